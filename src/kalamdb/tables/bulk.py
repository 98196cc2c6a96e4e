"""Segments that a statement writes itself: named, written, checked, published in one commit.

A statement with more rows than a batch may carry becomes one level-0 segment per table. Its rows get
their `_seq` from the commit (the file holds 1..n, see `SegmentRecord.relative`), and the commit holds
only if no key of it was written since it was checked.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kalamdb.catalog import CatalogEntry
from kalamdb.clock import ulid
from kalamdb.errors import TransactionConflict
from kalamdb.storage import (
    ABSENT,
    Batch,
    Commit,
    ExpectationFailed,
    JobOp,
    RecordKind,
    RecordOp,
    record_key,
)
from kalamdb.storage.jobs import fence_of
from kalamdb.tables.layout import KEY
from kalamdb.tables.mirror import write_mirror
from kalamdb.tables.segments import IntentRecord, SegmentRecord, matches, write_segment
from kalamdb.tables.store import Moment, TableState, TableStore, Version, Watch
from kalamdb.types import RowFlags, Scope, Seq

_HOT_LOOKUP_ROWS = 65_536
"""Hot rows that are looked up among the keys of a large statement at once."""

JobOps = Sequence[JobOp]


@dataclass(frozen=True, slots=True)
class Checked:
    """The moment at which the keys of a draft were looked up."""

    seq: Seq
    manifest_version: Seq


@dataclass(slots=True)
class SegmentDraft:
    """Rows of one table that are to become a segment."""

    entry: CatalogEntry
    scopes: tuple[Scope, ...]
    rows: pa.Table
    """In the segment schema, sorted by row key, each key once, `_seq` 1..n."""
    expected: dict[int, Seq] = field(default_factory=dict)
    """Row index -> newest version that it replaces; rows not named expect none."""
    checked: Checked | None = None
    """When `expected` was found so, where the caller knows it."""


class Naming:
    """Names files by intent before they are created, and cleans up names that are not published.

    Each commit of it is fenced by the leases that `jobs` carries.
    """

    def __init__(
        self, store: TableStore, entry: CatalogEntry, jobs: JobOps = (), owner: IntentRecord | None = None
    ) -> None:
        self._store = store
        self._entry = entry
        self._fences = [fence for op in jobs if (fence := fence_of(op)) is not None]
        self._owner = owner or IntentRecord(segment_id="", process=store.process)
        self._names: dict[str, Seq] = {}

    def next(self) -> tuple[str, Path]:
        """A fresh name, its intent durable: (segment id, path)."""
        store, uid = self._store, self._entry.definition.uid
        segment_id = ulid(store.clock)
        intent = msgspec.structs.replace(self._owner, segment_id=segment_id)
        op = RecordOp(record_key(RecordKind.INTENT, uid, segment_id), msgspec.msgpack.encode(intent), ABSENT)
        store.drafting.add(segment_id)
        try:
            batch = Batch(records=[op, store.alive(uid)], jobs=list(self._fences), names_files=True)
            self._names[segment_id] = store.commit(batch).seq
        except BaseException:
            store.drafting.discard(segment_id)
            raise
        return segment_id, store.path_of(self._entry.definition, segment_id)

    def release(self, segment_id: str) -> RecordOp:
        """The operation that ends the intent; part of the commit that publishes the file."""
        key = record_key(RecordKind.INTENT, self._entry.definition.uid, segment_id)
        return RecordOp(key, None, self._names[segment_id])

    def published(self) -> None:
        """All names are segments now."""
        for segment_id in self._names:
            self._store.drafting.discard(segment_id)
        self._names.clear()

    def abandon(self) -> None:
        """Take the names back, then remove the files. What fails, for want of the lease too, is left to the sweep."""
        store = self._store
        for segment_id in list(self._names):
            path = store.path_of(self._entry.definition, segment_id)
            try:
                store.commit(Batch(records=[self.release(segment_id)], jobs=list(self._fences), names_files=True))
                store.files.unlink(path)
            except Exception:  # noqa: BLE001 - the first error is the one to report; the sweep removes the file
                store.log.debug("segment file '%s' is left to the sweep", path)
            store.drafting.discard(segment_id)
        self._names.clear()


@contextmanager
def naming(
    store: TableStore, entry: CatalogEntry, jobs: JobOps = (), owner: IntentRecord | None = None
) -> Iterator[Naming]:
    """Names for new files of a table; those not published when the block ends are taken back.

    A crash inside, or the loss of the lease, leaves intents and files; the sweep removes both.
    """
    names = Naming(store, entry, jobs, owner)
    try:
        yield names
    finally:
        names.abandon()


def publish(
    store: TableStore, entry: CatalogEntry, records: Iterable[SegmentRecord], names: Naming, *, manifest: Seq
) -> list[RecordOp]:
    """The record operations that make written files live. `manifest`: its expected version, or ANY."""
    uid = entry.definition.uid
    ops = [RecordOp(record_key(RecordKind.MANIFEST, uid), b"", manifest)]
    for record in records:
        key = record_key(RecordKind.SEGMENT, uid, record.segment_id)
        ops += [RecordOp(key, msgspec.msgpack.encode(record), ABSENT), names.release(record.segment_id)]
        store.files.check_size(store.path_of(entry.definition, record.segment_id), record.size_bytes)
    return ops


def commit_drafts(
    store: TableStore, drafts: Sequence[SegmentDraft], *, jobs: JobOps = (), records: Sequence[RecordOp] = ()
) -> Commit:
    """Write each draft as a segment and publish all in one commit, with jobs and records; durable on return.

    `jobs` go with that commit; the leases that they hold by fence the names of the files before it.
    Raises ExpectationFailed when a key is not at its expected version any more, LeaseLost.
    """
    with ExitStack() as stack:
        watches = [stack.enter_context(store.watch(draft.entry.definition.uid)) for draft in drafts]
        written: list[tuple[SegmentDraft, Naming, SegmentRecord]] = []
        for draft in drafts:
            names = stack.enter_context(naming(store, draft.entry, jobs))
            segment_id, path = names.next()
            layout = store.layout(draft.entry.definition)
            record = write_segment(
                store.files,
                path,
                layout,
                [draft.rows],
                row_group_rows_max=store.limits.row_group_rows_max,
                compression=store.limits.segment_compression,
            )
            assert record is not None
            record = msgspec.structs.replace(record, relative=True, created_at=store.clock.now_ms())
            written.append((draft, names, record))
        commit = _publish_checked(store, written, watches, jobs, records)
        for _, names, _ in written:
            names.published()
    for draft in drafts:
        write_mirror(store, draft.entry)
    return commit


def _publish_checked(
    store: TableStore,
    written: Sequence[tuple[SegmentDraft, Naming, SegmentRecord]],
    watches: Sequence[Watch],
    jobs: JobOps,
    records: Sequence[RecordOp],
) -> Commit:
    # What the caller checked before the watches began holds as long as nobody wrote since. Otherwise
    # the keys are looked up again, and from then on the watches tell which keys were written.
    known = [draft.checked for draft, _, _ in written]
    checks = [one for one in known if one is not None] if None not in known else None
    watched = False
    for _ in range(store.limits.conflict_retries):
        if checks is None:
            checks, watched = _check_all(store, [draft for draft, _, _ in written]), True
        batch = Batch(jobs=list(jobs), records=list(records), names_files=True)
        for (draft, names, record), watch, check in zip(written, watches, checks, strict=True):
            seq = max(check.seq, _check_watch(store, draft, watch)) if watched else check.seq
            batch.quiet.append((draft.entry.definition.uid, seq))
            alive = {op.key: op for op in store.preconditions(draft.entry, draft.scopes)}
            batch.hints.update((draft.entry.definition.uid, scope) for scope in draft.scopes)
            batch.records += alive.values()
            batch.records += publish(store, draft.entry, [record], names, manifest=check.manifest_version)
            batch.reserve = max(batch.reserve, record.rows)
        try:
            return store.commit(batch)
        except ExpectationFailed as failed:
            moved = failed.what == "record" and failed.key[:1] == bytes([RecordKind.MANIFEST])
            if failed.what != "quiet" and not moved:
                raise
            if moved or not watched:
                checks = None
    raise TransactionConflict("the tables kept changing while a large statement was committed; try again")


def _check_all(store: TableStore, drafts: Sequence[SegmentDraft]) -> list[Checked]:
    """Look all keys up; raises ExpectationFailed when one is not at its expected version any more."""
    with store.frozen() as moment:
        states = [moment.state(draft.entry) for draft in drafts]
        for draft, state in zip(drafts, states, strict=True):
            _check_expected(store, draft, moment, state)
        return [Checked(moment.snapshot.seq, state.manifest_version) for state in states]


def _check_watch(store: TableStore, draft: SegmentDraft, watch: Watch) -> Seq:
    with store.hot.lock:
        changed, watch.keys = watch.keys, []
        seq = watch.seq
    view = draft.rows.column(KEY)
    for key in changed:
        if index_of(view, key) is not None:
            raise _stale(draft, seq)
    return seq


def index_of(column: pa.ChunkedArray, key: bytes) -> int | None:
    """Index of `key` in a sorted key column."""
    at = bisect_left(range(len(column)), key, key=lambda index: column[index].as_py())
    return at if at < len(column) and column[at].as_py() == key else None


def _stale(draft: SegmentDraft, seq: Seq) -> ExpectationFailed:
    return ExpectationFailed(
        f"a row of '{draft.entry.definition.table_id}' was changed meanwhile", what="row", found=seq
    )


def _check_expected(store: TableStore, draft: SegmentDraft, moment: Moment, state: TableState) -> None:
    hits = existing(store, draft.entry, draft.rows.column(KEY), moment, state, draft.scopes)
    if {index: version.seq for index, version in hits.items()} != draft.expected:
        raise _stale(draft, moment.snapshot.seq)


def existing(
    store: TableStore,
    entry: CatalogEntry,
    column: pa.ChunkedArray,
    moment: Moment,
    state: TableState,
    scopes: Sequence[Scope],
) -> dict[int, Version]:
    """Newest version, tombstones included, of those keys of a sorted key column that have one.

    Costs a pass over the hot rows of the scopes and over the row groups that overlap the keys.
    """
    hits: dict[int, Version] = {}
    if not len(column):
        return hits
    one_scope = scopes[0] if len(scopes) == 1 else None
    sought = column.combine_chunks()
    for chunk in moment.snapshot.hot(entry.definition.uid, one_scope, chunk_rows=_HOT_LOOKUP_ROWS):
        for index, position in matches(pa.array([row.key for row in chunk], pa.binary()), sought):
            row = chunk[index]
            hits[position] = Version(row.seq, row.flags, row.payload)
    for segment in state.segments:
        for index, found in store.segments.find_many(segment, column):
            if index not in hits or hits[index].seq < found.seq:
                hits[index] = Version(found.seq, found.flags, found=found)
    return hits


def sort_by_key(table: pa.Table) -> tuple[pa.Table, int | None]:
    """Rows in key order, numbered 1..n; and the index of a key that stands twice."""
    table = table.take(pc.sort_indices(table, sort_keys=[(KEY, "ascending")])).combine_chunks()
    column = table.column(KEY)
    if len(column) > 1:
        same = pc.equal(column.slice(1), column.slice(0, len(column) - 1))
        at = pc.index(same, True).as_py()
        if at >= 0:
            return table, int(at)
    return table.set_column(1, "_seq", pa.array(np.arange(1, len(table) + 1, dtype=np.int64))), None


def with_flags(rows: pa.Table, hits: dict[int, Version]) -> pa.Table:
    """Rows with the mark set on those that replace a version."""
    flags = np.zeros(len(rows), np.uint8)
    if hits:
        flags[np.fromiter(hits, np.int64, len(hits))] = RowFlags.SUPERSEDES
    return rows.set_column(2, rows.schema.field(2), pa.array(flags))
