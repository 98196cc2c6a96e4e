"""What each move of a job does to its row, and the events that it writes. Pure functions.

Each returns the new row and its events; the legal moves themselves are a table in `storage.jobs`.
"""

from __future__ import annotations

from typing import Any, Final, assert_never

from msgspec.structs import replace

from kalamdb.clock import Clock
from kalamdb.storage.jobs import Hold, JobRow, JobStatus, OnInterrupt, RetryPolicy

Events = tuple[tuple[str, str], ...]
Move = tuple[JobRow, Events]

INFO: Final = "INFO"
WARN: Final = "WARN"
ERROR: Final = "ERROR"

RESTARTED: Final = "Server restarted during execution"
_RESTARTED_TRACE: Final = "The job was running when the server went down; there is no traceback."
_EXPONENT_MAX: Final = 64


def retry_delay_ms(policy: RetryPolicy, retries: int, clock: Clock) -> int:
    """How long to wait after `retries` retries were used: grows by the factor up to the cap, with jitter."""
    grown = policy.base_ms * policy.factor ** min(retries, _EXPONENT_MAX)
    delay = min(grown, float(policy.cap_ms))
    draw = int.from_bytes(clock.random_bytes(4), "big") / 0xFFFF_FFFF
    return max(int(delay * (1 + policy.jitter * (2 * draw - 1))), 0)


def seconds(delay_ms: int) -> str:
    """A wait as the log shows it: 2s, 0.1s."""
    return f"{delay_ms / 1000:g}s"


def admit(row: JobRow, now_ms: int) -> Move:
    """new -> queued."""
    return replace(row, status=JobStatus.QUEUED, updated_at=now_ms), ((INFO, "Job queued"),)


def start(row: JobRow, now_ms: int) -> Move:
    """A row that was just claimed: message and traceback stay until the job ends well."""
    text = "Job started" if row.attempt <= 1 else f"Job started (attempt {row.attempt})"
    return replace(row, started_at=now_ms, updated_at=now_ms, progress=None), ((INFO, text),)


def complete(row: JobRow, message: str | None, result: Any, now_ms: int) -> Move:
    """running -> completed; the traceback of earlier attempts goes."""
    text = "Job completed" if message is None else f"Job completed: {message}"
    ended = _ended(row, JobStatus.COMPLETED, now_ms, message=message, exception_trace=None, result=result)
    return ended, ((INFO, text),)


def skip(row: JobRow, message: str, now_ms: int) -> Move:
    """running -> skipped."""
    ended = _ended(row, JobStatus.SKIPPED, now_ms, message=message, exception_trace=None)
    return ended, ((INFO, f"Job skipped: {message}"),)


def fail(row: JobRow, error: str, trace: str | None, now_ms: int) -> Move:
    """running -> failed, for good."""
    ended = _ended(row, JobStatus.FAILED, now_ms, message=error, exception_trace=trace)
    return ended, ((ERROR, f"Job failed permanently: {error}"),)


def retry_or_fail(row: JobRow, error: str, trace: str | None, now_ms: int, delay_ms: int) -> Move:
    """running -> retrying while retries are left, else failed."""
    if row.retry_count >= row.max_retries:
        return fail(row, error, trace, now_ms)
    used = row.retry_count + 1
    waiting = _released(
        row,
        JobStatus.RETRYING,
        now_ms,
        run_at=now_ms + delay_ms,
        retry_count=used,
        message=error,
        exception_trace=trace,
    )
    return waiting, (
        (WARN, f"Attempt {row.attempt} failed: {error}"),
        (WARN, f"Job failed, retrying in {seconds(delay_ms)} (attempt {used}/{row.max_retries})"),
    )


def snooze(row: JobRow, delay_ms: int, now_ms: int) -> Move:
    """running -> queued until later; no retry used."""
    waiting = _released(row, JobStatus.QUEUED, now_ms, run_at=now_ms + delay_ms)
    return waiting, ((INFO, f"Job snoozed for {seconds(delay_ms)}"),)


def cancel(row: JobRow, now_ms: int, error: str | None = None, trace: str | None = None) -> Move:
    """Any active state -> cancelled; `error` is what went wrong while it stopped."""
    kept = {} if error is None else {"message": error, "exception_trace": trace}
    ended = _ended(row, JobStatus.CANCELLED, now_ms, cancel_requested=True, **kept)
    return ended, ((INFO, "Job cancelled by user"),)


def pause(row: JobRow, now_ms: int) -> Move:
    """queued, retrying or running -> held; a running job goes back to queued, no retry used."""
    status = JobStatus.QUEUED if row.status is JobStatus.RUNNING else row.status
    return _released(row, status, now_ms, hold=Hold.PAUSED), ((INFO, "Job paused"),)


def resume(row: JobRow, now_ms: int) -> Move:
    """A paused job may be claimed again."""
    return replace(row, hold=None, updated_at=now_ms), ((INFO, "Job resumed"),)


def requeue(row: JobRow, now_ms: int, why: str) -> Move:
    """running -> queued; no retry used."""
    return _released(row, JobStatus.QUEUED, now_ms), ((WARN, f"{why}; job queued again"),)


def interrupted(row: JobRow, now_ms: int, delay_ms: int) -> Move:
    """running -> what the job's `on_interrupt` says for a crash or a hard stop."""
    match row.on_interrupt:
        case OnInterrupt.REQUEUE:
            return requeue(row, now_ms, RESTARTED)
        case OnInterrupt.RETRY:
            return retry_or_fail(row, RESTARTED, _RESTARTED_TRACE, now_ms, delay_ms)
        case OnInterrupt.FAIL:
            return fail(row, RESTARTED, _RESTARTED_TRACE, now_ms)
        case _:
            assert_never(row.on_interrupt)


def recovered(row: JobRow, now_ms: int, delay_ms: int, quarantine_after: int) -> Move:
    """A row found running at the start: the process that ran it died."""
    row = replace(row, process_deaths=row.process_deaths + 1)
    if row.cancel_requested:
        return cancel(row, now_ms)
    if row.process_deaths >= quarantine_after:
        error = (
            f"quarantined: the process died {row.process_deaths} times while the job was running; "
            f"RETRY JOB '{row.job_id}' runs it again"
        )
        quarantined, events = fail(row, error, _RESTARTED_TRACE, now_ms)
        return replace(quarantined, hold=Hold.QUARANTINED), events
    return interrupted(row, now_ms, delay_ms)


def reset(row: JobRow, now_ms: int) -> Move:
    """failed or cancelled -> queued, as RETRY JOB does: all counts of earlier runs start again."""
    fresh = replace(
        row,
        status=JobStatus.QUEUED,
        retry_count=0,
        process_deaths=0,
        hold=None,
        cancel_requested=False,
        run_at=now_ms,
        updated_at=now_ms,
        finished_at=None,
    )
    return fresh, ((INFO, "Job retried by user"), (INFO, "Job queued"))


def _ended(row: JobRow, status: JobStatus, now_ms: int, **changes: Any) -> JobRow:
    return replace(
        row, status=status, lease_id=None, hold=None, updated_at=now_ms, finished_at=now_ms, **changes
    )


def _released(row: JobRow, status: JobStatus, now_ms: int, **changes: Any) -> JobRow:
    return replace(row, status=status, lease_id=None, updated_at=now_ms, **changes)
