"""Results as the JSON of the wire: values by type, schema fields, whole answers."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Any

import msgspec
import pyarrow as pa

from kalamdb.result import Result

_EPOCH = dt.date(1970, 1, 1)


def result_json(result: Result, as_user: str) -> dict[str, Any]:
    """One entry of `results`."""
    out: dict[str, Any] = {"row_count": result.row_count, "as_user": as_user}
    if result.message is not None:
        out["message"] = result.message
    if not result.columns:
        return out
    table = result.arrow()
    columns = [_column_json(field, column) for field, column in zip(table.schema, table.columns, strict=True)]
    out["schema"] = [
        {"name": field.name, "data_type": data_type(field), "index": at} for at, field in enumerate(table.schema)
    ]
    out["rows"] = list(zip(*columns, strict=True)) if columns else []
    return out


def data_type(field: pa.Field) -> Any:
    """The `data_type` of a schema field."""
    declared = (field.metadata or {}).get(b"kalam", b"").decode()
    names = {"UUID": "Uuid", "JSON": "Json", "FILE": "File", "DATETIME": "DateTime"}
    if declared in names:
        return names[declared]
    kind = field.type
    if pa.types.is_decimal(kind):
        return {"Decimal": {"precision": kind.precision, "scale": kind.scale}}
    if pa.types.is_fixed_size_list(kind):
        return {"Embedding": kind.list_size}
    if pa.types.is_timestamp(kind):
        return "DateTime" if kind.tz else "Timestamp"
    for test, name in _NAMES:
        if test(kind):
            return name
    return "Text"


_NAMES: list[tuple[Callable[[pa.DataType], bool], str]] = [
    (pa.types.is_boolean, "Boolean"),
    (pa.types.is_int8, "SmallInt"),
    (pa.types.is_int16, "SmallInt"),
    (pa.types.is_int32, "Int"),
    (pa.types.is_integer, "BigInt"),
    (pa.types.is_float32, "Float"),
    (pa.types.is_floating, "Double"),
    (pa.types.is_date, "Date"),
    (pa.types.is_time, "Time"),
    (pa.types.is_binary, "Bytes"),
]


def _column_json(field: pa.Field, column: pa.ChunkedArray) -> list[Any]:
    kind = field.type
    if pa.types.is_timestamp(kind) or pa.types.is_time(kind):
        return list(column.cast(pa.int64()).to_pylist())
    if pa.types.is_date(kind):
        return list(column.cast(pa.int32()).to_pylist())
    values = column.to_pylist()
    if pa.types.is_int64(kind) or pa.types.is_unsigned_integer(kind) or pa.types.is_decimal(kind):
        return [None if value is None else str(value) for value in values]
    if pa.types.is_binary(kind):
        return [None if value is None else list(value) for value in values]
    return list(values)


def encode(answer: Any) -> bytes:
    """JSON bytes of an answer."""
    return msgspec.json.encode(answer)
