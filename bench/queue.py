"""Jobs that do nothing: creating, draining, picking up; Huey over SQLite does the same in the same run."""

from __future__ import annotations

import itertools
import logging
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huey import SqliteHuey

import kalamdb
from bench.harness import Figure, rate
from bench.scans import QUIET
from kalamdb.app_context import AppContext
from kalamdb.clock import SystemClock
from kalamdb.config import Settings
from kalamdb.database import Database
from kalamdb.jobs import JobContext, JobRequest
from kalamdb.storage import Commit
from kalamdb.storage.jobs import JobStatus
from kalamdb.storage.kv import KvBackend
from kalamdb.storage.rocks import RocksKv
from kalamdb.testing.counting import claim_reads

DRAIN_RATIO_MIN = 1.5
"""Our goal against Huey with fsync."""
PICK_UP_MS_MAX = 2.0
SHOW_MS_MAX = 50.0
BATCH = 10_000
FSYNC = {"commit": True, "os": False}
"""What Huey calls the same durability."""
_POLL_S = 0.002
_WAIT_S = 3600


def queue(durability: str, *, count: int, single: int, slots: int, picked_up: int) -> Iterator[Figure]:
    """All figures of one durability and number of workers."""
    note = f"durability {durability}, {slots} workers; peer: Huey, SqliteStorage(fsync={FSYNC[durability]})"
    theirs = _peer(durability, count=min(count, 5_000), single=min(single, 1_000), slots=slots)
    with _ours(durability, slots) as db:
        one = rate(lambda: _each(lambda: db.jobs.create_job("noop"), single))
        yield _figure("create, one by one", one, theirs["create"], note)
        _settle(db, single)
        db.jobs.pause_queue("noop")
        many = rate(lambda: _create(db, count))
        yield _figure(f"create, {BATCH:,} in one call", many, theirs["create"], f"{note}, which has no such call")
        drained = rate(lambda: _drain(db, single, count))
        goal = DRAIN_RATIO_MIN if FSYNC[durability] else None
        yield _figure(f"drain {count:,}", drained, theirs["drain"], note, goal)
        visible = db.execute("SELECT count(*) FROM system.jobs WHERE status = 'completed'").scalar()
        assert visible == single + count, f"{visible} of {single + count} jobs are completed"
        yield _shown(db, count)
    with _ours(durability, slots) as db:
        yield from _pick_up(db, picked_up, theirs, note)


def _figure(name: str, ours: float, peer: float, note: str, goal: float | None = None) -> Figure:
    passed = None if goal is None else ours >= goal * peer
    return Figure(name, f"{ours:,.0f} jobs/s", f"{peer:,.0f} jobs/s", ours / peer, note, passed)


@contextmanager
def _ours(durability: str, slots: int) -> Iterator[Database]:
    """A database on disk with everything that a job writes switched on: events, jobs.log."""
    settings = {**QUIET, "storage.durability": durability, "jobs.max_concurrent": slots}
    with tempfile.TemporaryDirectory() as folder, kalamdb.connect(folder, **settings) as db:

        @db.jobs.executor("noop", prefix="NO", queue="noop")
        def noop(ctx: JobContext[dict[str, object]]) -> None:
            return None

        yield db


def _each(call: Callable[[], object], times: int) -> int:
    for _ in range(times):
        call()
    return times


def _create(db: Database, count: int) -> int:
    for first in range(0, count, BATCH):
        db.jobs.create_jobs([JobRequest(job_type="noop")] * min(BATCH, count - first))
    return count


def _drain(db: Database, before: int, count: int) -> int:
    db.jobs.resume_queue("noop")
    _settle(db, before + count)
    return count


def _settle(db: Database, completed: int) -> None:
    """Until so many jobs are completed, which any statement sees then, and that is durable."""
    backend, deadline, pause = db.context.backend, time.monotonic() + _WAIT_S, threading.Event()
    while backend.jobs.count(JobStatus.COMPLETED) < completed:
        assert time.monotonic() < deadline, "the jobs did not end"
        pause.wait(_POLL_S)
    backend.wait_durable(Commit(backend.head(), (), ()))


def _pick_up(db: Database, count: int, theirs: dict[str, float], note: str) -> Iterator[Figure]:
    """From the call of create_job to the first line of the body, on an idle runner."""
    began = threading.Event()
    at = 0.0

    @db.jobs.executor("stamp", prefix="ST", queue="stamp")
    def stamp(ctx: JobContext[dict[str, object]]) -> None:
        nonlocal at
        at = time.perf_counter()
        began.set()

    times_ms = []
    for _ in range(count):
        began.clear()
        start = time.perf_counter()
        job = db.jobs.create_job("stamp")
        assert began.wait(60), "the job did not begin"
        times_ms.append((at - start) * 1000)
        db.jobs.wait(job.id, 60)
    for name, ms in _percentiles(times_ms).items():
        goal = ms < PICK_UP_MS_MAX if name == "p50" else None
        yield Figure(
            f"pick-up, {name} of {count:,}", f"{ms:.2f} ms", f"{theirs[name]:.1f} ms", ms / theirs[name], note, goal
        )


def _percentiles(times_ms: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(times_ms, n=100)
    return {"p50": cuts[49], "p99": cuts[98]}


def _shown(db: Database, ended: int) -> Figure:
    """SHOW JOBS of the active ones beside all those that have ended."""
    db.jobs.pause_queue("noop")
    active = [job.id for job in db.jobs.create_jobs([JobRequest(job_type="noop")] * 20)]
    times_ms = []
    for _ in range(7):
        start = time.perf_counter()
        found = db.execute("SHOW JOBS WHERE status IN ('new', 'queued', 'running', 'retrying')")
        times_ms.append((time.perf_counter() - start) * 1000)
        assert len(found.rows) == 20, len(found.rows)
    for job_id in active:
        db.jobs.cancel_job(job_id)
    ms = statistics.median(times_ms)
    return Figure(
        f"SHOW JOBS of 20 active, {ended:,} ended", f"{ms:.1f} ms", note=f"at most {SHOW_MS_MAX:g} ms",
        passed=ms <= SHOW_MS_MAX,
    )  # fmt: skip


def claims(ended: int, claimed: int = 1_000) -> Iterator[Figure]:
    """What a claim reads beside no ended jobs and beside many, on disk; the active ones of those many."""
    with tempfile.TemporaryDirectory() as folder:
        fresh, full = (
            claim_reads(RocksKv(Path(folder) / name, create=True), ended=count, claimed=claimed)
            for name, count in (("fresh", 0), ("full", ended))
        )
        for count, reads in ((0, fresh), (ended, full)):
            keys, size = sum(one.keys_read for one in reads), sum(one.bytes_read for one in reads)
            text = f"{keys / claimed:.2f} keys, {size / claimed:,.0f} bytes"
            yield Figure(f"one claim, {count:,} ended", text, note="equal for each claim", passed=reads == fresh)
        settings = Settings.load({**QUIET, "storage.durability": "os", "jobs.history_completed_days": 36_500})
        backend = KvBackend(RocksKv(Path(folder) / "full", create=False), SystemClock(), durability="os")
        with Database(AppContext(None, settings, backend=backend, root=Path(folder) / "root")) as db:
            db.jobs.executor("noop", prefix="NO", queue="noop")(lambda ctx: None)
            yield _shown(db, ended)


# The peer


def _peer(durability: str, *, count: int, single: int, slots: int) -> dict[str, float]:
    """The same by Huey: tasks whose end is stored, `slots` threads, the shortest delay that it allows a poll."""
    with tempfile.TemporaryDirectory() as folder:
        huey = SqliteHuey(
            "bench", filename=str(Path(folder) / "huey.db"), fsync=FSYNC[durability], store_none=True, results=True
        )
        began = threading.Event()
        at: list[float] = [0.0]

        @huey.task()
        def noop() -> None:
            return None

        @huey.task()
        def stamp() -> None:
            at[0] = time.perf_counter()
            began.set()

        figures = {"create": rate(lambda: _each(noop, single))}
        _each(noop, count - single)
        figures["drain"] = _peer_drain(huey, count, slots)
        with _consumer(huey, slots):
            times_ms = []
            for _ in range(100):
                began.clear()
                start = time.perf_counter()
                stamp()
                assert began.wait(60), "the task did not begin"
                times_ms.append((at[0] - start) * 1000)
        return {**figures, **_percentiles(times_ms)}


@contextmanager
def _consumer(huey: Any, slots: int) -> Iterator[None]:
    logging.getLogger("huey").setLevel(logging.CRITICAL)
    consumer = huey.create_consumer(workers=slots, worker_type="thread", periodic=False, initial_delay=0.1)
    consumer.start()
    try:
        yield
    finally:
        consumer.stop(graceful=True)
        for _, worker in consumer.worker_threads:
            worker.join(20)


def _peer_drain(huey: Any, count: int, slots: int) -> float:
    """Tasks per second; a task is complete when its result is stored."""
    done = itertools.count(1)
    finished = threading.Event()

    @huey.signal("complete")
    def ended(signal: str, task: Any) -> None:
        if next(done) == count:
            finished.set()

    start = time.perf_counter()
    with _consumer(huey, slots):
        assert finished.wait(_WAIT_S), "the tasks did not end"
        took_s = time.perf_counter() - start
    huey.disconnect_signal(ended)
    return count / took_s
