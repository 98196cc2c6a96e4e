"""For tests of applications: jobs run in the thread of the test, when it says so, by a clock that it moves.

with open_manual(clock=clock) as db:
    sign_up(db, "anna")
    assert_created(db, "send_mail", to="anna")
    drain(db)
"""

from __future__ import annotations

import asyncio
import inspect
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kalamdb.app_context import AppContext
from kalamdb.clock import Clock
from kalamdb.config import Settings
from kalamdb.database import Database
from kalamdb.jobs import Job
from kalamdb.jobs.workers import Attempt, Finished, execute_attempt
from kalamdb.testing.clock import SimulatedClock
from kalamdb.types import JobId

_QUIET = {"flush.scheduler_enabled": False, "compaction.enabled": False, "jobs.schedules_enabled": False}


class _InlineWorkers:
    """Attempts run at once, in the thread that starts them."""

    def __init__(self, ran: list[JobId], finished: Finished) -> None:
        self._ran = ran
        self._finished = finished

    def submit(self, attempts: Sequence[Attempt]) -> None:
        """See Workers."""
        for attempt in attempts:
            self._ran.append(attempt.row.job_id)
            try:
                outcome = execute_attempt(attempt)
                attempt.outcome = asyncio.run(_awaited(outcome)) if inspect.isawaitable(outcome) else outcome
            except KeyboardInterrupt:
                raise
            except BaseException as exc:
                attempt.outcome = exc
            self._finished(attempt)

    def abandon(self, attempt: Attempt) -> None:
        """See Workers."""
        if attempt.kill is not None:
            attempt.kill()

    def stop(self) -> None:
        """See Workers."""


async def _awaited(outcome: Any) -> Any:
    return await outcome


class ManualDatabase(Database):
    """A database without background work: its jobs wait until `drain`."""

    def __init__(self, context: AppContext, ran: list[JobId], on_close: Callable[[], None]) -> None:
        super().__init__(context, on_close)
        self.ran = ran
        """Ids of the jobs that were started, once per attempt, oldest first."""


def open_manual(
    path: str | os.PathLike[str] | None = None, *, clock: Clock | None = None, **settings: Any
) -> ManualDatabase:
    """Open a database whose jobs run in `drain` only; in memory without `path`, by a new SimulatedClock without
    `clock`. Settings as in `connect`; flush and compaction schedulers and schedules are off unless switched on."""
    given = {name.replace(".", "_") for name in settings}
    quiet = {key: value for key, value in _QUIET.items() if key.replace(".", "_") not in given}
    loaded = Settings.load({**quiet, **settings})
    ran: list[JobId] = []
    folder = None if path is not None else Path(tempfile.mkdtemp(prefix="kalamdb-"))

    def remove() -> None:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    try:
        context = AppContext(
            None if path is None else Path(path), loaded, clock=clock or SimulatedClock(), root=folder,
            workers=partial(_InlineWorkers, ran), background=False,
        )  # fmt: skip
        return ManualDatabase(context, ran, remove)
    except BaseException:
        remove()
        raise


def drain(db: ManualDatabase, *, attempts_max: int = 1000) -> list[Job]:
    """Run every job that is due, and those that they make due, in this thread; one Job per attempt, as it is now.

    A job that waits for its time or its retry is run by a later call, when the clock has moved. Raises
    AssertionError when there is still something to do after `attempts_max` attempts.
    """
    context = db.context
    first = len(db.ran)
    schedules = context.settings["jobs.schedules_enabled"]
    more = True
    while more:
        fired = schedules and context.schedules.step()
        more = context.job_manager.runner.step() or fired
        if more and len(db.ran) - first >= attempts_max:
            raise AssertionError(
                f"{len(db.ran) - first} attempts were made and there is still something to do; the last was of "
                f"'{db.ran[-1]}'; does a job make itself due again? attempts_max is {attempts_max}"
            )
    return [context.job_manager.get_job(job_id) for job_id in db.ran[first:]]


def assert_created(db: Database, job_type: str, /, **params: Any) -> Job:
    """The newest job of a type whose parameters hold all of `params`, in whatever state.

    Raises AssertionError that lists the jobs of the type when there is none.
    """
    jobs = db.jobs.list_jobs(job_type=job_type, descending=True, limit=None)
    for job in jobs:
        stored = job.parameters if isinstance(job.parameters, dict) else {}
        if all(name in stored and stored[name] == value for name, value in params.items()):
            return job
    there = "\n".join(f"  {job.id} {job.status} {job.parameters}" for job in jobs[:20]) or "  none"
    raise AssertionError(f"no '{job_type}' job with {params} was created; those of the type are\n{there}")


__all__ = ["ManualDatabase", "SimulatedClock", "assert_created", "drain", "open_manual"]
