"""Executors: what a job type does, and how its jobs are treated."""

from __future__ import annotations

import dataclasses
import inspect
import re
import threading
import types
from collections.abc import Awaitable, Callable, Sequence, Set
from typing import Any, ClassVar, Generic, TypeVar, cast, get_args, get_origin, get_type_hints

import msgspec

from kalamdb.errors import InvalidRequest, NotFound
from kalamdb.jobs.context import JobContext, JobServices
from kalamdb.jobs.model import Cron, Every, Outcome, RunIn
from kalamdb.jobs.processes import reference_to
from kalamdb.jobs.queues import check_queue_name
from kalamdb.storage.jobs import OnInterrupt, RetryPolicy

Params = TypeVar("Params")
_PREFIX = re.compile(r"[A-Z]{2}\Z")
_TYPE = re.compile(r"[a-z][a-z0-9_]{0,63}\Z")


class JobExecutor(Generic[Params]):
    """One job type. Subclass it, name the type, the prefix and `Params`, and write `execute`.

    `execute` returns Completed | Skipped | Retry | Snooze | None; any exception but Permanent is a failed
    attempt, retried while retry_count < max_retries. It may be a coroutine function.
    """

    job_type: ClassVar[str]
    prefix: ClassVar[str]
    """Two capital letters, unique."""
    Params: ClassVar[Any] = dict
    """A msgspec Struct, a dataclass, or dict."""
    on_interrupt: ClassVar[OnInterrupt] = OnInterrupt.RETRY
    max_retries: ClassVar[int | None] = None
    """None is `jobs.max_retries`."""
    retry: ClassVar[RetryPolicy | None] = None
    """None takes the base from `jobs.retry_backoff_ms`."""
    timeout_s: ClassVar[float | None] = None
    queue: ClassVar[str] = "default"
    priority: ClassVar[int] = 0
    """Higher runs first; a point is worth a minute of waiting."""

    run_in: ClassVar[RunIn] = RunIn.THREAD
    """RunIn.PROCESS: each attempt has a process of its own, where the class is imported and made without arguments;
    its context has no database, and the job's parameters and result are JSON-like."""

    schedule: ClassVar[Every | Cron | None] = None
    """Jobs that come back by themselves: a schedule of the name of the job type, made when there is none."""

    @property
    def is_async(self) -> bool:
        """Whether `execute` is a coroutine function, which runs on the loop of async jobs."""
        return inspect.iscoroutinefunction(self.execute)

    @property
    def reference(self) -> tuple[str, str]:
        """(module, name) by which a process of an attempt imports this. Raises InvalidRequest when it cannot."""
        return reference_to(type(self), self.job_type)

    def execute(self, ctx: JobContext[Params]) -> Outcome | Awaitable[Outcome]:
        """Do the work of one attempt."""
        raise InvalidRequest(f"executor '{self.job_type}' has no execute method")

    def pre_validate(self, params: Params, services: JobServices | None) -> str | None:
        """Why no job is needed, None when one is. Asked by schedules; `services` is the database."""
        return None

    def idempotency_key(self, params: Params, table_uid: int | None) -> str | None:
        """The key of a job that is created without one."""
        return None

    def concurrency_key(self, params: Params, table_uid: int | None) -> str | None:
        """Jobs with the same key run one after another."""
        return None

    def upcast(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Stored parameters of an older version as `Params` reads them now."""
        return parameters

    def decode(self, parameters: Any) -> Params:
        """Stored parameters as `Params`. A legacy array becomes {"arg0": ..., "arg1": ...}."""
        if isinstance(parameters, list):
            parameters = {f"arg{at}": value for at, value in enumerate(parameters)}
        if self.Params is dict:
            return cast(Params, self.upcast(dict(parameters)))
        try:
            return cast(Params, msgspec.convert(self.upcast(dict(parameters)), self.Params))
        except msgspec.ValidationError as exc:
            raise InvalidRequest(f"parameters of a '{self.job_type}' job do not fit: {exc}") from exc

    def schema(self) -> dict[str, Any]:
        """JSON schema of the parameters."""
        return {"type": "object"} if self.Params is dict else msgspec.json.schema(self.Params)


class _FunctionExecutor(JobExecutor[Any]):
    """An executor over a function."""

    def __init__(self, function: Callable[[JobContext[Any]], Any], concurrency_key: str | None) -> None:
        self._function = function
        self._concurrency_key = concurrency_key

    @property
    def is_async(self) -> bool:
        function: Any = self._function
        return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)

    @property
    def reference(self) -> tuple[str, str]:
        return reference_to(self._function, self.job_type)

    def execute(self, ctx: JobContext[Any]) -> Outcome | Awaitable[Outcome]:
        outcome: Outcome | Awaitable[Outcome] = self._function(ctx)
        return outcome

    def concurrency_key(self, params: Any, table_uid: int | None) -> str | None:
        if self._concurrency_key is None:
            return None
        values = params if isinstance(params, dict) else msgspec.to_builtins(params)
        try:
            return self._concurrency_key.format(**values)
        except (KeyError, IndexError) as exc:
            raise InvalidRequest(
                f"concurrency_key '{self._concurrency_key}' names the parameter {exc}, which the job lacks"
            ) from None


def executor_of(
    function: Callable[[JobContext[Any]], Any],
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
) -> JobExecutor[Any]:
    """An executor over `function(ctx)`; the annotation JobContext[Params] gives the parameter type."""
    try:
        interrupt = OnInterrupt(on_interrupt)
    except ValueError:
        raise InvalidRequest(f"on_interrupt '{on_interrupt}' is not one of {', '.join(OnInterrupt)}") from None
    try:
        place = RunIn(run_in)
    except ValueError:
        raise InvalidRequest(f"run_in '{run_in}' is not one of {', '.join(RunIn)}") from None
    body = {
        "job_type": job_type,
        "prefix": prefix,
        "Params": _annotated(function),
        "retry": retry,
        "max_retries": max_retries,
        "timeout_s": timeout_s,
        "on_interrupt": interrupt,
        "queue": queue,
        "priority": priority,
        "schedule": schedule,
        "run_in": place,
        "__doc__": function.__doc__,
    }
    kind = types.new_class(f"{job_type}_executor", (_FunctionExecutor,), exec_body=lambda space: space.update(body))
    made: JobExecutor[Any] = kind(function, concurrency_key)
    return made


def _annotated(function: Callable[..., Any]) -> Any:
    parameters = list(inspect.signature(function).parameters)
    if not parameters:
        raise InvalidRequest(f"executor function '{getattr(function, '__name__', function)}' must take the job context")
    try:
        hint = get_type_hints(function).get(parameters[0])
    except (NameError, TypeError):
        # A name that is known to type checkers only, or a callable that is not a function.
        return dict
    if get_origin(hint) is JobContext:
        kind = get_args(hint)[0]
        if dataclasses.is_dataclass(kind) or (isinstance(kind, type) and issubclass(kind, msgspec.Struct)):
            return kind
    return dict


def check_job_type(job_type: Any) -> str:
    """The type, if it is one. Raises InvalidRequest."""
    if not isinstance(job_type, str) or not _TYPE.match(job_type):
        raise InvalidRequest(f"job type '{job_type}' must be lower-case letters, digits and underscores, 64 at most")
    return job_type


class JobRegistry:
    """Executors by job type. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_type: dict[str, JobExecutor[Any]] = {}
        self.on_register: list[Callable[[], None]] = []
        """Called after each registration: waiting jobs may run now, a schedule may begin."""

    def register(self, executor: JobExecutor[Any]) -> None:
        """Add an executor. Raises InvalidRequest for a bad or taken type or prefix."""
        job_type, prefix = executor.job_type, executor.prefix
        check_job_type(job_type)
        if not _PREFIX.match(prefix):
            raise InvalidRequest(f"prefix '{prefix}' of job type '{job_type}' must be two capital letters")
        if executor.max_retries is not None and executor.max_retries < 0:
            raise InvalidRequest(
                f"max_retries of job type '{job_type}' is {executor.max_retries}; 0 or more is allowed"
            )
        if executor.timeout_s is not None and not 0 < executor.timeout_s < float("inf"):
            raise InvalidRequest(f"timeout_s of job type '{job_type}' is {executor.timeout_s}; more than 0 is allowed")
        check_queue_name(executor.queue)
        if executor.run_in == RunIn.PROCESS:
            if executor.is_async:
                raise InvalidRequest(f"job type '{job_type}' is async; run_in='process' is for sync executors")
            _ = executor.reference
        with self._lock:
            if job_type in self._by_type:
                raise InvalidRequest(f"job type '{job_type}' is registered already")
            for known in self._by_type.values():
                if known.prefix == prefix:
                    raise InvalidRequest(f"prefix '{prefix}' of job type '{job_type}' belongs to '{known.job_type}'")
            self._by_type[job_type] = executor
        for told in self.on_register:
            told()

    def get(self, job_type: str) -> JobExecutor[Any] | None:
        """The executor of a type."""
        return self._by_type.get(job_type)

    def get_or_error(self, job_type: str) -> JobExecutor[Any]:
        """The executor of a type. Raises NotFound."""
        executor = self.get(job_type)
        if executor is None:
            known = ", ".join(self.job_types())
            raise NotFound(f"there is no executor for job type '{job_type}'; known are {known}")
        return executor

    def contains(self, job_type: str) -> bool:
        """Whether the type has an executor."""
        return job_type in self._by_type

    @property
    def types(self) -> Set[str]:
        """All types, as they are registered."""
        return self._by_type.keys()

    def executors(self) -> list[JobExecutor[Any]]:
        """All executors, by type."""
        return [self._by_type[job_type] for job_type in self.job_types()]

    def table_rows(self) -> list[Sequence[Any]]:
        """Rows of system.job_executors."""
        return [
            (
                one.job_type,
                one.prefix,
                one.queue,
                one.priority,
                one.max_retries,
                one.timeout_s,
                one.on_interrupt.value,
                None if one.schedule is None else str(one.schedule),
                one.schema(),
            )
            for one in self.executors()
        ]

    def job_types(self) -> list[str]:
        """All types, sorted."""
        return sorted(self._by_type)

    def __len__(self) -> int:
        return len(self._by_type)
