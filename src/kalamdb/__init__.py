"""KalamDB: an SQL-first realtime database for Python programs whose users have private data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kalamdb.errors import (
    Cancelled,
    Closed,
    Conflict,
    Corrupt,
    Denied,
    DirectoryLocked,
    IdempotencyConflict,
    Internal,
    InvalidRequest,
    KalamDbError,
    LeaseLost,
    LimitExceeded,
    NotFound,
    RateLimited,
    Timeout,
    TransactionConflict,
    Unauthenticated,
    Unavailable,
    UniqueViolation,
)
from kalamdb.version import VERSION

if TYPE_CHECKING:
    from kalamdb.async_database import AsyncDatabase, aconnect
    from kalamdb.backup.restore import restore
    from kalamdb.client import AsyncClient, Client
    from kalamdb.database import Database
    from kalamdb.opening import connect
    from kalamdb.result import Result

__version__ = VERSION


def __getattr__(name: str) -> Any:
    # The engines take half a second to import; a program pays for them when it connects.
    if name == "connect":
        from kalamdb.opening import connect

        return connect
    if name == "Database":
        from kalamdb.database import Database

        return Database
    if name in ("aconnect", "AsyncDatabase"):
        from kalamdb import async_database

        return getattr(async_database, name)
    if name in ("Client", "AsyncClient"):
        from kalamdb import client

        return getattr(client, name)
    if name == "restore":
        from kalamdb.backup.restore import restore

        return restore
    if name == "Result":
        from kalamdb.result import Result

        return Result
    raise AttributeError(f"module 'kalamdb' has no attribute {name!r}")


__all__ = [
    "AsyncClient",
    "AsyncDatabase",
    "Client",
    "Cancelled",
    "Closed",
    "Conflict",
    "Corrupt",
    "Database",
    "Denied",
    "DirectoryLocked",
    "IdempotencyConflict",
    "Internal",
    "InvalidRequest",
    "KalamDbError",
    "LeaseLost",
    "LimitExceeded",
    "NotFound",
    "RateLimited",
    "Result",
    "Timeout",
    "TransactionConflict",
    "Unauthenticated",
    "Unavailable",
    "UniqueViolation",
    "aconnect",
    "connect",
    "restore",
]
