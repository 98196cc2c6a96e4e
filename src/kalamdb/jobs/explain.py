"""Why a job is not running, and when that ends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from kalamdb.clock import Clock
from kalamdb.jobs.queues import JobQueues
from kalamdb.jobs.registry import JobRegistry
from kalamdb.jobs.runner import Runner
from kalamdb.storage.jobs import Hold, JobRow, JobStatus, JobStore


class ReasonKind(StrEnum):
    """What keeps a job from running."""

    RUNNING = "running"
    """Nothing: it runs."""
    ENDED = "ended"
    QUARANTINED = "quarantined"
    PAUSED = "paused"
    SCHEDULED = "scheduled"
    RETRY_WAIT = "retry wait"
    NO_EXECUTOR = "no executor"
    QUEUE_PAUSED = "queue paused"
    QUEUE_LIMIT = "queue limit"
    CONCURRENCY_KEY = "concurrency key"
    NOT_STARTED = "not started"
    ABANDONED_THREADS = "abandoned threads"
    NO_FREE_SLOT = "no free slot"
    NEXT = "next"
    """Nothing: the next pass starts it."""


@dataclass(frozen=True, slots=True)
class Reason:
    """One cause. `until` is when it ends, None where that depends on somebody."""

    kind: ReasonKind
    detail: str
    until: datetime | None = None


def explain(
    row: JobRow, jobs: JobStore, registry: JobRegistry, queues: JobQueues, runner: Runner, clock: Clock
) -> list[Reason]:
    """All causes, never none."""
    if row.status is JobStatus.RUNNING:
        return [Reason(ReasonKind.RUNNING, f"attempt {row.attempt} runs under lease {row.lease_id}")]
    if row.hold is Hold.QUARANTINED:
        return [Reason(ReasonKind.QUARANTINED, row.message or f"RETRY JOB '{row.job_id}' runs it again")]
    if row.status.is_terminal:
        return [Reason(ReasonKind.ENDED, f"it is {row.status}" + (f": {row.message}" if row.message else ""))]
    found = [
        *_of_job(row, clock.now_ms()),
        *_of_surroundings(row, jobs, registry, queues),
        *_of_runner(row, runner),
    ]
    return found or [Reason(ReasonKind.NEXT, "nothing keeps it; it starts with the next pass")]


def _of_job(row: JobRow, now_ms: int) -> Iterator[Reason]:
    if row.hold is Hold.PAUSED:
        yield Reason(ReasonKind.PAUSED, f"RESUME JOB '{row.job_id}' releases it")
    if row.run_at > now_ms:
        until = datetime.fromtimestamp(row.run_at / 1000, UTC)
        if row.status is JobStatus.RETRYING:
            detail = f"attempt {row.attempt} failed: {row.message}; retry {row.retry_count} of {row.max_retries}"
            yield Reason(ReasonKind.RETRY_WAIT, detail, until)
        else:
            yield Reason(ReasonKind.SCHEDULED, "it is to run at that time", until)


def _of_surroundings(row: JobRow, jobs: JobStore, registry: JobRegistry, queues: JobQueues) -> Iterator[Reason]:
    if not registry.contains(row.job_type):
        yield Reason(ReasonKind.NO_EXECUTOR, f"no executor of type '{row.job_type}' is registered here")
    queue = queues.get(row.queue)
    running = jobs.count(JobStatus.RUNNING, row.queue)
    if queue.paused:
        by = f" by {queue.paused_by}" if queue.paused_by else ""
        why = f": {queue.reason}" if queue.reason else ""
        yield Reason(ReasonKind.QUEUE_PAUSED, f"queue '{row.queue}' is paused{by}{why}")
    elif queue.max_concurrent is not None and running >= queue.max_concurrent:
        yield Reason(ReasonKind.QUEUE_LIMIT, f"{running} of {queue.max_concurrent} jobs of queue '{row.queue}' run")
    holder = jobs.running_with_key(row.concurrency_key) if row.concurrency_key is not None else None
    if holder is not None:
        yield Reason(
            ReasonKind.CONCURRENCY_KEY, f"job '{holder.job_id}' runs with its concurrency key '{row.concurrency_key}'"
        )


def _of_runner(row: JobRow, runner: Runner) -> Iterator[Reason]:
    if not runner.is_claiming:
        yield Reason(ReasonKind.NOT_STARTED, "the job manager of this database does not run")
        return
    if runner.is_choked:
        yield Reason(
            ReasonKind.ABANDONED_THREADS,
            f"{runner.abandoned_threads} threads outlived their job; restart the process to end them",
        )
    running = runner.running
    if len(running) >= runner.slots:
        names = ", ".join(one.job_id for one in running[:5]) + (", ..." if len(running) > 5 else "")
        yield Reason(ReasonKind.NO_FREE_SLOT, f"all {runner.slots} slots are taken by {names}")
