"""Restoring a backup: verify, stage a further generation, then one rename at the next start.

A running database records in its store that a generation waits (`PendingRestore`), in the commit that ends
the job; the next start makes that generation the current one. A closed directory is restored at once. The
generation before it stays until the restored one has passed a check.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from kalamdb.backup.listing import Located, checked, locate, verify
from kalamdb.backup.targets import Targets
from kalamdb.clock import Clock, SystemClock
from kalamdb.errors import Closed, InvalidRequest, KalamDbError
from kalamdb.files import FileOps, LocalFiles
from kalamdb.service import Loop
from kalamdb.storage import Batch, RecordKind, RecordOp, StorageBackend, record_key
from kalamdb.storage.directory import (
    FORMAT_VERSION,
    DataDirectory,
    Generation,
    Generations,
    Origin,
    held_for_restore,
    publish_restored,
    replaced_name,
)
from kalamdb.tables.flush import JobHandle, Message
from kalamdb.tables.store import TableStore
from kalamdb.types import JobId

PENDING_KEY = record_key(RecordKind.META, "pending_restore")
_RECHECK_S = 3600.0
_STOP_WAIT_S = 2.0
_log = logging.getLogger("kalamdb.backup")


class PendingRestore(msgspec.Struct, frozen=True, kw_only=True):
    """A restored generation that becomes the current one at the next start."""

    generation: str
    database_uid: str
    """Uid of the restored database; a record of another directory names one that is not there."""
    backup: str
    backup_id: str
    snapshot_seq: int
    decided_at: int


def pending_restore(backend: StorageBackend) -> PendingRestore | None:
    """What waits for the next start."""
    stored = backend.latest().records([PENDING_KEY])[0]
    return None if stored is None else msgspec.msgpack.decode(stored.value, type=PendingRestore)


def waiting_generation(directory: DataDirectory, backend: StorageBackend) -> Generation | None:
    """The generation that this start has to make the current one."""
    pending = pending_restore(backend)
    if pending is None:
        return None
    generation = Generation(pending.generation, directory.path / pending.generation)
    origin = directory.generations.origin(generation) if generation.path.is_dir() else None
    return generation if origin is not None and origin.database_uid == pending.database_uid else None


def check_format(backup: Located) -> None:
    """Refuse a backup of a newer format. Raises InvalidRequest."""
    if backup.manifest.format_version > FORMAT_VERSION:
        raise InvalidRequest(
            f"backup '{backup.where}' has format {backup.manifest.format_version}, this version reads up to "
            f"{FORMAT_VERSION}; install a newer KalamDB"
        )


def stage(
    backup: Located, generations: Generations, origin: Origin, files: LocalFiles, step: Callable[[int], None]
) -> Generation:
    """Copy a backup into a further generation and seal it; nothing of it stays when that fails.

    Raises Corrupt that names the file which is not what was written, Unavailable.
    """
    generation = generations.next()
    try:
        for file in backup.manifest.files:
            with files.create(generation.path / file.path) as out:
                for chunk in checked(backup, file, step):
                    out.write(chunk)
        files.make_folder(generation.segments)
        generations.seal(generation, origin)
    except BaseException:
        with suppress(KalamDbError, OSError):
            generations.discard(generation.name)
        raise
    return generation


def make_origin(backup: Located, clock: Clock, *, previous: str | None, resume_jobs: bool) -> Origin:
    """Where a generation restored from `backup` comes from; it gets a uid of its own."""
    manifest = backup.manifest
    return Origin(
        database_uid=clock.random_bytes(8).hex(),
        lineage=(manifest.database_uid, *manifest.lineage),
        previous=previous,
        backup=backup.where,
        backup_id=manifest.backup_id,
        backup_job=manifest.job_id,
        backup_message=manifest.message,
        snapshot_seq=manifest.snapshot_seq,
        restored_at=clock.now_ms(),
        resume_jobs=resume_jobs,
    )


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """What a restore staged."""

    backup: str
    files: int
    bytes: int
    generation: str


def stage_online(
    store: TableStore,
    backup: Located,
    directory: DataDirectory,
    files: LocalFiles,
    job: JobHandle,
    message: Message,
    *,
    resume_jobs: bool,
) -> RestoreReport:
    """Verify and stage a backup beside the running database; one commit decides on it and ends the job."""
    clock, backend = store.clock, store.backend
    check_format(backup)
    total, done = 2 * backup.manifest.size_bytes, 0

    def step(bytes_: int) -> None:
        nonlocal done
        job.check()
        done += bytes_
        job.progress(done, total, "bytes")

    verify(backup, step)
    origin = make_origin(backup, clock, previous=directory.generation.name, resume_jobs=resume_jobs)
    job_id, _ = job.intent_owner()
    report = RestoreReport(
        backup.where, len(backup.manifest.files), backup.manifest.size_bytes, directory.generations.next().name
    )
    origin = msgspec.structs.replace(origin, restore_job=_job_columns(backend, job_id))
    generation = stage(backup, directory.generations, origin, files, step)
    pending = PendingRestore(
        generation=generation.name,
        database_uid=origin.database_uid,
        backup=backup.where,
        backup_id=backup.manifest.backup_id,
        snapshot_seq=backup.manifest.snapshot_seq,
        decided_at=clock.now_ms(),
    )
    replaced = pending_restore(backend)
    batch = Batch(records=[RecordOp(PENDING_KEY, msgspec.msgpack.encode(pending))], names_files=True)
    try:
        job.check()
        job.seal(batch, message=message(report), result=msgspec.to_builtins(report))
        store.commit(batch)
    except BaseException:
        # Should the commit have happened after all, its generation is not there, and it counts for nothing.
        with suppress(KalamDbError):
            directory.generations.discard(generation.name)
        raise
    if replaced is not None:
        with suppress(KalamDbError):
            directory.generations.discard(replaced.generation)
    return report


def _job_columns(backend: StorageBackend, job_id: str) -> dict[str, object] | None:
    row = backend.jobs.get(JobId(job_id))
    if row is None:
        return None
    return {
        "job_id": row.job_id,
        "parameters": row.parameters,
        "queue": row.queue,
        "created_by": row.created_by,
        "created_at": row.created_at,
        "started_at": row.started_at,
        "attempt_started_at": row.attempt_started_at,
    }


def restore(
    backup: str | Path,
    path: str | Path,
    *,
    overwrite: bool = False,
    resume_jobs: bool = False,
    clock: Clock | None = None,
    operations: FileOps | None = None,
) -> None:
    """Make directory `path` the database that `backup` holds: a backup, or a target whose newest one is taken.

    The directory must be absent or empty, or, with `overwrite`, a database that is not open: until the
    restored one was opened and has passed a check, the one before stays on the disk. Jobs of the application
    start paused unless `resume_jobs`. Blocks. Raises Corrupt that names the damaged file, NotFound,
    InvalidRequest, DirectoryLocked, Unavailable; the directory is as it was then.
    """
    clock = clock or SystemClock()
    found = locate(Targets(operations), str(backup))
    check_format(found)
    target = Path(path).absolute()
    files = LocalFiles.below(target, operations)
    with held_for_restore(target, clock, files, overwrite=overwrite) as generations:
        verify(found, lambda _: None)
        previous = replaced_name(generations.path)
        origin = make_origin(found, clock, previous=previous, resume_jobs=resume_jobs)
        generation = stage(found, generations, origin, files, lambda _: None)
        publish_restored(generations, generation, origin, files)


class Probation:
    """Keeps the generation before a restore until the restored one has passed a check in a running database."""

    def __init__(self, directory: DataDirectory, check: Callable[[], list[str]], clock: Clock) -> None:
        self._directory = directory
        self._check = check
        self._loop = Loop("restored", self.step, _RECHECK_S, clock)
        self.problems: list[str] = []
        """What the check found; the generation before stays then."""
        self.over = threading.Event()
        """Set when nothing is kept any more, or the check has failed."""

    @property
    def kept(self) -> str | None:
        """The generation that is kept, None when there is none."""
        name = self._directory.origin.previous if self._directory.origin is not None else None
        return name if name is not None and (self._directory.path / name).is_dir() else None

    def start(self) -> None:
        """Check in the background, when there is something to keep."""
        if self.kept is None:
            self.over.set()
        else:
            self._loop.start()

    def stop(self) -> None:
        """End; a check that still reads ends with the store."""
        self._loop.stop(_STOP_WAIT_S)

    def step(self) -> bool:
        """Check once; never returns True."""
        kept = self.kept
        if kept is None or self.over.is_set():
            return False
        try:
            self.problems = self._check()
        except Closed:
            return False
        if self.problems:
            _log.error("the restored database is not sound, generation '%s' is kept: %s", kept, self.problems[0])
        else:
            self._directory.generations.discard(kept)
        self.over.set()
        return False


__all__ = [
    "PENDING_KEY",
    "PendingRestore",
    "Probation",
    "RestoreReport",
    "check_format",
    "pending_restore",
    "restore",
    "stage_online",
    "waiting_generation",
]
