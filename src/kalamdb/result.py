"""What a statement gives back: rows as Arrow, shown as Python values on demand."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from kalamdb.errors import InvalidRequest
from kalamdb.schema import DataType

if TYPE_CHECKING:
    import pandas
    import polars
    import pyarrow

_TYPE_METADATA = b"kalam"


@dataclass(frozen=True, slots=True)
class OutputColumn:
    """A column of a result: its SQL type, and what is known of its values: nn (never NULL), pk (the primary key or
    a part of it), uq (no value twice)."""

    name: str
    kind: DataType
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RowsFirst:
    """Rows that are there in stored form; Python values and Arrow are made when somebody asks for them."""

    outputs: tuple[OutputColumn, ...]
    stored: list[tuple[Any, ...]]
    load: Callable[[], list[tuple[Any, ...]]]
    build: Callable[[], pyarrow.Table]
    schema: Callable[[], pyarrow.Schema]
    """Of that Arrow, without making it."""


class Result:
    """Rows and message of one statement, materialised.

    `row_count` is the number of rows: returned, or written when there are none. `results` holds the
    results of all statements of a batch, this being the last. Iterating gives tuples.
    """

    def __init__(
        self,
        table: pyarrow.Table | RowsFirst | None = None,
        *,
        row_count: int | None = None,
        message: str | None = None,
        results: list[Result] | None = None,
        known: Mapping[str, OutputColumn] | None = None,
    ) -> None:
        ready = table if isinstance(table, RowsFirst) else None
        self._table: pyarrow.Table | None = None if isinstance(table, RowsFirst) else table
        self._rows: list[tuple[Any, ...]] | None = None
        self.ready = ready
        """The rows in stored form, where they are there."""
        self.outputs: tuple[OutputColumn, ...] | None = ready.outputs if ready is not None else None
        """The columns, when they are known without a look at the Arrow table."""
        self.known: Mapping[str, OutputColumn] = known or {}
        """The columns of the table that was read, by name."""
        self._columns: list[str] | None = None if self.outputs is None else [one.name for one in self.outputs]
        self.row_count: int = row_count if row_count is not None else self._count()
        self.message = message
        self.results: list[Result] = results if results is not None else [self]
        self.as_user: str | None = None
        """Whose rows the statement worked on, where EXECUTE AS USER named another user."""
        self._position = 0

    def _count(self) -> int:
        if self.ready is not None:
            return len(self.ready.stored)
        return 0 if self._table is None else int(self._table.num_rows)

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        if self._columns is None:
            self._columns = [] if self._table is None else list(self._table.schema.names)
        return list(self._columns)

    @property
    def rows(self) -> list[tuple[Any, ...]]:
        """All rows as tuples of Python values."""
        if self._rows is None and self.ready is not None:
            self._rows = self.ready.load()
        elif self._rows is None:
            self._rows = [] if self._table is None else table_rows(self._table)
        return self._rows

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def fetchone(self) -> tuple[Any, ...] | None:
        """The next row, None at the end."""
        if self._position >= len(self.rows):
            return None
        self._position += 1
        return self.rows[self._position - 1]

    def fetchall(self) -> list[tuple[Any, ...]]:
        """The rows that were not fetched yet."""
        left = self.rows[self._position :]
        self._position = len(self.rows)
        return left

    def dicts(self) -> list[dict[str, Any]]:
        """All rows as dicts."""
        names = self.columns
        return [dict(zip(names, row, strict=True)) for row in self.rows]

    def scalar(self) -> Any:
        """The first value of the first row, None when there is no row. Raises InvalidRequest without columns."""
        if not self.columns:
            raise InvalidRequest("the statement returned no columns, so there is no scalar")
        return self.rows[0][0] if self.rows else None

    def arrow(self) -> pyarrow.Table:
        """The rows as an Arrow table; empty for a statement without rows."""
        if self._table is None:
            if self.ready is None:
                import pyarrow as pa

                return pa.table({})
            self._table = self.ready.build()
        return self._table

    def to_pandas(self) -> pandas.DataFrame:
        """The rows as a pandas DataFrame; pandas must be installed."""
        return self.arrow().to_pandas()

    def to_polars(self) -> polars.DataFrame:
        """The rows as a polars DataFrame, columns of one name numbered; polars must be installed."""
        import polars

        seen: dict[str, int] = {}
        names = []
        for name in self.columns:
            count = seen[name] = seen.get(name, -1) + 1
            names.append(f"{name}:{count}" if count else name)
        frame = polars.from_arrow(self.arrow().rename_columns(names))
        assert isinstance(frame, polars.DataFrame)
        return frame

    def __repr__(self) -> str:
        if not self.columns:
            return f"<Result {self.message or self.row_count!r}>"
        return f"<Result {self.row_count} rows of {', '.join(self.columns)}>"


def table_rows(table: pyarrow.Table) -> list[tuple[Any, ...]]:
    """Rows of an Arrow table as tuples of the Python values that the types of SQL promise."""
    if not table.num_columns:
        return [()] * table.num_rows
    columns = []
    for field, column in zip(table.schema, table.columns, strict=True):
        try:
            values = column.to_pylist()
        except (OverflowError, ValueError) as exc:
            raise InvalidRequest(
                f"column '{field.name}' holds a value of type {field.type} that Python has no value for: {exc}; "
                "read it with arrow() or CAST it to TEXT"
            ) from exc
        convert = _converter(field)
        columns.append(values if convert is None else [None if v is None else convert(v) for v in values])
    return list(zip(*columns, strict=True))


def _converter(field: pyarrow.Field) -> Callable[[Any], Any] | None:
    kind = (field.metadata or {}).get(_TYPE_METADATA, b"")
    if kind == b"UUID":
        return uuid.UUID
    if kind in (b"JSON", b"FILE"):
        return msgspec.json.decode
    return None
