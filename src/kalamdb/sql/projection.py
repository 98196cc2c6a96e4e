"""The SELECT list: what its columns are called, and what `*` means where system columns are named.

Works on tokens, so that the rest of the text reaches the engine as it was written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqlglot import exp

from kalamdb.sql.tokens import Token, TokenKind

_END_OF_LIST = frozenset(
    "FROM WHERE GROUP HAVING ORDER LIMIT OFFSET FETCH UNION EXCEPT INTERSECT WINDOW QUALIFY INTO".split()
)
_END_OF_FROM = _END_OF_LIST - {"FROM"}
_JOIN_WORDS = frozenset("JOIN INNER LEFT RIGHT FULL OUTER CROSS NATURAL SEMI ANTI LATERAL".split())


def quote(name: str) -> str:
    """An identifier in double quotes."""
    return '"' + name.replace('"', '""') + '"'


def name_columns(sql: str, tokens: Sequence[Token], tree: exp.Expression, start: int) -> str:
    """The text with an alias for each expression that has none: as it was written, words in lower case, and with a
    number behind it where two are the same. (The engine would show its own form of it, and refuses equal ones.)

    `tokens` are those of the text, whose first character stands at `start` of what they were made from.
    """
    items = _items(tokens)
    selects = tree.selects if isinstance(tree, exp.Query) else []
    if len(items) != len(selects):
        return sql
    pieces, previous = [], 0
    seen: dict[str, int] = {}
    for item, node in zip(items, selects, strict=True):
        if isinstance(node, exp.Alias) or node.is_star or item[-1].text == "*":
            continue
        text = _as_written(item)
        count = seen[text] = seen.get(text, -1) + 1
        if isinstance(node, exp.Column) and not count:
            continue
        pieces += [sql[previous : item[-1].end - start], f" AS {quote(f'{text}:{count}' if count else text)}"]
        previous = item[-1].end - start
    return "".join(pieces) + sql[previous:]


def _as_written(item: Sequence[Token]) -> str:
    out, end = "", item[0].start
    for token in item:
        text = token.text.lower() if token.kind is TokenKind.WORD else token.text
        out += (" " if token.start > end else "") + text
        end = token.end
    return out


def _items(tokens: Sequence[Token]) -> list[list[Token]]:
    """The items of the outermost SELECT list; none when it stands in parentheses."""
    depth = 0
    for at, token in enumerate(tokens):
        if depth == 0 and token.upper == "SELECT":
            return _split_list(tokens, at + 1)[0]
        depth += (token.text == "(") - (token.text == ")")
    return []


def _split_list(tokens: Sequence[Token], at: int) -> tuple[list[list[Token]], int]:
    """Items of the SELECT list that begins at `at`, and the index after it."""
    if at < len(tokens) and tokens[at].upper in ("DISTINCT", "ALL"):
        at += 1
        if at + 1 < len(tokens) and tokens[at].upper == "ON" and tokens[at + 1].text == "(":
            at = _closing(tokens, at + 1) + 1
    items: list[list[Token]] = [[]]
    depth = 0
    while at < len(tokens):
        token = tokens[at]
        if depth == 0 and token.upper in _END_OF_LIST and not _inside(tokens, at):
            break
        depth += (token.text in ("(", "[")) - (token.text in (")", "]"))
        if depth < 0:
            break
        if depth == 0 and token.text == ",":
            items.append([])
        else:
            items[-1].append(token)
        at += 1
    return [item for item in items if item], at


def _inside(tokens: Sequence[Token], at: int) -> bool:
    """Whether a word that may end a list belongs to IS DISTINCT FROM, or to * EXCEPT (...)."""
    before = tokens[at - 1]
    if tokens[at].upper == "FROM":
        return before.upper == "DISTINCT" and tokens[at - 2].upper in ("IS", "NOT")
    return tokens[at].upper == "EXCEPT" and before.text == "*"


def _closing(tokens: Sequence[Token], at: int) -> int:
    depth = 0
    for index in range(at, len(tokens)):
        depth += (tokens[index].text == "(") - (tokens[index].text == ")")
        if depth == 0:
            return index
    return len(tokens) - 1


# System columns


@dataclass(frozen=True, slots=True)
class _Source:
    """One item of a FROM clause."""

    alias: str
    """What the query calls it; '' for a sub-query without a name."""
    qualifier: str
    """What stands before `.*` of it."""
    is_table: bool

    def star(self, hidden: Sequence[str]) -> str:
        """All its columns but those that it hides."""
        hides = self.is_table and hidden
        return f"{self.qualifier}.*" + (f" EXCEPT ({', '.join(map(quote, hidden))})" if hides else "")


IsTable = Callable[[str | None, str], bool]
"""Whether [namespace.]name in a FROM clause is a table that has the columns to hide."""


def plain_stars(
    sql: str, tokens: Sequence[Token], is_table: IsTable, hidden: Sequence[str], *, outermost_whole: bool = False
) -> str:
    """The text in which `*` of a table does not stand for the columns `hidden`, which each table has, and in which
    `t.*` of `ns.t` is qualified as the engine wants it. What sub-queries and others than tables give stays whole;
    with `outermost_whole` that of the outermost SELECT too.
    """
    pieces, previous, depth, everywhere = [], 0, 0, hidden
    for at, token in enumerate(tokens):
        depth += (token.text == "(") - (token.text == ")")
        hidden = () if outermost_whole and depth == 0 else everywhere
        if token.upper != "SELECT":
            continue
        items, end = _split_list(tokens, at + 1)
        stars = [item for item in items if item[-1].text == "*" and (len(item) == 1 or item[-2].text == ".")]
        sources = _sources(tokens, end, is_table) if stars else []
        for item in stars:
            wanted = sources
            if len(item) > 1:
                wanted = [one for one in sources if len(item) == 3 and one.alias == item[0].name]
            elif not hidden or not any(one.is_table for one in sources):
                continue
            if not wanted or not all(one.alias for one in wanted):
                continue
            pieces += [sql[previous : item[0].start], ", ".join(one.star(hidden) for one in wanted)]
            previous = item[-1].end
    return "".join(pieces) + sql[previous:]


def _sources(tokens: Sequence[Token], at: int, is_table: IsTable) -> list[_Source]:
    """What the FROM clause at `at` names, in its order."""
    if at >= len(tokens) or tokens[at].upper != "FROM":
        return []
    found: list[_Source] = []
    expecting, at = True, at + 1
    while at < len(tokens):
        token = tokens[at]
        if token.upper in _END_OF_FROM or token.text == ")":
            break
        if token.text == "," or token.upper in _JOIN_WORDS:
            expecting = token.text == "," or token.upper in ("JOIN", "LATERAL") or expecting
            at += 1
        elif expecting:
            source, at = _source(tokens, at, is_table)
            found.append(source)
            expecting = False
        elif token.text == "(":
            at = _closing(tokens, at) + 1
        else:
            at += 1
    return found


def _source(tokens: Sequence[Token], at: int, is_table: IsTable) -> tuple[_Source, int]:
    alias, qualifier, found = "", "", False
    if tokens[at].text == "(":
        at = _closing(tokens, at) + 1
    else:
        alias, qualifier = tokens[at].name, quote(tokens[at].name)
        if at + 2 < len(tokens) and tokens[at + 1].text == ".":
            namespace, alias = alias, tokens[at + 2].name
            at, found = at + 2, is_table(namespace, alias)
            qualifier += "." + quote(alias)
        else:
            found = is_table(None, alias)
        at += 1
        if at < len(tokens) and tokens[at].text == "(":
            at, found = _closing(tokens, at) + 1, False
    if at < len(tokens) and tokens[at].upper == "AS":
        at += 1
    follows = at < len(tokens) and tokens[at].kind in (TokenKind.WORD, TokenKind.QUOTED)
    if follows and tokens[at].upper not in _END_OF_FROM | _JOIN_WORDS | {"ON", "USING"}:
        alias = tokens[at].name
        qualifier = quote(alias)
        at += 1
    return _Source(alias, qualifier, found), at
