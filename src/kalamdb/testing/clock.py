"""A clock for tests: time moves when the test says so, randomness repeats."""

from __future__ import annotations

import hashlib
import threading

_POLL_S = 0.001


class SimulatedClock:
    """A `Clock` that stands still until `advance`. Thread-safe.

    With `auto_advance` a wait moves time itself and returns at once: for tests in which nobody else
    would advance it.
    """

    def __init__(self, *, start_ms: int = 1_750_000_000_000, seed: int = 0, auto_advance: bool = False) -> None:
        self._changed = threading.Condition()
        self._wall_ms = float(start_ms)
        self._monotonic_s = 1000.0
        self._seed = seed
        self._drawn = 0
        self._auto_advance = auto_advance

    def now_ms(self) -> int:
        """Simulated milliseconds since 1970."""
        with self._changed:
            return int(self._wall_ms)

    def monotonic_s(self) -> float:
        """Simulated seconds; never steps backwards."""
        with self._changed:
            return self._monotonic_s

    def advance(self, seconds: float) -> None:
        """Let time pass; waits that are due return. Negative values are refused."""
        if seconds < 0:
            raise ValueError(f"time cannot pass backwards ({seconds} s); use step_wall_ms")
        with self._changed:
            self._wall_ms += seconds * 1000
            self._monotonic_s += seconds
            self._changed.notify_all()

    def step_wall_ms(self, milliseconds: int) -> None:
        """Set the wall clock forward or back, as an administrator or NTP does."""
        with self._changed:
            self._wall_ms += milliseconds

    def wait(self, event: threading.Event, timeout_s: float) -> bool:
        """Block until `event` is set or `timeout_s` of simulated time passed; True when it is set."""
        if self._auto_advance and not event.is_set():
            self.advance(max(timeout_s, 0.0))
            return event.is_set()
        with self._changed:
            deadline = self._monotonic_s + timeout_s
            while not event.is_set() and self._monotonic_s < deadline:
                # The event does not notify this condition, so a real poll looks after it.
                self._changed.wait(_POLL_S)
            return event.is_set()

    def random_bytes(self, count: int) -> bytes:
        """The next `count` bytes of a stream that the seed determines."""
        with self._changed:
            out = b""
            while len(out) < count:
                self._drawn += 1
                out += hashlib.sha256(f"{self._seed}:{self._drawn}".encode()).digest()
            return out[:count]
