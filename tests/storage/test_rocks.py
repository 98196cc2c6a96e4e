"""RocksDB as it is used here: settings of this opening, closing on a disk that refuses."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from kalamdb.errors import Corrupt, Unavailable
from kalamdb.storage.log_check import check_log, first_damaged
from kalamdb.storage.rocks import RocksKv


def fill(kv: RocksKv, count: int) -> None:
    for number in range(count):
        kv.write([(b"%06d" % number, b"x" * 2000)])
    kv.sync()


def test_the_settings_of_an_opening_hold_whatever_the_store_was_made_with(tmp_path: Path) -> None:
    RocksKv(tmp_path / "db", create=True, write_buffer_bytes=64 << 20).close()
    kv = RocksKv(tmp_path / "db", create=False, write_buffer_bytes=1 << 20)
    fill(kv, 1500)
    assert kv.stats()["sst_bytes"] > 0
    kv.close()


@pytest.fixture
def limited_files() -> Iterator[None]:
    """No file may grow beyond some bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_store_whose_disk_refused_closes_and_opens_again_with_all_that_was_synced(
    tmp_path: Path, limited_files: None, caplog: pytest.LogCaptureFixture
) -> None:
    kv = RocksKv(tmp_path / "db", create=True)
    synced = 0
    with pytest.raises(Unavailable, match="File too large"):
        while True:
            kv.write([(b"%06d" % synced, b"x" * 2000)])
            kv.sync()
            synced += 1
    kv.close()
    assert "refuses" in caplog.text
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    again = RocksKv(tmp_path / "db", create=False)
    assert [key for key, _ in again.scan(b"", b"\xff")][:synced] == [b"%06d" % number for number in range(synced)]
    again.close()


def test_the_damaged_record_of_a_log_is_found(tmp_path: Path) -> None:
    kv = RocksKv(tmp_path / "db", create=True)
    fill(kv, 40)
    (log,) = (tmp_path / "db").glob("*.log")
    body = log.read_bytes()
    kv.close()
    copy = tmp_path / "copy.log"
    copy.write_bytes(body)
    assert (check_log(copy).damaged_at, check_log(copy).torn_at, first_damaged(copy)) == (None, None, None)
    damaged = bytearray(body)
    damaged[40_000] ^= 1
    copy.write_bytes(damaged)
    found = first_damaged(copy)
    assert found is not None
    assert found < 40_000
    copy.write_bytes(body[:-1])
    assert check_log(copy).torn_at is not None
    assert first_damaged(copy) is None


def test_a_store_without_any_log_is_refused(tmp_path: Path) -> None:
    RocksKv(tmp_path / "db", create=True).close()
    for path in [*(tmp_path / "db").glob("*.log"), tmp_path / "db" / "SEAL"]:
        path.unlink()
    with pytest.raises(Corrupt, match=r"write-ahead log '.*\*\.log' is missing"):
        RocksKv(tmp_path / "db", create=False)
