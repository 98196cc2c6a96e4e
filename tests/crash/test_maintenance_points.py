"""Retention, stream eviction, erasing a user and backup, stopped before each write, fsync, rename, unlink and commit.

The database of these tests is two hours old: its deletions are past their retention, its streams past
their time to live. What is left of each stop is opened, the job runs to its end, and nothing is lost, back or
half removed. Restore is stopped in `tests/backup/test_restore_crash.py`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import kalamdb
from kalamdb.app_context import AppContext
from kalamdb.clock import SystemClock
from kalamdb.database import Database
from kalamdb.storage.jobs import JobStatus
from kalamdb.storage.kv import KvBackend
from kalamdb.testing.crash import DurableKv
from tests.crash.attempts import POINTS_MAX, Attempt, Image, old_image, spread
from tests.crash.support import (
    Contents,
    contents,
    fill_old,
    judge,
    no_bob,
    no_bucket,
    no_deleted_row,
    run_job,
    settings,
    settle,
)

MOST = pytest.mark.parametrize(
    "most",
    [
        pytest.param(POINTS_MAX, marks=pytest.mark.timeout(180)),
        pytest.param(None, marks=[pytest.mark.long, pytest.mark.timeout(600)]),
    ],
    ids=["sixty", "all"],
)
"""At how many points an operation is stopped."""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return old_image(tmp_path_factory.mktemp("image"), fill_old)


def backups_of(context: AppContext) -> Path:
    """A target beside the segments."""
    return context.store.root.parent / "backups"


@dataclass(frozen=True)
class Removal:
    """A job, what it removes, and whose rows it may change on the way."""

    job_type: str
    params: dict[str, Any]
    effect: Callable[[Database], None]
    erased: str = ""

    def run(self, context: AppContext) -> None:
        run_job(context, self.job_type, self.params)

    def without_erased(self, found: Contents) -> Contents:
        """What no stop may change."""
        return {key: rows for key, rows in found.items() if key[1] != self.erased or not key[1]}


REMOVALS = [
    Removal("retention", {}, no_deleted_row),
    Removal("stream_eviction", {}, no_bucket),
    Removal("user_cleanup", {"user_id": "bob"}, no_bob, erased="bob"),
]


@MOST
@pytest.mark.parametrize("removal", REMOVALS, ids=lambda removal: removal.job_type)
def test_a_removal_stopped_before_any_step_is_taken_up_and_loses_nothing_else(
    image: Image, tmp_path: Path, removal: Removal, most: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Attempt(image, tmp_path / "whole", removal.run, None)
    steps, reopened, taken_up = whole.stop.steps, 0, 0
    assert removal.without_erased(whole.after) == removal.without_erased(whole.before)
    points = spread(len(steps) + 1, most)
    for at in points:
        attempt = Attempt(image, tmp_path / str(at), removal.run, at)
        assert attempt.stop.steps[:at] == steps[:at]
        next_step = steps[at] if at < len(steps) else "the end"
        for how, kv, root in attempt.remains(tmp_path / str(at)):
            reopened += 1
            where = f"{removal.job_type} stopped before {next_step} ({at}), {how}"
            taken_up += _taken_up(kv, root, removal, whole, where)
        shutil.rmtree(tmp_path / str(at))
    assert taken_up > 0
    with capsys.disabled():
        print(f"\n{removal.job_type}: stopped at {len(points)} of {len(steps) + 1} points, reopened {reopened} times")


def _taken_up(kv: DurableKv, root: Path, removal: Removal, whole: Attempt, where: str) -> bool:
    """Open what is left and let the job end; whether there was one to take up."""
    context = AppContext(None, settings(), backend=KvBackend(kv, SystemClock()), root=root)
    kept = removal.without_erased(whole.before)
    assert removal.without_erased(contents(context)) == kept, where
    before = context.job_manager.list_jobs(job_type=removal.job_type)
    with Database(context) as db:
        assert db.check().problems == [], where
        settle(db)
        judge(db)
        jobs = db.jobs.list_jobs(job_type=removal.job_type)
        assert [job.status for job in jobs] == [JobStatus.COMPLETED] * len(before), where
        assert contents(context) == (whole.after if jobs else whole.before), where
        if jobs:
            removal.effect(db)
            assert db.check().problems == [], where
    return any(job.status.is_active for job in before)


def back_up(context: AppContext) -> None:
    run_job(context, "backup", {"path": str(backups_of(context))})


@MOST
def test_a_backup_stopped_before_any_step_is_whole_or_none(
    image: Image, tmp_path: Path, most: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Attempt(image, tmp_path / "whole", back_up, None)
    steps = whole.stop.steps
    kalamdb.restore(tmp_path / "whole" / "backups", tmp_path / "restored")
    restored = AppContext(tmp_path / "restored", settings())
    assert contents(restored) == whole.before
    restored.stop()
    seen = set()
    points = spread(len(steps) + 1, most)
    for at in points:
        attempt = Attempt(image, tmp_path / str(at), back_up, at)
        _, kv, root = next(attempt.remains(tmp_path / str(at)))
        context = AppContext(None, settings(), backend=KvBackend(kv, SystemClock()), root=root)
        where = f"backup stopped before {steps[at] if at < len(steps) else 'the end'} ({at})"
        with Database(context) as db:
            assert contents(context) == whole.before, where
            assert db.check().problems == [], where
            # One that nobody had claimed runs now.
            settle(db)
            made = [job.status for job in db.jobs.list_jobs(job_type="backup")]
            listed = context.backups.entries(str(backups_of(context)))
            found = [entry for entry in listed if entry.manifest is not None]
            seen.add((*made, len(found)))
            assert made in ([], ["failed"], ["completed"]) and len(found) <= 1, where
            assert made != ["completed"] or found, where
            for entry in found:
                context.backups.verify(f"{backups_of(context)}/{entry.backup_id}")
            again = db.backup(backups_of(context))
            assert again.status == "completed", f"{where}: {again.message}"
            settle(db)
            judge(db)
        assert not list(root.glob(".checkpoints/*")), where
        shutil.rmtree(tmp_path / str(at))
    assert {(0,), ("failed", 0), ("completed", 1)} <= seen
    with capsys.disabled():
        print(f"\nbackup: stopped at {len(points)} of {len(steps) + 1} points; left: {sorted(map(str, seen))}")
