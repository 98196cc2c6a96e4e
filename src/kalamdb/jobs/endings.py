"""What the end of an attempt makes of its job: columns to change and the events that say so."""

from __future__ import annotations

import math
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, assert_never

from kalamdb.clock import Clock
from kalamdb.errors import KalamDbError
from kalamdb.jobs.model import (
    EXPECTED_OUTCOMES,
    Completed,
    InterruptReason,
    JobInterrupted,
    Outcome,
    Permanent,
    ProcessFailure,
    Retry,
    Skipped,
    Snooze,
    stored_json,
)
from kalamdb.jobs.settings import JobSettings
from kalamdb.storage.jobs import AttemptOutcome, Events, Hold, JobRow, JobStatus, OnInterrupt

RESTARTED = "Server restarted during execution"
_WAIT_MAX_S = 366 * 86_400.0


@dataclass(frozen=True, slots=True)
class Ending:
    """Changes and events of one move out of `running`."""

    changes: Mapping[str, Any]
    events: Events


class _BadOutcome(Exception):
    """The executor returned what it may not."""


class Endings:
    """Decides how attempts end, by outcome, policy and settings."""

    def __init__(self, clock: Clock, settings: JobSettings) -> None:
        self._clock = clock
        self._settings = settings

    def of(self, row: JobRow, outcome: Outcome | BaseException, interrupted: InterruptReason | None) -> Ending:
        """The end of an attempt that returned or raised `outcome`. Raises nothing, whatever the executor did."""
        try:
            return self._of(row, outcome, interrupted)
        except _BadOutcome as exc:
            return self.failed(row, str(exc), None)

    def _of(self, row: JobRow, outcome: Outcome | BaseException, interrupted: InterruptReason | None) -> Ending:
        match outcome:
            case None:
                return self.completed(None)
            case Completed(message, result):
                return self.completed(message, result)
            case Skipped(message):
                text = self._cut(message)
                return Ending(
                    _ended(JobStatus.SKIPPED, message=text, exception_trace=None), (("INFO", f"Job skipped: {text}"),)
                )
            case _ if interrupted is InterruptReason.CANCEL:
                return self.cancelled()
            case Snooze(after_s):
                return self._snoozed(_delay_ms(after_s))
            case Retry(after_s, reason):
                delay_ms = None if after_s is None else _delay_ms(after_s)
                return self._retried(row, self._cut(reason), None, delay_ms)
            case JobInterrupted():
                return self.interrupted(row, interrupted or outcome.reason)
            case Permanent():
                return self.failed(row, self._text(outcome, bare=True) or "failed", self._trace(outcome))
            case ProcessFailure(text=text, trace=trace, is_permanent=is_permanent):
                end = self.failed if is_permanent else self._retried
                return end(row, self._cut(text), None if trace is None else self._kept_trace(trace))
            case BaseException():
                text = self._text(outcome, bare=isinstance(outcome, KalamDbError))
                return self._retried(row, text, self._trace(outcome), None)
            case _:
                raise _BadOutcome(f"the executor returned {type(outcome).__name__}, expected {EXPECTED_OUTCOMES}")

    def completed(self, message: str | None, result: Any = None) -> Ending:
        """Success."""
        text = None if message is None else self._cut(message)
        try:
            kept = stored_json(result, "the result", self._settings.result_bytes_max)
        except KalamDbError as exc:
            raise _BadOutcome(str(exc)) from exc
        changes = _ended(JobStatus.COMPLETED, message=text, exception_trace=None, result=kept)
        return Ending(changes, (("INFO", "Job completed" if text is None else f"Job completed: {text}"),))

    def cancelled(self) -> Ending:
        """Ended by its user."""
        return Ending(_ended(JobStatus.CANCELLED, cancel_requested=True), (("INFO", "Job cancelled by user"),))

    def failed(self, row: JobRow, error: str, trace: str | None) -> Ending:
        """Ended without a further attempt."""
        text = self._cut(error)
        changes = _ended(JobStatus.FAILED, message=text, exception_trace=trace)
        return Ending(changes, (("ERROR", f"Job failed permanently: {text}"),))

    def interrupted(self, row: JobRow, reason: InterruptReason) -> Ending:
        """The attempt was told to stop, and did or lost its lease."""
        match reason:
            case InterruptReason.CANCEL:
                return self.cancelled()
            case InterruptReason.TIMEOUT:
                limit_s = row.timeout_s or 0.0
                return self._retried(row, f"the attempt took longer than its time-out of {limit_s:g} s", None, None)
            case InterruptReason.PAUSE:
                return Ending(_waits(JobStatus.QUEUED, AttemptOutcome.PAUSED), (("INFO", "Job paused"),))
            case InterruptReason.STOP | InterruptReason.LEASE_LOST:
                return self._restarted(row)
            case _:
                assert_never(reason)

    def died(self, row: JobRow) -> Ending:
        """The process died while the job ran."""
        deaths = row.process_deaths + 1
        if row.cancel_requested:
            return self.cancelled()
        if deaths >= self._settings.quarantine_after:
            text = (
                f"quarantined: the process died {deaths} times while the job was running; "
                f"RETRY JOB '{row.job_id}' runs it again"
            )
            ending = self.failed(row, text, None)
            return Ending({**ending.changes, "hold": Hold.QUARANTINED, "process_deaths": deaths}, ending.events)
        ending = self._restarted(row)
        return Ending({**ending.changes, "process_deaths": deaths}, ending.events)

    def _restarted(self, row: JobRow) -> Ending:
        match row.on_interrupt:
            case OnInterrupt.REQUEUE:
                changes = _waits(JobStatus.QUEUED, AttemptOutcome.INTERRUPTED)
                return Ending(changes, (("WARN", f"{RESTARTED}; job queued again"),))
            case OnInterrupt.RETRY:
                return self._retried(row, RESTARTED, None, None)
            case OnInterrupt.FAIL:
                return self.failed(row, RESTARTED, None)
            case _:
                assert_never(row.on_interrupt)

    def _snoozed(self, delay_ms: int) -> Ending:
        changes = _waits(JobStatus.QUEUED, AttemptOutcome.SNOOZED, run_at=self._clock.now_ms() + delay_ms)
        return Ending(changes, (("INFO", f"Job snoozed for {delay_ms / 1000:g}s"),))

    def _retried(self, row: JobRow, error: str, trace: str | None, delay_ms: int | None = None) -> Ending:
        if row.retry_count >= row.max_retries:
            return self.failed(row, error, trace)
        policy, used = row.retry, row.retry_count + 1
        if delay_ms is None:
            grown = min(policy.base_ms * policy.factor ** min(row.retry_count, 64), policy.cap_ms)
            share = int.from_bytes(self._clock.random_bytes(4), "big") / 0xFFFF_FFFF
            delay_ms = int(grown * (1 + policy.jitter * (2 * share - 1)))
        changes = _waits(
            JobStatus.RETRYING, AttemptOutcome.RETRYING, retry_count=used, message=error, exception_trace=trace,
            run_at=self._clock.now_ms() + delay_ms,
        )  # fmt: skip
        text = f"Job failed, retrying in {delay_ms / 1000:g}s (attempt {used}/{row.max_retries})"
        return Ending(changes, (("WARN", text),))

    # Texts

    def _cut(self, text: object) -> str:
        raw = str(text).encode(errors="backslashreplace")
        limit = self._settings.message_bytes_max
        return raw.decode() if len(raw) <= limit else raw[:limit].decode(errors="ignore")

    def _text(self, exc: BaseException, *, bare: bool) -> str:
        try:
            text = str(exc)
        except Exception:
            text = "its text cannot be made"
        return self._cut(text if bare else f"{type(exc).__name__}: {text}")

    def _trace(self, exc: BaseException) -> str:
        try:
            return self._kept_trace("".join(traceback.format_exception(exc)))
        except Exception:
            # The memory or the stack may be used up still.
            return f"{type(exc).__name__} (no traceback could be made)"

    def _kept_trace(self, text: str) -> str:
        raw = text.encode(errors="backslashreplace")
        return raw[-self._settings.trace_bytes_max :].decode(errors="ignore")


def _ended(status: JobStatus, **changes: Any) -> dict[str, Any]:
    return {"status": status, "outcome": AttemptOutcome(status.value), "process_deaths": 0, **changes}


def _waits(status: JobStatus, outcome: AttemptOutcome, **changes: Any) -> dict[str, Any]:
    return {"status": status, "outcome": outcome, "process_deaths": 0, **changes}


def _delay_ms(after_s: Any) -> int:
    if isinstance(after_s, bool) or not isinstance(after_s, (int, float)) or not math.isfinite(after_s):
        raise _BadOutcome(f"the executor asked to wait {after_s!r} s; a number of seconds is expected")
    if not 0 <= after_s <= _WAIT_MAX_S:
        raise _BadOutcome(f"the executor asked to wait {after_s:g} s; 0 to {_WAIT_MAX_S:g} are allowed")
    return int(after_s * 1000)
