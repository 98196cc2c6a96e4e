"""What a system table is: a name, columns, a source of rows; and how rows become Arrow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import pyarrow as pa

from kalamdb.schema import DataType, TypeName
from kalamdb.tables.codec import physical_type
from kalamdb.types import TableId

SYSTEM: Final = "system"
INFORMATION_SCHEMA: Final = "information_schema"

Filters = Mapping[str, frozenset[Any]]
"""Column -> the values that the statement can use. A hint: a source may answer with more."""

Rows = Iterable[Sequence[Any]]
Source = Callable[[Filters], Rows]

_SMALLINT_MAX: Final = (1 << 15) - 1
_INT_MAX: Final = (1 << 31) - 1
_SPELLINGS: Final = {
    "T": TypeName.TEXT,
    "TS": TypeName.TIMESTAMP,
    "BOOL": TypeName.BOOLEAN,
    **{str(name): name for name in TypeName},
}


@dataclass(frozen=True, slots=True)
class SystemColumn:
    """A column of a system table."""

    name: str
    type: DataType
    nullable: bool


@dataclass(frozen=True, slots=True)
class SystemTable:
    """A table whose rows are made when it is read."""

    table_id: TableId
    columns: tuple[SystemColumn, ...]
    source: Source
    """Rows in the order of the columns; JSON as plain data, timestamps as milliseconds since 1970."""


SystemTables = Callable[[], Sequence[SystemTable]]
"""All system tables by name, for those of them that list the others."""


def columns_of(spec: str) -> tuple[SystemColumn, ...]:
    """Columns from "name TYPE, name TYPE?": T is TEXT, TS is TIMESTAMP, ? allows NULL."""
    columns = []
    for part in spec.split(","):
        name, kind = part.split()
        type_name = _SPELLINGS[kind.removesuffix("?")]
        columns.append(SystemColumn(name, DataType(type_name), kind.endswith("?")))
    return tuple(columns)


def wants(filters: Filters, column: str, value: object) -> bool:
    """Whether the statement can use a row with this value."""
    wanted = filters.get(column)
    return wanted is None or value in wanted


def arrow_table(columns: Sequence[SystemColumn], rows: Rows) -> pa.Table:
    """Rows as Arrow; each must have one value per column."""
    schema = pa.schema([_field(column) for column in columns])
    values = list(zip(*rows, strict=True)) or [()] * len(columns)
    arrays = [_array(column, some) for column, some in zip(columns, values, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


def json_text(data: Any) -> str:
    """JSON of plain data; what JSON has no form for becomes its text."""
    return msgspec.json.encode(data, enc_hook=str).decode()


def _field(column: SystemColumn) -> pa.Field:
    metadata = {b"kalam": b"JSON"} if column.type.name is TypeName.JSON else None
    return pa.field(column.name, physical_type(column.type), column.nullable, metadata)


def _array(column: SystemColumn, values: Sequence[Any]) -> pa.Array:
    physical = physical_type(column.type)
    match column.type.name:
        case TypeName.TIMESTAMP:
            return pa.array([None if ms is None else ms * 1000 for ms in values], pa.int64()).view(physical)
        case TypeName.JSON:
            return pa.array([None if data is None else json_text(data) for data in values], physical)
        case TypeName.SMALLINT:
            return pa.array([None if number is None else min(number, _SMALLINT_MAX) for number in values], physical)
        case TypeName.INT:
            return pa.array([None if number is None else min(number, _INT_MAX) for number in values], physical)
        case _:
            return pa.array(values, physical)
