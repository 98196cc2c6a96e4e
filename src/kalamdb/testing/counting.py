"""A store that counts what is read from it: what something costs, without a clock."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kalamdb.storage.ordered import KvReader, KvSnapshot, OrderedKv, Range, Write


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


__all__ = ["CountingKv", "Reads"]
