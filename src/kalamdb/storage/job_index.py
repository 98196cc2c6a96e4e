"""Jobs over an ordered key-value store: rows, the indexes to claim and query, and events.

Keys after the space byte:
    JOB         job id                                      value: encoded JobRow
    QUEUE       state, -priority, run_at, created_at, id    jobs that may be claimed now or later
    STATUS      status, created_at, id
    ACTIVE_KEY  idempotency key                             value: job id, of the active job only
    EVENT       position in commit order                    value: encoded JobEvent
    JOB_EVENT   job id, number                              value: position
    COUNT       status                                      value: how many
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import IntEnum
from typing import Final

import msgspec

from kalamdb.clock import Clock
from kalamdb.errors import IdempotencyConflict, Internal
from kalamdb.storage import Fenced, keys
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
from kalamdb.storage.ordered import OrderedKv, Write
from kalamdb.types import JobId


class JobSpace(IntEnum):
    """First byte of job keys; above those of kv.Space."""

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

_STATUS_BYTE: Final = {status: bytes([number]) for number, status in enumerate(JobStatus)}
_NUMBER = struct.Struct(">Q")
_WAITING: Final = frozenset({JobStatus.NEW, JobStatus.QUEUED, JobStatus.RETRYING})
_ID_DRAWS_MAX = 16
_NEVER_READY = b"\x02"

_encode_row = msgspec.msgpack.Encoder().encode
_decode_row = msgspec.msgpack.Decoder(JobRow).decode
_decode_event = msgspec.msgpack.Decoder(JobEvent).decode


def _after(prefix: bytes) -> bytes:
    end = keys.prefix_end(prefix)
    assert end is not None
    return end


@dataclass(slots=True)
class Staged:
    """What a batch does to jobs: ids of inserted ones, and the in-memory part to apply after the write."""

    ids: list[JobId] = field(default_factory=list)
    counts: dict[JobStatus, int] = field(default_factory=dict)
    event_position: int = 0
    apply: Callable[[], None] = lambda: None


class JobIndex:
    """`JobStore` over an `OrderedKv`. Moves go through `stage` inside a commit; reads are thread-safe."""

    def __init__(
        self, kv: OrderedKv, clock: Clock, commit_lock: threading.RLock, write: Callable[[list[Write]], None]
    ) -> None:
        self._kv = kv
        self._clock = clock
        self._lock = commit_lock
        self._write = write
        self._counts = {status: self._stored_count(status) for status in JobStatus}
        last = next(iter(kv.scan(_EVENT, _after(_EVENT), reverse=True)), None)
        self._position: int = _NUMBER.unpack(last[0][1:])[0] if last else 0
        lease = kv.get(_LEASE)
        self._lease: int = _NUMBER.unpack(lease)[0] if lease else 0

    def _stored_count(self, status: JobStatus) -> int:
        value = self._kv.get(_COUNT + _STATUS_BYTE[status])
        return _NUMBER.unpack(value)[0] if value else 0

    # Changing: inside a commit

    def stage(
        self, operations: Sequence[JobInsert | JobMove | JobFence], now_ms: int, writes: list[Write]
    ) -> Staged:
        """Check the operations and add their writes. Raises IdempotencyConflict, Fenced, Internal.

        Called under the commit lock; the caller calls `apply` of the answer after writing.
        """
        staged = Staged(event_position=self._position)
        if not operations:
            return staged
        fresh: dict[JobId, JobRow] = {}
        taken: dict[str, JobId] = {}
        for operation in operations:
            match operation:
                case JobInsert():
                    self._stage_insert(operation, now_ms, writes, staged, fresh, taken)
                case JobMove():
                    self._stage_move(operation, now_ms, writes, staged, fresh)
                case JobFence():
                    self._check_fence(operation, fresh)
        for status, change in staged.counts.items():
            writes.append((_COUNT + _STATUS_BYTE[status], _NUMBER.pack(self._counts[status] + change)))

        def apply() -> None:
            self._position = staged.event_position
            for status, change in staged.counts.items():
                self._counts[status] += change

        staged.apply = apply
        return staged

    def _stage_insert(
        self,
        insert: JobInsert,
        now_ms: int,
        writes: list[Write],
        staged: Staged,
        fresh: dict[JobId, JobRow],
        taken: dict[str, JobId],
    ) -> None:
        key = insert.row.idempotency_key
        if key is not None:
            holder = fresh.get(taken[key]) if key in taken else self.active_with_key(key)
            if holder is not None:
                raise _key_taken(holder)
        job_id = self._draw(insert, fresh)
        row = msgspec.structs.replace(insert.row, job_id=job_id, events=len(insert.events))
        fresh[job_id] = row
        if key is not None:
            taken[key] = job_id
        self._put(None, row, writes, staged)
        self._put_events(row, 0, insert.events, now_ms, writes, staged)
        staged.ids.append(job_id)

    def _draw(self, insert: JobInsert, fresh: dict[JobId, JobRow]) -> JobId:
        for _ in range(_ID_DRAWS_MAX):
            job_id = JobId(insert.draw_id())
            if job_id not in fresh and self._kv.get(_JOB + job_id.encode()) is None:
                return job_id
        raise Internal(f"no free job id was found in {_ID_DRAWS_MAX} draws")

    def _stage_move(
        self, move: JobMove, now_ms: int, writes: list[Write], staged: Staged, fresh: dict[JobId, JobRow]
    ) -> None:
        job_id = move.row.job_id
        stored = fresh.get(job_id) or self.get(job_id)
        if stored is None or (stored.status, stored.lease_id) != (move.status, move.lease_id):
            raise _fenced(job_id, stored)
        if move.row.status is not stored.status and move.row.status not in LEGAL_MOVES[stored.status]:
            raise Internal(f"job '{job_id}' cannot move from {stored.status} to {move.row.status}")
        if move.row.status.is_active and not stored.status.is_active and move.row.idempotency_key is not None:
            holder = self.active_with_key(move.row.idempotency_key)
            if holder is not None:
                raise _key_taken(holder)
        row = msgspec.structs.replace(move.row, events=stored.events + len(move.events))
        fresh[job_id] = row
        self._put(stored, row, writes, staged)
        self._put_events(row, stored.events, move.events, now_ms, writes, staged)

    def _check_fence(self, fence: JobFence, fresh: dict[JobId, JobRow]) -> None:
        stored = fresh.get(fence.job_id) or self.get(fence.job_id)
        if stored is None or stored.status is not JobStatus.RUNNING or stored.lease_id != fence.lease_id:
            raise _fenced(fence.job_id, stored)

    def _put(self, old: JobRow | None, new: JobRow, writes: list[Write], staged: Staged) -> None:
        if old is not None:
            writes += [(key, None) for key in _index_keys(old)]
            staged.counts[old.status] = staged.counts.get(old.status, 0) - 1
            if old.idempotency_key is not None and old.status.is_active:
                writes.append((_ACTIVE + old.idempotency_key.encode(), None))
        staged.counts[new.status] = staged.counts.get(new.status, 0) + 1
        writes.append((_JOB + new.job_id.encode(), _encode_row(new)))
        writes += [(key, b"") for key in _index_keys(new)]
        if new.idempotency_key is not None and new.status.is_active:
            writes.append((_ACTIVE + new.idempotency_key.encode(), new.job_id.encode()))

    def _put_events(
        self,
        row: JobRow,
        count: int,
        events: Sequence[tuple[str, str]],
        now_ms: int,
        writes: list[Write],
        staged: Staged,
    ) -> None:
        for number, (level, text) in enumerate(events, count + 1):
            staged.event_position += 1
            position = _NUMBER.pack(staged.event_position)
            event = JobEvent(job_id=row.job_id, number=number, at=now_ms, level=level, text=text)
            writes.append((_EVENT + position, _encode_row(event)))
            writes.append((_JOB_EVENT + row.job_id.encode() + b"\x00" + _NUMBER.pack(number), position))

    def claim(
        self,
        *,
        limit: int,
        runnable: Callable[[JobRow], bool],
        on_claim: Callable[[JobRow], tuple[JobRow, tuple[tuple[str, str], ...]]],
    ) -> list[JobRow]:
        """See JobStore."""
        claimed: list[JobRow] = []
        with self._lock:
            now_ms = self._clock.now_ms()
            writes: list[Write] = []
            staged = Staged(event_position=self._position)
            lease = self._lease
            for stored in self._due(now_ms):
                if len(claimed) >= limit:
                    break
                if not runnable(stored):
                    continue
                lease += 1
                leased = msgspec.structs.replace(
                    stored, status=JobStatus.RUNNING, lease_id=lease, attempt=stored.attempt + 1, updated_at=now_ms
                )
                row, events = on_claim(leased)
                row = msgspec.structs.replace(row, events=stored.events + len(events))
                self._put(stored, row, writes, staged)
                self._put_events(row, stored.events, events, now_ms, writes, staged)
                claimed.append(row)
            if not claimed:
                return []
            for status, change in staged.counts.items():
                writes.append((_COUNT + _STATUS_BYTE[status], _NUMBER.pack(self._counts[status] + change)))
            writes.append((_LEASE, _NUMBER.pack(lease)))
            self._write(writes)
            self._lease = lease
            self._position = staged.event_position
            for status, change in staged.counts.items():
                self._counts[status] += change
        return claimed

    def _due(self, now_ms: int) -> Iterator[JobRow]:
        """Claimable rows: due, not held; by priority, run_at, created_at."""
        start = _QUEUE + b"\x01"
        for key, _ in self._kv.scan(start, _after(start)):
            run_at = _NUMBER.unpack_from(key, 10)[0]
            if run_at > now_ms:
                continue
            row = self.get(JobId(key[26:].decode()))
            if row is not None:
                yield row

    # Reading

    def next_due_ms(self) -> int | None:
        """See JobStore."""
        start = _QUEUE + b"\x01"
        now_ms = self._clock.now_ms()
        due: int | None = None
        for key, _ in self._kv.scan(start, _after(start)):
            run_at: int = _NUMBER.unpack_from(key, 10)[0]
            if run_at > now_ms and (due is None or run_at < due):
                due = run_at
        return due

    def get(self, job_id: JobId) -> JobRow | None:
        """See JobStore."""
        value = self._kv.get(_JOB + job_id.encode())
        return None if value is None else _decode_row(value)

    def active_with_key(self, idempotency_key: str) -> JobRow | None:
        """See JobStore."""
        job_id = self._kv.get(_ACTIVE + idempotency_key.encode())
        return None if job_id is None else self.get(JobId(job_id.decode()))

    def count(self, status: JobStatus) -> int:
        """See JobStore."""
        return self._counts[status]

    def query(self, wanted: JobFilter) -> list[JobRow]:
        """See JobStore."""
        found = [row for row in self._candidates(wanted) if _matches(row, wanted)]
        if wanted.sort_by != "created_at" or wanted.statuses is not None or wanted.descending:
            found.sort(key=lambda row: (_sort_value(row, wanted.sort_by), row.job_id), reverse=wanted.descending)
        else:
            found.sort(key=lambda row: (row.created_at, row.job_id))
        return found if wanted.limit is None else found[: wanted.limit]

    def _candidates(self, wanted: JobFilter) -> Iterator[JobRow]:
        if wanted.statuses is None:
            for _, value in self._kv.scan(_JOB, _after(_JOB)):
                yield _decode_row(value)
            return
        for status in wanted.statuses:
            prefix = _STATUS + _STATUS_BYTE[status]
            for key, _ in self._kv.scan(prefix, _after(prefix)):
                row = self.get(JobId(key[10:].decode()))
                if row is not None:
                    yield row

    def events(self, job_id: JobId | None = None, *, after: int = 0, limit: int = 1000) -> Sequence[JobEvent]:
        """See JobStore."""
        found: list[JobEvent] = []
        if job_id is None:
            for _, value in self._kv.scan(_EVENT + _NUMBER.pack(after + 1), _after(_EVENT)):
                found.append(_decode_event(value))
                if len(found) >= limit:
                    break
            return found
        prefix = _JOB_EVENT + job_id.encode() + b"\x00"
        for _, position in self._kv.scan(prefix + _NUMBER.pack(after + 1), _after(prefix)):
            value = self._kv.get(_EVENT + position)
            if value is not None:
                found.append(_decode_event(value))
            if len(found) >= limit:
                break
        return found

    def event_position(self) -> int:
        """Position of the newest event."""
        return self._position

    def delete(self, job_ids: Sequence[JobId]) -> int:
        """See JobStore."""
        gone = 0
        with self._lock:
            writes: list[Write] = []
            counts: dict[JobStatus, int] = {}
            for job_id in job_ids:
                row = self.get(job_id)
                if row is None or row.status.is_active:
                    continue
                gone += 1
                counts[row.status] = counts.get(row.status, 0) - 1
                writes.append((_JOB + job_id.encode(), None))
                writes += [(key, None) for key in _index_keys(row)]
                prefix = _JOB_EVENT + job_id.encode() + b"\x00"
                for key, position in self._kv.scan(prefix, _after(prefix)):
                    writes += [(key, None), (_EVENT + position, None)]
            for status, change in counts.items():
                writes.append((_COUNT + _STATUS_BYTE[status], _NUMBER.pack(self._counts[status] + change)))
            if writes:
                self._write(writes)
            for status, change in counts.items():
                self._counts[status] += change
        return gone


def _index_keys(row: JobRow) -> list[bytes]:
    """Index entries of a row; the queue index holds what waits, held jobs behind all others."""
    found = [_STATUS + _STATUS_BYTE[row.status] + _NUMBER.pack(row.created_at) + row.job_id.encode()]
    if row.status in _WAITING:
        ready = b"\x01" if row.hold is None and row.status is not JobStatus.NEW else _NEVER_READY
        found.append(
            _QUEUE
            + ready
            + _NUMBER.pack((1 << 63) - row.priority)
            + _NUMBER.pack(row.run_at)
            + _NUMBER.pack(row.created_at)
            + row.job_id.encode()
        )
    return found


def _matches(row: JobRow, wanted: JobFilter) -> bool:
    return (
        (wanted.job_type is None or row.job_type == wanted.job_type)
        and (wanted.statuses is None or row.status in wanted.statuses)
        and (wanted.queue is None or row.queue == wanted.queue)
        and (wanted.idempotency_key is None or row.idempotency_key == wanted.idempotency_key)
        and (wanted.table_uid is None or row.table_uid == wanted.table_uid)
        and (wanted.created_after is None or row.created_at >= wanted.created_after)
        and (wanted.created_before is None or row.created_at < wanted.created_before)
    )


def _sort_value(row: JobRow, column: str) -> int | str:
    value = getattr(row, column)
    return 0 if value is None else value


def _key_taken(holder: JobRow) -> IdempotencyConflict:
    created = datetime.fromtimestamp(holder.created_at / 1000, UTC).isoformat(timespec="milliseconds")
    return IdempotencyConflict(
        f"Job '{holder.job_id}' with idempotency key '{holder.idempotency_key}' is already {holder.status} "
        f"(created {created.replace('+00:00', 'Z')})",
        holder,
    )


def _fenced(job_id: JobId, stored: JobRow | None) -> Exception:
    state = "does not exist" if stored is None else f"is {stored.status} under lease {stored.lease_id}"
    return Fenced(f"job '{job_id}' {state}: its lease was lost, nothing was written")
