"""A subscription as an iterator, for the program that embeds the database."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kalamdb.errors import Closed, Denied, InvalidRequest, KalamDbError, NotFound, Timeout, Unavailable
from kalamdb.live.changes import Change
from kalamdb.live.queries import LiveQueries
from kalamdb.live.subscription import Batch, LiveCode, LiveRequest, LiveSubscription
from kalamdb.sql.caller import Caller
from kalamdb.types import Seq

_QUEUE_BYTES_MAX = 4 << 20
_log = logging.getLogger("kalamdb.live")


class Subscription:
    """Changes of a table, one after another; made by `Database.subscribe`.

    Iterating waits for the next change and ends when `close` is called; it raises Denied, NotFound, InvalidRequest,
    Unavailable or Closed when the database ended the subscription. A reader that is slower than the changes misses
    none for good: beyond 4 MiB they are let go, and the newest version of each changed row is read instead.

    One thread may read; any may close.
    """

    def __init__(self, queries: LiveQueries, request: LiveRequest, caller: Caller) -> None:
        self._condition = threading.Condition()
        self._queue: deque[tuple[Change, Seq]] = deque()
        """Changes, and where to resume once they were read."""
        self._bytes = 0
        self._error: KalamDbError | None = None
        self._closed = False
        self._on_change: Callable[[], None] = lambda: None
        self._inner = queries.subscribe(request, caller, self)
        self._last_seq: Seq = self._inner.rows_after
        if request.options is None:
            self._inner.go_live()

    @property
    def id(self) -> str:
        """Its live_id in system.live."""
        return self._inner.live_id

    @property
    def last_seq(self) -> int:
        """Where `from_seq` of another subscription goes on: what was read up to now holds all up to this `_seq`."""
        return self._last_seq

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def must_read(self) -> bool:
        """Whether `poll` will read the tables, and so may block."""
        return not self._queue and self._inner.has_batches

    @property
    def resumed(self) -> bool:
        """Whether it goes on after `from_seq`; False when that was too old and every row came instead."""
        return self._inner.resumed

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Change]:
        return self

    def __next__(self) -> Change:
        found = self._wait(None)
        if found is None:
            raise StopIteration
        return found

    def next(self, timeout_s: float | None = None) -> Change:
        """The next change. Blocks; raises Timeout after `timeout_s`, Closed after `close`, or what iterating raises."""
        found = self._wait(timeout_s)
        if found is None:
            raise Closed("the subscription was closed")
        return found

    def close(self) -> None:
        """End it; a waiting reader ends too. Idempotent."""
        self._inner.close()
        with self._condition:
            self._closed = True
            self._queue.clear()
            self._condition.notify_all()
        self._on_change()

    # Reading

    def _wait(self, timeout_s: float | None) -> Change | None:
        while True:
            found = self.poll()
            if found is not None:
                return found
            with self._condition:
                if self._closed:
                    return None
                if not self._is_ready() and not self._condition.wait_for(self._is_ready, timeout_s):
                    raise Timeout(f"no change came within {timeout_s:g} s")

    def _is_ready(self) -> bool:
        return bool(self._queue) or self._closed or self._error is not None or self._inner.has_batches

    def poll(self) -> Change | None:
        """The next change that is there already, None when there is none. May block for the disk."""
        while True:
            with self._condition:
                if self._closed:
                    return None
                if self._queue:
                    change, position = self._queue.popleft()
                    self._bytes -= change.size
                    self._last_seq = max(self._last_seq, position)
                    return change
                if self._error is not None:
                    raise self._error
            if not self._inner.has_batches:
                return None
            try:
                batch = self._inner.next_batch()
            except Closed:
                # It ended meanwhile; whoever ended it said why.
                continue
            self._read(batch)
            if not batch.has_more:
                self._inner.go_live()

    def _read(self, batch: Batch) -> None:
        if batch.rows:
            # In `_seq` order: after each of them all before it is known, unless deletions are still to come.
            self._put([(change, min(change.seq, batch.resume_seq)) for change in batch.rows])
        elif batch.deletes:
            self._put([(change, 0) for change in batch.deletes[:-1]])
            self._put([(batch.deletes[-1], batch.resume_seq)])
        else:
            self._last_seq = max(self._last_seq, batch.resume_seq)

    def listen(self, on_change: Callable[[], None]) -> None:
        """Call `on_change`, which must not block, from any thread, whenever `poll` may find more than before."""
        self._on_change = on_change

    # The sink

    def _put(self, changes: Sequence[tuple[Change, Seq]]) -> None:
        with self._condition:
            if self._closed:
                return
            self._queue.extend(changes)
            self._bytes += sum(change.size for change, _ in changes)
            self._condition.notify_all()

    def deliver(self, changes: Sequence[tuple[LiveSubscription, Change]]) -> None:
        """See LiveSink."""
        self._put([(change, change.seq) for _, change in changes])
        if self._bytes > _QUEUE_BYTES_MAX:
            self._inner.fall_behind()
        self._on_change()

    def behind(self, subscription: LiveSubscription) -> None:
        """See LiveSink."""
        with self._condition:
            self._condition.notify_all()
        self._on_change()

    def ended(self, subscription: LiveSubscription, code: LiveCode, message: str) -> None:
        """See LiveSink."""
        with self._condition:
            self._error = _error(code, message)
            self._condition.notify_all()
        self._on_change()


def _error(code: LiveCode, message: str) -> KalamDbError:
    match code:
        case LiveCode.UNAUTHORIZED:
            return Denied(message)
        case LiveCode.NOT_FOUND:
            return NotFound(message)
        case LiveCode.INVALID_SQL:
            return InvalidRequest(message)
        case LiveCode.CLOSED:
            return Closed(message)
        case _:
            return Unavailable(message)


def call_back(subscription: Subscription, callback: Callable[[Change], Any]) -> None:
    """Call `callback` with each change, in a thread of its own. What it raises is logged and ends the subscription."""

    def run() -> None:
        try:
            for change in subscription:
                callback(change)
        except Closed:
            pass
        except Exception:
            _log.exception("subscription '%s' has ended", subscription.id)
        finally:
            subscription.close()

    threading.Thread(target=run, name="kalamdb-live-callback", daemon=True).start()
