"""SELECT: from a statement to Arrow rows, by key without the engine where that is possible."""

from __future__ import annotations

from collections.abc import Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Protocol

import pyarrow as pa

from kalamdb.catalog import Catalog, CatalogEntry
from kalamdb.errors import Denied, InvalidRequest, NotFound
from kalamdb.result import Result, RowsFirst
from kalamdb.schema import DataType, TypeName
from kalamdb.sql import statements as st
from kalamdb.sql.analyse import exact_decimals, referenced_tables, render
from kalamdb.sql.caller import Caller, denied, may_read
from kalamdb.sql.engine import Engine, QueryRun, TableSource, scrub_plan
from kalamdb.sql.tokens import Token, TokenKind, tokenize
from kalamdb.tables.codec import Stored
from kalamdb.tables.layout import Layout, Row
from kalamdb.tables.read import scan_columns, scan_plan
from kalamdb.tables.store import TableStore
from kalamdb.tables.transaction import Transaction
from kalamdb.tables.write import Writer
from kalamdb.types import Role, TableId, TableKind

_VIEW_DEPTH_MAX = 16
_INT_RANGE = {TypeName.SMALLINT: 1 << 15, TypeName.INT: 1 << 31, TypeName.BIGINT: 1 << 63}


class SystemTables(Protocol):
    """Where system.* and information_schema.* come from."""

    def find(self, table_id: TableId) -> Any:
        """The table of that name, None when there is none."""
        ...

    def table(self, table_id: TableId) -> pa.Table:
        """Its rows now."""
        ...


@dataclass(slots=True)
class Query:
    """A query that is ready to run: text, sources, and what must be released after it."""

    sql: str
    sources: list[TableSource] = field(default_factory=list)
    views: dict[tuple[str, str], str] = field(default_factory=dict)


class Reader:
    """Runs queries for callers."""

    def __init__(
        self, store: TableStore, catalog: Catalog, engine: Engine, system: SystemTables, result_bytes_max: int
    ) -> None:
        self._store = store
        self._catalog = catalog
        self._engine = engine
        self._system = system
        self._result_bytes_max = result_bytes_max

    def select(self, statement: st.Select, caller: Caller, transaction: Transaction | None) -> Result:
        """All rows of a SELECT or EXPLAIN. Raises LimitExceeded beyond limits.result_bytes_max."""
        if statement.lookup is not None:
            found = self._by_key(statement, statement.lookup, caller, transaction)
            if found is not None:
                return found
        with ExitStack() as stack:
            run = self.open(statement, caller, transaction, stack)
            table = run.table(self._result_bytes_max)
        return Result(_scrubbed(table) if statement.explain else table)

    def open(self, statement: st.Select, caller: Caller, transaction: Transaction | None, stack: ExitStack) -> QueryRun:
        """A running SELECT; what it reads stays until `stack` closes."""
        query = Query("")
        self._collect(query, statement.tables, statement, caller, transaction, stack, 0)
        sql = self._expand_stars(statement, caller) if statement.specials else statement.sql
        query.sql = render(sql, caller.parameter_sql, caller.function_sql)
        if statement.explain:
            query.sql = f"EXPLAIN {'ANALYZE ' if statement.analyze else ''}{query.sql}"
        return self.run(query, caller)

    def run(self, query: Query, caller: Caller) -> QueryRun:
        """Start a prepared query."""
        return self._engine.query(
            exact_decimals(query.sql, _decimal_columns(query.sources)),
            query.sources,
            default_schema=caller.namespace,
            views=query.views,
            deadline=caller.deadline,
            cancelled=caller.cancelled,
        )

    def resolve(self, name: st.TableName, caller: Caller) -> TableId:
        """The full name of a table as the caller means it."""
        return TableId(name.namespace or caller.namespace, name.name)

    def entry(self, name: st.TableName, caller: Caller) -> CatalogEntry:
        """The table that a statement names. Raises NotFound."""
        return self._catalog.require(self.resolve(name, caller))

    def _collect(
        self,
        query: Query,
        names: Sequence[st.TableName],
        statement: st.Select | None,
        caller: Caller,
        transaction: Transaction | None,
        stack: ExitStack,
        depth: int,
    ) -> None:
        """Add the sources of `names`: tables at one moment, system tables, views with what they read."""
        if depth > _VIEW_DEPTH_MAX:
            raise InvalidRequest(f"views are nested more than {_VIEW_DEPTH_MAX} deep")
        entries: dict[TableId, CatalogEntry] = {}
        views: list[TableId] = []
        known = {(source.namespace, source.name) for source in query.sources}
        for table_id in dict.fromkeys(self.resolve(name, caller) for name in names):
            if (table_id.namespace, table_id.name) in known:
                continue
            if self._system.find(table_id) is not None:
                query.sources.append(self._system_source(table_id, caller))
            elif self._catalog.view(table_id) is not None:
                views.append(table_id)
            else:
                entry = self._catalog.require(table_id)
                if not may_read(caller, entry.definition):
                    raise denied(caller, "read", entry.definition)
                entries[table_id] = entry
        for table_id in views:
            view = self._catalog.view(table_id)
            assert view is not None
            inner = Caller(caller.user, caller.role, view.namespace, None, caller.deadline, caller.cancelled)
            self._collect(query, referenced_tables(view.sql), None, inner, transaction, stack, depth + 1)
            query.views[(view.namespace, view.name)] = _qualified(
                render(view.sql, _no_params, caller.function_sql), view.namespace
            )
        if entries:
            query.sources += self._table_sources(list(entries.values()), statement, caller, transaction, stack)

    def _system_source(self, table_id: TableId, caller: Caller) -> TableSource:
        if table_id.namespace == "system" and not caller.has(Role.DBA):
            raise Denied(f"Admin privileges required to read '{table_id}', the caller has role {caller.role}")
        return TableSource(table_id.namespace, table_id.name, self._system.table(table_id))

    def add_system(self, query: Query, table_id: TableId, caller: Caller) -> None:
        """Let a prepared query read a system table. Raises Denied."""
        query.sources.append(self._system_source(table_id, caller))

    def _table_sources(
        self,
        entries: Sequence[CatalogEntry],
        statement: st.Select | None,
        caller: Caller,
        transaction: Transaction | None,
        stack: ExitStack,
    ) -> list[TableSource]:
        wanted = [(entry, caller.scope(entry.definition)) for entry in entries]
        if transaction is not None:
            transaction.check_open()
            point = transaction.moment.read(wanted)
        else:
            point = stack.enter_context(self._store.read_point(wanted))
        specials = statement.specials if statement is not None else frozenset()
        sources = []
        for entry, scope in wanted:
            uid = entry.definition.uid
            overlay = transaction.overlay(uid, scope) if transaction is not None else None
            sources.append(
                TableSource(
                    entry.definition.namespace,
                    entry.definition.name,
                    scan_plan(self._store, point.view(uid), overlay),
                    with_seq="_seq" in specials,
                    with_deleted="_deleted" in specials,
                    include_deleted=statement is not None and statement.deleted_in_where,
                )
            )
        return sources

    def changes_of(
        self,
        entry: CatalogEntry,
        alias: str,
        expressions: Sequence[str],
        where: str,
        tables: Sequence[st.TableName],
        caller: Caller,
        transaction: Transaction | None,
    ) -> tuple[pa.Table, int]:
        """Rows of one table that a predicate chooses: `_key`, `_seq`, the columns, then the expressions as
        `_new0`, `_new1`...; and the manifest version that they were read under."""
        definition = entry.definition
        with ExitStack() as stack:
            query = Query("")
            others = [name for name in tables if self.resolve(name, caller) != definition.table_id]
            self._collect(query, others, None, caller, transaction, stack, 0)
            scope = caller.scope(definition)
            if transaction is not None:
                view = transaction.moment.read([(entry, scope)]).view(definition.uid)
                overlay = transaction.overlay(definition.uid, scope)
            else:
                view = stack.enter_context(self._store.read_point([(entry, scope)])).view(definition.uid)
                overlay = None
            plan = scan_plan(self._store, view, overlay)
            query.sources.append(TableSource(definition.namespace, definition.name, plan, with_seq=True, with_key=True))
            quoted = _quote(alias)
            items = [
                f"{quoted}._key",
                f"{quoted}._seq",
                *(f"{quoted}.{_quote(column.name)}" for column in definition.columns),
            ]
            items += [f"({expression}) AS _new{at}" for at, expression in enumerate(expressions)]
            text = (
                f"SELECT {', '.join(items)} FROM {_quote(definition.namespace)}.{_quote(definition.name)} AS {quoted} "
                f"WHERE {where}"
            )
            query.sql = render(text, caller.parameter_sql, caller.function_sql)
            return self.run(query, caller).table(self._result_bytes_max), view.state.manifest_version

    def evaluate(
        self,
        items: str,
        layout: Layout | None,
        tables: Sequence[tuple[str, Sequence[Row]]],
        caller: Caller,
        *,
        where: str = "",
    ) -> pa.Table:
        """`SELECT items` over rows in memory, each of `tables` under its name, joined row by row when there are two."""
        query = Query("")
        names = []
        for name, rows in tables:
            assert layout is not None
            columns = [*layout.arrow_columns(rows), pa.array(range(len(rows)), pa.int64())]
            fields = [*(column.field for column in scan_columns(layout)), pa.field("_row", pa.int64())]
            query.sources.append(
                TableSource(caller.namespace, name, pa.Table.from_arrays(columns, schema=pa.schema(fields)))
            )
            names.append(_quote(name))
        source = ""
        if names:
            source = f" FROM {names[0]}" + "".join(
                f" JOIN {other} ON {names[0]}._row = {other}._row" for other in names[1:]
            )
            order = f" ORDER BY {names[0]}._row"
        else:
            order = ""
        text = f"SELECT {items}{source}{' WHERE ' + where if where else ''}{order}"
        for found in referenced_tables(f"SELECT {items}"):
            raise InvalidRequest(f"a sub-query over '{found.name}' cannot stand here")
        query.sql = render(text, caller.parameter_sql, caller.function_sql)
        return self.run(query, caller).table(self._result_bytes_max)

    def _by_key(
        self, statement: st.Select, lookup: st.KeyLookup, caller: Caller, transaction: Transaction | None
    ) -> Result | None:
        """The answer of a look-up by full primary key; None when the engine must do it."""
        table_id = self.resolve(statement.tables[0], caller)
        entry = self._catalog.table(table_id)
        if entry is None:
            if self._system.find(table_id) is None and self._catalog.view(table_id) is None:
                raise NotFound(f"Table '{table_id}' does not exist")
            return None
        definition = entry.definition
        if definition.kind is TableKind.STREAM:
            return None
        if not may_read(caller, definition):
            raise denied(caller, "read", definition)
        layout = self._store.layout(definition)
        values = key_values(layout, lookup.key, caller)
        if values is None:
            return None
        projection = lookup.projection or tuple((column.name, column.name) for column in layout.columns)
        if any(column not in layout.index_of_name for column, _ in projection):
            return None
        row = Writer(self._store, entry, caller.scope(definition), transaction).get(values)
        return _found(layout, projection, row)

    def _expand_stars(self, statement: st.Select, caller: Caller) -> str:
        """`*` as the table's own columns, so that naming `_seq` does not add it twice."""
        if len(statement.tables) != 1:
            return statement.sql
        entry = self._catalog.table(self.resolve(statement.tables[0], caller))
        if entry is None:
            return statement.sql
        return _replace_stars(statement.sql, [column.name for column in entry.definition.columns])


def _decimal_columns(sources: Sequence[TableSource]) -> Set[str]:
    """Names that stand for DECIMAL columns in each source that has them."""
    decimals: set[str] = set()
    others: set[str] = set()
    for source in sources:
        if not isinstance(source.plan, pa.Table):
            for column in source.plan.columns:
                (decimals if pa.types.is_decimal(column.field.type) else others).add(column.name)
    return decimals - others


def key_values(layout: Layout, key: st.KeyMatch, caller: Caller) -> list[Stored] | None:
    """Primary key values in stored form when `key` names exactly the key columns with values of exactly
    their types; None when only the engine's comparison rules can tell."""
    names = [layout.columns[index].name for index in layout.pk_indexes]
    if not names or set(names) != set(key.columns):
        return None
    by_name = dict(zip(key.columns, key.values, strict=True))
    out: list[Stored] = []
    for index, name in zip(layout.pk_indexes, names, strict=True):
        value = caller.bind(by_name[name])
        kind = layout.columns[index].type
        if not _compares_exactly(value, kind):
            return None
        out.append(layout.codecs[index].store(value, where=f"column '{name}'"))
    return out


def _compares_exactly(value: Any, kind: DataType) -> bool:
    match kind.name:
        case TypeName.SMALLINT | TypeName.INT | TypeName.BIGINT:
            return type(value) is int and -_INT_RANGE[kind.name] <= value < _INT_RANGE[kind.name]
        case TypeName.TEXT:
            return type(value) is str
        case TypeName.BOOLEAN:
            return type(value) is bool
        case TypeName.DECIMAL:
            return isinstance(value, Decimal) and value.is_finite() and _fits(value, kind)
        case _:
            return False


def _fits(value: Decimal, kind: DataType) -> bool:
    exponent = value.as_tuple().exponent
    return -int(exponent) == kind.scale and value.adjusted() < kind.precision - kind.scale


def _found(layout: Layout, projection: Sequence[tuple[str, str]], row: Row | None) -> Result:
    chosen = [layout.index_of_name[name] for name, _ in projection]
    outputs = [output for _, output in projection]
    rows = [] if row is None else [tuple(layout.codecs[at].load(row[at]) for at in chosen)]

    def build() -> pa.Table:
        columns = scan_columns(layout)
        arrays = [layout.codecs[at].to_arrow([] if row is None else [row[at]]) for at in chosen]
        fields = [columns[at].field.with_name(output) for at, output in zip(chosen, outputs, strict=True)]
        return pa.Table.from_arrays(arrays, schema=pa.schema(fields))

    return Result(RowsFirst(outputs, rows, build))


def _scrubbed(table: pa.Table) -> pa.Table:
    texts = [scrub_plan(text) for text in table.column("plan").to_pylist()]
    return table.set_column(table.schema.get_field_index("plan"), "plan", pa.array(texts, pa.string()))


def _no_params(key: int | str) -> str:
    raise InvalidRequest(f"a view cannot hold parameter {key}")


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _qualified(sql: str, namespace: str) -> str:
    """A view's text with its own namespace on unqualified tables."""
    import sqlglot
    from sqlglot import exp

    tree = sqlglot.parse_one(sql, dialect="postgres")
    ctes = {cte.alias for cte in tree.find_all(exp.CTE)}
    for table in tree.find_all(exp.Table):
        if isinstance(table.this, exp.Identifier) and not table.args.get("db") and table.name not in ctes:
            table.set("db", exp.to_identifier(namespace, quoted=True))
    return str(tree.sql(dialect="postgres"))


def _replace_stars(sql: str, columns: Sequence[str]) -> str:
    tokens = tokenize(sql)
    pieces: list[str] = []
    previous = 0
    for at, token in enumerate(tokens):
        if token.text != "*" or not _is_star(tokens, at):
            continue
        qualifier = ""
        start = token.start
        if tokens[at - 1].text == ".":
            qualifier = sql[tokens[at - 2].start : tokens[at - 1].end]
            start = tokens[at - 2].start
        pieces += [sql[previous:start], ", ".join(qualifier + _quote(column) for column in columns)]
        previous = token.end
    return "".join(pieces) + sql[previous:]


def _is_star(tokens: Sequence[Token], at: int) -> bool:
    before = tokens[at - 1]
    after = tokens[at + 1] if at + 1 < len(tokens) else None
    starts = before.upper in ("SELECT", "DISTINCT", "ALL") or before.text in (",", ".")
    ends = after is None or after.upper == "FROM" or (after.kind is TokenKind.SYMBOL and after.text in (",", ")"))
    return starts and ends
