"""Jobs over an ordered key-value store: rows, the indexes to claim and query, and events.

Keys after the space byte:
    JOB         job id                                      value: encoded JobRow
    QUEUE       -priority, run_at, created_at, job id       queued and retrying jobs without hold
    STATUS      status, created_at, job id
    ACTIVE_KEY  idempotency key                             value: job id, of the active job only
    EVENT       position in commit order                    value: encoded JobEvent
    JOB_EVENT   job id, number                              value: position
    COUNT       status                                      value: how many
    META        name                                        lease counter, highest event position
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import IntEnum
from heapq import merge
from itertools import islice
from typing import Any, Final

import msgspec
from sortedcontainers import SortedDict

from kalamdb.clock import Clock
from kalamdb.errors import IdempotencyConflict, Internal, InvalidRequest
from kalamdb.storage import Batch, Commit, Fenced, keys
from kalamdb.storage.jobs import (
    LEGAL_MOVES,
    JobEvent,
    JobFence,
    JobFilter,
    JobInsert,
    JobMove,
    JobRow,
    JobStatus,
)
from kalamdb.storage.ordered import KvReader, OrderedKv, Write
from kalamdb.types import JobId


class JobSpace(IntEnum):
    """First byte of job keys; above those of kv.Space. Part of the stored format."""

    JOB = 0x10
    QUEUE = 0x11
    STATUS = 0x12
    ACTIVE_KEY = 0x13
    EVENT = 0x14
    JOB_EVENT = 0x15
    COUNT = 0x16
    META = 0x17


_JOB = bytes([JobSpace.JOB])
_QUEUE = bytes([JobSpace.QUEUE])
_STATUS = bytes([JobSpace.STATUS])
_ACTIVE = bytes([JobSpace.ACTIVE_KEY])
_EVENT = bytes([JobSpace.EVENT])
_JOB_EVENT = bytes([JobSpace.JOB_EVENT])
_COUNT = bytes([JobSpace.COUNT])
_LEASE = bytes([JobSpace.META]) + b"lease"
_POSITION = bytes([JobSpace.META]) + b"event_position"

_STATUS_BYTE: Final = {
    JobStatus.NEW: b"\x00",
    JobStatus.QUEUED: b"\x01",
    JobStatus.RUNNING: b"\x02",
    JobStatus.RETRYING: b"\x03",
    JobStatus.COMPLETED: b"\x04",
    JobStatus.FAILED: b"\x05",
    JobStatus.CANCELLED: b"\x06",
    JobStatus.SKIPPED: b"\x07",
}
"""Part of the stored format."""
_NUMBER = struct.Struct(">Q")
_QUEUE_KEY = struct.Struct(">QQQ")
_STATUS_KEY_BYTES = 10
_PRIORITY_ZERO = 1 << 63
_CLAIMABLE: Final = frozenset({JobStatus.QUEUED, JobStatus.RETRYING})
_ID_DRAWS_MAX = 16
_READ_ROWS = 256
_DELETE_JOBS = 200
"""Jobs that one commit of `delete` takes, so that writers are not kept waiting."""

_encode = msgspec.msgpack.Encoder().encode
_decode_row = msgspec.msgpack.Decoder(JobRow).decode
_decode_event = msgspec.msgpack.Decoder(JobEvent).decode


def _after(prefix: bytes) -> bytes:
    end = keys.prefix_end(prefix)
    assert end is not None
    return end


CommitJobs = Callable[[Batch, Sequence[Write], Mapping[JobId, JobRow]], Commit]
"""Commit a batch with further writes; the mapping holds stored rows that were read under the lock already."""


@dataclass(slots=True)
class Staged:
    """What a batch does to jobs, until it is written: an overlay over the stored state."""

    event_position: int
    rows: dict[JobId, JobRow]
    writes: list[Write] = field(default_factory=list)
    ids: list[JobId] = field(default_factory=list)
    counts: dict[JobStatus, int] = field(default_factory=dict)
    holders: dict[str, JobId | None] = field(default_factory=dict)
    """Who holds an idempotency key after the operations so far."""
    queued: list[bytes] = field(default_factory=list)


class JobIndex:
    """`JobStore` over an `OrderedKv`. Changes go through `stage` inside a commit; reads are thread-safe."""

    def __init__(
        self,
        kv: OrderedKv,
        clock: Clock,
        commit_lock: threading.RLock,
        commit: CommitJobs,
        check_open: Callable[[], None],
    ) -> None:
        self._kv = kv
        self._clock = clock
        self._lock = commit_lock
        self._commit = commit
        self._check_open = check_open
        self._counts = {status: self._stored_number(_COUNT + _STATUS_BYTE[status]) for status in JobStatus}
        last = next(iter(kv.scan(_EVENT, _after(_EVENT), reverse=True)), None)
        newest = _NUMBER.unpack(last[0][1:])[0] if last else 0
        self._position = max(newest, self._stored_number(_POSITION))
        self._lease = self._stored_number(_LEASE)
        self._floors: SortedDict[bytes, bytes] = SortedDict()
        """Per priority a key at or below its first queue entry. A claim starts there: in an LSM store the
        entries that were claimed before would otherwise be skipped one by one."""
        self._find_priorities()

    def _stored_number(self, key: bytes) -> int:
        value = self._kv.get(key)
        return int(_NUMBER.unpack(value)[0]) if value else 0

    def _find_priorities(self) -> None:
        start, end = _QUEUE, _after(_QUEUE)
        while (first := next(iter(self._kv.scan(start, end)), None)) is not None:
            priority = first[0][:9]
            self._floors[priority] = first[0]
            start = _after(priority)

    # Changing: inside a commit

    def stage(self, operations: Sequence[JobInsert | JobMove | JobFence], known: Mapping[JobId, JobRow]) -> Staged:
        """Check the operations and collect their writes. Raises IdempotencyConflict, Fenced, Internal.

        Called under the commit lock; after the write the caller calls `apply`.
        """
        staged = Staged(self._position, dict(known))
        if not operations:
            return staged
        now_ms = self._clock.now_ms()
        for operation in operations:
            match operation:
                case JobInsert():
                    self._stage_insert(operation, now_ms, staged)
                case JobMove():
                    self._stage_move(operation, now_ms, staged)
                case JobFence():
                    stored = self._row(operation.job_id, staged)
                    running = stored is not None and stored.status is JobStatus.RUNNING
                    if stored is None or not running or stored.lease_id != operation.lease_id:
                        raise _fenced(operation.job_id, stored)
        for status, change in staged.counts.items():
            staged.writes.append((_COUNT + _STATUS_BYTE[status], _NUMBER.pack(self._counts[status] + change)))
        return staged

    def apply(self, staged: Staged) -> None:
        """Take over what a batch did, after it was written."""
        self._position = staged.event_position
        for status, change in staged.counts.items():
            self._counts[status] += change
        for key in staged.queued:
            priority = key[:9]
            floor = self._floors.get(priority)
            if floor is None or key < floor:
                self._floors[priority] = key

    def _row(self, job_id: JobId, staged: Staged) -> JobRow | None:
        row = staged.rows.get(job_id)
        if row is None:
            value = self._kv.get(_JOB + job_id.encode())
            if value is None:
                return None
            row = staged.rows[job_id] = _decode_row(value)
        return row

    def _refuse_taken(self, key: str, staged: Staged) -> None:
        if key in staged.holders:
            holder = staged.holders[key]
        else:
            value = self._kv.get(_ACTIVE + key.encode())
            holder = None if value is None else JobId(value.decode())
        row = None if holder is None else self._row(holder, staged)
        if row is not None:
            created = datetime.fromtimestamp(row.created_at / 1000, UTC).isoformat(timespec="milliseconds")
            raise IdempotencyConflict(
                f"Job '{row.job_id}' with idempotency key '{key}' is already {row.status} "
                f"(created {created.replace('+00:00', 'Z')})",
                row,
            )

    def _stage_insert(self, insert: JobInsert, now_ms: int, staged: Staged) -> None:
        if insert.row.idempotency_key is not None and insert.row.status.is_active:
            self._refuse_taken(insert.row.idempotency_key, staged)
        job_id = self._draw(insert, staged)
        row = msgspec.structs.replace(insert.row, job_id=job_id, events=len(insert.events))
        self._put(None, row, staged)
        self._put_events(row.job_id, 0, insert.events, now_ms, staged)
        staged.ids.append(job_id)

    def _draw(self, insert: JobInsert, staged: Staged) -> JobId:
        for _ in range(_ID_DRAWS_MAX):
            job_id = JobId(insert.draw_id())
            if self._row(job_id, staged) is None:
                return job_id
        raise Internal(f"no free job id was found in {_ID_DRAWS_MAX} draws; the last was '{job_id}'")

    def _stage_move(self, move: JobMove, now_ms: int, staged: Staged) -> None:
        job_id = move.row.job_id
        stored = self._row(job_id, staged)
        if stored is None or stored.status is not move.status or stored.lease_id != move.lease_id:
            raise _fenced(job_id, stored)
        status = move.row.status
        if status is not stored.status and status not in LEGAL_MOVES[stored.status]:
            raise Internal(f"job '{job_id}' cannot move from {stored.status} to {status}")
        key = move.row.idempotency_key
        if key != stored.idempotency_key:
            raise Internal(f"the idempotency key of job '{job_id}' cannot change")
        if key is not None and status.is_active and not stored.status.is_active:
            self._refuse_taken(key, staged)
        row = msgspec.structs.replace(move.row, events=stored.events + len(move.events))
        self._put(stored, row, staged)
        self._put_events(job_id, stored.events, move.events, now_ms, staged)

    def _put(self, old: JobRow | None, new: JobRow, staged: Staged) -> None:
        writes, counts = staged.writes, staged.counts
        name, queue_key = new.job_id.encode(), _queue_key(new)
        old_queue_key = None if old is None else _queue_key(old)
        if old_queue_key is not None and old_queue_key != queue_key:
            writes.append((old_queue_key, None))
        if queue_key is not None and old_queue_key != queue_key:
            writes.append((queue_key, b""))
            staged.queued.append(queue_key)
        if old is None or (old.status, old.created_at) != (new.status, new.created_at):
            if old is not None:
                writes.append((_status_key(old), None))
                counts[old.status] = counts.get(old.status, 0) - 1
            writes.append((_status_key(new), b""))
            counts[new.status] = counts.get(new.status, 0) + 1
        key = new.idempotency_key
        if key is not None and (old is not None and old.status.is_active) is not new.status.is_active:
            writes.append((_ACTIVE + key.encode(), name if new.status.is_active else None))
            staged.holders[key] = new.job_id if new.status.is_active else None
        writes.append((_JOB + name, _encode(new)))
        staged.rows[new.job_id] = new

    def _put_events(
        self, job_id: JobId, count: int, events: Sequence[tuple[str, str]], now_ms: int, staged: Staged
    ) -> None:
        for number, (level, text) in enumerate(events, count + 1):
            staged.event_position += 1
            position = _NUMBER.pack(staged.event_position)
            event = JobEvent(
                job_id=job_id, number=number, at=now_ms, level=level, text=text, position=staged.event_position
            )
            staged.writes.append((_EVENT + position, _encode(event)))
            staged.writes.append((_job_events(job_id) + _NUMBER.pack(number), position))

    def claim(
        self,
        *,
        limit: int,
        runnable: Callable[[JobRow], bool],
        on_claim: Callable[[JobRow], tuple[JobRow, tuple[tuple[str, str], ...]]],
    ) -> list[JobRow]:
        """See JobStore."""
        with self._lock:
            self._check_open()
            now_ms, lease = self._clock.now_ms(), self._lease
            batch, known = Batch(), dict[JobId, JobRow]()
            for stored in self._due(now_ms):
                if len(known) >= limit:
                    break
                if not runnable(stored):
                    continue
                lease += 1
                leased = msgspec.structs.replace(
                    stored,
                    status=JobStatus.RUNNING,
                    lease_id=lease,
                    attempt=stored.attempt + 1,
                    updated_at=now_ms,
                )
                row, events = on_claim(leased)
                known[stored.job_id] = stored
                batch.jobs.append(JobMove(stored.status, stored.lease_id, row, events))
            if not known:
                return []
            # Leases that a failed commit would have given out are skipped, never given again.
            self._lease = lease
            self._commit(batch, [(_LEASE, _NUMBER.pack(lease))], known)
            return [
                msgspec.structs.replace(move.row, events=known[move.row.job_id].events + len(move.events))
                for move in batch.jobs
                if isinstance(move, JobMove)
            ]

    def _due(self, now_ms: int) -> Iterator[JobRow]:
        """Claimable rows that are due, by priority, run_at, created_at. Raises the floors on its way."""
        for priority in list(self._floors):
            first = True
            end = min(priority + _NUMBER.pack(now_ms + 1), _after(priority))
            for key, _ in self._kv.scan(self._floors[priority], _after(priority)):
                if first:
                    self._floors[priority] = key
                    first = False
                if key >= end:
                    break
                value = self._kv.get(_JOB + key[25:])
                if value is None:
                    raise Internal(f"the queue names job '{key[25:].decode()}', which does not exist")
                yield _decode_row(value)
            if first:
                del self._floors[priority]

    def delete(self, job_ids: Sequence[JobId]) -> int:
        """See JobStore."""
        gone = 0
        wanted = list(dict.fromkeys(job_ids))
        for start in range(0, len(wanted), _DELETE_JOBS):
            with self._lock:
                gone += self._delete(wanted[start : start + _DELETE_JOBS])
        return gone

    def _delete(self, job_ids: Sequence[JobId]) -> int:
        self._check_open()
        staged = Staged(self._position, {})
        for row in self._rows_of(self._kv, job_ids):
            if row.status.is_active:
                continue
            staged.counts[row.status] = staged.counts.get(row.status, 0) - 1
            staged.writes += [(_JOB + row.job_id.encode(), None), (_status_key(row), None)]
            prefix = _job_events(row.job_id)
            for key, position in self._kv.scan(prefix, _after(prefix)):
                staged.writes += [(key, None), (_EVENT + position, None)]
        if not staged.writes:
            return 0
        for status, change in staged.counts.items():
            staged.writes.append((_COUNT + _STATUS_BYTE[status], _NUMBER.pack(self._counts[status] + change)))
        # The newest events may be among those that go; their positions are not given again.
        staged.writes.append((_POSITION, _NUMBER.pack(self._position)))
        self._commit(Batch(), staged.writes, {})
        self.apply(staged)
        return -sum(staged.counts.values())

    # Reading

    def next_due_ms(self) -> int | None:
        """See JobStore."""
        with self._lock:
            self._check_open()
            after = _NUMBER.pack(self._clock.now_ms() + 1)
            due: int | None = None
            for priority, floor in self._floors.items():
                start = max(priority + after, floor)
                first = next(iter(self._kv.scan(start, _after(priority))), None)
                if first is not None:
                    run_at = int(_NUMBER.unpack_from(first[0], 9)[0])
                    due = run_at if due is None else min(due, run_at)
            return due

    def get(self, job_id: JobId) -> JobRow | None:
        """See JobStore."""
        self._check_open()
        value = self._kv.get(_JOB + job_id.encode())
        return None if value is None else _decode_row(value)

    def active_with_key(self, idempotency_key: str) -> JobRow | None:
        """See JobStore."""
        self._check_open()
        with self._lock:
            job_id = self._kv.get(_ACTIVE + idempotency_key.encode())
            return None if job_id is None else self.get(JobId(job_id.decode()))

    def count(self, status: JobStatus) -> int:
        """See JobStore."""
        self._check_open()
        return self._counts[status]

    def query(self, wanted: JobFilter) -> list[JobRow]:
        """See JobStore. Raises InvalidRequest for a `sort_by` that is not a column or has no order."""
        if wanted.sort_by not in JobRow.__struct_fields__:
            raise InvalidRequest(f"jobs have no column '{wanted.sort_by}' to sort by")
        with self._lock:
            self._check_open()
            view = self._kv.snapshot()
        try:
            found = (row for row in self._rows_of(view, self._candidates(view, wanted)) if _matches(row, wanted))
            if wanted.sort_by == "created_at":
                return list(islice(found, wanted.limit))
            try:
                rows = sorted(found, key=lambda row: _order(row, wanted.sort_by), reverse=wanted.descending)
            except TypeError:
                raise InvalidRequest(f"jobs cannot be sorted by '{wanted.sort_by}'") from None
            return rows if wanted.limit is None else rows[: wanted.limit]
        finally:
            view.close()

    def _candidates(self, view: KvReader, wanted: JobFilter) -> Iterator[JobId]:
        """Ids from the status index, by created_at and id."""
        statuses = JobStatus if wanted.statuses is None else wanted.statuses
        low = _NUMBER.pack(max(wanted.created_after or 0, 0))
        high = None if wanted.created_before is None else _NUMBER.pack(max(wanted.created_before, 0))
        streams = []
        for status in statuses:
            prefix = _STATUS + _STATUS_BYTE[status]
            end = _after(prefix) if high is None else prefix + high
            scan = view.scan(prefix + low, end, reverse=wanted.descending)
            streams.append(key[2:] for key, _ in scan)
        for key in merge(*streams, reverse=wanted.descending):
            yield JobId(key[_STATUS_KEY_BYTES - 2 :].decode())

    def _rows_of(self, view: KvReader, job_ids: Sequence[JobId] | Iterator[JobId]) -> Iterator[JobRow]:
        remaining = iter(job_ids)
        size = 16
        while chunk := list(islice(remaining, size)):
            for value in view.get_many([_JOB + job_id.encode() for job_id in chunk]):
                if value is not None:
                    yield _decode_row(value)
            size = _READ_ROWS

    def events(self, job_id: JobId | None = None, *, after: int = 0, limit: int = 1000) -> Sequence[JobEvent]:
        """See JobStore."""
        self._check_open()
        start = _NUMBER.pack(max(after, 0) + 1)
        if job_id is None:
            scan = self._kv.scan(_EVENT + start, _after(_EVENT))
            return [_decode_event(value) for _, value in islice(scan, limit)]
        prefix = _job_events(job_id)
        positions = [position for _, position in islice(self._kv.scan(prefix + start, _after(prefix)), limit)]
        values = self._kv.get_many([_EVENT + position for position in positions])
        return [_decode_event(value) for value in values if value is not None]

    def event_position(self) -> int:
        """Position of the newest event."""
        return self._position


def _queue_key(row: JobRow) -> bytes | None:
    """Where a job waits to be claimed; None for one that cannot be."""
    if row.status not in _CLAIMABLE or row.hold is not None:
        return None
    order = _QUEUE_KEY.pack(_PRIORITY_ZERO - row.priority, max(row.run_at, 0), max(row.created_at, 0))
    return _QUEUE + order + row.job_id.encode()


def _status_key(row: JobRow) -> bytes:
    return _STATUS + _STATUS_BYTE[row.status] + _NUMBER.pack(max(row.created_at, 0)) + row.job_id.encode()


def _job_events(job_id: JobId) -> bytes:
    return _JOB_EVENT + job_id.encode() + b"\x00"


def _matches(row: JobRow, wanted: JobFilter) -> bool:
    return (
        (wanted.job_type is None or row.job_type == wanted.job_type)
        and (wanted.queue is None or row.queue == wanted.queue)
        and (wanted.idempotency_key is None or row.idempotency_key == wanted.idempotency_key)
        and (wanted.table_uid is None or row.table_uid == wanted.table_uid)
    )


def _order(row: JobRow, column: str) -> tuple[bool, Any, JobId]:
    value = getattr(row, column)
    return value is not None, 0 if value is None else value, row.job_id


def _fenced(job_id: JobId, stored: JobRow | None) -> Fenced:
    state = "does not exist" if stored is None else f"is {stored.status} under lease {stored.lease_id}"
    return Fenced(f"job '{job_id}' {state}: the caller's lease was lost, nothing was written")
