"""Rows in the forms that programs have them in, as Arrow columns of a table.

Arrow, pandas and polars stay columns. Rows of Python values are read by the codecs of the table's columns, so a
value means in `db.insert` what it means as a parameter of INSERT.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from kalamdb.errors import InvalidRequest
from kalamdb.tables.codec import shown
from kalamdb.tables.layout import Layout

_ONE_TYPE = (int, float, str, bytes, bool)
"""Types whose columns Arrow makes as they are."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Rows by column."""

    table: pa.Table
    absent: dict[str, list[int]] = field(default_factory=dict)
    """Column -> rows (of dicts) that do not name it: they take its default."""


@dataclass(frozen=True, slots=True)
class LooseColumns:
    """Columns of which some are still Python values: what those mean is for the table to say."""

    columns: list[tuple[str, Any]]
    """Name, and an Arrow array or a list."""


def columns_of(data: Any, layout: Layout, user_column: str | None) -> Columns:
    """`data` as columns. Raises InvalidRequest for what is neither a table nor rows, and for values that do not fit."""
    found = data_of(data)
    if isinstance(found, pa.Table):
        return Columns(found)
    if not isinstance(found, LooseColumns):
        return _of_rows(found, layout, user_column)
    arrays = [_column(one, name, layout) if isinstance(one, list) else one for name, one in found.columns]
    return Columns(pa.Table.from_arrays(arrays, names=[name for name, _ in found.columns]))


def data_of(data: Any) -> pa.Table | LooseColumns | Sequence[Any]:
    """`data` as far as it can be read without knowing its table: Arrow, columns, or rows of Python values.

    Raises InvalidRequest for what is none of them.
    """
    try:
        found = _of_table(data)
    except (pa.ArrowException, ValueError, TypeError, KeyError, OverflowError) as exc:
        raise InvalidRequest(f"the data cannot be read as a table: {shown(str(exc))}") from exc
    return _rows(data) if found is None else found


def _of_table(data: Any) -> pa.Table | LooseColumns | None:
    """What is a table already; None for rows."""
    if isinstance(data, LooseColumns):
        return data
    if isinstance(data, pa.RecordBatch):
        return _named_once(pa.Table.from_batches([data]))
    if isinstance(data, pa.Table):
        return _named_once(data)
    if hasattr(data, "iloc") and hasattr(data, "columns"):
        return _of_pandas(data)
    if hasattr(data, "to_arrow"):
        return _named_once(data.to_arrow())
    if hasattr(data, "__arrow_c_stream__"):
        return _named_once(pa.table(data))
    return None


def _named_once(table: pa.Table) -> pa.Table:
    names = table.schema.names
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest(f"the data has column '{twice}' twice")
    return table


def _of_pandas(frame: Any) -> LooseColumns:
    """Columns of Python objects are read value by value, others by Arrow; the index is not a column."""
    names = [str(name) for name in frame.columns]
    if len(set(names)) != len(names):
        raise InvalidRequest("the data frame has two columns of one name")
    columns: list[tuple[str, Any]] = []
    for at, name in enumerate(names):
        series = frame.iloc[:, at]
        if series.dtype == object:
            missing = series.isna()
            values = [None if gone is True else value for value, gone in zip(series, missing.tolist(), strict=True)]
            columns.append((name, values))
        else:
            columns.append((name, pa.Array.from_pandas(series)))
    return LooseColumns(columns)


def _rows(data: Any) -> Sequence[Any]:
    if isinstance(data, (str, bytes, Mapping, pa.Array, pa.ChunkedArray)) or not isinstance(data, Iterable):
        raise InvalidRequest(
            f"data of type {type(data).__name__} cannot be inserted; give Arrow, pandas, polars, or a list of dicts or "
            "tuples"
        )
    try:
        rows = data if isinstance(data, (list, tuple)) else list(data)
    except TypeError as exc:
        raise InvalidRequest(f"data of type {type(data).__name__} cannot be inserted: {exc}") from exc
    for at, row in enumerate(rows):
        if not isinstance(row, (Mapping, list, tuple)) or isinstance(row, Mapping) != isinstance(rows[0], Mapping):
            raise InvalidRequest(
                f"row {at + 1} of the data is a {type(row).__name__}; rows are all dicts, or all tuples or lists"
            )
    return rows


def _of_rows(rows: Sequence[Any], layout: Layout, user_column: str | None) -> Columns:
    if not rows:
        return Columns(pa.table({}))
    if isinstance(rows[0], Mapping):
        names = list(dict.fromkeys(name for row in rows for name in row))
        if not names:
            raise InvalidRequest("the rows name no column; give at least one")
        absent = {}
        for name in names:
            missing = [at for at, row in enumerate(rows) if name not in row]
            if missing:
                absent[name] = missing
        arrays = [_column([row.get(name) for row in rows], str(name), layout) for name in names]
        return Columns(pa.Table.from_arrays(arrays, names=[str(name) for name in names]), absent)
    own = [column.name for column in layout.columns]
    names = own if user_column is None else [user_column, *own]
    width = len(rows[0])
    for at, row in enumerate(rows):
        if len(row) != width or not 0 < width <= len(names):
            raise InvalidRequest(
                f"row {at + 1} of the data has {len(row)} values; rows as tuples have one length of 1 to "
                f"{len(names)}: {', '.join(names)}"
            )
    arrays = [_column([row[at] for row in rows], name, layout) for at, name in enumerate(names[:width])]
    return Columns(pa.Table.from_arrays(arrays, names=names[:width]))


def _column(values: list[Any], name: str, layout: Layout) -> pa.Array:
    kinds = set(map(type, values)) - {type(None)}
    at = layout.index_of_name.get(name)
    if at is None or (len(kinds) == 1 and next(iter(kinds)) in _ONE_TYPE):
        try:
            return pa.array(values)
        except (pa.ArrowException, OverflowError, TypeError, ValueError) as exc:
            if at is None:
                raise InvalidRequest(f"column '{name}' holds values that do not go together: {exc}") from None
    codec = layout.codecs[at]
    return codec.to_arrow([codec.store(value, where=f"column '{name}'") for value in values])
