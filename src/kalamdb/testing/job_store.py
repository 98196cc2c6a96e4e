"""The contract of `JobStore` and of the job operations of a `Batch`, as tests.

Subclass `JobStoreContract` together with `kalamdb.testing.storage.StorageContract`'s way to open.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Set
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kalamdb.errors import IdempotencyConflict, Internal, InvalidRequest, LeaseLost
from kalamdb.storage import Batch, Busy, Fenced, JobFence, JobInsert, JobMove, StorageBackend
from kalamdb.storage.jobs import AGEING_MS, LEGAL_MOVES, AttemptOutcome, Claim, Hold, JobFilter, JobRow, JobStatus
from kalamdb.testing.clock import SimulatedClock
from kalamdb.testing.storage import Store, commit, payloads, row
from kalamdb.types import JobId

Events = tuple[tuple[str, str], ...]


class Ids:
    """Job ids that a test can foretell: XX-1, XX-2, ..."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._given = 0

    def __call__(self) -> str:
        with self._lock:
            self._given += 1
            return f"XX-{self._given:06d}"


def job(**columns: object) -> JobRow:
    """A new job's row; queued unless `status` says otherwise."""
    given: dict[str, Any] = {"job_type": "test", "status": JobStatus.QUEUED, **columns}
    return JobRow(job_id=JobId(""), **given)


def insert(
    backend: StorageBackend, row_: JobRow, *, draw_id: Callable[[], str] | None = None, events: Events = ()
) -> JobRow:
    """Insert one job; returns it as stored."""
    ids = iter(f"XX-{backend.head()}-{number}" for number in range(9))
    done = commit(backend, Batch(jobs=[JobInsert(row_, draw_id or (lambda: next(ids)), events)]))
    return stored(backend, done.jobs[0])


def stored(backend: StorageBackend, job_id: JobId) -> JobRow:
    """The job, which must exist."""
    found = backend.jobs.get(job_id)
    assert found is not None
    return found


def move(backend: StorageBackend, old: JobRow, *, events: Events = (), **changes: object) -> JobRow:
    """Move a job from what the caller knows of it; returns it as stored."""
    commit(backend, Batch(jobs=[JobMove(old.job_id, old.status, old.lease_id, changes, events)]))
    return stored(backend, old.job_id)


def claim(
    backend: StorageBackend,
    limit: int = 1,
    *,
    types: Set[str] = frozenset({"test", "a", "b"}),
    queues: Mapping[str, int] | None = None,
    admit_max: int = 0,
    batch: Batch | None = None,
) -> list[JobRow]:
    """Claim as a runner has to: again when busy. The jobs as they were stored."""
    wanted = Claim(
        limit=limit, types=types, queue_limit=(queues or {}).get, admit_max=admit_max,
        admitted=(("INFO", "Job queued"),), started=lambda row_: (("INFO", f"Job started ({row_.attempt})"),),
    )  # fmt: skip
    while True:
        try:
            done = backend.claim(wanted, batch)
        except Busy:
            continue
        if done is None:
            return []
        rows = {row_.job_id: row_ for row_ in done.changed_jobs}
        return [rows[job_id] for job_id in done.claimed]


class JobStoreContract:
    """What each backend does with jobs."""

    def open_backend(self, path: Path, clock: SimulatedClock) -> StorageBackend:
        """Open the store that `path` stands for, making it the first time."""
        raise AssertionError("a subclass says how its backend is opened")

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        """An empty store."""
        store = Store(self.open_backend, tmp_path / "store")
        yield store
        store.backend.close()

    @pytest.fixture
    def backend(self, store: Store) -> StorageBackend:
        """The store's backend, for tests that do not reopen."""
        return store.backend

    # Inserting

    def test_a_job_is_stored_with_every_column(self, store: Store) -> None:
        given = job(
            parameters={"a": [1, None, {"b": 2.5}]}, message="m", idempotency_key="k", queue="q", priority=-3,
            table_uid=2**63 - 1, created_at=5, run_at=7, checkpoint=[1], hold=Hold.PAUSED, timeout_s=1.5,
        )  # fmt: skip
        found = insert(store.backend, given, draw_id=Ids())
        assert found == msgspec.structs.replace(given, job_id=JobId("XX-000001"))
        assert store.reopen().jobs.get(JobId("XX-000001")) == found
        assert store.backend.jobs.get(JobId("XX-999999")) is None

    def test_an_id_that_is_taken_is_drawn_again(self, backend: StorageBackend) -> None:
        ids = iter(["XX-1", "XX-1", "XX-1", "XX-2", "XX-2", "XX-3"])
        batch = Batch(jobs=[JobInsert(job(), lambda: next(ids))])
        assert list(commit(backend, batch).jobs) == ["XX-1"]
        pair = [JobInsert(job(), lambda: next(ids)), JobInsert(job(), lambda: next(ids))]
        assert list(commit(backend, Batch(jobs=list(pair))).jobs) == ["XX-2", "XX-3"]

    def test_one_active_job_holds_a_key(self, backend: StorageBackend) -> None:
        first = insert(backend, job(idempotency_key="daily", created_at=1_750_000_000_123))
        with pytest.raises(IdempotencyConflict) as caught:
            commit(backend, Batch(rows=[row(1)], jobs=[JobInsert(job(idempotency_key="daily"), Ids())]))
        assert caught.value.job == first and payloads(backend) == []
        assert str(caught.value).startswith(
            f"Job '{first.job_id}' with idempotency key 'daily' is already queued (created 2025-06-15T15:06:40.123"
        )
        assert backend.jobs.active_with_key("daily") == first
        insert(backend, job(idempotency_key="weekly"))
        insert(backend, job())

    def test_one_batch_cannot_insert_a_key_twice(self, backend: StorageBackend) -> None:
        ids = Ids()
        twice = [JobInsert(job(idempotency_key="k"), ids), JobInsert(job(idempotency_key="k"), ids)]
        with pytest.raises(IdempotencyConflict):
            commit(backend, Batch(jobs=list(twice)))
        assert backend.jobs.active_with_key("k") is None and backend.jobs.count(JobStatus.QUEUED) == 0

    @pytest.mark.parametrize("end", sorted(status for status in JobStatus if status.is_terminal))
    def test_an_ended_job_gives_its_key_free(self, backend: StorageBackend, end: JobStatus) -> None:
        insert(backend, job(idempotency_key="k"))
        running = claim(backend)[0]
        assert backend.jobs.active_with_key("k") == running
        move(backend, running, status=end)
        assert backend.jobs.active_with_key("k") is None
        assert insert(backend, job(idempotency_key="k")).status is JobStatus.QUEUED

    def test_a_job_can_end_and_be_succeeded_under_its_key_in_one_batch(self, backend: StorageBackend) -> None:
        insert(backend, job(idempotency_key="k"))
        running = claim(backend)[0]
        end = JobMove(running.job_id, JobStatus.RUNNING, running.lease_id, {"status": JobStatus.COMPLETED})
        batch = Batch(jobs=[end, JobInsert(job(idempotency_key="k"), lambda: "XX-next")])
        commit(backend, batch)
        heir = backend.jobs.active_with_key("k")
        assert heir is not None and heir.job_id == "XX-next"

    def test_retrying_an_ended_job_needs_its_key_free(self, backend: StorageBackend) -> None:
        insert(backend, job(idempotency_key="k"))
        failed = move(backend, claim(backend)[0], status=JobStatus.FAILED)
        heir = insert(backend, job(idempotency_key="k"))
        with pytest.raises(IdempotencyConflict):
            move(backend, failed, status=JobStatus.QUEUED)
        move(backend, heir, status=JobStatus.CANCELLED)
        assert move(backend, failed, status=JobStatus.QUEUED).status is JobStatus.QUEUED
        assert backend.jobs.active_with_key("k") == stored(backend, failed.job_id)

    # Moving

    @pytest.mark.parametrize(("old", "new"), list(product(JobStatus, JobStatus)))
    def test_only_legal_moves_are_made(self, backend: StorageBackend, old: JobStatus, new: JobStatus) -> None:
        before = insert(backend, job(status=old))
        if new is old or new in LEGAL_MOVES[old]:
            assert move(backend, before, status=new).status is new
        else:
            with pytest.raises(Internal):
                commit(backend, Batch(rows=[row(1)], jobs=[JobMove(before.job_id, old, None, {"status": new})]))
            assert stored(backend, before.job_id) == before and payloads(backend) == []
        for status in JobStatus:
            assert backend.jobs.count(status) == len(backend.jobs.query(JobFilter(statuses=frozenset({status}))))

    def test_a_move_from_a_status_or_lease_that_is_not_the_stored_one_is_fenced(self, backend: StorageBackend) -> None:
        insert(backend, job())
        running = claim(backend)[0]
        done = {"status": JobStatus.COMPLETED}
        assert running.lease_id is not None
        for status, lease in (
            (JobStatus.QUEUED, running.lease_id),
            (JobStatus.RUNNING, running.lease_id + 1),
            (JobStatus.RUNNING, None),
        ):
            with pytest.raises(Fenced):
                commit(backend, Batch(rows=[row(1)], jobs=[JobMove(running.job_id, status, lease, done)]))
        with pytest.raises(Fenced):
            commit(backend, Batch(jobs=[JobMove(JobId("XX-none"), JobStatus.RUNNING, running.lease_id, done)]))
        assert stored(backend, running.job_id) == running and payloads(backend) == []

    def test_a_fence_lets_a_batch_through_only_under_the_running_lease(self, backend: StorageBackend) -> None:
        insert(backend, job())
        running = claim(backend)[0]
        assert running.lease_id is not None
        fence = JobFence(running.job_id, running.lease_id)
        commit(backend, Batch(rows=[row(1)], jobs=[fence]))
        for wrong in (
            JobFence(running.job_id, running.lease_id + 1),
            JobFence(JobId("XX-none"), running.lease_id),
        ):
            with pytest.raises(Fenced):
                commit(backend, Batch(rows=[row(2)], jobs=[wrong]))
        requeued = move(backend, running, status=JobStatus.QUEUED)
        with pytest.raises(Fenced):
            commit(backend, Batch(rows=[row(2)], jobs=[fence]))
        again = claim(backend)[0]
        assert again.job_id == requeued.job_id and again.lease_id != running.lease_id
        with pytest.raises(Fenced):
            commit(backend, Batch(rows=[row(2)], jobs=[fence]))
        assert len(payloads(backend)) == 1

    def test_progress_is_written_without_changing_the_state(self, backend: StorageBackend) -> None:
        insert(backend, job())
        running = claim(backend)[0]
        move(backend, running, checkpoint={"at": 5}, events=(("INFO", "half"),))
        found = stored(backend, running.job_id)
        assert found.checkpoint == {"at": 5} and found.events == running.events + 1
        assert backend.jobs.count(JobStatus.RUNNING) == 1

    def test_an_end_and_its_effects_are_one_commit(self, store: Store) -> None:
        insert(store.backend, job())
        running = claim(store.backend)[0]
        done = {"status": JobStatus.COMPLETED, "message": "5 rows"}
        end = JobMove(
            running.job_id, JobStatus.RUNNING, running.lease_id, done, (("INFO", "Job completed: 5 rows"),)
        )  # fmt: skip
        effect = Batch(rows=[row(1)], jobs=[end])
        commit(store.backend, effect)
        backend = store.reopen()
        assert stored(backend, running.job_id).status is JobStatus.COMPLETED and len(payloads(backend)) == 1

    # Claiming

    def test_claims_follow_priority_then_due_time(self, store: Store) -> None:
        now = store.clock.now_ms()
        wanted = [
            insert(store.backend, job(priority=priority, run_at=run_at, created_at=now - age_ms)).job_id
            for priority, run_at, age_ms in (
                (5, 0, 9), (5, now - 5, 900), (5, now, 0), (0, 0, 7), (0, 0, 3), (0, now - 2, 5), (-7, 0, 9)
            )
        ]  # fmt: skip
        assert [one.job_id for one in claim(store.backend, 3)] == wanted[:3]
        assert [one.job_id for one in claim(store.backend, 99)] == wanted[3:]
        assert claim(store.backend, 99) == []

    def test_a_job_of_low_priority_that_waited_long_enough_comes_first(self, store: Store) -> None:
        now = store.clock.now_ms()
        young = insert(store.backend, job(priority=3, queue="a", created_at=now))
        old = insert(store.backend, job(created_at=now - 3 * AGEING_MS - 1))
        middle = insert(store.backend, job(priority=1, created_at=now - 2 * AGEING_MS + 1))
        assert [one.job_id for one in claim(store.backend, 9)] == [old.job_id, young.job_id, middle.job_id]

    def test_a_claim_takes_new_jobs_through_queued(self, backend: StorageBackend) -> None:
        fresh = insert(backend, job(status=JobStatus.NEW), events=(("INFO", "Job created"),))
        claimed = claim(backend)[0]
        assert claimed.job_id == fresh.job_id and claimed.status is JobStatus.RUNNING
        texts = [event.text for event in backend.jobs.events(fresh.job_id)]
        assert texts == ["Job created", "Job queued", "Job started (1)"]

    def test_new_jobs_that_are_not_claimed_become_queued(self, backend: StorageBackend) -> None:
        ids = Ids()
        commit(backend, Batch(jobs=[JobInsert(job(status=JobStatus.NEW), ids) for _ in range(5)]))
        insert(backend, job(status=JobStatus.NEW, job_type="strange"))
        insert(backend, job(status=JobStatus.NEW, hold=Hold.PAUSED))
        claim(backend, 2, admit_max=3)
        assert [backend.jobs.count(one) for one in (JobStatus.NEW, JobStatus.QUEUED, JobStatus.RUNNING)] == [2, 3, 2]
        claim(backend, 0, admit_max=9)
        assert [backend.jobs.count(one) for one in (JobStatus.NEW, JobStatus.QUEUED)] == [0, 5]

    def test_a_batch_and_the_claims_are_one_commit(self, backend: StorageBackend) -> None:
        first, second = insert(backend, job()), insert(backend, job())
        running = claim(backend)[0]
        assert running.job_id == first.job_id
        done = JobMove(running.job_id, JobStatus.RUNNING, running.lease_id, {"status": JobStatus.COMPLETED})
        before = backend.head()
        assert [one.job_id for one in claim(backend, batch=Batch(rows=[row(1)], jobs=[done]))] == [second.job_id]
        assert stored(backend, first.job_id).status is JobStatus.COMPLETED and backend.head() > before
        stale = JobMove(first.job_id, JobStatus.RUNNING, running.lease_id, {"status": JobStatus.COMPLETED})
        insert(backend, job())
        with pytest.raises(Fenced):
            claim(backend, batch=Batch(jobs=[stale]))
        assert backend.jobs.count(JobStatus.QUEUED) == 1

    def test_nothing_to_claim_is_no_commit(self, backend: StorageBackend) -> None:
        before = backend.head()
        assert claim(backend, 9, admit_max=9) == [] and backend.head() == before

    def test_a_queue_runs_no_more_than_its_limit(self, store: Store) -> None:
        backend, ids = store.backend, Ids()
        commit(backend, Batch(jobs=[JobInsert(job(queue=queue), ids) for queue in ("a", "a", "a", "b", "b", "c")]))
        limits = {"a": 2, "b": 0}
        running = claim(backend, 99, queues=limits)
        assert sorted(one.queue for one in running) == ["a", "a", "c"]
        assert claim(backend, 99, queues=limits) == []
        backend = store.reopen()
        assert claim(backend, 99, queues=limits) == []
        mine = next(one for one in running if one.queue == "a")
        end = JobMove(mine.job_id, JobStatus.RUNNING, mine.lease_id, {"status": JobStatus.COMPLETED})
        assert [one.queue for one in claim(backend, 99, queues=limits, batch=Batch(jobs=[end]))] == ["a"]
        assert [one.queue for one in claim(backend, 99)] == ["b", "b"]
        assert backend.jobs.queues() == ["a", "b", "c"] and backend.jobs.count(JobStatus.RUNNING, "b") == 2

    def test_jobs_of_one_concurrency_key_run_one_after_another(self, store: Store) -> None:
        backend, ids = store.backend, Ids()
        commit(backend, Batch(jobs=[JobInsert(job(concurrency_key="k"), ids) for _ in range(4)]))
        insert(backend, job(concurrency_key="other"))
        insert(backend, job())
        order = []
        assert [one.concurrency_key for one in claim(backend, 99)] == ["k", "other", None]
        for _ in range(4):
            running = backend.jobs.running_with_key("k")
            assert running is not None and claim(backend, 99) == []
            order.append(running.job_id)
            backend = store.reopen()
            move(backend, running, status=JobStatus.COMPLETED)
            claim(backend, 99)
        assert order == [f"XX-{number:06d}" for number in range(1, 5)]
        assert backend.jobs.running_with_key("k") is None and backend.jobs.count(JobStatus.QUEUED) == 0

    def test_a_key_is_free_while_its_job_waits_for_a_retry(self, store: Store) -> None:
        backend = store.backend
        insert(backend, job(concurrency_key="k"))
        insert(backend, job(concurrency_key="k"))
        running = claim(backend, 9)[0]
        assert claim(backend, 9) == []
        move(backend, running, status=JobStatus.RETRYING, run_at=store.clock.now_ms() + 60_000)
        other = claim(backend, 9)
        assert len(other) == 1 and other[0].job_id != running.job_id
        store.clock.advance(61)
        assert claim(backend, 9) == []
        move(backend, other[0], status=JobStatus.COMPLETED)
        assert [one.job_id for one in claim(backend, 9)] == [running.job_id]

    def test_a_key_goes_on_when_the_next_job_is_held_or_cancelled(self, backend: StorageBackend) -> None:
        rows_ = [insert(backend, job(concurrency_key="k")) for _ in range(5)]
        running = claim(backend, 9)[0]
        assert claim(backend, 9) == []
        move(backend, running, status=JobStatus.COMPLETED)
        move(backend, rows_[1], hold=Hold.PAUSED)
        move(backend, rows_[2], status=JobStatus.CANCELLED)
        claimed = claim(backend, 9)
        assert [one.job_id for one in claimed] == [rows_[3].job_id]
        move(backend, stored(backend, rows_[1].job_id), hold=None)
        move(backend, claimed[0], status=JobStatus.FAILED)
        seen = []
        while found := claim(backend, 9):
            seen += [one.job_id for one in found]
            move(backend, found[0], status=JobStatus.COMPLETED)
        assert sorted(seen) == sorted([rows_[1].job_id, rows_[4].job_id])

    def test_the_cost_of_a_claim_does_not_grow_with_jobs_that_wait_for_a_key(self, store: Store) -> None:
        backend, ids = store.backend, Ids()
        commit(backend, Batch(jobs=[JobInsert(job(concurrency_key="k"), ids) for _ in range(300)]))
        for _ in range(3):
            claim(backend, 300)
        running = backend.jobs.running_with_key("k")
        assert running is not None
        before = backend.head()
        assert claim(backend, 300) == [] and backend.head() == before
        move(backend, running, status=JobStatus.COMPLETED)
        assert [one.job_id for one in claim(backend, 300)] == ["XX-000002"]

    def test_lanes_of_many_jobs_are_read_on(self, store: Store) -> None:
        backend, ids = store.backend, Ids()
        for priority in (0, 1, 0):
            commit(backend, Batch(jobs=[JobInsert(job(priority=priority), ids) for _ in range(400)]))
        store.reopen()
        seen = [one.job_id for _ in range(25) for one in claim(store.backend, 50)]
        expected = [*range(401, 801), *range(1, 401), *range(801, 1201)]
        assert seen == [f"XX-{number:06d}" for number in expected]

    def test_a_claim_gives_each_job_a_new_lease_and_writes_its_events(self, backend: StorageBackend) -> None:
        ids = [insert(backend, job(), events=(("INFO", "Job queued"),)).job_id for _ in range(3)]
        claimed = claim(backend, 9)
        assert {one.job_id for one in claimed} == set(ids)
        assert len({one.lease_id for one in claimed}) == 3
        for one in claimed:
            assert (one.status, one.attempt) == (JobStatus.RUNNING, 1) and one.started_at is not None
            assert stored(backend, one.job_id) == one
            assert [event.text for event in backend.jobs.events(one.job_id)] == ["Job queued", "Job started (1)"]

    def test_leases_are_never_given_twice(self, store: Store) -> None:
        insert(store.backend, job())
        leases = []
        for _ in range(4):
            running = claim(store.backend)[0]
            leases.append(running.lease_id)
            move(store.backend, running, status=JobStatus.QUEUED)
            store.reopen()
        assert len(set(leases)) == 4 and stored(store.backend, running.job_id).attempt == 4

    def test_jobs_that_are_not_due_held_running_or_ended_are_not_claimed(self, store: Store) -> None:
        backend, now = store.backend, store.clock.now_ms()
        insert(backend, job(run_at=now + 60_000_000))
        insert(backend, job(status=JobStatus.RETRYING, run_at=now + 60_000_000))
        insert(backend, job(hold=Hold.PAUSED))
        insert(backend, job(hold=Hold.QUARANTINED))
        for status in JobStatus:
            if status not in (JobStatus.NEW, JobStatus.QUEUED, JobStatus.RETRYING):
                insert(backend, job(status=status))
        assert claim(backend, 99) == []

    def test_waiting_jobs_are_claimed_once_they_are_due(self, store: Store) -> None:
        backend, now = store.backend, store.clock.now_ms()
        assert backend.jobs.next_due_ms() is None
        later = insert(backend, job(priority=9, run_at=now + 600_000))
        sooner = insert(backend, job(status=JobStatus.RETRYING, run_at=now + 300_000))
        due = insert(backend, job())
        assert backend.jobs.next_due_ms() == now + 300_000
        assert [one.job_id for one in claim(backend, 9)] == [due.job_id]
        store.clock.advance(301)
        assert backend.jobs.next_due_ms() == now + 600_000
        assert backend.jobs.next_due_ms(after_ms=now) == now + 300_000
        assert [one.job_id for one in claim(backend, 9)] == [sooner.job_id]
        store.clock.advance(301)
        assert [one.job_id for one in claim(backend, 9)] == [later.job_id]
        assert backend.jobs.next_due_ms() is None

    def test_the_next_due_time_counts_neither_due_nor_held_jobs(self, store: Store) -> None:
        backend, now = store.backend, store.clock.now_ms()
        insert(backend, job(run_at=now - 5))
        held = insert(backend, job(run_at=now + 500_000, hold=Hold.PAUSED))
        assert backend.jobs.next_due_ms() is None
        move(backend, held, hold=None)
        assert backend.jobs.next_due_ms() == now + 500_000

    def test_what_the_caller_cannot_run_is_left(self, backend: StorageBackend) -> None:
        for kind in ("a", "b", "a", "b"):
            insert(backend, job(job_type=kind))
        seen = claim(backend, 9, types=frozenset({"b"}))
        assert [one.job_type for one in seen] == ["b", "b"]
        assert backend.jobs.count(JobStatus.QUEUED) == 2

    def test_a_held_job_is_claimed_after_its_release(self, backend: StorageBackend) -> None:
        held = insert(backend, job(hold=Hold.PAUSED))
        assert claim(backend) == []
        move(backend, held, hold=None)
        assert [one.job_id for one in claim(backend)] == [held.job_id]

    def test_many_claimers_never_share_a_job(self, backend: StorageBackend) -> None:
        ids = Ids()
        commit(backend, Batch(jobs=[JobInsert(job(), ids) for _ in range(120)]))
        claimed: list[JobId] = []

        def work() -> None:
            while found := claim(backend, 7):
                claimed.extend(one.job_id for one in found)
                for one in found:
                    move(backend, one, status=JobStatus.COMPLETED)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(claimed) == len(set(claimed)) == 120 == backend.jobs.count(JobStatus.COMPLETED)

    def test_observers_hear_of_a_claim(self, backend: StorageBackend) -> None:
        insert(backend, job())
        heard: list[JobStatus] = []
        backend.observe(lambda _, done: heard.extend(one.status for one in done.changed_jobs))
        claim(backend)
        assert heard == [JobStatus.RUNNING]

    # Querying

    def test_jobs_are_found_by_each_column_of_the_filter(self, backend: StorageBackend) -> None:
        first = insert(backend, job(job_type="a", queue="q1", idempotency_key="k1", table_uid=1, created_at=10))
        second = insert(
            backend, job(job_type="b", queue="q2", idempotency_key="k2", table_uid=2, created_at=20, hold=Hold.PAUSED)
        )  # fmt: skip
        third = move(backend, insert(backend, job(job_type="a", created_at=30)), status=JobStatus.CANCELLED)
        expected = [
            (JobFilter(), [first, second, third]),
            (JobFilter(job_type="a"), [first, third]),
            (JobFilter(statuses=frozenset({JobStatus.QUEUED})), [first, second]),
            (JobFilter(statuses=frozenset({JobStatus.QUEUED, JobStatus.CANCELLED})), [first, second, third]),
            (JobFilter(statuses=frozenset()), []),
            (JobFilter(queue="q2"), [second]),
            (JobFilter(idempotency_key="k1"), [first]),
            (JobFilter(table_uid=2), [second]),
            (JobFilter(created_after=20), [second, third]),
            (JobFilter(created_before=20), [first]),
            (JobFilter(descending=True), [third, second, first]),
            (JobFilter(descending=True, limit=1), [third]),
            (JobFilter(limit=2), [first, second]),
            (JobFilter(limit=None, sort_by="job_type"), [first, third, second]),
            (JobFilter(job_type="a", statuses=frozenset({JobStatus.CANCELLED}), created_after=30), [third]),
        ]
        for wanted, found in expected:
            assert [one.job_id for one in backend.jobs.query(wanted)] == [one.job_id for one in found], wanted

    def test_columns_with_nulls_can_be_sorted_by(self, backend: StorageBackend) -> None:
        with_key = insert(backend, job(idempotency_key="k"))
        without = insert(backend, job())
        found = backend.jobs.query(JobFilter(sort_by="idempotency_key"))
        assert {one.job_id for one in found} == {with_key.job_id, without.job_id}
        with pytest.raises(InvalidRequest, match="colour"):
            backend.jobs.query(JobFilter(sort_by="colour"))

    def test_counts_are_exact_and_survive_reopening(self, store: Store) -> None:
        ids = Ids()
        commit(store.backend, Batch(jobs=[JobInsert(job(), ids) for _ in range(9)]))
        for one in claim(store.backend, 4)[:3]:
            move(store.backend, one, status=JobStatus.COMPLETED)
        with pytest.raises(Fenced):
            commit(store.backend, Batch(jobs=[JobInsert(job(), ids), JobFence(JobId("XX-none"), 1)]))
        expected = {JobStatus.QUEUED: 5, JobStatus.RUNNING: 1, JobStatus.COMPLETED: 3}
        for status in JobStatus:
            assert store.backend.jobs.count(status) == expected.get(status, 0)
        store.reopen()
        for status in JobStatus:
            assert store.backend.jobs.count(status) == expected.get(status, 0)

    # Events

    def test_events_are_numbered_per_job_without_gaps(self, store: Store) -> None:
        first = insert(store.backend, job(), events=(("INFO", "a1"), ("INFO", "a2")))
        second = insert(store.backend, job(), events=(("INFO", "b1"),))
        move(store.backend, first, events=(("WARN", "a3"),))
        move(store.backend, second, events=(("ERROR", "b2"), ("INFO", "b3")))
        with pytest.raises(Fenced):
            commit(store.backend, Batch(jobs=[JobMove(first.job_id, JobStatus.RUNNING, 1, {}, (("INFO", "never"),))]))
        backend = store.reopen()
        found = backend.jobs.events(first.job_id)
        assert [(one.number, one.level, one.text) for one in found] == [
            (1, "INFO", "a1"), (2, "INFO", "a2"), (3, "WARN", "a3")
        ]  # fmt: skip
        assert [one.text for one in backend.jobs.events(second.job_id, after=1)] == ["b2", "b3"]
        assert [one.text for one in backend.jobs.events(second.job_id, limit=1)] == ["b1"]
        assert [one.text for one in backend.jobs.events()] == ["a1", "a2", "b1", "a3", "b2", "b3"]
        assert all(0 < one.at <= store.clock.now_ms() for one in found)
        assert backend.jobs.events(JobId("XX-none")) == []

    def test_events_of_all_jobs_are_read_on_from_a_position(self, store: Store) -> None:
        one = insert(store.backend, job(), events=tuple(("INFO", f"e{n}") for n in range(5)))
        seen: list[str] = []
        position = 0
        for _ in range(9):
            page = store.backend.jobs.events(after=position, limit=2)
            if not page:
                break
            seen += [event.text for event in page]
            position = page[-1].position
        assert seen == [f"e{n}" for n in range(5)]
        done = move(store.backend, one, status=JobStatus.CANCELLED, events=(("INFO", "last"),))
        store.backend.jobs.delete([done.job_id])
        insert(store.reopen(), job(), events=(("INFO", "after"),))
        assert [event.text for event in store.backend.jobs.events(after=position)] == ["after"]

    def test_the_order_of_all_events_is_forgotten_up_to_where_it_was_released(self, store: Store) -> None:
        one = insert(store.backend, job(), events=tuple(("INFO", f"a{n}") for n in range(3)))
        move(store.backend, one, events=(("INFO", "b0"), ("INFO", "b1")))
        position = store.backend.jobs.events()[3].position
        store.backend.jobs.release_events(position)
        backend = store.reopen()
        assert [event.text for event in backend.jobs.events(after=position)] == ["b1"]
        assert all(not event.text.startswith("a") for event in backend.jobs.events())
        assert [event.text for event in backend.jobs.events(one.job_id)] == ["a0", "a1", "a2", "b0", "b1"]
        backend.jobs.release_events(backend.jobs.event_position())
        assert backend.jobs.events() == []
        move(backend, stored(backend, one.job_id), events=(("INFO", "c"),))
        assert [event.text for event in backend.jobs.events()] == ["c"]

    def test_attempts_keep_what_each_came_to(self, store: Store) -> None:
        backend = store.backend
        insert(backend, job())
        assert backend.jobs.attempts(JobId("XX-none")) == []
        first = claim(backend)[0]
        assert [(one.attempt, one.outcome) for one in backend.jobs.attempts(first.job_id)] == [(1, None)]
        store.clock.advance(2)
        move(
            backend, first, status=JobStatus.RETRYING, message="no", exception_trace="trace",
            outcome=AttemptOutcome.RETRYING,
        )  # fmt: skip
        second = claim(backend)[0]
        move(backend, second, status=JobStatus.QUEUED, outcome=AttemptOutcome.SNOOZED)
        third = claim(backend)[0]
        done: dict[str, Any] = {
            "message": "yes",
            "result": {"n": 1},
            "exception_trace": None,
            "outcome": AttemptOutcome.COMPLETED,
        }
        move(backend, third, status=JobStatus.COMPLETED, **done)
        found = store.reopen().jobs.attempts(first.job_id)
        assert [(one.attempt, one.outcome, one.message, one.exception_trace, one.result) for one in found] == [
            (1, "retrying", "no", "trace", None), (2, "snoozed", None, None, None),
            (3, "completed", "yes", None, {"n": 1})
        ]  # fmt: skip
        assert (found[0].finished_at or 0) >= found[0].started_at + 2000

    def test_what_a_thread_commits_under_a_lease_holds_only_while_the_job_has_it(self, backend: StorageBackend) -> None:
        insert(backend, job())
        [running] = claim(backend)
        fence = JobFence(running.job_id, running.lease_id or 0)
        with backend.under_lease(fence):
            insert(backend, job())
            move(backend, running, status=JobStatus.COMPLETED)
            with pytest.raises(LeaseLost):
                insert(backend, job())
            with backend.under_lease(None):
                insert(backend, job())
            with pytest.raises(LeaseLost):
                insert(backend, job())
        insert(backend, job())
        assert backend.jobs.count(JobStatus.NEW) + backend.jobs.count(JobStatus.QUEUED) == 3

    # Deleting

    def test_ended_jobs_are_removed_by_state_and_age(self, store: Store) -> None:
        backend = store.backend
        for _ in range(3):
            insert(backend, job(created_at=store.clock.now_ms()))
            running = claim(backend)[0]
            store.clock.advance(10)
            move(backend, running, status=JobStatus.COMPLETED)
        cut = store.clock.now_ms() - 5_000
        assert backend.jobs.delete_ended(JobStatus.FAILED, finished_before=None, limit=9) == 0
        assert backend.jobs.delete_ended(JobStatus.COMPLETED, finished_before=cut, limit=1) == 1
        assert backend.jobs.delete_ended(JobStatus.COMPLETED, finished_before=cut, limit=9) == 1
        assert backend.jobs.delete_ended(JobStatus.COMPLETED, finished_before=cut, limit=9) == 0
        assert backend.jobs.delete_ended(JobStatus.COMPLETED, finished_before=None, limit=9) == 1
        with pytest.raises(Internal):
            backend.jobs.delete_ended(JobStatus.RUNNING, finished_before=None, limit=9)

    def test_a_removal_with_a_fence_holds_only_under_that_lease(self, backend: StorageBackend) -> None:
        ended = move(backend, insert(backend, job()), status=JobStatus.CANCELLED)
        insert(backend, job())
        [running] = claim(backend)
        fence = JobFence(running.job_id, running.lease_id or 0)
        wrong = JobFence(running.job_id, fence.lease_id + 1)
        with pytest.raises(Fenced):
            backend.jobs.delete_ended(JobStatus.CANCELLED, finished_before=None, limit=9, fence=wrong)
        assert backend.jobs.get(ended.job_id) is not None
        assert backend.jobs.delete_ended(JobStatus.CANCELLED, finished_before=None, limit=9, fence=fence) == 1
        move(backend, running, status=JobStatus.COMPLETED)
        with pytest.raises(Fenced):
            backend.jobs.delete_ended(JobStatus.COMPLETED, finished_before=None, limit=9, fence=fence)
        assert backend.jobs.count(JobStatus.COMPLETED) == 1

    def test_only_ended_jobs_are_deleted_with_their_events(self, store: Store) -> None:
        backend = store.backend
        ended = move(backend, insert(backend, job(), events=(("INFO", "x"),)), status=JobStatus.CANCELLED)
        active = insert(backend, job(idempotency_key="k"), events=(("INFO", "y"),))
        assert backend.jobs.delete([ended.job_id, active.job_id, JobId("XX-none"), ended.job_id]) == 1
        jobs = store.reopen().jobs
        assert jobs.get(ended.job_id) is None and jobs.events(ended.job_id) == []
        assert [one.job_id for one in jobs.query(JobFilter())] == [active.job_id]
        assert jobs.count(JobStatus.CANCELLED) == 0
        assert [one.text for one in jobs.events()] == ["y"]

    def test_deleting_a_job_leaves_the_key_of_its_successor(self, backend: StorageBackend) -> None:
        old = move(backend, insert(backend, job(idempotency_key="k")), status=JobStatus.CANCELLED)
        heir = insert(backend, job(idempotency_key="k"))
        backend.jobs.delete([old.job_id])
        assert backend.jobs.active_with_key("k") == heir
