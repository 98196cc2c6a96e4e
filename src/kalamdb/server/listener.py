"""Accepts connections and gives their requests to an ASGI application."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Mapping
from email.utils import formatdate
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp
from uvicorn.server import ServerState

from kalamdb.clock import Clock
from kalamdb.errors import InvalidRequest
from kalamdb.server.protocol import ConnectionLimits, Door, HttpProtocol, WebSocketProtocol

_CANCELLED_GRACE_S = 1.0
"""For cancelled requests to say so."""


def connection_limits(settings: Mapping[str, Any]) -> ConnectionLimits:
    """The bounds of connections as settings name them."""
    return ConnectionLimits(
        header_bytes_max=settings["performance.max_header_size"],
        header_timeout_s=settings["performance.client_request_timeout"],
        body_bytes_max=min(settings["security.max_request_body_size"], settings["rate_limit.request_body_limit_bytes"]),
        request_timeout_s=settings["performance.request_timeout"],
        closing_timeout_s=settings["performance.client_disconnect_timeout"],
        connections_max=settings["performance.max_connections"],
        connections_per_ip_max=settings["rate_limit.max_connections_per_ip"],
    )


class Listener:
    """A listening port and the connections that came through it. Lives on the loop."""

    def __init__(self, app: ASGIApp, door: Door, settings: Mapping[str, Any], clock: Clock, *, host: str, port: int):
        self._door = door
        self._clock = clock
        self._host, self._port = host, port
        cert, key = settings["server.tls_cert_file"], settings["server.tls_key_file"]
        if bool(cert) != bool(key):
            raise InvalidRequest("server.tls_cert_file and server.tls_key_file belong together; one of them is missing")
        self._config = uvicorn.Config(
            app,
            host=host,
            port=port,
            http=cast(type[asyncio.Protocol], functools.partial(HttpProtocol, door=door)),
            ws=cast(type[asyncio.Protocol], functools.partial(WebSocketProtocol, door=door)),
            ws_max_size=settings["security.max_ws_message_size"],
            ws_per_message_deflate=False,
            ws_ping_interval=None,
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            headers=[("x-content-type-options", "nosniff")],
            backlog=settings["performance.backlog"],
            timeout_keep_alive=settings["performance.keepalive_timeout"],
            ssl_certfile=cert or None,
            ssl_keyfile=key or None,
        )
        self._state = ServerState()
        self._servers: list[asyncio.Server] = []
        self._dating: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Begin to accept. Raises OSError when the port cannot be had, InvalidRequest for a bad certificate."""
        try:
            self._config.load()
        except OSError as exc:
            raise InvalidRequest(
                f"the certificate (server.tls_cert_file, server.tls_key_file) cannot be used: {exc}"
            ) from exc
        self._date()
        loop = asyncio.get_running_loop()
        tls: dict[str, Any] = {}
        if self._config.ssl is not None:
            tls = {"ssl": self._config.ssl, "ssl_handshake_timeout": self._door.limits.header_timeout_s}
        self._servers = [
            await loop.create_server(
                lambda: HttpProtocol(
                    door=self._door, config=self._config, server_state=self._state, app_state={}, _loop=loop
                ),
                self._host, self._port, backlog=self._config.backlog, **tls,
            )
        ]  # fmt: skip
        self._port = self._servers[0].sockets[0].getsockname()[1]

    @property
    def url(self) -> str:
        """Where it listens; the port is known once it has started."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{'https' if self._config.is_ssl else 'http'}://{host}:{self._port}"

    def _date(self) -> None:
        """Standing headers with the date, new each second."""
        date = formatdate(self._clock.now_ms() / 1000, usegmt=True).encode()
        self._state.default_headers = [(b"date", date), *self._config.encoded_headers]
        self._dating = asyncio.get_running_loop().call_later(1.0, self._date)

    def stop_accepting(self) -> None:
        """Take no further connection, and no further request on the open ones: idle ones are closed."""
        for server in self._servers:
            server.close()
        for connection in list(self._door.http):
            connection.shutdown()

    async def finish_requests(self, stop: asyncio.Event, timeout_s: float) -> None:
        """Wait for running requests; cancel them after `timeout_s`, or when `stop` is set."""
        await first_of(self._door.without_http(), stop.wait(), timeout_s=timeout_s)
        if self._door.requests:
            for task in list(self._door.requests):
                task.cancel()
            await first_of(self._door.without_http(), timeout_s=_CANCELLED_GRACE_S)

    def close(self) -> None:
        """Cut off what is still open."""
        if self._dating is not None:
            self._dating.cancel()
        for socket in list(self._door.sockets):
            socket.shutdown()
        self._door.abort()


async def first_of(*waits: Any, timeout_s: float | None = None) -> None:
    """Wait for the first of some coroutines, at most `timeout_s`; the others are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
