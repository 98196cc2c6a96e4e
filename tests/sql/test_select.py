"""SELECT: names of columns, system columns, scope of names, EXPLAIN, limits of what a query may do (3.5)."""

from __future__ import annotations

import datetime as dt
import uuid
from typing import Any

import pytest

import kalamdb
from kalamdb.database import Database
from tests.sql.conftest import flush, refused, rows


@pytest.fixture
def shop(db: Database) -> Database:
    """app.t with ids 1 to 3 (1 deleted and cold), app.w with one row; a user's app.u."""
    db.execute("CREATE TABLE app.t (id BIGINT PRIMARY KEY, v TEXT); CREATE TABLE app.w (id BIGINT PRIMARY KEY, x TEXT)")
    db.execute("CREATE USER TABLE app.u (id BIGINT PRIMARY KEY, v TEXT)")
    db.execute("INSERT INTO app.t VALUES (1, 'a'), (2, 'b')")
    flush(db, "app.t")
    db.execute("DELETE FROM app.t WHERE id = 1; INSERT INTO app.t VALUES (3, 'c'); INSERT INTO app.w VALUES (2, 'q')")
    return db


@pytest.mark.parametrize(
    ("query", "columns"),
    [
        ("SELECT 1, 1, '1'", ["1", "1:1", "'1'"]),
        ("SELECT COUNT(*), count(*), sum(id) AS s FROM app.t", ["count(*)", "count(*):1", "s"]),
        ("SELECT id, id, ID FROM app.t", ["id", "id:1", "id:2"]),
        ("SELECT $1, $2, ?", ["$1", "$2", "$1:1"]),
        ("SELECT CURRENT_USER, CURRENT_USER(), CURRENT_USER_ID(), CURRENT_ROLE()",
         ["current_user", "current_user()", "current_user_id()", "current_role()"]),
        ("SELECT Upper(v)  ||  'X', v FROM app.t", ["upper(v) || 'X'", "v"]),
        ("SELECT CASE WHEN id = 1 THEN 'x' END, v IS DISTINCT FROM 'a' FROM app.t",
         ["case when id = 1 then 'x' end", "v is distinct from 'a'"]),
        ("SELECT CAST(5 AS INT), CAST(5 AS TEXT), 5::double", ["cast(5 as int)", "cast(5 as text)", "5::double"]),
        ("SELECT t.* FROM app.t", ["id", "v"]),
        ("SELECT *, id + 1 FROM app.t", ["id", "v", "id + 1"]),
        ("SELECT t.id, w.*, x || x FROM app.t JOIN app.w ON t.id = w.id", ["id", "id", "x", "x || x"]),
        ("SELECT id + 1 FROM app.t UNION SELECT id FROM app.w ORDER BY 1", ["id + 1"]),
        ("WITH q AS (SELECT count(*) FROM app.t) SELECT * FROM q", ["count(*)"]),
        ("VALUES (1, 'a')", ["column1", "column2"]),
    ],
)  # fmt: skip
def test_columns_are_called_as_they_were_written(shop: Database, query: str, columns: list[str]) -> None:
    assert shop.execute(query, [7, 7] if "$" in query else None).columns == columns


SEQ_QUERIES: list[tuple[str, list[str], list[Any]]] = [
    ("SELECT * FROM app.t ORDER BY id", ["id", "v"], [(2, "b"), (3, "c")]),
    ("SELECT *, _seq > 0 AS s FROM app.t ORDER BY id", ["id", "v", "s"], [(2, "b", True), (3, "c", True)]),
    ("SELECT a.*, a._seq > 0 AS s FROM app.t AS a WHERE id = 3", ["id", "v", "s"], [(3, "c", True)]),
    ("SELECT * FROM app.t WHERE _seq > 0 AND id = 2", ["id", "v"], [(2, "b")]),
    ("SELECT id, _deleted FROM app.t WHERE id < 3", ["id", "_deleted"], [(2, False)]),
    ("SELECT *, w._seq > t._seq AS later FROM app.t JOIN app.w ON t.id = w.id", ["id", "v", "id", "x", "later"],
     [(2, "b", 2, "q", True)]),
    ("SELECT t.*, w.x FROM app.t LEFT JOIN app.w ON t.id = w.id ORDER BY t._seq", ["id", "v", "x"],
     [(2, "b", "q"), (3, "c", None)]),
    ("SELECT * FROM (SELECT id, _seq > 0 AS s FROM app.t) q ORDER BY id", ["id", "s"], [(2, True), (3, True)]),
    ("SELECT * FROM (SELECT * FROM app.t WHERE _seq > 0) q ORDER BY id", ["id", "v"], [(2, "b"), (3, "c")]),
    ("SELECT * FROM app.w, (SELECT count(_seq) AS n FROM app.t) q", ["id", "x", "n"], [(2, "q", 2)]),
    ("WITH c AS (SELECT *, _seq > 0 AS s FROM app.t) SELECT * FROM c WHERE id = 2", ["id", "v", "s"], [(2, "b", True)]),
    ("WITH C AS (SELECT id FROM app.w) SELECT * FROM C", ["id"], [(2,)]),
    ("SELECT id FROM app.t ORDER BY _seq DESC LIMIT 1", ["id"], [(3,)]),
    ("SELECT max(_seq) - min(_seq) > 0 AS s FROM app.t", ["s"], [(True,)]),
    ("SELECT '_seq' AS a, 1 AS \"_deleted\"", ["a", "_deleted"], [("_seq", 1)]),
]  # fmt: skip


@pytest.mark.parametrize(("query", "columns", "expected"), SEQ_QUERIES)
def test_system_columns_appear_only_where_they_are_named(
    shop: Database, query: str, columns: list[str], expected: list[Any]
) -> None:
    result = shop.execute(query)
    assert (result.columns, result.rows) == (columns, expected)


def test_seq_rises_with_each_change_and_is_the_same_in_every_tier(shop: Database) -> None:
    def seq(key: int) -> int:
        return int(rows(shop, f"SELECT _seq FROM app.t WHERE id = {key}")[0][0])

    assert seq(2) < seq(3)
    before = seq(3)
    flush(shop, "app.t")
    assert seq(3) == before
    shop.execute("UPDATE app.t SET v = 'new' WHERE id = 2")
    assert seq(2) > before
    assert rows(shop, "SELECT id FROM app.t WHERE _seq > $1", [before]) == [(2,)]
    sent = dt.datetime.fromtimestamp((seq(2) >> 22) / 1000 + 1_704_067_200, dt.UTC)
    assert abs(sent - rows(shop, "SELECT CAST(NOW() AS DATETIME)")[0][0]) < dt.timedelta(minutes=5)


def test_functions_give_fresh_ids_for_each_row(shop: Database) -> None:
    shop.execute("INSERT INTO app.u SELECT SNOWFLAKE_ID(), v FROM app.t")
    assert rows(shop, "SELECT count(DISTINCT id) FROM app.u") == [(2,)]
    found = rows(shop, "SELECT UUID_V7(), UUID_V7(), ULID(), SNOWFLAKE_ID() FROM app.t")
    assert len({value for row in found for value in row}) == 8
    assert all(isinstance(row[0], uuid.UUID) and row[0].version == 7 and len(row[2]) == 26 for row in found)


def test_the_caller_is_seen_by_the_query(shop: Database) -> None:
    shop.execute("INSERT INTO app.u VALUES (1, CURRENT_USER)", user="ann")
    found = rows(shop, "SELECT v, v = CURRENT_USER(), CURRENT_ROLE() FROM app.u", user="ann", role="service")
    assert found == [("ann", True, "service")]
    assert rows(shop, "SELECT v FROM app.u WHERE v = CURRENT_USER", user="bob") == []


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("SELECT nope FROM app.t", "nope"),
        ("SELECT * FROM app.nope", "Table 'app.nope' does not exist"),
        ("SELECT * FROM a.b.c", "three parts"),
        ("SELECT * FROM", ""),
        ("SELECT id FROM app.t WHERE", ""),
        ("SELECT id INTO app.x FROM app.t", ""),
        ("WITH d AS (DELETE FROM app.t WHERE true RETURNING id) SELECT * FROM d", "cannot hold INSERT"),
        ("COPY app.t TO 'x.csv'", "does not begin a statement"),
        ("SELECT CAST(v AS INT) FROM app.t", "Cannot cast string"),
        ("SELECT * FROM generate_series(1, 100000000)", "1000000 rows"),
        ("EXPLAIN DELETE FROM app.t WHERE true", "SELECT is expected"),
        ("SELECT 'open", "is not closed"),
        ("SELECT 1 /* open", "is not closed"),
        ("SELECT \x00 1", "NUL"),
        ("VACUUM", "does not begin a statement"),
        ("", "No SQL statements provided"),
        (" ; -- nothing\n;", "No SQL statements provided"),
        ("SET foo TO bar", "cannot be changed by SET"),
    ],
)
def test_a_query_that_cannot_run_says_why(shop: Database, query: str, message: str) -> None:
    assert message in refused(shop, query)


def test_several_statements_answer_one_by_one(shop: Database) -> None:
    result = shop.execute("SELECT ';' AS a; INSERT INTO app.w VALUES (9, 'x;y') ;; SELECT count(*) FROM app.w; -- end")
    assert [one.row_count for one in result.results] == [1, 1, 1]
    assert result.results[0].rows == [(";",)] and result.scalar() == 2
    message = refused(shop, "INSERT INTO app.w VALUES (10, 'x'); INSERT INTO app.nope VALUES (1); DROP TABLE app.w")
    assert message == "Statement 2 failed: Table 'app.nope' does not exist"
    assert rows(shop, "SELECT count(*) FROM app.w") == [(3,)]


def test_explain_tells_nothing_of_files_and_of_rows_of_others(shop: Database) -> None:
    for user in ("ann", "secret-user"):
        shop.insert("app.u", [{"id": n, "v": f"secret {n}"} for n in range(777)], user=user)
    flush(shop, "app.u")
    for verb in ("EXPLAIN", "EXPLAIN ANALYZE", "EXPLAIN VERBOSE"):
        result = shop.execute(f"{verb} SELECT v FROM app.u WHERE id > 3 ORDER BY v", user="ann")
        assert result.columns == ["plan_type", "plan"] and result.row_count > 0
        text = str(result.rows)
        for hidden in ("secret", "777", "1554", ".parquet", "/tmp", "rows=", "bytes=", "kalamdb-"):
            assert hidden not in text, f"{hidden} in {verb}: {text}"


def test_deadlines_end_a_query(shop: Database) -> None:
    with pytest.raises(kalamdb.Timeout):
        shop.execute("SELECT a.value FROM generate_series(1, 99999) a, generate_series(1, 99999) b", timeout_s=0.05)
