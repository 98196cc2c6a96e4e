"""Numbers that are compared with DECIMAL columns, as decimals: the engine would take them for doubles."""

from __future__ import annotations

from collections.abc import Sequence, Set

from kalamdb.sql.tokens import Token, TokenKind, tokenize

_DECIMAL_DIGITS_MAX = 38
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
