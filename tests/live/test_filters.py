"""Filters of subscriptions agree with the engine on every row, and refuse what they cannot promise."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import kalamdb
from kalamdb.database import Database
from kalamdb.errors import InvalidRequest, KalamDbError
from kalamdb.live import parse_live
from kalamdb.live.filters import compile_filter, equality
from kalamdb.live.filters import sql as filter_sql
from kalamdb.sql.caller import Caller
from kalamdb.sql.tokens import SqlLimits
from kalamdb.types import Role, TableId

TEXT = st.text(alphabet="aAbB%_\\ ßéÉ😀\n'", max_size=4)
NUMBER = st.sampled_from([-3, 0, 1, 2, 7, 1 << 40])
DECIMALS = st.sampled_from([Decimal("-1.50"), Decimal("0.00"), Decimal("0.10"), Decimal("99999.99")])
FLOATS = st.sampled_from([-1.5, 0.0, 0.1, 2.0, 1e300])
MOMENTS = st.sampled_from([dt.datetime(1969, 12, 31, 23, 59, 59, 999999), dt.datetime(2026, 1, 31, 12, 0, 0, 5)])
DATES = st.sampled_from([dt.date(1969, 1, 1), dt.date(2026, 1, 31)])
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "i": NUMBER.filter(lambda value: abs(value) < 1 << 31), "n": NUMBER, "d": DECIMALS, "f": FLOATS, "t": TEXT,
    "b": st.booleans(), "m": MOMENTS, "y": DATES,
}  # fmt: skip
OPERATORS = ["=", "<>", "!=", "<", "<=", ">", ">="]


@st.composite
def conditions(draw: st.DrawFn, depth: int = 2) -> tuple[str, list[Any]]:
    """A condition with `?` for its values."""
    kind = draw(st.sampled_from(["compare", "compare", "like", "in", "between", "null", "not", "and", "or", "flag"]))
    if depth and kind in ("not", "and", "or"):
        left, values = draw(conditions(depth - 1))
        if kind == "not":
            return f"NOT ({left})", values
        right, more = draw(conditions(depth - 1))
        return f"({left}) {kind.upper()} ({right})", values + more
    column = draw(st.sampled_from(sorted(VALUES)))
    value = st.one_of(VALUES[column], VALUES[column], VALUES[column], st.none())
    match kind:
        case "like":
            word = draw(st.sampled_from(["LIKE", "ILIKE", "NOT LIKE", "NOT ILIKE"]))
            return f"t {word} ?", [draw(TEXT)]
        case "in":
            values = draw(st.lists(value, min_size=1, max_size=3))
            word = draw(st.sampled_from(["IN", "NOT IN"]))
            return f"{column} {word} ({', '.join('?' * len(values))})", values
        case "between":
            return f"{column} BETWEEN ? AND ?", [draw(VALUES[column]), draw(VALUES[column])]
        case "null":
            return f"{column} IS {draw(st.sampled_from(['', 'NOT ']))}NULL", []
        case "flag":
            return draw(st.sampled_from(["b", "b IS TRUE", "b IS FALSE", "n = i2", "n < i2"])), []
        case _:
            return f"{column} {draw(st.sampled_from(OPERATORS))} ?", [draw(value)]


@pytest.fixture(scope="module")
def db() -> Iterator[Database]:
    with kalamdb.connect(":memory:") as db:
        db.execute("CREATE NAMESPACE app")
        db.execute(
            "CREATE SHARED TABLE app.t (id INT PRIMARY KEY, i INT, n BIGINT, i2 BIGINT, d DECIMAL(10,2), f DOUBLE, "
            "t TEXT, b BOOLEAN, m TIMESTAMP, y DATE, j JSON)"
        )
        yield db


ROWS = st.lists(
    st.fixed_dictionaries({**{name: st.none() | value for name, value in VALUES.items()}, "i2": st.none() | NUMBER}),
    min_size=1,
    max_size=8,
)


@settings(max_examples=150, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(rows=ROWS, condition=conditions())
def test_a_filter_lets_pass_what_the_engine_lets_pass(
    db: Database, rows: list[dict[str, Any]], condition: tuple[str, list[Any]]
) -> None:
    where, params = condition
    db.execute("DELETE FROM app.t WHERE true")
    db.insert("app.t", [{"id": number, **row} for number, row in enumerate(rows)])
    layout = db.context.store.layout(db.context.catalog.require(TableId("app", "t")).definition)
    select = f"SELECT * FROM app.t WHERE {where}"
    found = parse_live(select, Caller("root", Role.SYSTEM, "default", params), SqlLimits()).filter(layout)
    test, wanted = compile_filter(found, layout), equality(found, layout)
    engine = {row[0] for row in db.execute(select, params).rows}
    rendered = {row[0] for row in db.execute(f"SELECT id FROM app.t WHERE {filter_sql(found, layout)}").rows}
    ours = set()
    for number, row in enumerate(rows):
        full = {"id": number, "j": None, **row}
        stored = tuple(
            codec.store(full[column.name], where="a test")
            for column, codec in zip(layout.columns, layout.codecs, strict=True)
        )
        if test(stored) is True:
            ours.add(number)
            assert wanted is None or stored[wanted[0]] == wanted[1]
    said = f"{where} {params}: {ours} here, {engine} and {rendered} of the engine: {rows}"
    assert ours == engine == rendered, said


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM app.t LIMIT 1", "SELECT * FROM app.t GROUP BY id", "SELECT DISTINCT id FROM app.t",
        "SELECT * FROM app.t JOIN app.t AS o ON true", "SELECT * FROM app.t, app.t AS o",
        "WITH x AS (SELECT 1) SELECT * FROM app.t", "SELECT _seq FROM app.t", "SELECT id, _deleted FROM app.t",
        "SELECT id + 1 FROM app.t", "SELECT id AS x FROM app.t", "SELECT count(*) FROM app.t",
        "SELECT nothing FROM app.t",
        "SELECT * FROM app.t WHERE id IN (SELECT 1)", "SELECT * FROM app.t WHERE lower(t) = 'a'",
        "SELECT * FROM app.t WHERE id = '1'", "SELECT * FROM app.t WHERE t = 1", "SELECT * FROM app.t WHERE id",
        "SELECT * FROM app.t WHERE m > NOW()", "SELECT * FROM app.t WHERE t LIKE 'a' ESCAPE '!'",
        "SELECT * FROM app.t WHERE j = '1'", "SELECT * FROM app.t WHERE i LIKE 'a'",
        "SELECT * FROM app.t WHERE i + 1 = 2",
        "SELECT * FROM app.t WHERE _seq > 1", "SELECT * FROM app.t UNION SELECT * FROM app.t", "SELECT 1",
        "SELECT * FROM app.t; SELECT 1", "DELETE FROM app.t WHERE true", "SELECT * FROM app.t WHERE", "",
        "SELECT * FROM",
        "SELECT * FROM app.t WHERE y = '2026-01-31 12:00:00'", "SELECT * FROM app.t FOR UPDATE",
        "SELECT * FROM app.t WHERE id = $1", "SELECT * FROM app.t WHERE CASE WHEN b THEN true END",
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused(db: Database, sql: str) -> None:
    with pytest.raises(InvalidRequest):
        db.subscribe(sql)


def test_order_comments_and_aliases_are_accepted(db: Database) -> None:
    sql = "SELECT x.t, \"id\" FROM app.t AS x WHERE x.t = CURRENT_USER() AND m > DATE '2026-01-31' ORDER BY id -- so"
    with db.subscribe(sql, user="anna") as found:
        db.execute("DELETE FROM app.t WHERE true")
        db.execute("INSERT INTO app.t (id, t, m) VALUES (1, 'anna', '2026-02-01'), (2, 'bob', '2027-01-01')")
        assert list(found.next(timeout_s=10).row or {}) == ["t", "id", "_seq"]
        assert found.poll() is None


def test_deep_filters_are_refused_before_they_are_read(db: Database) -> None:
    for sql in ("(" * 5000 + "b" + ")" * 5000, "NOT " * 5000 + "b", " AND ".join(["b"] * 5000)):
        with pytest.raises(KalamDbError):
            db.subscribe(f"SELECT * FROM app.t WHERE {sql}")
