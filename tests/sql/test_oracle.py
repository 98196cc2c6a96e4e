"""An independent oracle: DuckDB answers the same SELECTs over the same flights, whatever tier they are in."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pytest

import kalamdb
from tests.sql.flights import NAMESPACE, TIERS, USER, Twins, data

QUIET = {"flush.scheduler_enabled": False, "compaction.enabled": False, "hot.bytes_max": 1 << 30}


def statements(file: str) -> dict[str, str]:
    """The statements of a file by the name above each."""
    parts = (Path(__file__).parent / file).read_text().split("-- name: ")[1:]
    return {part.split("\n")[0]: part.split("\n", 1)[1].split(";")[0] for part in parts}


SELECTS = statements("oracle.sql")
LOOKUPS = statements("oracle_keys.sql")


def same(ours: Any, theirs: Any) -> bool:
    """Equal values; floats by tolerance, numbers whatever their Python type."""
    if ours is None or theirs is None or isinstance(ours, bool) or isinstance(theirs, bool):
        return ours is theirs
    if isinstance(ours, float) or isinstance(theirs, float):
        if not isinstance(ours, (int, float, Decimal)) or not isinstance(theirs, (int, float, Decimal)):
            return False
        return math.isclose(ours, theirs, rel_tol=1e-9, abs_tol=1e-9)
    if isinstance(ours, (int, Decimal)) and isinstance(theirs, (int, Decimal)):
        return ours == theirs
    return type(ours) is type(theirs) and ours == theirs


def assert_same(ours: list[tuple[Any, ...]], theirs: list[tuple[Any, ...]]) -> None:
    assert len(ours) == len(theirs)
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert len(one) == len(other) and all(map(same, one, other)), f"row {number}: {one}, DuckDB {other}"


def ask(twins: Twins, sql: str) -> list[tuple[Any, ...]]:
    return twins.db.execute(sql, user=USER, namespace=NAMESPACE).rows


@contextmanager
def opened(path: Path) -> Iterator[Twins]:
    with kalamdb.connect(path, **QUIET) as db, duckdb.connect() as duck:
        yield Twins(db, duck)


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Twins, list[str]]]:
    """Both databases and the tiers that the flights have been through."""
    with opened(tmp_path_factory.mktemp("flights") / "data") as twins:
        yield twins, []


@pytest.fixture(scope="module", params=TIERS)
def twins(request: pytest.FixtureRequest, history: tuple[Twins, list[str]]) -> Twins:
    """One of 16 flights in both databases, moved on into the tier of that name; tests only read them."""
    twins, passed = history
    wanted = list(TIERS)[: list(TIERS).index(request.param) + 1]
    assert passed == wanted[: len(passed)], "tiers come in order"
    for tier in wanted[len(passed) :]:
        TIERS[tier](twins, data(16))
        passed.append(tier)
    return twins


@pytest.mark.parametrize("name", SELECTS)
def test_a_select_answers_as_duckdb_does(twins: Twins, name: str) -> None:
    assert_same(ask(twins, SELECTS[name]), twins.duck.execute(SELECTS[name]).fetchall())


@pytest.mark.parametrize("name", LOOKUPS)
def test_a_look_up_by_key_answers_as_duckdb_does(twins: Twins, name: str) -> None:
    assert_same(ask(twins, LOOKUPS[name]), twins.duck.execute(LOOKUPS[name]).fetchall())


@pytest.mark.long
def test_all_flights_answer_as_duckdb_does_in_every_tier(tmp_path: Path) -> None:
    rows = data(1)
    with opened(tmp_path / "data") as twins:
        for tier, advance in TIERS.items():
            advance(twins, rows)
            for name, sql in {**SELECTS, **LOOKUPS}.items():
                try:
                    assert_same(ask(twins, sql), twins.duck.execute(sql).fetchall())
                except AssertionError as exc:
                    raise AssertionError(f"{tier} {name}: {exc}") from exc
        assert twins.db.check().ok


@pytest.mark.parametrize("predicate", ["price = {}", "{} = price", "price IN (1.5, {})", "price BETWEEN {} AND {}"])
@pytest.mark.parametrize("amount", ["73786.99", "999999.99", "-999999.99", "0.10"])
def test_an_amount_equals_itself_however_large_it_is(predicate: str, amount: str) -> None:
    with kalamdb.connect(":memory:", **QUIET) as db:
        db.execute("CREATE NAMESPACE m")
        db.execute("CREATE SHARED TABLE m.t (id INT PRIMARY KEY, price DECIMAL(12,2), half DOUBLE)")
        db.insert("m.t", [(1, Decimal(amount), 0.5), (2, Decimal("2.22"), 1e300), (3, None, None)])
        assert db.execute(f"SELECT id FROM m.t WHERE {predicate.format(amount, amount)}").rows == [(1,)]
        where = predicate.format("$1", "$1")
        assert db.execute(f"SELECT id FROM m.t WHERE {where}", [Decimal(amount)]).rows == [(1,)]
        assert db.execute(f"SELECT id FROM m.t GROUP BY id HAVING max(price) = {amount}").rows == [(1,)]
        assert db.execute("SELECT id FROM m.t WHERE half > 0.75").rows == [(2,)]


def test_values_of_mixed_types_are_read_by_the_type_of_the_column() -> None:
    with kalamdb.connect(":memory:", **QUIET) as db:
        db.execute("CREATE NAMESPACE m")
        db.execute("CREATE SHARED TABLE m.t (id INT PRIMARY KEY, price DECIMAL(12,2))")
        db.insert("m.t", [(1, Decimal("1.25")), (2, 2.5), (3, "3.75"), (4, 4), (5, None)])
        assert db.execute("SELECT sum(price) FROM m.t").scalar() == Decimal("11.50")
        with pytest.raises(kalamdb.InvalidRequest, match="column 'price': <object .* is not a valid DECIMAL"):
            db.insert("m.t", [(6, Decimal("1.25")), (7, object())])
