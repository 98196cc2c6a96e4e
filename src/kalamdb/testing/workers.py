"""Workers that a test holds: at their checks, or for good until the test says how an attempt ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kalamdb.jobs.context import JobContext
from kalamdb.jobs.model import Outcome
from kalamdb.jobs.workers import Attempt, Finished, ThreadWorkers


class HeldWorkers:
    """Attempts stand still until `end`. Give the class to UnifiedJobManager as `workers`."""

    def __init__(self, finished: Finished) -> None:
        self._finished = finished

    def submit(self, attempts: Sequence[Attempt]) -> None:
        """See Workers."""
        for attempt in attempts:
            attempt.context.params = attempt.executor.decode(attempt.row.parameters)

    def abandon(self, attempt: Attempt) -> None:
        """See Workers."""

    def end(self, attempt: Attempt, outcome: Outcome | BaseException) -> None:
        """The executor returned or raised this."""
        attempt.outcome = outcome
        self._finished(attempt)

    def stop(self) -> None:
        """See Workers."""


OnCheck = Callable[[JobContext[Any]], None]
"""Called in the thread of an attempt before each of its checks."""


class _Watched(JobContext[Any]):
    """The context of an attempt, seen from inside: one state, and checks that are announced."""

    def __init__(self, inner: JobContext[Any], on_check: OnCheck) -> None:
        self.__dict__ = inner.__dict__
        self._on_check = on_check

    def check(self) -> None:
        self._on_check(self)
        super().check()


class WatchedWorkers(ThreadWorkers):
    """Threads whose attempts announce each check. Give `partial(WatchedWorkers, on_check)` as `workers`."""

    def __init__(self, on_check: OnCheck, finished: Finished) -> None:
        super().__init__(finished)
        self._on_check = on_check

    def submit(self, attempts: Sequence[Attempt]) -> None:
        """See Workers."""
        for attempt in attempts:
            attempt.context = _Watched(attempt.context, self._on_check)
        super().submit(attempts)
