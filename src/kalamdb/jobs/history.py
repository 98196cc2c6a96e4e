"""What is kept of jobs that have ended and of the audit log, by age and number.

The manager makes a pass every minute, so that the number of rows is bounded whatever happens; the retention
job makes passes until nothing is left to remove, under its lease.
"""

from __future__ import annotations

import threading
from typing import Final

from kalamdb.jobs.settings import JobSettings
from kalamdb.storage import Batch, StorageBackend
from kalamdb.storage.jobs import JobFence, JobStatus
from kalamdb.users import expired_audit_ops

PASS_MAX: Final = 1000
"""Entries that one pass removes."""
ENDED: Final = (JobStatus.COMPLETED, JobStatus.SKIPPED, JobStatus.CANCELLED, JobStatus.FAILED)
_DAY_MS = 86_400_000


class History:
    """Removes what is older or more than the settings allow. Thread-safe; with a `fence` only under that lease."""

    def __init__(self, backend: StorageBackend, settings: JobSettings) -> None:
        self._backend = backend
        self._settings = settings
        self._lock = threading.Lock()
        """One pass at a time: two that find the same surplus would remove twice as much."""

    def purge_jobs(self, fence: JobFence | None = None) -> int:
        """One bounded pass over the ended jobs; returns how many went. Raises LeaseLost."""
        jobs, gone = self._backend.jobs, 0
        with self._lock:
            for status in ENDED:
                before = self._backend.now_ms() - int(self._days(status) * _DAY_MS)
                gone += jobs.delete_ended(status, finished_before=before, limit=PASS_MAX - gone, fence=fence)
                beyond = min(jobs.count(status) - self._settings.history_rows_max, PASS_MAX - gone)
                if beyond > 0:
                    gone += jobs.delete_ended(status, finished_before=None, limit=beyond, fence=fence)
        return gone

    def _days(self, status: JobStatus) -> float:
        is_failed = status is JobStatus.FAILED
        return self._settings.history_failed_days if is_failed else self._settings.history_completed_days

    def purge_audit(self, fence: JobFence | None = None) -> int:
        """One bounded pass over the audit log, oldest entries first; returns how many went. Raises LeaseLost."""
        before = self._backend.now_ms() - int(self._settings.audit_retention_days * _DAY_MS)
        ops = expired_audit_ops(self._backend, before, PASS_MAX)
        if ops:
            self._backend.commit(Batch(records=ops, jobs=[] if fence is None else [fence]))
        return len(ops)


__all__ = ["ENDED", "PASS_MAX", "History"]
