"""Removing files: what a dropped table left, and names without record or live intent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from kalamdb.schema import TableDef
from kalamdb.storage import (
    Batch,
    ExpectationFailed,
    Record,
    RecordKind,
    RecordOp,
    Snapshot,
    record_key,
    record_prefix,
    record_uid,
)
from kalamdb.storage.jobs import JobFilter, JobStatus
from kalamdb.tables.flush import JobHandle
from kalamdb.tables.mirror import MIRROR_NAME
from kalamdb.tables.segments import IntentRecord, SegmentRecord
from kalamdb.tables.store import TableStore
from kalamdb.types import JobId, TableUid

_STEP_RECORDS = 500
_ACTIVE = frozenset(status for status in JobStatus if status.is_active)


@dataclass(frozen=True, slots=True)
class CleanupReport:
    """What a cleanup removed."""

    files: int = 0
    bytes: int = 0
    hot_rows: int = 0


class DroppedTable(msgspec.Struct, frozen=True):
    """What DROP TABLE leaves for the cleanup: the last definition."""

    definition: TableDef
    dropped_at: int = 0


def dropped_tables(store: TableStore) -> list[TableUid]:
    """Tables whose cleanup is not done."""
    with store.backend.snapshot() as snapshot:
        found = list(snapshot.scan_records(*record_prefix(RecordKind.DROPPED)))
    return [record_uid(key) for key, _ in found]


def drop_leftovers(
    store: TableStore, uid: TableUid, job: JobHandle, message: Callable[[CleanupReport], str]
) -> CleanupReport | None:
    """Un-name and remove the files of a dropped table, end the job; None when there is nothing left of it.

    Everything is found by the uid, so a table re-created under the name is never touched. Blocks for the disk.
    """
    left = _remove_dropped(store, uid, job)
    if left is None:
        return None
    report, batch = left
    job.seal(batch, message=message(report), result={"files": report.files, "bytes": report.bytes})
    store.commit(batch)
    return report


def _remove_dropped(store: TableStore, uid: TableUid, job: JobHandle) -> tuple[CleanupReport, Batch] | None:
    """Un-name and remove the files of a dropped table; what was removed, and the batch that forgets the table."""
    key = record_key(RecordKind.DROPPED, uid)
    with store.backend.snapshot() as snapshot:
        stored = snapshot.records([key])[0]
        if stored is None:
            return None
        definition = msgspec.msgpack.decode(stored.value, type=DroppedTable).definition
        named = _named(snapshot, uid)
    for at in range(0, len(named), _STEP_RECORDS):
        job.check()
        batch = Batch(records=[op for _, op, _ in named[at : at + _STEP_RECORDS]], names_files=True)
        job.seal(batch)
        store.commit(batch)
        job.progress(min(at + _STEP_RECORDS, len(named)), len(named), "files")
    files = bytes_ = 0
    for segment_id, _, size in named:
        store.drafting.discard(segment_id)
        store.segments.unlink(segment_id, store.path_of(definition, segment_id))
        files += size > 0
        bytes_ += size
    bytes_ += _remove_folder(store, definition)
    batch = Batch(names_files=True)
    batch.records = [RecordOp(key, None, stored.version)]
    for kind in (RecordKind.MANIFEST, RecordKind.WATERMARK, RecordKind.REMOVAL, RecordKind.ERASED):
        batch.records.append(RecordOp(record_key(kind, uid), None))
    batch.delete_tables.append(uid)
    return CleanupReport(files, bytes_), batch


def _named(snapshot: Snapshot, uid: TableUid) -> list[tuple[str, RecordOp, int]]:
    out = []
    for key, stored in snapshot.scan_records(*record_prefix(RecordKind.SEGMENT, uid)):
        record = msgspec.msgpack.decode(stored.value, type=SegmentRecord)
        out.append((record.segment_id, RecordOp(key, None, stored.version), record.size_bytes))
    for key, stored in snapshot.scan_records(*record_prefix(RecordKind.INTENT, uid)):
        intent = msgspec.msgpack.decode(stored.value, type=IntentRecord)
        out.append((intent.segment_id, RecordOp(key, None, stored.version), 0))
    return out


def _remove_folder(store: TableStore, definition: TableDef) -> int:
    return sum(_empty_folder(store, store.folder_of(definition), store.root_of(definition)))


def _empty_folder(store: TableStore, folder: Path, root: Path) -> list[int]:
    """Remove a folder that no table owns; the bytes of each file that was in it."""
    freed = []
    # Under the lock of the mirror: who waits to write it finds the table gone, and makes no folder anew.
    with store.mirroring:
        for path in store.files.names(folder):
            freed.append(store.files.size(path))
            store.files.unlink(path)
        store.files.remove_empty(folder, stop=root)
    return freed


def sweep(
    store: TableStore, uid: TableUid | None, job: JobHandle, message: Callable[[CleanupReport], str]
) -> CleanupReport:
    """Remove files that neither a record nor a live intent names, of one table or of all; end the job.

    A sweep of all also takes up dropped tables whose own cleanup was cancelled or failed.
    """
    entries = store.catalog.tables() if uid is None else [store.entry(uid)]
    files = bytes_ = 0
    for dropped in dropped_tables(store) if uid is None else ():
        cleaned = _take_up(store, dropped, job)
        files += cleaned.files
        bytes_ += cleaned.bytes
    for at, entry in enumerate(entries):
        job.check()
        swept = _sweep_table(store, entry.definition, job)
        files += swept.files
        bytes_ += swept.bytes
        job.progress(at + 1, len(entries), "tables")
    if uid is None:
        for freed in _sweep_strangers(store, {str(entry.definition.uid) for entry in entries}):
            files += 1
            bytes_ += freed
    report = CleanupReport(files, bytes_)
    batch = Batch()
    job.seal(batch, message=message(report), result={"files": files, "bytes": bytes_})
    store.commit(batch)
    return report


def _take_up(store: TableStore, uid: TableUid, job: JobHandle) -> CleanupReport:
    """Finish the cleanup of a dropped table unless its own job still will."""
    if store.backend.jobs.query(JobFilter(statuses=_ACTIVE, table_uid=uid, limit=1)):
        return CleanupReport()
    try:
        left = _remove_dropped(store, uid, job)
        if left is None:
            return CleanupReport()
        report, batch = left
        job.seal(batch)
        store.commit(batch)
    except ExpectationFailed:
        # Its own job was run again meanwhile and came first.
        return CleanupReport()
    return report


def _sweep_table(store: TableStore, definition: TableDef, job: JobHandle) -> CleanupReport:
    mirror = store.folder_of(definition) / MIRROR_NAME
    unfinished = store.files.temporary(mirror)
    with store.mirroring:
        # Nobody writes the mirror now, so this is what a crash left.
        if unfinished.exists():
            store.files.unlink(unfinished)
    # The listing comes first: a file that is seen had its intent before it, so the later snapshot
    # shows for each listed file either its record, its intent, or that it is nobody's.
    listed = [path for path in store.files.names(mirror.parent) if path not in (mirror, unfinished)]
    with store.backend.snapshot() as snapshot:
        live = {
            msgspec.msgpack.decode(stored.value, type=SegmentRecord).segment_id
            for _, stored in snapshot.scan_records(*record_prefix(RecordKind.SEGMENT, definition.uid))
        }
        intents = list(snapshot.scan_records(*record_prefix(RecordKind.INTENT, definition.uid)))
    spared = set(live)
    for key, stored in intents:
        intent = msgspec.msgpack.decode(stored.value, type=IntentRecord)
        if _is_alive(store, intent) or not _end_intent(store, key, stored, job):
            spared.add(intent.segment_id)
    files = bytes_ = 0
    for path in listed:
        if path.stem in spared:
            continue
        size = store.files.size(path)
        if store.segments.unlink(path.stem, path):
            files += 1
            bytes_ += size
    return CleanupReport(files, bytes_)


def _is_alive(store: TableStore, intent: IntentRecord) -> bool:
    if intent.process == store.process and intent.segment_id in store.drafting:
        return True
    if intent.job_id is None or intent.lease_id is None:
        return False
    row = store.backend.jobs.get(JobId(intent.job_id))
    return row is not None and row.status is JobStatus.RUNNING and row.lease_id == intent.lease_id


def _end_intent(store: TableStore, key: bytes, stored: Record, job: JobHandle) -> bool:
    batch = Batch(records=[RecordOp(key, None, stored.version)], names_files=True)
    job.seal(batch)
    try:
        store.commit(batch)
    except ExpectationFailed:
        return False
    return True


def _sweep_strangers(store: TableStore, known: set[str]) -> list[int]:
    """Folders of uids that are neither live nor waiting for their cleanup."""
    freed: list[int] = []
    listed = [(root, folder) for root in store.storages.roots() for folder in store.files.folders(root, depth=3)]
    for root, folder in listed:
        if folder.name in known or not folder.name.isdigit():
            continue
        uid = TableUid(int(folder.name))
        with store.backend.snapshot() as snapshot:
            table, dropped = snapshot.records([record_key(RecordKind.TABLE, uid), record_key(RecordKind.DROPPED, uid)])
        if table is not None or dropped is not None:
            continue
        freed += _empty_folder(store, folder, root)
    return freed


__all__ = ["CleanupReport", "DroppedTable", "drop_leftovers", "dropped_tables", "sweep"]
