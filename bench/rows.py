"""Inserts, point reads, flush, with sqlite3 of the standard library as peer."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import kalamdb
from bench.harness import Figure, rate
from bench.scans import COLUMNS, QUIET, rows
from kalamdb.database import Database

SYNCHRONOUS = {"commit": "FULL", "os": "NORMAL"}
"""What sqlite3 in WAL mode calls the same durability."""
SETTINGS = "WAL, synchronous={}"
INSERT = "INSERT INTO {} VALUES (?, ?, ?, ?, ?, ?)"


@contextmanager
def databases(durability: str) -> Iterator[tuple[Database, sqlite3.Connection]]:
    """An empty table in each, both with the same durability."""
    settings = {**QUIET, "storage.durability": durability}
    with tempfile.TemporaryDirectory() as folder, kalamdb.connect(Path(folder) / "ours", **settings) as db:
        with closing(sqlite3.connect(Path(folder) / "peer", isolation_level=None)) as peer:
            db.execute("CREATE NAMESPACE b")
            db.execute(f"CREATE SHARED TABLE b.t ({COLUMNS})")
            peer.execute("PRAGMA journal_mode = WAL")
            peer.execute(f"PRAGMA synchronous = {SYNCHRONOUS[durability]}")
            peer.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, grp INT, kind TEXT, amount REAL, qty INT, at TEXT)")
            yield db, peer


def _plain(first: int, count: int) -> list[tuple[object, ...]]:
    return [tuple(row.values()) for row in rows(first, count).to_pylist()]


def _for_sqlite(plain: list[tuple[object, ...]]) -> list[tuple[object, ...]]:
    return [(*row[:-1], str(row[-1])) for row in plain]


def _figure(name: str, unit: str, ours: float, peer: float | None, note: str) -> Figure:
    ratio = None if peer is None else ours / peer
    return Figure(name, f"{ours:,.0f} {unit}/s", "" if peer is None else f"{peer:,.0f} {unit}/s", ratio, note)


def inserts(durability: str, *, hot: int, large: int, single: int) -> Iterator[Figure]:
    """Bulk inserts hot and as a segment, inserts of one row, point reads in both tiers, a flush."""
    note = f"durability {durability}; peer: sqlite3 {SETTINGS.format(SYNCHRONOUS[durability])}"
    with databases(durability) as (db, peer):
        batch = db.context.settings["limits.batch_rows_max"]
        parts = [rows(first, min(batch, hot - first)) for first in range(0, hot, batch)]
        plain = [_for_sqlite(_plain(first, min(batch, hot - first))) for first in range(0, hot, batch)]
        yield _figure(
            "bulk insert, hot", "rows", rate(lambda: _ours(db, parts)), rate(lambda: _peers(peer, plain)), note
        )
        yield from points(db, peer, hot, "hot", note)
        speed = rate(lambda: _flush(db, hot))
        yield _figure(f"flush of {hot:,} rows", "rows", speed, None, f"durability {durability}")
        yield from points(db, peer, hot, "cold", note)
        big, tuples = rows(1 << 30, large), _for_sqlite(_plain(1 << 30, large))
        ours = rate(lambda: db.insert("b.t", big))
        yield _figure(f"one insert of {large:,}", "rows", ours, rate(lambda: _peers(peer, [tuples])), note)
        loose = _plain(1 << 31, single)
        ours = rate(lambda: _each(lambda row: db.execute(INSERT.format("b.t"), row), loose))
        theirs = rate(lambda: _each(lambda row: peer.execute(INSERT.format("t"), row), _for_sqlite(loose)))
        yield _figure("insert of one row by SQL", "rows", ours, theirs, note)


def points(
    db: Database, peer: sqlite3.Connection, count: int, tier: str, note: str, reads: int = 3_000
) -> Iterator[Figure]:
    """Whole rows by primary key, spread over the table."""
    wanted = [(number * 7919 % count,) for number in range(reads)]
    ours = rate(lambda: _each(lambda key: db.execute("SELECT * FROM b.t WHERE id = $1", key).fetchone(), wanted))
    theirs = rate(lambda: _each(lambda key: peer.execute("SELECT * FROM t WHERE id = ?", key).fetchone(), wanted))
    yield _figure(f"point read, {tier}", "rows", ours, theirs, note)


def _each(call: Callable[[tuple[object, ...]], object], arguments: list[tuple[object, ...]]) -> int:
    for one in arguments:
        call(one)
    return len(arguments)


def _ours(db: Database, parts: list[object]) -> int:
    return sum(db.insert("b.t", part) for part in parts)


def _peers(peer: sqlite3.Connection, parts: list[list[tuple[object, ...]]]) -> int:
    for part in parts:
        peer.execute("BEGIN")
        peer.executemany(INSERT.format("t"), part)
        peer.execute("COMMIT")
    return sum(map(len, parts))


def _flush(db: Database, count: int) -> int:
    message = db.execute("STORAGE FLUSH TABLE b.t").message or ""
    job = db.jobs.wait(message.rsplit(" ", 1)[1], timeout_s=600)
    assert job.status == "completed", job.message
    return count
