"""Scans and groups of an append-only table against DataFusion on the same Parquet files and an in-memory batch."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
from datafusion import SessionConfig, SessionContext

import kalamdb
from bench.harness import Figure, median_ms
from kalamdb.database import Database

QUIET = {
    "flush.scheduler_enabled": False,
    "compaction.enabled": False,
    "hot.bytes_max": 1 << 30,
    "hot.cache_bytes_max": 1 << 30,
}
"""Nothing works beside what is measured."""
ROUNDS = 15
RATIO_MAX, EXTRA_MS_MAX = 1.5, 3.0
COLUMNS = "id BIGINT PRIMARY KEY, grp INT, kind TEXT, amount DOUBLE, qty INT, at TIMESTAMP"
QUERIES = {
    "count": "SELECT count(*) FROM {t}",
    "group by 100": "SELECT grp, count(*), sum(amount), avg(qty) FROM {t} GROUP BY grp",
    "group by text": "SELECT kind, count(*), max(amount) FROM {t} GROUP BY kind ORDER BY kind",
    "group by 10,000": "SELECT qty, sum(amount) FROM {t} GROUP BY qty ORDER BY 2 DESC LIMIT 10",
    "filter 1 %": "SELECT count(*), sum(amount) FROM {t} WHERE amount < 10.0",
    "filter 50 %, text": "SELECT sum(qty) FROM {t} WHERE kind < 'kind-4' AND grp <> 7",
    "filter to rows": "SELECT id, kind, amount FROM {t} WHERE qty = 77 AND grp < 50",
    "range of keys": "SELECT count(*), sum(qty) FROM {t} WHERE id BETWEEN 500000 AND 520000",
    "top 10": "SELECT id, amount FROM {t} ORDER BY amount DESC, id LIMIT 10",
}


def rows(first: int, count: int) -> pa.Table:
    """Rows with ids from `first`; the same for the same arguments."""
    random = np.random.default_rng(first)
    kinds = pa.array([f"kind-{number}" for number in range(8)])
    return pa.table(
        {
            "id": pa.array(np.arange(first, first + count)),
            "grp": pa.array(random.integers(0, 100, count, np.int32)),
            "kind": kinds.take(pa.array(random.integers(0, 8, count))),
            "amount": pa.array(random.random(count) * 1000),
            "qty": pa.array(random.integers(0, 10_000, count, np.int32)),
            "at": pa.array(np.arange(first, first + count) * 1_000_000, pa.timestamp("us")),
        }
    )


@contextmanager
def loaded(kind: str, cold: int, hot: int) -> Iterator[tuple[Database, list[Path]]]:
    """A table of `cold` rows in Parquet and `hot` rows in RocksDB, and its files."""
    settings = {**QUIET, "storage.durability": "os"}
    with tempfile.TemporaryDirectory() as folder, kalamdb.connect(folder, **settings) as db:
        db.execute("CREATE NAMESPACE b")
        db.execute(f"CREATE {kind} TABLE b.t ({COLUMNS})")
        for first in range(0, cold, 250_000):
            db.insert("b.t", rows(first, min(250_000, cold - first)))
        batch = db.context.settings["limits.batch_rows_max"]
        for first in range(cold, cold + hot, batch):
            db.insert("b.t", rows(first, min(batch, cold + hot - first)))
        yield db, sorted(Path(folder).rglob("*.parquet"))


def peer(files: list[Path], hot: pa.Table) -> SessionContext:
    """DataFusion with the files and the batch as one table; it stays open over all queries."""
    context = SessionContext(SessionConfig().with_target_partitions(2))
    context.register_parquet("cold", str(files[0].parent))
    names = hot.schema.names
    context.register_record_batches("hot", [hot.to_batches(max_chunksize=16_384)])
    columns = ", ".join(f"c{number} AS {name}" for number, name in enumerate(names, 1))
    union = context.sql(f"SELECT {columns} FROM cold UNION ALL SELECT {', '.join(names)} FROM hot")
    context.register_view("t", union)
    return context


def compare(kind: str, cold: int, hot: int) -> Iterator[Figure]:
    """Each query here and there, taking turns. Asserts that no anti-join is in any plan."""
    with loaded(kind, cold, hot) as (db, files):
        context = peer(files, rows(cold, hot))
        for name, sql in QUERIES.items():
            ours, theirs = sql.format(t="b.t"), sql.format(t="t")
            plan = str(db.execute(f"EXPLAIN {ours}").rows).lower()
            assert "anti" not in plan, f"an append-only table is read through an anti-join: {plan}"

            def run_ours(sql: str = ours) -> pa.Table:
                return db.execute(sql).arrow()

            def run_theirs(sql: str = theirs) -> pa.Table:
                return context.sql(sql).to_arrow_table()

            assert run_ours().num_rows == run_theirs().num_rows
            mine, other = median_ms(run_ours, run_theirs, rounds=ROUNDS)
            yield Figure(
                f"{kind}: {name}", f"{mine:.1f} ms", f"{other:.1f} ms", mine / other,
                f"at most {RATIO_MAX * other + EXTRA_MS_MAX:.1f} ms", mine <= RATIO_MAX * other + EXTRA_MS_MAX,
            )  # fmt: skip
