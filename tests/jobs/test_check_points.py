"""Cancel, time-out, pause and clean stop, each at the first, middle and last check of each built-in executor."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kalamdb.app_context import AppContext
from kalamdb.check import check_database
from kalamdb.clock import Clock, SystemClock
from kalamdb.database import Database
from kalamdb.errors import LeaseLost
from kalamdb.jobs import Job, JobContext
from kalamdb.storage.kv import KvBackend
from kalamdb.testing.clock import SimulatedClock
from kalamdb.testing.workers import WatchedWorkers
from tests.crash.attempts import Image, old_image
from tests.crash.support import (
    contents,
    fill_for_all,
    judge,
    settings,
    settle,
)
from tests.jobs.conftest import WAIT_S, Checks, Gate, until

_TIMEOUT_S = 5
ACTIONS = ("cancel", "timeout", "pause", "stop")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """Something to do for each executor."""
    return old_image(tmp_path_factory.mktemp("image"), fill_for_all)


class World:
    """A copy of the image, opened as often as a test likes."""

    def __init__(self, image: Image, folder: Path) -> None:
        self.root = folder / "segments"
        self.folder = folder
        shutil.copytree(image.root, self.root)
        self.kv = image.kv.copy(synced_only=False)

    def open(self, checks: Checks, clock: Clock | None = None, **given: Any) -> Database:
        clock = clock or SystemClock()
        context = AppContext(
            None, settings(shutdown__timeout_s=0, **given), backend=KvBackend(self.kv, clock),
            root=self.root, clock=clock, workers=partial(WatchedWorkers, checks),
        )  # fmt: skip
        return Database(context)


JOBS: dict[str, Callable[[World], dict[str, Any]]] = {
    "flush": lambda world: {"table_id": "app.t"},
    "compact": lambda world: {"table_id": "app.t"},
    "cleanup": lambda world: {"operation": "sweep"},
    "retention": lambda world: {},
    "stream_eviction": lambda world: {},
    "user_cleanup": lambda world: {"user_id": "bob"},
    "backup": lambda world: {"path": str(world.folder / "backups")},
}


def interrupted(db: Database, clock: SimulatedClock, job: Job, action: str) -> Job:
    """The job, held at a check, once the action was acknowledged."""
    match action:
        case "cancel":
            found = db.jobs.cancel_job(job.id)
            assert found.status == "cancelled"
            return found
        case "timeout":
            clock.advance(_TIMEOUT_S + 1)
            until(lambda: db.jobs.get_job(job.id).status == "retrying")
            found = db.jobs.get_job(job.id)
            assert found.message == f"the attempt took longer than its time-out of {_TIMEOUT_S} s"
            clock.advance(1)
            return found
        case "pause":
            found = db.jobs.pause_job(job.id)
            assert (found.status, found.hold, found.retry_count) == ("queued", "paused", 0)
            return found
        case _:
            raise AssertionError(action)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("job_type", JOBS)
def test_an_attempt_ends_at_each_check_and_the_job_goes_on_as_it_should(
    image: Image, tmp_path: Path, job_type: str, action: str
) -> None:
    counting = Checks()
    world = World(image, tmp_path / "whole")
    with world.open(counting) as db:
        assert db.jobs.wait(db.jobs.create_job(job_type, JOBS[job_type](world)).id, WAIT_S).status == "completed"
        after = contents(db.context)
    for at in sorted({0, counting.count // 2, counting.count - 1}):
        checks, world = Checks(at), World(image, tmp_path / str(at))
        clock = SimulatedClock(start_ms=SystemClock().now_ms())
        db = world.open(checks, clock if action == "timeout" else None)
        with db:
            timeout_s = _TIMEOUT_S if action == "timeout" else None
            job = db.jobs.create_job(job_type, JOBS[job_type](world), timeout_s=timeout_s)
            assert checks.held.wait(WAIT_S)
            if action != "stop":
                ended = interrupted(db, clock, job, action)
                if action in ("cancel", "pause"):
                    head, rows = db.context.backend.head(), contents(db.context)
                    assert db.jobs.runner.abandoned_threads == 0
                    assert (db.context.backend.head(), contents(db.context)) == (head, rows)
                if action == "cancel":
                    db.jobs.retry_job(ended.id)
                if action == "pause":
                    db.jobs.resume_job(ended.id)
                _finish(db, job, after)
        if action == "stop":
            world.kv = world.kv.copy(synced_only=False)
            with world.open(Checks()) as again:
                if job_type == "backup":
                    failed = again.jobs.get_job(job.id)
                    assert (failed.status, failed.message) == ("failed", "Server restarted during execution")
                    assert again.context.backups.entries(str(world.folder / "backups")) == []
                    again.jobs.retry_job(job.id)
                _finish(again, job, after)
        shutil.rmtree(tmp_path / str(at))


def _finish(db: Database, job: Job, after: Any) -> None:
    ended = db.jobs.wait(job.id, WAIT_S)
    assert (ended.status, ended.attempt) == ("completed", 2), f"{ended.message} {ended.exception_trace}"
    assert contents(db.context) == after
    settle(db)
    judge(db)
    assert check_database(db.context.store).problems == []


@pytest.mark.parametrize("action", ["cancel", "timeout", "stop"])
def test_an_executor_that_never_checks_writes_nothing_after_the_acknowledgement(
    image: Image, tmp_path: Path, action: str
) -> None:
    world, gate, refused = World(image, tmp_path / "data"), Gate(), []
    db = world.open(Checks(), jobs__cancel_timeout_s=0.05)
    with db:

        @db.jobs.executor("deaf", prefix="DE", max_retries=0, timeout_s=0.05 if action == "timeout" else None)
        def deaf(ctx: JobContext[Any]) -> None:
            ctx.execute("INSERT INTO app.s VALUES (500, 'in time')")
            gate()
            for write in (
                lambda: ctx.execute("INSERT INTO app.s VALUES (501, 'late')"),
                lambda: ctx.progress(1),
                lambda: ctx.checkpoint({"late": True}),
                lambda: ctx.log.info("late"),
                lambda: ctx.create_job("deaf"),
            ):
                try:
                    write()
                except LeaseLost as exc:
                    refused.append(exc)

        job = db.jobs.create_job("deaf")
        gate.await_entry()
        match action:
            case "cancel":
                assert db.jobs.cancel_job(job.id).status == "cancelled"
            case "timeout":
                assert db.jobs.wait(job.id, WAIT_S).status == "failed"
            case _:
                db.jobs.stop(0.0)
                assert db.jobs.get_job(job.id).status == "failed"
        head, events = db.context.backend.head(), db.jobs.get_job(job.id).events()
        gate.open.set()
        until(lambda: db.jobs.runner.abandoned_threads == 0)
        assert len(refused) == 5 and db.context.backend.head() == head
        assert list(db.jobs.get_job(job.id).events()) == list(events) and len(db.jobs.list_jobs(job_type="deaf")) == 1
        assert db.execute("SELECT id FROM app.s WHERE id >= 500").rows == [(500,)]
