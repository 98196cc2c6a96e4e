"""Every backend keeps the storage contract: RocksDB, memory, and both behind a slow, busy, doubtful network."""

from __future__ import annotations

from pathlib import Path

from kalamdb.storage import StorageBackend
from kalamdb.storage.kv import KvBackend
from kalamdb.storage.memory import MemoryKv
from kalamdb.storage.rocks import RocksKv
from kalamdb.testing.clock import SimulatedClock
from kalamdb.testing.faults import FlakyBackend
from kalamdb.testing.job_store import JobStoreContract
from kalamdb.testing.storage import StorageContract


class _Memory:
    """A map of one test stands for its directory: reopening finds what was stored."""

    def open_backend(self, path: Path, clock: SimulatedClock) -> StorageBackend:
        if not hasattr(self, "kv"):
            self.kv = MemoryKv()
        return KvBackend(self.kv, clock)


class _Rocks:
    def open_backend(self, path: Path, clock: SimulatedClock) -> StorageBackend:
        return KvBackend(RocksKv(path / "rocksdb", create=not (path / "rocksdb").exists()), clock)


class _FlakyMemory(_Memory):
    def open_backend(self, path: Path, clock: SimulatedClock) -> StorageBackend:
        return FlakyBackend(super().open_backend(path, clock), clock, seed=7)


class _FlakyRocks(_Rocks):
    def open_backend(self, path: Path, clock: SimulatedClock) -> StorageBackend:
        return FlakyBackend(super().open_backend(path, clock), clock, seed=8)


class TestMemory(_Memory, StorageContract):
    pass


class TestMemoryJobs(_Memory, JobStoreContract):
    pass


class TestRocksDb(_Rocks, StorageContract):
    pass


class TestRocksDbJobs(_Rocks, JobStoreContract):
    pass


class TestFlakyMemory(_FlakyMemory, StorageContract):
    pass


class TestFlakyMemoryJobs(_FlakyMemory, JobStoreContract):
    pass


class TestFlakyRocksDb(_FlakyRocks, StorageContract):
    pass


class TestFlakyRocksDbJobs(_FlakyRocks, JobStoreContract):
    pass
