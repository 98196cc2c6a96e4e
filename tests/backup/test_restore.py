"""Restoring: at the next start or from outside, whole or not at all."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

import kalamdb
from kalamdb.backup.manifest import decode_manifest, encode_manifest
from kalamdb.database import Database
from kalamdb.errors import Conflict, Corrupt, DirectoryLocked, InvalidRequest
from kalamdb.jobs.model import InterruptReason, JobInterrupted
from kalamdb.testing.maintenance import Unwatched
from tests.backup.support import Image, backup, connect, contents, generations, restore_job, state


def stats(db: Database) -> dict[str, str]:
    """system.stats by name."""
    return dict(db.execute("SELECT metric_name, metric_value FROM system.stats").rows)


def ids(found: dict[str, list[tuple[Any, ...]]]) -> set[int]:
    """Keys of the shared table."""
    return {row[0] for row in found["s"]}


def test_a_restore_is_taken_by_the_next_start(world: Image) -> None:
    with connect(world.old) as db:
        uid = db.context.directory.database_uid
        message = restore_job(db, world.backups)
        assert "restart required; writes from now on are not in the restored database" in message
        db.execute("INSERT INTO app.s VALUES (3000, 'lost')")
        assert ids(contents(db)) == ids(world.before) | {3000}
        assert "writes since then are not in the restored database" in stats(db)["restore_pending"]
        job = db.jobs.list_jobs(job_type="restore")[0]
    with connect(world.old) as db:
        assert contents(db) == world.after
        assert db.context.directory.database_uid != uid
        again = db.jobs.get_job(job.id)
        assert (again.status, again.job_type) == ("completed", "restore")
        assert "restore_pending" not in stats(db) and "restored_from" in stats(db)
        assert db.context.probation is not None and db.context.probation.over.wait(20)
        assert generations(world.old) == ["gen-2"]
        db.execute("INSERT INTO app.s VALUES (4000, 'kept')")
        backup(db, world.backups, incremental=True)
        restore_job(db, world.backups)
    assert 4000 in ids(state(world.old))
    assert generations(world.old) == ["gen-3"]


def test_the_older_generation_stays_while_the_restored_one_is_not_sound(world: Image) -> None:
    with connect(world.old) as db:
        restore_job(db, world.backups)
    segment = next((world.old / "gen-2").rglob("*.parquet"))
    whole = segment.read_bytes()
    segment.write_bytes(bytes(len(whole)))
    with connect(world.old) as db:
        assert db.context.probation is not None and db.context.probation.over.wait(20)
        found = stats(db)
        assert (found["restore_previous_generation"], found["restore_check_problems"] != "0") == ("gen-1", True)
    assert generations(world.old) == ["gen-1", "gen-2"]
    segment.write_bytes(whole)
    assert state(world.old) == world.after


def test_the_last_of_two_restores_counts(world: Image) -> None:
    with connect(world.old) as db:
        restore_job(db, world.backups)
        own = backup(db, world.path / "own")
        restore_job(db, Path(own))
        assert {"gen-1", "gen-3"} <= set(generations(world.old))
    assert state(world.old) == world.before
    # That backup was taken while a restore waited: its record means nothing where it comes back.
    kalamdb.restore(own, world.path / "copy")
    assert state(world.path / "copy") == world.before


def remember(where: list[str], what: str) -> Callable[[Any], None]:
    """An executor that notes where it ran."""
    return lambda ctx: where.append(what)


@pytest.mark.parametrize("resume", [False, True])
def test_jobs_of_the_application_wait_in_a_restored_database_unless_told_otherwise(world: Image, resume: bool) -> None:
    ran: list[str] = []
    with connect(world.old) as db:
        db.jobs.create_job("send", {"to": "ann"}, allow_unknown=True)
        source = backup(db, world.path / "own")
        made = db.jobs.list_jobs(job_type="backup", descending=True)[0]
    kalamdb.restore(source, world.path / "copy", resume_jobs=resume)
    with connect(world.path / "copy") as db:
        # Its own job was running when the backup was taken.
        assert (db.jobs.get_job(made.id).status, source in db.jobs.get_job(made.id).message) == ("completed", True)
        db.jobs.executor("send", prefix="SN")(remember(ran, "copy"))
        job = db.jobs.list_jobs(job_type="send")[0]
        if resume:
            assert db.jobs.wait(job.id, 20).status == "completed"
        else:
            db.execute("STORAGE FLUSH TABLE app.u")
            flushed = db.jobs.list_jobs(job_type="flush", descending=True)[0]
            assert db.jobs.wait(flushed.id, 20).status == "completed"
            assert db.jobs.get_job(job.id).status in ("new", "queued") and ran == []
            queue = db.execute("SELECT paused, reason FROM system.job_queues WHERE queue = 'default'").rows[0]
            assert queue[0] and "was restored" in queue[1]
            db.execute("RESUME QUEUE default")
            assert db.jobs.wait(job.id, 20).status == "completed"
    assert ran == ["copy"]


def test_a_directory_that_is_not_empty_is_replaced_only_on_demand(world: Image) -> None:
    with pytest.raises(InvalidRequest, match="not empty.*overwrite=True"):
        kalamdb.restore(world.backups, world.old)
    strange = world.path / "strange"
    strange.mkdir()
    (strange / "letter.txt").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(InvalidRequest, match=r"letter\.txt"):
            kalamdb.restore(world.backups, strange, overwrite=overwrite)
    assert [path.name for path in strange.iterdir()] == ["letter.txt"]
    with connect(world.old), pytest.raises(DirectoryLocked):
        kalamdb.restore(world.backups, world.old, overwrite=True)
    kalamdb.restore(world.backups, world.old, overwrite=True)
    assert generations(world.old) == ["gen-1", "gen-2"]
    assert state(world.old) == world.after
    (world.path / "empty").mkdir()
    kalamdb.restore(world.backups, world.path / "empty")
    assert state(world.path / "empty") == world.after


@pytest.mark.parametrize("damaged", ["FORMAT", "CURRENT", "gen-1/rocksdb/CURRENT"])
def test_a_damaged_database_is_replaced_from_outside(world: Image, damaged: str) -> None:
    (world.old / damaged).write_bytes(b"rubbish")
    with pytest.raises(kalamdb.KalamDbError):
        connect(world.old)
    kalamdb.restore(world.backups, world.old, overwrite=True)
    assert state(world.old) == world.after


def change_manifest(world: Image, change: Callable[[Any], Any]) -> None:
    """Write another `backup.json`, with a checksum that fits."""
    path = next(world.backups.glob("*/backup.json"))
    path.write_bytes(encode_manifest(change(decode_manifest(path.read_bytes(), str(path)))))


def test_a_backup_of_a_newer_format_is_refused(world: Image) -> None:
    change_manifest(world, lambda manifest: msgspec.structs.replace(manifest, format_version=99))
    with pytest.raises(InvalidRequest, match="has format 99.*install a newer KalamDB"):
        kalamdb.restore(world.backups, world.path / "copy")
    change_manifest(world, lambda manifest: msgspec.structs.replace(manifest, manifest_version=2))
    with pytest.raises(InvalidRequest, match="is of version 2.*install a newer KalamDB"):
        kalamdb.restore(world.backups, world.path / "copy")
    assert not (world.path / "copy").exists()


@pytest.mark.parametrize("name", ["rocksdb/../../../evil", "/evil", "rocksdb", "elsewhere/evil", "segments//x"])
def test_a_manifest_that_names_files_outside_is_refused(world: Image, name: str) -> None:
    def rename(manifest: Any) -> Any:
        files = (msgspec.structs.replace(manifest.files[0], path=name), *manifest.files[1:])
        return msgspec.structs.replace(manifest, files=files)

    change_manifest(world, rename)
    with pytest.raises(Corrupt, match="which is none of a database"):
        kalamdb.restore(world.backups, world.path / "copy")


class Stopping(Unwatched):
    """Stops the work at its check number `at`."""

    def __init__(self, at: int | None) -> None:
        self.at = at
        self.checks = 0

    def check(self) -> None:
        if self.checks == self.at:
            raise JobInterrupted(InterruptReason.CANCEL)
        self.checks += 1


def test_a_restore_cancelled_at_any_check_leaves_nothing(world: Image) -> None:
    with connect(world.old) as db:
        whole = Stopping(None)
        db.context.backups.restore(str(world.backups), whole, str, resume_jobs=False)
        for at in range(whole.checks):
            with pytest.raises(JobInterrupted):
                db.context.backups.restore(str(world.backups), Stopping(at), str, resume_jobs=False)
            assert generations(world.old) == ["gen-1", "gen-2"]
        assert contents(db) == world.before and db.check().ok
    assert state(world.old) == world.after


def test_a_second_restore_is_refused_while_one_is_active(db: Database, world: Image) -> None:
    later = dt.datetime(2100, 1, 1, tzinfo=dt.UTC)
    db.jobs.create_job("restore", {"path": str(world.backups)}, run_at=later)
    with pytest.raises(Conflict, match="with idempotency key 'restore' is already"):
        db.execute(f"RESTORE DATABASE FROM '{world.backups}'")


def test_a_damaged_origin_is_named(world: Image) -> None:
    with connect(world.old) as db:
        restore_job(db, world.backups)
    assert state(world.old) == world.after
    (world.old / "gen-2" / "ORIGIN").write_bytes(b"{}")
    with pytest.raises(Corrupt, match="ORIGIN"):
        connect(world.old)
