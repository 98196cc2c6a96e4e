"""Values between four forms: Python objects, stored primitives, key bytes, Arrow arrays.

*Stored* is what a hot row's payload and a catalog record hold: bool, int, float, str, bytes or None.
Dates are days, times and timestamps microseconds since 1970, decimals their text, embeddings packed
float32 (little endian), UUIDs their canonical text (compared and sorted like their bytes, and the
engine has no UUID type). *Physical* is the Arrow type in segments, in the hot cache and in the engine.
"""

from __future__ import annotations

import array
import datetime as dt
import math
import re
import struct
import sys
import uuid
from collections.abc import Callable, Sequence
from decimal import ROUND_HALF_UP, Decimal, InvalidOperation, localcontext
from functools import lru_cache
from typing import Any, assert_never, cast

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from kalamdb.errors import InvalidRequest
from kalamdb.schema import ColumnDef, DataType, TypeName
from kalamdb.storage import keys

Stored = bool | int | float | str | bytes | None

_EPOCH_DAY = dt.date(1970, 1, 1).toordinal()
_EPOCH = dt.datetime(1970, 1, 1)
_EPOCH_UTC = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_MICROSECOND = dt.timedelta(microseconds=1)
_INT_BITS = {TypeName.SMALLINT: 16, TypeName.INT: 32, TypeName.BIGINT: 64}
_FLOAT32_MAX = 3.4028234663852886e38
_TRUE = frozenset({"true", "t", "yes", "on", "1"})
_FALSE = frozenset({"false", "f", "no", "off", "0"})
_SHOWN_MAX = 60
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def shown(value: object) -> str:
    """`value` as it appears in an error message, cut to a readable length."""
    text = _ADDRESS.sub("", repr(value))
    return text if len(text) <= _SHOWN_MAX else text[: _SHOWN_MAX - 3] + "..."


def is_unicode(text: str) -> bool:
    """Whether the text can be stored: it holds no half of a surrogate pair."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def physical_type(kind: DataType) -> pa.DataType:
    """Arrow type of a column in segments, in the hot cache and in the engine."""
    match kind.name:
        case TypeName.BOOLEAN:
            return pa.bool_()
        case TypeName.SMALLINT:
            return pa.int16()
        case TypeName.INT:
            return pa.int32()
        case TypeName.BIGINT:
            return pa.int64()
        case TypeName.FLOAT:
            return pa.float32()
        case TypeName.DOUBLE:
            return pa.float64()
        case TypeName.DECIMAL:
            return pa.decimal128(kind.precision, kind.scale)
        case TypeName.TEXT | TypeName.JSON | TypeName.FILE | TypeName.UUID:
            return pa.string()
        case TypeName.BYTES:
            return pa.binary()
        case TypeName.TIMESTAMP:
            return pa.timestamp("us")
        case TypeName.DATETIME:
            return pa.timestamp("us", "UTC")
        case TypeName.DATE:
            return pa.date32()
        case TypeName.TIME:
            return pa.time64("us")
        case TypeName.EMBEDDING:
            return pa.list_(pa.float32(), kind.size)
        case _:
            assert_never(kind.name)


def _key_encoder(kind: DataType) -> Callable[[Any], bytes]:
    match kind.name:
        case TypeName.BOOLEAN:
            return lambda stored: b"\x01" if stored else b"\x00"
        case TypeName.DECIMAL:
            return lambda stored: keys.encode_wide_int(int(Decimal(str(stored)).scaleb(kind.scale)))
        case TypeName.FLOAT | TypeName.DOUBLE:
            return keys.encode_float
        case TypeName.BYTES:
            return keys.encode_bytes
        case TypeName.TEXT | TypeName.UUID:
            return keys.encode_text
        case _:
            return keys.encode_int


_TEMPORAL = frozenset({TypeName.DATE, TypeName.TIMESTAMP, TypeName.DATETIME, TypeName.TIME})
"""Stored as numbers."""


class ValueCodec:
    """Conversions of one data type. Stateless; get one from `codec_of`."""

    def __init__(self, kind: DataType) -> None:
        self.kind = kind
        self.physical = physical_type(kind)
        self._encode = _ENCODERS[kind.name]
        self._decode = _DECODERS.get(kind.name)
        self.key_bytes = _key_encoder(kind)
        """Order-preserving bytes of a primary key value in stored form."""

    def store(self, value: object, *, where: str) -> Stored:
        """Python value to stored form; `where` names the column in errors. Raises InvalidRequest."""
        if value is None:
            return None
        try:
            return self._encode(value, self.kind)
        except _Unfit as exc:
            raise InvalidRequest(f"{where}: {exc}") from None
        except (ValueError, TypeError, OverflowError, InvalidOperation) as exc:
            raise InvalidRequest(f"{where}: {shown(value)} is not a valid {self.kind} value") from exc

    def load(self, stored: Stored) -> Any:
        """Stored form to the Python value that results show."""
        if stored is None or self._decode is None:
            return stored
        return self._decode(stored)

    def to_arrow(self, stored: Sequence[Stored]) -> pa.Array:
        """A column of stored values as an Arrow array of the physical type."""
        match self.kind.name:
            case TypeName.DATE:
                return pa.array(stored, pa.int32()).view(self.physical)
            case TypeName.TIMESTAMP | TypeName.DATETIME | TypeName.TIME:
                return pa.array(stored, pa.int64()).view(self.physical)
            case TypeName.DECIMAL:
                texts = cast(Sequence[str | None], stored)
                return pa.array([None if v is None else Decimal(v) for v in texts], self.physical)
            case TypeName.EMBEDDING:
                return self._embeddings_to_arrow(stored)
            case _:
                return pa.array(stored, self.physical)

    def from_arrow(self, column: pa.Array | pa.ChunkedArray) -> list[Stored]:
        """An Arrow array of the physical type as stored values."""
        match self.kind.name:
            case TypeName.DATE:
                return list(column.cast(pa.int32()).to_pylist())
            case TypeName.TIMESTAMP | TypeName.DATETIME | TypeName.TIME:
                return list(column.cast(pa.int64()).to_pylist())
            case TypeName.DECIMAL:
                return [None if v is None else format(v, "f") for v in column.to_pylist()]
            case TypeName.EMBEDDING:
                return [None if v is None else struct.pack(f"<{len(v)}f", *v) for v in column.to_pylist()]
            case _:
                return list(column.to_pylist())

    def from_scalar(self, scalar: pa.Scalar) -> Stored:
        """One value of a column of the physical type as stored value."""
        value: Any = scalar.as_py() if self.kind.name not in _TEMPORAL else scalar.value
        match self.kind.name:
            case TypeName.DECIMAL if value is not None:
                value = format(value, "f")
            case TypeName.EMBEDDING if value is not None:
                value = struct.pack(f"<{len(value)}f", *value)
            case _:
                pass
        stored: Stored = value
        return stored

    def coerce(self, column: pa.Array | pa.ChunkedArray, *, where: str) -> pa.Array:
        """Any Arrow column as an array of the physical type; vectorised where Arrow can cast exactly.

        Raises InvalidRequest naming the first value that does not fit.
        """
        if isinstance(column, pa.ChunkedArray):
            column = column.combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
        if column.type == self.physical and (self.kind.name not in _CHECKED_TEXT or self._all_finite(column)):
            return self._in_range(column, where)
        if self.kind.name not in _CHECKED_TEXT and _casts_exactly(column.type, self.physical):
            try:
                return self._in_range(pc.cast(column, self.physical, safe=True), where)
            except pa.ArrowInvalid:
                pass
        try:
            values = column.to_pylist()
        except (OverflowError, ValueError) as exc:
            raise InvalidRequest(f"{where}: a value is out of range for {self.kind}: {exc}") from exc
        return self.to_arrow([self.store(value, where=where) for value in values])

    def _in_range(self, column: pa.Array, where: str) -> pa.Array:
        """Refuse moments that Arrow knows and Python does not: years 1 to 9999 can be read back."""
        bounds = _MOMENTS.get(self.kind.name)
        if bounds is None or not len(column):
            return column
        plain = pa.int32() if self.kind.name is TypeName.DATE else pa.int64()
        found = pc.min_max(column.view(plain)).as_py()
        for value in (found["min"], found["max"]):
            if value is not None and not bounds[0] <= value <= bounds[1]:
                unit = "days" if self.kind.name is TypeName.DATE else "microseconds"
                since = "midnight" if self.kind.name is TypeName.TIME else "1970-01-01"
                raise InvalidRequest(f"{where}: {value} {unit} since {since} is out of range for {self.kind}")
        return column

    def _all_finite(self, column: pa.Array) -> bool:
        if self.kind.name is not TypeName.EMBEDDING or column.null_count:
            return False
        return pc.all(pc.is_finite(column.flatten())).as_py() is not False

    def _embeddings_to_arrow(self, stored: Sequence[Stored]) -> pa.Array:
        size = self.kind.size
        zero = bytes(4 * size)
        packed = b"".join(zero if v is None else v for v in cast(Sequence[bytes | None], stored))
        flat = pa.Array.from_buffers(pa.float32(), size * len(stored), [None, pa.py_buffer(packed)])
        mask = pa.array([v is None for v in stored], pa.bool_())
        return pa.FixedSizeListArray.from_arrays(flat, size, mask=mask)


@lru_cache(maxsize=4096)
def codec_of(kind: DataType) -> ValueCodec:
    """The codec of a data type."""
    return ValueCodec(kind)


def column_codec(column: ColumnDef) -> ValueCodec:
    """The codec of a column's type."""
    return codec_of(column.type)


class _Unfit(ValueError):
    """A value does not fit; the text says why."""


def _bool(value: object, kind: DataType) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower() if isinstance(value, (str, int)) else ""
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise _Unfit(f"{shown(value)} is not a valid BOOLEAN value")


def _int(value: object, kind: DataType) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal, str)):
        raise _Unfit(f"{shown(value)} is not a valid {kind} value")
    if isinstance(value, (float, Decimal)) and not value == int(value):
        raise _Unfit(f"{shown(value)} has a fraction, which {kind} cannot hold")
    if isinstance(value, str) and len(value) > _SHOWN_MAX:
        raise _Unfit(f"{shown(value)} is not a valid {kind} value")
    number = int(value)
    bound = 1 << (_INT_BITS[kind.name] - 1)
    if not -bound <= number < bound:
        raise _Unfit(f"{shown(value)} is out of range for {kind} ({-bound} to {bound - 1})")
    return number


def _float(value: object, kind: DataType) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal, str)):
        raise _Unfit(f"{shown(value)} is not a valid {kind} value")
    number = float(value)
    if math.isinf(number) and isinstance(value, Decimal) and value.is_finite():
        raise _Unfit(f"{shown(value)} is out of range for {kind}")
    if kind.name is TypeName.FLOAT:
        if math.isfinite(number) and abs(number) > _FLOAT32_MAX:
            raise _Unfit(f"{shown(value)} is out of range for FLOAT")
        number = struct.unpack("<f", struct.pack("<f", number))[0]
    return number


def _decimal(value: object, kind: DataType) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal, str)):
        raise _Unfit(f"{shown(value)} is not a valid {kind} value")
    number = Decimal(repr(value)) if isinstance(value, float) else Decimal(value)
    if not number.is_finite():
        raise _Unfit(f"{shown(value)} is not a finite number")
    with localcontext() as context:
        context.prec = 100
        number = number.quantize(Decimal(1).scaleb(-kind.scale), rounding=ROUND_HALF_UP)
    if number.adjusted() >= kind.precision - kind.scale and number != 0:
        raise _Unfit(f"{shown(value)} is out of range for {kind}")
    return format(abs(number) if number == 0 else number, "f")


def _text(value: object, kind: DataType) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float, Decimal, uuid.UUID)):
        raise _Unfit(f"{shown(value)} is not a valid {kind} value")
    text = str(value)
    if not text.isascii():
        text.encode()
    return text


def _bytes(value: object, kind: DataType) -> bytes:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, str):
        return value.encode()
    raise _Unfit(f"{shown(value)} is not a valid BYTES value")


def _json(value: object, kind: DataType) -> str:
    if isinstance(value, (bytes, bytearray)):
        value = value.decode()
    if isinstance(value, str):
        try:
            msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError) as exc:
            raise _Unfit(f"{shown(value)} is not valid JSON: {exc}") from None
        return value
    return msgspec.json.encode(_plain_json(value)).decode()


def _plain_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise _Unfit(f"{value} has no JSON form")
    if isinstance(value, dict):
        return {str(key): _plain_json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_json(inner) for inner in value]
    return value


def _timestamp(value: object, kind: DataType) -> int:
    if isinstance(value, str):
        value = dt.datetime.fromisoformat(value.strip())
    if isinstance(value, dt.datetime):
        base = _EPOCH if value.tzinfo is None else _EPOCH_UTC
        return (value - base) // _MICROSECOND
    if isinstance(value, dt.date):
        return (value.toordinal() - _EPOCH_DAY) * 86_400_000_000
    if isinstance(value, int) and not isinstance(value, bool):
        _EPOCH + value * _MICROSECOND
        return value
    raise _Unfit(f"{shown(value)} is not a valid {kind} value")


def _date(value: object, kind: DataType) -> int:
    if isinstance(value, str):
        value = dt.datetime.fromisoformat(value.strip())
    if isinstance(value, dt.date):
        return value.toordinal() - _EPOCH_DAY
    if isinstance(value, int) and not isinstance(value, bool):
        dt.date.fromordinal(value + _EPOCH_DAY)
        return value
    raise _Unfit(f"{shown(value)} is not a valid DATE value")


def _time(value: object, kind: DataType) -> int:
    if isinstance(value, str):
        value = dt.time.fromisoformat(value.strip())
    if isinstance(value, dt.time):
        if value.tzinfo is not None:
            raise _Unfit(f"{shown(value)} has a time zone, which TIME cannot hold")
        seconds = (value.hour * 60 + value.minute) * 60 + value.second
        return seconds * 1_000_000 + value.microsecond
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 86_400_000_000:
        return value
    raise _Unfit(f"{shown(value)} is not a valid TIME value")


def _uuid(value: object, kind: DataType) -> str:
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, str):
        return str(uuid.UUID(value))
    if isinstance(value, (bytes, bytearray)) and len(value) == 16:
        return str(uuid.UUID(bytes=bytes(value)))
    raise _Unfit(f"{shown(value)} is not a valid UUID value")


def _embedding(value: object, kind: DataType) -> bytes:
    if isinstance(value, str):
        value = msgspec.json.decode(value, type=list[float])
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        raise _Unfit(f"{shown(value)} is not a valid {kind} value")
    if len(value) != kind.size:
        raise _Unfit(f"a vector of {len(value)} numbers does not fit {kind}")
    packed = array.array("f", value)
    if not all(map(math.isfinite, packed)):
        raise _Unfit("the vector holds a number that is not finite")
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


_ENCODERS: dict[TypeName, Callable[[Any, DataType], Stored]] = {
    TypeName.BOOLEAN: _bool,
    TypeName.SMALLINT: _int,
    TypeName.INT: _int,
    TypeName.BIGINT: _int,
    TypeName.FLOAT: _float,
    TypeName.DOUBLE: _float,
    TypeName.DECIMAL: _decimal,
    TypeName.TEXT: _text,
    TypeName.BYTES: _bytes,
    TypeName.JSON: _json,
    TypeName.FILE: _json,
    TypeName.TIMESTAMP: _timestamp,
    TypeName.DATETIME: _timestamp,
    TypeName.DATE: _date,
    TypeName.TIME: _time,
    TypeName.UUID: _uuid,
    TypeName.EMBEDDING: _embedding,
}

_DECODERS: dict[TypeName, Callable[[Any], Any]] = {
    TypeName.DECIMAL: Decimal,
    TypeName.JSON: msgspec.json.decode,
    TypeName.FILE: msgspec.json.decode,
    TypeName.TIMESTAMP: lambda stored: _EPOCH + stored * _MICROSECOND,
    TypeName.DATETIME: lambda stored: _EPOCH_UTC + stored * _MICROSECOND,
    TypeName.DATE: lambda stored: dt.date.fromordinal(stored + _EPOCH_DAY),
    TypeName.TIME: lambda stored: (_EPOCH + stored * _MICROSECOND).time(),
    TypeName.UUID: uuid.UUID,
    TypeName.EMBEDDING: lambda stored: list(struct.unpack(f"<{len(stored) // 4}f", stored)),
}

_DAY_US = 86_400_000_000
_DAYS = (1 - _EPOCH_DAY, dt.date.max.toordinal() - _EPOCH_DAY)
_MICROSECONDS = (_DAYS[0] * _DAY_US, (_DAYS[1] + 1) * _DAY_US - 1)
_MOMENTS = {
    TypeName.DATE: _DAYS,
    TypeName.TIMESTAMP: _MICROSECONDS,
    TypeName.DATETIME: _MICROSECONDS,
    TypeName.TIME: (0, _DAY_US - 1),
}
"""Smallest and largest stored value."""
_CHECKED_TEXT = frozenset({TypeName.JSON, TypeName.FILE, TypeName.UUID, TypeName.EMBEDDING})


def _casts_exactly(source: pa.DataType, target: pa.DataType) -> bool:
    """Whether Arrow's safe cast means the same as `ValueCodec.store` on each value."""
    if source == target or pa.types.is_null(source):
        return True
    if pa.types.is_integer(target):
        return bool(pa.types.is_integer(source) or pa.types.is_floating(source))
    if pa.types.is_floating(target):
        narrows = pa.types.is_float64(source) and pa.types.is_float32(target)
        return bool(not narrows and (pa.types.is_integer(source) or pa.types.is_floating(source)))
    if pa.types.is_string(target):
        return bool(
            pa.types.is_large_string(source) or pa.types.is_string_view(source) or pa.types.is_dictionary(source)
        )
    if pa.types.is_binary(target):
        return bool(pa.types.is_large_binary(source) or pa.types.is_binary_view(source))
    if pa.types.is_timestamp(target):
        return bool(pa.types.is_timestamp(source))
    return bool(pa.types.is_decimal(target) and pa.types.is_decimal(source) and source.scale <= target.scale)
