"""The unified job manager: durable jobs, executors, and the loop that runs them."""

from kalamdb.jobs.context import JobContext
from kalamdb.jobs.manager import JobRequest, UnifiedJobManager
from kalamdb.jobs.model import (
    Completed,
    Cron,
    Every,
    InterruptReason,
    Job,
    JobInterrupted,
    Permanent,
    Retry,
    RunIn,
    Skipped,
    Snooze,
)
from kalamdb.jobs.registry import JobExecutor, JobRegistry
from kalamdb.storage.jobs import JobStatus, RetryPolicy

__all__ = [
    "Completed",
    "Cron",
    "Every",
    "InterruptReason",
    "Job",
    "JobContext",
    "JobExecutor",
    "JobInterrupted",
    "JobRegistry",
    "JobRequest",
    "JobStatus",
    "Permanent",
    "Retry",
    "RetryPolicy",
    "RunIn",
    "Skipped",
    "Snooze",
    "UnifiedJobManager",
]
