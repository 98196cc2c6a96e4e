"""A job manager over a memory store, with or without a database around it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kalamdb
from kalamdb.clock import Clock, SystemClock
from kalamdb.database import Database
from kalamdb.jobs import Job, JobContext, JobRegistry, UnifiedJobManager
from kalamdb.jobs.settings import JobSettings
from kalamdb.storage.kv import KvBackend
from kalamdb.storage.memory import MemoryKv

QUIET = {"flush.scheduler_enabled": False, "compaction.enabled": False}
WAIT_S = 20.0


class Gate:
    """Where a job stops until the test lets it go."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()

    def __call__(self, ctx: JobContext[Any] | None = None) -> None:
        self.entered.release()
        if not self.open.wait(WAIT_S):
            raise AssertionError("nobody opened the gate")

    def await_entry(self, times: int = 1) -> None:
        """Until so many jobs stand here."""
        for _ in range(times):
            assert self.entered.acquire(timeout=WAIT_S)


class Checks:
    """Holds the attempt at its check number `at`, from 0, until it is asked to stop; counts the others."""

    def __init__(self, at: int | None = None) -> None:
        self._at = at
        self.count = 0
        self.held = threading.Event()

    def __call__(self, ctx: JobContext[Any]) -> None:
        """See `kalamdb.testing.workers.OnCheck`."""
        if self.count == self._at and not self.held.is_set():
            self.held.set()
            until(lambda: ctx.cancelled)
        self.count += 1


class World:
    """A store and its managers."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = clock or SystemClock()
        self.kv = MemoryKv()
        self.opened: list[UnifiedJobManager] = []
        self.backend = KvBackend(self.kv, self.clock)

    def manager(self, *, start: int = 0, **settings: Any) -> UnifiedJobManager:
        """A manager over the store; `start` slots run at once when given."""
        quick = {"cancel_timeout_s": 0.3, "retry_backoff_ms": 1, "shutdown_timeout_s": 0.2, **settings}
        made = UnifiedJobManager(self.backend, JobRegistry(), self.clock, JobSettings(**quick))
        self.opened.append(made)
        if start:
            made.run_loop(start)
        return made

    def close(self) -> None:
        """Stop all managers."""
        for manager in self.opened:
            manager.stop(0.0)
        self.backend.close()


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


@pytest.fixture
def open_db(tmp_path: Path) -> Iterator[Callable[..., Database]]:
    """Opens databases on disk; the same directory each time."""
    opened: list[Database] = []

    def open_(**settings: Any) -> Database:
        db = kalamdb.connect(tmp_path / "data", **{**QUIET, "shutdown.timeout_s": 0.2, **settings})
        opened.append(db)
        return db

    yield open_
    for db in opened:
        db.close()


def until(condition: Callable[[], bool]) -> None:
    """Wait for what no signal tells."""
    pause = threading.Event()
    for _ in range(int(WAIT_S * 1000)):
        if condition():
            return
        pause.wait(0.001)
    raise AssertionError("it did not happen in time")


def texts(job: Job) -> list[str]:
    """The history of a job: level and text."""
    return [f"{event.level} {event.text}" for event in job.events()]
