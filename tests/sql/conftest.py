"""A database in memory with the namespace `app`, and short ways to talk to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import kalamdb
from kalamdb.database import Database
from tests.conftest import run_job


@pytest.fixture
def db() -> Iterator[Database]:
    """Quiet: no scheduler works beside the test."""
    quiet = {"flush.scheduler_enabled": False, "compaction.enabled": False}
    with kalamdb.connect(":memory:", **quiet) as database:
        database.execute("CREATE NAMESPACE app")
        yield database


def rows(db: Database, sql: str, params: Any = None, **caller: Any) -> list[tuple[Any, ...]]:
    """All rows of a query."""
    return db.execute(sql, params, **caller).rows


def refused(db: Database, sql: str, params: Any = None, **caller: Any) -> str:
    """The message of the error that a statement must raise."""
    with pytest.raises(kalamdb.KalamDbError) as caught:
        db.execute(sql, params, **caller)
    return str(caught.value)


def flush(db: Database, table: str) -> None:
    """Move the hot rows of a table to a segment."""
    run_job(db, f"STORAGE FLUSH TABLE {table}")


def compact(db: Database, table: str) -> None:
    """Merge the segments of a table."""
    run_job(db, f"STORAGE COMPACT TABLE {table}")
