"""Where attempts run: a pool of threads for sync executors, one event loop for async ones."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from kalamdb.errors import KalamDbError
from kalamdb.jobs.context import JobContext
from kalamdb.jobs.model import EXPECTED_OUTCOMES, Outcome, Permanent, RunIn
from kalamdb.jobs.processes import run_in_process
from kalamdb.jobs.registry import JobExecutor
from kalamdb.storage.jobs import JobRow

_IDLE_S = 10.0
_LOOP_STOP_S = 1.0
_log = logging.getLogger("kalamdb.jobs")


class Attempt:
    """One running lease."""

    def __init__(self, row: JobRow, executor: JobExecutor[Any], context: JobContext[Any]) -> None:
        self.row = row
        self.executor = executor
        self.context = context
        self.outcome: Outcome | BaseException = None
        self.returned = False
        """Whether the executor is through; `outcome` holds."""
        self.revoked = False
        self.revoke_s: float | None = None
        """When its lease is taken away if it has not stopped by then."""
        self.ended = threading.Event()
        """Set when its end is recorded, or its lease was taken away."""
        self.task: asyncio.Task[None] | None = None
        self.kill: Callable[[], None] | None = None
        """Ends the process of the attempt, where it has one."""

    def attach(self, kill: Callable[[], None]) -> None:
        """The attempt has a process now."""
        self.kill = kill
        if self.revoked:
            kill()


Finished = Callable[[Attempt], None]
"""Called in the thread of the attempt, once it is through."""


class Workers(Protocol):
    """Who runs attempts."""

    def submit(self, attempts: Sequence[Attempt]) -> None:
        """Run them soon. Does not block."""
        ...

    def abandon(self, attempt: Attempt) -> None:
        """The lease of a running attempt is gone: end it, if that can be done."""
        ...

    def stop(self) -> None:
        """Take no more; blocks for a second at most."""
        ...


WorkersFactory = Callable[[Finished], Workers]


def _prepare(attempt: Attempt) -> None:
    try:
        attempt.context.params = attempt.executor.decode(attempt.row.parameters)
    except KalamDbError as exc:
        raise Permanent(str(exc)) from exc


def execute_attempt(attempt: Attempt) -> Outcome | Awaitable[Outcome]:
    """Decode its parameters and call the executor, here or in a process. Raises what it raises."""
    _prepare(attempt)
    if attempt.executor.run_in == RunIn.PROCESS:
        return run_in_process(attempt.context, attempt.executor.reference, attempt.attach)
    return attempt.executor.execute(attempt.context)


class ThreadWorkers:
    """Threads that run sync executors; as many as there are attempts at once, kept for a while.

    A thread that takes an attempt and sees another waiting wakes or starts the next one: short jobs run
    one after another in one thread, long ones side by side.
    """

    def __init__(self, finished: Finished) -> None:
        self._finished = finished
        self._condition = threading.Condition()
        self._waiting: deque[Attempt] = deque()
        self._idle = 0
        self._stopping = False

    def submit(self, attempts: Sequence[Attempt]) -> None:
        """Run them soon. Does not block."""
        with self._condition:
            self._waiting.extend(attempts)
            self._call_one()

    def _call_one(self) -> None:
        if self._idle:
            self._condition.notify()
        else:
            threading.Thread(target=self._run, name="kalamdb-job", daemon=True).start()

    def _next(self) -> Attempt | None:
        with self._condition:
            while not self._waiting:
                if self._stopping:
                    return None
                self._idle += 1
                called = self._condition.wait(_IDLE_S)
                self._idle -= 1
                if not called and not self._waiting:
                    return None
            attempt = self._waiting.popleft()
            if self._waiting:
                self._call_one()
            return attempt

    def _run(self) -> None:
        while (attempt := self._next()) is not None:
            try:
                outcome = execute_attempt(attempt)
                if inspect.isawaitable(outcome):
                    if inspect.iscoroutine(outcome):
                        outcome.close()
                    raise Permanent(f"the executor returned an awaitable, expected {EXPECTED_OUTCOMES}")
                attempt.outcome = outcome
            except BaseException as exc:
                # A job may raise anything, SystemExit too; it ends that job and nothing else.
                attempt.outcome = exc
            self._finished(attempt)
            del attempt

    def abandon(self, attempt: Attempt) -> None:
        """A process is killed; a thread cannot be ended from outside."""
        if attempt.kill is not None:
            attempt.kill()

    def stop(self) -> None:
        """Let idle threads end. Busy ones end with their attempt."""
        with self._condition:
            self._stopping = True
            self._condition.notify_all()


class AsyncWorkers:
    """One event loop, in a thread of its own, that runs async executors."""

    def __init__(self, finished: Finished) -> None:
        self._finished = finished
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopping = False

    def submit(self, attempts: Sequence[Attempt]) -> None:
        """Run them soon. Does not block."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(
                target=self._serve, args=(self._loop,), name="kalamdb-jobs-async", daemon=True
            )
            self._thread.start()
        self._loop.call_soon_threadsafe(self._start, list(attempts))

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        while not self._stopping:
            try:
                loop.run_forever()
            except BaseException:
                # A task of a job's own may raise SystemExit through the loop; the other jobs go on.
                _log.exception("the event loop of async jobs was left by an exception; it goes on")
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.wait(tasks, timeout=_LOOP_STOP_S / 2))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()

    def _start(self, attempts: Sequence[Attempt]) -> None:
        for attempt in attempts:
            attempt.task = asyncio.get_running_loop().create_task(self._run(attempt))

    async def _run(self, attempt: Attempt) -> None:
        try:
            _prepare(attempt)
            outcome = attempt.executor.execute(attempt.context)
            attempt.outcome = await outcome if inspect.isawaitable(outcome) else outcome
        except BaseException as exc:
            attempt.outcome = exc
        self._finished(attempt)

    def abandon(self, attempt: Attempt) -> None:
        """Throw CancelledError into an attempt whose lease is gone."""
        loop, task = self._loop, attempt.task
        if loop is not None and task is not None:
            loop.call_soon_threadsafe(task.cancel)

    def stop(self) -> None:
        """End the loop; what still runs on it is dropped. Blocks for a second at most."""
        loop, thread = self._loop, self._thread
        self._loop = self._thread = None
        if loop is None or thread is None:
            return
        self._stopping = True
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_LOOP_STOP_S)
