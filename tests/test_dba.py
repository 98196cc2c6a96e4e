"""Namespace `dba` of a served database: tables, samples of figures, and how long they are kept."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kalamdb.app_context import AppContext
from kalamdb.config import Settings
from kalamdb.database import Database
from kalamdb.errors import Denied
from kalamdb.storage import Batch, Commit
from kalamdb.testing.clock import SimulatedClock

QUIET = {"flush.scheduler_enabled": False, "compaction.enabled": False, "jobs.schedules_enabled": False}
DAY_S = 86_400


def opened(path: Path, clock: SimulatedClock, **settings: object) -> Database:
    """A database over a clock that stands still."""
    return Database(AppContext(path, Settings.load({**QUIET, **settings}, environment={}), clock=clock))


@pytest.fixture
def clock() -> SimulatedClock:
    return SimulatedClock()


@pytest.fixture
def served(tmp_path: Path, clock: SimulatedClock) -> Iterator[Database]:
    """A database that samples when the test says so."""
    with opened(tmp_path / "data", clock, **{"retention.enable_dba_stats": False}) as db:
        db.context.sampler.start()
        yield db


def described(db: Database, table: str) -> list[tuple[str, str]]:
    """Names and types of columns."""
    return [(row["column_name"], row["data_type"]) for row in db.execute(f"DESCRIBE TABLE {table}").dicts()]


def test_an_embedded_database_has_no_namespace_dba(tmp_path: Path, clock: SimulatedClock) -> None:
    with opened(tmp_path / "data", clock) as db:
        assert [row[0] for row in db.execute("SHOW NAMESPACES").rows] == ["default", "system"]


def test_the_tables_are_those_of_the_original(served: Database) -> None:
    assert described(served, "dba.stats") == [
        ("id", "TEXT"),
        ("node_id", "BIGINT"),
        ("metric_name", "TEXT"),
        ("metric_value", "DOUBLE"),
        ("metric_unit", "TEXT"),
        ("sampled_at", "TIMESTAMP"),
    ]
    assert described(served, "dba.notifications") == [
        ("id", "TEXT"),
        ("user_id", "TEXT"),
        ("title", "TEXT"),
        ("body", "TEXT"),
        ("is_read", "BOOLEAN"),
        ("created_at", "TIMESTAMP"),
        ("updated_at", "TIMESTAMP"),
    ]
    served.execute("INSERT INTO dba.notifications (title) VALUES ('hello')", role="service")
    assert served.execute("SELECT title, is_read FROM dba.notifications", role="user").rows == [("hello", False)]
    with pytest.raises(Denied):
        served.execute("SELECT * FROM dba.stats", role="service")


def test_a_sample_holds_figures_with_their_units(served: Database) -> None:
    served.context.sampler.step()
    served.context.sampler.step()
    found = served.execute("SELECT metric_name, metric_unit, count(*), max(node_id) FROM dba.stats GROUP BY 1, 2").rows
    assert {("total_tables", "tables", 2, 0), ("memory_rss_mb", "MB", 2, 0), ("jobs_failed", "jobs", 2, 0)} <= set(
        found
    )
    value = "SELECT DISTINCT metric_value FROM dba.stats WHERE metric_name = 'total_tables'"
    assert served.execute(value).rows == [(2.0,)]
    assert served.execute("SELECT count(DISTINCT id) = count(*) FROM dba.stats").scalar() is True


def test_the_retention_job_removes_samples_after_seven_days(served: Database, clock: SimulatedClock) -> None:
    served.context.sampler.step()
    clock.advance(6 * DAY_S)
    served.context.sampler.step()
    times = "SELECT count(DISTINCT sampled_at) FROM dba.stats"
    served.jobs.wait(served.jobs.create_job("retention").id)
    assert served.execute(times).scalar() == 2
    clock.advance(1.5 * DAY_S)
    job = served.jobs.wait(served.jobs.create_job("retention").id)
    assert (job.status, served.execute(times).scalar()) == ("completed", 1)
    assert served.check().problems == []


def test_samples_are_taken_every_ten_seconds_once_it_is_started(tmp_path: Path) -> None:
    clock = SimulatedClock(auto_advance=True)
    with opened(tmp_path / "data", clock) as db:
        commits: list[int] = []
        enough = threading.Event()

        def note(batch: Batch, _: Commit) -> None:
            commits.append(len(batch.rows))
            if sum(rows > 1 for rows in commits) >= 3:
                enough.set()

        db.context.backend.observe(note)
        db.context.sampler.start()
        db.context.sampler.start()
        assert enough.wait(30)
        db.context.sampler.stop()
        gaps = db.execute("SELECT DISTINCT sampled_at FROM dba.stats ORDER BY 1").rows
    assert (gaps[1][0] - gaps[0][0]).total_seconds() >= 10


def test_the_tables_are_made_once(tmp_path: Path, clock: SimulatedClock) -> None:
    for _ in range(2):
        with opened(tmp_path / "data", clock, **{"retention.enable_dba_stats": False}) as db:
            db.context.sampler.start()
            db.context.sampler.step()
    with opened(tmp_path / "data", clock) as db:
        assert db.execute("SELECT count(*) FROM dba.stats WHERE metric_name = 'total_tables'").scalar() == 2
