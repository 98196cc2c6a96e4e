"""Retention jobs: what was deleted long ago leaves the files, and history that is old enough the store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import msgspec

from kalamdb.errors import TransactionConflict
from kalamdb.jobs.context import JobContext
from kalamdb.jobs.executors.maintenance import MaintenanceExecutor
from kalamdb.jobs.history import History
from kalamdb.jobs.model import Completed, Cron, Outcome, Skipped, Snooze, counted, size
from kalamdb.storage.jobs import JobFence

_BUSY_S = 1.0


class RetentionParams(msgspec.Struct, frozen=True):
    """One table, or every table by its own setting and the histories; `retention_hours` stands in for the table's."""

    table_id: str | None = None
    retention_hours: Annotated[float, msgspec.Meta(ge=0)] | None = None


class RetentionExecutor(MaintenanceExecutor[RetentionParams]):
    """Removes rows that were deleted longer ago than DELETED_RETENTION_HOURS, hot and cold.

    Without `table_id` also ended jobs and entries of the audit log, as their settings say.
    """

    job_type = "retention"
    prefix = "RT"
    Params = RetentionParams
    schedule = Cron("30 2 * * *")

    def __init__(self, history: History) -> None:
        self._history = history

    def idempotency_key(self, params: RetentionParams, table_uid: int | None) -> str | None:
        return f"retention:{table_uid if table_uid is not None else params.table_id or 'all'}"

    def concurrency_key(self, params: RetentionParams, table_uid: int | None) -> str | None:
        return f"table:{table_uid}" if table_uid is not None else "retention"

    def execute(self, ctx: JobContext[RetentionParams]) -> Outcome:
        assert ctx.services is not None
        maintenance, uid = ctx.services.maintenance, ctx.row.table_uid
        if ctx.params.table_id is not None and (uid is None or not maintenance.exists(uid)):
            return Skipped(f"table '{ctx.params.table_id}' does not exist")
        try:
            report = maintenance.retain(uid, ctx, retention_hours=ctx.params.retention_hours)
        except TransactionConflict:
            return Snooze(_BUSY_S)
        rows, tables = counted(report.rows, "deleted row"), counted(report.tables, "table")
        message = f"Removed {rows} of {tables} for good, {size(max(report.bytes, 0))} freed"
        figures = {"rows": report.rows, "tables": report.tables, "bytes": report.bytes}
        if ctx.params.table_id is None:
            jobs = _purge(ctx, report, "ended job", self._history.purge_jobs)
            entries = _purge(ctx, report, "audit row", self._history.purge_audit)
            message += f"; {counted(jobs, 'ended job')} and {counted(entries, 'audit row')}"
            figures |= {"jobs": jobs, "audit_rows": entries}
        return Completed(message, result=figures)


def _purge(ctx: JobContext[RetentionParams], report: Any, what: str, one_pass: Callable[[JobFence], int]) -> int:
    """Make passes until one finds nothing, each a few commits under the lease; how much went."""
    total = 0
    while True:
        ctx.check()
        gone = one_pass(ctx.fence())
        if not gone:
            return total
        total += gone
        ctx.progress(report.seen, report.seen, "tables", f"{counted(total, what)} removed")
