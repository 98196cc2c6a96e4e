"""What a table is: types, columns, options. Plain frozen data, stored as records."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgspec

from kalamdb.types import AccessLevel, TableId, TableKind, TableUid


class TypeName(StrEnum):
    """The data types of SQL."""

    BOOLEAN = "BOOLEAN"
    SMALLINT = "SMALLINT"
    INT = "INT"
    BIGINT = "BIGINT"
    FLOAT = "FLOAT"
    DOUBLE = "DOUBLE"
    DECIMAL = "DECIMAL"
    TEXT = "TEXT"
    BYTES = "BYTES"
    JSON = "JSON"
    TIMESTAMP = "TIMESTAMP"
    DATETIME = "DATETIME"
    DATE = "DATE"
    TIME = "TIME"
    UUID = "UUID"
    EMBEDDING = "EMBEDDING"
    FILE = "FILE"


class DataType(msgspec.Struct, frozen=True):
    """A data type with its parameters (DECIMAL: precision and scale; EMBEDDING: size)."""

    name: TypeName
    precision: int = 0
    scale: int = 0
    size: int = 0

    def __str__(self) -> str:
        match self.name:
            case TypeName.DECIMAL:
                return f"DECIMAL({self.precision},{self.scale})"
            case TypeName.EMBEDDING:
                return f"EMBEDDING({self.size})"
            case _:
                return str(self.name)


class DefaultFunction(StrEnum):
    """Functions that may stand behind DEFAULT; evaluated once per row."""

    NOW = "NOW"
    SNOWFLAKE_ID = "SNOWFLAKE_ID"
    UUID_V7 = "UUID_V7"
    ULID = "ULID"
    CURRENT_USER = "CURRENT_USER"


class Default(msgspec.Struct, frozen=True):
    """A column's default: a function, or a constant in stored form (see `tables.codec`)."""

    function: DefaultFunction | None = None
    constant: Any = None
    sql: str = ""
    """As DESCRIBE shows it."""


class ColumnDef(msgspec.Struct, frozen=True, kw_only=True):
    """One column. `id` is never reused within a table."""

    id: int
    name: str
    type: DataType
    nullable: bool = True
    default: Default | None = None
    ordinal: int = 0
    """1-based; kept when other columns are dropped."""
    comment: str | None = None
    fill: Any = None
    """Stored form of what rows written before this column existed read; None is NULL."""
    since_version: int = 1
    """Schema version that added the column."""


class Check(msgspec.Struct, frozen=True):
    """A CHECK constraint: an SQL expression over the row's columns that must not be false."""

    name: str
    sql: str


class FlushPolicy(msgspec.Struct, frozen=True):
    """When hot rows become a segment. None means that part is not set."""

    rows: int | None = None
    interval_s: int | None = None


class TableOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of CREATE TABLE ... WITH (...)."""

    storage_id: str = "local"
    use_user_storage: bool = False
    flush_policy: FlushPolicy | None = None
    deleted_retention_hours: int | None = 168
    """None is 'off': soft-deleted rows are kept for ever."""
    ttl_s: int | None = None
    access_level: AccessLevel = AccessLevel.PRIVATE


class TableDef(msgspec.Struct, frozen=True, kw_only=True):
    """One version of a table's schema."""

    uid: TableUid
    namespace: str
    name: str
    kind: TableKind
    version: int
    columns: tuple[ColumnDef, ...]
    """By ordinal."""
    primary_key: tuple[int, ...]
    """Column ids, in key order; empty only for streams."""
    checks: tuple[Check, ...] = ()
    options: TableOptions = TableOptions()
    next_column_id: int = 1
    comment: str | None = None
    created_at: int = 0
    updated_at: int = 0

    @property
    def table_id(self) -> TableId:
        """namespace.table."""
        return TableId(self.namespace, self.name)

    def column(self, name: str) -> ColumnDef | None:
        """The column of that exact name."""
        return next((column for column in self.columns if column.name == name), None)

    def column_by_id(self, column_id: int) -> ColumnDef | None:
        """The column with that id, None when it was dropped."""
        return next((column for column in self.columns if column.id == column_id), None)

    @property
    def pk_columns(self) -> tuple[ColumnDef, ...]:
        """Columns of the primary key, in key order."""
        by_id = {column.id: column for column in self.columns}
        return tuple(by_id[column_id] for column_id in self.primary_key)
