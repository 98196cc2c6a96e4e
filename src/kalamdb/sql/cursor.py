"""Reading tokens one after another, with errors that say what stands where."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from kalamdb.errors import InvalidRequest
from kalamdb.sql.statements import DEFAULT, EngineExpr, Expr, Param, TableName
from kalamdb.sql.tokens import Token, TokenKind, place

_INT_TEXT_MAX = 4000
_HEX = re.compile(r"(?:[0-9A-Fa-f]{2})*")


class Cursor:
    """A position in the tokens of one statement."""

    def __init__(self, text: str, tokens: Sequence[Token]) -> None:
        self.text = text
        self.tokens = tokens
        self.at = 0

    @property
    def token(self) -> Token | None:
        """The next token, None at the end."""
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    @property
    def sql(self) -> str:
        """Text of the whole statement."""
        return self.text[self.tokens[0].start : self.tokens[-1].end]

    def peek(self, *words: str) -> bool:
        """Whether the next tokens are these words or symbols."""
        for offset, word in enumerate(words):
            index = self.at + offset
            if index >= len(self.tokens):
                return False
            token = self.tokens[index]
            if token.upper != word and not (token.kind is TokenKind.SYMBOL and token.text == word):
                return False
        return True

    def accept(self, *words: str) -> bool:
        """Step over these words when they come next."""
        if self.peek(*words):
            self.at += len(words)
            return True
        return False

    def expect(self, *words: str) -> None:
        """Step over these words. Raises InvalidRequest when something else stands there."""
        for word in words:
            if not self.accept(word):
                raise self.unexpected(word)

    def unexpected(self, wanted: str) -> InvalidRequest:
        """The error for the next token."""
        token = self.token
        if token is None:
            return InvalidRequest(f"the statement ends where {wanted} is expected: {_short(self.sql)}")
        return InvalidRequest(
            f"'{_short(token.text)}' at {place(self.text, token.start)} stands where {wanted} is expected"
        )

    def take(self) -> Token:
        """The next token. Raises InvalidRequest at the end."""
        token = self.token
        if token is None:
            raise self.unexpected("more")
        self.at += 1
        return token

    def name(self, what: str = "a name") -> str:
        """An identifier."""
        token = self.token
        if token is None or token.kind not in (TokenKind.WORD, TokenKind.QUOTED):
            raise self.unexpected(what)
        self.at += 1
        if not token.name:
            raise InvalidRequest(f"an empty name stands at {place(self.text, token.start)}")
        return token.name

    def table(self) -> TableName:
        """[namespace.]table"""
        first = self.name("a table name")
        if self.accept("."):
            return TableName(first, self.name("a table name"))
        return TableName(None, first)

    def name_or_string(self, what: str) -> str:
        """An identifier or a string literal."""
        token = self.token
        if token is not None and token.kind is TokenKind.STRING:
            self.at += 1
            return token.string
        return self.name(what)

    def string(self, what: str) -> str:
        """A string literal."""
        token = self.token
        if token is None or token.kind is not TokenKind.STRING:
            raise self.unexpected(what)
        self.at += 1
        return token.string

    def whole(self, what: str) -> int:
        """A whole number, which may have a minus."""
        sign = -1 if self.accept("-") else 1
        token = self.token
        value = number(token.text) if token is not None and token.kind is TokenKind.NUMBER else None
        if not isinstance(value, int):
            raise self.unexpected(what)
        self.at += 1
        return sign * value

    def names(self) -> tuple[str, ...]:
        """(name, name, ...)"""
        self.expect("(")
        found = [self.name("a column name")]
        while self.accept(","):
            found.append(self.name("a column name"))
        self.expect(")")
        return tuple(found)

    def end(self) -> None:
        """Raise InvalidRequest unless the statement ends here."""
        if self.token is not None:
            raise self.unexpected("the end of the statement")

    def until(self, *stops: str) -> str:
        """Text up to one of these words or symbols outside parentheses, or the end."""
        start, depth = self.at, 0
        while (token := self.token) is not None:
            if depth == 0 and (token.upper in stops or (token.kind is TokenKind.SYMBOL and token.text in stops)):
                break
            if token.text in ("(", "["):
                depth += 1
            elif token.text in (")", "]"):
                depth -= 1
                if depth < 0:
                    break
            if token.upper == "CASE":
                depth += 1
            elif token.upper == "END":
                depth -= 1
            self.at += 1
        if start == self.at:
            raise self.unexpected("an expression")
        return self.text[self.tokens[start].start : self.tokens[self.at - 1].end]

    def span(self, start: int) -> list[Token]:
        """Tokens from index `start` up to here."""
        return list(self.tokens[start : self.at])

    def expression(self, *stops: str) -> Expr:
        """A literal, a parameter, DEFAULT, or the text of an expression."""
        start = self.at
        text = self.until(*stops)
        value = literal(self.span(start))
        return EngineExpr(text) if value is NOT_LITERAL else value


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


NOT_LITERAL = object()


def literal(tokens: Sequence[Token]) -> Any:
    """The value of tokens that are one literal, a parameter or DEFAULT; NOT_LITERAL for everything else."""
    if len(tokens) == 1:
        return _single(tokens[0])
    if len(tokens) == 2 and tokens[0].text in ("-", "+") and tokens[1].kind is TokenKind.NUMBER:
        value = number(tokens[1].text)
        return -value if tokens[0].text == "-" else value
    if len(tokens) == 2 and tokens[0].upper in ("DATE", "TIME", "TIMESTAMP", "UUID", "JSON"):
        return _single(tokens[1]) if tokens[1].kind is TokenKind.STRING else NOT_LITERAL
    return NOT_LITERAL


def _single(token: Token) -> Any:
    match token.kind:
        case TokenKind.STRING:
            if token.text[0] in "xX":
                return bytes.fromhex(token.string) if _HEX.fullmatch(token.string) else NOT_LITERAL
            return NOT_LITERAL if token.text[0] in "eEbBnN" else token.string
        case TokenKind.NUMBER:
            return number(token.text)
        case TokenKind.PARAM:
            return Param(int(token.text[1:]) if token.text[1:].isdigit() else token.text[1:])
        case TokenKind.WORD:
            return {"NULL": None, "TRUE": True, "FALSE": False, "DEFAULT": DEFAULT}.get(token.upper, NOT_LITERAL)
        case _:
            return NOT_LITERAL


def number(text: str) -> int | float | Decimal:
    """A number literal: int, Decimal with a point, float with an exponent."""
    plain = text.replace("_", "")
    if len(plain) > _INT_TEXT_MAX:
        raise InvalidRequest(f"the number {_short(plain)} has {len(plain)} digits, at most {_INT_TEXT_MAX} are allowed")
    if "e" in plain or "E" in plain:
        return float(plain)
    return Decimal(plain) if "." in plain else int(plain)
