"""CREATE, ALTER and DROP STORAGE, STORAGE CHECK: parsing and running them."""

from __future__ import annotations

from typing import Any, Final, assert_never

import msgspec
import pyarrow as pa

from kalamdb.catalog import Catalog
from kalamdb.errors import InvalidRequest, NotFound
from kalamdb.result import Result
from kalamdb.sql import statements as st
from kalamdb.sql.caller import Caller
from kalamdb.sql.cursor import Cursor
from kalamdb.storages import StorageDef, StorageHealth, StorageKind, Storages

_FIELDS: Final = {
    "NAME": "name",
    "DESCRIPTION": "description",
    "PATH": "base_directory",
    "BASE_DIRECTORY": "base_directory",
    "BUCKET": "base_directory",
    "REGION": "region",
    "SHARED_TABLES_TEMPLATE": "shared_tables_template",
    "USER_TABLES_TEMPLATE": "user_tables_template",
    "CREDENTIALS": "credentials",
    "CONFIG": "config",
}
_SETTABLE: Final = ("NAME", "DESCRIPTION", "SHARED_TABLES_TEMPLATE", "USER_TABLES_TEMPLATE", "CONFIG")
_JSON_FIELDS: Final = frozenset({"credentials", "config"})
_STOPS: Final = ("TYPE", "SET", ",", *_FIELDS)


def parse_storage_statement(cursor: Cursor) -> st.StorageStatement:
    """CREATE, ALTER or DROP STORAGE. Raises InvalidRequest."""
    verb = st.StorageVerb(cursor.take().upper)
    cursor.expect("STORAGE")
    guard = False
    if verb is st.StorageVerb.CREATE:
        guard = cursor.accept("IF", "NOT", "EXISTS")
    elif verb is st.StorageVerb.DROP:
        guard = cursor.accept("IF", "EXISTS")
    name = cursor.name_or_string("a storage id")
    clauses: dict[str, st.Expr] = {}
    match verb:
        case st.StorageVerb.CREATE:
            while cursor.token is not None:
                _clause(cursor, clauses, tuple(_FIELDS))
            for wanted, field in (("TYPE", "kind"), ("PATH", "base_directory")):
                if field not in clauses:
                    raise InvalidRequest(f"CREATE STORAGE {name} needs {wanted}")
        case st.StorageVerb.ALTER:
            while cursor.token is not None:
                cursor.expect("SET")
                _clause(cursor, clauses, _SETTABLE)
                cursor.accept(",")
            if not clauses:
                raise cursor.unexpected("SET")
        case st.StorageVerb.DROP | st.StorageVerb.CHECK:
            pass
        case _:
            assert_never(verb)
    cursor.end()
    return st.StorageStatement(cursor.sql, verb, name, clauses, guard)


def parse_storage_check(cursor: Cursor) -> st.StorageStatement:
    """STORAGE CHECK id [EXTENDED], after its first two words."""
    name = cursor.name_or_string("a storage id")
    extended = cursor.accept("EXTENDED")
    cursor.end()
    return st.StorageStatement(cursor.sql, st.StorageVerb.CHECK, name, {}, extended)


def _clause(cursor: Cursor, clauses: dict[str, st.Expr], allowed: tuple[str, ...]) -> None:
    if "NAME" in allowed and len(allowed) == len(_FIELDS) and cursor.accept("TYPE"):
        field = "kind"
        value: st.Expr = _kind(cursor.name_or_string("a type of storage"))
    else:
        word = next((one for one in allowed if cursor.accept(one)), None)
        if word is None:
            raise cursor.unexpected(", ".join(allowed))
        field = _FIELDS[word]
        cursor.accept("=")
        value = cursor.expression(*_STOPS)
    if field in clauses:
        raise InvalidRequest(f"the statement says twice what the {field.replace('_', ' ')} of the storage is")
    clauses[field] = value


def _kind(word: str) -> StorageKind:
    try:
        return StorageKind(word.lower())
    except ValueError:
        raise InvalidRequest(f"storage TYPE '{word}' is not one of {', '.join(StorageKind)}") from None


class StorageAdmin:
    """Runs statements about storages."""

    def __init__(self, storages: Storages, catalog: Catalog) -> None:
        self._storages = storages
        self._catalog = catalog

    def run(self, statement: st.StorageStatement, caller: Caller) -> Result:
        """Run one statement; the role of the caller was checked. Blocks for the disk."""
        name = statement.name
        match statement.verb:
            case st.StorageVerb.CREATE:
                definition = _definition(statement, caller)
                created = self._storages.create(definition, if_not_exists=statement.guard)
                return Result(message=f"Storage '{name}' {'created successfully' if created else 'already exists'}")
            case st.StorageVerb.ALTER:
                self._storages.alter(name, _fields(statement, caller))
                return Result(message=f"Storage '{name}' altered successfully")
            case st.StorageVerb.DROP:
                try:
                    self._catalog.drop_storage(name)
                except NotFound:
                    if statement.guard:
                        return Result(message=f"Storage '{name}' does not exist")
                    raise
                return Result(message=f"Storage '{name}' dropped successfully")
            case st.StorageVerb.CHECK:
                return Result(_health_row(name, self._storages.check(name, extended=statement.guard)))
            case _:
                assert_never(statement.verb)


def _fields(statement: st.StorageStatement, caller: Caller) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field, expression in statement.clauses.items():
        value = caller.bind(expression)
        if field == "kind":
            found[field] = value
            continue
        if not isinstance(value, str):
            raise InvalidRequest(f"the {field.replace('_', ' ')} of a storage must be a text")
        found[field] = _json(field, value) if field in _JSON_FIELDS else value
    region = found.pop("region", None)
    if region is not None:
        found["config"] = {"region": region, **(found.get("config") or {})}
    return found


def _json(field: str, text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.MsgspecError:
        raise InvalidRequest(f"{field.upper()} of a storage must be a JSON object") from None


def _definition(statement: st.StorageStatement, caller: Caller) -> StorageDef:
    fields = {"name": statement.name, **_fields(statement, caller)}
    return StorageDef(storage_id=statement.name, owner="", **fields)


def _health_row(name: str, health: StorageHealth) -> pa.Table:
    return pa.table(
        {
            "storage_id": pa.array([name]),
            "status": pa.array([health.status.value]),
            "readable": pa.array([health.readable]),
            "writable": pa.array([health.writable]),
            "listable": pa.array([health.listable]),
            "deletable": pa.array([health.deletable]),
            "latency_ms": pa.array([health.latency_ms], pa.int64()),
            "total_bytes": pa.array([health.total_bytes], pa.int64()),
            "used_bytes": pa.array([health.used_bytes], pa.int64()),
            "error": pa.array([health.error], pa.string()),
            "tested_at": pa.array([health.tested_at * 1000], pa.int64()).view(pa.timestamp("us")),
        }
    )


__all__ = ["StorageAdmin", "parse_storage_check", "parse_storage_statement"]
