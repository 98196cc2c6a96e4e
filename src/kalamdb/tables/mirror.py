"""`manifest.json`: a mirror of the segment records beside the files, in the original's shape.

The store's records are the truth; a database can be made anew from the mirrors and the segments.
"""

from __future__ import annotations

from typing import Any

import msgspec

from kalamdb.catalog import CatalogEntry
from kalamdb.errors import KalamDbError
from kalamdb.tables.segments import Segment
from kalamdb.tables.store import TableState, TableStore
from kalamdb.types import TableKind

MIRROR_NAME = "manifest.json"


def segment_json(segment: Segment) -> dict[str, Any]:
    """One segment as the mirror and system.manifest show it."""
    record = segment.record
    return {
        "id": record.segment_id,
        "path": segment.path.name,
        "level": record.level,
        "column_stats": {
            str(column_id): {"min": low, "max": high, "null_count": nulls}
            for column_id, (low, high, nulls) in record.column_stats.items()
        },
        "min_seq": segment.seq_min,
        "max_seq": segment.seq_max,
        "row_count": record.rows,
        "size_bytes": record.size_bytes,
        "crc32": record.crc32,
        "tombstones": record.tombstones,
        "marks": record.marks,
        "users": record.users,
        "min_key": record.key_min.hex(),
        "max_key": record.key_max.hex(),
        "seq_base": segment.seq_base,
        "created_at": record.created_at,
        "schema_version": record.schema_version,
        "status": "committed",
    }


def manifest_json(entry: CatalogEntry, state: TableState) -> dict[str, Any]:
    """The manifest of a table."""
    definition = entry.definition
    scope = "shared" if definition.kind is TableKind.SHARED else "all"
    return {
        "table_id": f"{definition.namespace}:{definition.name}",
        "uid": definition.uid,
        "scope": scope,
        "user_id": None,
        "version": state.manifest_version,
        "watermark": state.watermark,
        "segments": [segment_json(segment) for segment in state.segments],
        "last_sequence_number": max((segment.seq_max for segment in state.segments), default=0),
        "schema": msgspec.to_builtins(definition),
    }


def mirror_body(entry: CatalogEntry, state: TableState) -> bytes:
    """The mirror of a table as a file holds it."""
    return msgspec.json.format(msgspec.json.encode(manifest_json(entry, state)))


def write_mirror(store: TableStore, entry: CatalogEntry) -> None:
    """Bring the mirror of a table up to date. A failure is logged: the next change writes it again."""
    uid = entry.definition.uid
    path = store.folder_of(entry.definition) / MIRROR_NAME
    # One at a time, with the state read inside: an older one never replaces a newer one, and of many that
    # wait the first does the work of all.
    with store.mirroring:
        current, state = store.catalog.by_uid(uid), store.state(uid)
        if current is None:
            return
        shown = (state.manifest_version, current.definition.version)
        if store.mirrored.get(uid) == shown:
            return
        body = mirror_body(current, state)
        try:
            store.files.replace(path, body)
        except KalamDbError as exc:
            store.log.warning("the mirror '%s' was not written: %s", path, exc)
            return
        store.mirrored[uid] = shown
