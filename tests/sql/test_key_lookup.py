"""Statements by primary key skip the engine: each must answer, or fail, as the engine does."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest

import kalamdb
from kalamdb.database import Database
from tests.conftest import run_job

KEYS: dict[str, tuple[str, list[str]]] = {
    "small": ("SMALLINT", ["1", "-32768", "32767"]),
    "int": ("INT", ["1", "-2147483648", "2147483647"]),
    "big": ("BIGINT", ["1", "5", "-9223372036854775808", "9223372036854775807"]),
    "text": ("TEXT", ["'1'", "''", "'a'", "'A'", "'a '", "'ä'", "'it''s'", "'5'", "'1.0'"]),
    "flag": ("BOOLEAN", ["TRUE", "FALSE"]),
    "price": ("DECIMAL(8,2)", ["1.00", "-999999.99", "999999.99", "0.50", "5.00"]),
    "real": ("DOUBLE", ["1.0", "0.1", "-2.5"]),
    "single": ("FLOAT", ["1.0", "0.1", "5.0"]),
    "day": ("DATE", ["DATE '2013-01-31'", "DATE '1969-12-31'"]),
    "moment": ("TIMESTAMP", ["TIMESTAMP '2013-01-31 10:00:00'", "TIMESTAMP '1969-12-31 23:59:59.999999'"]),
    "instant": ("DATETIME", ["TIMESTAMP '2013-01-31 10:00:00'"]),
    "clock": ("TIME", ["TIME '10:00:00'"]),
    "ident": ("UUID", ["'12345678-1234-5678-1234-567812345678'"]),
    "raw": ("BYTES", ["X'01'", "X''"]),
}
QUIET = {"flush.scheduler_enabled": False, "compaction.enabled": False}
LITERALS = [
    "1", "5", "'5'", "'1'", "'01'", "' 1'", "'x'", "''", "5.0", "5.5", "1.00", "1.000", "1e0", "1e400",
    "NULL", "TRUE", "'true'",
    "'TRUE'", "-1", "+1", "-32768", "32767", "32768", "-2147483648", "2147483648", "-9223372036854775808",
    "9223372036854775807", "9223372036854775808", "123456789012345678901234567890", "-999999.99",
    "999999.99", "999999999.99",
    "0.5", "0.1", "'a'", "'A'", "'a '", "'ä'", "'it''s'", "X'01'", "X'0'", "DATE '2013-01-31'",
    "DATE 'x'", "'2013-01-31'",
    "TIMESTAMP '2013-01-31 10:00:00'", "'2013-01-31 10:00:00'", "TIMESTAMP '2013-01-31'", "TIME '10:00:00'",
    "'10:00:00'",
    "'12345678-1234-5678-1234-567812345678'", "'12345678123456781234567812345678'", "E'a'",
    "CURRENT_USER", "DEFAULT",
]  # fmt: skip
PARAMETERS: list[Any] = [
    1, 5, "5", "1", "x", "", 5.0, 5.5, float("nan"), float("inf"), None, True, False, 1 << 31, 1 << 63,
    -(1 << 63), 1 << 200,
    Decimal("1"), Decimal("1.00"), Decimal("1.000"), Decimal("5"), Decimal("-999999.99"), Decimal("1e3"),
    Decimal("NaN"),
    "a", "it's", b"\x01", b"", dt.date(2013, 1, 31), dt.datetime(2013, 1, 31, 10), dt.time(10),
    dt.datetime(2013, 1, 31, 10, tzinfo=dt.UTC), [1], {"a": 1}, object(),
]  # fmt: skip

Answer = tuple[Any, ...]


def answer(db: Database, sql: str, params: Any = None) -> Answer:
    """What a statement gives: columns and rows, or the class of its error."""
    try:
        result = db.execute(sql, params, user="ann")
    except kalamdb.KalamDbError as exc:
        return ("error", type(exc))
    return ("rows", [(field.name, field.type) for field in result.arrow().schema], repr(result.rows))


@pytest.fixture(scope="module", params=["hot", "cold"])
def db(request: pytest.FixtureRequest) -> Iterator[Database]:
    """One USER table per type of key; tests only read them."""
    with kalamdb.connect(":memory:", **QUIET) as db:
        db.execute("CREATE NAMESPACE k")
        for name, (kind, keys) in KEYS.items():
            db.execute(f"CREATE USER TABLE k.{name} (id {kind} PRIMARY KEY, v TEXT, n INT)")
            db.execute(f"INSERT INTO k.{name} VALUES " + ", ".join(f"({key}, 'v', 7)" for key in keys), user="ann")
        db.execute("CREATE USER TABLE k.pair (a INT, b TEXT, v TEXT, PRIMARY KEY (a, b))")
        db.execute("INSERT INTO k.pair VALUES (1, 'x', 'one'), (1, 'y', NULL), (2, 'x', 'three')", user="ann")
        if request.param == "cold":
            for name in [*KEYS, "pair"]:
                run_job(db, f"STORAGE FLUSH TABLE k.{name}")
        yield db


@pytest.mark.parametrize("table", KEYS)
def test_a_literal_finds_by_key_what_the_engine_finds(db: Database, table: str) -> None:
    different = [
        (literal, fast, engine)
        for literal in [*LITERALS, *KEYS[table][1]]
        if (fast := answer(db, f"SELECT * FROM k.{table} WHERE id = {literal}"))
        != (engine := answer(db, f"SELECT * FROM k.{table} WHERE (id = {literal})"))
    ]
    assert not different


@pytest.mark.parametrize("table", KEYS)
def test_a_parameter_finds_by_key_what_the_engine_finds(db: Database, table: str) -> None:
    different = [
        (value, fast, engine)
        for value in PARAMETERS
        if (fast := answer(db, f"SELECT v, id FROM k.{table} WHERE id = $1", [value]))
        != (engine := answer(db, f"SELECT v, id FROM k.{table} WHERE (id = $1)", [value]))
    ]
    assert not different


@pytest.mark.parametrize(
    "predicate",
    [
        "a = 1 AND b = 'x'", "b = 'x' AND a = 1", "a = 1 AND b = 'z'", "a = '1' AND b = 'x'", "a = 1.0 AND b = 'x'",
        "a = 1 AND b = NULL", "a = NULL AND b = 'x'", "a = 1 AND b = 1", "a = 1 AND b = 'x' AND v = 'one'",
        "a = 1 AND b = 'x' AND a = 1", "a = 1 AND b = 'x' AND a = 2", "a = 1", "b = 'x'", "a = 3000000000 AND b = 'x'",
        "a = 1 AND nothing = 'x'", "pair.a = 1 AND pair.b = 'x'", "other.a = 1 AND b = 'x'", "A = 1 AND B = 'x'",
        "\"A\" = 1 AND b = 'x'", "\"a\" = 1 AND \"b\" = 'x'",
    ],
)  # fmt: skip
def test_a_composite_key_finds_what_the_engine_finds(db: Database, predicate: str) -> None:
    fast = answer(db, f"SELECT * FROM k.pair WHERE {predicate}")
    assert fast == answer(db, f"SELECT * FROM k.pair WHERE ({predicate})")


@pytest.mark.parametrize(
    "items",
    [
        "*", "id", "v, id", "id AS key, v AS value", "id AS id", "ID, V", '"id"', '"ID"', "big.id",
        "big.v AS w", "other.id",
        "id, id", "id AS a, v AS a", "id AS v, v", "nothing", "id, nothing", "*, id", "id, *", "DISTINCT id",
        "count(*)", "id + 1",
        "_seq > 0", "big.*", "v, v AS w",
    ],
)  # fmt: skip
def test_chosen_columns_are_those_that_the_engine_gives(db: Database, items: str) -> None:
    for key in ("5", "6"):
        for end in ("", " LIMIT 1", " LIMIT 0", " LIMIT 5 OFFSET 1", " ORDER BY id"):
            fast = answer(db, f"SELECT {items} FROM k.big WHERE id = {key}{end}")
            assert fast == answer(db, f"SELECT {items} FROM k.big WHERE (id = {key}){end}")


@pytest.mark.parametrize("table", ["k.nothing", "nothing.big", "big", "system.nothing"])
def test_an_unknown_table_is_the_same_error(db: Database, table: str) -> None:
    fast = answer(db, f"SELECT * FROM {table} WHERE id = 5")
    assert fast[0] == "error" and fast == answer(db, f"SELECT * FROM {table} WHERE (id = 5)")


@pytest.mark.parametrize("verb", ["UPDATE k.t SET v = 'new', n = n + 1", "DELETE FROM k.t"])
@pytest.mark.parametrize("tier", ["hot", "cold"])
def test_changes_by_key_do_what_the_engine_does(verb: str, tier: str) -> None:
    literals = ["1", "'1'", "1.0", "1.5", "1e0", "NULL", "2", "9223372036854775808", "'x'", "TRUE", "-1", "$1"]
    again = "ON CONFLICT (id) DO UPDATE SET v = 'old', n = excluded.n"
    outcomes: dict[str, list[Any]] = {"id = {}": [], "(id = {})": []}
    for predicate, seen in outcomes.items():
        with kalamdb.connect(":memory:", **QUIET) as db:
            db.execute("CREATE NAMESPACE k")
            db.execute("CREATE SHARED TABLE k.t (id BIGINT PRIMARY KEY, v TEXT, n INT)")
            for number, literal in enumerate(literals):
                db.execute(f"INSERT INTO k.t VALUES (1, 'old', 1), (2, 'old', {number}) {again}")
                if tier == "cold":
                    run_job(db, "STORAGE FLUSH TABLE k.t")
                sql = f"{verb} WHERE {predicate.format(literal)} RETURNING *"
                change = answer(db, sql, [1] if literal == "$1" else None)
                seen.append((literal, change, db.execute("SELECT * FROM k.t ORDER BY id").rows))
    assert outcomes["id = {}"] == outcomes["(id = {})"]
