"""Jobs over an ordered key-value store: rows, the indexes to claim and query, and their history.

The keys and what they stand for are in `job_keys`.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Final, Protocol

import msgspec

from kalamdb.clock import Clock
from kalamdb.errors import IdempotencyConflict, Internal, InvalidRequest, LeaseLost
from kalamdb.storage import Batch, Commit, Fenced
from kalamdb.storage import job_keys as jk
from kalamdb.storage.job_lanes import Lane, WaitingJobs
from kalamdb.storage.job_query import candidates, in_order, matches
from kalamdb.storage.job_scrub import Scrubber
from kalamdb.storage.jobs import (
    LEGAL_MOVES,
    Claim,
    Events,
    Hold,
    JobAttempt,
    JobEvent,
    JobFence,
    JobFilter,
    JobInsert,
    JobMove,
    JobOp,
    JobRow,
    JobScrub,
    JobStatus,
)
from kalamdb.storage.ordered import KvReader, OrderedKv, Range, Write
from kalamdb.types import JobId

_KEPT_BY_STORE: Final = frozenset(
    {"job_id", "idempotency_key", "created_at", "queue", "concurrency_key", "events", "lease_id", "attempt"}
)
_ID_DRAWS_MAX = 16
_READ_ROWS = 256
_DEPARTED_MAX = 1024
"""So many removed entries may lie in front of a status index before its floor is raised over them."""
_DELETE_JOBS = 200
"""Jobs that one commit of `delete` takes, so that writers are not kept waiting."""


class CommitJobs(Protocol):
    """How the store commits: a batch with the claims, or with writes that are prepared already."""

    def __call__(
        self,
        batch: Batch,
        *,
        claim: Claim | None = None,
        prepared: Staged | None = None,
        ranges: Sequence[Range] = (),
    ) -> Commit: ...


@dataclass(slots=True)
class Staged:
    """What a batch does to jobs, until it is written: an overlay over the stored state."""

    position: int
    lease: int
    before: dict[JobId, JobRow | None] = field(default_factory=dict)
    """Rows as they are stored, of the jobs that were looked at."""
    after: dict[JobId, JobRow] = field(default_factory=dict)
    """Rows of the jobs that change."""
    writes: list[Write] = field(default_factory=list)
    ids: list[JobId] = field(default_factory=list)
    claimed: list[JobId] = field(default_factory=list)
    holders: dict[str, JobId | None] = field(default_factory=dict)
    """Who holds an idempotency key after the operations so far."""
    counts: Counter[tuple[JobStatus, str]] = field(default_factory=Counter)
    departed: Counter[JobStatus] = field(default_factory=Counter)
    """How many entries of the status index go."""
    committed: list[tuple[str, int, int]] = field(default_factory=list)
    joined: list[bytes] = field(default_factory=list)
    left: list[bytes] = field(default_factory=list)
    parked: list[tuple[str, bytes]] = field(default_factory=list)
    unparked: list[tuple[str, bytes]] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is to be written."""
        return not self.after and not self.writes

    @property
    def rows(self) -> tuple[JobRow, ...]:
        """The jobs that change, as they become."""
        return tuple(self.after.values())


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
        self._counts: Counter[tuple[JobStatus, str]] = Counter()
        for key, value in kv.scan(jk.COUNT, jk.after(jk.COUNT)):
            self._counts[jk.STATUSES[key[1]], key[2:].decode()] = jk.NUMBER.unpack(value)[0]
        self._totals = Counter[JobStatus]()
        for (status, _), count in self._counts.items():
            self._totals[status] += count
        self._position = self._stored_number(jk.POSITION)
        self._lease = self._stored_number(jk.LEASE)
        self._waiting = WaitingJobs(kv, jk.QUEUE)
        self._floors = {status: jk.STATUS + jk.STATUS_BYTE[status] for status in JobStatus}
        """A key at or below the first entry of each status: an LSM store skips removed entries one by one."""
        self._departed = Counter[JobStatus]()
        """Entries that went from each status since its floor was raised."""
        self._parked_floors: dict[str, bytes] = {}
        self._running: dict[JobId, JobRow] = {}
        self._running_keys = Counter[str]()
        for row in self._rows_of(kv, self._ids(kv, JobStatus.RUNNING)):
            self._follow_running(row.job_id, row)

    def _stored_number(self, key: bytes) -> int:
        value = self._kv.get(key)
        return int(jk.NUMBER.unpack(value)[0]) if value else 0

    # Changing: inside a commit

    def begin(self) -> Staged:
        """An overlay without changes."""
        return Staged(self._position, self._lease)

    def stage(self, operations: Sequence[JobOp], claim: Claim | None) -> Staged:
        """Check the operations, then claim, and collect their writes. Raises IdempotencyConflict, Fenced, Internal.

        Called under the commit lock; after the write the caller calls `apply`.
        """
        staged = self.begin()
        if not operations and claim is None:
            return staged
        now_ms = self._clock.now_ms()
        for operation in operations:
            match operation:
                case JobInsert():
                    self._stage_insert(operation, now_ms, staged)
                case JobMove():
                    self._stage_move(operation, now_ms, staged)
                case JobFence():
                    self._require_lease(operation, staged)
                case JobScrub():
                    self._stage_scrub(operation, now_ms, staged)
        if claim is not None:
            self._stage_claims(claim, now_ms, staged)
            if claim.admit_max:
                self._stage_admissions(claim, now_ms, staged)
        self._close(staged)
        return staged

    def check_lease(self, fence: JobFence) -> None:
        """Raise LeaseLost unless the job runs under that lease. Called under the commit lock."""
        try:
            self._require_lease(fence, self.begin())
        except Fenced as lost:
            # Not as Fenced: that says of an operation of the batch that its job moved on.
            raise LeaseLost(str(lost)) from None

    def _require_lease(self, fence: JobFence, staged: Staged) -> None:
        stored = self._row(fence.job_id, staged)
        if stored is None or stored.status is not JobStatus.RUNNING or stored.lease_id != fence.lease_id:
            raise _fenced(fence.job_id, stored)

    def apply(self, staged: Staged) -> None:
        """Take over what a batch did, after it was written."""
        self._position, self._lease = staged.position, staged.lease
        for (status, queue), change in staged.counts.items():
            self._counts[status, queue] += change
            self._totals[status] += change
            if not self._counts[status, queue]:
                del self._counts[status, queue]
        for key in staged.left:
            self._waiting.left(key)
        for key in staged.joined:
            self._waiting.joined(key)
        for name, key in staged.parked:
            self._parked_floors[name] = min(self._parked_floors.get(name, key), key)
        for name, key in staged.unparked:
            self._parked_floors[name] = key
        for row in staged.after.values():
            self._follow_running(row.job_id, row)
            floor = jk.status_key(row)
            if floor < self._floors[row.status]:
                self._floors[row.status] = floor
        for status, gone in staged.departed.items():
            self._departed[status] += gone
            if not self._totals[status] or self._departed[status] >= _DEPARTED_MAX:
                self._raise_floor(status)

    def _raise_floor(self, status: JobStatus) -> None:
        end = jk.after(jk.STATUS + jk.STATUS_BYTE[status])
        first = next(self._kv.scan(self._floors[status], end, limit=1), None) if self._totals[status] else None
        self._floors[status] = end if first is None else first[0]
        self._departed[status] = 0

    def _follow_running(self, job_id: JobId, row: JobRow) -> None:
        old = self._running.pop(job_id, None)
        if old is not None and old.concurrency_key is not None:
            self._running_keys[old.concurrency_key] -= 1
            if not self._running_keys[old.concurrency_key]:
                del self._running_keys[old.concurrency_key]
        if row.status is JobStatus.RUNNING:
            self._running[job_id] = row
            if row.concurrency_key is not None:
                self._running_keys[row.concurrency_key] += 1

    def _row(self, job_id: JobId, staged: Staged) -> JobRow | None:
        """The job as the batch has made it so far."""
        if job_id in staged.after:
            return staged.after[job_id]
        if job_id not in staged.before:
            running = self._running.get(job_id)
            if running is None:
                value = self._kv.get(jk.JOB + job_id.encode())
                running = None if value is None else jk.decode_row(value)
            staged.before[job_id] = running
        return staged.before[job_id]

    def _refuse_taken(self, key: str, staged: Staged) -> None:
        if key in staged.holders:
            holder = staged.holders[key]
        else:
            value = self._kv.get(jk.ACTIVE + key.encode())
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
        key = insert.row.idempotency_key
        if key is not None and insert.row.status.is_active:
            self._refuse_taken(key, staged)
        for _ in range(_ID_DRAWS_MAX):
            job_id = JobId(insert.draw_id())
            if self._row(job_id, staged) is None:
                break
        else:
            raise Internal(f"no free job id was found in {_ID_DRAWS_MAX} draws; the last was '{job_id}'")
        if key is not None and insert.row.status.is_active:
            staged.holders[key] = job_id
        row = msgspec.structs.replace(insert.row, job_id=job_id, events=0)
        self._change(row, insert.events, now_ms, staged)
        staged.ids.append(job_id)

    def _stage_move(self, move: JobMove, now_ms: int, staged: Staged) -> None:
        stored = self._row(move.job_id, staged)
        if stored is None or stored.status is not move.status or stored.lease_id != move.lease_id:
            raise _fenced(move.job_id, stored)
        if not _KEPT_BY_STORE.isdisjoint(move.changes):
            raise Internal(f"a move cannot change {', '.join(sorted(_KEPT_BY_STORE & move.changes.keys()))}")
        changes: dict[str, Any] = {"updated_at": now_ms, **move.changes}
        status = changes.get("status", stored.status)
        if status is not stored.status:
            if status not in LEGAL_MOVES[stored.status]:
                raise Internal(f"job '{move.job_id}' cannot move from {stored.status} to {status}")
            if stored.status is JobStatus.RUNNING:
                changes["lease_id"] = None
                changes.setdefault("attempt_finished_at", now_ms)
            changes["finished_at"] = now_ms if status.is_terminal else None
            if status.is_terminal and changes.get("hold") is not Hold.QUARANTINED:
                changes["hold"] = None
            self._move_key(stored, status, staged)
        self._change(msgspec.structs.replace(stored, **changes), move.events, now_ms, staged)

    def _move_key(self, stored: JobRow, status: JobStatus, staged: Staged) -> None:
        key = stored.idempotency_key
        if key is None or status.is_active is stored.status.is_active:
            return
        if status.is_active:
            self._refuse_taken(key, staged)
        staged.holders[key] = stored.job_id if status.is_active else None

    def _stage_scrub(self, scrub: JobScrub, now_ms: int, staged: Staged) -> None:
        stored = self._row(scrub.job_id, staged)
        if scrub.lease_id is None:
            if stored is None or stored.status.is_active:
                return
        elif stored is None or stored.status is not JobStatus.RUNNING or stored.lease_id != scrub.lease_id:
            raise _fenced(scrub.job_id, stored)
        scrubber = Scrubber(scrub.name)
        row, key = scrubber.row(stored), stored.idempotency_key
        if key is not None and row.idempotency_key != key and stored.status.is_active:
            staged.holders[key] = None
            staged.writes.append((jk.ACTIVE + key.encode(), None))
            row = msgspec.structs.replace(row, idempotency_key=None)
        staged.writes += scrubber.writes(self._kv, scrub.job_id)
        self._change(row, (), now_ms, staged)

    def _change(self, row: JobRow, events: Events, now_ms: int, staged: Staged) -> None:
        if events:
            first = row.events + 1
            value = (staged.position + 1, now_ms, list(events))
            staged.writes.append((jk.history_prefix(row.job_id) + jk.NUMBER.pack(first), jk.encode(value)))
            staged.committed.append((row.job_id, first, len(events)))
            staged.position += len(events)
            row = msgspec.structs.replace(row, events=row.events + len(events))
        staged.after[row.job_id] = row

    # Claiming

    def _stage_claims(self, claim: Claim, now_ms: int, staged: Staged) -> None:
        rooms: dict[str, int | None] = {}
        taken = Counter[str]()
        keys_taken = Counter[str]()
        for row in staged.after.values():
            taken[row.queue] += (row.status is JobStatus.RUNNING) - (row.job_id in self._running)
            if row.concurrency_key is not None:
                keys_taken[row.concurrency_key] += (row.status is JobStatus.RUNNING) - (row.job_id in self._running)

        def is_open(lane: Lane) -> bool:
            if lane.job_type not in claim.types:
                return False
            queue = lane.queue
            if queue not in rooms:
                allowed = claim.queue_limit(queue)
                running = self._counts[JobStatus.RUNNING, queue] + taken[queue] if allowed is not None else 0
                rooms[queue] = None if allowed is None else allowed - running
            room = rooms[queue]
            return room is None or room > 0

        if claim.limit <= 0:
            return
        for lane, key in self._waiting.due(now_ms, is_open):
            row_ = self._row(lane.job_id(key), staged)
            if row_ is None:
                raise Internal(f"the queue names job '{lane.job_id(key)}', which does not exist")
            if row_.job_id in staged.after:
                continue
            name = row_.concurrency_key
            if name is not None:
                if self._running_keys[name] + keys_taken[name] > 0:
                    self._park(name, row_, key, staged)
                    continue
                keys_taken[name] += 1
            room = rooms[lane.queue]
            if room is not None:
                rooms[lane.queue] = room - 1
            self._lease_to(row_, claim, now_ms, staged)
            if len(staged.claimed) >= claim.limit:
                return

    def _lease_to(self, row: JobRow, claim: Claim, now_ms: int, staged: Staged) -> None:
        staged.lease += 1
        if row.attempt:
            attempt = row.attempt_row()
            staged.writes.append((jk.attempts_prefix(row.job_id) + jk.NUMBER.pack(attempt.attempt), jk.encode(attempt)))
        leased = msgspec.structs.replace(
            row,
            status=JobStatus.RUNNING,
            lease_id=staged.lease,
            attempt=row.attempt + 1,
            updated_at=now_ms,
            started_at=row.started_at or now_ms,
            attempt_started_at=now_ms,
            attempt_finished_at=None,
            outcome=None,
            progress=None,
        )
        events = [*(claim.admitted if row.status is JobStatus.NEW else ()), *claim.started(leased)]
        self._change(leased, events, now_ms, staged)
        staged.claimed.append(row.job_id)

    def _stage_admissions(self, claim: Claim, now_ms: int, staged: Staged) -> None:
        if self._totals[JobStatus.NEW] <= 0:
            return
        admitted = 0
        fresh = (job_id for job_id in self._ids(self._kv, JobStatus.NEW) if job_id not in staged.after)
        for row in self._rows_of(self._kv, fresh):
            if admitted == claim.admit_max:
                return
            staged.before[row.job_id] = row
            queued = msgspec.structs.replace(row, status=JobStatus.QUEUED, updated_at=now_ms)
            self._change(queued, claim.admitted, now_ms, staged)
            admitted += 1

    def _park(self, name: str, row: JobRow, key: bytes, staged: Staged) -> None:
        parked = jk.parked_key(row)
        assert parked is not None
        staged.writes += [(key, None), (parked, key)]
        staged.left.append(key)
        staged.parked.append((name, parked))

    def _unpark(self, name: str, staged: Staged, gone: Set[bytes]) -> None:
        prefix = jk.parked_prefix(name)
        start = self._parked_floors.get(name, prefix)
        for key, lane in self._kv.scan(start, jk.after(prefix)):
            if key in gone:
                continue
            staged.writes += [(key, None), (lane, b"")]
            staged.joined.append(lane)
            staged.unparked.append((name, key))
            return

    # Writing

    def _close(self, staged: Staged) -> None:
        """Turn the changes of rows into writes."""
        freed: set[str] = set()
        gone: set[bytes] = set()
        for job_id, row in staged.after.items():
            self._put(staged.before.get(job_id), row, staged, freed, gone)
        for row in staged.after.values():
            if row.status is JobStatus.RUNNING and row.concurrency_key is not None:
                freed.discard(row.concurrency_key)
        for name in freed:
            self._unpark(name, staged, gone)
        for (status, queue), change in staged.counts.items():
            count = self._counts[status, queue] + change
            key = jk.COUNT + jk.STATUS_BYTE[status] + queue.encode()
            staged.writes.append((key, jk.NUMBER.pack(count) if count else None))
        if staged.committed:
            first = jk.NUMBER.pack(self._position + 1)
            staged.writes.append((jk.COMMITTED + first, jk.encode(staged.committed)))
            staged.writes.append((jk.POSITION, jk.NUMBER.pack(staged.position)))
        if staged.lease != self._lease:
            staged.writes.append((jk.LEASE, jk.NUMBER.pack(staged.lease)))

    def _put(self, old: JobRow | None, new: JobRow, staged: Staged, freed: set[str], gone: set[bytes]) -> None:
        writes, counts = staged.writes, staged.counts
        name = new.job_id.encode()
        queue_key = jk.queue_key(new)
        old_queue_key = None if old is None else jk.queue_key(old)
        if old_queue_key != queue_key:
            if old_queue_key is not None:
                writes.append((old_queue_key, None))
                staged.left.append(old_queue_key)
            if queue_key is not None:
                writes.append((queue_key, b""))
                staged.joined.append(queue_key)
        key = new.concurrency_key
        if key is not None and old is not None:
            left_queue = old_queue_key is not None and old_queue_key != queue_key
            if left_queue:
                parked = jk.parked_key(old)
                assert parked is not None
                gone.add(parked)
                writes.append((parked, None))
            if new.status is not JobStatus.RUNNING and (left_queue or old.status is JobStatus.RUNNING):
                freed.add(key)
        if old is None or old.status is not new.status:
            if old is not None:
                writes.append((jk.status_key(old), None))
                staged.departed[old.status] += 1
                counts[old.status, old.queue] -= 1
            writes.append((jk.status_key(new), b""))
            counts[new.status, new.queue] += 1
        active = new.idempotency_key
        if active is not None and (old is not None and old.status.is_active) is not new.status.is_active:
            holder = staged.holders.get(active, new.job_id if new.status.is_active else None)
            writes.append((jk.ACTIVE + active.encode(), None if holder is None else holder.encode()))
        writes.append((jk.JOB + name, jk.encode(new)))

    # Deleting

    def delete(self, job_ids: Sequence[JobId], fence: JobFence | None = None) -> int:
        """See JobStore; `fence` as for `delete_ended`."""
        gone = 0
        wanted = list(dict.fromkeys(job_ids))
        for start in range(0, len(wanted), _DELETE_JOBS):
            with self._lock:
                gone += self._delete(wanted[start : start + _DELETE_JOBS], fence)
        return gone

    def _delete(self, job_ids: Sequence[JobId], fence: JobFence | None) -> int:
        self._check_open()
        if fence is not None:
            self._require_lease(fence, self.begin())
        staged = self.begin()
        for row in self._rows_of(self._kv, job_ids):
            if row.status.is_active:
                continue
            staged.counts[row.status, row.queue] -= 1
            staged.departed[row.status] += 1
            staged.writes += [(jk.JOB + row.job_id.encode(), None), (jk.status_key(row), None)]
            for prefix in (jk.history_prefix(row.job_id), jk.attempts_prefix(row.job_id)):
                staged.writes += [(key, None) for key, _ in self._kv.scan(prefix, jk.after(prefix))]
        gone = -sum(staged.counts.values())
        self._close(staged)
        if gone:
            self._commit(Batch(), prepared=staged)
        return gone

    def delete_ended(
        self, status: JobStatus, *, finished_before: int | None, limit: int, fence: JobFence | None = None
    ) -> int:
        """See JobStore."""
        if status.is_active:
            raise Internal(f"jobs in status {status} have not ended")
        # A job that ended before some time was created before it, so the index by creation will do.
        wanted = JobFilter(statuses=frozenset({status}), created_before=finished_before, limit=4 * limit)
        ended = [
            row.job_id
            for row in self.query(wanted)
            if finished_before is None or (row.finished_at or row.created_at) < finished_before
        ]
        return self.delete(ended[:limit], fence)

    def release_events(self, position: int) -> None:
        """See JobStore."""
        with self._lock:
            self._check_open()
            upto = min(position, self._position)
            # An entry holds all events of its commit: the one that begins at or below stays if it goes beyond.
            self._commit(
                Batch(),
                prepared=self.begin(),
                ranges=[(jk.COMMITTED, self._entry_at(upto + 1) or jk.COMMITTED + jk.NUMBER.pack(upto + 1))],
            )

    def _entry_at(self, position: int) -> bytes | None:
        """The COMMITTED key whose events include `position`."""
        end = jk.COMMITTED + jk.NUMBER.pack(position + 1)
        found = next(iter(self._kv.scan(jk.COMMITTED, end, reverse=True)), None)
        if found is None:
            return None
        first = int(jk.NUMBER.unpack(found[0][1:])[0])
        count = sum(count for _, _, count in jk.decode_committed(found[1]))
        return found[0] if first + count > position else None

    # Reading

    def ended_naming(self, name: str) -> list[JobId]:
        """See JobStore."""
        with self._lock:
            self._check_open()
            view = self._kv.snapshot()
        try:
            found = Scrubber(name).jobs_in(view)
            return [row.job_id for row in self._rows_of(view, found) if row.status.is_terminal]
        finally:
            view.close()

    def next_due_ms(self, types: Set[str] | None = None, *, after_ms: int | None = None) -> int | None:
        """See JobStore."""
        with self._lock:
            self._check_open()
            return self._waiting.next_due_ms(self._clock.now_ms() if after_ms is None else after_ms, types)

    def get(self, job_id: JobId) -> JobRow | None:
        """See JobStore."""
        self._check_open()
        value = self._kv.get(jk.JOB + job_id.encode())
        return None if value is None else jk.decode_row(value)

    def active_with_key(self, idempotency_key: str) -> JobRow | None:
        """See JobStore."""
        with self._lock:
            self._check_open()
            job_id = self._kv.get(jk.ACTIVE + idempotency_key.encode())
            return None if job_id is None else self.get(JobId(job_id.decode()))

    def running_with_key(self, concurrency_key: str) -> JobRow | None:
        """See JobStore."""
        with self._lock:
            self._check_open()
            return next((row for row in self._running.values() if row.concurrency_key == concurrency_key), None)

    def count(self, status: JobStatus, queue: str | None = None) -> int:
        """See JobStore."""
        self._check_open()
        return self._totals[status] if queue is None else self._counts[status, queue]

    def queues(self) -> list[str]:
        """See JobStore."""
        with self._lock:
            return sorted({queue for _, queue in self._counts})

    def query(self, wanted: JobFilter) -> list[JobRow]:
        """See JobStore. Raises InvalidRequest for a `sort_by` that is not a column or has no order."""
        if wanted.sort_by not in JobRow.__struct_fields__:
            raise InvalidRequest(f"jobs have no column '{wanted.sort_by}' to sort by")
        with self._lock:
            self._check_open()
            view, floors, totals = self._kv.snapshot(), dict(self._floors), Counter(self._totals)
        try:
            chosen = candidates(view, wanted, floors, totals)
            found = (row for row in self._rows_of(view, chosen) if matches(row, wanted))
            if wanted.sort_by == "created_at":
                return list(islice(found, wanted.limit))
            return in_order(found, wanted)
        finally:
            view.close()

    def _ids(self, view: KvReader, status: JobStatus) -> Iterator[JobId]:
        """Ids of a status, oldest first. Raises its floor, so only under the commit lock."""
        prefix = jk.STATUS + jk.STATUS_BYTE[status]
        first = True
        for key, _ in view.scan(self._floors[status], jk.after(prefix), limit=self._totals[status]):
            if first:
                self._floors[status] = key
                first = False
            yield JobId(key[jk.STATUS_KEY_BYTES :].decode())

    def _rows_of(self, view: KvReader, job_ids: Iterable[JobId]) -> Iterator[JobRow]:
        remaining = iter(job_ids)
        size = 16
        while chunk := list(islice(remaining, size)):
            for value in view.get_many([jk.JOB + job_id.encode() for job_id in chunk]):
                if value is not None:
                    yield jk.decode_row(value)
            size = _READ_ROWS

    def attempts(self, job_id: JobId) -> list[JobAttempt]:
        """See JobStore."""
        with self._lock:
            self._check_open()
            row = self.get(job_id)
            prefix = jk.attempts_prefix(job_id)
            found = [jk.decode_attempt(value) for _, value in self._kv.scan(prefix, jk.after(prefix))]
        return [*found, row.attempt_row()] if row is not None and row.attempt else found

    def event_position(self) -> int:
        """See JobStore."""
        return self._position

    def events(self, job_id: JobId | None = None, *, after: int = 0, limit: int = 1000) -> Sequence[JobEvent]:
        """See JobStore."""
        self._check_open()
        after = max(after, 0)
        if job_id is not None:
            return list(islice(self._events_of(job_id, after), limit))
        start = self._entry_at(after + 1) or jk.COMMITTED + jk.NUMBER.pack(after + 1)
        found: list[JobEvent] = []
        entries = self._committed_after(start, after)
        while len(found) < limit and (page := list(islice(entries, min(limit, _READ_ROWS)))):
            bodies = self._kv.get_many([jk.history_prefix(job_id) + jk.NUMBER.pack(first) for job_id, first in page])
            for (job_id, first), body in zip(page, bodies, strict=True):
                if body is not None:
                    found += [event for event in jk.unpack_events(job_id, first, body) if event.position > after]
        return found[:limit]

    def _committed_after(self, start: bytes, after: int) -> Iterator[tuple[JobId, int]]:
        """(job id, number of the first event) of what was written together, from the event after `after` on."""
        for key, value in self._kv.scan(start, jk.after(jk.COMMITTED)):
            position = int(jk.NUMBER.unpack(key[1:])[0])
            for name, first, count in jk.decode_committed(value):
                position += count
                if position > after + 1:
                    yield JobId(name), first

    def _events_of(self, job_id: JobId, after: int) -> Iterator[JobEvent]:
        prefix = jk.history_prefix(job_id)
        wanted = prefix + jk.NUMBER.pack(after + 2)
        entry = next(iter(self._kv.scan(prefix, wanted, reverse=True)), None)
        for key, value in self._kv.scan(prefix if entry is None else entry[0], jk.after(prefix)):
            for event in jk.unpack_events(job_id, jk.NUMBER.unpack(key[-8:])[0], value):
                if event.number > after:
                    yield event


def _fenced(job_id: JobId, stored: JobRow | None) -> Fenced:
    state = "does not exist" if stored is None else f"is {stored.status} under lease {stored.lease_id}"
    return Fenced(f"job '{job_id}' {state}: the caller's lease was lost, nothing was written")


__all__ = ["CommitJobs", "JobIndex", "Staged"]
