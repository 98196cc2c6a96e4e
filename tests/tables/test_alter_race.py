"""A table that is altered while a statement is under way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import kalamdb
from kalamdb.database import Database
from tests.conftest import Open


@pytest.mark.parametrize("count", [1, 10], ids=["hot", "segment"])
@pytest.mark.parametrize("kind", ["USER", "SHARED"])
def test_a_bulk_insert_into_a_table_that_is_altered_meanwhile_asks_to_be_repeated(
    open_db: Open, kind: str, count: int
) -> None:
    db = open_db(limits_batch_rows_max=4)
    db.execute(f"CREATE {kind} TABLE t (id INT PRIMARY KEY)")
    with pytest.raises(kalamdb.TransactionConflict, match=r"'default\.t' was altered") as caught:
        db.insert("t", _altering(db, "t", count))
    assert caught.value.retryable
    assert db.execute("SELECT count(*) FROM t").scalar() == 0
    assert db.insert("t", [{"id": number} for number in range(count)]) == count


def test_an_insert_into_a_stream_that_is_altered_meanwhile_asks_to_be_repeated(open_db: Open) -> None:
    db = open_db()
    db.execute("CREATE STREAM TABLE s (id INT) WITH (TTL_SECONDS = 60)")
    with pytest.raises(kalamdb.TransactionConflict, match=r"'default\.s' was altered"):
        db.insert("s", _altering(db, "s", 2))
    assert db.execute("SELECT count(*) FROM s").scalar() == 0


def _altering(db: Database, table: str, count: int) -> Iterator[dict[str, Any]]:
    """Rows that alter the table when they are taken, after the statement looked the table up."""
    db.execute(f"ALTER TABLE {table} ADD COLUMN note TEXT")
    yield from ({"id": number} for number in range(count))
