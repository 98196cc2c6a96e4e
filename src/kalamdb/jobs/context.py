"""What an executor holds while it works: parameters, progress, checkpoint, log, and fenced writes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Any, Generic, Protocol, TypeVar

from kalamdb.clock import Clock
from kalamdb.errors import LeaseLost, Unavailable
from kalamdb.jobs.endings import Endings
from kalamdb.jobs.model import InterruptReason, Job, JobInterrupted, stored_json
from kalamdb.jobs.settings import JobSettings
from kalamdb.storage import Batch, StorageBackend
from kalamdb.storage.jobs import Events, JobEvent, JobFence, JobMove, JobRow, JobStatus, Progress

Params = TypeVar("Params")
_PROGRESS_INTERVAL_S = 0.25
_PROGRESS_TEXT_MAX = 500


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
    """One attempt of a job. Everything through it raises LeaseLost once the lease is gone. Thread-safe.

    In async executors the calls that wait for the database have awaitable twins: `aexecute`, `ainsert`,
    `atransaction`, `acheckpoint`, `acreate_job`. The plain ones would hold up every async job.
    """

    params: Params
    """Parameters as the executor's type; set before `execute` is called."""

    def __init__(
        self,
        row: JobRow,
        *,
        backend: StorageBackend,
        services: JobServices | None,
        clock: Clock,
        settings: JobSettings,
        endings: Endings,
        create: Callable[..., Job],
    ) -> None:
        assert row.lease_id is not None
        self.row = row
        """The job as it was when this attempt began."""
        self.lease_id: int = row.lease_id
        self.attempt = row.attempt
        self.checkpoint_state: Any = row.checkpoint
        self.services = services
        self.sealed = False
        """Whether a move that ends the job was handed out, for a commit of the executor."""
        self._backend = backend
        self._clock = clock
        self._settings = settings
        self._endings = endings
        self._create = create
        self._lock = threading.RLock()
        self._interrupt: InterruptReason | None = None
        self._revoked = False
        self.on_interrupt: Callable[[InterruptReason], None] | None = None
        """Told when the attempt is asked to stop."""
        self._shown_s: float | None = None
        self._progress: Progress | None = None
        self._unsaved = False

    @property
    def log(self) -> JobLog:
        """Writes lines into the job's history, and so into jobs.log."""
        return JobLog(self)

    @property
    def job(self) -> Job:
        """The job as it is stored now."""
        return Job(self._backend.jobs.get(self.row.job_id) or self.row, self._backend.jobs)

    @property
    def cancelled(self) -> bool:
        """Whether the attempt was asked to stop."""
        return self._interrupt is not None

    def interrupt(self, reason: InterruptReason) -> None:
        """Ask the attempt to stop at its next check; the first reason stays."""
        self._interrupt = self._interrupt or reason
        if (told := self.on_interrupt) is not None:
            told(self._interrupt)

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
                f"job '{self.row.job_id}' does not hold lease {self.lease_id} any more; nothing was written"
            )

    # Progress, checkpoint, log

    def progress(self, done: int, total: int | None = None, unit: str = "", text: str = "") -> None:
        """Say how far the work is; never goes backwards. Stored at most four times a second."""
        with self._lock:
            self._require_lease()
            done = max(int(done), self._progress.done if self._progress is not None else 0)
            self._progress = Progress(
                done=done, total=None if total is None else int(total), unit=str(unit)[:_PROGRESS_TEXT_MAX],
                text=str(text)[:_PROGRESS_TEXT_MAX],
            )  # fmt: skip
            self._unsaved = True
            now_s = self._clock.monotonic_s()
            if self._shown_s is None or now_s - self._shown_s >= _PROGRESS_INTERVAL_S:
                self._shown_s = now_s
                self.amend({})

    def checkpoint(self, state: Any) -> None:
        """Keep `state` (JSON-like) for the next attempt; durable on return. Raises LimitExceeded, InvalidRequest."""
        what = f"the checkpoint of job '{self.row.job_id}'"
        kept = stored_json(state, what, self._settings.checkpoint_bytes_max)
        with self._lock:
            self._require_lease()
            self.amend({"checkpoint": kept}, durable=True)
            self.checkpoint_state = kept

    def write_event(self, level: str, text: str) -> None:
        """Add a line to the job's history under the lease."""
        raw = str(text).encode(errors="backslashreplace")[: self._settings.message_bytes_max]
        with self._lock:
            self._require_lease()
            self.amend({}, ((level, raw.decode(errors="ignore")),))

    def amend(self, changes: Mapping[str, Any], events: Events = (), *, durable: bool = False) -> None:
        """Change columns of the running job under the lease. Raises LeaseLost."""
        with self._lock:
            batch = Batch(jobs=[self._move(changes, events)])
            commit = self._backend.commit(batch)
        if durable:
            self._backend.wait_durable(commit)

    def _move(self, changes: Mapping[str, Any], events: Events = ()) -> JobMove:
        return JobMove(
            self.row.job_id, JobStatus.RUNNING, self.lease_id, {**changes, **self.unsaved_progress()}, events
        )

    def unsaved_progress(self) -> dict[str, Any]:
        """The change that stores the newest progress, if it is not stored."""
        unsaved, self._unsaved = self._unsaved, False
        return {"progress": self._progress} if unsaved else {}

    def events(self) -> Sequence[JobEvent]:
        """The job's history."""
        return self._backend.jobs.events(self.row.job_id)

    # Binding commits to the lease

    def fence(self) -> JobFence:
        """The precondition that the lease is held."""
        self._require_lease()
        return JobFence(self.row.job_id, self.lease_id)

    def completion(self, message: str, result: Any = None) -> JobMove:
        """The move that ends the job as completed, for the commit that holds its last effect."""
        self._require_lease()
        self.sealed = True
        ending = self._endings.completed(message, result)
        return self._move(ending.changes, ending.events)

    def seal(self, batch: Batch, *, message: str | None = None, result: Any = None) -> None:
        """Bind a batch to the lease; with `message` the batch also ends the job as completed."""
        with self._lock:
            batch.jobs.append(self.fence() if message is None else self.completion(message, result))

    def intent_owner(self) -> tuple[str, int]:
        """(job id, lease id) for the intents of files."""
        return self.row.job_id, self.lease_id

    # The database, under the lease

    def _services(self) -> JobServices:
        self._require_lease()
        if self.services is None:
            raise Unavailable("this job manager has no database; only checks, progress and checkpoints work")
        return self.services

    def execute(
        self, sql: str, params: Sequence[Any] | Mapping[str, Any] | None = None, *, user: str | None = None
    ) -> Any:
        """Run SQL; its writes hold only while the lease does.

        INSERT, UPDATE, DELETE and CALL of one text are one commit. Every other statement is one commit of its own,
        STORAGE FLUSH and COMPACT ... ALL one per table; each is refused with LeaseLost when the lease went before
        it. What PRUNE BACKUPS removes lies outside the database and is bound to nothing.
        """
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

    # The same, awaitable

    async def aexecute(
        self, sql: str, params: Sequence[Any] | Mapping[str, Any] | None = None, *, user: str | None = None
    ) -> Any:
        """See execute."""
        return await asyncio.to_thread(self.execute, sql, params, user=user)

    async def ainsert(self, table: str, data: Any, *, user: str | None = None) -> int:
        """See insert."""
        return await asyncio.to_thread(self.insert, table, data, user=user)

    @asynccontextmanager
    async def atransaction(
        self, complete: str | None = None, *, user: str | None = None
    ) -> AsyncIterator[AsyncTransaction]:
        """See transaction; the calls of what it gives are awaitable."""
        inner = self.transaction(complete, user=user)
        entered = await asyncio.to_thread(inner.__enter__)
        try:
            yield AsyncTransaction(entered)
        except BaseException as exc:
            if not await asyncio.to_thread(inner.__exit__, type(exc), exc, exc.__traceback__):
                raise
        else:
            await asyncio.to_thread(inner.__exit__, None, None, None)

    async def acheckpoint(self, state: Any) -> None:
        """See checkpoint."""
        await asyncio.to_thread(self.checkpoint, state)

    async def acreate_job(
        self, job_type: str, params: Any = None, idempotency_key: str | None = None, **options: Any
    ) -> Job:
        """See create_job."""
        return await asyncio.to_thread(self.create_job, job_type, params, idempotency_key, **options)


class AsyncTransaction:
    """A transaction whose calls are awaitable."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    async def execute(self, sql: str, params: Any = None, **options: Any) -> Any:
        """Run statements inside the transaction."""
        return await asyncio.to_thread(self._inner.execute, sql, params, **options)

    async def insert(self, table: str, data: Any, **options: Any) -> Any:
        """Insert rows inside the transaction."""
        return await asyncio.to_thread(self._inner.insert, table, data, **options)

    async def create_job(self, job_type: str, params: Any = None, *arguments: Any, **options: Any) -> None:
        """Create a job that lives and dies with the transaction."""
        await asyncio.to_thread(self._inner.create_job, job_type, params, *arguments, **options)


class EventWriter(Protocol):
    """Where lines go."""

    def write_event(self, level: str, text: str) -> None:
        """Add a line to the job's history."""
        ...


class JobLog:
    """Lines in the job's history; they appear in jobs.log too."""

    def __init__(self, context: EventWriter) -> None:
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
