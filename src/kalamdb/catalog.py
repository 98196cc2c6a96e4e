"""Namespaces, tables and their versions: what exists, and how that changes.

Each change is one batch with expectations, so of two concurrent changes of one object one wins and
the other sees the new state. Look-ups are reads of a dict that follows the store's commits.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from kalamdb.clock import Clock
from kalamdb.errors import Conflict, InvalidRequest, LimitExceeded, NotFound
from kalamdb.schema import (
    Check,
    ColumnDef,
    DataType,
    Default,
    TableDef,
    TableOptions,
    TypeName,
)
from kalamdb.storage import (
    ABSENT,
    Batch,
    Commit,
    ExpectationFailed,
    JobInsert,
    RecordKind,
    RecordOp,
    StorageBackend,
    record_key,
    record_prefix,
    record_uid,
)
from kalamdb.types import AccessLevel, Seq, TableId, TableKind, TableUid

NAME_LENGTH_MAX = 64
COLUMNS_MAX = 1000
CHANGE_ATTEMPTS = 16
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*\Z")
_RESERVED_NAMESPACES = frozenset(
    "system sys root kalamdb kalam main default sql admin internal information_schema pg_catalog datafusion".split()
)
_KEYWORDS = frozenset(
    "select from where table insert update delete create drop alter and or not null join on group order by having "
    "union values into set as in is like between case when then else end primary key namespace".split()
)
_RESERVED_COLUMNS = frozenset(
    "_seq _deleted _commit_seq _id _row_id _rowid _key _updated _created _timestamp _version _hash".split()
)
_NOT_IN_KEY = frozenset({TypeName.JSON, TypeName.EMBEDDING, TypeName.FILE})
_WIDENS: dict[TypeName, frozenset[TypeName]] = {
    TypeName.SMALLINT: frozenset({TypeName.INT, TypeName.BIGINT, TypeName.DOUBLE}),
    TypeName.INT: frozenset({TypeName.BIGINT, TypeName.DOUBLE}),
    TypeName.FLOAT: frozenset({TypeName.DOUBLE}),
    TypeName.JSON: frozenset({TypeName.TEXT}),
    TypeName.UUID: frozenset({TypeName.TEXT}),
}
DEFAULT_NAMESPACE = "default"
SYSTEM_NAMESPACES = frozenset({"system", "information_schema"})


class NamespaceDef(msgspec.Struct, frozen=True):
    """A namespace."""

    name: str
    options: dict[str, Any] = {}
    created_at: int = 0


class ViewDef(msgspec.Struct, frozen=True):
    """A view: a name for a SELECT."""

    namespace: str
    name: str
    sql: str
    created_at: int = 0


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """A table as stored; `record_version` moves with each change and is the precondition of its writers."""

    definition: TableDef
    record_version: Seq


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnSpec:
    """A column as CREATE TABLE or ADD COLUMN states it."""

    name: str
    type: DataType
    nullable: bool = True
    default: Default | None = None
    primary_key: bool = False
    comment: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSpec:
    """A table as CREATE TABLE states it."""

    namespace: str
    name: str
    kind: TableKind
    columns: tuple[ColumnSpec, ...]
    primary_key: tuple[str, ...] = ()
    """Names of a table-level PRIMARY KEY clause; empty when the columns say it."""
    checks: tuple[Check, ...] = ()
    options: TableOptions = TableOptions()
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


MakeCleanup = Callable[[TableDef], JobInsert]
"""The cleanup job of a dropped table, inserted in the commit that drops it."""


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


class Catalog:
    """See the module. Thread-safe."""

    def __init__(self, backend: StorageBackend, clock: Clock) -> None:
        self._backend = backend
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: dict[TableUid, CatalogEntry] = {}
        self._by_name: dict[TableId, TableUid] = {}
        self._namespaces: dict[str, tuple[NamespaceDef, Seq]] = {}
        self._views: dict[TableId, tuple[ViewDef, Seq]] = {}
        self._versions: dict[tuple[TableUid, int], TableDef] = {}

    def start(self) -> None:
        """Load everything and follow later commits; makes the namespace `default`."""
        self._backend.observe(self._on_commit)
        with self._backend.snapshot() as snapshot:
            for kind in (RecordKind.NAMESPACE, RecordKind.TABLE, RecordKind.VIEW):
                for key, record in snapshot.scan_records(*record_prefix(kind)):
                    self._take(key, record.value, record.version)
        if DEFAULT_NAMESPACE not in self._namespaces:
            self._create_namespace(DEFAULT_NAMESPACE)

    # Looking up

    def namespaces(self) -> list[NamespaceDef]:
        """All namespaces, by name."""
        return [definition for _, (definition, _) in sorted(self._namespaces.items())]

    def has_namespace(self, name: str) -> bool:
        """Whether a namespace exists; the system ones do."""
        return name in self._namespaces or name in SYSTEM_NAMESPACES

    def tables(self, namespace: str | None = None) -> list[CatalogEntry]:
        """Live tables by name."""
        found = [one for one in list(self._entries.values()) if namespace in (None, one.definition.namespace)]
        return sorted(found, key=lambda one: (one.definition.namespace, one.definition.name))

    def table(self, table_id: TableId) -> CatalogEntry | None:
        """The live table of that name."""
        uid = self._by_name.get(table_id)
        return None if uid is None else self._entries.get(uid)

    def require(self, table_id: TableId) -> CatalogEntry:
        """As `table`. Raises NotFound."""
        entry = self.table(table_id)
        if entry is None:
            raise NotFound(f"Table '{table_id}' does not exist")
        return entry

    def by_uid(self, uid: TableUid) -> CatalogEntry | None:
        """The live table of that uid."""
        return self._entries.get(uid)

    def version(self, uid: TableUid, version: int) -> TableDef:
        """A schema version of a table. Raises NotFound."""
        known = self._versions.get((uid, version))
        if known is None:
            key = record_key(RecordKind.TABLE_VERSION, uid, version)
            record = self._backend.latest().records([key])[0]
            if record is None:
                raise NotFound(f"table {uid} has no schema version {version}")
            known = self._versions[(uid, version)] = msgspec.msgpack.decode(record.value, type=TableDef)
        return known

    def versions(self, uid: TableUid) -> list[TableDef]:
        """All schema versions of a table, oldest first."""
        with self._backend.snapshot() as snapshot:
            found = list(snapshot.scan_records(*record_prefix(RecordKind.TABLE_VERSION, uid)))
        return [msgspec.msgpack.decode(record.value, type=TableDef) for _, record in found]

    def view(self, view_id: TableId) -> ViewDef | None:
        """The view of that name."""
        found = self._views.get(view_id)
        return None if found is None else found[0]

    def views(self) -> list[ViewDef]:
        """All views by name."""
        return [definition for _, (definition, _) in sorted(self._views.items(), key=lambda item: str(item[0]))]

    # Namespaces

    def create_namespace(self, name: str, *, if_not_exists: bool = False) -> bool:
        """Make a namespace; False when it exists and `if_not_exists`. Raises InvalidRequest, Conflict."""
        check_name("namespace", name)
        lowered = name.lower()
        if lowered in _RESERVED_NAMESPACES or lowered in _KEYWORDS:
            raise InvalidRequest(f"namespace name '{name}' is reserved; choose another")
        if name in self._namespaces:
            if if_not_exists:
                return False
            raise Conflict(f"Namespace '{name}' already exists")
        try:
            self._create_namespace(name)
        except ExpectationFailed:
            return self.create_namespace(name, if_not_exists=if_not_exists)
        return True

    def _create_namespace(self, name: str) -> None:
        body = msgspec.msgpack.encode(NamespaceDef(name, {}, self._clock.now_ms()))
        self._commit(Batch(records=[RecordOp(record_key(RecordKind.NAMESPACE, name), body, ABSENT)]))

    def alter_namespace(self, name: str, options: dict[str, Any]) -> None:
        """Merge options into a namespace. Raises NotFound."""

        def change() -> Batch:
            definition, version = self._require_namespace(name)
            merged = msgspec.structs.replace(definition, options={**definition.options, **options})
            key = record_key(RecordKind.NAMESPACE, name)
            return Batch(records=[RecordOp(key, msgspec.msgpack.encode(merged), version)])

        self._repeat(change)

    def drop_namespace(self, name: str, make_cleanup: MakeCleanup) -> tuple[list[TableDef], Commit]:
        """Drop a namespace with all its tables in one commit; (its tables, the commit with their cleanup jobs)."""
        dropped: list[TableDef] = []

        def change() -> Batch:
            if name == DEFAULT_NAMESPACE or name in SYSTEM_NAMESPACES:
                raise InvalidRequest(f"namespace '{name}' cannot be dropped")
            _, version = self._require_namespace(name)
            batch = Batch(records=[RecordOp(record_key(RecordKind.NAMESPACE, name), None, version)])
            dropped.clear()
            for entry in self.tables(name):
                self._stage_drop(batch, entry, make_cleanup)
                dropped.append(entry.definition)
            for view_id in [view_id for view_id in self._views if view_id.namespace == name]:
                key = record_key(RecordKind.VIEW, view_id.namespace, view_id.name)
                batch.records.append(RecordOp(key, None, self._views[view_id][1]))
            return batch

        commit = self._repeat(change)
        return dropped, commit

    def _require_namespace(self, name: str) -> tuple[NamespaceDef, Seq]:
        found = self._namespaces.get(name)
        if found is None:
            raise NotFound(f"Namespace '{name}' does not exist")
        return found

    # Tables

    def create_table(self, spec: TableSpec) -> CatalogEntry:
        """Make a table. Raises InvalidRequest, NotFound (namespace), Conflict (exists already)."""
        table_id = TableId(spec.namespace, spec.name)
        definition = self._define(spec)

        def change() -> Batch:
            if spec.namespace in SYSTEM_NAMESPACES:
                raise InvalidRequest(f"tables cannot be created in namespace '{spec.namespace}'")
            if spec.namespace not in self._namespaces:
                raise NotFound(
                    f"Namespace '{spec.namespace}' does not exist. Create it first with "
                    f"CREATE NAMESPACE {spec.namespace}"
                )
            if self.table(table_id) is not None or table_id in self._views:
                raise Conflict(f"Table '{table_id}' already exists")
            return Batch(
                records=[
                    RecordOp(
                        record_key(RecordKind.TABLE_NAME, spec.namespace, spec.name),
                        _encode(definition.uid),
                        ABSENT,
                    ),
                    RecordOp(
                        record_key(RecordKind.NAMESPACE, spec.namespace),
                        expect=self._namespaces[spec.namespace][1],
                        check=True,
                    ),
                    *self._stage_version(definition, ABSENT),
                ]
            )  # fmt: skip

        self._repeat(change)
        return self._entries[definition.uid]

    def alter_table(self, table_id: TableId, change: AlterChange, probe: RowProbe) -> tuple[CatalogEntry, str]:
        """Change a table without rewriting rows; (the table, what was done). Raises InvalidRequest, NotFound."""
        done: list[str] = []

        def attempt() -> Batch:
            entry = self.require(table_id)
            definition, text = alter(entry.definition, change, probe, self._clock.now_ms())
            done[:] = [text]
            if definition is entry.definition:
                return Batch()
            return Batch(records=self._stage_version(definition, entry.record_version))

        self._repeat(attempt)
        return self.require(table_id), done[0]

    def drop_table(self, table_id: TableId, make_cleanup: MakeCleanup) -> tuple[TableDef, Commit]:
        """Drop a table in one commit: metadata, hot rows, and its cleanup job. Raises NotFound."""
        dropped: list[TableDef] = []

        def change() -> Batch:
            entry = self.require(table_id)
            dropped[:] = [entry.definition]
            batch = Batch()
            self._stage_drop(batch, entry, make_cleanup)
            return batch

        commit = self._repeat(change)
        return dropped[0], commit

    def truncate_table(self, table_id: TableId, make_cleanup: MakeCleanup) -> tuple[TableDef, Commit]:
        """Empty a table: the same table under a fresh uid; what the old one held goes by its cleanup job."""
        uid = TableUid(self._backend.next_numbers("table_uid"))
        dropped: list[TableDef] = []

        def change() -> Batch:
            entry = self.require(table_id)
            dropped[:] = [entry.definition]
            batch = Batch()
            self._stage_drop(batch, entry, make_cleanup)
            name_key = record_key(RecordKind.TABLE_NAME, table_id.namespace, table_id.name)
            batch.records = [op for op in batch.records if op.key != name_key]
            batch.records.append(RecordOp(name_key, _encode(uid)))
            fresh = msgspec.structs.replace(
                entry.definition,
                uid=uid,
                columns=tuple(_without_history(column) for column in entry.definition.columns),
            )
            batch.records += self._stage_version(fresh, ABSENT)
            return batch

        commit = self._repeat(change)
        return dropped[0], commit

    def _stage_version(self, definition: TableDef, expect: Seq) -> list[RecordOp]:
        body = msgspec.msgpack.encode(definition)
        return [
            RecordOp(record_key(RecordKind.TABLE, definition.uid), body, expect),
            RecordOp(record_key(RecordKind.TABLE_VERSION, definition.uid, definition.version), body),
        ]

    def _stage_drop(self, batch: Batch, entry: CatalogEntry, make_cleanup: MakeCleanup) -> None:
        definition = entry.definition
        left = {"definition": msgspec.to_builtins(definition), "dropped_at": self._clock.now_ms()}
        batch.records += [
            RecordOp(record_key(RecordKind.TABLE, definition.uid), None, entry.record_version),
            RecordOp(record_key(RecordKind.TABLE_NAME, definition.namespace, definition.name), None),
            RecordOp(record_key(RecordKind.DROPPED, definition.uid), msgspec.msgpack.encode(left), ABSENT),
            *(
                RecordOp(record_key(RecordKind.TABLE_VERSION, definition.uid, version), None)
                for version in range(1, definition.version + 1)
            ),
        ]
        batch.delete_tables.append(definition.uid)
        batch.jobs.append(make_cleanup(definition))

    def _define(self, spec: TableSpec) -> TableDef:
        check_name("table", spec.name)
        if len(spec.columns) > COLUMNS_MAX:
            raise LimitExceeded(
                f"table '{spec.name}' has {len(spec.columns)} columns, at most {COLUMNS_MAX} are allowed"
            )
        if not spec.columns:
            raise InvalidRequest(f"table '{spec.name}' has no column; name at least one")
        names = _key_names(spec)
        columns: list[ColumnDef] = []
        for ordinal, column in enumerate(spec.columns, 1):
            _check_column(column.name, {known.name for known in columns})
            nullable = column.nullable and column.name not in names
            columns.append(_column(column, ordinal, ordinal, nullable=nullable))
        by_name = {column.name: column for column in columns}
        for name in names:
            if by_name[name].type.name in _NOT_IN_KEY:
                raise InvalidRequest(f"column '{name}' of type {by_name[name].type} cannot be part of the PRIMARY KEY")
        now_ms = self._clock.now_ms()
        return TableDef(
            uid=TableUid(self._backend.next_numbers("table_uid")),
            namespace=spec.namespace,
            name=spec.name,
            kind=spec.kind,
            version=1,
            columns=tuple(columns),
            primary_key=tuple(by_name[name].id for name in names),
            checks=spec.checks,
            options=spec.options,
            next_column_id=len(columns) + 1,
            comment=spec.comment,
            created_at=now_ms,
            updated_at=now_ms,
        )

    # Views

    def create_view(self, view_id: TableId, sql: str, *, or_replace: bool) -> None:
        """Name a SELECT. Raises Conflict when the name is taken, NotFound for the namespace."""

        def change() -> Batch:
            check_name("view", view_id.name)
            self._require_namespace(view_id.namespace)
            known = self._views.get(view_id)
            if self.table(view_id) is not None or (known is not None and not or_replace):
                raise Conflict(f"'{view_id}' already exists")
            body = msgspec.msgpack.encode(ViewDef(view_id.namespace, view_id.name, sql, self._clock.now_ms()))
            key = record_key(RecordKind.VIEW, view_id.namespace, view_id.name)
            return Batch(records=[RecordOp(key, body, known[1] if known else ABSENT)])

        self._repeat(change)

    def drop_view(self, view_id: TableId) -> None:
        """Forget a view. Raises NotFound."""

        def change() -> Batch:
            known = self._views.get(view_id)
            if known is None:
                raise NotFound(f"View '{view_id}' does not exist")
            return Batch(
                records=[RecordOp(record_key(RecordKind.VIEW, view_id.namespace, view_id.name), None, known[1])]
            )

        self._repeat(change)

    # Committing and following

    def _commit(self, batch: Batch) -> Commit:
        commit = self._backend.commit(batch)
        self._backend.wait_durable(commit, names_files=batch.names_files)
        return commit

    def _repeat(self, change: Callable[[], Batch]) -> Commit:
        """Commit what `change` makes, made anew when another change came first."""
        for _ in range(CHANGE_ATTEMPTS):
            batch = change()
            if batch.is_empty():
                return Commit(self._backend.head(), (), ())
            try:
                return self._commit(batch)
            except ExpectationFailed:
                continue
        raise Conflict("the catalog changed in every attempt; try again")

    def _on_commit(self, batch: Batch, commit: Commit) -> None:
        for op in batch.records:
            if not op.check and op.key[0] in _CATALOG_KINDS:
                self._take(op.key, op.value, commit.seq)

    def _take(self, key: bytes, value: bytes | None, version: Seq) -> None:
        with self._lock:
            match RecordKind(key[0]):
                case RecordKind.TABLE:
                    self._take_table(record_uid(key), value, version)
                case RecordKind.NAMESPACE:
                    name = _texts(key)[0]
                    if value is None:
                        self._namespaces.pop(name, None)
                    else:
                        self._namespaces[name] = (msgspec.msgpack.decode(value, type=NamespaceDef), version)
                case RecordKind.VIEW:
                    view_id = TableId(*_texts(key))
                    if value is None:
                        self._views.pop(view_id, None)
                    else:
                        self._views[view_id] = (msgspec.msgpack.decode(value, type=ViewDef), version)
                case _:
                    pass

    def _take_table(self, uid: TableUid, value: bytes | None, version: Seq) -> None:
        if value is None:
            known = self._entries.pop(uid, None)
            if known is not None and self._by_name.get(known.definition.table_id) == uid:
                del self._by_name[known.definition.table_id]
            return
        definition = msgspec.msgpack.decode(value, type=TableDef)
        self._entries[uid] = CatalogEntry(definition, version)
        self._by_name[definition.table_id] = uid
        self._versions[(uid, definition.version)] = definition


_CATALOG_KINDS = frozenset({RecordKind.TABLE, RecordKind.NAMESPACE, RecordKind.VIEW})


def _encode(uid: TableUid) -> bytes:
    return msgspec.msgpack.encode(uid)


def _texts(key: bytes) -> list[str]:
    """The text parts of a record key."""
    parts = key[1:].split(b"\x00\x01")[:-1]
    return [part.replace(b"\x00\xff", b"\x00").decode() for part in parts]


def _check_column(name: str, known: set[str]) -> None:
    if name.lower() in _RESERVED_COLUMNS or name.startswith("_"):
        raise InvalidRequest(f"column name '{name}' is reserved; names must not begin with an underscore")
    check_name("column", name)
    if name in known:
        raise InvalidRequest(f"column '{name}' stands twice")


def _column(
    spec: ColumnSpec, column_id: int, ordinal: int, *, nullable: bool, version: int = 1, fill: Any = None
) -> ColumnDef:
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


def _without_history(column: ColumnDef) -> ColumnDef:
    return msgspec.structs.replace(column, fill=None)


def _key_names(spec: TableSpec) -> tuple[str, ...]:
    inline = tuple(column.name for column in spec.columns if column.primary_key)
    if inline and spec.primary_key:
        raise InvalidRequest(f"table '{spec.name}' states PRIMARY KEY twice")
    if len(inline) > 1:
        raise InvalidRequest(
            f"table '{spec.name}' marks {len(inline)} columns as PRIMARY KEY; write PRIMARY "
            f"KEY ({', '.join(inline)}) instead"
        )
    names = spec.primary_key or inline
    known = {column.name for column in spec.columns}
    for name in names:
        if name not in known:
            raise InvalidRequest(f"PRIMARY KEY names column '{name}', which table '{spec.name}' does not have")
    if len(set(names)) != len(names):
        raise InvalidRequest(f"PRIMARY KEY of table '{spec.name}' names a column twice")
    if not names and spec.kind is not TableKind.STREAM:
        raise InvalidRequest(f"table '{spec.name}' needs a PRIMARY KEY; only STREAM tables may have none")
    return names


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
        known = ", ".join(column.name for column in definition.columns)
        raise InvalidRequest(f"table '{definition.table_id}' has no column '{name}'; it has {known}")
    return column


def _names_column(sql: str, name: str) -> bool:
    return re.search(rf"(?<![\w\"]){re.escape(name)}(?!\w)|\"{re.escape(name)}\"", sql, re.IGNORECASE) is not None


def _refuse_checked(definition: TableDef, name: str, verb: str) -> None:
    for check in definition.checks:
        if _names_column(check.sql, name):
            raise InvalidRequest(f"column '{name}' cannot be {verb}: CHECK ({check.sql}) names it")


def _add_column(definition: TableDef, change: AddColumn, probe: RowProbe) -> tuple[tuple[ColumnDef, ...], str]:
    spec = change.column
    _check_column(spec.name, {column.name for column in definition.columns})
    if spec.primary_key:
        raise InvalidRequest(f"column '{spec.name}' cannot be added to the PRIMARY KEY of '{definition.table_id}'")
    if len(definition.columns) >= COLUMNS_MAX:
        raise LimitExceeded(f"table '{definition.table_id}' has {COLUMNS_MAX} columns, more are not allowed")
    if not spec.nullable and spec.default is None and not probe.is_empty():
        raise InvalidRequest(
            f"column '{spec.name}' is NOT NULL without DEFAULT and '{definition.table_id}' has rows; give it a DEFAULT"
        )
    ordinal = max(column.ordinal for column in definition.columns) + 1
    added = _column(
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
    _check_column(change.new_name, {one.name for one in definition.columns})
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
        changed = msgspec.structs.replace(changed, type=change.type)
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
