"""BEGIN ... COMMIT and db.transaction() over several tables (surface reference 3.6)."""

from __future__ import annotations

import pytest

import kalamdb
from kalamdb.database import Database
from tests.sql.conftest import flush, refused, rows


@pytest.fixture
def bank(db: Database) -> Database:
    """A user's accounts (1 cold, 2 hot), a shared log, a stream."""
    db.execute("CREATE USER TABLE app.a (id INT PRIMARY KEY, n INT); CREATE TABLE app.log (id INT PRIMARY KEY, t TEXT)")
    db.execute("CREATE STREAM TABLE app.s (x INT) WITH (TTL_SECONDS = 60)")
    db.execute("INSERT INTO app.a VALUES (1, 10)")
    flush(db, "app.a")
    db.execute("INSERT INTO app.a VALUES (2, 20)")
    return db


def state(db: Database) -> tuple[list[tuple[object, ...]], list[tuple[object, ...]]]:
    return rows(db, "SELECT id, n FROM app.a ORDER BY id"), rows(db, "SELECT id, t FROM app.log ORDER BY id")


START = ([(1, 10), (2, 20)], [])


def test_a_batch_commits_all_tables_together(bank: Database) -> None:
    results = bank.execute(
        "BEGIN; UPDATE app.a SET n = n - 5 WHERE id = 1; UPDATE app.a SET n = n + 5 WHERE id = 2; "
        "INSERT INTO app.log VALUES (1, 'moved 5'); SELECT sum(n) FROM app.a; COMMIT"
    ).results
    assert [one.message for one in results[:4]] == [
        "Transaction started (1)", "Updated 1 row(s)", "Updated 1 row(s)", "Inserted 1 row(s)",
    ]  # fmt: skip
    assert results[4].scalar() == 30 and results[5].message == "Transaction committed (1)"
    assert state(bank) == ([(1, 5), (2, 25)], [(1, "moved 5")])


def test_rollback_forgets_and_several_blocks_may_follow(bank: Database) -> None:
    result = bank.execute(
        "START TRANSACTION; DELETE FROM app.a WHERE true; ROLLBACK; BEGIN TRANSACTION; "
        "INSERT INTO app.log VALUES (1, 'kept'); END; INSERT INTO app.log VALUES (2, 'alone')"
    )
    messages = [one.message for one in result.results]
    assert messages[2] == "Transaction rolled back (1)" and messages[5] == "Transaction committed (2)"
    assert state(bank) == (START[0], [(1, "kept"), (2, "alone")])


def test_every_kind_of_statement_sees_the_writes_before_it(bank: Database) -> None:
    with bank.transaction() as tx:
        tx.execute("INSERT INTO app.a VALUES (3, 30)")
        tx.execute("UPDATE app.a SET n = n * 2 WHERE id = 3")
        tx.execute("UPDATE app.a SET n = n + 1 WHERE n > 15")
        tx.execute("DELETE FROM app.a WHERE id = 1")
        tx.execute("INSERT INTO app.a VALUES (1, 1)")
        tx.execute("INSERT INTO app.a VALUES (1, 5), (9, 9) ON CONFLICT (id) DO UPDATE SET n = a.n + excluded.n")
        assert tx.insert("app.a", [{"id": 7, "n": 70}]) == 1
        assert tx.execute("SELECT id, n FROM app.a ORDER BY id").rows == [(1, 6), (2, 21), (3, 61), (7, 70), (9, 9)]
        assert tx.execute("SELECT n FROM app.a WHERE id = 7").rows == [(70,)]
        assert tx.execute("SELECT count(*) FROM app.a a JOIN app.a b ON a.id = b.id").scalar() == 5
        assert tx.execute("DELETE FROM app.a WHERE id = 9 RETURNING n").rows == [(9,)]
        tx.execute("INSERT INTO app.log SELECT id, 'n' FROM app.a")
        with pytest.raises(kalamdb.UniqueViolation):
            tx.execute("INSERT INTO app.a VALUES (7, 0)")
        assert state(bank) == START
    assert state(bank)[0] == [(1, 6), (2, 21), (3, 61), (7, 70)] and len(state(bank)[1]) == 4


def test_reads_stay_at_the_moment_of_the_beginning(bank: Database) -> None:
    with bank.transaction() as tx:
        bank.execute("UPDATE app.a SET n = 99 WHERE id = 1; DELETE FROM app.a WHERE id = 2")
        bank.execute("INSERT INTO app.log VALUES (1, 'x')")
        flush(bank, "app.a")
        assert tx.execute("SELECT id, n FROM app.a ORDER BY id").rows == START[0]
        assert tx.execute("SELECT n FROM app.a WHERE id = 2").rows == [(20,)]
        assert tx.execute("SELECT count(*) FROM app.log").scalar() == 0


@pytest.mark.parametrize(
    "other",
    [
        "UPDATE app.a SET n = 0 WHERE id = 1",
        "DELETE FROM app.a WHERE id = 1",
        "INSERT INTO app.a VALUES (5, 0)",
        "ALTER TABLE app.a ADD COLUMN z INT",
        "DROP TABLE app.a",
        "TRUNCATE TABLE app.a",
    ],
)
def test_the_first_committer_wins(bank: Database, other: str) -> None:
    with pytest.raises(kalamdb.TransactionConflict), bank.transaction() as tx:
        tx.execute("UPDATE app.a SET n = 1 WHERE id = 1; INSERT INTO app.a VALUES (5, 5)")
        tx.execute("INSERT INTO app.log VALUES (1, 'lost')")
        bank.execute(other)
    assert rows(bank, "SELECT * FROM app.log") == []


def test_changes_of_other_keys_and_flushes_do_not_conflict(bank: Database) -> None:
    with bank.transaction() as tx:
        tx.execute("UPDATE app.a SET n = 1 WHERE id = 1")
        bank.execute("UPDATE app.a SET n = 2 WHERE id = 2; INSERT INTO app.a VALUES (3, 3)")
        flush(bank, "app.a")
    assert state(bank)[0] == [(1, 1), (2, 2), (3, 3)]


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        ("CREATE TABLE app.x (id INT PRIMARY KEY)", "CREATE TABLE cannot stand inside a transaction"),
        ("ALTER TABLE app.a ADD COLUMN x INT", "ALTER TABLE cannot stand inside a transaction"),
        ("DROP TABLE app.a", "DROP TABLE cannot stand inside a transaction"),
        ("TRUNCATE TABLE app.a", "cannot stand inside a transaction"),
        ("CREATE NAMESPACE x", "cannot stand inside a transaction"),
        ("STORAGE FLUSH TABLE app.a", "cannot stand inside a transaction"),
        ("BEGIN", "a transaction is open already"),
        ("INSERT INTO app.s VALUES (1)", "stream tables are not supported inside explicit transactions"),
        ("DELETE FROM app.s WHERE x = 1", "stream tables are not supported inside explicit transactions"),
        ("INSERT INTO system.jobs VALUES (1)", "Cannot insert system table"),
        ("INSERT INTO app.a VALUES (1, 0)", "Primary key violation"),
        ("UPDATE app.a SET n = 'x' WHERE id = 1", "column 'n'"),
        ("SELECT * FROM app.nope", "does not exist"),
    ],
)
def test_a_failing_statement_rolls_everything_back(bank: Database, inside: str, message: str) -> None:
    text = f"BEGIN; INSERT INTO app.log VALUES (1, 'x'); {inside}; COMMIT"
    failure = refused(bank, text)
    assert failure.startswith("Statement 3 failed: ") and message in failure
    assert state(bank) == START
    bank.execute("BEGIN; INSERT INTO app.log VALUES (1, 'later'); COMMIT")


def test_a_text_that_ends_inside_a_transaction_is_rolled_back(bank: Database) -> None:
    message = refused(bank, "BEGIN; INSERT INTO app.log VALUES (1, 'x')")
    assert message == "Request completed with an open explicit transaction; rolled back automatically"
    for verb in ("COMMIT", "ROLLBACK"):
        assert refused(bank, verb) == f"{verb} without BEGIN"
    assert state(bank) == START


def test_an_exception_in_the_block_rolls_back_and_the_end_is_final(bank: Database) -> None:
    with pytest.raises(RuntimeError), bank.transaction() as tx:
        tx.execute("DELETE FROM app.a WHERE true")
        raise RuntimeError
    with pytest.raises(kalamdb.Closed):
        tx.execute("SELECT 1")
    with bank.transaction() as tx:
        tx.execute("DELETE FROM app.a WHERE true")
        tx.rollback()
    for verb in ("BEGIN", "COMMIT", "ROLLBACK"):
        with bank.transaction() as tx, pytest.raises(kalamdb.InvalidRequest, match="leave the block instead"):
            tx.execute(verb)
    assert state(bank) == START


def test_jobs_are_created_with_the_transaction_or_not_at_all(bank: Database) -> None:
    with pytest.raises(RuntimeError), bank.transaction() as tx:
        tx.create_job("flush", {"table_id": "app.a"})
        raise RuntimeError
    assert len(bank.jobs.list_jobs(job_type="flush")) == 1
    with bank.transaction() as tx:
        tx.execute("INSERT INTO app.a VALUES (3, 30)")
        tx.create_job("flush", {"table_id": "app.a"})
    job = bank.jobs.list_jobs(job_type="flush", descending=True)[0]
    assert bank.jobs.wait(job.id, 20).status == "completed"
    assert rows(bank, "SELECT n FROM app.a WHERE id = 3") == [(30,)]


def test_open_transactions_are_listed(bank: Database) -> None:
    with bank.transaction(user="ann") as tx:
        tx.execute("INSERT INTO app.a VALUES (1, 1), (2, 2); INSERT INTO app.log VALUES (1, 'x')")
        [found] = bank.execute("SELECT * FROM system.transactions").dicts()
        assert (found["owner_id"], found["origin"], found["state"]) == ("ann", "Api", "open")
        assert (found["write_count"], found["touched_tables_count"]) == (3, 2) and found["write_bytes"] > 0
    batch = bank.execute("BEGIN; INSERT INTO app.log VALUES (9, 'x'); SELECT origin FROM system.transactions; COMMIT")
    assert batch.results[2].rows == [("SqlBatch",)]
    assert rows(bank, "SELECT * FROM system.transactions") == []


def test_transactions_have_limits_of_size_and_time() -> None:
    limits = {"max_transaction_buffer_bytes": 20_000, "transaction_timeout_secs": 0.05}
    with kalamdb.connect(":memory:", **limits) as db:
        db.execute("CREATE NAMESPACE app; CREATE TABLE app.t (id INT PRIMARY KEY, v TEXT)")
        with db.transaction() as tx:
            with pytest.raises(kalamdb.LimitExceeded, match="max_transaction_buffer_bytes"):
                tx.insert("app.t", [{"id": n, "v": "x" * 100} for n in range(100)])
            tx.execute("INSERT INTO app.t VALUES (1, 'fits')")
        with pytest.raises(kalamdb.LimitExceeded, match="transaction_timeout_secs"), db.transaction() as tx:
            while True:
                tx.execute("SELECT v FROM app.t WHERE id = 1")
        assert rows(db, "SELECT * FROM app.t") == [(1, "fits")]


def test_a_transaction_above_the_batch_size_is_one_commit_over_all_its_tables() -> None:
    with kalamdb.connect(":memory:", limits_batch_rows_max=50, flush_scheduler_enabled=False) as db:
        db.execute("CREATE NAMESPACE app; CREATE TABLE app.a (id INT PRIMARY KEY, n INT)")
        db.execute("CREATE USER TABLE app.b (id INT PRIMARY KEY, n INT); INSERT INTO app.a VALUES (5, 0), (200, 0)")
        with db.transaction(user="ann") as tx:
            tx.execute("INSERT INTO app.b SELECT value, 1 FROM generate_series(1, 120)")
            tx.execute("UPDATE app.b SET n = 2 WHERE id <= 40")
            tx.execute("DELETE FROM app.b WHERE id > 110")
            tx.execute("UPDATE app.a SET n = 7 WHERE id = 5")
            assert tx.execute("SELECT sum(n) FROM app.b").scalar() == 150
            assert rows(db, "SELECT count(*) FROM app.b", user="ann") == [(0,)]
        assert rows(db, "SELECT sum(n), count(*) FROM app.b", user="ann") == [(150, 110)]
        assert rows(db, "SELECT id, n FROM app.a ORDER BY id") == [(5, 7), (200, 0)]
        with pytest.raises(kalamdb.TransactionConflict), db.transaction(user="ann") as tx:
            tx.execute("UPDATE app.b SET n = 0 WHERE true; UPDATE app.a SET n = 0 WHERE id = 5")
            db.execute("UPDATE app.b SET n = 99 WHERE id = 50", user="ann")
        assert rows(db, "SELECT sum(n) FROM app.b", user="ann") == [(248,)]
        assert rows(db, "SELECT n FROM app.a WHERE id = 5") == [(7,)] and db.check().ok
