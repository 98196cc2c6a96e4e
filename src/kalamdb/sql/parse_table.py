"""CREATE TABLE and ALTER TABLE."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from kalamdb.alter import (
    AddColumn,
    AlterChange,
    ColumnSpec,
    DropColumn,
    ModifyColumn,
    RenameColumn,
    SetAccessLevel,
)
from kalamdb.errors import InvalidRequest
from kalamdb.schema import Check, DataType, Default, DefaultFunction, FlushPolicy, TableOptions, TypeName
from kalamdb.sql.cursor import NOT_LITERAL, Cursor, literal
from kalamdb.sql.statements import AlterTable, CreateTable, DefaultMarker, Param
from kalamdb.sql.tokens import Token, TokenKind
from kalamdb.tables.codec import codec_of
from kalamdb.types import AccessLevel, TableKind

_TYPES: dict[str, TypeName] = {
    name: kind
    for kind, names in {
        TypeName.BOOLEAN: "BOOL BOOLEAN",
        TypeName.SMALLINT: "SMALLINT INT2 SMALLSERIAL SERIAL2",
        TypeName.INT: "INT INTEGER INT4 MEDIUMINT SIGNED SERIAL SERIAL4",
        TypeName.BIGINT: "BIGINT INT8 INT64 BIGSERIAL SERIAL8",
        TypeName.FLOAT: "FLOAT REAL FLOAT4",
        TypeName.DOUBLE: "DOUBLE FLOAT8 FLOAT64",
        TypeName.DECIMAL: "DECIMAL NUMERIC DEC",
        TypeName.TEXT: "TEXT TINYTEXT MEDIUMTEXT LONGTEXT CHAR CHARACTER VARCHAR NVARCHAR CLOB STRING",
        TypeName.BYTES: "BYTES BINARY VARBINARY BLOB BYTEA",
        TypeName.JSON: "JSON JSONB",
        TypeName.TIMESTAMP: "TIMESTAMP",
        TypeName.DATETIME: "DATETIME TIMESTAMPTZ",
        TypeName.DATE: "DATE",
        TypeName.TIME: "TIME",
        TypeName.UUID: "UUID",
        TypeName.EMBEDDING: "EMBEDDING",
        TypeName.FILE: "FILE",
    }.items()
    for name in names.split()
}
_SERIAL = frozenset({"SERIAL", "SERIAL2", "SERIAL4", "SERIAL8", "SMALLSERIAL", "BIGSERIAL"})
_FUNCTIONS = {
    "NOW": DefaultFunction.NOW,
    "CURRENT_TIMESTAMP": DefaultFunction.NOW,
    "SNOWFLAKE_ID": DefaultFunction.SNOWFLAKE_ID,
    "UUID_V7": DefaultFunction.UUID_V7,
    "ULID": DefaultFunction.ULID,
    "CURRENT_USER": DefaultFunction.CURRENT_USER,
}
_EMBEDDING_MAX = 8192
_PRECISION_MAX = 38
_ROWS_MAX = 1_000_000
_INTERVAL_MAX_S = 86_400


def parse_type(cursor: Cursor) -> tuple[DataType, bool]:
    """A data type, and whether its spelling implies AUTO_INCREMENT."""
    start = cursor.token
    word = cursor.name("a data type").upper()
    kind = _TYPES.get(word)
    if kind is None:
        near = difflib.get_close_matches(word, _TYPES, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InvalidRequest(f"'{start.text if start else word}' is not a data type{hint}")
    if word == "DOUBLE":
        cursor.accept("PRECISION")
    if word == "CHARACTER":
        cursor.accept("VARYING")
    sizes = _sizes(cursor)
    if word == "TIMESTAMP" and cursor.accept("WITH", "TIME", "ZONE"):
        kind = TypeName.TIMESTAMP
    cursor.accept("WITHOUT", "TIME", "ZONE")
    if kind is TypeName.DECIMAL:
        return _decimal(sizes), False
    if kind is TypeName.EMBEDDING:
        if len(sizes) != 1 or not 1 <= sizes[0] <= _EMBEDDING_MAX:
            raise InvalidRequest(f"EMBEDDING needs one size from 1 to {_EMBEDDING_MAX}, as in EMBEDDING(384)")
        return DataType(kind, size=sizes[0]), False
    return DataType(kind), word in _SERIAL


def _sizes(cursor: Cursor) -> list[int]:
    sizes: list[int] = []
    if cursor.accept("("):
        while True:
            token = cursor.take()
            if token.kind is not TokenKind.NUMBER or not token.text.isdigit() or len(token.text) > 9:
                raise InvalidRequest(f"'{token.text}' is not a size of a data type")
            sizes.append(int(token.text))
            if not cursor.accept(","):
                break
        cursor.expect(")")
    return sizes


def _decimal(sizes: list[int]) -> DataType:
    precision, scale = (_PRECISION_MAX, 10) if not sizes else (sizes[0], sizes[1] if len(sizes) > 1 else 0)
    if len(sizes) > 2 or not 1 <= precision <= _PRECISION_MAX or scale > precision:
        raise InvalidRequest(
            f"DECIMAL({', '.join(map(str, sizes))}) is not allowed: precision 1 to "
            f"{_PRECISION_MAX}, scale 0 to precision"
        )
    return DataType(TypeName.DECIMAL, precision=precision, scale=scale)


def parse_default(cursor: Cursor, kind: DataType, column: str) -> Default:
    """What follows DEFAULT: a literal, or one of the default functions."""
    start = cursor.at
    token = cursor.token
    if token is not None and token.upper in _FUNCTIONS:
        cursor.at += 1
        if cursor.accept("("):
            cursor.expect(")")
        default = Default(function=_FUNCTIONS[token.upper], sql=f"{token.upper}()")
        _check_function(default, kind, column)
        return default
    parenthesised = cursor.accept("(")
    begin = cursor.at
    while (
        (token := cursor.token) is not None and token.text not in (",", ")", "(") and not _ends_default(cursor, begin)
    ):
        cursor.at += 1
    value = literal(cursor.span(begin))
    if parenthesised:
        cursor.expect(")")
    if value is NOT_LITERAL or isinstance(value, (Param, DefaultMarker)):
        text = cursor.text[cursor.tokens[start].start : cursor.tokens[max(cursor.at - 1, start)].end]
        raise InvalidRequest(
            f"DEFAULT of column '{column}' is '{text}': a literal or one of "
            f"{', '.join(sorted(set(_FUNCTIONS)))} is allowed"
        )
    stored = codec_of(kind).store(value, where=f"DEFAULT of column '{column}'")
    return Default(constant=stored, sql=cursor.text[cursor.tokens[begin].start : cursor.tokens[cursor.at - 1].end])


def _ends_default(cursor: Cursor, begin: int) -> bool:
    return (
        cursor.at > begin
        and cursor.token is not None
        and cursor.token.kind is TokenKind.WORD
        and not (cursor.at == begin + 1 and cursor.tokens[begin].upper in ("DATE", "TIME", "TIMESTAMP", "UUID", "JSON"))
    )


def _check_function(default: Default, kind: DataType, column: str) -> None:
    allowed: frozenset[TypeName]
    match default.function:
        case DefaultFunction.NOW:
            allowed = frozenset(
                {TypeName.TIMESTAMP, TypeName.DATETIME, TypeName.DATE, TypeName.TIME, TypeName.BIGINT, TypeName.TEXT}
            )
        case DefaultFunction.SNOWFLAKE_ID:
            allowed = frozenset({TypeName.BIGINT, TypeName.TEXT})
        case DefaultFunction.UUID_V7:
            allowed = frozenset({TypeName.UUID, TypeName.TEXT})
        case _:
            allowed = frozenset({TypeName.TEXT})
    if kind.name not in allowed:
        names = ", ".join(sorted(allowed))
        raise InvalidRequest(f"DEFAULT {default.sql} of column '{column}' does not fit {kind}; it fits {names}")


def parse_column(cursor: Cursor, checks: list[Check]) -> ColumnSpec:
    """name TYPE [constraints...]"""
    name = cursor.name("a column name")
    kind, auto = parse_type(cursor)
    nullable, primary, default, comment = True, False, None, None
    while cursor.token is not None:
        if cursor.accept("PRIMARY", "KEY"):
            primary, nullable = True, False
        elif cursor.accept("NOT", "NULL"):
            nullable = False
        elif cursor.accept("NULL"):
            nullable = True
        elif cursor.accept("DEFAULT"):
            default = parse_default(cursor, kind, name)
        elif cursor.accept("AUTO_INCREMENT") or cursor.accept("AUTOINCREMENT") or cursor.accept("IDENTITY"):
            auto = True
        elif cursor.accept("UNIQUE"):
            pass
        elif cursor.accept("COMMENT"):
            comment = cursor.string("a comment")
        elif cursor.accept("CHECK"):
            checks.append(_check(cursor, f"{name}_check"))
        elif cursor.accept("REFERENCES"):
            cursor.table()
            if cursor.peek("("):
                cursor.names()
        else:
            break
    if auto and default is None:
        if kind.name not in (TypeName.BIGINT, TypeName.INT, TypeName.SMALLINT):
            raise InvalidRequest(f"AUTO_INCREMENT of column '{name}' needs an integer type, not {kind}")
        kind = DataType(TypeName.BIGINT)
        default = Default(function=DefaultFunction.SNOWFLAKE_ID, sql="SNOWFLAKE_ID()")
    return ColumnSpec(name=name, type=kind, nullable=nullable, default=default, primary_key=primary, comment=comment)


def _check(cursor: Cursor, name: str) -> Check:
    cursor.expect("(")
    sql = cursor.until()
    cursor.expect(")")
    return Check(name, sql)


def parse_create_table(cursor: Cursor, kind: TableKind | None) -> CreateTable:
    """What follows CREATE [kind] TABLE."""
    if_not_exists = cursor.accept("IF", "NOT", "EXISTS")
    table = cursor.table()
    columns: list[ColumnSpec] = []
    checks: list[Check] = []
    primary_key: tuple[str, ...] = ()
    cursor.expect("(")
    while True:
        constraint = cursor.name("a name") if cursor.accept("CONSTRAINT") else None
        if cursor.accept("PRIMARY", "KEY"):
            if primary_key:
                raise InvalidRequest(f"table '{table.name}' states PRIMARY KEY twice")
            primary_key = cursor.names()
        elif cursor.accept("CHECK"):
            checks.append(_check(cursor, constraint or f"{table.name}_check{len(checks) + 1}"))
        elif cursor.accept("UNIQUE"):
            cursor.names()
        elif cursor.accept("FOREIGN", "KEY"):
            cursor.names()
            cursor.expect("REFERENCES")
            cursor.table()
            if cursor.peek("("):
                cursor.names()
        else:
            columns.append(parse_column(cursor, checks))
        if not cursor.accept(","):
            break
    cursor.expect(")")
    if cursor.accept("USING"):
        cursor.name("a name")
    stated = parse_options(cursor) if cursor.accept("WITH") else {}
    cursor.end()
    kind = _kind(kind, stated, table.name)
    options = table_options(kind, stated)
    return CreateTable(
        cursor.sql, table, kind, if_not_exists, tuple(columns), primary_key, tuple(checks), options,
        "DELETED_RETENTION_HOURS" in stated,
    )  # fmt: skip


def _kind(kind: TableKind | None, stated: dict[str, Any], table: str) -> TableKind | None:
    named = stated.pop("TYPE", None)
    if named is None:
        return kind
    try:
        wanted = TableKind(str(named).lower())
    except ValueError:
        wanted = TableKind.SYSTEM
    if wanted is TableKind.SYSTEM:
        raise InvalidRequest(f"TYPE '{named}' of table '{table}' is not one of 'USER', 'SHARED', 'STREAM'")
    if kind is not None and kind is not wanted:
        raise InvalidRequest(f"table '{table}' is CREATE {kind.upper()} TABLE with TYPE '{named}'; state one of them")
    return wanted


def parse_options(cursor: Cursor) -> dict[str, Any]:
    """(NAME = value, ...); names in capitals."""
    cursor.expect("(")
    options: dict[str, Any] = {}
    while not cursor.peek(")"):
        name = cursor.name_or_string("an option").upper()
        cursor.expect("=")
        token = cursor.take()
        if token.kind is TokenKind.STRING:
            options[name] = token.string
        elif token.kind is TokenKind.NUMBER and token.text.isdigit():
            options[name] = int(token.text)
        elif token.kind in (TokenKind.WORD, TokenKind.QUOTED):
            options[name] = {"true": True, "false": False}.get(token.name, token.name)
        else:
            raise InvalidRequest(f"option {name} has the value '{token.text}', expected a string, a number or a word")
        if not cursor.accept(","):
            break
    cursor.expect(")")
    return options


_ALLOWED: dict[str, frozenset[TableKind]] = {
    "STORAGE_ID": frozenset({TableKind.USER, TableKind.SHARED}),
    "USE_USER_STORAGE": frozenset({TableKind.USER}),
    "FLUSH_POLICY": frozenset({TableKind.USER, TableKind.SHARED}),
    "DELETED_RETENTION_HOURS": frozenset({TableKind.USER, TableKind.SHARED}),
    "TTL_SECONDS": frozenset({TableKind.STREAM}),
    "ACCESS_LEVEL": frozenset({TableKind.SHARED}),
}


def table_options(kind: TableKind | None, stated: dict[str, Any]) -> TableOptions:
    """Checked options of CREATE TABLE; `kind` None means SHARED."""
    kind = kind or TableKind.SHARED
    for name in stated:
        if name not in _ALLOWED:
            near = difflib.get_close_matches(name, _ALLOWED, 1)
            raise InvalidRequest(f"unknown table option {name}" + (f"; did you mean {near[0]}?" if near else ""))
        if kind not in _ALLOWED[name]:
            kinds = " and ".join(sorted(one.upper() for one in _ALLOWED[name]))
            raise InvalidRequest(f"option {name} belongs to {kinds} tables, not to {kind.upper()} tables")
    if kind is TableKind.STREAM and "TTL_SECONDS" not in stated:
        raise InvalidRequest("a STREAM table needs WITH (TTL_SECONDS = seconds)")
    ttl_s = stated.get("TTL_SECONDS")
    if ttl_s is not None:
        ttl_s = _whole("TTL_SECONDS", ttl_s, 1, 10 * 365 * 86_400)
    return TableOptions(
        storage_id=str(stated.get("STORAGE_ID", "local")),
        use_user_storage=bool(stated.get("USE_USER_STORAGE", False)),
        flush_policy=parse_flush_policy(str(stated["FLUSH_POLICY"])) if "FLUSH_POLICY" in stated else None,
        deleted_retention_hours=_retention(stated.get("DELETED_RETENTION_HOURS", 168)),
        ttl_s=ttl_s,
        access_level=parse_access_level(str(stated.get("ACCESS_LEVEL", "private"))),
    )


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if not str(value).isdigit() or not low <= int(value) <= high:
        raise InvalidRequest(f"{name} is '{value}', a whole number from {low} to {high} is allowed")
    return int(value)


def _retention(value: Any) -> int | None:
    return None if str(value).lower() == "off" else _whole("DELETED_RETENTION_HOURS", value, 0, 1_000_000)


def parse_access_level(text: str) -> AccessLevel:
    """PUBLIC, PRIVATE, RESTRICTED or DBA."""
    try:
        return AccessLevel(text.lower())
    except ValueError:
        raise InvalidRequest(f"ACCESS_LEVEL '{text}' is not one of PUBLIC, PRIVATE, RESTRICTED, DBA") from None


def parse_flush_policy(text: str) -> FlushPolicy:
    """'rows:N', 'interval:S' or both."""
    found: dict[str, int] = {}
    bounds = {"rows": _ROWS_MAX, "interval": _INTERVAL_MAX_S}
    for part in text.split(","):
        name, _, value = part.strip().partition(":")
        if name not in bounds or name in found or not value.isdigit() or not 0 < int(value) < bounds[name]:
            raise InvalidRequest(
                f"FLUSH_POLICY '{text}' is not 'rows:N' (0 < N < {_ROWS_MAX}), 'interval:S' "
                f"(0 < S < {_INTERVAL_MAX_S}) or both"
            )
        found[name] = int(value)
    return FlushPolicy(found.get("rows"), found.get("interval"))


def parse_alter_table(cursor: Cursor) -> AlterTable:
    """What follows ALTER TABLE."""
    table = cursor.table()
    change = _change(cursor)
    cursor.end()
    return AlterTable(cursor.sql, table, change)


def _change(cursor: Cursor) -> AlterChange:
    if cursor.accept("ADD"):
        cursor.accept("COLUMN")
        checks: list[Check] = []
        column = parse_column(cursor, checks)
        if checks:
            raise InvalidRequest(f"CHECK cannot be added with column '{column.name}'; state it in CREATE TABLE")
        return AddColumn(column)
    if cursor.accept("DROP"):
        cursor.accept("COLUMN")
        return DropColumn(cursor.name("a column name"))
    if cursor.accept("RENAME"):
        if cursor.peek("TO"):
            raise InvalidRequest("a table cannot be renamed; create a new one and INSERT ... SELECT")
        cursor.accept("COLUMN")
        old = cursor.name("a column name")
        cursor.expect("TO")
        return RenameColumn(old, cursor.name("a column name"))
    if cursor.accept("MODIFY"):
        cursor.accept("COLUMN")
        name = cursor.name("a column name")
        kind, _ = parse_type(cursor)
        nullable = False if cursor.accept("NOT", "NULL") else True if cursor.accept("NULL") else None
        return ModifyColumn(name, kind, nullable)
    if cursor.accept("ALTER"):
        cursor.accept("COLUMN")
        return _alter_column(cursor)
    if cursor.accept("SET", "TBLPROPERTIES"):
        options = parse_options(cursor)
        if set(options) != {"ACCESS_LEVEL"}:
            raise InvalidRequest("SET TBLPROPERTIES takes ACCESS_LEVEL alone")
        return SetAccessLevel(parse_access_level(str(options["ACCESS_LEVEL"])))
    if cursor.accept("SET", "ACCESS", "LEVEL"):
        return SetAccessLevel(parse_access_level(cursor.name_or_string("an access level")))
    raise cursor.unexpected("ADD, DROP, RENAME, MODIFY, ALTER or SET")


def _alter_column(cursor: Cursor) -> AlterChange:
    name = cursor.name("a column name")
    if cursor.accept("SET", "NOT", "NULL"):
        return ModifyColumn(name, nullable=False)
    if cursor.accept("DROP", "NOT", "NULL"):
        return ModifyColumn(name, nullable=True)
    if cursor.accept("DROP", "DEFAULT"):
        return ModifyColumn(name, drop_default=True)
    if cursor.accept("SET", "DEFAULT"):
        begin = cursor.at
        while cursor.token is not None:
            cursor.at += 1
        return DefaultLater(name, tokens=tuple(cursor.span(begin)), text=cursor.text)
    if cursor.accept("SET", "DATA", "TYPE") or cursor.accept("TYPE"):
        kind, _ = parse_type(cursor)
        return ModifyColumn(name, kind)
    raise cursor.unexpected("SET or DROP")


@dataclass(frozen=True, slots=True)
class DefaultLater(ModifyColumn):
    """SET DEFAULT: its value takes the column's type, which is known when the statement runs."""

    tokens: tuple[Token, ...] = ()
    text: str = ""


def resolve_default(change: AlterChange, kind: DataType) -> AlterChange:
    """SET DEFAULT with its value in the type of its column; every other change as it is."""
    if not isinstance(change, DefaultLater):
        return change
    cursor = Cursor(change.text, change.tokens)
    default = parse_default(cursor, kind, change.name)
    cursor.end()
    return ModifyColumn(change.name, default=default)
