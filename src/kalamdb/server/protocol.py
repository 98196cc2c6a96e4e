"""Connections: what is bounded before a request reaches the application, and what a WebSocket tells of itself.

uvicorn parses and writes. Here are the limits that it has not: bytes and time of a header, bytes and time of a
body, connections per address and in all, and a reader that has stopped reading. One object of each class per
connection; all of it lives on the loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import httptools
import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame

_REFUSED_MAX = 200
"""Connections above a limit that still get an answer; more of them are cut off."""
_DIGITS_ALWAYS_FIT = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """Bounds of connections. Times in seconds."""

    header_bytes_max: int = 16_384
    header_timeout_s: float = 5.0
    body_bytes_max: int = 10 << 20
    request_timeout_s: float = 30.0
    """For a body to arrive, and for a reader to take something of an answer."""
    closing_timeout_s: float = 2.0
    connections_max: int = 25_000
    connections_per_ip_max: int = 100


class _Refused(Exception):
    """Ends parsing: the answer was written."""


def answer(status: int, code: str, message: str, retry_after_s: float | None = None) -> bytes:
    """A whole answer that ends its connection, for what never reaches the application."""
    body = msgspec.json.encode({"error": message, "code": code})
    lines = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        "content-type: application/json",
        "x-content-type-options: nosniff",
        f"content-length: {len(body)}",
        "connection: close",
    ]
    if retry_after_s is not None:
        lines.append(f"retry-after: {max(int(retry_after_s + 0.999), 1)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


class Door:
    """The open connections of a server, and who may open another one."""

    def __init__(
        self,
        limits: ConnectionLimits,
        *,
        is_exempt: Callable[[str], bool] = lambda ip: False,
        banned_s: Callable[[str], float] = lambda ip: 0.0,
    ) -> None:
        self.limits = limits
        self._is_exempt = is_exempt
        self._banned_s = banned_s
        self.http: set[HttpProtocol] = set()
        self.sockets: set[WebSocketProtocol] = set()
        self.requests: set[asyncio.Task[None]] = set()
        """Requests that run."""
        self._per_ip: dict[str, int] = {}
        self._open = 0
        self.open_peak = 0
        """Most connections that were open at a time, since the start."""
        self.sockets_peak = 0
        """Most WebSockets."""
        self.refused = 0
        """Connections and requests that were refused here, since the start."""
        self._no_http = asyncio.Event()

    @property
    def open(self) -> int:
        """Connections that are open, refused ones that are not gone yet among them."""
        return self._open

    def enter(self, ip: str) -> bytes | None:
        """Count a connection; the answer for one that may not stay, empty for one to be cut off at once."""
        self._open += 1
        if self._open > self.open_peak:
            self.open_peak = self._open
        count = self._per_ip[ip] = self._per_ip.get(ip, 0) + 1
        limits = self.limits
        if self._open > limits.connections_max:
            message = (
                f"{limits.connections_max} connections are open, no more are allowed (performance.max_connections)"
            )
            over, refusal = self._open - limits.connections_max, answer(503, "TOO_MANY_CONNECTIONS", message, 1)
        elif self._is_exempt(ip):
            return None
        elif (left_s := self._banned_s(ip)) > 0:
            message = f"this address is refused for {left_s:.0f} seconds more (rate_limit.ban_duration_seconds)"
            over, refusal = count, answer(429, "RATE_LIMIT_EXCEEDED", message, left_s)
        elif count > limits.connections_per_ip_max:
            message = (
                f"{limits.connections_per_ip_max} connections of this address are open, "
                "no more are allowed (rate_limit.max_connections_per_ip)"
            )
            over, refusal = count - limits.connections_per_ip_max, answer(429, "TOO_MANY_CONNECTIONS", message, 1)
        else:
            return None
        self.refused += 1
        return refusal if over <= _REFUSED_MAX else b""

    def leave(self, ip: str) -> None:
        """Count off what `enter` counted."""
        self._open -= 1
        left = self._per_ip[ip] - 1
        if left:
            self._per_ip[ip] = left
        else:
            del self._per_ip[ip]

    def opened(self, connection: HttpProtocol) -> None:
        """An HTTP connection is there."""
        self.http.add(connection)
        self._no_http.clear()

    def became_socket(self, connection: WebSocketProtocol) -> None:
        """A connection is a WebSocket from now on."""
        self.sockets.add(connection)
        self.sockets_peak = max(self.sockets_peak, len(self.sockets))

    def gone(self, connection: HttpProtocol) -> None:
        """It is closed, or a WebSocket now."""
        self.http.discard(connection)
        if not self.http:
            self._no_http.set()

    async def without_http(self) -> None:
        """Wait until no HTTP connection is open."""
        if self.http:
            await self._no_http.wait()

    def abort(self) -> None:
        """Cut all connections off."""
        connections: Iterable[HttpProtocol | WebSocketProtocol] = [*self.http, *self.sockets]
        for connection in connections:
            connection.transport.abort()


class HttpProtocol(HttpToolsProtocol):
    """One HTTP connection."""

    def __init__(self, *, door: Door, **given: Any) -> None:
        super().__init__(**given)
        self._door = door
        self._limits = door.limits
        self._ip = ""
        self._refused = False
        self._in_header = False
        self._in_body = False
        self._began = False
        """Whether the header began in the chunk that is parsed."""
        self._chunk = 0
        self._header_bytes = 0
        """Bytes of the unfinished header, without those of the chunk in which it began."""
        self._body_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count it, and refuse it when there are too many."""
        super().connection_made(transport)
        self._ip = self.client[0] if self.client else ""
        self._door.opened(self)
        refusal = self._door.enter(self._ip)
        if refusal is None:
            self._timer = self.loop.call_later(self._limits.header_timeout_s, self._header_late)
        elif refusal:
            self._leave_with(refusal)
        else:
            self._refused = True
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Count it off."""
        self._stop_timer()
        self._stop_stalled()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)
        self._door.leave(self._ip)
        self._door.gone(self)

    def data_received(self, data: bytes) -> None:
        """Parse what came; what comes after a refusal is thrown away, so that the other side reads the answer."""
        if self._refused:
            return
        self._unset_keepalive_if_required()
        self._chunk = len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            if self._should_upgrade():
                self._become_socket()
                return
            # Another protocol was offered. The request is answered in HTTP/1.1; what follows it is not read.
            self.cycle.keep_alive = False
        except httptools.HttpParserError:
            if not self._refused:
                self._refuse(400, "INVALID_HTTP", "the request is not valid HTTP/1.1")
            return
        if self._in_header:
            self._await_header()
        elif self._in_body and self._timer is None:
            self._timer = self.loop.call_later(self._limits.request_timeout_s, self._body_late)
        self._began = False

    def _await_header(self) -> None:
        if not self._began:
            self._header_bytes += self._chunk
        if self._header_bytes > self._limits.header_bytes_max:
            self._refuse_header()
        elif self._timer is None:
            self._timer = self.loop.call_later(self._limits.header_timeout_s, self._header_late)

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._in_header = self._began = True
        self._header_bytes = self._body_bytes = 0

    def on_headers_complete(self) -> None:
        """The header is complete: it and the length that it states are within their limits, else the request ends."""
        limits = self._limits
        if self._header_bytes + self._chunk > limits.header_bytes_max:
            exact = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if exact > limits.header_bytes_max:
                self._refuse_header()
                raise _Refused
        for name, value in self.headers:
            if name == b"content-length" and len(value) > _DIGITS_ALWAYS_FIT and int(value) > limits.body_bytes_max:
                self._refuse_body()
                raise _Refused
        if self.parser.should_upgrade() and not self._should_upgrade() and self._states_body():
            # The parser takes the body for the other protocol. It must not run as a request without one.
            self._refuse(400, "INVALID_HTTP", "a request with a body cannot offer another protocol (Upgrade)")
            raise _Refused
        self._stop_timer()
        super().on_headers_complete()
        self._in_header, self._in_body = False, True

    def _states_body(self) -> bool:
        return any(
            name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
            for name, value in self.headers
        )

    def on_body(self, body: bytes) -> None:
        """Part of a body; its length may not have been stated."""
        self._body_bytes += len(body)
        if self._body_bytes > self._limits.body_bytes_max:
            self._refuse_body()
            raise _Refused
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The body is complete."""
        self._in_body = False
        self._stop_timer()
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        task = self.loop.create_task(cycle.run_asgi(app))
        self._door.requests.add(task)
        task.add_done_callback(self._door.requests.discard)

    def _become_socket(self) -> None:
        self._door.gone(self)
        self._stop_timer()
        self.handle_websocket_upgrade()

    # Refusing

    def _refuse_header(self) -> None:
        self._refuse(
            431, "HEADER_TOO_LARGE",
            f"the header is larger than {self._limits.header_bytes_max} bytes (performance.max_header_size)",
        )  # fmt: skip

    def _refuse_body(self) -> None:
        self._refuse(
            413, "BODY_TOO_LARGE",
            f"the body is larger than {self._limits.body_bytes_max} bytes (security.max_request_body_size)",
        )  # fmt: skip

    def _header_late(self) -> None:
        self._timer = None
        if not self._in_header:
            # Nothing came at all: a connection opened in advance. There is no request to answer.
            self.transport.close()
            return
        self._refuse(408, "HEADER_TIMEOUT", f"the header did not arrive within {self._limits.header_timeout_s:g} s")

    def _body_late(self) -> None:
        self._timer = None
        self._refuse(408, "BODY_TIMEOUT", f"the body did not arrive within {self._limits.request_timeout_s:g} s")

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Answer the request that is being received, and end the connection."""
        self._door.refused += 1
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            self._leave_with(answer(status, code, message))
            return
        self._refused = True
        self._stop_timer()
        if self._in_header:
            # It came behind one that is still being answered: that answer goes out, then the connection ends.
            cycle.keep_alive = False
            return
        cycle.disconnected = True
        cycle.message_event.set()
        if cycle.response_started or self.pipeline:
            self.transport.close()
        else:
            self._leave_with(answer(status, code, message))

    def _leave_with(self, refusal: bytes) -> None:
        """Write a last answer. Closing at once would reset the connection while bytes of the other side are on their
        way, and it would not see the answer."""
        self._refused = True
        self._stop_timer()
        self.transport.write(refusal)
        if not self.transport.can_write_eof():
            self.transport.close()
            return
        self.transport.write_eof()
        self.flow.resume_reading()
        self._timer = self.loop.call_later(self._limits.closing_timeout_s, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # Answers that nobody reads

    def pause_writing(self) -> None:
        """The answer waits for its reader, for a bounded time."""
        super().pause_writing()
        self._stalled = self.loop.call_later(self._limits.request_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """The reader took some."""
        super().resume_writing()
        self._stop_stalled()

    def _stop_stalled(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None


class Wire:
    """What lies under one WebSocket; `scope["state"]["wire"]` of its ASGI scope."""

    def __init__(self, protocol: WebSocketProtocol) -> None:
        self._protocol = protocol
        self.frame_at_s = protocol.loop.time()
        """When the last frame came, of any kind, PING and PONG too: seconds of the loop's clock.

        While a message waits to be received by the application nothing further is read."""

    def buffered_bytes(self) -> int:
        """Bytes that were sent and that the other side has not taken."""
        return self._protocol.transport.get_write_buffer_size()

    async def drained(self) -> None:
        """Wait until the other side has taken nearly all, or is gone."""
        await self._protocol.writable.wait()

    def send_all(self, messages: Iterable[str | bytes]) -> None:
        """Send messages, a text or binary frame each, in one write. Does not wait for the other side.

        Sends nothing once the socket is closing."""
        protocol = self._protocol
        if protocol.close_sent or protocol.disconnected or not protocol.handshake_complete:
            return
        connection = protocol.conn
        for message in messages:
            if isinstance(message, str):
                connection.send_text(message.encode())
            else:
                connection.send_binary(message)
        protocol.transport.write(b"".join(connection.data_to_send()))

    def abort(self) -> None:
        """Cut the connection off; nothing that waits is sent."""
        self._protocol.transport.abort()


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """One WebSocket connection."""

    def __init__(self, *, door: Door, **given: Any) -> None:
        super().__init__(**given)
        self._door = door
        self.close_timeout = door.limits.closing_timeout_s
        self.wire = Wire(self)
        self.app_state = {**self.app_state, "wire": self.wire}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It was an HTTP connection until now, and is counted."""
        super().connection_made(transport)
        self._door.became_socket(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Count it off."""
        super().connection_lost(exc)
        self._door.sockets.discard(self)
        self._door.leave(self.client[0] if self.client else "")

    def data_received(self, data: bytes) -> None:
        """Frames; first of all the handshake, which may be none."""
        super().data_received(data)
        if self.conn.handshake_exc is not None and not self.handshake_complete:
            self.close_sent = self.handshake_complete = True
            self.transport.write(answer(400, "INVALID_HTTP", "the handshake of the WebSocket is not valid"))
            self.transport.close()

    def handle_ping(self) -> None:
        """Answer it; it counts as life."""
        self.wire.frame_at_s = self.loop.time()
        super().handle_ping()

    def handle_pong(self, event: Frame) -> None:
        """It counts as life."""
        self.wire.frame_at_s = self.loop.time()
        super().handle_pong(event)

    def handle_text(self, event: Frame) -> None:
        """A text, or its first part."""
        self.wire.frame_at_s = self.loop.time()
        super().handle_text(event)

    def handle_bytes(self, event: Frame) -> None:
        """A binary message, or its first part."""
        self.wire.frame_at_s = self.loop.time()
        super().handle_bytes(event)

    def handle_cont(self, event: Frame) -> None:
        """A further part."""
        self.wire.frame_at_s = self.loop.time()
        super().handle_cont(event)
