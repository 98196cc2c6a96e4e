"""Flush, compaction, cleanup and large statements, stopped before each write, fsync, rename, unlink and commit.

After each stop the store is opened four times: with everything that was done (a killed process), with
only what was synced (a power cut), and with either half of that. Nothing may be lost, doubled or left.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kalamdb.app_context import AppContext
from kalamdb.clock import SystemClock
from kalamdb.database import Database
from kalamdb.storage.kv import KvBackend
from kalamdb.testing.crash import DurableKv, SteppedBackend, SteppedFiles
from tests.crash.attempts import Attempt, Image
from tests.crash.support import (
    Moment,
    Operation,
    contents,
    execute,
    fill,
    judge,
    run_job,
    run_waiting,
    settings,
    settle,
)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """Tables with rows in both tiers and both levels, one without files, one to be dropped, and things to sweep."""
    root, kv = tmp_path_factory.mktemp("image") / "segments", DurableKv()
    root.mkdir()
    context = AppContext(None, settings(), backend=KvBackend(kv, SystemClock()), root=root)
    fill(context)
    context.stop()
    return Image(kv, root)


def flush(context: AppContext) -> None:
    run_job(context, "flush", {"table_id": "app.t"})
    while context.backend.remove_retired(1):
        pass


def first_flush(context: AppContext) -> None:
    run_job(context, "flush", {"table_id": "app.n"})


def compact(context: AppContext) -> None:
    run_job(context, "compact", {"table_id": "app.t"})


def drop(context: AppContext) -> None:
    execute(context, "DROP TABLE app.d")
    run_waiting(context)


def sweep(context: AppContext) -> None:
    run_job(context, "cleanup", {"operation": "sweep"})


def large_insert(context: AppContext) -> None:
    values = ", ".join(f"({number}, 'large')" for number in range(1, 13))
    execute(context, f"INSERT INTO app.n VALUES {values} ON CONFLICT (id) DO UPDATE SET v = excluded.v", "ann")


def large_delete(context: AppContext) -> None:
    execute(context, "DELETE FROM app.s WHERE id < 10")


OPERATIONS: dict[str, Operation] = {
    one.__name__: one for one in (flush, first_flush, compact, drop, sweep, large_insert, large_delete)
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_stopped_before_any_step_loses_doubles_and_leaves_nothing(
    image: Image, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    operation = OPERATIONS[name]
    whole = Attempt(image, tmp_path / "whole", operation, None)
    moment = Moment(whole.before, whole.after)
    steps, reopened = len(whole.stop.steps), 0
    for at in range(steps + 1):
        attempt = Attempt(image, tmp_path / str(at), operation, at)
        assert attempt.stop.steps[:at] == whole.stop.steps[:at]
        next_step = whole.stop.steps[at] if at < steps else "the end"
        for how, kv, root in attempt.remains(tmp_path / str(at)):
            reopened += 1
            _reopen(kv, root, moment, finished=at == steps, where=f"{name} stopped before {next_step} ({at}), {how}")
        shutil.rmtree(tmp_path / str(at))
    with capsys.disabled():
        print(f"\n{name}: stopped before each of {steps} steps, reopened {reopened} times")
    assert moment.seen == ({"before", "after"} if whole.before != whole.after else {"after"})


def _reopen(kv: DurableKv, root: Path, moment: Moment, *, finished: bool, where: str) -> None:
    context = AppContext(None, settings(), backend=KvBackend(kv, SystemClock()), root=root)
    found = contents(context)
    moment.accept(found, finished=finished, where=where)
    with Database(context) as db:
        assert db.check().problems == [], where
        settle(db)
        judge(db)
        assert contents(db.context) == found, where


def test_a_folder_that_a_killed_process_made_is_synced_before_a_file_in_it_is_named(
    image: Image, tmp_path: Path
) -> None:
    whole = Attempt(image, tmp_path / "whole", first_flush, None)
    made = [at for at, step in enumerate(whole.stop.steps) if step == "make folder"]
    assert made
    for at in made:
        killed = Attempt(image, tmp_path / str(at), first_flush, at + 1)
        kv = killed.kv.copy(synced_only=False)
        context = AppContext(
            None, settings(), backend=KvBackend(kv, SystemClock()), operations=killed.files, root=killed.root
        )
        with Database(context) as db:
            settle(db)
        power_cut = tmp_path / f"{at}-cut"
        killed.files.copy_durable(power_cut)
        moment = Moment(whole.after, whole.after)
        _reopen(kv.copy(synced_only=True), power_cut, moment, finished=True, where=f"folder made at step {at}")


class Recorder:
    """What happened to which path, in order."""

    def __init__(self) -> None:
        self.log: list[tuple[str, Path | None]] = []

    def __call__(self, point: str, path: Path | None) -> None:
        when, _, step = point.partition(" ")
        if when == "after":
            self.log.append((step, path))

    def first(self, step: str, path: Path | None = None) -> int:
        """Index of the first such step."""
        return next(at for at, (name, where) in enumerate(self.log) if name == step and path in (None, where))

    def last(self, step: str, path: Path | None = None) -> int:
        """Index of the last such step."""
        return max(at for at, (name, where) in enumerate(self.log) if name == step and path in (None, where))


@pytest.mark.parametrize("name", OPERATIONS)
def test_files_and_folders_are_synced_before_the_commit_that_names_them_and_unlinked_after_the_one_that_does_not(
    image: Image, tmp_path: Path, name: str
) -> None:
    record = Recorder()
    root = tmp_path / "segments"
    shutil.copytree(image.root, root)
    backend = SteppedBackend(KvBackend(image.kv.copy(synced_only=False), SystemClock()), record)
    context = AppContext(None, settings(), backend=backend, operations=SteppedFiles(record), root=root)
    OPERATIONS[name](context)
    context.stop()
    steps = [step for step, _ in record.log]
    created = [path for step, path in record.log if step == "create segment" and path is not None]
    assert bool(created) is (name not in ("drop", "sweep"))
    for path in created:
        synced, named = record.last("fsync segment", path), record.last("commit of the publication")
        assert record.last("write segment", path) < synced < record.last("fsync folder", path.parent)
        in_folder = next(at for at in range(synced, named) if record.log[at] == ("fsync folder", path.parent))
        assert in_folder < named < record.last("durability of the publication")
        assert record.first("durability of the intent") < record.first("create segment", path)
        # Each folder on the way down was synced into its parent before the file was named.
        for folder in path.parents[: path.parents.index(root)]:
            assert record.first("fsync folder", folder.parent) < named
    for at, (step, path) in enumerate(record.log):
        if step == "make folder":
            assert path is not None
            assert record.log[at + 1] == ("fsync folder", path.parent)
        if step == "unlink segment":
            durable = max(
                (before for before in range(at) if steps[before].startswith("durability of the")), default=None
            )
            assert durable is not None
            assert steps[durable] in ("durability of the publication", "durability of the un-naming")
    assert ("unlink segment" in steps) is (name in ("compact", "drop", "sweep"))
