"""The memory backend keeps the storage contract."""

from pathlib import Path

from kalamdb.storage import StorageBackend
from kalamdb.storage.kv import KvBackend
from kalamdb.storage.memory import MemoryKv
from kalamdb.testing.clock import SimulatedClock
from kalamdb.testing.job_store import JobStoreContract
from kalamdb.testing.storage import StorageContract


class _Memory:
    """A map of one test stands for its directory: reopening finds what was stored."""

    def open_backend(self, path: Path, clock: SimulatedClock) -> StorageBackend:
        if not hasattr(self, "kv"):
            self.kv = MemoryKv()
        return KvBackend(self.kv, clock)


class TestMemory(_Memory, StorageContract):
    pass


class TestMemoryJobs(_Memory, JobStoreContract):
    pass
