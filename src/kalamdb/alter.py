"""How a table's definition may change: each ALTER TABLE as a step from one schema version to the next.

Only steps that every stored row survives unchanged are allowed, so that none rewrites a row.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from kalamdb.errors import InvalidRequest, LimitExceeded
from kalamdb.schema import ColumnDef, DataType, Default, TableDef, TypeName
from kalamdb.types import AccessLevel, TableKind

NAME_LENGTH_MAX = 64
COLUMNS_MAX = 1000
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*\Z")
_RESERVED_COLUMNS = frozenset(
    "_seq _deleted _commit_seq _id _row_id _rowid _key _updated _created _timestamp _version _hash".split()
)
_WIDENS: dict[TypeName, frozenset[TypeName]] = {
    TypeName.SMALLINT: frozenset({TypeName.INT, TypeName.BIGINT, TypeName.DOUBLE}),
    TypeName.INT: frozenset({TypeName.BIGINT, TypeName.DOUBLE}),
    TypeName.FLOAT: frozenset({TypeName.DOUBLE}),
    TypeName.JSON: frozenset({TypeName.TEXT}),
    TypeName.UUID: frozenset({TypeName.TEXT}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnSpec:
    """A column as CREATE TABLE or ADD COLUMN states it."""

    name: str
    type: DataType
    nullable: bool = True
    default: Default | None = None
    primary_key: bool = False
    comment: str | None = None


@dataclass(frozen=True, slots=True)
class AddColumn:
    """ADD COLUMN; `fill` is the default in stored form, evaluated for the rows that exist."""

    column: ColumnSpec
    fill: Any = None


@dataclass(frozen=True, slots=True)
class DropColumn:
    """DROP COLUMN."""

    name: str


@dataclass(frozen=True, slots=True)
class RenameColumn:
    """RENAME COLUMN."""

    name: str
    new_name: str


@dataclass(frozen=True, slots=True)
class ModifyColumn:
    """MODIFY COLUMN and ALTER COLUMN; None leaves that part alone."""

    name: str
    type: DataType | None = None
    nullable: bool | None = None
    default: Default | None = None
    drop_default: bool = False


@dataclass(frozen=True, slots=True)
class SetAccessLevel:
    """SET ACCESS LEVEL."""

    level: AccessLevel


AlterChange = AddColumn | DropColumn | RenameColumn | ModifyColumn | SetAccessLevel


@dataclass(frozen=True, slots=True)
class RowProbe:
    """What a change must know of the rows that exist."""

    is_empty: Callable[[], bool]
    has_nulls: Callable[[str], bool]


def check_name(kind: str, name: str) -> None:
    """Raise InvalidRequest unless `name` may name a namespace, table or column."""
    if not name or len(name) > NAME_LENGTH_MAX:
        raise InvalidRequest(
            f"{kind} name '{name[:80]}' has {len(name)} characters, 1 to {NAME_LENGTH_MAX} are allowed"
        )
    if not _NAME.match(name):
        raise InvalidRequest(
            f"{kind} name '{name}' must begin with a letter and hold only letters, digits and underscores"
        )


def check_column(name: str, known: set[str]) -> None:
    """Raise InvalidRequest unless a column may have this name beside the lower-case names in `known`."""
    if name.lower() in _RESERVED_COLUMNS or name.startswith("_"):
        raise InvalidRequest(f"column name '{name}' is reserved; names must not begin with an underscore")
    check_name("column", name)
    if name in known:
        raise InvalidRequest(f"column '{name}' stands twice")


def make_column(
    spec: ColumnSpec, column_id: int, ordinal: int, *, nullable: bool, version: int = 1, fill: Any = None
) -> ColumnDef:
    """The column that a spec states, with its id and place."""
    return ColumnDef(
        id=column_id,
        name=spec.name,
        type=spec.type,
        nullable=nullable,
        default=spec.default,
        ordinal=ordinal,
        comment=spec.comment,
        fill=fill,
        since_version=version,
    )


def alter(definition: TableDef, change: AlterChange, probe: RowProbe, now_ms: int) -> tuple[TableDef, str]:
    """The next version of a definition and what was done; the same object when nothing changes."""
    match change:
        case AddColumn():
            columns, text = _add_column(definition, change, probe)
        case DropColumn():
            columns, text = _drop_column(definition, change)
        case RenameColumn():
            columns, text = _rename_column(definition, change)
        case ModifyColumn():
            columns, text = _modify_column(definition, change, probe)
        case SetAccessLevel():
            return _set_access(definition, change, now_ms)
    if columns == definition.columns:
        return definition, _unchanged(definition)
    version = definition.version + 1
    changed = msgspec.structs.replace(
        definition,
        columns=columns,
        version=version,
        updated_at=now_ms,
        next_column_id=max(definition.next_column_id, max(column.id for column in columns) + 1),
    )
    return changed, f"Table {definition.table_id} altered successfully: {text} (version {version})"


def _unchanged(definition: TableDef) -> str:
    return f"Table {definition.table_id} unchanged"


def _set_access(definition: TableDef, change: SetAccessLevel, now_ms: int) -> tuple[TableDef, str]:
    if definition.kind is not TableKind.SHARED:
        raise InvalidRequest(
            f"table '{definition.table_id}' is a {definition.kind.upper()} table; only SHARED "
            "tables have an access level"
        )
    if definition.options.access_level is change.level:
        return definition, _unchanged(definition)
    options = msgspec.structs.replace(definition.options, access_level=change.level)
    changed = msgspec.structs.replace(definition, options=options, version=definition.version + 1, updated_at=now_ms)
    text = f"access level {change.level}"
    return changed, f"Table {definition.table_id} altered successfully: {text} (version {changed.version})"


def _require_column(definition: TableDef, name: str) -> ColumnDef:
    column = definition.column(name)
    if column is None:
        if name in _RESERVED_COLUMNS:
            raise InvalidRequest(f"column '{name}' is a system column and cannot be changed")
        known = ", ".join(column.name for column in definition.columns)
        raise InvalidRequest(f"table '{definition.table_id}' has no column '{name}'; it has {known}")
    return column


def _refuse_known(definition: TableDef, name: str) -> None:
    if definition.column(name) is not None:
        raise InvalidRequest(f"column '{name}' already exists in table '{definition.table_id}'")


def _names_column(sql: str, name: str) -> bool:
    return re.search(rf"(?<![\w\"]){re.escape(name)}(?!\w)|\"{re.escape(name)}\"", sql, re.IGNORECASE) is not None


def _refuse_checked(definition: TableDef, name: str, verb: str) -> None:
    for check in definition.checks:
        if _names_column(check.sql, name):
            raise InvalidRequest(f"column '{name}' cannot be {verb}: CHECK ({check.sql}) names it")


def _add_column(definition: TableDef, change: AddColumn, probe: RowProbe) -> tuple[tuple[ColumnDef, ...], str]:
    spec = change.column
    _refuse_known(definition, spec.name)
    check_column(spec.name, set())
    if spec.primary_key:
        raise InvalidRequest(f"column '{spec.name}' cannot be added to the PRIMARY KEY of '{definition.table_id}'")
    if len(definition.columns) >= COLUMNS_MAX:
        raise LimitExceeded(f"table '{definition.table_id}' has {COLUMNS_MAX} columns, more are not allowed")
    if not spec.nullable and spec.default is None and not probe.is_empty():
        raise InvalidRequest(
            f"column '{spec.name}' is NOT NULL without DEFAULT and '{definition.table_id}' has rows; give it a DEFAULT"
        )
    ordinal = max(column.ordinal for column in definition.columns) + 1
    added = make_column(
        spec,
        definition.next_column_id,
        ordinal,
        nullable=spec.nullable,
        version=definition.version + 1,
        fill=None if spec.nullable else change.fill,
    )
    return (*definition.columns, added), f"added column {spec.name}"


def _drop_column(definition: TableDef, change: DropColumn) -> tuple[tuple[ColumnDef, ...], str]:
    column = _require_column(definition, change.name)
    if column.id in definition.primary_key:
        raise InvalidRequest(f"column '{change.name}' is part of the PRIMARY KEY and cannot be dropped")
    _refuse_checked(definition, change.name, "dropped")
    if len(definition.columns) == 1:
        raise InvalidRequest(
            f"column '{change.name}' is the last one of '{definition.table_id}'; drop the table instead"
        )
    return tuple(one for one in definition.columns if one.id != column.id), f"dropped column {change.name}"


def _rename_column(definition: TableDef, change: RenameColumn) -> tuple[tuple[ColumnDef, ...], str]:
    column = _require_column(definition, change.name)
    if change.new_name == change.name:
        return definition.columns, ""
    _refuse_known(definition, change.new_name)
    check_column(change.new_name, set())
    _refuse_checked(definition, change.name, "renamed")
    renamed = msgspec.structs.replace(column, name=change.new_name)
    return _replaced(definition, renamed), f"renamed column {change.name} to {change.new_name}"


def _replaced(definition: TableDef, column: ColumnDef) -> tuple[ColumnDef, ...]:
    return tuple(column if one.id == column.id else one for one in definition.columns)


def _modify_column(definition: TableDef, change: ModifyColumn, probe: RowProbe) -> tuple[tuple[ColumnDef, ...], str]:
    column = _require_column(definition, change.name)
    changed = column
    if change.type is not None and change.type != column.type:
        _check_widening(definition, column, change.type)
        changed = msgspec.structs.replace(
            changed,
            type=change.type,
            fill=widened(column.fill, change.type),
            default=None
            if column.default is None
            else msgspec.structs.replace(column.default, constant=widened(column.default.constant, change.type)),
        )
    if change.nullable is True and not column.nullable:
        if column.id in definition.primary_key:
            raise InvalidRequest(f"column '{change.name}' is part of the PRIMARY KEY and stays NOT NULL")
        changed = msgspec.structs.replace(changed, nullable=True)
    if change.nullable is False and column.nullable:
        if probe.has_nulls(change.name):
            raise InvalidRequest(f"column '{change.name}' of '{definition.table_id}' holds NULL; set a value first")
        changed = msgspec.structs.replace(changed, nullable=False)
    if change.drop_default:
        changed = msgspec.structs.replace(changed, default=None)
    elif change.default is not None:
        changed = msgspec.structs.replace(changed, default=change.default)
    return _replaced(definition, changed), f"modified column {change.name}"


def widened(stored: Any, kind: DataType) -> Any:
    """A stored value in a wider type that `alter` allows; only integers change their form."""
    return float(stored) if kind.name is TypeName.DOUBLE and isinstance(stored, int) else stored


def _check_widening(definition: TableDef, column: ColumnDef, wanted: DataType) -> None:
    """Only changes that every stored value survives unchanged, so that no row is rewritten."""
    old = column.type
    widens = wanted.name in _WIDENS.get(old.name, frozenset()) or (
        old.name is wanted.name is TypeName.DECIMAL and wanted.scale == old.scale and wanted.precision >= old.precision
    )
    keeps_key = column.id not in definition.primary_key or (
        {old.name, wanted.name} <= {TypeName.SMALLINT, TypeName.INT, TypeName.BIGINT, TypeName.UUID, TypeName.TEXT}
        or old.name in (TypeName.FLOAT, TypeName.DECIMAL)
    )
    if not widens or not keeps_key:
        raise InvalidRequest(
            f"column '{column.name}' of type {old} cannot become {wanted}: only widening without rewriting is allowed "
            "(SMALLINT to INT to BIGINT, integers to DOUBLE outside the key, FLOAT to DOUBLE, DECIMAL to more digits, "
            "JSON or UUID to TEXT)"
        )
