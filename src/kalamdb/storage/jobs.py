"""What the store keeps of a job, the legal moves between its states, and the seam to claim and query.

    new -> queued -> running -> completed | skipped | failed | cancelled
                        |  ^
                        v  |
                     retrying            (waits for run_at without a slot; a claim moves it to running)

A claim may take a new job through queued to running in its one commit. `paused` and `quarantined` are the
column `hold`, not states. Terminal states are final, except that RETRY JOB moves failed or cancelled back
to queued.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Protocol

import msgspec

from kalamdb.types import JobId


class JobStatus(StrEnum):
    """State of a job; the text is what SQL shows and compares."""

    NEW = "new"
    QUEUED = "queued"
    RUNNING = "running"
    RETRYING = "retrying"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    SKIPPED = "skipped"

    @property
    def is_terminal(self) -> bool:
        """Whether the job has ended."""
        return self in TERMINAL

    @property
    def is_active(self) -> bool:
        """Whether the job holds its idempotency key."""
        return self not in TERMINAL


TERMINAL: Final = frozenset({JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.SKIPPED})

LEGAL_MOVES: Final[dict[JobStatus, frozenset[JobStatus]]] = {
    JobStatus.NEW: frozenset({JobStatus.QUEUED, JobStatus.CANCELLED}),
    JobStatus.QUEUED: frozenset({JobStatus.RUNNING, JobStatus.CANCELLED}),
    JobStatus.RUNNING: frozenset(
        {
            JobStatus.QUEUED,
            JobStatus.RETRYING,
            JobStatus.COMPLETED,
            JobStatus.FAILED,
            JobStatus.CANCELLED,
            JobStatus.SKIPPED,
        }
    ),
    JobStatus.RETRYING: frozenset({JobStatus.RUNNING, JobStatus.QUEUED, JobStatus.CANCELLED}),
    JobStatus.COMPLETED: frozenset(),
    JobStatus.SKIPPED: frozenset(),
    JobStatus.FAILED: frozenset({JobStatus.QUEUED}),
    JobStatus.CANCELLED: frozenset({JobStatus.QUEUED}),
}
"""The one table of moves. A job may also be rewritten without changing its state (progress, hold)."""


class Hold(StrEnum):
    """Why a job is not claimed although its state would allow it."""

    PAUSED = "paused"
    QUARANTINED = "quarantined"


class OnInterrupt(StrEnum):
    """What a crash or a hard stop does to a running job."""

    REQUEUE = "requeue"
    RETRY = "retry"
    FAIL = "fail"


class AttemptOutcome(StrEnum):
    """How an attempt ended."""

    COMPLETED = "completed"
    SKIPPED = "skipped"
    FAILED = "failed"
    RETRYING = "retrying"
    """It failed and the job is tried again."""
    SNOOZED = "snoozed"
    PAUSED = "paused"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"
    """Its process stopped or died."""

    @property
    def has_message(self) -> bool:
        """Whether message, trace and result of the job are those of this attempt."""
        return self in _WITH_MESSAGE


_WITH_MESSAGE: Final = frozenset(
    {AttemptOutcome.COMPLETED, AttemptOutcome.SKIPPED, AttemptOutcome.FAILED, AttemptOutcome.RETRYING}
)

PRIORITY_MAX: Final = 1000
"""Priorities lie between minus this and this."""

AGEING_MS: Final = 60_000
"""One point of priority counts as much as this much longer a wait, so that nothing starves. Part of the stored
format."""


class RetryPolicy(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """How long a failed attempt waits: min(base * factor ** retries, cap), give or take `jitter`."""

    base_ms: int = 100
    factor: float = 2.0
    cap_ms: int = 60_000
    jitter: float = 0.1
    """Share of the wait that is drawn at random, 0 to 1."""


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far an attempt is; `total` is None when it is not known."""

    done: int = 0
    total: int | None = None
    unit: str = ""
    text: str = ""


class JobRow(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One row of system.jobs as stored. Times are milliseconds since 1970; they end in `_at`.

    The order of the fields is part of the stored format: add new ones at the end.
    """

    job_id: JobId
    job_type: str
    status: JobStatus = JobStatus.NEW
    parameters: dict[str, Any] | list[Any] = {}
    """An object; a list only in records of older versions."""
    message: str | None = None
    exception_trace: str | None = None
    result: Any = None
    idempotency_key: str | None = None
    queue: str = "default"
    priority: int = 0
    """Higher runs first."""
    retry_count: int = 0
    max_retries: int = 3
    attempt: int = 0
    """Leases given so far."""
    process_deaths: int = 0
    lease_id: int | None = None
    hold: Hold | None = None
    """Of a running job: what holds it once this attempt has ended."""
    cancel_requested: bool = False
    progress: Progress | None = None
    checkpoint: Any = None
    concurrency_key: str | None = None
    table_uid: int | None = None
    """The table that a maintenance job works on."""
    created_by: str = "system"
    created_at: int = 0
    updated_at: int = 0
    run_at: int = 0
    """Not before this time; the due time of a retry too."""
    started_at: int | None = None
    finished_at: int | None = None
    timeout_s: float | None = None
    on_interrupt: OnInterrupt = OnInterrupt.RETRY
    retry: RetryPolicy = RetryPolicy()
    memory_used: int | None = None
    cpu_used: int | None = None
    node_id: int = 0
    events: int = 0
    """Events written so far; the next one has number events + 1."""
    attempt_started_at: int | None = None
    attempt_finished_at: int | None = None
    outcome: AttemptOutcome | None = None
    """How the last attempt ended; None before the first and while one runs."""

    @property
    def due_at(self) -> int:
        """When its waiting began or begins: jobs of one priority run in this order."""
        return max(self.run_at, self.created_at, 0)

    def attempt_row(self) -> JobAttempt:
        """The newest attempt, as far as it is."""
        told = self.outcome is not None and self.outcome.has_message
        return JobAttempt(
            job_id=self.job_id,
            attempt=self.attempt,
            outcome=self.outcome,
            started_at=self.attempt_started_at or 0,
            finished_at=self.attempt_finished_at,
            message=self.message if told else None,
            exception_trace=self.exception_trace if told else None,
            result=self.result if told else None,
            progress=self.progress,
        )


class JobAttempt(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One run of a job. New fields go to the end."""

    job_id: JobId
    attempt: int
    outcome: AttemptOutcome | None = None
    """None while it runs."""
    started_at: int = 0
    finished_at: int | None = None
    message: str | None = None
    exception_trace: str | None = None
    result: Any = None
    progress: Progress | None = None


class JobEvent(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One line of a job's history. `number` rises per job from 1 without gaps."""

    job_id: JobId
    number: int
    at: int
    level: str
    text: str
    position: int = 0
    """Place in the commit order over all jobs; rises, with gaps where jobs were deleted."""


Events = Sequence[tuple[str, str]]
"""(level, text) of each event that an operation writes."""


@dataclass(frozen=True, slots=True)
class JobInsert:
    """Add a job. The id is drawn by `draw_id`, again on a collision; `row.job_id` is ignored.

    Raises IdempotencyConflict when an active job holds `row.idempotency_key`; its `.job` is the
    JobRow of that job. `events` are written as numbers 1, 2, ...
    """

    row: JobRow
    draw_id: Callable[[], str]
    events: Events = ()


@dataclass(frozen=True, slots=True)
class JobMove:
    """Change columns of a job by compare-and-set on (status, lease).

    Fails with Fenced when the stored (status, lease_id) is not (`status`, `lease_id`). A new status must be
    in LEGAL_MOVES or the same. The store itself keeps `updated_at`, `lease_id`, `attempt_finished_at`,
    `finished_at`, `events`, and clears `hold` of a job that ends (but quarantine).
    """

    job_id: JobId
    status: JobStatus
    lease_id: int | None
    changes: Mapping[str, Any]
    """Column -> new value; may hold `status`."""
    events: Events = ()


@dataclass(frozen=True, slots=True)
class JobFence:
    """The batch holds only while `job_id` is running under `lease_id`; Fenced otherwise."""

    job_id: JobId
    lease_id: int


@dataclass(frozen=True, slots=True)
class JobScrub:
    """Take a name out of what is stored of a job: parameters, texts, results, keys, history and attempts.

    Of a job that has ended when `lease_id` is None; one that is active again by then is left as it is. Of a
    running one under its lease otherwise, which gives up an idempotency key that names it; Fenced without the lease.
    """

    job_id: JobId
    name: str
    lease_id: int | None = None


JobOp = JobInsert | JobMove | JobFence | JobScrub
"""What a batch may do to jobs."""


def fence_of(op: JobOp) -> JobFence | None:
    """The precondition that the lease is held which an operation of its holder needs; None for those of nobody."""
    match op:
        case JobFence():
            return op
        case JobMove(job_id=job_id, status=JobStatus.RUNNING, lease_id=int(lease_id)):
            return JobFence(job_id, lease_id)
        case JobScrub(job_id=job_id, lease_id=int(lease_id)):
            return JobFence(job_id, lease_id)
        case _:
            return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """Which jobs to start: up to `limit` that are due and not held.

    Those of a lane (queue, type, priority) go by `due_at`; between lanes a point of priority is worth
    AGEING_MS. A job whose concurrency key a running job has waits until that one has ended.
    """

    limit: int
    types: Set[str]
    """Types that can run here."""
    queue_limit: Callable[[str], int | None] = lambda queue: None
    """How many jobs of a queue may run at once; 0 stops it, None is no limit."""
    admit_max: int = 0
    """So many new jobs beyond the claimed ones become queued."""
    admitted: Events = ()
    """Events of a job that leaves `new`."""
    started: Callable[[JobRow], Events] = lambda row: ()
    """Events of a claimed job, given its row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFilter:
    """Which jobs `query` returns. None means any."""

    job_type: str | None = None
    statuses: frozenset[JobStatus] | None = None
    queue: str | None = None
    idempotency_key: str | None = None
    table_uid: int | None = None
    created_after: int | None = None
    """Inclusive, milliseconds since 1970."""
    created_before: int | None = None
    """Exclusive."""
    sort_by: str = "created_at"
    descending: bool = False
    limit: int | None = 100


class JobStore(Protocol):
    """Reading jobs. They change by `StorageBackend.commit` and `StorageBackend.claim` only."""

    def next_due_ms(self, types: Set[str] | None = None, *, after_ms: int | None = None) -> int | None:
        """`due_at` of the earliest job (of these types) that is due later than `after_ms`; None when none is.

        None means now. Who claims and then waits for this passes a moment before the claim: what becomes due
        between the two would be in neither.
        """
        ...

    def get(self, job_id: JobId) -> JobRow | None:
        """One job."""
        ...

    def active_with_key(self, idempotency_key: str) -> JobRow | None:
        """The active job that holds this key."""
        ...

    def running_with_key(self, concurrency_key: str) -> JobRow | None:
        """The running job that has this concurrency key."""
        ...

    def query(self, wanted: JobFilter) -> list[JobRow]:
        """Jobs that match, sorted. Uses the status index where `statuses` is given."""
        ...

    def count(self, status: JobStatus, queue: str | None = None) -> int:
        """How many jobs (of a queue) are in `status`; does not read them."""
        ...

    def queues(self) -> list[str]:
        """Queues that have jobs, sorted; does not read the jobs."""
        ...

    def events(self, job_id: JobId | None = None, *, after: int = 0, limit: int = 1000) -> Sequence[JobEvent]:
        """Events of one job with number > `after`; of all jobs in commit order with position > `after` when None.

        The order of all jobs is forgotten up to where `release_events` said, and for deleted jobs.
        """
        ...

    def event_position(self) -> int:
        """Position of the newest event."""
        ...

    def release_events(self, position: int) -> None:
        """Nobody reads the events of all jobs at or below `position` any more. Those of each job stay."""
        ...

    def attempts(self, job_id: JobId) -> list[JobAttempt]:
        """All attempts of a job, oldest first."""
        ...

    def ended_naming(self, name: str) -> list[JobId]:
        """Ended jobs of which anything stored may contain `name`, for JobScrub. Reads all jobs; blocks accordingly."""
        ...

    def delete(self, job_ids: Sequence[JobId]) -> int:
        """Remove ended jobs with their history; active ones are left. Returns how many went."""
        ...

    def delete_ended(
        self, status: JobStatus, *, finished_before: int | None, limit: int, fence: JobFence | None = None
    ) -> int:
        """Remove up to `limit` jobs of a terminal state, oldest first, that ended before that time (None: any).

        With a `fence` each commit holds only under that lease; Fenced without it.
        """
        ...
