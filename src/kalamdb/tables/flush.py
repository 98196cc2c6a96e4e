"""Flush: the hot rows of a table become one level-0 segment, then one commit of constant size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import pyarrow as pa

from kalamdb.catalog import CatalogEntry
from kalamdb.errors import NotFound, TransactionConflict
from kalamdb.storage import (
    ABSENT,
    ANY,
    Batch,
    ExpectationFailed,
    RecordKind,
    RecordOp,
    Retire,
    Snapshot,
    record_key,
)
from kalamdb.tables.bulk import naming, publish
from kalamdb.tables.layout import rows_to_batch
from kalamdb.tables.mirror import write_mirror
from kalamdb.tables.segments import IntentRecord, SegmentRecord, write_segment
from kalamdb.tables.store import TableStore
from kalamdb.types import TableKind, TableUid


class JobHandle(Protocol):
    """What the tables need of the job that they work for."""

    def check(self) -> None:
        """Raise when the job must stop."""
        ...

    def progress(self, done: int, total: int | None = None, unit: str = "", text: str = "") -> None:
        """Say how far the work is."""
        ...

    def seal(self, batch: Batch, *, message: str | None = None, result: Any = None) -> None:
        """Bind a batch to the job's lease; with `message` the batch also ends the job as completed."""
        ...

    def intent_owner(self) -> tuple[str, int]:
        """(job id, lease id) for the intents of files."""
        ...


@dataclass(frozen=True, slots=True)
class FlushReport:
    """What a flush did."""

    rows: int
    users: int
    """0 for SHARED tables."""
    segments: int
    bytes: int
    path: str


class Step:
    """A job handle for a part of a longer job, which shows progress of its own."""

    def __init__(self, job: JobHandle) -> None:
        self.check = job.check
        self.seal = job.seal
        self.intent_owner = job.intent_owner

    def progress(self, done: int, total: int | None = None, unit: str = "", text: str = "") -> None:
        """Left to the whole job."""


Message = Callable[[Any], str]
"""The last words of a job, from the report of its work."""


def flush_table(store: TableStore, uid: TableUid, job: JobHandle, message: Message | None = None) -> FlushReport | None:
    """Write all hot rows of a table to one segment; None when nothing is hot. With `message` it ends the job.

    Memory is bounded whatever the size of the table. Blocks for the disk.
    """
    entry = store.entry(uid)
    if entry.definition.kind is TableKind.STREAM or not store.has_pending(uid):
        return None
    with store.backend.snapshot() as snapshot:
        watermark = snapshot.seq
        entry = store.entry(uid)
        with store.hot.lock:
            store.figures(uid).flush_seq = watermark
        try:
            return _flush(store, entry, snapshot, job, message)
        finally:
            with store.hot.lock:
                store.figures(uid).flush_seq = 0


def _flush(
    store: TableStore, entry: CatalogEntry, snapshot: Snapshot, job: JobHandle, message: Message | None
) -> FlushReport | None:
    uid, watermark = entry.definition.uid, snapshot.seq
    layout = store.layout(entry.definition)
    erased = unerased(snapshot, uid)
    fence = Batch()
    job.seal(fence)
    job_id, lease_id = job.intent_owner()
    owner = IntentRecord(segment_id="", job_id=job_id, lease_id=lease_id, process=store.process)
    with naming(store, entry, fence.jobs, owner) as names:
        segment_id, path = names.next()
        record = write_segment(
            store.files,
            path,
            layout,
            _hot_batches(store, entry, snapshot, job),
            row_group_rows_max=store.limits.row_group_rows_max,
            compression=store.limits.segment_compression,
        )
        if record is None:
            # Whoever's rows these were is erased: nothing is pending any more.
            fence.retire = [Retire(uid, watermark)]
            store.commit(fence)
            return None
        record = msgspec.structs.replace(record, created_at=store.clock.now_ms())
        report = _report(record, path, entry.definition.kind)
        job.check()
        batch = Batch(retire=[Retire(uid, watermark)], names_files=True)
        batch.records = [store.alive(uid), erased, *publish(store, entry, [record], names, manifest=ANY)]
        job.seal(batch, message=message and message(report), result=_figures(report))
        try:
            store.commit(batch)
        except ExpectationFailed as failed:
            name = entry.definition.table_id
            if failed.key == erased.key:
                raise TransactionConflict(f"rows of '{name}' were erased during the flush; flush again") from failed
            raise NotFound(f"table '{name}' was dropped during the flush") from failed
        names.published()
    write_mirror(store, entry)
    return report


def unerased(snapshot: Snapshot, uid: TableUid) -> RecordOp:
    """Check that no rows of the table were erased since the snapshot, which holds them."""
    key = record_key(RecordKind.ERASED, uid)
    found = snapshot.records([key])[0]
    return RecordOp(key, expect=found.version if found is not None else ABSENT, check=True)


def _hot_batches(store: TableStore, entry: CatalogEntry, snapshot: Snapshot, job: JobHandle) -> Iterator[pa.Table]:
    layout, layout_of = store.layout(entry.definition), store.layout_of(entry.definition.uid)
    with store.hot.lock:
        total = store.figures(entry.definition.uid).rows
    done = 0
    for chunk in snapshot.hot(entry.definition.uid):
        job.check()
        yield pa.Table.from_batches([rows_to_batch(chunk, layout_of, layout)])
        done += len(chunk)
        job.progress(done, max(total, done), "rows")


def _report(record: SegmentRecord, path: Path, kind: TableKind) -> FlushReport:
    users = 0 if kind is TableKind.SHARED else record.users
    return FlushReport(record.rows, users, 1, record.size_bytes, str(path))


def _figures(report: FlushReport) -> dict[str, int]:
    return {"rows": report.rows, "users": report.users, "segments": report.segments, "bytes": report.bytes}
