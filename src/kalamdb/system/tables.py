"""What the catalog knows: namespaces, tables, their versions and columns, data types, storages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, assert_never

import pyarrow as pa

from kalamdb.catalog import DEFAULT_NAMESPACE, Catalog, CatalogEntry
from kalamdb.schema import ColumnDef, DataType, FlushPolicy, TableDef, TypeName
from kalamdb.settings import HIDDEN
from kalamdb.storages import Storages
from kalamdb.system.shape import (
    SYSTEM,
    Filters,
    Rows,
    SystemColumn,
    SystemTable,
    SystemTables,
    columns_of,
    json_text,
    wants,
)
from kalamdb.tables.codec import physical_type
from kalamdb.types import TableId, TableKind

DESCRIBE: Final = columns_of(
    "column_name T, ordinal_position INT, column_id BIGINT, data_type T, is_nullable BOOL, is_primary_key BOOL, "
    "column_default T?, column_comment T?, schema_version INT"
)
SCHEMAS: Final = columns_of(
    "table_id T, table_name T, namespace_id T, table_type T, created_at TS, schema_version INT, columns JSON, "
    "table_comment T?, updated_at TS, options JSON?, access_level T?, is_latest BOOL, storage_id T?, "
    "use_user_storage BOOL?"
)
_NAMESPACES: Final = columns_of("namespace_id T, name T, created_at TS, options JSON?, table_count INT")
_TABLES: Final = columns_of(
    "namespace_id T, table_name T, table_type T, storage_id T?, version BIGINT, options T?, comment T?, "
    "updated_at TS, created_at TS"
)
_COLUMNS: Final = columns_of(
    "namespace_id T, table_name T, version BIGINT, column_id BIGINT, column_name T, comment T?, data_type T, "
    "default_value T?, ordinal BIGINT, nullable BOOL, primary_key BOOL, primary_key_pos BIGINT?"
)
STORAGES: Final = columns_of(
    "storage_id T, storage_name T, description T?, storage_type T, base_directory T, credentials JSON?, "
    "config_json JSON?, shared_tables_template T, user_tables_template T, created_at TS, updated_at TS"
)
_DATATYPES: Final = columns_of("arrow_type T, kalam_type T, sql_name T, description T")


def catalog_tables(catalog: Catalog, system_tables: SystemTables, storages: Storages) -> list[SystemTable]:
    """namespaces, schemas and its twin, tables, columns, describe, storages, datatypes."""
    return [
        SystemTable(TableId(SYSTEM, "namespaces"), _NAMESPACES, lambda _: _namespace_rows(catalog, system_tables)),
        SystemTable(TableId(SYSTEM, "schemas"), SCHEMAS, lambda filters: _schema_rows(catalog, system_tables, filters)),
        SystemTable(
            TableId(SYSTEM, "table_schemas"), SCHEMAS, lambda filters: _schema_rows(catalog, system_tables, filters)
        ),
        SystemTable(TableId(SYSTEM, "tables"), _TABLES, lambda filters: _table_rows(catalog, system_tables, filters)),
        SystemTable(
            TableId(SYSTEM, "columns"),
            _COLUMNS,
            lambda filters: _column_rows(catalog, system_tables, filters),
        ),
        SystemTable(TableId(SYSTEM, "describe"), DESCRIBE, lambda _: _all_descriptions(catalog)),
        SystemTable(TableId(SYSTEM, "storages"), STORAGES, lambda _: storage_rows(storages, born_at(catalog))),
        SystemTable(TableId(SYSTEM, "datatypes"), _DATATYPES, lambda _: _datatype_rows()),
    ]


def entries(catalog: Catalog, filters: Filters, namespace: str = "namespace_id") -> Iterator[CatalogEntry]:
    """Tables that the statement can use; `namespace` is the column that names theirs."""
    for entry in catalog.tables():
        definition = entry.definition
        if wants(filters, namespace, definition.namespace) and wants(filters, "table_name", definition.name):
            yield entry


def chosen(tables: SystemTables, filters: Filters, namespace: str = "namespace_id") -> Iterator[SystemTable]:
    """System tables that the statement can use."""
    for table in tables():
        table_id = table.table_id
        if wants(filters, namespace, table_id.namespace) and wants(filters, "table_name", table_id.name):
            yield table


def born_at(catalog: Catalog) -> int:
    """When the database was made: milliseconds since 1970."""
    return next((one.created_at for one in catalog.namespaces() if one.name == DEFAULT_NAMESPACE), 0)


def _namespace_rows(catalog: Catalog, system_tables: SystemTables) -> Rows:
    counts: dict[str, int] = {}
    for entry in catalog.tables():
        counts[entry.definition.namespace] = counts.get(entry.definition.namespace, 0) + 1
    for one in catalog.namespaces():
        yield one.name, one.name, one.created_at, one.options or None, counts.get(one.name, 0)
    own = sum(table.table_id.namespace == SYSTEM for table in system_tables())
    yield SYSTEM, SYSTEM, born_at(catalog), None, own


# One row per schema version


def _schema_rows(catalog: Catalog, system_tables: SystemTables, filters: Filters) -> Rows:
    latest_only = filters.get("is_latest") == frozenset({True})
    for entry in entries(catalog, filters):
        if latest_only:
            yield schema_row(entry.definition, entry.definition.version)
        else:
            yield from version_rows(catalog, entry)
    born = born_at(catalog)
    for table in chosen(system_tables, filters):
        name, namespace = table.table_id.name, table.table_id.namespace
        columns = [_system_column_json(at, column) for at, column in enumerate(table.columns, 1)]
        head = (f"{namespace}:{name}", name, namespace, TableKind.SYSTEM.value, born, 1, columns)
        yield (*head, None, born, None, None, True, None, None)


def version_rows(catalog: Catalog, entry: CatalogEntry) -> Rows:
    """All versions of a table in the shape of SCHEMAS, oldest first."""
    latest = entry.definition.version
    # A table that is dropped meanwhile has no versions any more; it is shown as it was.
    versions = catalog.versions(entry.definition.uid) or [entry.definition]
    return [schema_row(definition, latest) for definition in versions]


def schema_row(definition: TableDef, latest: int) -> Sequence[Any]:
    """One version of a table in the shape of SCHEMAS; `latest` is the newest version number."""
    options, kind = definition.options, definition.kind
    return (
        f"{definition.namespace}:{definition.name}",
        definition.name,
        definition.namespace,
        kind.value,
        definition.created_at,
        definition.version,
        _columns_json(definition),
        definition.comment,
        definition.updated_at,
        options_json(definition),
        options.access_level.value if kind is TableKind.SHARED else None,
        definition.version >= latest,
        _storage_id(definition),
        options.use_user_storage if kind is TableKind.USER else None,
    )


def _storage_id(definition: TableDef) -> str | None:
    return None if definition.kind is TableKind.STREAM else definition.options.storage_id


def _columns_json(definition: TableDef) -> list[dict[str, Any]]:
    columns = [
        _column_json(
            column.id,
            column.name,
            column.type,
            column.ordinal,
            nullable=column.nullable,
            primary_key=column.id in definition.primary_key,
            default=default_text(column),
            comment=column.comment,
        )
        for column in definition.columns
    ]
    last = max(column.ordinal for column in definition.columns)
    for offset, (name, kind) in enumerate((("_seq", TypeName.BIGINT), ("_deleted", TypeName.BOOLEAN)), 1):
        columns.append(_column_json(-offset, name, DataType(kind), last + offset, nullable=False))
    return columns


def _system_column_json(ordinal: int, column: SystemColumn) -> dict[str, Any]:
    return _column_json(ordinal, column.name, column.type, ordinal, nullable=column.nullable)


def _column_json(
    column_id: int,
    name: str,
    kind: DataType,
    ordinal: int,
    *,
    nullable: bool,
    primary_key: bool = False,
    default: str | None = None,
    comment: str | None = None,
) -> dict[str, Any]:
    return {
        "column_id": column_id,
        "column_name": name,
        "column_comment": comment,
        "data_type": wire_type(kind),
        "default_value": default,
        "ordinal_position": ordinal,
        "is_nullable": nullable,
        "is_primary_key": primary_key,
        "is_partition_key": False,
    }


_WIRE_NAMES: Final = {
    TypeName.BOOLEAN: "Boolean",
    TypeName.SMALLINT: "SmallInt",
    TypeName.INT: "Int",
    TypeName.BIGINT: "BigInt",
    TypeName.FLOAT: "Float",
    TypeName.DOUBLE: "Double",
    TypeName.TEXT: "Text",
    TypeName.BYTES: "Bytes",
    TypeName.JSON: "Json",
    TypeName.TIMESTAMP: "Timestamp",
    TypeName.DATETIME: "DateTime",
    TypeName.DATE: "Date",
    TypeName.TIME: "Time",
    TypeName.UUID: "Uuid",
    TypeName.FILE: "File",
}


def wire_type(kind: DataType) -> str | dict[str, Any]:
    """A data type as HTTP answers and system.schemas spell it."""
    match kind.name:
        case TypeName.DECIMAL:
            return {"Decimal": {"precision": kind.precision, "scale": kind.scale}}
        case TypeName.EMBEDDING:
            return {"Embedding": kind.size}
        case _:
            return _WIRE_NAMES[kind.name]


def options_json(definition: TableDef) -> dict[str, Any]:
    """Options of a table as system.schemas shows them."""
    options = definition.options
    shown: dict[str, Any] = {"table_type": definition.kind.upper()}
    match definition.kind:
        case TableKind.STREAM:
            return shown | {"ttl_seconds": options.ttl_s, "eviction_strategy": "time_based"}
        case TableKind.USER:
            shown |= {"storage_id": options.storage_id, "use_user_storage": options.use_user_storage}
        case TableKind.SHARED:
            shown |= {"storage_id": options.storage_id, "access_level": options.access_level.value}
        case TableKind.SYSTEM:
            return shown
        case _:
            assert_never(definition.kind)
    return shown | {
        "flush_policy": _policy_json(options.flush_policy),
        "compression": "zstd",
        "deleted_retention_hours": options.deleted_retention_hours,
    }


def _policy_json(policy: FlushPolicy | None) -> dict[str, Any] | None:
    if policy is None or (policy.rows is None and policy.interval_s is None):
        return None
    if policy.interval_s is None:
        return {"type": "row_limit", "row_limit": policy.rows}
    if policy.rows is None:
        return {"type": "time_interval", "interval_seconds": policy.interval_s}
    return {"type": "combined", "row_limit": policy.rows, "interval_seconds": policy.interval_s}


def default_text(column: ColumnDef) -> str | None:
    """A column's default as SQL, None without one."""
    default = column.default
    if default is None:
        return None
    return default.sql or (f"{default.function}()" if default.function is not None else str(default.constant))


# One row per table, per column


def _table_rows(catalog: Catalog, system_tables: SystemTables, filters: Filters) -> Rows:
    for entry in entries(catalog, filters):
        one = entry.definition
        head = (
            one.namespace,
            one.name,
            one.kind.value,
            _storage_id(one),
            one.version,
            json_text(options_json(one)),
        )
        yield (*head, one.comment, one.updated_at, one.created_at)
    born = born_at(catalog)
    for table in chosen(system_tables, filters):
        name = table.table_id
        yield (name.namespace, name.name, TableKind.SYSTEM.value, None, 1, None, None, born, born)


def _column_rows(catalog: Catalog, system_tables: SystemTables, filters: Filters) -> Rows:
    for entry in entries(catalog, filters):
        one = entry.definition
        positions = {column_id: at for at, column_id in enumerate(one.primary_key, 1)}
        for column in one.columns:
            head = (
                one.namespace,
                one.name,
                one.version,
                column.id,
                column.name,
                column.comment,
                str(column.type),
            )
            key = (column.id in positions, positions.get(column.id))
            yield (*head, default_text(column), column.ordinal, column.nullable, *key)
    for table in chosen(system_tables, filters):
        namespace, name = table.table_id.namespace, table.table_id.name
        for at, known in enumerate(table.columns, 1):
            yield (
                namespace,
                name,
                1,
                at,
                known.name,
                None,
                str(known.type),
                None,
                at,
                known.nullable,
                False,
                None,
            )


def describe_rows(definition: TableDef) -> Rows:
    """The columns of a table in the shape of DESCRIBE."""
    for column in definition.columns:
        in_key = column.id in definition.primary_key
        head = (column.name, column.ordinal, column.id, str(column.type), column.nullable, in_key)
        yield (*head, default_text(column), column.comment, definition.version)


def describe_system_rows(table: SystemTable) -> Rows:
    """The columns of a system table in the shape of DESCRIBE."""
    for at, column in enumerate(table.columns, 1):
        yield column.name, at, at, str(column.type), column.nullable, False, None, None, 1


def describe_schema_rows(schema: pa.Schema) -> Rows:
    """The columns of a query in the shape of DESCRIBE."""
    for at, field in enumerate(schema, 1):
        stated = (field.metadata or {}).get(b"kalam", b"").decode()
        yield field.name, at, at, stated or _type_text(field.type), True, False, None, None, 1


def _type_text(kind: pa.DataType) -> str:
    """The SQL name of an Arrow type; Arrow's own where SQL has none."""
    if pa.types.is_decimal(kind):
        return f"DECIMAL({kind.precision},{kind.scale})"
    simple = (name for name in TypeName if name not in _WITH_PARAMETERS and physical_type(DataType(name)) == kind)
    return next(simple, None) or str(kind).upper()


def _all_descriptions(catalog: Catalog) -> Rows:
    for entry in catalog.tables():
        yield from describe_rows(entry.definition)


def storage_rows(storages: Storages, born_at: int, *, hidden: bool = False) -> Rows:
    """All storages; `hidden` shows credentials as ***. `born_at`: when `local` was made."""
    for one in storages.all():
        yield (
            one.storage_id,
            one.name,
            one.description,
            one.kind.value,
            one.base_directory,
            HIDDEN if hidden and one.credentials is not None else one.credentials,
            one.config,
            one.shared_tables_template,
            one.user_tables_template,
            one.created_at or born_at,
            one.updated_at or born_at,
        )


_DESCRIPTIONS: Final = {
    TypeName.BOOLEAN: "true or false",
    TypeName.SMALLINT: "integer of 16 bits",
    TypeName.INT: "integer of 32 bits",
    TypeName.BIGINT: "integer of 64 bits",
    TypeName.FLOAT: "floating point number of 32 bits",
    TypeName.DOUBLE: "floating point number of 64 bits",
    TypeName.DECIMAL: "exact number of up to 38 digits",
    TypeName.TEXT: "text in UTF-8",
    TypeName.BYTES: "bytes",
    TypeName.JSON: "a JSON document",
    TypeName.TIMESTAMP: "date and time without zone, microseconds",
    TypeName.DATETIME: "moment in UTC, microseconds",
    TypeName.DATE: "day",
    TypeName.TIME: "time of day, microseconds",
    TypeName.UUID: "UUID",
    TypeName.EMBEDDING: "vector of 32-bit floating point numbers",
    TypeName.FILE: "reference to a stored file",
}
_WITH_PARAMETERS: Final = {TypeName.DECIMAL: "DECIMAL(p,s)", TypeName.EMBEDDING: "EMBEDDING(n)"}
_EXAMPLE: Final = {"precision": 38, "scale": 10, "size": 384}


def _datatype_rows() -> Rows:
    for name in TypeName:
        kind = DataType(name, **_EXAMPLE)
        wire = wire_type(kind)
        spelled = wire if isinstance(wire, str) else next(iter(wire))
        yield str(physical_type(kind)), spelled, _WITH_PARAMETERS.get(name, name.value), _DESCRIPTIONS[name]
