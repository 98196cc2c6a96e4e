"""Settings of the job system, as plain values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSettings:
    """See docs/settings.md, section jobs."""

    max_concurrent: int = 10
    max_retries: int = 3
    retry_backoff_ms: int = 100
    cancel_timeout_s: float = 5.0
    quarantine_after: int = 3
    abandoned_threads_max: int = 0
    """0 is max_concurrent."""
    queued_max: int = 1_000_000
    parameters_bytes_max: int = 262_144
    checkpoint_bytes_max: int = 1 << 20
    result_bytes_max: int = 1 << 20
    message_bytes_max: int = 4096
    trace_bytes_max: int = 65_536
    shutdown_timeout_s: float = 30.0
    history_completed_days: float = 7.0
    """For jobs that were skipped or cancelled too."""
    history_failed_days: float = 90.0
    history_rows_max: int = 1_000_000
    """Ended jobs of each state."""
    audit_retention_days: float = 365.0
    """`audit.retention_days`: entries of the audit log go by the same job."""
    log_bytes_max: int = 16 << 20
    log_files_max: int = 5
