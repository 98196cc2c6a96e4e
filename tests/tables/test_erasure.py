"""Bytes of what was erased: found before in every kind of file, and nowhere after."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from kalamdb.app_context import AppContext
from kalamdb.clock import SystemClock
from kalamdb.config import Settings
from kalamdb.database import Database
from kalamdb.jobs import Completed, JobContext
from kalamdb.storage import Batch, RecordKind
from kalamdb.storage.rocks import RocksKv
from kalamdb.storage.spaces import Space
from kalamdb.users import expired_audit_ops
from tests.conftest import run_job

USER, TEXT, DELETED = "gone-7d1f", "MARK-5e0a", "DELETED-9c3b"
AUDIT = bytes([Space.RECORD, RecordKind.AUDIT])
_HOUR_MS = 3_600_000


class SteppedClock(SystemClock):
    """The machine's clock, moved by steps."""

    offset_ms = 0

    def now_ms(self) -> int:
        return super().now_ms() + self.offset_ms


Open = Callable[[bool], Database]


@pytest.fixture
def clock() -> SteppedClock:
    return SteppedClock()


@pytest.fixture
def open_db(tmp_path: Path, clock: SteppedClock) -> Iterator[Open]:
    opened: list[Database] = []

    def open_(compressed: bool) -> Database:
        quiet = {"flush.scheduler_enabled": False, "compaction.enabled": False, "storage.compression": compressed}
        db = Database(AppContext(tmp_path / "data", Settings.load(quiet, environment={}), clock=clock))

        @db.jobs.executor("mail", prefix="MA", max_retries=1)
        def mail(ctx: JobContext[Any]) -> Completed:
            ctx.log.info(f"writing to {ctx.params['to']}")
            if ctx.attempt == 1:
                ctx.checkpoint({"to": ctx.params["to"]})
                raise RuntimeError(f"{ctx.params['to']} does not answer")
            return Completed(f"mailed {ctx.params['to']}", {"sent": [ctx.params["to"]]})

        opened.append(db)
        return db

    yield open_
    for db in opened:
        db.close()


def fill(db: Database) -> None:
    """Rows of two users in both tiers, replaced and deleted ones, a stream, and jobs that name the users."""
    db.execute("CREATE NAMESPACE app")
    db.execute("CREATE USER TABLE app.u (id INT PRIMARY KEY, v TEXT) WITH (DELETED_RETENTION_HOURS = 1)")
    db.execute("CREATE STREAM TABLE app.e (v TEXT) WITH (TTL_SECONDS = 360000)")
    for user, text in ((USER, TEXT), ("kept", "other")):
        db.execute(f"CREATE USER '{user}' EMAIL '{user}@example.org'")
        db.insert("app.u", [{"id": key, "v": f"{text} {key}"} for key in range(20)], user=user)
    db.insert("app.u", [{"id": key, "v": f"{DELETED} {key}"} for key in (100, 101)], user="kept")
    run_job(db, "STORAGE FLUSH TABLE app.u")
    db.execute("DELETE FROM app.u WHERE id >= 100", user="kept")
    for user, text in ((USER, TEXT), ("kept", "other")):
        db.execute("UPDATE app.u SET v = $1 WHERE id < 5", [f"{text} updated"], user=user)
        db.execute("INSERT INTO app.e VALUES ($1)", [text], user=user)
        job = db.jobs.create_job("mail", {"to": user, user: [user]}, f"mail:{user}", created_by=user)
        assert db.jobs.wait(job.id, 20).status == "completed"


def erase(db: Database, clock: SteppedClock) -> None:
    """Purge the user, and remove the deleted rows of the other."""
    run_job(db, f"PURGE USER '{USER}'")
    clock.offset_ms = 2 * _HOUR_MS
    job = db.jobs.wait(db.jobs.create_job("retention").id, 20)
    assert job.status == "completed" and "Removed 2 deleted rows" in str(job.message)


def entries(db: Database) -> Iterator[tuple[bytes, bytes]]:
    """What the store holds but for the audit log, which keeps who purged whom."""
    kv = db.context.backend._kv
    assert isinstance(kv, RocksKv)
    return ((key, value) for key, value in kv.scan(b"", b"\xff") if not key.startswith(AUDIT))


def segment_texts(root: Path) -> Iterator[str]:
    """Values of all columns, statistics of all column chunks, and the key-value metadata of all segments."""
    for path in root.rglob("*.parquet"):
        file = pq.ParquetFile(path)
        for column in file.read().columns:
            yield str(column.to_pylist())
        yield str(file.metadata.metadata)
        for group in range(file.metadata.num_row_groups):
            for column in range(file.metadata.num_columns):
                statistics = file.metadata.row_group(group).column(column).statistics
                if statistics is not None and statistics.has_min_max:
                    yield f"{statistics.min!r} {statistics.max!r}"


def decoded(db: Database, folder: Path, marker: str) -> set[str]:
    """The kinds of places in which a marker is found."""
    raw, segments, found = marker.encode(), db.context.store.root, set()
    if any(raw in key for key, _ in entries(db)):
        found.add("key")
    if any(raw in value for _, value in entries(db)):
        found.add("value")
    if any(marker in text for text in segment_texts(segments)):
        found.add("segment")
    if any(marker in path.read_text() for path in segments.rglob("manifest.json")):
        found.add("mirror")
    if any(marker in path.read_text() for path in (folder / "logs").iterdir()):
        found.add("jobs.log")
    for table in ("jobs", "job_attempts", "job_events", "users"):
        if marker in str(db.execute(f"SELECT * FROM system.{table}").rows):
            found.add(table)
    return found


def in_bytes(folder: Path, marker: str) -> set[str]:
    """Names of the files that hold a marker."""
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and marker.encode() in path.read_bytes()
    }


def test_markers_of_a_purged_user_and_of_expired_rows_are_decoded_nowhere(
    open_db: Open, tmp_path: Path, clock: SteppedClock
) -> None:
    db, folder = open_db(True), tmp_path / "data"
    fill(db)
    everywhere = {"key", "value", "segment", "jobs.log", "jobs", "job_attempts", "job_events", "users"}
    assert decoded(db, folder, USER) >= everywhere
    assert decoded(db, folder, TEXT) >= {"value", "segment"} and decoded(db, folder, DELETED) >= {"segment"}
    erase(db, clock)
    for marker in (USER, TEXT, DELETED):
        assert decoded(db, folder, marker) == set(), marker
    assert decoded(db, folder, "kept") >= everywhere
    assert db.execute("SELECT count(*) FROM app.u", user="kept").scalar() == 20
    [mail] = [job for job in db.jobs.list_jobs(job_type="mail") if job.created_by != "kept"]
    assert mail.parameters == {"to": "[ERASED]", "[ERASED]": ["[ERASED]"]} and mail.created_by == "[ERASED]"
    assert (mail.message, mail.result) == ("mailed [ERASED]", {"sent": ["[ERASED]"]})
    assert f"[{mail.id}] INFO - writing to [ERASED]" in (folder / "logs" / "jobs.log").read_text()
    assert db.check().problems == []


def test_markers_are_in_no_byte_of_any_file_once_nothing_is_compressed(
    open_db: Open, tmp_path: Path, clock: SteppedClock
) -> None:
    db, folder = open_db(False), tmp_path / "data"
    fill(db)
    for marker in (USER, TEXT, DELETED):
        found = in_bytes(folder, marker)
        assert any(name.endswith(".parquet") for name in found), marker
        assert any(name.endswith((".log", ".sst")) and "rocksdb" in name for name in found), marker
    erase(db, clock)
    assert in_bytes(folder, TEXT) == in_bytes(folder, DELETED) == set()
    # The audit log keeps the name as long as it keeps its entries.
    db.context.backend.commit(Batch(records=expired_audit_ops(db.context.backend, clock.now_ms() + 1, 1000)))
    db.context.backend.purge((), records=True)
    assert {name for name in in_bytes(folder, USER) if "MANIFEST" not in name} == set()
    db.close()
    reopened = open_db(False)
    assert in_bytes(folder, USER) == set()
    assert reopened.check().problems == []
    assert reopened.execute("SELECT count(*) FROM app.u", user="kept").scalar() == 20


def test_the_job_that_erased_a_user_keeps_no_name_and_a_repetition_finds_nothing(open_db: Open) -> None:
    db = open_db(True)
    fill(db)
    message = db.execute(f"PURGE USER '{USER}'").message or ""
    job = db.jobs.wait(message.rsplit(" ", 1)[1], 20)
    assert job.parameters == {"user_id": "[ERASED]"} and job.idempotency_key is None
    again = run_job(db, f"PURGE USER '{USER}'")
    assert again.startswith("Erased 1 user: 0 cold rows")


def test_jobs_that_have_not_ended_and_words_that_only_contain_the_name_are_left_alone(open_db: Open) -> None:
    db = open_db(True)
    db.execute("CREATE USER ann")
    db.jobs.pause_queue("later")
    waiting = db.jobs.create_job("mail", {"to": "ann"}, "mail:ann", queue="later")
    db.jobs.executor("note", prefix="NO")(lambda ctx: Completed("told mail_ann of an annual sum, Ann"))
    ended = db.jobs.wait(db.jobs.create_job("note").id, 20)
    run_job(db, "PURGE USER ann")
    assert db.jobs.get_job(ended.id).message == "told mail_[ERASED] of an annual sum, Ann"
    assert db.jobs.get_job(waiting.id).parameters == {"to": "ann"}
    db.jobs.resume_queue("later")
    assert db.jobs.wait(waiting.id, 20).message == "mailed ann"
    assert db.check().problems == []
