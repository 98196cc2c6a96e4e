"""From a moment of a table to the plain description of its rows that the engine scans."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from kalamdb.clock import EPOCH_2024_MS, SEQ_SHIFT
from kalamdb.schema import TypeName
from kalamdb.storage import HotRow, keys
from kalamdb.tables.hot import mark_table
from kalamdb.tables.layout import KEY, SEQ, Layout, physical_name, rows_to_batch
from kalamdb.tables.scan import FilePart, MemoryPart, Projection, ScanColumn, ScanPlan
from kalamdb.tables.segments import Segment
from kalamdb.tables.store import TableStore, TableView
from kalamdb.tables.transaction import Overlay
from kalamdb.types import SHARED_SCOPE, RowFlags, Scope, Seq, TableKind

_META_TYPE = b"kalam"
_PART_BYTES = 16_384
"""With what the engine keeps for it."""
_MARK_SCHEMA = pa.schema([pa.field(KEY, pa.binary()), pa.field(SEQ, pa.int64())])
_TYPED = frozenset({TypeName.UUID, TypeName.JSON, TypeName.FILE, TypeName.EMBEDDING})
"""Types whose Arrow form does not tell them; a result needs the metadata to show them as such."""
_TEXTS = frozenset({TypeName.UUID, TypeName.JSON, TypeName.FILE})
"""Types whose stored form is what Arrow holds."""


def scan_columns(layout: Layout) -> tuple[ScanColumn, ...]:
    """The table's columns as a statement sees them; the engine treats each as nullable."""
    out = []
    for column, codec in zip(layout.columns, layout.codecs, strict=True):
        metadata = {_META_TYPE: str(column.type).encode()} if column.type.name in _TYPED else None
        out.append(ScanColumn(column.name, pa.field(column.name, codec.physical, metadata=metadata)))
    return tuple(out)


def scan_plan(
    store: TableStore, view: TableView, overlay: Overlay | None = None, *, include_deleted: bool = False
) -> ScanPlan:
    """All rows of `view`, with the uncommitted changes of a transaction on top; tombstones too where they matter."""
    layout = store.layout(view.definition)
    if view.definition.kind is TableKind.STREAM:
        return _stream_plan(store, view, layout)
    start, end = scope_range(view.scope)
    segments = [segment for segment in view.state.segments if segment.overlaps(start, end)]
    later = [found for segment in segments if (found := store.segments.marks(segment, start, end)) is not None]
    if overlay is not None and overlay.changes:
        later.append(overlay.marks())
    # A key has one hot version, so hot marks hide cold rows only.
    hiding_hot, marked = _Marks(later), _Marks([*later, *mark_table(view.chunks)])
    parts: list[FilePart | MemoryPart] = [
        _file_part(store, view, segment, layout, marked, start, end)
        for segment in segments
        if include_deleted or segment.record.rows > segment.record.tombstones
    ]
    for version in sorted({chunk.version for chunk in view.chunks}):
        chunks = [chunk for chunk in view.chunks if chunk.version == version]
        written = store.layout_of(view.definition.uid)(version)
        parts.append(
            MemoryPart(
                tuple(chunk.batch for chunk in chunks),
                written.schema,
                projections(written.schema, layout),
                has_tombstones=any(chunk.tombstones for chunk in chunks),
                has_hidden=hiding_hot.may_hide(min(chunk.seq_min for chunk in chunks)),
            )
        )
    if overlay is not None and overlay.changes:
        batch = overlay.batch(layout)
        own = projections(layout.schema, layout)
        parts.append(MemoryPart((batch,), layout.schema, own, has_tombstones=False, has_hidden=False))
    needed = marked.table if any(part.has_hidden for part in parts) else None
    return ScanPlan(scan_columns(layout), tuple(parts), needed)


class _Marks:
    """The marks of a read, and which parts they may hide rows of."""

    def __init__(self, tables: Sequence[pa.Table]) -> None:
        self.table = pa.concat_tables([table.cast(_MARK_SCHEMA) for table in tables]) if tables else None
        self._newest = max((int(pc.max(table.column(SEQ)).as_py()) for table in tables if len(table)), default=0)

    def may_hide(self, oldest: Seq) -> bool:
        """Whether a row as old as `oldest` may be hidden."""
        return self._newest > oldest


def scope_range(scope: Scope) -> tuple[bytes, bytes]:
    """First row key of a scope, and the first one after it."""
    prefix = keys.scope_prefix(scope)
    end = keys.prefix_end(prefix)
    assert end is not None
    return prefix, end


def projections(schema: pa.Schema, layout: Layout) -> tuple[Projection, ...]:
    """Where the columns of `layout` come from in a part of this physical schema."""
    names = set(schema.names)
    return tuple(
        Projection(physical_name(column.id))
        if physical_name(column.id) in names
        else Projection(None, column.fill if column.type.name in _TEXTS else codec.load(column.fill))
        for column, codec in zip(layout.columns, layout.codecs, strict=True)
    )


def _file_part(
    store: TableStore, view: TableView, segment: Segment, layout: Layout, marks: _Marks, start: bytes, end: bytes
) -> FilePart:
    store.segments.verify(segment)
    has_hidden = marks.may_hide(segment.seq_min)

    def build() -> FilePart:
        schema = store.layout_of(view.definition.uid)(segment.record.schema_version).schema
        whole = view.scope == SHARED_SCOPE or (segment.record.key_min >= start and segment.record.key_max < end)
        return FilePart(
            segment.path,
            schema,
            projections(schema, layout),
            None if whole else start,
            None if whole else end,
            segment.seq_base,
            has_tombstones=segment.record.tombstones > 0,
            has_hidden=has_hidden,
            single_scope=whole or store.segments.separates(segment, start, end),
        )

    return store.segments.derived(segment, ("part", layout.version, start, has_hidden), build, _PART_BYTES)


def _stream_plan(store: TableStore, view: TableView, layout: Layout) -> ScanPlan:
    ttl_s = view.definition.options.ttl_s or 0
    oldest_ms = store.backend.now_ms() - ttl_s * 1000
    oldest_seq = max(oldest_ms - EPOCH_2024_MS, 0) << SEQ_SHIFT
    bucket = bucket_of(oldest_ms, ttl_s)
    with store.backend.snapshot() as snapshot:
        rows = [
            row
            for chunk in snapshot.stream(view.definition.uid, view.scope, from_bucket=bucket)
            for row in chunk
            if row.seq >= oldest_seq
        ]
    # The key of a stream's row is its bucket: with `_seq` and the scope it says which row is meant.
    hot = [HotRow(row.bucket.to_bytes(8, "big"), row.seq, RowFlags.NONE, row.payload) for row in rows]
    batch = rows_to_batch(hot, store.layout_of(view.definition.uid), layout)
    part = MemoryPart(
        (batch,), layout.schema, projections(layout.schema, layout), has_tombstones=False, has_hidden=False
    )
    return ScanPlan(scan_columns(layout), (part,), None)


def bucket_of(at_ms: int, ttl_s: int) -> int:
    """STREAM bucket of a moment: at most 64 buckets cover one TTL. Milliseconds at which it begins."""
    width_ms = bucket_width_ms(ttl_s)
    return max(at_ms, 0) // width_ms * width_ms


def bucket_width_ms(ttl_s: int) -> int:
    """How long a STREAM bucket is."""
    return max(-(-ttl_s * 1000 // 62), 1)


__all__ = ["KEY", "bucket_of", "projections", "scan_columns", "scan_plan", "scope_range"]
