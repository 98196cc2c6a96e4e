"""What only the whole database knows of itself: figures, open transactions, what the engine offers."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from kalamdb.backup import Backups
from kalamdb.backup.restore import Probation
from kalamdb.clock import Clock
from kalamdb.jobs import UnifiedJobManager
from kalamdb.live import LiveQueries, live_table
from kalamdb.machine import machine_figures
from kalamdb.sql.engine import Engine
from kalamdb.sql.queries import RunningQueries
from kalamdb.sql.session import Session
from kalamdb.storage.directory import DataDirectory
from kalamdb.system import INFORMATION_SCHEMA, SYSTEM, SystemTable, columns_of
from kalamdb.system.node import CLUSTER_ID, NODE_ID, NodeFacts, node_tables
from kalamdb.tables.store import TableStore
from kalamdb.types import TableId
from kalamdb.version import VERSION

_TRANSACTIONS = columns_of(
    "transaction_id T, owner_id T, origin T, state T, age_ms BIGINT, idle_ms BIGINT, write_count BIGINT, "
    "write_bytes BIGINT, touched_tables_count BIGINT, snapshot_commit_seq BIGINT"
)
_QUERIES = columns_of("query_id T, user_id T, state T, started_at TS, duration_ms BIGINT, sql T")
_ENGINE_TABLES = {
    "df_settings": "name T, value T?, description T?",
    "routines": "specific_catalog T?, specific_schema T?, specific_name T?, routine_catalog T?, routine_schema T?, "
    "routine_name T, routine_type T?, is_deterministic BOOL?, data_type T?, function_type T?, description T?, "
    "syntax_example T?",
    "parameters": "specific_catalog T?, specific_schema T?, specific_name T?, ordinal_position BIGINT, "
    "parameter_mode T?, parameter_name T?, data_type T?, parameter_default T?, is_variadic BOOL?, rid BIGINT?",
}
"""Tables of information_schema that describe the engine."""
Figures = Mapping[str, object]
_OF_A_SERVER: Final[Figures] = dict.fromkeys(
    (
        "total_live_queries", "active_connections", "active_connections_peak", "active_subscriptions",
        "active_subscriptions_peak", "websocket_sessions", "websocket_sessions_peak", "server_workers_configured",
        "server_workers_effective", "max_connections", "max_connections_configured", "connection_backlog",
        "worker_max_blocking_threads",
    ),
    0,
)  # fmt: skip
"""Figures that a server says; a database that is not served has none of what they count."""
_ABSENT: Final[Figures] = {
    "topic_cache_topic_count": 0, "topic_cache_table_route_count": 0, "topic_cache_total_routes": 0,
    "string_interner_unique_strings": 0, "server_build_date": "", "server_git_branch": "", "server_git_commit": "",
    "cluster_mode": "standalone", "cluster_id": CLUSTER_ID, "cluster_rpc_addr": "",
    "cluster_api_addr": "", "node_id": NODE_ID,
    "user_shards": 1, "shared_shards": 1, "raft_group_count": 0,
}  # fmt: skip
"""Figures of the original about what there is once, or not at all, here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Introspection:
    """Rows of system.stats, system.live, system.transactions and of the engine's information_schema, over the parts."""

    clock: Clock
    store: TableStore
    session: Session
    engine: Engine
    queries: RunningQueries
    manager: UnifiedJobManager
    backups: Backups
    directory: DataDirectory | None
    probation: Probation | None
    made_s: float
    """When the database was opened, by the monotonic clock."""
    live: LiveQueries
    users_counted: Callable[[], int]
    logs_folder: Path | None
    """Where the server writes its log files."""
    sources: list[Callable[[], Figures]] = field(default_factory=list)
    """More figures, of a server; they replace those of the same name."""

    def figures(self) -> Mapping[str, object]:
        """Figures by name, for system.stats."""
        uptime_s = int(self.clock.monotonic_s() - self.made_s)
        found: dict[str, object] = {
            **_OF_A_SERVER,
            **_ABSENT,
            **machine_figures(),
            **self.store.backend.stats(),
            **self.live.figures(),
            "server_version": VERSION,
            "server_uptime_seconds": uptime_s,
            "server_uptime_human": str(dt.timedelta(seconds=uptime_s)),
            "total_users": self.users_counted(),
            "schema_cache_size": self.store.layouts_kept,
            "schema_cache_total_entries": self.store.layouts_kept,
            "schema_registry_size": len(self.store.catalog.tables()),
            "datafusion_query_parallelism": self.engine.limits.target_partitions,
            "datafusion_max_partitions": self.engine.limits.target_partitions,
            "datafusion_memory_limit_mb": self.engine.limits.memory_bytes_max >> 20,
            "plan_cache_size": self.session.plans_cached,
            "open_transactions": len(self.session.open_transactions()),
            "hot_bytes": self.store.hot_bytes(),
            "hot_cache_bytes": self.store.hot.bytes_used,
            "abandoned_job_threads": self.manager.runner.abandoned_threads,
            **self._of_restores(),
        }
        for source in self.sources:
            found.update(source())
        return found

    def _of_restores(self) -> Mapping[str, object]:
        found: dict[str, object] = {}
        if self.directory is None:
            return found
        if (pending := self.backups.pending()) is not None:
            found["restore_pending"] = pending
        if (origin := self.directory.origin) is not None:
            found["restored_from"] = f"'{origin.backup}' up to _seq {origin.snapshot_seq}"
        if self.probation is not None and self.probation.kept is not None:
            found["restore_previous_generation"] = self.probation.kept
            found["restore_check_problems"] = len(self.probation.problems)
        return found

    def tables(self) -> Iterator[SystemTable]:
        """The system tables over these parts."""
        yield live_table(self.live.rows)
        yield SystemTable(TableId(SYSTEM, "transactions"), _TRANSACTIONS, lambda _: self._transactions())
        yield SystemTable(TableId(SYSTEM, "queries"), _QUERIES, lambda _: list(self.queries.rows()))
        yield from node_tables(
            NodeFacts(
                figures=self.figures,
                head=self.store.backend.head,
                version=VERSION,
                logs_folder=self.logs_folder,
            )
        )
        for name, columns in _ENGINE_TABLES.items():
            rows = partial(self._of_engine, name)
            yield SystemTable(TableId(INFORMATION_SCHEMA, name), columns_of(columns), rows)

    def _transactions(self) -> Iterator[Sequence[Any]]:
        now_s = self.clock.monotonic_s()
        for one in self.session.open_transactions():
            inner = one.transaction
            ages_ms = (int((now_s - since_s) * 1000) for since_s in (one.began_s, inner.used_s))
            yield str(one.number), one.owner, one.origin, "open", *ages_ms, *inner.writes, inner.moment.snapshot.seq

    def _of_engine(self, name: str, filters: Mapping[str, Any]) -> Sequence[Sequence[Any]]:
        return self.engine.information(name)
