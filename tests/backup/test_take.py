"""Taking backups: consistent under writes, verified, shared between each other, cancelled, refused."""

from __future__ import annotations

import asyncio
import shutil
import threading
from pathlib import Path

import pytest

import kalamdb
from kalamdb.backup.manifest import new_backup_id
from kalamdb.clock import SystemClock
from kalamdb.database import Database
from kalamdb.errors import Corrupt, InvalidRequest, KalamDbError, NotFound
from kalamdb.jobs.model import InterruptReason, JobInterrupted
from kalamdb.testing.maintenance import Unwatched
from tests.backup.support import (
    QUIET,
    Image,
    Stopped,
    StoppingFiles,
    backup,
    connect,
    connect_with,
    contents,
    fill,
    restored,
)
from tests.conftest import run_job

KEYS = 10
WRITES_MIN = 30


def test_a_backup_under_constant_writes_holds_every_write_up_to_its_seq_and_none_above(tmp_path: Path) -> None:
    with connect(tmp_path / "data") as db:
        db.execute("CREATE NAMESPACE app")
        db.execute("CREATE USER TABLE app.t (id INT PRIMARY KEY, n INT)")
        stop, enough = threading.Event(), threading.Semaphore(0)
        written: dict[str, list[tuple[int, int, int | None]]] = {f"user{number}": [] for number in range(3)}
        """Per user, in order: (id, seq, n), n None for a deletion."""

        def write(user: str) -> None:
            own, count = db.session(user=user), 0
            while not stop.is_set():
                count += 1
                if count == WRITES_MIN:
                    enough.release()
                key = count % KEYS
                if count % 7 == 0 and count > KEYS:
                    own.execute("DELETE FROM app.t WHERE id = ?", [key])
                    gone = own.execute("SELECT _seq FROM app.t WHERE id = ? AND _deleted", [key]).scalar()
                    written[user].append((key, gone, None))
                    continue
                own.execute(
                    "INSERT INTO app.t VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET n = excluded.n", [key, count]
                )
                seq = own.execute("SELECT _seq FROM app.t WHERE id = ?", [key]).scalar()
                written[user].append((key, seq, count))

        writers = [threading.Thread(target=write, args=(user,)) for user in written]
        for writer in writers:
            writer.start()
        jobs = []
        for number in range(4):
            jobs.append(db.backup(tmp_path / "backups", incremental=number % 2 == 1))
            run_job(db, "STORAGE FLUSH TABLE app.t")
        assert all(enough.acquire(timeout=30) for _ in writers)
        run_job(db, "STORAGE COMPACT TABLE app.t")
        jobs.append(db.backup(tmp_path / "backups", incremental=True))
        stop.set()
        for writer in writers:
            writer.join()
    assert [job.status for job in jobs] == ["completed"] * 5
    for job in jobs:
        seq = job.result["snapshot_seq"]
        kalamdb.restore(tmp_path / "backups" / job.result["backup_id"], tmp_path / job.id)
        with connect(tmp_path / job.id) as copy:
            assert copy.check().ok
            for user, history in written.items():
                expected = {key: (at, n) for key, at, n in history if at <= seq}
                found = copy.execute("SELECT id, _seq, n FROM app.t", user=user).rows
                assert {key: (at, n) for key, at, n in found} == {
                    key: (at, n) for key, (at, n) in expected.items() if n is not None
                }
    all_seqs = [seq for history in written.values() for _, seq, _ in history]
    assert all(min(all_seqs) < job.result["snapshot_seq"] for job in jobs[-2:])
    assert all(job.result["snapshot_seq"] < max(all_seqs) for job in jobs)


def test_a_restored_database_is_what_was_backed_up_under_a_uid_of_its_own(db: Database, tmp_path: Path) -> None:
    before = contents(db)
    source = backup(db, tmp_path / "backups")
    db.execute("DELETE FROM app.s WHERE id < 40")
    assert restored(source, tmp_path / "copy") == before
    with connect(tmp_path / "copy") as copy:
        assert copy.context.directory.database_uid != db.context.directory.database_uid
        copy.execute("INSERT INTO app.s VALUES (100, 'later')")
        assert copy.execute("SELECT max(_seq) FROM app.s").scalar() > max(row[2] for row in before["s"])


def test_a_database_in_memory_is_backed_up_into_one_on_disk(tmp_path: Path) -> None:
    with connect(":memory:") as db:
        fill(db)
        before = contents(db)
        source = backup(db, tmp_path / "backups")
        assert db.execute(f"VERIFY BACKUP '{source}'").message.startswith("Backup")
        job = db.jobs.wait(db.jobs.create_job("restore", {"path": source}).id, 10)
        assert job.status == "failed" and "in memory" in job.message
    assert restored(source, tmp_path / "copy") == before


def test_the_awaitable_database_backs_up_too(world: Image) -> None:
    async def back_up() -> tuple[str, str]:
        async with await kalamdb.aconnect(world.old, **QUIET) as db:
            begun = await db.backup(world.path / "awaited", wait=False)
            ended = await db.backup(world.path / "awaited too")
            return begun.status, ended.status

    assert asyncio.run(back_up()) == ("new", "completed")
    assert restored(world.path / "awaited too", world.path / "copy") == world.before


def files_of(source: str) -> list[str]:
    """All files of a backup, relative."""
    return sorted(path.relative_to(source).as_posix() for path in Path(source).rglob("*") if path.is_file())


def test_a_changed_byte_in_any_file_of_a_backup_is_found_and_named(db: Database, tmp_path: Path) -> None:
    source = backup(db, tmp_path / "backups")
    names = [name for name in files_of(source) if (Path(source) / name).stat().st_size]
    kinds = {name.rpartition("/")[2].partition("-")[0].rpartition(".")[2] for name in names}
    assert {"json", "parquet", "sst", "CURRENT", "MANIFEST", "OPTIONS"} <= kinds
    for number, name in enumerate(names):
        copy = tmp_path / "damaged" / str(number)
        shutil.copytree(source, copy)
        body = bytearray((copy / name).read_bytes())
        body[len(body) // 2] ^= 0x01
        (copy / name).write_bytes(body)
        refused(db, tmp_path, copy, copy / name)
    assert db.check().ok and contents(db)["s"]


@pytest.mark.parametrize("name", ["backup.json", "CURRENT", ".sst", ".parquet"])
def test_a_missing_file_is_named(db: Database, tmp_path: Path, name: str) -> None:
    source = backup(db, tmp_path / "backups")
    gone = next(Path(source) / one for one in files_of(source) if one.endswith(name))
    gone.unlink()
    refused(db, tmp_path, Path(source), gone)
    assert db.check().ok


def refused(db: Database, tmp_path: Path, source: Path, damaged: Path) -> None:
    """Neither verified nor restored, neither by statement nor job nor from outside, and nothing is left of it."""
    for attempt in (
        lambda: db.execute(f"VERIFY BACKUP '{source}'"),
        lambda: kalamdb.restore(source, tmp_path / "refused"),
    ):
        with pytest.raises(Corrupt) as caught:
            attempt()
        assert f"'{damaged}'" in str(caught.value)
    assert not (tmp_path / "refused" / "FORMAT").exists()
    assert not list((tmp_path / "refused").glob("gen-*"))
    job = db.jobs.wait(db.jobs.create_job("restore", {"path": str(source)}).id, 10)
    assert job.status == "failed" and f"'{damaged}'" in job.message
    assert [path.name for path in db.context.directory.path.glob("gen-*")] == ["gen-1"]


def test_an_incremental_backup_shares_unchanged_files_and_outlives_the_older_one(db: Database, tmp_path: Path) -> None:
    older = backup(db, tmp_path / "backups")
    db.execute("INSERT INTO app.s VALUES (200, 'new')")
    expected = contents(db)
    newer = backup(db, tmp_path / "backups", incremental=True)
    shared = [name for name in files_of(newer) if (Path(newer) / name).stat().st_nlink > 1]
    assert {name.rpartition(".")[2] for name in shared} >= {"parquet", "sst"}
    live = {path.stat().st_ino for path in db.context.directory.path.rglob("*") if path.is_file()}
    assert live.isdisjoint((Path(newer) / name).stat().st_ino for name in files_of(newer))
    db.execute(f"PRUNE BACKUPS IN '{tmp_path / 'backups'}' KEEP 1 DAILY")
    assert not Path(older).exists()
    assert restored(tmp_path / "backups", tmp_path / "copy") == expected


def test_an_incremental_backup_takes_over_no_damage_of_the_older_one(db: Database, tmp_path: Path) -> None:
    older = backup(db, tmp_path / "backups")
    damaged = next(Path(older).rglob("*.parquet"))
    damaged.write_bytes(bytes(damaged.stat().st_size))
    newer = backup(db, tmp_path / "backups", incremental=True)
    db.execute(f"VERIFY BACKUP '{newer}'")
    with pytest.raises(Corrupt):
        db.execute(f"VERIFY BACKUP '{older}'")


def test_a_damaged_segment_is_not_backed_up(db: Database, tmp_path: Path) -> None:
    segment = next(db.context.store.root.rglob("*.parquet"))
    whole = segment.read_bytes()
    segment.write_bytes(whole[:-1] + b"\0")
    job = db.backup(tmp_path / "backups")
    assert job.status == "failed" and str(segment) in job.message
    assert list((tmp_path / "backups").iterdir()) == []
    segment.write_bytes(whole)
    backup(db, tmp_path / "backups")


def test_compaction_during_a_backup_takes_no_file_from_it(tmp_path: Path) -> None:
    files = StoppingFiles()
    with connect_with(tmp_path / "data", files) as db:
        fill(db)
        run_job(db, "STORAGE FLUSH TABLE app.s")
        expected = contents(db)
        compacted = threading.Event()

        def compact(step: str) -> None:
            if step == "create CURRENT" and not compacted.is_set():
                compacted.set()
                run_job(db, "STORAGE COMPACT TABLE app.s")
                db.execute("DELETE FROM app.s WHERE id < 10")

        files.on_step = compact
        source = backup(db, tmp_path / "backups")
        assert compacted.is_set()
        live = {path.name for path in db.context.store.root.rglob("*.parquet")}
        assert live.isdisjoint(path.name for path in Path(source).rglob("*.parquet"))
    assert restored(source, tmp_path / "copy") == expected


class Counting(Unwatched):
    """Stops the work at its check number `at`."""

    def __init__(self, at: int | None = None) -> None:
        self.at = at
        self.checks = 0
        self.shown: list[tuple[int, int | None]] = []

    def check(self) -> None:
        if self.checks == self.at:
            raise JobInterrupted(InterruptReason.CANCEL)
        self.checks += 1

    def progress(self, done: int, total: int | None = None, unit: str = "", text: str = "") -> None:
        assert unit == "bytes"
        self.shown.append((done, total))


def test_a_backup_stopped_at_any_check_leaves_nothing(db: Database, tmp_path: Path) -> None:
    target = str(tmp_path / "backups")
    whole = Counting()
    manifest = db.context.backups.take(target, whole, lambda found, where: "", incremental=False)
    assert whole.shown[-1] == (manifest.size_bytes, manifest.size_bytes) and whole.shown == sorted(whole.shown)
    assert whole.checks >= 2 * len(manifest.files) - 1
    for at in range(1000):
        try:
            db.context.backups.take(target, Counting(at), lambda found, where: "", incremental=at % 2 == 1)
            break
        except JobInterrupted:
            assert [path.name for path in Path(target).iterdir()] == [manifest.backup_id]
    assert at >= len(manifest.files)
    assert not any((db.context.directory.generation.path / "checkpoints").iterdir())
    run_job(db, "STORAGE COMPACT TABLE app.s")
    assert db.check().strays == 0


def test_a_backup_whose_lease_is_taken_away_is_cancelled_and_leaves_nothing(tmp_path: Path) -> None:
    reached, go, gone = threading.Event(), threading.Event(), threading.Event()

    class Watched(StoppingFiles):
        def rmdir(self, path: Path) -> None:
            super().rmdir(path)
            if path.parent.name == "backups":
                gone.set()

    files = Watched()
    with connect_with(tmp_path / "data", files, jobs_cancel_timeout_s=0.05) as db:
        fill(db)

        def hold(step: str) -> None:
            if step == "create CURRENT":
                reached.set()
                assert go.wait(20)

        files.on_step = hold
        job = db.backup(tmp_path / "backups", wait=False)
        assert reached.wait(20)
        assert db.execute(f"CANCEL JOB '{job.id}'").message == f"Job {job.id} killed: cancelled"
        go.set()
        assert gone.wait(20) and db.jobs.get_job(job.id).status == "cancelled"
        assert db.execute(f"SHOW BACKUPS IN '{tmp_path / 'backups'}'").rows == []


def test_a_backup_that_dies_at_any_step_on_files_counts_for_nothing(tmp_path: Path) -> None:
    files = StoppingFiles()
    with connect_with(tmp_path / "data", files) as db:
        fill(db)
        take = db.context.backups.take
        target = str(tmp_path / "backups")
        first = take(target, Unwatched(), lambda found, where: "", incremental=False)
        files.steps.clear()
        take(target, Unwatched(), lambda found, where: "", incremental=True)
        steps = list(files.steps)
        assert any(step.startswith("link ") for step in steps) and "fsync .backup.json.tmp" in steps
        shutil.rmtree(tmp_path / "backups")
        first = take(target, Unwatched(), lambda found, where: "", incremental=False)
        # By number as far as the manifest, then by name: how many files the store has differs a little.
        last = ["unlink .backup.json.tmp", "create .backup.json.tmp", "fsync .backup.json.tmp", "rename backup.json"]
        for stop in [*range(steps.index(last[0])), *last]:
            files.steps.clear()
            files.at = stop if isinstance(stop, int) else None

            def die(step: str, stop: int | str = stop) -> None:
                if step == stop or step == last[-1]:
                    files.at = len(files.steps) - 1
                    raise Stopped

            files.on_step = die
            with pytest.raises(Stopped):
                take(target, Unwatched(), lambda found, where: "", incremental=True)
            files.at, files.on_step = None, lambda step: None
            entries = db.context.backups.entries(target)
            assert [one.backup_id for one in entries if one.status != "incomplete"] == [first.backup_id]
            assert db.context.backups.locate(target).manifest.backup_id == first.backup_id
            for one in entries[1:]:
                shutil.rmtree(one.where)
        assert db.check().ok
        source = backup(db, target, incremental=True)
    with connect(tmp_path / "data") as db:
        assert not (db.context.directory.generation.path / "checkpoints").exists()
        assert restored(source, tmp_path / "copy") == contents(db)


def test_paths_that_are_no_target_are_refused_before_any_job(db: Database, tmp_path: Path) -> None:
    inside = db.context.directory.path / "backups"
    (tmp_path / "link").symlink_to(db.context.directory.path)
    refusals = {
        "": "cannot be empty",
        "  ": "cannot be empty",
        "a\0b": "NUL",
        "/x/../y": "must not contain '..'",
        "..\\y": "must not contain '..'",
        "file:///x/%2e%2e/y": "must not contain '..'",
        "/etc/kalam": "system directory /etc",
        "/root": "system directory /root",
        "/var/log/x": "system directory /var/log",
        "C:\\Windows\\x": "system directory c:/windows",
        "/": "root of the filesystem",
        "ftp://host/x": "unknown scheme",
        str(inside): "inside the data directory",
        str(tmp_path / "link" / "x"): "inside the data directory",
    }
    jobs = len(db.jobs.list_jobs())
    for path, reason in refusals.items():
        with pytest.raises(InvalidRequest, match=reason.replace(".", r"\.")):
            db.backup(path)
        with pytest.raises(InvalidRequest, match=reason.replace(".", r"\.")):
            db.jobs.create_job("backup", {"path": path})
        if "\0" not in path:
            with pytest.raises(InvalidRequest, match=reason.replace(".", r"\.")):
                db.execute(f"BACKUP DATABASE TO '{path}'")
    assert len(db.jobs.list_jobs()) == jobs
    assert not inside.exists()


def test_a_half_backup_is_no_backup(db: Database, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        kalamdb.restore(tmp_path / "nothing", tmp_path / "copy")
    target = tmp_path / "backups"
    half = target / new_backup_id(SystemClock(), [])
    (half / "rocksdb").mkdir(parents=True)
    for path in (half, target):
        with pytest.raises(Corrupt, match="backup.json' is missing: the backup was not completed"):
            kalamdb.restore(path, tmp_path / "copy")
    older = backup(db, target)
    later = target / new_backup_id(SystemClock(), [Path(older).name])
    later.mkdir()
    assert restored(target, tmp_path / "copy") == contents(db)
    assert [row[2] for row in db.execute(f"SHOW BACKUPS IN '{target}'").rows] == [
        "incomplete",
        "complete",
        "incomplete",
    ]


def test_a_disk_that_refuses_fails_the_backup_and_nothing_else(tmp_path: Path) -> None:
    class Full(StoppingFiles):
        def _step(self, name: str, path: Path) -> None:
            if name == "create" and path.name == "CURRENT":
                raise OSError(28, "No space left on device")

    with connect_with(tmp_path / "data", Full()) as db:
        fill(db)
        job = db.jobs.wait(db.jobs.create_job("backup", {"path": str(tmp_path / "b")}, max_retries=0).id, 20)
        assert job.status == "failed" and "the disk is full" in job.message
        assert not list((tmp_path / "b").iterdir())
        with pytest.raises(KalamDbError):
            kalamdb.restore(tmp_path / "b", tmp_path / "copy")
        assert db.check().ok
