"""Processes killed at random moments while a built-in executor runs; the next one recovers as `on_interrupt` says.

The moments lie between the acceptance of a job and its end, as long as that took undisturbed; every second one
of a restore in the start after it.
"""

from __future__ import annotations

import multiprocessing
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from kalamdb.app_context import AppContext
from kalamdb.database import Database
from kalamdb.jobs import Job
from kalamdb.storage.jobs import OnInterrupt
from tests.crash.children import OPERATIONS, params_of, start, work
from tests.crash.support import (
    Contents,
    EarlierClock,
    contents,
    execute,
    fill_for_all,
    judge,
    judge_copies,
    judge_jobs,
    no_bob,
    no_bucket,
    no_deleted_row,
    run_job,
    settings,
    settle,
)


def nothing_left(job_type: str) -> Callable[[Database], None]:
    """Asserts that a further job of that type finds nothing to do."""

    def look(db: Database) -> None:
        assert db.context.directory is not None
        params = params_of(job_type, db.context.directory.path)
        assert db.jobs.wait(db.jobs.create_job(job_type, params).id, 30).status == "skipped"

    return look


EFFECTS: dict[str, Callable[[Database], None]] = {
    "flush": nothing_left("flush"),
    "compact": nothing_left("compact"),
    "cleanup": lambda db: None,
    "retention": no_deleted_row,
    "stream_eviction": no_bucket,
    "user_cleanup": no_bob,
    "backup": OPERATIONS["backup"],
    "restore": lambda db: None,
}
"""What is so, or can be done, once the job of each executor has ended."""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a closed database in which each executor finds something to do, and a backup of it."""
    folder = tmp_path_factory.mktemp("image")
    context = AppContext(folder / "data", settings(), clock=EarlierClock())
    fill_for_all(context)
    run_job(context, "backup", params_of("backup", folder / "data"))
    execute(context, "INSERT INTO app.s VALUES (100, 'not in the backup')")
    context.stop()
    return folder


class Child:
    """A process that runs a job in a copy of the image."""

    def __init__(self, image: Path, folder: Path, job_type: str) -> None:
        self.path = shutil.copytree(image, folder) / "data"
        received, sender = multiprocessing.Pipe(duplex=False)
        self._received: Connection = received
        self._process: ForkServerProcess = start(work, self.path, job_type, sender)
        sender.close()
        self.job_id: str = self.receive()

    def receive(self) -> str:
        assert self._received.poll(60)
        return str(self._received.recv())

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._received.close()


@dataclass
class Trial:
    """Kills of one executor."""

    job_type: str
    before: Contents
    after: Contents
    seen: Counter[str] = field(default_factory=Counter)

    def judge(self, path: Path, job_id: str, where: str) -> None:
        """Open what a kill left and let the job end."""
        with Database(AppContext(path, settings())) as db:
            assert db.check().problems == [], where
            settle(db)
            judge(db)
            job = db.jobs.get_job(job_id)
            self._count(job, db.context.job_registry.get_or_error(self.job_type).on_interrupt, where)
            judge_jobs(db)
        with Database(AppContext(path, settings())) as db:
            # A restore that ended counts from here on.
            is_done = self.job_type != "restore" or job.status == "completed"
            assert contents(db.context) == (self.after if is_done else self.before), where
            judge_copies(db)
            assert db.jobs.get_job(job_id).status == job.status, where
            EFFECTS[self.job_type](db)
            settle(db)
            judge(db)
            judge_copies(db)

    def _count(self, job: Job, policy: OnInterrupt, where: str) -> None:
        outcomes = [str(one.outcome) for one in job.attempts()]
        ends = [event.text for event in job.events() if event.text.startswith(("Job completed", "Job failed"))]
        match policy, outcomes:
            case _, ["completed"]:
                self.seen["ended already or not begun"] += 1
                assert (job.status, job.retry_count, len(ends)) == ("completed", 0, 1), where
            case OnInterrupt.REQUEUE, ["interrupted", "completed"]:
                self.seen["requeued"] += 1
                assert (job.status, job.retry_count, len(ends)) == ("completed", 0, 1), where
            case OnInterrupt.FAIL, ["failed"]:
                self.seen["failed"] += 1
                assert (job.status, job.message) == ("failed", "Server restarted during execution"), where
            case _:
                raise AssertionError(f"{where}: {policy}: {job.status}: {job.message}: {outcomes}")


def kill(image: Path, folder: Path, job_type: str, times: int) -> str:
    """Kill a process so often while it runs such a job; a line of figures."""
    with Database(AppContext(shutil.copytree(image, folder / "before") / "data", settings())) as db:
        before = contents(db.context)
    whole, words = Child(image, folder / "whole", job_type), ["completed"]
    if job_type == "restore":
        words.append("started")
    took_s = []
    for word in words:
        began = time.monotonic()
        assert whole.receive() == word
        took_s.append(time.monotonic() - began)
    whole.kill()
    with Database(AppContext(whole.path, settings())) as db:
        after = contents(db.context)
    trial, seed = Trial(job_type, before, after), random.Random(f"{job_type}, {times} kills")
    for number in range(times):
        child = Child(image, folder / str(number), job_type)
        # Every second restore ends, and its process is killed in the start after it.
        span = number % len(words)
        for word in words[:span]:
            assert child.receive() == word
        moment_s = seed.uniform(0, took_s[span])
        time.sleep(moment_s)
        child.kill()
        trial.judge(child.path, child.job_id, f"{job_type}, kill {number} after {moment_s * 1000:.1f} ms")
        shutil.rmtree(folder / str(number))
    figures = ", ".join(f"{count} {name}" for name, count in sorted(trial.seen.items()))
    spans = " and ".join(f"{span_s * 1000:.0f} ms" for span_s in took_s)
    return f"{job_type}: {times} kills within {spans}; {figures}"


@pytest.mark.parametrize("job_type", EFFECTS)
def test_a_job_whose_process_is_killed_at_any_moment_is_recovered_and_has_its_effect_once(
    image: Path, tmp_path: Path, job_type: str, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = kill(image, tmp_path, job_type, 2)
    with capsys.disabled():
        print(f"\n{figures}")


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("job_type", EFFECTS)
def test_a_job_whose_process_is_killed_at_ten_moments_is_recovered_and_has_its_effect_once(
    image: Path, tmp_path: Path, job_type: str, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = kill(image, tmp_path, job_type, 10)
    with capsys.disabled():
        print(f"\n{figures}")


def test_each_executor_is_killed(image: Path, tmp_path: Path) -> None:
    with Database(AppContext(shutil.copytree(image, tmp_path / "copy") / "data", settings())) as db:
        assert EFFECTS.keys() == set(db.context.job_registry.job_types())
