"""Where a statement runs: on the event loop, or in a slot of the query threads; and who waits for the disk.

All but the thread of `DurableWaits` belongs to the event loop: no locks.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from kalamdb.errors import Closed, RateLimited
from kalamdb.storage import Commit


class QuerySlots:
    """Slots of the query threads, given fairly: users that wait take turns, and one user holds at most half of them
    (at least one)."""

    def __init__(self, slots: int, *, queue_max: int, wait_s: float) -> None:
        self._free = slots
        self._user_max = max(slots // 2, 1)
        self._queue_max = queue_max
        self._wait_s = wait_s
        self._held: dict[str, int] = {}
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        """By user; the one whose turn is next first."""
        self.queued = 0

    async def acquire(self, user: str, wait_s: float | None = None) -> None:
        """Take a slot; `release` it. Raises RateLimited when the queue is full or the wait is too long."""
        if self._free and self._held.get(user, 0) < self._user_max and user not in self._waiting:
            self._take(user)
            return
        if self.queued >= self._queue_max:
            raise RateLimited(
                f"{self.queued} statements wait for a thread, at most {self._queue_max} may "
                "(execution.queue_max); come again in a second"
            )
        limit_s = self._wait_s if wait_s is None else min(wait_s, self._wait_s)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(user, deque()).append(turn)
        self.queued += 1
        try:
            async with asyncio.timeout(limit_s):
                await turn
        except BaseException as exc:
            if turn.done() and not turn.cancelled():
                self.release(user)
            else:
                self._forget(user, turn)
            if isinstance(exc, TimeoutError):
                raise RateLimited(
                    f"the statement waited {limit_s:g} s for a thread (execution.queue_wait_s); come again later"
                ) from None
            raise

    def release(self, user: str) -> None:
        """Give a slot back; who waits longest in its turn gets it."""
        self._free += 1
        self._held[user] -= 1
        if not self._held[user]:
            del self._held[user]
        self._hand_out()

    def _take(self, user: str) -> None:
        self._free -= 1
        self._held[user] = self._held.get(user, 0) + 1

    def _hand_out(self) -> None:
        while self._free:
            user = next((one for one in self._waiting if self._held.get(one, 0) < self._user_max), None)
            if user is None:
                return
            turns = self._waiting[user]
            turn = turns.popleft()
            self.queued -= 1
            self._waiting.move_to_end(user)
            if not turns:
                del self._waiting[user]
            if not turn.done():
                self._take(user)
                turn.set_result(None)

    def _forget(self, user: str, turn: asyncio.Future[None]) -> None:
        turns = self._waiting.get(user)
        if turns is not None and turn in turns:
            turns.remove(turn)
            self.queued -= 1
            if not turns:
                del self._waiting[user]


class QueryThreads:
    """Runs work in threads, each in a slot of its user. What a caller gave up keeps its slot until it is through."""

    def __init__(self, threads: int, *, queue_max: int, wait_s: float) -> None:
        self.slots = QuerySlots(threads, queue_max=queue_max, wait_s=wait_s)
        self._wait_s = wait_s
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="kalamdb-query")

    @contextlib.asynccontextmanager
    async def slot(
        self, user: str, wait_s: float
    ) -> AsyncIterator[Callable[[Callable[[], None]], asyncio.Future[None]]]:
        """A slot; inside it `start(work)` runs the work in a thread. Left early, the slot is held till the work ends.

        Raises RateLimited.
        """
        await self.slots.acquire(user, wait_s)
        started: list[asyncio.Future[None]] = []
        loop = asyncio.get_running_loop()

        def start(work: Callable[[], None]) -> asyncio.Future[None]:
            future = loop.run_in_executor(self._executor, work)
            started.append(future)
            return future

        try:
            yield start
        finally:
            if started and not started[0].done():
                started[0].add_done_callback(lambda done: self._through(user, done))
            else:
                self.slots.release(user)

    async def run(self, user: str, work: Callable[[], None]) -> None:
        """Run the work in a slot of the user, and wait for its end. Raises RateLimited, and what the work raises."""
        async with self.slot(user, self._wait_s) as start:
            await start(work)

    def _through(self, user: str, done: asyncio.Future[None]) -> None:
        if not done.cancelled():
            done.exception()
        self.slots.release(user)

    def close(self) -> None:
        """No new work; threads that still run are left alone."""
        self._executor.shutdown(wait=False, cancel_futures=True)


class DurableWaits:
    """Waits for the disk for all requests at a time: one thread, which wakes the loop once for all that it served."""

    def __init__(self, wait: Callable[[Commit], None], loop: asyncio.AbstractEventLoop) -> None:
        self._wait = wait
        self._loop = loop
        self._condition = threading.Condition()
        self._waiting: list[tuple[Commit, asyncio.Future[None]]] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="kalamdb-durable", daemon=True)
        self._thread.start()

    def until_durable(self, commit: Commit) -> asyncio.Future[None]:
        """Done when the commit is on disk; raises what `StorageBackend.wait_durable` raises."""
        future: asyncio.Future[None] = self._loop.create_future()
        with self._condition:
            if self._stopping:
                raise Closed("the server stops")
            self._waiting.append((commit, future))
            self._condition.notify()
        return future

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._waiting and not self._stopping:
                    self._condition.wait()
                served, self._waiting = self._waiting, []
                if not served:
                    return
            error: BaseException | None = None
            try:
                self._wait(max((commit for commit, _ in served), key=lambda commit: commit.seq))
            except BaseException as exc:  # noqa: BLE001 - it belongs to those who wait
                error = exc
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(_resolve, [future for _, future in served], error)

    def stop(self) -> None:
        """Serve those who wait, then end. Blocks for the disk."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        self._thread.join()


def _resolve(futures: Sequence[asyncio.Future[None]], error: BaseException | None) -> None:
    for future in futures:
        if future.done():
            continue
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
