"""`system.*` and `information_schema.*`: what the database knows of itself, as Arrow tables.

A system table is its name, its columns, and a function that yields its rows; nothing of it is stored.
Timestamps are milliseconds inside and microseconds in the tables. JSON columns are text whose field
metadata says that it is JSON.

Rows of USER tables belong to their users, so nothing here shows a value out of them: the manifest of such
a table comes without the bounds of its columns and keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa

from kalamdb.catalog import Catalog
from kalamdb.config import Settings
from kalamdb.errors import Denied, InvalidRequest, NotFound
from kalamdb.schema import TypeName
from kalamdb.settings import SETTINGS
from kalamdb.storage.jobs import JobStatus, JobStore
from kalamdb.system.jobs import job_tables
from kalamdb.system.shape import (
    INFORMATION_SCHEMA,
    SYSTEM,
    Filters,
    Rows,
    SystemColumn,
    SystemTable,
    arrow_table,
    columns_of,
)
from kalamdb.system.standard import standard_tables
from kalamdb.system.tables import (
    DESCRIBE,
    SCHEMAS,
    STORAGES,
    born_at,
    catalog_tables,
    describe_rows,
    describe_schema_rows,
    describe_system_rows,
    options_json,
    schema_row,
    storage_rows,
    version_rows,
    wire_type,
)
from kalamdb.tables.mirror import segment_json
from kalamdb.tables.store import TableStore
from kalamdb.types import Role, TableId, TableKind

__all__ = [
    "INFORMATION_SCHEMA",
    "SYSTEM",
    "Filters",
    "SystemColumn",
    "SystemSources",
    "SystemTable",
    "SystemTablesRegistry",
    "arrow_table",
    "columns_of",
    "figure_rows",
    "options_json",
    "wire_type",
]

_ALIASES: Final = {"manifest_cache": "manifest"}
_BOUNDS: Final = frozenset({"min_key", "max_key"})
_MANIFEST: Final = columns_of(
    "cache_key T, namespace_id T, table_name T, scope T, etag T?, last_refreshed TS, last_accessed TS, in_memory BOOL, "
    "sync_state T, manifest_json JSON"
)
_SETTINGS: Final = columns_of("name T, value T, description T, category T")
_STATS: Final = columns_of("metric_name T, metric_value T")


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemSources:
    """Where the rows come from."""

    catalog: Catalog
    jobs: JobStore
    store: TableStore
    settings: Settings
    stats: Callable[[], Mapping[str, object]]
    """Figures by name; shown together with those of the catalog and of the jobs."""
    job_queues: Callable[[], Rows] = tuple
    """Rows of system.job_queues."""
    job_executors: Callable[[], Rows] = tuple
    """Rows of system.job_executors."""
    job_schedules: Callable[[], Rows] = tuple
    """Rows of system.job_schedules."""


class SystemTablesRegistry:
    """All system tables by name. Each read sees its source as it is then; thread-safe once it is filled."""

    def __init__(self, sources: SystemSources) -> None:
        self._catalog = sources.catalog
        self._storages = sources.store.storages
        self._tables: dict[TableId, SystemTable] = {}
        own = [
            *catalog_tables(sources.catalog, self.tables, sources.store.storages),
            *job_tables(sources.jobs, sources.job_queues, sources.job_executors, sources.job_schedules),
            *standard_tables(sources.catalog, self.tables),
            SystemTable(TableId(SYSTEM, "manifest"), _MANIFEST, lambda _: _manifest_rows(sources.store)),
            SystemTable(TableId(SYSTEM, "settings"), _SETTINGS, lambda _: _setting_rows(sources.settings)),
            SystemTable(TableId(SYSTEM, "stats"), _STATS, lambda _: figure_rows(sources)),
        ]
        for table in own:
            self.register(table)

    def register(self, table: SystemTable) -> None:
        """Add a table. Raises InvalidRequest when the name is taken or not in a namespace of the system."""
        if table.table_id.namespace not in (SYSTEM, INFORMATION_SCHEMA):
            raise InvalidRequest(f"system table '{table.table_id}' must lie in {SYSTEM} or {INFORMATION_SCHEMA}")
        if table.table_id in self._tables:
            raise InvalidRequest(f"system table '{table.table_id}' is registered already")
        self._tables[table.table_id] = table

    def tables(self) -> list[SystemTable]:
        """All system tables by name."""
        return sorted(self._tables.values(), key=lambda table: str(table.table_id))

    def find(self, table_id: TableId) -> SystemTable | None:
        """The system table of that name; knows the older spellings too."""
        found = self._tables.get(table_id)
        if found is None and table_id.namespace == SYSTEM:
            name = table_id.name.removeprefix("system_")
            found = self._tables.get(TableId(SYSTEM, _ALIASES.get(name, name)))
        return found

    def allowed(self, role: Role, table_id: TableId) -> bool:
        """Whether a caller may read this table: `system` is for dba and system, information_schema for all."""
        return table_id.namespace != SYSTEM or role in (Role.DBA, Role.SYSTEM)

    def check_read(self, role: Role, table_id: TableId) -> None:
        """Raise Denied unless `allowed`."""
        if not self.allowed(role, table_id):
            raise Denied(f"Admin privileges (role dba or system) are needed to read '{table_id}'; your role is {role}")

    def write_refusal(self, verb: str, table_id: TableId) -> InvalidRequest:
        """The error for a statement (`verb`: insert, update, delete, alter, drop) that would change one."""
        return InvalidRequest(f"Cannot {verb} system table '{table_id}': its rows are made when it is read")

    def table(self, table_id: TableId, *, filters: Filters | None = None) -> pa.Table:
        """Its rows. `filters` may save work; rows beside them can be among the answer. Raises NotFound."""
        found = self.find(table_id)
        if found is None:
            known = ", ".join(str(table.table_id) for table in self.tables())
            raise NotFound(f"System table '{table_id}' does not exist; there are {known}")
        texts = {column.name for column in found.columns if column.type.name is TypeName.TEXT}
        usable = {name: values for name, values in (filters or {}).items() if name in texts}
        return arrow_table(found.columns, found.source(usable))

    def show_tables(self, namespace: str) -> pa.Table:
        """SHOW TABLES: the newest schema of each table of a namespace, in the shape of system.schemas."""
        definitions = [entry.definition for entry in self._catalog.tables(namespace)]
        return arrow_table(SCHEMAS, (schema_row(definition, definition.version) for definition in definitions))

    def show_storages(self, *, hidden: bool) -> pa.Table:
        """SHOW STORAGES: rows of system.storages; `hidden` shows credentials as ***."""
        return arrow_table(STORAGES, storage_rows(self._storages, born_at(self._catalog), hidden=hidden))

    def describe(self, table_id: TableId) -> pa.Table:
        """DESCRIBE TABLE: the columns of a table or system table. Raises NotFound."""
        found = self.find(table_id)
        if found is not None:
            return arrow_table(DESCRIBE, describe_system_rows(found))
        return arrow_table(DESCRIBE, describe_rows(self._catalog.require(table_id).definition))

    def describe_schema(self, schema: pa.Schema) -> pa.Table:
        """Columns of a query, as of a view, in the shape of DESCRIBE TABLE."""
        return arrow_table(DESCRIBE, describe_schema_rows(schema))

    def history(self, table_id: TableId) -> pa.Table:
        """DESCRIBE TABLE ... HISTORY: all schema versions, oldest first, in the shape of system.schemas."""
        return arrow_table(SCHEMAS, version_rows(self._catalog, self._catalog.require(table_id)))


def _setting_rows(settings: Settings) -> Rows:
    for one in SETTINGS:
        yield one.key, settings.shown(one.key), one.help, one.category


def figure_rows(sources: SystemSources) -> list[tuple[str, str]]:
    """Rows of system.stats: figures by name."""
    counts = {status: sources.jobs.count(status) for status in JobStatus}
    figures: dict[str, object] = {
        "total_namespaces": len(sources.catalog.namespaces()),
        "total_tables": len(sources.catalog.tables()),
        "total_storages": len(sources.store.storages.all()),
        "total_jobs": sum(counts.values()),
        **{f"jobs_{status.value}": count for status, count in counts.items()},
        **sources.stats(),
    }
    return sorted((name, str(value)) for name, value in figures.items())


def _manifest_rows(store: TableStore) -> Rows:
    """One row per table, scope 'shared' or, where rows belong to users, 'all'."""
    for entry in store.catalog.tables():
        definition = entry.definition
        if definition.kind is TableKind.STREAM:
            continue
        shared = definition.kind is TableKind.SHARED
        state = store.state(definition.uid)
        segments = [segment_json(segment) for segment in state.segments]
        table, scope = f"{definition.namespace}:{definition.name}", "shared" if shared else "all"
        yield (
            f"{table}:{scope}",
            definition.namespace,
            definition.name,
            scope,
            None,
            max((segment.record.created_at for segment in state.segments), default=definition.created_at),
            store.clock.now_ms(),
            True,
            "pending_write" if store.has_pending(definition.uid) else "in_sync",
            {
                "table_id": table,
                "scope": scope,
                "version": state.manifest_version,
                "segments": segments if shared else [_without_values(one) for one in segments],
            },
        )


def _without_values(segment: Mapping[str, Any]) -> dict[str, Any]:
    """A segment of rows of users, without any value out of them."""
    kept = {name: value for name, value in segment.items() if name not in _BOUNDS}
    stats = kept.get("column_stats")
    if stats is not None:
        kept["column_stats"] = {column: {"null_count": found.get("null_count")} for column, found in stats.items()}
    return kept
