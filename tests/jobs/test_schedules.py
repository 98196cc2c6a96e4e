"""Schedules: when they are due, what a missed time means, and that each due time makes one job."""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

import kalamdb
from kalamdb.app_context import AppContext
from kalamdb.clock import SystemClock
from kalamdb.config import Settings
from kalamdb.database import Database
from kalamdb.jobs import Completed, Cron, Every, JobContext
from kalamdb.jobs.schedules import Misfire, Schedule

DAY_MS = 86_400_000
BERLIN = ZoneInfo("Europe/Berlin")


class SteppedClock(SystemClock):
    """A clock that stands where a test puts it."""

    at_ms = 1_750_000_000_000

    def now_ms(self) -> int:
        return self.at_ms


class World:
    """A database whose schedules run when the test steps them."""

    def __init__(self, path: Path) -> None:
        self.path, self.clock = path, SteppedClock()
        self.db = self.open()

    def open(self) -> Database:
        quiet = {"flush.scheduler_enabled": False, "compaction.enabled": False, "jobs.schedules_enabled": False}
        self.db = Database(AppContext(self.path, Settings.load(quiet, environment={}), clock=self.clock))
        self.db.jobs.executor("report", prefix="RP")(lambda ctx: Completed(str(ctx.params)))
        for name in ("stream_eviction", "user_cleanup", "retention", "cleanup"):
            self.db.execute(f"ALTER SCHEDULE {name} PAUSE")
        return self.db

    def step(self, seconds: float = 0) -> list[str]:
        """Let time pass and the schedules look once; the ids of the jobs that they made."""
        before = {job.id for job in self.db.jobs.list_jobs(limit=None)}
        self.clock.at_ms += int(seconds * 1000)
        while self.db.context.schedules.step():
            pass
        made = [job for job in self.db.jobs.list_jobs(limit=None) if job.id not in before]
        for job in made:
            self.db.jobs.wait(job.id, timeout_s=30)
        return [job.id for job in made]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path / "data")
    yield made
    made.db.close()


def row(world: World, name: str) -> dict[str, Any]:
    return world.db.execute("SELECT * FROM system.job_schedules WHERE schedule_name = $1", [name]).dicts()[0]


def test_an_interval_makes_a_job_each_time_with_its_parameters(world: World) -> None:
    world.db.execute("""CREATE SCHEDULE often FOR JOB report EVERY '90 seconds' PARAMETERS '{"a": 1}'""")
    assert world.step(89) == []
    [first] = world.step(1)
    assert world.db.jobs.get_job(first).message == "{'a': 1}"
    assert world.step(89) == [] and len(world.step(1)) == 1
    shown = row(world, "often")
    assert (shown["last_job_id"] is not None, shown["interval_s"], shown["declared"]) == (True, 90.0, False)


def test_a_cron_expression_is_due_in_its_time_zone(world: World) -> None:
    world.clock.at_ms = int(dt.datetime(2026, 6, 1, 0, 30, tzinfo=dt.UTC).timestamp() * 1000)
    world.db.execute("CREATE SCHEDULE nightly FOR JOB report CRON '0 3 * * *' TIME ZONE 'Europe/Berlin'")
    assert world.step(29 * 60) == []
    assert len(world.step(60)) == 1
    assert row(world, "nightly")["next_run_at"] == dt.datetime(2026, 6, 2, 1, 0)


@pytest.mark.parametrize(
    "start, expression, expected",
    [
        # 2026-03-29: 02:00 to 03:00 does not exist. 2026-10-25: it exists twice.
        ("2026-03-28 12:00", "30 2 * * *", ["2026-03-29 03:00+02:00", "2026-03-30 02:30+02:00"]),
        ("2026-10-24 12:00", "30 2 * * *", ["2026-10-25 02:30+02:00", "2026-10-26 02:30+01:00"]),
        (
            "2026-10-25 00:30",
            "0 * * * *",
            ["2026-10-25 01:00+02:00", "2026-10-25 02:00+02:00", "2026-10-25 02:00+01:00"],
        ),
    ],
)
def test_daylight_saving_runs_a_skipped_time_once_and_a_repeated_time_once(
    start: str, expression: str, expected: list[str]
) -> None:
    begin = int(dt.datetime.fromisoformat(start).replace(tzinfo=BERLIN).timestamp() * 1000)
    schedule = Schedule(name="x", job_type="x", cron=expression, time_zone="Europe/Berlin")
    times = [moment for moment, _ in zip(schedule.times_after(begin), expected, strict=False)]
    assert times == [int(dt.datetime.fromisoformat(text).timestamp() * 1000) for text in expected]


@pytest.mark.parametrize("misfire, jobs", [("SKIP", 0), ("ONCE", 1), ("ALL MAX 3", 3), ("ALL", 5)])
def test_times_that_passed_while_nothing_ran_follow_the_misfire_policy(world: World, misfire: str, jobs: int) -> None:
    world.db.jobs.executor("piled", prefix="PL")(lambda ctx: None)
    world.db.execute(f"CREATE SCHEDULE daily FOR JOB piled EVERY 1 DAY MISFIRE {misfire}")
    world.db.close()
    world.clock.at_ms += 5 * DAY_MS + 3_600_000
    db = world.open()
    db.jobs.executor("piled", prefix="PL")(lambda ctx: None)
    assert len(world.step()) == jobs
    assert row(world, "daily")["next_run_at"] is not None
    assert len(world.step(23 * 3600)) == 1


def test_a_slow_job_does_not_pile_up_behind_itself(world: World) -> None:
    world.db.execute("PAUSE QUEUE 'default'")
    world.db.execute("CREATE SCHEDULE often FOR JOB report EVERY 10 SECONDS")
    world.clock.at_ms += 10_000
    world.db.context.schedules.step()
    [job] = world.db.jobs.list_jobs(job_type="report")
    world.clock.at_ms += 10_000
    world.db.context.schedules.step()
    assert len(world.db.jobs.list_jobs(job_type="report")) == 1
    assert row(world, "often")["last_skipped"].startswith(f"job '{job.id}' is still")


def test_a_due_time_makes_one_job_whatever_dies_around_it(world: World) -> None:
    world.db.execute("CREATE SCHEDULE often FOR JOB report EVERY 60 SECONDS")
    [first] = world.step(60)
    world.db.close()
    world.open()
    assert world.step() == []
    assert len(world.step(60)) == 1
    assert world.db.jobs.get_job(first).status == "completed"


def test_a_paused_schedule_makes_no_job_and_begins_anew_when_resumed(world: World) -> None:
    world.db.execute("CREATE SCHEDULE often FOR JOB report EVERY 60 SECONDS")
    world.db.execute("ALTER SCHEDULE often PAUSE")
    assert world.step(600) == [] and row(world, "often")["next_run_at"] is None
    world.db.execute("ALTER SCHEDULE often RESUME")
    assert world.step() == [] and len(world.step(60)) == 1


def test_alter_changes_time_parameters_queue_and_zone(world: World) -> None:
    world.db.execute("CREATE SCHEDULE often FOR JOB report EVERY 60 SECONDS")
    world.db.execute(
        "ALTER SCHEDULE often SET CRON '*/5 * * * *', SET TIME ZONE 'Asia/Kolkata', "
        "SET PARAMETERS $1, SET QUEUE reports, SET PRIORITY -3, SET MISFIRE ALL MAX 2",
        ['{"b": 2}'],
    )
    shown = row(world, "often")
    assert (shown["cron"], shown["interval_s"], shown["time_zone"]) == ("*/5 * * * *", None, "Asia/Kolkata")
    assert (shown["parameters"], shown["queue"], shown["priority"]) == ({"b": 2}, "reports", -3)
    assert (shown["misfire"], shown["catch_up_max"]) == ("all", 2)


def test_run_makes_the_job_now_and_says_its_id(world: World) -> None:
    world.db.execute("CREATE SCHEDULE nightly FOR JOB report CRON '0 3 * * *'")
    message = world.db.execute("RUN SCHEDULE nightly").message or ""
    job = world.db.jobs.wait(message.rsplit(" ", 1)[1], timeout_s=30)
    assert job.status == "completed" and job.job_type == "report"


@pytest.mark.parametrize(
    "sql, text",
    [
        ("CREATE SCHEDULE x FOR JOB report", "one of both"),
        ("CREATE SCHEDULE x FOR JOB report CRON '0 3 * *'", "cron expression '0 3 \\* \\*'"),
        ("CREATE SCHEDULE x FOR JOB report CRON '0 0 31 2 *'", "cron expression"),
        ("CREATE SCHEDULE x FOR JOB report CRON '0 3 * * *' TIME ZONE 'Mars/Base'", "time zone 'Mars/Base'"),
        ("CREATE SCHEDULE x FOR JOB report EVERY '3 moons'", "is not a span"),
        ("CREATE SCHEDULE x FOR JOB report EVERY '0 seconds'", "0.1 to"),
        ("CREATE SCHEDULE x FOR JOB report EVERY 60 SECONDS EVERY 90 SECONDS", "twice"),
        ("CREATE SCHEDULE x FOR JOB report EVERY 60 SECONDS PARAMETERS '[1]'", "JSON object"),
        ("CREATE SCHEDULE x FOR JOB nothing EVERY 60 SECONDS", "no executor for job type 'nothing'"),
        ("CREATE SCHEDULE x FOR JOB flush EVERY 60 SECONDS", "parameters of a 'flush' job do not fit"),
        ("CREATE SCHEDULE retention FOR JOB report EVERY 60 SECONDS", "already exists"),
        ("DROP SCHEDULE retention", "cannot be dropped"),
        ("DROP SCHEDULE nothing", "does not exist"),
        ("RUN SCHEDULE nothing", "does not exist"),
        ("ALTER SCHEDULE nothing PAUSE", "does not exist"),
    ],
)
def test_what_cannot_be_a_schedule_is_refused_and_leaves_nothing(world: World, sql: str, text: str) -> None:
    before = world.db.execute("SELECT * FROM system.job_schedules").rows
    with pytest.raises(kalamdb.KalamDbError, match=text):
        world.db.execute(sql)
    assert world.db.execute("SELECT * FROM system.job_schedules").rows == before


def test_only_a_dba_changes_schedules(world: World) -> None:
    with pytest.raises(kalamdb.Denied):
        world.db.execute("CREATE SCHEDULE x FOR JOB report EVERY 60 SECONDS", role="service")


def test_an_executor_brings_its_schedule_and_a_change_of_it_stays(world: World) -> None:
    def hourly(ctx: JobContext[dict[str, Any]]) -> None:
        """Nothing to do."""

    world.db.jobs.executor("hourly", prefix="HR", schedule=Every(3600, {"a": 1}))(hourly)
    assert row(world, "hourly")["declared"]
    assert len(world.step(3600)) == 1
    world.db.execute("ALTER SCHEDULE hourly SET EVERY '2 hours'")
    world.db.close()
    db = world.open()
    db.jobs.executor("hourly", prefix="HR", schedule=Every(3600, {"a": 1}))(hourly)
    assert row(world, "hourly")["interval_s"] == 7200
    executors = db.execute("SELECT schedule FROM system.job_executors WHERE job_type = 'hourly'").scalar()
    assert executors == "every 3600 s"


def test_a_declared_schedule_that_cannot_be_is_refused_where_it_is_written() -> None:
    for make in (lambda: Cron("nonsense"), lambda: Cron("0 3 * * *", "Nowhere"), lambda: Every(0)):
        with pytest.raises(kalamdb.InvalidRequest):
            make()


def test_a_schedule_of_a_running_database_is_due_at_its_time() -> None:
    ran = threading.Semaphore(0)
    with kalamdb.connect(":memory:") as db:
        db.jobs.executor("tick", prefix="TK", schedule=Every(0.1))(lambda ctx: ran.release())
        assert ran.acquire(timeout=10) and ran.acquire(timeout=10)


def test_a_schedule_without_work_writes_no_job(world: World) -> None:
    world.db.execute("ALTER SCHEDULE stream_eviction RESUME")
    world.db.execute("ALTER SCHEDULE user_cleanup RESUME")
    assert world.step(2 * 86_400) == []
    assert row(world, "user_cleanup")["last_skipped"] == "no dropped user is past the grace time"
    world.db.execute("CREATE STREAM TABLE s (v INT) WITH (TTL_SECONDS = 60)")
    world.db.execute("INSERT INTO s VALUES (1)")
    assert [one[:2] for one in world.step(200)] == ["SE"]
    assert world.db.execute("SELECT count(*) FROM s").scalar() == 0


def test_misfire_words_are_those_of_the_enum() -> None:
    assert {str(one) for one in Misfire} == {"skip", "once", "all"}
