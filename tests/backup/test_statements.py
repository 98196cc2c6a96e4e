"""BACKUP, RESTORE, VERIFY, SHOW BACKUPS, PRUNE, EXPLAIN RESTORE as statements."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from kalamdb.app_context import AppContext
from kalamdb.backup.manifest import decode_manifest, encode_manifest
from kalamdb.clock import SystemClock
from kalamdb.config import Settings
from kalamdb.database import Database
from kalamdb.errors import Denied, InvalidRequest, NotFound
from tests.backup.support import QUIET, Image, backup, fill, generations

DAY_MS = 86_400_000


def finished(db: Database, message: str | None):
    """The job that a statement named, ended."""
    assert message is not None
    return db.jobs.wait(message.rsplit(" ", 1)[1], 20)


def test_a_backup_statement_starts_a_job_whose_message_has_the_figures(db: Database, tmp_path: Path) -> None:
    target = tmp_path / "b"
    result = db.execute(f"BACKUP DATABASE TO '{target}'")
    job = finished(db, result.message)
    assert result.message == f"Database backup started to '{target}'. Job ID: {job.id}" and job.id.startswith("BK-")
    assert (job.status, job.job_type, job.on_interrupt) == ("completed", "backup", "fail")
    assert job.message.startswith(f"Backup completed: '{target}/{job.result['backup_id']}' (")
    assert "files of 3 tables" in job.message and job.progress.unit == "bytes"
    assert job.progress.done == job.progress.total == job.result["bytes"]
    for text, kind in (
        ("INCREMENTAL", "incremental"),
        ("WITH (INCREMENTAL = true)", "incremental"),
        ("FULL", "full"),
        ("", "full"),
    ):
        assert finished(db, db.execute(f"BACKUP DATABASE TO '{target}' {text};").message).status == "completed"
        assert db.execute(f"SHOW BACKUPS IN '{target}'").dicts()[-1]["kind"] == kind


def test_backups_are_listed_verified_and_planned(world: Image, db: Database) -> None:
    rows = db.execute(f"SHOW BACKUPS IN '{world.backups}'").dicts()
    found = rows[0]
    assert len(rows) == 1 and found["path"] == str(world.backups / found["backup_id"])
    assert (found["status"], found["kind"], found["tables"]) == ("complete", "full", 3)
    assert found["database_uid"] == db.context.directory.database_uid
    assert found["size_bytes"] == found["new_bytes"] > 0 and found["started_at"] <= found["finished_at"]
    message = db.execute(f"VERIFY BACKUP '{world.backups}'").message
    assert message == (
        f"Backup '{found['backup_id']}' verified: {found['files']} files, {found['size_bytes']:,} bytes, "
        f"all writes up to _seq {found['snapshot_seq']}"
    )
    plan = db.execute(f"EXPLAIN RESTORE FROM '{world.backups}'").dicts()
    assert [(row["step"], row["action"]) for row in plan] == list(
        enumerate(["verify", "stage", "contents", "lost", "commit", "restart", "keep"], 1)
    )
    assert "gen-2" in plan[1]["detail"] and f"writes above _seq {found['snapshot_seq']}" in plan[3]["detail"]
    assert generations(world.old) == ["gen-1"]


def test_show_backups_without_a_path_lists_every_target_on_record(db: Database, world: Image) -> None:
    paths = [world.path / "a", world.path / "b"]
    for path in paths:
        backup(db, path)
    listed = {Path(row["path"]).parent for row in db.execute("SHOW BACKUPS").dicts()}
    assert set(paths) <= listed
    shutil.rmtree(paths[0])
    assert paths[0] not in {Path(row["path"]).parent for row in db.execute("SHOW BACKUPS").dicts()}


def test_a_restore_from_nowhere_is_refused_without_a_job(db: Database, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    jobs = len(db.jobs.list_jobs())
    for path, error, text in (
        (tmp_path / "nothing", NotFound, "does not exist"),
        (tmp_path / "file", InvalidRequest, "is not a directory"),
        (tmp_path / "empty", NotFound, "there is no backup in"),
        ("/etc", InvalidRequest, "system directory"),
        ("../x", InvalidRequest, r"must not contain '\.\.'"),
        ("", InvalidRequest, "cannot be empty"),
    ):
        for statement in ("RESTORE DATABASE FROM", "EXPLAIN RESTORE FROM", "VERIFY BACKUP"):
            with pytest.raises(error, match=text):
                db.execute(f"{statement} '{path}'")
    assert len(db.jobs.list_jobs()) == jobs


@pytest.mark.parametrize(
    ("sql", "reason"),
    [
        ("BACKUP DATABASE TO somewhere", "a path in quotes"),
        ("BACKUP DATABASE app TO '/x'", "where TO is expected"),
        ("BACKUP DATABASE TO '/x' WITH (SPEED = 9)", "option SPEED is not known"),
        ("BACKUP DATABASE TO '/x' WITH (INCREMENTAL = 9)", "true or false is expected"),
        ("RESTORE DATABASE FROM '/x' '/y'", "the end of the statement"),
        ("PRUNE BACKUPS IN '/x' KEEP many DAILY", "a number of backups"),
        ("PRUNE BACKUPS IN '/x' KEEP 3", "WEEKLY"),
        ("EXPLAIN RESTORE '/x'", "where FROM is expected"),
    ],
)
def test_statements_that_say_something_else_are_refused(db: Database, sql: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        db.execute(sql)


def test_only_administrators_use_backups(db: Database, world: Image) -> None:
    for sql in (
        f"BACKUP DATABASE TO '{world.path / 'b'}'",
        f"RESTORE DATABASE FROM '{world.backups}'",
        f"VERIFY BACKUP '{world.backups}'",
        "SHOW BACKUPS",
        f"PRUNE BACKUPS IN '{world.backups}'",
        f"EXPLAIN RESTORE FROM '{world.backups}'",
    ):
        for role in ("user", "service"):
            with pytest.raises(Denied):
                db.execute(sql, role=role)
    db.execute(f"VERIFY BACKUP '{world.backups}'", role="dba")
    with pytest.raises(InvalidRequest, match="inside a transaction"):
        db.execute(f"BEGIN; BACKUP DATABASE TO '{world.path / 'b'}'; COMMIT")


class SteppedClock(SystemClock):
    """The machine's clock, moved by steps."""

    offset_ms = 0

    def now_ms(self) -> int:
        return super().now_ms() + self.offset_ms


@pytest.fixture
def clock() -> SteppedClock:
    return SteppedClock()


@pytest.fixture
def dated(tmp_path: Path, clock: SteppedClock):
    """A database whose time the test moves."""
    settings = Settings.load(QUIET, environment={})
    with Database(AppContext(tmp_path / "data", settings, clock=clock)) as opened:
        fill(opened)
        yield opened


def test_pruning_keeps_days_and_weeks_and_never_the_only_one(
    dated: Database, clock: SteppedClock, tmp_path: Path
) -> None:
    target = tmp_path / "b"
    made = []
    for day in range(16):
        clock.offset_ms = day * DAY_MS
        made.append(Path(backup(dated, target, incremental=True)).name)
        if day == 0:
            made.append(Path(backup(dated, target, incremental=True)).name)
    dated.execute(f"PRUNE BACKUPS IN '{target}' KEEP 3 DAILY 2 WEEKLY")
    kept = [row["backup_id"] for row in dated.execute(f"SHOW BACKUPS IN '{target}'").dicts()]
    assert kept[-3:] == made[-3:] and 3 <= len(kept) <= 5
    for backup_id in kept:
        dated.execute(f"VERIFY BACKUP '{target / backup_id}'")
    message = dated.execute(f"PRUNE BACKUPS IN '{target}' KEEP 0 DAILY 0 WEEKLY").message
    assert message == f"Removed {len(kept) - 1} backups and 0 incomplete ones, kept 1"
    assert [path.name for path in target.iterdir()] == made[-1:]
    assert dated.execute(f"PRUNE BACKUPS IN '{target}'").message.endswith("kept 1")


def test_a_backup_job_may_prune_what_it_makes_old(dated: Database, clock: SteppedClock, tmp_path: Path) -> None:
    target = tmp_path / "b"
    for day in range(4):
        clock.offset_ms = day * DAY_MS
        sql = f"BACKUP DATABASE TO '{target}' INCREMENTAL WITH (KEEP_DAILY = 2)"
        job = finished(dated, dated.execute(sql).message)
        assert job.status == "completed"
    assert job.message.endswith("; 1 older removed")
    assert len(list(target.iterdir())) == 2


def test_pruning_removes_halves_of_yesterday_and_nothing_of_other_databases(
    dated: Database, clock: SteppedClock, tmp_path: Path
) -> None:
    target = tmp_path / "b"
    ours = Path(backup(dated, target)).name
    path = target / ours / "backup.json"
    theirs = target / ours.replace("Z-", "Z-0")[:-1]
    shutil.copytree(target / ours, theirs)
    manifest = decode_manifest(path.read_bytes(), str(path))
    body = encode_manifest(type(manifest)(**{**_fields(manifest), "database_uid": "another"}))
    (theirs / "backup.json").write_bytes(body)
    half = Path(backup(dated, target))
    (half / "backup.json").unlink()
    sql = f"PRUNE BACKUPS IN '{target}' KEEP 1 DAILY"
    assert dated.execute(sql).message == "Removed 0 backups and 0 incomplete ones, kept 1"
    clock.offset_ms = DAY_MS + 60_000
    assert dated.execute(sql).message == "Removed 0 backups and 1 incomplete ones, kept 1"
    assert sorted(os.listdir(target)) == sorted([ours, theirs.name])


def _fields(manifest):
    return {name: getattr(manifest, name) for name in manifest.__struct_fields__}
