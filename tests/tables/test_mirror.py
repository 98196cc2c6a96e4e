"""manifest.json, the mirror of a table's segments beside its files."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest

import kalamdb
from tests.conftest import run_job

SETTINGS = {"limits.batch_rows_max": 4, "flush.scheduler_enabled": False, "compaction.enabled": False}


def mirror(path: Path) -> dict[str, Any]:
    """The mirror of the only table."""
    [found] = path.glob("gen-1/segments/*/*/*/manifest.json")
    shown: dict[str, Any] = json.loads(found.read_text())
    return shown


def files(path: Path) -> set[str]:
    """Names of the segment files."""
    return {found.name for found in path.rglob("*.parquet")}


def test_the_mirror_follows_large_statements_flushes_and_compactions(tmp_path: Path) -> None:
    # A job has ended with its commit, and its last act, the mirror, is through when the database is closed.
    with kalamdb.connect(tmp_path, **SETTINGS) as db:
        db.execute("CREATE SHARED TABLE t (id INT PRIMARY KEY)")
        db.insert("t", [{"id": number} for number in range(10)])
        assert [one["row_count"] for one in mirror(tmp_path)["segments"]] == [10]
    with kalamdb.connect(tmp_path, **SETTINGS) as db:
        db.execute("INSERT INTO t VALUES (100)")
        run_job(db, "STORAGE FLUSH TABLE t")
    assert sorted(one["row_count"] for one in mirror(tmp_path)["segments"]) == [1, 10]
    with kalamdb.connect(tmp_path, **SETTINGS) as db:
        run_job(db, "STORAGE COMPACT TABLE t")
    assert [one["row_count"] for one in mirror(tmp_path)["segments"]] == [11]
    assert {one["path"] for one in mirror(tmp_path)["segments"]} == files(tmp_path)
    assert mirror(tmp_path)["schema"]["name"] == "t"


def test_large_statements_of_many_threads_leave_the_mirror_of_the_last(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with kalamdb.connect(tmp_path, **SETTINGS) as db, caplog.at_level(logging.WARNING, "kalamdb"):
        db.execute("CREATE SHARED TABLE t (id INT PRIMARY KEY)")

        def load(first: int) -> None:
            for at in range(first, first + 30, 10):
                db.insert("t", [{"id": number} for number in range(at, at + 10)])

        threads = [threading.Thread(target=load, args=(1000 * number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert db.execute("SELECT count(*) FROM t").scalar() == 180
    assert [record.getMessage() for record in caplog.records] == []
    assert {one["path"] for one in mirror(tmp_path)["segments"]} == files(tmp_path)


def test_a_sweep_beside_large_statements_leaves_the_mirror_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with kalamdb.connect(tmp_path, **SETTINGS) as db, caplog.at_level(logging.WARNING, "kalamdb"):
        db.execute("CREATE SHARED TABLE t (id INT PRIMARY KEY)")
        loading = threading.Event()

        def sweep() -> None:
            while not loading.is_set():
                job = db.jobs.create_job("cleanup", {"operation": "sweep"}, on_conflict="return")
                db.jobs.wait(job.id, timeout_s=30)

        sweeper = threading.Thread(target=sweep)
        sweeper.start()
        try:
            for at in range(0, 200, 10):
                db.insert("t", [{"id": number} for number in range(at, at + 10)])
        finally:
            loading.set()
            sweeper.join()
    assert [record.getMessage() for record in caplog.records] == []
    assert {one["path"] for one in mirror(tmp_path)["segments"]} == files(tmp_path)


def test_what_a_crash_left_of_a_mirror_is_swept(tmp_path: Path) -> None:
    with kalamdb.connect(tmp_path, **SETTINGS) as db:
        db.execute("CREATE SHARED TABLE t (id INT PRIMARY KEY)")
        db.insert("t", [{"id": number} for number in range(10)])
        [found] = tmp_path.glob("gen-1/segments/*/*/*/manifest.json")
        left = found.with_name(".manifest.json.tmp")
        left.write_text("half of it")
        job = db.jobs.create_job("cleanup", {"operation": "sweep"})
        assert db.jobs.wait(job.id, timeout_s=30).status == "completed"
        assert not left.exists() and found.exists()
