"""Writers against a dict while jobs flush and compact, round after round: `make soak`, for SOAK_MINUTES.

Each round opens the database anew, lets several threads write their own rows of a USER and of a SHARED
table, runs flush, compact and sweep jobs and schema changes beside them, then compares every row with the
model and asks `db.check()`. The first difference ends it with status 1 and the seed.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np

import kalamdb

MINUTES = float(os.environ.get("SOAK_MINUTES", "2"))
SEED = int(os.environ.get("SOAK_SEED", str(int(time.time_ns() // 1_000_000_000))))
ROUND_S = 5.0
WRITERS = 3
KEYS = 300
LARGE_ROWS = 150
SETTINGS = {"limits.batch_rows_max": 64, "compaction.level0_segments_max": 3, "flush.scheduler_enabled": False}
SCHEMA = """
CREATE NAMESPACE soak;
CREATE USER TABLE soak.own (id INT PRIMARY KEY, n INT, text TEXT);
CREATE SHARED TABLE soak.shared (owner TEXT, id INT, n INT, text TEXT, PRIMARY KEY (owner, id));
"""
Rows = dict[int, tuple[int, str]]


class Difference(Exception):
    """The database and the model do not agree."""


class Writer:
    """One thread's rows: those of user `name` in soak.own, and those that it owns in soak.shared."""

    def __init__(self, name: str, seed: int, counts: Counter[str]) -> None:
        self.name = name
        self.random = np.random.default_rng(seed)
        self.counts = counts
        self.own: Rows = {}
        self.shared: Rows = {}
        self.failure: BaseException | None = None

    def run(self, db: kalamdb.Database, stop: threading.Event) -> None:
        """Random operations until `stop`; a conflict means that nothing was written."""
        operations = [self.insert, self.upsert, self.update, self.delete, self.predicate, self.large, self.transact]
        while not stop.is_set() and self.failure is None:
            operation = operations[int(self.random.integers(len(operations)))]
            try:
                operation(db)
                self.counts[operation.__name__] += 1
            except kalamdb.TransactionConflict:
                self.counts["conflicts"] += 1
            except BaseException as exc:
                self.failure = exc

    def key(self) -> int:
        """A key."""
        return int(self.random.integers(KEYS))

    def value(self) -> tuple[int, str]:
        """A value."""
        n = int(self.random.integers(1_000_000))
        return n, f"text-{n % 97}"

    def insert(self, db: kalamdb.Database) -> None:
        """INSERT of a key that may exist."""
        key, (n, text) = self.key(), self.value()
        try:
            db.execute("INSERT INTO soak.own (id, n, text) VALUES ($1, $2, $3)", [key, n, text], user=self.name)
        except kalamdb.UniqueViolation:
            if key not in self.own:
                raise Difference(f"INSERT of {key} for {self.name} was refused, but it does not exist") from None
            return
        if key in self.own:
            raise Difference(f"INSERT of {key} for {self.name} was accepted, but it exists")
        self.own[key] = (n, text)

    def upsert(self, db: kalamdb.Database) -> None:
        """Insert or replace one row of the shared table."""
        key, (n, text) = self.key(), self.value()
        row = {"owner": self.name, "id": key, "n": n, "text": text}
        db.insert("soak.shared", [row], on_conflict="update")
        self.shared[key] = (n, text)

    def update(self, db: kalamdb.Database) -> None:
        """UPDATE by key."""
        key, (n, text) = self.key(), self.value()
        sql = "UPDATE soak.own SET n = $1, text = $2 WHERE id = $3"
        db.execute(sql, [n, text, key], user=self.name)
        if key in self.own:
            self.own[key] = (n, text)

    def delete(self, db: kalamdb.Database) -> None:
        """DELETE by key in both tables."""
        key = self.key()
        db.execute("DELETE FROM soak.own WHERE id = $1", [key], user=self.name)
        self.own.pop(key, None)
        key = self.key()
        db.execute("DELETE FROM soak.shared WHERE owner = $1 AND id = $2", [self.name, key])
        self.shared.pop(key, None)

    def predicate(self, db: kalamdb.Database) -> None:
        """UPDATE and DELETE by a predicate that the engine evaluates."""
        low = self.key()
        db.execute("UPDATE soak.own SET n = n + 1 WHERE id BETWEEN $1 AND $2", [low, low + 20], user=self.name)
        for key in self.own.keys() & set(range(low, low + 21)):
            self.own[key] = (self.own[key][0] + 1, self.own[key][1])
        db.execute("DELETE FROM soak.shared WHERE owner = $1 AND n % 31 = 0", [self.name])
        self.shared = {key: row for key, row in self.shared.items() if row[0] % 31}

    def large(self, db: kalamdb.Database) -> None:
        """More rows than limits.batch_rows_max: they become a segment."""
        keys = self.random.choice(KEYS, LARGE_ROWS, replace=False)
        rows = {int(key): self.value() for key in keys}
        data = [{"id": key, "n": n, "text": text} for key, (n, text) in rows.items()]
        db.insert("soak.own", data, user=self.name, on_conflict="update")
        self.own.update(rows)

    def transact(self, db: kalamdb.Database) -> None:
        """A transaction over both tables, committed or rolled back."""
        first, second = self.key(), self.key()
        (n, text), (m, other) = self.value(), self.value()
        keep = bool(self.random.integers(2))
        with db.transaction(user=self.name) as tx:
            tx.insert("soak.own", [{"id": first, "n": n, "text": text}], on_conflict="update")
            row = {"owner": self.name, "id": second, "n": m, "text": other}
            tx.insert("soak.shared", [row], on_conflict="update")
            seen = tx.execute("SELECT n FROM soak.own WHERE id = $1", [first]).scalar()
            if seen != n:
                raise Difference(f"a transaction of {self.name} wrote {n} under {first} and reads {seen}")
            if not keep:
                tx.rollback()
        if keep:
            self.own[first], self.shared[second] = (n, text), (m, other)

    def compare(self, db: kalamdb.Database) -> None:
        """Every row of this writer against the model."""
        own = db.execute("SELECT id, n, text FROM soak.own", user=self.name).rows
        shared = db.execute("SELECT id, n, text FROM soak.shared WHERE owner = $1", [self.name]).rows
        for where, found, model in (("soak.own", own, self.own), ("soak.shared", shared, self.shared)):
            rows = {key: (n, text) for key, n, text in found}
            if len(rows) != len(found) or rows != model:
                wrong = sorted(key for key in rows.keys() | model.keys() if rows.get(key) != model.get(key))
                raise Difference(
                    f"{where} of {self.name}: {len(found)} rows, the model has {len(model)}; "
                    f"they differ at {wrong[:10]}"
                )


def maintain(db: kalamdb.Database, number: int, counts: Counter[str]) -> None:
    """One job or schema change beside the writers."""
    table = ("soak.own", "soak.shared")[number % 2]
    if number % 20 == 19:
        db.execute(f"ALTER TABLE {table} ADD COLUMN c{number} INT DEFAULT {number}")
        db.execute(f"ALTER TABLE {table} DROP COLUMN c{number}")
        counts["alters"] += 2
        return
    job_type = ("flush", "compact", "flush", "cleanup")[number // 2 % 4]
    params = {"operation": "sweep"} if job_type == "cleanup" else {"table_id": table}
    job = db.jobs.wait(db.jobs.create_job(job_type, params, on_conflict="return").id, timeout_s=60)
    if job.status not in ("completed", "skipped"):
        raise Difference(f"job {job.id} ({job_type}) is {job.status}: {job.message}")
    counts[f"{job_type} {job.status}"] += 1


def play(path: Path, writers: list[Writer], round_s: float, counts: Counter[str]) -> None:
    """One round: open, write and maintain, compare, check, close."""
    with kalamdb.connect(path, **SETTINGS) as db:
        stop = threading.Event()
        threads = [threading.Thread(target=writer.run, args=(db, stop)) for writer in writers]
        for thread in threads:
            thread.start()
        try:
            end, number = time.monotonic() + round_s, 0
            while time.monotonic() < end and all(writer.failure is None for writer in writers):
                maintain(db, number, counts)
                number += 1
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        for writer in writers:
            if writer.failure is not None:
                raise writer.failure
            writer.compare(db)
        report = db.check()
        if not report.ok:
            raise Difference(f"db.check() found: {report.problems}")
    counts["rounds"] += 1


def main() -> int:
    """Run for SOAK_MINUTES; the exit status."""
    counts: Counter[str] = Counter()
    writers = [Writer(f"user{number}", SEED + number, counts) for number in range(WRITERS)]
    print(f"seed {SEED}, {MINUTES:g} minutes, rounds of {ROUND_S:g} s", flush=True)
    end = time.monotonic() + MINUTES * 60
    with tempfile.TemporaryDirectory(prefix="kalamdb-soak-") as folder:
        path = Path(folder) / "data"
        with kalamdb.connect(path, **SETTINGS) as db:
            db.execute(SCHEMA)
        try:
            while time.monotonic() < end:
                play(path, writers, ROUND_S, counts)
                print(", ".join(f"{name} {count:,}" for name, count in sorted(counts.items())), flush=True)
        except (Difference, kalamdb.KalamDbError) as exc:
            print(f"FAILED with seed {SEED}: {type(exc).__name__}: {exc}", flush=True)
            return 1
    print("no difference", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
