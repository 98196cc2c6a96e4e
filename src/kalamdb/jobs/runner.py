"""The loop that starts jobs, records how they end, and takes leases away.

One thread does all of it: a pass records what has ended, admits new jobs and claims as many as there are
free slots, in one commit. So short jobs share their commits, and no instant sees more live leases than slots.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from heapq import heappop, heappush
from typing import Any

from kalamdb.clock import Clock
from kalamdb.errors import Closed, KalamDbError, LeaseLost
from kalamdb.jobs.context import JobContext
from kalamdb.jobs.endings import Ending, Endings
from kalamdb.jobs.model import InterruptReason, Job
from kalamdb.jobs.queues import JobQueues
from kalamdb.jobs.registry import JobRegistry
from kalamdb.jobs.settings import JobSettings
from kalamdb.jobs.workers import AsyncWorkers, Attempt, ThreadWorkers, WorkersFactory
from kalamdb.storage import Batch, Busy, Commit, Fenced, StorageBackend
from kalamdb.storage.jobs import Claim, Events, JobFilter, JobMove, JobRow, JobStatus
from kalamdb.types import JobId

_IDLE_S = 3600.0
_BACK_OFF_S = 0.2
_BACK_OFF_MAX_S = 30.0
_ADMITTED_MAX = 500
_STOP_GRACE_S = 2.0
_STOP_JOIN_S = 1.0
_ADMITTED: Events = (("INFO", "Job queued"),)
_log = logging.getLogger("kalamdb.jobs")


def _started(row: JobRow) -> Events:
    return (("INFO", "Job started" if row.attempt == 1 else f"Job started (attempt {row.attempt})"),)


class Runner:
    """Owns the slots. Thread-safe."""

    def __init__(
        self,
        backend: StorageBackend,
        registry: JobRegistry,
        queues: JobQueues,
        clock: Clock,
        settings: JobSettings,
        endings: Endings,
        create: Callable[..., Job],
        workers: WorkersFactory | None = None,
    ) -> None:
        self._workers = workers
        self._backend = backend
        self._registry = registry
        self._queues = queues
        self._clock = clock
        self._settings = settings
        self._endings = endings
        self._create = create
        self.services: Any = None
        """The database as executors see it."""
        self._lock = threading.Lock()
        self._running: dict[JobId, Attempt] = {}
        self._abandoned: set[Attempt] = set()
        self._returned: deque[Attempt] = deque()
        self._deadlines: list[tuple[float, int, Attempt]] = []
        self._wake = threading.Event()
        self._drained = threading.Event()
        self._thread: threading.Thread | None = None
        self._claiming = False
        self._ending = False
        self._hurried = False
        self._slots = settings.max_concurrent
        self._make_workers()

    def _make_workers(self) -> None:
        made = self._workers
        self._threads = made(self._finished) if made is not None else ThreadWorkers(self._finished)
        self._tasks = made(self._finished) if made is not None else AsyncWorkers(self._finished)

    @property
    def slots(self) -> int:
        """Live leases at once."""
        return self._slots

    @property
    def running(self) -> list[JobRow]:
        """Jobs that run here, as they were claimed."""
        with self._lock:
            return [attempt.row for attempt in self._running.values()]

    @property
    def is_claiming(self) -> bool:
        """Whether jobs are started: between start and stop."""
        return self._claiming

    @property
    def abandoned_threads(self) -> int:
        """Threads and tasks that outlived their lease."""
        with self._lock:
            return len(self._abandoned)

    @property
    def is_choked(self) -> bool:
        """Whether so many threads outlived their lease that no job is started."""
        return self.abandoned_threads > (self._settings.abandoned_threads_max or self._slots)

    def wake(self) -> None:
        """Look for work now."""
        self._wake.set()

    def start(self, max_concurrent: int) -> None:
        """Begin, and make passes in a thread of its own; does nothing when it runs."""
        if self._thread is not None:
            return
        self.begin(max_concurrent)
        self._thread = threading.Thread(target=self._run, name="kalamdb-jobs", daemon=True)
        self._thread.start()

    def begin(self, max_concurrent: int) -> None:
        """Recover what a dead process left running; passes are the caller's, by `step`."""
        self._slots = max_concurrent
        self._make_workers()
        self._recover()
        self._claiming, self._ending, self._hurried = True, False, False

    def _recover(self) -> None:
        running = self._backend.jobs.query(JobFilter(statuses=frozenset({JobStatus.RUNNING}), limit=None))
        for row in running:
            self._commit(row.job_id, row.lease_id, self._endings.died(row))

    def _run(self) -> None:
        failures = 0
        while not self._ending:
            self._wake.clear()
            try:
                began_ms = self._backend.now_ms()
                more = self.step()
                pause_s = 0.0 if more else self._pause_s(began_ms)
                failures = 0
            except Busy:
                pause_s = _BACK_OFF_S
            except Closed:
                return
            except Exception:
                # Nothing that one pass meets may end the loop that all jobs need.
                _log.exception("a pass of the job runner failed; it goes on")
                failures += 1
                pause_s = min(_BACK_OFF_S * 2**failures, _BACK_OFF_MAX_S)
                self._wake.clear()
            if pause_s:
                self._clock.wait(self._wake, pause_s)

    def _pause_s(self, began_ms: int) -> float:
        """Until something is due that the pass that began then may have left."""
        now_s = self._clock.monotonic_s()
        with self._lock:
            pause_s = self._deadlines[0][0] - now_s if self._deadlines else _IDLE_S
            free = len(self._running) < self._slots
        due_ms = None
        if free and self._claiming:
            due_ms = self._backend.jobs.next_due_ms(self._registry.types, after_ms=began_ms)
        if due_ms is not None:
            pause_s = min(pause_s, (due_ms - self._backend.now_ms()) / 1000)
        return min(max(pause_s, 0.001), _IDLE_S)

    # One pass

    def step(self) -> bool:
        """Record what has ended, start what may start; True when there is more to do at once."""
        self._expire()
        returned: list[Attempt] = []
        while self._returned:
            returned.append(self._returned.popleft())
        with self._lock:
            free = self._slots - len(self._running) + len(returned)
        try:
            commit = self._exchange(returned, free)
        except Busy:
            self._returned.extendleft(reversed(returned))
            returned = []
            raise
        except (Fenced, TypeError, ValueError, OverflowError):
            # A lease went meanwhile, or one end cannot be stored: one by one, so that it spoils no other.
            for attempt in returned:
                self._settle_alone(attempt)
            return True
        finally:
            self._release(returned)
        if commit is None:
            return False
        self._launch(commit)
        return bool(self._returned) or commit.jobs_wait or len(commit.changed_jobs) > _ADMITTED_MAX

    def _exchange(self, returned: list[Attempt], free: int) -> Commit | None:
        moves = [move for attempt in returned if (move := self._end_of(attempt)) is not None]
        batch = Batch(jobs=list(moves)) if moves else None
        if not self._claiming:
            return self._backend.commit(batch) if batch is not None else None
        claim = Claim(
            limit=0 if self.is_choked else max(free, 0),
            types=self._registry.types,
            queue_limit=self._queues.limit,
            admit_max=_ADMITTED_MAX,
            admitted=_ADMITTED,
            started=_started,
        )
        return self._backend.claim(claim, batch)

    def _end_of(self, attempt: Attempt) -> JobMove | None:
        context = attempt.context
        if context.sealed:
            stored = self._backend.jobs.get(attempt.row.job_id)
            if stored is None or stored.lease_id != context.lease_id:
                return None
        ending = self._endings.of(attempt.row, attempt.outcome, context.interrupt_reason)
        return JobMove(
            attempt.row.job_id,
            JobStatus.RUNNING,
            context.lease_id,
            {**ending.changes, **context.unsaved_progress()},
            ending.events,
        )

    def _settle_alone(self, attempt: Attempt) -> None:
        move = self._end_of(attempt)
        if move is None:
            return
        try:
            self._backend.commit(Batch(jobs=[move]))
        except LeaseLost:
            return
        except (TypeError, ValueError, OverflowError) as exc:
            ending = self._endings.failed(attempt.row, f"its end could not be stored: {exc}", None)
            self._commit(attempt.row.job_id, attempt.context.lease_id, ending)

    def _release(self, attempts: Sequence[Attempt]) -> None:
        with self._lock:
            for attempt in attempts:
                self._running.pop(attempt.row.job_id, None)
            if not self._running:
                self._drained.set()
        for attempt in attempts:
            attempt.ended.set()

    def _launch(self, commit: Commit) -> None:
        if not commit.claimed:
            return
        rows = {row.job_id: row for row in commit.changed_jobs}
        threads: list[Attempt] = []
        tasks: list[Attempt] = []
        now_s = self._clock.monotonic_s()
        for job_id in commit.claimed:
            row = rows[job_id]
            context: JobContext[Any] = JobContext(
                row, backend=self._backend, services=self.services, clock=self._clock, settings=self._settings,
                endings=self._endings, create=self._create,
            )  # fmt: skip
            attempt = Attempt(row, self._registry.get_or_error(row.job_type), context)
            (tasks if attempt.executor.is_async else threads).append(attempt)
            with self._lock:
                self._running[job_id] = attempt
                self._drained.clear()
                if row.timeout_s is not None:
                    heappush(self._deadlines, (now_s + row.timeout_s, context.lease_id, attempt))
        if threads:
            self._threads.submit(threads)
        if tasks:
            self._tasks.submit(tasks)

    def _finished(self, attempt: Attempt) -> None:
        """In the thread of the attempt: it is through."""
        with self._lock:
            attempt.returned = True
            self._abandoned.discard(attempt)
        if not attempt.revoked:
            self._returned.append(attempt)
        self._wake.set()

    def _commit(self, job_id: JobId, lease: int | None, ending: Ending) -> None:
        self._backend.commit(Batch(jobs=[JobMove(job_id, JobStatus.RUNNING, lease, ending.changes, ending.events)]))

    # Interrupting

    def _expire(self) -> None:
        now_s = self._clock.monotonic_s()
        while True:
            with self._lock:
                if not self._deadlines or self._deadlines[0][0] > now_s:
                    return
                _, lease, attempt = heappop(self._deadlines)
                if attempt.returned or attempt.revoked:
                    continue
                if attempt.revoke_s is None:
                    attempt.context.interrupt(InterruptReason.TIMEOUT)
                    attempt.revoke_s = now_s + self._settings.cancel_timeout_s
                    heappush(self._deadlines, (attempt.revoke_s, lease, attempt))
                    continue
            self._revoke(attempt)

    def _attempt_of(self, row: JobRow) -> Attempt | None:
        with self._lock:
            attempt = self._running.get(row.job_id)
        return attempt if attempt is not None and attempt.context.lease_id == row.lease_id else None

    def cancel(self, row: JobRow) -> None:
        """Ask a running attempt to stop; take its lease away when it does not. Blocks until it has ended."""
        attempt = self._attempt_of(row)
        if attempt is None:
            try:
                self._commit(row.job_id, row.lease_id, self._endings.cancelled())
            except Fenced:
                pass
            return
        try:
            attempt.context.amend({"cancel_requested": True})
        except Fenced:
            pass
        attempt.context.interrupt(InterruptReason.CANCEL)
        if not self._clock.wait(attempt.ended, self._settings.cancel_timeout_s) and not self._revoke(attempt):
            self._clock.wait(attempt.ended, self._settings.cancel_timeout_s)

    def pause(self, row: JobRow) -> None:
        """Ask a running attempt to stop at its next check; waits for it as long as for a cancellation."""
        attempt = self._attempt_of(row)
        if attempt is None:
            return
        attempt.context.interrupt(InterruptReason.PAUSE)
        self._clock.wait(attempt.ended, self._settings.cancel_timeout_s)

    def amend(self, row: JobRow, changes: Mapping[str, Any], events: Events) -> None:
        """Change a running job, wherever it runs. Raises LeaseLost when it does not run under that lease any more."""
        self._backend.commit(Batch(jobs=[JobMove(row.job_id, JobStatus.RUNNING, row.lease_id, changes, events)]))

    def _revoke(self, attempt: Attempt) -> bool:
        """Take the lease of an attempt that does not stop; False when it had stopped by itself.

        Its thread goes on but can write nothing.
        """
        context = attempt.context
        with self._lock:
            if attempt.returned or attempt.revoked:
                return False
            attempt.revoked = True
            self._running.pop(attempt.row.job_id, None)
            self._abandoned.add(attempt)
            if not self._running:
                self._drained.set()
        context.revoke()
        reason = context.interrupt_reason or InterruptReason.STOP
        try:
            # The move is the runner's, whichever statement of whichever job waits for it.
            with self._backend.under_lease(None):
                self._commit(attempt.row.job_id, context.lease_id, self._endings.interrupted(attempt.row, reason))
        except LeaseLost:
            pass
        finally:
            attempt.ended.set()
            (self._tasks if attempt.executor.is_async else self._threads).abandon(attempt)
            self._wake.set()
        return True

    def stop_claims(self) -> None:
        """Start nothing more; what runs goes on, and its end is recorded."""
        self._claiming = False
        self._wake.set()

    def hurry(self) -> None:
        """A `stop` that waits, or the next one, gives running attempts no time."""
        self._hurried = True
        self._drained.set()

    def stop(self, timeout_s: float) -> None:
        """Start nothing more, let running attempts finish, then interrupt and at last revoke them.

        Returns within `timeout_s` and five seconds, whatever they do.
        """
        self.stop_claims()
        with self._lock:
            if not self._running:
                self._drained.set()
        if self._thread is not None and self._outlasts(timeout_s):
            for attempt in self._live():
                attempt.context.interrupt(InterruptReason.STOP)
            self._clock.wait(self._drained, min(_STOP_GRACE_S, self._settings.cancel_timeout_s))
            for attempt in self._live():
                try:
                    self._revoke(attempt)
                except KalamDbError:
                    # The store refuses; the next start recovers the job.
                    _log.exception("the end of job '%s' was not recorded", attempt.row.job_id)
        self._ending = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(_STOP_JOIN_S)
            self._thread = None
        self._threads.stop()
        self._tasks.stop()

    def _outlasts(self, timeout_s: float) -> bool:
        """Wait for running attempts; whether some still run."""
        self._clock.wait(self._drained, 0.0 if self._hurried else timeout_s)
        return bool(self._live())

    def _live(self) -> list[Attempt]:
        with self._lock:
            return list(self._running.values())
