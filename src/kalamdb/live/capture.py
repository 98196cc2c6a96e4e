"""From commits to changed rows: what is noted under the commit lock, and what is looked up later without it.

A commit of few rows carries what it replaced, if that was hot. What is cold is found in the segments of that moment,
whose files are kept meanwhile. A large statement names one segment: its rows are read from there in chunks, and what
they replaced from a snapshot of the same moment.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import msgspec
import pyarrow as pa

from kalamdb.live.changes import same_row
from kalamdb.live.groups import RowChange
from kalamdb.live.system_feed import SystemFeed
from kalamdb.storage import Batch, Commit, RecordKind, RowOp, Snapshot, record_uid
from kalamdb.storage.jobs import JobRow
from kalamdb.tables.layout import FLAGS, KEY, SEQ, Layout, Row, conform, read_payload, row_at
from kalamdb.tables.segments import Found, Segment, SegmentRecord
from kalamdb.tables.store import TableState, TableStore, scope_prefix_of
from kalamdb.types import RowFlags, Seq, TableUid

_ROW_BYTES = 400
_LARGE_CHUNK_ROWS = 1024


@dataclass(slots=True)
class HotRows:
    """Rows of one table in a commit: (operation, `_seq`, payload that it replaced as in Commit.former)."""

    uid: TableUid
    rows: list[tuple[RowOp, Seq, bytes | None]]
    state: TableState | None = None
    """Segments of that moment, when some row replaced a cold one."""


@dataclass(slots=True)
class StreamRemovals:
    """Rows that went out of a STREAM table: (scope prefix, payload)."""

    uid: TableUid
    seq: Seq
    rows: list[tuple[bytes, Seq, bytes]]


@dataclass(slots=True)
class LargeRows:
    """The segment that a large statement wrote."""

    uid: TableUid
    segment: Segment
    state: TableState
    snapshot: Snapshot | None
    """Of that moment; None when no row of it replaced another."""


Part = HotRows | StreamRemovals | LargeRows


@dataclass(slots=True)
class Captured:
    """What of one commit concerns subscriptions. `release` gives back what it holds."""

    commit: Commit
    names_files: bool
    parts: list[Part] = field(default_factory=list)
    tables: list[TableUid] = field(default_factory=list)
    """Watched tables whose definition changed, or that went."""
    renewed: bool = False
    """A table that went was emptied by TRUNCATE."""
    users: list[bytes] = field(default_factory=list)
    """Stored users that changed."""
    jobs: Sequence[JobRow] = ()
    size: int = 0
    held: ExitStack = field(default_factory=ExitStack)

    @property
    def is_empty(self) -> bool:
        """Whether nothing of it concerns anybody."""
        return not (self.parts or self.tables or self.users or self.jobs)


class Capture:
    """See the module."""

    def __init__(self, store: TableStore) -> None:
        self._store = store

    @staticmethod
    def may_concern(batch: Batch, commit: Commit, watched: Collection[TableUid]) -> bool:
        """Whether there may be anything to note: most commits write rows of tables that nobody is subscribed to."""
        if commit.changed_jobs or batch.delete_stream or any(not op.check for op in batch.records):
            return True
        return any(op.table in watched for op in batch.rows)

    def note(self, batch: Batch, commit: Commit, watched: Collection[TableUid], *, rows: bool) -> Captured:
        """What to remember of a commit; called under the commit lock. Without `rows` no row is remembered."""
        out = Captured(commit, batch.names_files)
        if commit.changed_jobs and SystemFeed.watched(watched):
            out.jobs = commit.changed_jobs
        if rows and watched:
            self._note_rows(batch, commit, watched, out)
        for op in batch.records:
            if op.check:
                continue
            kind = op.key[0]
            if kind == RecordKind.TABLE and record_uid(op.key) in watched:
                out.tables.append(record_uid(op.key))
            elif kind == RecordKind.TABLE_NAME and op.value is not None:
                out.renewed = True
            elif kind == RecordKind.USER and op.value is not None:
                out.users.append(op.value)
            elif rows and kind == RecordKind.SEGMENT and op.value is not None and record_uid(op.key) in watched:
                self._note_segment(record_uid(op.key), op.value, out)
        return out

    def _note_rows(self, batch: Batch, commit: Commit, watched: Collection[TableUid], out: Captured) -> None:
        former = commit.former or [None] * len(batch.rows)
        by_table: dict[TableUid, HotRows] = {}
        for op, seq, replaced in zip(batch.rows, commit.seqs, former, strict=True):
            if op.table not in watched:
                continue
            part = by_table.get(op.table)
            if part is None:
                part = by_table[op.table] = HotRows(op.table, [])
            part.rows.append((op, seq, replaced))
            out.size += _ROW_BYTES + len(op.payload) + len(replaced or b"")
            if replaced is None and part.state is None:
                part.state = self._pinned(op.table, out)
        out.parts += by_table.values()
        gone: dict[TableUid, StreamRemovals] = {}
        for row, payload in zip(batch.delete_stream, commit.removed, strict=False):
            if payload is not None and row.table in watched:
                part_ = gone.setdefault(row.table, StreamRemovals(row.table, commit.seq, []))
                part_.rows.append((row.key, row.seq, payload))
                out.size += _ROW_BYTES + len(payload)
        out.parts += gone.values()

    def _note_segment(self, uid: TableUid, value: bytes, out: Captured) -> None:
        record = msgspec.msgpack.decode(value, type=SegmentRecord)
        if not record.relative:
            return
        state = self._pinned(uid, out)
        segment = next(one for one in state.segments if one.record.segment_id == record.segment_id)
        snapshot = out.held.enter_context(self._store.backend.snapshot()) if record.marks else None
        out.parts.append(LargeRows(uid, segment, state, snapshot))
        out.size += _ROW_BYTES

    def _pinned(self, uid: TableUid, out: Captured) -> TableState:
        state = self._store.state(uid)
        out.held.callback(self._store.segments.unpin, self._store.segments.pin(state.segments))
        return state

    # Later, without the commit lock

    def rows(self, part: Part, layout: Layout, scopes: Collection[bytes]) -> Iterator[list[RowChange]]:
        """The changed rows of `scopes` in `_seq` order, in chunks. Rows that did not change are left out."""
        match part:
            case HotRows():
                yield [row for row in self._hot_rows(part, layout, scopes) if row is not None]
            case StreamRemovals():
                yield [
                    RowChange(prefix, part.seq, None, seq, self._read(part.uid, payload, layout))
                    for prefix, seq, payload in part.rows
                    if prefix in scopes
                ]
            case LargeRows():
                yield from self._large_rows(part, layout, scopes)

    def _read(self, uid: TableUid, payload: bytes, layout: Layout) -> Row:
        return read_payload(payload, self._store.layout_of(uid), layout)

    def _hot_rows(self, part: HotRows, layout: Layout, scopes: Collection[bytes]) -> Iterator[RowChange | None]:
        for op, seq, replaced in part.rows:
            prefix = op.key if op.bucket is not None else scope_prefix_of(op.key)
            if prefix not in scopes:
                continue
            former: Row | None = None
            if replaced:
                former = self._read(part.uid, replaced, layout)
            elif replaced is None and part.state is not None:
                former = self._cold(part.state, op.key, op.expect, layout)
            new = None if op.flags & RowFlags.DELETED else self._read(part.uid, op.payload, layout)
            yield _changed(prefix, seq, new, op.expect, former)

    def _cold(self, state: TableState, key: bytes, seq: Seq, layout: Layout) -> Row | None:
        for segment in state.segments:
            if segment.seq_min <= seq <= segment.seq_max:
                found = self._store.segments.find(segment, key)
                if found is not None and found.seq == seq:
                    return self._load(found, layout)
        return None

    def _load(self, found: Found, layout: Layout) -> Row | None:
        if found.flags & RowFlags.DELETED:
            return None
        return row_at(self._store.segments.rows(found), found.position, layout)

    def _large_rows(self, part: LargeRows, layout: Layout, scopes: Collection[bytes]) -> Iterator[list[RowChange]]:
        version = part.segment.record.schema_version
        for table in self._store.segments.scan(part.segment, batch_rows=_LARGE_CHUNK_ROWS):
            keys = table.column(KEY).to_pylist()
            prefixes = [scope_prefix_of(key) for key in keys]
            chosen = [at for at, prefix in enumerate(prefixes) if prefix in scopes]
            if not chosen:
                yield []
                continue
            if len(chosen) < len(keys):
                table = table.take(pa.array(chosen))
                keys, prefixes = [keys[at] for at in chosen], [prefixes[at] for at in chosen]
            seqs, flags = table.column(SEQ).to_pylist(), table.column(FLAGS).to_pylist()
            wanted = conform(table, layout, version)
            columns = [
                codec.from_arrow(wanted.column(name))
                for codec, name in zip(layout.codecs, layout.physical_names, strict=True)
            ]
            former = self._former(part, keys, flags, layout)
            yield [
                change
                for prefix, key, seq, flag, row in zip(
                    prefixes, keys, seqs, flags, zip(*columns, strict=True), strict=True
                )
                for change in [
                    _changed(prefix, seq, None if flag & RowFlags.DELETED else row, *former.get(key, (0, None)))
                ]
                if change is not None
            ]

    def _former(
        self, part: LargeRows, keys: Sequence[bytes], flags: Sequence[int], layout: Layout
    ) -> dict[bytes, tuple[Seq, Row | None]]:
        """(`_seq`, live row) that each of the sorted keys had before the large statement."""
        marked = [key for key, flag in zip(keys, flags, strict=True) if flag & RowFlags.SUPERSEDES]
        if not marked or part.snapshot is None:
            return {}
        newest: dict[bytes, tuple[Seq, bytes | Found | None]] = {}
        for hot in part.snapshot.rows(part.uid, marked):
            if hot is not None:
                newest[hot.key] = (hot.seq, None if hot.flags & RowFlags.DELETED else hot.payload)
        column = pa.chunked_array([pa.array(marked, pa.binary())])
        for segment in part.state.segments:
            if segment.record.segment_id == part.segment.record.segment_id:
                continue
            for at, found in self._store.segments.find_many(segment, column):
                known = newest.get(marked[at])
                if known is None or known[0] < found.seq:
                    newest[marked[at]] = (found.seq, found)
        out: dict[bytes, tuple[Seq, Row | None]] = {}
        for key, (seq, version) in newest.items():
            if isinstance(version, Found):
                out[key] = (seq, self._load(version, layout))
            else:
                out[key] = (seq, None if version is None else self._read(part.uid, version, layout))
        return out


def _changed(prefix: bytes, seq: Seq, new: Row | None, former_seq: Seq, former: Row | None) -> RowChange | None:
    if former is None and new is None:
        return None
    if former is not None and new is not None and same_row(new, former):
        return None
    return RowChange(prefix, seq, new, former_seq, former)
