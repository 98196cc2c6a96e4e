"""What a query reads: its tables, the system columns it names, whether it is a look-up by key; and the
text that the engine gets: parameters and caller functions as literals, JSON operators as functions."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Callable, Sequence, Set
from decimal import Decimal
from typing import Any

import msgspec
import sqlglot
from sqlglot import exp

from kalamdb.errors import InvalidRequest, LimitExceeded
from kalamdb.sql.cursor import NOT_LITERAL, literal
from kalamdb.sql.statements import DefaultMarker, KeyLookup, KeyMatch, Select, TableName
from kalamdb.sql.tokens import Token, TokenKind, tokenize

SPECIALS = frozenset({"_seq", "_deleted"})
_JSON_OPERATORS = {"->": "json_get", "->>": "json_as_text"}
_END_OF_ITEM = frozenset({"FROM", "WHERE", "LIMIT", "ORDER", "GROUP", "HAVING", "UNION"})
_CALLER_WORDS = frozenset({"CURRENT_USER", "CURRENT_USER_ID", "CURRENT_ROLE"})
_TABLE_FUNCTIONS_REFUSED = frozenset({"generate_series", "range"})
_SERIES_MAX = 1_000_000
_DECIMAL_DIGITS_MAX = 38


def analyse_select(text: str, tokens: Sequence[Token], *, explain: bool = False, analyze: bool = False) -> Select:
    """A query as a statement. Raises InvalidRequest for text that does not parse."""
    sql = text[tokens[0].start : tokens[-1].end]
    lookup = None if explain else _key_lookup(tokens)
    names = {token.name for token in tokens if token.kind in (TokenKind.WORD, TokenKind.QUOTED)}
    _check_series(tokens)
    tables = (lookup[0],) if lookup is not None else referenced_tables(sql)
    specials = frozenset(names & SPECIALS)
    return Select(
        sql,
        tables,
        specials,
        deleted_in_where="_deleted" in specials and _in_where(tokens, "_deleted"),
        lookup=lookup[1] if lookup is not None and not specials else None,
        explain=explain,
        analyze=analyze,
    )


def _in_where(tokens: Sequence[Token], name: str) -> bool:
    words = [token.upper for token in tokens]
    if "WHERE" not in words:
        return False
    behind = tokens[words.index("WHERE") :]
    return any(token.name == name for token in behind if token.kind in (TokenKind.WORD, TokenKind.QUOTED))


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
    tree = _tree(sql)
    ctes = {cte.alias for cte in tree.find_all(exp.CTE)}
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
    plain = render(sql, _null_params, caller=lambda word: "''")
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
    if details:
        first = details[0]
        return f"{first['description'].rstrip('.')} at {first['line']}:{first['col']}, near '{first['highlight'][:60]}'"
    return str(exc).split("\n")[0][:300]


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


# Text for the engine


def sql_literal(value: Any) -> str:
    """A Python value as an SQL literal of the engine."""
    match value:
        case None:
            return "NULL"
        case bool():
            return "TRUE" if value else "FALSE"
        case int() | Decimal():
            text = format(value, "f") if isinstance(value, Decimal) else str(value)
            return f"({text})" if text.startswith("-") else text
        case float():
            return f"CAST('{value!r}' AS DOUBLE)"
        case str():
            return "'" + value.replace("'", "''") + "'"
        case bytes() | bytearray() | memoryview():
            return f"X'{bytes(value).hex()}'"
        case dt.datetime():
            kind = "TIMESTAMP" if value.tzinfo is None else "TIMESTAMP WITH TIME ZONE"
            return f"CAST('{value.isoformat()}' AS {kind})"
        case dt.date():
            return f"CAST('{value.isoformat()}' AS DATE)"
        case dt.time():
            return f"CAST('{value.isoformat()}' AS TIME)"
        case uuid.UUID():
            return f"'{value}'"
        case list() | tuple() | dict():
            return "'" + msgspec.json.encode(value).decode().replace("'", "''") + "'"
        case _:
            raise InvalidRequest(f"a parameter of type {type(value).__name__} has no SQL form")


_COMPARISONS = frozenset({"=", "<>", "!=", "<", "<=", ">", ">="})
_DECIMAL_AGGREGATES = frozenset({"SUM", "MIN", "MAX"})


def exact_decimals(sql: str, columns: Set[str]) -> str:
    """The text with numbers as decimals where they are compared with one of these DECIMAL columns or its sum,
    minimum or maximum. As doubles, amounts over 73786.97 would not equal themselves."""
    if not columns or "." not in sql:
        return sql
    tokens = tokenize(sql)
    pieces: list[str] = []
    previous, place = 0, ""
    for at, token in enumerate(tokens):
        is_number = token.kind is TokenKind.NUMBER
        if is_number and (place in _NUMBER_PLACES or _stands_before(tokens, at, columns)):
            pieces += [sql[previous : token.start], _decimal_literal(token.text)]
            previous = token.end
        place = _place_after(tokens, at, place, columns)
    return "".join(pieces) + sql[previous:]


_NUMBER_PLACES = frozenset({"operand", "between", "list"})


def _decimal_literal(text: str) -> str:
    whole, _, fraction = text.replace("_", "").lstrip("0").partition(".")
    precision = max(len(whole) + len(fraction), 1)
    if "e" in text.lower() or not fraction or precision > _DECIMAL_DIGITS_MAX:
        return text
    return f"CAST('{whole}.{fraction}' AS DECIMAL({precision},{len(fraction)}))"


def _place_after(tokens: Sequence[Token], at: int, place: str, columns: Set[str]) -> str:
    """Where a scan is after the token: behind a decimal "column", or where an "operand" that is compared with it
    stands, alone, in BETWEEN or in a "list"; "" elsewhere."""
    token = tokens[at]
    if _ends_decimal(tokens, at, columns):
        return "column"
    match place:
        case "column" if token.text in _COMPARISONS:
            return "operand"
        case "column":
            return {"NOT": "column", "BETWEEN": "between", "IN": "list"}.get(token.upper, "")
        case "operand" | "between" | "list" if token.text in ("-", "+", "("):
            return place
        case "between" | "list" if token.text == ")":
            return place
        case "between" if token.upper == "AND":
            return "operand"
        case "between" if token.kind is TokenKind.NUMBER:
            return place
        case "list" if token.kind is TokenKind.NUMBER or token.text == ",":
            return place
        case _:
            return ""


def _ends_decimal(tokens: Sequence[Token], at: int, columns: Set[str]) -> bool:
    if tokens[at].text != ")":
        return tokens[at].kind in (TokenKind.WORD, TokenKind.QUOTED) and tokens[at].name in columns
    start = at - 4 if at >= 4 and tokens[at - 2].text == "." else at - 2
    is_call = start > 0 and tokens[start].text == "(" and tokens[start - 1].upper in _DECIMAL_AGGREGATES
    return is_call and _ends_decimal(tokens, at - 1, columns)


def _stands_before(tokens: Sequence[Token], at: int, columns: Set[str]) -> bool:
    """Whether the number at `at` is compared with a decimal column to its right."""
    at += 2 if at + 1 < len(tokens) and tokens[at + 1].text == ")" else 1
    if at + 1 >= len(tokens) or tokens[at].text not in _COMPARISONS:
        return False
    at += 1
    if tokens[at].upper in _DECIMAL_AGGREGATES and at + 2 < len(tokens) and tokens[at + 1].text == "(":
        at += 2
    if at + 2 < len(tokens) and tokens[at + 1].text == ".":
        at += 2
    return tokens[at].kind in (TokenKind.WORD, TokenKind.QUOTED) and tokens[at].name in columns


def _null_params(key: int | str) -> str:
    return "NULL"


def render(sql: str, parameter: Callable[[int | str], str], caller: Callable[[str], str]) -> str:
    """The text with parameters and caller functions replaced, and JSON operators as function calls."""
    if not any(mark in sql for mark in ("$", "?", ":", "->")) and "current_" not in sql.lower():
        return sql
    tokens = tokenize(sql)
    pieces: list[str] = []
    gaps: list[str] = []
    kinds: list[str] = []
    previous = tokens[0].start if tokens else 0
    at = 0
    while at < len(tokens):
        token = tokens[at]
        gap = sql[previous : token.start]
        previous = token.end
        key_exists = token.text == "?" and at + 1 < len(tokens) and tokens[at + 1].kind is TokenKind.STRING
        if (token.text in _JSON_OPERATORS or key_exists) and at + 1 < len(tokens) and pieces:
            function = "json_contains" if key_exists else _JSON_OPERATORS[token.text]
            at, previous, argument = _json_argument(sql, tokens, at + 1, parameter, caller)
            start = _operand_start(pieces, kinds)
            operand = "".join(gap_ + piece for gap_, piece in zip(gaps[start:], pieces[start:], strict=True)).strip()
            head = gaps[start]
            del pieces[start:], gaps[start:], kinds[start:]
            pieces.append(f"{function}({operand}, {argument})")
            gaps.append(head)
            kinds.append("primary")
            continue
        text, kind = token.text, token.text if token.kind is TokenKind.SYMBOL else token.kind.name
        if token.kind is TokenKind.PARAM:
            name = token.text[1:]
            text = parameter(int(name) if name.isdigit() else name)
        elif token.upper in _CALLER_WORDS and not (pieces and kinds[-1] == "."):
            text = caller(token.upper)
            if [one.text for one in tokens[at + 1 : at + 3]] == ["(", ")"]:
                at += 2
                previous = tokens[at].end
        pieces.append(text)
        gaps.append(gap)
        kinds.append(kind)
        at += 1
    return "".join(gap + piece for gap, piece in zip(gaps, pieces, strict=True))


def _json_argument(
    sql: str, tokens: Sequence[Token], at: int, parameter: Callable[[int | str], str], caller: Callable[[str], str]
) -> tuple[int, int, str]:
    """(index after it, offset after it, SQL) of what stands right of a JSON operator."""
    token = tokens[at]
    if token.text == "(":
        depth, end = 0, at
        while end < len(tokens):
            depth += (tokens[end].text == "(") - (tokens[end].text == ")")
            if depth == 0:
                break
            end += 1
        if depth:
            raise InvalidRequest("a parenthesis after a JSON operator is not closed")
        inner = render(sql[token.start : tokens[end].end], parameter, caller)
        return end + 1, tokens[end].end, f"CAST({inner} AS TEXT)"
    if token.text == "-" and at + 1 < len(tokens) and tokens[at + 1].kind is TokenKind.NUMBER:
        return at + 2, tokens[at + 1].end, f"'-{tokens[at + 1].text}'"
    if token.kind is TokenKind.NUMBER:
        return at + 1, token.end, f"'{token.text}'"
    if token.kind is TokenKind.PARAM:
        name = token.text[1:]
        value = parameter(int(name) if name.isdigit() else name)
        return at + 1, token.end, f"CAST({value} AS TEXT)"
    return at + 1, token.end, token.text


def _operand_start(pieces: Sequence[str], kinds: Sequence[str]) -> int:
    """Index of the first piece of the primary expression that ends the pieces."""
    at = len(pieces) - 1
    while True:
        if kinds[at] == ")":
            depth = 0
            while at >= 0:
                depth += (kinds[at] == ")") - (kinds[at] == "(")
                if depth == 0:
                    break
                at -= 1
            if at > 0 and kinds[at - 1] in ("WORD", "QUOTED"):
                at -= 1
        if at >= 2 and kinds[at - 1] in (".", "::"):
            at -= 2
            continue
        return max(at, 0)
