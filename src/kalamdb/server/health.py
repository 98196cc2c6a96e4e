"""Whether the server lives, and whether it may be asked: /health, /ready, and the one node of the cluster."""

from __future__ import annotations

import datetime as dt
import socket
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

import kalamdb.version
from kalamdb.database import Database
from kalamdb.server.edge import peer_of
from kalamdb.server.guards import Guards
from kalamdb.version import VERSION

_CLUSTER_ID = "standalone"
_NODE_ID = 0


class Phase(StrEnum):
    """Where the server is in its life."""

    STARTING = "starting"
    SERVING = "serving"
    STOPPING = "stopping"


class Condition:
    """The phase of a server. Set by the one who starts and stops it."""

    def __init__(self) -> None:
        self.phase = Phase.STARTING


class HealthRoutes:
    """Answers on the state of a served database."""

    def __init__(self, database: Database, condition: Condition, guards: Guards, *, address: Callable[[], str]) -> None:
        self._database = database
        self._condition = condition
        self._guards = guards
        self._address = address
        made_s = Path(kalamdb.version.__file__).stat().st_mtime
        self._build_date = dt.datetime.fromtimestamp(made_s, dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    def routes(self) -> Sequence[BaseRoute]:
        """What to mount."""
        return [
            Route("/health", self.health),
            Route("/v1/api/healthcheck", self.health),
            Route("/v1/api/cluster/health", self.cluster),
            Route("/ready", self.ready),
        ]

    async def health(self, request: Request) -> Response:
        """Liveness: 200 while the process answers. What an operator should know stands beside it."""
        if not self._guards.peers.may_ask_health(peer_of(request.scope)):
            return _json({"error": "Access denied. Health endpoint is localhost-only."}, 403)
        answer: dict[str, Any] = {
            "status": "healthy", "version": VERSION, "api_version": "v1", "build_date": self._build_date
        }  # fmt: skip
        context = self._database.context
        runner = context.job_manager.runner
        answer["abandoned_job_threads"] = runner.abandoned_threads
        answer["jobs_are_held"] = runner.is_choked
        answer["restart_required"] = context.directory is not None and context.backups.pending() is not None
        return _json(answer)

    async def ready(self, request: Request) -> Response:
        """Whether requests should be sent here: 503 with the reason while they should not."""
        if not self._guards.peers.may_ask_health(peer_of(request.scope)):
            return _json({"error": "Access denied. Health endpoint is localhost-only."}, 403)
        reason = self.not_ready_because()
        if reason is None:
            return _json({"status": "ready"})
        return _json({"status": "not ready", "reason": reason}, 503)

    def not_ready_because(self) -> str | None:
        """Why no request should be sent here now; None when they should."""
        if self._condition.phase is not Phase.SERVING:
            return f"the server is {self._condition.phase}"
        if self._figures()["writes_refused"]:
            return "the store refuses writes since a commit failed; mend the cause, then restart the server"
        return None

    def _figures(self) -> Mapping[str, int]:
        return self._database.context.backend.stats()

    async def cluster(self, request: Request) -> Response:
        """The state of the cluster of one node, in the shape of one of several."""
        if not self._guards.peers.may_ask_health(peer_of(request.scope)):
            return _json({"error": "Access denied. Health endpoint is localhost-only."}, 403)
        figures = self._database.context.introspection.figures()
        head = self._database.context.backend.head()
        node = {
            "node_id": _NODE_ID, "role": "leader", "status": "active", "api_addr": self._address(), "is_self": True,
            "is_leader": True, "replication_lag": 0, "catchup_progress_pct": 100, "hostname": socket.gethostname(),
            "memory_usage_mb": figures.get("memory_usage_mb"), "cpu_usage_percent": None,
            "uptime_seconds": figures["server_uptime_seconds"], "uptime_human": figures["server_uptime_human"],
        }  # fmt: skip
        return _json(
            {
                "status": "degraded" if self.not_ready_because() else "healthy",
                "version": VERSION, "build_date": self._build_date, "is_cluster_mode": False,
                "cluster_id": _CLUSTER_ID, "node_id": _NODE_ID, "is_leader": True, "total_groups": 1,
                "groups_leading": 1, "current_term": 1, "last_applied": head, "millis_since_quorum_ack": 0,
                "nodes": [node],
            }
        )  # fmt: skip


def _json(answer: Mapping[str, Any], status: int = 200) -> Response:
    return Response(msgspec.json.encode(answer), status, media_type="application/json")
