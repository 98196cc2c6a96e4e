"""A job as its users see it, and what an attempt may come to."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
from cronsim import CronSim, CronSimError

from kalamdb.clock import Clock
from kalamdb.errors import InvalidRequest, LimitExceeded
from kalamdb.storage.jobs import JobAttempt, JobEvent, JobRow, JobStatus, JobStore

_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_TIME_DIGITS, _COUNT_DIGITS = 7, 3
_COUNT_MAX = 62**_COUNT_DIGITS
_EVENTS_MAX = 1_000_000
_EVERY_S_MIN, _EVERY_S_MAX = 0.1, 366 * 86_400.0


@dataclass(frozen=True, slots=True)
class Completed:
    """The attempt succeeded; `result` is any JSON-like value."""

    message: str | None = None
    result: Any = None


@dataclass(frozen=True, slots=True)
class Skipped:
    """There was nothing to do."""

    message: str


@dataclass(frozen=True, slots=True)
class Retry:
    """Try again in `after_s` seconds (None: by the retry policy); uses one retry."""

    after_s: float | None = None
    reason: str = "retry requested"


@dataclass(frozen=True, slots=True)
class Snooze:
    """Run again in `after_s` seconds; uses no retry."""

    after_s: float


@dataclass(frozen=True, slots=True)
class Every:
    """Comes back each `seconds` (0.1 to a year), with `params`. Raises InvalidRequest for other spans."""

    seconds: float
    params: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _EVERY_S_MIN <= self.seconds <= _EVERY_S_MAX:
            raise InvalidRequest(f"every {self.seconds:g} s: {_EVERY_S_MIN:g} to {_EVERY_S_MAX:g} s are allowed")

    def __str__(self) -> str:
        return f"every {self.seconds:g} s"


@dataclass(frozen=True, slots=True)
class Cron:
    """Comes back as a cron expression of five fields says in a time zone, with `params`.

    Raises InvalidRequest for an expression that is not one or never due, and for an unknown zone.
    """

    expression: str
    time_zone: str = "UTC"
    params: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            zone = ZoneInfo(self.time_zone)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise InvalidRequest(f"time zone '{self.time_zone}' is not known") from None
        try:
            next(CronSim(self.expression, datetime.fromtimestamp(0, zone)))
        except CronSimError as exc:
            raise InvalidRequest(f"cron expression '{self.expression}': {str(exc).lower()}") from None
        except StopIteration:
            raise InvalidRequest(f"cron expression '{self.expression}' is never due") from None

    def __str__(self) -> str:
        return f"{self.expression} {self.time_zone}"


Outcome = Completed | Skipped | Retry | Snooze | None


EXPECTED_OUTCOMES = "Completed, Skipped, Retry, Snooze or None"


class Permanent(Exception):
    """Raise it to end the job as failed at once."""


class ProcessFailure(Exception):
    """What ended an attempt in a process of its own, as text: an exception there, or the death of the process."""

    def __init__(self, text: str, trace: str | None = None, *, is_permanent: bool = False) -> None:
        super().__init__(text)
        self.text = text
        self.trace = trace
        self.is_permanent = is_permanent


class RunIn(StrEnum):
    """Where a sync executor runs."""

    THREAD = "thread"
    PROCESS = "process"
    """A process per attempt, for work that needs the processor."""


class InterruptReason(StrEnum):
    """Why an attempt must stop."""

    CANCEL = "cancel"
    PAUSE = "pause"
    STOP = "stop"
    TIMEOUT = "timeout"
    LEASE_LOST = "lease lost"


class JobInterrupted(BaseException):
    """The attempt must stop: clean up and let it pass. Not an Exception, so `except Exception` lets it by."""

    def __init__(self, reason: InterruptReason) -> None:
        super().__init__(f"the job was interrupted: {reason}")
        self.reason = reason


def _time(ms: int | None) -> datetime | None:
    return None if ms is None else datetime.fromtimestamp(ms / 1000, UTC)


@dataclass(frozen=True, slots=True)
class Job:
    """A job at one moment; its attributes are the columns of system.jobs, times are aware UTC."""

    row: JobRow = field(repr=False)
    _store: JobStore = field(repr=False)

    @property
    def id(self) -> str:
        """job_id"""
        return self.row.job_id

    @property
    def status(self) -> JobStatus:
        """State; a str enum with lower-case values."""
        return self.row.status

    @property
    def created_at(self) -> datetime:
        """When it was accepted."""
        found = _time(self.row.created_at)
        assert found is not None
        return found

    @property
    def updated_at(self) -> datetime:
        """When it last changed."""
        found = _time(self.row.updated_at)
        assert found is not None
        return found

    @property
    def run_at(self) -> datetime | None:
        """Not before this time."""
        return _time(self.row.run_at or None)

    @property
    def started_at(self) -> datetime | None:
        """When its first attempt began."""
        return _time(self.row.started_at)

    @property
    def finished_at(self) -> datetime | None:
        """When it ended."""
        return _time(self.row.finished_at)

    def events(self) -> Sequence[JobEvent]:
        """Its history, oldest first, as it is now."""
        return self._store.events(self.row.job_id, limit=_EVENTS_MAX)

    def attempts(self) -> list[JobAttempt]:
        """Its attempts, oldest first, as they are now."""
        return self._store.attempts(self.row.job_id)

    def __getattr__(self, name: str) -> Any:
        """The remaining columns as stored: job_type, message, retry_count, progress, ..."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.row, name)

    def __repr__(self) -> str:
        return f"<Job {self.row.job_id} {self.row.status}>"


def stored_json(value: Any, what: str, bytes_max: int) -> Any:
    """`value` as its JSON reads: what is stored, shown in SQL, and given back. Raises InvalidRequest, LimitExceeded."""
    try:
        encoded = msgspec.json.encode(value)
        plain = msgspec.json.decode(encoded)
        # JSON holds larger integers than a stored row does.
        msgspec.msgpack.encode(plain)
    except Exception as exc:
        raise InvalidRequest(f"{what} cannot be stored, it has no JSON form: {exc}") from exc
    if len(encoded) > bytes_max:
        raise LimitExceeded(f"{what} would take {len(encoded)} bytes, at most {bytes_max} are allowed")
    return plain


class JobIds:
    """Job ids: `<PREFIX>-` + 10 base62 digits: 7 of the time in ms, 3 random at the first id of a ms, then
    counting up; when they are used up the next ms is taken. They sort by creation."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._ms = 0
        self._count = 0

    def next(self, prefix: str) -> str:
        """A fresh id."""
        with self._lock:
            now_ms = self._clock.now_ms()
            if now_ms > self._ms:
                self._ms = now_ms
                self._count = int.from_bytes(self._clock.random_bytes(2), "big")
            elif self._count + 1 < _COUNT_MAX:
                self._count += 1
            else:
                self._ms += 1
                self._count = int.from_bytes(self._clock.random_bytes(2), "big")
            return f"{prefix}-{_base62(self._ms, _TIME_DIGITS)}{_base62(self._count, _COUNT_DIGITS)}"


def counted(number: int, noun: str) -> str:
    """A number with its noun, for messages."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def size(bytes_: int) -> str:
    """Bytes for messages: 512 B, 49.6 kB, 7.6 MB."""
    for unit, power in (("MB", 1e6), ("kB", 1e3)):
        if bytes_ >= power:
            return f"{bytes_ / power:,.1f} {unit}"
    return f"{bytes_} B"


def _base62(value: int, digits: int) -> str:
    out = ""
    for _ in range(digits):
        value, digit = divmod(value, 62)
        out = _ALPHABET[digit] + out
    return out
