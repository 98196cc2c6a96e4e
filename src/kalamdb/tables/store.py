"""The state of all tables, consistent reads over both tiers, and commits.

`TableStore` keeps, per table, which segments are live and what is hot, in step with the store's
commits. A `ReadPoint` is one moment of some tables: everything a statement reads comes from it.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import msgspec

from kalamdb.catalog import Catalog, CatalogEntry
from kalamdb.clock import Clock
from kalamdb.errors import LimitExceeded, NotFound, TransactionConflict, Unavailable
from kalamdb.schema import TableDef
from kalamdb.service import impatient, may_block
from kalamdb.storage import (
    ABSENT,
    PRESENT,
    Batch,
    Busy,
    Commit,
    HotRow,
    RecordKind,
    RecordOp,
    Snapshot,
    StorageBackend,
    UnknownOutcome,
    keys,
    record_key,
    record_prefix,
    record_uid,
)
from kalamdb.storages import LOCAL, Storages
from kalamdb.tables.hot import Chunk, HotCache, HotView, above, chunks_of
from kalamdb.tables.layout import Layout, Row, read_payload, row_at
from kalamdb.tables.segments import Found, Segment, SegmentCache, SegmentRecord, segment_path, table_folder
from kalamdb.types import SHARED_SCOPE, RowFlags, Scope, Seq, TableKind, TableUid

T = TypeVar("T")
_BUSY_RETRIES = 8
_COUNTED_COMMITS_MAX = 8192
_BUSY_WAIT_S = 0.02
_SHARED_PREFIX = keys.scope_prefix(SHARED_SCOPE)


@dataclass(frozen=True, slots=True)
class TableLimits:
    """Bounds that the tables keep, from the settings."""

    batch_rows_max: int = 4096
    row_group_rows_max: int = 65_536
    segment_compression: str = "zstd"
    """As pyarrow calls it."""
    segment_bytes_max: int = 128 << 20
    level0_segments_max: int = 5
    hot_bytes_max: int = 256 << 20
    hot_cache_bytes_max: int = 256 << 20
    segment_cache_bytes_max: int = 128 << 20
    hot_wait_timeout_s: float = 30.0
    tombstone_window_s: float = 600.0
    conflict_retries: int = 64


@dataclass(frozen=True, slots=True)
class TableState:
    """Segments and watermark of one table at one moment."""

    uid: TableUid
    manifest_version: Seq = 0
    segments: tuple[Segment, ...] = ()
    watermark: Seq = 0


@dataclass(slots=True)
class HotFigures:
    """How much of a table is hot. Guarded by the store's lock."""

    rows: int = 0
    bytes_: int = 0
    oldest_ms: int = 0
    oldest_seq: Seq = 0
    """Last `_seq` of the oldest commit above the watermark, 0 when none is."""
    last_seq: Seq = 0
    flush_seq: Seq = 0
    """Watermark of a running flush: what it replaces counts as a further row."""
    commits: deque[tuple[Seq, int, int, int]] = field(default_factory=deque)
    """(last `_seq`, rows, bytes, commit time in ms) of commits above the watermark."""

    def add(self, seq: Seq, rows: int, bytes_: int, now_ms: int) -> None:
        """Count one commit."""
        if not self.commits:
            self.oldest_ms, self.oldest_seq = now_ms, seq
        self.commits.append((seq, rows, bytes_, now_ms))
        if len(self.commits) > _COUNTED_COMMITS_MAX:
            self._merge()
        self.rows += rows
        self.bytes_ += bytes_
        self.last_seq = seq

    def _merge(self) -> None:
        """Count two commits as one: many small ones must not take more memory than their rows."""
        entries = list(self.commits)
        pairs = zip(entries[::2], entries[1::2], strict=False)
        merged = [(late[0], old[1] + late[1], old[2] + late[2], old[3]) for old, late in pairs]
        self.commits = deque(merged + entries[len(merged) * 2 :])

    def retire(self, watermark: Seq) -> None:
        """Forget what is at or below the watermark."""
        while self.commits and self.commits[0][0] <= watermark:
            _, rows, bytes_, _ = self.commits.popleft()
            self.rows -= rows
            self.bytes_ -= bytes_
        self.oldest_ms = self.commits[0][3] if self.commits else 0
        self.oldest_seq = self.commits[0][0] if self.commits else 0


class Version(msgspec.Struct, frozen=True, gc=False):
    """The newest version of a key, hot or cold."""

    seq: Seq
    flags: int
    payload: bytes | None = None
    found: Found | None = None

    @property
    def is_live(self) -> bool:
        """Whether it is not a tombstone."""
        return not self.flags & RowFlags.DELETED


@dataclass(frozen=True, slots=True)
class TableView:
    """One table, for one scope, at the moment of its ReadPoint."""

    entry: CatalogEntry
    scope: Scope
    state: TableState
    chunks: tuple[Chunk, ...]

    @property
    def definition(self) -> TableDef:
        """The schema version of this read."""
        return self.entry.definition


class ReadPoint:
    """One moment of some tables."""

    def __init__(self, views: dict[TableUid, TableView], seq: Seq) -> None:
        self.views = views
        self.seq = seq
        """Last `_seq` that was committed then. Rows of STREAM tables may be newer."""

    def view(self, uid: TableUid) -> TableView:
        """The view of a table that was asked for."""
        return self.views[uid]


class Moment:
    """The whole database as one snapshot saw it. Not thread-safe."""

    def __init__(self, store: TableStore, snapshot: Snapshot) -> None:
        self._store = store
        self.snapshot = snapshot
        self.held: list[str] = []
        self._views: dict[tuple[TableUid, Scope], TableView] = {}

    def read(self, wanted: Sequence[tuple[CatalogEntry, Scope]]) -> ReadPoint:
        """Tables of this moment. Raises TransactionConflict when a file of it is gone already."""
        views = {entry.definition.uid: self._view(entry, scope) for entry, scope in wanted}
        return ReadPoint(views, self.snapshot.seq)

    def _view(self, entry: CatalogEntry, scope: Scope) -> TableView:
        uid = entry.definition.uid
        known = self._views.get((uid, scope))
        if known is not None and known.entry is entry:
            return known
        state = self.state(entry)
        chunks: list[Chunk] = []
        if entry.definition.kind is not TableKind.STREAM:
            rows = [row for chunk in self.snapshot.hot(uid, scope) for row in chunk]
            chunks = chunks_of(rows, self._store.layout_of(uid), self._store.layout(entry.definition))
        view = self._views[(uid, scope)] = TableView(entry, scope, state, tuple(chunks))
        return view

    def state(self, entry: CatalogEntry) -> TableState:
        """Segments and watermark of a table at this moment."""
        uid, snapshot = entry.definition.uid, self.snapshot
        manifest = snapshot.records([record_key(RecordKind.MANIFEST, uid)])[0]
        version = manifest.version if manifest else 0
        state = self._store.state(uid)
        if state.manifest_version == version:
            return replace(state, watermark=snapshot.watermark(uid))
        segments = self._store.segments_in(snapshot, entry)
        self.held += self._store.segments.pin(segments)
        for segment in segments:
            if not segment.path.exists():
                raise TransactionConflict(f"table '{entry.definition.table_id}' was compacted meanwhile; try again")
        return TableState(uid, version, segments, snapshot.watermark(uid))


class _Waits(threading.local):
    pending: list[Commit] | None = None


class TableStore:
    """See the module. Thread-safe."""

    def __init__(
        self,
        backend: StorageBackend,
        catalog: Catalog,
        storages: Storages,
        clock: Clock,
        limits: TableLimits,
    ) -> None:
        self.backend = backend
        self.catalog = catalog
        self.storages = storages
        self.files = storages.files
        self.clock = clock
        self.limits = limits
        self.segments = SegmentCache(storages.files, limits.segment_cache_bytes_max)
        self.hot = HotCache(limits.hot_cache_bytes_max)
        self.process = clock.random_bytes(8).hex()
        self.pressure: Callable[[], None] = lambda: None
        """Called when the hot tier is over its bound; set by the owner."""
        self.drafting: set[str] = set()
        """Segment ids that statements and jobs of this process are writing now."""
        self.mirroring = threading.Lock()
        self.mirrored: dict[TableUid, tuple[Seq, int]] = {}
        """Manifest and schema version that a table's mirror shows; guarded by `mirroring`."""
        self.log = logging.getLogger("kalamdb.tables")
        self._states: dict[TableUid, TableState] = {}
        self._figures: dict[TableUid, HotFigures] = {}
        self._layouts: dict[tuple[TableUid, int], Layout] = {}
        self._watches: list[Watch] = []
        self._room = threading.Condition()
        self._key_counter = 0
        self._waits = _Waits()
        self._seq: Seq = backend.head()
        """Last commit that is in what this object holds; guarded by the store's lock."""

    def start(self) -> None:
        """Load which segments are live and how much is hot. Blocks for a scan of the hot tier."""
        self.backend.observe(self._on_commit)
        with self.backend.snapshot() as snapshot:
            with self.hot.lock:
                self._seq = max(self._seq, snapshot.seq)
            for entry in self.catalog.tables():
                self._load(snapshot, entry)

    def _load(self, snapshot: Snapshot, entry: CatalogEntry) -> None:
        uid = entry.definition.uid
        state = self.state_in(snapshot, entry)
        figures = HotFigures()
        if entry.definition.kind is not TableKind.STREAM:
            now_ms = self.backend.now_ms()
            newest = rows = bytes_ = 0
            for chunk in snapshot.hot(uid):
                rows += len(chunk)
                bytes_ += sum(len(row.payload) for row in chunk)
                newest = max(newest, *(row.seq for row in chunk))
            if rows:
                # One entry for all: the next flush takes everything that was there at the opening.
                figures.add(newest, rows, bytes_ + rows * _ROW_OVERHEAD, now_ms)
        with self.hot.lock:
            self._states[uid] = state
            self._figures[uid] = figures

    def state_in(self, snapshot: Snapshot, entry: CatalogEntry) -> TableState:
        """Segments and watermark of a table as a snapshot names them."""
        uid = entry.definition.uid
        manifest = snapshot.records([record_key(RecordKind.MANIFEST, uid)])[0]
        version = manifest.version if manifest else 0
        return TableState(uid, version, self.segments_in(snapshot, entry), snapshot.watermark(uid))

    def segments_in(self, snapshot: Snapshot, entry: CatalogEntry) -> tuple[Segment, ...]:
        """The segments of a table that a snapshot names."""
        uid = entry.definition.uid
        return tuple(
            Segment(uid, record, stored.version, self.path_of(entry.definition, record.segment_id))
            for _, stored in snapshot.scan_records(*record_prefix(RecordKind.SEGMENT, uid))
            for record in [msgspec.msgpack.decode(stored.value, type=SegmentRecord)]
        )

    @property
    def root(self) -> Path:
        """The folder of the storage `local`."""
        return self.storages.root_of(LOCAL)

    def root_of(self, definition: TableDef) -> Path:
        """The folder of the storage that a table's segments lie in."""
        return self.storages.root_of(definition.options.storage_id)

    def folder_of(self, definition: TableDef) -> Path:
        """The folder of one incarnation of a table."""
        return table_folder(self.root_of(definition), definition)

    def path_of(self, definition: TableDef, segment_id: str) -> Path:
        """Where a segment's file lies."""
        return segment_path(self.root_of(definition), definition, segment_id)

    # Following the commits

    def _on_commit(self, batch: Batch, commit: Commit) -> None:
        with self.hot.lock:
            self._seq = commit.seq
            if batch.rows:
                self._apply_rows(batch, commit)
            for op in batch.records:
                if not op.check:
                    self._apply_record(op, commit.seq)
            for retire_ in batch.retire:
                state = self._states.get(retire_.table, TableState(retire_.table))
                self._states[retire_.table] = replace(state, watermark=retire_.watermark)
                self.hot.retire(retire_.table, retire_.watermark)
                self.figures(retire_.table).retire(retire_.watermark)
            for uid, scope in batch.delete_scopes:
                self.hot.forget(uid, keys.scope_prefix(scope))
            for uid in batch.delete_tables:
                self.hot.forget(uid)
                self._figures.pop(uid, None)
                self._states.pop(uid, None)
        if batch.retire or batch.delete_tables:
            with self._room:
                self._room.notify_all()

    def _apply_rows(self, batch: Batch, commit: Commit) -> None:
        now_ms = self.clock.now_ms()
        for uid in {op.table for op in batch.rows if op.bucket is None}:
            figures, cached = self.figures(uid), self.hot.wants(uid)
            rows = bytes_ = 0
            for op, seq, replaced in zip(batch.rows, commit.seqs, commit.replaced, strict=True):
                if op.table != uid or op.bucket is not None:
                    continue
                rows += replaced <= figures.flush_seq
                bytes_ += len(op.payload) + _ROW_OVERHEAD
                if cached:
                    self.hot.add(uid, scope_prefix_of(op.key), HotRow(op.key, seq, op.flags, op.payload), replaced)
            figures.add(commit.seq, rows, bytes_, now_ms)
        for watch in self._watches:
            watch.note(batch, commit)

    def _apply_record(self, op: RecordOp, seq: Seq) -> None:
        kind = op.key[0]
        if kind not in (RecordKind.SEGMENT, RecordKind.MANIFEST):
            return
        uid = record_uid(op.key)
        state = self._states.get(uid, TableState(uid))
        if kind == RecordKind.MANIFEST:
            self._states[uid] = replace(state, manifest_version=seq if op.value is not None else 0)
            return
        segments = [
            one for one in state.segments if record_key(RecordKind.SEGMENT, uid, one.record.segment_id) != op.key
        ]
        if op.value is not None:
            record = msgspec.msgpack.decode(op.value, type=SegmentRecord)
            entry = self.catalog.by_uid(uid)
            if entry is None:
                return
            path = self.path_of(entry.definition, record.segment_id)
            segments.append(Segment(uid, record, seq, path))
        self._states[uid] = replace(state, segments=tuple(segments))

    # Layouts and figures

    @property
    def layouts_kept(self) -> int:
        """Schema versions whose layout is kept."""
        return len(self._layouts)

    def layout(self, definition: TableDef) -> Layout:
        """The layout of this schema version."""
        key = (definition.uid, definition.version)
        layout = self._layouts.get(key)
        if layout is None:
            layout = self._layouts[key] = Layout(definition)
        return layout

    def layout_of(self, uid: TableUid) -> Callable[[int], Layout]:
        """Layouts of a table by schema version."""

        def find(version: int) -> Layout:
            layout = self._layouts.get((uid, version))
            return layout if layout is not None else self.layout(self.catalog.version(uid, version))

        return find

    def figures(self, uid: TableUid) -> HotFigures:
        """Hot figures of a table; kept up to date. Read them under `hot.lock`."""
        figures = self._figures.get(uid)
        if figures is None:
            figures = self._figures[uid] = HotFigures()
        return figures

    def hot_bytes(self) -> int:
        """Bytes of the hot tier over all tables, about."""
        with self.hot.lock:
            return sum(figures.bytes_ for figures in self._figures.values())

    def has_pending(self, uid: TableUid) -> bool:
        """Whether a flush of the table would find rows."""
        with self.hot.lock:
            state = self._states.get(uid)
            return self.figures(uid).last_seq > (state.watermark if state else 0)

    def state(self, uid: TableUid) -> TableState:
        """Segments and watermark of a table now."""
        with self.hot.lock:
            return self._states.get(uid, TableState(uid))

    # Reading

    @contextmanager
    def read_point(self, wanted: Sequence[tuple[CatalogEntry, Scope]]) -> Iterator[ReadPoint]:
        """The newest moment of the tables of `wanted`; its files stay until the block ends."""
        for entry, scope in wanted:
            if entry.definition.kind is not TableKind.STREAM:
                self._ensure_cached(entry, scope)
        captured: list[tuple[CatalogEntry, Scope, TableState, HotView | None]] = []
        with self.hot.lock:
            for entry, scope in wanted:
                uid = entry.definition.uid
                view = self.hot.view(uid, keys.scope_prefix(scope))
                if view is None and entry.definition.kind is TableKind.STREAM:
                    view = HotView(())
                captured.append((entry, scope, self._states.get(uid, TableState(uid)), view))
            held = self.segments.pin(one for _, _, state, _ in captured for one in state.segments)
            seq = self._seq
        try:
            if any(view is None for _, _, _, view in captured):
                with self.frozen() as moment:
                    yield moment.read(wanted)
                return
            views = {}
            for entry, scope, state, view in captured:
                assert view is not None
                chunks = self._settle(entry, scope, view)
                views[entry.definition.uid] = TableView(entry, scope, state, tuple(above(chunks, state.watermark)))
            yield ReadPoint(views, seq)
        finally:
            self.segments.unpin(held)

    @contextmanager
    def frozen(self) -> Iterator[Moment]:
        """A moment of the whole database that stays readable until the block ends."""
        with self.hot.lock:
            # Pinned before the snapshot is taken: what the snapshot names cannot be unlinked in between.
            held = self.segments.pin(one for state in self._states.values() for one in state.segments)
        try:
            with self.backend.snapshot() as snapshot:
                moment = Moment(self, snapshot)
                try:
                    yield moment
                finally:
                    held += moment.held
        finally:
            self.segments.unpin(held)

    @contextmanager
    def checkpoint(self, path: Path, read: Callable[[Snapshot], T]) -> Iterator[T]:
        """Write the store's records and hot rows as they are now into the new folder `path`.

        Yields what `read` finds in a view of the same moment; the files of all segments that are live in it
        stay until the block ends.
        """
        held: list[str] = []

        def pin() -> None:
            with self.hot.lock:
                held.extend(self.segments.pin(one for state in self._states.values() for one in state.segments))

        try:
            with self.backend.checkpoint(path, pin) as snapshot:
                found = read(snapshot)
            yield found
        finally:
            self.segments.unpin(held)

    def _settle(self, entry: CatalogEntry, scope: Scope, view: HotView) -> tuple[Chunk, ...]:
        uid = entry.definition.uid
        chunks = view.settled(self.layout_of(uid), self.layout(entry.definition))
        if chunks is not view.chunks:
            self.hot.settle(uid, keys.scope_prefix(scope), view, chunks)
        return chunks

    def _ensure_cached(self, entry: CatalogEntry, scope: Scope) -> None:
        uid, prefix = entry.definition.uid, keys.scope_prefix(scope)
        with self.hot.lock:
            if not self.hot.reserve(uid, prefix):
                return
        try:
            with self.backend.snapshot() as snapshot:
                rows = [row for chunk in snapshot.hot(uid, scope) for row in chunk]
                base_seq = snapshot.seq
            chunks = chunks_of(rows, self.layout_of(uid), self.layout(entry.definition))
        except BaseException:
            with self.hot.lock:
                self.hot.forget(uid, prefix)
            raise
        with self.hot.lock:
            self.hot.install(uid, prefix, chunks, base_seq)

    @contextmanager
    def newest(
        self,
        entry: CatalogEntry,
        row_keys: Sequence[bytes],
        reader: Snapshot | None = None,
        state: TableState | None = None,
    ) -> Iterator[tuple[list[Version | None], Seq]]:
        """Newest version of each key over both tiers, tombstones included, and the manifest version seen.

        Until the block ends the files of the versions stay, so that they can be loaded. The hot tier is
        read first: a row that a flush moves meanwhile is found in the cold one. A hot version does not end
        the search: a large statement may have written a newer one as a segment. The segments of a given
        `state` are the caller's to keep.
        """
        uid = entry.definition.uid
        hot = (reader or self.backend.latest()).rows(uid, row_keys)
        held: list[str] = []
        if state is None:
            with self.hot.lock:
                state = self.state(uid)
                held = self.segments.pin(state.segments)
        try:
            yield (
                [self._newest(key, row, state) for key, row in zip(row_keys, hot, strict=True)],
                state.manifest_version,
            )
        finally:
            self.segments.unpin(held)

    def _newest(self, key: bytes, row: HotRow | None, state: TableState) -> Version | None:
        newest = Version(row.seq, row.flags, row.payload) if row is not None else None
        for segment in state.segments:
            if newest is not None and segment.seq_max < newest.seq:
                continue
            found = self.segments.find(segment, key)
            if found is not None and (newest is None or found.seq > newest.seq):
                newest = Version(found.seq, found.flags, found=found)
        return newest

    def load(self, version: Version, entry: CatalogEntry) -> Row:
        """The row of a live version in the schema version of `entry`."""
        wanted = self.layout(entry.definition)
        if version.payload is not None:
            return read_payload(version.payload, self.layout_of(entry.definition.uid), wanted)
        assert version.found is not None
        return row_at(self.segments.rows(version.found), version.found.position, wanted)

    # Committing

    def preconditions(self, entry: CatalogEntry, scopes: Iterable[Scope]) -> list[RecordOp]:
        """What must hold for a row batch: the table lives in this schema version, no user of it is being erased."""
        checks = [RecordOp(record_key(RecordKind.TABLE, entry.definition.uid), expect=entry.record_version, check=True)]
        for scope in scopes:
            if scope != SHARED_SCOPE:
                checks.append(RecordOp(record_key(RecordKind.ERASING, scope), expect=ABSENT, check=True))
        return checks

    def alive(self, uid: TableUid) -> RecordOp:
        """Check that the table was not dropped."""
        return RecordOp(record_key(RecordKind.TABLE, uid), expect=PRESENT, check=True)

    def commit(self, batch: Batch) -> Commit:
        """Commit, resolve unknown outcomes, wait until durable. Raises what `StorageBackend.commit` raises."""
        if not self.backend.caps.inline and batch.idempotency_key is None:
            self._key_counter += 1
            batch.idempotency_key = f"{self.process}:{self._key_counter}:{self.clock.random_bytes(6).hex()}"
        for attempt in range(_BUSY_RETRIES):
            try:
                commit = self.backend.commit(batch)
            except Busy:
                if attempt == _BUSY_RETRIES - 1:
                    raise
                self.clock.wait(threading.Event(), _BUSY_WAIT_S * (attempt + 1))
                continue
            except UnknownOutcome as unknown:
                outcome = self.backend.outcome(unknown.key)
                if outcome is None:
                    continue
                commit = outcome
            if self._waits.pending is not None and not batch.names_files:
                self._waits.pending.append(commit)
            else:
                self.backend.wait_durable(commit, names_files=batch.names_files)
            return commit
        raise Unavailable("the store did not answer a commit after several attempts; try again later")

    @contextmanager
    def unwaited(self) -> Iterator[list[Commit]]:
        """A block in which this thread gets WouldBlock instead of waiting, and its commits are applied and listed
        but not waited for: nobody may be told of them before `StorageBackend.wait_durable`."""
        pending: list[Commit] = []
        self._waits.pending = pending
        try:
            with impatient():
                yield pending
        finally:
            self._waits.pending = None

    def wait_for_room(self) -> None:
        """Block while the hot tier is over `hot.bytes_max`. Raises LimitExceeded after `hot.wait_timeout_s`."""
        if self.hot_bytes() <= self.limits.hot_bytes_max:
            return
        may_block()
        deadline = self.clock.monotonic_s() + self.limits.hot_wait_timeout_s
        while (used := self.hot_bytes()) > self.limits.hot_bytes_max:
            self.pressure()
            left = deadline - self.clock.monotonic_s()
            if left <= 0:
                raise LimitExceeded(
                    f"the hot tier holds {used} bytes, at most {self.limits.hot_bytes_max} "
                    "are allowed (hot.bytes_max), "
                    f"and flushes did not make room within {self.limits.hot_wait_timeout_s:g} s"
                )
            with self._room:
                self._room.wait(min(left, 0.5))

    def entry(self, uid: TableUid) -> CatalogEntry:
        """The live table of that uid. Raises NotFound when it was dropped."""
        entry = self.catalog.by_uid(uid)
        if entry is None:
            raise NotFound(f"table {uid} does not exist any more")
        return entry

    @contextmanager
    def watch(self, uid: TableUid) -> Iterator[Watch]:
        """Remember the keys of a table that are written while the block runs."""
        watch = Watch(uid)
        with self.hot.lock:
            self._watches.append(watch)
        try:
            yield watch
        finally:
            with self.hot.lock:
                self._watches.remove(watch)


class Watch:
    """Keys of one table that were written since the watch began."""

    def __init__(self, uid: TableUid) -> None:
        self.uid = uid
        self.keys: list[bytes] = []
        self.seq: Seq = 0

    def note(self, batch: Batch, commit: Commit) -> None:
        """Take over a commit; called under the store's lock."""
        written = [op.key for op in batch.rows if op.table == self.uid and op.bucket is None]
        if written:
            self.keys += written
            self.seq = commit.seq


def conflict(entry: CatalogEntry, attempts: int) -> TransactionConflict:
    """The error for a statement that lost against other writers each time."""
    return TransactionConflict(
        f"rows of '{entry.definition.table_id}' were changed by other writers in each of {attempts} attempts; try again"
    )


_ROW_OVERHEAD = 64


def scope_prefix_of(key: bytes) -> bytes:
    """The first bytes of a row key, which say whose row it is."""
    if key.startswith(_SHARED_PREFIX):
        return _SHARED_PREFIX
    return key[: key.index(b"\x00\x01", 2) + 2]
