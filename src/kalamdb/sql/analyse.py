"""What a query reads: its tables, the system columns it names, whether it is a look-up by key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlglot
from sqlglot import exp

from kalamdb.errors import InvalidRequest, LimitExceeded
from kalamdb.sql.cursor import NOT_LITERAL, literal
from kalamdb.sql.projection import name_columns
from kalamdb.sql.pushdown import table_filters
from kalamdb.sql.render import render
from kalamdb.sql.statements import DefaultMarker, KeyLookup, KeyMatch, Param, Select, TableName, Tail
from kalamdb.sql.tokens import Token, TokenKind, tokenize

SPECIALS = frozenset({"_seq", "_deleted"})
_END_OF_WHERE = frozenset("GROUP HAVING ORDER LIMIT OFFSET UNION EXCEPT INTERSECT WINDOW".split())
_TABLE_FUNCTIONS_REFUSED = frozenset({"generate_series", "range"})
_SERIES_MAX = 1_000_000
_SOURCES_MAX = 64
"""Tables, views and common table expressions in FROM and JOIN; the engine plans 200 of them for a minute."""


def analyse_select(text: str, tokens: Sequence[Token], *, explain: bool = False, analyze: bool = False) -> Select:
    """A query as a statement. Raises InvalidRequest for text that does not parse."""
    start = tokens[0].start
    sql = text[start : tokens[-1].end]
    specials = frozenset(_identifiers(tokens) & SPECIALS)
    lookup = None if explain else _key_lookup(tokens)
    if lookup is not None and not specials:
        return Select(
            sql,
            (lookup[0],),
            lookup=lookup[1],
            filters=table_filters(sql, (lookup[0],)),
            main=lookup[0],
            star=lookup[1].projection is None,
            tail=_tail(tokens, sql),
        )
    _check_series(tokens)
    tree = _tree(sql)
    tables = _tables_of(tree)
    named = name_columns(sql, tokens, tree, start)
    return Select(
        named,
        tables,
        specials,
        deleted_in_where="_deleted" in specials and _in_where(tokens, "_deleted"),
        ctes=_ctes_of(tree),
        explain=explain,
        analyze=analyze,
        filters=table_filters(sql, tables),
        main=_main_table(tree),
        star=isinstance(tree, exp.Select) and any(isinstance(item, exp.Star) for item in tree.selects),
        tail=_tail(tokens, named),
        sources=sum(1 for _ in tree.find_all(exp.Table)),
        endless=any(token.upper in ("RECURSIVE", "GENERATE_SERIES", "RANGE", "UNNEST") for token in tokens),
    )


def _main_table(tree: exp.Expression) -> TableName | None:
    if not isinstance(tree, exp.Select) or tree.args.get("joins") or tree.args.get("with_"):
        return None
    source = tree.args.get("from_")
    table = source.this if source is not None else None
    if not isinstance(table, exp.Table) or not isinstance(table.this, exp.Identifier) or table.args.get("joins"):
        return None
    return TableName(_identifier(table.args["db"]) if table.args.get("db") else None, _identifier(table.this))


def _tail(tokens: Sequence[Token], sql: str) -> Tail:
    """What follows the outermost SELECT; `sql` ends as the text of `tokens` does."""
    depth, ordered, start = 0, False, len(tokens)
    for at, token in enumerate(tokens):
        depth += (token.text == "(") - (token.text == ")")
        if depth == 0 and token.upper == "ORDER":
            ordered = True
        elif depth == 0 and token.upper in ("LIMIT", "OFFSET", "FETCH"):
            start = at
            break
    found: dict[str, Any] = {}
    rest = tokens[start:]
    for word, token in zip(rest[::2], rest[1::2], strict=False):
        value = literal([token])
        if word.upper not in ("LIMIT", "OFFSET") or word.upper in found or type(value) not in (int, Param):
            return Tail(ordered)
        found[word.upper] = value
    if len(rest) % 2:
        return Tail(ordered)
    body = sql[: len(sql) - (tokens[-1].end - tokens[start].start)] if rest else sql
    return Tail(ordered, body, found.get("LIMIT"), found.get("OFFSET"))


def analyse_text(sql: str) -> Select:
    """As `analyse_select`, for a text that is one query."""
    return analyse_select(sql, tokenize(sql))


def _identifiers(tokens: Sequence[Token]) -> set[str]:
    return {token.name for token in tokens if token.kind in (TokenKind.WORD, TokenKind.QUOTED)}


def _in_where(tokens: Sequence[Token], name: str) -> bool:
    """Whether a WHERE clause, of the query or of one inside it, names the column."""
    depth, inside = 0, set[int]()
    for token in tokens:
        if token.text == "(":
            depth += 1
        elif token.text == ")":
            inside.discard(depth)
            depth -= 1
        elif token.upper == "WHERE":
            inside.add(depth)
        elif token.upper in _END_OF_WHERE:
            inside.discard(depth)
        elif inside and token.kind in (TokenKind.WORD, TokenKind.QUOTED) and token.name == name:
            return True
    return False


def _check_series(tokens: Sequence[Token]) -> None:
    for at, token in enumerate(tokens[:-1]):
        if token.upper.lower() in _TABLE_FUNCTIONS_REFUSED and tokens[at + 1].text == "(":
            numbers = []
            for following in tokens[at + 2 :]:
                if following.text == ")":
                    break
                if following.kind is TokenKind.NUMBER:
                    numbers.append(float(following.text.replace("_", "")))
            if numbers and max(numbers) - min(0.0, *numbers) > _SERIES_MAX:
                raise LimitExceeded(f"{token.text} would make more than {_SERIES_MAX} rows; make them in parts")


def referenced_tables(sql: str) -> tuple[TableName, ...]:
    """The tables that a query reads, without the names of its CTEs."""
    return _tables_of(_tree(sql))


def _ctes_of(tree: exp.Expression) -> frozenset[str]:
    return frozenset(_identifier(cte.args["alias"].this) for cte in tree.find_all(exp.CTE) if cte.args.get("alias"))


def _tables_of(tree: exp.Expression) -> tuple[TableName, ...]:
    sources = sum(1 for _ in tree.find_all(exp.Table))
    if sources > _SOURCES_MAX:
        raise LimitExceeded(f"the statement reads {sources} tables, at most {_SOURCES_MAX} are allowed; split it")
    ctes = _ctes_of(tree)
    found: dict[TableName, None] = {}
    for table in tree.find_all(exp.Table):
        if not isinstance(table.this, exp.Identifier):
            continue
        if table.catalog:
            raise InvalidRequest(f"'{table.sql()}' has three parts; a table is namespace.table")
        name = _identifier(table.this)
        namespace = _identifier(table.args["db"]) if table.args.get("db") else None
        if namespace is None and name in ctes:
            continue
        found[TableName(namespace, name)] = None
    return tuple(found)


def _identifier(node: exp.Identifier) -> str:
    text: str = node.this
    return text if node.args.get("quoted") else text.lower()


def _tree(sql: str) -> exp.Expression:
    plain = render(sql, lambda key: "NULL", lambda word: "''")
    try:
        tree = sqlglot.parse_one(plain, dialect="postgres")
    except sqlglot.errors.SqlglotError as exc:
        raise InvalidRequest(_reason(exc)) from None
    except (RecursionError, MemoryError):
        raise LimitExceeded("the statement is nested too deeply; simplify it") from None
    if not isinstance(tree, (exp.Query, exp.Values, exp.Table)):
        raise InvalidRequest(f"'{sql[:60]}' is not a query")
    if tree.find(exp.Insert, exp.Update, exp.Delete, exp.Into):
        raise InvalidRequest("a query cannot hold INSERT, UPDATE, DELETE or INTO")
    return tree


def _reason(exc: sqlglot.errors.SqlglotError) -> str:
    details = getattr(exc, "errors", None)
    if not details:
        return f"the query does not parse: {str(exc).splitlines()[0][:200]}"
    first = details[0]
    text, near = str(first["description"]).rstrip("."), str(first["highlight"])[:60]
    where = f"near '{near}' at {first['line']}:{first['col']}"
    if text.startswith("Required keyword"):
        return f"an operand or a clause is missing {where}"
    if text.startswith("Expecting ") and len(text) < 40:
        return f"'{text.removeprefix('Expecting ')}' is missing {where}"
    if text.startswith("Expected table name"):
        return f"a table name is missing {where}"
    return f"the query does not parse {where}"


# Look-ups by key


def find_lookup(tokens: Sequence[Token], alias: str | None = None) -> KeyMatch | None:
    """`column = value [AND column = value ...]` as a KeyMatch; None for every other predicate."""
    columns: list[str] = []
    values: list[Any] = []
    at = 0
    while True:
        if at + 2 < len(tokens) and tokens[at + 1].text == ".":
            if tokens[at].name != alias:
                return None
            at += 2
        if (
            at + 2 >= len(tokens)
            or tokens[at].kind not in (TokenKind.WORD, TokenKind.QUOTED)
            or tokens[at + 1].text != "="
        ):
            return None
        size = 2 if tokens[at + 2].text in ("-", "+") else 1
        value = literal(tokens[at + 2 : at + 2 + size])
        if value is NOT_LITERAL or isinstance(value, DefaultMarker):
            return None
        columns.append(tokens[at].name)
        values.append(value)
        at += 2 + size
        if at == len(tokens):
            break
        if tokens[at].upper != "AND":
            return None
        at += 1
    return KeyMatch(tuple(columns), tuple(values)) if len(set(columns)) == len(columns) else None


def _key_lookup(tokens: Sequence[Token]) -> tuple[TableName, KeyLookup] | None:
    words = [token.upper for token in tokens]
    if words[0] != "SELECT" or words.count("SELECT") != 1 or "FROM" not in words or "WHERE" not in words:
        return None
    start, where = words.index("FROM"), words.index("WHERE")
    source = tokens[start + 1 : where]
    if not 1 <= len(source) <= 5 or source[0].kind not in (TokenKind.WORD, TokenKind.QUOTED):
        return None
    table, rest = TableName(None, source[0].name), list(source[1:])
    if len(rest) >= 2 and rest[0].text == ".":
        table, rest = TableName(table.name, rest[1].name), rest[2:]
    if rest and rest[0].upper == "AS":
        rest = rest[1:]
    if len(rest) > 1 or (rest and rest[0].kind not in (TokenKind.WORD, TokenKind.QUOTED)):
        return None
    alias = rest[0].name if rest else table.name
    end = words.index("LIMIT") if "LIMIT" in words else len(tokens)
    if end < len(tokens) and (end != len(tokens) - 2 or not tokens[-1].text.isdigit() or int(tokens[-1].text) < 1):
        return None
    key = find_lookup(tokens[where + 1 : end], alias)
    projection = _projection(tokens[1:start], alias)
    return None if key is None or projection is False else (table, KeyLookup(key, projection))


def _projection(tokens: Sequence[Token], alias: str) -> Any:
    """(column, output name) of plain columns, None for `*`, False for everything else."""
    if len(tokens) == 1 and tokens[0].text == "*":
        return None
    found: list[tuple[str, str]] = []
    item: list[Token] = []
    for token in [*tokens, None]:
        if token is not None and token.text != ",":
            item.append(token)
            continue
        if len(item) >= 3 and item[1].text == "." and item[0].name == alias:
            item = item[2:]
        if not item or item[0].kind not in (TokenKind.WORD, TokenKind.QUOTED):
            return False
        name = item[0].name
        if len(item) == 3 and item[1].upper == "AS" and item[2].kind in (TokenKind.WORD, TokenKind.QUOTED):
            found.append((name, item[2].name))
        elif len(item) == 1:
            found.append((name, name))
        else:
            return False
        item = []
    # The engine refuses a name that stands twice.
    return tuple(found) if len({output for _, output in found}) == len(found) else False
