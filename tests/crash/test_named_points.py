"""A process that ends at each named point of every built-in executor and of large statements, over RocksDB.

The names follow from the operations on files and the commits (`kalamdb.testing.crash`). A point that an
operation passes and that is not named here fails the test, and so does a named one that is not passed.
"""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import kalamdb
from kalamdb.app_context import AppContext
from kalamdb.database import Database
from tests.crash.children import OPERATIONS, STOPPED, params_of, start, stop_at
from tests.crash.support import (
    Contents,
    EarlierClock,
    Moment,
    contents,
    execute,
    fill,
    fill_old,
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

_NAMING = [
    "before commit of the intent",
    "after commit of the intent",
    "after durability of the intent",
]
_FOLDER = ["after make folder"]
_FILE = [
    "after create segment",
    "before write segment",
    "after write segment",
    "after fsync segment",
    "after fsync folder",
]
_PUBLISHING = [
    "before commit of the publication",
    "after commit of the publication",
    "after durability of the publication",
]
_MIRROR = ["after create mirror", "after write mirror", "after fsync mirror", "after rename mirror"]
_UN_NAMING = ["before commit of the un-naming", "after commit of the un-naming", "after durability of the un-naming"]
_UNLINKING = ["before unlink segment", "after unlink segment"]
_PURGING = ["before purge", "after purge"]
_END = [
    "before commit of the end of the job",
    "after commit of the end of the job",
    "after durability of the end of the job",
]
_COPYING = [
    *_FOLDER, "after create store file", "after write store file", "after fsync store file", "after fsync folder",
    "after create segment", "after write segment", "after fsync segment",
]  # fmt: skip

POINTS: dict[str, list[str]] = {
    "flush": [*_NAMING, *_FOLDER, *_FILE, *_PUBLISHING, *_MIRROR, "after removal of dead rows"],
    "compact": [*_NAMING, *_FILE, *_PUBLISHING, *_UNLINKING, *_MIRROR],
    "drop": [
        "before commit of the drop", "after commit of the drop", "after durability of the drop",
        *_UN_NAMING, *_UNLINKING, "after unlink mirror", "after remove folder",
        "before commit of the end of the dropped table", "after commit of the end of the dropped table",
        "after durability of the end of the dropped table",
    ],
    "sweep": [*_UN_NAMING, *_UNLINKING, "after unlink mirror", "after remove folder", *_END],
    "large statement": [*_NAMING, *_FOLDER, *_FILE, *_PUBLISHING],
    "retention": [*_NAMING, *_FILE, *_PUBLISHING, *_UNLINKING, *_MIRROR, *_PURGING],
    "stream_eviction": [
        "before commit of the eviction", "after commit of the eviction", "after durability of the eviction", *_END,
    ],
    "user_cleanup": [
        "before commit of the mark of the erasure", "after commit of the mark of the erasure",
        "after durability of the mark of the erasure", "before commit of the removal of the hot rows",
        "after commit of the removal of the hot rows", "after durability of the removal of the hot rows",
        *_NAMING, *_FILE, *_PUBLISHING, *_UNLINKING, *_MIRROR, *_PURGING,
        "before commit of the end of the user", "after commit of the end of the user",
        "after durability of the end of the user", *_END,
    ],
    "backup": [
        "before checkpoint", "after checkpoint", *_COPYING, "before unlink backup.json", "after create backup.json",
        "after write backup.json", "after fsync backup.json", "after rename backup.json", "after unlink store file",
        "after remove folder",
    ],
    "restore": [
        *_COPYING, "before unlink ORIGIN", "after create ORIGIN", "after write ORIGIN", "after fsync ORIGIN",
        "after rename ORIGIN", "before commit of the decision to restore", "after commit of the decision to restore",
        "after durability of the decision to restore",
    ],
    "start": [
        "before unlink CURRENT", "after create CURRENT", "after write CURRENT", "after fsync CURRENT",
        "after rename CURRENT", "after fsync folder", "before commit of the adoption", "after commit of the adoption",
        "after durability of the adoption", "after unlink store file", "after unlink segment", "after remove folder",
    ],
}  # fmt: skip
"""A start takes what a restore has staged, and then removes the database before it."""

EFFECTS: dict[str, Callable[[Database], None]] = {
    "retention": no_deleted_row,
    "stream_eviction": no_bucket,
    "user_cleanup": no_bob,
}
"""What is so in the end, wherever the process ended."""


def _is_named_by(point: str, named: set[str]) -> bool:
    """Whether a point is named, is between the same two steps as one that is, or belongs to no operation.

    Progress of jobs, jobs.log, the mirror of another table and the removal of dead rows go on beside it.
    """
    when, _, step = point.partition(" ")
    return (
        point in named
        or (when == "before" and f"after {step}" in named)
        or step.endswith((" of the job", " of the records", " of the commit", " of dead rows", " mirror"))
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with a closed database and its backups: by operation, and for those without one of their own."""
    new, old, staged = (tmp_path_factory.mktemp(name) for name in ("new", "old", "staged"))
    context = AppContext(new / "data", settings())
    fill(context)
    context.stop()
    context = AppContext(old / "data", settings(), clock=EarlierClock())
    fill_old(context)
    run_job(context, "backup", params_of("backup", old / "data"))
    execute(context, "INSERT INTO app.s VALUES (100, 'not in the backup')")
    context.stop()
    shutil.copytree(old, staged, dirs_exist_ok=True)
    with Database(AppContext(staged / "data", settings())) as db:
        OPERATIONS["restore"](db)
    return {"": new, **dict.fromkeys([*EFFECTS, "backup", "restore"], old), "start": staged}


@pytest.mark.parametrize("operation", POINTS)
def test_a_process_that_ends_at_a_named_point_loses_doubles_and_leaves_nothing(
    images: dict[str, Path], tmp_path: Path, operation: str, capsys: pytest.CaptureFixture[str]
) -> None:
    image = images.get(operation, images[""])
    whole = shutil.copytree(image, tmp_path / "whole") / "data"
    # The look at a database with a restore that waits would be its start.
    before = _contents(whole) if operation != "start" else None
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = start(stop_at, whole, operation, None, sender)
    passed: list[str] = receiver.recv()
    child.join()
    named = POINTS[operation]
    assert [point for point in named if point not in passed] == [], "named and never passed"
    assert {point for point in passed if not _is_named_by(point, set(named))} == set(), "passed and not named"
    after = _contents(whole)
    moment = Moment(after if before is None else before, after)
    if operation in ("restore", "start"):
        assert 100 not in moment.after["app.s", ""]
    hit = []
    for number, point in enumerate(named):
        path = shutil.copytree(image, tmp_path / str(number)) / "data"
        child = start(stop_at, path, operation, point, sender)
        child.join()
        assert child.exitcode == STOPPED, f"{operation}: {point}: the child ended with {child.exitcode}"
        hit.append(point)
        _reopen(path, moment, operation, f"{operation}: {point}")
    with capsys.disabled():
        print(f"\n{operation}: {len(hit)} points: {', '.join(hit)}")


def test_each_operation_and_each_executor_has_its_points() -> None:
    assert POINTS.keys() == OPERATIONS.keys()
    with kalamdb.connect(":memory:") as db:
        assert set(db.context.job_registry.job_types()) - POINTS.keys() == {"cleanup"}
    assert {"drop", "sweep"} <= POINTS.keys()


def _contents(path: Path) -> Contents:
    context = AppContext(path, settings())
    try:
        return contents(context)
    finally:
        context.stop()


def _reopen(path: Path, moment: Moment, operation: str, where: str) -> None:
    context = AppContext(path, settings())
    with Database(context) as db:
        found = contents(context)
        if operation == "user_cleanup":
            # His rows go table by table; those of others stay.
            assert {key: rows for key, rows in found.items() if key[1] != "bob"} == {
                key: rows for key, rows in moment.after.items() if key[1] != "bob"
            }, where
        else:
            moment.accept(found, finished=operation == "start", where=where)
        assert db.check().problems == [], where
        settle(db)
        judge(db)
        assert contents(context) == (moment.after if operation in EFFECTS else found), where
        judge_jobs(db)
        judge_copies(db)
        if (effect := EFFECTS.get(operation)) is not None:
            effect(db)
        if operation == "backup":
            OPERATIONS[operation](db)
            judge_copies(db)
