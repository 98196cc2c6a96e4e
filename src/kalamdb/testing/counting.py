"""A store that counts what is read from it: what something costs, without a clock."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kalamdb.storage import Batch, StorageBackend
from kalamdb.storage.jobs import Claim, JobInsert, JobMove, JobRow, JobStatus
from kalamdb.storage.kv import KvBackend
from kalamdb.storage.ordered import KvReader, KvSnapshot, OrderedKv, Range, Write
from kalamdb.testing.clock import SimulatedClock
from kalamdb.types import JobId


@dataclass(slots=True)
class Reads:
    """What was read since the last `CountingKv.reset`."""

    keys_read: int = 0
    """Keys that were looked up, and entries that scans passed over or returned."""
    bytes_read: int = 0
    """Of those keys and their values."""
    scans: int = 0
    """Scans begun: an LSM store seeks in every level for each."""

    def add(self, key: bytes, value: bytes | None) -> None:
        """One key was read."""
        self.keys_read += 1
        self.bytes_read += len(key) + len(value or b"")


class _CountingReader:
    """`KvReader` over another."""

    def __init__(self, inner: KvReader, reads: Reads) -> None:
        self._reader = inner
        self._reads = reads

    def get(self, key: bytes) -> bytes | None:
        value = self._reader.get(key)
        self._reads.add(key, value)
        return value

    def get_many(self, wanted: Sequence[bytes]) -> list[bytes | None]:
        values = self._reader.get_many(wanted)
        for key, value in zip(wanted, values, strict=True):
            self._reads.add(key, value)
        return values

    def scan(
        self, start: bytes, end: bytes, *, reverse: bool = False, limit: int | None = None
    ) -> Iterator[tuple[bytes, bytes]]:
        self._reads.scans += 1
        for key, value in self._reader.scan(start, end, reverse=reverse, limit=limit):
            self._reads.add(key, value)
            yield key, value


class _CountingSnapshot(_CountingReader):
    """`KvSnapshot` over another."""

    def __init__(self, inner: KvSnapshot, reads: Reads) -> None:
        super().__init__(inner, reads)
        self._snapshot = inner

    def close(self) -> None:
        self._snapshot.close()


class CountingKv(_CountingReader):
    """`OrderedKv` over another; `reads` says what was read. Counts hold while one thread reads at a time."""

    def __init__(self, inner: OrderedKv) -> None:
        self.reads = Reads()
        super().__init__(inner, self.reads)
        self._kv = inner
        self.caps = inner.caps

    def reset(self) -> None:
        """Count from zero."""
        self.reads.keys_read = self.reads.bytes_read = self.reads.scans = 0

    def write(self, writes: Sequence[Write], ranges: Sequence[Range] = ()) -> None:
        """See OrderedKv."""
        self._kv.write(writes, ranges)

    def snapshot(self) -> KvSnapshot:
        """See OrderedKv; what is read from it counts too."""
        return _CountingSnapshot(self._kv.snapshot(), self.reads)

    def sync(self) -> None:
        """See OrderedKv."""
        self._kv.sync()

    def purge(self, ranges: Sequence[Range]) -> None:
        """See OrderedKv."""
        self._kv.purge(ranges)

    def checkpoint(self, path: Path) -> None:
        """See OrderedKv."""
        self._kv.checkpoint(path)

    def stats(self) -> Mapping[str, int]:
        """See OrderedKv."""
        return self._kv.stats()

    def close(self) -> None:
        """See OrderedKv."""
        self._kv.close()


# What claims read

_EVENTS = (("INFO", "it happened"),)
_FILL_JOBS = 2000


def fill_jobs(backend: StorageBackend, status: JobStatus, count: int, *, first: int = 0) -> None:
    """Jobs of a state, with ids XX-00000000 and so on from `first`."""
    row = JobRow(job_id=JobId(""), job_type="test", status=status, created_at=backend.now_ms())
    ids = iter(range(first, first + count))
    for start in range(0, count, _FILL_JOBS):
        some = min(_FILL_JOBS, count - start)
        inserts = [JobInsert(row, lambda: f"XX-{next(ids):08d}", _EVENTS) for _ in range(some)]
        backend.commit(Batch(jobs=list(inserts)))


def claim_reads(kv: OrderedKv, *, ended: int, claimed: int) -> list[Reads]:
    """What each claim reads that starts one job and ends the one before, as a runner makes them, in an empty store
    that is given `ended` completed jobs first. Closes the store."""
    counting = CountingKv(kv)
    backend = KvBackend(counting, SimulatedClock(), durability="os")
    try:
        fill_jobs(backend, JobStatus.COMPLETED, ended)
        fill_jobs(backend, JobStatus.NEW, claimed, first=10_000_000)
        wanted = Claim(limit=1, types={"test"}, admit_max=50, admitted=_EVENTS, started=lambda row: _EVENTS)
        ends = Batch()
        found = []
        for _ in range(claimed):
            counting.reset()
            commit = backend.claim(wanted, ends)
            found.append(replace(counting.reads))
            assert commit is not None and len(commit.claimed) == 1
            (row,) = (row for row in commit.changed_jobs if row.job_id == commit.claimed[0])
            done = {"status": JobStatus.COMPLETED}
            ends = Batch(jobs=[JobMove(row.job_id, JobStatus.RUNNING, row.lease_id, done, _EVENTS)])
        backend.commit(ends)
        return found
    finally:
        backend.close()


__all__ = ["CountingKv", "Reads", "claim_reads", "fill_jobs"]
