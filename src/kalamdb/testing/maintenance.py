"""Flushes, compactions and sweeps without a job manager; one that waits before it publishes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from kalamdb.storage import Batch

_WAIT_S = 60.0


class Unwatched:
    """A job handle (`kalamdb.tables.flush.JobHandle`) that nothing stops and nobody looks at."""

    def check(self) -> None:
        """Nothing stops it."""

    def progress(self, done: int, total: int | None = None, unit: str = "", text: str = "") -> None:
        """Nobody looks."""

    def seal(self, batch: Batch, *, message: str | None = None, result: Any = None) -> None:
        """No lease binds the batch."""

    def intent_owner(self) -> tuple[str, int]:
        """Of no job in the store: for a sweep its intents are dead."""
        return "TEST", 0


class Died(Exception):
    """Ends held work before it publishes."""


class HeldWork(Unwatched):
    """Runs `work(self)` in a thread and holds it right before the commit that publishes.

    The constructor returns when the work is held or has ended. `end` lets it go on, or ends it there.
    """

    def __init__(self, work: Callable[[HeldWork], object]) -> None:
        self._reached, self._go = threading.Event(), threading.Event()
        self._dies = False
        self._error: BaseException | None = None
        self.waits = False
        """Whether it has something to publish."""
        self.result: object = None
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()
        assert self._reached.wait(_WAIT_S)

    def _run(self, work: Callable[[HeldWork], object]) -> None:
        try:
            self.result = work(self)
        except BaseException as exc:
            self._error = exc
        self._reached.set()

    def end(self, *, die: bool = False) -> None:
        """Publish, or die; returns when the work has ended and raises what it raised."""
        self._dies = die
        self._go.set()
        self._thread.join(_WAIT_S)
        assert not self._thread.is_alive()
        if self._error is not None and not isinstance(self._error, Died):
            raise self._error

    def seal(self, batch: Batch, *, message: str | None = None, result: Any = None) -> None:
        """Hold at the batch that ends the work; the lease of none binds it."""
        if message is not None:
            self.waits = True
            self._reached.set()
            assert self._go.wait(_WAIT_S)
            if self._dies:
                raise Died
