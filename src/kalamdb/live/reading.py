"""What is stored now, for subscriptions that begin or have to catch up: rows and deletions after a `_seq`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from kalamdb.catalog import CatalogEntry
from kalamdb.clock import seq_to_ms
from kalamdb.live.changes import SEQ_NAME, Change, Shape
from kalamdb.live.filters import Always, sql
from kalamdb.sql.caller import Caller
from kalamdb.sql.engine import TableSource
from kalamdb.sql.projection import quote
from kalamdb.sql.query import Query, Reader
from kalamdb.storage import Commit, RecordKind, record_prefix
from kalamdb.tables.codec import Stored
from kalamdb.tables.read import scan_plan
from kalamdb.tables.store import ReadPoint, TableStore
from kalamdb.types import ChangeType, Seq, TableKind, TableUid

_BLOCK_BYTES_MAX = 256 << 20


@dataclass(slots=True)
class Block:
    """What one look found, as of commit `seq`."""

    seq: Seq
    rows: Iterator[Change]
    left: int
    """Rows that `rows` still has."""
    complete: bool
    """Nothing that was committed up to `seq` lies behind it."""
    last_row: Seq = 0
    """`_seq` of its last row."""
    last_delete: Seq = 0
    deletes_after: Seq = 0
    """What was deleted up to here is known already."""
    deletes: list[Change] = field(default_factory=list)
    kept: Change | None = None
    """The row that did not fit the last page."""

    def page(self, rows_max: int, bytes_max: int) -> list[Change]:
        """The next rows."""
        out: list[Change] = []
        size = 0
        while len(out) < rows_max and self.left:
            change = self.kept or next(self.rows)
            self.kept = None
            size += change.size
            if out and size > bytes_max:
                self.kept = change
                break
            out.append(change)
            self.left -= 1
        return out


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a look is to find: rows after one `_seq`, or the newest; deletions after another, or none."""

    rows_after: Seq
    deletes_after: Seq | None
    last_rows: int | None = None
    type: ChangeType = ChangeType.SNAPSHOT


class LiveReader:
    """Reads tables for subscriptions. What it finds is durable when it returns."""

    def __init__(self, store: TableStore, reader: Reader, resume_window_s: float, *, block_rows: int = 16_384) -> None:
        self._store = store
        self._reader = reader
        self._resume_window_s = resume_window_s
        self.block_rows = block_rows
        """Rows that one look reads; its pages are handed out from memory."""

    def covers(self, uid: TableUid, seq: Seq) -> bool:
        """Whether what was deleted since `seq` is still known, so that a subscription may resume there."""
        oldest_ms = self._store.clock.now_ms() - self._resume_window_s * 1000
        if seq_to_ms(seq) < oldest_ms or seq > self._store.backend.head():
            return False
        # TRUNCATE makes a fresh uid, and what the old one held is nowhere remembered.
        with self._store.backend.snapshot() as snapshot:
            versions = snapshot.scan_records(*record_prefix(RecordKind.TABLE_VERSION, uid))
            born = min((record.version for _, record in versions), default=seq + 1)
        return born <= seq

    def read(self, entry: CatalogEntry, shape: Shape, caller: Caller, wanted: Wanted) -> Block:
        """Look once. Blocks for the engine and the disk."""
        definition, scope = entry.definition, caller.scope(entry.definition)
        head = self._store.backend.head()
        with self._store.read_point([(entry, scope)]) as point:
            # Rows of a stream are read after the moment was taken: those that came in between are not meant.
            is_stream = definition.kind is TableKind.STREAM
            seq = head if is_stream else point.seq
            limit = wanted.last_rows or self.block_rows
            rows = self._rows(entry, shape, caller, point, wanted, seq if is_stream else None, limit)
            complete = wanted.last_rows is not None or len(rows) < limit
            deleted: pa.Table | None = None
            if complete and wanted.deletes_after is not None and seq > wanted.deletes_after and not is_stream:
                deleted = self._deleted(entry, shape, caller, point, wanted.deletes_after)
        self._store.backend.wait_durable(Commit(seq, (), ()))
        block = Block(seq, self._changes(shape, rows, wanted.type), len(rows), complete)
        if len(rows):
            block.last_row = int(rows.column(SEQ_NAME)[-1].as_py())
        if deleted is not None:
            block.deletes = _deletions(shape, deleted)
            if len(deleted) == self.block_rows:
                block.complete = False
                block.last_delete = block.deletes[-1].seq
        return block

    def _rows(
        self, entry: CatalogEntry, shape: Shape, caller: Caller, point: ReadPoint, wanted: Wanted,
        up_to: Seq | None, limit: int,
    ) -> pa.Table:  # fmt: skip
        conditions = [] if shape.filter == Always(True) else [sql(shape.filter, shape.layout)]
        conditions.append(f"{SEQ_NAME} > {wanted.rows_after}")
        if up_to is not None:
            conditions.append(f"{SEQ_NAME} <= {up_to}")
        newest_first = wanted.last_rows is not None
        columns = [quote(shape.layout.columns[at].name) for at in shape.indexes]
        found = self._select(entry, caller, point, columns, conditions, "DESC" if newest_first else "ASC", limit)
        return found.take(pa.array(range(len(found) - 1, -1, -1), pa.int64())) if newest_first else found

    def _deleted(self, entry: CatalogEntry, shape: Shape, caller: Caller, point: ReadPoint, after: Seq) -> pa.Table:
        conditions = ["_deleted", f"{SEQ_NAME} > {after}"]
        if shape.key_only:
            conditions.append(sql(shape.filter, shape.layout))
        columns = [quote(shape.layout.columns[at].name) for at in shape.layout.pk_indexes]
        return self._select(entry, caller, point, columns, conditions, "ASC", self.block_rows, deleted=True)

    def _select(
        self, entry: CatalogEntry, caller: Caller, point: ReadPoint, columns: Sequence[str],
        conditions: Sequence[str], direction: str, limit: int, *, deleted: bool = False,
    ) -> pa.Table:  # fmt: skip
        definition = entry.definition
        where = " AND ".join(f"({condition})" for condition in conditions)
        query = Query(
            f"SELECT {', '.join([*columns, SEQ_NAME])} FROM {quote(definition.namespace)}.{quote(definition.name)} "
            f"WHERE {where} ORDER BY {SEQ_NAME} {direction} LIMIT {limit}"
        )
        plan = scan_plan(self._store, point.view(definition.uid), include_deleted=deleted)
        source = TableSource(
            definition.namespace, definition.name, plan, with_seq=True, with_deleted=deleted, include_deleted=deleted
        )
        query.sources.append(source)
        return self._reader.run(query, caller).table(_BLOCK_BYTES_MAX)

    def _changes(self, shape: Shape, rows: pa.Table, type_: ChangeType) -> Iterator[Change]:
        """The rows as changes, made in small pieces: the table stays in Arrow."""
        codecs = [shape.layout.codecs[at] for at in shape.indexes]
        for batch in rows.combine_chunks().to_batches(max_chunksize=1024):
            columns = [
                codec.from_arrow(batch.column(at).cast(codec.physical)) for at, codec in enumerate(codecs)
            ]  # fmt: skip
            seqs = batch.column(len(codecs)).to_pylist()
            for seq, stored in zip(seqs, zip(*columns, strict=True), strict=True):
                yield shape.whole(type_, seq, stored)


def _deletions(shape: Shape, deleted: pa.Table) -> list[Change]:
    codecs = [shape.layout.codecs[at] for at in shape.layout.pk_indexes]
    columns: list[list[Stored]] = [codec.from_arrow(deleted.column(at)) for at, codec in enumerate(codecs)]
    seqs = deleted.column(SEQ_NAME).to_pylist()
    return [shape.gone(seq, key) for seq, key in zip(seqs, zip(*columns, strict=True), strict=True)]
