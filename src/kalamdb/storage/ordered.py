"""The little that a store of bytes must do: ordered keys, atomic writes, snapshots, sync."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from kalamdb.storage import Caps

Write = tuple[bytes, bytes | None]
"""A key and its new value; None deletes."""
Range = tuple[bytes, bytes]
"""Start (inclusive) and end (exclusive)."""


class KvReader(Protocol):
    """Reading in key order."""

    def get(self, key: bytes) -> bytes | None:
        """The value of a key."""
        ...

    def get_many(self, wanted: Sequence[bytes]) -> list[bytes | None]:
        """The values of keys, in order."""
        ...

    def scan(
        self, start: bytes, end: bytes, *, reverse: bool = False, limit: int | None = None
    ) -> Iterator[tuple[bytes, bytes]]:
        """Entries with start <= key < end, the first `limit`: what lies behind them is not looked at, which an LSM
        store would do, past every removed entry. Raises Corrupt on a damaged block, never stops short in silence."""
        ...


class KvSnapshot(KvReader, Protocol):
    """A view that later writes do not change."""

    def close(self) -> None:
        """Release it."""
        ...


class OrderedKv(KvReader, Protocol):
    """An ordered key-value store. Thread-safe."""

    caps: Caps

    def write(self, writes: Sequence[Write], ranges: Sequence[Range] = ()) -> None:
        """Apply `ranges` (deletes), then `writes`, atomically; not yet durable. Raises Unavailable."""
        ...

    def snapshot(self) -> KvSnapshot:
        """A view of now."""
        ...

    def sync(self) -> None:
        """Make everything written so far durable; blocks for the disk."""
        ...

    def purge(self, ranges: Sequence[Range]) -> None:
        """Rewrite what is stored so that its files hold no former value of `ranges`. Blocks for the disk."""
        ...

    def checkpoint(self, path: Path) -> None:
        """Write all entries of now into the new folder `path`, as a store that RocksDB opens. Blocks for the disk."""
        ...

    def stats(self) -> Mapping[str, int]:
        """Figures of the store."""
        ...

    def close(self) -> None:
        """Release files and memory."""
        ...
