"""What runs in the processes that crash tests kill. They are forked from a server that has imported all this."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pyarrow as pa

import kalamdb
import kalamdb.sql.engine  # noqa: F401 - imported before the fork, so that no child pays for it
import kalamdb.storage.rocks  # noqa: F401
from kalamdb.app_context import AppContext
from kalamdb.database import Database
from kalamdb.testing.crash import SteppedContext
from tests.crash.support import settings as quiet


def fork_server() -> ForkServerContext:
    """Processes that start in milliseconds: forked from one that has imported the database and opened none."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def start(target: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    """A child that runs `target(*arguments)`."""
    process = fork_server().Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def write(path: Path, settings: dict[str, Any], operations: list[dict[str, Any]], output: Connection) -> None:
    """Do the operations one after the other; the number of each is a line on stdout once it is acknowledged."""
    os.dup2(output.fileno(), 1)
    print("opening", flush=True)
    db = kalamdb.connect(path, **settings)
    print("open", flush=True)
    for number, operation in enumerate(operations):
        _do(db, operation)
        print(number, flush=True)
    print("done", flush=True)
    multiprocessing.Event().wait()


def _do(db: Database, operation: dict[str, Any]) -> None:
    user = operation.get("user")
    match operation["kind"]:
        case "sql":
            db.execute(operation["sql"], operation.get("params"), user=user)
        case "bulk":
            rows = operation["rows"]
            data = pa.table({name: [row[at] for row in rows] for at, name in enumerate(("id", "n", "v"))})
            db.insert(operation["table"], data, user=user, on_conflict="update")
        case "transaction":
            with db.transaction(user=user) as transaction:
                for sql, params in operation["statements"]:
                    transaction.execute(sql, params)
        case "job":
            job = db.jobs.create_job(operation["type"], operation["params"], on_conflict="return")
            if operation["wait"]:
                db.jobs.wait(job.id, 60)
        case kind:
            raise AssertionError(kind)


STOPPED = 77
"""Exit status of a child that reached the point at which it was to stop."""


def stop_at(path: Path, operation: str, point: str | None, output: Connection) -> None:
    """Do one operation and stop dead at a point of it; without a point send the points that it passes."""
    armed = operation == "start"
    passed: list[str] = []

    def on_step(reached: str, path: Path | None) -> None:
        if armed:
            passed.append(reached)
            if reached == point:
                os._exit(STOPPED)

    with Database(SteppedContext(path, quiet(), on_step)) as db:
        armed = True
        # A job writes the mirror of its table after it has completed; the end of the block waits for that.
        OPERATIONS[operation](db)
    output.send(passed)


def backups_beside(path: Path) -> str:
    """Where a database of these tests has its backups."""
    return str(path.parent / "backups")


def params_of(job_type: str, path: Path) -> dict[str, Any]:
    """Parameters with which each built-in executor finds something to do in the database at `path`."""
    match job_type:
        case "flush" | "compact":
            return {"table_id": "app.t"}
        case "cleanup":
            return {"operation": "sweep"}
        case "retention" | "stream_eviction":
            return {}
        case "user_cleanup":
            return {"user_id": "bob"}
        case "backup" | "restore":
            return {"path": backups_beside(path)}
        case _:
            raise AssertionError(job_type)


def work(path: Path, job_type: str, output: Connection) -> None:
    """Run a job; say its id once it is accepted, then how it ended. After a restore open what it restored, say so."""
    with Database(AppContext(path, quiet())) as db:
        job = db.jobs.create_job(job_type, params_of(job_type, path))
        output.send(job.id)
        output.send(str(db.jobs.wait(job.id, 60).status))
        if job_type != "restore":
            multiprocessing.Event().wait()
    with Database(AppContext(path, quiet())) as db:
        _start(db)
        output.send("started")
        multiprocessing.Event().wait()


def _run(db: Database, job_type: str, params: dict[str, Any] | None = None) -> None:
    assert db.context.directory is not None
    params = params_of(job_type, db.context.directory.path) if params is None else params
    job = db.jobs.wait(db.jobs.create_job(job_type, params).id, 60)
    assert job.status == "completed", f"{job.status}: {job.message}"


def _flush(db: Database) -> None:
    _run(db, "flush", {"table_id": "app.n"})
    while db.context.backend.remove_retired():
        pass


def _drop(db: Database) -> None:
    message = db.execute("DROP TABLE app.d").message or ""
    job = db.jobs.wait(message.rsplit(" ", 1)[1], 60)
    assert job.status == "completed", f"{job.status}: {job.message}"


def _large_statement(db: Database) -> None:
    values = ", ".join(f"({number}, 'large')" for number in range(1, 13))
    conflict = "ON CONFLICT (id) DO UPDATE SET v = excluded.v"
    db.execute(f"INSERT INTO app.n VALUES {values} {conflict}", user="ann")


def _start(db: Database) -> None:
    assert db.context.probation is not None and db.context.probation.over.wait(60)


OPERATIONS: dict[str, Callable[[Database], None]] = {
    "flush": _flush,
    "compact": lambda db: _run(db, "compact"),
    "drop": _drop,
    "sweep": lambda db: _run(db, "cleanup"),
    "large statement": _large_statement,
    "retention": lambda db: _run(db, "retention"),
    "stream_eviction": lambda db: _run(db, "stream_eviction"),
    "user_cleanup": lambda db: _run(db, "user_cleanup"),
    "backup": lambda db: _run(db, "backup"),
    "restore": lambda db: _run(db, "restore"),
    "start": _start,
}
