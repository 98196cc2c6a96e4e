"""What tests of applications use: jobs that run in `drain` only, a clock that the test moves."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kalamdb.jobs import Completed, Every, JobContext, Retry, Snooze
from kalamdb.testing.clock import SimulatedClock
from kalamdb.testing.jobs import ManualDatabase, assert_created, drain, open_manual
from tests.jobs import in_process


@pytest.fixture
def clock() -> SimulatedClock:
    return SimulatedClock()


@pytest.fixture
def db(clock: SimulatedClock) -> Iterator[ManualDatabase]:
    with open_manual(clock=clock) as opened:
        yield opened


def test_jobs_wait_for_drain_and_run_in_its_thread(db: ManualDatabase) -> None:
    threads = []

    @db.jobs.executor("first", prefix="FI")
    def first(ctx: JobContext[dict[str, Any]]) -> Completed:
        threads.append(threading.current_thread())
        ctx.create_job("second", {"of": ctx.job.id})
        return Completed("one")

    @db.jobs.executor("second", prefix="SN")
    async def second(ctx: JobContext[dict[str, Any]]) -> Completed:
        threads.append(threading.current_thread())
        return Completed("two")

    job = db.jobs.create_job("first")
    assert db.jobs.get_job(job.id).status == "new" and threads == []
    ended = drain(db)
    assert [(one.job_type, one.status, one.message) for one in ended] == [
        ("first", "completed", "one"), ("second", "completed", "two"),
    ]  # fmt: skip
    assert threads == [threading.current_thread()] * 2
    assert drain(db) == []
    assert db.execute("SELECT count(*) FROM system.jobs WHERE status = 'completed'").scalar() == 2


def test_a_retry_comes_when_the_clock_has_moved(db: ManualDatabase, clock: SimulatedClock) -> None:
    @db.jobs.executor("later", prefix="LA")
    def later(ctx: JobContext[dict[str, Any]]) -> Retry | Completed:
        return Retry(60.0, "not yet") if ctx.attempt == 1 else Completed("now")

    db.jobs.create_job("later")
    assert [job.status for job in drain(db)] == ["retrying"]
    clock.advance(59)
    assert drain(db) == []
    clock.advance(1)
    assert [job.message for job in drain(db)] == ["now"]


def test_schedules_fire_in_drain_when_they_are_switched_on(clock: SimulatedClock) -> None:
    with open_manual(clock=clock, jobs_schedules_enabled=True) as db:
        db.jobs.executor("tick", prefix="TI", schedule=Every(10))(lambda ctx: None)
        drain(db)
        clock.advance(10)
        assert [job.job_type for job in drain(db)] == ["tick"]


def test_statements_that_make_jobs_are_drained_too(db: ManualDatabase) -> None:
    db.execute("CREATE NAMESPACE app; CREATE TABLE app.t (id INT PRIMARY KEY); INSERT INTO app.t VALUES (1)")
    db.execute("STORAGE FLUSH TABLE app.t")
    assert [job.status for job in drain(db)] == ["completed"]
    assert db.execute("SELECT * FROM app.t").rows == [(1,)]


def test_a_job_that_never_rests_is_named(db: ManualDatabase) -> None:
    db.jobs.executor("again", prefix="AG")(lambda ctx: Snooze(0.0))
    job = db.jobs.create_job("again")
    with pytest.raises(AssertionError, match=rf"5 attempts were made .* the last was of '{job.id}'"):
        drain(db, attempts_max=5)


def test_an_executor_of_a_process_has_one_here_too(db: ManualDatabase) -> None:
    db.jobs.executor("end", prefix="EN", run_in="process", max_retries=0)(in_process.end)
    db.jobs.create_job("end", {"how": "exit"})
    assert [job.message for job in drain(db)] == ["the process of the job ended with exit code 7"]


def test_assert_created_finds_by_some_parameters_and_lists_what_there_is(db: ManualDatabase) -> None:
    db.jobs.executor("mail", prefix="MA")(lambda ctx: None)
    first = db.jobs.create_job("mail", {"to": "anna", "kind": "hello"})
    db.jobs.create_job("mail", {"to": "bert"})
    assert assert_created(db, "mail", to="anna").id == first.id
    drain(db)
    assert assert_created(db, "mail", to="anna", kind="hello").status == "completed"
    with pytest.raises(AssertionError) as caught:
        assert_created(db, "mail", to="carl")
    assert "no 'mail' job with {'to': 'carl'} was created" in str(caught.value) and first.id in str(caught.value)
    with pytest.raises(AssertionError, match="none"):
        assert_created(db, "flush")


def test_what_waits_survives_in_a_directory(tmp_path: Path, clock: SimulatedClock) -> None:
    for expected in ([], ["mail"]):
        with open_manual(tmp_path / "data", clock=clock) as db:
            db.jobs.executor("mail", prefix="MA")(lambda ctx: None)
            if expected:
                assert [job.job_type for job in drain(db)] == expected
            else:
                db.jobs.create_job("mail")
