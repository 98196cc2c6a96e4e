"""Namespaces, tables and their versions: what exists, and how that changes.

Each change is one batch with expectations, so of two concurrent changes of one object one wins and
the other sees the new state. Look-ups are reads of a dict that follows the store's commits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from kalamdb.alter import (
    COLUMNS_MAX,
    AlterChange,
    ColumnSpec,
    RowProbe,
    alter,
    check_column,
    check_name,
    make_column,
)
from kalamdb.clock import Clock
from kalamdb.errors import Conflict, InvalidRequest, LimitExceeded, NotFound
from kalamdb.schema import (
    Check,
    ColumnDef,
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
from kalamdb.storages import Storages
from kalamdb.types import Seq, TableId, TableKind, TableUid

CHANGE_ATTEMPTS = 16
_RESERVED_NAMESPACES = frozenset(
    "system sys root kalamdb kalam main default sql admin internal information_schema pg_catalog datafusion".split()
)
_KEYWORDS = frozenset(
    "select from where table insert update delete create drop alter and or not null join on group order by having "
    "union values into set as in is like between case when then else end primary key namespace".split()
)
_NOT_IN_KEY = frozenset({TypeName.JSON, TypeName.EMBEDDING, TypeName.FILE})
DEFAULT_NAMESPACE = "default"
SYSTEM_NAMESPACES = frozenset({"system", "information_schema"})


class NamespaceNotFound(NotFound):
    """A namespace does not exist; everybody may know which ones do."""

    is_public = True


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


class _Left(msgspec.Struct, frozen=True):
    """What a dropped table leaves until it is cleaned up, as far as it matters here."""

    definition: TableDef


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """A table as stored; `record_version` moves with each change and is the precondition of its writers."""

    definition: TableDef
    record_version: Seq


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


MakeCleanup = Callable[[TableDef], JobInsert]
"""The cleanup job of a dropped table, inserted in the commit that drops it."""


class Catalog:
    """See the module. Thread-safe."""

    def __init__(self, backend: StorageBackend, clock: Clock, storages: Storages) -> None:
        self._backend = backend
        self._storages = storages
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

        with self._storages.membership:
            commit = self._repeat(change)
        return dropped, commit

    def drop_storage(self, storage_id: str) -> None:
        """Drop a storage in which no table lies. Raises NotFound, Conflict that names one that does, InvalidRequest
        for `local`."""
        with self._storages.membership:
            for entry in self.tables():
                if entry.definition.options.storage_id == storage_id:
                    raise Conflict(
                        f"storage '{storage_id}' is used by table '{entry.definition.table_id}'; drop its tables first"
                    )
            with self._backend.snapshot() as snapshot:
                left = [record for _, record in snapshot.scan_records(*record_prefix(RecordKind.DROPPED))]
            for record in left:
                definition = msgspec.msgpack.decode(record.value, type=_Left).definition
                if definition.options.storage_id == storage_id:
                    raise Conflict(
                        f"storage '{storage_id}' holds files of the dropped table '{definition.table_id}'; "
                        "wait for its cleanup job"
                    )
            self._storages.drop(storage_id)

    def _require_namespace(self, name: str) -> tuple[NamespaceDef, Seq]:
        found = self._namespaces.get(name)
        if found is None:
            raise NamespaceNotFound(f"Namespace '{name}' does not exist")
        return found

    # Tables

    def create_table(
        self, spec: TableSpec, check: Callable[[TableDef], None] = lambda definition: None
    ) -> CatalogEntry:
        """Make a table that `check` does not object to. Raises InvalidRequest, NotFound (namespace, storage), Conflict
        (exists already), and what `check` raises."""
        table_id = TableId(spec.namespace, spec.name)
        definition = self._define(spec)
        check(definition)

        def change() -> Batch:
            if spec.namespace in SYSTEM_NAMESPACES:
                raise InvalidRequest(f"tables cannot be created in namespace '{spec.namespace}'")
            if spec.namespace not in self._namespaces:
                raise NamespaceNotFound(
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

        with self._storages.membership:
            self._storages.get(spec.options.storage_id)
            commit = self._repeat(change)
        # As it was made: it may be dropped again already.
        return CatalogEntry(definition, commit.seq)

    def alter_table(self, table_id: TableId, change: AlterChange, probe: RowProbe) -> tuple[CatalogEntry, str]:
        """Change a table without rewriting rows; (the table, what was done). Raises InvalidRequest, NotFound."""
        done: list[str] = []

        def attempt() -> Batch:
            entry = self.require(table_id)
            uid = entry.definition.uid
            head = self._backend.head()
            manifest_key = record_key(RecordKind.MANIFEST, uid)
            manifest = self._backend.latest().records([manifest_key])[0]
            asked: list[bool] = []
            watched = RowProbe(
                lambda: _noted(asked, probe.is_empty()), lambda column: _noted(asked, probe.has_nulls(column))
            )
            definition, text = alter(entry.definition, change, watched, self._clock.now_ms())
            done[:] = [text]
            if definition is entry.definition:
                return Batch()
            batch = Batch(records=self._stage_version(definition, entry.record_version))
            if asked:
                # What the probe found must still hold: no row was written to either tier since.
                expected = manifest.version if manifest is not None else ABSENT
                batch.records.append(RecordOp(manifest_key, expect=expected, check=True))
                batch.quiet.append((uid, head))
            return batch

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
            check_column(column.name, {known.name for known in columns})
            nullable = column.nullable and column.name not in names
            columns.append(make_column(column, ordinal, ordinal, nullable=nullable))
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


def _noted(asked: list[bool], answer: bool) -> bool:
    asked.append(answer)
    return answer


def _encode(uid: TableUid) -> bytes:
    return msgspec.msgpack.encode(uid)


def _texts(key: bytes) -> list[str]:
    """The text parts of a record key."""
    parts = key[1:].split(b"\x00\x01")[:-1]
    return [part.replace(b"\x00\xff", b"\x00").decode() for part in parts]


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
