"""INSERT, UPDATE and DELETE statements over the tables layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pyarrow as pa

from kalamdb.catalog import CatalogEntry
from kalamdb.clock import Clock, ulid, uuid_v7
from kalamdb.errors import InvalidRequest, NotFound
from kalamdb.result import Result
from kalamdb.sql import statements as st
from kalamdb.sql.analyse import analyse_text
from kalamdb.sql.caller import Caller, denied, may_write
from kalamdb.sql.ingest import Columns
from kalamdb.sql.projection import quote
from kalamdb.sql.query import Reader, key_values
from kalamdb.tables.codec import Stored
from kalamdb.tables.layout import KEY, SEQ, Layout, Row
from kalamdb.tables.read import scan_columns
from kalamdb.tables.store import TableStore
from kalamdb.tables.transaction import Change, ChangeGroup, Transaction
from kalamdb.tables.write import Defaults, Merge, OnConflict, Validate, Writer, insert_columns, snowflake_id
from kalamdb.types import Scope, TableKind

_CALL = re.compile(r"(NOW|CURRENT_TIMESTAMP|SNOWFLAKE_ID|UUID_V7|ULID|CURRENT_USER)\s*(\(\s*\))?\Z", re.IGNORECASE)
_STEP = re.compile(r"\s*([A-Za-z]\w*)\s*([+-])\s*(\d{1,18})\s*\Z")
_EXCLUDED = re.compile(r"\s*excluded\s*\.\s*(?:([A-Za-z]\w*)|\"([^\"]+)\")\s*\Z", re.IGNORECASE)


class Rows:
    """Runs DML statements for callers."""

    def __init__(self, store: TableStore, reader: Reader, clock: Clock) -> None:
        self._store = store
        self._reader = reader
        self._clock = clock

    # INSERT

    def insert(self, statement: st.Insert, caller: Caller, transaction: Transaction | None) -> Result:
        """Run an INSERT."""
        entry = self._writable("insert", statement.table, caller)
        layout = self._store.layout(entry.definition)
        indexes = _column_indexes(entry, statement.columns)
        defaults = Defaults(self._store.backend, self._clock, caller.user)
        if statement.query is not None:
            rows = self._queried_rows(entry, layout, indexes, statement.query, caller, transaction, defaults)
        else:
            assert statement.rows is not None
            rows = self._stated_rows(layout, indexes, statement.rows, caller, defaults)
        on_conflict, merge = self._conflict(entry, layout, statement, caller, defaults)
        answer = _Answer("Inserted", self._reader, statement, layout, caller, self.checker(entry, caller))
        writer = Writer(self._store, entry, caller.scope(entry.definition), transaction)
        return answer.result(writer.insert(rows, on_conflict, merge, answer.take).count)

    def _stated_rows(
        self,
        layout: Layout,
        indexes: Sequence[int],
        stated: Sequence[Sequence[st.Expr]],
        caller: Caller,
        defaults: Defaults,
    ) -> list[Row]:
        evaluated = self._evaluate_all(stated, caller)
        rows: list[Row] = []
        missing = [at for at in range(len(layout.columns)) if at not in set(indexes)]
        wheres = [f"column '{column.name}'" for column in layout.columns]
        for values in stated:
            if len(values) != len(indexes):
                raise InvalidRequest(f"a row of VALUES has {len(values)} values for {len(indexes)} columns")
            row: list[Stored] = [None] * len(layout.columns)
            for at, value in zip(indexes, values, strict=True):
                column = layout.columns[at]
                if isinstance(value, st.DefaultMarker):
                    row[at] = defaults.value(column.default, column)
                    continue
                plain = evaluated[value.sql] if isinstance(value, st.EngineExpr) else caller.bind(value)
                row[at] = layout.codecs[at].store(self._fresh(plain), where=wheres[at])
            for at in missing:
                column = layout.columns[at]
                row[at] = defaults.value(column.default, column)
            rows.append(tuple(row))
        refuse_nulls(layout, rows)
        return rows

    def _fresh(self, value: Any) -> Any:
        return value() if isinstance(value, _PerRow) else value

    def _evaluate_all(self, stated: Sequence[Sequence[st.Expr]], caller: Caller) -> dict[str, Any]:
        """Values of all expressions in VALUES, in one query; id functions give a fresh value per use."""
        wanted: dict[str, Any] = {}
        for values in stated:
            for value in values:
                if isinstance(value, st.EngineExpr) and value.sql not in wanted:
                    wanted[value.sql] = self._call(value.sql, caller)
        open_ = [sql for sql, value in wanted.items() if value is _UNKNOWN]
        for at in range(0, len(open_), 200):
            part = open_[at : at + 200]
            items = ", ".join(f"{sql} AS v{number}" for number, sql in enumerate(part))
            result = Result(self._reader.evaluate(items, None, (), caller)).rows[0]
            wanted.update(zip(part, result, strict=True))
        return wanted

    def _call(self, sql: str, caller: Caller) -> Any:
        match = _CALL.match(sql.strip())
        if match is None:
            return _UNKNOWN
        name = match.group(1).upper()
        if match.group(2) is None and name not in ("CURRENT_TIMESTAMP", "CURRENT_USER"):
            return _UNKNOWN
        match name:
            case "NOW" | "CURRENT_TIMESTAMP":
                return caller.now
            case "CURRENT_USER":
                return caller.user
            case "UUID_V7":
                return _PerRow(lambda: uuid_v7(self._clock))
            case "ULID":
                return _PerRow(lambda: ulid(self._clock))
            case _:
                return _PerRow(lambda: snowflake_id(self._store.backend, self._clock))

    def _queried_rows(
        self,
        entry: CatalogEntry,
        layout: Layout,
        indexes: Sequence[int],
        query: st.Select,
        caller: Caller,
        transaction: Transaction | None,
        defaults: Defaults,
    ) -> list[Row]:
        table = self._reader.select(replace(query, lookup=None), caller, transaction).arrow()
        if table.num_columns != len(indexes):
            raise InvalidRequest(
                f"the SELECT gives {table.num_columns} columns for {len(indexes)} columns of "
                f"'{entry.definition.table_id}'"
            )
        columns: list[Sequence[Stored]] = []
        given = dict(zip(indexes, table.columns, strict=True))
        for at, (column, codec) in enumerate(zip(layout.columns, layout.codecs, strict=True)):
            if at in given:
                columns.append(codec.from_arrow(codec.coerce(given[at], where=f"column '{column.name}'")))
            else:
                columns.append([defaults.value(column.default, column) for _ in range(table.num_rows)])
        rows: list[Row] = list(zip(*columns, strict=True))
        refuse_nulls(layout, rows)
        return rows

    def _conflict(
        self, entry: CatalogEntry, layout: Layout, statement: st.Insert, caller: Caller, defaults: Defaults
    ) -> tuple[OnConflict, Merge | None]:
        clause = statement.conflict
        if clause is None:
            return OnConflict.ERROR, None
        if entry.definition.kind is TableKind.STREAM:
            raise InvalidRequest(
                f"ON CONFLICT has no meaning for stream '{entry.definition.table_id}': its rows have no unique key"
            )
        key = {layout.columns[index].name for index in layout.pk_indexes}
        if clause.columns and set(clause.columns) != key:
            raise InvalidRequest(
                f"ON CONFLICT ({', '.join(clause.columns)}) must name the primary key ({layout.pk_names()})"
            )
        if clause.action is st.ConflictAction.IGNORE:
            return OnConflict.IGNORE, None
        # A key column that is set to the proposed value is what it was: the keys are equal.
        same = [pair for pair in clause.assignments if pair[0] in key and _proposed(pair[1]) == pair[0]]
        clause = replace(clause, assignments=tuple(pair for pair in clause.assignments if pair not in same))
        self._check_assigned(entry, layout, [column for column, _ in clause.assignments])

        def merge(pairs: Sequence[tuple[Row, Row]]) -> Sequence[Row | None]:
            return self._merged(layout, statement.alias, clause, pairs, caller, defaults)

        return OnConflict.UPDATE, merge

    def _merged(
        self,
        layout: Layout,
        alias: str,
        clause: st.ConflictClause,
        pairs: Sequence[tuple[Row, Row]],
        caller: Caller,
        defaults: Defaults,
    ) -> Sequence[Row | None]:
        """DO UPDATE over (stored, proposed) rows, the expressions of all of them in one query."""
        rows = [list(stored) for stored, _ in pairs]
        later: list[tuple[int, str]] = []
        for column, value in clause.assignments:
            at = layout.index_of_name[column]
            codec, where = layout.codecs[at], f"column '{column}'"
            if isinstance(value, st.DefaultMarker):
                for row in rows:
                    row[at] = defaults.value(layout.columns[at].default, layout.columns[at])
            elif not isinstance(value, st.EngineExpr):
                constant = codec.store(caller.bind(value), where=where)
                for row in rows:
                    row[at] = constant
            elif (name := _proposed(value)) in layout.index_of_name:
                source = layout.index_of_name[name]
                for row, (_, proposed) in zip(rows, pairs, strict=True):
                    row[at] = codec.store(layout.codecs[source].load(proposed[source]), where=where)
            else:
                later.append((at, value.sql))
        chosen: Sequence[int] = range(len(rows))
        if later or clause.where is not None:
            items = ", ".join([f"{quote(alias)}._row", *(f"({sql}) AS v{at}" for at, (_, sql) in enumerate(later))])
            tables = [(alias, [stored for stored, _ in pairs]), ("excluded", [proposed for _, proposed in pairs])]
            table = self._reader.evaluate(items, layout, tables, caller, where=clause.where or "")
            chosen = table.column(0).to_pylist()
            for number, (at, _) in enumerate(later, 1):
                codec, where = layout.codecs[at], f"column '{layout.columns[at].name}'"
                values = codec.from_arrow(codec.coerce(table.column(number), where=where))
                for index, stored in zip(chosen, values, strict=True):
                    rows[index][at] = stored
        merged: list[Row | None] = [None] * len(rows)
        for index in chosen:
            merged[index] = tuple(rows[index])
        refuse_nulls(layout, [row for row in merged if row is not None])
        return merged

    # UPDATE and DELETE

    def update(self, statement: st.Update, caller: Caller, transaction: Transaction | None) -> Result:
        """Run an UPDATE."""
        entry = self._writable("update", statement.table, caller)
        if entry.definition.kind is TableKind.STREAM:
            raise InvalidRequest(
                f"UPDATE is not supported on STREAM table '{entry.definition.table_id}'; its rows never change"
            )
        layout = self._store.layout(entry.definition)
        self._check_assigned(entry, layout, [column for column, _ in statement.assignments])
        writer = Writer(self._store, entry, caller.scope(entry.definition), transaction)
        answer = _Answer("Updated", self._reader, statement, layout, caller, self.checker(entry, caller))
        values = key_values(layout, statement.key, caller) if statement.key is not None else None
        simple = self._simple_merge(layout, statement.assignments, caller) if values is not None else None
        if values is not None and simple is not None:
            return answer.result(writer.update_key(values, simple, answer.take).count)
        rows: list[Row] = []
        assigned = [(layout.index_of_name[column], value) for column, value in statement.assignments]
        to_default = [at for at, value in assigned if isinstance(value, st.DefaultMarker)]
        targets = [at for at, value in assigned if isinstance(value, st.EngineExpr)]
        expressions = [value.sql for _, value in assigned if isinstance(value, st.EngineExpr)]
        constants = {
            at: layout.codecs[at].store(caller.bind(value), where=f"column '{layout.columns[at].name}'")
            for at, value in assigned
            if not isinstance(value, (st.EngineExpr, st.DefaultMarker))
        }
        defaults = Defaults(self._store.backend, self._clock, caller.user)

        def decide() -> ChangeGroup:
            rows.clear()
            found, manifest = self._reader.changes_of(
                entry, statement.alias, expressions, statement.where, statement.tables, caller, transaction
            )
            group = ChangeGroup(entry, (writer.scope,), manifest)
            stored = _stored_rows(layout, found)
            fresh = _coerced(layout, found, targets)
            for at, (seq, old) in enumerate(zip(found.column(SEQ).to_pylist(), stored, strict=True)):
                row = list(old)
                for target, column in zip(targets, fresh, strict=True):
                    row[target] = column[at]
                for target, constant in constants.items():
                    row[target] = constant
                for target in to_default:
                    row[target] = defaults.value(layout.columns[target].default, layout.columns[target])
                if tuple(row) != old:
                    group.changes.append(Change(writer.key_of(old), tuple(row), seq))
                    rows.append(tuple(row))
            refuse_nulls(layout, rows)
            answer.take(rows)
            return group

        writer.apply(decide)
        return answer.result(len(rows))

    def delete(self, statement: st.Delete, caller: Caller, transaction: Transaction | None) -> Result:
        """Run a DELETE."""
        entry = self._writable("delete", statement.table, caller)
        layout = self._store.layout(entry.definition)
        writer = Writer(self._store, entry, caller.scope(entry.definition), transaction)
        answer = _Answer("Deleted", self._reader, statement, layout, caller)
        is_stream = entry.definition.kind is TableKind.STREAM
        values = key_values(layout, statement.key, caller) if statement.key is not None and not is_stream else None
        if values is not None:
            return answer.result(writer.delete_key(values, answer.take).count)
        rows: list[Row] = []

        def choose() -> tuple[pa.Table, int]:
            found, manifest = self._reader.changes_of(
                entry, statement.alias, (), statement.where, statement.tables, caller, transaction
            )
            rows[:] = _stored_rows(layout, found)
            answer.take(rows)
            return found, manifest

        def decide() -> ChangeGroup:
            found, manifest = choose()
            group = ChangeGroup(entry, (writer.scope,), manifest)
            for seq, row in zip(found.column(SEQ).to_pylist(), rows, strict=True):
                group.changes.append(Change(writer.key_of(row), None, seq, row))
            return group

        if is_stream:
            found, _ = choose()
            writer.remove(list(zip(found.column(KEY).to_pylist(), found.column(SEQ).to_pylist(), strict=True)))
        else:
            writer.apply(decide)
        return answer.result(len(rows))

    def _simple_merge(
        self, layout: Layout, assignments: Sequence[tuple[str, st.Expr]], caller: Caller
    ) -> Callable[[Row], Row | None] | None:
        """A function for literals, parameters and `column + number`; None when the engine must evaluate."""
        steps: list[tuple[int, Stored, int, int]] = []
        for column, value in assignments:
            at = layout.index_of_name[column]
            if not isinstance(value, st.EngineExpr):
                if isinstance(value, st.DefaultMarker):
                    default = Defaults(self._store.backend, self._clock, caller.user).value(
                        layout.columns[at].default, layout.columns[at]
                    )
                    steps.append((at, default, -1, 0))
                else:
                    steps.append((at, layout.codecs[at].store(caller.bind(value), where=f"column '{column}'"), -1, 0))
                continue
            match = _STEP.match(value.sql)
            source = layout.index_of_name.get(match.group(1).lower()) if match else None
            if (
                match is None
                or source is None
                or layout.columns[source].type != layout.columns[at].type
                or not _is_integer(layout, at)
            ):
                return None
            steps.append((at, None, source, int(match.group(3)) * (1 if match.group(2) == "+" else -1)))
        nulls = {
            at for at, stored, source, _ in steps if source < 0 and stored is None and not layout.columns[at].nullable
        }
        if nulls:
            raise _null_violation(layout.columns[min(nulls)].name)

        def merge(row: Row) -> Row | None:
            out = list(row)
            for at, stored, source, step in steps:
                if source < 0:
                    out[at] = stored
                    continue
                old = row[source]
                assert old is None or isinstance(old, int)
                where = f"column '{layout.columns[at].name}'"
                out[at] = None if old is None else layout.codecs[at].store(old + step, where=where)
            return tuple(out)

        return merge

    def _check_assigned(self, entry: CatalogEntry, layout: Layout, columns: Sequence[str]) -> None:
        for column in columns:
            at = layout.index_of_name.get(column)
            if at is None:
                known = ", ".join(layout.index_of_name)
                raise InvalidRequest(f"table '{entry.definition.table_id}' has no column '{column}'; it has {known}")
            if at in layout.pk_indexes:
                raise InvalidRequest(
                    f"column '{column}' is part of the PRIMARY KEY of "
                    f"'{entry.definition.table_id}' and cannot be changed"
                )

    # Shared parts

    def _writable(self, verb: str, name: st.TableName, caller: Caller) -> CatalogEntry:
        self._reader.refuse_system(verb, self._reader.resolve(name, caller))
        entry = self._reader.entry(name, caller)
        if not may_write(caller, entry.definition):
            raise denied(caller, "write", entry.definition)
        return entry

    def check_writes(self, name: st.TableName, caller: Caller) -> None:
        """Raise Denied for a table that there is and the caller may not write."""
        with suppress(NotFound, InvalidRequest):
            entry = self._reader.entry(name, caller)
            if not may_write(caller, entry.definition):
                raise denied(caller, "write", entry.definition)

    def checker(self, entry: CatalogEntry, caller: Caller) -> Validate | None:
        """What raises for rows that break a CHECK of the table; None when it has none."""
        checks = entry.definition.checks
        if not checks:
            return None
        layout = self._store.layout(entry.definition)
        items = ", ".join(f"({check.sql}) AS v{at}" for at, check in enumerate(checks))

        def validate(rows: Sequence[Row]) -> None:
            if not rows:
                return
            table = self._reader.evaluate(items, layout, [(entry.definition.name, rows)], caller)
            for check, column in zip(checks, table.columns, strict=True):
                for row, holds in zip(rows, column.to_pylist(), strict=True):
                    if holds is False:
                        raise InvalidRequest(
                            f"CHECK constraint '{check.name}' of table "
                            f"'{entry.definition.table_id}' is violated by the row "
                            f"with primary key '{layout.pk_text(row)}': {check.sql}"
                        )

        return validate

    # Bulk insert

    def insert_table(
        self,
        entry: CatalogEntry,
        given: Columns,
        scopes: Sequence[Scope],
        caller: Caller,
        on_conflict: OnConflict,
        transaction: Transaction | None,
    ) -> int:
        """Insert columns named as the table's; missing ones take their default. Returns the rows written."""
        if not may_write(caller, entry.definition):
            raise denied(caller, "write", entry.definition)
        layout, table = self._store.layout(entry.definition), given.table
        for name in table.schema.names:
            if name not in layout.index_of_name:
                known = ", ".join(layout.index_of_name)
                raise InvalidRequest(f"table '{entry.definition.table_id}' has no column '{name}'; it has {known}")
        defaults = Defaults(self._store.backend, self._clock, caller.user)
        columns: list[pa.Array] = []
        for column, codec in zip(layout.columns, layout.codecs, strict=True):
            if column.name in table.schema.names:
                array = codec.coerce(table.column(column.name), where=f"column '{column.name}'")
                wanted: Sequence[int] = given.absent.get(column.name, ())
            else:
                array = pa.nulls(table.num_rows, codec.physical)
                wanted = range(table.num_rows)
            if wanted and column.default is not None:
                values = codec.from_arrow(array)
                for at in wanted:
                    values[at] = defaults.value(column.default, column, scopes[at if len(scopes) > 1 else 0])
                array = codec.to_arrow(values)
            columns.append(array)
        validate = self.checker(entry, caller)
        one_scope = len(set(scopes)) == 1
        if validate is None and transaction is None and entry.definition.kind is not TableKind.STREAM:
            return insert_columns(self._store, entry, columns, scopes[:1] if one_scope else scopes, on_conflict)
        rows: list[Row] = list(
            zip(*(codec.from_arrow(array) for codec, array in zip(layout.codecs, columns, strict=True)), strict=True)
        )
        refuse_nulls(layout, rows)
        if validate is not None and transaction is None and one_scope is False:
            validate(rows)
            return insert_columns(self._store, entry, columns, scopes, on_conflict)
        written = 0
        for scope in dict.fromkeys(scopes):
            own = rows if one_scope else [row for row, owner in zip(rows, scopes, strict=True) if owner == scope]
            writer = Writer(self._store, entry, scope, transaction)
            written += writer.insert(own, on_conflict, None, validate).count
        return written


class _Answer:
    """What a statement answers: checked, and RETURNING evaluated, before it is committed, so that an error in
    either leaves everything as it was."""

    def __init__(
        self,
        verb: str,
        reader: Reader,
        statement: st.Insert | st.Update | st.Delete,
        layout: Layout,
        caller: Caller,
        check: Validate | None = None,
    ) -> None:
        self._verb = verb
        self._reader = reader
        self._returning, self._alias = statement.returning, statement.alias
        self._layout = layout
        self._caller = caller
        self._check = check
        self._table: pa.Table | None = None

    def take(self, rows: Sequence[Row]) -> None:
        """The rows that will be written or deleted."""
        if self._check is not None:
            self._check(rows)
        if self._returning is None:
            return
        if self._returning.strip() == "*":
            schema = pa.schema([column.field for column in scan_columns(self._layout)])
            self._table = pa.Table.from_arrays(self._layout.arrow_columns(rows), schema=schema)
            return
        asked = analyse_text(f"SELECT {self._returning}")
        if asked.specials:
            raise InvalidRequest(f"RETURNING cannot name {', '.join(sorted(asked.specials))}: SELECT it afterwards")
        items = asked.sql.removeprefix("SELECT")
        self._table = self._reader.evaluate(items, self._layout, [(self._alias, rows)], self._caller)

    def result(self, count: int) -> Result:
        """The answer after the commit."""
        if self._returning is not None and self._table is None:
            self.take([])
        message = f"{self._verb} {count} row(s)"
        return Result(row_count=count, message=message) if self._table is None else Result(self._table, message=message)


class _PerRow:
    """A value that each use makes anew."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    def __call__(self) -> Any:
        return self._make()


_UNKNOWN = object()


def _is_integer(layout: Layout, at: int) -> bool:
    return bool(pa.types.is_integer(layout.codecs[at].physical))


def _column_indexes(entry: CatalogEntry, columns: Sequence[str] | None) -> list[int]:
    definition = entry.definition
    if columns is None:
        return list(range(len(definition.columns)))
    index = {column.name: at for at, column in enumerate(definition.columns)}
    for name in columns:
        if name not in index:
            raise InvalidRequest(f"table '{definition.table_id}' has no column '{name}'; it has {', '.join(index)}")
    return [index[name] for name in columns]


def _stored_rows(layout: Layout, found: pa.Table) -> list[Row]:
    if not found.num_rows:
        return []
    columns = [codec.from_arrow(found.column(1 + at)) for at, codec in enumerate(layout.codecs)]
    return list(zip(*columns, strict=True))


def _coerced(layout: Layout, found: pa.Table, targets: Sequence[int]) -> list[list[Stored]]:
    first = 1 + len(layout.columns)
    out = []
    for number, target in enumerate(targets):
        codec, column = layout.codecs[target], layout.columns[target]
        out.append(codec.from_arrow(codec.coerce(found.column(first + number), where=f"column '{column.name}'")))
    return out


def refuse_nulls(layout: Layout, rows: Sequence[Row]) -> None:
    """Raise InvalidRequest when a NOT NULL column is NULL in one of the rows."""
    required = [at for at, column in enumerate(layout.columns) if not column.nullable]
    for row in rows:
        for at in required:
            if row[at] is None:
                raise _null_violation(layout.columns[at].name)


def _null_violation(name: str) -> InvalidRequest:
    return InvalidRequest(f"NOT NULL constraint violation: column '{name}' cannot be NULL")


def _proposed(value: st.Expr) -> str:
    """The column that EXCLUDED.column names; empty for other expressions."""
    match = _EXCLUDED.match(value.sql) if isinstance(value, st.EngineExpr) else None
    return "" if match is None else match.group(2) or match.group(1).lower()
