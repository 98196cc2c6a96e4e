"""Whether stored jobs, their indexes, their history and their leases agree with each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import msgspec

from kalamdb.storage import job_keys as jk
from kalamdb.storage.jobs import Hold, JobEvent, JobRow, JobStatus
from kalamdb.storage.ordered import KvReader
from kalamdb.types import JobId


def check_jobs(view: KvReader) -> Iterator[str]:
    """Problems of the jobs of one view of a store, in words."""
    return _Jobs(view).problems()


def _decoded(decode: Callable[[bytes], Any], value: bytes) -> tuple[Any, str]:
    try:
        return decode(value), ""
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        return None, str(exc)


class _Jobs:
    def __init__(self, view: KvReader) -> None:
        self._view = view
        self._rows: dict[str, JobRow] = {}
        self._status: dict[bytes, bytes] = {}
        self._active: dict[bytes, bytes] = {}
        self._waiting: dict[bytes, JobRow] = {}
        """What each index must hold: key -> value, or the job."""

    def problems(self) -> Iterator[str]:
        yield from self._read_rows()
        yield from self._index("status", jk.STATUS, self._status)
        yield from self._index("active key", jk.ACTIVE, self._active)
        yield from self._queue()
        yield from self._counts()
        yield from self._leases()
        yield from self._attempts()
        yield from _History(self._view, self._rows).problems()

    def _scan(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        return self._view.scan(prefix, jk.after(prefix))

    def _number(self, key: bytes) -> int:
        value = self._view.get(key)
        return int(jk.NUMBER.unpack(value)[0]) if value is not None and len(value) == 8 else 0

    def _read_rows(self) -> Iterator[str]:
        for key, value in self._scan(jk.JOB):
            name = key[1:].decode(errors="replace")
            row, problem = _decoded(jk.decode_row, value)
            if row is None:
                yield f"job '{name}' cannot be decoded: {problem}"
                continue
            if row.job_id != name:
                yield f"job '{name}' holds the row of job '{row.job_id}'"
            self._rows[row.job_id] = row
            yield from _state_problems(row)
            self._status[jk.status_key(row)] = b""
            if (waiting := jk.queue_key(row)) is not None:
                self._waiting[waiting] = row
            if row.idempotency_key is not None and row.status.is_active:
                active = jk.ACTIVE + row.idempotency_key.encode()
                holder = self._active.setdefault(active, row.job_id.encode())
                if holder != row.job_id.encode():
                    yield f"jobs '{holder.decode()}' and '{row.job_id}' are active with key '{row.idempotency_key}'"

    def _index(self, name: str, prefix: bytes, expected: dict[bytes, bytes]) -> Iterator[str]:
        for key, value in self._scan(prefix):
            if key not in expected:
                yield f"the {name} index of jobs holds {key[1:]!r}, which no job has"
            elif expected.pop(key) != value:
                yield f"the {name} index of jobs gives {key[1:]!r} to job '{value.decode(errors='replace')}'"
        for key in expected:
            yield f"the {name} index of jobs lacks {key[1:]!r}"

    def _queue(self) -> Iterator[str]:
        """Each waiting job stands in the queue or is parked; what is parked has another of its key to wait for."""
        movers = {row.concurrency_key for row in self._rows.values() if row.status is JobStatus.RUNNING}
        for key, _ in self._scan(jk.QUEUE):
            row = self._waiting.pop(key, None)
            if row is None:
                yield f"the queue of jobs holds {key[1:]!r}, which no job has"
            else:
                movers.add(row.concurrency_key)
        prefix = bytes([jk.JobSpace.PARKED])
        for key, lane in self._scan(prefix):
            row = self._waiting.pop(lane, None)
            if row is None or jk.parked_key(row) != key:
                yield f"{key[1:]!r} is parked, which no waiting job has"
            elif row.concurrency_key not in movers:
                yield f"job '{row.job_id}' is parked for '{row.concurrency_key}', and nothing of that key runs or waits"
        for row in self._waiting.values():
            yield f"job '{row.job_id}' is {row.status} and neither queued nor parked"

    def _counts(self) -> Iterator[str]:
        found = Counter((row.status, row.queue) for row in self._rows.values())
        for key, value in self._scan(jk.COUNT):
            status, queue = jk.STATUSES[key[1] % len(jk.STATUSES)], key[2:].decode(errors="replace")
            counted = jk.NUMBER.unpack(value)[0]
            if found.pop((status, queue), 0) != counted:
                yield f"the store counts {counted} jobs that are {status} in queue '{queue}', which is wrong"
        for (status, queue), count in found.items():
            yield f"{count} jobs are {status} in queue '{queue}', and the store counts none"

    def _leases(self) -> Iterator[str]:
        given = self._number(jk.LEASE)
        holders: dict[int, str] = {}
        for row in self._rows.values():
            if row.lease_id is None:
                continue
            if row.lease_id > given:
                yield f"job '{row.job_id}' holds lease {row.lease_id}, the last one given is {given}"
            if (other := holders.setdefault(row.lease_id, row.job_id)) != row.job_id:
                yield f"jobs '{other}' and '{row.job_id}' hold lease {row.lease_id}"

    def _attempts(self) -> Iterator[str]:
        for key, value in self._scan(bytes([jk.JobSpace.ATTEMPT])):
            name, number = key[1:-9].decode(errors="replace"), jk.NUMBER.unpack(key[-8:])[0]
            attempt, problem = _decoded(jk.decode_attempt, value)
            row = self._rows.get(name)
            if attempt is None:
                yield f"attempt {number} of job '{name}' cannot be decoded: {problem}"
            elif (attempt.job_id, attempt.attempt) != (name, number):
                yield f"attempt {number} of job '{name}' holds attempt {attempt.attempt} of '{attempt.job_id}'"
            elif row is None or number >= row.attempt:
                yield f"attempt {number} of job '{name}' is stored, which never was or is the newest"


class _History:
    """The events of each job, and the order of all of them."""

    def __init__(self, view: KvReader, rows: dict[str, JobRow]) -> None:
        self._view = view
        self._rows = rows
        self._entries: dict[tuple[str, int], tuple[int, int]] = {}
        """(job, number of its first event) -> (position, how many) of each commit."""

    def problems(self) -> Iterator[str]:
        counts: dict[str, int] = {}
        prefix = bytes([jk.JobSpace.HISTORY])
        for key, value in self._view.scan(prefix, jk.after(prefix)):
            name, first = key[1:-9].decode(errors="replace"), int(jk.NUMBER.unpack(key[-8:])[0])
            events, problem = _decoded(partial(_events, name, first), value)
            if not events:
                yield f"event {first} of job '{name}' cannot be decoded: {problem or 'it is empty'}"
                continue
            if first != counts.get(name, 0) + 1:
                yield f"event {counts.get(name, 0) + 1} of job '{name}' is missing: the next one has number {first}"
            counts[name] = first + len(events) - 1
            self._entries[name, first] = (events[0].position, len(events))
        for name in self._rows.keys() | counts.keys():
            row = self._rows.get(name)
            if row is None:
                yield f"there are events of job '{name}', which does not exist"
            elif row.events != counts.get(name, 0):
                yield f"job '{name}' counts {row.events} events, {counts.get(name, 0)} are stored"
        yield from self._order()

    def _order(self) -> Iterator[str]:
        """The order of events names each that it reaches back to; its beginning may have been forgotten."""
        last = self._view.get(jk.POSITION)
        highest = int(jk.NUMBER.unpack(last)[0]) if last is not None else 0
        following, oldest = 1, highest + 1
        for key, value in self._view.scan(jk.COMMITTED, jk.after(jk.COMMITTED)):
            position = int(jk.NUMBER.unpack(key[1:])[0])
            oldest = min(oldest, position)
            named, problem = _decoded(jk.decode_committed, value)
            if named is None:
                yield f"the events at position {position} cannot be decoded: {problem}"
                continue
            if position < following:
                yield f"the events at position {position} overlap those before, which reach to {following - 1}"
            for name, first, count in named:
                stored = self._entries.pop((name, first), None)
                if stored is not None and stored != (position, count):
                    yield f"event {first} of job '{name}' has position {stored[0]}, the order of events says {position}"
                elif stored is None and name in self._rows:
                    yield f"the event at position {position} is number {first} of job '{name}', which has none such"
                position += count
            following = position
        if following - 1 > highest:
            yield f"events reach to position {following - 1}, the last one given is {highest}"
        for (name, first), (position, _) in self._entries.items():
            if position >= oldest:
                yield f"event {first} of job '{name}' at position {position} is missing in the order of events"


def _events(name: str, first: int, body: bytes) -> list[JobEvent]:
    return list(jk.unpack_events(JobId(name), first, body))


def _state_problems(row: JobRow) -> Iterator[str]:
    """What a row may not be, whatever led to it."""
    where = f"job '{row.job_id}' is {row.status}"
    if row.status is JobStatus.RUNNING and (row.lease_id is None or row.attempt < 1):
        yield f"{where} without a lease"
    if row.status is not JobStatus.RUNNING and row.lease_id is not None:
        yield f"{where} and holds lease {row.lease_id}"
    if row.status.is_terminal is (row.finished_at is None):
        yield f"{where} and has finished_at {row.finished_at}"
    if row.status.is_terminal and row.hold not in (None, Hold.QUARANTINED):
        yield f"{where} and held as {row.hold}"
    if row.status is JobStatus.COMPLETED and row.exception_trace is not None:
        yield f"{where} and keeps the trace of a failure"
    if row.retry_count > row.max_retries:
        yield f"{where} after {row.retry_count} retries, {row.max_retries} are allowed"


__all__ = ["check_jobs"]
