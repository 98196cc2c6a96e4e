"""Stream eviction jobs: rows past their time to live leave the store."""

from __future__ import annotations

from typing import Any

import msgspec

from kalamdb.jobs.context import JobContext, JobServices
from kalamdb.jobs.executors.maintenance import MaintenanceExecutor
from kalamdb.jobs.model import Every, Outcome, Skipped, counted


class StreamEvictionParams(msgspec.Struct, frozen=True):
    """One stream, or all of them."""

    table_id: str | None = None


class StreamEvictionExecutor(MaintenanceExecutor[StreamEvictionParams]):
    """Removes expired buckets of streams, each by one range delete."""

    job_type = "stream_eviction"
    prefix = "SE"
    Params = StreamEvictionParams
    schedule = Every(60)

    def idempotency_key(self, params: StreamEvictionParams, table_uid: int | None) -> str | None:
        return f"evict:{table_uid if table_uid is not None else params.table_id or 'all'}"

    def pre_validate(self, params: StreamEvictionParams, services: JobServices | None) -> str | None:
        due = services is None or services.maintenance.has_expired_streams()
        return None if due else "no bucket of a stream has expired"

    def execute(self, ctx: JobContext[StreamEvictionParams]) -> Outcome:
        assert ctx.services is not None
        maintenance, uid = ctx.services.maintenance, ctx.row.table_uid
        if ctx.params.table_id is not None and (uid is None or not maintenance.exists(uid)):
            return Skipped(f"stream '{ctx.params.table_id}' does not exist")
        maintenance.evict_streams(uid, ctx, _message)
        return None


def _message(report: Any) -> str:
    return f"Evicted {counted(report.buckets, 'expired bucket')} of {counted(report.streams, 'stream')}"
