"""A database and a backup of it, made once; each test works on a copy."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import kalamdb
from kalamdb.database import Database
from tests.backup.support import Image, backup, connect, contents, fill, state


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """A closed database, a backup of it with other rows, and what each of them holds."""
    path = tmp_path_factory.mktemp("image")
    with connect(path / "old") as db:
        fill(db)
        db.execute("INSERT INTO app.s VALUES (1000, 'in the backup')")
        backup(db, path / "backups")
        after = contents(db)
        db.execute("DELETE FROM app.s WHERE id = 1000")
        db.execute("INSERT INTO app.s VALUES (2000, 'not in the backup')")
        before = contents(db)
    kalamdb.restore(path / "backups", path / "restored")
    assert state(path / "restored") == after
    shutil.rmtree(path / "restored")
    return Image(path, before, after)


@pytest.fixture
def world(image: Image, tmp_path: Path) -> Image:
    """A copy of the image."""
    shutil.copytree(image.path, tmp_path / "world")
    return Image(tmp_path / "world", image.before, image.after)


@pytest.fixture
def db(world: Image) -> Iterator[Database]:
    """The database of the image, open."""
    with connect(world.old) as opened:
        yield opened
