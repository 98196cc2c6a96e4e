"""A database that several processes share: this one holds the directory, or is attached to the one that does.

docs/decisions/0023-attached-processes.md says who holds when.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from kalamdb.app_context import AppContext
from kalamdb.backup import job_path
from kalamdb.clock import SystemClock
from kalamdb.config import Settings
from kalamdb.database import CheckReport, Database, Params, Transaction, check_params
from kalamdb.errors import DirectoryLocked, InvalidRequest, Unavailable
from kalamdb.jobs import Job, UnifiedJobManager
from kalamdb.jobs.manager import JobRequest
from kalamdb.jobs.model import stored_json
from kalamdb.live import Change, Subscription
from kalamdb.live.subscription import BATCH_ROWS
from kalamdb.result import Result
from kalamdb.service import GiveUp
from kalamdb.sharing.calls import CALLS, JOB_CALLS, Conversation
from kalamdb.sharing.channel import FRAME_BYTES_MAX
from kalamdb.sharing.holding import HoldingDatabase
from kalamdb.sharing.link import Gone, Line, Link
from kalamdb.sharing.values import table_of
from kalamdb.sql.ingest import data_of
from kalamdb.storage.directory import lock_holder, may_answer
from kalamdb.storage.jobs import JobAttempt, JobEvent, JobRow, JobStore
from kalamdb.types import Role

_RETRY_S = 0.02
_ATTEMPTS_MAX = 5
"""How often a call that reached nobody is made anew."""


class SharedDatabase(Database):
    """A Database in the process that shares its directory, and in those that are attached to it.

    A call reaches whoever holds the directory. When nobody does, a process that was opened with `share=True` takes
    it over in its next call, the others attach to that one.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        self._path = path.absolute()
        self._settings = settings
        self._clock = SystemClock()
        self._pid = os.getpid()
        self._closed = False
        self._turn = threading.Lock()
        """Held by the thread that finds out who holds the directory."""
        self._never = threading.Event()
        self._held: HoldingDatabase | None = None
        self._link: Link | None = None
        self._database_uid: str | None = None
        self._histories = cast(JobStore, _Histories(self))
        self._jobs = AttachedJobs(self)
        self._target()

    # Who holds

    @property
    def is_holder(self) -> bool:
        return self._held is not None

    @property
    def connections(self) -> int:
        """How many connections of attached processes this one serves; none while it does not hold the directory."""
        held = self._held
        return 0 if held is None else held.connections

    @property
    def context(self) -> AppContext:
        self._check_open()
        if self._held is None:
            raise self.refusal("the parts of a database are")
        return self._held.context

    def refusal(self, what: str) -> InvalidRequest:
        """The error for what an attached process cannot do."""
        link = self._link
        holder = f"process {link.pid}, which holds" if link is not None else "the process that holds"
        return InvalidRequest(
            f"{what} only in {holder} '{self._path}'; this process ({os.getpid()}) is attached to it. Do it there; "
            "executors installed as entry points 'kalamdb.executors' are known in whichever process holds it"
        )

    def held(self) -> Database | None:
        """The database itself, if this process holds it now. Raises Closed."""
        self._check_open()
        return self._held

    def _target(self) -> Database | Link:
        """Where calls go; finds out if need be. Raises DirectoryLocked, Unavailable, and what opening raises."""
        self._check_open()
        found = self._held or self._link
        if found is not None:
            return found
        with self._turn:
            return self._held or self._link or self._search()

    def _search(self) -> Database | Link:
        deadline_s = self._clock.monotonic_s() + self._settings["attach_timeout_s"]
        while True:
            self._check_open()
            link = Link(self._path, self.view, self._database_uid)
            if link.open():
                self._link, self._database_uid = link, link.database_uid
                return link
            refused: Unavailable = self._unanswered()
            if self._settings["share"]:
                try:
                    return self._hold()
                except Unavailable as exc:
                    # Also what the store says while the process that had it open is still going.
                    if not isinstance(exc, DirectoryLocked):
                        refused = exc
                    elif not may_answer(self._path):
                        raise
            elif not may_answer(self._path):
                raise refused
            if self._clock.monotonic_s() >= deadline_s:
                raise refused
            self._clock.wait(self._never, _RETRY_S)

    def _unanswered(self) -> Unavailable:
        pid = lock_holder(self._path)
        waited = f"within {self._settings['attach_timeout_s']:g} s (attach_timeout_s)"
        if pid is None:
            return Unavailable(
                f"no process holds '{self._path}' any more and none took it over {waited}; connect again, or with "
                "share=True in all processes, so that one of them takes it over"
            )
        return DirectoryLocked(
            f"data directory '{self._path}' is held by process {pid}, which did not answer {waited}; close it "
            "there, or open it there with share=True or by `kalamdb serve` so that others can attach",
            pid,
        )

    def _hold(self) -> Database:
        held = HoldingDatabase(self._path, self._settings, database_uid=self._database_uid)
        self._held, self._database_uid = held, held.database_uid
        return held

    def _forget(self, link: Link) -> None:
        with self._turn:
            if self._link is link:
                self._link = None
        link.close()

    def close(self) -> None:
        """See Database.close. Attached processes go on: one of them takes over."""
        if self._closed:
            return
        self._closed = True
        if os.getpid() != self._pid:
            return
        with self._turn:
            held, link = self._held, self._link
        if link is not None:
            link.close()
        if held is not None:
            held.close()

    # Calls

    def _enter(
        self, stack: ExitStack, given_up: GiveUp | None, begin: Callable[[Line], Any]
    ) -> Database | tuple[Line, Any]:
        """The database, if this process holds it; else a connection on which `begin` has been done, and its value.

        The connection is given back when `stack` closes. A call that reached nobody is made anew.
        """
        for _ in range(_ATTEMPTS_MAX):
            target = self._target()
            if isinstance(target, Database):
                return target
            with ExitStack() as attempt:
                try:
                    line = attempt.enter_context(target.line(given_up))
                    value = begin(line)
                except Gone:
                    self._forget(target)
                    continue
                except Unavailable:
                    self._check_open()
                    raise
                stack.push(attempt.pop_all())
                return line, value
        raise Unavailable(f"the process that holds '{self._path}' kept changing, nothing was done; try again")

    def ask(
        self, name: str, *args: Any, timeout_s: float | None = None, given_up: GiveUp | None = None, **named: Any
    ) -> Any:
        """Make a call of the table, here or in the process that holds the directory."""
        with ExitStack() as stack:
            reached = self._enter(stack, given_up, lambda line: line.call(name, *args, timeout_s=timeout_s, **named))
            if isinstance(reached, Database):
                return CALLS[name].run(Conversation(reached, given_up or GiveUp()), *args, **named)
            return self._seen(reached[1])

    def _seen(self, value: Any) -> Any:
        if isinstance(value, JobRow):
            return self.view(value)
        return [self._seen(one) for one in value] if isinstance(value, list) else value

    def view(self, row: JobRow) -> Job:
        """A stored row as its users see it."""
        return Job(row, self._histories)

    def _execute(
        self, sql: str, params: Params, timeout_s: float | None, given_up: GiveUp | None, *, user: str | None = None,
        role: str | Role | None = None, namespace: str | None = None,
    ) -> Result:  # fmt: skip
        check_params(params)
        bound = {"user": user, "role": role, "namespace": namespace}
        done: Result = self.ask("execute", sql, params, timeout_s, bound, timeout_s=timeout_s, given_up=given_up)
        return done

    @contextmanager
    def _stream(
        self, sql: str, params: Params, timeout_s: float | None, given_up: GiveUp | None, *, user: str | None = None,
        role: str | Role | None = None, namespace: str | None = None,
    ) -> Iterator[Iterator[pa.RecordBatch]]:  # fmt: skip
        check_params(params)
        bound = {"user": user, "role": role, "namespace": namespace}

        def begin(line: Line) -> Generator[memoryview, None, None]:
            items = line.items("stream", sql, params, timeout_s, bound, timeout_s=timeout_s)
            # The first one says that the query runs.
            next(items)
            return items

        with ExitStack() as stack:
            reached = self._enter(stack, given_up, begin)
            if isinstance(reached, Database):
                yield stack.enter_context(
                    reached._stream(sql, params, timeout_s, given_up, user=user, role=role, namespace=namespace)
                )
            else:
                items = stack.enter_context(closing(reached[1]))
                yield (batch for item in items for batch in table_of(item).to_batches())

    def insert(
        self,
        table: str,
        data: Any,
        *,
        user: str | None = None,
        user_column: str | None = None,
        on_conflict: str = "error",
        role: str | Role | None = None,
        namespace: str | None = None,
    ) -> int:
        """See Database.insert. The data is brought into columns here."""
        self._check_open()
        options = {
            "user": user, "user_column": user_column, "on_conflict": on_conflict, "role": role, "namespace": namespace,
        }  # fmt: skip
        return int(self.ask("insert", table, data_of(data), options))

    def subscribe(
        self, sql: str, params: Params = None, *, user: str | None = None, role: str | Role | None = None,
        namespace: str | None = None, callback: Callable[[Change], Any] | None = None, from_seq: int | None = None,
        last_rows: int | None = None, snapshot: bool = False, batch_size: int = BATCH_ROWS,
    ) -> Subscription:  # fmt: skip
        """See Database.subscribe. Raises InvalidRequest in a process that is attached."""
        held = self.held()
        if held is None:
            raise self.refusal("subscriptions are made")
        return held.subscribe(
            sql, params, user=user, role=role, namespace=namespace, callback=callback, from_seq=from_seq,
            last_rows=last_rows, snapshot=snapshot, batch_size=batch_size,
        )  # fmt: skip

    @contextmanager
    def _shared_transaction(self, user: str | None, bound: Mapping[str, Any]) -> Iterator[Transaction]:
        with ExitStack() as stack:
            reached = self._enter(stack, None, lambda line: line.call("begin", user, bound))
            if isinstance(reached, Database):
                yield stack.enter_context(reached.transaction(user, **bound))
                return
            line, _ = reached
            transaction = AttachedTransaction(self, line)
            try:
                yield transaction
            except BaseException:
                # Without a connection it is rolled back anyhow.
                with suppress(Unavailable):
                    transaction.call("abandon")
                raise
            transaction.call("leave")

    def transaction(
        self, user: str | None = None, *, role: str | Role | None = None, namespace: str | None = None
    ) -> AbstractContextManager[Transaction]:
        """See Database.transaction. It stays on one connection; when that is lost it is rolled back."""
        return self._shared_transaction(user, {"role": role, "namespace": namespace})

    @property
    def jobs(self) -> UnifiedJobManager:
        held = self.held()
        return self._jobs if held is None else held.jobs

    def backup(self, path: str | os.PathLike[str], *, wait: bool = True, incremental: bool = False) -> Job:
        """See Database.backup. A relative path is one of this process."""
        self._check_open()
        job: Job = self.ask("backup", job_path(os.fspath(path)), incremental)
        return self.jobs.wait(job.id) if wait else job

    def check(self) -> CheckReport:
        """See Database.check."""
        report: CheckReport = self.ask("check")
        return report

    def _tell_ends(self, tell: Callable[[str], None]) -> bool:
        return self._held is not None and self._held._tell_ends(tell)


class AttachedTransaction(Transaction):
    """What `with db.transaction() as tx` gives in an attached process."""

    def __init__(self, database: SharedDatabase, line: Line) -> None:
        self._database = database
        self._line = line

    def call(self, name: str, *args: Any, timeout_s: float | None = None) -> Any:
        """Make a call inside the transaction. Raises Unavailable when its connection is lost."""
        self._database._check_open()
        try:
            return self._line.call(name, *args, timeout_s=timeout_s)
        except Gone as exc:
            raise Unavailable(f"the connection of the transaction was lost ({exc}); it was rolled back") from exc

    def _execute(
        self, sql: str, params: Params, namespace: str | None, timeout_s: float | None, given_up: GiveUp | None
    ) -> Result:
        check_params(params)
        done: Result = self.call("execute_inside", sql, params, namespace, timeout_s, timeout_s=timeout_s)
        return done

    def insert(self, table: str, data: Any, *, user_column: str | None = None, on_conflict: str = "error") -> int:
        """See Transaction.insert."""
        options = {"user_column": user_column, "on_conflict": on_conflict}
        return int(self.call("insert_inside", table, data_of(data), options))

    def create_job(self, job_type: str, params: Any = None, idempotency_key: str | None = None, **options: Any) -> None:
        """See Transaction.create_job."""
        self.call("create_job_inside", [job_type, _json(job_type, params), idempotency_key], options)

    def rollback(self) -> None:
        """See Transaction.rollback."""
        self.call("rollback")


class AttachedJobs(UnifiedJobManager):
    """The job manager as an attached process sees it: calls are made where the jobs are.

    Those of `JOB_CALLS` are passed on as they are, all others but these below are refused.
    """

    def __init__(self, database: SharedDatabase) -> None:
        self._database = database

    def create_job(self, job_type: str, params: Any = None, idempotency_key: str | None = None, **options: Any) -> Job:
        """See UnifiedJobManager.create_job."""
        job: Job = self._database.ask("create_job", job_type, _json(job_type, params), idempotency_key, **options)
        return job

    def create_jobs(self, requests: Sequence[JobRequest | Mapping[str, Any]]) -> list[Job]:
        """See UnifiedJobManager.create_jobs."""
        jobs: list[Job] = self._database.ask("create_jobs", [_request(one) for one in requests])
        return jobs

    def wait(self, job_id: str, timeout_s: float | None = None) -> Job:
        """See UnifiedJobManager.wait."""
        job: Job = self._database.ask("wait", job_id, timeout_s, timeout_s=timeout_s)
        return job

    def __getattr__(self, name: str) -> Any:
        """Its parts are there only where it runs."""
        if name.startswith("_"):
            raise AttributeError(name)
        held = self._database.held()
        if held is None:
            raise self._database.refusal(f"'jobs.{name}' is")
        return getattr(held.jobs, name)


def _passed_on(name: str) -> Callable[..., Any]:
    @functools.wraps(getattr(UnifiedJobManager, name))
    def call(jobs: AttachedJobs, *args: Any, **named: Any) -> Any:
        return jobs._database.ask(name, *args, **named)

    return call


def _refused(name: str) -> Callable[..., Any]:
    @functools.wraps(getattr(UnifiedJobManager, name))
    def call(jobs: AttachedJobs, *args: Any, **named: Any) -> Any:
        return jobs.__getattr__(name)(*args, **named)

    return call


for _name in vars(UnifiedJobManager):
    if not _name.startswith("_") and _name not in vars(AttachedJobs):
        setattr(AttachedJobs, _name, _passed_on(_name) if _name in JOB_CALLS else _refused(_name))


def _json(job_type: str, params: Any) -> Any:
    """Parameters of a job as their JSON reads, which is all that is kept of them."""
    return None if params is None else stored_json(params, f"parameters of a '{job_type}' job", FRAME_BYTES_MAX)


def _request(one: JobRequest | Mapping[str, Any]) -> Any:
    if isinstance(one, JobRequest):
        one = {each.name: getattr(one, each.name) for each in fields(one)}
    if not isinstance(one, Mapping):
        return one
    return {**one, "params": _json(str(one.get("job_type")), one.get("params"))}


class _Histories:
    """What a Job asks of its store."""

    def __init__(self, database: SharedDatabase) -> None:
        self._database = database

    def events(self, job_id: str, limit: int) -> Sequence[JobEvent]:
        events: list[JobEvent] = self._database.ask("job_events", job_id, limit)
        return events

    def attempts(self, job_id: str) -> list[JobAttempt]:
        attempts: list[JobAttempt] = self._database.ask("job_attempts", job_id)
        return attempts


__all__ = ["AttachedJobs", "AttachedTransaction", "SharedDatabase"]
