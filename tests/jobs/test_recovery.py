"""Processes that die while jobs run, and what the next one makes of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import kalamdb
from kalamdb.database import Database
from kalamdb.jobs import JobContext
from tests.jobs.conftest import QUIET, until

PRELUDE = """
import os, sys, threading
import kalamdb
from kalamdb.jobs import JobContext
db = kalamdb.connect(sys.argv[1], **{"flush.scheduler_enabled": False, "compaction.enabled": False})
def say(text):
    os.write(1, (text + "\\n").encode())
forever = threading.Event()
for at, policy in enumerate(("requeue", "retry", "fail")):
    @db.jobs.executor(f"work_{policy}", prefix=f"W{'ABC'[at]}", on_interrupt=policy)
    def work(ctx):
        ctx.checkpoint({"half": True})
        ctx.progress(5, 10)
        say(ctx.job.id)
        forever.wait()
@db.jobs.executor("poison", prefix="PO", on_interrupt="requeue")
def poison(ctx):
    os._exit(9)
"""


def child(folder: Path, body: str, *, wait_for: int) -> tuple[int, list[str]]:
    """Run a process until it has said so many lines, then kill it; (exit status, the lines)."""
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(body), str(folder / "data")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ)) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline().strip() for _ in range(wait_for)]
        if wait_for:
            process.send_signal(signal.SIGKILL)
        return process.wait(30), lines


def reopened(folder: Path) -> Database:
    db = kalamdb.connect(folder / "data", **{**QUIET, "shutdown.timeout_s": 0.2})
    for at, policy in enumerate(("requeue", "retry", "fail")):

        @db.jobs.executor(f"work_{policy}", prefix=f"W{'ABC'[at]}", on_interrupt=policy)
        def work(ctx: JobContext[Any]) -> None:
            ctx.log.info(f"goes on from {ctx.checkpoint_state}")

    return db


def log_of(folder: Path, job_id: str) -> list[str]:
    lines = (folder / "data" / "logs" / "jobs.log").read_text().splitlines()
    return [line.partition("] ")[2] for line in lines if line.startswith(f"[{job_id}]")]


def test_jobs_that_ran_when_the_process_was_killed_go_on_as_their_policy_says(tmp_path: Path) -> None:
    body = """
    for policy in ("requeue", "retry", "fail"):
        db.jobs.create_job(f"work_{policy}")
    forever.wait()
    """
    status, lines = child(tmp_path, body, wait_for=3)
    assert status == -signal.SIGKILL and len(set(lines)) == 3
    with reopened(tmp_path) as db:
        jobs = {job_id[:2]: db.jobs.wait(job_id, 20) for job_id in lines}
        requeued, retried, failed = jobs["WA"], jobs["WB"], jobs["WC"]
        assert (requeued.status, requeued.retry_count, requeued.attempt) == ("completed", 0, 2)
        assert (retried.status, retried.retry_count, retried.attempt) == ("completed", 1, 2)
        assert (failed.status, failed.message) == ("failed", "Server restarted during execution")
        assert all(job.process_deaths == 0 for job in (requeued, retried))
        assert [one.outcome for one in requeued.attempts()] == ["interrupted", "completed"]
        assert db.check().ok
    assert log_of(tmp_path, requeued.id)[-4:] == [
        "WARN - Server restarted during execution; job queued again", "INFO - Job started (attempt 2)",
        "INFO - goes on from {'half': True}", "INFO - Job completed",
    ]  # fmt: skip


def test_a_job_that_kills_its_process_again_and_again_is_quarantined(tmp_path: Path) -> None:
    create = """
    job = db.jobs.create_job("poison")
    forever.wait()
    """
    assert child(tmp_path, create, wait_for=0)[0] == 9
    for _ in range(2):
        assert child(tmp_path, "forever.wait()", wait_for=0)[0] == 9
    with reopened(tmp_path) as db:
        job = db.jobs.list_jobs(job_type="poison")[0]
        assert (job.status, job.hold, job.attempt) == ("failed", "quarantined", 3)
        assert job.message.startswith("quarantined: the process died 3 times while the job was running; RETRY JOB")
        assert [str(reason.kind) for reason in db.jobs.explain_job(job.id)] == ["quarantined"]
        with pytest.raises(kalamdb.InvalidRequest, match="quarantined; RETRY JOB runs it again"):
            db.jobs.resume_job(job.id)
        db.jobs.executor("poison", prefix="PO")(lambda ctx: None)
        assert db.execute(f"RETRY JOB '{job.id}'").message == f"Job {job.id} queued again"
        healed = db.jobs.wait(job.id, 20)
        assert (healed.status, healed.hold, healed.process_deaths) == ("completed", None, 0)


def test_accepted_jobs_survive_a_kill_at_any_moment_and_run_once_each(tmp_path: Path) -> None:
    body = """
    db.execute("CREATE SHARED TABLE IF NOT EXISTS done (id INT PRIMARY KEY)")
    @db.jobs.executor("mark", prefix="MA", on_interrupt="requeue")
    def mark(ctx):
        with ctx.transaction(complete="marked") as tx:
            tx.execute("INSERT INTO done VALUES ($1)", [ctx.params["n"]])
    first = (db.execute("SELECT count(*) FROM system.jobs").scalar() or 0) * 1000
    for n in range(10_000):
        job = db.jobs.create_job("mark", {"n": first + n})
        say(f"{first + n} {job.id}")
    """
    accepted: dict[int, str] = {}
    for wait_for in (5, 17, 40):
        for line in child(tmp_path, body, wait_for=wait_for)[1]:
            number, _, job_id = line.partition(" ")
            accepted[int(number)] = job_id
    with reopened(tmp_path) as db:

        @db.jobs.executor("mark", prefix="MA", on_interrupt="requeue")
        def mark(ctx: JobContext[Any]) -> None:
            with ctx.transaction(complete="marked") as tx:
                tx.execute("INSERT INTO done VALUES ($1)", [ctx.params["n"]])

        assert all(db.jobs.wait(job_id, 20).status == "completed" for job_id in accepted.values())
        until(lambda: not db.jobs.list_jobs(status=["new", "queued", "running", "retrying"]))
        jobs = db.jobs.list_jobs(job_type="mark", limit=None)
        assert {job.status for job in jobs} == {"completed"}
        done = [number for (number,) in db.execute("SELECT id FROM done").rows]
        assert sorted(done) == sorted(job.parameters["n"] for job in jobs) and accepted.keys() <= set(done)
        assert db.check().ok
    for job in jobs:
        assert log_of(tmp_path, job.id)[-1] == "INFO - Job completed: marked"
        assert sum("Job completed" in line for line in log_of(tmp_path, job.id)) == 1
