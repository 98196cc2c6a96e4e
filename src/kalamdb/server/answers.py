"""The answers of POST /v1/api/sql: results as entries, errors as codes, and what callers may be told of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from kalamdb.errors import (
    Closed,
    Corrupt,
    Denied,
    Internal,
    KalamDbError,
    RateLimited,
    Unauthenticated,
    Unavailable,
)
from kalamdb.result import Result
from kalamdb.server.bodies import BadBody
from kalamdb.server.encode import encode, output_columns, row_encoder, rows_of, schema_json
from kalamdb.sql import statements as st
from kalamdb.sql.engine import EngineFault
from kalamdb.sql.parse import NoStatement


class Phase(Enum):
    """How far a request came."""

    READ = "read"
    PARSE = "parse"
    AUTHORISE = "authorise"
    RUN = "run"


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer without its `took`, which is measured last."""

    status: int
    head: bytes
    """JSON up to where `took` stands."""
    tail: bytes = b"}"
    retry_after_s: float | None = None
    replayed: bool = False
    """It is that of an earlier request with the same Idempotency-Key."""

    def body(self, took_ms: float) -> bytes:
        """All of it."""
        return b'%b,"took":%.3f%b' % (self.head, took_ms, self.tail)


_REDACTED = {
    "SQL_EXECUTION_ERROR": "SQL statement failed",
    "INVALID_SQL": "SQL statement is invalid or not allowed",
    "BATCH_PARSE_ERROR": "SQL statement is invalid or not allowed",
    "TABLE_NOT_FOUND": "Requested table is not available",
    "INTERNAL_ERROR": "SQL request failed",
    "CLUSTER_UNAVAILABLE": "SQL request failed",
}


def code_of(exc: BaseException, phase: Phase) -> tuple[int, str]:
    """HTTP status and error code."""
    match exc:
        case BadBody() | Unauthenticated() | RateLimited():
            return exc.http_status, exc.code
        case NoStatement():
            return 400, "EMPTY_SQL"
        case Denied():
            return 403, "PERMISSION_DENIED"
        case EngineFault():
            return 400, "SQL_EXECUTION_ERROR"
        case Unavailable() | Closed():
            return 503, "CLUSTER_UNAVAILABLE"
        case KalamDbError() if not isinstance(exc, Internal | Corrupt):
            codes = {Phase.READ: "INVALID_INPUT", Phase.PARSE: "INVALID_SQL", Phase.AUTHORISE: "INVALID_PARAMETER"}
            return 400, codes.get(phase, "SQL_EXECUTION_ERROR")
        case _:
            return 500, "INTERNAL_ERROR"


def error_json(exc: BaseException, phase: Phase, *, admin: bool) -> tuple[int, dict[str, Any]]:
    """HTTP status and the `error` of an answer. Who is no administrator is told only what is meant for everybody."""
    status, code = code_of(exc, phase)
    message = str(exc) if isinstance(exc, KalamDbError) else f"{type(exc).__name__}: {exc}"
    public = isinstance(exc, KalamDbError) and exc.is_public and not (code == "INVALID_SQL" and phase is Phase.PARSE)
    if not admin and not public and code in _REDACTED:
        return status, {"code": code, "message": _REDACTED[code]}
    error = {"code": code, "message": message}
    if admin and isinstance(exc, KalamDbError) and exc.failed_sql is not None:
        error["details"] = exc.failed_sql
    return status, error


def failure(exc: BaseException, phase: Phase, *, admin: bool) -> Answer:
    """The answer to a request that failed."""
    status, error = error_json(exc, phase, admin=admin)
    retry = exc.retry_after_s if isinstance(exc, RateLimited) else None
    return Answer(status, b'{"status":"error","results":[]', b',"error":%b}' % encode(error), retry)


def success(results: Sequence[Any], *, streamed: bool = False) -> Answer:
    """The answer to a request that succeeded; the single row-returning statement has the form of a stream."""
    tail = b',"error":null}' if streamed else b"}"
    return Answer(200, b'{"status":"success","results":%b' % encode(results), tail)


def results_json(script: st.Script, results: Sequence[Result], user: str) -> list[dict[str, Any]]:
    """The entries of `results`. Of a batch those of DML without rows are summed up and stand last."""
    if len(results) == 1:
        return [result_json(results[0], user)]
    sums = {st.Insert: 0, st.Update: 0, st.Delete: 0}
    entries = []
    for statement, result in zip(script.statements, results, strict=True):
        if type(statement) in sums and not result.columns:
            sums[type(statement)] += result.row_count
        else:
            entries.append(result_json(result, user))
    for kind, verb in ((st.Insert, "Inserted"), (st.Update, "Updated"), (st.Delete, "Deleted")):
        if sums[kind]:
            entries.append({"row_count": sums[kind], "message": f"{verb} {sums[kind]} row(s)", "as_user": user})
    return entries


def result_json(result: Result, user: str) -> dict[str, Any]:
    """One entry of `results`."""
    entry: dict[str, Any] = {}
    if result.ready is not None:
        outputs = result.ready.outputs
        entry["schema"] = schema_json(outputs)
        encoder = row_encoder(tuple(column.kind for column in outputs), stored=True)
        entry["rows"] = [encoder(row) for row in result.ready.stored]
    elif result.columns:
        table = result.arrow()
        columns = output_columns(table.schema, result.known)
        entry["schema"] = schema_json(columns)
        entry["rows"] = rows_of(columns, table)
    entry["row_count"] = result.row_count
    if result.message is not None:
        entry["message"] = result.message
    entry["as_user"] = result.as_user or user
    return entry


__all__ = ["Answer", "Phase", "error_json", "failure", "result_json", "results_json", "success"]
