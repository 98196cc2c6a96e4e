"""Slots of the query threads are given fairly, and one wait for the disk serves all."""

from __future__ import annotations

import asyncio
import threading

import pytest

from kalamdb.errors import RateLimited, Unavailable
from kalamdb.server.execute import is_quick
from kalamdb.server.lanes import DurableWaits, QuerySlots
from kalamdb.sql.parse import parse
from kalamdb.sql.tokens import SqlLimits
from kalamdb.storage import Commit


def test_users_that_wait_take_turns_and_none_holds_more_than_half() -> None:
    async def run() -> list[str]:
        slots = QuerySlots(4, queue_max=100, wait_s=10)
        order: list[str] = []

        async def work(user: str) -> None:
            await slots.acquire(user)
            order.append(user)

        tasks = [asyncio.ensure_future(work(user)) for user in ["a"] * 6 + ["b"] * 3 + ["c"]]
        await asyncio.sleep(0)
        assert order == ["a", "a", "b", "b"], "a has its half although two slots were free"
        for user in ("a", "b", "a", "a", "b", "c", "a", "a"):
            slots.release(user)
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        return order[4:]

    order = asyncio.run(run())
    assert order[:3] == ["a", "b", "c"] or order[:3] == ["a", "c", "b"]
    assert sorted(order) == ["a"] * 4 + ["b"] + ["c"]


def test_one_user_has_at_least_one_slot_and_who_waits_too_long_or_in_too_long_a_queue_is_refused() -> None:
    async def run() -> None:
        slots = QuerySlots(1, queue_max=1, wait_s=0.01)
        await slots.acquire("a")
        waiting = asyncio.ensure_future(slots.acquire("a"))
        await asyncio.sleep(0)
        with pytest.raises(RateLimited, match="execution.queue_max"):
            await slots.acquire("b")
        with pytest.raises(RateLimited, match="execution.queue_wait_s"):
            await waiting
        assert slots.queued == 0
        slots.release("a")
        await slots.acquire("b")

    asyncio.run(run())


def test_a_wait_that_is_given_up_gives_its_slot_to_the_next() -> None:
    async def run() -> None:
        slots = QuerySlots(1, queue_max=9, wait_s=10)
        await slots.acquire("a")
        first, second = (asyncio.ensure_future(slots.acquire(user)) for user in "bc")
        await asyncio.sleep(0)
        slots.release("a")
        first.cancel()
        await asyncio.wait_for(second, 5)
        assert first.cancelled()

    asyncio.run(run())


def test_all_that_wait_for_the_disk_are_served_by_one_wait_and_share_its_error() -> None:
    async def run() -> list[int]:
        waited: list[int] = []
        gate = threading.Event()

        def wait(commit: Commit) -> None:
            gate.wait(10)
            waited.append(commit.seq)
            if commit.seq == 99:
                raise Unavailable("the disk is full")

        waits = DurableWaits(wait, asyncio.get_running_loop())
        futures = [waits.until_durable(Commit(seq, (), ())) for seq in range(1, 9)]
        gate.set()
        await asyncio.gather(*futures)
        with pytest.raises(Unavailable):
            await waits.until_durable(Commit(99, (), ()))
        waits.stop()
        return waited

    waited = asyncio.run(run())
    assert waited[-2:] == [8, 99] and len(waited) <= 3


@pytest.mark.parametrize(
    "text, quick",
    [
        ("SELECT * FROM t WHERE id = 1", True),
        ("INSERT INTO t VALUES (1), (2)", True),
        ("UPDATE t SET n = 1 WHERE id = 1", True),
        ("DELETE FROM t WHERE id = $1", True),
        ("SELECT * FROM t", False),
        ("SELECT COUNT(*) FROM t WHERE id = 1", False),
        ("INSERT INTO t SELECT * FROM u", False),
        ("DELETE FROM t WHERE n > 1", False),
        ("UPDATE t SET n = 1 WHERE id = 1 RETURNING n", False),
        ("SELECT * FROM t WHERE id = 1; SELECT 1", False),
        ("CREATE NAMESPACE n", False),
        (f"INSERT INTO t VALUES {', '.join('(1)' for _ in range(21))}", False),
    ],
)
def test_only_point_reads_and_writes_run_on_the_loop(text: str, quick: bool) -> None:
    assert is_quick(parse(text, SqlLimits())) is quick
