"""`aconnect`: the calls of a database, awaitable."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import kalamdb
from kalamdb.jobs import JobContext

Body = Callable[[kalamdb.AsyncDatabase], Awaitable[None]]
SLOW = (
    "SELECT a.value * b.value FROM generate_series(1, 100000) a, generate_series(1, 100000) b WHERE a.value < b.value"
)


def run(body: Body, **settings: Any) -> None:
    """Run `body` on a loop of its own over a database in memory."""

    async def main() -> None:
        quiet: dict[str, Any] = {"flush.scheduler_enabled": False, "compaction.enabled": False}
        async with await kalamdb.aconnect(":memory:", **quiet, **settings) as db:
            await db.execute("CREATE NAMESPACE app; CREATE USER TABLE app.t (id INT PRIMARY KEY, v TEXT)")
            await body(db)

    asyncio.run(asyncio.wait_for(main(), 50))


def test_statements_inserts_and_sessions_are_awaited() -> None:
    async def body(db: kalamdb.AsyncDatabase) -> None:
        assert (await db.execute("INSERT INTO app.t VALUES ($1, $2)", [1, "a"], user="ann")).row_count == 1
        assert await db.insert("app.t", [{"id": 2, "v": "b"}], user="ann") == 1
        ann = db.session(user="ann", namespace="app")
        assert await ann.insert("t", [(3, "c")]) == 1
        assert (await ann.execute("SELECT id, CURRENT_USER FROM t ORDER BY id LIMIT 1")).rows == [(1, "ann")]
        assert (await db.execute("SELECT count(*) FROM app.t")).scalar() == 0
        async with ann.stream("SELECT id FROM t ORDER BY id") as batches:
            assert [value async for batch in batches for value in batch.column("id").to_pylist()] == [1, 2, 3]
        async with ann.transaction() as tx:
            await tx.execute("DELETE FROM t WHERE id = 3")
        assert (await db.check()).ok

    run(body)


def test_errors_come_as_they_are() -> None:
    async def body(db: kalamdb.AsyncDatabase) -> None:
        with pytest.raises(kalamdb.NotFound, match=r"Table 'app\.nope' does not exist"):
            await db.execute("SELECT * FROM app.nope")
        with pytest.raises(kalamdb.InvalidRequest):
            await db.insert("app.t", [{"nope": 1}])
        with pytest.raises(kalamdb.Denied):
            await db.session(role="user").execute("SHOW ALL")
        with pytest.raises(kalamdb.InvalidRequest):
            async with db.stream("DELETE FROM app.t WHERE true"):
                pass

    run(body)


def test_a_transaction_commits_rolls_back_and_conflicts() -> None:
    async def body(db: kalamdb.AsyncDatabase) -> None:
        async with db.transaction(user="ann") as tx:
            await tx.execute("INSERT INTO app.t VALUES (1, 'a')")
            assert await tx.insert("app.t", [(2, "b")]) == 1
            assert (await tx.execute("SELECT count(*) FROM app.t")).scalar() == 2
            assert (await db.execute("SELECT count(*) FROM app.t", user="ann")).scalar() == 0
        with pytest.raises(RuntimeError, match="stop"):
            async with db.transaction(user="ann") as tx:
                await tx.execute("DELETE FROM app.t WHERE true")
                raise RuntimeError("stop")
        with pytest.raises(kalamdb.TransactionConflict):
            async with db.transaction(user="ann") as tx:
                await tx.execute("UPDATE app.t SET v = 'x' WHERE id = 1")
                await db.execute("UPDATE app.t SET v = 'y' WHERE id = 1", user="ann")
        async with db.transaction(user="ann") as tx:
            await tx.execute("DELETE FROM app.t WHERE true")
            await tx.rollback()
        assert (await db.execute("SELECT v FROM app.t ORDER BY id", user="ann")).rows == [("y",), ("b",)]
        assert (await db.execute("SELECT * FROM system.transactions")).rows == []

    run(body)


def test_many_tasks_share_few_threads() -> None:
    async def body(db: kalamdb.AsyncDatabase) -> None:
        async def add(number: int) -> None:
            await db.execute("INSERT INTO app.t VALUES ($1, 'x')", [number], user=f"u{number % 5}")

        await asyncio.gather(*(add(number) for number in range(60)))
        counts = await asyncio.gather(*(db.execute("SELECT count(*) FROM app.t", user=f"u{n}") for n in range(5)))
        assert [count.scalar() for count in counts] == [12] * 5
        threads = [one for one in threading.enumerate() if one.name.startswith("kalamdb-async")]
        assert len(threads) <= 3

    run(body, threads_max=3)


def test_the_loop_goes_on_while_a_query_runs_and_a_cancelled_one_stops() -> None:
    async def body(db: kalamdb.AsyncDatabase) -> None:
        slow = [asyncio.create_task(db.execute(SLOW)) for _ in range(2)]
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert not any(task.done() for task in slow)
        for task in slow:
            task.cancel()
        assert all(
            isinstance(end, asyncio.CancelledError) for end in await asyncio.gather(*slow, return_exceptions=True)
        )
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await db.execute(SLOW)
        with pytest.raises(kalamdb.Timeout):
            await db.execute(SLOW, timeout_s=0.02)
        await db.execute("INSERT INTO app.t VALUES (1, 'after')")
        assert (await db.execute("SELECT v FROM app.t")).rows == [("after",)]

    run(body, threads_max=2)


def test_a_transaction_whose_task_is_cancelled_leaves_nothing() -> None:
    async def body(db: kalamdb.AsyncDatabase) -> None:
        inside = asyncio.Event()

        async def work() -> None:
            async with db.transaction() as tx:
                await tx.execute("INSERT INTO app.t VALUES (1, 'lost')")
                inside.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(work())
        await inside.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for delay in range(6):
            task = asyncio.create_task(work())
            for _ in range(delay):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert (await db.execute("SELECT count(*) FROM app.t")).scalar() == 0
        assert (await db.execute("SELECT * FROM system.transactions")).rows == []

    run(body)


def test_jobs_are_created_waited_for_and_cancelled() -> None:
    async def body(db: kalamdb.AsyncDatabase) -> None:
        go = threading.Event()

        @db.jobs.manager.executor("hold", prefix="HO")
        def hold(ctx: JobContext[dict[str, Any]]) -> None:
            while not go.is_set():
                ctx.check()

        await db.execute("INSERT INTO app.t VALUES (1, 'x')")
        flushed = await db.jobs.create_job("flush", {"table_id": "app.t"})
        assert (await db.jobs.wait(flushed.id, 20)).status == "completed"
        held = [await db.jobs.create_job("hold", {"n": n}) for n in range(4)]
        with pytest.raises(kalamdb.Timeout, match=f"'{held[0].id}' is still"):
            await db.jobs.wait(held[0].id, 0.05)
        waiting = [asyncio.create_task(db.jobs.wait(job.id)) for job in held for _ in range(5)]
        assert (await db.jobs.cancel_job(held[0].id)).status == "cancelled"
        assert len(await db.jobs.list_jobs(job_type="hold")) == 4
        go.set()
        ended = await asyncio.gather(*waiting)
        assert sorted({str(job.status) for job in ended}) == ["cancelled", "completed"]
        assert (await db.jobs.get_job(held[1].id)).status == "completed"
        with pytest.raises(kalamdb.NotFound):
            await db.jobs.wait("HO-nope")
        async with db.transaction() as tx:
            await tx.create_job("hold")
        assert len(await db.jobs.list_jobs(job_type="hold")) == 5

    run(body, threads_max=2)


def test_closing_ends_what_waits_and_refuses_what_comes(tmp_path: Path) -> None:
    async def main() -> None:
        db = await kalamdb.aconnect(tmp_path / "data", shutdown_timeout_s=0.1)
        started = threading.Event()

        @db.jobs.manager.executor("hold", prefix="HO")
        def hold(ctx: JobContext[dict[str, Any]]) -> None:
            started.set()
            while True:
                ctx.check()

        job = await db.jobs.create_job("hold")
        await asyncio.to_thread(started.wait, 10)
        waiting = asyncio.create_task(db.jobs.wait(job.id))
        await asyncio.sleep(0)
        await db.close()
        with pytest.raises(kalamdb.KalamDbError):
            await waiting
        await db.close()
        with pytest.raises(kalamdb.Closed):
            await db.execute("SELECT 1")
        with pytest.raises(kalamdb.Closed):
            await db.insert("app.t", [])
        with pytest.raises(kalamdb.Closed):
            await db.jobs.get_job(job.id)
        async with await kalamdb.aconnect(tmp_path / "data") as again:
            assert again.database.execute("SELECT 1").scalar() == 1
            with pytest.raises(kalamdb.DirectoryLocked):
                await kalamdb.aconnect(tmp_path / "data")
        with pytest.raises(kalamdb.InvalidRequest, match="threads_max is 0"):
            await kalamdb.aconnect(":memory:", threads_max=0)

    asyncio.run(asyncio.wait_for(main(), 50))
