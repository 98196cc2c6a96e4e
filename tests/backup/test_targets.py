"""Every kind of target keeps backups alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from obstore.store import LocalStore, MemoryStore

import kalamdb
from kalamdb.backup.targets import DirectoryTarget, ObjectTarget, Target, Targets, digest_of
from kalamdb.database import Database
from kalamdb.errors import Corrupt, InvalidRequest, NotFound, Unavailable
from kalamdb.files import LocalFiles
from tests.backup.support import Image, backup, connect, contents, restore_job, state


@pytest.fixture(params=["directory", "memory", "local store"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Target:
    """An empty target."""
    match request.param:
        case "directory":
            return DirectoryTarget(tmp_path / "t", LocalFiles(tmp_path))
        case "memory":
            return ObjectTarget("memory://t", MemoryStore())
        case _:
            return ObjectTarget("store://t", LocalStore(str(tmp_path), mkdir=True))


def names(target: Target, folder: str) -> list[str]:
    return sorted(one.path for one in target.files(folder))


def test_what_was_put_is_read(target: Target) -> None:
    assert target.folders() == []
    for path, chunks in (("a/x/1", [b"one", b"", b"two"]), ("a/2", []), ("b/3", [bytes(9 << 20)])):
        target.put(path, iter(chunks))
        assert b"".join(target.read(path)) == b"".join(chunks)
    assert target.folders() == ["a", "b"]
    assert names(target, "a") == ["a/2", "a/x/1"]
    assert {one.path: one.size_bytes for one in target.files("b")} == {"b/3": 9 << 20}
    with pytest.raises(FileNotFoundError):
        b"".join(target.read("a/nothing"))


def test_a_put_that_fails_leaves_nothing(target: Target) -> None:
    class Enough(BaseException):
        pass

    def chunks() -> Iterator[bytes]:
        yield bytes(9 << 20)
        raise Enough

    with pytest.raises(Enough):
        target.put("a/1", chunks())
    assert names(target, "a") == []


def test_a_file_is_reused_and_outlives_its_source(target: Target) -> None:
    target.put("a/1", iter([b"one"]))
    digest = digest_of([b"one"])
    assert target.reuse("a/1", "b/1", digest)
    assert not target.reuse("a/2", "b/2", digest)
    target.remove("a")
    assert b"".join(target.read("b/1")) == b"one"
    assert (names(target, "a"), names(target, "b")) == ([], ["b/1"])
    target.unlink("b/1")
    target.unlink("b/1")
    assert names(target, "b") == []


def test_a_directory_does_not_reuse_what_was_damaged(tmp_path: Path) -> None:
    target = DirectoryTarget(tmp_path, LocalFiles(tmp_path))
    target.put("a/1", iter([b"one"]))
    assert not target.reuse("a/1", "b/1", digest_of([b"another"]))
    assert names(target, "b") == []


def test_backups_in_an_object_store(world: Image, db: Database) -> None:
    url = "memory://bucket/backups"
    first = backup(db, url)
    db.execute("INSERT INTO app.s VALUES (1, 'x') ON CONFLICT (id) DO UPDATE SET v = excluded.v")
    expected = contents(db)
    second = backup(db, url, incremental=True)
    rows = db.execute(f"SHOW BACKUPS IN '{url}'").dicts()
    assert [row["path"] for row in rows] == [first, second]
    assert 0 < rows[1]["new_bytes"] < rows[1]["size_bytes"]
    db.execute(f"PRUNE BACKUPS IN '{url}' KEEP 1 DAILY")
    assert [row["path"] for row in db.execute(f"SHOW BACKUPS IN '{url}'").dicts()] == [second]
    assert "verified" in (db.execute(f"VERIFY BACKUP '{url}'").message or "")
    with pytest.raises(Corrupt, match=f"{first}/backup.json' is missing"):
        db.execute(f"VERIFY BACKUP '{first}'")
    with pytest.raises(NotFound, match="no backup in 'memory://other'"):
        db.execute("RESTORE DATABASE FROM 'memory://other'")
    restore_job(db, url)
    db.close()
    assert state(world.old) == expected


def test_a_file_url_is_a_directory(world: Image, db: Database) -> None:
    found = backup(db, f"file://{world.path}/by url")
    assert Path(found.removeprefix("file://")).is_dir()
    kalamdb.restore(f"file://{world.path}/by url", world.path / "copy")
    with connect(world.path / "copy") as copy:
        assert contents(copy) == world.before


def test_a_store_that_cannot_be_reached_or_used_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match="credentials from the environment"):
        Targets().open("gs://")
    (tmp_path / "t").write_text("in the way")
    store = ObjectTarget("store://t", LocalStore(str(tmp_path)))
    with pytest.raises(Unavailable, match="the object store refuses 'store://t/t/x'"):
        store.put("t/x", iter([b"x"]))
