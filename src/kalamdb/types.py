"""Ids and closed sets that every layer shares. Imports nothing of ours."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import NewType

TableUid = NewType("TableUid", int)
"""64-bit number of one incarnation of a table; a re-created table gets a new one."""

JobId = NewType("JobId", str)

Scope = NewType("Scope", str)
"""Whose rows: a user id in USER and STREAM tables, '' in SHARED tables."""

SHARED_SCOPE = Scope("")

Seq = int
"""`_seq`: a Snowflake-like number, rising in commit order over the whole store."""


class TableKind(StrEnum):
    """What a table's rows belong to, and how long they live."""

    USER = "user"
    SHARED = "shared"
    STREAM = "stream"
    SYSTEM = "system"


class Role(StrEnum):
    """Rights of a caller, rising: anonymous (none) < user < service < dba < system."""

    ANONYMOUS = "anonymous"
    USER = "user"
    SERVICE = "service"
    DBA = "dba"
    SYSTEM = "system"


class AccessLevel(StrEnum):
    """Who may read and write a SHARED table."""

    PUBLIC = "public"
    PRIVATE = "private"
    RESTRICTED = "restricted"
    DBA = "dba"


class ChangeType(StrEnum):
    """What happened to a row."""

    SNAPSHOT = "snapshot"
    """Nothing: it was there when the subscription began."""
    INSERT = "insert"
    UPDATE = "update"
    DELETE = "delete"


class RowFlags(IntEnum):
    """Flags of one row version."""

    NONE = 0
    DELETED = 1
    SUPERSEDES = 2


@dataclass(frozen=True, slots=True)
class TableId:
    """A table's name: namespace and table, both lower case unless they were quoted."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}.{self.name}"

    @staticmethod
    def parse(text: str) -> TableId:
        """Split "namespace.table"; raises ValueError when there is no dot."""
        namespace, dot, name = text.partition(".")
        if not dot or not namespace or not name:
            raise ValueError(f"'{text}' is not of the form namespace.table")
        return TableId(namespace, name)
