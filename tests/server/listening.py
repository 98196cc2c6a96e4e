"""A listener in this process around a small application, and raw connections to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import uvloop
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from kalamdb.clock import SystemClock
from kalamdb.config import Settings
from kalamdb.server.listener import Listener, connection_limits
from kalamdb.server.protocol import Door

WAIT_S = 10.0
"""Far above what is waited for; a test that comes here has failed."""


async def count_bytes(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the length of the body."""
    try:
        body = await Request(scope, receive).body()
    except ClientDisconnect:
        return
    await PlainTextResponse(str(len(body)))(scope, receive, send)


class Raw:
    """One connection on which any bytes can be sent."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        """Send as much of it as the server takes; a closed connection is no error."""
        try:
            self._writer.write(data)
            await asyncio.wait_for(self._writer.drain(), WAIT_S)
        except ConnectionError:
            pass

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """The next answer: status, headers, body."""
        head = await asyncio.wait_for(self._reader.readuntil(b"\r\n\r\n"), WAIT_S)
        status, *lines = head.decode("latin-1").strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await asyncio.wait_for(self._reader.readexactly(int(headers.get("content-length", "0"))), WAIT_S)
        return int(status.split(" ")[1]), headers, body

    async def rest(self) -> bytes:
        """All until the server closes the connection."""
        try:
            return await asyncio.wait_for(self._reader.read(), WAIT_S)
        except ConnectionError:
            return b""

    async def close(self) -> None:
        """Close it."""
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()


class Listening(Listener):
    """A listener that remembers the connections of its test."""

    raws: list[Raw]


def run(scenario: Coroutine[Any, Any, None]) -> None:
    """Run a test on the kind of loop that a server has."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenario)


@asynccontextmanager
async def listening(
    app: ASGIApp = count_bytes, *, is_exempt: Callable[[str], bool] = lambda ip: False, **settings: Any
) -> AsyncIterator[tuple[Listening, Door]]:
    """A listener on a free port, with settings as `performance_max_header_size=2048`."""
    loaded = Settings.load(settings, environment={})
    door = Door(connection_limits(loaded), is_exempt=is_exempt)
    listener = Listening(app, door, loaded, SystemClock(), host="127.0.0.1", port=0)
    listener.raws = []
    await listener.start()
    try:
        yield listener, door
    finally:
        for raw in listener.raws:
            await raw.close()
        listener.stop_accepting()
        listener.close()
        await asyncio.wait_for(door.without_http(), WAIT_S)


async def connection(listener: Listening) -> Raw:
    """A new connection, closed with the listener at the latest."""
    place = urlsplit(listener.url)
    raw = Raw(*await asyncio.open_connection(place.hostname, place.port))
    listener.raws.append(raw)
    return raw
