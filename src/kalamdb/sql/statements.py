"""What a statement says, as data. Parsed once; executed by `session`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from kalamdb.alter import AlterChange, ColumnSpec
from kalamdb.schema import Check, TableOptions
from kalamdb.types import TableKind


@dataclass(frozen=True, slots=True)
class TableName:
    """A table as the statement names it."""

    namespace: str | None
    name: str


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter: its 1-based number, or its name."""

    key: int | str


@dataclass(frozen=True, slots=True)
class EngineExpr:
    """An expression that the engine evaluates, as SQL text."""

    sql: str


class DefaultMarker:
    """DEFAULT in a VALUES list."""


DEFAULT = DefaultMarker()

Expr = Any
"""A Python literal, a Param, DEFAULT or an EngineExpr."""


@dataclass(frozen=True, slots=True)
class Statement:
    """Common to all: the text."""

    sql: str


@dataclass(frozen=True, slots=True)
class Script:
    """The statements of one text, and the parameters that it names."""

    statements: tuple[Statement, ...]
    parameters: frozenset[int | str]


# Namespaces


@dataclass(frozen=True, slots=True)
class CreateNamespace(Statement):
    """CREATE NAMESPACE [IF NOT EXISTS] name."""

    name: str
    if_not_exists: bool


@dataclass(frozen=True, slots=True)
class DropNamespace(Statement):
    """DROP NAMESPACE [IF EXISTS] name."""

    name: str
    if_exists: bool


@dataclass(frozen=True, slots=True)
class AlterNamespace(Statement):
    """ALTER NAMESPACE name SET OPTIONS (...)."""

    name: str
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class UseNamespace(Statement):
    """USE name, for the statements after it in the same text."""

    name: str


# Tables


@dataclass(frozen=True, slots=True)
class CreateTable(Statement):
    """CREATE [USER | SHARED | STREAM] TABLE. Without a kind the caller decides it."""

    table: TableName
    kind: TableKind | None
    if_not_exists: bool
    columns: tuple[ColumnSpec, ...]
    primary_key: tuple[str, ...]
    checks: tuple[Check, ...]
    options: TableOptions
    retention_stated: bool
    """Whether the options say DELETED_RETENTION_HOURS."""


@dataclass(frozen=True, slots=True)
class DropTable(Statement):
    """DROP TABLE [IF EXISTS] name."""

    table: TableName
    if_exists: bool
    kind: TableKind | None


@dataclass(frozen=True, slots=True)
class TruncateTable(Statement):
    """TRUNCATE TABLE name."""

    table: TableName


@dataclass(frozen=True, slots=True)
class AlterTable(Statement):
    """ALTER TABLE name, one change."""

    table: TableName
    change: AlterChange


@dataclass(frozen=True, slots=True)
class CreateView(Statement):
    """CREATE [OR REPLACE] VIEW name AS query."""

    view: TableName
    query: str
    select: Select
    or_replace: bool


@dataclass(frozen=True, slots=True)
class DropView(Statement):
    """DROP VIEW [IF EXISTS] name."""

    view: TableName
    if_exists: bool


# Rows


class ConflictAction(StrEnum):
    """What ON CONFLICT does with a row whose key exists."""

    ERROR = "error"
    IGNORE = "ignore"
    UPDATE = "update"


@dataclass(frozen=True, slots=True)
class ConflictClause:
    """ON CONFLICT (columns) DO NOTHING, or DO UPDATE SET assignments [WHERE where]."""

    columns: tuple[str, ...]
    action: ConflictAction
    assignments: tuple[tuple[str, Expr], ...] = ()
    where: str | None = None


@dataclass(frozen=True, slots=True)
class Insert(Statement):
    """INSERT of `rows` or of the rows of `query`. `columns` is None when none are named."""

    table: TableName
    alias: str
    columns: tuple[str, ...] | None
    rows: Sequence[Sequence[Expr]] | None
    query: Select | None
    conflict: ConflictClause | None
    returning: str | None


@dataclass(frozen=True, slots=True)
class KeyMatch:
    """WHERE is nothing but `column = value` for these columns, each once."""

    columns: tuple[str, ...]
    values: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Update(Statement):
    """UPDATE. `key` is set when the predicate is a look-up by key; `tables` are those that expressions read."""

    table: TableName
    alias: str
    assignments: tuple[tuple[str, Expr], ...]
    where: str
    key: KeyMatch | None
    returning: str | None
    tables: tuple[TableName, ...]


@dataclass(frozen=True, slots=True)
class Delete(Statement):
    """DELETE. `key` and `tables` as in Update."""

    table: TableName
    alias: str
    where: str
    key: KeyMatch | None
    returning: str | None
    tables: tuple[TableName, ...]


@dataclass(frozen=True, slots=True)
class KeyLookup:
    """The SELECT reads plain columns of one table by `key`. `projection` is None for `*`."""

    key: KeyMatch
    projection: tuple[tuple[str, str], ...] | None
    """(column, output name)."""


@dataclass(frozen=True, slots=True)
class TableFilter:
    """Only rows of a system table whose `column` has one of `values` can matter to the query."""

    table: TableName
    column: str
    values: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Tail:
    """What follows the outermost SELECT: whether an ORDER BY does, and LIMIT and OFFSET."""

    ordered: bool = False
    body: str | None = None
    """The text before LIMIT and OFFSET; None when they are not numbers, or do not end the text."""
    limit: Expr = None
    offset: Expr = None


@dataclass(frozen=True, slots=True)
class Select(Statement):
    """`sql` is the text for the engine; `tables` what it reads; `specials` the system columns it names."""

    tables: tuple[TableName, ...]
    specials: frozenset[str] = frozenset()
    deleted_in_where: bool = False
    ctes: frozenset[str] = frozenset()
    lookup: KeyLookup | None = None
    explain: bool = False
    analyze: bool = False
    filters: tuple[TableFilter, ...] = ()
    main: TableName | None = None
    """The one table that the outermost SELECT reads, when it joins nothing to it."""
    star: bool = False
    """`*` stands in the outermost list."""
    tail: Tail = Tail()
    sources: int = 1
    """How many tables and functions in FROM and JOIN it names, sub-queries included: what they may multiply."""
    endless: bool = False
    """Whether it makes rows of its own: a recursive query, a series."""


# Showing


class ShowKind(StrEnum):
    """What SHOW, DESCRIBE and JOB statements show."""

    NAMESPACES = "namespaces"
    TABLES = "tables"
    COLUMNS = "columns"
    ALL = "all"
    STATS = "stats"
    MANIFEST = "manifest"
    STORAGES = "storages"
    DESCRIBE = "describe"
    HISTORY = "history"
    JOB = "job"


@dataclass(frozen=True, slots=True)
class Show(Statement):
    """A statement that shows something; which fields are set depends on `kind`."""

    kind: ShowKind
    table: TableName | None = None
    namespace: str | None = None
    job_id: str | None = None


# Work


@dataclass(frozen=True, slots=True)
class Maintain(Statement):
    """STORAGE FLUSH or COMPACT of a table, or of all tables of a namespace."""

    operation: str
    table: TableName | None
    namespace: str | None


class JobVerb(StrEnum):
    """What a statement does to a job."""

    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"
    RETRY = "retry"


@dataclass(frozen=True, slots=True)
class ControlJob(Statement):
    """CANCEL (or KILL), PAUSE, RESUME or RETRY JOB."""

    verb: JobVerb
    job_id: str


@dataclass(frozen=True, slots=True)
class KillQuery(Statement):
    """KILL QUERY 'id': end a statement that runs for a client of the server."""

    query_id: str


@dataclass(frozen=True, slots=True)
class ExplainJob(Statement):
    """EXPLAIN JOB: why it is not running."""

    job_id: str


@dataclass(frozen=True, slots=True)
class ControlQueue(Statement):
    """PAUSE or RESUME QUEUE."""

    queue: str
    paused: bool


@dataclass(frozen=True, slots=True)
class LimitQueue(Statement):
    """ALTER QUEUE: how many of its jobs run at once; None lifts the limit."""

    queue: str
    limit: int | None


@dataclass(frozen=True, slots=True)
class CreateJob(Statement):
    """CALL create_job(type, parameters as JSON)."""

    job_type: Expr
    params: Expr


class TransactionVerb(StrEnum):
    """The ends of a transaction, and its beginning."""

    BEGIN = "begin"
    COMMIT = "commit"
    ROLLBACK = "rollback"


@dataclass(frozen=True, slots=True)
class TransactionControl(Statement):
    """BEGIN, COMMIT or ROLLBACK."""

    verb: TransactionVerb


@dataclass(frozen=True, slots=True)
class SetOption(Statement):
    """SET name = value."""

    name: str
    value: str


# Live queries


@dataclass(frozen=True, slots=True)
class SubscribeTo(Statement):
    """SUBSCRIBE TO query [OPTIONS (...)]; option names in capitals."""

    query: str
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class KillLiveQuery(Statement):
    """KILL LIVE QUERY 'id'."""

    live_id: str


LiveStatement = SubscribeTo | KillLiveQuery


# Users


class UserVerb(StrEnum):
    """What is done to a user."""

    CREATE = "CREATE"
    ALTER = "ALTER"
    DROP = "DROP"
    RESTORE = "RESTORE"
    PURGE = "PURGE"


class UserClause(StrEnum):
    """What CREATE and ALTER USER state."""

    PASSWORD = "PASSWORD"
    OAUTH = "OAUTH"
    INTERNAL = "INTERNAL"
    ROLE = "ROLE"
    EMAIL = "EMAIL"


@dataclass(frozen=True, slots=True)
class UserStatement(Statement):
    """CREATE, ALTER, DROP, RESTORE or PURGE USER. Its text may hold a password."""

    verb: UserVerb
    name: str
    clauses: dict[UserClause, Expr]
    if_exists: bool


USER_LENGTH_MAX = 128


@dataclass(frozen=True, slots=True)
class ExecuteAs(Statement):
    """EXECUTE AS USER user (statement)."""

    user: str
    inner: Statement


# Schedules


class ScheduleVerb(StrEnum):
    """What is done to a schedule."""

    CREATE = "CREATE"
    ALTER = "ALTER"
    DROP = "DROP"
    RUN = "RUN"


@dataclass(frozen=True, slots=True)
class ScheduleStatement(Statement):
    """CREATE, ALTER, DROP or RUN SCHEDULE. `changes` are fields of the schedule."""

    verb: ScheduleVerb
    name: str
    changes: dict[str, Expr]
    guard: bool
    """IF [NOT] EXISTS."""


# Storages


class StorageVerb(StrEnum):
    """What is done to a storage."""

    CREATE = "CREATE"
    ALTER = "ALTER"
    DROP = "DROP"
    CHECK = "CHECK"


@dataclass(frozen=True, slots=True)
class StorageStatement(Statement):
    """CREATE, ALTER or DROP STORAGE, STORAGE CHECK. Its text may hold credentials."""

    verb: StorageVerb
    name: str
    clauses: dict[str, Expr]
    """Fields of the storage."""
    guard: bool
    """IF [NOT] EXISTS; EXTENDED of CHECK."""


# Backups


class BackupVerb(StrEnum):
    """What is done with backups."""

    BACKUP = "BACKUP"
    RESTORE = "RESTORE"
    VERIFY = "VERIFY"
    SHOW = "SHOW"
    PRUNE = "PRUNE"
    EXPLAIN = "EXPLAIN"


@dataclass(frozen=True, slots=True)
class BackupStatement(Statement):
    """BACKUP or RESTORE DATABASE, VERIFY BACKUP, SHOW or PRUNE BACKUPS, EXPLAIN RESTORE."""

    verb: BackupVerb
    path: str | None
    """None only for SHOW BACKUPS of every target."""
    options: dict[str, Any]
    """Parameters of the job; `daily` and `weekly` of PRUNE."""
