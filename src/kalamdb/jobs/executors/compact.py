"""Compaction jobs: segments of one table are merged."""

from __future__ import annotations

from typing import Any

import msgspec

from kalamdb.jobs.context import JobContext
from kalamdb.jobs.executors.maintenance import MaintenanceExecutor
from kalamdb.jobs.model import Outcome, Skipped, counted, size


class CompactParams(msgspec.Struct, frozen=True):
    """Which table; `full` merges everything, else only what has piled up."""

    table_id: str
    full: bool = True


class CompactExecutor(MaintenanceExecutor[CompactParams]):
    """Merges segments into level 1, or small ones among each other; skipped when nothing is worth it."""

    job_type = "compact"
    prefix = "CO"
    Params = CompactParams

    def idempotency_key(self, params: CompactParams, table_uid: int | None) -> str | None:
        return f"compact:{table_uid if table_uid is not None else params.table_id}"

    def concurrency_key(self, params: CompactParams, table_uid: int | None) -> str | None:
        return f"table:{table_uid}"

    def execute(self, ctx: JobContext[CompactParams]) -> Outcome:
        maintenance = ctx.services.maintenance if ctx.services is not None else None
        uid = ctx.row.table_uid
        if maintenance is None or uid is None or not maintenance.exists(uid):
            return Skipped(f"table '{ctx.params.table_id}' does not exist")
        report = maintenance.compact(uid, ctx, _message, full=ctx.params.full)
        return None if report is not None else Skipped(f"nothing to compact in '{ctx.params.table_id}'")


def _message(report: Any) -> str:
    return (
        f"Compaction completed: {counted(report.inputs, 'segment')} into {report.outputs}, "
        f"{counted(report.rows_before, 'row')} into {report.rows_after:,}, "
        f"{size(report.bytes_before)} into {size(report.bytes_after)}"
    )
