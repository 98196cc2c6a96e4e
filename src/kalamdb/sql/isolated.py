"""Queries that may never end run in a process of their own, which can be ended.

The engine gives control back only when an operator asks its input for more: a cross join, a join on equal values or
a recursive query over few rows may work for days before it does. Such a query of a client is handed to a child
process as plain data (its text, Arrow rows, paths of segments) and its batches come back through a pipe.
"""

from __future__ import annotations

import os
import pickle
import queue
import select
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa

from kalamdb.errors import Closed, KalamDbError

_HEADER = struct.Struct(">cQ")
_IDLE_MAX = 2
_LOOK_S = 0.05
"""How often a waiting reader looks whether its query was ended."""
_NICENESS = 5
_PIPE_READ = 1 << 20


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
            kind, payload = child.receive(ended)
            if kind == b"E":
                self._give_back(child)
                raise pickle.loads(payload)
            schema = pa.ipc.read_schema(pa.py_buffer(payload))
        except KalamDbError:
            self._drop_unless_idle(child)
            raise
        except BaseException:
            self._drop(child)
            raise
        return schema, self._batches(child, schema, ended)

    def _batches(
        self, child: _Child, schema: pa.Schema, ended: Callable[[], KalamDbError | None]
    ) -> Iterator[pa.RecordBatch]:
        finished = False
        try:
            while True:
                kind, payload = child.receive(ended)
                if kind == b"B":
                    yield pa.ipc.read_record_batch(pa.py_buffer(payload), schema)
                    continue
                finished = True
                if kind == b"E":
                    raise pickle.loads(payload)
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
            children, self._idle = list(self._all), []
        for child in children:
            self._drop(child)

    def _take(self) -> _Child:
        with self._lock:
            if self._closed:
                raise Closed("the database is closed; open it again")
            if self._idle:
                return self._idle.pop()
        child = _Child()
        with self._lock:
            self._all.add(child)
        return child

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
    """One child process, seen from the parent."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kalamdb.sql.isolated"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in: IO[bytes] = self._process.stdin
        self._out = self._process.stdout.fileno()
        self._buffer = bytearray()

    def send(self, task: Task) -> None:
        """Hand a task over."""
        data = pickle.dumps(task, protocol=pickle.HIGHEST_PROTOCOL)
        self._in.write(_HEADER.pack(b"T", len(data)) + data)
        self._in.flush()

    def receive(self, ended: Callable[[], KalamDbError | None]) -> tuple[bytes, bytes]:
        """The next message. Raises what ends the query, Closed when the process is gone."""
        head = self._read(_HEADER.size, ended)
        kind, size = _HEADER.unpack(head)
        return kind, self._read(size, ended)

    def _read(self, size: int, ended: Callable[[], KalamDbError | None]) -> bytes:
        while len(self._buffer) < size:
            error = ended()
            if error is not None:
                raise error
            if select.select([self._out], [], [], _LOOK_S)[0]:
                data = os.read(self._out, _PIPE_READ)
                if not data:
                    raise Closed("the process of the query ended: the engine crashed, or memory ran out")
                self._buffer += data
        found = bytes(self._buffer[:size])
        del self._buffer[:size]
        return found

    def end(self) -> None:
        """End the process now."""
        self._process.kill()
        self._process.wait()
        self._in.close()
        if self._process.stdout is not None:
            self._process.stdout.close()


# The child


def _serve() -> None:
    os.nice(_NICENESS)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()
    threading.Thread(target=_take_tasks, args=(tasks,), daemon=True).start()
    engine: Any = None
    while True:
        task = tasks.get()
        try:
            engine = engine or _engine(task.limits)
            run = engine.query(**task.arguments)
            _write(out, b"S", run.schema.serialize())
            for batch in run:
                _write(out, b"B", batch.serialize())
            _write(out, b"D", b"")
        except KalamDbError as exc:
            _write(out, b"E", pickle.dumps(exc))


def _take_tasks(tasks: queue.SimpleQueue[Task]) -> None:
    """Read tasks; the end of the parent is the end of this process, whatever it does."""
    source = os.fdopen(0, "rb")
    while len(head := source.read(_HEADER.size)) == _HEADER.size:
        tasks.put(pickle.loads(source.read(_HEADER.unpack(head)[1])))
    os._exit(0)


def _write(out: IO[bytes], kind: bytes, payload: bytes | pa.Buffer) -> None:
    out.write(_HEADER.pack(kind, len(payload)))
    out.write(payload)
    out.flush()


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
    _serve()
