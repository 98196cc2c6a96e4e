"""The calls that an attached process may make: one table, read by both sides.

A call whose values come one by one is one more entry with `many`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from kalamdb.database import CheckReport, Database, Params, Transaction
from kalamdb.errors import Conflict, Timeout
from kalamdb.jobs import Job
from kalamdb.jobs.explain import Reason
from kalamdb.jobs.queues import QueueRow
from kalamdb.result import Result
from kalamdb.service import GiveUp
from kalamdb.sharing.values import result_form, table_bytes
from kalamdb.storage.jobs import JobAttempt, JobEvent, JobRow
from kalamdb.types import JobId

_WAIT_SLICE_S = 0.5
Bound = Mapping[str, Any]
"""user, role and namespace of a call."""


class Conversation:
    """What one connection of an attached process does in the process that holds the directory."""

    def __init__(self, database: Database, given_up: GiveUp) -> None:
        self._database = database
        self._given_up = given_up
        self._block: AbstractContextManager[Transaction] | None = None
        self._transaction: Transaction | None = None

    def execute(self, sql: str, params: Params, timeout_s: float | None, bound: Bound) -> Result:
        """See Database.execute."""
        return self._database._execute(sql, params, timeout_s, self._given_up, **bound)

    def stream(self, sql: str, params: Params, timeout_s: float | None, bound: Bound) -> Iterator[bytes]:
        """See Database.stream: nothing when the query runs, then its batches as Arrow IPC, as fast as the other side
        reads them."""
        with self._database._stream(sql, params, timeout_s, self._given_up, **bound) as batches:
            yield b""
            for batch in batches:
                yield table_bytes(batch)

    def insert(self, table: str, data: Any, options: Bound) -> int:
        """See Database.insert."""
        return self._database.insert(table, data, **options)

    def check(self) -> CheckReport:
        """See Database.check."""
        return self._database.check()

    def backup(self, path: str, incremental: bool) -> Job:
        """See Database.backup; the job as it was accepted."""
        return self._database.backup(path, wait=False, incremental=incremental)

    def begin(self, user: str | None, bound: Bound) -> None:
        """Enter the block of a transaction, which lives as long as the connection."""
        if self._block is not None:
            raise Conflict("a transaction is open already on this connection")
        block = self._database.transaction(user, **bound)
        self._transaction = block.__enter__()
        self._block = block

    def _inside(self) -> Transaction:
        if self._transaction is None:
            raise Conflict("no transaction is open on this connection")
        return self._transaction

    def execute_inside(self, sql: str, params: Params, namespace: str | None, timeout_s: float | None) -> Result:
        """See Transaction.execute."""
        return self._inside()._execute(sql, params, namespace, timeout_s, self._given_up)

    def insert_inside(self, table: str, data: Any, options: Bound) -> int:
        """See Transaction.insert."""
        return self._inside().insert(table, data, **options)

    def create_job_inside(self, args: list[Any], named: Mapping[str, Any]) -> None:
        """See Transaction.create_job."""
        self._inside().create_job(*args, **named)

    def rollback(self) -> None:
        """See Transaction.rollback."""
        self._inside().rollback()

    def leave(self) -> None:
        """Leave the block, which commits."""
        self._inside()
        block, self._block, self._transaction = self._block, None, None
        assert block is not None
        block.__exit__(None, None, None)

    def abandon(self) -> None:
        """Leave the block as by an exception, if one is open."""
        block, self._block, self._transaction = self._block, None, None
        if block is not None:
            reason = _Abandoned()
            try:
                block.__exit__(_Abandoned, reason, None)
            except _Abandoned:
                return

    def job_events(self, job_id: str, limit: int) -> list[JobEvent]:
        """See Job.events."""
        return list(self._database.context.backend.jobs.events(JobId(job_id), limit=limit))

    def job_attempts(self, job_id: str) -> list[JobAttempt]:
        """See Job.attempts."""
        return self._database.context.backend.jobs.attempts(JobId(job_id))

    def wait(self, job_id: str, timeout_s: float | None = None) -> Job:
        """See UnifiedJobManager.wait; ends when the other process is gone."""
        left_s = timeout_s
        while True:
            slice_s = _WAIT_SLICE_S if left_s is None else min(left_s, _WAIT_SLICE_S)
            try:
                return self._database.jobs.wait(job_id, slice_s)
            except Timeout:
                if self._given_up.is_set():
                    raise
                if left_s is not None:
                    left_s -= slice_s
                    if left_s <= 0:
                        status = self._database.jobs.get_job(job_id).status
                        raise Timeout(f"job '{job_id}' is still {status} after {timeout_s:g} s") from None


class _Abandoned(Exception):
    """Why a transaction was not committed."""


@dataclass(frozen=True, slots=True)
class Call:
    """An exposed call."""

    run: Callable[..., Any]
    """Called with the conversation and what was sent."""
    returns: Any = None
    """The type of its value as it travels."""
    many: bool = False
    """Whether it gives bytes one after another instead of one value."""


def _of_the_manager(name: str) -> Callable[..., Any]:
    def run(conversation: Conversation, *args: Any, **named: Any) -> Any:
        return getattr(conversation._database.jobs, name)(*args, **named)

    return run


JOB_CALLS: dict[str, Any] = {
    "create_job": JobRow,
    "create_jobs": list[JobRow],
    "get_job": JobRow,
    "list_jobs": list[JobRow],
    "explain_job": list[Reason],
    "cancel_job": JobRow,
    "pause_job": JobRow,
    "resume_job": JobRow,
    "retry_job": JobRow,
    "pause_queue": QueueRow,
    "resume_queue": QueueRow,
    "limit_queue": QueueRow,
    "purge": int,
}
"""Calls of the job manager that need no more than to be passed on, with the types of their values."""

CALLS: dict[str, Call] = {
    "execute": Call(Conversation.execute, Result),
    "stream": Call(Conversation.stream, many=True),
    "insert": Call(Conversation.insert, int),
    "check": Call(Conversation.check, CheckReport),
    "backup": Call(Conversation.backup, JobRow),
    "begin": Call(Conversation.begin),
    "execute_inside": Call(Conversation.execute_inside, Result),
    "insert_inside": Call(Conversation.insert_inside, int),
    "create_job_inside": Call(Conversation.create_job_inside),
    "rollback": Call(Conversation.rollback),
    "leave": Call(Conversation.leave),
    "abandon": Call(Conversation.abandon),
    "job_events": Call(Conversation.job_events, list[JobEvent]),
    "job_attempts": Call(Conversation.job_attempts, list[JobAttempt]),
    "wait": Call(Conversation.wait, JobRow),
    **{name: Call(_of_the_manager(name), returns) for name, returns in JOB_CALLS.items()},
}


def form_of(value: Any) -> Any:
    """What a call returned, as it travels."""
    if isinstance(value, Result):
        return result_form(value)
    if isinstance(value, Job):
        return value.row
    if isinstance(value, list):
        return [form_of(one) for one in value]
    return value


__all__ = ["CALLS", "JOB_CALLS", "Bound", "Call", "Conversation", "form_of"]
