"""The loop that claims jobs and runs them: threads for sync executors, one event loop for async ones."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
import traceback
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

import msgspec

from kalamdb.clock import Clock
from kalamdb.errors import KalamDbError, LeaseLost
from kalamdb.jobs.context import JobContext, completed
from kalamdb.jobs.model import (
    Completed,
    InterruptReason,
    Job,
    JobInterrupted,
    Outcome,
    Permanent,
    Retry,
    Skipped,
    Snooze,
)
from kalamdb.jobs.registry import JobRegistry
from kalamdb.jobs.settings import JobSettings
from kalamdb.storage import Batch, Fenced, StorageBackend
from kalamdb.storage.jobs import Hold, JobFilter, JobMove, JobRow, JobStatus, OnInterrupt

if TYPE_CHECKING:
    from kalamdb.jobs.manager import UnifiedJobManager

RESTARTED = "Server restarted during execution"
_IDLE_S = 3600.0
_TICK_S = 0.5
_log = logging.getLogger("kalamdb.jobs")


class _Attempt:
    """One running lease."""

    def __init__(self, row: JobRow, context: JobContext[Any], deadline_s: float | None) -> None:
        self.row = row
        self.context = context
        self.deadline_s = deadline_s
        self.revoke_s: float | None = None
        self.ended = threading.Event()


class Runner:
    """Owns the slots. Thread-safe."""

    def __init__(
        self,
        manager: UnifiedJobManager,
        backend: StorageBackend,
        registry: JobRegistry,
        clock: Clock,
        settings: JobSettings,
        services: Any,
    ) -> None:
        self._manager = manager
        self._backend = backend
        self._registry = registry
        self._clock = clock
        self._settings = settings
        self.services = services
        self._lock = threading.Lock()
        self._running: dict[str, _Attempt] = {}
        self._abandoned: set[threading.Thread] = set()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._slots = settings.max_concurrent
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_thread: threading.Thread | None = None

    @property
    def abandoned_threads(self) -> int:
        """Threads that outlived their lease."""
        self._abandoned = {thread for thread in self._abandoned if thread.is_alive()}
        return len(self._abandoned)

    def wake(self) -> None:
        """Look for work now."""
        self._wake.set()

    def start(self, max_concurrent: int) -> None:
        """Recover, then begin; does nothing when it runs."""
        if self._thread is not None:
            return
        self._slots = max_concurrent
        self._stopping = False
        self._recover()
        self._thread = threading.Thread(target=self._run, name="kalamdb-jobs", daemon=True)
        self._thread.start()

    def _recover(self) -> None:
        for row in self._backend.jobs.query(JobFilter(statuses=frozenset({JobStatus.RUNNING}), limit=None)):
            deaths = row.process_deaths + 1
            row = msgspec.structs.replace(row, process_deaths=deaths)
            if row.cancel_requested:
                self._finish(
                    row, row.lease_id, JobStatus.CANCELLED, row.message, None, (("INFO", "Job cancelled by user"),)
                )
            elif deaths >= self._settings.quarantine_after:
                text = (
                    f"quarantined: the process died {deaths} times while the job was running; "
                    f"RETRY JOB '{row.job_id}' runs it again"
                )
                self._fail(msgspec.structs.replace(row, hold=Hold.QUARANTINED), row.lease_id, text, None)
            else:
                self._interrupted(row, row.lease_id)

    def _run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            try:
                more = self._pass()
            except KalamDbError:
                if self._stopping:
                    return
                _log.exception("a pass of the job runner failed; it goes on")
                more = False
            if not more:
                self._clock.wait(self._wake, self._pause_s())

    def _pause_s(self) -> float:
        with self._lock:
            timed = any(one.deadline_s is not None or one.revoke_s is not None for one in self._running.values())
        due_ms = self._backend.jobs.next_due_ms() if not self._stopping else None
        pause = _TICK_S if timed else _IDLE_S
        return pause if due_ms is None else max(min(pause, (due_ms - self._clock.now_ms()) / 1000), 0.001)

    def _pass(self) -> bool:
        self._expire()
        self._admit()
        with self._lock:
            free = self._slots - len(self._running)
            keys = {one.row.concurrency_key for one in self._running.values() if one.row.concurrency_key}
        limit = self._settings.abandoned_threads_max or self._slots
        if free <= 0 or self._stopping or self.abandoned_threads > limit:
            return False

        def runnable(row: JobRow) -> bool:
            if not self._registry.contains(row.job_type) or (
                row.concurrency_key is not None and row.concurrency_key in keys
            ):
                return False
            if row.concurrency_key is not None:
                keys.add(row.concurrency_key)
            return True

        rows = self._backend.jobs.claim(limit=min(free, 50), runnable=runnable, on_claim=self._on_claim)
        for row in rows:
            self._manager.note(row)
            self._launch(row)
        return bool(rows)

    def _on_claim(self, row: JobRow) -> tuple[JobRow, tuple[tuple[str, str], ...]]:
        started = row.started_at or row.updated_at
        text = "Job started" if row.attempt == 1 else f"Job started (attempt {row.attempt})"
        return msgspec.structs.replace(row, started_at=started, progress=None), (("INFO", text),)

    def _admit(self) -> None:
        """new -> queued, also when no slot is free."""
        rows = self._backend.jobs.query(JobFilter(statuses=frozenset({JobStatus.NEW}), limit=500))
        known = [row for row in rows if row.status is JobStatus.NEW]
        if not known:
            return
        now_ms = self._clock.now_ms()
        moves = [
            JobMove(
                JobStatus.NEW,
                None,
                msgspec.structs.replace(row, status=JobStatus.QUEUED, updated_at=now_ms),
                (("INFO", "Job queued"),),
            )
            for row in known
        ]
        try:
            self._backend.commit(Batch(jobs=list(moves)))
        except Fenced:
            self._wake.set()
            return
        if len(known) == 500:
            self._wake.set()

    def _launch(self, row: JobRow) -> None:
        executor = self._registry.get_or_error(row.job_type)
        context: JobContext[Any]
        try:
            params = executor.decode(row.parameters)
        except KalamDbError as exc:
            self._fail(row, row.lease_id, str(exc), None)
            return
        context = JobContext(
            row, params, backend=self._backend, services=self.services, clock=self._clock, settings=self._settings,
            on_change=self._manager.note, view=self._manager.view, create=self._manager.create_job,
        )  # fmt: skip
        deadline_s = None if row.timeout_s is None else self._clock.monotonic_s() + row.timeout_s
        attempt = _Attempt(row, context, deadline_s)
        with self._lock:
            self._running[row.job_id] = attempt
        if inspect.iscoroutinefunction(executor.execute) or inspect.iscoroutinefunction(
            getattr(executor, "_function", None)
        ):
            asyncio.run_coroutine_threadsafe(self._run_async(attempt, executor.execute(context)), self._event_loop())  # type: ignore[arg-type]
            return
        thread = threading.Thread(
            target=self._run_sync, args=(attempt, executor), name=f"kalamdb-{row.job_id}", daemon=True
        )
        thread.start()

    def _event_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._loop_thread = threading.Thread(target=self._loop.run_forever, name="kalamdb-jobs-async", daemon=True)
            self._loop_thread.start()
        return self._loop

    async def _run_async(self, attempt: _Attempt, coroutine: Coroutine[Any, Any, Outcome]) -> None:
        try:
            outcome: Outcome | BaseException = await coroutine
        except BaseException as exc:
            # A job may raise anything, SystemExit too; it ends that job and nothing else.
            outcome = exc
        await asyncio.get_running_loop().run_in_executor(None, self._settle, attempt, outcome)

    def _run_sync(self, attempt: _Attempt, executor: Any) -> None:
        try:
            outcome: Outcome | BaseException = executor.execute(attempt.context)
        except BaseException as exc:
            # A job may raise anything, SystemExit too; it ends that job and nothing else.
            outcome = exc
        self._settle(attempt, outcome)

    # Ending an attempt

    def _settle(self, attempt: _Attempt, outcome: Outcome | BaseException) -> None:
        context = attempt.context
        try:
            stored = self._backend.jobs.get(attempt.row.job_id)
            if stored is not None and stored.status is JobStatus.RUNNING and stored.lease_id == context.lease_id:
                self._record(attempt, context.row, outcome)
        except Fenced:
            pass
        except KalamDbError:
            if not self._stopping:
                _log.exception("the end of job '%s' was not recorded", attempt.row.job_id)
        finally:
            with self._lock:
                if self._running.get(attempt.row.job_id) is attempt:
                    del self._running[attempt.row.job_id]
            attempt.ended.set()
            self._manager.note(attempt.row)

    def _record(self, attempt: _Attempt, row: JobRow, outcome: Outcome | BaseException) -> None:
        lease = attempt.context.lease_id
        now_ms = self._clock.now_ms()
        match outcome:
            case None | Completed():
                message = outcome.message if outcome is not None else None
                result = outcome.result if outcome is not None else None
                text = "Job completed" if message is None else f"Job completed: {message}"
                self._commit(row, lease, completed(row, message, result, now_ms, None), (("INFO", text),))
            case Skipped(message):
                self._finish(row, lease, JobStatus.SKIPPED, message, None, (("INFO", f"Job skipped: {message}"),))
            case Snooze(after_s):
                waiting = msgspec.structs.replace(
                    row, status=JobStatus.QUEUED, lease_id=None, run_at=now_ms + int(after_s * 1000), updated_at=now_ms
                )
                self._commit(row, lease, waiting, (("INFO", f"Job snoozed for {after_s:g}s"),))
            case Retry(after_s, reason):
                delay_ms = None if after_s is None else int(after_s * 1000)
                self._retry_or_fail(row, lease, reason, None, delay_ms)
            case JobInterrupted():
                self._stopped(attempt, row, lease, outcome)
            case Permanent():
                self._fail(row, lease, str(outcome) or "failed", self._trace(outcome))
            case BaseException() if attempt.context.interrupt_reason is InterruptReason.CANCEL:
                self._stopped(attempt, row, lease, JobInterrupted(InterruptReason.CANCEL))
            case BaseException():
                text = str(outcome) if isinstance(outcome, KalamDbError) else f"{type(outcome).__name__}: {outcome}"
                self._retry_or_fail(row, lease, text[: self._settings.message_bytes_max], self._trace(outcome), None)
            case _:
                text = (
                    f"the executor returned {type(outcome).__name__}, expected Completed, "
                    "Skipped, Retry, Snooze or None"
                )
                self._fail(row, lease, text, None)

    def _stopped(self, attempt: _Attempt, row: JobRow, lease: int, interrupted: JobInterrupted) -> None:
        match attempt.context.interrupt_reason or interrupted.reason:
            case InterruptReason.CANCEL:
                row = msgspec.structs.replace(row, cancel_requested=True)
                self._finish(row, lease, JobStatus.CANCELLED, row.message, None, (("INFO", "Job cancelled by user"),))
            case InterruptReason.TIMEOUT:
                self._retry_or_fail(
                    row, lease, f"the attempt took longer than its time-out of {row.timeout_s:g} s", None, None
                )
            case _:
                self._interrupted(row, lease)

    def _trace(self, exc: BaseException) -> str:
        text = "".join(traceback.format_exception(exc)).encode(errors="replace")
        return text[-self._settings.trace_bytes_max :].decode(errors="replace")

    def _retry_or_fail(
        self, row: JobRow, lease: int | None, error: str, trace: str | None, delay_ms: int | None
    ) -> None:
        if row.retry_count >= row.max_retries:
            self._fail(row, lease, error, trace)
            return
        policy, used, now_ms = row.retry, row.retry_count + 1, self._clock.now_ms()
        if delay_ms is None:
            grown = min(policy.base_ms * policy.factor ** min(row.retry_count, 64), policy.cap_ms)
            share = int.from_bytes(self._clock.random_bytes(4), "big") / 0xFFFF_FFFF
            delay_ms = int(grown * (1 + policy.jitter * (2 * share - 1)))
        waiting = msgspec.structs.replace(
            row, status=JobStatus.RETRYING, lease_id=None, retry_count=used, message=error, exception_trace=trace,
            run_at=now_ms + delay_ms, updated_at=now_ms,
        )  # fmt: skip
        text = f"Job failed, retrying in {delay_ms / 1000:g}s (attempt {used}/{row.max_retries})"
        self._commit(row, lease, waiting, (("WARN", text),))

    def _fail(self, row: JobRow, lease: int | None, error: str, trace: str | None) -> None:
        self._finish(row, lease, JobStatus.FAILED, error, trace, (("ERROR", f"Job failed permanently: {error}"),))

    def _interrupted(self, row: JobRow, lease: int | None) -> None:
        """A crash or a hard stop."""
        match row.on_interrupt:
            case OnInterrupt.REQUEUE:
                waiting = msgspec.structs.replace(
                    row, status=JobStatus.QUEUED, lease_id=None, updated_at=self._clock.now_ms()
                )
                self._commit(row, lease, waiting, (("WARN", f"{RESTARTED}; job queued again"),))
            case OnInterrupt.RETRY:
                self._retry_or_fail(row, lease, RESTARTED, None, None)
            case OnInterrupt.FAIL:
                self._fail(row, lease, RESTARTED, None)

    def _finish(
        self,
        row: JobRow,
        lease: int | None,
        status: JobStatus,
        message: str | None,
        trace: str | None,
        events: tuple[tuple[str, str], ...],
    ) -> None:
        now_ms = self._clock.now_ms()
        ended = msgspec.structs.replace(
            row,
            status=status,
            message=message,
            exception_trace=trace,
            lease_id=None,
            finished_at=now_ms,
            updated_at=now_ms,
        )
        self._commit(row, lease, ended, events)

    def _commit(self, row: JobRow, lease: int | None, new: JobRow, events: tuple[tuple[str, str], ...]) -> None:
        commit = self._backend.commit(Batch(jobs=[JobMove(JobStatus.RUNNING, lease, new, events)]))
        self._backend.wait_durable(commit)
        self._manager.note(new)

    # Interrupting

    def cancel(self, row: JobRow) -> Job:
        """Ask a running attempt to stop; take its lease away when it does not."""
        with self._lock:
            attempt = self._running.get(row.job_id)
        if attempt is None:
            self._finish(
                row, row.lease_id, JobStatus.CANCELLED, row.message, None, (("INFO", "Job cancelled by user"),)
            )
            return self._manager.get_job(row.job_id)
        attempt.context.interrupt(InterruptReason.CANCEL)
        if not attempt.ended.wait(self._settings.cancel_timeout_s):
            self._revoke(attempt, JobStatus.CANCELLED)
        return self._manager.get_job(row.job_id)

    def _revoke(self, attempt: _Attempt, status: JobStatus | None) -> None:
        """Take the lease of an attempt that does not stop; its thread goes on but can write nothing."""
        attempt.context.revoke()
        row, lease = attempt.context.row, attempt.context.lease_id
        stored = self._backend.jobs.get(row.job_id)
        try:
            if stored is not None and stored.status is JobStatus.RUNNING and stored.lease_id == lease:
                stored = msgspec.structs.replace(stored, cancel_requested=status is JobStatus.CANCELLED)
                self._stopped(attempt, stored, lease, JobInterrupted(InterruptReason.STOP))
        except (Fenced, LeaseLost):
            pass
        with self._lock:
            self._running.pop(attempt.row.job_id, None)
            for thread in threading.enumerate():
                if thread.name == f"kalamdb-{attempt.row.job_id}":
                    self._abandoned.add(thread)

    def _expire(self) -> None:
        now_s = self._clock.monotonic_s()
        with self._lock:
            late = [one for one in self._running.values() if one.deadline_s is not None and one.deadline_s <= now_s]
        for attempt in late:
            if attempt.revoke_s is None:
                attempt.context.interrupt(InterruptReason.TIMEOUT)
                attempt.revoke_s = now_s + self._settings.cancel_timeout_s
            elif attempt.revoke_s <= now_s:
                self._revoke(attempt, None)

    def stop(self, timeout_s: float) -> None:
        """Claim nothing more, let running attempts finish, then interrupt and at last revoke them."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        deadline = self._clock.monotonic_s() + timeout_s
        with self._lock:
            running = list(self._running.values())
        for attempt in running:
            attempt.ended.wait(max(deadline - self._clock.monotonic_s(), 0))
        late = [attempt for attempt in running if not attempt.ended.is_set()]
        for attempt in late:
            attempt.context.interrupt(InterruptReason.STOP)
        grace = self._clock.monotonic_s() + min(2.0, self._settings.cancel_timeout_s)
        for attempt in late:
            if not attempt.ended.wait(max(grace - self._clock.monotonic_s(), 0)):
                self._revoke(attempt, None)
        if self._loop is not None and self._loop_thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop_thread.join(2.0)
            self._loop = None
