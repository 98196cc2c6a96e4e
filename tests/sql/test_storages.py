"""Storages: directories of file systems that tables are kept in (surface reference 3.9)."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import kalamdb
from kalamdb.database import Database
from kalamdb.errors import Conflict, Denied, InvalidRequest, KalamDbError, NotFound
from kalamdb.storages import MARK_NAME
from tests.conftest import run_job
from tests.sql.conftest import rows

QUIET = {"flush.scheduler_enabled": False, "compaction.enabled": False}
STATE = "SELECT * FROM {0} ORDER BY 1"


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    with kalamdb.connect(tmp_path / "data", **QUIET) as opened:
        yield opened


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tmp_path / "disk" / "cold"


def make(db: Database, base: Path, storage: str = "archive") -> None:
    """A storage and two tables in it."""
    db.execute(f"CREATE STORAGE {storage} TYPE filesystem PATH '{base}'")
    db.execute("CREATE NAMESPACE app")
    db.execute(f"CREATE TABLE app.t (id INT PRIMARY KEY, v TEXT) WITH (STORAGE_ID = '{storage}')")
    db.execute(f"CREATE USER TABLE app.u (id INT PRIMARY KEY, v TEXT) WITH (STORAGE_ID = '{storage}')")


def fill(db: Database) -> None:
    """Two segments of each table."""
    for number in range(2):
        db.execute(f"INSERT INTO app.t VALUES ({number}, 'shared')")
        db.execute(f"INSERT INTO app.u VALUES ({number}, 'anna''s')", user="anna")
        for table in ("app.t", "app.u"):
            run_job(db, f"STORAGE FLUSH TABLE {table}")


def segments(folder: Path) -> list[str]:
    """Segment files below a folder, without their own names."""
    return sorted(path.parent.relative_to(folder).as_posix() for path in folder.rglob("*.parquet"))


def test_a_storage_is_made_changed_shown_and_dropped(db: Database, base: Path) -> None:
    made = db.execute(
        f"CREATE STORAGE cold TYPE filesystem NAME 'Cold disk' DESCRIPTION 'slow' BASE_DIRECTORY '{base}' "
        "SHARED_TABLES_TEMPLATE '{namespace}/{tableName}' USER_TABLES_TEMPLATE '{namespace}/{tableName}/{userId}' "
        """CREDENTIALS '{"user": "u"}' REGION 'eu' CONFIG '{"a": 1}'"""
    )
    assert made.message == "Storage 'cold' created successfully"
    columns = "storage_id, storage_name, description, storage_type, base_directory, credentials, config_json"
    [local, cold] = rows(db, f"SELECT {columns} FROM system.storages")
    assert local[0] == "local"
    assert cold == ("cold", "Cold disk", "slow", "filesystem", str(base), {"user": "u"}, {"region": "eu", "a": 1})
    assert base.is_dir()
    db.execute("ALTER STORAGE cold SET NAME 'Colder' SET DESCRIPTION 'slower'")
    db.execute("ALTER STORAGE cold SET CONFIG = '{}'; ALTER STORAGE local SET NAME 'Here'")
    assert rows(db, "SELECT storage_name, description, config_json FROM system.storages") == [
        ("Here", "Segments in the data directory", None),
        ("Colder", "slower", {}),
    ]
    assert [row["storage_id"] for row in db.execute("SHOW STORAGES").dicts()] == ["local", "cold"]
    assert db.execute("DROP STORAGE cold").message == "Storage 'cold' dropped successfully"
    assert db.execute("DROP STORAGE IF EXISTS cold").message == "Storage 'cold' does not exist"
    assert not (base / MARK_NAME).exists()


def test_the_name_defaults_to_the_id_and_if_not_exists_is_obeyed(db: Database, base: Path) -> None:
    db.execute("CREATE STORAGE cold TYPE filesystem PATH $1", [str(base)])
    again = db.execute(f"CREATE STORAGE IF NOT EXISTS cold TYPE filesystem PATH '{base}'")
    assert again.message == "Storage 'cold' already exists"
    assert rows(db, "SELECT storage_name FROM system.storages WHERE storage_id = 'cold'") == [("cold",)]


@pytest.mark.parametrize(
    ("statement", "error", "wanted"),
    [
        ("CREATE STORAGE x TYPE filesystem PATH ''", InvalidRequest, "PATH of a storage cannot be empty"),
        ("CREATE STORAGE x TYPE filesystem", InvalidRequest, "needs PATH"),
        ("CREATE STORAGE x PATH '{base}'", InvalidRequest, "needs TYPE"),
        ("CREATE STORAGE local TYPE filesystem PATH '{base}'", Conflict, "Storage 'local' already exists"),
        ("CREATE STORAGE taken TYPE filesystem PATH '{base}2'", Conflict, "Storage 'taken' already exists"),
        ("CREATE STORAGE x TYPE filesystem PATH '{base}' USER_TABLES_TEMPLATE 'a'", InvalidRequest, "{userId}"),
        ("CREATE STORAGE x TYPE s3 BUCKET 'b' REGION 'r'", InvalidRequest, "TYPE s3 yet; TYPE filesystem is offered"),
        ("CREATE STORAGE x TYPE tape PATH '{base}'", InvalidRequest, "not one of filesystem, s3, gcs, azure"),
        ("CREATE STORAGE x TYPE filesystem PATH '{base}/../y'", InvalidRequest, "must not contain '..'"),
        ("CREATE STORAGE x TYPE filesystem PATH '/etc/x'", InvalidRequest, "system directory /etc"),
        ("CREATE STORAGE x TYPE filesystem PATH '/'", InvalidRequest, "root of the filesystem"),
        ("CREATE STORAGE x TYPE filesystem PATH '{data}/x'", InvalidRequest, "overlaps the data directory"),
        ("CREATE STORAGE x TYPE filesystem PATH '{base}1/x'", InvalidRequest, "overlaps the storage 'taken'"),
        ("CREATE STORAGE x TYPE filesystem PATH '{base}' CONFIG '[]'", InvalidRequest, "must be a JSON object"),
        ("CREATE STORAGE x TYPE filesystem PATH '{base}' NAME ''", InvalidRequest, "NAME of storage 'x'"),
        ("CREATE STORAGE x TYPE filesystem PATH 'a' PATH 'b'", InvalidRequest, "says twice"),
        ("ALTER STORAGE taken SET PATH 'x'", InvalidRequest, "stands where NAME"),
        ("ALTER STORAGE taken SET USER_TABLES_TEMPLATE 'x'", InvalidRequest, "must contain {userId}"),
        ("ALTER STORAGE nowhere SET NAME 'x'", NotFound, "Storage 'nowhere' does not exist"),
        ("DROP STORAGE nowhere", NotFound, "Storage 'nowhere' does not exist"),
        ("DROP STORAGE local", InvalidRequest, "cannot be dropped"),
        ("STORAGE CHECK nowhere", NotFound, "Storage 'nowhere' does not exist"),
        ("CREATE TABLE t (id INT PRIMARY KEY) WITH (STORAGE_ID = 'nowhere')", NotFound, "Storage 'nowhere' does not"),
    ],
)
def test_what_cannot_be_is_refused(
    db: Database, base: Path, tmp_path: Path, statement: str, error: type[KalamDbError], wanted: str
) -> None:
    db.execute(f"CREATE STORAGE taken TYPE filesystem PATH '{base}1'")
    text = statement.replace("{base}", str(base)).replace("{data}", str(tmp_path / "data"))
    with pytest.raises(error, match=re.escape(wanted)):
        db.execute(text)
    assert len(rows(db, "SHOW STORAGES")) == 2
    assert not (base / MARK_NAME).exists()


def test_storages_are_for_admins_but_all_see_them(db: Database, base: Path) -> None:
    db.execute(f"""CREATE STORAGE cold TYPE filesystem PATH '{base}' CREDENTIALS '{{"key": "hush"}}'""")
    for statement in (
        f"CREATE STORAGE x TYPE filesystem PATH '{base}x'",
        "ALTER STORAGE cold SET NAME 'x'",
        "DROP STORAGE cold",
        "STORAGE CHECK cold",
    ):
        with pytest.raises(Denied):
            db.execute(statement, role="service")
    shown = db.execute("SHOW STORAGES", role="user").dicts()
    assert [row["credentials"] for row in shown] == [None, "***"]
    assert db.execute("SHOW STORAGES").dicts()[1]["credentials"] == {"key": "hush"}


def test_a_check_writes_reads_lists_and_removes_a_file(db: Database, base: Path) -> None:
    db.execute(f"CREATE STORAGE cold TYPE filesystem PATH '{base}'")
    [plain] = db.execute("STORAGE CHECK cold").dicts()
    assert list(plain) == [
        "storage_id", "status", "readable", "writable", "listable", "deletable", "latency_ms", "total_bytes",
        "used_bytes", "error", "tested_at",
    ]  # fmt: skip
    assert (plain["status"], plain["error"], plain["total_bytes"]) == ("healthy", None, None)
    assert plain["readable"] and plain["writable"] and plain["listable"] and plain["deletable"]
    [extended] = db.execute("STORAGE CHECK cold EXTENDED").dicts()
    assert extended["total_bytes"] > extended["used_bytes"] > 0
    assert db.execute("STORAGE CHECK local").dicts()[0]["status"] == "healthy"
    assert [path.name for path in base.iterdir()] == [MARK_NAME]
    (base / MARK_NAME).unlink()
    base.rmdir()
    [gone] = db.execute("STORAGE CHECK cold EXTENDED").dicts()
    assert (gone["status"], gone["writable"]) == ("unreachable", False) and "is the directory mounted?" in gone["error"]


def test_a_directory_serves_one_database(db: Database, base: Path, tmp_path: Path) -> None:
    db.execute(f"CREATE STORAGE cold TYPE filesystem PATH '{base}'")
    with kalamdb.connect(tmp_path / "other", **QUIET) as other:
        with pytest.raises(Conflict, match="holds files of database"):
            other.execute(f"CREATE STORAGE cold TYPE filesystem PATH '{base}'")
        db.execute("DROP STORAGE cold")
        other.execute(f"CREATE STORAGE cold TYPE filesystem PATH '{base}'")


def test_segments_of_a_table_lie_in_its_storage(db: Database, base: Path, tmp_path: Path) -> None:
    make(db, base)
    fill(db)
    uids = {entry.definition.name: entry.definition.uid for entry in db.context.catalog.tables("app")}
    t, u = f"app/t/{uids['t']}", f"app/u/{uids['u']}"
    assert segments(base) == [t, t, u, u]
    assert segments(tmp_path / "data") == []
    assert (base / t / "manifest.json").is_file()
    assert rows(db, STATE.format("app.t")) == [(0, "shared"), (1, "shared")]
    assert rows(db, STATE.format("app.u"), user="anna") == [(0, "anna's"), (1, "anna's")]
    assert rows(db, "SELECT table_name, storage_id FROM system.tables WHERE namespace_id = 'app' ORDER BY 1") == [
        ("t", "archive"),
        ("u", "archive"),
    ]
    run_job(db, "STORAGE COMPACT TABLE app.t")
    [live] = db.context.store.state(uids["t"]).segments
    assert live.path.parent == base / t and live.path.is_file()
    assert db.check().problems == []


def test_a_table_in_a_storage_outlives_a_restart(tmp_path: Path, base: Path) -> None:
    with kalamdb.connect(tmp_path / "data", **QUIET) as db:
        make(db, base)
        fill(db)
    with kalamdb.connect(tmp_path / "data", **QUIET) as db:
        assert rows(db, STATE.format("app.t")) == [(0, "shared"), (1, "shared")]
        db.execute("INSERT INTO app.t VALUES (2, 'later')")
        run_job(db, "STORAGE FLUSH TABLE app.t")
        assert len(segments(base)) == 5
        assert db.check().problems == []


def test_a_storage_that_tables_use_stays_until_their_files_are_gone(db: Database, base: Path) -> None:
    make(db, base)
    fill(db)
    with pytest.raises(Conflict, match="is used by table 'app.t'"):
        db.execute("DROP STORAGE archive")
    run_job(db, "DROP TABLE app.t")
    with pytest.raises(Conflict, match="is used by table 'app.u'"):
        db.execute("DROP STORAGE archive")
    run_job(db, "DROP TABLE app.u")
    assert [path.name for path in base.iterdir()] == [MARK_NAME]
    db.execute("DROP STORAGE archive")
    assert list(base.iterdir()) == []


def test_a_sweep_removes_what_nobody_names_from_every_storage(db: Database, base: Path) -> None:
    make(db, base)
    fill(db)
    uid = db.context.catalog.tables("app")[0].definition.uid
    stray = base / "app" / "t" / str(uid) / "01ARZ3NDEKTSV4RRFFQ69G5FAV.parquet"
    stray.write_bytes(b"half")
    stranger = base / "old" / "gone" / "987654"
    stranger.mkdir(parents=True)
    (stranger / "x.parquet").write_bytes(b"old")
    assert db.check().strays >= 2
    db.jobs.wait(db.jobs.create_job("cleanup", {"operation": "sweep"}).id)
    assert not stray.exists() and not (base / "old").exists()
    assert len(segments(base)) == 4 and (base / MARK_NAME).exists()
    assert db.check().strays == 0


def test_retention_and_truncate_work_in_a_storage(db: Database, base: Path) -> None:
    make(db, base)
    fill(db)
    db.execute("DELETE FROM app.t WHERE id = 0")
    db.jobs.wait(db.jobs.create_job("retention", {"table_id": "app.t", "retention_hours": 0}).id)
    assert rows(db, STATE.format("app.t")) == [(1, "shared")]
    run_job(db, "TRUNCATE TABLE app.t")
    assert rows(db, STATE.format("app.t")) == [] and len(segments(base)) == 2
    assert db.check().problems == []


def test_a_restored_database_keeps_the_tables_of_a_storage_itself(tmp_path: Path, base: Path) -> None:
    with kalamdb.connect(tmp_path / "data", **QUIET) as db:
        make(db, base)
        fill(db)
        job = db.backup(tmp_path / "backup")
        assert job.status == "completed"
        kalamdb.restore(tmp_path / "backup", tmp_path / "copy")
        before = segments(base)
        with kalamdb.connect(tmp_path / "copy", **QUIET) as copy:
            assert rows(copy, STATE.format("app.t")) == [(0, "shared"), (1, "shared")]
            assert rows(copy, STATE.format("app.u"), user="anna") == [(0, "anna's"), (1, "anna's")]
            run_job(copy, "STORAGE COMPACT TABLE app.t")
            run_job(copy, "DROP TABLE app.u")
            copy.jobs.wait(copy.jobs.create_job("cleanup", {"operation": "sweep"}).id)
            assert copy.check().problems == []
            assert "restored from" in copy.execute("STORAGE CHECK archive").dicts()[0]["error"]
            run_job(copy, "DROP TABLE app.t")
            copy.execute("DROP STORAGE archive")
        assert segments(base) == before and (base / MARK_NAME).exists()
        assert db.check().problems == []


def test_a_write_to_a_storage_that_is_gone_says_so_and_makes_no_directory(db: Database, base: Path) -> None:
    make(db, base)
    db.execute("INSERT INTO app.t VALUES (1, 'x')")
    (base / MARK_NAME).unlink()
    base.rmdir()
    job = db.jobs.wait(db.jobs.create_job("flush", {"table_id": "app.t"}, max_retries=0).id)
    assert job.status == "failed" and "is it mounted?" in job.message and not base.exists()
    base.mkdir()
    run_job(db, "STORAGE FLUSH TABLE app.t")
    assert rows(db, "SELECT * FROM app.t") == [(1, "x")]


def test_after_a_restore_in_place_the_files_in_the_storage_are_left_alone(tmp_path: Path, base: Path) -> None:
    with kalamdb.connect(tmp_path / "data", **QUIET) as db:
        make(db, base)
        fill(db)
        db.backup(tmp_path / "backup")
        db.execute("DELETE FROM app.t WHERE true")
        run_job(db, f"RESTORE DATABASE FROM '{tmp_path / 'backup'}'")
    before = segments(base)
    with kalamdb.connect(tmp_path / "data", **QUIET) as db:
        assert rows(db, STATE.format("app.t")) == [(0, "shared"), (1, "shared")]
        db.execute("CREATE TABLE app.later (id INT PRIMARY KEY) WITH (STORAGE_ID = 'archive')")
        db.execute("INSERT INTO app.later VALUES (1)")
        run_job(db, "STORAGE FLUSH TABLE app.later")
        db.jobs.wait(db.jobs.create_job("cleanup", {"operation": "sweep"}).id)
        assert (db.check().problems, segments(base)) == ([], before)
        for table in ("t", "u", "later"):
            run_job(db, f"DROP TABLE app.{table}")
        db.execute("DROP STORAGE archive")
        with pytest.raises(Conflict, match=f"remove '{MARK_NAME}' in it"):
            db.execute(f"CREATE STORAGE archive TYPE filesystem PATH '{base}'")


def attempts(count: int, db: Database, statement: str) -> None:
    """Run a statement over and over, whatever another thread does meanwhile."""
    for number in range(count):
        with suppress(Conflict, NotFound):
            db.execute(statement.replace("#", str(number)))


@pytest.mark.parametrize(
    ("made", "dropped"),
    [
        ("CREATE STORAGE cold TYPE filesystem PATH '{base}'", "DROP STORAGE cold"),
        ("CREATE NAMESPACE IF NOT EXISTS gone", "DROP NAMESPACE gone"),
    ],
)
def test_a_table_never_joins_what_is_being_dropped(db: Database, base: Path, made: str, dropped: str) -> None:
    made = made.replace("{base}", str(base))
    db.execute(made)
    db.execute("CREATE NAMESPACE IF NOT EXISTS gone; CREATE NAMESPACE IF NOT EXISTS app")
    into = "gone.t#" if "NAMESPACE" in made else "app.t#"
    storage = "local" if "NAMESPACE" in made else "cold"
    statements = [
        f"CREATE TABLE {into} (id INT PRIMARY KEY) WITH (STORAGE_ID = '{storage}')",
        f"DROP TABLE {into}",
        dropped,
        made,
    ]
    threads = [threading.Thread(target=attempts, args=(40, db, statement)) for statement in statements]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert db.check().problems == []
