"""INSERT, UPDATE and DELETE by key: from rows to changes.

What is here decides what each row replaces; `transaction` commits it or keeps it in an overlay.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import pyarrow as pa

from kalamdb.catalog import CatalogEntry
from kalamdb.clock import Clock, seq_to_ms, ulid, uuid_v7
from kalamdb.errors import InvalidRequest, UniqueViolation
from kalamdb.schema import ColumnDef, Default, DefaultFunction, TypeName
from kalamdb.storage import ABSENT, Batch, ExpectationFailed, RowOp, StorageBackend, StreamDelete, keys
from kalamdb.tables.bulk import Checked, SegmentDraft, commit_drafts, existing, sort_by_key, with_flags
from kalamdb.tables.codec import Stored, column_codec
from kalamdb.tables.layout import FLAGS, KEY, SEQ, Layout, Row
from kalamdb.tables.read import bucket_of
from kalamdb.tables.store import TableStore, Version, conflict
from kalamdb.tables.transaction import (
    Change,
    ChangeGroup,
    Transaction,
    autocommit,
    back_off,
    commit_groups,
    refuse_streams,
    refused,
)
from kalamdb.types import Scope, Seq, TableKind


class OnConflict(StrEnum):
    """What an INSERT does with a row whose key exists."""

    ERROR = "error"
    IGNORE = "ignore"
    UPDATE = "update"


Merge = Callable[[Sequence[tuple[Row, Row]]], Sequence[Row | None]]
"""(stored row, proposed row) each -> the rows to store, None to leave the stored one."""

Validate = Callable[[Sequence[Row]], None]
"""Sees the rows that a statement will write, or delete, before it is committed; what it raises stops the statement.
It is called again when another writer came first."""


class Defaults:
    """Values of DEFAULT functions: one moment per statement, fresh ids per row."""

    def __init__(self, backend: StorageBackend, clock: Clock, user: str) -> None:
        self._backend = backend
        self._clock = clock
        self._user = user
        self._now_us: int | None = None

    def value(self, default: Default | None, column: ColumnDef, user: str | None = None) -> Stored:
        """What a column without a value gets, in stored form. `user`: whose row it is, when not the caller's."""
        if default is None:
            return None
        if default.function is None:
            constant: Stored = default.constant
            return constant
        value = self._evaluate(default.function, column, user or self._user)
        return column_codec(column).store(value, where=f"column '{column.name}'")

    def _evaluate(self, function: DefaultFunction, column: ColumnDef, user: str) -> object:
        match function:
            case DefaultFunction.NOW:
                return self._now(column)
            case DefaultFunction.SNOWFLAKE_ID:
                return snowflake_id(self._backend, self._clock)
            case DefaultFunction.UUID_V7:
                return uuid_v7(self._clock)
            case DefaultFunction.ULID:
                return ulid(self._clock)
            case DefaultFunction.CURRENT_USER:
                return user

    def _now(self, column: ColumnDef) -> object:
        if self._now_us is None:
            self._now_us = self._clock.now_ms() * 1000
        match column.type.name:
            case TypeName.DATE:
                return self._now_us // 86_400_000_000
            case TypeName.TIME:
                return self._now_us % 86_400_000_000
            case TypeName.TIMESTAMP | TypeName.DATETIME | TypeName.BIGINT:
                return self._now_us
            case _:
                return (dt.datetime(1970, 1, 1) + dt.timedelta(microseconds=self._now_us)).isoformat(" ")


def snowflake_id(backend: StorageBackend, clock: Clock) -> int:
    """41 bits of ms since 1970, 10 of the node, 12 of a counter (surface reference 3.11)."""
    return (clock.now_ms() << 22) | (backend.next_numbers("snowflake") & 0x3F_FFFF)


@dataclass(frozen=True, slots=True)
class Written:
    """What a statement did."""

    count: int
    rows: tuple[Row, ...] = ()
    """For RETURNING: the new rows, or the former ones of a DELETE."""


class Writer:
    """Writes rows of one table for one scope, at once or into a transaction."""

    def __init__(self, store: TableStore, entry: CatalogEntry, scope: Scope, transaction: Transaction | None) -> None:
        self.store = store
        self.entry = entry
        self.scope = scope
        self.transaction = transaction
        self.layout = store.layout(entry.definition)
        self._prefix = keys.scope_prefix(scope)
        if transaction is not None:
            refuse_streams(entry)

    def key_of(self, row: Sequence[Stored]) -> bytes:
        """Row key of a row in stored form."""
        return self._prefix + self.layout.pk_bytes(row)

    def key_of_values(self, values: Sequence[Stored]) -> bytes:
        """Row key from primary key values."""
        return self._prefix + self.layout.pk_bytes_of(values)

    def current(self, row_keys: Sequence[bytes]) -> tuple[list[tuple[Seq, Row | None]], Seq]:
        """(version, live row or None) of each key as this writer sees it, and the manifest version seen."""
        if self.transaction is not None:
            return self._current(*self.transaction.newest(self.entry, self.scope, row_keys))
        with self.store.newest(self.entry, row_keys) as (versions, manifest):
            return self._current(versions, manifest)

    def _current(
        self, found: Sequence[Version | Change | None], manifest: Seq
    ) -> tuple[list[tuple[Seq, Row | None]], Seq]:
        out: list[tuple[Seq, Row | None]] = []
        for version in found:
            if version is None:
                out.append((ABSENT, None))
            elif isinstance(version, Change):
                out.append((version.expect, version.row))
            else:
                out.append((version.seq, self.store.load(version, self.entry) if version.is_live else None))
        return out, manifest

    def get(self, values: Sequence[Stored]) -> Row | None:
        """The live row with these primary key values."""
        if any(value is None for value in values):
            return None
        return self.current([self.key_of_values(values)])[0][0][1]

    def insert(
        self, rows: Sequence[Row], on_conflict: OnConflict, merge: Merge | None = None, validate: Validate | None = None
    ) -> Written:
        """Insert complete rows; all or none. Raises UniqueViolation for `OnConflict.ERROR`."""
        if self.entry.definition.kind is TableKind.STREAM:
            if validate is not None:
                validate(rows)
            return self._append(rows)
        row_keys = [self.key_of(row) for row in rows]
        self._refuse_twice(row_keys, rows, on_conflict)
        written: list[Row] = []

        def decide() -> ChangeGroup:
            written.clear()
            current, manifest = self.current(row_keys)
            group = ChangeGroup(self.entry, (self.scope,), manifest)
            stored_rows = [stored for _, stored in current]
            for key, merged, (seq, _) in zip(
                row_keys, self._resolve(rows, stored_rows, on_conflict, merge), current, strict=True
            ):
                if merged is not None:
                    group.changes.append(Change(key, merged, seq))
                    written.append(merged)
            if validate is not None:
                validate(written)
            return group

        self._carry_out(decide)
        return Written(len(written), tuple(written))

    def _refuse_twice(self, row_keys: Sequence[bytes], rows: Sequence[Row], on_conflict: OnConflict) -> None:
        if len(set(row_keys)) == len(row_keys):
            return
        seen: set[bytes] = set()
        for key, row in zip(row_keys, rows, strict=True):
            if key in seen:
                if on_conflict is OnConflict.ERROR:
                    raise self._violation(row)
                raise InvalidRequest(
                    f"the statement holds primary key {self.layout.pk_text(row)} of '{self.entry.definition.table_id}' "
                    "twice; ON CONFLICT cannot say which one is meant"
                )
            seen.add(key)

    def _resolve(
        self, rows: Sequence[Row], stored: Sequence[Row | None], on_conflict: OnConflict, merge: Merge | None
    ) -> list[Row | None]:
        """What to store of each row; None for nothing."""
        out: list[Row | None] = list(rows)
        met = [(at, old) for at, old in enumerate(stored) if old is not None]
        if not met:
            return out
        match on_conflict:
            case OnConflict.ERROR:
                raise self._violation(rows[met[0][0]])
            case OnConflict.IGNORE:
                for at, _ in met:
                    out[at] = None
            case OnConflict.UPDATE if merge is not None:
                merged = merge([(old, rows[at]) for at, old in met])
                for (at, old), new in zip(met, merged, strict=True):
                    out[at] = None if new == old else new
            case OnConflict.UPDATE:
                pass
        return out

    def _violation(self, row: Row) -> UniqueViolation:
        return UniqueViolation(
            f"Primary key violation: value '{self.layout.pk_text(row)}' already exists in column "
            f"'{self.layout.pk_names()}' of table '{self.entry.definition.table_id}'"
        )

    def update_key(
        self, values: Sequence[Stored], merge: Callable[[Row], Row | None], validate: Validate | None = None
    ) -> Written:
        """Change the live row of one key; nothing when there is none, or when `merge` gives None or the same row."""
        if any(value is None for value in values):
            return Written(0)
        key = self.key_of_values(values)
        written: list[Row] = []

        def decide() -> ChangeGroup:
            written.clear()
            [(seq, stored)], manifest = self.current([key])
            group = ChangeGroup(self.entry, (self.scope,), manifest)
            merged = merge(stored) if stored is not None else None
            if merged is not None and merged != stored:
                group.changes.append(Change(key, merged, seq))
                written.append(merged)
            if validate is not None:
                validate(written)
            return group

        self._carry_out(decide)
        return Written(len(written), tuple(written))

    def delete_key(self, values: Sequence[Stored], validate: Validate | None = None) -> Written:
        """Delete the live row of one key."""
        if any(value is None for value in values):
            return Written(0)
        key = self.key_of_values(values)
        removed: list[Row] = []

        def decide() -> ChangeGroup:
            removed.clear()
            [(seq, stored)], manifest = self.current([key])
            group = ChangeGroup(self.entry, (self.scope,), manifest)
            if stored is not None:
                group.changes.append(Change(key, None, seq, stored))
                removed.append(stored)
            if validate is not None:
                validate(removed)
            return group

        self._carry_out(decide)
        return Written(len(removed), tuple(removed))

    def apply(self, decide: Callable[[], ChangeGroup]) -> None:
        """Commit or stage what `decide` finds; it is called again when another writer came first."""
        self._carry_out(decide)

    def _carry_out(self, decide: Callable[[], ChangeGroup]) -> None:
        if self.transaction is not None:
            self.transaction.check_open()
            self.transaction.stage(decide())
        else:
            autocommit(self.store, self.entry, decide)

    def _append(self, rows: Sequence[Row]) -> Written:
        ttl_s = self.entry.definition.options.ttl_s or 0
        uid = self.entry.definition.uid
        bucket = bucket_of(max(self.store.backend.now_ms(), seq_to_ms(self.store.backend.head())), ttl_s)
        limit = self.store.limits.batch_rows_max
        if len(rows) > limit:
            raise InvalidRequest(
                f"{len(rows)} rows in one insert into stream '{self.entry.definition.table_id}', at most {limit} are "
                "allowed (limits.batch_rows_max); insert them in parts"
            )
        self.store.wait_for_room()
        batch = Batch(
            rows=[RowOp(uid, self._prefix, self.layout.payload(row), bucket=bucket) for row in rows],
            records=self.store.preconditions(self.entry, (self.scope,)),
            hints={(uid, self.scope)},
        )
        try:
            self.store.commit(batch)
        except ExpectationFailed as failed:
            raise refused(self.store, failed) from failed
        return Written(len(rows), tuple(rows))

    def remove(self, found: Sequence[tuple[bytes, Seq]]) -> None:
        """Remove rows of a STREAM table: the `_key` and `_seq` that a read of it gave."""
        if not found:
            return
        uid = self.entry.definition.uid
        gone = [StreamDelete(uid, int.from_bytes(key, "big"), self._prefix, seq) for key, seq in found]
        checks = self.store.preconditions(self.entry, (self.scope,))
        self.store.commit(Batch(delete_stream=gone, records=checks, hints={(uid, self.scope)}))


def insert_columns(
    store: TableStore,
    entry: CatalogEntry,
    columns: Sequence[pa.Array],
    scopes: Sequence[Scope],
    on_conflict: OnConflict,
) -> int:
    """Insert rows given as columns in physical types, row i for `scopes[i]` (or all for `scopes[0]`).

    Up to `limits.batch_rows_max` rows go hot in one commit, more become one segment. All or none.
    Returns how many rows were written. Raises UniqueViolation for `OnConflict.ERROR`.
    """
    layout = store.layout(entry.definition)
    count = len(columns[0]) if columns else 0
    if count == 0:
        return 0
    _refuse_nulls(layout, columns)
    row_keys = _keys_of(layout, columns, scopes, count)
    if count <= store.limits.batch_rows_max:
        return _insert_hot(store, entry, layout, columns, scopes, row_keys, on_conflict)
    arrays = [pa.array(row_keys, pa.binary()), pa.nulls(count, pa.int64()), pa.nulls(count, pa.uint8()), *columns]
    names = layout.schema.names
    loose = pa.schema([pa.field(name, array.type) for name, array in zip(names, arrays, strict=True)])
    rows, twice = sort_by_key(pa.Table.from_arrays(arrays, schema=loose))
    if twice is not None:
        raise _twice(entry, layout, rows.slice(twice, 1))
    distinct = tuple(dict.fromkeys(scopes))
    for _ in range(store.limits.conflict_retries):
        written = _publish(store, entry, layout, rows, distinct, on_conflict)
        if written is not None:
            return written
    raise conflict(entry, store.limits.conflict_retries)


def _publish(
    store: TableStore,
    entry: CatalogEntry,
    layout: Layout,
    rows: pa.Table,
    scopes: tuple[Scope, ...],
    on_conflict: OnConflict,
) -> int | None:
    """One attempt; None when another writer came in between."""
    with store.frozen() as moment:
        state = moment.state(entry)
        checked = Checked(moment.snapshot.seq, state.manifest_version)
        hits = existing(store, entry, rows.column(KEY), moment, state, scopes)
    live = [index for index, version in hits.items() if version.is_live]
    if live and on_conflict is OnConflict.ERROR:
        raise _exists(entry, layout, rows.slice(live[0], 1))
    if live and on_conflict is OnConflict.IGNORE:
        rows, hits = _drop_live(rows, hits)
        if not len(rows):
            return 0
        rows = rows.set_column(1, SEQ, pa.array(range(1, len(rows) + 1), pa.int64()))
    flagged = with_flags(rows, hits).select(layout.schema.names).cast(layout.schema)
    expected = {index: version.seq for index, version in hits.items()}
    try:
        commit_drafts(store, [SegmentDraft(entry, scopes, flagged, expected, checked)])
    except ExpectationFailed as failed:
        if failed.what == "record":
            raise refused(store, failed) from failed
        return None
    return len(flagged)


def _drop_live(rows: pa.Table, hits: dict[int, Version]) -> tuple[pa.Table, dict[int, Version]]:
    """The rows whose key has no live version, and the versions under their new indexes."""
    keep = np.ones(len(rows), bool)
    keep[[index for index, version in hits.items() if version.is_live]] = False
    position = np.cumsum(keep) - 1
    left = {int(position[index]): version for index, version in hits.items() if keep[index]}
    return rows.filter(pa.array(keep)), left


def _insert_hot(
    store: TableStore,
    entry: CatalogEntry,
    layout: Layout,
    columns: Sequence[pa.Array],
    scopes: Sequence[Scope],
    row_keys: Sequence[bytes],
    on_conflict: OnConflict,
) -> int:
    rows: list[Row] = list(
        zip(*(codec.from_arrow(array) for codec, array in zip(layout.codecs, columns, strict=True)), strict=True)
    )
    if len(set(row_keys)) != len(row_keys):
        raise UniqueViolation(f"the rows hold a primary key of '{entry.definition.table_id}' twice")

    distinct = tuple(dict.fromkeys(scopes))

    def decide() -> ChangeGroup:
        with store.newest(entry, row_keys) as (versions, manifest):
            pass
        group = ChangeGroup(entry, distinct, manifest)
        for key, row, version in zip(row_keys, rows, versions, strict=True):
            if version is not None and version.is_live:
                if on_conflict is OnConflict.ERROR:
                    raise UniqueViolation(
                        f"Primary key violation: value '{layout.pk_text(row)}' already exists in column "
                        f"'{layout.pk_names()}' of table '{entry.definition.table_id}'"
                    )
                if on_conflict is OnConflict.IGNORE:
                    continue
            group.changes.append(Change(key, row, version.seq if version is not None else ABSENT))
        return group

    for attempt in range(store.limits.conflict_retries):
        group = decide()
        try:
            commit_groups(store, [group])
            return len(group.changes)
        except ExpectationFailed as failed:
            if failed.what == "record":
                raise refused(store, failed) from failed
            back_off(store, attempt)
    raise conflict(entry, store.limits.conflict_retries)


def _keys_of(layout: Layout, columns: Sequence[pa.Array], scopes: Sequence[Scope], count: int) -> list[bytes]:
    prefixes = {scope: keys.scope_prefix(scope) for scope in set(scopes)}
    key_columns = []
    for index in layout.pk_indexes:
        codec = layout.codecs[index]
        key_columns.append([codec.key_bytes(value) for value in codec.from_arrow(columns[index])])
    pks = key_columns[0] if len(key_columns) == 1 else [b"".join(parts) for parts in zip(*key_columns, strict=True)]
    if len(scopes) == 1:
        prefix = prefixes[scopes[0]]
        return [prefix + pk for pk in pks]
    assert len(scopes) == count
    return [prefixes[scope] + pk for scope, pk in zip(scopes, pks, strict=True)]


def _refuse_nulls(layout: Layout, columns: Sequence[pa.Array]) -> None:
    for column, array in zip(layout.columns, columns, strict=True):
        if array.null_count and (not column.nullable or column.id in layout.definition.primary_key):
            raise InvalidRequest(f"NOT NULL constraint violation: column '{column.name}' cannot be NULL")


def _pk_text(layout: Layout, row: pa.Table) -> str:
    return ", ".join(str(row.column(f"c{column_id}")[0].as_py()) for column_id in layout.definition.primary_key)


def _twice(entry: CatalogEntry, layout: Layout, row: pa.Table) -> UniqueViolation:
    return UniqueViolation(
        f"the rows hold primary key '{_pk_text(layout, row)}' of table '{entry.definition.table_id}' twice"
    )


def _exists(entry: CatalogEntry, layout: Layout, row: pa.Table) -> UniqueViolation:
    return UniqueViolation(
        f"Primary key violation: value '{_pk_text(layout, row)}' already exists in column "
        f"'{layout.pk_names()}' of table '{entry.definition.table_id}'"
    )


__all__ = ["FLAGS", "Defaults", "OnConflict", "Writer", "Written", "insert_columns"]
