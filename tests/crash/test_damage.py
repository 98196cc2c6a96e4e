"""Damaged, cut and missing files, each alone: refused by name, or nothing is missing. Disks and rights that refuse."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

import kalamdb
from kalamdb.database import Database
from kalamdb.testing.crash import SteppedContext
from tests.conftest import run_job
from tests.crash.children import start
from tests.crash.support import Contents, contents, judge, settings, settle

QUIET = {"flush.scheduler_enabled": False, "compaction.enabled": False, "limits.batch_rows_max": 8}
SEED = 20130101


@dataclass(frozen=True)
class Images:
    """Copies of one database: as a crash leaves it, and closed."""

    crashed: Path
    closed: Path
    rows: Contents


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    """Rows in segments of both levels, in RocksDB's table files, and in its log."""
    folder = tmp_path_factory.mktemp("images")
    path = folder / "data"
    with kalamdb.connect(path, **QUIET) as db:
        db.execute("CREATE NAMESPACE app")
        db.execute("CREATE USER TABLE app.t (id BIGINT PRIMARY KEY, v TEXT)")
        db.execute("CREATE SHARED TABLE app.s (id BIGINT PRIMARY KEY, v TEXT)")
        for user in ("ann", "bob"):
            db.execute("INSERT INTO app.t VALUES (1, 'a'), (2, 'b'), (3, 'c')", user=user)
        run_job(db, "STORAGE FLUSH TABLE app.t")
        run_job(db, "STORAGE COMPACT TABLE app.t")
        db.execute("UPDATE app.t SET v = 'u' WHERE id = 1", user="ann")
        run_job(db, "STORAGE FLUSH TABLE app.t")
        for number in range(40):
            db.execute("INSERT INTO app.s VALUES ($1, 'in a table file')", [number])
    with kalamdb.connect(path, **QUIET) as db:
        for number in range(40, 60):
            db.execute("INSERT INTO app.s VALUES ($1, 'in the log')", [number])
        rows = contents(db.context)
        shutil.copytree(path, folder / "crashed")
    shutil.copytree(path, folder / "closed")
    return Images(folder / "crashed", folder / "closed", rows)


KINDS = {
    "FORMAT": "FORMAT",
    "CURRENT": "CURRENT",
    "RocksDB's CURRENT": "gen-1/rocksdb/CURRENT",
    "MANIFEST": "gen-1/rocksdb/MANIFEST-*",
    "WAL": "gen-1/rocksdb/*.log",
    "SST": "gen-1/rocksdb/*.sst",
    "segment": "gen-1/segments/**/*.parquet",
}


def files_of(path: Path, kind: str) -> list[Path]:
    found = sorted(path.glob(KINDS[kind]), key=lambda file: -file.stat().st_size)
    assert found, f"there is no {kind}"
    return found[:2]


def stored(path: Path) -> dict[str, bytes]:
    """All files but LOCK, which says who tried last."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and file != path / "LOCK"
    }


def outcome(path: Path, file: Path, rows: Contents) -> str:
    """Open and read everything: 'refused' or 'unreadable', by name; else 'whole'. Fails when a row is missing."""
    before = stored(path)
    try:
        db = kalamdb.connect(path, **QUIET)
    except kalamdb.Corrupt as exc:
        assert names(str(exc), file), f"{file} is not named: {exc}"
        assert stored(path) == before, "something was written on refusal"
        return "refused"
    with db:
        try:
            found = contents(db.context)
        except kalamdb.Corrupt as exc:
            assert names(str(exc), file), f"{file} is not named: {exc}"
            return "unreadable"
        assert found == rows, f"rows are missing in silence after damage of {file}"
    return "whole"


def names(message: str, file: Path) -> bool:
    """Whether a message names the file, or all files of its kind when RocksDB itself cannot tell which."""
    return str(file) in message or f"'{file.parent}/*{file.suffix}'" in message


def flip(file: Path, at: int, bit: int) -> None:
    body = bytearray(file.read_bytes())
    body[at] ^= 1 << bit
    file.write_bytes(bytes(body))


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_byte_is_refused_with_the_name_of_the_file(
    images: Images, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    seeded = random.Random(f"{SEED} {kind}")
    counts: dict[str, int] = {}
    for source in files_of(images.crashed, kind):
        size = source.stat().st_size
        for at in {0, 1, size // 2, size - 2, size - 1, *(seeded.randrange(size) for _ in range(6))}:
            path = shutil.copytree(images.crashed, tmp_path / "data")
            file = path / source.relative_to(images.crashed)
            flip(file, at, seeded.randrange(8))
            ended = outcome(path, file, images.rows)
            counts[ended] = counts.get(ended, 0) + 1
            # A table file's filter holds no row: without it more is read, not less.
            assert ended != "whole" or kind == "SST", f"byte {at} of {file}: nothing was noticed"
            shutil.rmtree(path)
    with capsys.disabled():
        print(f"\n{kind}, one byte flipped: {counts}")


def test_the_seal_of_a_closed_database_finds_each_flipped_byte(images: Images, tmp_path: Path) -> None:
    for pattern in ("MANIFEST-*", "CURRENT", "SEAL"):
        (source,) = (images.closed / "gen-1" / "rocksdb").glob(pattern)
        size = source.stat().st_size
        for at in (0, size // 2, size - 1):
            path = shutil.copytree(images.closed, tmp_path / f"{pattern[:4]}-{at}")
            file = path / source.relative_to(images.closed)
            flip(file, at, 0)
            assert outcome(path, file, images.rows) == "refused"


def cut(file: Path, size: int) -> None:
    os.truncate(file, size)


LOSSES: dict[str, Callable[[Path], None]] = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: cut(file, 0),
    "half": lambda file: cut(file, file.stat().st_size // 2),
    "one byte short": lambda file: cut(file, file.stat().st_size - 1),
}


@pytest.mark.parametrize(
    ("kind", "loss"),
    # The log of a closed database is empty: all of it is in table files.
    [(kind, loss) for kind in KINDS for loss in LOSSES if kind != "WAL" or loss == "missing"],
)
def test_a_cut_or_missing_file_of_a_closed_database_is_refused_with_its_name(
    images: Images, tmp_path: Path, kind: str, loss: str
) -> None:
    (source, *_) = files_of(images.closed, kind)
    path = shutil.copytree(images.closed, tmp_path / "data")
    file = path / source.relative_to(images.closed)
    LOSSES[loss](file)
    assert outcome(path, file, images.rows) == ("unreadable" if kind == "segment" else "refused")


@pytest.mark.parametrize(
    ("kind", "loss"),
    [(kind, loss) for kind in KINDS for loss in LOSSES if kind != "WAL" or loss == "missing"],
)
def test_a_cut_or_missing_file_after_a_crash_never_loses_a_row_in_silence(
    images: Images, tmp_path: Path, kind: str, loss: str
) -> None:
    (source, *_) = files_of(images.crashed, kind)
    path = shutil.copytree(images.crashed, tmp_path / "data")
    file = path / source.relative_to(images.crashed)
    LOSSES[loss](file)
    ended = outcome(path, file, images.rows)
    # A MANIFEST may end in half an entry: RocksDB was writing it, and what it was about is in the log.
    assert ended != "whole" or (kind, loss) == ("MANIFEST", "one byte short")


def test_a_torn_end_of_the_log_loses_only_what_was_not_durable(images: Images, tmp_path: Path) -> None:
    path = shutil.copytree(images.closed, tmp_path / "data")
    states: list[tuple[int, Contents]] = []
    with kalamdb.connect(path, **QUIET) as db:
        (log,) = (path / "gen-1" / "rocksdb").glob("*.log")
        for number in range(3):
            db.execute("UPDATE app.s SET v = $2 WHERE id = $1", [number, "torn" * 50])
            states.append((log.stat().st_size, contents(db.context)))
        shutil.copytree(path, tmp_path / "crashed")
    seeded = random.Random(SEED)
    for (durable, rows), (following, _) in zip(states, states[1:], strict=False):
        for size in {durable, durable + 1, durable + 6, following - 1, seeded.randrange(durable, following)}:
            copy = shutil.copytree(tmp_path / "crashed", tmp_path / "cut")
            cut(copy / log.relative_to(path), size)
            with kalamdb.connect(copy, **QUIET) as db:
                assert contents(db.context) == rows, f"cut at {size}, durable up to {durable}"
                assert db.check().problems == []
            shutil.rmtree(copy)


def test_a_directory_without_its_format_file_is_never_made_anew(images: Images, tmp_path: Path) -> None:
    path = shutil.copytree(images.closed, tmp_path / "data")
    body = (path / "FORMAT").read_bytes()
    (path / "FORMAT").unlink()
    with pytest.raises(kalamdb.Corrupt, match="FORMAT' is missing"):
        kalamdb.connect(path, **QUIET)
    (path / "FORMAT").write_bytes(body)
    with kalamdb.connect(path, **QUIET) as db:
        assert contents(db.context) == images.rows


# Disks and rights that refuse


class Disk:
    """An OnStep that refuses to write segments while it is full."""

    def __init__(self) -> None:
        self.is_full = False

    def __call__(self, point: str, path: Path | None) -> None:
        if self.is_full and point == "before write segment":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_a_full_disk_stops_segments_and_nothing_else(images: Images, tmp_path: Path) -> None:
    path, disk = shutil.copytree(images.closed, tmp_path / "data"), Disk()
    many = ", ".join(f"({number}, 'many')" for number in range(100, 120))
    with Database(SteppedContext(path, settings(), disk)) as db:
        disk.is_full = True
        with pytest.raises(kalamdb.Unavailable, match="the disk is full; free some space"):
            db.execute(f"INSERT INTO app.s VALUES {many}")
        job = db.jobs.create_job("flush", {"table_id": "app.s"}, max_retries=0)
        ended = db.jobs.wait(job.id, 30)
        assert ended.status == "failed"
        assert "the disk is full" in ended.message
        assert contents(db.context) == images.rows
        db.execute("INSERT INTO app.s VALUES (200, 'few')")
        disk.is_full = False
        db.execute(f"INSERT INTO app.s VALUES {many}")
        run_job(db, "STORAGE FLUSH TABLE app.s")
        expected = contents(db.context)
        assert len(expected["app.s", ""]) == 60 + 1 + 20
    with kalamdb.connect(path, **QUIET) as db:
        assert contents(db.context) == expected
        settle(db)
        judge(db)


def _write_until_refused(path: Path, output: Connection, prepare: Callable[[Path], None] | None) -> None:
    """Write until the database refuses; sends how many rows were acknowledged, the refusals, and what can be read."""
    with kalamdb.connect(path, **QUIET, **{"storage.rocksdb.write_buffer_size": 1 << 20}) as db:
        before = contents(db.context)
        if prepare is not None:
            prepare(path)
        acknowledged, refusals = 0, []
        try:
            while acknowledged < 5000:
                db.execute("INSERT INTO app.s VALUES ($1, $2)", [1000 + acknowledged, "x" * 2000])
                acknowledged += 1
        except kalamdb.Unavailable as exc:
            refusals.append(str(exc))
        try:
            db.execute("INSERT INTO app.t VALUES (77, 'after')", user="ann")
        except kalamdb.Unavailable as exc:
            refusals.append(str(exc))
        read = contents(db.context)
        unchanged = all(read[scope] == rows for scope, rows in before.items() if scope[0] != "app.s")
        rows = {number: text for number, text in read["app.s", ""].items() if number < 1000}
        output.send((acknowledged, refusals, unchanged and rows == before["app.s", ""]))


def _limit_files(path: Path) -> None:
    size = max(file.stat().st_size for file in (path / "gen-1" / "rocksdb").iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 200_000, resource.RLIM_INFINITY))


def _become_nobody(path: Path) -> None:
    os.setgid(65534)
    os.setuid(65534)


def _run_child(target: Callable[..., None], *arguments: Any) -> Any:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = start(target, *arguments[:1], sender, *arguments[1:])
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        child.join()
        raise AssertionError(f"the child ended with {child.exitcode}") from None
    child.join()
    assert child.exitcode == 0
    return answer


def test_a_file_size_limit_refuses_writes_names_the_cause_and_loses_nothing(images: Images, tmp_path: Path) -> None:
    path = shutil.copytree(images.closed, tmp_path / "data")
    acknowledged, refusals, readable = _run_child(_write_until_refused, path, _limit_files)
    assert 10 < acknowledged < 5000
    assert "File too large" in refusals[0]
    assert "writes are refused" in refusals[1]
    assert readable
    with kalamdb.connect(path, **QUIET) as db:
        found = contents(db.context)["app.s", ""]
        assert set(range(1000, 1000 + acknowledged)) <= found.keys()
        assert len(found) - 60 - acknowledged in (0, 1)
        assert db.check().problems == []


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter; those of pytest are root's alone."""
    folder = Path(tempfile.mkdtemp(prefix="kalamdb-test-"))
    folder.chmod(0o755)
    yield folder
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder)


def test_a_process_that_lost_its_rights_reads_on_and_refuses_writes(images: Images, open_folder: Path) -> None:
    path = shutil.copytree(images.closed, open_folder / "data")
    prepare = _become_nobody if os.geteuid() == 0 else _forbid
    acknowledged, refusals, readable = _run_child(_write_until_refused, path, prepare)
    assert "Permission denied" in refusals[0]
    assert "writes are refused" in refusals[1]
    assert readable
    _allow(path)
    with kalamdb.connect(path, **QUIET) as db:
        found = contents(db.context)["app.s", ""]
        assert set(range(1000, 1000 + acknowledged)) <= found.keys()
        assert len(found) - 60 - acknowledged in (0, 1)
        assert db.check().problems == []


def _forbid(path: Path) -> None:
    for folder in [path, *path.rglob("*")]:
        if folder.is_dir():
            folder.chmod(0o555)


def _allow(path: Path) -> None:
    for folder in [path, *path.rglob("*")]:
        if folder.is_dir():
            folder.chmod(0o755)


def _large_statement_without_rights(path: Path, output: Connection, prepare: Callable[[Path], None]) -> None:
    with kalamdb.connect(path, **QUIET) as db:
        prepare(path)
        many = ", ".join(f"({number}, 'many')" for number in range(100, 120))
        try:
            db.execute(f"INSERT INTO app.s VALUES {many}")
        except kalamdb.Unavailable as exc:
            output.send((str(exc), contents(db.context)))


def test_a_segment_that_may_not_be_written_is_refused_with_the_cause(images: Images, open_folder: Path) -> None:
    path = shutil.copytree(images.closed, open_folder / "data")
    prepare = _become_nobody if os.geteuid() == 0 else _forbid
    message, rows = _run_child(_large_statement_without_rights, path, prepare)
    assert "permission is denied; check the rights of the directory" in message
    assert rows == images.rows


def _open_as_nobody(path: Path, output: Connection, prepare: Callable[[Path], None]) -> None:
    prepare(path)
    try:
        kalamdb.connect(path, **QUIET).close()
    except kalamdb.Unavailable as exc:
        output.send(str(exc))


def test_a_directory_that_may_not_be_written_is_refused_with_the_cause(images: Images, open_folder: Path) -> None:
    path = shutil.copytree(images.closed, open_folder / "data")
    if os.geteuid() != 0:
        (path / "LOCK").chmod(0o444)
    prepare = _become_nobody if os.geteuid() == 0 else _forbid
    message = _run_child(_open_as_nobody, path, prepare)
    assert str(path) in message
    assert "Permission denied; check its rights" in message
