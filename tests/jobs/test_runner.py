"""Slots, queues, priorities, time-outs, cancelling, pausing, stopping: what runs when, and what ends it."""

from __future__ import annotations

import asyncio
import itertools
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from kalamdb.clock import SystemClock
from kalamdb.errors import LeaseLost
from kalamdb.jobs import Completed, Job, JobContext, JobInterrupted, Permanent, Retry, RetryPolicy, Skipped, Snooze
from kalamdb.jobs.manager import UnifiedJobManager
from kalamdb.storage.jobs import Hold
from tests.jobs.conftest import Gate, World, texts, until


def run(manager: UnifiedJobManager, job_type: str, **options: Any) -> Job:
    return manager.wait(manager.create_job(job_type, **options).id, 10)


def soon(world: World, milliseconds: int) -> datetime:
    return datetime.fromtimestamp((world.clock.now_ms() + milliseconds) / 1000, UTC)


# What an executor may do


@pytest.mark.parametrize(
    ("outcome", "status", "message"),
    [
        (None, "completed", None),
        (Completed("fine", {"n": 1}), "completed", "fine"),
        (Skipped("nothing there"), "skipped", "nothing there"),
        (17, "failed", "the executor returned int, expected Completed, Skipped, Retry, Snooze or None"),
        (
            Completed("x", object()),
            "failed",
            "the result cannot be stored, it has no JSON form: Encoding objects of type object is unsupported",
        ),
        (
            Completed("x", 2**70),
            "failed",
            "the result cannot be stored, it has no JSON form: can't serialize ints < -2**63 or > 2**64 - 1",
        ),
        (Snooze(-1), "failed", "the executor asked to wait -1 s; 0 to 3.16224e+07 are allowed"),
        (Snooze(float("nan")), "failed", "the executor asked to wait nan s; a number of seconds is expected"),
        (Retry(after_s=float("inf")), "failed", "the executor asked to wait inf s; a number of seconds is expected"),
    ],
)  # fmt: skip
def test_what_an_executor_returns_ends_the_job(world: World, outcome: Any, status: str, message: str | None) -> None:
    manager = world.manager(start=2)
    manager.executor("given", prefix="GI")(lambda ctx: outcome)
    job = run(manager, "given")
    assert (job.status, job.message) == (status, message)
    assert job.finished_at is not None and job.lease_id is None and job.exception_trace is None


class _Silent(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def endless(depth: int = 0) -> int:
    return endless(depth + 1)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda: sys.exit(3), "SystemExit: 3"),
        (lambda: endless(), "RecursionError: maximum recursion depth exceeded"),
        (lambda: (_ for _ in ()).throw(MemoryError("all gone")), "MemoryError: all gone"),
        (lambda: (_ for _ in ()).throw(KeyboardInterrupt()), "KeyboardInterrupt: "),
        (lambda: (_ for _ in ()).throw(_Silent()), "_Silent: its text cannot be made"),
        (lambda: (_ for _ in ()).throw(GeneratorExit()), "GeneratorExit: "),
    ],
)
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_whatever_an_executor_raises_ends_that_job_only(world: World, fault: Any, said: str, kind: str) -> None:
    manager, gate = world.manager(start=3), Gate()
    manager.executor("held", prefix="HE")(gate)

    def sync(ctx: JobContext[Any]) -> None:
        fault()

    async def asynchronous(ctx: JobContext[Any]) -> None:
        fault()

    manager.executor("broken", prefix="BR", max_retries=0)(sync if kind == "sync" else asynchronous)
    other = manager.create_job("held")
    gate.await_entry()
    job = run(manager, "broken")
    assert job.status == "failed" and job.message.startswith(said)
    assert said.partition(":")[0] in job.exception_trace
    gate.open.set()
    assert manager.wait(other.id, 10).status == "completed"
    assert run(manager, "broken").status == "failed"


def test_permanent_ends_a_job_at_once(world: World) -> None:
    manager = world.manager(start=1)

    @manager.executor("final", prefix="FI")
    def final(ctx: JobContext[Any]) -> None:
        raise Permanent("no such host")

    job = run(manager, "final")
    assert (job.status, job.message, job.attempt) == ("failed", "no such host", 1)


def test_texts_are_cut_at_their_limits(world: World) -> None:
    manager = world.manager(start=1, message_bytes_max=50, trace_bytes_max=200, result_bytes_max=20)

    @manager.executor("wordy", prefix="WO", max_retries=0)
    def wordy(ctx: JobContext[dict[str, Any]]) -> Completed:
        ctx.log.info("ö" * 100)
        if ctx.params.get("fail"):
            raise ValueError("\udc80" + "x" * 1000)
        return Completed("ä" * 100, ctx.params.get("result"))

    job = run(manager, "wordy")
    assert job.message == "ä" * 25 and f"INFO {'ö' * 25}" in texts(job)
    failed = run(manager, "wordy", params={"fail": True})
    assert len(failed.message) == 50 and len(failed.exception_trace) <= 200
    assert run(manager, "wordy", params={"result": "r" * 30}).message.startswith(
        "the result would take 32 bytes, at most 20"
    )


# Order


def test_jobs_run_by_priority_then_age(world: World) -> None:
    manager, seen = world.manager(), []
    manager.executor("mark", prefix="MA")(lambda ctx: seen.append(ctx.params["n"]))
    for number, priority in enumerate((0, 5, 0, -5, 5)):
        last = manager.create_job("mark", {"n": number}, priority=priority)
    manager.run_loop(1)
    until(lambda: len(seen) == 5)
    assert seen == [1, 4, 0, 2, 3] and last.status == "new"


def test_run_at_delays_a_job(world: World) -> None:
    manager = world.manager(start=1)
    manager.executor("quick", prefix="QU")(lambda ctx: None)
    at = soon(world, 150)
    job = run(manager, "quick", run_at=at)
    assert job.started_at >= at - timedelta(milliseconds=1)
    assert run(manager, "quick", run_at=datetime(1970, 1, 1, tzinfo=UTC)).status == "completed"


def test_a_job_that_becomes_due_within_a_pass_is_not_left_waiting() -> None:
    class Rushing(SystemClock):
        """Each look at it takes a millisecond, so any two looks of a pass have a due time between them."""

        def __init__(self) -> None:
            self.looks = itertools.count(1_750_000_000_000)

        def now_ms(self) -> int:
            return next(self.looks)

    world = World(Rushing())
    try:
        manager = world.manager(start=2)
        manager.executor("quick", prefix="QU")(lambda ctx: None)
        for ahead in range(1, 25):
            job = manager.create_job("quick", run_at=soon(world, ahead))
            assert manager.wait(job.id, 5).status == "completed"
    finally:
        world.close()


def test_a_snoozed_job_comes_again_without_using_a_retry(world: World) -> None:
    manager = world.manager(start=1)

    @manager.executor("patient", prefix="PA", max_retries=0)
    def patient(ctx: JobContext[Any]) -> Snooze | Completed:
        return Snooze(0.02) if ctx.attempt < 4 else Completed("now")

    job = run(manager, "patient")
    assert (job.status, job.retry_count, job.attempt) == ("completed", 0, 4)
    assert [attempt.outcome for attempt in job.attempts()] == ["snoozed", "snoozed", "snoozed", "completed"]
    assert "INFO Job snoozed for 0.02s" in texts(job)


def test_retry_uses_a_retry_and_waits_as_it_says(world: World) -> None:
    manager = world.manager(start=1)

    @manager.executor("asks", prefix="AS", max_retries=1)
    def asks(ctx: JobContext[Any]) -> Retry:
        return Retry(0.05, "the service is busy")

    job = run(manager, "asks")
    assert (job.status, job.message, job.retry_count) == ("failed", "the service is busy", 1)
    assert "WARN Job failed, retrying in 0.05s (attempt 1/1)" in texts(job)


def test_waits_grow_by_the_policy_within_cap_and_jitter(world: World) -> None:
    manager = world.manager(start=1)
    policy = RetryPolicy(base_ms=10, factor=3.0, cap_ms=50, jitter=0.5)

    @manager.executor("bad", prefix="BA", max_retries=4, retry=policy)
    def bad(ctx: JobContext[Any]) -> None:
        raise RuntimeError("no")

    job = run(manager, "bad")
    waits = [float(text.split("in ")[1].split("s ")[0]) * 1000 for text in texts(job) if "retrying" in text]
    for wait, grown in zip(waits, (10, 30, 50, 50), strict=True):
        assert grown * 0.5 - 1 <= wait <= grown * 1.5 + 1
    assert len(set(waits)) > 1


def test_a_job_that_waits_for_its_retry_holds_no_slot(world: World) -> None:
    manager = world.manager(start=1, retry_backoff_ms=60_000)
    manager.executor("bad", prefix="BA")(lambda ctx: 1 / 0)
    manager.executor("good", prefix="GO")(lambda ctx: None)
    waiting = manager.create_job("bad")
    until(lambda: manager.get_job(waiting.id).status == "retrying")
    assert run(manager, "good").status == "completed"


def test_jobs_of_one_concurrency_key_never_overlap(world: World) -> None:
    manager = world.manager(start=8)
    inside, most, lock = [0], [0], threading.Lock()

    @manager.executor("exclusive", prefix="EX", concurrency_key="user:{user}")
    def exclusive(ctx: JobContext[dict[str, Any]]) -> None:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        threading.Event().wait(0.002)
        with lock:
            inside[0] -= 1

    jobs = [manager.create_job("exclusive", {"user": "anna"}) for _ in range(20)]
    assert all(manager.wait(job.id, 10).status == "completed" for job in jobs) and most[0] == 1


def test_a_queue_runs_no_more_than_its_limit_and_stops_when_it_is_paused(world: World) -> None:
    manager, gate = world.manager(start=8), Gate()
    manager.executor("held", prefix="HE", queue="slow")(gate)
    manager.executor("quick", prefix="QU")(lambda ctx: None)
    manager.limit_queue("slow", 2)
    jobs = [manager.create_job("held") for _ in range(5)]
    gate.await_entry(2)
    assert run(manager, "quick").status == "completed"
    assert len(manager.list_jobs(status="running")) == 2
    manager.pause_queue("slow", by="anna", reason="deploy")
    gate.open.set()
    until(lambda: not manager.list_jobs(status="running"))
    assert len(manager.list_jobs(status="queued")) == 3
    assert manager.explain_job(jobs[4].id)[0].detail == "queue 'slow' is paused by anna: deploy"
    reopened = UnifiedJobManager(world.backend, manager.registry, world.clock, manager._settings)
    assert reopened.queues.limit("slow") == 0
    manager.resume_queue("slow")
    assert all(manager.wait(job.id, 10).status == "completed" for job in jobs)


def test_a_job_waits_for_its_executor(world: World) -> None:
    manager = world.manager(start=1)
    job = manager.create_job("later", allow_unknown=True)
    assert job.id.startswith("UN-")
    until(lambda: manager.get_job(job.id).status == "queued")
    manager.executor("later", prefix="LA")(lambda ctx: None)
    assert manager.wait(job.id, 10).status == "completed"


def test_parameters_that_do_not_fit_any_more_fail_the_job(world: World) -> None:
    manager = world.manager()
    from dataclasses import dataclass

    @dataclass
    class Wanted:
        name: str

    job = manager.create_job("typed", {"size": 3}, allow_unknown=True)

    def typed(ctx: Any) -> None:
        raise AssertionError("it must not run")

    typed.__annotations__["ctx"] = JobContext[Wanted]
    manager.executor("typed", prefix="TY")(typed)
    manager.run_loop(1)
    found = manager.wait(job.id, 10)
    assert found.status == "failed" and found.message.startswith("parameters of a 'typed' job do not fit")


# Ending attempts from outside


class Loop:
    """An executor that works until it is told to stop, and what it was told."""

    def __init__(self) -> None:
        self.started = threading.Semaphore(0)
        self.reasons: list[str] = []

    def __call__(self, ctx: JobContext[Any]) -> None:
        pause = threading.Event()
        self.started.release()
        try:
            while True:
                ctx.check()
                pause.wait(0.001)
        except JobInterrupted as told:
            self.reasons.append(str(told.reason))
            raise


@pytest.mark.parametrize("before", ["new", "queued", "retrying", "running"])
def test_a_job_can_be_cancelled_in_every_active_state(world: World, before: str) -> None:
    manager, loop = world.manager(retry_backoff_ms=60_000), Loop()
    manager.executor("loop", prefix="LO")(loop if before == "running" else lambda ctx: 1 / 0)
    job = manager.create_job("loop", run_at=datetime(2100, 1, 1, tzinfo=UTC) if before == "queued" else None)
    if before != "new":
        manager.run_loop(1)
        until(lambda: manager.get_job(job.id).status == before)
    cancelled = manager.cancel_job(job.id)
    assert cancelled.status == "cancelled" and cancelled.finished_at is not None
    assert texts(cancelled)[-1] == "INFO Job cancelled by user"
    with pytest.raises(Exception, match=f"Cannot cancel job '{job.id}' in status cancelled"):
        manager.cancel_job(job.id)


def test_cancelling_a_job_that_completes_meanwhile_says_completed(world: World) -> None:
    manager, gate = world.manager(start=1, cancel_timeout_s=5), Gate()
    manager.executor("held", prefix="HE")(gate)
    job = manager.create_job("held")
    gate.await_entry()
    ended: list[Job] = []
    thread = threading.Thread(target=lambda: ended.append(manager.cancel_job(job.id)))
    thread.start()
    until(lambda: manager.get_job(job.id).cancel_requested)
    gate.open.set()
    thread.join(10)
    assert ended[0].status == "completed"


@pytest.mark.parametrize("end", ["raise", "retry", "snooze"])
def test_an_attempt_that_ends_otherwise_after_a_cancellation_is_cancelled(world: World, end: str) -> None:
    manager, started = world.manager(start=1, cancel_timeout_s=5), threading.Event()

    @manager.executor("stubborn", prefix="ST")
    def stubborn(ctx: JobContext[Any]) -> Any:
        started.set()
        until(lambda: ctx.cancelled)
        if end == "raise":
            raise ValueError("in the way out")
        return Retry() if end == "retry" else Snooze(60)

    job = manager.create_job("stubborn")
    assert started.wait(10)
    assert manager.cancel_job(job.id).status == "cancelled"


def test_a_job_that_never_checks_loses_its_lease(world: World) -> None:
    manager, gate, seen = world.manager(start=1, cancel_timeout_s=0.05), Gate(), []

    @manager.executor("deaf", prefix="DE")
    def deaf(ctx: JobContext[Any]) -> None:
        gate()
        for call in (
            ctx.check, lambda: ctx.progress(1), lambda: ctx.checkpoint(1), lambda: ctx.log.info("x"), ctx.fence,
            lambda: ctx.create_job("deaf"), lambda: ctx.completion("done"),
        ):  # fmt: skip
            try:
                call()
            except LeaseLost:
                seen.append(call)

    job = manager.create_job("deaf")
    gate.await_entry()
    cancelled = manager.cancel_job(job.id)
    assert cancelled.status == "cancelled" and manager.runner.abandoned_threads == 1
    history = texts(cancelled)
    gate.open.set()
    until(lambda: manager.runner.abandoned_threads == 0)
    assert len(seen) == 7 and texts(manager.get_job(job.id)) == history


def test_too_many_abandoned_threads_stop_the_starting_of_jobs(world: World) -> None:
    manager, gate = world.manager(start=4, cancel_timeout_s=0.01, abandoned_threads_max=1), Gate()
    manager.executor("deaf", prefix="DE")(gate)
    manager.executor("quick", prefix="QU")(lambda ctx: None)
    for _ in range(2):
        job = manager.create_job("deaf")
        gate.await_entry()
        manager.cancel_job(job.id)
    waiting = manager.create_job("quick")
    until(lambda: manager.get_job(waiting.id).status == "queued")
    assert [str(reason.kind) for reason in manager.explain_job(waiting.id)] == ["abandoned threads"]
    gate.open.set()
    assert manager.wait(waiting.id, 10).status == "completed"


@pytest.mark.parametrize("kind", ["checks", "deaf", "async"])
def test_a_time_out_ends_an_attempt(world: World, kind: str) -> None:
    manager, loop, gate = world.manager(start=2, cancel_timeout_s=0.05), Loop(), Gate()

    async def asynchronous(ctx: JobContext[Any]) -> None:
        await asyncio.sleep(3600)

    body = {"checks": loop, "deaf": gate, "async": asynchronous}[kind]
    manager.executor("slow", prefix="SL", timeout_s=0.05, max_retries=1)(body)
    job = run(manager, "slow")
    assert (job.status, job.attempt) == ("failed", 2)
    assert job.message == "the attempt took longer than its time-out of 0.05 s"
    gate.open.set()
    until(lambda: manager.runner.abandoned_threads == 0)


def test_a_time_out_of_the_job_overrides_that_of_its_executor(world: World) -> None:
    manager, loop = world.manager(start=1), Loop()
    manager.executor("slow", prefix="SL", timeout_s=3600, max_retries=0)(loop)
    assert run(manager, "slow", timeout_s=0.03).status == "failed" and loop.reasons == ["timeout"]


def test_a_paused_job_waits_until_it_is_resumed(world: World) -> None:
    manager = world.manager(start=1)
    manager.executor("quick", prefix="QU")(lambda ctx: None)
    job = manager.create_job("quick", run_at=soon(world, 100))
    assert manager.pause_job(job.id).hold is Hold.PAUSED and manager.pause_job(job.id).hold is Hold.PAUSED
    threading.Event().wait(0.15)
    assert manager.get_job(job.id).status == "queued"
    assert [str(reason.kind) for reason in manager.explain_job(job.id)] == ["paused"]
    assert manager.resume_job(job.id).hold is None
    done = manager.wait(job.id, 10)
    assert done.status == "completed"
    for call in (manager.pause_job, manager.resume_job):
        with pytest.raises(Exception, match="Cannot"):
            call(job.id)


def test_pausing_a_running_job_ends_its_attempt_and_keeps_its_checkpoint(world: World) -> None:
    manager, started, seen = world.manager(start=1, cancel_timeout_s=5), threading.Event(), []

    @manager.executor("steps", prefix="SE", max_retries=0)
    def steps(ctx: JobContext[Any]) -> Completed:
        seen.append(ctx.checkpoint_state)
        if ctx.checkpoint_state is None:
            ctx.checkpoint({"at": 7})
            started.set()
            until(lambda: ctx.cancelled)
            ctx.check()
        return Completed("went on")

    job = manager.create_job("steps")
    assert started.wait(10)
    paused = manager.pause_job(job.id)
    assert (paused.status, paused.hold, paused.retry_count, paused.lease_id) == ("queued", "paused", 0, None)
    manager.resume_job(job.id)
    assert manager.wait(job.id, 10).message == "went on" and seen == [None, {"at": 7}]
    assert [attempt.outcome for attempt in manager.get_job(job.id).attempts()] == ["paused", "completed"]


def test_a_job_that_completes_in_spite_of_a_pause_is_completed(world: World) -> None:
    manager, gate = world.manager(start=1, cancel_timeout_s=0.02), Gate()
    manager.executor("held", prefix="HE")(gate)
    job = manager.create_job("held")
    gate.await_entry()
    asked = manager.pause_job(job.id)
    assert (asked.status, asked.hold) == ("running", "paused")
    gate.open.set()
    done = manager.wait(job.id, 10)
    assert (done.status, done.hold) == ("completed", None)


def test_a_failed_or_cancelled_job_is_run_again_under_its_id(world: World) -> None:
    manager, fail = world.manager(start=1), threading.Event()
    fail.set()

    @manager.executor("once", prefix="ON", max_retries=1)
    def once(ctx: JobContext[Any]) -> None:
        if fail.is_set():
            raise RuntimeError("no")

    job = run(manager, "once", idempotency_key="k")
    assert job.status == "failed" and job.retry_count == 1
    fail.clear()
    assert manager.retry_job(job.id).retry_count == 0
    done = manager.wait(job.id, 10)
    assert (done.id, done.status, done.attempt) == (job.id, "completed", 3)
    with pytest.raises(Exception, match=f"Cannot retry job '{job.id}' in status completed"):
        manager.retry_job(job.id)


def test_a_job_is_not_run_again_while_another_has_its_key(world: World) -> None:
    manager = world.manager()
    first = manager.create_job("x", None, "k", allow_unknown=True)
    manager.cancel_job(first.id)
    second = manager.create_job("x", None, "k", allow_unknown=True)
    with pytest.raises(Exception, match="is already new") as caught:
        manager.retry_job(first.id)
    assert caught.value.job.id == second.id and manager.get_job(first.id).status == "cancelled"


# Stopping


@pytest.mark.parametrize(
    ("policy", "status", "retries"), [("requeue", "queued", 0), ("retry", "retrying", 1), ("fail", "failed", 0)]
)
@pytest.mark.parametrize("kind", ["checks", "deaf", "async"])
def test_a_stop_ends_running_jobs_as_their_policy_says(
    world: World, policy: str, status: str, retries: int, kind: str
) -> None:
    manager = world.manager(start=2, cancel_timeout_s=0.05, retry_backoff_ms=60_000)
    loop, gate, begun = Loop(), Gate(), threading.Event()

    async def asynchronous(ctx: JobContext[Any]) -> None:
        begun.set()
        await asyncio.sleep(3600)

    body = {"checks": loop, "deaf": gate, "async": asynchronous}[kind]
    manager.executor("work", prefix="WO", on_interrupt=policy)(body)
    job = manager.create_job("work")
    until(lambda: manager.get_job(job.id).status == "running")
    began = time.monotonic()
    manager.stop(0.05)
    assert time.monotonic() - began < 5
    found = manager.get_job(job.id)
    assert (found.status, found.retry_count, found.lease_id) == (status, retries, None)
    gate.open.set()


def test_a_stop_lets_a_job_finish_that_is_quick_enough(world: World) -> None:
    manager, gate = world.manager(start=1), Gate()
    manager.executor("held", prefix="HE")(gate)
    job, later = manager.create_job("held"), manager.create_job("held")
    gate.await_entry()
    stopping = threading.Thread(target=manager.stop, args=(10.0,))
    stopping.start()
    until(lambda: not manager.runner.is_claiming)
    gate.open.set()
    stopping.join(10)
    assert manager.get_job(job.id).status == "completed" and manager.get_job(later.id).status == "queued"
    manager.run_loop(1)
    assert manager.wait(later.id, 10).status == "completed"


def test_claims_can_stop_while_what_runs_goes_on_and_is_recorded(world: World) -> None:
    manager, gate = world.manager(start=1), Gate()
    manager.executor("held", prefix="HE")(gate)
    job, later = manager.create_job("held"), manager.create_job("held")
    gate.await_entry()
    manager.stop_claims()
    gate.open.set()
    assert manager.wait(job.id, 10).status == "completed"
    assert manager.get_job(later.id).status == "queued"


@pytest.mark.parametrize("before", [True, False], ids=["before", "during"])
def test_a_stop_that_is_hurried_waits_for_no_job(world: World, before: bool) -> None:
    manager, gate = world.manager(start=1, cancel_timeout_s=0.05), Gate()
    manager.executor("held", prefix="HE", on_interrupt="requeue")(gate)
    job = manager.create_job("held")
    gate.await_entry()
    stopping = threading.Thread(target=manager.stop, args=(600.0,))
    if before:
        manager.hurry()
        stopping.start()
    else:
        stopping.start()
        until(lambda: not manager.runner.is_claiming)
        manager.hurry()
    stopping.join(10)
    assert not stopping.is_alive()
    assert manager.get_job(job.id).status == "queued"
    gate.open.set()


# Async executors


def test_thousands_of_async_jobs_run_at_once(world: World) -> None:
    manager = world.manager(start=2000)
    inside, most = [0], [0]

    @manager.executor("wait", prefix="WA")
    async def wait(ctx: JobContext[Any]) -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        while most[0] < 1500:
            await asyncio.sleep(0.005)
        inside[0] -= 1

    jobs = manager.create_jobs([{"job_type": "wait"}] * 1500)
    for job in jobs:
        assert manager.wait(job.id, 20).status == "completed"
    assert most[0] == 1500


def test_cancelling_an_async_job_that_does_not_check_throws_it_out(world: World) -> None:
    manager, begun, thrown = world.manager(start=1, cancel_timeout_s=0.02), threading.Event(), threading.Event()

    @manager.executor("sleeper", prefix="SL")
    async def sleeper(ctx: JobContext[Any]) -> None:
        begun.set()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            thrown.set()
            raise

    job = manager.create_job("sleeper")
    assert begun.wait(10)
    assert manager.cancel_job(job.id).status == "cancelled" and thrown.wait(10)
    until(lambda: manager.runner.abandoned_threads == 0)


def test_a_task_of_a_job_that_exits_does_not_end_the_loop_of_the_others(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    manager = world.manager(start=2)

    async def leave() -> None:
        raise SystemExit(1)

    @manager.executor("spawner", prefix="SP", max_retries=0)
    async def spawner(ctx: JobContext[Any]) -> None:
        task = asyncio.ensure_future(leave())
        await asyncio.sleep(0.05)
        assert isinstance(task.exception(), SystemExit)

    assert run(manager, "spawner").status == "completed"
    assert run(manager, "spawner").status == "completed"
    assert "it goes on" in caplog.text
