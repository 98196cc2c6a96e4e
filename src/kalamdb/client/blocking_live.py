"""Live queries for programs that block: one thread per client reads the socket."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

from websockets.exceptions import ConnectionClosed, InvalidHandshake
from websockets.sync.client import ClientConnection, connect

from kalamdb.client.live import (
    CHANGES_WAITING_MAX,
    PING,
    PING_INTERVAL_S,
    RECONNECT_MAX_S,
    STEADY_S,
    Change,
    Feed,
    LiveProtocol,
)
from kalamdb.clock import Clock
from kalamdb.errors import Closed, KalamDbError, Timeout, Unauthenticated

_RECONNECT_S = 0.1
_OPEN_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 5.0


class LiveQuery:
    """A live query: an iterator of its changes. A context manager that closes it.

    Made by `Client.subscribe`. The socket is opened again when it is lost, and the query goes on after the last
    change that was seen.
    """

    def __init__(self, socket: LiveSocket, callback: Callable[[Change], None] | None) -> None:
        self._socket = socket
        self._callback = callback
        self._changes: queue.Queue[Change | None] = queue.Queue(CHANGES_WAITING_MAX)
        self._error: KalamDbError | None = None
        self._closed = threading.Event()
        self.feed: Feed

    def next(self, timeout_s: float | None = None) -> Change:
        """The next change. Blocks; raises Timeout, Closed after `close`, or the error that ended the query."""
        found = self._wait(timeout_s)
        if found is None:
            raise Closed("the live query was closed")
        return found

    def _wait(self, timeout_s: float | None) -> Change | None:
        try:
            change = self._changes.get(timeout=timeout_s)
        except queue.Empty:
            raise Timeout(f"no change came within {timeout_s:g} s") from None
        if change is None:
            self._changes.put(None)
            if self._error is not None:
                raise self._error
        return change

    def __iter__(self) -> Iterator[Change]:
        while (change := self._wait(None)) is not None:
            yield change

    def __enter__(self) -> LiveQuery:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def ready(self) -> bool:
        """Whether the rows that are there have come, so that what comes now are changes."""
        return self.feed.ready

    @property
    def last_seq(self) -> int | None:
        """All up to this `_seq` has come; where `from_seq` of another live query goes on."""
        return self.feed.last_seq

    def close(self) -> None:
        """Ask for no more changes. Idempotent."""
        self._closed.set()
        self._socket.remove(self.feed)

    def emit(self, change: Change) -> None:
        """A change came. Blocks while its reader has too many."""
        if self._callback is not None:
            self._callback(change)
            return
        while not self._closed.is_set():
            try:
                return self._changes.put(change, timeout=0.1)
            except queue.Full:
                continue

    def ended(self, error: KalamDbError | None) -> None:
        """Nothing comes any more."""
        self._error = error
        self._closed.set()
        while True:
            try:
                return self._changes.put_nowait(None)
            except queue.Full:
                self._changes.get_nowait()


class LiveSocket:
    """The one socket of a client: opened for the first live query, opened again when it is lost. Thread-safe."""

    def __init__(self, url: str, token: Callable[[bool], str], clock: Clock) -> None:
        self._url = url
        self._token = token
        """Gives an access token, with True a fresh one."""
        self._clock = clock
        self._protocol = LiveProtocol()
        self._lock = threading.RLock()
        self._connection: ClientConnection | None = None
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._stopping = False

    def add(self, feed: Feed) -> None:
        """Begin a live query."""
        with self._lock:
            self._send(self._protocol.add(feed))
            if self._thread is None:
                self._stopping = False
                self._wake.clear()
                self._thread = threading.Thread(target=self._run, name="kalamdb-live-client", daemon=True)
                self._thread.start()

    def remove(self, feed: Feed) -> None:
        """End a live query."""
        with self._lock:
            self._send(self._protocol.remove(feed))

    def close(self) -> None:
        """End all live queries and the socket. Idempotent."""
        with self._lock:
            self._stopping = True
            self._protocol.end(None)
            connection, thread = self._connection, self._thread
        self._wake.set()
        if connection is not None:
            connection.close()
        if thread is not None and thread is not threading.current_thread():
            thread.join(_STOP_TIMEOUT_S)

    def _send(self, frames: list[str]) -> None:
        if self._connection is None:
            return
        try:
            for frame in frames:
                self._connection.send(frame)
        except ConnectionClosed:
            pass  # The reader sees it too, and opens another.

    def _run(self) -> None:
        pause_s, fresh = _RECONNECT_S, False
        while not self._idle():
            began_s = self._clock.monotonic_s()
            try:
                with connect(self._url, open_timeout=_OPEN_TIMEOUT_S, compression=None, max_size=None) as connection:
                    self._follow(connection, self._token(fresh))
            except Unauthenticated as exc:
                if not self._protocol.online and (fresh or exc.code != "TOKEN_EXPIRED"):
                    self._protocol.end(exc)
                fresh = True
                continue
            except (ConnectionClosed, InvalidHandshake, OSError, TimeoutError):
                pass
            except KalamDbError as exc:
                if not exc.retryable:
                    self._protocol.end(exc)
            finally:
                with self._lock:
                    self._connection = None
                    self._protocol.lost()
            if self._clock.monotonic_s() - began_s > STEADY_S:
                pause_s, fresh = _RECONNECT_S, False
            self._clock.wait(self._wake, pause_s)
            pause_s = min(2 * pause_s, RECONNECT_MAX_S)

    def _idle(self) -> bool:
        """Whether there is nothing to read for; the thread ends then."""
        with self._lock:
            if not self._stopping and len(self._protocol):
                return False
            self._thread = None
            return True

    def _follow(self, connection: ClientConnection, token: str) -> None:
        with self._lock:
            self._connection = connection
            self._send(self._protocol.opened(token))
        while not self._stopping and len(self._protocol):
            try:
                frame = connection.recv(timeout=PING_INTERVAL_S)
            except TimeoutError:
                connection.send(PING)
                continue
            with self._lock:
                self._send(self._protocol.received(frame))
