"""Namespace `dba` of a served database: its figures over time, and notifications.

`dba.stats` gets a sample of the figures of system.stats every ten seconds; the retention job removes those
that are too old. The tables are ordinary ones, made when they are not there.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping
from typing import Any, Final

from kalamdb.catalog import Catalog
from kalamdb.clock import Clock
from kalamdb.result import Result
from kalamdb.service import Loop
from kalamdb.types import TableId

INTERVAL_S: Final = 10.0
_STATS: Final = TableId("dba", "stats")
_DAY_MS: Final = 86_400_000
_TABLES: Final = """
    CREATE NAMESPACE IF NOT EXISTS dba;
    CREATE SHARED TABLE IF NOT EXISTS dba.stats (
        id TEXT PRIMARY KEY DEFAULT ULID(),
        node_id BIGINT NOT NULL,
        metric_name TEXT NOT NULL,
        metric_value DOUBLE NOT NULL,
        metric_unit TEXT,
        sampled_at TIMESTAMP NOT NULL
    ) WITH (ACCESS_LEVEL = 'DBA', DELETED_RETENTION_HOURS = 0);
    CREATE SHARED TABLE IF NOT EXISTS dba.notifications (
        id TEXT PRIMARY KEY DEFAULT ULID(),
        user_id TEXT,
        title TEXT NOT NULL,
        body TEXT,
        is_read BOOLEAN NOT NULL DEFAULT false,
        created_at TIMESTAMP NOT NULL DEFAULT NOW(),
        updated_at TIMESTAMP NOT NULL DEFAULT NOW()
    ) WITH (ACCESS_LEVEL = 'PUBLIC')
"""
_UNITS: Final[Mapping[str, str]] = {
    "memory_rss_mb": "MB",
    "memory_virtual_mb": "MB",
    "system_used_memory_mb": "MB",
    "open_files_total": "files",
    "total_users": "users",
    "total_tables": "tables",
    "total_jobs": "jobs",
    "jobs_running": "jobs",
    "jobs_queued": "jobs",
    "jobs_failed": "jobs",
    "active_connections": "connections",
    "active_subscriptions": "subscriptions",
    "websocket_sessions": "sessions",
    "open_transactions": "transactions",
    "commits": "commits",
    "hot_bytes": "bytes",
    "hot_cache_bytes": "bytes",
}
"""What is sampled. All figures would be half a million rows a day."""

Execute = Callable[[str, Any], Result]
"""Runs SQL with parameters as the system."""


class StatsSampler:
    """Makes the tables of `dba` and fills `dba.stats`. Start and stop are idempotent."""

    def __init__(
        self,
        execute: Execute,
        catalog: Catalog,
        figures: Callable[[], Mapping[str, object]],
        clock: Clock,
        *,
        sampled: bool,
        retention_days: float,
    ) -> None:
        self._execute = execute
        self._catalog = catalog
        self._figures = figures
        self._clock = clock
        self._sampled = sampled
        self._retention_ms = int(retention_days * _DAY_MS)
        self._loop = Loop("dba_stats", self.step, INTERVAL_S, clock)

    def start(self) -> None:
        """Make the tables, then sample in the background unless retention.enable_dba_stats is off. Blocks for
        the disk."""
        self._execute(_TABLES, None)
        if self._sampled:
            self._loop.start()

    def stop(self) -> None:
        """End after the running sample."""
        self._loop.stop()

    def step(self) -> bool:
        """Take one sample; never returns True."""
        figures, now = self._figures(), _moment(self._clock.now_ms())
        node_id = figures.get("node_id", 0)
        params: list[Any] = []
        for name, unit in _UNITS.items():
            if name in figures:
                params += (node_id, name, float(str(figures[name])), unit, now)
        rows = (f"(${at + 1}, ${at + 2}, ${at + 3}, ${at + 4}, ${at + 5})" for at in range(0, len(params), 5))
        columns = "node_id, metric_name, metric_value, metric_unit, sampled_at"
        self._execute(f"INSERT INTO dba.stats ({columns}) VALUES {', '.join(rows)}", params)
        return False

    def remove_old(self) -> None:
        """Delete the samples that are older than retention.dba_stats_retention_days; 0 keeps all. Blocks."""
        if self._retention_ms and self._catalog.table(_STATS) is not None:
            oldest = _moment(self._clock.now_ms() - self._retention_ms)
            self._execute("DELETE FROM dba.stats WHERE sampled_at < $1", [oldest])


def _moment(ms: int) -> dt.datetime:
    """A TIMESTAMP, in UTC without a zone."""
    return dt.datetime(1970, 1, 1) + dt.timedelta(milliseconds=ms)
