"""CREATE, ALTER, DROP, RESTORE and PURGE USER: parsing and running them."""

from __future__ import annotations

from typing import Any, assert_never

import msgspec

from kalamdb.errors import InvalidRequest, NotFound
from kalamdb.jobs import JobRequest, UnifiedJobManager
from kalamdb.result import Result
from kalamdb.sql import statements as st
from kalamdb.sql.caller import Caller
from kalamdb.sql.cursor import Cursor
from kalamdb.types import Role
from kalamdb.users import Actor, AuthType, Credentials, Users

_ROLE_ALIASES = {
    "admin": Role.DBA,
    "developer": Role.SERVICE,
    "analyst": Role.SERVICE,
    "viewer": Role.USER,
    "readonly": Role.USER,
}


def parse_user_statement(cursor: Cursor) -> st.UserStatement:
    """A statement about a user. Raises InvalidRequest."""
    verb = st.UserVerb(cursor.take().upper)
    cursor.expect("USER")
    if_exists = verb is st.UserVerb.DROP and cursor.accept("IF", "EXISTS")
    name = cursor.name_or_string("a user name")
    clauses: dict[st.UserClause, st.Expr] = {}
    match verb:
        case st.UserVerb.CREATE:
            _create_clauses(cursor, clauses)
        case st.UserVerb.ALTER:
            cursor.expect("SET")
            clause = st.UserClause(_word_of(cursor, (*_SETTABLE,)))
            clauses[clause] = _role(cursor) if clause is st.UserClause.ROLE else cursor.expression()
        case st.UserVerb.DROP:
            cursor.accept("CASCADE")
        case st.UserVerb.RESTORE | st.UserVerb.PURGE:
            pass
        case _:
            assert_never(verb)
    cursor.end()
    return st.UserStatement(cursor.sql, verb, name, clauses, if_exists)


_SETTABLE = (st.UserClause.PASSWORD, st.UserClause.ROLE, st.UserClause.EMAIL)
_STOPS = ("WITH", "ROLE", "EMAIL")


def _word_of(cursor: Cursor, wanted: tuple[str, ...]) -> str:
    for word in wanted:
        if cursor.accept(word):
            return word
    raise cursor.unexpected(" or ".join(wanted))


def _create_clauses(cursor: Cursor, clauses: dict[st.UserClause, st.Expr]) -> None:
    while cursor.token is not None:
        cursor.accept("WITH")
        kinds = (*_SETTABLE, st.UserClause.OAUTH, st.UserClause.INTERNAL)
        clause = st.UserClause(_word_of(cursor, kinds))
        if clause in clauses:
            raise InvalidRequest(f"CREATE USER states {clause} twice")
        match clause:
            case st.UserClause.ROLE:
                clauses[clause] = _role(cursor)
            case st.UserClause.INTERNAL:
                clauses[clause] = True
            case _:
                clauses[clause] = cursor.expression(*_STOPS)
    proofs = [one for one in clauses if one not in (st.UserClause.ROLE, st.UserClause.EMAIL)]
    if len(proofs) > 1:
        raise InvalidRequest(f"CREATE USER states {' and '.join(proofs)}; a user has one way to log in")


def _role(cursor: Cursor) -> Role:
    name = cursor.name_or_string("a role").lower()
    try:
        return _ROLE_ALIASES.get(name) or Role(name)
    except ValueError:
        raise InvalidRequest(f"role '{name}' is not one of {', '.join((*Role, *_ROLE_ALIASES))}") from None


class UserAdmin:
    """Runs statements about users."""

    def __init__(self, users: Users, manager: UnifiedJobManager) -> None:
        self._users = users
        self._manager = manager

    def run(self, statement: st.UserStatement, caller: Caller) -> Result:
        """Run one statement; the role of the caller was checked."""
        users, name = self._users, statement.name
        actor = Actor(caller.user, caller.role, caller.address)
        match statement.verb:
            case st.UserVerb.CREATE:
                role = statement.clauses.get(st.UserClause.ROLE, Role.USER)
                email = _text(statement, st.UserClause.EMAIL, caller)
                users.create(name, _credentials(statement, caller), role, email, actor=actor)
                return Result(message=f"User '{name}' created")
            case st.UserVerb.ALTER:
                self._alter(statement, caller, actor)
                return Result(message=f"User '{name}' updated")
            case st.UserVerb.DROP:
                try:
                    users.drop(name, actor=actor)
                except NotFound:
                    if statement.if_exists:
                        return Result(message=f"User '{name}' does not exist")
                    raise
                return Result(message=f"User '{name}' dropped (soft delete)")
            case st.UserVerb.RESTORE:
                users.restore(name, actor=actor)
                return Result(message=f"User '{name}' restored")
            case st.UserVerb.PURGE:
                cleanup = self._manager.prepare(JobRequest(job_type="user_cleanup", params={"user_id": name}))
                job_id = users.purge(name, cleanup, actor=actor)
                return Result(message=f"User '{name}' is being erased. Cleanup job: {job_id}")
            case _:
                assert_never(statement.verb)

    def _alter(self, statement: st.UserStatement, caller: Caller, actor: Actor) -> None:
        [(clause, value)] = statement.clauses.items()
        match clause:
            case st.UserClause.ROLE:
                self._users.set_role(statement.name, value, actor=actor)
            case st.UserClause.EMAIL:
                email = _text(statement, clause, caller)
                self._users.set_email(statement.name, email or "", actor=actor)
            case _:
                password = _text(statement, clause, caller)
                self._users.set_password(statement.name, password or "", actor=actor)


def _credentials(statement: st.UserStatement, caller: Caller) -> Credentials:
    if st.UserClause.PASSWORD in statement.clauses:
        password = _text(statement, st.UserClause.PASSWORD, caller)
        return Credentials(auth_type=AuthType.PASSWORD, password=password or "")
    if st.UserClause.OAUTH in statement.clauses:
        text = _text(statement, st.UserClause.OAUTH, caller) or ""
        try:
            data = msgspec.json.decode(text, type=dict[str, Any])
        except msgspec.DecodeError:
            raise InvalidRequest("WITH OAUTH needs a JSON object with 'provider' and 'subject'") from None
        return Credentials(auth_type=AuthType.OAUTH, auth_data=data)
    return Credentials()


def _text(statement: st.UserStatement, clause: st.UserClause, caller: Caller) -> str | None:
    if clause not in statement.clauses:
        return None
    value = caller.bind(statement.clauses[clause])
    if not isinstance(value, str):
        raise InvalidRequest(f"{clause} must be a string literal or a parameter that holds one")
    return value
