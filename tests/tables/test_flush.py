"""Flush and compaction: what is deleted stays deleted, what is updated stays updated, one file for all users."""

from __future__ import annotations

import resource
import threading
from pathlib import Path

import pyarrow as pa
import pytest

import kalamdb
from kalamdb.database import Database
from kalamdb.tables.compact import compact_table
from kalamdb.tables.flush import flush_table
from kalamdb.testing.maintenance import HeldWork
from kalamdb.types import TableId
from tests.conftest import Open, run_job


def held_flush(db: Database, table: str) -> HeldWork:
    store = db.context.store
    uid = store.catalog.require(TableId.parse(table)).definition.uid
    work = HeldWork(lambda job: flush_table(store, uid, job, str))
    assert work.waits
    return work


def held_compaction(db: Database, table: str) -> HeldWork:
    store = db.context.store
    uid = store.catalog.require(TableId.parse(table)).definition.uid
    work = HeldWork(lambda job: compact_table(store, uid, job, str))
    assert work.waits
    return work


def make(db: Database, kind: str, rows: int = 10) -> None:
    db.execute("CREATE NAMESPACE app")
    db.execute(f"CREATE {kind} TABLE app.t (id INT PRIMARY KEY, v INT)")
    if rows:
        db.insert("app.t", [{"id": key, "v": key} for key in range(rows)])


def contents(db: Database) -> dict[int, int]:
    rows = db.execute("SELECT id, v FROM app.t").rows
    assert len(rows) == len(dict(rows))
    for key in range(15):
        assert db.execute("SELECT id, v FROM app.t WHERE id = $1", [key]).rows == [r for r in rows if r[0] == key]
    return dict(rows)


@pytest.mark.parametrize("kind", ["USER", "SHARED"])
def test_a_delete_that_falls_into_a_running_flush_stays(open_db: Open, kind: str) -> None:
    db = open_db()
    make(db, kind)
    flush = held_flush(db, "app.t")
    db.execute("DELETE FROM app.t WHERE id = 3")
    db.execute("UPDATE app.t SET v = 70 WHERE id = 7")
    expected = {key: 70 if key == 7 else key for key in range(10) if key != 3}
    assert contents(db) == expected
    flush.end()
    assert contents(db) == expected
    while db.context.backend.remove_retired(2):
        pass
    assert contents(db) == expected
    run_job(db, "STORAGE FLUSH TABLE app.t")
    assert contents(db) == expected
    run_job(db, "STORAGE COMPACT TABLE app.t")
    assert contents(db) == expected
    assert db.check().ok


def test_writes_that_fall_into_a_running_compaction_stay(open_db: Open) -> None:
    db = open_db()
    make(db, "SHARED")
    run_job(db, "STORAGE FLUSH TABLE app.t")
    compaction = held_compaction(db, "app.t")
    db.execute("DELETE FROM app.t WHERE id = 3")
    db.execute("UPDATE app.t SET v = 70 WHERE id = 7")
    compaction.end()
    assert contents(db) == {key: 70 if key == 7 else key for key in range(10) if key != 3}


def test_a_large_update_over_hot_rows_survives_a_compaction_before_their_flush(open_db: Open) -> None:
    db = open_db(**{"limits.batch_rows_max": 5})
    make(db, "SHARED", rows=0)
    for key in range(10):
        db.execute("INSERT INTO app.t VALUES ($1, $1)", [key])
    assert db.execute("UPDATE app.t SET v = v + 100 WHERE id < 8").row_count == 8
    assert db.execute("DELETE FROM app.t WHERE id > 1 AND id < 9").row_count == 7
    expected = {0: 100, 1: 101, 9: 9}
    assert contents(db) == expected
    run_job(db, "STORAGE COMPACT TABLE app.t")
    assert contents(db) == expected
    run_job(db, "STORAGE FLUSH TABLE app.t")
    assert contents(db) == expected
    run_job(db, "STORAGE COMPACT TABLE app.t")
    assert contents(db) == expected
    db.execute("INSERT INTO app.t VALUES (5, 5)")
    assert contents(db) == {**expected, 5: 5}


def test_a_row_update_after_a_large_update_of_the_same_hot_row_is_not_lost(open_db: Open) -> None:
    db = open_db(**{"limits.batch_rows_max": 5})
    make(db, "SHARED", rows=0)
    for key in range(8):
        db.execute("INSERT INTO app.t VALUES ($1, $1)", [key])
    db.execute("UPDATE app.t SET v = v + 100 WHERE id < 8")
    db.execute("UPDATE app.t SET v = v + 1 WHERE id = 3")
    db.execute("UPDATE app.t SET v = v + 1 WHERE id = 3")
    assert contents(db)[3] == 105
    with pytest.raises(kalamdb.UniqueViolation):
        db.execute("INSERT INTO app.t VALUES (4, 0)")


def test_an_update_of_a_cold_row_that_races_with_a_flush_of_another_is_never_lost(open_db: Open) -> None:
    """One writer reads the cold row before a flush publishes the other's update of it."""
    db = open_db()
    make(db, "SHARED")
    run_job(db, "STORAGE FLUSH TABLE app.t")
    with db.transaction() as tx:
        assert tx.execute("SELECT v FROM app.t WHERE id = 5").scalar() == 5
        tx.execute("UPDATE app.t SET v = v + 1 WHERE id = 5")
        db.execute("UPDATE app.t SET v = 50 WHERE id = 5")
        run_job(db, "STORAGE FLUSH TABLE app.t")
        while db.context.backend.remove_retired():
            pass
        with pytest.raises(kalamdb.TransactionConflict):
            tx._inner.commit()
    assert contents(db)[5] == 50


def test_counters_in_cold_rows_lose_no_step_while_flushes_and_compactions_run(open_db: Open) -> None:
    db = open_db()
    make(db, "SHARED", rows=3)
    run_job(db, "STORAGE FLUSH TABLE app.t")

    def count(key: int) -> None:
        for _ in range(40):
            db.execute("UPDATE app.t SET v = v + 1 WHERE id = $1", [key])

    threads = [threading.Thread(target=count, args=(key,)) for key in (0, 0, 1)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        for sql in ("STORAGE FLUSH TABLE app.t", "STORAGE COMPACT TABLE app.t"):
            job_id = (db.execute(sql).message or "").rsplit(" ", 1)[1]
            if "-" in job_id:
                db.jobs.wait(job_id, timeout_s=30)
    assert contents(db) == {0: 80, 1: 41, 2: 2}


@pytest.mark.timeout(300)
def test_ten_thousand_users_flush_into_one_segment_in_bounded_memory(tmp_path: Path) -> None:
    users, rows_each, batch = 10_000, 100, 4_000
    quiet = {"flush.scheduler_enabled": False, "compaction.enabled": False, "hot.bytes_max": 4 << 30}
    with kalamdb.connect(tmp_path / "data", **quiet, **{"storage.durability": "os"}) as db:
        db.execute("CREATE NAMESPACE app")
        db.execute("CREATE USER TABLE app.t (id INT PRIMARY KEY, v INT)")
        names = [f"user-{number:05d}" for number in range(users)]
        for round_ in range(rows_each):
            for at in range(0, users, batch):
                owners = names[at : at + batch]
                data = pa.table({"owner": owners, "id": pa.array([round_] * len(owners), pa.int32())})
                assert db.insert("app.t", data, user_column="owner") == len(owners)
        before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        message = run_job(db, "STORAGE FLUSH TABLE app.t")
        grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb) / 1024
        print(f"{message}; memory grew by {grown_mb:.0f} MB")
        assert message.startswith("Flushed 1,000,000 rows of 10,000 users into 1 segment")
        assert [path.suffix for path in (tmp_path / "data").rglob("segments/**/*.*") if path.is_file()].count(
            ".parquet"
        ) == 1
        assert grown_mb < 150
        for user in (names[0], names[-1]):
            assert db.execute("SELECT count(*), max(id) FROM app.t", user=user).rows == [(rows_each, rows_each - 1)]
