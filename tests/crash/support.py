"""Databases that crash tests stop, reopen and judge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from kalamdb.app_context import AppContext
from kalamdb.clock import SystemClock, ulid
from kalamdb.config import Settings
from kalamdb.database import Database
from kalamdb.jobs.context import JobContext
from kalamdb.jobs.endings import Endings
from kalamdb.jobs.manager import JobRequest
from kalamdb.jobs.settings import JobSettings
from kalamdb.sql.caller import Caller
from kalamdb.storage import ABSENT, Batch, RecordKind, RecordOp, record_key
from kalamdb.storage.jobs import Claim, JobMove, JobRow, JobStatus, OnInterrupt
from kalamdb.tables.maintenance import Maintenance
from kalamdb.tables.segments import IntentRecord, segment_path
from kalamdb.types import Role, TableId

USERS = ("ann", "bob")
_AGE_MS = 2 * 3_600_000
Contents = dict[tuple[str, str], dict[int, str]]
"""(table, user) -> id -> v; the user is '' in a shared table."""


def settings(**given: Any) -> Settings:
    """No scheduler works beside the test; statements of more than eight rows become segments."""
    quiet = {
        "flush.scheduler_enabled": False, "compaction.enabled": False, "limits.batch_rows_max": 8,
        # To look for installed executors takes a tenth of such a test.
        "jobs.entry_points_enabled": False,
    }  # fmt: skip
    return Settings.load({**quiet, **{key.replace("__", "."): value for key, value in given.items()}}, environment={})


def execute(context: AppContext, sql: str, user: str = "root") -> list[tuple[Any, ...]]:
    """Run SQL on parts that were not started."""
    return context.session.execute(sql, Caller(user, Role.SYSTEM, "default")).rows


def contents(context: AppContext) -> Contents:
    """All rows of all tables in namespace app, as SQL shows them."""
    found: Contents = {}
    definitions = [entry.definition for entry in context.catalog.tables("app")]
    for user in USERS:
        own = {
            str(one.table_id): user if one.kind == "user" else ""
            for one in definitions
            if one.kind == "user" or user == USERS[0]
        }
        selects = [f"SELECT '{table}', id, v FROM {table}" for table in own]
        found |= {(table, owner): {} for table, owner in own.items()}
        for table, number, value in execute(context, " UNION ALL ".join(selects), user):
            rows = found[table, own[table]]
            assert number not in rows, f"row {number} of {table} is shown twice: {rows[number]}, {value}"
            rows[number] = value
    return found


def fill(context: AppContext) -> None:
    """Tables with rows in both tiers and both levels, one without files, one to be dropped, and things to sweep."""
    execute(context, "CREATE NAMESPACE app")
    for name in "tdn":
        execute(context, f"CREATE USER TABLE app.{name} (id BIGINT PRIMARY KEY, v TEXT)")
    execute(context, "CREATE SHARED TABLE app.s (id BIGINT PRIMARY KEY, v TEXT)")
    for user in ("ann", "bob"):
        for name in "td":
            execute(context, f"INSERT INTO app.{name} VALUES (1, 'a'), (2, 'b'), (3, 'c'), (4, 'd')", user)
        execute(context, "INSERT INTO app.n VALUES (1, 'new'), (2, 'new')", user)
    execute(context, "INSERT INTO app.s VALUES " + ", ".join(f"({number}, 's')" for number in range(12)))
    for name in "td":
        run_job(context, "flush", {"table_id": f"app.{name}"})
    run_job(context, "compact", {"table_id": "app.t"})
    execute(context, "DELETE FROM app.t WHERE id = 1", "ann")
    execute(context, "UPDATE app.t SET v = 'u' WHERE id = 2", "ann")
    run_job(context, "flush", {"table_id": "app.t"})
    execute(context, "UPDATE app.t SET v = 'hot' WHERE id = 3", "ann")
    execute(context, "DELETE FROM app.t WHERE id = 4", "bob")
    execute(context, "INSERT INTO app.d VALUES (9, 'hot')", "ann")
    while context.backend.remove_retired():
        pass
    litter(context)


class EarlierClock(SystemClock):
    """Two hours ago."""

    def now_ms(self) -> int:
        return super().now_ms() - _AGE_MS


def fill_old(context: AppContext) -> None:
    """Tables whose deleted and replaced rows lie in both tiers and both levels, and a stream."""
    execute(context, "CREATE NAMESPACE app")
    hourly = "WITH (DELETED_RETENTION_HOURS = 1)"
    execute(context, f"CREATE USER TABLE app.t (id BIGINT PRIMARY KEY, v TEXT) {hourly}")
    execute(context, f"CREATE SHARED TABLE app.s (id BIGINT PRIMARY KEY, v TEXT) {hourly}")
    execute(context, "CREATE STREAM TABLE app.e (id BIGINT, v TEXT) WITH (TTL_SECONDS = 60)")
    execute(context, "CREATE USER bob")
    for user in ("ann", "bob"):
        execute(context, "INSERT INTO app.t VALUES (1, 'a'), (2, 'b'), (3, 'c'), (4, 'd')", user)
        execute(context, "INSERT INTO app.e VALUES (1, 'event')", user)
    execute(context, "INSERT INTO app.s VALUES (1, 'a'), (2, 'b'), (3, 'c')")
    for name in "ts":
        run_job(context, "flush", {"table_id": f"app.{name}"})
    run_job(context, "compact", {"table_id": "app.t"})
    for user in ("ann", "bob"):
        execute(context, "DELETE FROM app.t WHERE id = 1", user)
        execute(context, "UPDATE app.t SET v = 'u' WHERE id = 2", user)
    execute(context, "DELETE FROM app.s WHERE id = 1")
    run_job(context, "flush", {"table_id": "app.t"})
    execute(context, "DELETE FROM app.t WHERE id = 3", "ann")
    execute(context, "UPDATE app.t SET v = 'hot' WHERE id = 4", "bob")
    while context.backend.remove_retired():
        pass


def fill_for_all(context: AppContext) -> None:
    """Something to do for each built-in executor."""
    fill_old(context)
    execute(context, "CREATE USER TABLE app.d (id BIGINT PRIMARY KEY, v TEXT)")
    execute(context, "INSERT INTO app.d VALUES (1, 'cold')", "ann")
    run_job(context, "flush", {"table_id": "app.d"})
    litter(context)


def litter(context: AppContext) -> None:
    """What crashes leave: a file of a dead intent, an intent without a file, files that nothing names."""
    definition = context.catalog.require(TableId("app", "t")).definition
    for with_file in (True, False):
        segment_id = ulid(context.clock)
        body = msgspec.msgpack.encode(IntentRecord(segment_id=segment_id, process="dead"))
        key = record_key(RecordKind.INTENT, definition.uid, segment_id)
        context.backend.commit(Batch(records=[RecordOp(key, body, ABSENT)]))
        if with_file:
            segment_path(context.store.root, definition, segment_id).write_bytes(b"half")
    folder = segment_path(context.store.root, definition, "x").parent
    (folder / f"{ulid(context.clock)}.parquet").write_bytes(b"never named")
    (folder / ".manifest.json.tmp").write_bytes(b"{")
    gone = folder.parent.parent / "gone" / "77"
    gone.mkdir(parents=True)
    (gone / f"{ulid(context.clock)}.parquet").write_bytes(b"of a table that is no more")


@dataclass
class _Services:
    maintenance: Maintenance


class _Standing(SystemClock):
    """Seconds stand still, so that the commits of a job do not depend on how fast it is: progress is shown once."""

    def monotonic_s(self) -> float:
        return 0.0


def run_job(context: AppContext, job_type: str, params: dict[str, Any]) -> None:
    """Create a job, claim it and run its executor in this thread."""
    create_job(context, job_type, params)
    run_waiting(context)


def create_job(context: AppContext, job_type: str, params: dict[str, Any]) -> None:
    """Create a job on parts that were not started."""
    insert = context.job_manager.prepare(JobRequest(job_type=job_type, params=params))
    context.backend.wait_durable(context.backend.commit(Batch(jobs=[insert])))


class Work:
    """A claimed job, run and ended by whoever calls `run`."""

    def __init__(self, context: AppContext, row: JobRow) -> None:
        self.row = row
        self._backend = context.backend
        self._endings = Endings(context.clock, JobSettings())
        self._executor = context.job_registry.get_or_error(row.job_type)
        self.job: JobContext[Any] = JobContext(
            row, backend=context.backend, services=_Services(context.maintenance), clock=_Standing(),
            settings=JobSettings(), endings=self._endings, create=context.job_manager.create_job,
        )  # fmt: skip
        self.job.params = self._executor.decode(row.parameters)

    def run(self) -> None:
        """Execute, and record the end unless the executor did."""
        outcome = self._executor.execute(self.job)
        if not self.job.sealed:
            ending = self._endings.of(self.row, outcome, None)
            move = JobMove(self.row.job_id, JobStatus.RUNNING, self.row.lease_id, ending.changes, ending.events)
            self._backend.wait_durable(self._backend.commit(Batch(jobs=[move])))


def claim(context: AppContext) -> list[Work]:
    """Claim all jobs that wait."""
    claimed = context.backend.claim(Claim(limit=10, types=set(context.job_registry.job_types())))
    assert claimed is not None
    rows = {row.job_id: row for row in claimed.changed_jobs}
    return [Work(context, rows[job_id]) for job_id in claimed.claimed]


def run_waiting(context: AppContext) -> None:
    """Run all jobs that wait, in this thread."""
    for work in claim(context):
        work.run()
        ended = context.backend.jobs.get(work.row.job_id)
        assert ended is not None
        assert ended.status is JobStatus.COMPLETED, f"{ended.job_id} is {ended.status}: {ended.message}"


def settle(db: Database) -> None:
    """Wait until no job is active, then sweep."""
    while active := [job for job in db.jobs.list_jobs(limit=None) if job.status.is_active]:
        db.jobs.wait(active[0].id, 30)
    job = db.jobs.create_job("cleanup", {"operation": "sweep"})
    ended = db.jobs.wait(job.id, 30)
    assert ended.status is JobStatus.COMPLETED, f"the sweep is {ended.status}: {ended.message}"


def judge(db: Database) -> None:
    """Everything fits together, and no file is there that no record names."""
    report = db.check()
    assert report.problems == []
    assert (report.strays, report.intents, report.dropped) == (0, 0, 0)
    root = db.context.store.root
    named = {
        str(segment.path)
        for entry in db.context.catalog.tables()
        for segment in db.context.store.state(entry.definition.uid).segments
    }
    assert {str(path) for path in root.rglob("*.parquet")} == named
    assert [path for path in root.rglob("*.tmp")] == []


def judge_jobs(db: Database) -> None:
    """Every job has ended, well or as its policy for the death of the process says."""
    for job in db.jobs.list_jobs(limit=None):
        fails = db.context.job_registry.get_or_error(job.job_type).on_interrupt is OnInterrupt.FAIL
        if job.status == "failed":
            assert fails and job.message == "Server restarted during execution", f"{job.id}: {job.message}"
        else:
            assert job.status == "completed", f"{job.id} is {job.status}: {job.message}"


def judge_copies(db: Database) -> None:
    """Backups beside the database are whole or count for nothing; no generation and no copy is left over."""
    directory, probation, backups = db.context.directory, db.context.probation, db.context.backups
    assert directory is not None and probation is not None
    assert probation.over.wait(30) and probation.problems == []
    assert [path.name for path in directory.path.glob("gen-*")] == [directory.generation.name]
    assert list(directory.generation.path.glob("checkpoints/*")) == []
    for entry in backups.entries(str(directory.path.parent / "backups")):
        assert entry.status in ("complete", "incomplete")
        if entry.status == "complete":
            backups.verify(entry.where)


def no_deleted_row(db: Database) -> None:
    """What retention leaves of `fill_old`."""
    for table, user in (("app.t", "ann"), ("app.t", "bob"), ("app.s", "root")):
        assert db.execute(f"SELECT id FROM {table} WHERE _deleted", user=user).rows == []


def no_bucket(db: Database) -> None:
    """What stream eviction leaves of `fill_old`."""
    uid = db.context.catalog.require(TableId.parse("app.e")).definition.uid
    with db.context.backend.snapshot() as snapshot:
        assert list(snapshot.buckets(uid)) == []


def no_bob(db: Database) -> None:
    """What erasing bob leaves of `fill_old`; makes him anew."""
    assert db.execute("SELECT count(*) FROM system.users WHERE user_id = 'bob'").scalar() == 0
    assert db.execute("SELECT id FROM app.t WHERE _deleted OR NOT _deleted", user="bob").rows == []
    # The mark is gone with the user: the name is free again.
    db.execute("CREATE USER bob")
    db.execute("INSERT INTO app.t VALUES (1, 'new')", user="bob")
    db.execute("DELETE FROM app.t WHERE id = 1", user="bob")


Operation = Callable[[AppContext], None]


@dataclass
class Moment:
    """What a crash may leave visible: the state before the operation, after it, or either."""

    before: Contents
    after: Contents
    seen: set[str] = field(default_factory=set)

    def accept(self, found: Contents, *, finished: bool, where: str) -> None:
        """Fail unless `found` is one of the two, and the later one when the operation was acknowledged."""
        if found == self.after:
            self.seen.add("after")
        else:
            assert found == self.before and not finished, f"{where}: {found}"
            self.seen.add("before")


def root_of(path: Path) -> Path:
    """Where the segments of a database on disk lie."""
    return path / "gen-1" / "segments"
