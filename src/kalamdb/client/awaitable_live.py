"""Live queries for programs on an event loop: one task per client reads the socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

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
from kalamdb.errors import Closed, KalamDbError, Timeout, Unauthenticated

_RECONNECT_S = 0.1
_OPEN_TIMEOUT_S = 10.0


class AsyncLiveQuery:
    """A live query: an asynchronous iterator of its changes; see `LiveQuery`. An async context manager."""

    def __init__(self, socket: AsyncLiveSocket) -> None:
        self._socket = socket
        self._changes: asyncio.Queue[Change | None] = asyncio.Queue()
        self._error: KalamDbError | None = None
        self.feed: Feed

    async def next(self, timeout_s: float | None = None) -> Change:
        """The next change. Raises Timeout, Closed after `close`, or the error that ended the query."""
        try:
            async with asyncio.timeout(timeout_s):
                found = await self._wait()
        except TimeoutError:
            raise Timeout(f"no change came within {timeout_s:g} s") from None
        if found is None:
            raise Closed("the live query was closed")
        return found

    async def _wait(self) -> Change | None:
        change = await self._changes.get()
        self._socket.taken(self._changes.qsize())
        if change is None:
            self._changes.put_nowait(None)
            if self._error is not None:
                raise self._error
        return change

    async def __aiter__(self) -> AsyncIterator[Change]:
        while (change := await self._wait()) is not None:
            yield change

    async def __aenter__(self) -> AsyncLiveQuery:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    @property
    def ready(self) -> bool:
        """Whether the rows that are there have come, so that what comes now are changes."""
        return self.feed.ready

    @property
    def last_seq(self) -> int | None:
        """All up to this `_seq` has come; where `from_seq` of another live query goes on."""
        return self.feed.last_seq

    async def close(self) -> None:
        """Ask for no more changes. Idempotent."""
        await self._socket.remove(self.feed)

    def emit(self, change: Change) -> None:
        """A change came."""
        self._changes.put_nowait(change)
        if self._changes.qsize() >= CHANGES_WAITING_MAX:
            self._socket.full()

    def ended(self, error: KalamDbError | None) -> None:
        """Nothing comes any more."""
        self._error = error
        self._changes.put_nowait(None)


class AsyncLiveSocket:
    """The one socket of a client: opened for the first live query, opened again when it is lost."""

    def __init__(self, url: str, token: Callable[[bool], Awaitable[str]]) -> None:
        self._url = url
        self._token = token
        self._protocol = LiveProtocol()
        self._connection: ClientConnection | None = None
        self._task: asyncio.Task[None] | None = None
        self._room = asyncio.Event()
        self._room.set()

    async def add(self, feed: Feed) -> None:
        """Begin a live query."""
        await self._send(self._protocol.add(feed))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="kalamdb-live-client")

    async def remove(self, feed: Feed) -> None:
        """End a live query."""
        self._room.set()
        await self._send(self._protocol.remove(feed))

    async def close(self) -> None:
        """End all live queries and the socket. Idempotent."""
        self._protocol.end(None)
        self._room.set()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def full(self) -> None:
        """Some reader has too many changes: the socket is not read until it has taken them."""
        self._room.clear()

    def taken(self, waiting: int) -> None:
        """A reader took one, `waiting` are left."""
        if waiting <= CHANGES_WAITING_MAX // 2:
            self._room.set()

    async def _send(self, frames: list[str]) -> None:
        if self._connection is None:
            return
        try:
            for frame in frames:
                await self._connection.send(frame)
        except ConnectionClosed:
            pass  # The reader sees it too, and opens another.

    async def _run(self) -> None:
        pause_s, fresh = _RECONNECT_S, False
        while len(self._protocol):
            began_s = asyncio.get_running_loop().time()
            try:
                async with connect(
                    self._url, open_timeout=_OPEN_TIMEOUT_S, compression=None, max_size=None, ping_interval=None
                ) as connection:
                    await self._follow(connection, await self._token(fresh))
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
                self._connection = None
                self._protocol.lost()
            if asyncio.get_running_loop().time() - began_s > STEADY_S:
                pause_s, fresh = _RECONNECT_S, False
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, RECONNECT_MAX_S)

    async def _follow(self, connection: ClientConnection, token: str) -> None:
        self._connection = connection
        await self._send(self._protocol.opened(token))
        while len(self._protocol):
            await self._room.wait()
            try:
                async with asyncio.timeout(PING_INTERVAL_S):
                    frame = await connection.recv()
            except TimeoutError:
                await connection.send(PING)
                continue
            await self._send(self._protocol.received(frame))
