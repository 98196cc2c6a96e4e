"""Who asks, with which parameters, until when; and what each role may do (surface reference 5.2)."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, assert_never

from kalamdb.errors import Denied, InvalidRequest
from kalamdb.schema import TableDef
from kalamdb.sql import statements as st
from kalamdb.sql.render import sql_literal
from kalamdb.types import SHARED_SCOPE, AccessLevel, Role, Scope, TableKind

_RANK = {Role.ANONYMOUS: -1, Role.USER: 0, Role.SERVICE: 1, Role.DBA: 2, Role.SYSTEM: 3}

Params = Sequence[Any] | Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Served:
    """How a server shapes the SELECTs of its clients; 0 means without a limit."""

    limit_default: int = 0
    """Rows of a SELECT without LIMIT."""
    limit_max: int = 0
    """Rows of one with it."""
    sorted: bool = False
    """Without ORDER BY rows come by primary key, without one by `_seq`, when those columns are in the output."""
    system_columns: bool = False
    """`SELECT *` of one table shows `_seq` and `_deleted`."""


@dataclass(frozen=True, slots=True)
class Caller:
    """One statement's surroundings."""

    user: str
    role: Role
    namespace: str
    params: Params = None
    now_ms: int = 0
    """What NOW() is: milliseconds since 1970."""
    deadline: Callable[[], bool] = lambda: False
    cancelled: Callable[[], bool] = lambda: False
    served: Served | None = None
    address: str | None = None
    """IP address that the request came from; None for calls of the program itself."""
    acts_for_another: bool = False
    """Inside EXECUTE AS USER: `user` is the target."""

    def scope(self, definition: TableDef) -> Scope:
        """Whose rows of a table the caller works on."""
        return SHARED_SCOPE if definition.kind is TableKind.SHARED else Scope(self.user)

    def has(self, role: Role) -> bool:
        """Whether the caller's role is at least `role`."""
        return _RANK[self.role] >= _RANK[role]

    def bind(self, value: st.Expr) -> Any:
        """The value of a literal or parameter."""
        return self.parameter(value.key) if isinstance(value, st.Param) else value

    def parameter(self, key: int | str) -> Any:
        """Value of a parameter by its 1-based number or its name. Raises InvalidRequest."""
        params = self.params
        if isinstance(key, int):
            if not isinstance(params, (list, tuple)) and (
                isinstance(params, (str, bytes)) or not isinstance(params, Sequence)
            ):
                raise InvalidRequest(f"parameter ${key} was not given: params must be a list or tuple that holds it")
            if not 1 <= key <= len(params):
                raise InvalidRequest(f"parameter ${key} was not given: there are {len(params)} parameters")
            return params[key - 1]
        if not isinstance(params, Mapping):
            raise InvalidRequest(f"parameter :{key} was not given: params must be a dict that holds it")
        if key not in params:
            raise InvalidRequest(f"parameter :{key} was not given; there are {', '.join(map(str, params)) or 'none'}")
        return params[key]

    def check_parameters(self, wanted: Set[int | str]) -> None:
        """Raise InvalidRequest unless each parameter in `wanted` was given, and no more by number."""
        for key in wanted:
            self.parameter(key)
        if self.params is not None and not isinstance(self.params, Mapping):
            used = max((key for key in wanted if isinstance(key, int)), default=0)
            if len(self.params) > used:
                raise InvalidRequest(f"{len(self.params)} parameters were given, the SQL uses {used}")

    def parameter_sql(self, key: int | str) -> str:
        """A parameter as an SQL literal."""
        return sql_literal(self.parameter(key))

    @property
    def now(self) -> dt.datetime:
        """What NOW() is, in UTC without a zone."""
        return dt.datetime(1970, 1, 1) + dt.timedelta(milliseconds=self.now_ms)

    def function_sql(self, word: str) -> str:
        """A word of the caller (CURRENT_USER, CURRENT_USER_ID, CURRENT_ROLE) or of the clock (CURRENT_TIMESTAMP,
        CURRENT_DATE, CURRENT_TIME) as an SQL literal."""
        match word:
            case "CURRENT_ROLE":
                return sql_literal(str(self.role))
            case "CURRENT_TIMESTAMP":
                return sql_literal(self.now)
            case "CURRENT_DATE":
                return sql_literal(self.now.date())
            case "CURRENT_TIME":
                return sql_literal(self.now.time())
            case _:
                return sql_literal(self.user)


def required_role(statement: st.Statement) -> Role:
    """The lowest role that may run a statement; access to its tables is checked apart."""
    match statement:
        case st.CreateNamespace() | st.DropNamespace() | st.AlterNamespace() | st.CreateView() | st.DropView():
            return Role.DBA
        case st.DropTable() | st.TruncateTable() | st.SetOption():
            return Role.DBA
        case st.UserStatement() | st.ScheduleStatement() | st.BackupStatement() | st.StorageStatement():
            return Role.DBA
        case st.KillQuery() | st.KillLiveQuery():
            return Role.DBA
        case st.ControlJob() | st.ControlQueue() | st.LimitQueue() | st.ExplainJob() | st.CreateJob():
            return Role.DBA
        case st.Show(kind=st.ShowKind.ALL | st.ShowKind.COLUMNS | st.ShowKind.JOB):
            return Role.DBA
        case st.Show(kind=st.ShowKind.MANIFEST) | st.Maintain():
            return Role.SERVICE
        case st.Select(explain=True):
            return Role.DBA
        case _:
            return Role.USER


def check_role(caller: Caller, statement: st.Statement) -> None:
    """Raise Denied when the caller's role does not suffice."""
    role = required_role(statement)
    if not caller.has(role):
        explain = "EXPLAIN " if isinstance(statement, st.Select) else ""
        words = explain + " ".join(statement.sql.split()[:3])
        raise Denied(f"Admin privileges required: '{words}' needs role {role}, the caller has {caller.role}")


def may_read(caller: Caller, definition: TableDef) -> bool:
    """Whether the caller may read a table. Raises InvalidRequest for a SHARED one inside EXECUTE AS USER."""
    if not caller.has(Role.USER):
        return False
    if definition.kind is not TableKind.SHARED:
        return True
    _refuse_shared(caller)
    match definition.options.access_level:
        case AccessLevel.PUBLIC:
            return True
        case AccessLevel.PRIVATE | AccessLevel.RESTRICTED:
            return caller.has(Role.SERVICE)
        case AccessLevel.DBA:
            return caller.has(Role.DBA)
        case other:
            assert_never(other)


def may_write(caller: Caller, definition: TableDef) -> bool:
    """Whether the caller may write a table. Raises InvalidRequest for a SHARED one inside EXECUTE AS USER."""
    if definition.kind is not TableKind.SHARED:
        return caller.has(Role.USER)
    _refuse_shared(caller)
    needed = Role.DBA if definition.options.access_level is AccessLevel.DBA else Role.SERVICE
    return caller.has(needed)


def may_create(caller: Caller, kind: TableKind) -> bool:
    """Whether the caller may create or alter a table of a kind. Raises InvalidRequest for SHARED ones inside
    EXECUTE AS USER."""
    if kind is not TableKind.SHARED:
        return caller.has(Role.USER)
    _refuse_shared(caller)
    return caller.has(Role.SERVICE)


def _refuse_shared(caller: Caller) -> None:
    if caller.acts_for_another:
        raise InvalidRequest("EXECUTE AS USER is not allowed on SHARED tables: their rows belong to no user")


def denied(caller: Caller, verb: str, definition: TableDef) -> Denied:
    """The error for a table that the caller may not use so."""
    return Denied(
        f"role {caller.role} may not {verb} {definition.kind.upper()} table '{definition.table_id}' "
        f"(access level {definition.options.access_level})"
    )
