"""INSERT, UPDATE, DELETE, ON CONFLICT and RETURNING (surface reference 3.4, design section 5)."""

from __future__ import annotations

import threading

import pytest

import kalamdb
from kalamdb.database import Database
from tests.sql.conftest import compact, flush, refused, rows


@pytest.fixture(params=["USER", "SHARED"])
def table(request: pytest.FixtureRequest, db: Database) -> Database:
    """app.t with one cold row (1), one cold row changed since (2) and one hot row (3)."""
    db.execute(f"CREATE {request.param} TABLE app.t (id BIGINT PRIMARY KEY, v TEXT, n INT NOT NULL DEFAULT 5)")
    db.execute("INSERT INTO app.t (id, v) VALUES (1, 'a'), (2, 'old')")
    flush(db, "app.t")
    db.execute("UPDATE app.t SET v = 'b' WHERE id = 2")
    db.execute("INSERT INTO app.t VALUES (3, 'c', 7)")
    return db


START = [(1, "a", 5), (2, "b", 5), (3, "c", 7)]


def content(db: Database) -> list[tuple[object, ...]]:
    return rows(db, "SELECT * FROM app.t ORDER BY id")


# INSERT


@pytest.mark.parametrize(
    ("statement", "message", "added"),
    [
        ("INSERT INTO app.t VALUES (9, 'x', 1)", "Inserted 1 row(s)", [(9, "x", 1)]),
        ("INSERT INTO app.t (v, id) VALUES ('x', 9), ('y', 8)", "Inserted 2 row(s)", [(8, "y", 5), (9, "x", 5)]),
        ("INSERT INTO app.t (id, v, n) VALUES (9, NULL, DEFAULT)", "Inserted 1 row(s)", [(9, None, 5)]),
        ("INSERT INTO app.t (id, v) VALUES (4 + 5, upper('x') || 'y')", "Inserted 1 row(s)", [(9, "Xy", 5)]),
        ("INSERT INTO app.t (id, v) SELECT id + 8, v FROM app.t WHERE id < 2", "Inserted 1 row(s)", [(9, "a", 5)]),
        ("INSERT INTO app.t (id) WITH q AS (SELECT 9 AS x) SELECT x FROM q", "Inserted 1 row(s)", [(9, None, 5)]),
        ("INSERT INTO app.t (id, v) (SELECT 9, 'x')", "Inserted 1 row(s)", [(9, "x", 5)]),
        ("INSERT INTO app.t (id, v) SELECT id, v FROM app.t WHERE id > 99", "Inserted 0 row(s)", []),
    ],
)
def test_insert_adds_rows(table: Database, statement: str, message: str, added: list[tuple[object, ...]]) -> None:
    result = table.execute(statement)
    assert (result.message, result.row_count) == (message, len(added))
    assert content(table) == START + added


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("INSERT INTO app.t (id) VALUES (1)", "Primary key violation: value '1' already exists in column 'id'"),
        ("INSERT INTO app.t (id) VALUES (9), (3)", "Primary key violation: value '3' already exists in column 'id'"),
        ("INSERT INTO app.t (id) VALUES (9), (9)", "Primary key violation: value '9' already exists in column 'id'"),
        ("INSERT INTO app.t SELECT id, v, n FROM app.t", "Primary key violation"),
        ("INSERT INTO app.t (v) VALUES ('x')", "NOT NULL constraint violation: column 'id' cannot be NULL"),
        ("INSERT INTO app.t VALUES (9, 'x', NULL)", "NOT NULL constraint violation: column 'n' cannot be NULL"),
        ("INSERT INTO app.t DEFAULT VALUES", "NOT NULL constraint violation: column 'id' cannot be NULL"),
        ("INSERT INTO app.t VALUES (9, 'x')", "2 values for 3 columns"),
        ("INSERT INTO app.t (id) VALUES (9), (8, 'x')", "row 2 of VALUES has 2 values, the first has 1"),
        ("INSERT INTO app.t (id, v) SELECT 9", "gives 1 columns for 2 columns"),
        ("INSERT INTO app.t (id, id) VALUES (9, 9)", "names a column twice"),
        ("INSERT INTO app.t (id, nope) VALUES (9, 9)", "it has id, v, n"),
        ("INSERT INTO app.t (id, v, n) VALUES (9, 'x', 'many')", "column 'n': 'many' is not a valid INT value"),
        ("INSERT INTO app.t (id) VALUES (9), (10 / 0)", "Divide by zero"),
        ("INSERT INTO app.t (id) VALUES ((SELECT max(id) FROM app.t))", "sub-query"),
        ("INSERT INTO app.nope VALUES (1)", "Table 'app.nope' does not exist"),
        ("INSERT INTO system.jobs VALUES (1)", "Cannot insert system table 'system.jobs'"),
        ("INSERT INTO app.t", "VALUES or SELECT"),
    ],
)
def test_an_insert_that_is_refused_leaves_nothing(table: Database, statement: str, message: str) -> None:
    assert message in refused(table, statement)
    assert content(table) == START


def test_a_deleted_key_may_be_used_again(table: Database) -> None:
    table.execute("DELETE FROM app.t WHERE id < 3")
    table.execute("INSERT INTO app.t (id, v) VALUES (1, 'again')")
    flush(table, "app.t")
    table.execute("INSERT INTO app.t (id, v) VALUES (2, 'again')")
    compact(table, "app.t")
    assert content(table) == [(1, "again", 5), (2, "again", 5), (3, "c", 7)]


# UPDATE


@pytest.mark.parametrize(
    ("statement", "count", "after"),
    [
        ("UPDATE app.t SET v = 'z' WHERE id = 1", 1, [(1, "z", 5), *START[1:]]),
        ("UPDATE app.t SET v = 'b' WHERE id = 2", 0, START),
        ("UPDATE app.t SET v = v, n = n WHERE true", 0, START),
        ("UPDATE app.t SET v = 'b' WHERE id > 0", 2, [(1, "b", 5), (2, "b", 5), (3, "b", 7)]),
        ("UPDATE app.t SET n = n + 1 WHERE id = 3", 1, [*START[:2], (3, "c", 8)]),
        ("UPDATE app.t SET n = n - 1, v = NULL WHERE v = 'a'", 1, [(1, None, 4), *START[1:]]),
        ("UPDATE app.t SET n = DEFAULT WHERE id = 3", 1, [*START[:2], (3, "c", 5)]),
        ("UPDATE app.t SET n = DEFAULT, v = DEFAULT WHERE n > 5", 1, [*START[:2], (3, None, 5)]),
        ("UPDATE app.t AS x SET v = x.v || '!' WHERE x.id IN (1, 3)", 2, [(1, "a!", 5), START[1], (3, "c!", 7)]),
        ("UPDATE app.t x SET n = (SELECT max(n) FROM app.t) WHERE x.id = 1", 1, [(1, "a", 7), *START[1:]]),
        ("UPDATE app.t SET v = 'm' WHERE n = (SELECT max(n) FROM app.t)", 1, [*START[:2], (3, "m", 7)]),
        ("UPDATE app.t SET v = CASE WHEN n > 5 THEN 'big' ELSE v END WHERE true", 1, [*START[:2], (3, "big", 7)]),
        ("UPDATE app.t SET v = 'x' WHERE id = 99", 0, START),
        ("UPDATE app.t SET v = 'x' WHERE id = NULL", 0, START),
        ("UPDATE app.t SET v = 'x' WHERE _seq < 0", 0, START),
    ],
)
def test_update_changes_what_differs(
    table: Database, statement: str, count: int, after: list[tuple[object, ...]]
) -> None:
    result = table.execute(statement)
    assert (result.message, result.row_count) == (f"Updated {count} row(s)", count)
    assert content(table) == after
    flush(table, "app.t")
    assert content(table) == after


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE app.t SET v = 'x'", "needs a WHERE clause"),
        ("UPDATE app.t SET id = 9 WHERE id = 1", "part of the PRIMARY KEY"),
        ("UPDATE app.t SET nope = 9 WHERE id = 1", "has no column 'nope'"),
        ("UPDATE app.t SET v = 'x' WHERE nope = 1", "nope"),
        ("UPDATE app.t SET n = 'x' WHERE id = 1", "column 'n'"),
        ("UPDATE app.t SET n = 'x' WHERE id > 0", "column 'n'"),
        ("UPDATE app.t SET n = n + 2147483647 WHERE id = 1", "out of range for INT"),
        ("UPDATE app.t SET n = n * 2147483647 WHERE id > 0", ""),
        ("UPDATE app.t SET v = 'x', v = 'y' WHERE id = 1", "names a column twice"),
        ("UPDATE app.t SET v = 'x' FROM app.t AS o WHERE o.id = 1", "UPDATE ... FROM"),
        ("UPDATE system.jobs SET status = 'x' WHERE true", "Cannot update system table"),
    ],
)
def test_an_update_that_is_refused_leaves_everything(table: Database, statement: str, message: str) -> None:
    assert message in refused(table, statement)
    assert content(table) == START


# DELETE


@pytest.mark.parametrize(
    ("statement", "left"),
    [
        ("DELETE FROM app.t WHERE id = 1", START[1:]),
        ("DELETE FROM app.t WHERE v IN ('b', 'c')", START[:1]),
        ("DELETE FROM app.t AS x WHERE x.n > 5", START[:2]),
        ("DELETE FROM app.t WHERE id IN (SELECT id FROM app.t WHERE n > 5)", START[:2]),
        ("DELETE FROM app.t WHERE NOT _deleted AND _seq > 0", []),
        ("DELETE FROM app.t WHERE true", []),
        ("DELETE FROM app.t WHERE id = 99", START),
    ],
)
def test_delete_removes_what_matches(table: Database, statement: str, left: list[tuple[object, ...]]) -> None:
    result = table.execute(statement)
    assert result.message == f"Deleted {3 - len(left)} row(s)"
    assert content(table) == left
    for move in (flush, compact):
        move(table, "app.t")
        assert content(table) == left
    assert table.execute(statement).row_count == 0


def test_delete_needs_where_and_a_table_of_ours(table: Database) -> None:
    assert "needs a WHERE clause" in refused(table, "DELETE FROM app.t")
    assert "Cannot delete system table" in refused(table, "DELETE FROM system.jobs WHERE true")
    assert content(table) == START


def test_tombstones_show_only_when_where_names_deleted(table: Database) -> None:
    table.execute("DELETE FROM app.t WHERE id IN (1, 3)")
    for move in (None, flush):
        if move is not None:
            move(table, "app.t")
        assert rows(table, "SELECT id, _deleted FROM app.t ORDER BY id") == [(2, False)]
        assert rows(table, "SELECT id FROM app.t WHERE id > 0 ORDER BY _deleted, id") == [(2,)]
        assert rows(table, "SELECT id, _deleted FROM app.t WHERE _deleted ORDER BY id") == [(1, True), (3, True)]
        assert rows(table, "SELECT id FROM app.t WHERE id = 1 AND _deleted = true") == [(1,)]
        assert rows(table, "SELECT count(*) FROM app.t WHERE _deleted = false") == [(1,)]
        assert rows(table, "SELECT count(*) FROM app.t WHERE id IN (SELECT id FROM app.t WHERE _deleted)") == [(2,)]


# ON CONFLICT


@pytest.mark.parametrize(
    ("clause", "values", "count", "after"),
    [
        ("ON CONFLICT DO NOTHING", "(1, 'x', 1)", 0, START),
        ("ON CONFLICT (id) DO NOTHING", "(1, 'x', 1), (9, 'y', 1)", 1, [*START, (9, "y", 1)]),
        ("ON CONFLICT (id) DO UPDATE SET v = excluded.v", "(1, 'x', 1), (9, 'y', 1)", 2,
         [(1, "x", 5), *START[1:], (9, "y", 1)]),
        ("ON CONFLICT (id) DO UPDATE SET v = EXCLUDED.v, n = excluded.n", "(3, 'c', 7)", 0, START),
        ("ON CONFLICT (id) DO UPDATE SET n = t.n + excluded.n, v = 'sum'", "(1, '', 1), (2, '', 2)", 2,
         [(1, "sum", 6), (2, "sum", 7), START[2]]),
        ("ON CONFLICT (id) DO UPDATE SET v = 'w' WHERE t.n > excluded.n", "(1, '', 6), (3, '', 6)", 1,
         [*START[:2], (3, "w", 7)]),
        ("ON CONFLICT (id) DO UPDATE SET n = DEFAULT, v = NULL", "(3, '', 1)", 1, [*START[:2], (3, None, 5)]),
        ("ON CONFLICT (id) DO UPDATE SET v = upper(t.v) || upper(excluded.v)", "(1, 'q', 1), (9, 'q', 1)", 2,
         [(1, "AQ", 5), *START[1:], (9, "q", 1)]),
    ],
)  # fmt: skip
def test_on_conflict_decides_about_keys_that_exist(
    table: Database, clause: str, values: str, count: int, after: list[tuple[object, ...]]
) -> None:
    result = table.execute(f"INSERT INTO app.t VALUES {values} {clause}")
    assert (result.message, content(table)) == (f"Inserted {count} row(s)", after)


def test_on_conflict_sees_a_deleted_key_as_free(table: Database) -> None:
    table.execute("DELETE FROM app.t WHERE id = 1")
    table.execute("INSERT INTO app.t VALUES (1, 'new', 1) ON CONFLICT (id) DO UPDATE SET v = 'merged'")
    assert content(table) == [(1, "new", 1), *START[1:]]


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        ("(1, 'x', 1) ON CONFLICT (v) DO NOTHING", "must name the primary key (id)"),
        ("(1, 'x', 1) ON CONFLICT (id) DO UPDATE SET id = 9", "part of the PRIMARY KEY"),
        ("(1, 'x', 1) ON CONFLICT (id) DO UPDATE SET n = NULL", "NOT NULL constraint violation: column 'n'"),
        ("(1, 'x', 1) ON CONFLICT (id) DO UPDATE SET nope = 1", "has no column 'nope'"),
        ("(1, 'x', 1) ON CONFLICT (id) DO UPDATE SET n = 10 / 0", "Divide by zero"),
        ("(1, 'x', 1), (1, 'y', 1) ON CONFLICT (id) DO UPDATE SET v = 'x'", "twice"),
        ("(1, 'x', 1) ON CONFLICT (id) DO MERGE", "is expected"),
    ],
)
def test_on_conflict_that_is_refused_leaves_everything(table: Database, tail: str, message: str) -> None:
    assert message in refused(table, f"INSERT INTO app.t VALUES {tail}")
    assert content(table) == START


# RETURNING


@pytest.mark.parametrize(
    ("statement", "columns", "expected"),
    [
        ("INSERT INTO app.t (id) VALUES (9), (8) RETURNING *", ["id", "v", "n"], [(9, None, 5), (8, None, 5)]),
        ("INSERT INTO app.t (id) VALUES (9) RETURNING id AS key, n * 2", ["key", "n * 2"], [(9, 10)]),
        ("INSERT INTO app.t AS x (id) VALUES (1) ON CONFLICT (id) DO UPDATE SET n = x.n + 1 RETURNING x.n",
         ["n"], [(6,)]),
        ("INSERT INTO app.t (id) VALUES (1) ON CONFLICT DO NOTHING RETURNING id", ["id"], []),
        ("UPDATE app.t SET v = 'new' WHERE id = 1 RETURNING id, v", ["id", "v"], [(1, "new")]),
        ("UPDATE app.t AS x SET v = 'b' WHERE x.id > 1 RETURNING x.*, upper(x.v)",
         ["id", "v", "n", "upper(x.v)"], [(3, "b", 7, "B")]),
        ("DELETE FROM app.t WHERE id = 3 RETURNING *", ["id", "v", "n"], [(3, "c", 7)]),
        ("DELETE FROM app.t AS x WHERE x.id > 2 RETURNING x.v || '?' AS gone", ["gone"], [("c?",)]),
        ("DELETE FROM app.t WHERE id = 99 RETURNING id", ["id"], []),
    ],
)  # fmt: skip
def test_returning_gives_the_new_rows_or_the_deleted_ones(
    table: Database, statement: str, columns: list[str], expected: list[tuple[object, ...]]
) -> None:
    result = table.execute(statement)
    assert (result.columns, result.rows, result.row_count) == (columns, expected, len(expected))


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO app.t (id) VALUES (9)",
        "INSERT INTO app.t (id) VALUES (1) ON CONFLICT (id) DO UPDATE SET v = 'x'",
        "UPDATE app.t SET v = 'x' WHERE id = 1",
        "UPDATE app.t SET v = 'x' WHERE n > 0",
        "DELETE FROM app.t WHERE id = 1",
        "DELETE FROM app.t WHERE n > 0",
    ],
)
def test_a_returning_that_fails_undoes_its_statement(table: Database, statement: str) -> None:
    for returning, message in {
        "_seq": "RETURNING cannot name _seq",
        "nope": "nope",
        "(SELECT max(n) FROM app.t)": "sub-query",
        "10 / (n - n)": "Divide by zero",
        "id +": "",
    }.items():
        assert message in refused(table, f"{statement} RETURNING {returning}")
    assert content(table) == START


# Streams


def test_streams_append_read_and_delete_own_rows(db: Database) -> None:
    db.execute("CREATE STREAM TABLE app.s (x INT PRIMARY KEY, v TEXT) WITH (TTL_SECONDS = 3600)")
    db.execute("INSERT INTO app.s VALUES (1, 'a'), (1, 'b'), (2, 'c')", user="ann")
    db.execute("INSERT INTO app.s VALUES (1, 'bob')", user="bob")
    assert rows(db, "SELECT x, v, _deleted FROM app.s ORDER BY v", user="ann")[1] == (1, "b", False)
    assert db.execute("DELETE FROM app.s WHERE x = 1 RETURNING v", user="ann").rows == [("a",), ("b",)]
    assert db.execute("DELETE FROM app.s WHERE x = 1", user="ann").message == "Deleted 0 row(s)"
    assert rows(db, "SELECT v FROM app.s", user="ann") == [("c",)]
    assert rows(db, "SELECT v FROM app.s", user="bob") == [("bob",)]
    assert "not supported" in refused(db, "UPDATE app.s SET v = 'x' WHERE x = 1")
    assert "ON CONFLICT" in refused(db, "INSERT INTO app.s VALUES (1, 'x') ON CONFLICT DO NOTHING")


# Concurrency and size


def test_counters_by_upsert_lose_nothing(db: Database) -> None:
    db.execute("CREATE TABLE app.c (id INT PRIMARY KEY, n INT)")
    failures: list[BaseException] = []

    def count() -> None:
        try:
            for _ in range(20):
                db.execute("INSERT INTO app.c VALUES (1, 1) ON CONFLICT (id) DO UPDATE SET n = c.n + excluded.n")
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=count) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and rows(db, "SELECT n FROM app.c") == [(60,)]


def test_statements_above_the_batch_size_are_atomic_too() -> None:
    with kalamdb.connect(":memory:", limits_batch_rows_max=50, flush_scheduler_enabled=False) as db:
        db.execute("CREATE NAMESPACE app; CREATE USER TABLE app.t (id INT PRIMARY KEY, v TEXT)")
        db.execute("INSERT INTO app.t VALUES (5, 'hot')")
        many = "SELECT value AS id, 'm' AS v FROM generate_series(100, 399)"
        assert db.execute(f"INSERT INTO app.t {many}").row_count == 300
        assert "already exists" in refused(db, f"INSERT INTO app.t {many} UNION ALL SELECT 1, 'x'")
        upsert = (
            f"INSERT INTO app.t {many} UNION ALL SELECT 5, 'x' ON CONFLICT (id) DO UPDATE SET v = t.v || excluded.v"
        )
        assert db.execute(upsert).row_count == 301
        assert rows(db, "SELECT v, count(*) FROM app.t GROUP BY v ORDER BY v") == [("hotx", 1), ("mm", 300)]
        assert db.execute("UPDATE app.t SET v = 'u' WHERE id >= 200").row_count == 200
        assert db.execute("DELETE FROM app.t WHERE id >= 300 RETURNING id").row_count == 100
        assert rows(db, "SELECT v, count(*) FROM app.t GROUP BY v ORDER BY v") == [("hotx", 1), ("mm", 100), ("u", 100)]
        assert rows(db, "SELECT v FROM app.t WHERE id = 250") == [("u",)]
        assert db.check().ok
