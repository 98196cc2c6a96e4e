"""The first start of a restored database: jobs that the backup caught half-way.

The backup's own job has done what it was to do, the restore's job is put on record, and jobs of the
application do not run before somebody says so. What ran otherwise is recovered as after a crash.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from kalamdb.backup.restore import PENDING_KEY
from kalamdb.clock import Clock
from kalamdb.storage import Batch, RecordKind, RecordOp, StorageBackend, record_key
from kalamdb.storage.directory import Origin
from kalamdb.storage.jobs import AttemptOutcome, Hold, JobFilter, JobInsert, JobMove, JobRow, JobStatus
from kalamdb.types import JobId

_ADOPTED_KEY = record_key(RecordKind.META, "adopted_restore")
_STEP_JOBS = 500
_ACTIVE = frozenset(status for status in JobStatus if status.is_active)


def adopt(
    backend: StorageBackend,
    origin: Origin,
    clock: Clock,
    *,
    pause_queues: Callable[[], None],
    built_in: Collection[str],
    running_queue: str,
) -> None:
    """Do it unless it is done; every step may be repeated. Before any job is claimed.

    `pause_queues` pauses every queue but `running_queue`, where jobs of types other than `built_in` are held.
    """
    stored = backend.latest().records([_ADOPTED_KEY])[0]
    if stored is not None and stored.value == origin.database_uid.encode():
        return
    if not origin.resume_jobs:
        pause_queues()
        _hold_jobs(backend, running_queue, built_in)
    batch = Batch(records=[RecordOp(_ADOPTED_KEY, origin.database_uid.encode()), RecordOp(PENDING_KEY, None)])
    batch.jobs += _backup_ended(backend, origin)
    batch.jobs += _restore_ended(backend, origin, clock)
    backend.wait_durable(backend.commit(batch), names_files=True)


def _hold_jobs(backend: StorageBackend, queue: str, built_in: Collection[str]) -> None:
    rows = [
        row
        for row in backend.jobs.query(JobFilter(statuses=_ACTIVE, queue=queue, limit=None))
        if row.job_type not in built_in and row.hold is None
    ]
    for at in range(0, len(rows), _STEP_JOBS):
        backend.commit(Batch(jobs=[_paused(row) for row in rows[at : at + _STEP_JOBS]]))


def _paused(row: JobRow) -> JobMove:
    events = (("INFO", "Job paused: the database was restored"),)
    return JobMove(row.job_id, row.status, row.lease_id, {"hold": Hold.PAUSED}, events)


def _backup_ended(backend: StorageBackend, origin: Origin) -> list[JobMove]:
    row = None if origin.backup_job is None else backend.jobs.get(JobId(origin.backup_job))
    if row is None or row.status is not JobStatus.RUNNING:
        return []
    changes = {
        "status": JobStatus.COMPLETED,
        "outcome": AttemptOutcome.COMPLETED,
        "message": origin.backup_message,
        "exception_trace": None,
    }
    events = (("INFO", f"Job completed: {origin.backup_message}"),)
    return [JobMove(row.job_id, row.status, row.lease_id, changes, events)]


def _restore_ended(backend: StorageBackend, origin: Origin, clock: Clock) -> list[JobInsert]:
    job: dict[str, Any] | None = origin.restore_job
    if job is None or backend.jobs.get(JobId(job["job_id"])) is not None:
        return []
    now_ms = clock.now_ms()
    message = f"Restored '{origin.backup}': all writes up to _seq {origin.snapshot_seq}"
    row = JobRow(
        job_type="restore",
        status=JobStatus.COMPLETED,
        message=message,
        outcome=AttemptOutcome.COMPLETED,
        attempt=1,
        attempt_finished_at=now_ms,
        finished_at=now_ms,
        updated_at=now_ms,
        **job,
    )
    return [JobInsert(row, lambda: row.job_id, (("INFO", f"Job completed: {message}"),))]


__all__ = ["adopt"]
