"""The routes of the server, put together."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from kalamdb.server.execute import SqlRoute
from kalamdb.version import VERSION


def build_app(sql: SqlRoute) -> Starlette:
    """The ASGI application."""
    return Starlette(routes=[Route("/health", _health), Route("/v1/api/healthcheck", _health), *sql.routes()])


async def _health(request: Request) -> Response:
    return JSONResponse({"status": "healthy", "version": VERSION, "api_version": "v1"})
