"""What calls take and give, as MessagePack that keeps every type: the values of SQL, rows as Arrow, errors."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from enum import IntEnum
from functools import partial
from typing import Any

import msgspec
import pyarrow as pa

from kalamdb import errors
from kalamdb.errors import (
    DirectoryLocked,
    IdempotencyConflict,
    Internal,
    InvalidRequest,
    KalamDbError,
    LimitExceeded,
)
from kalamdb.jobs import Job
from kalamdb.result import OutputColumn, Result, RowsFirst
from kalamdb.schema import TypeName
from kalamdb.sharing.channel import FRAME_BYTES_MAX
from kalamdb.sql.ingest import LooseColumns
from kalamdb.storage.jobs import JobRow
from kalamdb.tables.codec import shown


class _Code(IntEnum):
    """Extension types of MessagePack; part of the protocol."""

    INTEGER = 1
    DECIMAL = 2
    DATETIME = 3
    DATE = 4
    TIME = 5
    UUID = 6
    INTERVAL = 7
    TABLE = 8
    COLUMNS = 9


_AS_THEY_ARE = frozenset({str, float, bool, bytes, type(None)})
_TEXT_KEPT = frozenset({TypeName.JSON, TypeName.FILE})
_INT_MIN, _INT_MAX = -(1 << 63), (1 << 64) - 1


class Request(msgspec.Struct, array_like=True, frozen=True):
    """One call: its name in the table of calls, and what it takes."""

    name: str
    args: list[Any] = []
    named: dict[str, Any] = {}


class Hello(msgspec.Struct, frozen=True):
    """What each side says first. Fields are only ever added, so that two versions can tell each other who they are."""

    protocol: int
    version: str
    pid: int
    database_uid: str = ""


class ResultForm(msgspec.Struct, array_like=True, frozen=True):
    """A Result. `before` are the results of the statements before it in one text."""

    table: bytes | None
    row_count: int
    message: str | None
    before: list[ResultForm] = []
    outputs: tuple[OutputColumn, ...] = ()
    rows: list[tuple[Any, ...]] = []
    schema: bytes = b""
    """With `outputs` and `rows` the Arrow schema of rows that travel as values: one row is cheaper so."""
    as_user: str | None = None


class ErrorForm(msgspec.Struct, array_like=True, frozen=True):
    """An error: its code, or the name of an exception of Python."""

    code: str
    message: str
    job: JobRow | None = None
    pid: int | None = None


def portable(value: Any) -> Any:
    """A value as MessagePack can hold it without losing its type. Raises InvalidRequest for what cannot be sent."""
    kind = type(value)
    if kind in _AS_THEY_ARE:
        return value
    if kind is int:
        return value if _INT_MIN <= value <= _INT_MAX else _extension(_Code.INTEGER, hex(value))
    if kind is list or kind is tuple:
        return [portable(one) for one in value]
    if kind is dict:
        return {portable(key): portable(one) for key, one in value.items()}
    return _rare(value)


def _rare(value: Any) -> Any:
    if isinstance(value, str):
        return str.__str__(value)
    match value:
        case Decimal():
            return _extension(_Code.DECIMAL, str(value))
        case dt.datetime() if value == value:
            return _extension(_Code.DATETIME, value.isoformat())
        case dt.date() if value == value:
            return _extension(_Code.DATE, value.isoformat())
        case dt.time():
            return _extension(_Code.TIME, value.isoformat())
        case dt.timedelta() if value == value:
            return _extension(_Code.INTERVAL, f"{value.days} {value.seconds} {value.microseconds}")
        case uuid.UUID():
            return msgspec.msgpack.Ext(int(_Code.UUID), value.bytes)
        case pa.Table():
            return msgspec.msgpack.Ext(int(_Code.TABLE), table_bytes(value))
        case LooseColumns():
            return msgspec.msgpack.Ext(
                int(_Code.COLUMNS), encode([[name, _column(one)] for name, one in value.columns])
            )
        case int():
            return portable(int(value))
        case float():
            return float(value)
        case bytearray() | memoryview():
            return bytes(value)
        case Mapping():
            return {portable(key): portable(one) for key, one in value.items()}
        case Sequence():
            return [portable(one) for one in value]
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return portable(value.tolist())
    raise InvalidRequest(
        f"a value of type {type(value).__name__} cannot be sent to the process that holds the data directory: "
        f"{shown(value)}; give a Python value of an SQL type"
    )


def _extension(code: _Code, text: str) -> msgspec.msgpack.Ext:
    return msgspec.msgpack.Ext(int(code), text.encode())


def _column(values: Any) -> Any:
    return portable(pa.table({"": values}) if isinstance(values, (pa.Array, pa.ChunkedArray)) else values)


def _from_extension(code: int, data: memoryview) -> Any:
    """Raises ValueError for what no `portable` made."""
    if code == _Code.UUID:
        return uuid.UUID(bytes=bytes(data))
    if code == _Code.TABLE:
        return table_of(data)
    if code == _Code.COLUMNS:
        pairs = _anything.decode(data)
        return LooseColumns([(name, _loose(values)) for name, values in pairs])
    text = str(data, "utf-8")
    match _Code(code):
        case _Code.INTEGER:
            return int(text, 16)
        case _Code.DECIMAL:
            return Decimal(text)
        case _Code.DATETIME:
            return dt.datetime.fromisoformat(text)
        case _Code.DATE:
            return dt.date.fromisoformat(text)
        case _Code.TIME:
            return dt.time.fromisoformat(text)
        case _:
            days, seconds, microseconds = map(int, text.split())
            return dt.timedelta(days, seconds, microseconds)


def _loose(values: Any) -> Any:
    return values.column(0) if isinstance(values, pa.Table) else values


_anything = msgspec.msgpack.Decoder(ext_hook=_from_extension)
_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(Request, ext_hook=_from_extension)
_failures = msgspec.msgpack.Decoder(ErrorForm)
_results = msgspec.msgpack.Decoder(ResultForm, ext_hook=_from_extension)


def encode(value: Any) -> bytes:
    """The bytes of what `portable`, a form or a struct is. Raises InvalidRequest, LimitExceeded."""
    try:
        body = _encoder.encode(value)
    except (UnicodeEncodeError, RecursionError, OverflowError, ValueError, TypeError) as exc:
        raise InvalidRequest(f"a value cannot be sent to the other process: {shown(str(exc))}") from exc
    if len(body) > FRAME_BYTES_MAX:
        raise LimitExceeded(
            f"{len(body)} bytes are to be sent at once, at most {FRAME_BYTES_MAX} are allowed; insert in parts, read "
            "with db.stream"
        )
    return body


def request_bytes(name: str, args: Sequence[Any], named: Mapping[str, Any]) -> bytes:
    """A request as it travels. Raises InvalidRequest, LimitExceeded."""
    try:
        return encode(
            Request(name, [portable(one) for one in args], {key: portable(one) for key, one in named.items()})
        )
    except RecursionError:
        raise InvalidRequest("a value is nested too deeply to be sent to the other process") from None


def request_of(body: memoryview) -> Request:
    """The request of a frame. Raises ValueError for what is none."""
    try:
        return _requests.decode(body)
    except (msgspec.DecodeError, ValueError, ArithmeticError, pa.ArrowException, RecursionError, TypeError) as exc:
        raise ValueError(f"a request cannot be read: {exc}") from exc


# Rows


def table_bytes(table: pa.Table | pa.RecordBatch) -> bytes:
    """Rows as an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write(table)
    taken: bytes = sink.getvalue().to_pybytes()
    return taken


def table_of(data: bytes | memoryview) -> pa.Table:
    """Rows of an Arrow IPC stream."""
    with pa.ipc.open_stream(pa.py_buffer(data)) as reader:
        return reader.read_all()


def result_form(result: Result) -> ResultForm:
    """A Result as it travels."""
    return _one_form(result, [_one_form(one, []) for one in result.results[:-1]])


def _one_form(result: Result, before: list[ResultForm]) -> ResultForm:
    ready = result.ready
    # The text of JSON is to arrive as it is stored.
    if ready is not None and not any(one.kind.name in _TEXT_KEPT for one in ready.outputs):
        schema = ready.schema().serialize().to_pybytes()
        rows = portable(result.rows)
        return ResultForm(
            None, result.row_count, result.message, before, ready.outputs, rows, schema, as_user=result.as_user
        )
    table = table_bytes(result.arrow()) if result.columns else None
    return ResultForm(table, result.row_count, result.message, before, as_user=result.as_user)


def result_of(body: memoryview) -> Result:
    """The Result of a frame."""
    form = _results.decode(body)
    result = _one_result(form)
    if form.before:
        result.results = [*map(_one_result, form.before), result]
    return result


def _one_result(form: ResultForm) -> Result:
    table: pa.Table | RowsFirst | None = None
    if form.schema:
        rows = form.rows
        table = RowsFirst(
            form.outputs, rows, lambda: rows, partial(_built, form.schema, rows), partial(_schema, form.schema)
        )
    elif form.table is not None:
        table = table_of(form.table)
    result = Result(table, row_count=form.row_count, message=form.message)
    result.as_user = form.as_user
    return result


def _schema(data: bytes) -> pa.Schema:
    return pa.ipc.read_schema(pa.py_buffer(data))


def _built(schema_bytes: bytes, rows: list[tuple[Any, ...]]) -> pa.Table:
    schema = _schema(schema_bytes)
    columns = zip(*rows, strict=True) if rows else [()] * len(schema)
    arrays = [
        pa.array([str(one) if isinstance(one, uuid.UUID) else one for one in values], field.type)
        for field, values in zip(schema, columns, strict=True)
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


# Errors


def _tree(root: type[KalamDbError]) -> list[type[KalamDbError]]:
    return [root, *(kind for child in root.__subclasses__() for kind in _tree(child))]


_BY_CODE = {kind.code: kind for kind in _tree(KalamDbError) if kind.__module__ == errors.__name__}
_OF_PYTHON = {kind.__name__: kind for kind in (TypeError, ValueError, OverflowError, MemoryError, RecursionError)}


def error_form(exc: Exception) -> ErrorForm:
    """An exception as it travels."""
    name = type(exc).__name__
    if not isinstance(exc, KalamDbError):
        return ErrorForm(name, str(exc)) if name in _OF_PYTHON else ErrorForm(Internal.code, f"{name}: {exc}")
    job = getattr(exc, "job", None)
    row = job.row if isinstance(job, Job) else job
    return ErrorForm(exc.code, str(exc), row if isinstance(row, JobRow) else None, getattr(exc, "pid", None))


def error_of(body: memoryview, view: Callable[[JobRow], Job]) -> Exception:
    """The exception of a frame."""
    form = _failures.decode(body)
    if form.code in _OF_PYTHON:
        return _OF_PYTHON[form.code](form.message)
    kind = _BY_CODE.get(form.code, Internal)
    if issubclass(kind, IdempotencyConflict):
        return kind(form.message, None if form.job is None else view(form.job))
    if issubclass(kind, DirectoryLocked):
        return kind(form.message, form.pid)
    return kind(form.message)


__all__ = [
    "ErrorForm",
    "Hello",
    "Request",
    "ResultForm",
    "encode",
    "error_form",
    "error_of",
    "portable",
    "request_bytes",
    "request_of",
    "result_form",
    "result_of",
    "table_bytes",
    "table_of",
]
