"""Worlds of several processes, and one database behind each way to reach it."""

from __future__ import annotations

import asyncio
import inspect
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import kalamdb

QUIET: dict[str, Any] = {"flush.scheduler_enabled": False, "compaction.enabled": False}
HOLDER = """
db = connect(path, share=True)
say("holds" if db.is_holder else "attached")
wait()
db.close()
"""
_PRELUDE = """
import os, sys, threading, kalamdb
path, quiet = sys.argv[1], {"flush.scheduler_enabled": False, "compaction.enabled": False}
def connect(path, **settings):
    return kalamdb.connect(path, **{**quiet, "attach_timeout_s": 20, **settings})
def say(*words):
    print(*words, flush=True)
def wait():
    return sys.stdin.readline().strip()
"""


class Child:
    """A process that runs a script and talks by lines."""

    def __init__(self, script: str, path: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PRELUDE + script, str(path), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        return self.process.pid

    def line(self, timeout_s: float = 40) -> str:
        """The next line that it says."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], timeout_s)
        assert ready, "the child says nothing"
        said = self.process.stdout.readline().strip()
        if not said:
            raise AssertionError(f"the child ended: {self.process.communicate(timeout=10)[1]}")
        return said

    def tell(self, word: str = "") -> None:
        """Let it go on from `wait()`."""
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        """SIGKILL; it is gone on return."""
        self.process.kill()
        self.process.wait(20)

    def interrupt(self) -> None:
        """Ctrl-C."""
        os.kill(self.pid, signal.SIGINT)

    def end(self) -> None:
        """Let it finish; it must have gone well."""
        _, said = self.process.communicate("\n", timeout=40)
        assert self.process.returncode == 0, said

    def discard(self) -> None:
        """However it is."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


Spawn = Callable[..., Child]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Starts children that are gone at the end."""
    children: list[Child] = []

    def start(script: str, path: Path, *arguments: str) -> Child:
        children.append(Child(script, path, *arguments))
        return children[-1]

    yield start
    for child in children:
        child.discard()


@contextmanager
def holder(path: Path) -> Iterator[Child]:
    """A process of its own that holds a directory and shares it."""
    child = Child(HOLDER, path)
    try:
        assert child.line() == "holds"
        yield child
        child.end()
    finally:
        child.discard()


# Ways to reach a database: each gives something with the calls of a Database. A further client adds one line to WAYS.


@contextmanager
def _alone(path: Path) -> Iterator[Any]:
    with kalamdb.connect(path, **QUIET) as db:
        yield db


@contextmanager
def _holding(path: Path) -> Iterator[Any]:
    with kalamdb.connect(path, share=True, **QUIET) as db:
        yield db


@contextmanager
def _attached(path: Path) -> Iterator[Any]:
    with holder(path), kalamdb.connect(path, **QUIET) as db:
        assert not db.is_holder
        yield db


@contextmanager
def _awaited(path: Path) -> Iterator[Any]:
    with _Loop() as loop:
        db = loop.run(kalamdb.aconnect(path, **QUIET))
        try:
            yield Blocking(db, loop)
        finally:
            loop.run(db.close())


@contextmanager
def _awaited_attached(path: Path) -> Iterator[Any]:
    with holder(path), _awaited(path) as db:
        yield db


WAYS: dict[str, Callable[[Path], AbstractContextManager[Any]]] = {
    "Database": _alone,
    "Database that shares": _holding,
    "attached Database": _attached,
    "AsyncDatabase": _awaited,
    "attached AsyncDatabase": _awaited_attached,
}


@pytest.fixture(params=list(WAYS))
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """An empty database, with the calls of a Database, reached in each way."""
    with ExitStack() as stack:
        yield stack.enter_context(WAYS[request.param](tmp_path / "data"))


class _Loop:
    """An event loop in a thread."""

    def __enter__(self) -> _Loop:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, awaited: Any) -> Any:
        """The value of an awaitable."""

        async def main() -> Any:
            return await awaited

        return asyncio.run_coroutine_threadsafe(main(), self._loop).result(60)


class Blocking:
    """An object with awaitable calls, as one with calls that block."""

    def __init__(self, inner: Any, loop: _Loop) -> None:
        self._inner = inner
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found):
            return Blocking(found, self._loop) if type(found).__module__ == "kalamdb.async_database" else found
        return lambda *args, **named: self._plain(found(*args, **named))

    def _plain(self, value: Any) -> Any:
        if inspect.isawaitable(value):
            return self._loop.run(value)
        if hasattr(value, "__aenter__"):
            return self._block(value)
        return Blocking(value, self._loop) if type(value).__module__ == "kalamdb.async_database" else value

    @contextmanager
    def _block(self, entered: Any) -> Iterator[Any]:
        value = self._loop.run(entered.__aenter__())
        try:
            yield self._each(value) if hasattr(value, "__anext__") else Blocking(value, self._loop)
        except BaseException as exc:
            if not self._loop.run(entered.__aexit__(type(exc), exc, exc.__traceback__)):
                raise
        else:
            self._loop.run(entered.__aexit__(None, None, None))

    def _each(self, values: AsyncIterator[Any]) -> Iterator[Any]:
        while True:
            try:
                yield self._loop.run(values.__anext__())
            except StopAsyncIteration:
                return
