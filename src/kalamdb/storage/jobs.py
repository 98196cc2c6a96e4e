"""What the store keeps of a job, the legal moves between its states, and the seam to claim and query.

    new -> queued -> running -> completed | skipped | failed | cancelled
                        |  ^
                        v  |
                     retrying            (waits for run_at without a slot; a claim moves it to running)

`paused` and `quarantined` are the column `hold`, not states. Terminal states are final, except that
RETRY JOB moves failed or cancelled back to queued.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


class RetryPolicy(msgspec.Struct, frozen=True, kw_only=True):
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


class JobRow(msgspec.Struct, frozen=True, kw_only=True):
    """One row of system.jobs as stored. Times are milliseconds since 1970; they end in `_at`."""

    job_id: JobId
    job_type: str
    status: JobStatus = JobStatus.NEW
    parameters: dict[str, Any] = {}
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


class JobEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a job's history. `number` rises per job from 1 without gaps."""

    job_id: JobId
    number: int
    at: int
    level: str
    text: str
    position: int = 0
    """Place in the commit order over all jobs; rises, with gaps where jobs were deleted. Set by the store."""


@dataclass(frozen=True, slots=True)
class JobInsert:
    """Add a job. The id is drawn by `draw_id`, again on a collision; `row.job_id` is ignored.

    Raises IdempotencyConflict when an active job holds `row.idempotency_key`; its `.job` is the
    JobRow of that job. `events` are written as numbers 1, 2, ...
    """

    row: JobRow
    draw_id: Callable[[], str]
    events: tuple[tuple[str, str], ...] = ()
    """(level, text) of each event."""


@dataclass(frozen=True, slots=True)
class JobMove:
    """Replace a job's row by compare-and-set on (status, lease).

    `row` holds the new state; the move from `status` must be in LEGAL_MOVES or keep the state.
    Fails with Fenced when the stored (status, lease_id) is not (`status`, `lease_id`).
    `row.events` must be the stored count; the store adds len(events) to it.
    """

    status: JobStatus
    lease_id: int | None
    row: JobRow
    events: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class JobFence:
    """The batch holds only while `job_id` is running under `lease_id`; Fenced otherwise."""

    job_id: JobId
    lease_id: int


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
    """Reading and claiming jobs. Moves and inserts go through `StorageBackend.commit`."""

    def claim(
        self,
        *,
        limit: int,
        runnable: Callable[[JobRow], bool],
        on_claim: Callable[[JobRow], tuple[JobRow, tuple[tuple[str, str], ...]]],
    ) -> list[JobRow]:
        """Move up to `limit` due jobs to running, each under a new lease, in one commit.

        Considers queued and due retrying jobs without hold, by priority (highest first), then run_at,
        then created_at. `runnable` may refuse one (no executor here, a limit is reached); `on_claim`
        gets the row with its new lease and status and returns it with started_at and its events.
        """
        ...

    def next_due_ms(self) -> int | None:
        """run_at of the earliest job that waits for its time; None when none waits."""
        ...

    def get(self, job_id: JobId) -> JobRow | None:
        """One job."""
        ...

    def active_with_key(self, idempotency_key: str) -> JobRow | None:
        """The active job that holds this key."""
        ...

    def query(self, wanted: JobFilter) -> list[JobRow]:
        """Jobs that match, sorted. Uses the status index where `statuses` is given."""
        ...

    def count(self, status: JobStatus) -> int:
        """How many jobs are in `status`; does not read them."""
        ...

    def events(self, job_id: JobId | None = None, *, after: int = 0, limit: int = 1000) -> Sequence[JobEvent]:
        """Events of one job with number > `after`; of all jobs in commit order with position > `after` when None."""
        ...

    def delete(self, job_ids: Sequence[JobId]) -> int:
        """Remove ended jobs with their events; active ones are left. Returns how many went."""
        ...
