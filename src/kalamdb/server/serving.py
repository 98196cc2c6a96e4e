"""Starts and stops a served database, in order."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import uvloop

from kalamdb.config import Settings
from kalamdb.database import Database
from kalamdb.opening import hold
from kalamdb.server.app import absent_routes, static_routes
from kalamdb.server.auth import open_auth
from kalamdb.server.edge import Edge, peer_of
from kalamdb.server.execute import SqlRoute
from kalamdb.server.guards import Guards
from kalamdb.server.health import Condition, HealthRoutes, Phase
from kalamdb.server.listener import Listener, connection_limits, first_of
from kalamdb.server.live_route import LiveRoute, origin_check, socket_limits
from kalamdb.server.live_socket import LiveServices
from kalamdb.server.logs import AccessLog, configure_logging
from kalamdb.server.metrics import Metrics, MetricsRoute
from kalamdb.server.openapi import openapi_routes
from kalamdb.server.protocol import Door
from kalamdb.server.sockets import Sockets
from kalamdb.server.telemetry import make_tracing
from kalamdb.version import VERSION

_SWITCH_INTERVAL_S = 0.0005
"""The loop gets the interpreter back from a busy thread after this long."""
_CLOSE_SERVICE_RESTART = 1012
_SOCKETS_CLOSING_S = 2.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_log = logging.getLogger("kalamdb.server")


class StopSignals:
    """SIGTERM and SIGINT: the first asks for a clean stop, the second to wait for nothing any more.

    uvicorn would raise a caught signal again at the end, and the process would die of it. Here its exit status is 0.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._count = 0
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()

    def install(self) -> None:
        """Catch them from now on; until `attend` they are counted."""
        for number in _SIGNALS:
            signal.signal(number, self._caught)

    def attend(self, loop: asyncio.AbstractEventLoop) -> None:
        """Set the events on `loop`."""
        self._loop = loop
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._count_one)
        self._announce()

    def _caught(self, number: int, frame: FrameType | None) -> None:
        self._count += 1

    def _count_one(self) -> None:
        self._count += 1
        self._announce()

    def _announce(self) -> None:
        if self._count >= 1:
            self.stop.set()
        if self._count >= 2:
            self.hurry.set()

    def ignore(self) -> None:
        """All is stopped: nothing may change the exit status now."""
        for number in _SIGNALS:
            if self._loop is not None:
                self._loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)


class Serving:
    """One served database: its parts, and the order in which they start and stop."""

    def __init__(self, database: Database, settings: Mapping[str, Any], *, host: str, port: int) -> None:
        self._database = database
        self._settings = settings
        context = database.context
        clock = context.clock
        self.condition = Condition()
        self.sockets = Sockets()
        guards = Guards(settings, clock)
        self._auth = open_auth(context, host=host, sender_of=lambda request: peer_of(request.scope))
        self._sql = SqlRoute(database, self._auth.authenticator)
        self._live = LiveRoute(
            LiveServices(
                context.live, self._auth.authenticator, self.sockets, clock, socket_limits(settings),
                self._sql.threads.run, origin_check(settings),
            )
        )  # fmt: skip
        metrics = Metrics(database)
        context.backend.observe(metrics.on_commit)
        self._tracing = make_tracing(settings, clock)
        if self._tracing is not None:
            context.backend.observe(self._tracing.on_commit)
        door = Door(connection_limits(settings), is_exempt=guards.is_exempt, banned_s=guards.banned_s)
        routes = [
            *self._auth.routes,
            *self._sql.routes(),
            *self._live.routes(),
            *static_routes(),
            *HealthRoutes(database, self.condition, guards, address=lambda: self.listener.url).routes(),
            *MetricsRoute(metrics, guards, lambda header: self._auth.authenticator.bearer(header).role).routes(),
            *openapi_routes(),
            *absent_routes(),
        ]
        self._access_log = None
        if settings["logging.access_log"]:
            self._access_log = AccessLog(clock, is_json=settings["logging.format"] == "json")
            self._access_log.start()
        edge = Edge(
            routes,
            settings,
            guards=guards,
            metrics=metrics,
            clock=clock,
            access_log=self._access_log,
            tracing=self._tracing,
        )
        self.listener = Listener(edge, door, settings, clock, host=host, port=port)
        self._door = door
        context.introspection.sources.extend([self._figures, context.live.figures])
        metrics.gauge(
            "kalamdb_live", "Live queries: subscriptions and what they do", context.live.figures, label="figure"
        )
        metrics.gauge("kalamdb_queries", "Statements that wait or run", context.queries.counts, label="state")
        metrics.gauge("kalamdb_connections", "Open connections", lambda: door.open)
        metrics.gauge("kalamdb_connections_refused", "Connections and requests over a limit", lambda: door.refused)
        metrics.gauge("kalamdb_sockets", "Open WebSockets", lambda: len(door.sockets))

    def _figures(self) -> Mapping[str, object]:
        """What system.stats says of a server."""
        door, settings = self._door, self._settings
        return {
            "active_connections": door.open,
            "active_connections_peak": door.open_peak,
            "websocket_sessions": len(door.sockets),
            "websocket_sessions_peak": door.sockets_peak,
            "server_workers_configured": 1,
            "server_workers_effective": 1,
            "max_connections": settings["performance.max_connections"],
            "max_connections_configured": settings["performance.max_connections"],
            "connection_backlog": settings["performance.backlog"],
            "cluster_api_addr": self.listener.url,
        }

    async def run(self, signals: StopSignals, *, ready: str) -> None:
        """Serve until a signal, then stop in order. `ready` is printed with the address when requests may come."""
        signals.attend(asyncio.get_running_loop())
        try:
            await asyncio.to_thread(self._database.context.sampler.start)
            await self.listener.start()
        except BaseException:
            await asyncio.to_thread(self._database.close)
            raise
        self.condition.phase = Phase.SERVING
        print(f"{ready} on {self.listener.url}", flush=True)
        await signals.stop.wait()
        await self._stop(signals)

    async def _stop(self, signals: StopSignals) -> None:
        """Stop asking for work, finish what was accepted, then close. A second signal ends each wait."""
        _log.info("the server stops")
        self.condition.phase = Phase.STOPPING
        manager = self._database.context.job_manager
        self.listener.stop_accepting()
        manager.stop_claims()
        await self.listener.finish_requests(signals.hurry, self._settings["shutdown.requests_s"])
        self._sql.stop()
        closing = self.sockets.close_all(_CLOSE_SERVICE_RESTART, "the server restarts", timeout_s=_SOCKETS_CLOSING_S)
        await first_of(closing, signals.hurry.wait())
        self.listener.close()
        ended = asyncio.ensure_future(asyncio.to_thread(self._close))
        await first_of(asyncio.shield(ended), signals.hurry.wait())
        manager.hurry()
        await ended
        _log.info("the server has stopped")

    def _close(self) -> None:
        """Jobs get shutdown.timeout_s, then go as their on_interrupt says; last the store is synced and closed."""
        self._sql.close()
        self._auth.close()
        self._database.close()
        if self._access_log is not None:
            self._access_log.stop()
        if self._tracing is not None:
            self._tracing.stop()


def serve(path: Path, settings: Settings, *, host: str, port: int) -> int:
    """Serve the database in `path` until SIGTERM or SIGINT; blocks. The exit status. For the main thread of a process
    of its own: it sets signal handlers, the logging and the switch interval.

    Raises KalamDbError when the database cannot be opened, OSError when the port or the log cannot.
    """
    signals = StopSignals()
    signals.install()
    configure_logging(path, settings)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    for ignored in settings.ignored:
        _log.warning("setting without a meaning here: %s", ignored)
    database = hold(path, settings)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        serving = _made(database, settings, host=host, port=port)
        runner.run(serving.run(signals, ready=f"KalamDB {VERSION} serves {path}"))
        signals.ignore()
    return 0


def _made(database: Database, settings: Settings, *, host: str, port: int) -> Serving:
    try:
        return Serving(database, settings, host=host, port=port)
    except BaseException:
        database.close()
        raise


def leave(status: int) -> None:
    """End the process though threads of abandoned jobs and statements still run; all that counts is closed."""
    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.current_thread()):
        os._exit(status)
