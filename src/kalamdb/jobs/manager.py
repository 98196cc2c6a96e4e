"""The one job manager: creating, finding, waiting for, steering and ending jobs."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from kalamdb.clock import Clock
from kalamdb.errors import (
    Conflict,
    IdempotencyConflict,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    Timeout,
)
from kalamdb.jobs.endings import Endings
from kalamdb.jobs.explain import Reason, explain
from kalamdb.jobs.history import ENDED, PASS_MAX, History
from kalamdb.jobs.log import JobLogFile
from kalamdb.jobs.model import Cron, Every, Job, JobIds, stored_json
from kalamdb.jobs.queues import JobQueues, QueueRow, check_queue_name
from kalamdb.jobs.registry import JobExecutor, JobRegistry, check_job_type, executor_of
from kalamdb.jobs.runner import Runner
from kalamdb.jobs.settings import JobSettings
from kalamdb.jobs.workers import WorkersFactory
from kalamdb.service import Loop
from kalamdb.storage import Batch, Commit, Fenced, StorageBackend
from kalamdb.storage.jobs import (
    PRIORITY_MAX,
    Events,
    Hold,
    JobFence,
    JobFilter,
    JobInsert,
    JobMove,
    JobOp,
    JobRow,
    JobStatus,
    OnInterrupt,
    RetryPolicy,
)
from kalamdb.types import JobId

_UNKNOWN_PREFIX = "UN"
_MOVE_ATTEMPTS = 16
_CREATED: Events = (("INFO", "Job created"),)
_CREATED_MAX = 10_000
_KEY_LENGTH_MAX = 512
_PURGE_INTERVAL_S = 60.0
_FOREVER_S = 366 * 86_400.0
_SORT_COLUMNS = ("created_at", "updated_at", "priority")


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


class _Waiter:
    """Somebody who waits for the end of one job."""

    __slots__ = ("commit", "ended", "row")

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.row: JobRow | None = None
        self.commit: Commit | None = None


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
        resolve_table: Callable[[str], int | None] = lambda table_id: None,
        workers: WorkersFactory | None = None,
        history: History | None = None,
    ) -> None:
        self._backend = backend
        self._clock = clock
        self._settings = settings
        self._ids = JobIds(clock)
        self._waiters: dict[JobId, list[_Waiter]] = {}
        self._waiters_lock = threading.Lock()
        self._resolve_table = resolve_table
        self._stopped = threading.Event()
        self.registry = registry
        self.log = log
        self.queues = JobQueues(backend, clock)
        endings = Endings(clock, settings)
        self.runner = Runner(backend, registry, self.queues, clock, settings, endings, self.create_job, workers)
        self._history = history or History(backend, settings)
        self._purging = Loop("job-history", self.purge_history, _PURGE_INTERVAL_S, clock)
        registry.on_register.append(self.runner.wake)
        backend.observe(self._on_commit)

    def _on_commit(self, batch: Batch, commit: Commit) -> None:
        """Under the commit lock: whoever changed a job, in whatever batch, the runner and who waits hear of it."""
        if commit.jobs_wait:
            self.runner.wake()
        if commit.changed_jobs and self._waiters:
            for row in commit.changed_jobs:
                if row.status.is_terminal and row.job_id in self._waiters:
                    for waiter in self._waiters.get(row.job_id, ()):
                        waiter.row, waiter.commit = row, commit
                        waiter.ended.set()

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
        created_by: str = "system",
        fence: JobFence | None = None,
    ) -> Job:
        """Accept a job; durable on return, status `new`.

        None takes the executor's policy. Raises IdempotencyConflict (or returns that job with
        on_conflict="return"), NotFound for a type without executor, LimitExceeded, InvalidRequest.
        """
        if on_conflict not in ("error", "return"):
            raise InvalidRequest(f"on_conflict '{on_conflict}' is not one of error, return")
        request = JobRequest(
            job_type=job_type, params=params, idempotency_key=idempotency_key, max_retries=max_retries, queue=queue,
            priority=priority, run_at=run_at, timeout_s=timeout_s, allow_unknown=allow_unknown, created_by=created_by,
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
        return self.view(commit.changed_jobs[0])

    def create_jobs(self, requests: Sequence[JobRequest | Mapping[str, Any]]) -> list[Job]:
        """Accept many jobs in one commit; all or none. At most 10,000."""
        if len(requests) > _CREATED_MAX:
            raise LimitExceeded(f"{len(requests)} jobs are to be created at once, at most {_CREATED_MAX} are allowed")
        inserts: list[JobOp] = []
        for one in requests:
            try:
                request = one if isinstance(one, JobRequest) else JobRequest(**one)
            except TypeError as exc:
                raise InvalidRequest(f"request {len(inserts) + 1} is not one: {exc}") from None
            inserts.append(self.prepare(request, before=len(inserts)))
        if not inserts:
            return []
        try:
            commit = self._backend.commit(Batch(jobs=inserts))
        except IdempotencyConflict as conflict:
            conflict.job = self.view(conflict.job)
            raise
        self._backend.wait_durable(commit)
        return [self.view(row) for row in commit.changed_jobs]

    def prepare(self, request: JobRequest, *, before: int = 0) -> JobInsert:
        """The operation that accepts a job, for a batch of the caller that holds `before` others already."""
        executor = self.registry.get(request.job_type)
        if executor is None and not request.allow_unknown:
            raise NotFound(
                f"there is no executor for job type '{request.job_type}'; register one or pass allow_unknown=True"
            )
        check_job_type(request.job_type)
        self._check_room(before)
        parameters = self._parameters(request)
        decoded = executor.decode(parameters) if executor is not None else None
        table_uid = parameters.get("table_uid")
        if table_uid is None and isinstance(parameters.get("table_id"), str):
            table_uid = self._resolve_table(parameters["table_id"])
        key = request.idempotency_key
        if key is None and executor is not None:
            key = executor.idempotency_key(decoded, table_uid)
        now_ms = self._clock.now_ms()
        # One key space and one text form for all of the row: what cannot be stored is refused here.
        row = JobRow(
            job_id=JobId(""),
            job_type=request.job_type,
            parameters=parameters,
            idempotency_key=_key("idempotency_key", key),
            queue=check_queue_name(request.queue if request.queue is not None else _of(executor, "queue", "default")),
            priority=_whole(
                "priority",
                request.priority if request.priority is not None else _of(executor, "priority", 0),
                -PRIORITY_MAX,
                PRIORITY_MAX,
            ),
            max_retries=_whole("max_retries", self._retries(request, executor), 0, 1_000_000),
            concurrency_key=_key(
                "concurrency_key", executor.concurrency_key(decoded, table_uid) if executor is not None else None
            ),
            table_uid=table_uid,
            created_by=request.created_by,
            created_at=now_ms,
            updated_at=now_ms,
            run_at=_milliseconds(request.run_at),
            timeout_s=_timeout(
                request.timeout_s if request.timeout_s is not None else _of(executor, "timeout_s", None)
            ),
            on_interrupt=_of(executor, "on_interrupt", OnInterrupt.RETRY),
            retry=_of(executor, "retry", None) or RetryPolicy(base_ms=self._settings.retry_backoff_ms),
        )
        prefix = executor.prefix if executor is not None else _UNKNOWN_PREFIX
        return JobInsert(row, lambda: self._ids.next(prefix), _CREATED)

    def _check_room(self, before: int) -> None:
        count = self._backend.jobs.count
        waiting = before + count(JobStatus.NEW) + count(JobStatus.QUEUED) + count(JobStatus.RETRYING)
        if waiting >= self._settings.queued_max:
            raise LimitExceeded(
                f"{waiting} jobs wait already, at most {self._settings.queued_max} are allowed (jobs.queued_max)"
            )

    def _retries(self, request: JobRequest, executor: JobExecutor[Any] | None) -> Any:
        for given in (request.max_retries, _of(executor, "max_retries", None)):
            if given is not None:
                return given
        return self._settings.max_retries

    def _parameters(self, request: JobRequest) -> dict[str, Any]:
        """The parameters as their JSON reads: what SQL shows is what the executor gets."""
        kind = request.job_type
        raw = {} if request.params is None else request.params
        if isinstance(raw, (list, tuple)):
            raw = {f"arg{at}": value for at, value in enumerate(raw)}
        plain = stored_json(raw, f"parameters of a '{kind}' job", self._settings.parameters_bytes_max)
        if not isinstance(plain, dict):
            raise InvalidRequest(f"parameters of a '{kind}' job must be an object, got {type(raw).__name__}")
        return plain

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
        priority: int = 0,
        concurrency_key: str | None = None,
        schedule: Every | Cron | None = None,
        run_in: str = "thread",
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator that registers a function as the executor of a job type; see `executor_of`."""

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            self.registry.register(
                executor_of(
                    function, job_type, prefix=prefix, retry=retry, max_retries=max_retries, timeout_s=timeout_s,
                    on_interrupt=on_interrupt, queue=queue, priority=priority, concurrency_key=concurrency_key,
                    schedule=schedule, run_in=run_in,
                )
            )  # fmt: skip
            return function

        return register

    # Finding

    def get_job(self, job_id: str) -> Job:
        """One job. Raises NotFound."""
        return self.view(self._row(job_id))

    def _row(self, job_id: str) -> JobRow:
        row = self._backend.jobs.get(JobId(str(job_id)))
        if row is None:
            raise NotFound(f"Job '{job_id}' does not exist")
        return row

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
        if sort_by not in _SORT_COLUMNS:
            raise InvalidRequest(f"sort_by '{sort_by}' is not one of {', '.join(_SORT_COLUMNS)}")
        if limit is not None and (isinstance(limit, bool) or limit < 0):
            raise InvalidRequest(f"limit is {limit!r}; 0 or more, or None for all, is allowed")
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
        return Job(row, self._backend.jobs)

    def explain_job(self, job_id: str) -> list[Reason]:
        """Why a job is not running, one reason each, and when each ends; never empty. Raises NotFound."""
        return explain(self._row(job_id), self._backend.jobs, self.registry, self.queues, self.runner, self._clock)

    def wait(self, job_id: str, timeout_s: float | None = None) -> Job:
        """Block until the job has ended, in whatever state, and that is durable. Raises Timeout, NotFound."""
        key, waiter = JobId(str(job_id)), _Waiter()
        with self._waiters_lock:
            self._waiters[key] = [*self._waiters.get(key, ()), waiter]
        try:
            row = self._row(job_id)
            if not row.status.is_terminal:
                if not self._clock.wait(waiter.ended, _FOREVER_S if timeout_s is None else max(timeout_s, 0.0)):
                    raise Timeout(f"job '{job_id}' is still {self._row(job_id).status} after {timeout_s:g} s")
                if waiter.row is None or waiter.commit is None:
                    raise Conflict(f"the job manager was stopped before job '{job_id}' ended; it is {row.status}")
                row = waiter.row
            # Whoever is told of an end may rely on it.
            self._backend.wait_durable(waiter.commit or Commit(self._backend.head(), (), ()))
            return self.view(row)
        finally:
            with self._waiters_lock:
                left = [one for one in self._waiters.pop(key, ()) if one is not waiter]
                if left:
                    self._waiters[key] = left

    # Steering

    def cancel_job(self, job_id: str) -> Job:
        """End a job. A running one is asked to stop and loses its lease after jobs.cancel_timeout_s.

        Returns it as it ended: cancelled, or completed when its last commit came first. Raises
        InvalidRequest when it had ended before, NotFound.
        """
        for _ in range(_MOVE_ATTEMPTS):
            row = self._row(job_id)
            if row.status.is_terminal:
                raise InvalidRequest(f"Cannot cancel job '{job_id}' in status {row.status}")
            if row.status is JobStatus.RUNNING:
                self.runner.cancel(row)
                return self._ended(job_id)
            changes = {"status": JobStatus.CANCELLED, "cancel_requested": True}
            if self._moved(row, changes, (("INFO", "Job cancelled by user"),)):
                return self.get_job(job_id)
        raise self._restless(job_id)

    def _ended(self, job_id: str) -> Job:
        """The job after a cancellation: one that was interrupted otherwise meanwhile is cancelled where it waits."""
        row = self._row(job_id)
        if row.status.is_terminal:
            self._backend.wait_durable(Commit(self._backend.head(), (), ()))
            return self.view(row)
        return self.cancel_job(job_id)

    def pause_job(self, job_id: str) -> Job:
        """Hold a job until `resume_job`. A running one ends its attempt at its next check and uses no retry.

        Waits at most jobs.cancel_timeout_s for that; then it returns the job still running, to be held later.
        Raises InvalidRequest for a job that has ended, NotFound.
        """
        for _ in range(_MOVE_ATTEMPTS):
            row = self._row(job_id)
            if row.status.is_terminal:
                raise InvalidRequest(f"Cannot pause job '{job_id}' in status {row.status}")
            if row.hold is Hold.PAUSED and row.status is not JobStatus.RUNNING:
                return self.view(row)
            if self._moved(row, {"hold": Hold.PAUSED}, (("INFO", "Job paused by user"),)):
                if row.status is JobStatus.RUNNING:
                    self.runner.pause(row)
                return self.get_job(job_id)
        raise self._restless(job_id)

    def resume_job(self, job_id: str) -> Job:
        """Release a paused job. Raises InvalidRequest when it is not paused, NotFound."""
        for _ in range(_MOVE_ATTEMPTS):
            row = self._row(job_id)
            if row.hold is Hold.QUARANTINED:
                raise InvalidRequest(f"Cannot resume job '{job_id}': it is quarantined; RETRY JOB runs it again")
            if row.hold is not Hold.PAUSED:
                raise InvalidRequest(f"Cannot resume job '{job_id}' in status {row.status}: it is not paused")
            if self._moved(row, {"hold": None}, (("INFO", "Job resumed by user"),)):
                return self.get_job(job_id)
        raise self._restless(job_id)

    def retry_job(self, job_id: str) -> Job:
        """Run a failed or cancelled job again under its id, with fresh retries and its checkpoint.

        Raises InvalidRequest for another state, IdempotencyConflict when an active job has its key, NotFound.
        """
        row = self._row(job_id)
        if row.status not in (JobStatus.FAILED, JobStatus.CANCELLED):
            raise InvalidRequest(f"Cannot retry job '{job_id}' in status {row.status}; only failed and cancelled ones")
        fresh = {
            "status": JobStatus.QUEUED,
            "retry_count": 0,
            "process_deaths": 0,
            "hold": None,
            "cancel_requested": False,
            "run_at": 0,
        }
        try:
            if not self._moved(row, fresh, (("INFO", "Job queued again by user"),)):
                raise self._restless(job_id)
        except IdempotencyConflict as conflict:
            conflict.job = self.view(conflict.job)
            raise
        return self.get_job(job_id)

    def _restless(self, job_id: str) -> Conflict:
        return Conflict(f"job '{job_id}' kept changing; try again")

    def _moved(self, row: JobRow, changes: Mapping[str, Any], events: Events) -> bool:
        try:
            commit = self._backend.commit(Batch(jobs=[JobMove(row.job_id, row.status, row.lease_id, changes, events)]))
        except Fenced:
            return False
        self._backend.wait_durable(commit)
        return True

    # Queues

    def pause_queue(self, name: str, *, by: str = "system", reason: str | None = None) -> QueueRow:
        """Start no further job of a queue; those that run go on."""
        return self.queues.pause(name, by=by, reason=reason)

    def resume_queue(self, name: str) -> QueueRow:
        """Start the jobs of a queue again."""
        row = self.queues.resume(name)
        self.runner.wake()
        return row

    def limit_queue(self, name: str, max_concurrent: int | None) -> QueueRow:
        """At most so many jobs of a queue run at once; None lifts the limit."""
        row = self.queues.set_limit(name, max_concurrent)
        self.runner.wake()
        return row

    # History

    def purge(
        self, *, finished_before: datetime | None = None, status: str | None = None, limit: int = PASS_MAX
    ) -> int:
        """Remove up to `limit` ended jobs (of one state) with their history, oldest first; returns how many."""
        before = _milliseconds(finished_before) if finished_before else None
        wanted = [one for one in ENDED if status is None or one == status]
        if not wanted:
            raise InvalidRequest(f"status '{status}' is not one of {', '.join(ENDED)}")
        gone = 0
        for one in wanted:
            if gone < limit:
                gone += self._backend.jobs.delete_ended(one, finished_before=before, limit=limit - gone)
        return gone

    def purge_history(self) -> bool:
        """One bounded pass over what is older or more than the settings allow; True when more may be left."""
        gone = self._history.purge_jobs()
        if self.log is None:
            self._backend.jobs.release_events(self._backend.jobs.event_position())
        return gone >= PASS_MAX

    # Running

    def run_loop(self, max_concurrent: int | None = None) -> None:
        """Recover what a dead process left running, then run jobs in the background until `stop`. Returns at once."""
        slots = _whole("max_concurrent", self._settings.max_concurrent if max_concurrent is None else max_concurrent, 1)
        self.runner.start(slots)
        self._purging.start()

    def stop_claims(self) -> None:
        """Start no job from now on; running ones go on."""
        self.runner.stop_claims()

    def hurry(self) -> None:
        """Give running jobs no more time at a stop, also at one that waits for them now."""
        self.runner.hurry()

    def stop(self, timeout_s: float | None = None) -> None:
        """Claim nothing more; running jobs get `timeout_s` (shutdown.timeout_s), then as on_interrupt says."""
        self.runner.stop(self._settings.shutdown_timeout_s if timeout_s is None else timeout_s)
        self._purging.stop()


def _of(executor: JobExecutor[Any] | None, name: str, default: Any) -> Any:
    return default if executor is None else getattr(executor, name)


def _key(what: str, value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not 0 < len(value) <= _KEY_LENGTH_MAX:
        raise InvalidRequest(f"{what} {str(value)[:60]!r} is not a text of 1 to {_KEY_LENGTH_MAX} characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"{what} {value[:60]!r} is not valid Unicode") from None
    return value


def _whole(what: str, value: Any, low: int, high: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise InvalidRequest(f"{what} is {value!r}, {low} {'or more' if high is None else f'to {high}'} is allowed")
    return value


def _timeout(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise InvalidRequest(f"timeout_s is {value!r}; a number of seconds above 0 is allowed")
    return float(value)


def _milliseconds(moment: datetime | None) -> int:
    if moment is None:
        return 0
    if not isinstance(moment, datetime):
        raise InvalidRequest(f"{moment!r} is not a time; use an aware datetime")
    if moment.tzinfo is None:
        raise InvalidRequest(f"the time {moment.isoformat()} has no time zone; use an aware datetime")
    return max(int(moment.timestamp() * 1000), 0)


__all__ = ["JobRequest", "UnifiedJobManager"]
