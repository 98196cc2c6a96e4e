"""Creating, finding, waiting for and purging jobs; what is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

import kalamdb
from kalamdb.database import Database
from kalamdb.errors import IdempotencyConflict, InvalidRequest, LimitExceeded, NotFound, Timeout
from kalamdb.jobs import JobContext, JobExecutor, JobRequest
from kalamdb.jobs.model import JobIds
from kalamdb.storage.jobs import JobStatus
from kalamdb.testing.clock import SimulatedClock
from tests.jobs.conftest import QUIET, Gate, World, texts, until

Open = Callable[..., Database]


class Circular(list[Any]):
    """JSON has no form for it."""

    def __init__(self) -> None:
        super().__init__([self])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"job_type": "Bad Type"}, "must be lower-case letters"),
        ({"params": 5}, "must be an object, got int"),
        ({"params": {"x": object()}}, "no JSON form"),
        ({"params": {"x": 2**70}}, "no JSON form"),
        ({"params": {"x": Circular()}}, "no JSON form"),
        ({"params": {"x": "\ud800"}}, "no JSON form"),
        ({"params": {"x": "y" * 300_000}}, "at most 262144 are allowed"),
        ({"idempotency_key": ""}, "1 to 512 characters"),
        ({"idempotency_key": "k" * 513}, "1 to 512 characters"),
        ({"idempotency_key": "\udc00"}, "not valid Unicode"),
        ({"idempotency_key": 5}, "1 to 512 characters"),
        ({"max_retries": -1}, "0 or more"),
        ({"max_retries": "3"}, "0 to 1000000"),
        ({"priority": 1001}, "-1000 to 1000"),
        ({"priority": 1.5}, "-1000 to 1000"),
        ({"timeout_s": 0}, "above 0"),
        ({"timeout_s": float("nan")}, "above 0"),
        ({"queue": ""}, "printable name"),
        ({"queue": "a\nb"}, "printable name"),
        ({"run_at": datetime(2026, 1, 1)}, "has no time zone"),
        ({"run_at": 17}, "is not a time"),
        ({"on_conflict": "ignore"}, "not one of error, return"),
    ],
)
def test_bad_requests_are_refused_and_leave_nothing(world: World, options: dict[str, Any], said: str) -> None:
    manager = world.manager()
    before = world.backend.head()
    with pytest.raises((InvalidRequest, LimitExceeded)) as caught:
        manager.create_job(**{"job_type": "x", "allow_unknown": True, **options})
    assert said in str(caught.value) or said.replace("0 or more", "0 to") in str(caught.value)
    assert world.backend.head() == before and manager.list_jobs() == []


def test_an_unknown_type_is_refused_unless_it_may_be(world: World) -> None:
    manager = world.manager()
    with pytest.raises(NotFound, match="no executor for job type 'x'; register one or pass allow_unknown=True"):
        manager.create_job("x")
    assert manager.create_job("x", allow_unknown=True).id.startswith("UN-")


def test_parameters_read_as_their_json(world: World) -> None:
    manager = world.manager()
    given = {"at": datetime(2026, 1, 2, tzinfo=UTC), "raw": b"\x00\xff", "n": (1, 2), 5: "five", "big": 2**63}
    job = manager.create_job("x", given, allow_unknown=True)
    assert job.parameters == {"at": "2026-01-02T00:00:00Z", "raw": "AP8=", "n": [1, 2], "5": "five", "big": 2**63}
    assert manager.get_job(job.id).parameters == job.parameters
    assert manager.create_job("x", ["a", "b"], allow_unknown=True).parameters == {"arg0": "a", "arg1": "b"}


def test_waiting_jobs_are_bounded(world: World) -> None:
    manager = world.manager(queued_max=3)
    manager.create_job("x", allow_unknown=True)
    with pytest.raises(LimitExceeded, match=r"at most 3 are allowed \(jobs.queued_max\)"):
        manager.create_jobs([JobRequest(job_type="x", allow_unknown=True)] * 3)
    assert len(manager.list_jobs()) == 1
    assert len(manager.create_jobs([{"job_type": "x", "allow_unknown": True}] * 2)) == 2
    with pytest.raises(LimitExceeded, match="at most 10000 are allowed"):
        manager.create_jobs([{"job_type": "x"}] * 10_001)


def test_many_jobs_are_created_all_or_none(world: World) -> None:
    manager = world.manager()
    one = {"job_type": "x", "allow_unknown": True}
    for bad in ({"job_type": "y"}, {**one, "colour": "red"}, {**one, "priority": 5000}):
        with pytest.raises((NotFound, InvalidRequest)):
            manager.create_jobs([one, bad])
    with pytest.raises(IdempotencyConflict) as caught:
        manager.create_jobs([{**one, "idempotency_key": "k"}, {**one, "idempotency_key": "k"}])
    assert caught.value.job.idempotency_key == "k"
    assert manager.list_jobs() == [] and manager.create_jobs([]) == []
    jobs = manager.create_jobs([{**one, "params": {"n": n}} for n in range(50)])
    assert [job.parameters["n"] for job in jobs] == list(range(50))
    assert [job.id for job in manager.list_jobs()] == [job.id for job in jobs] == sorted(job.id for job in jobs)


def test_one_of_many_racing_creators_gets_the_key(world: World) -> None:
    manager, start = world.manager(), threading.Barrier(8)
    outcomes: list[str] = []

    def create() -> None:
        start.wait()
        try:
            outcomes.append(manager.create_job("x", None, "k", allow_unknown=True).id)
        except IdempotencyConflict as conflict:
            outcomes.append(f"after {conflict.job.id}")

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    winner = next(one for one in outcomes if not one.startswith("after"))
    assert sorted(outcomes) == sorted([winner] + [f"after {winner}"] * 7)


def test_none_takes_the_policy_of_the_executor(world: World) -> None:
    manager = world.manager(max_retries=7)

    class Own(JobExecutor[dict[str, Any]]):
        job_type, prefix, queue, priority, max_retries, timeout_s = "own", "OW", "slow", 9, 2, 4.0

        def idempotency_key(self, params: dict[str, Any], table_uid: int | None) -> str:
            return f"own:{params['n']}"

    manager.registry.register(Own())
    job = manager.create_job("own", {"n": 1})
    assert (job.queue, job.priority, job.max_retries, job.timeout_s) == ("slow", 9, 2, 4.0)
    assert job.idempotency_key == "own:1"
    with pytest.raises(IdempotencyConflict):
        manager.create_job("own", {"n": 1})
    other = manager.create_job("own", {"n": 1}, "mine", queue="q", priority=-1, max_retries=0, timeout_s=1)
    assert (other.queue, other.priority, other.max_retries, other.timeout_s) == ("q", -1, 0, 1.0)
    assert manager.create_job("x", allow_unknown=True).max_retries == 7


def test_jobs_are_listed_by_each_filter(world: World) -> None:
    manager = world.manager()
    first = manager.create_job("a", None, "k", allow_unknown=True, queue="q", priority=3)
    second = manager.create_job("b", allow_unknown=True, priority=5)
    manager.cancel_job(second.id)
    ids = lambda **wanted: [job.id for job in manager.list_jobs(**wanted)]  # noqa: E731
    assert ids(job_type="a") == ids(status="NEW") == ids(queue="q") == ids(idempotency_key="k") == [first.id]
    assert ids(status=["cancelled", "failed"]) == [second.id] and ids(limit=1) == [first.id] and ids(limit=0) == []
    assert ids(sort_by="priority", descending=True) == [second.id, first.id]
    later = first.created_at + timedelta(days=1)
    assert ids(created_after=later) == [] and ids(created_before=later, limit=None) == [first.id, second.id]
    for wrong in ({"status": "done"}, {"sort_by": "colour"}, {"limit": -1}):
        with pytest.raises(InvalidRequest):
            manager.list_jobs(**wrong)


def test_waiting_ends_with_the_job_the_time_or_the_name(world: World) -> None:
    manager, gate = world.manager(start=1), Gate()
    manager.executor("held", prefix="HE")(gate)
    job = manager.create_job("held")
    with pytest.raises(Timeout, match=f"job '{job.id}' is still running after 0.05 s"):
        manager.wait(job.id, 0.05)
    with pytest.raises(NotFound, match="Job 'HE-none' does not exist"):
        manager.wait("HE-none")
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(manager.wait(job.id, 10).status)) for _ in range(3)]
    for thread in threads:
        thread.start()
    gate.open.set()
    for thread in threads:
        thread.join(10)
    assert found == ["completed"] * 3 and manager.wait(job.id).status == "completed"
    assert manager._waiters == {}


def test_old_jobs_are_purged_by_state_and_age(world: World) -> None:
    manager = world.manager(start=1)
    manager.executor("good", prefix="GO")(lambda ctx: None)
    manager.executor("bad", prefix="BA", max_retries=0)(lambda ctx: 1 / 0)
    for job_type in ("good", "good", "bad"):
        manager.wait(manager.create_job(job_type).id, 10)
    waiting = manager.create_job("later", allow_unknown=True)
    assert manager.purge(finished_before=datetime(2020, 1, 1, tzinfo=UTC)) == 0
    assert manager.purge(status="completed", limit=1) == 1
    assert manager.purge() == 2 and [job.id for job in manager.list_jobs()] == [waiting.id]
    with pytest.raises(InvalidRequest, match="status 'running' is not one of"):
        manager.purge(status="running")


def test_history_is_bounded_by_age_and_number(world: World) -> None:
    manager = world.manager(start=4, history_completed_days=0.0, history_rows_max=2)
    manager.executor("good", prefix="GO")(lambda ctx: None)
    manager.executor("bad", prefix="BA", max_retries=0)(lambda ctx: 1 / 0)
    jobs = manager.create_jobs([{"job_type": kind} for kind in ("good", "bad") for _ in range(5)])
    for job in jobs:
        manager.wait(job.id, 10)
    until(lambda: not manager.purge_history() and world.backend.jobs.count(JobStatus.COMPLETED) == 0)
    left = manager.list_jobs(status="failed")
    assert [job.id for job in left] == [job.id for job in jobs[8:]]
    assert world.backend.jobs.events(jobs[0].id) == [] and len(texts(left[0])) == 4


def test_ids_sort_by_creation_and_never_repeat() -> None:
    ids = JobIds(SimulatedClock())
    made = [ids.next("FL") for _ in range(250_000)]
    assert made == sorted(set(made)) and all(len(one) == 13 for one in made)


def test_a_job_in_a_transaction_lives_and_dies_with_it(open_db: Open) -> None:
    db = open_db()
    db.execute("CREATE SHARED TABLE t (id INT PRIMARY KEY)")
    db.jobs.executor("quick", prefix="QU")(lambda ctx: None)
    with pytest.raises(ValueError), db.transaction() as tx:
        tx.execute("INSERT INTO t VALUES (1)")
        tx.create_job("quick", {"n": 1})
        raise ValueError
    assert db.jobs.list_jobs() == []
    with db.transaction() as tx:
        tx.execute("INSERT INTO t VALUES (1)")
        tx.create_job("quick", {"n": 2})
        tx.execute("""CALL create_job('quick', '{"n": 3}')""")
        assert db.jobs.list_jobs() == []
    jobs = db.jobs.list_jobs()
    assert [db.jobs.wait(job.id, 10).parameters["n"] for job in jobs] == [2, 3]
    with pytest.raises(kalamdb.KalamDbError):
        db.execute("BEGIN; CALL create_job('quick'); INSERT INTO t VALUES (1); COMMIT")
    assert len(db.jobs.list_jobs()) == 2


# SQL


def test_jobs_are_steered_in_sql(open_db: Open) -> None:
    db = open_db()
    db.jobs.executor("quick", prefix="QU")(lambda ctx: None)
    db.execute("PAUSE QUEUE default")
    message = db.execute("CALL create_job('quick', $1)", ['{"n": 1}']).message
    job_id = message.rsplit(" ", 1)[1]
    assert message == f"Job created. Job ID: {job_id}" and db.jobs.get_job(job_id).created_by == "root"
    assert db.execute(f"PAUSE JOB '{job_id}'").message == f"Job {job_id} paused"
    reasons = db.execute(f"EXPLAIN JOB '{job_id}'")
    assert reasons.columns == ["job_id", "reason", "detail", "until"]
    assert [row[1] for row in reasons.rows] == ["paused", "queue paused"]
    assert db.execute("SELECT queue, paused, paused_by FROM system.job_queues").rows == [("default", True, "root")]
    assert db.execute(f"RESUME JOB {job_id}").message == f"Job {job_id} resumed"
    assert db.execute(f"KILL JOB '{job_id}'").message == f"Job {job_id} killed: cancelled"
    assert db.execute(f'RETRY JOB "{job_id}"').message == f"Job {job_id} queued again"
    assert db.execute("RESUME QUEUE 'default'").message == "Queue default resumed"
    assert db.jobs.wait(job_id, 10).status == "completed"
    assert db.execute(f"EXPLAIN JOB '{job_id}'").rows[0][1:3] == ("ended", "it is completed")
    shown = db.execute(f"SHOW JOB '{job_id}'").dicts()[0]
    assert (shown["job_id"], shown["status"], shown["hold"]) == (job_id, "completed", None)
    assert len(db.execute("SHOW JOBS WHERE status = 'completed'").rows) == 1
    attempts = db.execute(f"SELECT attempt, outcome FROM system.job_attempts WHERE job_id = '{job_id}'").rows
    assert attempts == [(1, "completed")]
    events = db.execute(f"SELECT event_number, message FROM system.job_events WHERE job_id = '{job_id}'").rows
    assert [number for number, _ in events] == list(range(1, len(events) + 1))
    executors = db.execute("SELECT job_type, prefix, queue, on_interrupt FROM system.job_executors").rows
    assert ("quick", "QU", "default", "retry") in executors and ("flush", "FL", "maintenance", "requeue") in executors


def test_a_queue_is_limited_in_sql_and_the_limit_survives_reopening(open_db: Open) -> None:
    db = open_db()
    gate = Gate()
    db.jobs.executor("held", prefix="HE", queue="mail")(gate)
    assert db.execute("ALTER QUEUE 'mail' SET LIMIT 2").message == "Queue mail runs at most 2 jobs at once"
    limits = "SELECT queue, max_concurrent FROM system.job_queues WHERE queue = 'mail'"
    assert db.execute(limits).rows == [("mail", 2)]
    jobs = db.jobs.create_jobs([{"job_type": "held"} for _ in range(3)])
    gate.await_entry(2)
    assert [row[1] for row in db.execute(f"EXPLAIN JOB '{jobs[2].id}'").rows] == ["queue limit"]
    assert db.execute("ALTER QUEUE mail DROP LIMIT").message == "Queue mail has no limit"
    gate.await_entry()
    gate.open.set()
    assert [db.jobs.wait(job.id, 10).status for job in jobs] == ["completed"] * 3
    db.execute("ALTER QUEUE mail SET LIMIT 1")
    db.close()
    assert open_db().execute(limits).rows == [("mail", 1)]


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("KILL JOB 'FL-none'", "Job 'FL-none' does not exist"),
        ("PAUSE JOB 'FL-none'", "does not exist"),
        ("EXPLAIN JOB 'FL-none'", "does not exist"),
        ("SHOW JOB 'FL-none'", "does not exist"),
        ("RETRY QUEUE q", "JOB"),
        ("CALL nothing('x')", "there is no procedure 'nothing'"),
        ("CALL create_job('flush', '{')", "are not JSON"),
        ("CALL create_job('flush', '[1]')", "a JSON object"),
        ("CALL create_job(5)", "the job type, as a text"),
        ("CALL create_job('nobody')", "no executor for job type 'nobody'"),
        ("CALL create_job('flush', '{}')", "do not fit"),
        ("PAUSE JOB", "a job id"),
        ("ALTER QUEUE q SET LIMIT 0", "1 or more is allowed (pause the queue for 0)"),
        ("ALTER QUEUE q SET LIMIT -1", "1 or more is allowed"),
        ("ALTER QUEUE q SET LIMIT 1.5", "a number of jobs"),
        ("ALTER QUEUE q SET LIMIT", "a number of jobs"),
        ("ALTER QUEUE q DROP LIMIT 2", "stands where the end"),
        ("ALTER QUEUE '' SET LIMIT 2", "a printable name"),
        ("ALTER QUEUE q LIMIT 2", "SET"),
    ],
)
def test_bad_statements_about_jobs_are_refused(sql: str, said: str) -> None:
    with kalamdb.connect(":memory:", **QUIET) as db:
        with pytest.raises(kalamdb.KalamDbError) as caught:
            db.execute(sql)
        assert said in str(caught.value) and db.jobs.list_jobs() == []


def test_only_dba_steers_jobs() -> None:
    with kalamdb.connect(":memory:", **QUIET) as db:
        for sql in (
            "CALL create_job('flush')", "PAUSE QUEUE q", "ALTER QUEUE q DROP LIMIT", "EXPLAIN JOB 'x'", "RETRY JOB 'x'",
            "KILL JOB 'x'",
        ):  # fmt: skip
            with pytest.raises(kalamdb.Denied):
                db.execute(sql, role="service")


# EXPLAIN JOB


def kinds(manager: Any, job_id: str) -> list[str]:
    return [str(reason.kind) for reason in manager.explain_job(job_id)]


def test_each_cause_is_named_alone_and_the_job_starts_when_it_is_gone(world: World) -> None:
    manager, gate = world.manager(), Gate()
    manager.executor("held", prefix="HE", concurrency_key="k")(gate)
    manager.executor("quick", prefix="QU", concurrency_key="k")(lambda ctx: None)
    job = manager.create_job("quick")
    assert kinds(manager, job.id) == ["not started"]
    manager.pause_queue("default")
    manager.run_loop(1)
    assert kinds(manager, job.id) == ["queue paused"]
    manager.limit_queue("other", 1)
    holder = manager.create_job("held", queue="other")
    gate.await_entry()
    manager.resume_queue("default")
    found = manager.explain_job(job.id)
    assert [str(one.kind) for one in found] == ["concurrency key", "no free slot"]
    assert f"job '{holder.id}' runs" in found[0].detail and holder.id in found[1].detail
    assert kinds(manager, manager.create_job("held", queue="other").id)[0] == "queue limit"
    gate.open.set()
    assert manager.wait(job.id, 10).status == "completed" and kinds(manager, job.id) == ["ended"]


def test_a_job_that_waits_for_its_time_says_until_when(world: World) -> None:
    manager = world.manager(start=1, retry_backoff_ms=60_000)
    manager.executor("bad", prefix="BA")(lambda ctx: 1 / 0)
    at = datetime(2100, 1, 1, tzinfo=UTC)
    found = manager.explain_job(manager.create_job("bad", run_at=at).id)
    assert [(str(one.kind), one.until) for one in found] == [("scheduled", at)]
    job = manager.create_job("bad")
    until(lambda: manager.get_job(job.id).status == "retrying")
    found = manager.explain_job(job.id)
    assert [str(one.kind) for one in found] == ["retry wait"] and found[0].until == manager.get_job(job.id).run_at
    assert "ZeroDivisionError: division by zero; retry 1 of 3" in found[0].detail


def test_a_job_without_executor_or_that_runs_says_so(world: World) -> None:
    manager, gate = world.manager(start=1), Gate()
    lost = manager.create_job("nobody", allow_unknown=True)
    assert kinds(manager, lost.id) == ["no executor"]
    manager.executor("held", prefix="HE")(gate)
    job = manager.create_job("held")
    gate.await_entry()
    assert kinds(manager, job.id) == ["running"]
    gate.open.set()


def test_the_context_creates_jobs_under_its_lease(world: World) -> None:
    manager = world.manager(start=2)
    manager.executor("child", prefix="CH")(lambda ctx: None)

    @manager.executor("parent", prefix="PR")
    def parent(ctx: JobContext[Any]) -> None:
        for _ in range(2):
            ctx.create_job("child", {"of": ctx.job.id}, f"child of {ctx.job.id}", on_conflict="return")

    job = manager.wait(manager.create_job("parent").id, 10)
    children = manager.list_jobs(job_type="child")
    assert [child.parameters["of"] for child in children] == [job.id]
