"""SELECT: from a statement to Arrow rows, by key without the engine where that is possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import lru_cache
from typing import Any, Protocol

import pyarrow as pa

from kalamdb.catalog import Catalog, CatalogEntry
from kalamdb.errors import Denied, InvalidRequest, NotFound
from kalamdb.result import OutputColumn, Result, RowsFirst
from kalamdb.schema import ColumnDef, DataType, TypeName
from kalamdb.sql import statements as st
from kalamdb.sql.analyse import analyse_text, referenced_tables
from kalamdb.sql.caller import Caller, Served, denied, may_read
from kalamdb.sql.decimals import exact_decimals
from kalamdb.sql.engine import Engine, QueryRun, Shape, TableSource, scrub_plan
from kalamdb.sql.projection import plain_stars, quote
from kalamdb.sql.render import render
from kalamdb.sql.tokens import tokenize
from kalamdb.tables.codec import Stored
from kalamdb.tables.layout import Layout, Row
from kalamdb.tables.read import scan_columns, scan_plan
from kalamdb.tables.store import ReadPoint, TableStore, TableView
from kalamdb.tables.transaction import Transaction
from kalamdb.tables.write import Writer
from kalamdb.types import Role, Seq, TableId, TableKind

_VIEW_DEPTH_MAX = 16
_INT_RANGE = {TypeName.SMALLINT: 1 << 15, TypeName.INT: 1 << 31, TypeName.BIGINT: 1 << 63}


class SystemTables(Protocol):
    """Where system.* and information_schema.* come from."""

    def find(self, table_id: TableId) -> Any:
        """The table of that name, None when there is none."""
        ...

    def table(self, table_id: TableId, *, filters: Filters | None = None) -> pa.Table:
        """Its rows now; those that `filters` (column -> values) rules out may be missing."""
        ...

    def write_refusal(self, verb: str, table_id: TableId) -> Exception:
        """The error for a statement that would change one."""
        ...


Filters = Mapping[str, frozenset[Any]]


@dataclass(slots=True)
class Query:
    """A query that is ready to run: its text and what it reads."""

    sql: str
    sources: list[TableSource] = field(default_factory=list)
    views: dict[tuple[str, str], str] = field(default_factory=dict)
    shape: Shape | None = None
    isolate: bool = False


@dataclass(slots=True)
class _Reads:
    """What a query reads, through views too."""

    entries: dict[TableId, CatalogEntry] = field(default_factory=dict)
    system: dict[TableId, Filters] = field(default_factory=dict)
    views: dict[TableId, st.Select] = field(default_factory=dict)
    """Innermost first."""
    specials: set[str] = field(default_factory=set)
    deleted_in_where: bool = False
    outermost_whole: bool = False
    """`*` of the outermost SELECT stands for the system columns too."""


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

    def select(
        self, statement: st.Select, caller: Caller, transaction: Transaction | None, served: Served | None = None
    ) -> Result:
        """All rows of a SELECT or EXPLAIN. Raises LimitExceeded beyond limits.result_bytes_max."""
        found = self.look_up(statement, caller, transaction, served)
        if found is not None:
            return found
        with ExitStack() as stack:
            run = self.open(statement, caller, transaction, stack, served)
            table = run.table(self._result_bytes_max)
        return Result(_scrubbed(table) if statement.explain else table, known=run.known)

    def look_up(
        self, statement: st.Select, caller: Caller, transaction: Transaction | None, served: Served | None = None
    ) -> Result | None:
        """The rows of a SELECT by full primary key; None for every other one: `open` it."""
        if statement.lookup is None:
            return None
        return self._by_key(statement, statement.lookup, caller, transaction, served)

    def open(
        self,
        statement: st.Select,
        caller: Caller,
        transaction: Transaction | None,
        stack: ExitStack,
        served: Served | None = None,
    ) -> QueryRun:
        """A running SELECT; what it reads stays until `stack` closes. `served` shapes its rows."""
        query = Query("")
        reads = _Reads()
        self._follow(reads, statement.tables, statement, caller, 0)
        known: Mapping[str, OutputColumn] = {}
        if served is not None and not statement.explain:
            statement, known = self._shape(query, reads, statement, caller, served)
        self._gather(query, reads, caller, transaction, stack)
        query.sql = render(self._plain_stars(statement, reads, caller), caller.parameter_sql, caller.function_sql)
        if statement.explain:
            query.sql = f"EXPLAIN {'ANALYZE ' if statement.analyze else ''}{query.sql}"
        query.isolate = served is not None and _may_never_end(statement, reads, query)
        run = self.run(query, caller)
        run.known = known
        return run

    def _shape(
        self, query: Query, reads: _Reads, statement: st.Select, caller: Caller, served: Served
    ) -> tuple[st.Select, Mapping[str, OutputColumn]]:
        """Set the shape of a served SELECT; the statement without what the shape does, and the columns it reads."""
        entry = None if statement.main is None else reads.entries.get(self.resolve(statement.main, caller))
        if entry is not None and statement.star and served.system_columns:
            reads.specials |= {"_seq", "_deleted"}
            reads.outermost_whole = True
        layout = None if entry is None else self._store.layout(entry.definition)
        tail = statement.tail
        sort_by: tuple[str, ...] = ()
        if layout is not None and served.sorted and not tail.ordered and tail.body is not None:
            sort_by = tuple(layout.columns[index].name for index in layout.pk_indexes) or ("_seq",)
        given, offset = _rows(caller, tail.limit, "LIMIT"), _rows(caller, tail.offset, "OFFSET") or 0
        capped = served.limit_max or None
        if tail.body is None:
            query.shape = Shape(limit=capped)
        else:
            statement = replace(statement, sql=tail.body)
            limits = [one for one in (given, capped) if one is not None]
            limit = min(limits) if given is not None else (served.limit_default or capped)
            query.shape = Shape(sort_by, limit, offset)
        return statement, {} if layout is None else known_columns(layout)

    def run(self, query: Query, caller: Caller) -> QueryRun:
        """Start a prepared query."""
        return self._engine.query(
            exact_decimals(query.sql, _decimal_columns(query.sources)),
            query.sources,
            default_schema=caller.namespace,
            views=query.views,
            shape=query.shape,
            isolate=query.isolate,
            deadline=caller.deadline,
            cancelled=caller.cancelled,
        )

    def check_reads(self, names: Sequence[st.TableName], caller: Caller) -> None:
        """Raise Denied for a table that there is and the caller may not read."""
        for name in names:
            with suppress(NotFound, InvalidRequest):
                self._follow(_Reads(), (name,), None, caller, 0)

    def views_of(self, statement: st.Select, caller: Caller) -> frozenset[TableId]:
        """The views that a query reads, also through others."""
        reads = _Reads()
        self._follow(reads, statement.tables, statement, caller, 0)
        return frozenset(reads.views)

    def columns(self, view_id: TableId, statement: st.Select, caller: Caller) -> pa.Schema:
        """The columns of a view; raises what its SELECT raises."""
        with ExitStack() as stack:
            inner = replace(caller, namespace=view_id.namespace, params=None)
            return self.open(statement, inner, None, stack).schema

    def resolve(self, name: st.TableName, caller: Caller) -> TableId:
        """The full name of a table as the caller means it."""
        return TableId(name.namespace or caller.namespace, name.name)

    def entry(self, name: st.TableName, caller: Caller) -> CatalogEntry:
        """The table that a statement names. Raises NotFound."""
        return self._catalog.require(self.resolve(name, caller))

    def refuse_system(self, verb: str, table_id: TableId) -> None:
        """Raise InvalidRequest when `verb` (insert, update, delete, alter, drop, truncate) meets a system table."""
        if self._system.find(table_id) is not None:
            raise self._system.write_refusal(verb, table_id)

    def _follow(
        self,
        reads: _Reads,
        names: Sequence[st.TableName],
        statement: st.Select | None,
        caller: Caller,
        depth: int,
    ) -> None:
        """Add what `names` stand for; `statement` is the query that names them."""
        if depth > _VIEW_DEPTH_MAX:
            raise InvalidRequest(f"views are nested more than {_VIEW_DEPTH_MAX} deep, or one reads itself")
        if statement is not None:
            reads.specials |= statement.specials
            reads.deleted_in_where |= statement.deleted_in_where
        for table_id in dict.fromkeys(self.resolve(name, caller) for name in names):
            if self._system.find(table_id) is not None:
                self._check_system(table_id, caller)
                # Read from a second place, all rows may be needed.
                reads.system[table_id] = (
                    {} if table_id in reads.system or statement is None else _filters_of(statement, table_id, caller)
                )
            elif (view := self._catalog.view(table_id)) is not None:
                inner = analyse_text(view.sql)
                self._follow(reads, inner.tables, inner, replace(caller, namespace=view.namespace), depth + 1)
                reads.views.setdefault(table_id, inner)
            else:
                entry = self._catalog.require(table_id)
                if not may_read(caller, entry.definition):
                    raise denied(caller, "read", entry.definition)
                reads.entries[table_id] = entry

    def _gather(
        self, query: Query, reads: _Reads, caller: Caller, transaction: Transaction | None, stack: ExitStack
    ) -> ReadPoint | None:
        """Sources of all that a query reads, its tables at one moment, which is returned when there are some."""
        query.sources += [
            TableSource(one.namespace, one.name, self._system.table(one, filters=filters))
            for one, filters in reads.system.items()
        ]
        for view_id, statement in reads.views.items():
            text = _qualified(render(statement.sql, _no_params, caller.function_sql), view_id.namespace)
            qualified = replace(statement, sql=text)
            query.views[(view_id.namespace, view_id.name)] = self._plain_stars(qualified, reads, caller)
        if not reads.entries:
            return None
        sources, point = self._table_sources(list(reads.entries.values()), reads, caller, transaction, stack)
        query.sources += sources
        return point

    def _plain_stars(self, statement: st.Select, reads: _Reads, caller: Caller) -> str:
        """The text in which `*` stands for the tables' own columns although their sources have system columns."""
        if not reads.specials and ".*" not in statement.sql:
            return statement.sql

        def is_table(namespace: str | None, name: str) -> bool:
            own = namespace is not None or name not in statement.ctes
            return own and self.resolve(st.TableName(namespace, name), caller) in reads.entries

        hidden, whole = sorted(reads.specials), reads.outermost_whole
        return plain_stars(statement.sql, tokenize(statement.sql), is_table, hidden, outermost_whole=whole)

    def _check_system(self, table_id: TableId, caller: Caller) -> None:
        if table_id.namespace == "system" and not caller.has(Role.DBA):
            raise Denied(f"Admin privileges required to read '{table_id}', the caller has role {caller.role}")

    def _table_sources(
        self,
        entries: Sequence[CatalogEntry],
        reads: _Reads,
        caller: Caller,
        transaction: Transaction | None,
        stack: ExitStack,
    ) -> tuple[list[TableSource], ReadPoint]:
        wanted = [(entry, caller.scope(entry.definition)) for entry in entries]
        if transaction is not None:
            transaction.check_open()
            point = transaction.moment.read(wanted)
        else:
            point = stack.enter_context(self._store.read_point(wanted))
        sources = []
        for entry, scope in wanted:
            uid = entry.definition.uid
            overlay = transaction.overlay(uid, scope) if transaction is not None else None
            sources.append(
                TableSource(
                    entry.definition.namespace,
                    entry.definition.name,
                    scan_plan(self._store, point.view(uid), overlay, include_deleted=reads.deleted_in_where),
                    with_seq="_seq" in reads.specials,
                    with_deleted="_deleted" in reads.specials,
                    include_deleted=reads.deleted_in_where,
                    rows=_rows_in(point.view(uid)),
                )
            )
        return sources, point

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
        """Rows of one table that a predicate chooses: `_seq`, the columns, then the expressions as `_new0`,
        `_new1`..., for a STREAM table then `_key`; and the manifest version that they were read under.

        Other row keys are not among them: a writer makes them from its own scope and the primary key, so
        that no text of a caller can name a row of somebody else.
        """
        definition, is_stream = entry.definition, entry.definition.kind is TableKind.STREAM
        with ExitStack() as stack:
            query = Query("")
            reads = _Reads()
            self._follow(reads, tables, None, caller, 0)
            reads.entries[definition.table_id] = entry
            point = self._gather(query, reads, caller, transaction, stack)
            assert point is not None
            target = (definition.namespace, definition.name)
            at = next(at for at, one in enumerate(query.sources) if (one.namespace, one.name) == target)
            with_deleted = "_deleted" in where.lower()
            query.sources[at] = replace(query.sources[at], with_seq=True, with_key=is_stream, with_deleted=with_deleted)
            quoted = quote(alias)
            items = [f"{quoted}._seq", *(f"{quoted}.{quote(column.name)}" for column in definition.columns)]
            items += [f"({expression}) AS _new{at}" for at, expression in enumerate(expressions)]
            items += [f"{quoted}._key"] if is_stream else []
            text = (
                f"SELECT {', '.join(items)} FROM {quote(definition.namespace)}.{quote(definition.name)} AS {quoted} "
                f"WHERE ({where})"
            )
            query.sql = render(text, caller.parameter_sql, caller.function_sql)
            found = self.run(query, caller).table(self._result_bytes_max)
            return found, point.view(definition.uid).state.manifest_version

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
            names.append(quote(name))
        source = ""
        if names:
            source = f" FROM {names[0]}" + "".join(
                f" JOIN {other} ON {names[0]}._row = {other}._row" for other in names[1:]
            )
            order = f" ORDER BY {names[0]}._row"
        else:
            order = ""
        for found in referenced_tables(f"SELECT {items}{' WHERE ' + where if where else ''}"):
            raise InvalidRequest(f"a sub-query over '{found.name}' cannot stand here")
        text = f"SELECT {items}{source}{' WHERE ' + where if where else ''}{order}"
        text = plain_stars(text, tokenize(text), lambda namespace, name: True, ["_row"]) if "*" in items else text
        query.sql = render(text, caller.parameter_sql, caller.function_sql)
        return self.run(query, caller).table(self._result_bytes_max)

    def _by_key(
        self,
        statement: st.Select,
        lookup: st.KeyLookup,
        caller: Caller,
        transaction: Transaction | None,
        served: Served | None,
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
        writer = Writer(self._store, entry, caller.scope(definition), transaction)
        [(seq, row)], _ = writer.current([writer.key_of_values(values)])
        shown = seq if lookup.projection is None and served is not None and served.system_columns else None
        return _found(layout, projection, row, shown)


def _filters_of(statement: st.Select, table_id: TableId, caller: Caller) -> Filters:
    found: dict[str, frozenset[Any]] = {}
    for one in statement.filters:
        values = frozenset(caller.bind(value) for value in one.values)
        if TableId(one.table.namespace or "", one.table.name) == table_id and all(type(v) is str for v in values):
            found[one.column] = found.get(one.column, values) & values
    return found


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


@lru_cache(maxsize=256)
def _known(columns: tuple[ColumnDef, ...], primary_key: tuple[int, ...]) -> Mapping[str, OutputColumn]:
    found = {}
    for column in columns:
        flags: tuple[str, ...] = () if column.nullable else ("nn",)
        if column.id in primary_key:
            flags = ("nn", "pk", "uq") if len(primary_key) == 1 else ("nn", "pk")
        found[column.name] = OutputColumn(column.name, column.type, flags)
    return {**found, **_SYSTEM_COLUMNS}


def known_columns(layout: Layout) -> Mapping[str, OutputColumn]:
    """The columns of a table by name, with its system columns."""
    return _known(layout.columns, tuple(layout.definition.primary_key))


_SYSTEM_COLUMNS = {
    "_seq": OutputColumn("_seq", DataType(TypeName.BIGINT), ("nn",)),
    "_deleted": OutputColumn("_deleted", DataType(TypeName.BOOLEAN), ("nn",)),
}


def _found(layout: Layout, projection: Sequence[tuple[str, str]], row: Row | None, seq: Seq | None) -> Result:
    """The answer of a look-up; with `seq` its system columns stand behind the others."""
    chosen = [layout.index_of_name[name] for name, _ in projection]
    known = known_columns(layout)
    outputs = tuple(known[name] if name == output else replace(known[name], name=output) for name, output in projection)
    system: tuple[Any, ...] = () if seq is None else (seq, False)
    outputs += tuple(_SYSTEM_COLUMNS.values())[: len(system)]
    stored: list[tuple[Any, ...]] = [] if row is None else [(*(row[at] for at in chosen), *system)]

    def schema() -> pa.Schema:
        columns = scan_columns(layout)
        fields = [columns[at].field.with_name(output) for at, (_, output) in zip(chosen, projection, strict=True)]
        if system:
            fields += [pa.field("_seq", pa.int64()), pa.field("_deleted", pa.bool_())]
        return pa.schema(fields)

    def build() -> pa.Table:
        arrays = [layout.codecs[at].to_arrow([] if row is None else [row[at]]) for at in chosen]
        if system:
            arrays += [pa.array([seq] * len(stored), pa.int64()), pa.array([False] * len(stored), pa.bool_())]
        return pa.Table.from_arrays(arrays, schema=schema())

    def load() -> list[tuple[Any, ...]]:
        return [] if row is None else [(*(layout.codecs[at].load(row[at]) for at in chosen), *system)]

    return Result(RowsFirst(outputs, stored, load, build, schema))


_PAIRS_MAX = 300_000_000
"""Combinations of rows that the engine goes through within some seconds."""


def _may_never_end(statement: st.Select, reads: _Reads, query: Query) -> bool:
    """Whether the engine might work on a query for much longer than one is willing to wait, deaf to its deadline."""
    if "snowflake_id" in query.sql.lower():
        return False
    parts = [statement, *reads.views.values()]
    if any(one.endless for one in parts):
        return True
    named = sum(one.sources for one in parts)
    rows: int = max((_source_rows(source) for source in query.sources), default=1)
    return named > 1 and bool(max(rows, 2) ** named > _PAIRS_MAX)


def _source_rows(source: TableSource) -> int:
    return int(source.plan.num_rows if isinstance(source.plan, pa.Table) else source.rows)


def _rows_in(view: TableView) -> int:
    cold = sum(segment.record.rows for segment in view.state.segments)
    return cold + sum(int(chunk.batch.num_rows) for chunk in view.chunks)


def _rows(caller: Caller, stated: st.Expr, word: str) -> int | None:
    value = caller.bind(stated)
    if value is not None and (type(value) is not int or not 0 <= value < 1 << 62):
        raise InvalidRequest(f"{word} is {value!r}; a whole number from 0 is expected")
    return value


def _scrubbed(table: pa.Table) -> pa.Table:
    texts = [scrub_plan(text) for text in table.column("plan").to_pylist()]
    return table.set_column(table.schema.get_field_index("plan"), "plan", pa.array(texts, pa.string()))


def _no_params(key: int | str) -> str:
    raise InvalidRequest(f"a view cannot hold parameter {key}")


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
