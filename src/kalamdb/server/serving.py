"""Starts and stops a served database, in order."""

from __future__ import annotations

import os
from pathlib import Path

import uvicorn

from kalamdb.config import Settings
from kalamdb.database import connect
from kalamdb.server.app import build_app
from kalamdb.server.execute import SqlRoute
from kalamdb.server.identity import Authenticator


def serve(path: Path, settings: Settings, *, host: str, port: int) -> int:
    """Serve the database in `path` until SIGTERM; blocks. The exit status."""
    with connect(path, **settings) as database:
        context = database.context
        authenticator = Authenticator(context.users, context.clock, secret=None, access_s=24 * 3600)
        sql = SqlRoute(database, authenticator, context.clock, os.cpu_count() or 2)
        server = uvicorn.Server(uvicorn.Config(build_app(sql), host=host, port=port, loop="uvloop", http="httptools"))
        server.run()
        sql.close()
    return 0
