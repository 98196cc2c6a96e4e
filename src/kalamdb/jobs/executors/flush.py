"""Flush jobs: hot rows of one table become a segment."""

from __future__ import annotations

from typing import Any

import msgspec

from kalamdb.jobs.context import JobContext
from kalamdb.jobs.executors.maintenance import MaintenanceExecutor
from kalamdb.jobs.model import Outcome, Skipped, counted, size


class FlushParams(msgspec.Struct, frozen=True):
    """Which table."""

    table_id: str


class FlushExecutor(MaintenanceExecutor[FlushParams]):
    """Writes all hot rows of a table to one level-0 segment; skipped when none is hot."""

    job_type = "flush"
    prefix = "FL"
    Params = FlushParams

    def idempotency_key(self, params: FlushParams, table_uid: int | None) -> str | None:
        return f"flush:{table_uid if table_uid is not None else params.table_id}"

    def concurrency_key(self, params: FlushParams, table_uid: int | None) -> str | None:
        return f"table:{table_uid}"

    def execute(self, ctx: JobContext[FlushParams]) -> Outcome:
        maintenance = ctx.services.maintenance if ctx.services is not None else None
        uid = ctx.row.table_uid
        if maintenance is None or uid is None or not maintenance.exists(uid):
            return Skipped(f"table '{ctx.params.table_id}' does not exist")
        report = maintenance.flush(uid, ctx, _message)
        return None if report is not None else Skipped(f"no pending writes in '{ctx.params.table_id}'")


def _message(report: Any) -> str:
    whose = f" of {counted(report.users, 'user')}" if report.users else ""
    where = f"{counted(report.segments, 'segment')} ({size(report.bytes)})"
    return f"Flushed {counted(report.rows, 'row')}{whose} into {where}"
