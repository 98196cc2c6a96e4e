"""Background work, a thread that does one bounded pass after another; work that Ctrl-C waits for; and the word that
nobody waits for a call any more."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from kalamdb.clock import Clock

_BACK_OFF_S = 1.0
_log = logging.getLogger("kalamdb.service")


class WouldBlock(Exception):
    """What was asked for would wait or take long, in a thread that must not; nothing was done."""


class _Impatience(threading.local):
    on = False


_impatience = _Impatience()


class impatient:
    """A block in which this thread gets WouldBlock instead of waiting: see `may_block`."""

    def __enter__(self) -> None:
        _impatience.on = True

    def __exit__(self, *exc: object) -> None:
        _impatience.on = False


def may_block() -> None:
    """Stands before what waits or takes long: raises WouldBlock in a thread that is `impatient`."""
    if _impatience.on:
        raise WouldBlock


def is_impatient() -> bool:
    """Whether this thread is in an `impatient` block."""
    return _impatience.on


class uninterrupted:
    """A block that Ctrl-C does not cut in two: KeyboardInterrupt is raised when it ends.

    Python raises it in the main thread only, so elsewhere nothing is to be done. A class, as it stands
    in the path of each commit.
    """

    __slots__ = ("_former", "_pending")

    def __enter__(self) -> None:
        self._former: Any = None
        self._pending: tuple[int, FrameType | None] | None = None
        # Who is impatient is the loop of a server, whose signal handlers raise nothing; asking would cost much.
        if not _impatience.on and threading.current_thread() is threading.main_thread():
            former = signal.getsignal(signal.SIGINT)
            if callable(former):
                self._former = former
                signal.signal(signal.SIGINT, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._pending = (number, frame)

    def __exit__(self, *exc: object) -> None:
        if self._former is not None:
            signal.signal(signal.SIGINT, self._former)
            if self._pending is not None:
                self._former(*self._pending)


class GiveUp:
    """Says that nobody waits for a call any more. Set from any thread; whoever does the call asks, or is told."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_set = False
        self._tell: list[Callable[[], None]] = []

    def is_set(self) -> bool:
        """Whether the call need not be finished."""
        return self._is_set

    def set(self) -> None:
        """Nobody waits any more. Idempotent."""
        with self._lock:
            self._is_set = True
            for tell in self._tell:
                tell()

    @contextmanager
    def telling(self, tell: Callable[[], None]) -> Iterator[None]:
        """Call `tell`, which must not block, when it is set inside the block or was before; never after the block."""
        with self._lock:
            self._tell.append(tell)
            if self._is_set:
                tell()
        try:
            yield
        finally:
            with self._lock:
                self._tell.remove(tell)


class Loop:
    """Calls `step` every `interval_s` seconds, at once when woken, and again while it returns True.

    `step` does one bounded pass. What it raises is logged and the loop goes on. Start and stop are
    idempotent; tests call `step` themselves.
    """

    def __init__(self, name: str, step: Callable[[], bool], interval_s: float, clock: Clock) -> None:
        self.name = name
        self._step = step
        self.interval_s = interval_s
        """A step may change it, for the pause after it."""
        self._clock = clock
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin; does nothing when it runs."""
        if self._thread is None:
            self._stopping = False
            self._thread = threading.Thread(target=self._run, name=f"kalamdb-{self.name}", daemon=True)
            self._thread.start()

    def wake(self) -> None:
        """Do the next pass now."""
        self._wake.set()

    def stop(self, timeout_s: float | None = None) -> bool:
        """End after the running pass; True when the thread is gone within `timeout_s`."""
        self._stopping = True
        self._wake.set()
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return True
        thread.join(timeout_s)
        if thread.is_alive():
            return False
        self._thread = None
        return True

    def _run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            try:
                if self._step():
                    continue
                pause_s = self.interval_s
            except Exception:
                _log.exception("a pass of '%s' failed; it goes on", self.name)
                pause_s = max(_BACK_OFF_S, self.interval_s)
            self._clock.wait(self._wake, pause_s)
