"""`GET /v1/ws`: who may open a socket, and with which bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starlette.routing import BaseRoute, WebSocketRoute
from starlette.types import Receive, Scope, Send

from kalamdb.server.live_socket import Doorbell, LiveServices, LiveSocket, SocketLimits


class LiveRoute:
    """`GET /v1/ws`."""

    def __init__(self, services: LiveServices) -> None:
        self._services = services
        self._doorbell: Doorbell | None = None

    def routes(self) -> Sequence[BaseRoute]:
        """What to mount."""
        return [WebSocketRoute("/v1/ws", self), WebSocketRoute("/ws", self)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application of the route."""
        if self._doorbell is None:
            self._doorbell = Doorbell(asyncio.get_running_loop())
        await LiveSocket(self._services, self._doorbell, scope, receive, send).run()


def socket_limits(settings: Mapping[str, Any]) -> SocketLimits:
    """The bounds of a socket that the settings ask for."""
    return SocketLimits(
        auth_timeout_s=settings["websocket.auth_timeout_secs"],
        client_timeout_s=settings["websocket.client_timeout_secs"],
        heartbeat_interval_s=settings["websocket.heartbeat_interval_secs"],
        queue_bytes_max=settings["websocket.queue_bytes_max"],
        message_bytes_max=min(settings["limits.max_message_size"], settings["security.max_ws_message_size"]),
        messages_per_s_max=settings["rate_limit.max_messages_per_sec"],
    )


def origin_check(settings: Mapping[str, Any]) -> Callable[[Scope], bool]:
    """Whether a page may open a socket: one of this server, or of [security.cors]. Who sends no Origin is no browser,
    and passes unless `security.strict_ws_origin_check`."""
    allowed = {origin.lower().rstrip("/") for origin in settings["security.cors.allowed_origins"]}
    strict = settings["security.strict_ws_origin_check"]

    def check(scope: Scope) -> bool:
        headers = dict(scope["headers"])
        origin = headers.get(b"origin")
        if origin is None:
            return not strict
        text = origin.decode("latin-1").lower().rstrip("/")
        own = headers.get(b"host", b"").decode("latin-1").lower()
        return "*" in allowed or text in allowed or text.partition("://")[2] == own

    return check
