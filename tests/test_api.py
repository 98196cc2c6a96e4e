"""The Python API: results, sessions, streams, and bulk insert in every form (design section 7)."""

from __future__ import annotations

import datetime as dt
import subprocess
import sys
import uuid
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pandas
import polars
import pyarrow as pa
import pytest

import kalamdb
from kalamdb.database import Database

KEY = uuid.UUID(int=7)


@pytest.fixture
def db() -> Iterator[Database]:
    with kalamdb.connect(":memory:", flush_scheduler_enabled=False, compaction_enabled=False) as database:
        database.execute(
            "CREATE NAMESPACE app; CREATE USER TABLE app.t (id INT PRIMARY KEY, v TEXT DEFAULT 'none', "
            "n DECIMAL(8, 2), j JSON, owner TEXT DEFAULT CURRENT_USER(), CHECK (n IS NULL OR n >= 0))"
        )
        yield database


def rows(db: Database, sql: str, user: str = "root") -> list[tuple[Any, ...]]:
    return db.execute(sql, user=user).rows


# Results


def test_a_result_is_read_in_every_form(db: Database) -> None:
    result = db.execute("SELECT 1 AS a, 'x' AS b UNION ALL SELECT 2, NULL ORDER BY a")
    assert list(result) == result.rows == [(1, "x"), (2, None)] and len(result) == result.row_count == 2
    assert result.columns == ["a", "b"] and result.message is None and result.results == [result]
    assert result.dicts() == [{"a": 1, "b": "x"}, {"a": 2, "b": None}] and result.scalar() == 1
    assert result.fetchone() == (1, "x") and result.fetchall() == [(2, None)] and result.fetchone() is None
    assert result.arrow().to_pydict() == {"a": [1, 2], "b": ["x", None]}
    assert result.to_polars().rows() == result.rows
    frame = result.to_pandas()
    assert list(frame.columns) == ["a", "b"] and frame["a"].tolist() == [1, 2] and "2 rows" in repr(result)


def test_a_result_without_rows_says_what_was_done(db: Database) -> None:
    result = db.execute("INSERT INTO app.t (id) VALUES (1), (2)")
    assert (result.row_count, result.message, result.rows, result.columns) == (2, "Inserted 2 row(s)", [], [])
    assert result.arrow().num_columns == 0 and list(result) == [] and result.fetchone() is None
    with pytest.raises(kalamdb.InvalidRequest, match="no columns"):
        result.scalar()
    empty = db.execute("SELECT id FROM app.t WHERE id > 9")
    assert empty.scalar() is None and empty.columns == ["id"] and empty.to_polars().shape == (0, 1)


def test_the_last_of_several_results_holds_all(db: Database) -> None:
    result = db.execute("SELECT 1; INSERT INTO app.t (id) VALUES (1); SELECT id FROM app.t")
    assert [one.row_count for one in result.results] == [1, 1, 1] and result is result.results[2]


def test_columns_of_one_name_stay_apart_in_polars(db: Database) -> None:
    db.execute("INSERT INTO app.t (id) VALUES (1)")
    result = db.execute("SELECT a.id, b.id FROM app.t a JOIN app.t b ON a.id = b.id")
    assert result.columns == ["id", "id"] and result.to_polars().columns == ["id", "id:1"]


# Inserting

ROWS = [
    {"id": 1, "v": "a", "n": Decimal("1.50"), "j": {"k": [1, None]}},
    {"id": 2, "v": None, "n": None, "j": None},
    {"id": 3, "v": "c", "n": Decimal("2.00"), "j": [1, 2]},
]
STORED = [(row["id"], row["v"], row["n"], row["j"], "root") for row in ROWS]
TEXTS = [
    {**row, "j": None if row["j"] is None else str(row["j"]).replace("'", '"').replace("None", "null")} for row in ROWS
]
FORMS: dict[str, Any] = {
    "dicts": ROWS,
    "tuples": [tuple(row.values()) for row in ROWS],
    "lists": [list(row.values()) for row in ROWS],
    "generator": lambda: (row for row in ROWS),
    "arrow": pa.Table.from_pylist(TEXTS),
    "record batch": pa.RecordBatch.from_pylist(TEXTS),
    "pandas": pandas.DataFrame(ROWS),
    "polars": polars.DataFrame(TEXTS),
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_every_form_are_inserted(db: Database, form: str) -> None:
    data = FORMS[form]() if callable(FORMS[form]) else FORMS[form]
    assert db.insert("app.t", data) == 3
    assert rows(db, "SELECT * FROM app.t ORDER BY id") == STORED


@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("tuples", "lists", "generator")])
@pytest.mark.parametrize("batch_rows_max", [2, 4096])
def test_user_column_says_whose_row_it_is(form: str, batch_rows_max: int) -> None:
    settings = {"limits.batch_rows_max": batch_rows_max, "flush.scheduler_enabled": False}
    with kalamdb.connect(":memory:", **settings) as db:
        db.execute(
            "CREATE NAMESPACE app; CREATE USER TABLE app.t (id INT PRIMARY KEY, who TEXT DEFAULT CURRENT_USER())"
        )
        owners, ids = ["ann", "bob", "ann", "eve"], [1, 1, 2, 9]
        data: Any = [{"owner": owner, "id": key} for owner, key in zip(owners, ids, strict=True)]
        table = pa.table({"owner": owners, "id": ids})
        match form:
            case "arrow":
                data = table
            case "record batch":
                data = table.to_batches()[0]
            case "pandas":
                data = table.to_pandas()
            case "polars":
                data = polars.from_arrow(table)
            case _:
                pass
        assert db.insert("app.t", data, user_column="owner") == 4
        assert rows(db, "SELECT * FROM app.t ORDER BY id", "ann") == [(1, "ann"), (2, "ann")]
        assert rows(db, "SELECT * FROM app.t", "bob") == [(1, "bob")] and rows(db, "SELECT * FROM app.t") == []
        with pytest.raises(kalamdb.UniqueViolation):
            db.insert("app.t", data, user_column="owner")
        assert db.insert("app.t", data, user_column="owner", on_conflict="ignore") == 0


def test_tuples_have_the_user_first_when_there_is_a_user_column(db: Database) -> None:
    assert db.insert("app.t", [("ann", 1, "x"), ("bob", 1, "y")], user_column="who") == 2
    assert rows(db, "SELECT id, v, owner FROM app.t", "bob") == [(1, "y", "bob")]


@pytest.mark.parametrize(
    ("on_conflict", "count", "stored"),
    [("ignore", 1, [(1, "old"), (2, "new")]), ("update", 2, [(1, "new"), (2, "new")])],
)
@pytest.mark.parametrize("cold", [False, True])
def test_on_conflict_decides_about_known_keys(
    db: Database, on_conflict: str, count: int, stored: list[tuple[int, str]], cold: bool
) -> None:
    db.insert("app.t", [{"id": 1, "v": "old"}])
    if cold:
        db.jobs.wait(db.jobs.create_job("flush", {"table_id": "app.t"}).id, 20)
    data = [{"id": 1, "v": "new"}, {"id": 2, "v": "new"}]
    with pytest.raises(kalamdb.UniqueViolation, match="value '1' already exists"):
        db.insert("app.t", data)
    assert db.insert("app.t", data, on_conflict=on_conflict) == count
    assert rows(db, "SELECT id, v FROM app.t ORDER BY id") == stored


def test_what_a_row_does_not_name_takes_its_default(db: Database) -> None:
    db.insert("app.t", [{"id": 1}, {"id": 2, "v": None}, {"id": 3, "v": "x"}], user="ann")
    assert rows(db, "SELECT id, v, owner FROM app.t ORDER BY id", "ann") == [
        (1, "none", "ann"), (2, None, "ann"), (3, "x", "ann"),
    ]  # fmt: skip
    db.execute("CREATE TABLE app.g (id BIGINT PRIMARY KEY DEFAULT SNOWFLAKE_ID(), u UUID DEFAULT UUID_V7(), x INT)")
    assert db.insert("app.g", pa.table({"x": list(range(200))})) == 200
    assert rows(db, "SELECT count(DISTINCT id), count(DISTINCT u) FROM app.g") == [(200, 200)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"id": 1, "nope": 2}], "has no column 'nope'; it has id, v, n, j, owner"),
        ([{"id": "x"}], "column 'id'"),
        ([{"id": 1, "n": "many"}], "column 'n'"),
        ([{"id": 1, "j": "{bad"}], "is not valid JSON"),
        ([{"id": 1}, {"id": 1}], "Primary key violation: value '1'"),
        ([{"v": "x"}], "column 'id' cannot be NULL"),
        ([{"id": 1, "n": -1}], "CHECK constraint"),
        ([(1, "a"), (2,)], "row 2 of the data has 1 values"),
        ([(1, 2, 3, 4, 5, 6)], "of 1 to 5"),
        ([{"id": 1}, (2,)], "row 2 of the data is a tuple"),
        ([1, 2], "row 1 of the data is a int"),
        ("text", "data of type str cannot be inserted"),
        (5, "data of type int cannot be inserted"),
        ({"id": 1}, "data of type dict cannot be inserted"),
        (pa.table({"id": [1, None]}), "column 'id' cannot be NULL"),
        (pa.table({"id": [2**40]}), "column 'id'"),
        (pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["id", "id"]), "column 'id' twice"),
        (pandas.DataFrame({"id": [1.5]}), "column 'id'"),
    ],
)
def test_data_that_does_not_fit_is_refused_as_a_whole(db: Database, data: Any, message: str) -> None:
    db.insert("app.t", [{"id": 50}])
    with pytest.raises(kalamdb.KalamDbError) as caught:
        db.insert("app.t", data)
    assert message in str(caught.value)
    assert rows(db, "SELECT id FROM app.t") == [(50,)]


def test_calls_that_make_no_sense_are_refused(db: Database) -> None:
    db.execute("CREATE TABLE app.s (id INT PRIMARY KEY)")
    one = [{"id": 1}]
    for call, message in (
        (lambda: db.insert("app.t", one, on_conflict="merge"), "error, ignore, update"),
        (lambda: db.insert("app.nope", one), "Table 'app.nope' does not exist"),
        (lambda: db.insert("a.b.c", one), "the end of the statement"),
        (lambda: db.insert("app.", one), "a table name"),
        (lambda: db.insert("system.jobs", one), "Cannot insert system table 'system.jobs'"),
        (lambda: db.insert("app.s", [{"id": 1, "u": "ann"}], user_column="u"), "no meaning for SHARED table"),
        (lambda: db.insert("app.t", one, user_column="u"), "no column 'u'"),
        (lambda: db.insert("app.t", one, user_column="v"), "is a column of 'app.t'"),
        (lambda: db.insert("app.t", [{"id": 1, "u": None}], user_column="u"), "is not a user name"),
        (lambda: db.insert("app.s", one, role="user"), "may not write"),
        (lambda: db.insert("app.t", [("bob", 1)], user="ann", user_column="u", role="user"), "rows of 'bob'"),
        (lambda: db.execute("SELECT 1", user="x" * 200), "characters"),
    ):
        with pytest.raises(kalamdb.KalamDbError) as caught:
            call()
        assert message in str(caught.value)
    assert db.insert("app.t", []) == 0 and db.insert("app.t", pa.table({"id": pa.array([], pa.int32())})) == 0


def test_names_are_read_as_in_sql(db: Database) -> None:
    db.execute('CREATE TABLE app."Big" (id INT PRIMARY KEY); CREATE TABLE plain (id INT PRIMARY KEY)')
    assert db.insert('APP."Big"', [(1,)]) == 1 and db.insert("PLAIN", [(1,)]) == 1
    assert db.insert("t", [(1,)], namespace="app") == 1


def test_values_keep_their_types_on_the_way_in(db: Database) -> None:
    db.execute(
        "CREATE TABLE app.v (id INT PRIMARY KEY, d DATE, ts TIMESTAMP, z DATETIME, u UUID, b BYTES, e EMBEDDING(2), "
        "big DECIMAL(38, 0), f DOUBLE)"
    )
    moment = dt.datetime(2024, 1, 2, 3, 4, 5, 6)
    row = (1, moment.date(), moment, moment.replace(tzinfo=dt.UTC), KEY, b"\x00", [0.5, 1.0], Decimal(10**30), 0.1)
    other = (2, None, None, None, None, None, None, None, None)
    assert db.insert("app.v", [row, other]) == 2
    assert rows(db, "SELECT * FROM app.v ORDER BY id") == [row, other]
    assert db.insert("app.v", [{"id": 3, "big": 10**30, "f": 1, "u": str(KEY), "d": "2024-01-02"}]) == 1
    assert rows(db, "SELECT big, f, u, d FROM app.v WHERE id = 3") == [(Decimal(10**30), 1.0, KEY, moment.date())]


# Sessions and streams


def test_a_session_binds_user_role_and_namespace(db: Database) -> None:
    ann = db.session(user="ann", role="user", namespace="app")
    assert ann.insert("t", [{"id": 1}]) == 1
    assert ann.execute("SELECT owner, CURRENT_USER, CURRENT_ROLE() FROM t").rows == [("ann", "ann", "user")]
    with ann.transaction() as tx:
        tx.execute("UPDATE t SET v = 'tx' WHERE id = 1")
        assert tx.insert("t", [{"id": 2}]) == 1
        with pytest.raises(kalamdb.Denied):
            tx.execute("SELECT * FROM system.jobs")
    with ann.stream("SELECT v FROM t WHERE id = $1", [1]) as batches:
        assert [batch.to_pydict() for batch in batches] == [{"v": ["tx"]}]
    with pytest.raises(kalamdb.Denied):
        ann.execute("SHOW ALL")
    assert rows(db, "SELECT * FROM app.t") == []


def test_a_stream_is_not_bound_by_the_size_of_results() -> None:
    with kalamdb.connect(":memory:", limits_result_bytes_max=1 << 16) as db:
        query = "SELECT value, 'text of row ' || value AS t FROM generate_series(1, 50000)"
        with pytest.raises(kalamdb.LimitExceeded, match="db.stream"):
            db.execute(query)
        with db.stream(query) as batches:
            assert sum(batch.num_rows for batch in batches) == 50_000
        with db.stream(query) as batches:
            assert next(batches).num_rows > 0
        for bad in ("DELETE FROM x WHERE true", "SELECT 1; SELECT 2", "EXPLAIN ANALYZE SELECT 1"):
            with pytest.raises(kalamdb.InvalidRequest, match="only one SELECT"), db.stream(bad):
                pass
        assert db.execute("SELECT 1").scalar() == 1


def test_a_closed_database_refuses_every_call(db: Database) -> None:
    session = db.session(user="ann")
    db.close()
    db.close()
    for call in (
        lambda: db.execute("SELECT 1"),
        lambda: db.insert("app.t", [(1,)]),
        lambda: session.execute("SELECT 1"),
        lambda: db.check(),
        lambda: db.jobs,
        lambda: db.transaction().__enter__(),
        lambda: db.stream("SELECT 1").__enter__(),
    ):
        with pytest.raises(kalamdb.Closed):
            call()


def test_importing_the_package_does_not_import_the_engines() -> None:

    code = (
        "import kalamdb, sys; print([m for m in ('pyarrow', 'datafusion', 'sqlglot', 'asyncio') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
