"""The engine's contexts: used again, yet each query sees its own tables only."""

from __future__ import annotations

import threading

import pyarrow as pa
import pytest

from kalamdb.errors import InvalidRequest
from kalamdb.sql.engine import Engine, EngineLimits, TableSource


def table(namespace: str, name: str, *values: int) -> TableSource:
    return TableSource(namespace, name, pa.table({"v": pa.array(values, pa.int64())}))


def test_a_query_sees_no_table_of_the_query_before_it() -> None:
    engine = Engine(EngineLimits(), {})
    sources = [table("default", "mine", 1), table("other", "yours", 2)]
    sql = "SELECT mine.v + yours.v AS s FROM mine, other.yours"
    assert engine.query(sql, sources).table(1 << 20)["s"].to_pylist() == [3]
    for name in ("mine", "other.yours", "default.mine"):
        with pytest.raises(InvalidRequest, match="not found"):
            engine.query(f"SELECT * FROM {name}", [table("default", "theirs", 3)])
        assert engine.query("SELECT v FROM theirs", [table("default", "theirs", 3)]).table(99)["v"].to_pylist() == [3]


def test_a_name_means_the_table_of_this_query_while_another_runs() -> None:
    engine = Engine(EngineLimits(), {})
    running = engine.query("SELECT v FROM t ORDER BY v", [table("default", "t", *range(50_000))])
    assert engine.query("SELECT v FROM t", [table("default", "t", 7)]).table(99)["v"].to_pylist() == [7]
    assert running.table(1 << 20)["v"].to_pylist() == list(range(50_000))


def test_threads_that_share_an_engine_get_their_own_rows() -> None:
    engine = Engine(EngineLimits(), {})
    wrong: list[object] = []

    def ask(number: int) -> None:
        for _ in range(20):
            found = engine.query("SELECT v FROM t", [table("default", "t", number)]).table(99)["v"].to_pylist()
            if found != [number]:
                wrong.append(found)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_now_is_the_moment_of_each_query() -> None:
    engine = Engine(EngineLimits(), {})
    first, second = (engine.query("SELECT now() AS at", []).table(99)["at"][0].as_py() for _ in range(2))
    assert first < second
