"""A process that ends at each named point of flush, compaction, cleanup and large statements, over RocksDB.

The names follow from the operations on files and the commits (`kalamdb.testing.crash`). A point that an
operation passes and that is not named here fails the test, and so does a named one that is not passed.
"""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path

import pytest

from kalamdb.app_context import AppContext
from kalamdb.database import Database
from tests.crash.children import OPERATIONS, STOPPED, start, stop_at
from tests.crash.support import Moment, contents, fill, judge, settings, settle

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

POINTS: dict[str, list[str]] = {
    "flush": [*_NAMING, *_FOLDER, *_FILE, *_PUBLISHING, *_MIRROR, "after removal of dead rows"],
    "compact": [*_NAMING, *_FILE, *_PUBLISHING, *_UNLINKING, *_MIRROR],
    "drop": [
        "before commit of the drop", "after commit of the drop", "after durability of the drop",
        *_UN_NAMING, *_UNLINKING, "after unlink mirror", "after remove folder",
        "before commit of the end of the dropped table", "after commit of the end of the dropped table",
        "after durability of the end of the dropped table",
    ],
    "sweep": [*_UN_NAMING, *_UNLINKING, "after unlink mirror", "after remove folder"],
    "large statement": [*_NAMING, *_FOLDER, *_FILE, *_PUBLISHING],
}  # fmt: skip


def _is_named_by(point: str, named: set[str]) -> bool:
    """Whether a point is named, is between the same two steps as one that is, or belongs to no operation.

    Progress of jobs, jobs.log and the mirror of another table go on beside it.
    """
    when, _, step = point.partition(" ")
    return (
        point in named
        or (when == "before" and f"after {step}" in named)
        or step.endswith((" of the job", " of the records", " of the commit", " mirror"))
    )


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed database with something to do for each operation."""
    path = tmp_path_factory.mktemp("image") / "data"
    context = AppContext(path, settings())
    fill(context)
    context.stop()
    return path


@pytest.mark.parametrize("operation", POINTS)
def test_a_process_that_ends_at_a_named_point_loses_doubles_and_leaves_nothing(
    image: Path, tmp_path: Path, operation: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = shutil.copytree(image, tmp_path / "whole")
    before = _contents(whole)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = start(stop_at, whole, operation, None, sender)
    passed: list[str] = receiver.recv()
    child.join()
    named = POINTS[operation]
    assert [point for point in named if point not in passed] == [], "named and never passed"
    assert {point for point in passed if not _is_named_by(point, set(named))} == set(), "passed and not named"
    moment = Moment(before, _contents(whole))
    hit = []
    for number, point in enumerate(named):
        path = shutil.copytree(image, tmp_path / str(number))
        child = start(stop_at, path, operation, point, sender)
        child.join()
        assert child.exitcode == STOPPED, f"{operation}: {point}: the child ended with {child.exitcode}"
        hit.append(point)
        _reopen(path, moment, f"{operation}: {point}")
    with capsys.disabled():
        print(f"\n{operation}: {len(hit)} points: {', '.join(hit)}")


def test_each_operation_has_its_points() -> None:
    assert POINTS.keys() == OPERATIONS.keys()


def _contents(path: Path) -> dict[tuple[str, str], dict[int, str]]:
    context = AppContext(path, settings())
    try:
        return contents(context)
    finally:
        context.stop()


def _reopen(path: Path, moment: Moment, where: str) -> None:
    context = AppContext(path, settings())
    with Database(context) as db:
        found = contents(context)
        moment.accept(found, finished=False, where=where)
        assert db.check().problems == [], where
        settle(db)
        judge(db)
        assert contents(context) == found, where
