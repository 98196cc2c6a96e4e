"""A grammar of statements over one user's rows.

Each statement is total on the rows of `cells`: it fails for none of them, whatever the optimizer evaluates
first. On a row of `marked_cells` most of its expressions fail, and each cell is recognisable in any text.
"""

from __future__ import annotations

import datetime as dt
import re
import uuid
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

DDL = (
    "CREATE USER TABLE iso.t (id BIGINT PRIMARY KEY, n BIGINT, z INT, v TEXT, j JSON, d DOUBLE, dc DECIMAL(20,4), "
    "da DATE, ts TIMESTAMP, dtm DATETIME, ti TIME, u UUID, by BYTES, b BOOLEAN, e EMBEDDING(2))"
)
COLUMNS = ("id", "n", "z", "v", "j", "d", "dc", "da", "ts", "dtm", "ti", "u", "by", "b", "e")
MARKERS = re.compile(
    r"MARKER|4d41524b|TUFSS0|7770001|7\.77000|7777[-, ]+0?7[-, ]+0?7|07:07:07|7, 7, 7, 777777", re.IGNORECASE
)
"""Finds a cell of `marked_cells` as text, as JSON, in hexadecimal, in base64, or as Python shows it."""
_MARKED_MOMENT = dt.datetime(7777, 7, 7, 7, 7, 7, 777777)


def cells(at: int) -> tuple[Any, ...]:
    """A row on which no expression of the grammar fails."""
    day = dt.datetime(2020, 1, at % 28 + 1, 1, 2, 3)
    return (
        at,
        at % 9 + 1,
        at % 5 + 1,
        None if at % 6 == 5 else str(at * 7 % 100),
        {"k": at % 50, "s": str(at % 50), "a": [at % 50]},
        at % 50 + 0.5,
        Decimal(at % 50) + Decimal("0.25"),
        day.date(),
        day,
        day.replace(tzinfo=dt.UTC),
        day.time(),
        uuid.UUID(int=at),
        b"12",
        at % 2 == 0,
        [float(at % 50), 0.5],
    )


def marked_cells(at: int) -> tuple[Any, ...]:
    """A row of which nothing may be seen: casts, divisions and JSON paths fail on it."""
    return (
        at,
        7770001112220 + at,
        0,
        f"MARKER-é-{at}",
        {"k": "MARKERk", "s": "MARKERs", "a": ["MARKERa"]},
        7.770001112e222,
        Decimal("7770001112220.7777"),
        _MARKED_MOMENT.date(),
        _MARKED_MOMENT,
        _MARKED_MOMENT.replace(tzinfo=dt.UTC),
        _MARKED_MOMENT.time(),
        uuid.UUID("77700011-1222-4770-8011-122277700011"),
        b"MARKER",
        None,
        [7770001.0, 7770001.0],
    )


# `@` stands for the alias of the table and its dot.
_NUMBERS = (
    "@id",
    "@n",
    "@z",
    "10 / @z",
    "100 % @z",
    "1000 / (@n + @z)",
    "60 / CAST(CAST(@z AS TEXT) AS INT)",
    "CAST(@v AS INT)",
    "CAST('1' || @v AS INT)",
    "CAST(@n AS SMALLINT)",
    "CAST(@n AS DECIMAL(5,2))",
    "CAST(@dc AS SMALLINT)",
    "CAST(@dc AS DECIMAL(6,2))",
    "CAST(@d AS SMALLINT)",
    "CAST(round(@d) AS SMALLINT)",
    "CAST(@j->>'k' AS INT)",
    "CAST(@j->'a'->>0 AS INT)",
    "json_get_int(@j, 'k')",
    "length(@v)",
    "json_length(@j)",
    "CAST(encode(@by, 'hex') AS INT)",
    "CAST(date_part('year', @da) AS INT) - 2000",
    "CAST(date_part('day', CAST(@da AS TIMESTAMP)) AS INT)",
    "CAST(substr(CAST(@ts AS TEXT), 3, 2) AS INT)",
    "CAST(CASE WHEN @b IS NULL THEN @v ELSE '4' END AS INT)",
    "CASE WHEN @z = 0 THEN CAST(@v AS INT) ELSE @z END",
    "coalesce(CAST(@v AS INT), 0)",
    "CAST(@e[1] AS SMALLINT)",
    "@n * 100000000000000",
    "@n * @n * @n",
)
_TEXTS = ("@v", "upper(@v)", "@v || '!'", "@j->>'s'", "CAST(@da AS TEXT)", "CAST(@u AS TEXT)", "encode(@by, 'base64')")
_PLAIN = ("@id", "@n", "@z", "@v", "@d", "@dc", "@da", "@ts", "@dtm", "@ti", "@b", "@by", "@e", "@j", "@u")
_TESTS = (
    "@b",
    "NOT @b",
    "@b IS NULL",
    "@v IS NOT NULL",
    "@v LIKE '%1%'",
    "@v ~ '^[0-9]+$'",
    "@j ? 'k'",
    "@j->>'s' = '5'",
    "@da < DATE '2020-01-07'",
    "CAST(@da AS TIMESTAMP) > TIMESTAMP '2020-01-03 00:00:00'",
    "@ts >= '2020-01-04'",
    "@dtm IS NOT NULL",
    "@u > '00000000-0000-0000-0000-000000000004'",
    "@ti = '01:02:03'",
    "@dc BETWEEN 2 AND 9",
    "@d > 3.5",
    "@id IN (1, 3, 5, 7, 104)",
    "true",
)
_AGGREGATES = ("count(*)", "count({0})", "sum({0})", "min({0})", "max({0})", "count(DISTINCT {0})")


class Grammar:
    """Statements from a seed; the same seed makes the same ones."""

    def __init__(self, seed: int) -> None:
        self._numbers = np.random.default_rng(seed)

    def below(self, bound: int) -> int:
        """A number from 0 to bound - 1."""
        return int(self._numbers.integers(bound))

    def pick(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[self.below(len(options))]

    # Expressions

    def number(self, alias: str = "") -> str:
        """A numeric expression over one row."""
        text = self.pick(_NUMBERS).replace("@", alias)
        return f"({text}) {self.pick(('+', '-'))} {self.below(9) + 1}" if self.below(5) == 0 else text

    def scalar(self, alias: str = "") -> str:
        """Any expression over one row."""
        kind = self.below(4)
        if kind == 0:
            return self.pick(_TEXTS).replace("@", alias)
        return self.pick(_PLAIN).replace("@", alias) if kind == 1 else self.number(alias)

    def predicate(self, alias: str = "", depth: int = 2) -> str:
        """A condition over one row, perhaps with sub-queries."""
        match self.below(10 if depth else 5):
            case 0 | 1:
                return self.pick(_TESTS).replace("@", alias)
            case 2 | 3:
                return f"{self.number(alias)} {self.pick(('<', '>', '=', '<>', '<=', '>='))} {self.below(40)}"
            case 4:
                return f"{self.number(alias)} {self.pick(('<', '=', '>='))} {self.number(alias)}"
            case 5 | 6:
                joined = self.pick(("AND", "OR"))
                return f"({self.predicate(alias, depth - 1)} {joined} {self.predicate(alias, depth - 1)})"
            case 7:
                return f"NOT ({self.predicate(alias, depth - 1)})"
            case 8:
                return f"{alias}id IN (SELECT s.id FROM iso.t s WHERE {self.predicate('s.', 0)})"
            case _:
                return f"{self.number(alias)} >= (SELECT min({self.number('s.')}) FROM iso.t s)"

    # Queries

    def query(self) -> str:
        """A SELECT whose rows are the same in any order."""
        forms: tuple[Callable[[], str], ...] = (
            self._plain,
            self._aggregated,
            self._grouped,
            self._ordered,
            self._joined,
            self._outer_joined,
            self._set_operation,
            self._common_table,
            self._windowed,
            self._limited,
            self._correlated,
            self._whole,
            self._by_key,
            self._system_columns,
            self._other_tables,
        )
        return self.pick(forms)()

    def _plain(self) -> str:
        distinct = self.pick(("", "DISTINCT "))
        items = ", ".join(f"{self.scalar('a.')} AS x{at}" for at in range(self.below(3) + 1))
        return f"SELECT {distinct}{items} FROM iso.t a WHERE {self.predicate('a.')}"

    def _aggregated(self) -> str:
        items = ", ".join(
            f"{self.pick(_AGGREGATES).format(self.number('a.'))} AS x{at}" for at in range(self.below(3) + 1)
        )
        where = f" WHERE {self.predicate('a.')}" if self.below(3) else ""
        return f"SELECT {items} FROM iso.t a{where}"

    def _grouped(self) -> str:
        key = self.number("a.")
        having = f" HAVING max({self.number('a.')}) > {self.below(20)}" if self.below(2) else ""
        return f"SELECT {key} AS g, count(*), sum({self.number('a.')}) FROM iso.t a GROUP BY {key}{having}"

    def _ordered(self) -> str:
        key, direction = self.number("a."), self.pick(("", " DESC"))
        where = f" WHERE {self.predicate('a.', 1)}" if self.below(2) else ""
        return f"SELECT {key} AS k FROM iso.t a{where} ORDER BY k{direction} NULLS LAST LIMIT {self.below(6) + 1}"

    def _joined(self) -> str:
        on = f"{self.number('a.')} = {self.number('b.')}"
        return (
            f"SELECT a.id, b.id, {self.scalar('b.')} FROM iso.t a JOIN iso.t b ON {on} WHERE {self.predicate('a.', 1)}"
        )

    def _outer_joined(self) -> str:
        kind = self.pick(("LEFT", "RIGHT", "FULL"))
        return (
            f"SELECT a.id, p.name, {self.number('a.')} FROM iso.t a {kind} JOIN iso.p p "
            f"ON p.id = {self.number('a.')} AND {self.predicate('a.', 0)}"
        )

    def _set_operation(self) -> str:
        kind = self.pick(("UNION", "UNION ALL", "INTERSECT", "EXCEPT"))
        left = f"SELECT CAST({self.number('a.')} AS TEXT) FROM iso.t a WHERE {self.predicate('a.', 1)}"
        right = f"SELECT CAST({self.number('b.')} AS TEXT) FROM iso.t b WHERE {self.predicate('b.', 1)}"
        return f"{left} {kind} {right}"

    def _common_table(self) -> str:
        return (
            f"WITH c AS (SELECT a.id, {self.number('a.')} AS x, {self.scalar('a.')} AS y FROM iso.t a "
            f"WHERE {self.predicate('a.', 1)}) SELECT c.x, c.y, (SELECT count(*) FROM c) FROM c "
            f"JOIN iso.t b ON b.id = c.id WHERE {self.predicate('b.', 0)}"
        )

    def _windowed(self) -> str:
        return (
            f"SELECT a.id, sum({self.number('a.')}) OVER (PARTITION BY {self.number('a.')} ORDER BY a.id), "
            f"row_number() OVER (ORDER BY {self.number('a.')}, a.id) FROM iso.t a WHERE {self.predicate('a.', 1)}"
        )

    def _limited(self) -> str:
        inner = f"SELECT {self.scalar('a.')} AS x FROM iso.t a WHERE {self.predicate('a.', 1)}"
        return f"SELECT count(*) FROM ({inner} LIMIT {self.below(8)} OFFSET {self.below(3)}) q"

    def _correlated(self) -> str:
        return (
            f"SELECT a.id FROM iso.t a WHERE {self.pick(('', 'NOT '))}EXISTS (SELECT 1 FROM iso.t b WHERE b.id = a.id "
            f"AND {self.predicate('b.', 0)}) AND {self.predicate('a.', 0)}"
        )

    def _whole(self) -> str:
        return self.pick(
            (
                "SELECT * FROM iso.t",
                "SELECT count(*), min(n), max(n), min(v), max(v), min(da), max(ts), max(dc) FROM iso.t",
                "SELECT count(*) FROM iso.t",
                "SELECT n, v FROM iso.t ORDER BY n DESC, v DESC, id LIMIT 4",
                "SELECT min(id), max(id), count(v), count(b) FROM iso.t",
            )
        )

    def _by_key(self) -> str:
        columns = self.pick(("*", "v", "id, j, dc"))
        return f"SELECT {columns} FROM iso.t WHERE id = {self.pick((1, 2, 3, 104, 999))}"

    def _system_columns(self) -> str:
        return self.pick(
            (
                f"SELECT id, _seq > 0 FROM iso.t WHERE {self.predicate()}",
                "SELECT id, _deleted FROM iso.t WHERE _deleted",
                f"SELECT count(*) FROM iso.t WHERE NOT _deleted AND {self.number()} > 3",
            )
        )

    def _other_tables(self) -> str:
        return self.pick(
            (
                f"SELECT {self.number()} AS x, v FROM iso.w WHERE {self.predicate()}",
                f"SELECT count(*), sum({self.number()}) FROM iso.w",
                f"SELECT CAST(v AS INT) + {self.below(5)}, 10 / z FROM iso.s WHERE CAST(v AS INT) > {self.below(9)}",
                "SELECT count(*), max(v), min(z) FROM iso.s",
                f"SELECT a.id, s.v FROM iso.t a JOIN iso.s s ON CAST(s.v AS INT) = {self.number('a.')}",
            )
        )

    def faulty_query(self) -> str:
        """A SELECT that fails on rows of its own caller."""
        wrong = self.pick(
            ("CAST('x' || @v AS INT)", "1 / (@z - @z)", "CAST(@j AS INT)", "CAST(@n * 100000 AS SMALLINT)")
        )
        return f"SELECT {wrong.replace('@', 'a.')} FROM iso.t a WHERE a.v IS NOT NULL"

    # Writes

    def write(self) -> str:
        """A statement that changes rows; what it writes keeps to the rows of `cells`."""
        returning = self.pick(("", f" RETURNING id, {self.number()} AS x", " RETURNING *"))
        match self.below(8):
            case 0 | 1 | 2:
                changes = ", ".join(
                    {text[:2]: text for text in (self.assignment("a."), self.assignment("a."))}.values()
                )
                return f"UPDATE iso.t AS a SET {changes} WHERE {self.predicate('a.')}{returning}"
            case 3:
                return f"DELETE FROM iso.t AS a WHERE {self.predicate('a.')} AND {self.number('a.')} > 3{returning}"
            case 4:
                return f"DELETE FROM iso.t WHERE id = {self.below(12)}{returning}"
            case 5:
                return f"UPDATE iso.t SET {self.assignment('')} WHERE id = {self.below(12)}{returning}"
            case 6:
                shift = 100 * (self.below(4) + 1)
                return (
                    f"INSERT INTO iso.t (id, n, z, v) SELECT a.id + {shift}, a.n, a.z, a.v FROM iso.t a "
                    f"WHERE a.id < 20 AND {self.predicate('a.', 1)} ON CONFLICT DO NOTHING{returning}"
                )
            case _:
                keys = sorted({self.below(24) for _ in range(3)})
                rows = ", ".join(f"({key}, {key % 9 + 1}, {key % 5 + 1}, '{key}')" for key in keys)
                conflict = self.pick(
                    (
                        "",
                        " ON CONFLICT DO NOTHING",
                        " ON CONFLICT (id) DO UPDATE SET v = excluded.v, n = excluded.n",
                        " ON CONFLICT (id) DO UPDATE SET n = excluded.n WHERE 10 / t.z > 2 AND CAST(t.v AS INT) >= 0",
                    )
                )
                return f"INSERT INTO iso.t (id, n, z, v) VALUES {rows}{conflict}{returning}"

    def assignment(self, alias: str) -> str:
        """One `column = value` of SET."""
        whole = f"abs(CAST({self.number(alias)} AS BIGINT))"
        return self.pick(
            (
                f"n = {whole} % 9 + 1",
                f"z = CAST({whole} % 5 AS INT) + 1",
                f"v = CAST({whole} % 100 AS TEXT)",
                f"d = {whole} % 50 + 0.5",
                f"dc = {whole} % 50 + 0.25",
                """j = '{"k": 3, "s": "5", "a": [4]}'""",
                "v = NULL",
                "da = DATE '2020-01-09'",
            )
        )
