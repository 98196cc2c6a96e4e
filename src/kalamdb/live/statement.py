"""What may be subscribed: `SELECT * | columns FROM table [WHERE filter]`, from its text to data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlglot
from sqlglot import exp

from kalamdb.errors import InvalidRequest, LimitExceeded
from kalamdb.live.filters import (
    All,
    Always,
    Compare,
    CompareColumns,
    Filter,
    IsNull,
    IsTrue,
    Like,
    Not,
    OneOf,
    Some,
    compile_filter,
)
from kalamdb.sql.caller import Caller
from kalamdb.sql.cursor import number
from kalamdb.sql.render import CLOCK_WORDS, render
from kalamdb.sql.statements import TableName
from kalamdb.sql.tokens import SqlLimits, TokenKind, check_shape, check_size, number_params, split, tokenize
from kalamdb.tables.layout import Layout
from kalamdb.types import TableId

_MARK = "\x00"
_SPECIALS = frozenset({"_seq", "_deleted"})
_COMPARISONS: Mapping[type[exp.Expression], str] = {
    exp.EQ: "=", exp.NEQ: "<>", exp.LT: "<", exp.LTE: "<=", exp.GT: ">", exp.GTE: ">=",
}  # fmt: skip
_MIRRORED = {"=": "=", "<>": "<>", "<": ">", "<=": ">=", ">": "<", ">=": "<="}
_ACCEPTED = frozenset({"expressions", "from", "from_", "where", "order", "kind"})
"""Parts of a SELECT; ORDER BY is accepted and has no meaning."""


@dataclass(frozen=True, slots=True)
class LiveSelect:
    """A subscription's SELECT, before its table is known."""

    table_id: TableId
    columns: tuple[str, ...] | None
    """Names in order; None for `*`."""
    where: exp.Expression | None
    values: tuple[Any, ...]
    """What the marks in `where` stand for: parameters and words of the caller."""
    names: frozenset[str]
    """What the table may be called in front of a column."""

    def filter(self, layout: Layout) -> Filter:
        """The filter over the columns of a table. Raises InvalidRequest for what a filter cannot hold."""
        if self.where is None:
            return Always(True)
        try:
            found = _Builder(self, layout).build(self.where)
        except RecursionError:
            raise LimitExceeded("the filter is nested too deeply; simplify it") from None
        compile_filter(found, layout)
        return found

    def column_ids(self, layout: Layout) -> tuple[int, ...] | None:
        """Ids of the columns in order, each once; None for `*`."""
        if self.columns is None:
            return None
        return tuple(dict.fromkeys(_column_id(layout, name) for name in self.columns))


def parse_live(sql: str, caller: Caller, limits: SqlLimits) -> LiveSelect:
    """The SELECT of a subscription. Raises InvalidRequest, LimitExceeded."""
    if not isinstance(sql, str):
        raise InvalidRequest(f"SQL is text; a value of type {type(sql).__name__} was given")
    check_size(sql, limits)
    tokens = tokenize(sql)
    if any(token.text == "?" for token in tokens):
        sql = number_params(sql, tokens)
        tokens = tokenize(sql)
    statements = list(split(tokens))
    if len(statements) != 1 or statements[0][0].upper != "SELECT":
        raise InvalidRequest("a subscription is one statement: SELECT * or columns FROM namespace.table [WHERE ...]")
    check_shape(statements[0], limits)
    used = [token.text[1:] for token in statements[0] if token.kind is TokenKind.PARAM]
    caller.check_parameters(frozenset(int(name) if name.isdigit() else name for name in used))
    values: list[Any] = []

    def mark(value: Any) -> str:
        values.append(value)
        return f"'{_MARK}{len(values) - 1}'"

    def word(name: str) -> str:
        if name in CLOCK_WORDS:
            raise InvalidRequest(f"{name} cannot stand in a subscription: its value would be that of the beginning")
        return mark(str(caller.role) if name == "CURRENT_ROLE" else caller.user)

    text = sql[statements[0][0].start : statements[0][-1].end]
    select = _tree(render(text, lambda key: mark(caller.parameter(key)), word))
    for part, value in select.args.items():
        if value and part not in _ACCEPTED:
            raise InvalidRequest(f"{part.rstrip('_').upper()} cannot stand in a subscription; WHERE and columns can")
    source = _source(select)
    name = TableName(_text(source.args.get("db")) or None, _text(source.this))
    where = select.args.get("where")
    return LiveSelect(
        TableId(name.namespace or caller.namespace, name.name), _projection(select, source),
        None if where is None else where.this, tuple(values), _names(source),
    )  # fmt: skip


def _tree(text: str) -> exp.Select:
    try:
        tree = sqlglot.parse_one(text, dialect="postgres")
    except sqlglot.errors.SqlglotError as exc:
        raise InvalidRequest(f"the subscription does not parse: {str(exc).splitlines()[0][:200]}") from None
    except (RecursionError, MemoryError):
        raise LimitExceeded("the subscription is nested too deeply; simplify it") from None
    if not isinstance(tree, exp.Select):
        raise InvalidRequest("a subscription is one SELECT over one table")
    return tree


def _source(select: exp.Select) -> exp.Table:
    first = select.args.get("from_") or select.args.get("from")
    source = None if first is None else first.this
    if isinstance(source, exp.Table) and isinstance(source.this, exp.Identifier):
        if not source.args.get("joins") and not source.catalog:
            return source
    raise InvalidRequest("a subscription reads one table: FROM namespace.table")


def _names(source: exp.Table) -> frozenset[str]:
    alias = source.args.get("alias")
    return frozenset({_text(alias.this)} if alias is not None else {_text(source.this)})


def _projection(select: exp.Select, source: exp.Table) -> tuple[str, ...] | None:
    names = _names(source)
    found: list[str] = []
    for one in select.expressions:
        star = isinstance(one, exp.Star) or (isinstance(one, exp.Column) and isinstance(one.this, exp.Star))
        if star and len(select.expressions) == 1 and not _stars_options(one):
            return None
        if not isinstance(one, exp.Column) or star or (one.table and _text(one.args["table"]) not in names):
            raise InvalidRequest(f"'{one.sql()[:60]}' cannot stand in a subscription; name columns, or *")
        name = _text(one.this)
        if name in _SPECIALS:
            raise InvalidRequest(f"{name} comes with each row by itself; do not name it")
        found.append(name)
    return tuple(found)


def _stars_options(star: exp.Expression) -> bool:
    inner = star if isinstance(star, exp.Star) else star.this
    return any(inner.args.values())


def _text(node: Any) -> str:
    if not isinstance(node, exp.Identifier):
        return ""
    text: str = node.this
    return text if node.args.get("quoted") else text.lower()


def _column_id(layout: Layout, name: str) -> int:
    column = layout.definition.column(name)
    if column is None:
        raise InvalidRequest(f"table '{layout.definition.table_id}' has no column '{name}'")
    return column.id


_NOT_VALUE = object()
_KNOWN = frozenset({"this", "expression", "expressions", "low", "high", "negate", "is_string"})


class _Builder:
    """From a syntax tree to a filter."""

    def __init__(self, select: LiveSelect, layout: Layout) -> None:
        self._select = select
        self._layout = layout

    def build(self, node: exp.Expression) -> Filter:
        """The filter of a node. The parser says NOT inside of some nodes; what else it may add is refused unseen."""
        if not isinstance(node, exp.Column) and any(value and part not in _KNOWN for part, value in node.args.items()):
            raise self._refused(node)
        found = self._positive(node)
        return Not(found) if node.args.get("negate") else found

    def _positive(self, node: exp.Expression) -> Filter:
        match node:
            case exp.Paren():
                return self.build(node.this)
            case exp.And():
                return All(self._parts(node, exp.And))
            case exp.Or():
                return Some(self._parts(node, exp.Or))
            case exp.Not():
                return Not(self.build(node.this))
            case exp.Boolean():
                return Always(bool(node.this))
            case exp.Null():
                return Always(None)
            case exp.Column():
                return IsTrue(self._column(node))
            case exp.Is():
                return self._is(node)
            case exp.In():
                return OneOf(self._column(node.this), tuple(self._value(one) for one in node.expressions))
            case exp.Between():
                column = self._column(node.this)
                low, high = self._value(node.args["low"]), self._value(node.args["high"])
                return All((Compare(column, ">=", low), Compare(column, "<=", high)))
            case exp.Like() | exp.ILike():
                return self._like(node)
            case _ if type(node) in _COMPARISONS:
                return self._comparison(node)
            case _:
                found = self._literal(node)
                if isinstance(found, bool):
                    return Always(found)
                raise self._refused(node)

    def _refused(self, node: exp.Expression) -> InvalidRequest:
        text = node.sql(dialect="postgres").replace(_MARK, "")[:60]
        return InvalidRequest(f"'{text}' cannot stand in the filter of a subscription")

    def _parts(self, node: exp.Expression, kind: type[exp.Expression]) -> tuple[Filter, ...]:
        out: list[Filter] = []
        left = node
        while isinstance(left, kind):
            out.append(self.build(left.args["expression"]))
            left = left.this
        out.append(self.build(left))
        return tuple(reversed(out))

    def _is(self, node: exp.Is) -> Filter:
        value = node.args["expression"]
        if isinstance(value, exp.Null):
            return IsNull(self._column(node.this))
        if isinstance(value, exp.Boolean):
            column = self._column(node.this)
            wanted = IsTrue(column) if value.this else Not(IsTrue(column))
            return All((wanted, Not(IsNull(column))))
        raise self._refused(node)

    def _like(self, node: exp.Expression) -> Filter:
        pattern = self._value(node.args["expression"])
        if pattern is not None and not isinstance(pattern, str):
            raise self._refused(node)
        return Like(self._column(node.this), pattern, isinstance(node, exp.ILike))

    def _comparison(self, node: exp.Expression) -> Filter:
        left, right = _unnest(node.this), _unnest(node.args["expression"])
        operator = _COMPARISONS[type(node)]
        if isinstance(left, exp.Column) and isinstance(right, exp.Column):
            return CompareColumns(self._column(left), operator, self._column(right))
        if isinstance(left, exp.Column):
            return Compare(self._column(left), operator, self._value(right))
        return Compare(self._column(right), _MIRRORED[operator], self._value(left))

    def _column(self, node: exp.Expression) -> int:
        node = _unnest(node)
        if not isinstance(node, exp.Column) or not isinstance(node.this, exp.Identifier):
            raise self._refused(node)
        qualifier = _text(node.args.get("table"))
        table_id = self._select.table_id
        own = not qualifier or qualifier in self._select.names
        if not own or (node.args.get("db") and _text(node.args["db"]) != table_id.namespace):
            raise self._refused(node)
        return _column_id(self._layout, _text(node.this))

    def _value(self, node: exp.Expression) -> Any:
        found = self._literal(_unnest(node))
        if found is _NOT_VALUE:
            raise self._refused(node)
        return found

    def _literal(self, node: exp.Expression) -> Any:
        match node:
            case exp.Null():
                return None
            case exp.Boolean():
                return bool(node.this)
            case exp.Literal() if node.is_string:
                text = str(node.this)
                return self._select.values[int(text[1:])] if text.startswith(_MARK) else text
            case exp.Literal():
                return number(str(node.this))
            case exp.Neg():
                value = self._literal(_unnest(node.this))
                return -value if value is not _NOT_VALUE and not isinstance(value, (bool, str)) else _NOT_VALUE
            case exp.HexString():
                return bytes.fromhex(str(node.this))
            case exp.Cast() if isinstance(_unnest(node.this), exp.Literal) and node.to.this in _MOMENTS:
                return self._literal(_unnest(node.this))
            case _:
                return _NOT_VALUE


_MOMENTS = frozenset(
    {exp.DataType.Type.DATE, exp.DataType.Type.TIME, exp.DataType.Type.TIMESTAMP, exp.DataType.Type.TIMESTAMPTZ}
)
"""`DATE '2026-01-31'` and the like: the column says what the text means."""


def _unnest(node: exp.Expression) -> exp.Expression:
    while isinstance(node, exp.Paren):
        node = node.this
    return node
