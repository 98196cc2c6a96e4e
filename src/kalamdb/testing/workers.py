"""Workers that do nothing by themselves: a test decides when an attempt ends, and with what."""

from __future__ import annotations

from collections.abc import Sequence

from kalamdb.jobs.model import Outcome
from kalamdb.jobs.workers import Attempt, Finished


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
