"""Parts that are built and stopped, started or not."""

from __future__ import annotations

from pathlib import Path

import kalamdb
from kalamdb.app_context import AppContext
from kalamdb.config import Settings
from tests.conftest import run_job


def test_parts_that_were_never_started_can_be_stopped_and_write_no_log(tmp_path: Path) -> None:
    with kalamdb.connect(tmp_path / "data") as db:
        db.execute("CREATE NAMESPACE app")
        db.execute("CREATE SHARED TABLE app.t (id BIGINT PRIMARY KEY)")
        db.execute("INSERT INTO app.t VALUES (1)")
        run_job(db, "STORAGE FLUSH TABLE app.t")
    log = tmp_path / "data" / "logs" / "jobs.log"
    before = log.read_text()
    context = AppContext(tmp_path / "data", Settings.load(environment={}))
    context.stop()
    assert log.read_text() == before


def test_closing_succeeds_though_the_log_of_jobs_cannot_be_written(tmp_path: Path) -> None:
    db = kalamdb.connect(tmp_path / "data", **{"flush.scheduler_enabled": False})
    db.execute("CREATE NAMESPACE app")
    db.execute("CREATE SHARED TABLE app.t (id BIGINT PRIMARY KEY)")
    db.execute("INSERT INTO app.t VALUES (1)")
    log = tmp_path / "data" / "logs" / "jobs.log"
    log.mkdir()
    run_job(db, "STORAGE FLUSH TABLE app.t")
    db.close()
    log.rmdir()
    with kalamdb.connect(tmp_path / "data") as db:
        assert db.execute("SELECT id FROM app.t").rows == [(1,)]
    assert "Job completed" in log.read_text()


def test_a_sweep_takes_up_a_dropped_table_whose_own_cleanup_was_cancelled(tmp_path: Path) -> None:
    quiet = Settings.load({"flush.scheduler_enabled": False, "compaction.enabled": False}, environment={})
    with kalamdb.connect(tmp_path / "data", **dict(quiet)) as db:
        db.execute("CREATE NAMESPACE app")
        db.execute("CREATE SHARED TABLE app.t (id BIGINT PRIMARY KEY)")
        db.execute("INSERT INTO app.t VALUES (1)")
        run_job(db, "STORAGE FLUSH TABLE app.t")
        db.context.job_manager.stop()
        job = (db.execute("DROP TABLE app.t").message or "").rsplit(" ", 1)[1]
        assert db.jobs.cancel_job(job).status == "cancelled"
    with kalamdb.connect(tmp_path / "data", **dict(quiet)) as db:
        assert db.check().dropped == 1
        sweep = db.jobs.create_job("cleanup", {"operation": "sweep"})
        assert db.jobs.wait(sweep.id, 30).status == "completed"
        report = db.check()
        assert (report.problems, report.dropped, report.strays) == ([], 0, 0)
        assert not list(db.context.store.root.rglob("*.parquet"))
