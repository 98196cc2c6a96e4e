"""The database for programs on an event loop: the same calls, awaitable.

Each call crosses into a bounded pool of threads and runs there as it always does; nothing of the database knows of
the loop. Of the library only this module, the server and the runner of jobs know asyncio.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, suppress
from datetime import datetime
from typing import Any, Literal, ParamSpec, TypeVar

import pyarrow as pa

from kalamdb.database import CheckReport, Database, Params, Transaction
from kalamdb.errors import Closed, InvalidRequest, Timeout
from kalamdb.jobs import Job
from kalamdb.jobs.manager import JobRequest, UnifiedJobManager
from kalamdb.live import Change, Subscription
from kalamdb.live.subscription import BATCH_ROWS
from kalamdb.opening import connect
from kalamdb.result import Result
from kalamdb.service import GiveUp
from kalamdb.types import Role

_P = ParamSpec("_P")
_T = TypeVar("_T")

THREADS_MAX = 8
"""Threads of a database unless `aconnect` is told otherwise."""
_POLL_S_MIN, _POLL_S_MAX = 0.01, 0.5
_END = object()


def _check_threads(threads_max: int) -> None:
    if not 1 <= threads_max <= 256:
        raise InvalidRequest(f"threads_max is {threads_max}, 1 to 256 are allowed")


class _Pool:
    """Threads that run the calls. A call that has begun runs to its end, whatever becomes of who awaits it."""

    def __init__(self, threads_max: int) -> None:
        _check_threads(threads_max)
        self._threads = ThreadPoolExecutor(threads_max, thread_name_prefix="kalamdb-async")

    async def run(self, function: Callable[_P, _T], *args: _P.args, **named: _P.kwargs) -> _T:
        """The call in a thread. When the awaiting task is cancelled the call goes on, or never begins."""
        try:
            future = self._threads.submit(function, *args, **named)
        except RuntimeError:
            raise Closed("the database is closed; open it again") from None
        return await asyncio.wrap_future(future)

    async def finish(self, function: Callable[_P, _T], *args: _P.args, **named: _P.kwargs) -> _T:
        """As `run`, but a cancellation waits until the call has ended: for what one thread may use at a time."""
        task = asyncio.ensure_future(self.run(function, *args, **named))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait([task])
            if not task.cancelled():
                task.exception()
            raise

    @asynccontextmanager
    async def entered(self, blocking: AbstractContextManager[_T]) -> AsyncIterator[_T]:
        """A blocking context manager, entered and left in threads."""
        entering = asyncio.ensure_future(self.run(blocking.__enter__))
        try:
            value = await asyncio.shield(entering)
        except asyncio.CancelledError:
            await asyncio.wait([entering])
            if not entering.cancelled() and entering.exception() is None:
                await asyncio.wait([asyncio.ensure_future(self.run(blocking.__exit__, None, None, None))])
            raise
        try:
            yield value
        except BaseException as exc:
            if not await self.finish(blocking.__exit__, type(exc), exc, exc.__traceback__):
                raise
        else:
            await self.finish(blocking.__exit__, None, None, None)

    def shutdown(self) -> None:
        """Take no more calls; wait for those that run."""
        self._threads.shutdown(wait=True, cancel_futures=True)


class AsyncDatabase:
    """An open database whose calls are awaitable; see `Database` for what they do.

    Any number of tasks may use it. A cancelled query stops at its next batch; a cancelled write is either not begun
    or completed, and the database stays usable. An async context manager that closes it.
    """

    def __init__(self, database: Database, *, threads_max: int = THREADS_MAX) -> None:
        self._pool = _Pool(threads_max)
        self._database = database
        self._jobs = AsyncJobs(database, self._pool)

    @property
    def database(self) -> Database:
        """The same database with calls that block."""
        return self._database

    @property
    def jobs(self) -> AsyncJobs:
        """The job manager."""
        return self._jobs

    async def __aenter__(self) -> AsyncDatabase:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """See Database.close. Calls that run are waited for. Idempotent."""
        await asyncio.to_thread(self._database.close)
        self._jobs.wake_all()
        await asyncio.to_thread(self._pool.shutdown)

    async def execute(
        self,
        sql: str,
        params: Params = None,
        *,
        user: str | None = None,
        role: str | Role | None = None,
        namespace: str | None = None,
        timeout_s: float | None = None,
    ) -> Result:
        """See Database.execute."""
        given_up = GiveUp()
        try:
            return await self._pool.run(
                self._database._execute, sql, params, timeout_s, given_up, user=user, role=role, namespace=namespace
            )
        except asyncio.CancelledError:
            given_up.set()
            raise

    @asynccontextmanager
    async def stream(
        self,
        sql: str,
        params: Params = None,
        *,
        user: str | None = None,
        role: str | Role | None = None,
        namespace: str | None = None,
        timeout_s: float | None = None,
    ) -> AsyncIterator[AsyncIterator[pa.RecordBatch]]:
        """See Database.stream; the batches come by `async for`."""
        blocking = self._database.stream(sql, params, user=user, role=role, namespace=namespace, timeout_s=timeout_s)

        async def each(batches: Iterator[pa.RecordBatch]) -> AsyncIterator[pa.RecordBatch]:
            while (batch := await self._pool.finish(next, batches, _END)) is not _END:
                yield batch

        async with self._pool.entered(blocking) as batches:
            yield each(batches)

    async def insert(
        self,
        table: str,
        data: Any,
        *,
        user: str | None = None,
        user_column: str | None = None,
        on_conflict: str = "error",
        role: str | Role | None = None,
        namespace: str | None = None,
    ) -> int:
        """See Database.insert."""
        return await self._pool.run(
            self._database.insert, table, data, user=user, user_column=user_column, on_conflict=on_conflict, role=role,
            namespace=namespace,
        )  # fmt: skip

    async def subscribe(
        self, sql: str, params: Params = None, *, user: str | None = None, role: str | Role | None = None,
        namespace: str | None = None, from_seq: int | None = None, last_rows: int | None = None,
        snapshot: bool = False, batch_size: int = BATCH_ROWS,
    ) -> AsyncSubscription:  # fmt: skip
        """See Database.subscribe; the changes come by `async for`."""
        found = await self._pool.finish(
            self._database.subscribe, sql, params, user=user, role=role, namespace=namespace, from_seq=from_seq,
            last_rows=last_rows, snapshot=snapshot, batch_size=batch_size,
        )  # fmt: skip
        return AsyncSubscription(found, self._pool)

    def session(
        self, *, user: str | None = None, role: str | Role | None = None, namespace: str | None = None
    ) -> AsyncSession:
        """The same calls, bound to a user, role and namespace."""
        return AsyncSession(self, {"user": user, "role": role, "namespace": namespace})

    @asynccontextmanager
    async def transaction(
        self, user: str | None = None, *, role: str | Role | None = None, namespace: str | None = None
    ) -> AsyncIterator[AsyncTransaction]:
        """See Database.transaction. Only the task that entered the block may use it."""
        blocking = self._database.transaction(user, role=role, namespace=namespace)
        async with self._pool.entered(blocking) as inner:
            yield AsyncTransaction(inner, self._pool)

    async def backup(self, path: str | os.PathLike[str], *, wait: bool = True, incremental: bool = False) -> Job:
        """See Database.backup. Holds no thread while it waits."""
        job = await self._pool.run(self._database.backup, path, wait=False, incremental=incremental)
        return await self._jobs.wait(job.id) if wait else job

    async def check(self) -> CheckReport:
        """See Database.check."""
        return await self._pool.run(self._database.check)


class AsyncSubscription:
    """Changes of a table by `async for`; see `Subscription`. One task may read; leaving `async with` closes it."""

    def __init__(self, inner: Subscription, pool: _Pool) -> None:
        self._inner = inner
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._more = asyncio.Event()
        inner.listen(self._wake)

    def _wake(self) -> None:
        # A loop that is closed reads nothing any more.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._more.set)

    @property
    def last_seq(self) -> int:
        """See Subscription.last_seq."""
        return self._inner.last_seq

    @property
    def resumed(self) -> bool:
        """See Subscription.resumed."""
        return self._inner.resumed

    async def __aenter__(self) -> AsyncSubscription:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def __aiter__(self) -> AsyncSubscription:
        return self

    async def __anext__(self) -> Change:
        while not self._inner.closed:
            self._more.clear()
            reads = self._inner.must_read
            found = await self._pool.finish(self._inner.poll) if reads else self._inner.poll()
            if found is not None:
                return found
            await self._more.wait()
        raise StopAsyncIteration

    async def next(self, timeout_s: float | None = None) -> Change:
        """See Subscription.next."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self.__anext__()
        except TimeoutError:
            raise Timeout(f"no change came within {timeout_s:g} s") from None
        except StopAsyncIteration:
            raise Closed("the subscription was closed") from None

    async def close(self) -> None:
        """See Subscription.close."""
        await asyncio.to_thread(self._inner.close)


class AsyncSession:
    """Calls of an AsyncDatabase with user, role and namespace filled in."""

    def __init__(self, database: AsyncDatabase, bound: dict[str, Any]) -> None:
        self._database = database
        self._bound = bound

    async def execute(self, sql: str, params: Params = None, *, timeout_s: float | None = None) -> Result:
        """See Database.execute."""
        return await self._database.execute(sql, params, timeout_s=timeout_s, **self._bound)

    def stream(
        self, sql: str, params: Params = None, *, timeout_s: float | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[pa.RecordBatch]]:
        """See AsyncDatabase.stream."""
        return self._database.stream(sql, params, timeout_s=timeout_s, **self._bound)

    async def insert(self, table: str, data: Any, *, user_column: str | None = None, on_conflict: str = "error") -> int:
        """See Database.insert."""
        return await self._database.insert(table, data, user_column=user_column, on_conflict=on_conflict, **self._bound)

    async def subscribe(self, sql: str, params: Params = None, **options: Any) -> AsyncSubscription:
        """See AsyncDatabase.subscribe."""
        return await self._database.subscribe(sql, params, **options, **self._bound)

    def transaction(self) -> AbstractAsyncContextManager[AsyncTransaction]:
        """See AsyncDatabase.transaction."""
        return self._database.transaction(**self._bound)


class AsyncTransaction:
    """What `async with db.transaction() as tx` gives."""

    def __init__(self, inner: Transaction, pool: _Pool) -> None:
        self._inner = inner
        self._pool = pool

    async def execute(
        self, sql: str, params: Params = None, *, namespace: str | None = None, timeout_s: float | None = None
    ) -> Result:
        """See Transaction.execute."""
        return await self._pool.finish(self._inner.execute, sql, params, namespace=namespace, timeout_s=timeout_s)

    async def insert(self, table: str, data: Any, *, user_column: str | None = None, on_conflict: str = "error") -> int:
        """See Transaction.insert."""
        return await self._pool.finish(
            self._inner.insert, table, data, user_column=user_column, on_conflict=on_conflict
        )

    async def create_job(
        self, job_type: str, params: Any = None, idempotency_key: str | None = None, **options: Any
    ) -> None:
        """See Transaction.create_job."""
        await self._pool.finish(self._inner.create_job, job_type, params, idempotency_key, **options)

    async def rollback(self) -> None:
        """Forget all changes."""
        await self._pool.finish(self._inner.rollback)


class AsyncJobs:
    """The job manager with awaitable calls; executors are registered at `manager`."""

    def __init__(self, database: Database, pool: _Pool) -> None:
        self._pool = pool
        self._database = database
        self._waiting: dict[str, list[tuple[asyncio.AbstractEventLoop, asyncio.Event]]] = {}
        self._is_told = database._tell_ends(self._wake)

    @property
    def manager(self) -> UnifiedJobManager:
        """The same manager with calls that block."""
        return self._database.jobs

    def _wake(self, job_id: str) -> None:
        for loop, ended in list(self._waiting.get(job_id, ())):
            try:
                loop.call_soon_threadsafe(ended.set)
            except RuntimeError:
                # The loop was closed under its waiters: nobody is there to be told.
                continue

    def wake_all(self) -> None:
        """Let those who wait look again."""
        for job_id in list(self._waiting):
            self._wake(job_id)

    async def create_job(
        self,
        job_type: str,
        params: Any = None,
        idempotency_key: str | None = None,
        *,
        max_retries: int | None = None,
        queue: str | None = None,
        priority: int | None = None,
        run_at: datetime | None = None,
        timeout_s: float | None = None,
        on_conflict: Literal["error", "return"] = "error",
        allow_unknown: bool = False,
    ) -> Job:
        """See UnifiedJobManager.create_job."""
        return await self._pool.run(
            self.manager.create_job, job_type, params, idempotency_key, max_retries=max_retries, queue=queue,
            priority=priority, run_at=run_at, timeout_s=timeout_s, on_conflict=on_conflict, allow_unknown=allow_unknown,
        )  # fmt: skip

    async def create_jobs(self, requests: Sequence[JobRequest | Mapping[str, Any]]) -> list[Job]:
        """See UnifiedJobManager.create_jobs."""
        return await self._pool.run(self.manager.create_jobs, requests)

    async def get_job(self, job_id: str) -> Job:
        """See UnifiedJobManager.get_job."""
        return await self._pool.run(self.manager.get_job, job_id)

    async def list_jobs(self, **chosen: Any) -> list[Job]:
        """See UnifiedJobManager.list_jobs; the same names."""
        return await self._pool.run(self.manager.list_jobs, **chosen)

    async def cancel_job(self, job_id: str) -> Job:
        """See UnifiedJobManager.cancel_job."""
        return await self._pool.run(self.manager.cancel_job, job_id)

    async def pause_job(self, job_id: str) -> Job:
        """See UnifiedJobManager.pause_job."""
        return await self._pool.run(self.manager.pause_job, job_id)

    async def resume_job(self, job_id: str) -> Job:
        """See UnifiedJobManager.resume_job."""
        return await self._pool.run(self.manager.resume_job, job_id)

    async def retry_job(self, job_id: str) -> Job:
        """See UnifiedJobManager.retry_job."""
        return await self._pool.run(self.manager.retry_job, job_id)

    async def wait(self, job_id: str, timeout_s: float | None = None) -> Job:
        """See UnifiedJobManager.wait. Holds no thread, so any number of tasks may wait."""
        ended = asyncio.Event()
        waiter = (asyncio.get_running_loop(), ended)
        self._waiting.setdefault(job_id, []).append(waiter)
        try:
            async with asyncio.timeout(timeout_s):
                pause_s = _POLL_S_MIN
                while not (await self.get_job(job_id)).status.is_terminal and not ended.is_set():
                    if self._is_told:
                        await ended.wait()
                    else:
                        # Only the process that holds the data is told; an attached one looks, less and less often.
                        with suppress(TimeoutError):
                            await asyncio.wait_for(ended.wait(), pause_s)
                        pause_s = min(pause_s * 2, _POLL_S_MAX)
            return await self._pool.run(self.manager.wait, job_id, 0)
        except TimeoutError:
            job = await self.get_job(job_id)
            raise Timeout(f"job '{job_id}' is still {job.status} after {timeout_s:g} s") from None
        finally:
            left = [one for one in self._waiting.pop(job_id, ()) if one is not waiter]
            if left:
                self._waiting[job_id] = left


async def aconnect(path: str | os.PathLike[str], *, threads_max: int = THREADS_MAX, **settings: Any) -> AsyncDatabase:
    """As `connect`, for programs on an event loop. `threads_max` calls run at the same time, others wait.

    Raises what `connect` raises.
    """
    _check_threads(threads_max)
    return AsyncDatabase(await asyncio.to_thread(connect, path, **settings), threads_max=threads_max)


__all__ = ["AsyncDatabase", "AsyncJobs", "AsyncSession", "AsyncTransaction", "aconnect"]
