"""Statements about namespaces, tables and views, and SHOW."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, assert_never

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from kalamdb.alter import AddColumn, AlterChange, ModifyColumn, RowProbe
from kalamdb.catalog import Catalog, CatalogEntry, NamespaceNotFound, TableSpec
from kalamdb.clock import Clock
from kalamdb.errors import Conflict, Denied, InvalidRequest, NotFound
from kalamdb.jobs import JobRequest, UnifiedJobManager
from kalamdb.result import Result
from kalamdb.schema import ColumnDef, TableDef
from kalamdb.sql import statements as st
from kalamdb.sql.analyse import analyse_text
from kalamdb.sql.caller import Caller, denied, may_create
from kalamdb.sql.parse_table import resolve_default
from kalamdb.sql.projection import quote
from kalamdb.sql.query import Reader
from kalamdb.storage.jobs import JobInsert
from kalamdb.system import SystemTablesRegistry
from kalamdb.tables.layout import KEY, Layout, conform, physical_name, read_payload
from kalamdb.tables.store import TableStore
from kalamdb.tables.write import Defaults
from kalamdb.types import Role, TableId, TableKind


class Admin:
    """Runs DDL and SHOW for callers."""

    def __init__(
        self,
        store: TableStore,
        catalog: Catalog,
        reader: Reader,
        system: SystemTablesRegistry,
        manager: UnifiedJobManager,
        clock: Clock,
        *,
        retention_hours: int,
    ) -> None:
        self._store = store
        self._catalog = catalog
        self._reader = reader
        self._system = system
        self._manager = manager
        self._clock = clock
        self._retention_hours = retention_hours
        """Of a table that does not say its own."""

    def run(self, statement: st.Statement, caller: Caller) -> Result:
        """Run one statement."""
        match statement:
            case st.CreateNamespace(name=name):
                created = self._catalog.create_namespace(name, if_not_exists=statement.if_not_exists)
                return Result(message=f"Namespace '{name}' {'created successfully' if created else 'already exists'}")
            case st.DropNamespace():
                return self._drop_namespace(statement)
            case st.AlterNamespace(name=name, options=options):
                self._catalog.alter_namespace(name, options)
                return Result(message=f"Namespace '{name}' altered successfully")
            case st.CreateTable():
                return self._create_table(statement, caller)
            case st.AlterTable():
                return self._alter_table(statement, caller)
            case st.DropTable():
                return self._drop_table(statement, caller)
            case st.TruncateTable(table=table):
                table_id = self._reader.resolve(table, caller)
                self._reader.refuse_system("truncate", table_id)
                definition, commit = self._catalog.truncate_table(table_id, self._cleanup)
                return Result(message=f"Table {definition.table_id} truncated. Cleanup job: {commit.jobs[0]}")
            case st.CreateView():
                return self._create_view(statement, caller)
            case st.DropView():
                return self._drop_view(statement, caller)
            case st.Show():
                return Result(self._show(statement, caller))
            case st.SetOption(name=name):
                raise InvalidRequest(f"setting '{name}' cannot be changed by SET; give it when the database is opened")
            case _:
                raise InvalidRequest(f"'{statement.sql[:60]}' cannot run here")

    def use(self, statement: st.UseNamespace) -> str:
        """The namespace that USE selects. Raises NotFound."""
        self._require_namespace(statement.name)
        return statement.name

    def _cleanup(self, definition: TableDef) -> JobInsert:
        """The job that removes what a dropped or truncated table leaves."""
        params = {"table_id": str(definition.table_id), "operation": "drop_table", "table_uid": int(definition.uid)}
        return self._manager.prepare(JobRequest(job_type="cleanup", params=params))

    def _require_namespace(self, name: str) -> None:
        if not self._catalog.has_namespace(name):
            raise NamespaceNotFound(f"Namespace '{name}' does not exist")

    def _drop_namespace(self, statement: st.DropNamespace) -> Result:
        try:
            dropped, commit = self._catalog.drop_namespace(statement.name, self._cleanup)
        except NotFound:
            if statement.if_exists:
                return Result(message=f"Namespace '{statement.name}' does not exist")
            raise
        jobs = f" Cleanup jobs: {', '.join(commit.jobs)}" if dropped else ""
        return Result(message=f"Namespace '{statement.name}' dropped successfully with {len(dropped)} table(s).{jobs}")

    def _create_table(self, statement: st.CreateTable, caller: Caller) -> Result:
        table_id = self._reader.resolve(statement.table, caller)
        kind = statement.kind
        if kind is None:
            own = not caller.has(Role.DBA) and table_id.namespace == caller.user
            kind = TableKind.USER if own else TableKind.SHARED
        if not may_create(caller, kind):
            raise Denied(f"role {caller.role} may not create {kind.upper()} table '{table_id}'")
        if statement.if_not_exists and self._catalog.table(table_id) is not None:
            return Result(message=f"Table {table_id} already exists")
        options = statement.options
        if not statement.retention_stated:
            options = msgspec.structs.replace(options, deleted_retention_hours=self._retention_hours)
        spec = TableSpec(
            namespace=table_id.namespace,
            name=table_id.name,
            kind=kind,
            columns=statement.columns,
            primary_key=statement.primary_key,
            checks=statement.checks,
            options=options,
        )
        try:
            self._catalog.create_table(spec, lambda definition: self._try_checks(definition, caller))
        except Conflict:
            # Another statement may have made it since the look above.
            if statement.if_not_exists and self._catalog.table(table_id) is not None:
                return Result(message=f"Table {table_id} already exists")
            raise
        return Result(message=f"Table {table_id} created successfully")

    def _create_view(self, statement: st.CreateView, caller: Caller) -> Result:
        view_id = self._reader.resolve(statement.view, caller)
        self._reader.refuse_system("create", view_id)
        inner = replace(caller, namespace=view_id.namespace)
        known = self._catalog.view(view_id) is not None
        names = {self._reader.resolve(name, inner) for name in statement.select.tables}
        if view_id in names or (known and view_id in self._reader.views_of(statement.select, inner)):
            raise InvalidRequest(f"view '{view_id}' cannot read itself")
        self._reader.columns(view_id, statement.select, caller)
        self._catalog.create_view(view_id, statement.query, or_replace=statement.or_replace)
        return Result(message=f"View {view_id} created successfully")

    def _try_checks(self, definition: TableDef, caller: Caller) -> None:
        for check in definition.checks:
            layout = Layout(definition)
            found = self._reader.evaluate(f"({check.sql}) AS v0", layout, [(definition.name, [])], caller)
            if not pa.types.is_boolean(found.schema.field(0).type) and not pa.types.is_null(found.schema.field(0).type):
                raise InvalidRequest(f"CHECK ({check.sql}) is not a condition")

    def _alter_table(self, statement: st.AlterTable, caller: Caller) -> Result:
        table_id = self._reader.resolve(statement.table, caller)
        self._reader.refuse_system("alter", table_id)
        entry = self._catalog.require(table_id)
        if not may_create(caller, entry.definition.kind):
            raise denied(caller, "alter", entry.definition)
        change: AlterChange = statement.change
        if isinstance(change, ModifyColumn):
            column = entry.definition.column(change.name)
            if column is not None:
                change = resolve_default(change, column.type)
        if isinstance(change, AddColumn) and not change.column.nullable and change.column.default is not None:
            change = replace(change, fill=self._fill(change, caller))
        probe = RowProbe(lambda: self._is_empty(table_id), lambda column: self._has_nulls(table_id, column))
        _, text = self._catalog.alter_table(table_id, change, probe)
        return Result(message=text)

    def _fill(self, change: AddColumn, caller: Caller) -> Any:
        column = ColumnDef(id=0, name=change.column.name, type=change.column.type)
        return Defaults(self._store.backend, self._clock, caller.user).value(change.column.default, column)

    def _is_empty(self, table_id: TableId) -> bool:
        entry = self._catalog.require(table_id)
        if self._store.state(entry.definition.uid).segments:
            return False
        with self._store.backend.snapshot() as snapshot:
            if entry.definition.kind is TableKind.STREAM:
                return not snapshot.buckets(entry.definition.uid)
            return next(iter(snapshot.hot(entry.definition.uid, chunk_rows=1)), None) is None

    def _has_nulls(self, table_id: TableId, column: str) -> bool:
        """Whether a live row, of whomever, holds NULL in a column."""
        entry = self._catalog.require(table_id)
        at = self._store.layout(entry.definition).index_of_name[column]
        for keys in self._null_keys(entry, at):
            with self._store.newest(entry, keys) as (versions, _):
                for version in versions:
                    if version is not None and version.is_live and self._store.load(version, entry)[at] is None:
                        return True
        return False

    def _null_keys(self, entry: CatalogEntry, at: int) -> Iterator[list[bytes]]:
        """Keys of rows that may hold NULL in the column at `at`, newest version or not."""
        definition, store = entry.definition, self._store
        layout, layout_of = store.layout(definition), store.layout_of(definition.uid)
        column = layout.columns[at]
        for segment in store.state(definition.uid).segments:
            written = layout_of(segment.record.schema_version)
            if column.id in written.index_of_id:
                if segment.record.column_stats.get(column.id, (None, None, -1))[2] == 0:
                    continue
            elif column.fill is not None:
                continue
            for table in store.segments.scan(segment):
                values = conform(table, layout, segment.record.schema_version).column(physical_name(column.id))
                yield pc.filter(table.column(KEY), pc.is_null(values)).to_pylist()
        with store.backend.snapshot() as snapshot:
            for chunk in snapshot.hot(definition.uid):
                yield [row.key for row in chunk if read_payload(row.payload, layout_of, layout)[at] is None]

    def _drop_table(self, statement: st.DropTable, caller: Caller) -> Result:
        table_id = self._reader.resolve(statement.table, caller)
        self._reader.refuse_system("drop", table_id)
        entry = self._catalog.table(table_id)
        if entry is None and statement.if_exists:
            return Result(message=f"Table {table_id} does not exist")
        if entry is not None and statement.kind is not None and entry.definition.kind is not statement.kind:
            raise InvalidRequest(
                f"table '{table_id}' is a {entry.definition.kind.upper()} table, not a {statement.kind.upper()} table"
            )
        definition, commit = self._catalog.drop_table(table_id, self._cleanup)
        return Result(message=f"Table {definition.table_id} dropped successfully. Cleanup job: {commit.jobs[0]}")

    def _drop_view(self, statement: st.DropView, caller: Caller) -> Result:
        view_id = self._reader.resolve(statement.view, caller)
        if statement.if_exists and self._catalog.view(view_id) is None:
            return Result(message=f"View {view_id} does not exist")
        self._catalog.drop_view(view_id)
        return Result(message=f"View {view_id} dropped successfully")

    # Showing

    def _show(self, statement: st.Show, caller: Caller) -> pa.Table:
        system = self._system
        match statement.kind:
            case st.ShowKind.NAMESPACES:
                return system.table(TableId("system", "namespaces"))
            case st.ShowKind.TABLES:
                namespace = statement.namespace or caller.namespace
                self._require_namespace(namespace)
                return system.show_tables(namespace)
            case st.ShowKind.COLUMNS | st.ShowKind.DESCRIBE:
                assert statement.table is not None
                return self._describe(self._reader.resolve(statement.table, caller), caller)
            case st.ShowKind.HISTORY:
                assert statement.table is not None
                return system.history(self._reader.resolve(statement.table, caller))
            case st.ShowKind.STORAGES:
                return system.show_storages(hidden=not caller.has(Role.DBA))
            case st.ShowKind.ALL:
                return system.table(TableId("system", "settings"))
            case st.ShowKind.MANIFEST:
                return system.table(TableId("system", "manifest"))
            case st.ShowKind.STATS:
                assert statement.table is not None
                return self._stats(statement.table, caller)
            case st.ShowKind.JOB:
                asked = analyse_text("SELECT * FROM system.jobs WHERE job_id = $1")
                found = self._reader.select(asked, replace(caller, params=[statement.job_id]), None).arrow()
                if not found.num_rows:
                    raise NotFound(f"Job '{statement.job_id}' does not exist")
                return found
            case other:
                assert_never(other)

    def _describe(self, table_id: TableId, caller: Caller) -> pa.Table:
        view = self._catalog.view(table_id)
        if view is None:
            return self._system.describe(table_id)
        return self._system.describe_schema(self._reader.columns(table_id, analyse_text(view.sql), caller))

    def _stats(self, name: st.TableName, caller: Caller) -> pa.Table:
        """How many rows the caller has in a table; from service on also how it is stored."""
        entry = self._reader.entry(name, caller)
        table_id = entry.definition.table_id
        count = analyse_text(f"SELECT count(*) FROM {quote(table_id.namespace)}.{quote(table_id.name)}")
        rows = {"rows": self._reader.select(count, caller, None).scalar()}
        if caller.has(Role.SERVICE):
            state = self._store.state(entry.definition.uid)
            with self._store.hot.lock:
                figures = self._store.figures(entry.definition.uid)
                rows |= {"hot_rows": figures.rows, "hot_bytes": figures.bytes_}
            rows |= {
                "segments": len(state.segments),
                "level0_segments": sum(one.record.level == 0 for one in state.segments),
                "cold_rows": sum(one.record.rows for one in state.segments),
                "cold_bytes": sum(one.record.size_bytes for one in state.segments),
                "tombstones": sum(one.record.tombstones for one in state.segments),
            }
        return pa.table({"statistic": list(rows), "value": pa.array(list(rows.values()), pa.int64())})
