"""Workers whose lease went while they stood still: nothing that they do afterwards counts.

In one process a worker is held before each commit and each step on files of its executor, a second one
finishes the job, then the first goes on. The test takes the lease in the store only, so that it is the store
that refuses, whatever the context of the first knows.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from kalamdb.app_context import AppContext
from kalamdb.check import check_database
from kalamdb.clock import SystemClock
from kalamdb.errors import LeaseLost
from kalamdb.storage import Batch
from kalamdb.storage.jobs import AttemptOutcome, JobMove, JobStatus
from kalamdb.storage.kv import KvBackend
from kalamdb.testing.crash import SteppedBackend, SteppedFiles
from tests.crash.attempts import HeldThread, Image, old_image
from tests.crash.support import (
    claim,
    contents,
    create_job,
    execute,
    fill_for_all,
    run_job,
    settings,
)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """Something to do for each executor."""
    return old_image(tmp_path_factory.mktemp("image"), fill_for_all)


class Trial:
    """A copy of the image in which one worker is held."""

    def __init__(self, image: Image, folder: Path, create: Callable[[AppContext], object], at: int | None) -> None:
        root = folder / "segments"
        shutil.copytree(image.root, root)
        self.held = HeldThread(at, on_files=True)
        backend = SteppedBackend(KvBackend(image.kv.copy(synced_only=False), SystemClock()), self.held)
        self.context = AppContext(None, settings(), backend=backend, operations=SteppedFiles(self.held), root=root)
        create(self.context)
        [self.first] = claim(self.context)
        self.held.start(self.first)

    def revoke(self) -> None:
        """The job waits again; the first worker hears nothing of it."""
        row = self.first.row
        changes = {"status": JobStatus.QUEUED, "outcome": AttemptOutcome.INTERRUPTED}
        self.context.backend.commit(Batch(jobs=[JobMove(row.job_id, JobStatus.RUNNING, row.lease_id, changes)]))

    def status(self) -> JobStatus:
        """Of the job."""
        row = self.context.backend.jobs.get(self.first.row.job_id)
        assert row is not None
        return row.status

    def state(self) -> dict[str, Any]:
        """Rows, segment records, the job with its history and attempts, users."""
        context = self.context
        jobs, job_id = context.backend.jobs, self.first.row.job_id
        segments = {
            str(entry.definition.table_id): [one.record for one in context.store.state(entry.definition.uid).segments]
            for entry in context.catalog.tables()
        }
        return {
            "rows": contents(context),
            "deleted": sorted(execute(context, "SELECT id FROM app.t WHERE _deleted", "ann")),
            "segments": segments,
            "job": jobs.get(job_id),
            "events": list(jobs.events(job_id)),
            "attempts": jobs.attempts(job_id),
            "users": list(context.users.all()),
        }

    def judge(self) -> None:
        """After a sweep no file is there that no record names, and everything fits together."""
        run_job(self.context, "cleanup", {"operation": "sweep"})
        report = check_database(self.context.store)
        assert report.problems == []
        assert (report.strays, report.intents, report.dropped) == (0, 0, 0)


def backups(context: AppContext) -> Path:
    return context.store.root.parent / "backups"


CREATE: dict[str, Callable[[AppContext], object]] = {
    "flush": lambda context: create_job(context, "flush", {"table_id": "app.t"}),
    "compact": lambda context: create_job(context, "compact", {"table_id": "app.t"}),
    "drop": lambda context: execute(context, "DROP TABLE app.d"),
    "sweep": lambda context: create_job(context, "cleanup", {"operation": "sweep"}),
    "retention": lambda context: create_job(context, "retention", {}),
    "stream_eviction": lambda context: create_job(context, "stream_eviction", {}),
    "user_cleanup": lambda context: execute(context, "PURGE USER bob"),
    "backup": lambda context: create_job(context, "backup", {"path": str(backups(context))}),
}


@pytest.fixture(params=CREATE)
def name(request: pytest.FixtureRequest) -> str:
    """An operation of CREATE."""
    return str(request.param)


@pytest.fixture
def steps(image: Image, tmp_path: Path, name: str) -> list[str]:
    """What the operation does, from its begin to its end."""
    trial = Trial(image, tmp_path / "unheld", CREATE[name], None)
    assert trial.held.error is None and trial.status() is JobStatus.COMPLETED
    trial.context.stop()
    return trial.held.steps


def test_nothing_that_a_stale_worker_does_counts(
    image: Image, tmp_path: Path, name: str, steps: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [at for at, step in enumerate(steps) if step.startswith("commit") or step not in steps[:at]]
    told = try_all(image, tmp_path, name, chosen)
    with capsys.disabled():
        print(f"\n{name}: {told}")


@pytest.mark.long
def test_nothing_that_a_stale_worker_does_counts_whichever_step_it_is_held_at(
    image: Image, tmp_path: Path, name: str, steps: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    told = try_all(image, tmp_path, name, range(len(steps)))
    with capsys.disabled():
        print(f"\n{name}: {told}")


def try_all(image: Image, tmp_path: Path, name: str, chosen: Iterable[int]) -> str:
    """Hold a worker before each of these steps; what was done."""
    stale: list[str] = []
    ended: list[str] = []
    for at in chosen:
        trial = Trial(image, tmp_path / str(at), CREATE[name], at)
        assert trial.held.is_held, (at, trial.held.steps, trial.held.error)
        if trial.status() is JobStatus.RUNNING:
            stale.append(trial.held.steps[at])
            judge_stale(trial, name)
        else:
            # The job has ended: what is left to do is nobody else's any more.
            ended.append(trial.held.steps[at])
            trial.held.release()
            assert trial.held.error is None
        trial.judge()
        trial.context.stop()
        shutil.rmtree(tmp_path / str(at))
    assert stale
    return (
        f"held before {len(stale)} steps: {', '.join(dict.fromkeys(stale))}; "
        f"after the end of the job: {', '.join(dict.fromkeys(ended)) or 'none'}"
    )


def judge_stale(trial: Trial, name: str) -> None:
    """A second worker does the whole job, then the held one goes on and changes nothing."""
    steps = list(trial.held.steps)
    trial.revoke()
    [second] = claim(trial.context)
    if trial.context.store.mirroring.locked():
        # The held one has the lock under which a mirror changes: the second waits for it.
        runner = threading.Thread(target=second.run, daemon=True)
        runner.start()
        trial.held.release()
        runner.join(20)
        assert not runner.is_alive()
        before = trial.state()
    else:
        second.run()
        if name == "user_cleanup":
            # The name is free again: what a new user of that name writes is not the first worker's to erase.
            execute(trial.context, "INSERT INTO app.t VALUES (77, 'new')", "bob")
        before = trial.state()
        trial.held.release()
    assert (before["job"].status, before["job"].attempt) == ("completed", 2), steps
    assert isinstance(trial.held.error, LeaseLost), (steps, trial.held.error)
    assert trial.held.late == [], steps
    assert trial.state() == before, steps
    if name == "backup":
        # Held before the job's own end the first worker's backup was complete already, and stays one.
        made = trial.context.backups.entries(str(backups(trial.context)))
        assert 1 <= len(made) <= 2
        for entry in made:
            trial.context.backups.verify(f"{backups(trial.context)}/{entry.backup_id}")
