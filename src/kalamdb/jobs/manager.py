"""The one job manager: creating, finding, waiting for and ending jobs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

import msgspec

from kalamdb.clock import Clock
from kalamdb.errors import Conflict, IdempotencyConflict, InvalidRequest, LimitExceeded, NotFound, Timeout
from kalamdb.jobs.log import JobLogFile
from kalamdb.jobs.model import InterruptReason, Job, JobIds
from kalamdb.jobs.registry import JobExecutor, JobRegistry, executor_of
from kalamdb.jobs.runner import Runner
from kalamdb.jobs.settings import JobSettings
from kalamdb.storage import Batch, Fenced, StorageBackend
from kalamdb.storage.jobs import JobFence, JobFilter, JobInsert, JobMove, JobRow, JobStatus, OnInterrupt, RetryPolicy
from kalamdb.types import JobId

_UNKNOWN_PREFIX = "UN"
_MOVE_ATTEMPTS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRequest:
    """One job for `create_jobs`; the fields are the arguments of `create_job`."""

    job_type: str
    params: Any = None
    idempotency_key: str | None = None
    max_retries: int | None = None
    queue: str | None = None
    priority: int | None = None
    run_at: datetime | None = None
    timeout_s: float | None = None
    allow_unknown: bool = False
    created_by: str = "system"
    options: dict[str, Any] = field(default_factory=dict)


class UnifiedJobManager:
    """Does all background work of a database and runs the application's own jobs. Thread-safe."""

    def __init__(
        self,
        backend: StorageBackend,
        registry: JobRegistry,
        clock: Clock,
        settings: JobSettings,
        *,
        log: JobLogFile | None = None,
        services: Any = None,
        resolve_table: Callable[[str], int | None] = lambda table_id: None,
    ) -> None:
        self._backend = backend
        self._clock = clock
        self._settings = settings
        self._ids = JobIds(clock)
        self._changed = threading.Condition()
        self.registry = registry
        self.resolve_table = resolve_table
        self.log = log
        self.runner = Runner(self, backend, registry, clock, settings, services)
        registry.on_register = self.runner.wake

    # Creating

    def create_job(
        self,
        job_type: str,
        params: Any = None,
        idempotency_key: str | None = None,
        *,
        max_retries: int | None = None,
        queue: str | None = None,
        priority: int | None = None,
        run_at: datetime | None = None,
        timeout_s: float | None = None,
        on_conflict: Literal["error", "return"] = "error",
        allow_unknown: bool = False,
        fence: JobFence | None = None,
    ) -> Job:
        """Accept a job; durable on return, status `new`.

        None takes the executor's policy. Raises IdempotencyConflict (or returns that job with
        on_conflict="return"), NotFound for a type without executor, LimitExceeded, InvalidRequest.
        """
        request = JobRequest(
            job_type=job_type, params=params, idempotency_key=idempotency_key, max_retries=max_retries, queue=queue,
            priority=priority, run_at=run_at, timeout_s=timeout_s, allow_unknown=allow_unknown,
        )  # fmt: skip
        insert = self.prepare(request)
        try:
            commit = self._backend.commit(Batch(jobs=[insert] if fence is None else [fence, insert]))
        except IdempotencyConflict as conflict:
            conflict.job = self.view(conflict.job)
            if on_conflict == "return":
                found: Job = conflict.job
                return found
            raise
        self._backend.wait_durable(commit)
        created = msgspec.structs.replace(insert.row, job_id=commit.jobs[0], events=len(insert.events))
        self.note(created)
        return self.view(created)

    def create_jobs(self, requests: Sequence[JobRequest | Mapping[str, Any]]) -> list[Job]:
        """Accept many jobs in one commit; all or none."""
        inserts = [self.prepare(one if isinstance(one, JobRequest) else JobRequest(**one)) for one in requests]
        if not inserts:
            return []
        commit = self._backend.commit(Batch(jobs=list(inserts)))
        self._backend.wait_durable(commit)
        rows = [
            msgspec.structs.replace(insert.row, job_id=job_id, events=len(insert.events))
            for insert, job_id in zip(inserts, commit.jobs, strict=True)
        ]
        self.runner.wake()
        return [self.view(row) for row in rows]

    def prepare(self, request: JobRequest) -> JobInsert:
        """The operation that accepts a job, for a batch of the caller."""
        executor = self.registry.get(request.job_type)
        if executor is None and not request.allow_unknown:
            raise NotFound(
                f"there is no executor for job type '{request.job_type}'; register one or pass allow_unknown=True"
            )
        waiting = self._backend.jobs.count(JobStatus.NEW) + self._backend.jobs.count(JobStatus.QUEUED)
        if waiting >= self._settings.queued_max:
            raise LimitExceeded(
                f"{waiting} jobs wait already, at most {self._settings.queued_max} are allowed (jobs.queued_max)"
            )
        parameters = self._parameters(request, executor)
        decoded = executor.decode(parameters) if executor is not None else None
        table_uid = parameters.get("table_uid")
        if table_uid is None and isinstance(parameters.get("table_id"), str):
            table_uid = self.resolve_table(parameters["table_id"])
        key = request.idempotency_key
        if key is None and executor is not None:
            key = executor.idempotency_key(decoded, table_uid)
        now_ms = self._clock.now_ms()
        policy = executor.retry if executor is not None else None
        retries = (
            request.max_retries
            if request.max_retries is not None
            else executor.max_retries
            if executor is not None
            else None
        )
        if retries is None:
            retries = self._settings.max_retries
        if retries < 0:
            raise InvalidRequest(f"max_retries is {retries}, 0 or more is allowed")
        row = JobRow(
            job_id=JobId(""),
            job_type=request.job_type,
            parameters=parameters,
            idempotency_key=key,
            queue=request.queue or (executor.queue if executor is not None else "default"),
            priority=request.priority or 0,
            max_retries=retries,
            concurrency_key=executor.concurrency_key(decoded, table_uid) if executor is not None else None,
            table_uid=table_uid,
            created_by=request.created_by,
            created_at=now_ms,
            updated_at=now_ms,
            run_at=_milliseconds(request.run_at),
            timeout_s=request.timeout_s
            if request.timeout_s is not None
            else executor.timeout_s
            if executor is not None
            else None,
            on_interrupt=executor.on_interrupt if executor is not None else OnInterrupt.RETRY,
            retry=policy or RetryPolicy(base_ms=self._settings.retry_backoff_ms),
        )
        prefix = executor.prefix if executor is not None else _UNKNOWN_PREFIX
        return JobInsert(row, lambda: self._ids.next(prefix), (("INFO", "Job created"),))

    def _parameters(self, request: JobRequest, executor: JobExecutor[Any] | None) -> dict[str, Any]:
        raw = {} if request.params is None else msgspec.to_builtins(request.params)
        if isinstance(raw, (list, tuple)):
            raw = {f"arg{at}": value for at, value in enumerate(raw)}
        if not isinstance(raw, dict):
            raise InvalidRequest(
                f"parameters of a '{request.job_type}' job must be an object, got {type(raw).__name__}"
            )
        try:
            size = len(msgspec.json.encode(raw))
        except (TypeError, ValueError) as exc:
            raise InvalidRequest(f"parameters of a '{request.job_type}' job have no JSON form: {exc}") from exc
        if size > self._settings.parameters_bytes_max:
            raise LimitExceeded(
                f"parameters of a '{request.job_type}' job take {size} bytes, "
                f"at most {self._settings.parameters_bytes_max} are allowed"
            )
        return raw

    def executor(
        self,
        job_type: str,
        *,
        prefix: str,
        retry: RetryPolicy | None = None,
        max_retries: int | None = None,
        timeout_s: float | None = None,
        on_interrupt: str = "retry",
        queue: str = "default",
        concurrency_key: str | None = None,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator that registers a function as the executor of a job type; see `executor_of`."""

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            self.registry.register(
                executor_of(
                    function, job_type, prefix=prefix, retry=retry, max_retries=max_retries, timeout_s=timeout_s,
                    on_interrupt=on_interrupt, queue=queue, concurrency_key=concurrency_key,
                )
            )  # fmt: skip
            return function

        return register

    # Finding

    def get_job(self, job_id: str) -> Job:
        """One job. Raises NotFound."""
        row = self._backend.jobs.get(JobId(job_id))
        if row is None:
            raise NotFound(f"Job '{job_id}' does not exist")
        return self.view(row)

    def list_jobs(
        self,
        *,
        job_type: str | None = None,
        status: str | Sequence[str] | None = None,
        queue: str | None = None,
        idempotency_key: str | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
        sort_by: str = "created_at",
        descending: bool = False,
        limit: int | None = 100,
    ) -> list[Job]:
        """Jobs that match; `created_after` is inclusive, `created_before` exclusive."""
        statuses = None
        if status is not None:
            given = [status] if isinstance(status, str) else list(status)
            try:
                statuses = frozenset(JobStatus(str(one).lower()) for one in given)
            except ValueError as exc:
                raise InvalidRequest(f"{exc}; states are {', '.join(JobStatus)}") from None
        if sort_by not in ("created_at", "updated_at", "priority"):
            raise InvalidRequest(f"sort_by '{sort_by}' is not one of created_at, updated_at, priority")
        rows = self._backend.jobs.query(
            JobFilter(
                job_type=job_type,
                statuses=statuses,
                queue=queue,
                idempotency_key=idempotency_key,
                created_after=_milliseconds(created_after) if created_after else None,
                created_before=_milliseconds(created_before) if created_before else None,
                sort_by=sort_by,
                descending=descending,
                limit=limit,
            )
        )
        return [self.view(row) for row in rows]

    def view(self, row: JobRow) -> Job:
        """A stored row as its users see it."""
        return Job(row, lambda job_id: self._backend.jobs.events(JobId(job_id), limit=1_000_000))

    def wait(self, job_id: str, timeout_s: float | None = None) -> Job:
        """Block until the job has ended, in whatever state. Raises Timeout, NotFound."""
        deadline = None if timeout_s is None else self._clock.monotonic_s() + timeout_s
        with self._changed:
            while True:
                job = self.get_job(job_id)
                if job.status.is_terminal:
                    return job
                left = None if deadline is None else deadline - self._clock.monotonic_s()
                if left is not None and left <= 0:
                    raise Timeout(f"job '{job_id}' is still {job.status} after {timeout_s:g} s")
                self._changed.wait(left)

    def note(self, row: JobRow) -> None:
        """A job changed: wake who waits for it, and the runner."""
        with self._changed:
            self._changed.notify_all()
        if self.log is not None:
            self.log.wake()
        self.runner.wake()

    # Ending

    def cancel_job(self, job_id: str) -> Job:
        """End a job. A running one is asked to stop and loses its lease after jobs.cancel_timeout_s.

        Returns it as it ended: cancelled, or completed when its last commit came first. Raises
        InvalidRequest when it had ended before, NotFound.
        """
        for _ in range(_MOVE_ATTEMPTS):
            row = self.get_job(job_id).row
            if row.status.is_terminal:
                raise InvalidRequest(f"Cannot cancel job '{job_id}' in status {row.status}")
            if row.status is JobStatus.RUNNING:
                return self.runner.cancel(row)
            now_ms = self._clock.now_ms()
            ended = msgspec.structs.replace(
                row, status=JobStatus.CANCELLED, cancel_requested=True, finished_at=now_ms, updated_at=now_ms
            )
            if self._moved(JobMove(row.status, row.lease_id, ended, (("INFO", "Job cancelled by user"),))):
                return self.get_job(job_id)
        raise Conflict(f"job '{job_id}' kept changing; try again")

    def retry_job(self, job_id: str) -> Job:
        """Run a failed or cancelled job again under its id, with fresh retries. Raises InvalidRequest, Conflict."""
        row = self.get_job(job_id).row
        if row.status not in (JobStatus.FAILED, JobStatus.CANCELLED):
            raise InvalidRequest(f"Cannot retry job '{job_id}' in status {row.status}; only failed and cancelled ones")
        now_ms = self._clock.now_ms()
        fresh = msgspec.structs.replace(
            row, status=JobStatus.QUEUED, retry_count=0, process_deaths=0, hold=None, cancel_requested=False,
            run_at=0, finished_at=None, updated_at=now_ms, lease_id=None,
        )  # fmt: skip
        if not self._moved(JobMove(row.status, row.lease_id, fresh, (("INFO", "Job queued again by user"),))):
            raise Conflict(f"job '{job_id}' changed meanwhile; try again")
        return self.get_job(job_id)

    def purge(self, *, finished_before: datetime | None = None, limit: int = 1000) -> int:
        """Remove up to `limit` ended jobs with their history; returns how many."""
        before = _milliseconds(finished_before) if finished_before else None
        ended = frozenset(status for status in JobStatus if status.is_terminal)
        rows = self._backend.jobs.query(JobFilter(statuses=ended, limit=None))
        chosen = [row.job_id for row in rows if before is None or (row.finished_at or 0) < before]
        return self._backend.jobs.delete(chosen[:limit])

    def _moved(self, move: JobMove) -> bool:
        try:
            commit = self._backend.commit(Batch(jobs=[move]))
        except Fenced:
            return False
        self._backend.wait_durable(commit)
        self.note(move.row)
        return True

    # Running

    def run_loop(self, max_concurrent: int | None = None) -> None:
        """Recover what a dead process left running, then run jobs in the background until `stop`. Returns at once."""
        self.runner.start(max_concurrent or self._settings.max_concurrent)

    def stop(self, timeout_s: float | None = None) -> None:
        """Claim nothing more; running jobs get `timeout_s` (shutdown.timeout_s), then as on_interrupt says."""
        self.runner.stop(self._settings.shutdown_timeout_s if timeout_s is None else timeout_s)
        with self._changed:
            self._changed.notify_all()


def _milliseconds(moment: datetime | None) -> int:
    if moment is None:
        return 0
    if moment.tzinfo is None:
        raise InvalidRequest(f"the time {moment.isoformat()} has no time zone; use an aware datetime")
    return int(moment.timestamp() * 1000)


__all__ = ["InterruptReason", "JobRequest", "UnifiedJobManager"]
