"""Routes without a part of their own: the module for browsers, and features of the original that are not here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from hashlib import sha256
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

_ABSENT: tuple[tuple[str, str, str], ...] = (
    ("/v1/api/topics/consume", "POST", "topics are"),
    ("/v1/api/topics/ack", "POST", "topics are"),
    ("/v1/files/{ns}/{table}/{subfolder}/{file_id}", "GET", "FILE columns are"),
    ("/api/v1/files/{ns}/{table}/{subfolder}/{file_id}", "GET", "FILE columns are"),
    ("/v1/exports/{user_id}/{export_id}", "GET", "exports are"),
    ("/ui", "GET", "the admin pages are"),
    ("/ui/{path:path}", "GET", "the admin pages are"),
)
"""Path, method, what is missing."""


def static_routes() -> Sequence[BaseRoute]:
    """`/kalamdb.js`, the client for browsers."""
    content = files("kalamdb.server").joinpath("static", "kalamdb.js").read_bytes()
    tag = f'"{sha256(content).hexdigest()[:16]}"'
    headers = {"etag": tag, "cache-control": "no-cache", "cross-origin-resource-policy": "cross-origin"}

    async def answer(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type="text/javascript; charset=utf-8")

    return [Route("/kalamdb.js", answer, methods=["GET"])]


def absent_routes() -> Sequence[BaseRoute]:
    """Routes that say clearly that their feature is not there, instead of that their path is unknown."""
    return [Route(path, _absent(what), methods=[method]) for path, method, what in _ABSENT]


def _absent(what: str) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        return JSONResponse({"error": f"{what} not offered by this server", "code": "UNSUPPORTED"}, 501)

    return answer
