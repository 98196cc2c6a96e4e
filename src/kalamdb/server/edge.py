"""What every request passes on its way in and out: id, sender, rates, route, errors, headers, log line, figures.

One plain ASGI application instead of a stack of them: the whole costs some microseconds per request.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kalamdb.clock import Clock
from kalamdb.errors import KalamDbError
from kalamdb.server.guards import Guards, Peer
from kalamdb.server.logs import REQUEST_ID, AccessLog
from kalamdb.server.metrics import Metrics
from kalamdb.server.telemetry import Tracing

_SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
_AUTH_PREFIX = "/v1/api/auth/"
_SQL_PATH = "/v1/api/sql"
_SLUGS = {"RATE_LIMIT_EXCEEDED": "rate_limited"}
"""Codes that routes for log-in spell in another way."""
_STANDING_HEADERS = (
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
)
"""Of each answer whose route has not set its own. `nosniff` is added to every answer by the connection."""
_TLS_HEADER = (b"strict-transport-security", b"max-age=31536000")
_log = logging.getLogger("kalamdb.server")


def peer_of(scope: Scope) -> Peer:
    """Who sent the request of an ASGI scope."""
    peer: Peer = scope["state"]["peer"]
    return peer


def request_id_of(scope: Scope) -> str:
    """The id of the request of an ASGI scope, as its answer and its log lines have it."""
    request_id: str = scope["state"]["request_id"]
    return request_id


def with_cors(app: ASGIApp, settings: Mapping[str, Any]) -> ASGIApp:
    """`app` with the answers to browsers that [security.cors] asks for; `app` itself when it names no origin."""
    origins = settings["security.cors.allowed_origins"]
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=settings["security.cors.allowed_methods"],
        allow_headers=settings["security.cors.allowed_headers"],
        expose_headers=settings["security.cors.expose_headers"],
        allow_credentials=settings["security.cors.allow_credentials"],
        allow_private_network=settings["security.cors.allow_private_network"],
        max_age=settings["security.cors.max_age"],
    )


def error_body(path: str, code: str, message: str) -> bytes:
    """An error in the shape that the clients of `path` read."""
    if path == _SQL_PATH:
        shape: dict[str, Any] = {"status": "error", "results": [], "error": {"code": code, "message": message}}
        return msgspec.json.encode({**shape, "took": 0.0})
    if path.startswith(_AUTH_PREFIX):
        return msgspec.json.encode({"error": _SLUGS.get(code, code.lower()), "message": message})
    return msgspec.json.encode({"error": message, "code": code})


class Edge:
    """The ASGI application of the server."""

    def __init__(
        self,
        routes: Sequence[BaseRoute],
        settings: Mapping[str, Any],
        *,
        guards: Guards,
        metrics: Metrics,
        clock: Clock,
        access_log: AccessLog | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._router = Router(routes, redirect_slashes=False, default=_not_found)
        self._by_place = {
            (method, route.path): route
            for route in routes
            if isinstance(route, Route) and not route.param_convertors
            for method in route.methods or ()
        }
        """Routes without parameters by method and path: found without asking each of them."""
        self._app = with_cors(self._routed, settings)
        self._guards = guards
        self._metrics = metrics
        self._clock = clock
        self._tracing = tracing
        self._access_log = access_log
        self._headers = _STANDING_HEADERS + ((_TLS_HEADER,) if settings["server.tls_cert_file"] else ())
        self._id_prefix = clock.random_bytes(6).hex()
        self._count = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        client = scope["client"]
        peer = self._guards.peers.of(client[0] if client else "", headers)
        given = headers.get(b"x-request-id")
        if given is not None and _SANE_ID.fullmatch(given):
            request_id = given.decode()
        else:
            self._count += 1
            request_id = f"{self._id_prefix}-{self._count:x}"
        state = scope["state"]
        state["peer"], state["request_id"] = peer, request_id
        scope["app"] = self
        REQUEST_ID.set(request_id)
        path = scope["path"]
        wait_s = self._guards.wait_s(peer, is_auth=path.startswith(_AUTH_PREFIX))
        if scope["type"] == "http":
            await self._http(scope, receive, send, wait_s)
        elif wait_s:
            await _refuse_socket(send, 429, "RATE_LIMIT_EXCEEDED", _too_often(wait_s))
        else:
            await self._router(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send, wait_s: float) -> None:
        began_s = self._clock.monotonic_s()
        status = 0
        request_id = scope["state"]["request_id"].encode()

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = message["headers"] = list(message.get("headers", ()))
                names = {name for name, _ in headers}
                headers += [pair for pair in self._headers if pair[0] not in names]
                headers.append((b"x-request-id", request_id))
            await send(message)

        failed: BaseException | None = None
        try:
            if wait_s:
                await _refuse(scope, answer, 429, "RATE_LIMIT_EXCEEDED", _too_often(wait_s), wait_s)
            else:
                await self._app(scope, receive, answer)
        except ClientDisconnect:
            pass
        except asyncio.CancelledError:
            if not status:
                await _refuse(scope, answer, 503, "UNAVAILABLE", "the server stops; ask again later", 1.0)
        except Exception as exc:
            failed = exc
        if failed is not None:
            await self._failed(scope, answer, failed, bool(status))
        took_s = self._clock.monotonic_s() - began_s
        route = getattr(scope.get("route"), "path", "none")
        self._metrics.observe(scope["method"], route, status, took_s)
        if self._tracing is not None:
            self._tracing.request(scope, route, status, took_s)
        if self._access_log is not None:
            ip, raw_path = scope["state"]["peer"].ip, scope["raw_path"]
            self._access_log.add(ip, scope["method"], raw_path, status, took_s, scope["state"]["request_id"])

    async def _routed(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Errors are turned into answers here, below CORS, so that pages of other origins can read them."""
        try:
            route = self._by_place.get((scope["method"], scope["path"]))
            if route is None:
                await self._router(scope, receive, send)
            else:
                scope["route"], scope["endpoint"], scope["path_params"] = route, route.endpoint, {}
                await route.app(scope, receive, send)
        except HTTPException as exc:
            await _refuse(
                scope, send, exc.status_code, _CODES.get(exc.status_code, "ERROR"), exc.detail, None, exc.headers
            )
        except KalamDbError as exc:
            if exc.http_status >= 500:
                _log.exception("a request failed")
            await _refuse(scope, send, exc.http_status, exc.code, str(exc), 1.0 if exc.retryable else None)

    async def _failed(self, scope: Scope, send: Send, exc: BaseException, started: bool) -> None:
        """What nobody expected: logged with its trace, and told without it."""
        _log.error("a request failed: %s %s", scope["method"], scope["raw_path"].decode("latin-1"), exc_info=exc)
        if started:
            # The answer cannot be taken back. Raising ends its connection, so that it is not taken for whole.
            raise exc
        text = f"the request failed inside the server; its log has the reason under {request_id_of(scope)}"
        await _refuse(scope, send, 500, "INTERNAL_ERROR", text)


_CODES = {404: "NOT_FOUND", 405: "METHOD_NOT_ALLOWED", 400: "INVALID_INPUT"}


def _too_often(wait_s: float) -> str:
    return f"too many requests; wait {wait_s:.2f} s"


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        await _refuse(scope, send, 404, "NOT_FOUND", "there is nothing at this path")
    else:
        await _refuse_socket(send, 404, "NOT_FOUND", "there is no WebSocket at this path")


async def _refuse(
    scope: Scope, send: Send, status: int, code: str, message: str, retry_after_s: float | None = None,
    more: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    body = error_body(scope["path"], code, message)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if retry_after_s is not None:
        headers.append((b"retry-after", b"%d" % max(int(retry_after_s + 0.999), 1)))
    headers += [(name.lower().encode(), value.encode()) for name, value in (more or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})


async def _refuse_socket(send: Send, status: int, code: str, message: str) -> None:
    body = msgspec.json.encode({"error": message, "code": code})
    headers = [(b"content-type", b"application/json")]
    await send({"type": "websocket.http.response.start", "status": status, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body})
