"""Retention, stream eviction, erasure: what time or a request removes is gone, and nothing older comes back."""

from __future__ import annotations

from pathlib import Path

import pytest

import kalamdb
from kalamdb.app_context import AppContext
from kalamdb.clock import SystemClock
from kalamdb.config import Settings
from kalamdb.database import Database
from kalamdb.storage import Batch
from kalamdb.storage.jobs import JobFence, JobStatus
from kalamdb.tables.erase import erase_rows
from kalamdb.tables.flush import flush_table
from kalamdb.testing.counting import fill_jobs
from kalamdb.testing.jobs import drain, open_manual
from kalamdb.testing.maintenance import HeldWork, Unwatched
from kalamdb.types import JobId, Scope, TableId
from kalamdb.users import AuditRow, audit_op
from tests.conftest import run_job

HOUR_MS = 3_600_000


class SteppedClock(SystemClock):
    """The machine's clock, moved by steps."""

    offset_ms = 0

    def now_ms(self) -> int:
        return super().now_ms() + self.offset_ms


@pytest.fixture
def clock() -> SteppedClock:
    return SteppedClock()


@pytest.fixture
def db(tmp_path: Path, clock: SteppedClock):
    quiet = {"flush.scheduler_enabled": False, "compaction.enabled": False}
    with Database(AppContext(tmp_path / "data", Settings.load(quiet, environment={}), clock=clock)) as opened:
        opened.execute("CREATE NAMESPACE app")
        yield opened


def stored_bytes(folder: Path) -> bytes:
    """Everything that the directory holds."""
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def run(db: Database, job_type: str, **params: object) -> str:
    job = db.jobs.wait(db.jobs.create_job(job_type, params).id, timeout_s=30)
    assert job.status == "completed", job.exception_trace
    return str(job.message)


def test_deleted_rows_leave_after_their_retention_and_never_come_back(db: Database, clock: SteppedClock) -> None:
    db.execute("CREATE TABLE app.t (id INT PRIMARY KEY, v TEXT) WITH (DELETED_RETENTION_HOURS = 24)")
    db.insert("app.t", [{"id": key, "v": f"row {key}"} for key in range(10)])
    run_job(db, "STORAGE FLUSH TABLE app.t")
    db.execute("DELETE FROM app.t WHERE id < 4")
    clock.offset_ms = 23 * HOUR_MS
    assert run(db, "retention", table_id="app.t").startswith("Removed 0 deleted rows")
    deleted = "SELECT count(*) FROM app.t WHERE _deleted"
    assert db.execute(deleted).scalar() == 4
    clock.offset_ms = 25 * HOUR_MS
    assert run(db, "retention").startswith("Removed 4 deleted rows of 1 table for good")
    assert db.execute(deleted).scalar() == 0
    assert db.execute("SELECT count(*), min(id) FROM app.t").rows == [(6, 4)]
    assert db.check().ok


def test_retention_of_all_removes_jobs_and_audit_rows_past_their_age_and_of_one_table_does_not(
    db: Database, clock: SteppedClock
) -> None:
    db.execute("CREATE TABLE app.t (id INT PRIMARY KEY)")
    done, bad = db.jobs.executor("done", prefix="DO"), db.jobs.executor("bad", prefix="BA", max_retries=0)
    done(lambda ctx: None)
    bad(lambda ctx: 1 / 0)
    for job in db.jobs.create_jobs([{"job_type": kind} for kind in ("done", "bad")]):
        db.jobs.wait(job.id, 30)
    db.execute("CREATE USER ann")
    db.execute("CREATE USER bob")
    audited = "SELECT target FROM system.audit_log ORDER BY target"
    clock.offset_ms = 8 * 24 * HOUR_MS
    assert run(db, "retention", table_id="app.t") == "Removed 0 deleted rows of 0 tables for good, 0 B freed"
    assert db.execute(audited).rows == [("ann",), ("bob",)]
    assert run(db, "retention").endswith("; 1 ended job and 0 audit rows")
    assert [job.job_type for job in db.jobs.list_jobs()] == ["bad", "retention", "retention"]
    clock.offset_ms = 364 * 24 * HOUR_MS
    db.execute("CREATE USER eve")
    clock.offset_ms = 366 * 24 * HOUR_MS
    assert run(db, "retention").endswith("; 3 ended jobs and 2 audit rows")
    assert db.execute(audited).rows == [("eve",)]
    [left] = db.jobs.list_jobs()
    assert left.result == {"rows": 0, "tables": 0, "bytes": 0, "jobs": 3, "audit_rows": 2}
    assert db.check().ok


def test_retention_removes_a_long_history_in_bounded_steps_under_its_lease() -> None:
    with open_manual(jobs_history_rows_max=40) as db:
        backend = db.context.backend
        fill_jobs(backend, JobStatus.COMPLETED, 1500)
        fill_jobs(backend, JobStatus.FAILED, 700, first=1500)
        rows = [
            AuditRow(audit_id=f"{at:05d}", timestamp=at, actor_user_id="root", action="A", target="x")
            for at in range(1500)
        ]
        backend.commit(Batch(records=[audit_op(row) for row in rows]))
        removals: list[Batch] = []
        backend.observe(lambda batch, _: removals.append(batch) if batch.records else None)
        job_id = db.jobs.create_job("retention").id
        drain(db)
        job = db.jobs.get_job(job_id)
        assert job.message == (
            "Removed 0 deleted rows of 0 tables for good, 0 B freed; 2,120 ended jobs and 1,500 audit rows"
        )
        assert [len(batch.records) for batch in removals] == [1000, 500]
        assert all(batch.jobs == [JobFence(JobId(job_id), 1)] for batch in removals)
        assert (job.progress.done, job.progress.text) == (0, "1,500 audit rows removed")


def test_retention_off_keeps_deletions_for_ever(db: Database, clock: SteppedClock) -> None:
    db.execute("CREATE TABLE app.t (id INT PRIMARY KEY) WITH (DELETED_RETENTION_HOURS = 'off')")
    db.execute("INSERT INTO app.t VALUES (1), (2)")
    db.execute("DELETE FROM app.t WHERE id = 1")
    clock.offset_ms = 10_000 * HOUR_MS
    assert run(db, "retention").startswith("Removed 0 deleted rows")
    assert db.execute("SELECT id FROM app.t WHERE _deleted").rows == [(1,)]


def test_an_expired_bucket_of_a_stream_goes_whatever_it_holds(db: Database, clock: SteppedClock) -> None:
    db.execute("CREATE STREAM TABLE app.s (id INT, v TEXT) WITH (TTL_SECONDS = 60)")
    for key in range(30):
        db.execute("INSERT INTO app.s VALUES ($1, 'old-row')", [key])
    clock.offset_ms = 40_000
    db.execute("INSERT INTO app.s VALUES (100, 'young')")
    uid = db.context.catalog.require(TableId.parse("app.s")).definition.uid
    assert run(db, "stream_eviction").startswith("Evicted 0 expired buckets")
    clock.offset_ms = 70_000
    assert run(db, "stream_eviction", table_id="app.s").startswith("Evicted")
    with db.context.backend.snapshot() as snapshot:
        assert [row.payload for chunk in snapshot.stream(uid) for row in chunk] != []
        assert sum(len(chunk) for chunk in snapshot.stream(uid)) == 1
    assert db.execute("SELECT id FROM app.s").rows == [(100,)]


def test_an_erased_user_leaves_no_byte_behind(db: Database, tmp_path: Path) -> None:
    marker = "MARK-7d1f"
    db.execute("CREATE USER TABLE app.u (id INT PRIMARY KEY, v TEXT)")
    db.execute("CREATE STREAM TABLE app.s (v TEXT) WITH (TTL_SECONDS = 3600)")
    for user, text in (("gone", marker), ("kept", "other")):
        db.insert("app.u", [{"id": key, "v": f"{text} {key}"} for key in range(50)], user=user)
    run_job(db, "STORAGE FLUSH TABLE app.u")
    for user, text in (("gone", marker), ("kept", "other")):
        db.execute("UPDATE app.u SET v = $1 WHERE id < 5", [f"{text} updated"], user=user)
        db.execute("INSERT INTO app.s VALUES ($1)", [text], user=user)
    folder = tmp_path / "data"
    assert marker.encode() in stored_bytes(folder)
    report = erase_rows(db.context.store, Scope("gone"), Unwatched())
    assert report.tables == 1 and report.rows >= 50
    assert db.execute("SELECT count(*) FROM app.u", user="gone").scalar() == 0
    assert db.execute("SELECT count(*) FROM app.s", user="gone").scalar() == 0
    assert db.execute("SELECT count(*) FROM app.u WHERE v LIKE 'other%'", user="kept").scalar() == 50
    assert db.execute("SELECT count(*) FROM app.s", user="kept").scalar() == 1
    assert marker.encode() not in stored_bytes(folder)
    assert db.check().ok


def test_a_flush_that_read_an_erased_user_does_not_publish_the_rows(db: Database) -> None:
    db.execute("CREATE USER TABLE app.u (id INT PRIMARY KEY)")
    db.execute("INSERT INTO app.u VALUES (1)", user="gone")
    db.execute("INSERT INTO app.u VALUES (1)", user="kept")
    store = db.context.store
    uid = db.context.catalog.require(TableId.parse("app.u")).definition.uid
    flush = HeldWork(lambda job: flush_table(store, uid, job, str))
    erase_rows(store, Scope("gone"), Unwatched())
    with pytest.raises(kalamdb.TransactionConflict, match="were erased during the flush"):
        flush.end()
    flush_table(store, uid, Unwatched())
    assert db.execute("SELECT count(*) FROM app.u", user="gone").scalar() == 0
    assert db.execute("SELECT count(*) FROM app.u", user="kept").scalar() == 1


def test_nobody_writes_rows_of_a_user_who_is_being_erased(db: Database) -> None:
    db.execute("CREATE USER TABLE app.u (id INT PRIMARY KEY)")
    with db.transaction(user="gone") as tx:
        tx.execute("INSERT INTO app.u VALUES (1)")
        erase_rows(db.context.store, Scope("gone"), Unwatched())
        with pytest.raises(kalamdb.TransactionConflict, match="user 'gone' is being erased"):
            tx._inner.commit()
    with pytest.raises(kalamdb.TransactionConflict, match="user 'gone' is being erased"):
        db.execute("INSERT INTO app.u VALUES (1)", user="gone")


def test_a_table_whose_only_hot_rows_were_erased_has_nothing_pending(db: Database) -> None:
    db.execute("CREATE USER TABLE app.u (id INT PRIMARY KEY)")
    db.execute("INSERT INTO app.u VALUES (1)", user="gone")
    erase_rows(db.context.store, Scope("gone"), Unwatched())
    uid = db.context.catalog.require(TableId.parse("app.u")).definition.uid
    assert flush_table(db.context.store, uid, Unwatched()) is None
    assert not db.context.store.has_pending(uid)
