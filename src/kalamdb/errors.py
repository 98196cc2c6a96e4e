"""The error tree. The class says what the caller should do, the message what happened.

KalamDbError
├── InvalidRequest          the request itself is wrong; repeating it cannot help
├── NotFound                a named object does not exist
├── Conflict                the request collides with what is stored
│   ├── UniqueViolation     a primary key exists already
│   ├── TransactionConflict another writer came first; run the transaction again
│   └── IdempotencyConflict an active job has the key; `.job` is that job
├── Denied                  the caller may not do this
├── Unauthenticated         who calls is not proved: no token, a wrong or an expired one
├── LimitExceeded           a named limit was hit
├── Timeout                 a deadline passed
├── Cancelled               the statement was ended from outside
├── RateLimited             too much at a time; `.retry_after_s` says when to come again
├── Unavailable             the database cannot do this now; later it may
│   └── DirectoryLocked     another process holds the directory; `.pid` is that process
├── Closed                  the object was closed
├── LeaseLost               the job no longer holds its lease
├── Corrupt                 stored bytes are damaged; the message names the file
└── Internal                our own mistake
"""

from __future__ import annotations

from typing import Any, ClassVar


class KalamDbError(Exception):
    """Root of all errors that this package raises on purpose."""

    code: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    is_public: ClassVar[bool] = True
    """Whether a server shows the message to callers that are not administrators. Not so where it may tell
    what exists beyond what they may see, or how the server works."""
    failed_sql: str | None = None
    """The statement of a batch that raised it."""


class InvalidRequest(KalamDbError):
    """The request is malformed or breaks a rule of the schema."""

    code = "INVALID_REQUEST"
    http_status = 400


class NotFound(KalamDbError):
    """A named object does not exist."""

    code = "NOT_FOUND"
    http_status = 404
    is_public = False


class Conflict(KalamDbError):
    """The request collides with what is stored."""

    code = "CONFLICT"
    http_status = 409


class UniqueViolation(Conflict):
    """A row with this primary key exists already."""

    code = "UNIQUE_VIOLATION"


class TransactionConflict(Conflict):
    """Another writer changed what this transaction read or wrote; run it again."""

    code = "TRANSACTION_CONFLICT"
    retryable = True


class IdempotencyConflict(Conflict):
    """An active job holds this idempotency key; `job` is that job."""

    code = "IDEMPOTENCY_CONFLICT"

    def __init__(self, message: str, job: Any = None) -> None:
        super().__init__(message)
        self.job = job


class Denied(KalamDbError):
    """The caller may not do this."""

    code = "PERMISSION_DENIED"
    http_status = 403


class Unauthenticated(KalamDbError):
    """The caller did not prove who it is. `code` says how: MISSING_AUTHORIZATION, INVALID_CREDENTIALS,
    TOKEN_EXPIRED, SETUP_REQUIRED or ACCOUNT_LOCKED."""

    code = "INVALID_CREDENTIALS"
    http_status = 401

    def __init__(self, message: str, code: str = "INVALID_CREDENTIALS") -> None:
        super().__init__(message)
        self.code = code  # type: ignore[misc]


class LimitExceeded(KalamDbError):
    """A named limit was hit; the message names it and its value."""

    code = "LIMIT_EXCEEDED"
    http_status = 400


class Timeout(KalamDbError):
    """A deadline passed before the work was done."""

    code = "TIMEOUT"
    http_status = 408
    retryable = True


class Cancelled(KalamDbError):
    """The statement was cancelled: by KILL QUERY, as the client went away, or as the server stops."""

    code = "CANCELLED"
    http_status = 400


class RateLimited(KalamDbError):
    """Too much is asked at a time; the same request succeeds after `retry_after_s` seconds."""

    code = "RATE_LIMIT_EXCEEDED"
    http_status = 429
    retryable = True

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(KalamDbError):
    """The database cannot do this now; a later attempt may succeed."""

    code = "UNAVAILABLE"
    http_status = 503
    retryable = True
    is_public = False


class DirectoryLocked(Unavailable):
    """Another process holds the data directory; `pid` is that process, when known."""

    code = "DIRECTORY_LOCKED"

    def __init__(self, message: str, pid: int | None = None) -> None:
        super().__init__(message)
        self.pid = pid


class Closed(KalamDbError):
    """The database, session or result was closed, or belongs to another process after fork()."""

    code = "CLOSED"
    http_status = 503


class LeaseLost(KalamDbError):
    """The job that asked no longer holds its lease; nothing was written."""

    code = "LEASE_LOST"
    http_status = 409


class Corrupt(KalamDbError):
    """Stored bytes are damaged; the message names the file."""

    code = "CORRUPT"
    is_public = False


class Internal(KalamDbError):
    """A mistake of this package; please report it with the message."""

    code = "INTERNAL"
    is_public = False
