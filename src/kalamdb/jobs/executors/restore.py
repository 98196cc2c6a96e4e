"""Restore jobs: a backup becomes the database at the next start."""

from __future__ import annotations

from typing import Any

import msgspec

from kalamdb.backup import Backups
from kalamdb.errors import Corrupt, InvalidRequest, NotFound
from kalamdb.jobs.context import JobContext
from kalamdb.jobs.model import Outcome, Permanent, counted, size
from kalamdb.jobs.queues import MAINTENANCE_QUEUE
from kalamdb.jobs.registry import JobExecutor
from kalamdb.storage.jobs import OnInterrupt


class RestoreParams(msgspec.Struct, frozen=True):
    """From where: a backup, or a target whose newest one is taken."""

    path: str
    resume_jobs: bool = False
    """Whether jobs of the application run at once in the restored database; else they start paused."""


class RestoreExecutor(JobExecutor[RestoreParams]):
    """Verifies a backup and stages it; the last commit decides that the next start takes it."""

    job_type = "restore"
    prefix = "RS"
    Params = RestoreParams
    on_interrupt = OnInterrupt.FAIL
    queue = MAINTENANCE_QUEUE

    def __init__(self, backups: Backups) -> None:
        self._backups = backups

    def decode(self, parameters: object) -> RestoreParams:
        params: RestoreParams = super().decode(parameters)
        self._backups.check_source(params.path)
        return params

    def idempotency_key(self, params: RestoreParams, table_uid: int | None) -> str | None:
        return "restore"

    def concurrency_key(self, params: RestoreParams, table_uid: int | None) -> str | None:
        return "restore"

    def execute(self, ctx: JobContext[RestoreParams]) -> Outcome:
        try:
            self._backups.restore(ctx.params.path, ctx, _message, resume_jobs=ctx.params.resume_jobs)
        except (Corrupt, InvalidRequest, NotFound) as exc:
            raise Permanent(str(exc)) from exc
        return None


def _message(report: Any) -> str:
    return (
        f"Restore of '{report.backup}' staged ({size(report.bytes)} in {counted(report.files, 'file')}): restart "
        "required; writes from now on are not in the restored database"
    )
