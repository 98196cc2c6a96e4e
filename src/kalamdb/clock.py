"""The only door to time, sleep, randomness and new ids.

Everything else asks a `Clock`, so that tests can step time and repeat randomness. Lint bans the
standard functions outside this file.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from typing import Protocol

EPOCH_2024_MS = 1_704_067_200_000
"""Start of `_seq` time: 2024-01-01T00:00:00Z in milliseconds since 1970."""

SEQ_SHIFT = 22
"""Bits below the milliseconds in `_seq`: 10 of the node and 12 of a counter."""

_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


class Clock(Protocol):
    """Time, sleep and randomness."""

    def now_ms(self) -> int:
        """Milliseconds since 1970, UTC; may step backwards as wall clocks do."""
        ...

    def monotonic_s(self) -> float:
        """Seconds of a clock that never steps backwards."""
        ...

    def wait(self, event: threading.Event, timeout_s: float) -> bool:
        """Block until `event` is set or `timeout_s` passed; True when it is set."""
        ...

    def random_bytes(self, count: int) -> bytes:
        """`count` unpredictable bytes."""
        ...


class SystemClock:
    """The machine's clock and entropy."""

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def monotonic_s(self) -> float:
        return time.monotonic()

    def wait(self, event: threading.Event, timeout_s: float) -> bool:
        return event.wait(timeout_s)

    def random_bytes(self, count: int) -> bytes:
        return os.urandom(count)


def seq_at_ms(now_ms: int) -> int:
    """The smallest `_seq` of the millisecond `now_ms` (since 1970)."""
    return max(now_ms - EPOCH_2024_MS, 0) << SEQ_SHIFT


def seq_to_ms(seq: int) -> int:
    """Milliseconds since 1970 at which `seq` was given out."""
    return (seq >> SEQ_SHIFT) + EPOCH_2024_MS


def uuid_v7(clock: Clock) -> uuid.UUID:
    """A UUID of version 7 (RFC 9562, section 5.7): 48 bits of time, 74 of randomness."""
    raw = int.from_bytes(clock.random_bytes(10), "big")
    value = (clock.now_ms() & 0xFFFF_FFFF_FFFF) << 80
    value |= 0x7 << 76 | (raw >> 68 & 0xFFF) << 64
    value |= 0b10 << 62 | raw & 0x3FFF_FFFF_FFFF_FFFF
    return uuid.UUID(int=value)


def ulid(clock: Clock) -> str:
    """A ULID (github.com/ulid/spec): 26 characters, 48 bits of time and 80 of randomness."""
    value = clock.now_ms() << 80 | int.from_bytes(clock.random_bytes(10), "big")
    return "".join(_CROCKFORD[value >> shift & 31] for shift in range(125, -5, -5))


class Ulids:
    """ULIDs that rise: those of one millisecond count up, as the specification has it. Thread-safe."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._last = ""

    def next(self) -> str:
        """A fresh ULID, larger than those before."""
        with self._lock:
            found = ulid(self._clock)
            if found[:10] <= self._last[:10]:
                found = _after(self._last)
            self._last = found
            return found


def _after(text: str) -> str:
    digits = text.rstrip(_CROCKFORD[-1])
    zeros = _CROCKFORD[0] * (len(text) - len(digits))
    return digits[:-1] + _CROCKFORD[_CROCKFORD.index(digits[-1]) + 1] + zeros
