"""Cleanup jobs: what DROP and TRUNCATE leave, and files that nothing names."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from kalamdb.jobs.context import JobContext
from kalamdb.jobs.executors.maintenance import MaintenanceExecutor
from kalamdb.jobs.model import Cron, Outcome, Skipped, counted, size


class CleanupParams(msgspec.Struct, frozen=True):
    """What to clean; `table_uid` names the dropped incarnation, whatever bears the name now."""

    operation: Literal["drop_table", "truncate", "sweep"]
    table_id: str | None = None
    table_uid: int | None = None


class CleanupExecutor(MaintenanceExecutor[CleanupParams]):
    """Removes records and files of dropped tables, and files without record or live intent."""

    job_type = "cleanup"
    prefix = "CL"
    Params = CleanupParams
    schedule = Cron("0 3 * * *", params={"operation": "sweep"})

    def idempotency_key(self, params: CleanupParams, table_uid: int | None) -> str | None:
        return f"sweep:{params.table_id or 'all'}" if params.operation == "sweep" else f"drop:{table_uid}"

    def concurrency_key(self, params: CleanupParams, table_uid: int | None) -> str | None:
        return f"table:{table_uid}" if table_uid is not None else "sweep"

    def execute(self, ctx: JobContext[CleanupParams]) -> Outcome:
        assert ctx.services is not None
        maintenance, uid = ctx.services.maintenance, ctx.row.table_uid
        if ctx.params.operation == "sweep":
            maintenance.sweep(uid, ctx, _message)
            return None
        report = maintenance.drop_leftovers(uid, ctx, _message) if uid is not None else None
        return None if report is not None else Skipped("nothing is left of the table")


def _message(report: Any) -> str:
    return f"Cleaned up: {counted(report.files, 'file')} removed, {size(report.bytes)} freed"
