"""A restore that is stopped anywhere leaves the old or the new database, never a mixture.

Processes that end at its named points are in `tests/crash/test_named_points.py`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kalamdb.app_context import AppContext
from kalamdb.backup.restore import Probation, restore
from kalamdb.config import Settings
from kalamdb.testing.maintenance import Unwatched
from tests.backup.support import (
    QUIET,
    Image,
    Stopped,
    StoppingFiles,
    connect,
    connect_with,
    generations,
    restore_job,
    state,
)

_FULL_CHECK_EVERY = 7
"""So many stops share one look at the whole database; the others look at what decides."""


def is_old(path: Path) -> bool:
    """Whether the next start takes the database that was there."""
    return (path / "CURRENT").read_bytes().startswith(b"gen-1\n")


def test_a_restore_from_outside_that_dies_at_any_step_leaves_the_old_or_the_new_database(world: Image) -> None:
    trial, counting = world.path / "trial", StoppingFiles()
    shutil.copytree(world.old, trial)
    restore(world.backups, trial, overwrite=True, operations=counting)
    assert state(trial) == world.after
    decided = counting.steps.index("rename CURRENT")
    assert counting.steps[decided:] == ["rename CURRENT", "fsync folder trial"]
    shutil.rmtree(trial)
    shutil.copytree(world.old, trial)
    for at in range(len(counting.steps)):
        with pytest.raises(Stopped):
            restore(world.backups, trial, overwrite=True, operations=StoppingFiles(at))
        assert is_old(trial) == (at <= decided), counting.steps[at]
        if at % _FULL_CHECK_EVERY == 0 or at >= decided:
            assert state(trial) == (world.before if at <= decided else world.after), counting.steps[at]


def test_a_restore_into_a_new_directory_that_dies_at_any_step_can_be_repeated(world: Image) -> None:
    trial, counting = world.path / "trial", StoppingFiles()
    restore(world.backups, trial, operations=counting)
    assert counting.steps[-2:] == ["rename FORMAT", "fsync folder trial"]
    for at in range(len(counting.steps)):
        shutil.rmtree(trial, ignore_errors=True)
        with pytest.raises(Stopped):
            restore(world.backups, trial, operations=StoppingFiles(at))
        assert (trial / "FORMAT").exists() == (at == len(counting.steps) - 1), counting.steps[at]
        if at % _FULL_CHECK_EVERY == 0 or at == len(counting.steps) - 1:
            if at != len(counting.steps) - 1:
                restore(world.backups, trial, overwrite=True)
            assert state(trial) == world.after


def context_of(path: Path, files: StoppingFiles) -> AppContext:
    """The parts of a database; nothing of it is started."""
    return AppContext(path, Settings.load(QUIET, environment={}), operations=files)


def test_a_restore_job_that_dies_at_any_step_leaves_the_running_database_alone(world: Image) -> None:
    files = StoppingFiles()
    context = context_of(world.old, files)
    try:
        for at in range(1000):
            files.steps.clear()
            files.at = at
            try:
                context.backups.restore(str(world.backups), Unwatched(), str, resume_jobs=False)
            except Stopped:
                assert is_old(world.old) and context.backups.pending() is None
                continue
            break
        assert "rename ORIGIN" in files.steps and files.steps[-1].startswith("fsync folder gen-")
        assert at == len(files.steps) > 20
    finally:
        context.stop()
    assert len(generations(world.old)) == at + 1
    # Every half generation goes, the one that was decided on is taken.
    assert state(world.old) == world.after


def test_half_a_generation_is_removed_by_the_next_start(world: Image) -> None:
    context = context_of(world.old, StoppingFiles(12))
    with pytest.raises(Stopped):
        context.backups.restore(str(world.backups), Unwatched(), str, resume_jobs=False)
    context.stop()
    assert generations(world.old) == ["gen-1", "gen-2"]
    assert state(world.old) == world.before
    assert generations(world.old) == ["gen-1"]


def test_a_start_that_dies_at_any_step_after_a_restore_is_taken_up_by_the_next(world: Image) -> None:
    with connect(world.old) as db:
        restore_job(db, world.backups)
    pending, trial, counting = world.old, world.path / "trial", StoppingFiles()
    shutil.copytree(pending, trial)
    with connect_with(trial, counting) as db:
        assert db.context.probation is not None and db.context.probation.over.wait(20)
    steps = counting.steps
    switched = steps.index("rename CURRENT")
    assert steps[-1] == "remove folder gen-1"
    for at in range(len(steps)):
        if at <= switched + 2 or at % _FULL_CHECK_EVERY == 0 or at == len(steps) - 1:
            shutil.rmtree(trial)
            shutil.copytree(pending, trial)
            start_that_dies(trial, at)
            assert is_old(trial) == (at <= switched), steps[at]
            assert state(trial) == world.after, steps[at]


def start_that_dies(path: Path, at: int) -> None:
    """Starts and takes the generation before the restore away, as far as the operation on files."""
    try:
        context = context_of(path, StoppingFiles(at))
    except Stopped:
        return
    try:
        assert context.directory is not None
        with pytest.raises(Stopped):
            Probation(context.directory, list, context.clock).step()
    finally:
        context.stop()
