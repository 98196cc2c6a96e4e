"""Jobs and their history."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from kalamdb.storage.jobs import JobAttempt, JobFilter, JobRow, JobStatus, JobStore
from kalamdb.system.shape import SYSTEM, Filters, Rows, SystemTable, columns_of
from kalamdb.types import JobId, TableId

_JOBS: Final = columns_of(
    "job_id T, job_type T, status T, leader_status T?, parameters JSON?, message T?, exception_trace T?, "
    "idempotency_key T?, queue T?, priority INT?, retry_count SMALLINT, max_retries SMALLINT, memory_used BIGINT?, "
    "cpu_used BIGINT?, created_at TS, updated_at TS, started_at TS?, finished_at TS?, node_id BIGINT, "
    "leader_node_id BIGINT?, attempt INT, progress JSON?, checkpoint JSON?, result JSON?, lease_id BIGINT?, hold T?, "
    "run_at TS, created_by T, timeout_s DOUBLE?, on_interrupt T"
)
_JOB_NODES: Final = columns_of(
    "job_id T, node_id BIGINT, status T, error_message T?, created_at TS, started_at TS?, finished_at TS?, "
    "updated_at TS"
)
_JOB_EVENTS: Final = columns_of("job_id T, event_number BIGINT, created_at TS, level T, message T")
_JOB_ATTEMPTS: Final = columns_of(
    "job_id T, attempt INT, outcome T?, started_at TS, finished_at TS?, message T?, exception_trace T?, result JSON?, "
    "progress JSON?"
)
_JOB_QUEUES: Final = columns_of(
    "queue T, max_concurrent INT?, paused BOOL, paused_by T?, paused_at TS?, reason T?, jobs_new BIGINT, "
    "jobs_queued BIGINT, jobs_running BIGINT, jobs_retrying BIGINT"
)
_JOB_EXECUTORS: Final = columns_of(
    "job_type T, prefix T, queue T, priority INT, max_retries INT?, timeout_s DOUBLE?, on_interrupt T, schedule T?, "
    "parameters_schema JSON"
)
_JOB_SCHEDULES: Final = columns_of(
    "schedule_name T, job_type T, parameters JSON, cron T?, interval_s DOUBLE?, time_zone T, misfire T, "
    "catch_up_max INT, queue T?, priority INT?, paused BOOL, declared BOOL, next_run_at TS?, last_run_at TS?, "
    "last_job_id T?, last_skipped T?, created_by T, created_at TS, updated_at TS"
)
_EVENTS_MAX: Final = 1_000_000


def job_tables(
    jobs: JobStore, queues: Callable[[], Rows], executors: Callable[[], Rows], schedules: Callable[[], Rows]
) -> list[SystemTable]:
    """jobs, job_nodes, job_events, job_attempts, job_queues, job_executors, job_schedules."""
    return [
        SystemTable(TableId(SYSTEM, "job_attempts"), _JOB_ATTEMPTS, lambda filters: _attempt_rows(jobs, filters)),
        SystemTable(TableId(SYSTEM, "job_queues"), _JOB_QUEUES, lambda _: queues()),
        SystemTable(TableId(SYSTEM, "job_executors"), _JOB_EXECUTORS, lambda _: executors()),
        SystemTable(TableId(SYSTEM, "job_schedules"), _JOB_SCHEDULES, lambda _: schedules()),
        SystemTable(TableId(SYSTEM, "jobs"), _JOBS, lambda filters: map(_job_row, _chosen(jobs, filters))),
        SystemTable(TableId(SYSTEM, "job_nodes"), _JOB_NODES, lambda filters: map(_node_row, _chosen(jobs, filters))),
        SystemTable(TableId(SYSTEM, "job_events"), _JOB_EVENTS, lambda filters: _event_rows(jobs, filters)),
    ]


def _chosen(jobs: JobStore, filters: Filters) -> list[JobRow]:
    ids = filters.get("job_id")
    if ids is not None:
        return [row for job_id in sorted(map(str, ids)) if (row := jobs.get(JobId(job_id))) is not None]
    statuses = filters.get("status")
    known = None if statuses is None else frozenset(status for status in JobStatus if status.value in statuses)
    if known is not None and not known:
        return []
    return jobs.query(
        JobFilter(
            statuses=known,
            job_type=_only(filters, "job_type"),
            queue=_only(filters, "queue"),
            idempotency_key=_only(filters, "idempotency_key"),
            limit=None,
        )
    )


def _node_row(job: JobRow) -> Sequence[Any]:
    """The one node that runs a job."""
    error = job.message if job.status is JobStatus.FAILED else None
    times = (job.created_at, job.started_at, job.finished_at, job.updated_at)
    return (job.job_id, job.node_id, job.status.value, error, *times)


def _only(filters: Filters, column: str) -> str | None:
    """The value of a column when the statement allows a single one."""
    wanted = filters.get(column)
    return str(next(iter(wanted))) if wanted is not None and len(wanted) == 1 else None


def _job_row(job: JobRow) -> Sequence[Any]:
    return (
        job.job_id,
        job.job_type,
        job.status.value,
        None,
        job.parameters,
        job.message,
        job.exception_trace,
        job.idempotency_key,
        job.queue,
        job.priority,
        job.retry_count,
        job.max_retries,
        job.memory_used,
        job.cpu_used,
        job.created_at,
        job.updated_at,
        job.started_at,
        job.finished_at,
        job.node_id,
        None,
        job.attempt,
        job.progress,
        job.checkpoint,
        job.result,
        job.lease_id,
        None if job.hold is None else job.hold.value,
        job.run_at,
        job.created_by,
        job.timeout_s,
        job.on_interrupt.value,
    )


def _job_ids(jobs: JobStore, filters: Filters) -> Sequence[JobId]:
    ids = filters.get("job_id")
    if ids is not None:
        return [JobId(job_id) for job_id in sorted(map(str, ids))]
    return [row.job_id for row in jobs.query(JobFilter(limit=None))]


def _event_rows(jobs: JobStore, filters: Filters) -> Rows:
    for job_id in _job_ids(jobs, filters):
        for event in jobs.events(job_id, limit=_EVENTS_MAX):
            yield event.job_id, event.number, event.at, event.level, event.text


def _attempt_rows(jobs: JobStore, filters: Filters) -> Rows:
    for job_id in _job_ids(jobs, filters):
        yield from map(_attempt_row, jobs.attempts(job_id))


def _attempt_row(attempt: JobAttempt) -> Sequence[Any]:
    return (
        attempt.job_id,
        attempt.attempt,
        None if attempt.outcome is None else attempt.outcome.value,
        attempt.started_at,
        attempt.finished_at,
        attempt.message,
        attempt.exception_trace,
        attempt.result,
        attempt.progress,
    )
