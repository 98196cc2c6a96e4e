"""Backup and restore of one open database, as its jobs and statements use them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kalamdb.backup.listing import BackupEntry, Located, PruneReport, list_backups, locate, prune, verify
from kalamdb.backup.manifest import BackupManifest
from kalamdb.backup.restore import RestoreReport, check_format, pending_restore, stage_online
from kalamdb.backup.take import BackupMessage, DatabaseIdentity, take_backup
from kalamdb.backup.targets import Targets
from kalamdb.clock import seq_to_ms
from kalamdb.errors import InvalidRequest
from kalamdb.files import FileOps, LocalFiles
from kalamdb.storage.directory import DataDirectory
from kalamdb.storage.jobs import JobFilter
from kalamdb.tables.flush import JobHandle, Message
from kalamdb.tables.store import TableStore


@dataclass(frozen=True, slots=True)
class PlanStep:
    """One line of EXPLAIN RESTORE."""

    action: str
    detail: str


class Backups:
    """What executors and statements call. Thread-safe."""

    def __init__(
        self,
        store: TableStore,
        directory: DataDirectory | None,
        *,
        scratch: Path,
        identity: DatabaseIdentity,
        operations: FileOps | None = None,
    ) -> None:
        home = store.root if directory is None else directory.path
        self._store = store
        self._directory = directory
        self._scratch = scratch
        self._identity = identity
        self._files = LocalFiles(home, operations)
        self._targets = Targets(operations, data_directory=home)

    def remove_scratch(self) -> None:
        """Remove what a backup that was cut short left in the data directory. Before any backup runs."""
        self._files.remove_tree(self._scratch)

    def check_destination(self, path: str) -> None:
        """Raise InvalidRequest unless backups may be written to `path`."""
        self._targets.check_destination(path)

    def check_source(self, path: str) -> None:
        """Raise InvalidRequest unless a backup may be read from `path`."""
        self._targets.check(path)

    def take(self, path: str, job: JobHandle, message: BackupMessage, *, incremental: bool) -> BackupManifest:
        """See `take_backup`."""
        self.check_destination(path)
        return take_backup(
            self._store, self._targets.open(path), job, scratch=self._scratch, identity=self._identity,
            incremental=incremental, message=message,
        )  # fmt: skip

    def locate(self, path: str) -> Located:
        """See `listing.locate`."""
        return locate(self._targets, path)

    def verify(self, path: str) -> Located:
        """Read every byte of a backup. Raises Corrupt that names the first damaged or missing file."""
        backup = self.locate(path)
        verify(backup, lambda _: None)
        return backup

    def entries(self, path: str | None) -> list[BackupEntry]:
        """Backups of a target; None is every target that a backup job on record wrote to."""
        if path is not None:
            return list_backups(self._targets.open(path))
        rows = self._store.backend.jobs.query(JobFilter(job_type="backup", limit=None))
        given = [row.parameters for row in rows]
        known = sorted({str(one["path"]) for one in given if isinstance(one, dict) and "path" in one})
        return [entry for one in known for entry in list_backups(self._targets.open(one))]

    def prune(self, path: str, *, daily: int, weekly: int) -> PruneReport:
        """See `listing.prune`; of this database and those that it was restored from."""
        uids = {self._identity.uid, *self._identity.lineage}
        return prune(self._targets.open(path), uids, daily=daily, weekly=weekly, now_ms=self._store.clock.now_ms())

    def restore(self, path: str, job: JobHandle, message: Message, *, resume_jobs: bool) -> RestoreReport:
        """See `stage_online`."""
        directory = self._on_disk()
        backup = self.locate(path)
        return stage_online(self._store, backup, directory, self._files, job, message, resume_jobs=resume_jobs)

    def _on_disk(self) -> DataDirectory:
        if self._directory is None:
            raise InvalidRequest(
                "a database in memory cannot be restored in place; use kalamdb.restore(backup, path) and open that path"
            )
        return self._directory

    def plan_restore(self, path: str) -> list[PlanStep]:
        """What RESTORE DATABASE would do, and what it would cost. Nothing is changed."""
        backup = self.locate(path)
        check_format(backup)
        manifest, directory = backup.manifest, self._on_disk()
        size = f"{len(manifest.files):,} files, {manifest.size_bytes / 1e6:,.1f} MB"
        generation = directory.generations.next().name
        behind_s = max(seq_to_ms(self._store.backend.head()) - seq_to_ms(manifest.snapshot_seq), 0) / 1000
        versions = sum(one.hot_versions + one.cold_versions for one in manifest.tables)
        lost = (
            f"writes above _seq {manifest.snapshot_seq}: of the last {behind_s:,.0f} s and until the restart"
            if manifest.database_uid == self._identity.uid
            else f"all of this database (uid {self._identity.uid}): the backup is of database {manifest.database_uid}"
        )
        return [
            PlanStep("verify", f"read {size} of backup '{backup.where}' ({manifest.kind})"),
            PlanStep("stage", f"copy {size} into {generation} of '{directory.path}', then fsync"),
            PlanStep("contents", f"{len(manifest.tables):,} tables with {versions:,} row versions"),
            PlanStep("lost", lost),
            PlanStep("commit", "record the restore, end the job as completed; the running database goes on"),
            PlanStep("restart", f"replace CURRENT ({directory.generation.name} by {generation}) at the next start"),
            PlanStep("keep", f"{directory.generation.name} stays until {generation} has passed a check"),
        ]

    def pending(self) -> str | None:
        """A sentence about a restore that waits for a restart; None when none does."""
        found = pending_restore(self._store.backend)
        if found is None:
            return None
        return (
            f"restart required: '{found.backup}' was restored up to _seq {found.snapshot_seq}; "
            "writes since then are not in the restored database"
        )


__all__ = ["Backups", "PlanStep"]
