"""The acceptance scenarios of the job system, each under its number, with real jobs."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import pytest

from kalamdb.database import Database
from kalamdb.errors import IdempotencyConflict
from kalamdb.files import FileOps
from kalamdb.jobs import Completed, JobContext, JobExecutor, JobInterrupted, Permanent, RetryPolicy
from kalamdb.storage import Batch
from kalamdb.storage.jobs import JobInsert, JobRow
from kalamdb.types import JobId
from tests.backup.support import connect_with
from tests.jobs.conftest import Gate, texts, until

Open = Callable[..., Database]
QUICK = RetryPolicy(base_ms=1, jitter=0.0)


def table(db: Database, rows: int = 3) -> None:
    db.execute("CREATE NAMESPACE app")
    db.execute("CREATE SHARED TABLE app.t (id INT PRIMARY KEY)")
    db.insert("app.t", [{"id": number} for number in range(rows)])


def column(db: Database, job_id: str, name: str) -> Any:
    return db.execute(f"SELECT {name} FROM system.jobs WHERE job_id = $1", [job_id]).scalar()


def log_of(path: Path, job_id: str) -> list[str]:
    lines = (path / "data" / "logs" / "jobs.log").read_text().splitlines()
    return [line.removeprefix(f"[{job_id}] ") for line in lines if line.startswith(f"[{job_id}] ")]


def failing(db: Database, times: int, *, max_retries: int = 3, retry: RetryPolicy = QUICK) -> list[int]:
    """Registers `shaky`, which fails so often and then completes; the attempts so far."""
    seen: list[int] = []

    @db.jobs.executor("shaky", prefix="SH", retry=retry, max_retries=max_retries)
    def shaky(ctx: JobContext[Any]) -> Completed:
        seen.append(ctx.attempt)
        if len(seen) <= times:
            raise RuntimeError(f"failure {len(seen)}")
        return Completed("done at last")

    return seen


def test_01_a_created_job_is_new_and_stored(open_db: Open) -> None:
    db = open_db()
    table(db)
    db.jobs.stop()
    job = db.jobs.create_job("flush", {"table_id": "app.t"})
    assert job.status == "new" and re.fullmatch(r"FL-[0-9A-Za-z]{10}", job.id)
    assert db.execute("SELECT job_id, job_type, status FROM system.jobs").rows == [(job.id, "flush", "new")]


def test_02_a_new_job_is_queued_then_runs(open_db: Open, tmp_path: Path) -> None:
    db, gate = open_db(), Gate()
    db.jobs.executor("held", prefix="HE")(gate)
    job = db.jobs.create_job("held")
    gate.await_entry()
    running = db.jobs.get_job(job.id)
    assert running.status == "running" and running.started_at is not None and running.started_at >= job.created_at
    gate.open.set()
    db.jobs.wait(job.id, 10)
    db.close()
    lines = log_of(tmp_path, job.id)
    assert lines.index("INFO - Job queued") < lines.index("INFO - Job started")


def test_03_a_job_that_succeeds_is_completed_with_its_result(open_db: Open, tmp_path: Path) -> None:
    db = open_db()
    table(db, 1000)
    job = db.jobs.wait(db.execute("STORAGE FLUSH TABLE app.t").message.rsplit(" ", 1)[1], 10)
    assert job.status == "completed" and job.finished_at is not None and job.result["rows"] == 1000
    db.close()
    assert log_of(tmp_path, job.id)[-1] == f"INFO - Job completed: {job.message}"
    assert job.message.startswith("Flushed 1,000 rows")


def test_04_a_transient_failure_is_retried_after_a_wait(open_db: Open, tmp_path: Path) -> None:
    db = open_db()
    failing(db, 1, retry=RetryPolicy(base_ms=200, jitter=0.0))
    job = db.jobs.create_job("shaky")
    until(lambda: db.jobs.get_job(job.id).status == "retrying")
    assert db.jobs.get_job(job.id).retry_count == 1
    assert db.jobs.wait(job.id, 10).status == "completed"
    db.close()
    assert "WARN - Job failed, retrying in 0.2s (attempt 1/3)" in log_of(tmp_path, job.id)


def test_05_a_job_whose_attempts_are_used_up_fails(open_db: Open, tmp_path: Path) -> None:
    db = open_db()
    seen = failing(db, 99)
    job = db.jobs.wait(db.jobs.create_job("shaky").id, 10)
    assert job.status == "failed" and seen == [1, 2, 3, 4] and job.message == "RuntimeError: failure 4"
    db.close()
    assert log_of(tmp_path, job.id)[-1] == "ERROR - Job failed permanently: RuntimeError: failure 4"


def test_06_a_job_that_runs_when_the_database_stops_fails_when_its_type_says_so(open_db: Open, tmp_path: Path) -> None:
    db, gate = open_db(), Gate()
    db.jobs.executor("fragile", prefix="FR", on_interrupt="fail")(gate)
    job = db.jobs.create_job("fragile")
    gate.await_entry()
    db.close()
    gate.open.set()
    db = open_db()
    found = db.jobs.get_job(job.id)
    assert (found.status, found.message) == ("failed", "Server restarted during execution")
    db.close()
    assert log_of(tmp_path, job.id)[-1] == "ERROR - Job failed permanently: Server restarted during execution"


class HeldFiles(FileOps):
    """Files of a backup target are made only when the test lets them."""

    def __init__(self, target: Path, gate: Gate) -> None:
        self._target = target
        self._gate = gate

    def open_write(self, path: Path) -> BinaryIO:
        if self._target in path.parents:
            self._gate()
        return super().open_write(path)


def test_06_a_backup_that_runs_when_the_database_stops_fails_and_is_none(open_db: Open, tmp_path: Path) -> None:
    target, gate = tmp_path / "backups", Gate()
    with connect_with(tmp_path / "data", HeldFiles(target, gate), **{"shutdown.timeout_s": 0.1}) as db:
        table(db)
        job = db.backup(target, wait=False)
        gate.await_entry()
    gate.open.set()
    db = open_db()
    found = db.jobs.get_job(job.id)
    assert (found.status, found.message) == ("failed", "Server restarted during execution")
    assert [row["status"] for row in db.execute(f"SHOW BACKUPS IN '{target}'").dicts()] in ([], ["incomplete"])
    db.close()
    assert log_of(tmp_path, job.id)[-1] == "ERROR - Job failed permanently: Server restarted during execution"


def test_07_jobs_of_all_eight_types_are_seen_under_their_prefixes(open_db: Open, tmp_path: Path) -> None:
    db = open_db()
    table(db)
    db.execute("CREATE STREAM TABLE app.e (id INT) WITH (TTL_SECONDS = 60)")
    db.insert("app.t", [{"id": number} for number in range(10, 20)])
    made: dict[str, str] = {}
    for prefix, sql in {
        "FL": "STORAGE FLUSH TABLE app.t",
        "CO": """CALL create_job('compact', '{"table_id": "app.t"}')""",
        "RT": """CALL create_job('retention', '{"table_id": "app.t"}')""",
        "SE": """CALL create_job('stream_eviction', '{"table_id": "app.e"}')""",
        "UC": "PURGE USER anna",
        "BK": f"BACKUP DATABASE TO '{tmp_path / 'backups'}'",
        "RS": f"RESTORE DATABASE FROM '{tmp_path / 'backups'}'",
        "CL": "DROP TABLE app.t",
    }.items():
        made[prefix] = str(db.execute(sql).message).rsplit(" ", 1)[1]
        assert db.jobs.wait(made[prefix], 20).status in ("completed", "skipped"), sql
    assert {prefix: job_id[:3] for prefix, job_id in made.items()} == {prefix: f"{prefix}-" for prefix in made}
    seen = dict(db.execute("SELECT job_id, job_type FROM system.jobs").rows)
    assert {prefix: seen[job_id] for prefix, job_id in made.items()} == {
        "FL": "flush", "CO": "compact", "RT": "retention", "SE": "stream_eviction", "UC": "user_cleanup",
        "BK": "backup", "RS": "restore", "CL": "cleanup",
    }  # fmt: skip


def test_08_the_log_tells_the_story_of_each_job_under_its_id(open_db: Open, tmp_path: Path) -> None:
    db = open_db()

    @db.jobs.executor("talk", prefix="TA")
    def talk(ctx: JobContext[dict[str, Any]]) -> None:
        ctx.log.info(f"this is {ctx.params['name']}\nin two lines")
        ctx.log.warning("careful")

    jobs = [db.jobs.create_job("talk", {"name": name}) for name in ("anna", "bert")]
    for job in jobs:
        db.jobs.wait(job.id, 10)
    db.close()
    assert log_of(tmp_path, jobs[0].id) == [
        "INFO - Job created", "INFO - Job queued", "INFO - Job started", "INFO - this is anna\\nin two lines",
        "WARN - careful", "INFO - Job completed",
    ]  # fmt: skip
    lines = (tmp_path / "data" / "logs" / "jobs.log").read_text().splitlines()
    assert len(lines) == 12 and not any("anna" in line for line in lines if jobs[1].id in line)


def test_09_no_more_jobs_run_than_there_are_slots(open_db: Open) -> None:
    db, gate = open_db(**{"jobs.max_concurrent": 5}), Gate()
    db.jobs.executor("held", prefix="HE")(gate)
    jobs = [db.jobs.create_job("held") for _ in range(10)]
    gate.await_entry(5)
    until(lambda: not db.jobs.list_jobs(status="new"))
    assert len(db.jobs.list_jobs(status="running")) == 5 and len(db.jobs.list_jobs(status="queued")) == 5
    gate.open.set()
    assert [db.jobs.wait(job.id, 10).status for job in jobs] == ["completed"] * 10


def test_10_a_cancelled_job_cleans_up_and_is_cancelled(open_db: Open, tmp_path: Path) -> None:
    db, started, cleaned = open_db(), threading.Event(), threading.Event()

    @db.jobs.executor("long", prefix="LO")
    def long(ctx: JobContext[Any]) -> None:
        pause = threading.Event()
        started.set()
        try:
            while True:
                ctx.check()
                pause.wait(0.001)
        except JobInterrupted:
            cleaned.set()
            raise

    job = db.jobs.create_job("long")
    assert started.wait(10)
    assert db.execute(f"CANCEL JOB '{job.id}'").message == f"Job {job.id} killed: cancelled"
    assert cleaned.is_set() and column(db, job.id, "status") == "cancelled"
    db.close()
    assert log_of(tmp_path, job.id)[-1] == "INFO - Job cancelled by user"


def test_11_a_job_with_a_key_is_created(open_db: Open) -> None:
    db = open_db()
    db.jobs.stop()
    job = db.jobs.create_job("report", None, "report:20260101", allow_unknown=True)
    assert job.status == "new" and column(db, job.id, "idempotency_key") == "report:20260101"


def test_12_a_key_that_an_active_job_holds_is_refused_naming_that_job(open_db: Open) -> None:
    db, gate = open_db(), Gate()
    db.jobs.executor("held", prefix="HE")(gate)
    first = db.jobs.create_job("held", None, "daily")
    gate.await_entry()
    with pytest.raises(IdempotencyConflict) as caught:
        db.jobs.create_job("held", None, "daily")
    at = re.escape(first.created_at.isoformat(timespec="milliseconds").replace("+00:00", "Z"))
    wanted = rf"Job '{first.id}' with idempotency key 'daily' is already running \(created {at}\)"
    assert re.fullmatch(wanted, str(caught.value)) and caught.value.job.id == first.id
    assert db.jobs.create_job("held", None, "daily", on_conflict="return").id == first.id
    gate.open.set()


def test_13_a_key_whose_job_has_ended_is_free(open_db: Open) -> None:
    db = open_db()
    db.jobs.executor("quick", prefix="QU")(lambda ctx: None)
    first = db.jobs.wait(db.jobs.create_job("quick", None, "daily").id, 10)
    second = db.jobs.create_job("quick", None, "daily")
    assert first.status == "completed" and second.id != first.id


def test_14_a_key_whose_job_is_to_be_retried_is_refused(open_db: Open) -> None:
    db = open_db()
    failing(db, 99, retry=RetryPolicy(base_ms=60_000))
    job = db.jobs.create_job("shaky", None, "daily")
    until(lambda: db.jobs.get_job(job.id).status == "retrying")
    with pytest.raises(IdempotencyConflict, match="already retrying"):
        db.jobs.create_job("shaky", None, "daily")


def test_15_an_hourly_cleanup_is_refused_while_the_first_is_active(open_db: Open) -> None:
    db = open_db()
    db.jobs.stop()
    db.jobs.create_job("cleanup", {"operation": "sweep"}, "cleanup:20260101T14")
    with pytest.raises(IdempotencyConflict):
        db.jobs.create_job("cleanup", {"operation": "sweep"}, "cleanup:20260101T14")
    db.jobs.run_loop(2)
    until(lambda: not db.jobs.list_jobs(status=["new", "queued", "running"]))
    assert db.jobs.create_job("cleanup", {"operation": "sweep"}, "cleanup:20260101T14").status == "new"


def test_16_jobs_without_a_key_do_not_exclude_each_other(open_db: Open) -> None:
    db = open_db()
    db.jobs.executor("quick", prefix="QU")(lambda ctx: None)
    jobs = [db.jobs.create_job("quick") for _ in range(5)]
    assert len({db.jobs.wait(job.id, 10).id for job in jobs}) == 5


def test_17_a_completed_flush_has_its_message_and_no_trace(open_db: Open) -> None:
    db = open_db()
    table(db)
    job_id = db.execute("STORAGE FLUSH TABLE app.t").message.rsplit(" ", 1)[1]
    db.jobs.wait(job_id, 10)
    assert column(db, job_id, "message").startswith("Flushed 3 rows")
    assert column(db, job_id, "exception_trace") is None


def test_18_and_20_a_failure_stands_in_message_and_nowhere_else(open_db: Open) -> None:
    db = open_db()

    @db.jobs.executor("broken", prefix="BR")
    def broken(ctx: JobContext[Any]) -> None:
        raise Permanent("the disk is on fire")

    job = db.jobs.wait(db.jobs.create_job("broken").id, 10)
    assert column(db, job.id, "message") == "the disk is on fire"
    names = db.execute("SELECT * FROM system.jobs").columns
    assert not {"error", "error_message", "trace"} & set(names)


def test_19_a_retention_job_tells_what_it_did_in_message(open_db: Open) -> None:
    db = open_db()
    table(db)
    job = db.jobs.wait(db.jobs.create_job("retention", {"table_id": "app.t"}).id, 10)
    assert job.status in ("completed", "skipped") and column(db, job.id, "message")


def test_21_and_23_the_whole_trace_is_kept_beside_a_short_message(open_db: Open) -> None:
    db = open_db()

    @db.jobs.executor("deep", prefix="DE", max_retries=0)
    def deep(ctx: JobContext[Any]) -> None:
        try:
            {}["missing"]  # noqa: B018
        except KeyError as exc:
            raise ValueError("short\n" + "\n".join(f"line {n}" for n in range(120))) from exc

    job = db.jobs.wait(db.jobs.create_job("deep").id, 10)
    trace = column(db, job.id, "exception_trace")
    assert "KeyError: 'missing'" in trace and "line 119" in trace and trace.count("\n") > 120
    assert column(db, job.id, "message").startswith("ValueError: short")


def test_22_the_trace_is_cleared_when_a_later_attempt_succeeds(open_db: Open) -> None:
    db = open_db()
    failing(db, 2)
    job = db.jobs.wait(db.jobs.create_job("shaky").id, 10)
    assert (job.status, job.message, job.exception_trace) == ("completed", "done at last", None)
    traces = [attempt.exception_trace for attempt in job.attempts()]
    assert ["failure 1" in (traces[0] or ""), "failure 2" in (traces[1] or ""), traces[2]] == [True, True, None]


def test_24_message_and_trace_of_a_failure_stay_until_the_next_end(open_db: Open) -> None:
    db, gate = open_db(), Gate()

    @db.jobs.executor("again", prefix="AG", retry=QUICK)
    def again(ctx: JobContext[Any]) -> None:
        if ctx.attempt == 1:
            raise RuntimeError("first")
        gate()

    job = db.jobs.create_job("again")
    gate.await_entry()
    running = db.jobs.get_job(job.id)
    assert running.message == "RuntimeError: first" and "first" in running.exception_trace
    gate.open.set()


def test_25_failed_jobs_are_found_with_message_and_trace(open_db: Open) -> None:
    db = open_db()
    failing(db, 99, max_retries=0)
    db.jobs.wait(db.jobs.create_job("shaky").id, 10)
    found = db.execute("SELECT message, exception_trace FROM system.jobs WHERE status = 'failed'").rows
    assert len(found) == 1 and all(found[0])
    assert [job.message for job in db.jobs.list_jobs(status="Failed")] == [found[0][0]]


def test_26_a_new_job_has_three_retries_and_used_none(open_db: Open) -> None:
    db = open_db()
    db.jobs.stop()
    job = db.jobs.create_job("later", allow_unknown=True)
    assert (job.retry_count, job.max_retries) == (0, 3)


def test_27_to_29_retries_are_counted_up_to_the_limit(open_db: Open) -> None:
    db = open_db()
    failing(db, 99)
    job = db.jobs.wait(db.jobs.create_job("shaky").id, 10)
    assert (job.retry_count, job.max_retries, job.attempt, job.status) == (3, 3, 4, "failed")
    waits = [text for text in texts(job) if "retrying" in text]
    assert [text.rsplit("(", 1)[1] for text in waits] == ["attempt 1/3)", "attempt 2/3)", "attempt 3/3)"]
    outcomes = [attempt.outcome for attempt in job.attempts()]
    assert outcomes == ["retrying", "retrying", "retrying", "failed"]


def test_30_a_job_may_have_five_retries(open_db: Open) -> None:
    db = open_db()
    seen = failing(db, 99)
    job = db.jobs.wait(db.jobs.create_job("shaky", max_retries=5).id, 10)
    assert (len(seen), job.retry_count, job.status) == (6, 5, "failed")


def test_31_parameters_are_stored_as_an_object(open_db: Open) -> None:
    db = open_db()
    table(db)
    db.jobs.stop()
    job = db.jobs.create_job("flush", {"table_id": "app.t"})
    assert db.execute("SELECT parameters FROM system.jobs").scalar() == {"table_id": "app.t"} == job.parameters
    assert db.execute("SELECT parameters->>'table_id' FROM system.jobs").scalar() == "app.t"


def test_32_an_executor_reads_parameters_by_name(open_db: Open) -> None:
    db = open_db()
    table(db)
    job_id = db.execute("DROP TABLE app.t").message.rsplit(" ", 1)[1]
    job = db.jobs.wait(job_id, 10)
    assert job.status == "completed" and job.parameters["operation"] == "drop_table"
    assert job.parameters["table_id"] == "app.t"


def test_33_parameters_of_an_older_version_reach_the_executor_in_the_new_form(open_db: Open) -> None:
    db = open_db()
    seen: list[Any] = []

    class CopyParams(msgspec.Struct):
        source: str
        target: str

    class Copy(JobExecutor[CopyParams]):
        job_type = "copy"
        prefix = "CY"
        Params = CopyParams

        def upcast(self, parameters: dict[str, Any]) -> dict[str, Any]:
            if "arg0" in parameters:
                return {"source": parameters["arg0"], "target": parameters["arg1"]}
            return parameters

        def execute(self, ctx: JobContext[CopyParams]) -> None:
            seen.append((ctx.params.source, ctx.params.target))

    assert Copy().decode(["p1", "p2"]) == CopyParams("p1", "p2")
    row = JobRow(job_id=JobId(""), job_type="copy", parameters=["p1", "p2"], created_at=1)
    commit = db.context.backend.commit(Batch(jobs=[JobInsert(row, lambda: "CY-legacy")]))
    db.jobs.registry.register(Copy())
    assert db.jobs.wait(commit.jobs[0], 10).status == "completed" and seen == [("p1", "p2")]
