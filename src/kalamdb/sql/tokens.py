"""SQL text as tokens, the limits that are checked before anything is parsed, and the statement splitter."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from kalamdb.errors import InvalidRequest, LimitExceeded


class TokenKind(IntEnum):
    """What a token is."""

    WORD = 1
    QUOTED = 2
    """An identifier in double quotes or backticks."""
    NUMBER = 3
    STRING = 4
    PARAM = 5
    SYMBOL = 6


class Token(NamedTuple):
    """One token; `text` as written, `start` and `end` its place in the statement text."""

    kind: TokenKind
    text: str
    start: int
    end: int

    @property
    def upper(self) -> str:
        """The word in capitals; '' for everything else than words."""
        return self.text.upper() if self.kind is TokenKind.WORD else ""

    @property
    def name(self) -> str:
        """The identifier that the token names: lower case unless it was quoted."""
        if self.kind is TokenKind.QUOTED:
            quote = self.text[0]
            return self.text[1:-1].replace(quote * 2, quote)
        return self.text.lower()

    @property
    def string(self) -> str:
        """The value of a string literal."""
        if self.text.startswith("$"):
            tag = self.text.index("$", 1) + 1
            return self.text[tag:-tag]
        return self.text[self.text.index("'") + 1 : -1].replace("''", "'")


@dataclass(frozen=True, slots=True)
class SqlLimits:
    """Limits of one SQL text. Literals of VALUES and IN lists do not count as tokens."""

    bytes_max: int = 1 << 20
    tokens_max: int = 20_000
    depth_max: int = 256
    set_operands_max: int = 64


_TOKEN = re.compile(
    r"""(?P<space>\s+|--[^\n]*|/\*(?:[^*]|\*(?!/))*\*/)
      |(?P<string>[eE]'(?:[^'\\]|''|\\.)*'|[xXbBnN]?'(?:[^']|'')*'|\$(?P<tag>[A-Za-z_]*)\$.*?\$(?P=tag)\$)
      |(?P<quoted>"(?:[^"]|"")*"|`(?:[^`]|``)*`)
      |(?P<number>(?:\d[\d_]*(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)
      |(?P<param>\$\d+|:[A-Za-z_]\w*|\?(?![|&?]))
      |(?P<word>[^\W\d]\w*)
      |(?P<symbol><=|>=|<>|!=|::|->>|->|\|\||\?\||\?&|!~\*|!~|~\*|=>|[^\s\w])
    """,
    re.VERBOSE | re.DOTALL,
)
_KINDS = {
    "string": TokenKind.STRING,
    "quoted": TokenKind.QUOTED,
    "number": TokenKind.NUMBER,
    "param": TokenKind.PARAM,
    "word": TokenKind.WORD,
    "symbol": TokenKind.SYMBOL,
}
_SURROGATE = re.compile("[\ud800-\udfff]")
_QUERY_DEPTH_MAX = 16
"""The engine's optimizer takes 15 times longer for every four levels of EXISTS or IN, and crashes above 400."""
_LOGICAL = frozenset({"AND", "OR"})
_CHAIN_SYMBOLS = frozenset("+ - * / % || = <> != < > <= >= -> ->> ~ ^ & | :: !~ ~* !~*".split())
_CHAIN_WORDS = frozenset({"NOT", "LIKE", "ILIKE", "IS"})
_SET_WORDS = frozenset({"UNION", "EXCEPT", "INTERSECT"})
_LITERALS = frozenset({TokenKind.NUMBER, TokenKind.STRING, TokenKind.PARAM})
_LITERAL_WORDS = frozenset({"NULL", "TRUE", "FALSE", "DEFAULT"})
_LIST_SYMBOLS = frozenset(",()-")
_UNCOUNTED_MIN = 5
"""Tokens after the fifth in a row of literals, commas, signs and parentheses are a list."""


def tokenize(sql: str) -> list[Token]:
    """All tokens without space and comments. Raises InvalidRequest for an unterminated string or comment."""
    tokens: list[Token] = []
    position = 0
    for match in _TOKEN.finditer(sql):
        if match.start() != position:
            break
        position = match.end()
        kind = match.lastgroup if match.lastgroup != "tag" else "string"
        text = match.group()
        if kind == "space":
            if "/*" in text and "/*" in text[2:] and text[0] == "/":
                raise InvalidRequest(f"a comment at {place(sql, match.start())} holds another '/*'; end it before")
            continue
        if kind == "symbol" and text in "'\"`":
            raise InvalidRequest(f"a quote that begins at {place(sql, match.start())} is not closed")
        if text == "/" and sql.startswith("/*", match.start()):
            raise InvalidRequest(f"a comment that begins at {place(sql, match.start())} is not closed")
        assert kind is not None
        tokens.append(Token(_KINDS[kind], text, match.start(), match.end()))
    if position != len(sql):
        raise InvalidRequest(f"character {sql[position]!r} at {place(sql, position)} is not SQL")
    return tokens


def place(sql: str, offset: int) -> str:
    """line:column of an offset, from 1."""
    line = sql.count("\n", 0, offset) + 1
    return f"{line}:{offset - (sql.rfind(chr(10), 0, offset) + 1) + 1}"


def check_size(sql: str, limits: SqlLimits) -> None:
    """Raise LimitExceeded for a text above limits.sql_bytes_max, InvalidRequest for what is not Unicode text."""
    size = len(sql) if sql.isascii() else len(sql.encode("utf-8", "surrogatepass"))
    if size > limits.bytes_max:
        raise LimitExceeded(
            f"SQL query too long: {size} bytes, at most {limits.bytes_max} are allowed (limits.sql_bytes_max)"
        )
    if "\x00" in sql:
        raise InvalidRequest(f"the SQL text holds a NUL character at {place(sql, sql.index(chr(0)))}")
    half = _SURROGATE.search(sql) if not sql.isascii() else None
    if half is not None:
        raise InvalidRequest(f"the SQL text holds half of a surrogate pair at {place(sql, half.start())}")


def check_shape(tokens: Sequence[Token], limits: SqlLimits) -> None:
    """Raise LimitExceeded for a statement that is too long, too deep, or joins too many sets."""
    outer = deepest = counted = operands = literals = logical = chain = queries = queries_deepest = 0
    is_query = True
    open_: list[tuple[int, int, bool]] = []
    for token in tokens:
        word = token.upper
        literal = token.kind in _LITERALS or token.text in _LIST_SYMBOLS or word in _LITERAL_WORDS
        literals = literals + 1 if literal else 0
        counted += not literal or literals <= _UNCOUNTED_MIN
        if token.text in ("(", "[") or word == "CASE":
            chain += token.text == "["
            open_.append((logical, chain, is_query))
            outer += logical + chain + 1
            logical, chain, is_query = 0, 0, False
        elif (token.text in (")", "]") or word == "END") and open_:
            queries -= is_query
            logical, chain, is_query = open_.pop()
            outer -= logical + chain + 1
        elif word in _LOGICAL:
            logical, chain = logical + 1, 0
        elif token.text in _CHAIN_SYMBOLS or word in _CHAIN_WORDS:
            chain += 1
        elif token.text == "," or word in ("SELECT", "FROM", "WHERE", "SET", "VALUES"):
            logical = chain = 0
        if word == "SELECT" and not is_query:
            is_query = True
            queries += 1
            queries_deepest = max(queries_deepest, queries)
        operands += word in _SET_WORDS
        deepest = max(deepest, outer + logical + chain)
    if deepest > limits.depth_max:
        raise LimitExceeded(
            f"the statement nests or chains operators {deepest} deep, at most {limits.depth_max} are allowed "
            "(limits.sql_depth_max); use IN lists or join a VALUES list instead"
        )
    if queries_deepest > _QUERY_DEPTH_MAX:
        raise LimitExceeded(
            f"the statement nests sub-queries {queries_deepest} deep, at most {_QUERY_DEPTH_MAX} are allowed; "
            "use WITH or joins instead"
        )
    if operands >= limits.set_operands_max:
        raise LimitExceeded(
            f"the statement joins {operands + 1} SELECTs by UNION, EXCEPT or INTERSECT, "
            f"at most {limits.set_operands_max} are allowed (limits.sql_set_operands_max)"
        )
    if counted > limits.tokens_max:
        raise LimitExceeded(
            f"the statement has {counted} tokens, at most {limits.tokens_max} are allowed (limits.sql_tokens_max)"
        )


def split(tokens: Sequence[Token]) -> Iterator[list[Token]]:
    """The tokens of each statement; `;` separates."""
    current: list[Token] = []
    for token in tokens:
        if token.text == ";" and token.kind is TokenKind.SYMBOL:
            if current:
                yield current
            current = []
        else:
            current.append(token)
    if current:
        yield current


def number_params(sql: str, tokens: Sequence[Token]) -> str:
    """The text with each positional `?` as `$1`, `$2`, ...; `?` before a string is the JSON operator."""
    pieces: list[str] = []
    previous = number = 0
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        if token.text == "?" and (following is None or following.kind is not TokenKind.STRING):
            number += 1
            pieces += [sql[previous : token.start], f"${number}"]
            previous = token.end
    return "".join(pieces) + sql[previous:]
