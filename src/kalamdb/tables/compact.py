"""Compaction: a two-level LSM tree per table.

Level 0 holds runs that overlap; level 1 holds runs of disjoint key ranges with one live version per
key. Small runs pile up into larger level-0 runs until level 0 is a quarter of level 1; only then is
level 1 rewritten. Inputs are replaced by outputs in one commit that holds only while every input lives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kalamdb.catalog import CatalogEntry
from kalamdb.clock import seq_at_ms
from kalamdb.errors import TransactionConflict
from kalamdb.storage import ANY, Batch, ExpectationFailed, RecordKind, RecordOp, record_key
from kalamdb.tables.bulk import Naming, naming, publish
from kalamdb.tables.flush import JobHandle, Message
from kalamdb.tables.layout import FLAGS, KEY, SEQ, Layout, conform
from kalamdb.tables.mirror import write_mirror
from kalamdb.tables.segments import IntentRecord, Segment, SegmentRecord, write_segment
from kalamdb.tables.store import TableState, TableStore
from kalamdb.types import RowFlags, Seq, TableKind, TableUid

_LEVEL1_SHARE = 4
_NEWEST = (1 << 63) - 1
_HOUR_MS = 3_600_000


KeyRange = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True)
class CompactReport:
    """What a compaction did."""

    inputs: int
    outputs: int
    rows_before: int
    rows_after: int
    tombstones_before: int
    tombstones_after: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Which segments merge, into which level."""

    inputs: tuple[Segment, ...]
    level: int
    settled: Seq = 0
    """Outside the inputs no version is older than a version up to here that the inputs hold."""
    droppable: Seq = 0
    """Tombstones up to here have served their time."""
    without: KeyRange | None = None
    """Row keys that are left out: start (inclusive) and end (exclusive)."""


def choose(state: TableState, level0_segments_max: int, *, full: bool, droppable: Seq = 0) -> Plan | None:
    """What to merge now; None when nothing is worth it.

    `full` merges everything into level 1; tombstones at or below `droppable` are worth it then.
    """
    level0 = [segment for segment in state.segments if segment.record.level == 0]
    level1 = [segment for segment in state.segments if segment.record.level == 1]
    if full:
        stale = any(one.record.tombstones and one.seq_min <= droppable for one in level1)
        if not level0 and not stale:
            return None
        return Plan((*level0, *level1), 1)
    if len(level0) <= level0_segments_max:
        return None
    bytes0 = sum(segment.record.size_bytes for segment in level0)
    bytes1 = sum(segment.record.size_bytes for segment in level1)
    if bytes0 * _LEVEL1_SHARE < bytes1:
        return Plan(tuple(_similar(level0)), 0)
    return _into_base(state)


def _into_base(state: TableState, range_: KeyRange | None = None) -> Plan:
    """All of level 0, and what level 1 holds in their key range, and in `range_`."""
    level0 = [segment for segment in state.segments if segment.record.level == 0]
    ranges = [(segment.record.key_min, segment.record.key_max + b"\x00") for segment in level0]
    if range_ is not None:
        ranges.append(range_)
    low, high = min(start for start, _ in ranges), max(end for _, end in ranges)
    touched = [one for one in state.segments if one.record.level == 1 and one.overlaps(low, high)]
    return Plan((*level0, *touched), 1)


def _similar(level0: Sequence[Segment]) -> list[Segment]:
    """The small runs: all up to the first that is larger than everything before it together."""
    ordered = sorted(level0, key=lambda segment: segment.record.size_bytes)
    chosen, total = ordered[:2], sum(segment.record.size_bytes for segment in ordered[:2])
    for segment in ordered[2:]:
        if segment.record.size_bytes > total:
            break
        chosen.append(segment)
        total += segment.record.size_bytes
    return chosen


def needs_compaction(store: TableStore, uid: TableUid) -> bool:
    """Whether level 0 of the table has more segments than compaction.level0_segments_max."""
    return choose(store.state(uid), store.limits.level0_segments_max, full=False) is not None


def compact_table(
    store: TableStore,
    uid: TableUid,
    job: JobHandle,
    message: Message | None = None,
    *,
    full: bool = True,
    retention_hours: float | None = None,
) -> CompactReport | None:
    """Merge segments of a table; None when there is nothing to merge. With `message` it ends the job.

    `retention_hours` stands in for the table's own. Memory is bounded by the number of inputs. Blocks
    for the disk. Raises TransactionConflict when another compaction came first.
    """
    entry = store.entry(uid)
    if entry.definition.kind is TableKind.STREAM:
        return None
    settled = _settled(store, uid)
    droppable = min(expired_seq(store, entry, retention_hours), settled)
    plan = choose(store.state(uid), store.limits.level0_segments_max, full=full, droppable=droppable)
    if plan is None:
        return None
    return _carry_out(store, entry, replace(plan, settled=settled, droppable=droppable), job, message)


def erase_keys(store: TableStore, uid: TableUid, range_: KeyRange, job: JobHandle) -> CompactReport | None:
    """Rewrite the segments that hold row keys of a range without them; None when none does. Blocks."""
    entry = store.entry(uid)
    settled = _settled(store, uid)
    state = store.state(uid)
    if not any(segment.overlaps(*range_) for segment in state.segments):
        return None
    droppable = min(expired_seq(store, entry), settled)
    plan = replace(_into_base(state, range_), settled=settled, droppable=droppable, without=range_)
    return _carry_out(store, entry, plan, job, None)


def _carry_out(
    store: TableStore, entry: CatalogEntry, plan: Plan, job: JobHandle, message: Message | None
) -> CompactReport:
    with store.segments.pinned(plan.inputs):
        report = _compact(store, entry, plan, job, message)
    for segment in plan.inputs:
        store.segments.unlink(segment.record.segment_id, segment.path)
    write_mirror(store, entry)
    return report


def _compact(
    store: TableStore, entry: CatalogEntry, plan: Plan, job: JobHandle, message: Message | None
) -> CompactReport:
    fence = Batch()
    job.seal(fence)
    job_id, lease_id = job.intent_owner()
    owner = IntentRecord(segment_id="", job_id=job_id, lease_id=lease_id, process=store.process)
    with naming(store, entry, fence.jobs, owner) as names:
        outputs = _write_outputs(store, entry, plan, job, names)
        rows = [segment.record.rows for segment in plan.inputs]
        report = CompactReport(
            inputs=len(plan.inputs),
            outputs=len(outputs),
            rows_before=sum(rows),
            rows_after=sum(record.rows for record in outputs),
            tombstones_before=sum(segment.record.tombstones for segment in plan.inputs),
            tombstones_after=sum(record.tombstones for record in outputs),
            bytes_before=sum(segment.record.size_bytes for segment in plan.inputs),
            bytes_after=sum(record.size_bytes for record in outputs),
        )
        batch = Batch(names_files=True)
        batch.records = [store.alive(entry.definition.uid), *publish(store, entry, outputs, names, manifest=ANY)]
        batch.records += [
            RecordOp(
                record_key(RecordKind.SEGMENT, entry.definition.uid, segment.record.segment_id), None, segment.version
            )
            for segment in plan.inputs
        ]
        job.check()
        job.seal(batch, message=message and message(report), result=_figures(report))
        try:
            store.commit(batch)
        except ExpectationFailed as failed:
            raise TransactionConflict(
                f"segments of '{entry.definition.table_id}' changed during the compaction: {failed}"
            ) from failed
        names.published()
    return report


def _settled(store: TableStore, uid: TableUid) -> Seq:
    """What a segment holds up to this `_seq` is newer than no hot version. To be asked before the plan is made.

    Large statements write segments over hot rows. Their marks and tombstones must stay until the hot
    rows that they hide are flushed and merged with them; hot rows are above the watermark.
    """
    with store.hot.lock:
        pending = store.has_pending(uid)
        return store.state(uid).watermark if pending else _NEWEST


def _figures(report: CompactReport) -> dict[str, int]:
    return {name: getattr(report, name) for name in report.__slots__}


def _write_outputs(
    store: TableStore, entry: CatalogEntry, plan: Plan, job: JobHandle, names: Naming
) -> list[SegmentRecord]:
    layout = store.layout(entry.definition)
    total = sum(segment.record.rows for segment in plan.inputs)
    if plan.level == 0:
        rows = (merged for merged, _ in _merged(store, layout, plan, job))
        return _write_runs(store, layout, rows, names, level=0, rows_max=total)
    deletions = 0

    def live() -> Iterator[pa.Table]:
        nonlocal deletions
        for merged, deleted in _merged(store, layout, plan, job):
            deletions += len(deleted)
            yield merged

    bytes_per_row = sum(segment.record.size_bytes for segment in plan.inputs) / total
    rows_max = max(int(store.limits.segment_bytes_max / bytes_per_row), 1)
    outputs = _write_runs(store, layout, live(), names, level=1, rows_max=rows_max)
    if deletions:
        # Read once more rather than kept: there may be more of them than memory.
        kept = (deleted for _, deleted in _merged(store, layout, plan, job))
        outputs += _write_runs(store, layout, kept, names, level=1, rows_max=total)
    return outputs


def _merged(store: TableStore, layout: Layout, plan: Plan, job: JobHandle) -> Iterator[tuple[pa.Table, pa.Table]]:
    """(rows, deletions that stay) of the inputs of a plan, in key order; level 0 keeps both together."""
    total, done = sum(segment.record.rows for segment in plan.inputs), 0
    for merged, read in merge(store, layout, plan.inputs):
        job.check()
        done += read
        job.progress(done, total, "rows")
        if plan.without is not None:
            merged = _outside(merged, plan.without)
        if plan.level == 0:
            yield merged, merged.slice(0, 0)
            continue
        deleted = pa.array((merged.column(FLAGS).to_numpy() & RowFlags.DELETED) != 0)
        gone = merged.filter(deleted)
        gone = gone.filter(pc.greater(gone.column(SEQ), plan.droppable))
        yield _unmarked(merged.filter(pc.invert(deleted)), plan.settled), _unmarked(gone, plan.settled)


def _write_runs(
    store: TableStore, layout: Layout, rows: Iterator[pa.Table], names: Naming, *, level: int, rows_max: int
) -> list[SegmentRecord]:
    outputs: list[SegmentRecord] = []
    stream = _Stream(rows)
    while stream.has_more():
        _, path = names.next()
        record = write_segment(
            store.files,
            path,
            layout,
            stream.take(rows_max),
            row_group_rows_max=store.limits.row_group_rows_max,
            compression=store.limits.segment_compression,
        )
        assert record is not None
        outputs.append(msgspec.structs.replace(record, level=level, created_at=store.clock.now_ms()))
    return outputs


class _Stream:
    """A stream of rows that is taken in parts."""

    def __init__(self, source: Iterator[pa.Table]) -> None:
        self._source = source
        self._next: pa.Table | None = None

    def has_more(self) -> bool:
        """Whether a row is left."""
        if self._next is None:
            self._next = next((table for table in self._source if len(table)), None)
        return self._next is not None

    def take(self, rows_max: int) -> Iterator[pa.Table]:
        """The next `rows_max` rows."""
        left = rows_max
        while left and self.has_more():
            assert self._next is not None
            table = self._next
            part, rest = table.slice(0, left), table.slice(left)
            self._next = rest if len(rest) else None
            left -= len(part)
            yield part


def _outside(table: pa.Table, range_: KeyRange) -> pa.Table:
    start, end = range_
    column = table.column(KEY)
    return table.filter(pc.or_(pc.less(column, start), pc.greater_equal(column, end)))


def _unmarked(table: pa.Table, settled: Seq) -> pa.Table:
    """Rows without the marks up to `settled`: what those hid is gone."""
    flags = table.column(FLAGS).to_numpy()
    kept = np.where(table.column(SEQ).to_numpy() > settled, flags, flags & RowFlags.DELETED)
    column = pa.array(kept.astype(np.uint8))
    return table.set_column(table.schema.get_field_index(FLAGS), table.schema.field(FLAGS), column)


def expired_seq(store: TableStore, entry: CatalogEntry, retention_hours: float | None = None) -> Seq:
    """Tombstones up to this `_seq` are older than the table's retention and the resume window; 0 for none."""
    hours = entry.definition.options.deleted_retention_hours if retention_hours is None else retention_hours
    if hours is None:
        return 0
    age_ms = int(max(hours * _HOUR_MS, store.limits.tombstone_window_s * 1000))
    return seq_at_ms(store.clock.now_ms() - age_ms)


def merge(store: TableStore, layout: Layout, inputs: Sequence[Segment]) -> Iterator[tuple[pa.Table, int]]:
    """The newest version of each key, in key order, in pieces; with each the rows that were read for it."""

    def rows(segment: Segment) -> Iterator[pa.Table]:
        version = segment.record.schema_version
        return (conform(batch, layout, version) for batch in store.segments.scan(segment))

    for table in gather([rows(segment) for segment in inputs]):
        yield newest_per_key(table), len(table)


def gather(inputs: Sequence[Iterator[pa.Table]]) -> Iterator[pa.Table]:
    """Key-ordered streams of one schema as pieces, each with all rows of its keys, keys rising from piece to piece.

    Holds one batch per input: all rows up to the smallest last key among the batches can be settled.
    """
    sources = [_Source(tables) for tables in inputs]
    while sources := [source for source in sources if source.fill()]:
        bound = min(source.last_key() for source in sources)
        yield pa.concat_tables([part for source in sources if (part := source.take_through(bound)) is not None])


def newest_per_key(table: pa.Table) -> pa.Table:
    """The row with the greatest `_seq` of each key, in key order."""
    order = pc.sort_indices(table, sort_keys=[(KEY, "ascending"), (SEQ, "descending")])
    table = table.take(order).combine_chunks()
    column = table.column(KEY)
    if len(column) < 2:
        return table
    fresh = pc.not_equal(column.slice(1), column.slice(0, len(column) - 1))
    mask = pa.chunked_array([pa.array([True]), *fresh.chunks])
    return table.filter(mask)


class _Source:
    """One input of `gather`, batch by batch."""

    def __init__(self, tables: Iterator[pa.Table]) -> None:
        self._tables = tables
        self._table: pa.Table | None = None

    def fill(self) -> bool:
        """Make sure that there is a batch; False at the end."""
        if self._table is None or not len(self._table):
            self._table = next((table for table in self._tables if len(table)), None)
        return self._table is not None

    def last_key(self) -> bytes:
        """Last key of the batch."""
        assert self._table is not None
        key: bytes = self._table.column(KEY)[-1].as_py()
        return key

    def take_through(self, bound: bytes) -> pa.Table | None:
        """Rows with key <= bound, taken out of the batch."""
        assert self._table is not None
        count = int(pc.sum(pc.less_equal(self._table.column(KEY), bound)).as_py() or 0)
        taken, self._table = self._table.slice(0, count), self._table.slice(count)
        return taken if count else None
