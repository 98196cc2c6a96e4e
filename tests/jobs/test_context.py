"""What executors do through their context, and that nothing of it holds without the lease."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kalamdb.database import Database
from kalamdb.errors import InvalidRequest, LeaseLost, LimitExceeded, Unavailable
from kalamdb.jobs import Completed, Job, JobContext
from kalamdb.storage import Batch
from kalamdb.storage.jobs import AttemptOutcome, Hold, JobMove, JobStatus
from kalamdb.testing.jobs import drain, open_manual
from tests.jobs.conftest import Gate, World, texts, until

Open = Callable[..., Database]


def run(db: Database, job_type: str, params: Any = None) -> Job:
    return db.jobs.wait(db.jobs.create_job(job_type, params).id, 10)


@pytest.fixture
def db(open_db: Open) -> Database:
    made = open_db(**{"jobs.cancel_timeout_s": 0.05, "jobs.retry_backoff_ms": 1})
    made.execute("CREATE SHARED TABLE t (id INT PRIMARY KEY, v TEXT)")
    return made


def rows(db: Database) -> list[tuple[Any, ...]]:
    return db.execute("SELECT id FROM t ORDER BY id").rows


def test_progress_never_goes_back_and_its_last_state_is_kept(world: World) -> None:
    manager, seen = world.manager(start=1), []

    @manager.executor("count", prefix="CO")
    def count(ctx: JobContext[Any]) -> None:
        for done in (1, 50, 20, 60):
            ctx.progress(done, 100, "rows", f"at {done}")
        progress = ctx.job.progress
        seen.append(progress.done)

    job = manager.wait(manager.create_job("count").id, 10)
    assert seen == [1] and (job.progress.done, job.progress.text) == (60, "at 60")
    assert job.progress.total == 100 and job.progress.unit == "rows"


def test_each_attempt_counts_its_progress_anew_and_finds_the_checkpoint(world: World) -> None:
    manager, seen = world.manager(start=1), []

    @manager.executor("steps", prefix="ST")
    def steps(ctx: JobContext[Any]) -> None:
        seen.append((ctx.attempt, ctx.checkpoint_state, ctx.job.progress))
        ctx.progress(90 if ctx.attempt == 1 else 10, 100)
        ctx.checkpoint({"at": ctx.attempt, "parts": (1, 2)})
        assert ctx.checkpoint_state == {"at": ctx.attempt, "parts": [1, 2]}
        if ctx.attempt == 1:
            raise RuntimeError("again")

    job = manager.wait(manager.create_job("steps").id, 10)
    assert seen == [(1, None, None), (2, {"at": 1, "parts": [1, 2]}, None)] and job.progress.done == 10
    assert [attempt.progress.done for attempt in job.attempts() if attempt.progress is not None] == [90, 10]


def test_checkpoints_are_bounded_and_plain(world: World) -> None:
    manager, seen = world.manager(start=1, checkpoint_bytes_max=50), []

    @manager.executor("big", prefix="BI")
    def big(ctx: JobContext[Any]) -> None:
        for state, kind in (("x" * 60, LimitExceeded), (object(), InvalidRequest), (2**80, InvalidRequest)):
            with pytest.raises(kind):
                ctx.checkpoint(state)
            seen.append(kind)
        ctx.checkpoint([1])

    job = manager.wait(manager.create_job("big").id, 10)
    assert job.status == "completed" and job.checkpoint == [1] and len(seen) == 3


def test_lines_of_a_job_stand_in_its_history_in_order(world: World) -> None:
    manager = world.manager(start=1)

    @manager.executor("talk", prefix="TA")
    def talk(ctx: JobContext[Any]) -> None:
        ctx.log.debug("a")
        ctx.log.info("b")
        ctx.log.warning("c")
        ctx.log.error("d")
        assert [event.text for event in ctx.events()][-4:] == ["a", "b", "c", "d"]

    job = manager.wait(manager.create_job("talk").id, 10)
    assert texts(job)[3:] == ["DEBUG a", "INFO b", "WARN c", "ERROR d", "INFO Job completed"]
    assert [event.number for event in job.events()] == list(range(1, 9))


def test_a_manager_without_a_database_says_so(world: World) -> None:
    manager = world.manager(start=1)
    manager.executor("x", prefix="XX", max_retries=0)(lambda ctx: ctx.execute("SELECT 1"))
    job = manager.wait(manager.create_job("x").id, 10)
    assert job.message == "this job manager has no database; only checks, progress and checkpoints work"
    assert Unavailable.code == "UNAVAILABLE"


def test_a_transaction_ends_the_job_with_its_effect(db: Database) -> None:
    @db.jobs.executor("once", prefix="ON")
    def once(ctx: JobContext[Any]) -> Completed:
        with ctx.transaction(complete="stored one") as tx:
            tx.execute("INSERT INTO t VALUES (1, 'a')")
        return Completed("not this")

    job = run(db, "once")
    assert (job.status, job.message) == ("completed", "stored one") and rows(db) == [(1,)]
    assert [text for text in texts(job) if "completed" in text] == ["INFO Job completed: stored one"]


def test_a_transaction_that_fails_neither_writes_nor_ends_the_job(db: Database) -> None:
    @db.jobs.executor("twice", prefix="TW")
    def twice(ctx: JobContext[Any]) -> Completed:
        try:
            with ctx.transaction(complete="never") as tx:
                tx.execute("INSERT INTO t VALUES (1, 'a')")
                raise ValueError("changed its mind")
        except ValueError:
            return Completed("went on")

    job = run(db, "twice")
    assert (job.status, job.message) == ("completed", "went on") and rows(db) == []


def test_sql_of_a_job_cannot_begin_a_transaction(db: Database) -> None:
    db.jobs.executor("x", prefix="XX", max_retries=0)(lambda ctx: ctx.execute("BEGIN; COMMIT"))
    assert "use ctx.transaction()" in run(db, "x").message


@pytest.mark.parametrize(
    "write",
    [
        lambda ctx: ctx.execute("INSERT INTO t VALUES (9, 'late')"),
        lambda ctx: ctx.execute("/* first */ INSERT INTO t VALUES (9, 'late')"),
        lambda ctx: ctx.execute("CALL create_job('stale', '{}')"),
        lambda ctx: ctx.execute("DROP TABLE t"),
        lambda ctx: ctx.insert("t", [{"id": 9, "v": "late"}]),
        lambda ctx: ctx.create_job("stale"),
        lambda ctx: ctx.transaction(complete="x").__enter__(),
    ],
)
def test_nothing_is_written_after_the_lease_was_taken_away(db: Database, write: Callable[[Any], Any]) -> None:
    gate, seen = Gate(), []

    @db.jobs.executor("stale", prefix="ST")
    def stale(ctx: JobContext[Any]) -> None:
        gate()
        try:
            write(ctx)
        except LeaseLost as exc:
            seen.append(exc)

    job = db.jobs.create_job("stale")
    gate.await_entry()
    assert db.jobs.cancel_job(job.id).status == "cancelled"
    gate.open.set()
    until(lambda: db.jobs.runner.abandoned_threads == 0)
    assert len(seen) == 1 and rows(db) == [] and len(db.jobs.list_jobs()) == 1


def test_a_transaction_begun_under_a_lease_that_went_does_not_commit(db: Database) -> None:
    gate, seen = Gate(), []

    @db.jobs.executor("stale", prefix="ST")
    def stale(ctx: JobContext[Any]) -> None:
        try:
            with ctx.transaction() as tx:
                tx.execute("INSERT INTO t VALUES (9, 'late')")
                gate()
        except LeaseLost as exc:
            seen.append(exc)

    job = db.jobs.create_job("stale")
    gate.await_entry()
    db.jobs.cancel_job(job.id)
    gate.open.set()
    until(lambda: db.jobs.runner.abandoned_threads == 0)
    assert len(seen) == 1 and rows(db) == []


def fill_all(db: Database) -> None:
    """Something that each of _STATEMENTS would change."""
    db.execute("""
        CREATE SHARED TABLE t (id INT PRIMARY KEY, v TEXT); INSERT INTO t VALUES (1, 'x');
        CREATE NAMESPACE ns; CREATE VIEW ns.v AS SELECT id FROM default.t;
        CREATE USER ann; CREATE USER dan; DROP USER dan; PAUSE QUEUE held
    """)
    db.jobs.executor("other", prefix="OT", queue="held")(lambda ctx: None)
    _, paused, ended = db.jobs.create_jobs([{"job_type": "other"} for _ in range(3)])
    db.jobs.pause_job(paused.id)
    db.jobs.cancel_job(ended.id)
    db.execute("CREATE SCHEDULE s FOR JOB other EVERY 60 SECONDS")


@pytest.fixture
def lapse() -> Iterator[Callable[[Callable[[Any], Any]], list[Batch]]]:
    """Runs a write of a job whose lease the store has taken back without telling the job; the commits it made."""
    with open_manual(limits_batch_rows_max=8) as db:
        fill_all(db)
        backend = db.context.backend
        writes: list[Callable[[Any], Any]] = []
        commits: list[Batch] = []

        @db.jobs.executor("stale", prefix="ST")
        def stale(ctx: JobContext[Any]) -> None:
            changes = {"status": JobStatus.QUEUED, "outcome": AttemptOutcome.INTERRUPTED, "hold": Hold.PAUSED}
            backend.commit(Batch(jobs=[JobMove(ctx.row.job_id, JobStatus.RUNNING, ctx.row.lease_id, changes)]))
            backend.observe(lambda batch, _: commits.append(batch))
            ctx.check()
            with pytest.raises(LeaseLost):
                writes[0](ctx)

        def run_stale(write: Callable[[Any], Any]) -> list[Batch]:
            writes.append(write)
            job = db.jobs.create_job("stale")
            drain(db)
            assert db.jobs.get_job(job.id).status == "queued" and job.id in db.ran
            return commits

        yield run_stale
        assert db.check().problems == []


def test_a_large_insert_without_the_lease_does_not_even_name_its_file(
    lapse: Callable[[Callable[[Any], Any]], list[Batch]],
) -> None:
    assert lapse(lambda ctx: ctx.insert("t", [{"id": number, "v": "late"} for number in range(20)])) == []


_STATEMENTS = """
    CREATE NAMESPACE late; ALTER NAMESPACE ns SET OPTIONS (a = 1); DROP NAMESPACE ns;
    CREATE SHARED TABLE ns.late (id INT PRIMARY KEY); ALTER TABLE t ADD COLUMN w INT; TRUNCATE TABLE t; DROP TABLE t;
    CREATE VIEW ns.late AS SELECT id FROM default.t; DROP VIEW ns.v;
    CREATE USER late; ALTER USER ann SET EMAIL 'late@example.org'; DROP USER ann; RESTORE USER dan; PURGE USER ann;
    PAUSE QUEUE q; RESUME QUEUE q; ALTER QUEUE q SET LIMIT 2;
    CREATE SCHEDULE late FOR JOB stale EVERY 60 SECONDS; ALTER SCHEDULE s PAUSE; DROP SCHEDULE s; RUN SCHEDULE s;
    STORAGE FLUSH TABLE t; STORAGE FLUSH ALL IN default; STORAGE COMPACT TABLE t;
    KILL JOB '{waiting}'; PAUSE JOB '{waiting}'; RESUME JOB '{paused}'; RETRY JOB '{ended}'; BACKUP DATABASE TO '{path}'
"""


def test_no_statement_commits_once_the_store_has_taken_the_lease_back(
    lapse: Callable[[Callable[[Any], Any]], list[Batch]], tmp_path: Path
) -> None:
    refused = []

    def write(ctx: JobContext[Any]) -> None:
        waiting, paused, ended = [
            row[0] for row in ctx.execute("SELECT job_id FROM system.jobs ORDER BY job_id LIMIT 3")
        ]
        text = _STATEMENTS.format(waiting=waiting, paused=paused, ended=ended, path=tmp_path / "backups")
        for statement in text.split(";"):
            with pytest.raises(LeaseLost):
                ctx.execute(statement)
            refused.append(statement.split()[0])
        raise LeaseLost("all were")

    assert lapse(write) == [] and len(refused) == 29


def test_a_statement_of_a_job_commits_under_its_lease_and_binds_nothing_afterwards(db: Database) -> None:
    @db.jobs.executor("builder", prefix="BU")
    def builder(ctx: JobContext[Any]) -> str:
        ctx.execute("CREATE NAMESPACE made; CREATE SHARED TABLE made.t (id INT PRIMARY KEY)")
        with ctx.transaction(complete="built") as tx:
            tx.execute("INSERT INTO made.t VALUES (2)")
        db.execute("CREATE NAMESPACE afterwards")
        with pytest.raises(LeaseLost):
            ctx.execute("DROP NAMESPACE made")
        return "unused"

    assert run(db, "builder").message == "built"
    assert db.execute("SELECT id FROM made.t").rows == [(2,)]
    assert {"made", "afterwards"} <= {row[1] for row in db.execute("SHOW NAMESPACES").rows}


def test_async_executors_await_the_database(db: Database) -> None:
    threads: list[str] = []

    @db.jobs.executor("child", prefix="CH")
    async def child(ctx: JobContext[Any]) -> None:
        threads.append(threading.current_thread().name)

    @db.jobs.executor("parent", prefix="PA")
    async def parent(ctx: JobContext[Any]) -> None:
        await ctx.aexecute("INSERT INTO t VALUES (1, 'a')")
        assert await ctx.ainsert("t", [{"id": 2, "v": "b"}]) == 1
        await ctx.acheckpoint({"at": 2})
        await ctx.acreate_job("child", {"n": 1})
        with pytest.raises(ValueError):
            async with ctx.atransaction() as tx:
                await tx.execute("INSERT INTO t VALUES (8, 'no')")
                raise ValueError
        async with ctx.atransaction(complete="all stored") as tx:
            await tx.execute("INSERT INTO t VALUES (3, 'c')")
            await tx.insert("t", [{"id": 4, "v": "d"}])
            await tx.create_job("child", {"n": 2})

    job = run(db, "parent")
    assert (job.status, job.message, job.checkpoint) == ("completed", "all stored", {"at": 2})
    assert rows(db) == [(1,), (2,), (3,), (4,)]
    children = db.jobs.list_jobs(job_type="child")
    assert [db.jobs.wait(one.id, 10).status for one in children] == ["completed"] * 2
    assert set(threads) == {"kalamdb-jobs-async"}
