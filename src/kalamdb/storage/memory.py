"""An ordered store in memory: for tests, and for databases that need not outlive their process."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from sortedcontainers import SortedDict

from kalamdb.storage import Caps
from kalamdb.storage.ordered import Range, Write

_CHUNK_KEYS = 256


class _View:
    """Reads of one version of the map, which nobody changes while a view of it is alive."""

    def __init__(self, entries: SortedDict[bytes, bytes]) -> None:
        self.entries: SortedDict[bytes, bytes] = entries

    def get(self, key: bytes) -> bytes | None:
        found: bytes | None = self.entries.get(key)
        return found

    def get_many(self, wanted: Sequence[bytes]) -> list[bytes | None]:
        return [self.entries.get(key) for key in wanted]

    def scan(
        self, start: bytes, end: bytes, *, reverse: bool = False, limit: int | None = None
    ) -> Iterator[tuple[bytes, bytes]]:
        entries = self.entries
        for key in islice(entries.irange(start, end, inclusive=(True, False), reverse=reverse), limit):
            yield key, entries[key]

    def close(self) -> None:
        self.entries = SortedDict()


class MemoryKv:
    """`OrderedKv` over a sorted map. A write copies the map first when a snapshot of it is alive."""

    caps = Caps(inline=True, multi_node=False, batch_rows_max=4096, snapshot_age_max_s=300.0)

    def __init__(self) -> None:
        self._entries: SortedDict[bytes, bytes] = SortedDict()
        self._lock = threading.Lock()
        self._views: weakref.WeakSet[_View] = weakref.WeakSet()

    def get(self, key: bytes) -> bytes | None:
        value: bytes | None = self._entries.get(key)
        return value

    def get_many(self, wanted: Sequence[bytes]) -> list[bytes | None]:
        with self._lock:
            return [self._entries.get(key) for key in wanted]

    def scan(
        self, start: bytes, end: bytes, *, reverse: bool = False, limit: int | None = None
    ) -> Iterator[tuple[bytes, bytes]]:
        if limit is not None:
            yield from islice(self.scan(start, end, reverse=reverse), limit)
            return
        bounds = (True, False)
        while True:
            with self._lock:
                keys = self._entries.irange(start, end, inclusive=bounds, reverse=reverse)
                chunk = [(key, self._entries[key]) for key in islice(keys, _CHUNK_KEYS)]
            yield from chunk
            if len(chunk) < _CHUNK_KEYS:
                return
            if reverse:
                end = chunk[-1][0]
            else:
                start, bounds = chunk[-1][0], (False, False)

    def write(self, writes: Sequence[Write], ranges: Sequence[Range] = ()) -> None:
        with self._lock:
            if any(view.entries is self._entries for view in self._views):
                self._entries = self._entries.copy()
            entries = self._entries
            for start, end in ranges:
                for key in list(entries.irange(start, end, inclusive=(True, False))):
                    del entries[key]
            for key, value in writes:
                if value is None:
                    entries.pop(key, None)
                else:
                    entries[key] = value

    def snapshot(self) -> _View:
        with self._lock:
            view = _View(self._entries)
            self._views.add(view)
            return view

    def sync(self) -> None:
        """Memory has nothing to wait for."""

    def purge(self, ranges: Sequence[Range]) -> None:
        """The map holds current values only."""

    def checkpoint(self, path: Path) -> None:
        # A database in memory is backed up as one on disk, which it becomes when it is restored.
        from kalamdb.storage.rocks import RocksKv

        view = self.snapshot()
        entries = iter(view.entries.items())
        copy = RocksKv(path, create=True)
        try:
            while chunk := list(islice(entries, _CHUNK_KEYS)):
                copy.write(chunk)
            copy.sync()
        finally:
            copy.close()

    def stats(self) -> Mapping[str, int]:
        return {"entries": len(self._entries)}

    def close(self) -> None:
        """What was stored stays with this object, so that a test can open a backend over it again."""
