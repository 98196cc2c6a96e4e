"""Data directories of each released format open, read as they were written, and can be written.

`tests/data/make_format.py` made them; nobody makes an old one anew.
"""

from __future__ import annotations

import datetime as dt
import json
import shutil
import uuid
import zlib
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

import kalamdb
from kalamdb.database import Database
from kalamdb.testing.clock import SimulatedClock
from tests.conftest import run_job
from tests.data.make_format import MADE_AT_MS, every_type, open_at

FORMATS = sorted((Path(__file__).parent / "data").glob("format-*"))
MADE_AT = dt.datetime.fromtimestamp(MADE_AT_MS / 1000, dt.UTC).replace(tzinfo=None)


@pytest.fixture(params=FORMATS, ids=lambda path: path.name)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A copy of the directory, opened an hour after it was made."""
    shutil.copytree(request.param, tmp_path / "data")
    with open_at(tmp_path / "data", SimulatedClock(start_ms=MADE_AT_MS + 3_600_000, seed=3)) as db:
        yield db


def as_read(row: dict[str, Any]) -> dict[str, Any]:
    """A row of every_type as a SELECT gives it back."""
    full = dict.fromkeys(every_type(1)) | row
    if len(row) > 1:
        full["c_decimal"] = Decimal(full["c_decimal"])
        full["c_uuid"] = uuid.UUID(full["c_uuid"])
    return full


def test_there_is_data_of_the_present_format() -> None:
    assert [path.name for path in FORMATS] == ["format-1"]


@pytest.mark.parametrize("numbers", [[0, 2, 3, 4]])
def test_values_of_every_type_read_as_they_were_written(old: Database, numbers: list[int]) -> None:
    rows = old.execute("SELECT * FROM app.every_type ORDER BY id").dicts()
    assert rows == [as_read(every_type(number)) for number in numbers]
    for user in ("anna", "Bertil/ö"):
        own = old.execute("SELECT * FROM app.every_type_own ORDER BY id", user=user).dicts()
        assert own == [as_read(every_type(number)) for number in range(4)]
    assert old.execute("SELECT count(*) FROM app.every_type_own", user="nobody").scalar() == 0


def test_a_table_with_an_altered_schema_reads_rows_of_all_its_versions(old: Database) -> None:
    columns = "SELECT column_name, data_type FROM system.describe WHERE column_name IN ('heading', 'words', 'state')"
    assert dict(old.execute(columns).rows) == {"heading": "TEXT", "words": "BIGINT", "state": "TEXT"}
    assert "draft" not in old.execute("SELECT * FROM app.notes LIMIT 1").columns
    first = (
        "SELECT number, heading, words, state, author, made_at FROM app.notes WHERE day = '2025-11-24' ORDER BY number"
    )
    anna = [
        (n, f"anna {n}", 100 * n + (n == 1), "done" if n == 3 else "open", "anna", MADE_AT) for n in (0, 1, 3, 4, 5)
    ]
    assert old.execute(first, user="anna").rows == anna
    bert = [(n, f"bert {n}", 5_000_000_000 if n == 5 else 100 * n, "open", "bert", MADE_AT) for n in (0, 1, 2, 3, 5)]
    assert old.execute(first, user="bert").rows == bert
    large = "SELECT count(*), min(number), max(number) FROM app.notes WHERE day = '2025-11-25'"
    assert old.execute(large, user="anna").rows == [(40, 0, 39)]
    assert old.execute("SELECT count(*) FROM app.notes WHERE number = 3", user="anna").scalar() == 2


def test_generated_keys_go_on_where_they_stopped(old: Database) -> None:
    names = "SELECT name FROM app.items ORDER BY id"
    assert old.execute(names).rows == [("one",), ("second",), ("three",), ("four",)]
    old.execute("INSERT INTO app.items (name) VALUES ('five')")
    assert old.execute(names).rows[-1] == ("five",)
    assert old.execute("SELECT count(DISTINCT key), count(DISTINCT tag) FROM app.items").rows == [(5, 5)]


def test_streams_views_options_and_dropped_tables_are_as_they_were(old: Database) -> None:
    assert old.execute("SELECT kind FROM app.events ORDER BY _seq", user="anna").rows == [("opened",), ("closed",)]
    assert old.execute("SELECT kind FROM app.events", user="bert").rows == [("opened",)]
    longer = old.execute("SELECT number FROM app.long_notes WHERE day = '2025-11-24' ORDER BY number", user="anna")
    assert longer.rows == [(1,), (3,), (4,), (5,)]
    options = "SELECT options FROM system.schemas WHERE table_name = 'notes' AND is_latest"
    policy = {"type": "combined", "row_limit": 1000, "interval_seconds": 600}
    assert old.execute(options).scalar()["flush_policy"] == policy
    assert old.execute("SELECT options FROM system.namespaces WHERE name = 'app'").scalar() == {"owner": "tests"}
    with pytest.raises(kalamdb.NotFound, match="'app.dropped' does not exist"):
        old.execute("SELECT * FROM app.dropped")
    with pytest.raises(kalamdb.InvalidRequest, match="words"):
        old.execute("UPDATE app.notes SET words = -1 WHERE number = 1", user="anna")


def test_jobs_are_in_the_states_in_which_they_were_left(old: Database) -> None:
    states = "SELECT job_type, status, count(*) FROM system.jobs GROUP BY job_type, status ORDER BY 1, 2"
    assert old.execute(states).rows == [
        ("bad", "failed", 1),
        ("cleanup", "completed", 1),
        ("compact", "completed", 1),
        ("flaky", "retrying", 1),
        ("flush", "completed", 5),
        ("flush", "skipped", 1),
        ("good", "cancelled", 1),
        ("good", "completed", 1),
        ("good", "queued", 1),
        ("nobody", "queued", 1),
    ]
    [failed] = old.jobs.list_jobs(job_type="bad")
    assert failed.message == "the printer is on fire" and "Permanent" in failed.exception_trace
    [done] = old.jobs.list_jobs(job_type="good", status="completed")
    assert (done.checkpoint, done.progress.done, done.progress.unit) == ({"page": 3}, 3, "pages")
    assert [event.text for event in done.events()][-2:] == ["three pages\nand a second line", "Job completed"]
    [later] = old.jobs.list_jobs(idempotency_key="good:later")
    assert (later.priority, later.queue, later.parameters) == (7, "slow", {"pages": 4})
    assert later.run_at == dt.datetime(2200, 1, 1, tzinfo=dt.UTC)
    [waiting] = old.jobs.list_jobs(job_type="flaky")
    assert (waiting.retry_count, waiting.max_retries, waiting.message) == (1, 5, "RuntimeError: no answer")


def test_a_directory_of_an_old_format_passes_the_check_before_and_after_it_is_written(
    old: Database, tmp_path: Path
) -> None:
    report = old.check()
    assert (report.ok, report.strays) == (True, 0), report.problems
    old.insert("app.notes", [{"day": dt.date(2025, 11, 26), "number": 1, "words": 7}], user="anna")
    old.execute("DELETE FROM app.notes WHERE day = '2025-11-25'", user="anna")
    old.execute("ALTER TABLE app.notes DROP COLUMN heading")
    run_job(old, "STORAGE FLUSH TABLE app.notes")
    run_job(old, "STORAGE COMPACT TABLE app.notes")
    sums = "SELECT count(*), sum(words) FROM app.notes"
    assert old.execute(sums, user="anna").rows == [(6, 1 + 100 + 300 + 400 + 500 + 7)]
    old.close()
    with open_at(tmp_path / "data", SimulatedClock(start_ms=MADE_AT_MS + 7_200_000, seed=4)) as again:
        assert again.execute(sums, user="anna").rows == [(6, 1 + 100 + 300 + 400 + 500 + 7)]
        assert again.check().ok


def test_the_lines_that_a_crash_kept_from_the_job_log_are_appended(old: Database, tmp_path: Path) -> None:
    log = tmp_path / "data" / "logs" / "jobs.log"
    old.close()
    lines = log.read_text().splitlines()
    assert sum(line.endswith("ERROR - Job failed permanently: the printer is on fire") for line in lines) == 1
    assert len(lines) == len(set(lines))


def test_the_mirror_of_a_table_names_the_segments_that_are_live(old: Database, tmp_path: Path) -> None:
    segments = tmp_path / "data" / "gen-1" / "segments" / "app"
    for folder in segments.glob("*/*"):
        mirror = json.loads((folder / "manifest.json").read_text())
        assert {one["path"] for one in mirror["segments"]} == {path.name for path in folder.glob("*.parquet")}


def test_a_directory_of_a_newer_format_is_refused_and_left_alone(tmp_path: Path) -> None:
    with kalamdb.connect(tmp_path / "data"):
        pass
    path = tmp_path / "data" / "FORMAT"
    body = path.read_bytes().partition(b"\n")[0].replace(b'"format_version":1', b'"format_version":2')
    path.write_bytes(body + f"\n{zlib.crc32(body):08x}\n".encode())
    with pytest.raises(kalamdb.InvalidRequest, match="has format 2, this version reads up to 1; install a newer"):
        kalamdb.connect(tmp_path / "data")
    assert path.read_bytes().startswith(body)
