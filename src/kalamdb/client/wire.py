"""HTTP without the sockets: what a call sends, what an answer means (surface reference 1.3, 1.5, 1.8)."""

from __future__ import annotations

import datetime as dt
import math
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any
from urllib.parse import urlsplit

import msgspec

from kalamdb.errors import (
    Conflict,
    Denied,
    Internal,
    InvalidRequest,
    KalamDbError,
    LimitExceeded,
    NotFound,
    Timeout,
    TransactionConflict,
    Unauthenticated,
    Unavailable,
    UniqueViolation,
)
from kalamdb.result import OutputColumn, Result, RowsFirst
from kalamdb.schema import DataType, TypeName
from kalamdb.sql.tokens import TokenKind, tokenize

Params = Sequence[Any] | Mapping[str, Any] | None

PARAMS_MAX = 50
"""Of one statement on the wire; more are written into the text."""
INSERT_TEXT_MAX = 512 << 10
"""Characters of one INSERT of `insert`."""
_EPOCH = dt.datetime(1970, 1, 1)
_DAY_ZERO = dt.date(1970, 1, 1)
_MIDNIGHT = dt.datetime(1970, 1, 1)
_UNAUTHENTICATED = frozenset(
    {"MISSING_AUTHORIZATION", "INVALID_CREDENTIALS", "TOKEN_EXPIRED", "SETUP_REQUIRED", "ACCOUNT_LOCKED"}
)
_BY_CODE: Mapping[str, type[KalamDbError]] = {
    "PERMISSION_DENIED": Denied,
    "RATE_LIMIT_EXCEEDED": Unavailable,
    "INTERNAL_ERROR": Internal,
    "NOT_FOUND": NotFound,
    "UNAUTHORIZED": Denied,
}
_BY_KIND: Mapping[str, type[KalamDbError]] = {
    kind.code: kind
    for kind in (Conflict, Denied, Internal, InvalidRequest, LimitExceeded, NotFound, Timeout, TransactionConflict,
                 Unavailable, UniqueViolation)
}  # fmt: skip
_REPEATABLE = ("SELECT", "SHOW", "DESCRIBE", "DESC", "EXPLAIN")


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a log-in gave."""

    access: str
    refresh: str | None = None


class _SqlBody(msgspec.Struct, omit_defaults=True):
    sql: str
    params: list[Any] | None = None
    namespace_id: str | None = None


def base_url(url: str) -> str:
    """The address of a server without a slash at its end. Raises InvalidRequest."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise InvalidRequest(f"'{url}' is not the address of a server, like http://127.0.0.1:8080")
    return url.rstrip("/")


def socket_url(url: str) -> str:
    """The address of the WebSocket of a server."""
    return "ws" + base_url(url).removeprefix("http") + "/v1/ws"


def may_repeat(sql: str) -> bool:
    """Whether a text that perhaps was not received may be sent again."""
    return sql.lstrip().upper().startswith(_REPEATABLE)


def sql_body(sql: str, params: Params, namespace: str | None) -> bytes:
    """The body of a call of /v1/api/sql. Raises InvalidRequest."""
    plain = _plain_params(params)
    if plain is None:
        sql = _with_literals(sql, params)
    return msgspec.json.encode(_SqlBody(sql, plain or None, namespace))


def _plain_params(params: Params) -> list[Any] | None:
    """Parameters as JSON has them; None when they must be written into the text."""
    if params is None:
        return []
    if isinstance(params, Mapping) or len(params) > PARAMS_MAX:
        return None
    plain = [_plain(value) for value in params]
    return None if any(value is _UNFIT for value in plain) else plain


_UNFIT = object()


def _plain(value: Any) -> Any:
    match value:
        case None | bool() | str():
            return value
        case int():
            return value if -(1 << 63) <= value < 1 << 64 else _UNFIT
        case float():
            return value if math.isfinite(value) else _UNFIT
        case Decimal() | uuid.UUID():
            return str(value)
        case dt.datetime() | dt.date() | dt.time():
            return value.isoformat()
        case dict() | list() | tuple():
            return msgspec.json.encode(value).decode()
        case _:
            return _UNFIT


def literal(value: Any) -> str:
    """A value as SQL text. Raises InvalidRequest for what has none."""
    match value:
        case None:
            return "NULL"
        case bool():
            return "TRUE" if value else "FALSE"
        case int():
            return str(value)
        case Decimal() if value.is_finite():
            return format(value, "f")
        case float():
            return repr(value) if math.isfinite(value) and "e" in repr(value) else f"CAST('{value!r}' AS DOUBLE)"
        case bytes() | bytearray() | memoryview():
            return f"X'{bytes(value).hex()}'"
        case _:
            plain = _plain(value)
            if not isinstance(plain, str):
                raise InvalidRequest(f"a parameter of type {type(value).__name__} has no SQL form")
            return "'" + plain.replace("'", "''") + "'"


def _with_literals(sql: str, params: Params) -> str:
    pieces, at = [], 0
    for token in tokenize(sql):
        if token.kind is TokenKind.PARAM:
            pieces += [sql[at : token.start], literal(_param(params, token.text[1:]))]
            at = token.end
    return "".join(pieces) + sql[at:]


def _param(params: Params, name: str) -> Any:
    try:
        if isinstance(params, Mapping):
            return params[name]
        assert params is not None
        return params[int(name) - 1]
    except (KeyError, IndexError, ValueError):
        raise InvalidRequest(f"parameter '{name}' was not given") from None


def as_user_sql(sql: str, user: str) -> str:
    """A statement that runs for another user."""
    return f"EXECUTE AS USER {literal(user)} ({sql.rstrip().rstrip(';')})"


def insert_texts(table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], on_conflict: str) -> Iterator[str]:
    """INSERT statements of at most about INSERT_TEXT_MAX characters. Raises InvalidRequest."""
    endings = {"error": "", "ignore": " ON CONFLICT DO NOTHING", "update": _update_ending(columns)}
    if on_conflict not in endings:
        raise InvalidRequest(f"on_conflict '{on_conflict}' is not one of {', '.join(endings)}")
    head = f"INSERT INTO {table} ({', '.join(quoted(name) for name in columns)}) VALUES "
    part: list[str] = []
    size = 0
    for row in rows:
        text = f"({', '.join(literal(value) for value in row)})"
        if part and size + len(text) > INSERT_TEXT_MAX:
            yield head + ", ".join(part) + endings[on_conflict]
            part, size = [], 0
        part.append(text)
        size += len(text)
    if part:
        yield head + ", ".join(part) + endings[on_conflict]


def _update_ending(columns: Sequence[str]) -> str:
    settings = ", ".join(f"{quoted(name)} = EXCLUDED.{quoted(name)}" for name in columns)
    return f" ON CONFLICT DO UPDATE SET {settings}"


def quoted(name: str) -> str:
    """A name as SQL text that is read as it is."""
    return '"' + name.replace('"', '""') + '"'


def table_of(data: Any) -> tuple[list[str], list[Sequence[Any]]]:
    """Column names and rows of dicts, Arrow, pandas or polars. Raises InvalidRequest."""
    if hasattr(data, "__arrow_c_stream__") or hasattr(data, "iloc"):
        import pyarrow as pa

        found = pa.Table.from_pandas(data, preserve_index=False) if hasattr(data, "iloc") else pa.table(data)
        return list(found.schema.names), list(zip(*(column.to_pylist() for column in found.columns), strict=True))
    rows = list(data)
    if not all(isinstance(row, Mapping) for row in rows):
        raise InvalidRequest("rows over the network are dicts, or Arrow, pandas or polars: their columns have names")
    names = list(dict.fromkeys(name for row in rows for name in row))
    if any(len(row) != len(names) for row in rows):
        short = next(row for row in rows if len(row) != len(names))
        raise InvalidRequest(f"each row names the same columns ({', '.join(names)}); one has {', '.join(short)}")
    return names, [[row[name] for name in names] for row in rows]


# Answers


def answer_of(status: int, content: bytes, retry_after: str | None = None) -> Any:
    """The decoded body of an answer. Raises the error that it tells."""
    try:
        answer = msgspec.json.decode(content)
    except msgspec.DecodeError:
        answer = None
    error = answer.get("error") if isinstance(answer, dict) else None
    if 200 <= status < 300 and isinstance(answer, dict) and error is None:
        return answer
    raise _error(status, answer if isinstance(answer, dict) else {}, content, retry_after)


def _error(status: int, answer: dict[str, Any], content: bytes, retry_after: str | None) -> KalamDbError:
    error = answer.get("error")
    if isinstance(error, dict):
        code, message, kind = error.get("code", ""), error.get("message", ""), error.get("kind", "")
    else:
        code, kind = answer.get("code", ""), ""
        message = answer.get("message") or error or content[:200].decode(errors="replace")
    message = str(message) or f"the server answered with status {status}"
    if status == 401 or code in _UNAUTHENTICATED:
        return Unauthenticated(message, str(code) if code in _UNAUTHENTICATED else "INVALID_CREDENTIALS")
    if status == 428:
        return Unauthenticated(message, "SETUP_REQUIRED")
    if status == 429:
        return Unavailable(message + (f"; try again in {retry_after} s" if retry_after else ""))
    kinds: Mapping[int, type[KalamDbError]] = {
        403: Denied, 404: NotFound, 408: Timeout, 409: Conflict, 413: LimitExceeded, 503: Unavailable, 500: Internal,
    }  # fmt: skip
    return (_BY_KIND.get(kind) or _BY_CODE.get(code) or kinds.get(status) or InvalidRequest)(message)


def tokens_of(answer: Mapping[str, Any]) -> Tokens:
    """The tokens of a log-in or refresh."""
    return Tokens(answer["access_token"], answer.get("refresh_token"))


def result_of(answer: Mapping[str, Any]) -> Result:
    """The last result of an answer of /v1/api/sql, all of them in `.results`."""
    results = [_result(one) for one in answer["results"]] or [Result()]
    last = results[-1]
    last.results = results
    return last


def _result(wire: Mapping[str, Any]) -> Result:
    schema = wire.get("schema") or []
    if not schema:
        return Result(row_count=int(wire["row_count"]), message=wire.get("message"))
    readers = [reader(field["data_type"]) for field in schema]
    columns = list(zip(*wire.get("rows") or [], strict=True)) or [()] * len(schema)
    values = [
        column if read is None else [None if one is None else read(one) for one in column]
        for read, column in zip(readers, columns, strict=True)
    ]
    rows = list(zip(*values, strict=True))
    result = Result(
        RowsFirst(
            tuple(map(output_column, schema)),
            rows,
            lambda: rows,
            lambda: _table(schema, values),
            lambda: _table(schema, [()] * len(schema)).schema,
        ),  # fmt: skip
        message=wire.get("message"),
    )
    result.as_user = wire.get("as_user")
    return result


def output_column(field: Mapping[str, Any]) -> OutputColumn:
    """A column as the wire describes it."""
    return OutputColumn(field["name"], _kind(field["data_type"]), tuple(field.get("flags", ())))


def _kind(data_type: Any) -> DataType:
    match data_type:
        case {"Decimal": {"precision": precision, "scale": scale}}:
            return DataType(TypeName.DECIMAL, precision=precision, scale=scale)
        case {"Embedding": size}:
            return DataType(TypeName.EMBEDDING, size=size)
        case _:
            return DataType(TypeName(str(data_type).upper()))


def _table(schema: Sequence[Mapping[str, Any]], values: Sequence[Sequence[Any]]) -> Any:
    import pyarrow as pa

    arrays, fields = [], []
    for field, column in zip(schema, values, strict=True):
        kind, name = arrow_type(field["data_type"]), field["data_type"]
        if name in ("Json", "File"):
            column = [None if one is None else msgspec.json.encode(one).decode() for one in column]
        elif name == "Uuid":
            column = [None if one is None else str(one) for one in column]
        metadata = {"kalam": name.upper()} if name in ("Json", "File", "Uuid") else None
        arrays.append(pa.array(column, kind))
        fields.append(pa.field(field["name"], kind, True, metadata))
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def arrow_type(data_type: Any) -> Any:
    """The Arrow type of a data type of the wire."""
    import pyarrow as pa

    if isinstance(data_type, Mapping):
        if "Decimal" in data_type:
            return pa.decimal128(data_type["Decimal"]["precision"], data_type["Decimal"]["scale"])
        return pa.list_(pa.float32(), int(data_type["Embedding"]))
    kinds: Mapping[str, Callable[[], Any]] = {
        "Boolean": pa.bool_, "SmallInt": pa.int16, "Int": pa.int32, "BigInt": pa.int64, "Float": pa.float32,
        "Double": pa.float64, "Timestamp": lambda: pa.timestamp("us"), "DateTime": lambda: pa.timestamp("us", "UTC"),
        "Date": pa.date32, "Time": lambda: pa.time64("us"), "Bytes": pa.binary,
    }  # fmt: skip
    return kinds.get(data_type, pa.string)()


def reader(data_type: Any) -> Callable[[Any], Any] | None:
    """What turns a value of the wire into that of Python; None where they are the same."""
    if isinstance(data_type, Mapping):
        return Decimal if "Decimal" in data_type else None
    return _READERS.get(data_type)


def _timestamp(us: int) -> dt.datetime:
    return _EPOCH + dt.timedelta(microseconds=us)


_READERS: Mapping[str, Callable[[Any], Any]] = {
    "BigInt": int,
    "Timestamp": _timestamp,
    "DateTime": lambda us: _timestamp(us).replace(tzinfo=dt.UTC),
    "Date": lambda days: _DAY_ZERO + dt.timedelta(days=days),
    "Time": lambda us: (_MIDNIGHT + dt.timedelta(microseconds=us)).time(),
    "Bytes": bytes,
    "Uuid": uuid.UUID,
    "Json": msgspec.json.decode,
    "File": msgspec.json.decode,
}
