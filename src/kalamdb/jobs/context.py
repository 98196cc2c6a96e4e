"""What an executor holds while it works: parameters, progress, checkpoint, log, and fenced writes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from kalamdb.clock import Clock
from kalamdb.errors import LeaseLost, LimitExceeded
from kalamdb.jobs.model import InterruptReason, Job, JobInterrupted
from kalamdb.jobs.settings import JobSettings
from kalamdb.storage import Batch, StorageBackend
from kalamdb.storage.jobs import JobEvent, JobFence, JobMove, JobRow, JobStatus, Progress

Params = TypeVar("Params")
_PROGRESS_INTERVAL_S = 0.25


class JobServices(Protocol):
    """The database as executors see it; every call is bound to the job's lease by `fence`."""

    @property
    def maintenance(self) -> Any:
        """The work of the built-in executors (`kalamdb.tables.maintenance`)."""
        ...

    def execute(self, sql: str, params: Any, *, user: str | None, fence: JobFence) -> Any:
        """Run SQL under the lease."""
        ...

    def insert(self, table: str, data: Any, *, user: str | None, fence: JobFence) -> int:
        """Bulk insert under the lease."""
        ...

    def transaction(
        self, *, user: str | None, operations: Callable[[], list[JobFence | JobMove]]
    ) -> AbstractContextManager[Any]:
        """A transaction whose commit carries `operations()`."""
        ...


class JobContext(Generic[Params]):
    """One attempt of a job. Everything through it raises LeaseLost once the lease is gone. Thread-safe."""

    def __init__(
        self,
        row: JobRow,
        params: Params,
        *,
        backend: StorageBackend,
        services: JobServices | None,
        clock: Clock,
        settings: JobSettings,
        on_change: Callable[[JobRow], None],
        view: Callable[[JobRow], Job],
        create: Callable[..., Job],
    ) -> None:
        assert row.lease_id is not None
        self.params = params
        self.lease_id: int = row.lease_id
        self.attempt = row.attempt
        self.checkpoint_state: Any = row.checkpoint
        self.services = services
        self.sealed: JobRow | None = None
        """The row that ended the job inside a commit of the executor."""
        self._row = row
        self._backend = backend
        self._clock = clock
        self._settings = settings
        self._on_change = on_change
        self._view = view
        self._create = create
        self._lock = threading.RLock()
        self._interrupt: InterruptReason | None = None
        self._revoked = False
        self._shown_s = -1e9
        self._pending: Progress | None = None
        self.log = JobLog(self)

    @property
    def job(self) -> Job:
        """The job as of the last change through this context."""
        return self._view(self._row)

    @property
    def row(self) -> JobRow:
        """The stored row as this attempt knows it."""
        return self._row

    @property
    def cancelled(self) -> bool:
        """Whether the attempt was asked to stop."""
        return self._interrupt is not None

    def interrupt(self, reason: InterruptReason) -> None:
        """Ask the attempt to stop at its next check; the first reason stays."""
        self._interrupt = self._interrupt or reason

    @property
    def interrupt_reason(self) -> InterruptReason | None:
        """Why the attempt was asked to stop."""
        return self._interrupt

    def revoke(self) -> None:
        """Take the lease away: nothing through this context is accepted any more."""
        self._revoked = True

    def check(self) -> None:
        """Raise JobInterrupted when the attempt must stop, LeaseLost when its lease is gone."""
        self._require_lease()
        if self._interrupt is not None:
            raise JobInterrupted(self._interrupt)

    def _require_lease(self) -> None:
        if self._revoked:
            raise LeaseLost(
                f"job '{self._row.job_id}' does not hold lease {self.lease_id} any more; nothing was written"
            )

    def progress(self, done: int, total: int | None = None, unit: str = "", text: str = "") -> None:
        """Say how far the work is; never goes backwards. Stored at most four times a second."""
        with self._lock:
            self._require_lease()
            last = self._pending or self._row.progress
            if last is not None and self._row.progress is not None and done < last.done:
                done = last.done
            self._pending = Progress(done=done, total=total, unit=unit, text=text[:500])
            now_s = self._clock.monotonic_s()
            if now_s - self._shown_s >= _PROGRESS_INTERVAL_S:
                self._shown_s = now_s
                self._save(msgspec.structs.replace(self._row, progress=self._pending))

    def checkpoint(self, state: Any) -> None:
        """Keep `state` (JSON-like) for the next attempt; durable on return. Raises LimitExceeded."""
        size = len(msgspec.msgpack.encode(state))
        if size > self._settings.checkpoint_bytes_max:
            raise LimitExceeded(
                f"the checkpoint of job '{self._row.job_id}' takes {size} bytes, "
                f"at most {self._settings.checkpoint_bytes_max} are allowed (jobs.checkpoint_bytes_max)"
            )
        with self._lock:
            self._require_lease()
            self._save(msgspec.structs.replace(self._row, checkpoint=state), durable=True)
            self.checkpoint_state = state

    def _save(self, row: JobRow, events: tuple[tuple[str, str], ...] = (), *, durable: bool = False) -> None:
        row = msgspec.structs.replace(row, updated_at=self._clock.now_ms())
        commit = self._backend.commit(Batch(jobs=[JobMove(JobStatus.RUNNING, self.lease_id, row, events)]))
        self._row = msgspec.structs.replace(row, events=row.events + len(events))
        self._on_change(self._row)
        if durable:
            self._backend.wait_durable(commit)

    def write_event(self, level: str, text: str) -> None:
        """Add a line to the job's history under the lease."""
        with self._lock:
            self._require_lease()
            self._save(self._row, ((level, text[: self._settings.message_bytes_max]),))

    def events(self) -> Sequence[JobEvent]:
        """The job's history."""
        return self._backend.jobs.events(self._row.job_id)

    def fence(self) -> JobFence:
        """The precondition that the lease is held."""
        self._require_lease()
        return JobFence(self._row.job_id, self.lease_id)

    def completion(self, message: str, result: Any = None) -> JobMove:
        """The move that ends the job as completed, for the commit that holds its last effect."""
        self._require_lease()
        row = completed(self._row, message, result, self._clock.now_ms(), self._pending)
        self.sealed = row
        return JobMove(JobStatus.RUNNING, self.lease_id, row, (("INFO", f"Job completed: {message}"),))

    def seal(self, batch: Batch, *, message: str | None = None, result: Any = None) -> None:
        """Bind a batch to the lease; with `message` the batch also ends the job as completed."""
        with self._lock:
            batch.jobs.append(self.fence() if message is None else self.completion(message, result))

    def intent_owner(self) -> tuple[str, int]:
        """(job id, lease id) for the intents of files."""
        return self._row.job_id, self.lease_id

    # The database, under the lease

    def _services(self) -> JobServices:
        self._require_lease()
        if self.services is None:
            raise LeaseLost("this job manager has no database")
        return self.services

    def execute(
        self, sql: str, params: Sequence[Any] | Mapping[str, Any] | None = None, *, user: str | None = None
    ) -> Any:
        """Run SQL; its writes hold only while the lease does."""
        return self._services().execute(sql, params, user=user, fence=self.fence())

    def insert(self, table: str, data: Any, *, user: str | None = None) -> int:
        """Bulk insert; holds only while the lease does. Returns the rows written."""
        return self._services().insert(table, data, user=user, fence=self.fence())

    def transaction(self, complete: str | None = None, *, user: str | None = None) -> AbstractContextManager[Any]:
        """A transaction under the lease; with `complete` its commit also ends the job with that message."""

        def operations() -> list[JobFence | JobMove]:
            return [self.fence() if complete is None else self.completion(complete)]

        return self._services().transaction(user=user, operations=operations)

    def create_job(self, job_type: str, params: Any = None, idempotency_key: str | None = None, **options: Any) -> Job:
        """Create a further job while the lease holds; arguments as UnifiedJobManager.create_job."""
        return self._create(job_type, params, idempotency_key, fence=self.fence(), **options)


def completed(row: JobRow, message: str | None, result: Any, now_ms: int, progress: Progress | None) -> JobRow:
    """The row of a job that succeeded: trace cleared, lease given back."""
    return msgspec.structs.replace(
        row,
        status=JobStatus.COMPLETED,
        message=message,
        result=result,
        exception_trace=None,
        lease_id=None,
        finished_at=now_ms,
        updated_at=now_ms,
        progress=progress or row.progress,
    )


class JobLog:
    """Lines in the job's history; they appear in jobs.log too."""

    def __init__(self, context: JobContext[Any]) -> None:
        self._context = context

    def debug(self, text: str) -> None:
        """A line of level DEBUG."""
        self._context.write_event("DEBUG", text)

    def info(self, text: str) -> None:
        """A line of level INFO."""
        self._context.write_event("INFO", text)

    def warning(self, text: str) -> None:
        """A line of level WARN."""
        self._context.write_event("WARN", text)

    def error(self, text: str) -> None:
        """A line of level ERROR."""
        self._context.write_event("ERROR", text)
