"""Changes before they are committed: the overlay of a transaction and the commit of a group of changes.

Every DML statement becomes `Change`s: a row key, what to write, and which version it replaces. Outside
a transaction they are committed at once; inside they wait in an overlay that later statements read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import pyarrow as pa

from kalamdb.catalog import CatalogEntry
from kalamdb.errors import Closed, InvalidRequest, LimitExceeded, TransactionConflict
from kalamdb.service import may_block
from kalamdb.storage import (
    ABSENT,
    Batch,
    Commit,
    ExpectationFailed,
    JobOp,
    RecordKind,
    RecordOp,
    RowOp,
    keys,
    record_uid,
)
from kalamdb.tables.bulk import SegmentDraft, commit_drafts
from kalamdb.tables.layout import KEY, SEQ, Layout, Row
from kalamdb.tables.store import Moment, TableStore, Version, conflict
from kalamdb.types import RowFlags, Scope, Seq, TableKind, TableUid

_CHANGE_OVERHEAD = 256
_MARK, _TOMBSTONE = int(RowFlags.SUPERSEDES), int(RowFlags.DELETED)
_INFINITE = (1 << 63) - 1
"""`_seq` of marks that hide every committed version."""


class Change(msgspec.Struct, frozen=True, gc=False):
    """Write `row` under `key`, or delete the key when `row` is None. `expect` is the newest version now."""

    key: bytes
    row: Row | None
    expect: Seq
    former: Row | None = None
    """For a delete: the row that goes."""

    @property
    def flags(self) -> int:
        """Bits of RowFlags of the version that this change makes."""
        return (0 if self.expect == ABSENT else _MARK) | (_TOMBSTONE if self.row is None else 0)


@dataclass(slots=True)
class ChangeGroup:
    """Changes of one table for some scopes (one, inside a transaction), decided under one manifest version."""

    entry: CatalogEntry
    scopes: tuple[Scope, ...]
    manifest_version: Seq
    changes: list[Change] = field(default_factory=list)


def commit_groups(
    store: TableStore,
    groups: Sequence[ChangeGroup],
    *,
    jobs: Sequence[JobOp] = (),
    records: Sequence[RecordOp] = (),
) -> Commit | None:
    """Commit changes of any number of tables, and jobs and records with them, in one step, durable on return.

    Few rows go to the hot tier, many as one segment per table. Raises ExpectationFailed when a key is
    no longer at its expected version, and what `TableStore.commit` raises.
    """
    groups = [group for group in groups if group.changes]
    total = sum(len(group.changes) for group in groups)
    if total == 0 and not jobs and not records:
        return None
    store.wait_for_room()
    if total > store.limits.batch_rows_max:
        drafts = [_draft(store, group) for group in groups]
        return commit_drafts(store, drafts, jobs=jobs, records=records)
    batch = Batch(jobs=list(jobs))
    checks: dict[bytes, RecordOp] = {}
    for group in groups:
        layout = store.layout(group.entry.definition)
        uid = group.entry.definition.uid
        batch.manifests[uid] = min(batch.manifests.get(uid, group.manifest_version), group.manifest_version)
        batch.hints.update((uid, scope) for scope in group.scopes)
        for check in store.preconditions(group.entry, group.scopes):
            checks[check.key] = check
        batch.rows += [
            RowOp(
                uid,
                change.key,
                layout.payload(_stored(layout, change)),
                change.flags,
                change.expect,
            )
            for change in group.changes
        ]
    batch.records = [*checks.values(), *records]
    return _commit_rechecked(store, groups, batch)


def _stored(layout: Layout, change: Change) -> Row:
    """What is stored of a change: a tombstone keeps the primary key."""
    if change.row is not None:
        return change.row
    former = change.former
    kept = layout.pk_indexes if former is not None else ()
    return tuple(former[index] if former and index in kept else None for index in range(len(layout.columns)))


def _commit_rechecked(store: TableStore, groups: Sequence[ChangeGroup], batch: Batch) -> Commit:
    """Commit; when only the manifest moved (a flush or a compaction), look the keys up again and go on."""
    for _ in range(store.limits.conflict_retries):
        try:
            return store.commit(batch)
        except ExpectationFailed as failed:
            if failed.what != "manifest":
                raise
        for group in groups:
            row_keys = [change.key for change in group.changes]
            with store.newest(group.entry, row_keys) as (versions, manifest_version):
                pass
            for change, version in zip(group.changes, versions, strict=True):
                if (version.seq if version is not None else ABSENT) != change.expect:
                    raise ExpectationFailed(
                        f"a row of '{group.entry.definition.table_id}' was changed meanwhile",
                        what="row",
                        found=version.seq if version else ABSENT,
                        found_flags=version.flags if version else RowFlags.NONE,
                    )
            batch.manifests[group.entry.definition.uid] = manifest_version
    raise TransactionConflict("flushes and compactions moved the manifest in every attempt to commit; try again")


def _draft(store: TableStore, group: ChangeGroup) -> SegmentDraft:
    layout = store.layout(group.entry.definition)
    ordered = sorted(group.changes, key=lambda change: change.key)
    arrays = [
        pa.array([change.key for change in ordered], pa.binary()),
        pa.array(range(1, len(ordered) + 1), pa.int64()),
        pa.array([change.flags for change in ordered], pa.uint8()),
        *layout.arrow_columns([_stored(layout, change) for change in ordered]),
    ]
    table = pa.Table.from_arrays(arrays, schema=layout.schema)
    expected = {index: change.expect for index, change in enumerate(ordered) if change.expect != ABSENT}
    return SegmentDraft(group.entry, group.scopes, table, expected)


class Overlay:
    """The uncommitted changes of one table and scope, newest per key."""

    def __init__(self, group: ChangeGroup) -> None:
        self.group = group
        self.changes: dict[bytes, Change] = {}

    def put(self, change: Change) -> None:
        """Take a change; what the first change of a key expected stays expected."""
        earlier = self.changes.get(change.key)
        if earlier is None:
            self.changes[change.key] = change
        elif change.row is None and earlier.expect == ABSENT:
            del self.changes[change.key]
        else:
            self.changes[change.key] = Change(change.key, change.row, earlier.expect, change.former)

    def batch(self, layout: Layout) -> pa.RecordBatch:
        """The written rows in the segment schema; their `_seq` is above every committed one."""
        live = [change for change in self.changes.values() if change.row is not None]
        arrays = [
            pa.array([change.key for change in live], pa.binary()),
            pa.array([_INFINITE] * len(live), pa.int64()),
            pa.array([0] * len(live), pa.uint8()),
            *layout.arrow_columns([change.row for change in live if change.row is not None]),
        ]
        return pa.RecordBatch.from_arrays(arrays, schema=layout.schema)

    def marks(self) -> pa.Table:
        """Marks that hide every committed version of the written keys."""
        hidden = [change.key for change in self.changes.values() if change.expect != ABSENT]
        return pa.table({KEY: pa.array(hidden, pa.binary()), SEQ: pa.array([_INFINITE] * len(hidden), pa.int64())})


class Transaction:
    """Snapshot reads, own writes visible, first committer wins. Not thread-safe.

    `moment` is the snapshot of its beginning. Ends once: by `commit` or `rollback`.
    """

    def __init__(self, store: TableStore, moment: Moment, *, number: int, bytes_max: int, deadline_s: float) -> None:
        self._store = store
        self.moment = moment
        self.number = number
        self.used_s = store.clock.monotonic_s()
        """When it was used last, on the monotonic clock."""
        self._bytes_max = bytes_max
        self._bytes = 0
        self._deadline_s = deadline_s
        self._overlays: dict[tuple[TableUid, Scope], Overlay] = {}
        self.jobs: list[JobOp] = []
        self.records: list[RecordOp] = []
        """Records that are written with it."""
        self.ended = False

    def check_open(self) -> None:
        """Raise Closed after the end, Timeout-like LimitExceeded after the time allowed."""
        if self.ended:
            raise Closed("the transaction has ended; begin a new one")
        self.used_s = self._store.clock.monotonic_s()
        if self.used_s > self._deadline_s:
            self.rollback()
            raise LimitExceeded("the transaction was rolled back: it took longer than transaction_timeout_secs allows")

    @property
    def writes(self) -> tuple[int, int, int]:
        """Keys written, bytes of changes, tables written."""
        overlays = list(self._overlays.values())
        return sum(len(one.changes) for one in overlays), self._bytes, len({uid for uid, _ in list(self._overlays)})

    def overlay(self, uid: TableUid, scope: Scope) -> Overlay | None:
        """Own writes of a table and scope."""
        return self._overlays.get((uid, scope))

    def newest(
        self, entry: CatalogEntry, scope: Scope, keys: Sequence[bytes]
    ) -> tuple[list[Version | Change | None], Seq]:
        """Newest version of each key: an own change, or what the snapshot holds; and the manifest version seen."""
        state = self.moment.state(entry)
        with self._store.newest(entry, keys, self.moment.snapshot, state) as (versions, _):
            pass
        overlay = self.overlay(entry.definition.uid, scope)
        found: list[Version | Change | None] = list(versions)
        if overlay is not None:
            found = [overlay.changes.get(key, version) for key, version in zip(keys, versions, strict=True)]
        return found, state.manifest_version

    def stage(self, group: ChangeGroup) -> None:
        """Add changes to the overlay. Raises LimitExceeded beyond max_transaction_buffer_bytes."""
        self.check_open()
        uid = group.entry.definition.uid
        [scope] = group.scopes
        overlay = self._overlays.get((uid, scope))
        if overlay is None:
            empty = ChangeGroup(group.entry, group.scopes, group.manifest_version)
            overlay = self._overlays[(uid, scope)] = Overlay(empty)
        elif overlay.group.entry.record_version != group.entry.record_version:
            raise TransactionConflict(
                f"table '{group.entry.definition.table_id}' was altered during the transaction; run it again"
            )
        size = sum(_size(change) for change in group.changes)
        if self._bytes + size > self._bytes_max:
            raise LimitExceeded(
                f"the transaction would hold {self._bytes + size} bytes of changes, "
                f"at most {self._bytes_max} are allowed (max_transaction_buffer_bytes)"
            )
        self._bytes += size
        for change in group.changes:
            overlay.put(change)

    def commit(self) -> Commit | None:
        """Make all changes durable in one step. Raises TransactionConflict when another writer came first."""
        self.check_open()
        self.ended = True
        groups = []
        for overlay in self._overlays.values():
            overlay.group.changes = list(overlay.changes.values())
            groups.append(overlay.group)
        try:
            return commit_groups(self._store, groups, jobs=self.jobs, records=self.records)
        except ExpectationFailed as failed:
            raise TransactionConflict(f"the transaction was rolled back: {refused(self._store, failed)}") from failed

    def rollback(self) -> None:
        """Forget all changes. Idempotent."""
        self.ended = True
        self._overlays.clear()
        self.jobs.clear()


def _size(change: Change) -> int:
    values = change.row or ()
    return _CHANGE_OVERHEAD + len(change.key) + sum(len(v) if isinstance(v, (str, bytes)) else 8 for v in values)


def autocommit(store: TableStore, entry: CatalogEntry, decide: Callable[[], ChangeGroup]) -> Commit | None:
    """Decide the changes of one statement and commit them; decide anew when another writer came first."""
    for attempt in range(store.limits.conflict_retries):
        group = decide()
        if not group.changes:
            return None
        try:
            return commit_groups(store, [group])
        except ExpectationFailed as failed:
            if failed.what == "record":
                raise refused(store, failed) from failed
            back_off(store, attempt)
    raise conflict(entry, store.limits.conflict_retries)


def refused(store: TableStore, failed: ExpectationFailed) -> TransactionConflict:
    """The error for a commit that a record of the catalog or another writer stood against."""
    kind = RecordKind(failed.key[0]) if failed.key else None
    if kind is RecordKind.ERASING:
        user = keys.decode_text(failed.key[1:])
        return TransactionConflict(f"user '{user}' is being erased; no row of that user is written until it has ended")
    if kind is RecordKind.TABLE:
        entry = store.catalog.by_uid(record_uid(failed.key))
        what = "a table was dropped" if entry is None else f"table '{entry.definition.table_id}' was altered"
        return TransactionConflict(f"{what} meanwhile; try again")
    return TransactionConflict(f"another writer came first: {failed}; try again")


def back_off(store: TableStore, attempt: int) -> None:
    """Wait a little, at random, before the next attempt of a statement that lost."""
    if attempt > 2:
        may_block()
        jitter = store.clock.random_bytes(1)[0] / 255
        store.clock.wait(threading.Event(), min(0.001 * 2 ** min(attempt, 6), 0.05) * jitter)


def refuse_streams(entry: CatalogEntry) -> None:
    """Raise InvalidRequest for a STREAM table."""
    if entry.definition.kind is TableKind.STREAM:
        raise InvalidRequest("stream tables are not supported inside explicit transactions")
