"""Values, rows and results as the JSON of the wire; rows over HTTP and in live changes are encoded alike.

| Type | JSON |
|---|---|
| BIGINT, unsigned 64 bit | text of digits |
| SMALLINT, INT, FLOAT, DOUBLE | number; NaN and the infinities, which JSON lacks, are null |
| DECIMAL(p,s) | text with s decimals |
| TIMESTAMP, DATETIME, TIME | number of microseconds |
| DATE | number of days |
| BYTES, EMBEDDING | array of numbers |
| TEXT, UUID, JSON, FILE | text |
"""

from __future__ import annotations

import datetime as dt
import struct
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Any, assert_never

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from kalamdb.result import OutputColumn
from kalamdb.schema import DataType, TypeName

_EPOCH_DAY = dt.date(1970, 1, 1).toordinal()
_EPOCH = dt.datetime(1970, 1, 1)
_EPOCH_UTC = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_US = dt.timedelta(microseconds=1)
_PLAIN_SCALE_MAX = 6
"""Up to this scale Arrow writes a DECIMAL without an exponent."""

_encoder = msgspec.json.Encoder()
encode = _encoder.encode
"""JSON bytes of an answer made of dicts, lists and encoded values."""


# One value


def value_encoder(kind: DataType) -> Callable[[Any], Any] | None:
    """What turns a Python value of a type (never None) into what JSON shows; None when nothing is to be done."""
    match kind.name:
        case TypeName.BIGINT | TypeName.UUID:
            return str
        case TypeName.DECIMAL:
            return lambda value: format(value, f".{kind.scale}f")
        case TypeName.TIMESTAMP:
            return lambda value: (value - _EPOCH) // _US
        case TypeName.DATETIME:
            return lambda value: (value - _EPOCH_UTC) // _US
        case TypeName.DATE:
            return lambda value: value.toordinal() - _EPOCH_DAY
        case TypeName.TIME:
            return _time_us
        case TypeName.BYTES:
            return list
        case TypeName.JSON | TypeName.FILE:
            return lambda value: msgspec.json.encode(value).decode()
        case (
            TypeName.BOOLEAN | TypeName.SMALLINT | TypeName.INT | TypeName.FLOAT | TypeName.DOUBLE | TypeName.TEXT
            | TypeName.EMBEDDING
        ):  # fmt: skip
            return None
        case _:
            assert_never(kind.name)


def _time_us(value: dt.time) -> int:
    return ((value.hour * 60 + value.minute) * 60 + value.second) * 1_000_000 + value.microsecond


def stored_encoder(kind: DataType) -> Callable[[Any], Any] | None:
    """As `value_encoder`, of a value in stored form: how the tables layer keeps rows."""
    match kind.name:
        case TypeName.BIGINT:
            return str
        case TypeName.DECIMAL:
            return lambda stored: format(Decimal(stored), f".{kind.scale}f")
        case TypeName.BYTES:
            return list
        case TypeName.EMBEDDING:
            return lambda stored: list(struct.unpack(f"<{len(stored) // 4}f", stored))
        case _:
            return None


@lru_cache(maxsize=512)
def row_encoder(kinds: tuple[DataType, ...], *, stored: bool = False) -> Callable[[Sequence[Any]], list[Any]]:
    """What turns a row of Python values (or `stored` ones) of these types into the values that JSON shows."""
    find = stored_encoder if stored else value_encoder
    encoders = [(at, found) for at, kind in enumerate(kinds) if (found := find(kind)) is not None]

    def encode_row(row: Sequence[Any]) -> list[Any]:
        out = list(row)
        for at, encoder in encoders:
            if out[at] is not None:
                out[at] = encoder(out[at])
        return out

    return encode_row


# Columns of Arrow


def column_values(kind: DataType, column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """The values of a result's column as JSON shows them."""
    arrow = column.type
    match kind.name:
        case TypeName.BIGINT:
            return list(pc.cast(column, pa.string()).to_pylist())
        case TypeName.TIMESTAMP | TypeName.DATETIME | TypeName.TIME:
            unit = pa.time64("us") if pa.types.is_time(arrow) else pa.timestamp("us", arrow.tz)
            return list(pc.cast(pc.cast(column, unit, safe=False), pa.int64()).to_pylist())
        case TypeName.DATE:
            return list(pc.cast(pc.cast(column, pa.date32()), pa.int32()).to_pylist())
        case TypeName.DECIMAL if 0 <= kind.scale <= _PLAIN_SCALE_MAX:
            return list(pc.cast(column, pa.string()).to_pylist())
        case TypeName.DECIMAL:
            return [None if value is None else _plain_decimal(value, kind.scale) for value in column.to_pylist()]
        case TypeName.BYTES:
            return [None if value is None else list(value) for value in column.to_pylist()]
        case TypeName.TEXT if not _is_text(arrow):
            return _as_text(column)
        case _:
            return list(column.to_pylist())


def _plain_decimal(value: Decimal, scale: int) -> str:
    return format(value, f".{max(scale, 0)}f")


def _is_text(arrow: pa.DataType) -> bool:
    return bool(pa.types.is_string(arrow) or pa.types.is_large_string(arrow) or pa.types.is_string_view(arrow))


def _as_text(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Columns of types that SQL tables do not have: intervals, lists, structs, of NULLs."""
    return [
        value if value is None or isinstance(value, (str, bool, int, float)) else _text_of(value)
        for value in column.to_pylist()
    ]


def _text_of(value: Any) -> str:
    try:
        return _encoder.encode(value).decode()
    except (TypeError, UnicodeDecodeError):
        return str(value)


def rows_of(columns: Sequence[OutputColumn], batch: pa.RecordBatch | pa.Table) -> list[tuple[Any, ...]]:
    """The rows of a batch, their values as JSON shows them."""
    if not columns:
        return [()] * batch.num_rows
    values = [column_values(column.kind, array) for column, array in zip(columns, batch.columns, strict=True)]
    return list(zip(*values, strict=True))


# Schemas


def output_columns(schema: pa.Schema, known: Mapping[str, OutputColumn] | None = None) -> tuple[OutputColumn, ...]:
    """The columns of an Arrow result. A column of a name and type in `known` has the flags of that one."""
    found = []
    for field in schema:
        kind, column = field_kind(field), None
        if known is not None and (column := known.get(field.name)) is not None and column.kind != kind:
            column = None
        found.append(column or OutputColumn(field.name, kind))
    return tuple(found)


def field_kind(field: pa.Field) -> DataType:
    """The SQL type of a field of a result; TEXT for what SQL has no type for."""
    declared = (field.metadata or {}).get(b"kalam")
    if declared is not None:
        name = declared.decode()
        if "(" not in name:
            return DataType(TypeName(name))
    kind = field.type
    if pa.types.is_decimal(kind):
        return DataType(TypeName.DECIMAL, precision=kind.precision, scale=kind.scale)
    if pa.types.is_fixed_size_list(kind):
        return DataType(TypeName.EMBEDDING, size=kind.list_size)
    if pa.types.is_timestamp(kind):
        return DataType(TypeName.DATETIME if kind.tz else TypeName.TIMESTAMP)
    return next((DataType(name) for test, name in _TESTS if test(kind)), DataType(TypeName.TEXT))


_TESTS: list[tuple[Callable[[pa.DataType], bool], TypeName]] = [
    (pa.types.is_boolean, TypeName.BOOLEAN),
    (pa.types.is_int8, TypeName.SMALLINT),
    (pa.types.is_uint8, TypeName.SMALLINT),
    (pa.types.is_int16, TypeName.SMALLINT),
    (pa.types.is_uint16, TypeName.INT),
    (pa.types.is_int32, TypeName.INT),
    (pa.types.is_integer, TypeName.BIGINT),
    (pa.types.is_float16, TypeName.FLOAT),
    (pa.types.is_float32, TypeName.FLOAT),
    (pa.types.is_floating, TypeName.DOUBLE),
    (pa.types.is_date, TypeName.DATE),
    (pa.types.is_time, TypeName.TIME),
    (pa.types.is_binary, TypeName.BYTES),
    (pa.types.is_large_binary, TypeName.BYTES),
]

_WIRE_NAMES = {
    TypeName.BOOLEAN: "Boolean", TypeName.SMALLINT: "SmallInt", TypeName.INT: "Int", TypeName.BIGINT: "BigInt",
    TypeName.FLOAT: "Float", TypeName.DOUBLE: "Double", TypeName.TEXT: "Text", TypeName.BYTES: "Bytes",
    TypeName.JSON: "Json", TypeName.TIMESTAMP: "Timestamp", TypeName.DATETIME: "DateTime", TypeName.DATE: "Date",
    TypeName.TIME: "Time", TypeName.UUID: "Uuid", TypeName.FILE: "File",
}  # fmt: skip


def data_type(kind: DataType) -> Any:
    """The `data_type` of a schema field."""
    match kind.name:
        case TypeName.DECIMAL:
            return {"Decimal": {"precision": kind.precision, "scale": kind.scale}}
        case TypeName.EMBEDDING:
            return {"Embedding": kind.size}
        case _:
            return _WIRE_NAMES[kind.name]


@lru_cache(maxsize=512)
def schema_json(columns: tuple[OutputColumn, ...]) -> msgspec.Raw:
    """The `schema` of a result, encoded."""
    fields = []
    for at, column in enumerate(columns):
        field: dict[str, Any] = {"name": column.name, "data_type": data_type(column.kind), "index": at}
        if column.flags:
            field["flags"] = list(column.flags)
        fields.append(field)
    return msgspec.Raw(_encoder.encode(fields))


__all__ = [
    "column_values",
    "data_type",
    "encode",
    "field_kind",
    "output_columns",
    "row_encoder",
    "rows_of",
    "schema_json",
    "stored_encoder",
    "value_encoder",
]
