"""EXECUTE AS USER: who may act for whom, and what is told about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kalamdb.errors import Denied, InvalidRequest
from kalamdb.sql import statements as st
from kalamdb.sql.caller import Caller
from kalamdb.sql.cursor import Cursor
from kalamdb.sql.tokens import Token
from kalamdb.types import Role
from kalamdb.users import Actor, Users

_ONE_STATEMENT = "EXECUTE AS USER takes exactly one statement in parentheses: EXECUTE AS USER 'name' (SELECT ...)"
_MAY_ACT_FOR = {
    Role.ANONYMOUS: frozenset[Role](),
    Role.USER: frozenset[Role](),
    Role.SERVICE: frozenset({Role.USER, Role.SERVICE, Role.ANONYMOUS}),
    Role.DBA: frozenset({Role.USER, Role.SERVICE, Role.ANONYMOUS, Role.DBA}),
    Role.SYSTEM: frozenset(Role),
}
"""The roles of others that a role may act for; oneself is always allowed to it, but for anonymous."""


def parse_execute_as(cursor: Cursor) -> tuple[str, Sequence[Token]]:
    """The user and the tokens of the inner statement. Raises InvalidRequest."""
    cursor.expect("EXECUTE", "AS", "USER")
    user = cursor.name_or_string("a user name")
    inner = cursor.tokens[cursor.at + 1 : -1]
    depth = 0
    for token in cursor.tokens[cursor.at :]:
        if depth == 0 and token.text != "(":
            raise InvalidRequest(_ONE_STATEMENT)
        depth += (token.text == "(") - (token.text == ")")
        if depth == 0 and token is not cursor.tokens[-1]:
            raise InvalidRequest(_ONE_STATEMENT)
    if depth != 0 or not inner:
        raise InvalidRequest(_ONE_STATEMENT)
    return user, inner


def check_inner(statement: st.Statement) -> None:
    """Raise InvalidRequest for a statement that cannot stand inside."""
    if isinstance(statement, st.ExecuteAs | st.TransactionControl | st.UseNamespace):
        raise InvalidRequest(f"'{' '.join(statement.sql.split()[:3])[:60]}' cannot stand inside EXECUTE AS USER")


class Impersonation:
    """Decides who may act for whom, and writes it into the audit log."""

    def __init__(self, users: Users) -> None:
        self._users = users

    def check(self, statement: st.ExecuteAs, caller: Caller) -> Caller:
        """The target as caller: with role user, whatever its own. It need not have a record. Raises Denied,
        for a user that was dropped too."""
        target = statement.user
        if not 0 < len(target) <= st.USER_LENGTH_MAX:
            raise InvalidRequest(f"EXECUTE AS USER needs a name of 1 to {st.USER_LENGTH_MAX} characters")
        found = self._users.find(target)
        role = Role.USER if found is None else found.role
        oneself = target == caller.user and caller.has(Role.USER)
        if not oneself and role not in _MAY_ACT_FOR[caller.role]:
            self._users.audit(_actor(caller), "EXECUTE_AS_USER_DENIED", target, "role_not_allowed")
            raise Denied(f"role {caller.role} may not act for user '{target}' of role {role}")
        self._users.refuse_gone(target)
        return replace(caller, user=target, role=Role.USER, acts_for_another=True)

    def note(self, statement: st.ExecuteAs, caller: Caller) -> None:
        """Tell the audit log that it runs."""
        self._users.audit(_actor(caller), "EXECUTE_AS_USER", statement.user)


def _actor(caller: Caller) -> Actor:
    return Actor(caller.user, caller.role, caller.address)
