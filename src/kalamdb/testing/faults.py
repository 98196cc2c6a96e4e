"""A backend that behaves as one behind a network does: slow, busy, in doubt. Seeded, so it repeats."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from kalamdb.clock import Clock
from kalamdb.storage import (
    ANY,
    Batch,
    Busy,
    Commit,
    CommitObserver,
    ExpectationFailed,
    JobStore,
    Snapshot,
    StorageBackend,
    UnknownOutcome,
)
from kalamdb.storage.jobs import Claim, JobAttempt, JobEvent, JobFence, JobFilter, JobRow, JobStatus
from kalamdb.types import JobId, RowFlags, Seq, TableUid


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """How often a call fails, each a share of 0 to 1, and how long it takes."""

    busy: float = 0.1
    conflict: float = 0.1
    unknown: float = 0.1
    """Only of commits with an idempotency key; half of them really committed."""
    delay_s: float = 0.001
    """Longest wait of one call, through the Clock."""


class FlakyBackend:
    """A `StorageBackend` around another, with `caps.inline` off and faults drawn from `seed`."""

    def __init__(self, inner: StorageBackend, clock: Clock, *, seed: int = 0, faults: Faults | None = None) -> None:
        self.caps = replace(inner.caps, inline=False)
        self.faults = faults or Faults()
        self.inner = inner
        self.injected: dict[str, int] = {"busy": 0, "conflict": 0, "unknown": 0}
        """How many faults of each kind were made so far."""
        self._clock = clock
        self._seed = seed
        self._draws = 0
        self._lock = threading.Lock()
        self._jobs = _FlakyJobs(inner.jobs, self)

    @property
    def jobs(self) -> JobStore:
        """The inner store's jobs, slow and at times busy."""
        return self._jobs

    def now_ms(self) -> int:
        """The inner store's clock."""
        return self.inner.now_ms()

    def snapshot(self) -> AbstractContextManager[Snapshot]:
        """See StorageBackend."""
        self.delay()
        return self.inner.snapshot()

    def latest(self) -> Snapshot:
        """See StorageBackend."""
        self.delay()
        return self.inner.latest()

    def commit(self, batch: Batch) -> Commit:
        """See StorageBackend; may fail without a cause. `is_injected` tells such a conflict from a real one."""
        self.delay()
        self.maybe_busy()
        guarded = any(op.expect != ANY and op.bucket is None for op in batch.rows)
        if guarded and self._draw() < self.faults.conflict:
            self._count("conflict")
            raise _InjectedConflict(batch.rows[0].table)
        if batch.idempotency_key is not None and self._draw() < self.faults.unknown:
            self._count("unknown")
            if self._draw() < 0.5:
                self.inner.commit(batch)
            raise UnknownOutcome(batch.idempotency_key)
        return self.inner.commit(batch)

    def under_lease(self, fence: JobFence | None) -> AbstractContextManager[None]:
        """See StorageBackend."""
        return self.inner.under_lease(fence)

    def claim(self, wanted: Claim, batch: Batch | None = None) -> Commit | None:
        """See StorageBackend; may be busy."""
        self.delay()
        self.maybe_busy()
        return self.inner.claim(wanted, batch)

    def wait_durable(self, commit: Commit, *, names_files: bool = False) -> None:
        """See StorageBackend."""
        self.delay()
        self.inner.wait_durable(commit, names_files=names_files)

    def outcome(self, key: str) -> Commit | None:
        """See StorageBackend."""
        self.delay()
        return self.inner.outcome(key)

    def observe(self, observer: CommitObserver) -> None:
        """See StorageBackend."""
        self.inner.observe(observer)

    def keep_former(self, tables: Set[TableUid]) -> Seq:
        """See StorageBackend."""
        return self.inner.keep_former(tables)

    def next_numbers(self, name: str, count: int = 1) -> int:
        """See StorageBackend."""
        self.delay()
        return self.inner.next_numbers(name, count)

    def remove_retired(self, rows_max: int = 1000) -> bool:
        """See StorageBackend."""
        self.delay()
        return self.inner.remove_retired(rows_max)

    def checkpoint(self, path: Path, pin: Callable[[], None]) -> AbstractContextManager[Snapshot]:
        """See StorageBackend."""
        self.delay()
        return self.inner.checkpoint(path, pin)

    def purge(self, tables: Sequence[TableUid], *, records: bool = False) -> None:
        """See StorageBackend."""
        self.delay()
        self.inner.purge(tables, records=records)

    def head(self) -> Seq:
        """See StorageBackend."""
        return self.inner.head()

    def stats(self) -> Mapping[str, int]:
        """See StorageBackend."""
        return self.inner.stats()

    def check(self) -> list[str]:
        """See StorageBackend."""
        return self.inner.check()

    def close(self) -> None:
        """See StorageBackend."""
        self.inner.close()

    def delay(self) -> None:
        """Take a part of `faults.delay_s`."""
        if self.faults.delay_s:
            self._clock.wait(threading.Event(), self._draw() * self.faults.delay_s)

    def maybe_busy(self) -> None:
        """Raise Busy as often as `faults.busy` says."""
        if self._draw() < self.faults.busy:
            self._count("busy")
            raise Busy("the store is busy; try again")

    def _draw(self) -> float:
        with self._lock:
            self._draws += 1
            digest = hashlib.sha256(f"{self._seed}:{self._draws}".encode()).digest()
        return int.from_bytes(digest[:7], "big") / (1 << 56)

    def _count(self, kind: str) -> None:
        with self._lock:
            self.injected[kind] += 1


class _InjectedConflict(ExpectationFailed):
    """A conflict with a writer that is not there: what the caller saw is still true when it looks again."""

    def __init__(self, table: TableUid) -> None:
        super().__init__(
            f"the segments of table {table} may have changed since the row was looked up",
            what="manifest",
            index=0,
            found_flags=RowFlags.NONE,
            table=table,
        )


def is_injected(error: Exception) -> bool:
    """Whether a FlakyBackend made up this conflict."""
    return isinstance(error, _InjectedConflict)


class _FlakyJobs:
    """A `JobStore` whose calls take time."""

    def __init__(self, inner: JobStore, backend: FlakyBackend) -> None:
        self._inner = inner
        self._backend = backend

    def next_due_ms(self, types: Set[str] | None = None, *, after_ms: int | None = None) -> int | None:
        self._backend.delay()
        return self._inner.next_due_ms(types, after_ms=after_ms)

    def get(self, job_id: JobId) -> JobRow | None:
        self._backend.delay()
        return self._inner.get(job_id)

    def active_with_key(self, idempotency_key: str) -> JobRow | None:
        self._backend.delay()
        return self._inner.active_with_key(idempotency_key)

    def running_with_key(self, concurrency_key: str) -> JobRow | None:
        self._backend.delay()
        return self._inner.running_with_key(concurrency_key)

    def query(self, wanted: JobFilter) -> list[JobRow]:
        self._backend.delay()
        return self._inner.query(wanted)

    def count(self, status: JobStatus, queue: str | None = None) -> int:
        self._backend.delay()
        return self._inner.count(status, queue)

    def queues(self) -> list[str]:
        self._backend.delay()
        return self._inner.queues()

    def events(self, job_id: JobId | None = None, *, after: int = 0, limit: int = 1000) -> Sequence[JobEvent]:
        self._backend.delay()
        return self._inner.events(job_id, after=after, limit=limit)

    def event_position(self) -> int:
        return self._inner.event_position()

    def release_events(self, position: int) -> None:
        self._backend.delay()
        self._inner.release_events(position)

    def attempts(self, job_id: JobId) -> list[JobAttempt]:
        self._backend.delay()
        return self._inner.attempts(job_id)

    def ended_naming(self, name: str) -> list[JobId]:
        self._backend.delay()
        return self._inner.ended_naming(name)

    def delete(self, job_ids: Sequence[JobId]) -> int:
        self._backend.delay()
        return self._inner.delete(job_ids)

    def delete_ended(
        self, status: JobStatus, *, finished_before: int | None, limit: int, fence: JobFence | None = None
    ) -> int:
        self._backend.delay()
        return self._inner.delete_ended(status, finished_before=finished_before, limit=limit, fence=fence)
