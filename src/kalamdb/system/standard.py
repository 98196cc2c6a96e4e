"""`information_schema`: the views of the SQL standard over the catalog."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from kalamdb.catalog import Catalog
from kalamdb.schema import DataType, TypeName
from kalamdb.system.shape import (
    INFORMATION_SCHEMA,
    SYSTEM,
    Filters,
    Rows,
    SystemTable,
    SystemTables,
    columns_of,
)
from kalamdb.system.tables import chosen, default_text, entries
from kalamdb.types import TableId

CATALOG_NAME: Final = "kalam"

_TABLES: Final = columns_of("table_catalog T, table_schema T, table_name T, table_type T")
_COLUMNS: Final = columns_of(
    "table_catalog T, table_schema T, table_name T, column_name T, ordinal_position BIGINT, column_default T?, "
    "is_nullable T, data_type T, character_maximum_length BIGINT?, character_octet_length BIGINT?, "
    "numeric_precision BIGINT?, numeric_precision_radix BIGINT?, numeric_scale BIGINT?, datetime_precision BIGINT?, "
    "interval_type T?"
)
_SCHEMATA: Final = columns_of(
    "catalog_name T, schema_name T, schema_owner T?, default_character_set_catalog T?, "
    "default_character_set_schema T?, default_character_set_name T?, sql_path T?"
)
_VIEWS: Final = columns_of("table_catalog T, table_schema T, table_name T, definition T")
_INTEGER_BITS: Final = {TypeName.SMALLINT: 16, TypeName.INT: 32, TypeName.BIGINT: 64}
_MANTISSA_BITS: Final = {TypeName.FLOAT: 24, TypeName.DOUBLE: 53}
_TIMES: Final = frozenset({TypeName.TIMESTAMP, TypeName.DATETIME, TypeName.TIME})
_TIME_DIGITS: Final = 6


def standard_tables(catalog: Catalog, system_tables: SystemTables) -> list[SystemTable]:
    """tables, columns, schemata, views."""
    own = INFORMATION_SCHEMA
    return [
        SystemTable(TableId(own, "tables"), _TABLES, lambda filters: _table_rows(catalog, system_tables, filters)),
        SystemTable(TableId(own, "columns"), _COLUMNS, lambda filters: _column_rows(catalog, system_tables, filters)),
        SystemTable(TableId(own, "schemata"), _SCHEMATA, lambda _: _schema_rows(catalog)),
        SystemTable(TableId(own, "views"), _VIEWS, lambda _: _view_rows(catalog)),
    ]


def _table_rows(catalog: Catalog, system_tables: SystemTables, filters: Filters) -> Rows:
    for entry in entries(catalog, filters, "table_schema"):
        yield CATALOG_NAME, entry.definition.namespace, entry.definition.name, "BASE TABLE"
    for view in catalog.views():
        yield CATALOG_NAME, view.namespace, view.name, "VIEW"
    for table in chosen(system_tables, filters, "table_schema"):
        yield CATALOG_NAME, table.table_id.namespace, table.table_id.name, "VIEW"


def _column_rows(catalog: Catalog, system_tables: SystemTables, filters: Filters) -> Rows:
    for entry in entries(catalog, filters, "table_schema"):
        table_id = entry.definition.table_id
        for column in entry.definition.columns:
            place = (table_id.namespace, table_id.name, column.name, column.ordinal, default_text(column))
            yield CATALOG_NAME, *place, _yes(column.nullable), *_type_columns(column.type)
    for table in chosen(system_tables, filters, "table_schema"):
        for at, known in enumerate(table.columns, 1):
            place = (table.table_id.namespace, table.table_id.name, known.name, at, None)
            yield CATALOG_NAME, *place, _yes(known.nullable), *_type_columns(known.type)


def _yes(value: bool) -> str:
    return "YES" if value else "NO"


def _type_columns(kind: DataType) -> Sequence[Any]:
    """data_type and what follows it."""
    precision, radix, scale = None, None, None
    if kind.name is TypeName.DECIMAL:
        precision, radix, scale = kind.precision, 10, kind.scale
    elif kind.name in _INTEGER_BITS:
        precision, radix, scale = _INTEGER_BITS[kind.name], 2, 0
    elif kind.name in _MANTISSA_BITS:
        precision, radix = _MANTISSA_BITS[kind.name], 2
    return str(kind), None, None, precision, radix, scale, _TIME_DIGITS if kind.name in _TIMES else None, None


def _schema_rows(catalog: Catalog) -> Rows:
    for name in (*(one.name for one in catalog.namespaces()), SYSTEM, INFORMATION_SCHEMA):
        yield CATALOG_NAME, name, None, None, None, None, None


def _view_rows(catalog: Catalog) -> Rows:
    for view in catalog.views():
        yield CATALOG_NAME, view.namespace, view.name, view.sql
