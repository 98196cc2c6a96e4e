"""Databases to back up, and file operations that end everything at a chosen one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import kalamdb
from kalamdb.app_context import AppContext
from kalamdb.config import Settings
from kalamdb.database import Database
from kalamdb.files import FileOps
from tests.conftest import run_job

QUIET = {"flush.scheduler_enabled": False, "compaction.enabled": False}
Rows = list[tuple[Any, ...]]


def connect(path: Path | str, **settings: Any) -> Database:
    """A database in which nothing works beside the test."""
    return kalamdb.connect(path, **{**QUIET, **settings})


def connect_with(path: Path, operations: FileOps, **settings: Any) -> Database:
    """The same over other file operations."""
    return Database(AppContext(path, Settings.load({**QUIET, **settings}, environment={}), operations=operations))


def fill(db: Database) -> None:
    """A table in both tiers with replaced and deleted rows, one of users, a stream."""
    db.execute("CREATE NAMESPACE app")
    db.execute("CREATE SHARED TABLE app.s (id INT PRIMARY KEY, v TEXT)")
    db.execute("CREATE USER TABLE app.u (id INT PRIMARY KEY, v TEXT)")
    db.execute("CREATE STREAM TABLE app.e (id INT PRIMARY KEY, v TEXT) WITH (TTL_SECONDS = 3600)")
    db.insert("app.s", [{"id": key, "v": f"cold {key}"} for key in range(50)])
    run_job(db, "STORAGE FLUSH TABLE app.s")
    db.execute("UPDATE app.s SET v = 'hot' WHERE id < 5")
    db.execute("DELETE FROM app.s WHERE id >= 45")
    for user in ("ann", "bob"):
        db.insert("app.u", [{"id": key, "v": user} for key in range(3)], user=user)
    db.execute("INSERT INTO app.e VALUES (1, 'event')", user="ann")


def contents(db: Database) -> dict[str, Rows]:
    """What users see, with `_seq`."""
    found = {"s": db.execute("SELECT id, v, _seq FROM app.s ORDER BY id").rows}
    for user in ("ann", "bob"):
        found[user] = db.execute("SELECT id, v, _seq FROM app.u ORDER BY id", user=user).rows
        found[f"{user} stream"] = db.execute("SELECT id, v FROM app.e ORDER BY id", user=user).rows
    return found


@dataclass(frozen=True)
class Image:
    """A closed database, backups of it with other rows, and what both hold."""

    path: Path
    before: dict[str, Rows]
    after: dict[str, Rows]

    @property
    def old(self) -> Path:
        """The database."""
        return self.path / "old"

    @property
    def backups(self) -> Path:
        """The target with one backup."""
        return self.path / "backups"


def state(path: Path) -> dict[str, Rows]:
    """What a closed database holds; it is sound, and nothing is left of generations that nobody needs."""
    with connect(path) as db:
        report = db.check()
        assert report.ok, report.problems
        assert db.context.probation is not None and db.context.probation.over.wait(20)
        assert generations(path) == [db.context.directory.generation.name]
        return contents(db)


def generations(path: Path) -> list[str]:
    """Generations in a directory."""
    return sorted(folder.name for folder in path.glob("gen-*"))


def backup(db: Database, target: Path | str, **options: Any) -> str:
    """Back up; the path of the new backup."""
    job = db.backup(target, **options)
    assert job.status == "completed", f"{job.message} {job.exception_trace}"
    separator = "" if str(target).endswith("/") else "/"
    return f"{target}{separator}{job.result['backup_id']}"


def restored(source: Path | str, path: Path) -> dict[str, Rows]:
    """What a backup holds, restored into a new directory; the database there is sound."""
    kalamdb.restore(source, path)
    with connect(path) as db:
        report = db.check()
        assert report.ok, report.problems
        return contents(db)


class Stopped(BaseException):
    """The process is dead from here on. Not an Exception: nobody may handle it."""


class StoppingFiles(FileOps):
    """Every operation on files before number `at` (from 0) happens, none after it. Records their names."""

    def __init__(self, at: int | None = None) -> None:
        self.at = at
        self.steps: list[str] = []
        self.on_step: Callable[[str], None] = lambda step: None

    @property
    def is_stopped(self) -> bool:
        """Whether the operation was reached."""
        return self.at is not None and len(self.steps) > self.at

    def _step(self, name: str, path: Path) -> None:
        if self.is_stopped:
            raise Stopped
        self.steps.append(f"{name} {path.name}")
        if self.is_stopped:
            raise Stopped
        self.on_step(self.steps[-1])

    def open_write(self, path: Path) -> BinaryIO:
        self._step("create", path)
        return super().open_write(path)

    def fsync_file(self, file: BinaryIO, path: Path) -> None:
        self._step("fsync", path)
        super().fsync_file(file, path)

    def fsync_dir(self, path: Path) -> None:
        self._step("fsync folder", path)
        super().fsync_dir(path)

    def mkdir(self, path: Path) -> None:
        self._step("make folder", path)
        super().mkdir(path)

    def rename(self, source: Path, target: Path) -> None:
        self._step("rename", target)
        super().rename(source, target)

    def link(self, source: Path, target: Path) -> None:
        self._step("link", target)
        super().link(source, target)

    def unlink(self, path: Path) -> None:
        self._step("unlink", path)
        super().unlink(path)

    def rmdir(self, path: Path) -> None:
        self._step("remove folder", path)
        super().rmdir(path)


def restore_job(db: Database, source: Path | str) -> str:
    """Run RESTORE DATABASE; the job's message."""
    message = db.execute(f"RESTORE DATABASE FROM '{source}'").message or ""
    assert "restart required" in message
    job = db.jobs.wait(message.rsplit(" ", 1)[1], 20)
    assert job.status == "completed", job.message
    return str(job.message)
