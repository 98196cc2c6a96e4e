"""Which rows of the system tables a query can use, so that a table over a million jobs makes only those.

A hint and nothing else: the engine still applies the whole WHERE.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import sqlglot
from sqlglot import exp

from kalamdb.sql.render import render
from kalamdb.sql.statements import Expr, Param, TableFilter, TableName

_NAMESPACES = frozenset({"system", "information_schema"})
_MARK = "\x00"


def table_filters(sql: str, tables: Sequence[TableName]) -> tuple[TableFilter, ...]:
    """`column = value` and `column IN (values)` that each row of a system table must pass to be seen.

    Of tables that the query names once: a second mention may need other rows.
    """
    if _MARK in sql or not any(table.namespace in _NAMESPACES for table in tables):
        return ()
    keys: list[int | str] = []

    def mark(key: int | str) -> str:
        keys.append(key)
        return f"'{_MARK}{len(keys) - 1}'"

    try:
        tree = sqlglot.parse_one(render(sql, mark, lambda word: "NULL"), dialect="postgres")
    except sqlglot.errors.SqlglotError:
        # A text may stand where only a number can: the query is sound, only the hint is lost.
        return ()
    mentions = Counter(_name(table) for table in tree.find_all(exp.Table))
    found: list[TableFilter] = []
    for select in tree.find_all(exp.Select):
        sources = _sources(select)
        for source in sources:
            if isinstance(source, exp.Table) and not source.args.get("joins"):
                name = _name(source)
                if name.namespace in _NAMESPACES and mentions[name] == 1:
                    found += _filters(select, source, name, alone=len(sources) == 1, keys=keys)
    return tuple(found)


def _text(node: Any) -> str:
    if not isinstance(node, exp.Identifier):
        return ""
    text: str = node.this
    return text if node.args.get("quoted") else text.lower()


def _name(table: exp.Table) -> TableName:
    return TableName(_text(table.args.get("db")) or None, _text(table.this))


def _sources(select: exp.Select) -> list[exp.Expression]:
    first = select.args.get("from_") or select.args.get("from")
    joins = select.args.get("joins") or []
    return [part.this for part in ([first] if first is not None else []) + joins + (select.args.get("laterals") or [])]


def _filters(
    select: exp.Select, source: exp.Table, name: TableName, *, alone: bool, keys: Sequence[int | str]
) -> Iterator[TableFilter]:
    where = select.args.get("where")
    if where is None:
        return
    alias = source.args.get("alias")
    alias_text = _text(alias.this) if alias is not None else ""
    if alias is not None and alias.args.get("columns"):
        return
    for part in _conjuncts(where.this):
        column, values = _comparison(part)
        if column is None or not values:
            continue
        qualifier = (_text(column.args.get("db")), _text(column.args.get("table")))
        named = [("", alias_text)] if alias_text else [("", name.name), (name.namespace, name.name)]
        if qualifier in named or (alone and qualifier == ("", "")):
            yield TableFilter(name, _text(column.this), tuple(_value(text, keys) for text in values))


def _conjuncts(node: exp.Expression) -> Iterator[exp.Expression]:
    node = node.unnest()
    if isinstance(node, exp.And):
        yield from _conjuncts(node.left)
        yield from _conjuncts(node.right)
    else:
        yield node


def _comparison(node: exp.Expression) -> tuple[exp.Column | None, list[str]]:
    """The column and the texts that it may have; no texts when it is another comparison."""
    match node:
        case exp.EQ():
            left, right = node.left.unnest(), node.right.unnest()
            column, others = (left, [right]) if isinstance(left, exp.Column) else (right, [left])
        case exp.In():
            column, others = node.this.unnest(), [one.unnest() for one in node.expressions]
        case _:
            return None, []
    if not isinstance(column, exp.Column) or not all(isinstance(one, exp.Literal) and one.is_string for one in others):
        return None, []
    return column, [str(one.this) for one in others]


def _value(text: str, keys: Sequence[int | str]) -> Expr:
    return Param(keys[int(text[len(_MARK) :])]) if text.startswith(_MARK) else text
