"""Filters of subscriptions: a WHERE clause as data, as a test of one row, and as SQL for the engine.

Columns are named by id, so a renamed column stays the same and equal filters are equal values. The test works on rows
in stored form and knows three answers: True, False and None for unknown. It agrees with what the engine makes of `sql`.
"""

from __future__ import annotations

import datetime as dt
import math
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from operator import eq, ge, gt, le, lt, ne
from typing import Any, assert_never

from kalamdb.errors import InvalidRequest, NotFound
from kalamdb.schema import ColumnDef, DataType, TypeName
from kalamdb.sql.projection import quote
from kalamdb.sql.render import sql_literal
from kalamdb.tables.codec import Stored, codec_of, shown
from kalamdb.tables.layout import Layout, Row

Test = Callable[[Row], bool | None]
"""Whether a row passes; None when that is unknown."""

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {"=": eq, "<>": ne, "<": lt, "<=": le, ">": gt, ">=": ge}
_INTEGERS = frozenset({TypeName.SMALLINT, TypeName.INT, TypeName.BIGINT})
_FLOATS = frozenset({TypeName.FLOAT, TypeName.DOUBLE})
_TEXTS = frozenset({TypeName.TEXT, TypeName.UUID})
_INDEXED = _INTEGERS | _TEXTS | {TypeName.BOOLEAN, TypeName.DATE, TypeName.TIMESTAMP, TypeName.DATETIME}
"""Types whose stored values are equal exactly when the engine says so."""


@dataclass(frozen=True, slots=True)
class Always:
    """TRUE, FALSE or NULL."""

    value: bool | None


@dataclass(frozen=True, slots=True)
class Compare:
    """column operator value; an operator of `=`, `<>`, `<`, `<=`, `>`, `>=`."""

    column: int
    operator: str
    value: Any


@dataclass(frozen=True, slots=True)
class CompareColumns:
    """column operator column, of one type."""

    left: int
    operator: str
    right: int


@dataclass(frozen=True, slots=True)
class Like:
    """column LIKE or ILIKE pattern."""

    column: int
    pattern: str | None
    ignore_case: bool


@dataclass(frozen=True, slots=True)
class OneOf:
    """column IN (values)."""

    column: int
    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class IsNull:
    """column IS NULL."""

    column: int


@dataclass(frozen=True, slots=True)
class IsTrue:
    """A BOOLEAN column by itself."""

    column: int


@dataclass(frozen=True, slots=True)
class Not:
    """NOT inner."""

    inner: Filter


@dataclass(frozen=True, slots=True)
class All:
    """AND."""

    parts: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class Some:
    """OR."""

    parts: tuple[Filter, ...]


Filter = Always | Compare | CompareColumns | Like | OneOf | IsNull | IsTrue | Not | All | Some


def columns_of(filter_: Filter) -> frozenset[int]:
    """Ids of the columns that a filter names."""
    match filter_:
        case Always():
            return frozenset()
        case CompareColumns(left=left, right=right):
            return frozenset({left, right})
        case Not(inner=inner):
            return columns_of(inner)
        case All(parts=parts) | Some(parts=parts):
            return frozenset().union(*map(columns_of, parts))
        case _:
            return frozenset({filter_.column})


def equality(filter_: Filter, layout: Layout) -> tuple[int, Stored] | None:
    """(column index, stored value) that each row passing the filter has; None when it names none such."""
    for part in filter_.parts if isinstance(filter_, All) else (filter_,):
        if isinstance(part, Compare) and part.operator == "=" and part.value is not None:
            column = _column(layout, part.column)
            value = operand(column, part.value)
            if column.type.name in _INDEXED and (column.type.name not in _INTEGERS or type(value) is int):
                return layout.index_of_id[part.column], value
    return None


# As SQL


def sql(filter_: Filter, layout: Layout) -> str:
    """The filter as an expression of the engine over the columns of a schema version."""
    match filter_:
        case Always(value=value):
            return "CAST(NULL AS BOOLEAN)" if value is None else str(value).upper()
        case Compare(column=column, operator=operator, value=value):
            return f"{_name(layout, column)} {operator} {_literal(layout, column, value)}"
        case CompareColumns(left=left, operator=operator, right=right):
            return f"{_name(layout, left)} {operator} {_name(layout, right)}"
        case Like(column=column, pattern=pattern, ignore_case=ignore_case):
            return f"{_name(layout, column)} {'ILIKE' if ignore_case else 'LIKE'} {sql_literal(pattern)}"
        case OneOf(column=column, values=values):
            return f"{_name(layout, column)} IN ({', '.join(_literal(layout, column, value) for value in values)})"
        case IsNull(column=column):
            return f"{_name(layout, column)} IS NULL"
        case IsTrue(column=column):
            return _name(layout, column)
        case Not(inner=inner):
            return f"NOT ({sql(inner, layout)})"
        case All(parts=parts):
            return " AND ".join(f"({sql(part, layout)})" for part in parts)
        case Some(parts=parts):
            return " OR ".join(f"({sql(part, layout)})" for part in parts)
        case _:
            assert_never(filter_)


def _name(layout: Layout, column_id: int) -> str:
    return quote(_column(layout, column_id).name)


def _literal(layout: Layout, column_id: int, value: Any) -> str:
    if value is None:
        return "NULL"
    column = _column(layout, column_id)
    known = operand(column, value)
    match column.type.name:
        case TypeName.DATE | TypeName.TIME | TypeName.TIMESTAMP | TypeName.DATETIME:
            return sql_literal(layout.codecs[layout.index_of_id[column_id]].load(known))
        case _:
            return sql_literal(known)


def _column(layout: Layout, column_id: int) -> ColumnDef:
    found = layout.definition.column_by_id(column_id)
    if found is None:
        raise NotFound(f"a column of the filter was dropped from '{layout.definition.table_id}'")
    return found


# Values


def operand(column: ColumnDef, value: Any) -> Any:
    """`value` in the form in which rows of the column are compared. Raises InvalidRequest for another kind."""
    found = _operand(column.type, value)
    if found is None:
        raise InvalidRequest(f"column '{column.name}' of type {column.type} cannot be compared with {shown(value)}")
    return found


def _operand(kind: DataType, value: Any) -> Any:
    is_number = isinstance(value, (int, Decimal, float)) and not isinstance(value, bool)
    match kind.name:
        case TypeName.SMALLINT | TypeName.INT | TypeName.BIGINT:
            return value if is_number else None
        case TypeName.FLOAT | TypeName.DOUBLE:
            return float(value) if is_number else None
        case TypeName.DECIMAL:
            return value if isinstance(value, float) or not is_number else Decimal(value)
        case TypeName.BOOLEAN:
            return value if isinstance(value, bool) else None
        case TypeName.TEXT | TypeName.UUID:
            return str(value) if isinstance(value, (str, uuid.UUID)) else None
        case TypeName.BYTES:
            return bytes(value) if isinstance(value, (bytes, bytearray, memoryview)) else None
        case TypeName.DATE | TypeName.TIME | TypeName.TIMESTAMP | TypeName.DATETIME:
            return _moment(kind, value)
        case TypeName.JSON | TypeName.FILE | TypeName.EMBEDDING:
            return None
        case _:
            assert_never(kind.name)


def _moment(kind: DataType, value: Any) -> Any:
    match kind.name:
        case TypeName.DATE:
            fits = (isinstance(value, str) and len(value.strip()) == 10) or type(value) is dt.date
        case TypeName.TIME:
            fits = isinstance(value, (str, dt.time))
        case _:
            fits = isinstance(value, (str, dt.date))
    return codec_of(kind).store(value, where="the filter") if fits else None


# As a test


def compile_filter(filter_: Filter, layout: Layout) -> Test:
    """The test of a row of this schema version. Raises InvalidRequest for a value of the wrong kind, NotFound for a
    column that is gone."""
    match filter_:
        case Always(value=value):
            return lambda row: value
        case Compare(column=column, operator=operator, value=value):
            return _compare(layout, column, operator, value)
        case CompareColumns():
            return _compare_columns(layout, filter_)
        case Like():
            return _like(layout, filter_)
        case OneOf(column=column, values=values):
            return _one_of(layout, column, values)
        case IsNull(column=column):
            _column(layout, column)
            at = layout.index_of_id[column]
            return lambda row: row[at] is None
        case IsTrue(column=column):
            return _is_true(layout, column)
        case Not(inner=inner):
            return _not(compile_filter(inner, layout))
        case All(parts=parts):
            return _all([compile_filter(part, layout) for part in parts])
        case Some(parts=parts):
            return _some([compile_filter(part, layout) for part in parts])
        case _:
            assert_never(filter_)


def _not(inner: Test) -> Test:
    def test(row: Row) -> bool | None:
        found = inner(row)
        return None if found is None else not found

    return test


def _all(parts: Sequence[Test]) -> Test:
    def test(row: Row) -> bool | None:
        answer: bool | None = True
        for part in parts:
            found = part(row)
            if found is False:
                return False
            if found is None:
                answer = None
        return answer

    return test


def _some(parts: Sequence[Test]) -> Test:
    def test(row: Row) -> bool | None:
        answer: bool | None = False
        for part in parts:
            found = part(row)
            if found:
                return True
            if found is None:
                answer = None
        return answer

    return test


def _is_true(layout: Layout, column_id: int) -> Test:
    column = _column(layout, column_id)
    if column.type.name is not TypeName.BOOLEAN:
        raise InvalidRequest(f"column '{column.name}' of type {column.type} is not a condition")
    at = layout.index_of_id[column_id]

    def test(row: Row) -> bool | None:
        value = row[at]
        return None if value is None else bool(value)

    return test


def _compare(layout: Layout, column_id: int, operator: str, value: Any) -> Test:
    column = _column(layout, column_id)
    if value is None:
        return lambda row: None
    wanted, form = _forms(column, operand(column, value))
    compare, at = _OPERATORS[operator], layout.index_of_id[column_id]
    if form is None:

        def plain(row: Row) -> bool | None:
            found = row[at]
            return None if found is None else compare(found, wanted)

        return plain

    def formed(row: Row) -> bool | None:
        found = row[at]
        return None if found is None else compare(form(found), wanted)

    return formed


def _forms(column: ColumnDef, value: Any) -> tuple[Any, Callable[[Any], Any] | None]:
    """(value to compare with, how a stored value gets comparable; None when it is as it is)."""
    kind = column.type.name
    if kind is TypeName.DECIMAL and not isinstance(value, float):
        return value, Decimal
    if kind in _FLOATS or isinstance(value, float):
        return total_order(value), lambda stored: total_order(float(stored))
    return value, None


def total_order(value: float) -> tuple[int, float, float]:
    """A key that sorts floats as the engine does: -NaN lowest, -0.0 under 0.0, NaN highest."""
    sign = math.copysign(1.0, value)
    if math.isnan(value):
        return (int(sign), 0.0, 0.0)
    return (0, value, sign)


def _compare_columns(layout: Layout, filter_: CompareColumns) -> Test:
    left, right = _column(layout, filter_.left), _column(layout, filter_.right)
    comparable = left.type.name not in (TypeName.JSON, TypeName.FILE, TypeName.EMBEDDING)
    if left.type != right.type or not comparable:
        raise InvalidRequest(
            f"columns '{left.name}' and '{right.name}' of types {left.type} and {right.type} cannot be compared here"
        )
    first, second = layout.index_of_id[filter_.left], layout.index_of_id[filter_.right]
    compare = _OPERATORS[filter_.operator]
    form: Callable[[Any], Any] = lambda stored: stored  # noqa: E731
    if left.type.name is TypeName.DECIMAL:
        form = Decimal
    elif left.type.name in _FLOATS:
        form = total_order

    def test(row: Row) -> bool | None:
        one, other = row[first], row[second]
        return None if one is None or other is None else compare(form(one), form(other))

    return test


def _one_of(layout: Layout, column_id: int, values: Sequence[Any]) -> Test:
    tests = _some([_compare(layout, column_id, "=", value) for value in values])
    column = _column(layout, column_id)
    if column.type.name not in _INDEXED or None in values:
        return tests
    wanted, at = frozenset(operand(column, value) for value in values), layout.index_of_id[column_id]

    def test(row: Row) -> bool | None:
        found = row[at]
        return None if found is None else found in wanted

    return test


def _like(layout: Layout, filter_: Like) -> Test:
    column = _column(layout, filter_.column)
    if column.type.name not in _TEXTS:
        raise InvalidRequest(f"column '{column.name}' of type {column.type} is not text; LIKE needs text")
    if filter_.pattern is None:
        return lambda row: None
    flags = re.DOTALL | (re.IGNORECASE if filter_.ignore_case else 0)
    matches, at = re.compile(_pattern(filter_.pattern), flags).fullmatch, layout.index_of_id[filter_.column]

    def test(row: Row) -> bool | None:
        found: Any = row[at]
        return None if found is None else matches(found) is not None

    return test


def _pattern(like: str) -> str:
    """A LIKE pattern as a regular expression; `\\` takes `%`, `_` and itself literally."""
    out: list[str] = []
    characters = iter(like)
    for character in characters:
        if character == "\\":
            following = next(characters, "")
            out.append(re.escape(following if following and following in "%_\\" else "\\" + following))
        elif character == "%":
            out.append(".*")
        elif character == "_":
            out.append(".")
        else:
            out.append(re.escape(character))
    return "".join(out)
