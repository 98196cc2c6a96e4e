"""What a call costs in an attached process, beside the same call in the process that holds the directory."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import kalamdb
from bench.harness import Figure, median_ms
from bench.scans import QUIET
from kalamdb.database import Database

OVERHEAD_MAX_US = 150.0
_ROWS = 1_000
_ATTACHED = """
import sys, kalamdb
from bench.sharing import QUIET, measured
with kalamdb.connect(sys.argv[1], **QUIET) as db:
    assert not db.is_holder
    print(*measured(db, int(sys.argv[2]), int(sys.argv[3])))
"""
NAMES = ("point SELECT", "INSERT of one row", "SELECT of 1,000 rows")


def measured(db: Database, rounds: int, first: int) -> list[float]:
    """Median ms of each call of `NAMES`; new rows get ids from `first`."""
    ids = count(first)
    return [
        *median_ms(lambda: db.execute("SELECT v FROM t WHERE id = $1", [7]).rows, rounds=rounds),
        *median_ms(lambda: db.execute("INSERT INTO t VALUES ($1, $2)", [next(ids), "x"]), rounds=rounds),
        *median_ms(lambda: db.execute(f"SELECT id, v FROM t WHERE id < {_ROWS}").rows, rounds=max(rounds // 20, 5)),
    ]


def sharing(durability: str, *, rounds: int) -> Iterator[Figure]:
    """The calls in a process of its own and in the holder, one after the other, twice; the better of each."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data"
        with kalamdb.connect(path, share=True, **{**QUIET, "storage.durability": durability}) as db:
            db.execute("CREATE SHARED TABLE t (id INT PRIMARY KEY, v TEXT)")
            db.insert("t", [{"id": at, "v": f"row {at}"} for at in range(_ROWS)])
            here, there = [], []
            for turn in (1, 2):
                command = [sys.executable, "-c", _ATTACHED, str(path), str(rounds), str(turn * 10_000_000)]
                said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                there.append([float(word) for word in said.split()])
                here.append(measured(db, rounds, turn * 10_000_000 + 5_000_000))
    best_here, best_there = map(min, zip(*here, strict=True)), map(min, zip(*there, strict=True))
    for name, ours, theirs in zip(NAMES, best_there, best_here, strict=True):
        over_us = (ours - theirs) * 1000
        passed = over_us < OVERHEAD_MAX_US if name == NAMES[0] else None
        note = f"durability {durability}; round trip {over_us:,.0f} us"
        yield Figure(name, f"{ours * 1000:,.0f} us", f"{theirs * 1000:,.0f} us", ours / theirs, note, passed)
