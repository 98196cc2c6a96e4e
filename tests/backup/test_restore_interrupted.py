"""Restore jobs that are asked to stop at a check, and those whose lease goes while they stand still."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest

from kalamdb.app_context import AppContext
from kalamdb.database import Database
from kalamdb.errors import LeaseLost
from kalamdb.storage import Batch
from kalamdb.storage.jobs import AttemptOutcome, JobMove, JobStatus
from kalamdb.testing.crash import SteppedContext
from kalamdb.testing.workers import WatchedWorkers
from tests.backup.support import Image, state
from tests.crash.attempts import HeldThread
from tests.crash.support import claim, create_job, settings
from tests.jobs.conftest import WAIT_S, Checks


def open_(path: Path, checks: Checks) -> Database:
    given = settings(shutdown__timeout_s=0)
    return Database(AppContext(path, given, workers=partial(WatchedWorkers, checks)))


@pytest.mark.parametrize("action", ["cancel", "pause", "stop"])
def test_a_restore_that_is_interrupted_at_a_check_leaves_the_database_that_was_there(world: Image, action: str) -> None:
    trial, counting = world.path / "trial", Checks()
    shutil.copytree(world.old, trial)
    params = {"path": str(world.backups)}
    with open_(trial, counting) as db:
        assert db.jobs.wait(db.jobs.create_job("restore", params).id, WAIT_S).status == "completed"
    for at in (0, counting.count // 2, counting.count - 1):
        shutil.rmtree(trial)
        shutil.copytree(world.old, trial)
        checks = Checks(at)
        with open_(trial, checks) as db:
            job = db.jobs.create_job("restore", params)
            assert checks.held.wait(WAIT_S)
            if action == "cancel":
                assert db.jobs.cancel_job(job.id).status == "cancelled"
            elif action == "pause":
                paused = db.jobs.pause_job(job.id)
                assert (paused.status, paused.hold) == ("queued", "paused")
            assert action == "stop" or db.context.backups.pending() is None
        with open_(trial, Checks()) as db:
            ended = db.jobs.get_job(job.id)
            expected = {"cancel": "cancelled", "pause": "queued", "stop": "failed"}[action]
            assert ended.status == expected
            assert (ended.message == "Server restarted during execution") is (action == "stop")
        assert state(trial) == world.before
        with open_(trial, Checks()) as db:
            (db.jobs.resume_job if action == "pause" else db.jobs.retry_job)(job.id)
            assert db.jobs.wait(job.id, WAIT_S).status == "completed"
        assert state(trial) == world.after


def test_a_stale_restore_decides_nothing(world: Image) -> None:
    at, steps = 0, []
    while True:
        trial, held = world.path / str(at), HeldThread(at)
        shutil.copytree(world.old, trial)
        context = SteppedContext(trial, settings(), held)
        create_job(context, "restore", {"path": str(world.backups)})
        [first] = claim(context)
        held.start(first)
        if not held.is_held:
            context.stop()
            break
        steps.append(held.steps[-1])
        changes = {"status": JobStatus.QUEUED, "outcome": AttemptOutcome.INTERRUPTED}
        job_id, lease_id = first.row.job_id, first.row.lease_id
        context.backend.commit(Batch(jobs=[JobMove(job_id, JobStatus.RUNNING, lease_id, changes)]))
        [second] = claim(context)
        second.run()
        before = context.backend.jobs.get(job_id), context.backend.jobs.events(job_id), context.backups.pending()
        assert before[2] is not None
        held.release()
        assert isinstance(held.error, LeaseLost) and held.late == []
        after = context.backend.jobs.get(job_id), context.backend.jobs.events(job_id), context.backups.pending()
        assert after == before
        context.stop()
        assert state(trial) == world.after, steps
        at += 1
    assert len(steps) >= 2
