"""Whether everything that a database holds fits together: `kalamdb check`, and the judge of every crash test.

Nothing is changed. The records are the truth: files, hot rows and jobs are held against them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kalamdb.catalog import CatalogEntry
from kalamdb.errors import Corrupt, KalamDbError
from kalamdb.schema import TableDef
from kalamdb.storage import HotRow, Record, RecordKind, Snapshot, keys, record_key, record_prefix
from kalamdb.storage.kv_check import PROBLEMS_MAX, scope_problem
from kalamdb.storages import LOCAL, MARK_NAME
from kalamdb.tables.compact import gather
from kalamdb.tables.layout import FLAGS, KEY, SEQ, Layout, decode_payload
from kalamdb.tables.mirror import MIRROR_NAME
from kalamdb.tables.segments import IntentRecord, Segment, SegmentRecord
from kalamdb.tables.store import TableStore
from kalamdb.tables.sweep import DroppedTable
from kalamdb.types import SHARED_SCOPE, RowFlags, Seq, TableId, TableKind, TableUid

_DELETED, _MARK = int(RowFlags.DELETED), int(RowFlags.SUPERSEDES)
_OF_A_TABLE = (
    RecordKind.SEGMENT,
    RecordKind.INTENT,
    RecordKind.MANIFEST,
    RecordKind.WATERMARK,
    RecordKind.REMOVAL,
    RecordKind.TABLE_VERSION,
    RecordKind.ERASED,
)
_VERSIONS = pa.schema([pa.field(KEY, pa.binary()), pa.field(SEQ, pa.int64()), pa.field(FLAGS, pa.uint8())])
T = TypeVar("T")


@dataclass(slots=True)
class CheckReport:
    """What `Database.check` found; sound when `problems` is empty."""

    problems: list[str] = field(default_factory=list)
    """Each names the object and what is wrong with it; at most a few hundred of one kind."""
    tables: int = 0
    segments: int = 0
    versions: int = 0
    """Row versions in both tiers, tombstones and replaced ones included."""
    dropped: int = 0
    """Dropped tables whose cleanup is not done."""
    intents: int = 0
    """Files that may come to exist: of running work, or of a dead process until a sweep ends them."""
    strays: int = 0
    """Files that neither a record nor an intent names; a sweep removes them."""

    @property
    def ok(self) -> bool:
        """Whether everything holds."""
        return not self.problems


def check_database(store: TableStore) -> CheckReport:
    """Verify all invariants of design sections 4 and 6 that can be seen at one moment; changes nothing.

    Blocks while it reads every row of both tiers. What is damaged is reported, not raised.
    """
    report = CheckReport()
    try:
        report.problems += store.backend.check()
        _Check(store, report).run()
    except Corrupt as exc:
        report.problems.append(str(exc))
    return report


class _Check:
    """One pass over the tables."""

    def __init__(self, store: TableStore, report: CheckReport) -> None:
        self.store = store
        self.report = report
        self.schemas: dict[tuple[TableUid, int], TableDef] = {}
        self._live: dict[TableUid, CatalogEntry] = {}
        self._dropped: dict[TableUid, TableDef] = {}
        self._named: set[Path] = set()

    def run(self) -> None:
        # The listing comes first: a file that is seen had its intent before it, and the later snapshot
        # shows its record, its intent, or that it is nobody's.
        roots = self.store.storages.roots()
        listed = [Path(folder, name) for root in roots for folder, _, names in os.walk(root) for name in names]
        self._named.update(root / MARK_NAME for root in roots)
        with self.store.frozen() as moment:
            snapshot = moment.snapshot
            self._read_catalog(snapshot)
            for uid in self._orphans(snapshot):
                self._problem(f"records of table {uid} exist, but there is no such table")
            for entry in self._live.values():
                self._read_intents(snapshot, entry.definition)
                _Table(self, snapshot, entry).run()
            for definition in self._dropped.values():
                self._read_intents(snapshot, definition)
                self.segments(snapshot, definition)
        self.report.strays = sum(1 for path in listed if path not in self._named and path.exists())

    def _problem(self, text: str) -> None:
        self.report.problems.append(text)

    # Catalog

    def _read_catalog(self, snapshot: Snapshot) -> None:
        for key, record in snapshot.scan_records(*record_prefix(RecordKind.TABLE_VERSION)):
            definition = self.decoded(record, TableDef, f"schema version {key[1:].hex()}")
            if definition is not None:
                self.schemas[_uid(key), int.from_bytes(key[9:17], "big") - (1 << 63)] = definition
        for key, record in snapshot.scan_records(*record_prefix(RecordKind.TABLE)):
            definition = self.decoded(record, TableDef, f"the definition of table {_uid(key)}")
            if definition is not None:
                self._live[_uid(key)] = CatalogEntry(definition, record.version)
        for key, record in snapshot.scan_records(*record_prefix(RecordKind.DROPPED)):
            dropped = self.decoded(record, DroppedTable, f"what was dropped of table {_uid(key)}")
            if dropped is not None:
                self._dropped[_uid(key)] = dropped.definition
        self.report.tables, self.report.dropped = len(self._live), len(self._dropped)
        for uid in self._live.keys() & self._dropped.keys():
            self._problem(f"table '{self._live[uid].definition.table_id}' (uid {uid}) is live and dropped")
        self._check_names(snapshot)

    def _check_names(self, snapshot: Snapshot) -> None:
        named: dict[int, TableId] = {}
        for key, record in snapshot.scan_records(*record_prefix(RecordKind.TABLE_NAME)):
            uid = self.decoded(record, int, f"the name record {key[1:].hex()}")
            if uid is not None and (entry := self._live.get(TableUid(uid))) is None:
                self._problem(f"the name record {key[1:].hex()} names table {uid}, which does not exist")
            elif uid is not None and entry is not None:
                named[uid] = entry.definition.table_id
                expected = record_key(RecordKind.TABLE_NAME, entry.definition.namespace, entry.definition.name)
                if key != expected:
                    self._problem(f"table '{entry.definition.table_id}' is found under another name")
        for uid, entry in self._live.items():
            definition = entry.definition
            where = f"table '{definition.table_id}'"
            if definition.uid != uid:
                self._problem(f"{where} has uid {definition.uid}, its record is of {uid}")
            if uid not in named:
                self._problem(f"{where} is not found by its name")
            if snapshot.records([record_key(RecordKind.NAMESPACE, definition.namespace)])[0] is None:
                self._problem(f"{where} lies in namespace '{definition.namespace}', which does not exist")
            storage = definition.options.storage_id
            if storage != LOCAL and snapshot.records([record_key(RecordKind.STORAGE, storage)])[0] is None:
                self._problem(f"{where} is kept in storage '{storage}', which does not exist")
            for version in range(1, definition.version + 1):
                if (uid, version) not in self.schemas:
                    self._problem(f"{where} lacks its schema version {version} of {definition.version}")

    def _orphans(self, snapshot: Snapshot) -> list[TableUid]:
        known = self._live.keys() | self._dropped.keys()
        found = set()
        for kind in _OF_A_TABLE:
            found |= {_uid(key) for key, _ in snapshot.scan_records(*record_prefix(kind))} - known
        return sorted(found)

    # Names of files

    def _read_intents(self, snapshot: Snapshot, definition: TableDef) -> None:
        uid = definition.uid
        for key, record in snapshot.scan_records(*record_prefix(RecordKind.INTENT, uid)):
            intent = self.decoded(record, IntentRecord, f"an intent of table '{definition.table_id}'")
            if intent is None:
                continue
            self.report.intents += 1
            self._named.add(self.store.path_of(definition, intent.segment_id))
            where = f"the intent '{intent.segment_id}' of table '{definition.table_id}'"
            if record_key(RecordKind.INTENT, uid, intent.segment_id) != key:
                self._problem(f"{where} is stored under another name")
            if snapshot.records([record_key(RecordKind.SEGMENT, uid, intent.segment_id)])[0] is not None:
                self._problem(f"{where} names a live segment")

    def segments(self, snapshot: Snapshot, definition: TableDef) -> list[Segment]:
        """The segments of a table by their records."""
        uid, found = definition.uid, []
        for key, stored in snapshot.scan_records(*record_prefix(RecordKind.SEGMENT, uid)):
            record = self.decoded(stored, SegmentRecord, f"a segment record of '{definition.table_id}'")
            if record is None:
                continue
            if record_key(RecordKind.SEGMENT, uid, record.segment_id) != key:
                self._problem(f"the record of segment '{record.segment_id}' is stored under another name")
            path = self.store.path_of(definition, record.segment_id)
            found.append(Segment(uid, record, stored.version, path))
        self._named.update(segment.path for segment in found)
        self._named.add(self.store.folder_of(definition) / MIRROR_NAME)
        self.report.segments += len(found)
        return found

    def decoded(self, record: Record, type_: type[T], what: str) -> T | None:
        """The value of a record; a problem and None when it cannot be read."""
        try:
            return msgspec.msgpack.decode(record.value, type=type_)
        except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
            self._problem(f"{what} cannot be decoded: {exc}")
            return None


def _uid(key: bytes) -> TableUid:
    return TableUid(int.from_bytes(key[1:9], "big") - (1 << 63))


class _Table:
    """One live table: its records, its hot rows, its segments, and what a reader would see of them."""

    def __init__(self, check: _Check, snapshot: Snapshot, entry: CatalogEntry) -> None:
        self._check = check
        self._snapshot = snapshot
        self._entry = entry
        self._store = check.store
        self._report = check.report
        self._name = f"table '{entry.definition.table_id}'"
        self._found = 0

    def run(self) -> None:
        segments = self._check.segments(self._snapshot, self._entry.definition)
        if self._entry.definition.kind is TableKind.STREAM:
            if segments:
                self._problem(f"{self._name} is a stream and has {len(segments)} segments")
            return
        self._check_manifest(segments)
        readable = [segment for segment in segments if self._check_file(segment)]
        self._check_levels(segments)
        try:
            streams = [self._segment_versions(segment) for segment in readable]
            self._check_visible([*streams, self._hot_versions()])
        except KalamDbError as exc:
            self._problem(str(exc))

    def _problem(self, text: str) -> None:
        self._found += 1
        if self._found <= PROBLEMS_MAX:
            self._report.problems.append(text)

    def _check_manifest(self, segments: list[Segment]) -> None:
        stored = self._snapshot.records([record_key(RecordKind.MANIFEST, self._entry.definition.uid)])[0]
        version = stored.version if stored is not None else 0
        for segment in segments:
            if segment.version > version:
                self._problem(
                    f"segment '{segment.path}' was published at {segment.version}, after the manifest version {version}"
                )

    def _check_file(self, segment: Segment) -> bool:
        try:
            self._store.segments.verify(segment, again=True)
        except Corrupt as exc:
            self._problem(str(exc))
            return False
        return True

    def _check_levels(self, segments: list[Segment]) -> None:
        for segment in segments:
            if segment.record.level not in (0, 1):
                self._problem(f"segment '{segment.path}' is of level {segment.record.level}, 0 and 1 exist")
        base = [one for one in segments if one.record.level == 1 and one.record.tombstones < one.record.rows]
        base.sort(key=lambda segment: segment.record.key_min)
        for segment in base:
            if segment.record.tombstones:
                self._problem(f"segment '{segment.path}' of level 1 holds tombstones among its rows")
        for left, right in zip(base, base[1:], strict=False):
            if left.record.key_max >= right.record.key_min:
                self._problem(f"segments '{left.path}' and '{right.path}' of level 1 overlap")

    # Segments

    def _segment_versions(self, segment: Segment) -> Iterator[pa.Table]:
        """Key, `_seq` and flags of each row; what the record says is compared on the way."""
        figures = _Figures()
        for table in self._store.segments.scan(segment):
            versions = table.select([KEY, SEQ, FLAGS]).cast(_VERSIONS)
            for problem in figures.add(versions, shared=self._is_shared):
                self._problem(f"segment '{segment.path}' {problem}")
            yield versions
        for name, counted, recorded in figures.compared(segment):
            if counted != recorded:
                self._problem(f"segment '{segment.path}' has {name} {counted!r}, its record says {recorded!r}")
        if figures.seq_max > self._snapshot.seq:
            self._problem(f"segment '{segment.path}' has _seq {figures.seq_max}, the last seq is {self._snapshot.seq}")
        if (self._entry.definition.uid, segment.record.schema_version) not in self._check.schemas:
            self._problem(f"segment '{segment.path}' is of unknown schema version {segment.record.schema_version}")

    @property
    def _is_shared(self) -> bool:
        return self._entry.definition.kind is TableKind.SHARED

    # Hot rows

    def _hot_versions(self) -> Iterator[pa.Table]:
        uid = self._entry.definition.uid
        for chunk in self._snapshot.hot(uid):
            for row in chunk:
                if (problem := self._row_problem(row)) is not None:
                    self._problem(f"hot row {row.key.hex()} of {self._name} {problem}")
            columns = [[row.key for row in chunk], [row.seq for row in chunk], [int(row.flags) for row in chunk]]
            yield pa.Table.from_arrays(
                [pa.array(values, column.type) for values, column in zip(columns, _VERSIONS, strict=True)],
                schema=_VERSIONS,
            )

    def _row_problem(self, row: HotRow) -> str | None:
        if (problem := _key_problem(row.key, shared=self._is_shared)) is not None:
            return problem
        try:
            version, values = decode_payload(row.payload)
        except Corrupt as exc:
            return f"cannot be decoded: {exc}"
        definition = self._check.schemas.get((self._entry.definition.uid, version))
        if definition is None:
            return f"is of unknown schema version {version}"
        layout = self._store.layout(definition)
        if len(values) != len(layout.columns):
            return f"has {len(values)} values, {len(layout.columns)} columns exist in version {version}"
        return _pk_problem(row, values, layout)

    # Both tiers

    def _check_visible(self, streams: list[Iterator[pa.Table]]) -> None:
        """No key may have two versions that a reader sees, or two of one `_seq`."""
        for table in gather(streams):
            self._report.versions += len(table)
            order = pc.sort_indices(table, sort_keys=[(KEY, "ascending"), (SEQ, "descending")])
            table = table.take(order).combine_chunks()
            column = table.column(KEY)
            if len(column) < 2:
                continue
            same = pc.equal(column.slice(1), column.slice(0, len(column) - 1)).to_numpy()
            if not same.any():
                continue
            seqs, flags = table.column(SEQ).to_numpy(), table.column(FLAGS).to_numpy()
            for at in np.flatnonzero(same):
                # `at` is newer than `at + 1` of the same key and must hide it; so must each newer one of them.
                key = column[int(at)].as_py().hex()
                if seqs[at] == seqs[at + 1]:
                    self._problem(f"{self._name} has two versions of row {key} with _seq {seqs[at]}")
                elif not flags[at] & _MARK and not flags[at + 1] & _DELETED and not _hidden(same, flags, int(at)):
                    self._problem(f"{self._name} shows version {seqs[at + 1]} of row {key} beside {seqs[at]}")


def _hidden(same: Any, flags: Any, at: int) -> bool:
    """Whether a version of the same key that is newer than `at` hides everything older."""
    while at and same[at - 1]:
        at -= 1
        if flags[at] & _MARK:
            return True
    return False


def _key_problem(row_key: bytes, *, shared: bool) -> str | None:
    if (problem := scope_problem(row_key)) is not None:
        return problem
    scope, _ = keys.split_row_key(row_key)
    if (scope == SHARED_SCOPE) is not shared:
        return "lies outside the shared scope" if shared else "belongs to no user"
    return None


def _pk_problem(row: HotRow, values: list[Any], layout: Layout) -> str | None:
    pk = [values[index] for index in layout.pk_indexes]
    if row.flags & RowFlags.DELETED and all(value is None for value in pk):
        return None
    try:
        encoded = layout.pk_bytes_of(pk)
    except (KalamDbError, TypeError, ValueError) as exc:
        return f"has a primary key that cannot be encoded: {exc}"
    return None if keys.split_row_key(row.key)[1] == encoded else "has another primary key than its values"


class _Figures:
    """What a segment's record says, counted anew."""

    def __init__(self) -> None:
        self.rows = self.tombstones = self.marks = self.users = 0
        self.key_min = self.key_max = b""
        self.seq_min: Seq = 1 << 63
        self.seq_max: Seq = 0
        self._scope = b""

    def add(self, versions: pa.Table, *, shared: bool) -> Iterator[str]:
        """Count rows in their order; yields what is wrong with them."""
        row_keys = versions.column(KEY).to_pylist()
        seqs, flags = versions.column(SEQ).to_numpy(), versions.column(FLAGS).to_numpy()
        self.rows += len(row_keys)
        self.tombstones += int(np.count_nonzero(flags & _DELETED))
        self.marks += int(np.count_nonzero(flags & _MARK))
        self.seq_min, self.seq_max = min(self.seq_min, int(seqs.min())), max(self.seq_max, int(seqs.max()))
        if (flags & ~np.uint8(_DELETED | _MARK)).any():
            yield "has rows with unknown flags"
        if self.key_max >= row_keys[0] or any(a >= b for a, b in zip(row_keys, row_keys[1:], strict=False)):
            yield "is not in strict key order"
        self.key_min = self.key_min or row_keys[0]
        self.key_max = row_keys[-1]
        for key in row_keys:
            if self._scope and key.startswith(self._scope):
                continue
            if (problem := _key_problem(key, shared=shared)) is not None:
                yield f"has row {key.hex()}, which {problem}"
                continue
            self._scope = keys.scope_prefix(keys.split_row_key(key)[0])
            self.users += 1

    def compared(self, segment: Segment) -> Iterator[tuple[str, object, object]]:
        """(name, counted, recorded) of each figure."""
        record = segment.record
        for name in ("rows", "tombstones", "marks", "users", "key_min", "key_max"):
            yield name, getattr(self, name), getattr(record, name)
        yield "seq_min", self.seq_min, segment.seq_min
        yield "seq_max", self.seq_max, segment.seq_max


__all__ = ["CheckReport", "check_database"]
