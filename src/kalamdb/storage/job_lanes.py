"""Jobs that wait, in the order in which they are to start, over an index of an ordered key-value store.

A *lane* is a queue, a type and a priority; its entries lie side by side, by due time. The first entries
of each lane are kept in memory, so a claim reads the store once in a few hundred jobs and never passes
over what was claimed before, which an LSM store would have to skip one by one.
"""

from __future__ import annotations

import struct
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field
from functools import lru_cache
from heapq import heapify, heappop, heapreplace
from itertools import islice
from typing import Final

from kalamdb.storage import keys
from kalamdb.storage.jobs import AGEING_MS, PRIORITY_MAX, JobRow
from kalamdb.storage.ordered import KvReader
from kalamdb.types import JobId

_PRIORITY: Final = struct.Struct(">H")
_NUMBER: Final = struct.Struct(">Q")
_KEPT_MAX: Final = 256
_EMPTY_LANES_MAX: Final = 4096


def lane_key(space: bytes, row: JobRow) -> bytes:
    """Entry of a waiting job: queue, type, priority, due time, id."""
    return _lane_prefix(space, row.queue, row.job_type, row.priority) + _NUMBER.pack(row.due_at) + row.job_id.encode()


@lru_cache(1024)
def _lane_prefix(space: bytes, queue: str, job_type: str, priority: int) -> bytes:
    name = keys.encode_text(queue) + keys.encode_text(job_type)
    return space + name + _PRIORITY.pack(priority + PRIORITY_MAX)


@dataclass(slots=True)
class Lane:
    """One queue, type and priority."""

    prefix: bytes
    queue: str
    job_type: str
    priority: int
    first: list[bytes] = field(default_factory=list)
    """The first entries, without a gap."""
    complete: bool = False
    """Whether `first` holds all entries."""
    floor: bytes = b""
    """No entry that is not in `first` lies below it."""

    def due(self, key: bytes) -> int:
        """Due time of an entry."""
        return int(_NUMBER.unpack_from(key, len(self.prefix))[0])

    def job_id(self, key: bytes) -> JobId:
        """The job of an entry."""
        return JobId(key[len(self.prefix) + 8 :].decode())


class WaitingJobs:
    """All lanes. Not thread-safe: used under the commit lock, kept in step by `joined` and `left`."""

    def __init__(self, kv: KvReader, space: bytes) -> None:
        self._kv = kv
        self._space = space
        self._lanes: dict[bytes, Lane] = {}
        start, end = space, _after(space)
        while (found := next(iter(kv.scan(start, end)), None)) is not None:
            start = _after(self._lane_of(found[0]).prefix)

    def _lane_of(self, key: bytes) -> Lane:
        at = key.index(b"\x00\x01", 1) + 2
        at = key.index(b"\x00\x01", at) + 2
        prefix = key[: at + 2]
        lane = self._lanes.get(prefix)
        if lane is None:
            queue, _, job_type = prefix[1:-4].partition(b"\x00\x01")
            lane = Lane(
                prefix,
                queue.replace(b"\x00\xff", b"\x00").decode(),
                job_type.replace(b"\x00\xff", b"\x00").decode(),
                int.from_bytes(prefix[-2:], "big") - PRIORITY_MAX,
                floor=prefix,
            )
            self._lanes[prefix] = lane
        return lane

    def joined(self, key: bytes) -> None:
        """An entry was written."""
        lane = self._lane_of(key)
        if lane.complete or (lane.first and key < lane.first[-1]):
            insort(lane.first, key)
            if len(lane.first) > _KEPT_MAX:
                lane.floor = lane.first.pop()
                lane.complete = False
        else:
            lane.floor = min(lane.floor, key)

    def left(self, key: bytes) -> None:
        """An entry was removed."""
        lane = self._lane_of(key)
        at = bisect_left(lane.first, key)
        if at < len(lane.first) and lane.first[at] == key:
            del lane.first[at]

    def _head(self, lane: Lane) -> bytes | None:
        if not lane.first and not lane.complete:
            lane.first = [key for key, _ in islice(self._kv.scan(lane.floor, _after(lane.prefix)), _KEPT_MAX)]
            lane.complete = len(lane.first) < _KEPT_MAX
            lane.floor = lane.first[-1] + b"\x00" if lane.first else lane.floor
        return lane.first[0] if lane.first else None

    def _open(self, is_open: Callable[[Lane], bool]) -> Iterator[tuple[Lane, bytes]]:
        """Lanes that are open and not empty, with their first entries."""
        for lane in list(self._lanes.values()):
            if not is_open(lane):
                continue
            head = self._head(lane)
            if head is not None:
                yield lane, head
            elif len(self._lanes) > _EMPTY_LANES_MAX:
                # Otherwise it stays: a lane known to be empty need not be read when it fills again.
                del self._lanes[lane.prefix]

    def due(self, now_ms: int, is_open: Callable[[Lane], bool]) -> Iterator[tuple[Lane, bytes]]:
        """Entries due at `now_ms` in the order to start them; asks again before each whether its lane is open."""
        heap = [
            (lane.due(head) - lane.priority * AGEING_MS, head, lane.prefix)
            for lane, head in self._open(is_open)
            if lane.due(head) <= now_ms
        ]
        heapify(heap)
        followers: dict[bytes, Iterator[bytes]] = {}
        while heap:
            _, key, prefix = heap[0]
            lane = self._lanes[prefix]
            if not is_open(lane):
                heappop(heap)
                continue
            yield lane, key
            follower = followers.get(prefix)
            if follower is None:
                follower = followers[prefix] = self._following(lane)
            key = next(follower, b"")
            if not key or lane.due(key) > now_ms:
                heappop(heap)
            else:
                heapreplace(heap, (lane.due(key) - lane.priority * AGEING_MS, key, prefix))

    def _following(self, lane: Lane) -> Iterator[bytes]:
        """Entries of a lane after the first. Neither the store nor `first` changes meanwhile."""
        yield from lane.first[1:]
        if not lane.complete:
            for key, _ in self._kv.scan(lane.floor, _after(lane.prefix)):
                yield key

    def next_due_ms(self, after_ms: int, types: Set[str] | None) -> int | None:
        """Due time of the first entry (of these types) that is not due at `after_ms`."""
        found: int | None = None
        for lane, _ in self._open(lambda lane: types is None or lane.job_type in types):
            start = lane.prefix + _NUMBER.pack(after_ms + 1)
            at = bisect_left(lane.first, start)
            if at < len(lane.first):
                key: bytes | None = lane.first[at]
            elif lane.complete:
                key = None
            else:
                key = next((key for key, _ in self._kv.scan(max(start, lane.floor), _after(lane.prefix))), None)
            if key is not None:
                found = lane.due(key) if found is None else min(found, lane.due(key))
        return found


def _after(prefix: bytes) -> bytes:
    end = keys.prefix_end(prefix)
    assert end is not None
    return end
