"""Values as JSON: Arrow columns, Python values and stored values of a type give the same, by the table of types."""

from __future__ import annotations

import datetime as dt
import json
import struct
import uuid
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as s

from kalamdb.schema import DataType, TypeName
from kalamdb.server.encode import column_values, data_type, encode, field_kind, row_encoder
from kalamdb.tables.codec import codec_of

_UTC = dt.timezone.utc  # noqa: UP017
_EPOCH = dt.datetime(1970, 1, 1)


def _us(moment: dt.datetime) -> int:
    return (moment.replace(tzinfo=None) - _EPOCH) // dt.timedelta(microseconds=1)


def _bits(size: int) -> Any:
    return s.integers(-(1 << size - 1), (1 << size - 1) - 1)


def _single(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


_DECIMALS = [DataType(TypeName.DECIMAL, precision=10, scale=2), DataType(TypeName.DECIMAL, precision=38, scale=20)]
_FINITE = s.floats(allow_nan=False, allow_infinity=False)
_FLOATS = s.floats(width=32, allow_nan=False, allow_infinity=False)
_JSON = s.recursive(s.none() | s.booleans() | s.integers(-9, 9) | s.text(max_size=3), lambda inner: s.lists(inner))
_TEXT = s.text(s.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=20)
CASES: dict[str, tuple[DataType, Any, Any]] = {
    "boolean": (DataType(TypeName.BOOLEAN), s.booleans(), lambda v: v),
    "smallint": (DataType(TypeName.SMALLINT), _bits(16), lambda v: v),
    "int": (DataType(TypeName.INT), _bits(32), lambda v: v),
    "bigint": (DataType(TypeName.BIGINT), _bits(64), str),
    "float": (DataType(TypeName.FLOAT), _FLOATS, lambda v: v),
    "double": (DataType(TypeName.DOUBLE), _FINITE, lambda v: v),
    "text": (DataType(TypeName.TEXT), _TEXT, lambda v: v),
    "bytes": (DataType(TypeName.BYTES), s.binary(max_size=20), list),
    "timestamp": (DataType(TypeName.TIMESTAMP), s.datetimes(), _us),
    "datetime": (DataType(TypeName.DATETIME), s.datetimes(timezones=s.just(_UTC)), _us),
    "date": (DataType(TypeName.DATE), s.dates(), lambda v: (v - dt.date(1970, 1, 1)).days),
    "time": (DataType(TypeName.TIME), s.times(), lambda v: _us(dt.datetime.combine(dt.date(1970, 1, 1), v))),
    "uuid": (DataType(TypeName.UUID), s.uuids(), str),
    "embedding": (DataType(TypeName.EMBEDDING, size=2), s.lists(_FLOATS, min_size=2, max_size=2), lambda v: v),
    "decimal(10,2)": (_DECIMALS[0], s.decimals(-9999999, 9999999, places=2), lambda v: f"{v:.2f}"),
    "decimal(38,20)": (_DECIMALS[1], s.decimals("-99.99", "99.99", places=20), lambda v: f"{v:.20f}"),
}


@pytest.mark.parametrize("name", CASES)
@given(data=s.data())
def test_all_three_forms_of_a_value_give_what_the_table_of_types_says(name: str, data: Any) -> None:
    kind, values, rule = CASES[name]
    codec = codec_of(kind)
    given_ = data.draw(s.lists(s.none() | values, min_size=1, max_size=5))
    stored = [codec.store(value, where="here") for value in given_]
    expected = [None if value is None else rule(_positive_zero(value)) for value in given_]
    loaded = [codec.load(value) for value in stored]
    from_arrow = column_values(kind, codec.to_arrow(stored))
    from_python = [row_encoder((kind,))([value])[0] for value in loaded]
    from_stored = [row_encoder((kind,), stored=True)([value])[0] for value in stored]
    for found in (from_arrow, from_python, from_stored):
        assert json.loads(encode(found)) == expected


def _positive_zero(value: Any) -> Any:
    return abs(value) if isinstance(value, Decimal) and value == 0 else value


def test_json_is_the_text_that_was_stored_and_of_a_python_value_its_shortest_text() -> None:
    kind = DataType(TypeName.JSON)
    assert row_encoder((kind,), stored=True)(['{"a": 1}']) == ['{"a": 1}']
    assert row_encoder((kind,))([{"a": 1}]) == ['{"a":1}']


@given(value=_JSON)
def test_a_python_value_of_json_is_shown_as_text_that_means_it(value: Any) -> None:
    [text] = row_encoder((DataType(TypeName.JSON),))([value])
    assert text is None if value is None else json.loads(text) == value


@pytest.mark.parametrize(
    "column, shown",
    [
        (pa.array([2**64 - 1], pa.uint64()), ["18446744073709551615"]),
        (pa.array([float("nan"), float("inf")], pa.float64()), [None, None]),
        (pa.array([None, None], pa.null()), [None, None]),
        (pa.array([[1, 2]], pa.list_(pa.int64())), ["[1,2]"]),
        (pa.array([{"a": uuid.UUID(int=0).hex}]), ['{"a":"' + "0" * 32 + '"}']),
        (pa.array([1], pa.timestamp("ms")), [1000]),
        (pa.array([Decimal("-0.000001")], pa.decimal128(12, 6)), ["-0.000001"]),
        (pa.array([Decimal("0.00000001")], pa.decimal128(12, 8)), ["0.00000001"]),
    ],
)
def test_what_only_queries_make_is_shown_too(column: pa.Array, shown: list[Any]) -> None:
    kind = field_kind(pa.field("x", column.type))
    assert json.loads(encode(column_values(kind, column))) == shown
    assert data_type(kind)
