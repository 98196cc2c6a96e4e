"""Every SQL name of every type, its values, its limits, and every DEFAULT function (surface reference 3.11)."""

from __future__ import annotations

import datetime as dt
import uuid
from decimal import Decimal
from typing import Any

import pytest

from kalamdb.database import Database
from tests.sql.conftest import flush, refused, rows

SPELLINGS = {
    "BOOLEAN": "BOOL, BOOLEAN",
    "SMALLINT": "SMALLINT, INT2",
    "INT": "INT, INTEGER, INT4, MEDIUMINT, SIGNED",
    "BIGINT": "BIGINT, INT8, INT64, SERIAL, SERIAL2, SERIAL4, SERIAL8, SMALLSERIAL, BIGSERIAL",
    "FLOAT": "FLOAT, FLOAT(24), REAL, FLOAT4",
    "DOUBLE": "DOUBLE, DOUBLE PRECISION, FLOAT8, FLOAT64",
    "DECIMAL(38,10)": "DECIMAL, NUMERIC, DEC",
    "TEXT": "TEXT, TINYTEXT, MEDIUMTEXT, LONGTEXT, CHAR, CHAR(3), CHARACTER VARYING, CHARACTER VARYING(9), VARCHAR, "
    "VARCHAR(20), NVARCHAR, NVARCHAR(5), CLOB, STRING",
    "BYTES": "BYTES, BINARY, BINARY(3), VARBINARY, VARBINARY(3), BLOB, BYTEA",
    "JSON": "JSON, JSONB",
    "TIMESTAMP": "TIMESTAMP, TIMESTAMP(3), TIMESTAMP WITH TIME ZONE, TIMESTAMP WITHOUT TIME ZONE",
    "DATETIME": "DATETIME",
    "DATE": "DATE",
    "TIME": "TIME",
    "UUID": "UUID",
    "FILE": "FILE",
}


@pytest.mark.parametrize("kind", SPELLINGS)
def test_every_spelling_means_its_type(db: Database, kind: str) -> None:
    spellings = [one.strip() for one in SPELLINGS[kind].split(", ")]
    columns = ", ".join(f"c{at} {spelling}" for at, spelling in enumerate(spellings))
    db.execute(f"CREATE TABLE app.t (id INT PRIMARY KEY, {columns})")
    assert {row[3] for row in rows(db, "DESCRIBE TABLE app.t") if row[0] != "id"} == {kind}


@pytest.mark.parametrize(
    ("spelling", "shown"),
    [("DECIMAL(9)", "DECIMAL(9,0)"), ("NUMERIC(9, 3)", "DECIMAL(9,3)"), ("DECIMAL(38,38)", "DECIMAL(38,38)"),
     ("EMBEDDING(1)", "EMBEDDING(1)"), ("EMBEDDING(8192)", "EMBEDDING(8192)")],
)  # fmt: skip
def test_types_with_sizes_keep_them(db: Database, spelling: str, shown: str) -> None:
    db.execute(f"CREATE TABLE app.t (id INT PRIMARY KEY, v {spelling})")
    assert rows(db, "DESCRIBE TABLE app.t")[1][3] == shown


@pytest.mark.parametrize(
    "spelling",
    ["DECIMAL(39)", "DECIMAL(0)", "DECIMAL(5, 6)", "DECIMAL(1, 2, 3)", "EMBEDDING", "EMBEDDING(0)", "EMBEDDING(8193)",
     "EMBEDDING(1, 2)", "INT[]", "INTERVAL", "VARCHAR(x)", "TIMESTAMP(9999999999)"],
)  # fmt: skip
def test_sizes_that_do_not_exist_are_refused(db: Database, spelling: str) -> None:
    refused(db, f"CREATE TABLE app.t (id INT PRIMARY KEY, v {spelling})")
    assert rows(db, "SHOW TABLES IN app") == []


UTC = dt.UTC
MOMENT = dt.datetime(2024, 2, 29, 1, 2, 3, 4)
VALUES: list[tuple[str, str | None, Any, Any]] = [
    # type, SQL literal, parameter, value read
    ("BOOLEAN", "TRUE", True, True),
    ("BOOLEAN", "'no'", "no", False),
    ("SMALLINT", "-32768", -32768, -32768),
    ("INT", "2147483647", 2147483647, 2147483647),
    ("BIGINT", "-9223372036854775808", -(2**63), -(2**63)),
    ("BIGINT", "5.0", Decimal("5.0"), 5),
    ("FLOAT", "0.1", 0.1, 0.10000000149011612),
    ("DOUBLE", "1e300", 1e300, 1e300),
    ("DOUBLE", "'-0.5'", "-0.5", -0.5),
    ("DECIMAL(10,2)", "12.345", Decimal("12.345"), Decimal("12.35")),
    ("DECIMAL(10,2)", "-7", -7, Decimal("-7.00")),
    ("DECIMAL(38,0)", "9" * 38, Decimal("9" * 38), Decimal("9" * 38)),
    ("TEXT", "'it''s \u00e9\U0001f600'", "it's \u00e9\U0001f600", "it's \u00e9\U0001f600"),
    ("TEXT", "''", "", ""),
    ("VARCHAR(3)", "'longer than three'", "longer than three", "longer than three"),
    ("BYTES", "X'00ff'", b"\x00\xff", b"\x00\xff"),
    ("JSON", "'{\"a\": [1, null]}'", {"a": [1, None]}, {"a": [1, None]}),
    ("JSON", "'null'", "null", None),
    ("TIMESTAMP", "'2024-02-29 01:02:03.000004'", MOMENT, MOMENT),
    ("TIMESTAMP", "TIMESTAMP '1600-01-01 00:00:00'", dt.datetime(1600, 1, 1), dt.datetime(1600, 1, 1)),
    ("DATETIME", "'2024-02-29T03:02:03.000004+02:00'", MOMENT.replace(tzinfo=UTC), MOMENT.replace(tzinfo=UTC)),
    ("DATE", "DATE '1969-12-31'", dt.date(1969, 12, 31), dt.date(1969, 12, 31)),
    ("DATE", "'0001-01-01'", dt.date(1, 1, 1), dt.date(1, 1, 1)),
    ("TIME", "'23:59:59.999999'", dt.time(23, 59, 59, 999999), dt.time(23, 59, 59, 999999)),
    ("UUID", f"'{uuid.UUID(int=77)}'", uuid.UUID(int=77), uuid.UUID(int=77)),
    ("EMBEDDING(3)", "'[0.5, -1, 2]'", [0.5, -1.0, 2.0], [0.5, -1.0, 2.0]),
    ("FILE", "'{\"id\": \"f\"}'", {"id": "f"}, {"id": "f"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "literal", "parameter", "value"), VALUES)
def test_a_value_comes_back_however_it_was_written(
    db: Database, kind: str, literal: str, parameter: Any, value: Any
) -> None:
    db.execute(f"CREATE TABLE app.t (id INT PRIMARY KEY, v {kind})")
    db.execute(f"INSERT INTO app.t VALUES (1, {literal})")
    db.execute("INSERT INTO app.t VALUES (2, $1)", [parameter])
    db.insert("app.t", [{"id": 3, "v": parameter}])
    db.execute(f"INSERT INTO app.t (id) VALUES (4); UPDATE app.t SET v = {literal} WHERE id > 3")
    for move in (None, flush):
        if move is not None:
            move(db, "app.t")
        found = rows(db, "SELECT v FROM app.t ORDER BY id")
        assert found == [(value,)] * 4 and {type(one[0]) for one in found} == {type(value)}
        assert [rows(db, f"SELECT v FROM app.t WHERE id = {at}")[0] for at in (1, 2, 3, 4)] == found


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        ("BOOLEAN", "'maybe'"), ("BOOLEAN", "2"), ("SMALLINT", "32768"), ("INT", "'x'"), ("INT", "1.5"),
        ("BIGINT", "9223372036854775808"), ("INT", "TRUE"), ("FLOAT", "1e39"), ("DOUBLE", "'abc'"),
        ("DECIMAL(4,2)", "100"), ("DECIMAL(4,2)", "'NaN'"), ("TEXT", "TRUE"), ("JSON", "'{bad'"),
        ("TIMESTAMP", "'yesterday'"), ("DATE", "'2024-02-30'"), ("TIME", "'25:00'"), ("UUID", "'123'"),
        ("EMBEDDING(3)", "'[1, 2]'"), ("EMBEDDING(1)", "'[\"x\"]'"), ("FILE", "'nope'"),
    ],
)  # fmt: skip
def test_a_value_that_does_not_fit_names_its_column(db: Database, kind: str, bad: str) -> None:
    db.execute(f"CREATE TABLE app.t (id INT PRIMARY KEY, v {kind}); INSERT INTO app.t (id) VALUES (1)")
    for statement in (f"INSERT INTO app.t VALUES (2, {bad})", f"UPDATE app.t SET v = {bad} WHERE id = 1"):
        assert "column 'v'" in refused(db, statement)
    assert rows(db, "SELECT * FROM app.t") == [(1, None)]


DEFAULTS: dict[str, tuple[str, type]] = {
    "TIMESTAMP DEFAULT NOW()": ("2025-06-15 15:06:40", dt.datetime),
    "DATETIME DEFAULT CURRENT_TIMESTAMP": ("2025-06-15 15:06:40+00:00", dt.datetime),
    "DATE DEFAULT NOW()": ("2025-06-15", dt.date),
    "TIME DEFAULT CURRENT_TIMESTAMP()": ("15:06:40", dt.time),
    "BIGINT DEFAULT NOW()": ("1750000000000000", int),
    "TEXT DEFAULT NOW()": ("2025-06-15 15:06:40", str),
    "TEXT DEFAULT CURRENT_USER()": ("ann", str),
    "TEXT DEFAULT CURRENT_USER": ("ann", str),
    "BOOLEAN DEFAULT false": ("False", bool),
    "INT DEFAULT -5": ("-5", int),
    "INT DEFAULT (7)": ("7", int),
    "DECIMAL(5,2) DEFAULT 1.5": ("1.50", Decimal),
    "JSON DEFAULT '{}'": ("{}", dict),
    "DATE DEFAULT DATE '2024-01-01'": ("2024-01-01", dt.date),
    "BYTES DEFAULT X'00'": ("b'\\x00'", bytes),
    "UUID DEFAULT '00000000-0000-0000-0000-000000000001'": ("00000000-0000-0000-0000-000000000001", uuid.UUID),
    "TEXT DEFAULT NULL": ("None", type(None)),
}


def test_defaults_give_the_value_in_the_type_of_the_column() -> None:
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from kalamdb.app_context import AppContext
    from kalamdb.config import Settings
    from kalamdb.testing.clock import SimulatedClock

    with TemporaryDirectory() as folder:
        context = AppContext(None, Settings.load({}, environment={}), clock=SimulatedClock(), root=Path(folder))
        with Database(context) as db:
            columns = ", ".join(f"c{at} {stated}" for at, stated in enumerate(DEFAULTS))
            db.execute(f"CREATE NAMESPACE app; CREATE TABLE app.t (id INT PRIMARY KEY, {columns})")
            db.execute("INSERT INTO app.t (id) VALUES (1)", user="ann")
            db.insert("app.t", [{"id": 2}], user="ann")
            db.execute("INSERT INTO app.t (id) SELECT 3", user="ann")
            for row in rows(db, "SELECT * FROM app.t"):
                assert [(str(value), type(value)) for value in row[1:]] == list(DEFAULTS.values())
            now = dt.datetime(2025, 6, 15, 15, 6, 40)
            found = rows(db, "SELECT NOW(), CURRENT_TIMESTAMP, current_date, CURRENT_TIME, CURRENT_USER()", user="ann")
            assert found == [(now, now, now.date(), now.time(), "ann")]


@pytest.mark.parametrize("where", ["DEFAULT {0}() PRIMARY KEY", "PRIMARY KEY DEFAULT {0}()"])
@pytest.mark.parametrize(
    ("function", "kind"), [("SNOWFLAKE_ID", "BIGINT"), ("UUID_V7", "UUID"), ("ULID", "TEXT"), ("UUID_V7", "TEXT")]
)
def test_generated_defaults_differ_and_rise(db: Database, function: str, kind: str, where: str) -> None:
    db.execute(f"CREATE TABLE app.t (id {kind} {where.format(function)}, v INT)")
    db.execute("INSERT INTO app.t (v) VALUES (1), (2)")
    db.execute(f"INSERT INTO app.t VALUES ({function}(), 3), ({function}(), 4)")
    db.execute(f"INSERT INTO app.t SELECT {function}(), v + 4 FROM app.t")
    db.insert("app.t", [{"v": 9}, {"v": 10}])
    found = rows(db, "SELECT id, v FROM app.t")
    assert len({one[0] for one in found}) == len(found) == 10
    if function == "ULID":
        assert all(len(one[0]) == 26 for one in found)
    if kind == "UUID":
        assert all(one[0].version == 7 for one in found)


@pytest.mark.parametrize(
    "column",
    ["INT DEFAULT SNOWFLAKE_ID()", "BIGINT DEFAULT UUID_V7()", "UUID DEFAULT ULID()", "INT DEFAULT CURRENT_USER()",
     "BOOLEAN DEFAULT NOW()", "INT DEFAULT 'x'", "INT DEFAULT 1 + 1", "INT DEFAULT (SELECT 1)", "TEXT DEFAULT $1",
     "SMALLINT DEFAULT 40000", "JSON DEFAULT '{'", "INT DEFAULT random()"],
)  # fmt: skip
def test_a_default_that_does_not_fit_is_refused(db: Database, column: str) -> None:
    assert "DEFAULT" in refused(db, f"CREATE TABLE app.t (id INT PRIMARY KEY, v {column})")


def test_casts_know_our_names_of_types(db: Database) -> None:
    found = rows(
        db,
        "SELECT CAST('5' AS INT64), '5'::NUMERIC(5,2), CAST('5' AS DEC), CAST('5' AS FLOAT64), '5'::mediumint, "
        "CAST(5 AS CLOB), 5::character varying, CAST(5 AS nvarchar(3)), CAST('a' AS BYTES), 'a'::blob, "
        "CAST('2024-01-01T02:00:00+02:00' AS DATETIME), TIMESTAMP '1600-01-01 00:00:00', "
        "CAST('1500-01-01' AS TIMESTAMP), CAST('10:00' AS TIME), CAST('[1]' AS JSON), CAST(NULL AS UUID)",
    )
    assert found == [
        (5, Decimal("5.00"), Decimal(5), 5.0, 5, "5", "5", "5", b"a", b"a", dt.datetime(2024, 1, 1, tzinfo=UTC),
         dt.datetime(1600, 1, 1), dt.datetime(1500, 1, 1), dt.time(10), "[1]", None)
    ]  # fmt: skip


def test_parameters_stand_for_values_of_every_type(db: Database) -> None:
    given: list[Any] = [
        None,
        True,
        -5,
        2**62,
        0.25,
        Decimal("-1.50"),
        "it's",
        b"\x00'",
        MOMENT,
        MOMENT.date(),
        MOMENT.time(),
    ]
    marks = ", ".join(f"${at + 1}" for at in range(len(given)))
    [found] = rows(db, f"SELECT {marks}", given)
    assert [(value, type(value)) for value in found] == [(value, type(value)) for value in given]
    assert rows(db, "SELECT $1", [MOMENT.replace(tzinfo=UTC)]) == [(MOMENT.replace(tzinfo=UTC),)]
    assert rows(db, "SELECT $1 + 1, $2", [10**30, Decimal("0.001")]) == [(Decimal(10**30 + 1), Decimal("0.001"))]
    assert rows(db, "SELECT ?, ?, ?", [1, 1, 2]) == [(1, 1, 2)]
    assert rows(db, "SELECT :b, :a || :b", {"a": "x", "b": "y"}) == [("y", "xy")]
    assert rows(db, "SELECT '$1 ? :a', $1 -- ? $2 :b", ["v"]) == [("$1 ? :a", "v")]
    for sql, params, message in (
        ("SELECT $2", [1], "there are 1 parameters"),
        ("SELECT $1", None, "params must be a list or tuple"),
        ("SELECT $1", {"a": 1}, "params must be a list or tuple"),
        ("SELECT $1", "text", "a list or tuple for $1"),
        ("SELECT :a", [1], "params must be a dict"),
        ("SELECT :a", {"b": 1}, "parameter :a was not given"),
        ("SELECT $1", [object()], "has no SQL form"),
    ):
        assert message in refused(db, sql, params)
