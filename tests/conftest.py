"""Worlds that tests build for themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kalamdb
from kalamdb.database import Database

Open = Callable[..., Database]


@pytest.fixture(params=["memory", "disk"])
def open_db(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens databases that are closed at the end; quiet: no scheduler works beside the test."""
    opened: list[Database] = []

    def open_(**settings: Any) -> Database:
        quiet = {"flush.scheduler_enabled": False, "compaction.enabled": False, **settings}
        db = kalamdb.connect(":memory:" if request.param == "memory" else tmp_path / "data", **quiet)
        opened.append(db)
        return db

    yield open_
    for db in opened:
        db.close()


def run_job(db: Database, sql: str) -> str:
    """Run a statement that starts a job, wait for it; its message."""
    message = db.execute(sql).message or ""
    job = db.jobs.wait(message.rsplit(" ", 1)[1], timeout_s=30)
    assert job.status == "completed", f"{job.status}: {job.message}"
    return str(job.message)
