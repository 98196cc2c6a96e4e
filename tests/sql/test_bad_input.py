"""Bad input of every kind gives one clear error of our tree, and leaves the data as it was."""

from __future__ import annotations

import datetime as dt
import json
import math
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kalamdb
from kalamdb.database import Database
from tests.sql.deep_statements import STATEMENTS

TABLE = (
    "CREATE SHARED TABLE app.t (id INT PRIMARY KEY, s SMALLINT, n BIGINT, v TEXT NOT NULL DEFAULT 'x', f FLOAT, "
    "d DOUBLE, dc DECIMAL(6,2), b BOOLEAN, by BYTES, j JSON, da DATE, ts TIMESTAMP, dtm DATETIME, ti TIME, u UUID, "
    "e EMBEDDING(2), CHECK (s < 100))"
)
_FOREIGN = ("sqlglot", "DataFusion", "datafusion", "<class", "Token", "._row", "Utf8", "Int64", "pyarrow", " at 0x")
"""Words of the libraries and of the inside, which tell a user nothing."""
_TEXT_MAX = 1500


class World:
    """A database with one row, and what it holds."""

    def __init__(self, db: Database) -> None:
        self.db = db
        db.execute("CREATE NAMESPACE app")
        db.execute(TABLE)
        db.execute("CREATE USER TABLE app.u (id INT PRIMARY KEY, v TEXT)")
        db.execute("CREATE STREAM TABLE app.st (x INT) WITH (TTL_SECONDS = 60)")
        db.execute("INSERT INTO app.t (id, s) VALUES (1, 5)")
        self.before = self.contents()

    def contents(self) -> list[Any]:
        """Rows, tables, columns, namespaces and views."""
        statements = (
            "SELECT * FROM app.t ORDER BY id",
            "SELECT count(*) FROM app.st",
            "SELECT count(*) FROM app.u",
            "SELECT namespace_id, table_name, version FROM system.tables WHERE table_type <> 'system'",
            "SELECT name FROM system.namespaces",
            "SELECT * FROM information_schema.views",
        )
        return [self.db.execute(sql).arrow().to_pylist() for sql in statements]

    def refuses(self, call: Callable[[], object], what: object) -> str:
        """The error's text. The call must fail with one of our tree and change nothing."""
        try:
            call()
        except kalamdb.KalamDbError as exc:
            text = str(exc)
            told = f"{str(what)[:300]}\n{type(exc).__name__}: {text}"
            assert not isinstance(exc, kalamdb.Internal), told
            assert 10 < len(text) < _TEXT_MAX, told
            assert not [word for word in _FOREIGN if word in text], told
            assert self.contents() == self.before, f"changed the data: {told}"
            return text
        raise AssertionError(f"was not refused: {str(what)[:300]}")

    def refuses_sql(self, sql: str, params: Any = None, **options: Any) -> str:
        """The same for a statement."""
        return self.refuses(lambda: self.db.execute(sql, params, **options), (sql, params))


@pytest.fixture
def world() -> Iterator[World]:
    with opened() as made:
        yield made


@contextmanager
def opened() -> Iterator[World]:
    with kalamdb.connect(":memory:", **{"flush.scheduler_enabled": False, "compaction.enabled": False}) as db:
        yield World(db)


# Statements

ODD = (
    "",
    "SELECT \x00",
    "SELECT '\ud800'",
    "\ufeffSELECT 1",
    "SELECT \U0001f642",
    "ＳＥＬＥＣＴ 1",
    f"CREATE TABLE app.{'x' * 300} (id INT PRIMARY KEY)",
    f"CREATE TABLE app.x ({'x' * 300} INT PRIMARY KEY)",
    f"CREATE TABLE app.x (id INT PRIMARY KEY, {', '.join(f'c{at} INT' for at in range(2000))})",
)


def bad_statements() -> dict[str, list[str]]:
    """The statements of bad_statements.txt by their heading."""
    found: dict[str, list[str]] = {"odd": list(ODD)}
    for line in (Path(__file__).parent / "bad_statements.txt").read_text().splitlines():
        if line.startswith("# "):
            found[line[2:]] = []
        elif line:
            list(found.values())[-1].append(line)
    return found


BAD_STATEMENTS = bad_statements()

CONSTRAINTS = (
    ("INSERT INTO app.t (id) VALUES (1)", "value '1' already exists in column 'id' of table 'app.t'"),
    ("INSERT INTO app.t (id) VALUES (2), (2)", "value '2' already exists"),
    ("INSERT INTO app.t (id) VALUES (3), (1)", "value '1' already exists"),
    ("INSERT INTO app.t (id) VALUES (NULL)", "column 'id' cannot be NULL"),
    ("INSERT INTO app.t (v) VALUES ('a')", "column 'id' cannot be NULL"),
    ("INSERT INTO app.t (id, v) VALUES (2, NULL)", "column 'v' cannot be NULL"),
    ("UPDATE app.t SET v = NULL WHERE id = 1", "column 'v' cannot be NULL"),
    ("UPDATE app.t SET v = NULL WHERE id > 0", "column 'v' cannot be NULL"),
    (
        "INSERT INTO app.t (id, s) VALUES (2, 100)",
        "CHECK constraint 't_check1' of table 'app.t' is violated by the row",
    ),
    ("UPDATE app.t SET s = 100 WHERE id = 1", "primary key '1': s < 100"),
    ("UPDATE app.t SET s = s + 99 WHERE id > 0", "primary key '1': s < 100"),
    (
        "BEGIN; INSERT INTO app.t (id) VALUES (5); INSERT INTO app.t (id) VALUES (5); COMMIT",
        "Statement 3 failed: Primary",
    ),
    ("INSERT INTO app.t (id) VALUES (2), ('x')", "column 'id': 'x' is not a valid INT value"),
)


@pytest.mark.parametrize("kind", BAD_STATEMENTS)
def test_a_bad_statement_gives_one_clear_error_and_changes_nothing(world: World, kind: str) -> None:
    assert BAD_STATEMENTS[kind]
    for sql in BAD_STATEMENTS[kind]:
        world.refuses_sql(f"CREATE TABLE app.x {sql}" if kind == "definitions" else sql)


def test_a_broken_constraint_is_told_with_its_table_column_and_value(world: World) -> None:
    for sql, expected in CONSTRAINTS:
        assert expected in world.refuses_sql(sql)


# Values

UNFIT: dict[str, tuple[Any, ...]] = {
    "s": (
        40000,
        -40000,
        1.5,
        "x",
        "",
        True,
        [1],
        {},
        b"a",
        math.nan,
        math.inf,
        10**30,
        Decimal("1.1"),
        "1" * 100,
        object(),
    ),
    "n": (2**63, -(2**63) - 1, "9223372036854775808", 1e300, 1j, Decimal("NaN")),
    "v": ([1], {}, b"a", True, dt.date(2020, 1, 1), "\ud800", object()),
    "f": (1e39, "x", True, [1]),
    "d": ("x", True, 10**400, Decimal("1e999")),
    "dc": (10000, 99999.999, "x", math.nan, Decimal("Infinity"), True, "1e5", 10**100, Decimal("1e1000000")),
    "b": (2, "maybe", 1.0, []),
    "by": (1, "\ud800", [1], 1.5),
    "j": ("{", "x", math.nan, object(), {1: object()}, {"a": math.inf}, "[" * 100_000, b"\xff"),
    "da": ("2020-13-01", "x", 10**10, 1.5, True, "10000-01-01", [1]),
    "ts": ("2020-01-01 25:00:00", "x", 10**30, 1.5, True, {}),
    "dtm": ("x", 10**30),
    "ti": ("25:00", "x", 86_400_000_000, -1, dt.time(1, 2, tzinfo=dt.UTC)),
    "u": ("x", 5, b"123", "0" * 33),
    "e": ([1], [1, 2, 3], "x", [1, "a"], [1e39, 1], [math.nan, 1], [None, 1], 5, "[1]", {}),
}


@pytest.mark.parametrize("column", UNFIT)
def test_a_value_that_does_not_fit_is_refused_alike_in_each_statement_and_names_the_column(
    world: World, column: str
) -> None:
    for value in UNFIT[column]:
        texts = {
            world.refuses_sql(sql, [value])
            for sql in (
                f"INSERT INTO app.t (id, {column}) VALUES (2, $1)",
                f"UPDATE app.t SET {column} = $1 WHERE id = 1",
                f"UPDATE app.t SET {column} = $1 WHERE id > 0",
            )
        }
        assert len(texts) == 1
        assert f"column '{column}'" in texts.pop()
        assert f"column '{column}'" in world.refuses(
            lambda v=value: world.db.insert("app.t", [{"id": 2, column: v}]), value
        )


@pytest.mark.parametrize(
    ("sql", "params"),
    [
        ("SELECT $1", None),
        ("SELECT $1", []),
        ("SELECT $2", [1]),
        ("SELECT $0", [1]),
        ("SELECT $1", {"a": 1}),
        ("SELECT :a", [1]),
        ("SELECT :a", {}),
        ("SELECT ?", []),
        ("SELECT ?, ?", [1]),
        ("SELECT $1", "abc"),
        ("SELECT $1", b"abc"),
        ("SELECT $1", 5),
        ("SELECT $1", {1}),
        ("SELECT $1", [object()]),
        ("SELECT $1", ["\ud800"]),
        ("SELECT $1", [Decimal("NaN")]),
        ("SELECT $1", [[object()]]),
        ("SELECT 1", [1]),
        ("SELECT $1", [1, 2]),
        ("SELECT $1", [dt.timedelta(1)]),
        ("SELECT $99999999999999999999", [1]),
        ("INSERT INTO app.t (id) VALUES (7); SELECT $2", [1]),
        ("SELECT $1", iter([1])),
        (5, None),
        (None, None),
        (b"SELECT 1", None),
        (["SELECT 1"], None),
    ],
)
def test_wrong_parameters_are_refused_before_anything_runs(world: World, sql: Any, params: Any) -> None:
    world.refuses(lambda: world.db.execute(sql, params), (sql, params))


def test_whole_numbers_beyond_64_bits_keep_their_digits(world: World) -> None:
    for number in (2**63, -(2**63) - 1, 10**37):
        assert world.db.execute("SELECT $1 AS x", [number]).scalar() == number
    assert world.db.execute("SELECT count(*) FROM app.t WHERE id < $1", [2**63]).scalar() == 1


def test_wrong_options_of_a_call_are_refused(world: World) -> None:
    for options in (
        {"user": ""},
        {"user": 5},
        {"user": "x" * 129},
        {"user": "\ud800"},
        {"role": "nope"},
        {"role": 5},
        {"namespace": 5},
        {"namespace": "a\x00b"},
        {"timeout_s": -1},
        {"timeout_s": "x"},
        {"timeout_s": math.nan},
        {"timeout_s": True},
    ):
        world.refuses(lambda given=options: world.db.execute("SELECT 1", **given), options)


def test_a_moment_that_python_cannot_hold_is_told_and_can_be_read_otherwise(world: World) -> None:
    sql = "SELECT DATE '9999-12-31' + INTERVAL '20 years' AS far"
    result = world.db.execute(sql)
    world.refuses(lambda: result.rows, sql)
    assert result.arrow().num_rows == 1


# Settings and paths


@pytest.mark.parametrize(
    "given",
    [
        {"nope": 1},
        {"hot.bytes_max": "x"},
        {"hot.bytes_max": 1},
        {"hot.bytes_max": math.nan},
        {"hot.bytes_max": None},
        {"hot.bytes_max": [1]},
        {"jobs.max_concurrent": True},
        {"jobs.max_concurrent": 1.5},
        {"storage.durability": "x"},
        {"limits.sql_depth_max": 10**9},
        {"config": "/nonexistent"},
        {"config": 5},
        {"logging.logs_path": 5},
        {"shutdown.timeout_s": math.inf},
        {"shutdown.timeout_s": "nan"},
        {"flush.scheduler_enabled": "perhaps"},
    ],
)
def test_bad_settings_are_refused_before_anything_is_opened(given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(kalamdb.InvalidRequest) as refused:
        kalamdb.connect(tmp_path / "data", **given)
    assert next(iter(given)).split(".")[-1] in str(refused.value)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("path", [None, 5, "", b"x", "a\x00b", "\ud800", "/dev/null", "/proc/nope/x"])
def test_bad_paths_are_refused(path: Any) -> None:
    with pytest.raises((kalamdb.InvalidRequest, kalamdb.Unavailable)) as refused:
        kalamdb.connect(path)
    assert repr(path)[1:-1] in str(refused.value)


def test_a_settings_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "kalamdb.toml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(kalamdb.InvalidRequest, match="cannot be read"):
        kalamdb.connect(":memory:", config=file)


# db.insert


class Frame:
    """Looks like a frame of polars, and cannot be read."""

    columns = ("id",)

    def to_arrow(self) -> pa.Table:
        """Fails as a foreign library fails."""
        raise ValueError("no such column")


BAD_DATA: tuple[Any, ...] = (
    None,
    5,
    "abc",
    b"abc",
    object(),
    {},
    {1, 2},
    {"id": [2]},
    {"id": 2},
    [5],
    [None],
    ["ab"],
    [[]],
    [()],
    [{}],
    [(2,), (3, 4)],
    [(2,) * 50],
    [{"id": 2, "nope": 1}],
    [{"nope": 1}],
    [{"id": "x"}],
    [{"id": 2}, {"id": 2}],
    [{"id": 1}],
    [{"id": None}],
    [{"v": "a"}],
    [{"id": 2, "v": None}],
    [{"id": 2, "s": 100}],
    [{"id": 2, "s": "x"}, {"id": 3, "s": 5}],
    [{"id": 2}, 5],
    [{"id": 2}, (3,)],
    [(2,), {"id": 3}],
    [(2,), None],
    [{1: 2}],
    [{"id": 2, "j": object()}],
    range(3),
    iter([5]),
    pa.table({"id": [2], "nope": [1]}),
    pa.table({"id": ["x"]}),
    pa.table({"id": pa.array([None], pa.int32())}),
    pa.table({"id": [1]}),
    pa.table({"id": [2, 2]}),
    pa.table({"id": [2**40]}),
    pa.table({"id": [2.5]}),
    pa.table({"id": [2], "e": [[1.0]]}),
    pa.table({"id": [2], "ts": ["x"]}),
    pa.table({"id": [2], "by": [1]}),
    pa.table([pa.array([2]), pa.array([3])], names=["id", "id"]),
    pa.table({"id": pa.array([2], pa.duration("s"))}),
    pa.table({"id": [2], "v": [None]}),
    pa.table({"id": [2], "u": ["x"]}),
    pa.table({"id": [2], "v": pa.array([b"\xff"])}),
    pa.table({"id": [2], "dtm": pa.array([10**18], pa.timestamp("s"))}),
    pa.table({"id": [2], "d": [True]}),
    pa.table({"id": [2], "da": pa.array([2**31 - 1], pa.date32())}),
    pa.array(["a"]),
    pa.chunked_array([[1]]),
    pa.table({"id": [2], "ts": pa.array([2**62], pa.timestamp("us"))}),
    pa.table({"id": [2], "ti": pa.array([-1], pa.time64("us"))}),
    pa.RecordBatch.from_pydict({"id": ["x"]}),
    pd.DataFrame({"id": [2], "nope": [1]}),
    pd.DataFrame({"id": ["x"]}),
    pd.DataFrame({"id": [math.nan]}),
    pd.DataFrame({"id": [2], "j": [object()]}),
    pd.DataFrame({0: [1]}),
    pd.Series([1]),
    pd.DataFrame([[2, 3]], columns=["id", "id"]),
    np.array([2]),
    np.array(5),
    Frame(),
)


def test_bad_data_is_refused_in_every_form(world: World) -> None:
    for data in BAD_DATA:
        world.refuses(lambda given=data: world.db.insert("app.t", given), repr(data))


def test_wrong_arguments_of_insert_are_refused(world: World) -> None:
    rows = [{"id": 2}]
    for arguments in (
        {"on_conflict": "nope"},
        {"on_conflict": None},
        {"user_column": "id"},
        {"user": 5},
        {"role": "user"},
    ):
        world.refuses(lambda given=arguments: world.db.insert("app.t", rows, **given), arguments)
    for table in (
        "nope",
        "app.nope",
        "app.",
        ".t",
        "",
        "a.b.c",
        5,
        None,
        "system.jobs",
        "information_schema.tables",
    ):
        world.refuses(lambda given=table: world.db.insert(given, rows), table)
    for owners in ([5], [None], [""], ["x" * 200], ["\ud800"], [[1]], ["a", None]):
        data = [{"id": at, "w": owner} for at, owner in enumerate(owners)]
        world.refuses(lambda given=data: world.db.insert("app.u", given, user_column="w"), data)
    for data in ([("a",)], [("a", 1, "v", 4)], [{"id": 1}], [{"id": 1, "w": "a"}, {"id": 1, "w": "a"}]):
        world.refuses(lambda given=data: world.db.insert("app.u", given, user_column="w"), data)
    world.refuses(lambda: world.db.insert("app.st", [(1,)] * 5000), "5000 rows into a stream")
    world.refuses(lambda: world.db.insert("app.st", [(1,), ("x",)]), "a text into a stream")


def test_rows_of_mixed_values_are_read_in_the_type_of_the_column(world: World) -> None:
    world.db.insert("app.t", [(2, "7", 1.0, 5), (3, 8, "9", "text")])
    world.db.insert("app.t", [{"id": 4, "j": {"a": 1}}, {"id": 5, "j": [1, "b"]}, {"id": 6, "u": uuid.UUID(int=1)}])
    assert world.db.execute("SELECT s, n, v FROM app.t WHERE id IN (2, 3) ORDER BY id").rows == [
        (7, 1, "5"),
        (8, 9, "text"),
    ]
    assert world.db.execute("SELECT j FROM app.t WHERE id IN (4, 5) ORDER BY id").rows == [({"a": 1},), ([1, "b"],)]


# Deep and long statements, in a child process that must live


def child(sizes: str, names: str) -> list[dict[str, Any]]:
    """Run statements of `deep_statements` in a process of their own."""
    command = [sys.executable, "-m", "tests.sql.deep_statements", sizes, names]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=600)
    assert done.returncode == 0, (
        f"exit status {done.returncode} after {done.stdout.splitlines()[-1:]}\n{done.stderr[-2000:]}"
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_outcomes(outcomes: list[dict[str, Any]]) -> None:
    for outcome in outcomes:
        if outcome["error"] is not None:
            kind, text = outcome["error"]
            assert kind in ("InvalidRequest", "QueryFailed", "LimitExceeded", "UniqueViolation", "Conflict"), outcome
            assert len(text) < _TEXT_MAX, outcome
            assert not [word for word in _FOREIGN if word in text], outcome
    slowest = sorted(outcomes, key=lambda one: -one["seconds"])[:3]
    print("slowest:", [(one["name"], one["bytes"], one["seconds"]) for one in slowest])


@pytest.mark.parametrize("part", range(4))
def test_deep_and_long_statements_of_40_kilobytes_end_in_an_answer_or_an_error(part: int) -> None:
    names = list(STATEMENTS)[part::4]
    outcomes = child("900,40000", ",".join(names))
    assert len(outcomes) == 2 * len(names)
    check_outcomes(outcomes)


def test_statements_of_a_mebibyte_end_in_an_answer_or_an_error() -> None:
    outcomes = child("1048000", "values,name,pattern")
    assert len(outcomes) == 3
    check_outcomes(outcomes)


@pytest.mark.long
@pytest.mark.parametrize("name", STATEMENTS)
def test_every_statement_ends_at_every_size(name: str) -> None:
    check_outcomes(child("200,500,900,1500,2500,4000,10000,100000,400000,1048000", name))


def test_a_statement_above_the_limit_of_bytes_is_refused_unread(world: World) -> None:
    assert "limits.sql_bytes_max" in world.refuses_sql("SELECT '" + "a" * (1 << 20) + "'")


def test_sensible_depth_works(world: World) -> None:
    nested = "(" * 200 + "1" + ")" * 200
    chained = " OR ".join(f"id = {at}" for at in range(200))
    casts = "CAST(" * 100 + "id" + " AS INT)" * 100
    assert world.db.execute(f"SELECT {nested} AS x, {casts} AS y FROM app.t WHERE {chained}").rows == [(1, 1)]


# Garbage and mutations

VALID = (Path(__file__).parent / "valid_statements.txt").read_text().splitlines()
SPICE = (
    "SELECT FROM WHERE ( ) , ; ' \" -- /* */ * NULL AND OR NOT 1 1e400 - :: $1 :x ? -> ->> || = < IN IS "
    "CASE END UNION BETWEEN LIKE RETURNING VALUES SET id v app.t app _seq _key _deleted excluded E'\\'' "
    "X'0' $$ [ ] { } \\ é 🙂 \u2028 99999999999999999999 0x1F LATERAL ARRAY[ DISTINCT WITH AS . .. @ # % ^ ~ |> "
    "=> "
).split()
PHRASES = ("ON CONFLICT", "DO NOTHING", "DATE 'x'", "OVER ()", "CAST(id AS", "INTERVAL '1")
WORDS = st.sampled_from([*SPICE, *PHRASES])


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """A valid statement after some changes of its words."""
    words = draw(st.sampled_from(VALID)).split(" ")
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(words)))
        match draw(st.integers(0, 4)):
            case 0:
                words[at : at + 1] = []
            case 1:
                words.insert(at, draw(WORDS))
            case 2:
                words[at : at + 1] = [draw(WORDS)]
            case 3:
                words[at:at] = words[at : at + 3]
            case _:
                words[at:] = words[at:][::-1]
    return " ".join(words)


class Spare:
    """A world that is made anew after each statement that changed it."""

    def __init__(self) -> None:
        self._open: Any = None
        self.world: World | None = None

    def get(self) -> World:
        """A world as it was made."""
        if self.world is None:
            self._open = opened()
            self.world = self._open.__enter__()
        return self.world

    def drop(self) -> None:
        """Close it."""
        if self.world is not None:
            self._open.__exit__(None, None, None)
            self.world = None


@pytest.fixture(scope="module")
def spare() -> Iterator[Spare]:
    kept = Spare()
    yield kept
    kept.drop()


def survives(spare: Spare, sql: str) -> None:
    world = spare.get()
    try:
        world.db.execute(sql)
    except kalamdb.Internal as exc:
        raise AssertionError(f"{sql!r} is our own mistake: {exc}") from exc
    except kalamdb.KalamDbError as exc:
        assert 5 < len(str(exc)) < _TEXT_MAX, (sql, str(exc))
        if not sql.rstrip("; ").count(";"):
            assert world.contents() == world.before, f"{sql!r} failed and changed the data: {exc}"
            return
    if world.contents() != world.before:
        spare.drop()


FUZZ = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@FUZZ
@given(sql=mutated())
def test_mutated_statements_work_or_are_refused_without_a_trace(spare: Spare, sql: str) -> None:
    survives(spare, sql)


@FUZZ
@given(sql=st.lists(st.one_of(WORDS, st.text(max_size=8)), max_size=12).map(" ".join))
def test_garbage_is_refused(spare: Spare, sql: str) -> None:
    survives(spare, sql)


@pytest.mark.long
@settings(FUZZ, max_examples=20_000, derandomize=False)
@given(sql=st.one_of(mutated(), st.text()))
def test_many_mutated_statements_work_or_are_refused_without_a_trace(spare: Spare, sql: str) -> None:
    survives(spare, sql)
