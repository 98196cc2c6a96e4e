"""Queries that may never end run in a process of their own, which can be ended.

The engine gives control back only when an operator asks its input for more: a cross join, a join on equal values or
a recursive query over few rows may work for days before it does. Such a query of a client is handed to a child
process as plain data (its text, Arrow rows, paths of segments) and its batches come back through a socket.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import Any

import pyarrow as pa

from kalamdb.errors import Closed, KalamDbError

_IDLE_MAX = 2
_LOOK_S = 0.05
"""How often a waiting reader looks whether its query was ended."""
_NICENESS = 5


@dataclass(frozen=True, slots=True)
class Task:
    """What a child runs: arguments of `Engine.query`, and the limits of its engine."""

    limits: Any
    arguments: dict[str, Any]


class Children:
    """Child processes, used again until one is ended. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[_Child] = []
        self._all: set[_Child] = set()
        self._closed = False

    def run(self, task: Task, ended: Callable[[], KalamDbError | None]) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        """Start a query in a child. `ended` gives the error that ends it from outside; it is asked all the time."""
        child = self._take()
        try:
            child.send(task)
            schema = child.receive(ended)
            if isinstance(schema, KalamDbError):
                self._give_back(child)
                raise schema
        except KalamDbError:
            self._drop_unless_idle(child)
            raise
        except BaseException:
            self._drop(child)
            raise
        return schema, self._batches(child, ended)

    def _batches(self, child: _Child, ended: Callable[[], KalamDbError | None]) -> Iterator[pa.RecordBatch]:
        finished = False
        try:
            while True:
                found = child.receive(ended)
                if isinstance(found, pa.RecordBatch):
                    yield found
                    continue
                finished = True
                if isinstance(found, KalamDbError):
                    raise found
                return
        finally:
            if finished:
                self._give_back(child)
            else:
                self._drop(child)

    def close(self) -> None:
        """End all children at once."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            busy = self._all.difference(idle)
        for child in idle:
            self._drop(child)
        for child in busy:
            # Whoever reads from it sees the end and closes the socket; two that close it would close another's file.
            child.kill()

    def _take(self) -> _Child:
        with self._lock:
            if self._closed:
                raise Closed("the database is closed; open it again")
            if self._idle:
                return self._idle.pop()
        child = _Child()
        with self._lock:
            if not self._closed:
                self._all.add(child)
                return child
        child.end()
        raise Closed("the database is closed; open it again")

    def _give_back(self, child: _Child) -> None:
        with self._lock:
            if not self._closed and len(self._idle) < _IDLE_MAX and child not in self._idle:
                self._idle.append(child)
                return
        self._drop_unless_idle(child)

    def _drop_unless_idle(self, child: _Child) -> None:
        with self._lock:
            if child in self._idle:
                return
        self._drop(child)

    def _drop(self, child: _Child) -> None:
        with self._lock:
            self._all.discard(child)
        child.end()


class _Child:
    """One child process, seen from the parent. It answers a task with a schema, batches and None, or an error."""

    def __init__(self) -> None:
        self._connection, other = Pipe()
        fd = other.fileno()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kalamdb.sql.isolated", str(fd)], pass_fds=[fd], stdin=subprocess.DEVNULL
            )
        finally:
            other.close()

    def send(self, task: Task) -> None:
        """Hand a task over."""
        self._connection.send(task)

    def receive(self, ended: Callable[[], KalamDbError | None]) -> Any:
        """What it says next. Raises what ends the query, Closed when the process is gone."""
        while True:
            error = ended()
            if error is not None:
                raise error
            if self._connection.poll(_LOOK_S):
                try:
                    return self._connection.recv()
                except (EOFError, OSError):
                    raise Closed("the process of the query ended: the engine crashed, or memory ran out") from None

    def kill(self) -> None:
        """End the process now. From any thread."""
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        """End the process now and let go of it. By its owner, once."""
        self.kill()
        self._connection.close()


# The child


def _serve(connection: Connection) -> None:
    os.nice(_NICENESS)
    tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()
    threading.Thread(target=_take_tasks, args=(connection, tasks), daemon=True).start()
    engine: Any = None
    while True:
        task = tasks.get()
        try:
            engine = engine or _engine(task.limits)
            run = engine.query(**task.arguments)
            connection.send(run.schema)
            for batch in run:
                connection.send(batch)
            connection.send(None)
        except KalamDbError as exc:
            connection.send(exc)


def _take_tasks(connection: Connection, tasks: queue.SimpleQueue[Task]) -> None:
    """Take tasks; the end of the parent is the end of this process, whatever it does."""
    try:
        while True:
            tasks.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)


def _engine(limits: Any) -> Any:
    from kalamdb.clock import SystemClock, ulid, uuid_v7
    from kalamdb.sql.engine import Engine

    clock = SystemClock()

    def refused() -> int:
        raise Closed("SNOWFLAKE_ID() is the parent's")

    return Engine(
        limits, {"snowflake_id": refused, "uuid_v7": lambda: str(uuid_v7(clock)), "ulid": lambda: ulid(clock)}
    )


if __name__ == "__main__":
    # By its name, so that what is sent is of the same classes here and there.
    from kalamdb.sql import isolated

    isolated._serve(Connection(int(sys.argv[1])))
