"""Backup jobs: a consistent copy of the whole database, while it is written to."""

from __future__ import annotations

from typing import Annotated

import msgspec

from kalamdb.backup import Backups
from kalamdb.backup.manifest import BackupManifest
from kalamdb.errors import Corrupt, InvalidRequest
from kalamdb.jobs.context import JobContext
from kalamdb.jobs.model import Completed, Outcome, Permanent, counted, size
from kalamdb.jobs.queues import MAINTENANCE_QUEUE
from kalamdb.jobs.registry import JobExecutor
from kalamdb.storage.jobs import OnInterrupt

_KEEP_MAX = 100_000
_Keep = Annotated[int, msgspec.Meta(ge=0, le=_KEEP_MAX)]


class BackupParams(msgspec.Struct, frozen=True):
    """Where to. `incremental` shares unchanged files with the backup before; with one of `keep_daily` and
    `keep_weekly` older backups are pruned after it."""

    path: str
    incremental: bool = False
    keep_daily: _Keep | None = None
    keep_weekly: _Keep | None = None


class BackupExecutor(JobExecutor[BackupParams]):
    """Backs up the database into a folder of its own in a target; half a backup never counts as one."""

    job_type = "backup"
    prefix = "BK"
    Params = BackupParams
    on_interrupt = OnInterrupt.FAIL
    queue = MAINTENANCE_QUEUE

    def __init__(self, backups: Backups) -> None:
        self._backups = backups

    def decode(self, parameters: object) -> BackupParams:
        params: BackupParams = super().decode(parameters)
        self._backups.check_destination(params.path)
        return params

    def idempotency_key(self, params: BackupParams, table_uid: int | None) -> str | None:
        return f"backup:{params.path}"

    def concurrency_key(self, params: BackupParams, table_uid: int | None) -> str | None:
        return "backup"

    def execute(self, ctx: JobContext[BackupParams]) -> Outcome:
        params = ctx.params
        try:
            manifest = self._backups.take(params.path, ctx, _message, incremental=params.incremental)
            message = manifest.message
            if params.keep_daily is not None or params.keep_weekly is not None:
                ctx.amend({})  # Whoever lost the lease meanwhile removes nothing.
                pruned = self._backups.prune(params.path, daily=params.keep_daily or 0, weekly=params.keep_weekly or 0)
                message += f"; {len(pruned.removed)} older removed"
        except (Corrupt, InvalidRequest) as exc:
            raise Permanent(str(exc)) from exc
        result = {
            "backup_id": manifest.backup_id,
            "snapshot_seq": manifest.snapshot_seq,
            "files": len(manifest.files),
            "bytes": manifest.size_bytes,
            "new_bytes": manifest.new_bytes,
        }
        return Completed(message, result)


def _message(manifest: BackupManifest, where: str) -> str:
    seconds = (manifest.finished_at - manifest.started_at) / 1000
    return (
        f"Backup completed: '{where}' ({size(manifest.size_bytes)} in {counted(len(manifest.files), 'file')} of "
        f"{counted(len(manifest.tables), 'table')}, {size(manifest.new_bytes)} new) in {seconds:.1f} s"
    )
