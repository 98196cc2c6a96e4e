"""The text that the engine gets: parameters, the caller's functions and the clock as literals, JSON operators and
paths as function calls, our names of types as those of the engine."""

from __future__ import annotations

import datetime as dt
import re
import uuid
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import reduce
from typing import Any

import msgspec

from kalamdb.errors import InvalidRequest
from kalamdb.sql.functions import GENERATED_NAMES, JSON_ACCESS_NAMES, JSON_WHOLE_NAMES
from kalamdb.sql.tokens import Token, TokenKind, tokenize
from kalamdb.tables.codec import is_unicode, shown

CALLER_WORDS = frozenset({"CURRENT_USER", "CURRENT_USER_ID", "CURRENT_ROLE"})
"""Stand with or without parentheses."""
CLOCK_WORDS = frozenset({"CURRENT_TIMESTAMP", "CURRENT_DATE", "CURRENT_TIME"})
"""Stand with or without parentheses; NOW() needs them."""

_JSON_OPERATORS = {"->": "json_get", "->>": "json_as_text"}
_JSON_NAMES = JSON_ACCESS_NAMES | JSON_WHOLE_NAMES
_NEEDED = re.compile(
    r"[$?:]|->|current_|\bnow\s*\(|\bcast\s*\(|\btimestamp\b|json_|" + "|".join(GENERATED_NAMES), re.IGNORECASE
)
_ENGINE_TYPES = {
    **dict.fromkeys(("JSON", "JSONB", "UUID", "CLOB", "NVARCHAR", "TINYTEXT", "MEDIUMTEXT", "LONGTEXT"), "VARCHAR"),
    **dict.fromkeys(("FILE", "CHARACTER", "STRING", "TEXT"), "VARCHAR"),
    **dict.fromkeys(("BYTES", "BINARY", "VARBINARY", "BLOB", "BYTEA"), "BYTEA"),
    **dict.fromkeys(("MEDIUMINT", "SIGNED"), "INT"),
    **dict.fromkeys(("DATETIME", "TIMESTAMPTZ"), "TIMESTAMP(6) WITH TIME ZONE"),
    "INT64": "BIGINT",
    "FLOAT64": "DOUBLE",
    "DEC": "DECIMAL",
    "TIMESTAMP": "TIMESTAMP(6)",
}  # fmt: skip
_DECIMAL_DIGITS_MAX = 38
_SIZED = frozenset({"DECIMAL"})
"""Engine types that keep the size behind them; the others have their own."""


def sql_literal(value: Any) -> str:
    """A Python value as an SQL literal of the engine."""
    match value:
        case None:
            return "NULL"
        case bool():
            return "TRUE" if value else "FALSE"
        case int() if -(1 << 63) <= value < 1 << 63:
            return f"({value})" if value < 0 else str(value)
        case int() | Decimal():
            return _decimal_literal(Decimal(value))
        case float():
            return f"CAST('{value!r}' AS DOUBLE)"
        case str():
            if not is_unicode(value):
                raise InvalidRequest(f"the parameter {shown(value)} holds half of a surrogate pair, which is not text")
            return "'" + value.replace("'", "''") + "'"
        case bytes() | bytearray() | memoryview():
            return f"X'{bytes(value).hex()}'"
        case dt.datetime():
            kind = "TIMESTAMP(6)" if value.tzinfo is None else "TIMESTAMP(6) WITH TIME ZONE"
            return f"CAST('{value.isoformat()}' AS {kind})"
        case dt.date():
            return f"CAST('{value.isoformat()}' AS DATE)"
        case dt.time():
            return f"CAST('{value.isoformat()}' AS TIME)"
        case uuid.UUID():
            return f"'{value}'"
        case list() | tuple() | dict():
            try:
                return sql_literal(msgspec.json.encode(value).decode())
            except (TypeError, ValueError, RecursionError) as exc:
                raise InvalidRequest(f"the parameter {shown(value)} has no JSON form: {exc}") from exc
        case _:
            raise InvalidRequest(f"a parameter of type {type(value).__name__} has no SQL form")


def _decimal_literal(value: Decimal) -> str:
    """Exact up to the 38 digits of DECIMAL, beyond them the nearest DOUBLE."""
    if not value.is_finite():
        raise InvalidRequest(f"the parameter {value} is not a finite number")
    text = format(value, "f")
    _, _, fraction = text.partition(".")
    digits = len(text.lstrip("-").replace(".", "").lstrip("0")) or 1
    precision = max(digits, len(fraction))
    kind = f"DECIMAL({precision}, {len(fraction)})" if precision <= _DECIMAL_DIGITS_MAX else "DOUBLE"
    return f"CAST('{text}' AS {kind})"


def render(sql: str, parameter: Callable[[int | str], str], caller: Callable[[str], str]) -> str:
    """The text for the engine. `parameter` gives the literal of a parameter, `caller` that of a word of the caller
    or of the clock (in capitals; NOW is CURRENT_TIMESTAMP)."""
    if _NEEDED.search(sql) is None:
        return sql
    return _Rendering(sql, parameter, caller).text()


class _Rendering:
    """One pass over the tokens. A piece is what goes out for one or more tokens; kinds tell operands apart."""

    def __init__(self, sql: str, parameter: Callable[[int | str], str], caller: Callable[[str], str]) -> None:
        self._sql = sql
        self._tokens = tokenize(sql)
        self._parameter = parameter
        self._caller = caller
        self._pieces: list[str] = []
        self._gaps: list[str] = []
        self._kinds: list[str] = []
        self._casts: list[bool] = []
        """For each open parenthesis whether it is that of a CAST."""

    def text(self) -> str:
        tokens, at = self._tokens, 0
        previous = tokens[0].start if tokens else 0
        while at < len(tokens):
            gap = self._sql[previous : tokens[at].start]
            at = self._operator(at, gap) or self._call(at, gap) or self._type(at, gap) or self._plain(at, gap)
            previous = tokens[at - 1].end
        return "".join(gap + piece for gap, piece in zip(self._gaps, self._pieces, strict=True))

    def _put(self, gap: str, piece: str, kind: str) -> None:
        self._gaps.append(gap)
        self._pieces.append(piece)
        self._kinds.append(kind)

    def _is(self, at: int, text: str) -> bool:
        return at < len(self._tokens) and self._tokens[at].text == text

    def _plain(self, at: int, gap: str) -> int:
        token = self._tokens[at]
        if token.text == "(":
            self._casts.append(bool(self._pieces) and self._pieces[-1].upper() in ("CAST", "TRY_CAST"))
        elif token.text == ")" and self._casts:
            self._casts.pop()
        text = self._value(token) if token.kind is TokenKind.PARAM else token.text
        self._put(gap, text, token.text if token.kind is TokenKind.SYMBOL else token.kind.name)
        return at + 1

    def _value(self, token: Token) -> str:
        name = token.text[1:]
        return self._parameter(int(name) if name.isdigit() else name)

    # JSON operators

    def _operator(self, at: int, gap: str) -> int:
        token, tokens = self._tokens[at], self._tokens
        key_exists = token.text == "?" and at + 1 < len(tokens) and tokens[at + 1].kind is TokenKind.STRING
        if not (token.text in _JSON_OPERATORS or key_exists) or at + 1 >= len(tokens) or not self._pieces:
            return 0
        function = "json_contains" if key_exists else _JSON_OPERATORS[token.text]
        after, argument = self._argument(at + 1)
        start = _operand_start(self._pieces, self._kinds)
        parts = zip(self._gaps[start:], self._pieces[start:], strict=True)
        operand = "".join(gap_ + piece for gap_, piece in parts).strip()
        head = self._gaps[start]
        del self._pieces[start:], self._gaps[start:], self._kinds[start:]
        self._put(head, f"{function}({operand}, {argument})", "primary")
        return after

    def _argument(self, at: int) -> tuple[int, str]:
        """(index after it, SQL) of what stands right of a JSON operator."""
        token = self._tokens[at]
        if token.text == "(":
            end = self._closing(at)
            inner = self._inner(token.start, self._tokens[end].end)
            return end + 1, f"CAST({inner} AS VARCHAR)"
        if token.text == "-" and at + 1 < len(self._tokens) and self._tokens[at + 1].kind is TokenKind.NUMBER:
            return at + 2, f"'-{self._tokens[at + 1].text}'"
        if token.kind is TokenKind.NUMBER:
            return at + 1, f"'{token.text}'"
        if token.kind is TokenKind.PARAM:
            return at + 1, f"CAST({self._value(token)} AS VARCHAR)"
        return at + 1, token.text

    def _closing(self, at: int) -> int:
        depth = 0
        for index in range(at, len(self._tokens)):
            depth += (self._tokens[index].text == "(") - (self._tokens[index].text == ")")
            if depth == 0:
                return index
        raise InvalidRequest(f"the parenthesis behind '{self._tokens[at - 1].text[:60]}' is not closed")

    def _inner(self, start: int, end: int) -> str:
        return render(self._sql[start:end], self._parameter, self._caller)

    # Functions

    def _call(self, at: int, gap: str) -> int:
        token = self._tokens[at]
        word = token.upper
        if not word or (self._kinds and self._kinds[-1] == "."):
            return 0
        empty = self._is(at + 1, "(") and self._is(at + 2, ")")
        if word in CALLER_WORDS or word in CLOCK_WORDS or (word == "NOW" and empty):
            self._put(gap, self._caller("CURRENT_TIMESTAMP" if word == "NOW" else word), "primary")
            return at + 3 if empty else at + 1
        name = word.lower()
        if name in GENERATED_NAMES and empty:
            # The argument tells the function how many values are wanted, and keeps it from being folded.
            self._put(gap, f"{name}(random())", "primary")
            return at + 3
        if name in _JSON_NAMES and self._is(at + 1, "("):
            end = self._closing(at + 1)
            self._put(gap, self._json_call(name, at + 2, end), "primary")
            return end + 1
        return 0

    def _json_call(self, name: str, at: int, end: int) -> str:
        """A JSON function whose path may have several steps, as nested calls of one step."""
        arguments: list[str] = []
        depth, start = 0, at
        for index in range(at, end + 1):
            token = self._tokens[index]
            if index == end or (depth == 0 and token.text == ","):
                if index > start:
                    arguments.append(self._inner(self._tokens[start].start, self._tokens[index - 1].end))
                start = index + 1
            depth += (token.text == "(") - (token.text == ")")
        steps = 0 if name in JSON_WHOLE_NAMES else 1
        if len(arguments) <= 1 + steps:
            return f"{name}({', '.join(arguments)})"
        document, path = arguments[0], arguments[1:]
        last = path[len(path) - steps :]
        document = reduce(lambda inner, step: f"json_get({inner}, {step})", path[: len(path) - steps], document)
        return f"{name}({', '.join([document, *last])})"

    # Types

    def _type(self, at: int, gap: str) -> int:
        token = self._tokens[at]
        engine = _ENGINE_TYPES.get(token.upper)
        if engine is None:
            return 0
        if token.upper == "TIMESTAMP" and at + 1 < len(self._tokens):
            following = self._tokens[at + 1]
            if following.kind is TokenKind.STRING:
                self._put(gap, f"CAST({following.text} AS TIMESTAMP(6))", "primary")
                return at + 2
        in_cast = bool(self._casts) and self._casts[-1] and bool(self._pieces) and self._pieces[-1].upper() == "AS"
        if not in_cast and not (self._kinds and self._kinds[-1] == "::"):
            return 0
        after = at + 1
        if after < len(self._tokens) and self._tokens[after].upper == "VARYING":
            after += 1
        if self._is(after, "(") and engine not in _SIZED:
            sized = self._closing(after)
            if token.upper == "TIMESTAMP":
                engine = "TIMESTAMP" + self._sql[self._tokens[after].start : self._tokens[sized].end]
            after = sized + 1
        self._put(gap, engine, "WORD")
        return after


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
