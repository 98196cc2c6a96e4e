"""The decoded hot tier: Arrow chunks per table and scope, kept in step with the store.

Every version is known by its `_seq`. A commit only appends to a list; turning what was appended into
Arrow, and dropping replaced versions, is done by the next reader. What a reader holds never changes.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from kalamdb.storage import HotRow
from kalamdb.tables.layout import FLAGS, KEY, SEQ, Layout, LayoutOf, rows_to_batch
from kalamdb.types import RowFlags, Seq, TableUid

_CHUNK_ROWS_MAX = 16_384
"""A replaced row copies its chunk, so chunks stay small enough for that to be cheap."""
_PENDING_ROWS_MAX = 65_536
_PENDING_ROW_BYTES = 200
"""Rough cost of a row that is not yet in Arrow, on top of its payload."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some hot rows of one scope in one schema version, `_seq` rising."""

    batch: pa.RecordBatch
    version: int
    seq_min: Seq
    seq_max: Seq
    marks: int
    tombstones: int


def make_chunk(batch: pa.RecordBatch, version: int) -> Chunk:
    """A chunk over a batch whose `_seq` rises."""
    seqs = batch.column(SEQ)
    flags = batch.column(FLAGS).to_numpy()
    return Chunk(
        batch,
        version,
        seqs[0].as_py(),
        seqs[-1].as_py(),
        int(np.count_nonzero(flags & RowFlags.SUPERSEDES)),
        int(np.count_nonzero(flags & RowFlags.DELETED)),
    )


def chunks_of(rows: Sequence[HotRow], layout_of: LayoutOf, wanted: Layout) -> list[Chunk]:
    """Hot rows in any order as chunks."""
    ordered = sorted(rows, key=lambda row: row.seq)
    return [
        make_chunk(rows_to_batch(ordered[at : at + _CHUNK_ROWS_MAX], layout_of, wanted), wanted.version)
        for at in range(0, len(ordered), _CHUNK_ROWS_MAX)
    ]


@dataclass(frozen=True, slots=True)
class HotView:
    """Hot rows of one scope at one moment: chunks plus what was committed after them."""

    chunks: tuple[Chunk, ...]
    pending: tuple[HotRow, ...] = ()
    dead: tuple[Seq, ...] = ()

    def settled(self, layout_of: LayoutOf, wanted: Layout) -> tuple[Chunk, ...]:
        """The same rows as chunks only."""
        if not self.pending and not self.dead:
            return self.chunks
        dead = set(self.dead)
        chunks = list(_without(self.chunks, dead)) if dead else list(self.chunks)
        fresh = [row for row in self.pending if row.seq not in dead]
        for chunk in chunks_of(fresh, layout_of, wanted):
            chunks.append(chunk)
            _merge_tail(chunks)
        return tuple(chunks)


def _without(chunks: Sequence[Chunk], dead: set[Seq]) -> list[Chunk]:
    gone = np.fromiter(dead, np.int64, len(dead))
    gone.sort()
    out = []
    for chunk in chunks:
        first, last = np.searchsorted(gone, (chunk.seq_min, chunk.seq_max + 1))
        if first == last:
            out.append(chunk)
            continue
        keep = ~np.isin(chunk.batch.column(SEQ).to_numpy(), gone[first:last])
        if keep.all():
            out.append(chunk)
        elif keep.any():
            out.append(make_chunk(chunk.batch.filter(pa.array(keep)), chunk.version))
    return out


def _merge_tail(chunks: list[Chunk]) -> None:
    """Merge small neighbours so that n rows are in O(log n) chunks, each row copied O(log n) times."""
    while len(chunks) > 1:
        older, newer = chunks[-2], chunks[-1]
        total = older.batch.num_rows + newer.batch.num_rows
        if older.version != newer.version or total > _CHUNK_ROWS_MAX or newer.batch.num_rows * 2 < older.batch.num_rows:
            return
        merged = pa.concat_batches([older.batch, newer.batch])
        chunks[-2:] = [make_chunk(merged, older.version)]


def above(chunks: Sequence[Chunk], watermark: Seq) -> list[Chunk]:
    """The rows with `_seq` greater than `watermark`."""
    out = []
    for chunk in chunks:
        if chunk.seq_min > watermark:
            out.append(chunk)
        elif chunk.seq_max > watermark:
            at = int(np.searchsorted(chunk.batch.column(SEQ).to_numpy(), watermark, side="right"))
            out.append(make_chunk(chunk.batch.slice(at), chunk.version))
    return out


class _Entry:
    """One scope's rows; guarded by the cache's lock."""

    __slots__ = ("base_seq", "bytes_", "chunks", "dead", "pending", "ready")

    def __init__(self) -> None:
        self.chunks: tuple[Chunk, ...] = ()
        self.pending: list[HotRow] = []
        self.dead: list[Seq] = []
        self.base_seq: Seq = 0
        self.ready = False
        self.bytes_ = 0


class HotCache:
    """Scopes that were read lately. All methods but `settle` must be called under `lock`."""

    def __init__(self, bytes_max: int) -> None:
        self.lock = threading.RLock()
        self._bytes_max = bytes_max
        self._tables: dict[TableUid, OrderedDict[bytes, _Entry]] = {}
        self._recent: OrderedDict[tuple[TableUid, bytes], None] = OrderedDict()
        self._bytes = 0

    @property
    def bytes_used(self) -> int:
        """Bytes held, about."""
        return self._bytes

    def _entry(self, table: TableUid, prefix: bytes) -> _Entry | None:
        scopes = self._tables.get(table)
        return None if scopes is None else scopes.get(prefix)

    def reserve(self, table: TableUid, prefix: bytes) -> bool:
        """Start collecting commits of a scope that is about to be read; False when it is known already."""
        scopes = self._tables.setdefault(table, OrderedDict())
        if prefix in scopes:
            return False
        scopes[prefix] = _Entry()
        self._recent[(table, prefix)] = None
        return True

    def install(self, table: TableUid, prefix: bytes, chunks: Sequence[Chunk], base_seq: Seq) -> None:
        """Set what a snapshot at `base_seq` held; commits collected since `reserve` stay on top."""
        entry = self._entry(table, prefix)
        if entry is None or entry.ready:
            return
        entry.chunks = tuple(chunks)
        entry.pending = [row for row in entry.pending if row.seq > base_seq]
        entry.base_seq = base_seq
        entry.ready = True
        self._account(entry, sum(chunk.batch.nbytes for chunk in chunks))
        self._evict((table, prefix))

    def forget(self, table: TableUid, prefix: bytes | None = None) -> None:
        """Drop a scope, or all scopes of a table."""
        scopes = self._tables.get(table)
        if scopes is None:
            return
        for known in [prefix] if prefix is not None else list(scopes):
            entry = scopes.pop(known, None)
            if entry is not None:
                self._bytes -= entry.bytes_
                self._recent.pop((table, known), None)
        if not scopes:
            del self._tables[table]

    def view(self, table: TableUid, prefix: bytes) -> HotView | None:
        """The scope's rows now; None when they are not cached."""
        entry = self._entry(table, prefix)
        if entry is None or not entry.ready:
            return None
        self._recent.move_to_end((table, prefix))
        return HotView(entry.chunks, tuple(entry.pending), tuple(entry.dead))

    def settle(self, table: TableUid, prefix: bytes, view: HotView, chunks: tuple[Chunk, ...]) -> None:
        """Keep the Arrow form of `view` for later readers. Takes the lock itself."""
        with self.lock:
            entry = self._entry(table, prefix)
            if entry is None or entry.chunks is not view.chunks:
                return
            entry.chunks = chunks
            entry.pending = entry.pending[len(view.pending) :]
            entry.dead = entry.dead[len(view.dead) :]
            self._account(entry, sum(chunk.batch.nbytes for chunk in chunks))
            self._evict((table, prefix))

    def wants(self, table: TableUid) -> bool:
        """Whether any scope of the table is cached or being read."""
        return table in self._tables

    def add(self, table: TableUid, prefix: bytes, row: HotRow, replaced: Seq) -> None:
        """Take over one committed version."""
        entry = self._tables[table].get(prefix)
        if entry is None or row.seq <= entry.base_seq:
            return
        entry.pending.append(row)
        if replaced:
            entry.dead.append(replaced)
        size = _PENDING_ROW_BYTES + len(row.payload)
        entry.bytes_ += size
        self._bytes += size
        if len(entry.pending) > _PENDING_ROWS_MAX or len(entry.dead) > _PENDING_ROWS_MAX:
            self.forget(table, prefix)

    def retire(self, table: TableUid, watermark: Seq) -> None:
        """Let go of rows at or below the watermark."""
        for entry in list(self._tables.get(table, OrderedDict()).values()):
            if entry.ready and entry.chunks:
                entry.chunks = tuple(chunk for chunk in entry.chunks if chunk.seq_max > watermark)
                self._account(entry, sum(chunk.batch.nbytes for chunk in entry.chunks))

    def _account(self, entry: _Entry, chunk_bytes: int) -> None:
        bytes_ = chunk_bytes + sum(_PENDING_ROW_BYTES + len(row.payload) for row in entry.pending)
        self._bytes += bytes_ - entry.bytes_
        entry.bytes_ = bytes_

    def _evict(self, keep: tuple[TableUid, bytes]) -> None:
        while self._bytes > self._bytes_max and len(self._recent) > 1:
            oldest = next(iter(self._recent))
            if oldest == keep:
                self._recent.move_to_end(oldest)
                continue
            self.forget(*oldest)


def mark_table(chunks: Sequence[Chunk]) -> list[pa.Table]:
    """Row key and `_seq` of the marks among hot rows."""
    out = []
    for chunk in chunks:
        if chunk.marks:
            flags = chunk.batch.column(FLAGS).to_numpy()
            chosen = pa.array((flags & RowFlags.SUPERSEDES) != 0)
            out.append(pa.Table.from_batches([chunk.batch.select([KEY, SEQ]).filter(chosen)]))
    return out
