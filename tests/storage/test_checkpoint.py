"""A checkpoint is the store of one moment, whatever is written while it is made."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from kalamdb.clock import SystemClock
from kalamdb.storage import Batch, RecordKind, RecordOp, StorageBackend, record_key
from kalamdb.storage.kv import KvBackend
from kalamdb.storage.memory import MemoryKv
from kalamdb.storage.ordered import OrderedKv
from kalamdb.storage.rocks import RocksKv
from kalamdb.testing.clock import SimulatedClock
from kalamdb.testing.faults import FlakyBackend

KEY = record_key(RecordKind.META, "count")


@pytest.fixture(params=["memory", "rocksdb", "flaky"])
def backend(request: pytest.FixtureRequest, tmp_path: Path):
    kv: OrderedKv = MemoryKv() if request.param == "memory" else RocksKv(tmp_path / "live", create=True)
    opened: StorageBackend = KvBackend(kv, SystemClock())
    if request.param == "flaky":
        opened = FlakyBackend(opened, SimulatedClock(auto_advance=True))
    yield opened
    opened.close()


def count(backend: StorageBackend, value: int) -> None:
    inner = backend.inner if isinstance(backend, FlakyBackend) else backend
    inner.commit(Batch(records=[RecordOp(KEY, b"%d" % value)]))


def counted(backend: StorageBackend) -> int:
    record = backend.latest().records([KEY])[0]
    assert record is not None
    return int(record.value)


def test_a_checkpoint_holds_all_commits_up_to_its_seq_and_none_above(backend: StorageBackend, tmp_path: Path) -> None:
    seen: list[int] = []
    stop = threading.Event()
    count(backend, 0)

    def write() -> None:
        value = 0
        while not stop.is_set():
            value += 1
            count(backend, value)

    writer = threading.Thread(target=write)
    writer.start()
    with backend.checkpoint(tmp_path / "copy", lambda: seen.append(counted(backend))) as snapshot:
        found = snapshot.records([KEY])[0]
        assert found is not None and [int(found.value)] == seen
        seq = snapshot.seq
    stop.set()
    writer.join()
    copy = KvBackend(RocksKv(tmp_path / "copy", create=False), SystemClock())
    assert (copy.head(), [counted(copy)]) == (seq, seen)
    count(copy, 1_000_000)
    copy.close()
    assert counted(backend) >= seen[0] and counted(backend) != 1_000_000
