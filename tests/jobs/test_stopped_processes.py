"""Processes that stand still while a job runs: SIGSTOP, then SIGCONT or SIGKILL."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

import kalamdb
from kalamdb.database import Database
from kalamdb.jobs import JobContext
from kalamdb.testing.crash import SteppedContext
from tests.crash.children import start
from tests.crash.support import settings
from tests.jobs.conftest import QUIET, WAIT_S, until

_STILL_S = 0.6
"""Longer than a job log, a progress report or a pass of the runner waits."""


_told = threading.Event()
"""In the child: the parent knows the job."""


def stop_self() -> None:
    assert _told.wait(WAIT_S)
    # To this thread: one to the process may reach another thread first, and this one would go on for a moment.
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


def mark(ctx: JobContext[Any]) -> None:
    """Stands still in its first attempt; when the time is up, stops at its next check; else one row."""
    if ctx.attempt == 1:
        stop_self()
        if ctx.params["is_late"]:
            until(lambda: ctx.cancelled)
        ctx.check()
    with ctx.transaction(complete="marked") as tx:
        tx.execute("INSERT INTO app.t VALUES (1000, 'marked')")


def run(path: Path, job: dict[str, Any], point: str | None, output: Connection) -> None:
    """Fill a database, then run a job in which the process stops itself once, at a point; send how the job ended."""
    armed = False

    def on_step(reached: str, where: Path | None) -> None:
        nonlocal armed
        if armed and reached == point:
            armed = False
            stop_self()

    with Database(SteppedContext(path, settings(), on_step)) as db:
        db.execute("CREATE NAMESPACE app")
        db.execute("CREATE SHARED TABLE app.t (id INT PRIMARY KEY, v TEXT)")
        db.execute("INSERT INTO app.t VALUES (1, 'a'), (2, 'b')")
        db.jobs.executor("mark", prefix="MK")(mark)
        armed = True
        made = db.jobs.create_job(**job)
        output.send(made.id)
        _told.set()
        ended = db.jobs.wait(made.id, WAIT_S)
        output.send((str(ended.status), [str(one.outcome) for one in ended.attempts()], ended.retry_count))
        output.send([event.text for event in ended.events()])


class Child:
    """A process that has stopped itself inside a job."""

    def __init__(self, path: Path, job: dict[str, Any], point: str | None = None) -> None:
        self.path = path
        self.received, sender = multiprocessing.Pipe(duplex=False)
        self.process: ForkServerProcess = start(run, path, job, point, sender)
        sender.close()
        self.job_id: str = self.receive()
        assert self.process.pid is not None
        self.pid = self.process.pid
        until(lambda: Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")

    def receive(self) -> Any:
        assert self.received.poll(WAIT_S)
        return self.received.recv()

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def join(self) -> None:
        self.process.join(WAIT_S)
        assert not self.process.is_alive()


def contents(path: Path) -> list[tuple[Any, ...]]:
    with kalamdb.connect(path, **QUIET) as db:
        assert db.check().problems == []
        return db.execute("SELECT id, v FROM app.t ORDER BY id").rows


ROWS = [(1, "a"), (2, "b")]
MARKED = [*ROWS, (1000, "marked")]


@pytest.mark.parametrize(
    ("job", "point", "rows"),
    [
        ({"job_type": "mark", "params": {"is_late": False}, "timeout_s": 30}, None, MARKED),
        (
            {"job_type": "flush", "params": {"table_id": "app.t"}, "timeout_s": 30},
            "before commit of the publication",
            ROWS,
        ),
    ],
    ids=["mark", "flush"],
)
def test_a_process_that_stood_still_keeps_its_database_and_its_job(
    tmp_path: Path, job: dict[str, Any], point: str | None, rows: list[Any]
) -> None:
    child = Child(tmp_path / "data", job, point)
    time.sleep(_STILL_S)
    with pytest.raises(kalamdb.KalamDbError, match=str(child.pid)):
        kalamdb.connect(tmp_path / "data", **QUIET)
    child.signal(signal.SIGCONT)
    assert child.receive() == ("completed", ["completed"], 0)
    child.join()
    assert contents(tmp_path / "data") == rows


def test_a_process_that_stood_still_for_longer_than_the_time_out_records_it_and_tries_again(tmp_path: Path) -> None:
    job = {"job_type": "mark", "params": {"is_late": True}, "timeout_s": 0.3}
    child = Child(tmp_path / "data", job)
    time.sleep(_STILL_S)
    child.signal(signal.SIGCONT)
    assert child.receive() == ("completed", ["retrying", "completed"], 1)
    texts = child.receive()
    assert any(text.startswith("Job failed, retrying") for text in texts)
    assert texts[-1] == "Job completed: marked"
    child.join()
    with kalamdb.connect(tmp_path / "data", **QUIET) as db:
        first = db.jobs.get_job(child.job_id).attempts()[0]
        assert first.message == "the attempt took longer than its time-out of 0.3 s"
    assert contents(tmp_path / "data") == MARKED


@pytest.mark.parametrize(
    ("job_type", "point", "status", "outcomes"),
    [
        ("flush", "before commit of the publication", "completed", ["interrupted", "completed"]),
        ("flush", "after commit of the publication", "completed", ["completed"]),
        ("backup", "before checkpoint", "failed", ["failed"]),
    ],
)
def test_a_process_that_is_killed_while_it_stands_still_is_recovered_as_the_policy_says(
    tmp_path: Path, job_type: str, point: str, status: str, outcomes: list[str]
) -> None:
    params = {"table_id": "app.t"} if job_type == "flush" else {"path": str(tmp_path / "backups")}
    child = Child(tmp_path / "data", {"job_type": job_type, "params": params}, point)
    with pytest.raises(kalamdb.KalamDbError, match=str(child.pid)):
        kalamdb.connect(tmp_path / "data", **QUIET)
    child.signal(signal.SIGKILL)
    child.join()
    with kalamdb.connect(tmp_path / "data", **QUIET) as db:
        job = db.jobs.wait(child.job_id, WAIT_S)
        assert (job.status, [str(one.outcome) for one in job.attempts()]) == (status, outcomes)
        assert (job.message == "Server restarted during execution") is (job_type == "backup")
        assert db.jobs.wait(db.jobs.create_job("cleanup", {"operation": "sweep"}).id, WAIT_S).status == "completed"
        report = db.check()
        assert report.problems == [] and (report.strays, report.intents) == (0, 0)
    assert contents(tmp_path / "data") == ROWS
