"""Any sequence of what users, workers, crashes and time do to jobs keeps the invariants of the job system.

I1 one live lease per job; I2 terminal states are final but for a retry; I3 nothing is accepted under an old
lease; I4 no accepted job is lost; I5 one active job per key; I6 no job waits without a reason; I7 progress
never goes back within a lease; I8 no limit is exceeded; I9 effects are there if and only if the job says so;
I10 the counters are the numbers of rows.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kalamdb.errors import IdempotencyConflict, InvalidRequest, LeaseLost
from kalamdb.jobs import (
    Completed,
    JobContext,
    JobInterrupted,
    JobRegistry,
    Permanent,
    Retry,
    RetryPolicy,
    Skipped,
    Snooze,
    UnifiedJobManager,
)
from kalamdb.jobs.explain import ReasonKind
from kalamdb.jobs.model import InterruptReason
from kalamdb.jobs.settings import JobSettings
from kalamdb.jobs.workers import Attempt
from kalamdb.storage import Batch, RecordKind, RecordOp, record_key
from kalamdb.storage.jobs import LEGAL_MOVES, Hold, JobFence, JobMove, JobRow, JobStatus
from kalamdb.storage.kv import KvBackend
from kalamdb.storage.memory import MemoryKv
from kalamdb.testing.clock import SimulatedClock
from kalamdb.testing.workers import HeldWorkers

SLOTS = 4
POLICIES = ("requeue", "retry", "fail")
STEPS: Counter[str] = Counter()
RULES = (
    "create", "cancel", "pause", "resume", "retry", "limit", "purge", "step", "end", "progress", "effect", "stale",
    "time", "time_out", "crash",
)  # fmt: skip
PARTS = 4
SETTINGS = JobSettings(max_concurrent=SLOTS, max_retries=2, retry_backoff_ms=1000, cancel_timeout_s=1.0)


@dataclass
class Known:
    """What the model knows of a job."""

    job_id: str
    key: str | None
    status: str = "new"
    hold: str | None = None
    retries: int = 0
    leases: list[int] = field(default_factory=list)
    effects: int = 0
    done: int = 0
    events: int = 0


def nothing(ctx: JobContext[Any]) -> None:
    """The workers are held: no executor is called."""


class Jobs(RuleBasedStateMachine):
    """A store, its manager, and a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = SimulatedClock(auto_advance=True)
        self.kv = MemoryKv()
        self.model: dict[str, Known] = {}
        self.stale: list[Attempt] = []
        self.limits: dict[str, int | None] = {}
        self.ran: dict[str, int] = {}
        self.open()

    def open(self) -> None:
        self.backend = KvBackend(self.kv, self.clock)
        self.manager = UnifiedJobManager(self.backend, JobRegistry(), self.clock, SETTINGS, workers=HeldWorkers)
        for at, policy in enumerate(POLICIES):
            self.manager.executor(
                policy, prefix=f"P{'ABC'[at]}", on_interrupt=policy, retry=RetryPolicy(base_ms=1000, jitter=0.0),
                timeout_s=500.0, concurrency_key="{group}" if policy == "retry" else None, queue=policy,
            )(nothing)  # fmt: skip
        self.runner = self.manager.runner
        self.runner.begin(SLOTS)

    # What there is

    def row(self, job_id: str) -> JobRow:
        found = self.backend.jobs.get(job_id)
        assert found is not None, "I4: an accepted job is gone"
        return found

    def attempts(self) -> list[Attempt]:
        return [one for one in self.runner._live() if not one.returned]

    def pick(self, data: st.DataObject, jobs: list[Any]) -> Any:
        return jobs[data.draw(st.integers(0, len(jobs) - 1))]

    def ids(self, *statuses: str) -> list[str]:
        return [one.job_id for one in self.model.values() if one.status in statuses]

    # Users

    @initialize(count=st.integers(2, 6))
    def begin(self, count: int) -> None:
        for _ in range(2):
            self.create("requeue", None, 0, 0, "x", count)
            self.create("retry", "k1", 0, 0, "x", count)
        self.step()

    @precondition(lambda self: len(self.model) < 25)
    @rule(
        policy=st.sampled_from(POLICIES),
        key=st.none() | st.sampled_from(["k1", "k2"]),
        priority=st.sampled_from([0, 0, 0, 7, -7]),
        delay_s=st.sampled_from([0, 0, 0, 30]),
        group=st.sampled_from("xy"),
        count=st.integers(1, 3),
    )
    def create(self, policy: str, key: str | None, priority: int, delay_s: int, group: str, count: int) -> None:
        STEPS["create"] += 1
        for number in range(count):
            wanted = key if number == 0 else None
            at = datetime.fromtimestamp(self.clock.now_ms() / 1000 + delay_s, UTC) if delay_s else None
            holders = [one for one in self.model.values() if one.key == wanted and one.status in ACTIVE]
            try:
                job = self.manager.create_job(policy, {"group": group}, wanted, priority=priority, run_at=at)
            except IdempotencyConflict as conflict:
                assert wanted is not None and [one.job_id for one in holders] == [conflict.job.id]
                continue
            assert wanted is None or not holders, "I5: a key was given twice"
            assert job.status == "new"
            self.model[job.id] = Known(job.id, wanted)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        STEPS["cancel"] += 1
        known = self.model[self.pick(data, list(self.model))]
        if known.status not in ACTIVE:
            with pytest.raises(InvalidRequest):
                self.manager.cancel_job(known.job_id)
            return
        running = [one for one in self.attempts() if one.row.job_id == known.job_id]
        job = self.manager.cancel_job(known.job_id)
        self.stale += running
        assert job.status == "cancelled"
        known.status, known.hold = "cancelled", None

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def pause(self, data: st.DataObject) -> None:
        STEPS["pause"] += 1
        known = self.model[self.pick(data, list(self.model))]
        if known.status not in ACTIVE:
            with pytest.raises(InvalidRequest):
                self.manager.pause_job(known.job_id)
            return
        self.manager.pause_job(known.job_id)
        known.hold = "paused"

    @precondition(lambda self: any(one.hold == "paused" for one in self.model.values()))
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        STEPS["resume"] += 1
        known = self.pick(data, [one for one in self.model.values() if one.hold == "paused"])
        self.manager.resume_job(known.job_id)
        known.hold = None

    @precondition(lambda self: self.ids("failed", "cancelled", "completed"))
    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        STEPS["retry"] += 1
        known = self.model[self.pick(data, self.ids("failed", "cancelled", "completed"))]
        if known.status == "completed":
            with pytest.raises(InvalidRequest):
                self.manager.retry_job(known.job_id)
            return
        taken = [one for one in self.model.values() if one.key == known.key and one.status in ACTIVE]
        try:
            self.manager.retry_job(known.job_id)
        except IdempotencyConflict:
            assert known.key is not None and taken
            return
        assert known.key is None or not taken
        known.status, known.hold, known.retries = "queued", None, 0

    @precondition(lambda self: len(self.ids("queued", "running")) > 2)
    @rule(queue=st.sampled_from(POLICIES), limit=st.sampled_from([None, 1, 2, 0]))
    def limit(self, queue: str, limit: int | None) -> None:
        STEPS["limit"] += 1
        if limit == 0:
            self.manager.pause_queue(queue)
        else:
            self.manager.resume_queue(queue)
            self.manager.limit_queue(queue, limit)
        self.limits[queue] = limit

    @precondition(lambda self: self.ids("completed", "failed", "cancelled", "skipped"))
    @rule(data=st.data())
    def purge(self, data: st.DataObject) -> None:
        STEPS["purge"] += 1
        before = {one.job_id for one in self.model.values() if one.status not in ACTIVE}
        gone = self.manager.purge(limit=2)
        left = {job.id for job in self.manager.list_jobs(limit=None)}
        removed = before - left
        assert len(removed) == gone == min(2, len(before))
        for job_id in removed:
            assert self.backend.jobs.events(job_id) == [] and self.backend.jobs.attempts(job_id) == []
            del self.model[job_id]

    # The runner and its workers

    @precondition(lambda self: self.ids("new", "queued", "retrying"))
    @rule()
    def step(self) -> None:
        STEPS["step"] += 1
        running = set(self.ids("running"))
        self.ran = {queue: self.backend.jobs.count(JobStatus.RUNNING, queue) for queue in POLICIES}
        while self.runner.step():
            pass
        self.follow(running)
        free = SLOTS - len(self.runner.running)
        for job_id in self.ids("new", "queued", "retrying"):
            reasons = [one.kind for one in self.manager.explain_job(job_id)]
            assert reasons, "I6: a job waits without a reason"
            assert free <= 0 or reasons != [ReasonKind.NEXT], f"I6: {job_id} could run and does not"
        assert not self.ids("new"), "a pass leaves no job new"

    def follow(self, running: set[str]) -> None:
        """Take over what a pass did: claims and admissions, ends that were delivered before, time-outs."""
        for known in self.model.values():
            row = self.row(known.job_id)
            if known.job_id in running and (row.status is not JobStatus.RUNNING or row.lease_id != known.leases[-1]):
                raise AssertionError("the end of a running job was not foretold")
            if row.status is JobStatus.RUNNING and known.status != "running":
                assert known.status in ("new", "queued", "retrying") and known.hold is None
                assert row.due_at <= self.clock.now_ms() and row.lease_id is not None
                assert row.lease_id not in {lease for one in self.model.values() for lease in one.leases}
                known.leases.append(row.lease_id)
                known.status, known.done = "running", 0
                allowed = self.limits.get(row.queue)
                assert allowed is None or self.backend.jobs.count(JobStatus.RUNNING, row.queue) <= max(
                    allowed, self.ran.get(row.queue, 0)
                ), "I8: a queue runs more than its limit"
            elif known.status == "new" and row.status is JobStatus.QUEUED:
                known.status = "queued"

    @precondition(lambda self: self.attempts())
    @rule(
        data=st.data(),
        outcome=st.sampled_from(
            [None, Completed("fine", {"n": 1}), Skipped("nothing"), Permanent("no"), ValueError("bad"), SystemExit(1)]
            + [Retry(5.0, "busy"), Snooze(3.0), "rubbish", JobInterrupted(InterruptReason.STOP)]
        ),
    )
    def end(self, data: st.DataObject, outcome: Any) -> None:
        STEPS["end"] += 1
        attempt = self.pick(data, self.attempts())
        known = self.model[attempt.row.job_id]
        told = attempt.context.interrupt_reason
        if isinstance(outcome, JobInterrupted) and told is not None:
            outcome = JobInterrupted(told)
        self.runner._threads.end(attempt, outcome)
        self.ended(known, attempt, outcome, told)
        self.step_over(known)
        self.stale.append(attempt)

    @precondition(lambda self: self.attempts())
    @rule(data=st.data())
    def end_well(self, data: st.DataObject) -> None:
        STEPS["end"] += 1
        attempt = self.pick(data, self.attempts())
        known = self.model[attempt.row.job_id]
        self.runner._threads.end(attempt, Completed("fine"))
        known.status, known.hold = "completed", None
        self.step_over(known)
        self.stale.append(attempt)

    def step_over(self, known: Known) -> None:
        status, hold = known.status, known.hold
        self.ran = {queue: self.backend.jobs.count(JobStatus.RUNNING, queue) for queue in POLICIES}
        while self.runner.step():
            pass
        row = self.row(known.job_id)
        if row.status is not JobStatus.RUNNING:
            assert (row.status, row.hold, row.retry_count) == (status, hold, known.retries), known
        self.follow(set(self.ids("running")) - {known.job_id})

    def ended(self, known: Known, attempt: Attempt, outcome: Any, told: InterruptReason | None) -> None:
        """What the model expects of an end."""
        policy = attempt.row.job_type
        match outcome:
            case None | Completed():
                known.status = "completed"
            case Skipped():
                known.status = "skipped"
            case _ if told is InterruptReason.CANCEL:
                known.status = "cancelled"
            case Snooze():
                known.status = "queued"
            case Permanent() | "rubbish":
                known.status = "failed"
            case JobInterrupted() if told is InterruptReason.PAUSE:
                known.status = "queued"
            case JobInterrupted() if told is not InterruptReason.TIMEOUT and policy != "retry":
                known.status = "queued" if policy == "requeue" else "failed"
            case _:
                self.used_retry(known)
        if known.status not in ACTIVE:
            known.hold = None

    def used_retry(self, known: Known) -> None:
        known.status = "retrying" if known.retries < 2 else "failed"
        known.retries += known.status == "retrying"

    @precondition(lambda self: self.attempts())
    @rule(data=st.data(), done=st.integers(0, 100), advance=st.booleans())
    def progress(self, data: st.DataObject, done: int, advance: bool) -> None:
        STEPS["progress"] += 1
        attempt = self.pick(data, self.attempts())
        if advance:
            self.clock.advance(0.3)
        attempt.context.progress(done, 100, "rows")
        attempt.context.checkpoint({"done": done})
        stored = self.row(attempt.row.job_id)
        known = self.model[attempt.row.job_id]
        assert stored.progress is not None and stored.progress.done >= known.done, "I7: progress went back"
        assert stored.checkpoint == {"done": done}
        known.done = stored.progress.done

    @precondition(lambda self: self.attempts())
    @rule(data=st.data(), complete=st.booleans())
    def effect(self, data: st.DataObject, complete: bool) -> None:
        """A commit of the executor, with or without the end of the job in it."""
        STEPS["effect"] += 1
        attempt = self.pick(data, self.attempts())
        known = self.model[attempt.row.job_id]
        known.effects += 1
        record = RecordOp(record_key(RecordKind.META, known.job_id), str(known.effects).encode())
        batch = Batch(records=[record])
        attempt.context.seal(batch, message="written" if complete else None)
        self.backend.commit(batch)
        if complete:
            known.status, known.hold = "completed", None
            assert self.row(known.job_id).message == "written"
            self.runner._threads.end(attempt, None)
            self.step_over(known)
            self.stale.append(attempt)

    @precondition(lambda self: self.stale)
    @rule(data=st.data())
    def write_under_an_old_lease(self, data: st.DataObject) -> None:
        STEPS["stale"] += 1
        attempt = self.pick(data, self.stale)
        job_id, lease = attempt.row.job_id, attempt.context.lease_id
        before = self.backend.jobs.get(job_id)
        record = RecordOp(record_key(RecordKind.META, job_id), b"stale")
        context = attempt.context
        context._shown_s = None
        for write in (
            lambda: context.progress(1000),
            lambda: context.checkpoint("stale"),
            lambda: context.log.info("stale"),
            lambda: context.create_job("requeue", {"group": "x"}),
            lambda: self.backend.commit(Batch(records=[record], jobs=[context.fence()])),
            lambda: self.backend.commit(Batch(records=[record], jobs=[JobFence(job_id, lease)])),
            lambda: self.backend.commit(Batch(jobs=[JobMove(job_id, JobStatus.RUNNING, lease, {"message": "stale"})])),
        ):
            with pytest.raises(LeaseLost):
                write()
        assert self.backend.jobs.get(job_id) == before, "I3: a write under an old lease was accepted"
        if attempt.revoked and not attempt.returned:
            self.runner._threads.end(attempt, None)
            assert self.backend.jobs.get(job_id) == before

    # Time and crashes

    @precondition(lambda self: self.ids("queued", "retrying"))
    @rule(seconds=st.sampled_from([0.5, 2.0, 40.0]))
    def time(self, seconds: float) -> None:
        STEPS["time"] += 1
        self.clock.advance(seconds)

    @precondition(lambda self: self.attempts())
    @rule()
    def time_out(self) -> None:
        """All that runs is told to stop, does not, and loses its lease."""
        STEPS["time_out"] += 1
        late = self.attempts()
        told = {one.row.job_id: one.context.interrupt_reason for one in late}
        self.clock.advance(600.0)
        running = set(self.ids("running"))
        self.runner._expire()
        self.clock.advance(2.0)
        self.runner._expire()
        for attempt in late:
            known = self.model[attempt.row.job_id]
            if told[known.job_id] is InterruptReason.PAUSE:
                known.status = "queued"
            else:
                self.used_retry(known)
            if known.status not in ACTIVE:
                known.hold = None
            row = self.row(known.job_id)
            assert (row.status, row.hold, row.retry_count) == (known.status, known.hold, known.retries)
            running.discard(known.job_id)
        self.stale += late
        self.follow(running)

    @precondition(lambda self: self.ids("running"))
    @rule()
    def crash(self) -> None:
        STEPS["crash"] += 1
        deaths = {job_id: self.row(job_id).process_deaths + 1 for job_id in self.ids("running")}
        self.stale.clear()
        self.open()
        for job_id, count in deaths.items():
            known = self.model[job_id]
            policy = self.row(job_id).job_type
            if count >= SETTINGS.quarantine_after:
                known.status, known.hold = "failed", "quarantined"
            elif policy == "retry":
                self.used_retry(known)
            else:
                known.status = "queued" if policy == "requeue" else "failed"
            if known.status not in ACTIVE and known.hold != "quarantined":
                known.hold = None

    # What always holds

    @invariant()
    def everything_holds(self) -> None:
        rows = [job.row for job in self.manager.list_jobs(limit=None)]
        self.rows_are_as_the_model_says({row.job_id: row for row in rows})
        self.no_limit_is_exceeded(rows)
        counted = Counter((row.status, row.queue) for row in rows)
        for status in JobStatus:
            found = [self.backend.jobs.count(status, queue) for queue in POLICIES]
            assert found == [counted[status, queue] for queue in POLICIES], "I10"
            assert self.backend.jobs.count(status) == sum(found), "I10"
        wanted = [record_key(RecordKind.META, known.job_id) for known in self.model.values()]
        for known, record in zip(self.model.values(), self.backend.latest().records(wanted), strict=True):
            assert (0 if record is None else int(record.value)) == known.effects, "I9"

    def rows_are_as_the_model_says(self, rows: dict[Any, JobRow]) -> None:
        assert rows.keys() == self.model.keys(), "I4: the jobs are not those that were accepted"
        for known in self.model.values():
            row = rows[known.job_id]
            assert (row.status.value, row.hold, row.retry_count) == (known.status, known.hold, known.retries), known
            assert (row.lease_id is not None) is (row.status is JobStatus.RUNNING), "I1"
            assert row.lease_id in (None, known.leases[-1] if known.leases else None), "I1"
            assert row.status.is_terminal is (row.finished_at is not None), "I2"
            assert row.attempt == len(known.leases) and row.retry_count <= row.max_retries
            assert row.hold is not Hold.QUARANTINED or row.status is JobStatus.FAILED
            if row.events != known.events:
                numbers = [event.number for event in self.backend.jobs.events(row.job_id)]
                assert numbers == list(range(1, row.events + 1)) and row.events > known.events
                assert [one.attempt for one in self.backend.jobs.attempts(row.job_id)] == list(
                    range(1, row.attempt + 1)
                )
                known.events = row.events

    def no_limit_is_exceeded(self, rows: list[JobRow]) -> None:
        running = [row for row in rows if row.status is JobStatus.RUNNING]
        assert len(running) <= SLOTS, "I8: more leases than slots"
        groups = Counter(row.concurrency_key for row in running if row.concurrency_key)
        assert all(count == 1 for count in groups.values()), "I8: a concurrency key runs twice"
        keys = Counter(row.idempotency_key for row in rows if row.idempotency_key and row.status.is_active)
        assert all(count == 1 for count in keys.values()), "I5: a key is active twice"


ACTIVE = ("new", "queued", "running", "retrying")


@pytest.mark.parametrize("part", range(PARTS))
def test_any_sequence_of_events_keeps_the_invariants(part: int) -> None:
    """About 5,000 steps each."""
    STEPS.clear()
    run_state_machine_as_test(
        Jobs,
        settings=settings(
            max_examples=80, stateful_step_count=80, deadline=None, suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )  # fmt: skip
    print(dict(STEPS))
    assert sum(STEPS.values()) > 3000 and all(STEPS[name] >= 20 for name in RULES)


@pytest.mark.long
def test_any_sequence_of_events_keeps_the_invariants_for_long() -> None:
    run_state_machine_as_test(
        Jobs,
        settings=settings(
            max_examples=3000, stateful_step_count=120, deadline=None, suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )  # fmt: skip


def test_the_table_of_moves_has_no_way_out_of_completed_and_skipped() -> None:
    assert LEGAL_MOVES[JobStatus.COMPLETED] == LEGAL_MOVES[JobStatus.SKIPPED] == frozenset()
