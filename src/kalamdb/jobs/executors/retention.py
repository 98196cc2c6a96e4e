"""Retention jobs: what was deleted long ago leaves the files."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from kalamdb.errors import TransactionConflict
from kalamdb.jobs.context import JobContext
from kalamdb.jobs.executors.maintenance import MaintenanceExecutor
from kalamdb.jobs.model import Cron, Outcome, Skipped, Snooze, counted, size

_BUSY_S = 1.0


class RetentionParams(msgspec.Struct, frozen=True):
    """One table, or every table by its own setting; `retention_hours` stands in for the table's."""

    table_id: str | None = None
    retention_hours: Annotated[float, msgspec.Meta(ge=0)] | None = None


class RetentionExecutor(MaintenanceExecutor[RetentionParams]):
    """Removes rows that were deleted longer ago than DELETED_RETENTION_HOURS, hot and cold."""

    job_type = "retention"
    prefix = "RT"
    Params = RetentionParams
    schedule = Cron("30 2 * * *")

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
            maintenance.retain(uid, ctx, _message, retention_hours=ctx.params.retention_hours)
        except TransactionConflict:
            return Snooze(_BUSY_S)
        return None


def _message(report: Any) -> str:
    rows, tables = counted(report.rows, "deleted row"), counted(report.tables, "table")
    return f"Removed {rows} of {tables} for good, {size(max(report.bytes, 0))} freed"
