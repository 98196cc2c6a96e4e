"""Makes tests/data/format-1: a small data directory of the released format, with something of everything.

Run it once per format version, when the version is released, and never again for an old one:

    .venv/bin/python tests/data/make_format.py tests/data/format-1

What it writes is what `tests/test_formats.py` expects. The clock is simulated, so the times in it are fixed.
"""

from __future__ import annotations

import datetime as dt
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kalamdb
from kalamdb.app_context import AppContext
from kalamdb.config import Settings
from kalamdb.database import Database
from kalamdb.jobs import JobContext, Permanent
from kalamdb.testing.clock import SimulatedClock

MADE_AT_MS = 1_764_000_000_000
"""2025-11-24 16:00 UTC."""
SETTINGS = {
    "limits.batch_rows_max": 16,
    "flush.scheduler_enabled": False,
    "compaction.enabled": False,
    "storage.rocksdb.write_buffer_size": 1 << 20,
}
NOT_KEPT = ("LOCK", "LOG", "LOG.old.*", "OPTIONS-*")
"""Names the machine, or is written anew at each opening."""

TYPES = """
    id INT PRIMARY KEY, c_boolean BOOLEAN, c_smallint SMALLINT, c_bigint BIGINT, c_float FLOAT, c_double DOUBLE,
    c_decimal DECIMAL(20, 4), c_text TEXT, c_bytes BYTES, c_json JSON, c_timestamp TIMESTAMP, c_datetime DATETIME,
    c_date DATE, c_time TIME, c_uuid UUID, c_embedding EMBEDDING(3), c_file FILE
"""
SCHEMA = f"""
CREATE NAMESPACE app;
ALTER NAMESPACE app SET OPTIONS (owner = 'tests');
CREATE USER TABLE app.every_type_own ({TYPES});
CREATE SHARED TABLE app.every_type ({TYPES}) WITH (ACCESS_LEVEL = 'public');
CREATE USER TABLE app.notes (day DATE, number INT, title TEXT NOT NULL DEFAULT 'untitled', draft TEXT,
    words INT CHECK (words >= 0), made_at TIMESTAMP DEFAULT NOW(), author TEXT DEFAULT CURRENT_USER(),
    PRIMARY KEY (day, number)) WITH (FLUSH_POLICY = 'rows:1000,interval:600');
CREATE SHARED TABLE app.items (id BIGINT AUTO_INCREMENT PRIMARY KEY, name TEXT, key UUID DEFAULT UUID_V7(),
    tag TEXT DEFAULT ULID());
CREATE STREAM TABLE app.events (kind TEXT, at TIMESTAMP DEFAULT NOW()) WITH (TTL_SECONDS = 86400);
CREATE SHARED TABLE app.dropped (id INT PRIMARY KEY);
CREATE VIEW app.long_notes AS SELECT day, number, words FROM app.notes WHERE words > 100;
"""


def every_type(number: int) -> dict[str, Any]:
    """A row with a value in each column; number 0 gives NULL in all but the key."""
    if number == 0:
        return {"id": 0}
    return {
        "id": number,
        "c_boolean": bool(number % 2),
        "c_smallint": number - 32768,
        "c_bigint": number - 2**63,
        "c_float": number + 0.5,
        "c_double": number / 3,
        "c_decimal": f"{number}.0001",
        "c_text": f"text {number} äöü \u0000 zero",
        "c_bytes": bytes([0, number, 255]),
        "c_json": {"number": number, "list": [1, None, "x"]},
        "c_timestamp": dt.datetime(2025, 11, 24, 16, 0, 0, number),
        "c_datetime": dt.datetime(2025, 11, 24, 16, 0, 0, number, tzinfo=dt.UTC),
        "c_date": dt.date(2025, 11, number),
        "c_time": dt.time(16, number, 0, number),
        "c_uuid": f"00000000-0000-7000-8000-0000000000{number:02d}",
        "c_embedding": [number, 0.5, -1.0],
        "c_file": {"id": f"file-{number}", "size": number},
    }


def open_at(path: Path, clock: SimulatedClock) -> Database:
    """The database with a simulated clock; the settings are those of the format's test."""
    return Database(AppContext(path, Settings.load(SETTINGS, environment={}), clock=clock))


def run(db: Database, sql: str) -> None:
    """Run a statement that starts a job, and wait for it."""
    job = db.jobs.wait((db.execute(sql).message or "").rsplit(" ", 1)[1], timeout_s=30)
    assert job.status == "completed", f"{job.id} is {job.status}: {job.message}"


def fill_tables(db: Database) -> None:
    """Rows in level 1, in level 0 (flushed, and one large statement), and hot; marks and tombstones."""
    db.execute(SCHEMA)
    for number in range(4):
        db.insert("app.every_type", [every_type(number)])
        db.insert("app.every_type_own", [every_type(number)], user="anna")
        db.insert("app.every_type_own", [every_type(number)], user="Bertil/ö")
    for name in ("every_type", "every_type_own"):
        run(db, f"STORAGE FLUSH TABLE app.{name}")
    note = "INSERT INTO app.notes (day, number, title, draft, words) VALUES ('2025-11-24', $1, $2, $3, $4)"
    for user in ("anna", "bert"):
        for number in range(6):
            db.execute(note, [number, f"{user} {number}", "draft", 100 * number], user=user)
    run(db, "STORAGE FLUSH TABLE app.notes")
    db.execute("UPDATE app.notes SET words = words + 1 WHERE number = 1", user="anna")
    db.execute("DELETE FROM app.notes WHERE number = 2", user="anna")
    run(db, "STORAGE FLUSH TABLE app.notes")
    run(db, "STORAGE COMPACT TABLE app.notes")
    db.execute("ALTER TABLE app.notes DROP COLUMN draft")
    db.execute("ALTER TABLE app.notes ADD COLUMN state TEXT NOT NULL DEFAULT 'open'")
    db.execute("ALTER TABLE app.notes RENAME COLUMN title TO heading")
    db.execute("ALTER TABLE app.notes MODIFY COLUMN words BIGINT")
    many = [{"day": dt.date(2025, 11, 25), "number": number, "words": number} for number in range(40)]
    db.insert("app.notes", many, user="anna")
    db.execute("UPDATE app.notes SET state = 'done' WHERE number = 3", user="anna")
    db.execute("DELETE FROM app.notes WHERE number = 4", user="bert")
    db.execute("UPDATE app.notes SET words = 5000000000 WHERE number = 5", user="bert")
    for name in ("one", "two", "three"):
        db.execute("INSERT INTO app.items (name) VALUES ($1)", [name])
    db.insert("app.every_type", [every_type(4)])
    db.execute("DELETE FROM app.every_type WHERE id = 1")
    db.execute("INSERT INTO app.events (kind) VALUES ('opened'), ('closed')", user="anna")
    db.execute("INSERT INTO app.events (kind) VALUES ('opened')", user="bert")
    db.execute("INSERT INTO app.dropped VALUES (1)")
    run(db, "STORAGE FLUSH TABLE app.dropped")
    run(db, "DROP TABLE app.dropped")


def fill_jobs(db: Database) -> None:
    """Jobs in every state that a closed database can hold, but new and running."""

    @db.jobs.executor("good", prefix="GO")
    def good(ctx: JobContext[dict[str, Any]]) -> None:
        ctx.progress(3, 3, "pages", "done")
        ctx.checkpoint({"page": 3})
        ctx.log.info("three pages\nand a second line")

    @db.jobs.executor("bad", prefix="BA")
    def bad(ctx: JobContext[dict[str, Any]]) -> None:
        raise Permanent("the printer is on fire")

    @db.jobs.executor("flaky", prefix="FK")
    def flaky(ctx: JobContext[dict[str, Any]]) -> None:
        raise RuntimeError("no answer")

    assert db.jobs.wait(db.jobs.create_job("good", {"pages": 3}).id, 10).status == "completed"
    assert db.jobs.wait(db.jobs.create_job("bad", {}).id, 10).status == "failed"
    assert db.jobs.wait(db.jobs.create_job("flush", {"table_id": "app.notes_2"}).id, 10).status == "skipped"
    later = dt.datetime(2200, 1, 1, tzinfo=dt.UTC)
    db.jobs.create_job("good", {"pages": 4}, "good:later", run_at=later, priority=7, queue="slow")
    db.jobs.cancel_job(db.jobs.create_job("good", {}, run_at=later).id)
    waiting = db.jobs.create_job("flaky", {"host": "printer"}, max_retries=5)
    while db.jobs.get_job(waiting.id).status != "retrying":
        os.sched_yield()
    db.jobs.create_job("nobody", {"a": 1}, allow_unknown=True)


def crash(path: Path) -> None:
    """Write more and end the process without closing: RocksDB's log holds it."""
    db = open_at(path, SimulatedClock(start_ms=MADE_AT_MS + 60_000, seed=2))
    fill_jobs(db)
    db.execute("INSERT INTO app.items (name) VALUES ('four')")
    db.execute("UPDATE app.items SET name = 'second' WHERE name = 'two'")
    report = db.check()
    assert report.ok, report.problems
    os._exit(0)


def main() -> None:
    """Make the directory named by the argument."""
    path = Path(sys.argv[1])
    if "--crash" in sys.argv:
        crash(path)
    shutil.rmtree(path, ignore_errors=True)
    with open_at(path, SimulatedClock(start_ms=MADE_AT_MS, seed=1)) as db:
        fill_tables(db)
    subprocess.run([sys.executable, __file__, str(path), "--crash"], check=True)
    for pattern in NOT_KEPT:
        for found in path.rglob(pattern):
            found.unlink()
    print(f"{path}: {sum(one.stat().st_size for one in path.rglob('*') if one.is_file()):,} bytes")
    print(f"made with KalamDB {kalamdb.__version__}")


if __name__ == "__main__":
    main()
