"""Tables over both tiers, through the public calls."""

from __future__ import annotations

import datetime as dt
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pytest

import kalamdb
from tests.conftest import Open, run_job


def rows(db: kalamdb.Database, sql: str, user: str = "alice") -> list[tuple[object, ...]]:
    return db.execute(sql, user=user).rows


def make(db: kalamdb.Database, kind: str = "USER") -> None:
    db.execute("CREATE NAMESPACE app")
    db.execute(f"CREATE {kind} TABLE app.t (id BIGINT PRIMARY KEY, v TEXT)")


@pytest.mark.parametrize("kind", ["USER", "SHARED"])
def test_deleted_rows_stay_deleted_over_flush_reopen_and_compaction(open_db: Open, kind: str) -> None:
    db = open_db()
    make(db, kind)
    for number in range(10):
        db.execute("INSERT INTO app.t VALUES ($1, 'x')", [number], user="alice")
    run_job(db, "STORAGE FLUSH TABLE app.t")
    db.execute("DELETE FROM app.t WHERE id = 3", user="alice")
    db.execute("INSERT INTO app.t VALUES (100, 'new')", user="alice")
    run_job(db, "STORAGE FLUSH TABLE app.t")
    expected = [(number,) for number in (0, 1, 2, 4, 5, 6, 7, 8, 9, 100)]
    assert rows(db, "SELECT id FROM app.t ORDER BY id") == expected
    run_job(db, "STORAGE COMPACT TABLE app.t")
    assert rows(db, "SELECT id FROM app.t ORDER BY id") == expected
    assert rows(db, "SELECT id FROM app.t WHERE id = 3") == []
    assert db.check().ok


def test_updates_of_one_key_between_flushes_leave_one_row_with_the_last_value(open_db: Open) -> None:
    db = open_db()
    make(db)
    for number in range(4):
        db.execute(
            "INSERT INTO app.t VALUES (1, $1) ON CONFLICT (id) DO UPDATE SET v = excluded.v",
            [f"v{number}"],
            user="alice",
        )
        run_job(db, "STORAGE FLUSH TABLE app.t")
    assert rows(db, "SELECT * FROM app.t") == [(1, "v3")]
    run_job(db, "STORAGE COMPACT TABLE app.t")
    assert rows(db, "SELECT * FROM app.t") == [(1, "v3")]


def test_a_key_that_is_alive_in_the_cold_tier_is_refused(open_db: Open) -> None:
    db = open_db()
    make(db)
    db.execute("INSERT INTO app.t VALUES (1, 'cold')", user="alice")
    run_job(db, "STORAGE FLUSH TABLE app.t")
    with pytest.raises(kalamdb.UniqueViolation, match="value '1' already exists in column 'id'"):
        db.execute("INSERT INTO app.t VALUES (1, 'again')", user="alice")
    db.execute("DELETE FROM app.t WHERE id = 1", user="alice")
    db.execute("INSERT INTO app.t VALUES (1, 'again')", user="alice")
    assert rows(db, "SELECT v FROM app.t WHERE id = 1") == [("again",)]


def test_users_see_only_their_own_rows_in_every_tier(open_db: Open) -> None:
    db = open_db()
    make(db)
    for user in ("alice", "bob"):
        db.execute("INSERT INTO app.t VALUES (1, $1)", [f"secret of {user}"], user=user)
    for _ in range(2):
        assert rows(db, "SELECT v FROM app.t", "alice") == [("secret of alice",)]
        assert rows(db, "SELECT v FROM app.t", "bob") == [("secret of bob",)]
        assert rows(db, "SELECT count(*) FROM app.t", "carol") == [(0,)]
        with pytest.raises(kalamdb.InvalidRequest) as refused:
            db.execute("SELECT CAST(v AS INT) FROM app.t", user="alice")
        assert "bob" not in str(refused.value)
        if not db.execute("SELECT count(*) FROM system.manifest").scalar():
            break
        if db.context.store.has_pending(db.context.catalog.tables()[0].definition.uid):
            run_job(db, "STORAGE FLUSH TABLE app.t")


def test_a_statement_that_fails_changes_nothing(open_db: Open) -> None:
    db = open_db()
    make(db)
    db.execute("INSERT INTO app.t VALUES (1, 'a')", user="alice")
    for bad in (
        "INSERT INTO app.t VALUES (2, 'b'), (1, 'dup')",
        "INSERT INTO app.t VALUES (2, 'b'), ('x', 'c')",
        "INSERT INTO app.t VALUES (2, 'b'), (NULL, 'c')",
        "INSERT INTO app.t VALUES (99999999999999999999, 'c')",
        "INSERT INTO app.nope VALUES (1)",
        "UPDATE app.t SET v = CAST(1/0 AS TEXT) WHERE id = 1",
        "UPDATE app.t SET nope = 1 WHERE id = 1",
        "UPDATE app.t SET v = 'x'",
        "DELETE FROM app.t WHERE nope = 1",
        "SELECT * FROM",
        "garbage",
        "\x00",
    ):
        with pytest.raises(kalamdb.KalamDbError):
            db.execute(bad, user="alice")
    assert rows(db, "SELECT * FROM app.t") == [(1, "a")]


def test_every_type_comes_back_as_its_python_type_from_both_tiers(open_db: Open) -> None:
    db = open_db()
    db.execute("CREATE NAMESPACE app")
    db.execute(
        "CREATE SHARED TABLE app.t (id INT PRIMARY KEY, b BOOLEAN, s SMALLINT, f DOUBLE, d "
        "DECIMAL(10,2), x BYTES, j JSON, "
        "ts TIMESTAMP, dtm DATETIME, da DATE, ti TIME, u UUID, e EMBEDDING(2))"
    )
    key = uuid.uuid5(uuid.NAMESPACE_DNS, "kalamdb")
    row = (
        1, True, -3, 1.5, Decimal("12.30"), b"\x00\xff", {"a": [1, None]}, dt.datetime(2024, 2, 29, 1, 2, 3, 4),
        dt.datetime(2024, 2, 29, tzinfo=dt.UTC), dt.date(1969, 12, 31), dt.time(23, 59, 59, 999999), key, [0.5, -1.0],
    )  # fmt: skip
    names = ", ".join(f"${number}" for number in range(1, len(row) + 1))
    db.execute(f"INSERT INTO app.t VALUES ({names})", row)
    assert db.execute("SELECT * FROM app.t WHERE id = 1").rows == [row]
    assert db.execute("SELECT * FROM app.t").rows == [row]
    run_job(db, "STORAGE FLUSH TABLE app.t")
    assert db.execute("SELECT * FROM app.t WHERE id = 1").rows == [row]
    assert db.execute("SELECT * FROM app.t").rows == [row]


def test_alter_table_reads_old_rows_without_rewriting_them(open_db: Open) -> None:
    db = open_db()
    make(db)
    db.execute("INSERT INTO app.t VALUES (1, 'cold')", user="alice")
    run_job(db, "STORAGE FLUSH TABLE app.t")
    db.execute("INSERT INTO app.t VALUES (2, 'hot')", user="alice")
    db.execute("ALTER TABLE app.t ADD COLUMN n INT NOT NULL DEFAULT 7")
    db.execute("ALTER TABLE app.t RENAME COLUMN v TO name")
    assert rows(db, "SELECT id, name, n FROM app.t ORDER BY id") == [(1, "cold", 7), (2, "hot", 7)]
    db.execute("ALTER TABLE app.t DROP COLUMN name")
    db.execute("ALTER TABLE app.t ADD COLUMN name TEXT")
    assert rows(db, "SELECT id, n, name FROM app.t ORDER BY id") == [(1, 7, None), (2, 7, None)]
    run_job(db, "STORAGE FLUSH TABLE app.t")
    run_job(db, "STORAGE COMPACT TABLE app.t")
    assert rows(db, "SELECT id, n, name FROM app.t ORDER BY id") == [(1, 7, None), (2, 7, None)]


def test_a_recreated_table_holds_nothing_of_the_dropped_one(open_db: Open) -> None:
    db = open_db()
    make(db)
    db.execute("INSERT INTO app.t VALUES (1, 'old')", user="alice")
    run_job(db, "STORAGE FLUSH TABLE app.t")
    cleanup = (db.execute("DROP TABLE app.t").message or "").rsplit(" ", 1)[1]
    db.execute("CREATE USER TABLE app.t (id BIGINT PRIMARY KEY, v TEXT)")
    db.execute("INSERT INTO app.t VALUES (2, 'new')", user="alice")
    run_job(db, "STORAGE FLUSH TABLE app.t")
    assert db.jobs.wait(cleanup, 30).status == "completed"
    assert rows(db, "SELECT * FROM app.t") == [(2, "new")]
    assert len(list(db.context.store.root.rglob("*.parquet"))) == 1


def test_a_large_insert_becomes_one_segment_and_keeps_its_keys_unique(open_db: Open) -> None:
    db = open_db(**{"limits.batch_rows_max": 100})
    make(db, "SHARED")
    data = pa.table({"id": list(range(1000)), "v": ["x"] * 1000})
    assert db.insert("app.t", data) == 1000
    assert db.execute("SELECT count(*), max(_seq) - min(_seq) FROM app.t").rows == [(1000, 999)]
    with pytest.raises(kalamdb.UniqueViolation):
        db.insert("app.t", data)
    assert db.insert("app.t", pa.table({"id": list(range(900, 1200)), "v": ["y"] * 300}), on_conflict="ignore") == 200
    assert db.execute("SELECT v, count(*) FROM app.t GROUP BY v ORDER BY v").rows == [("x", 1000), ("y", 200)]
    assert db.execute("UPDATE app.t SET v = 'z' WHERE id < 500").row_count == 500
    assert db.execute("DELETE FROM app.t WHERE id >= 1000").row_count == 200
    run_job(db, "STORAGE COMPACT TABLE app.t")
    assert db.execute("SELECT v, count(*) FROM app.t GROUP BY v ORDER BY v").rows == [("x", 500), ("z", 500)]


def test_transactions_read_their_own_writes_and_lose_against_the_first_committer(open_db: Open) -> None:
    db = open_db()
    make(db)
    db.execute("INSERT INTO app.t VALUES (1, 'a')", user="alice")
    with db.transaction(user="alice") as tx:
        tx.execute("UPDATE app.t SET v = 'mine' WHERE id = 1")
        tx.execute("INSERT INTO app.t VALUES (2, 'b')")
        assert tx.execute("SELECT v FROM app.t ORDER BY id").rows == [("mine",), ("b",)]
        assert rows(db, "SELECT v FROM app.t") == [("a",)]
    assert rows(db, "SELECT v FROM app.t ORDER BY id") == [("mine",), ("b",)]
    with pytest.raises(kalamdb.TransactionConflict), db.transaction(user="alice") as tx:
        assert tx.execute("SELECT v FROM app.t WHERE id = 1").rows == [("mine",)]
        db.execute("UPDATE app.t SET v = 'theirs' WHERE id = 1", user="alice")
        assert tx.execute("SELECT v FROM app.t ORDER BY id").rows == [("mine",), ("b",)]
        tx.execute("UPDATE app.t SET v = 'late' WHERE id = 1")
    assert rows(db, "SELECT v FROM app.t WHERE id = 1") == [("theirs",)]


def test_an_update_of_a_cold_row_racing_with_flushes_is_never_lost(open_db: Open) -> None:
    db = open_db()
    make(db, "SHARED")
    db.execute("ALTER TABLE app.t ADD COLUMN n INT NOT NULL DEFAULT 0")
    db.execute("INSERT INTO app.t (id) VALUES (1)")
    errors: list[BaseException] = []

    def count() -> None:
        try:
            for _ in range(25):
                db.execute("UPDATE app.t SET n = n + 1 WHERE id = 1")
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=count) for _ in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if db.context.store.has_pending(db.context.catalog.tables()[0].definition.uid):
            job = db.jobs.create_job("flush", {"table_id": "app.t"}, on_conflict="return")
            db.jobs.wait(job.id, 30)
    assert not errors
    assert db.execute("SELECT n FROM app.t WHERE id = 1").scalar() == 75


def test_streams_keep_rows_for_their_time_to_live(open_db: Open) -> None:
    db = open_db()
    db.execute("CREATE NAMESPACE app")
    db.execute("CREATE STREAM TABLE app.s (x INT) WITH (TTL_SECONDS = 3600)")
    db.execute("INSERT INTO app.s VALUES (1), (1), (2)", user="alice")
    assert sorted(rows(db, "SELECT x FROM app.s")) == [(1,), (1,), (2,)]
    assert rows(db, "SELECT x FROM app.s", "bob") == []


def test_everything_acknowledged_is_there_after_reopening(tmp_path: Path) -> None:
    with kalamdb.connect(tmp_path / "data") as db:
        make(db)
        db.execute("INSERT INTO app.t VALUES (1, 'cold')", user="alice")
        run_job(db, "STORAGE FLUSH TABLE app.t")
        db.execute("INSERT INTO app.t VALUES (2, 'hot')", user="alice")
        db.execute("DELETE FROM app.t WHERE id = 1", user="alice")
    with kalamdb.connect(tmp_path / "data") as db:
        assert rows(db, "SELECT * FROM app.t") == [(2, "hot")]
        assert db.jobs.list_jobs()[0].status == "completed"
        assert db.check().ok
    log = (tmp_path / "data" / "logs" / "jobs.log").read_text()
    assert "INFO - Job completed: Flushed 1 row of 1 user into 1 segment" in log


def test_a_second_opener_learns_who_holds_the_directory(tmp_path: Path) -> None:
    with (
        kalamdb.connect(tmp_path / "data"),
        pytest.raises(kalamdb.DirectoryLocked, match="is held by this process") as refused,
    ):
        kalamdb.connect(tmp_path / "data")
    assert refused.value.pid is not None
    kalamdb.connect(tmp_path / "data").close()


def test_a_table_that_several_threads_make_if_it_is_not_there_is_made_once(open_db: Open) -> None:
    db = open_db()
    with ThreadPoolExecutor(8) as pool:
        for at in range(20):
            statement = f"CREATE SHARED TABLE IF NOT EXISTS t{at} (id INT PRIMARY KEY)"
            messages = [one.message for one in pool.map(lambda _, sql=statement: db.execute(sql), range(8))]
            assert messages.count(f"Table default.t{at} created successfully") == 1
