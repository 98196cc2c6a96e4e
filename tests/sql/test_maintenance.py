"""STORAGE FLUSH and COMPACT, SHOW JOBS, KILL and CANCEL JOB (surface reference 3.9)."""

from __future__ import annotations

import threading

import pytest

import kalamdb
from kalamdb.database import Database
from kalamdb.jobs import JobContext
from tests.sql.conftest import compact, flush, refused, rows


@pytest.fixture
def tables(db: Database) -> Database:
    db.execute("CREATE TABLE app.t (id INT PRIMARY KEY); CREATE USER TABLE app.u (id INT PRIMARY KEY)")
    db.execute("CREATE STREAM TABLE app.s (x INT) WITH (TTL_SECONDS = 60)")
    return db


def waited(db: Database, message: str | None) -> str:
    """The message of the one job that a statement names."""
    job = db.jobs.wait((message or "").rsplit(" ", 1)[1].strip("[]"), 20)
    assert job.status == "completed"
    return str(job.message)


def test_flush_starts_a_job_only_when_there_is_something_to_write(tables: Database) -> None:
    nothing = "Storage flush skipped for table 'app.t': no pending writes"
    assert tables.execute("STORAGE FLUSH TABLE app.t").message == nothing
    tables.execute("INSERT INTO app.t VALUES (1), (2)")
    message = tables.execute("STORAGE FLUSH TABLE app.t").message or ""
    assert message.startswith("Storage flush started for table 'app.t'. Job ID: FL-")
    assert "2 rows" in waited(tables, message)
    assert tables.execute("STORAGE FLUSH TABLE app.t").message == nothing
    tables.execute("DELETE FROM app.t WHERE id = 1")
    flush(tables, "app.t")
    assert rows(tables, "SELECT * FROM app.t") == [(2,)]
    assert len(rows(tables, "SHOW JOBS WHERE job_type = 'flush'")) == 2


def test_flush_all_means_one_namespace(tables: Database) -> None:
    assert tables.execute("STORAGE FLUSH ALL IN app").message == (
        "Storage flush skipped: no pending writes in namespace 'app'"
    )
    tables.execute("INSERT INTO app.t VALUES (1); INSERT INTO app.s VALUES (1)")
    assert "no pending writes in namespace 'default'" in (tables.execute("STORAGE FLUSH ALL").message or "")
    message = tables.execute("STORAGE FLUSH ALL IN NAMESPACE app").message
    assert "for 1 table(s). Job IDs: [FL-" in (message or "")
    waited(tables, message)
    tables.execute("INSERT INTO app.u VALUES (1)", user="ann")
    waited(tables, tables.execute("STORAGE FLUSH ALL", namespace="app").message)
    assert refused(tables, "STORAGE FLUSH ALL IN nope") == "Namespace 'nope' does not exist"


def test_compact_merges_segments(tables: Database) -> None:
    for number in range(3):
        tables.execute("INSERT INTO app.t VALUES ($1)", [number])
        flush(tables, "app.t")
    message = tables.execute("STORAGE COMPACT TABLE app.t").message or ""
    assert message.startswith("Storage compaction started for table 'app.t'. Job ID: CO-")
    assert waited(tables, message).startswith("Compaction completed")
    assert dict(rows(tables, "SHOW STATS FOR TABLE app.t"))["segments"] == 1
    assert rows(tables, "SELECT count(*) FROM app.t") == [(3,)]
    assert "No compactable tables" in refused(tables, "STORAGE COMPACT ALL IN app")
    tables.execute("INSERT INTO app.t VALUES (9)")
    flush(tables, "app.t")
    assert "Job IDs: [CO-" in (tables.execute("STORAGE COMPACT ALL IN app").message or "")


def test_a_second_request_names_the_job_that_runs(tables: Database) -> None:
    tables.jobs.runner.stop(5)
    tables.execute("INSERT INTO app.t VALUES (1)")
    job_id = (tables.execute("STORAGE FLUSH TABLE app.t").message or "").rsplit(" ", 1)[1]
    assert tables.execute("STORAGE FLUSH TABLE app.t").message == (
        f"Storage flush skipped for table 'app.t': already queued or running ({job_id})"
    )
    assert job_id in (tables.execute("STORAGE FLUSH ALL IN app").message or "")


@pytest.mark.parametrize("verb", ["FLUSH", "COMPACT"])
def test_streams_and_unknown_tables_are_refused(tables: Database, verb: str) -> None:
    assert "STREAM" in refused(tables, f"STORAGE {verb} TABLE app.s")
    assert refused(tables, f"STORAGE {verb} TABLE app.nope") == "Table 'app.nope' does not exist"
    refused(tables, f"STORAGE {verb}")
    refused(tables, "STORAGE CLEAN TABLE app.t")


def test_jobs_are_shown_newest_first(tables: Database) -> None:
    tables.execute("INSERT INTO app.t VALUES (1)")
    flush(tables, "app.t")
    compact(tables, "app.t")
    assert [row[1] for row in rows(tables, "SHOW JOBS")] == ["compact", "flush"]
    assert [row[1] for row in rows(tables, "SHOW JOBS WHERE status = 'completed' LIMIT 1")] == ["compact"]
    assert [row[1] for row in rows(tables, "SHOW JOBS ORDER BY created_at LIMIT 1")] == ["flush"]
    assert rows(tables, "SHOW JOBS WHERE job_type = 'backup'") == []
    job_id = rows(tables, "SHOW JOBS LIMIT 1")[0][0]
    assert rows(tables, f"SHOW JOB '{job_id}'")[0][2] == "completed"
    assert refused(tables, "SHOW JOB 'FL-nope'") == "Job 'FL-nope' does not exist"
    refused(tables, "SHOW JOBS FOR ann")


@pytest.mark.parametrize("verb", ["KILL JOB '{}'", "CANCEL JOB '{}'", "CANCEL JOB {}"])
def test_a_running_job_is_killed_and_a_finished_one_is_not(db: Database, verb: str) -> None:
    started = threading.Event()

    @db.jobs.executor("wait", prefix="WA")
    def wait(ctx: JobContext[dict[str, object]]) -> None:
        started.set()
        while True:
            ctx.check()

    job = db.jobs.create_job("wait")
    assert started.wait(10)
    assert db.execute(verb.format(job.id)).message == f"Job {job.id} killed: cancelled"
    assert db.jobs.get_job(job.id).status == "cancelled"
    with pytest.raises(kalamdb.InvalidRequest, match="in status cancelled"):
        db.execute(verb.format(job.id))
    with pytest.raises(kalamdb.NotFound):
        db.execute(verb.format("WA-nope"))
