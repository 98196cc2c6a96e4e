"""Cold files: writing one Parquet segment, looking rows up in it, and keeping it while it is read.

A segment is sorted by row key, so a scope is one range of it. Row groups end where a scope ends as far
as possible: a large scope has row groups of its own. The format is Apache Parquet 2.6 with ZSTD, page
index and page checksums.
"""

from __future__ import annotations

import threading
import zlib
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kalamdb.errors import Corrupt
from kalamdb.files import LocalFiles
from kalamdb.schema import TableDef
from kalamdb.service import may_block
from kalamdb.storage import keys
from kalamdb.tables.layout import FLAGS, KEY, SEQ, Layout
from kalamdb.types import RowFlags, Seq, TableUid

_TERMINATED_SCOPE_MIN = 2
_LARGE_SCOPE_ROWS = 8192
"""A scope with this many rows left in a row group gets one of its own."""
_ROWS_PER_PAGE = 8192
_T = TypeVar("_T")


class SegmentRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What the store knows of one live segment."""

    segment_id: str
    level: int
    rows: int
    tombstones: int
    marks: int
    users: int
    size_bytes: int
    crc32: int
    key_min: bytes
    key_max: bytes
    """Inclusive."""
    seq_min: Seq
    seq_max: Seq
    """As in the file; see `relative`."""
    relative: bool = False
    """The file holds 1..rows as `_seq`; the real ones are version of this record - rows + that."""
    schema_version: int = 1
    created_at: int = 0
    column_stats: dict[int, tuple[Any, Any, int]] = {}
    """Column id -> (min, max, null count), min and max in JSON-friendly form or None."""


class IntentRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A file that may come to exist: who writes it."""

    segment_id: str
    job_id: str | None = None
    lease_id: int | None = None
    process: str = ""
    """Names the writer when it is a statement: intents of another process are dead."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A live segment as a reader sees it."""

    table: TableUid
    record: SegmentRecord
    version: Seq
    path: Path

    @property
    def seq_base(self) -> Seq:
        """What to add to `_seq` in the file."""
        return self.version - self.record.rows if self.record.relative else 0

    @property
    def seq_min(self) -> Seq:
        """Smallest `_seq`."""
        return self.record.seq_min + self.seq_base

    @property
    def seq_max(self) -> Seq:
        """Largest `_seq`."""
        return self.record.seq_max + self.seq_base

    def overlaps(self, start: bytes, end: bytes | None) -> bool:
        """Whether a row key in [start, end) may be inside."""
        return self.record.key_max >= start and (end is None or self.record.key_min < end)


class _ChecksumFile:
    """A binary file that keeps the CRC-32 and the count of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.crc32 = 0
        self.size_bytes = 0
        self.closed = False

    def write(self, data: bytes) -> int:
        self.crc32 = zlib.crc32(data, self.crc32)
        self.size_bytes += len(data)
        self._file.write(data)
        return len(data)

    def tell(self) -> int:
        return self.size_bytes

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self.closed = True

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False


def write_segment(
    files: LocalFiles,
    path: Path,
    layout: Layout,
    batches: Iterable[pa.Table],
    *,
    row_group_rows_max: int,
    compression: str = "zstd",
) -> SegmentRecord | None:
    """Write key-ordered batches as one segment, fsynced; None, and no file, when there are no rows.

    Blocks for the disk. Raises Unavailable when the disk refuses.
    """
    iterator = iter(batches)
    first = next((batch for batch in iterator if batch.num_rows), None)
    if first is None:
        return None
    count = _Counter(layout)
    with files.create(path) as raw:
        sink = _ChecksumFile(raw)
        collected: list[Any] = []
        target, options = pa.PythonFile(sink, mode="w"), _writer_options(layout, compression)
        writer = pq.ParquetWriter(target, layout.schema, **options, metadata_collector=collected)
        try:
            for group in _row_groups(_chain(first, iterator), row_group_rows_max):
                count.add(group)
                writer.write_table(group, row_group_size=len(group))
            writer.close()
        except BaseException:
            # Its destructor would try to end the file again.
            writer.is_open = False
            raise
    return count.record(path.stem, sink, collected[0])


def _chain(first: pa.Table, rest: Iterator[pa.Table]) -> Iterator[pa.Table]:
    yield first
    yield from rest


def _writer_options(layout: Layout, compression: str) -> dict[str, Any]:
    texts = [
        field.name
        for field in layout.schema
        if field.name != KEY and (pa.types.is_string(field.type) or pa.types.is_binary(field.type))
    ]
    return {
        "compression": compression,
        "use_dictionary": texts,
        "column_encoding": {KEY: "DELTA_BYTE_ARRAY", SEQ: "DELTA_BINARY_PACKED"},
        "write_page_index": True,
        "write_page_checksum": True,
        "max_rows_per_page": _ROWS_PER_PAGE,
        "store_schema": False,
    }


def _scope_end(key: bytes) -> int:
    return key.index(b"\x00\x01", _TERMINATED_SCOPE_MIN) + 2


def _run_start(column: pa.ChunkedArray, prefix: bytes) -> int:
    return bisect_left(_KeyView(column), prefix)


def _row_groups(batches: Iterable[pa.Table], rows_max: int) -> Iterator[pa.Table]:
    """Cut a key-ordered stream into row groups that end where a scope ends, where that is possible."""
    buffer: list[pa.Table] = []
    rows = 0
    continued = b""
    for batch in batches:
        buffer.append(batch)
        rows += len(batch)
        while rows >= rows_max:
            table = pa.concat_tables(buffer)
            cut, continued = _cut(table, rows_max, continued)
            yield table.slice(0, cut).combine_chunks()
            table = table.slice(cut)
            buffer, rows = [table] if len(table) else [], len(table)
    while rows:
        table = pa.concat_tables(buffer)
        cut, continued = _cut(table, rows_max, continued) if continued else (rows, b"")
        yield table.slice(0, cut).combine_chunks()
        table = table.slice(cut)
        buffer, rows = [table], len(table)


def _cut(table: pa.Table, rows_max: int, continued: bytes) -> tuple[int, bytes]:
    """Rows of the next group, and the scope that goes on after it ('' when none does)."""
    rows = min(len(table), rows_max)
    column = table.column(KEY)
    first, last = column[0].as_py(), column[rows - 1].as_py()
    head, tail = first[: _scope_end(first)], last[: _scope_end(last)]
    if head == tail:
        return rows, head
    end = keys.prefix_end(head)
    assert end is not None
    run = _run_start(column, end)
    if head == continued or run >= _LARGE_SCOPE_ROWS:
        return run, b""
    return _run_start(column, tail), b""


class _KeyView(Sequence[bytes]):
    """A key column as a sequence of bytes for bisect."""

    def __init__(self, column: pa.ChunkedArray | pa.Array) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: Any) -> Any:
        return self._column[index].as_py()


class _Counter:
    """Figures of a segment while its row groups pass by."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.rows = self.tombstones = self.marks = self.users = 0
        self.key_min = self.key_max = b""
        self.seq_min, self.seq_max = 1 << 63, 0
        self._last_scope = b""

    def add(self, group: pa.Table) -> None:
        keys_column, flags = group.column(KEY), group.column(FLAGS)
        self.key_min = self.key_min or keys_column[0].as_py()
        self.key_max = keys_column[-1].as_py()
        self.rows += len(group)
        values = flags.to_numpy()
        self.tombstones += int(np.count_nonzero(values & RowFlags.DELETED))
        self.marks += int(np.count_nonzero(values & RowFlags.SUPERSEDES))
        extremes = pc.min_max(group.column(SEQ)).as_py()
        self.seq_min = min(self.seq_min, extremes["min"])
        self.seq_max = max(self.seq_max, extremes["max"])
        self._count_users(keys_column)

    def _count_users(self, column: pa.ChunkedArray) -> None:
        view, position = _KeyView(column), 0
        while position < len(view):
            key = view[position]
            scope = key[: _scope_end(key)]
            self.users += scope != self._last_scope
            self._last_scope = scope
            end = keys.prefix_end(scope)
            assert end is not None
            position = _gallop(view, end, position)

    def record(self, segment_id: str, sink: _ChecksumFile, metadata: pq.FileMetaData) -> SegmentRecord:
        return SegmentRecord(
            segment_id=segment_id,
            level=0,
            rows=self.rows,
            tombstones=self.tombstones,
            marks=self.marks,
            users=self.users,
            size_bytes=sink.size_bytes,
            crc32=sink.crc32,
            key_min=self.key_min,
            key_max=self.key_max,
            seq_min=self.seq_min,
            seq_max=self.seq_max,
            schema_version=self._layout.version,
            column_stats=_column_stats(metadata, self._layout),
        )


def _gallop(view: _KeyView, end: bytes, position: int) -> int:
    """First index >= `position` whose key is >= `end`; near ones are found in few steps."""
    step, low = 1, position
    while position + step < len(view) and view[position + step] < end:
        low = position + step
        step *= 2
    return bisect_left(view, end, low, min(position + step, len(view)))


def _column_stats(metadata: pq.FileMetaData, layout: Layout) -> dict[int, tuple[Any, Any, int]]:
    stats: dict[int, tuple[Any, Any, int]] = {}
    names = {metadata.row_group(0).column(i).path_in_schema: i for i in range(metadata.num_columns)}
    for column in layout.columns:
        index = names.get(f"c{column.id}")
        if index is None:
            continue
        low = high = None
        nulls, known = 0, True
        for group in range(metadata.num_row_groups):
            found = metadata.row_group(group).column(index).statistics
            if found is None:
                known = False
                break
            nulls += found.null_count or 0
            if found.has_min_max:
                low = found.min if low is None else min(low, found.min)
                high = found.max if high is None else max(high, found.max)
        stats[column.id] = (_plain(low), _plain(high), nulls) if known else (None, None, -1)
    return stats


def _plain(value: Any) -> Any:
    """A statistic as JSON can hold it; long or binary ones are left out."""
    if isinstance(value, bytes) or (isinstance(value, str) and len(value) > 128):
        return None
    return value if isinstance(value, (bool, int, float, str)) or value is None else str(value)


class Found(msgspec.Struct, frozen=True, gc=False):
    """The version of a key that a segment holds."""

    segment: Segment
    row_group: int
    position: int
    seq: Seq
    flags: int


@dataclass(frozen=True, slots=True)
class _GroupIndex:
    keys: pa.Array
    seqs: Any
    flags: Any


class SegmentCache:
    """Reads segments, keeps what was read within a bound, and delays unlinking files in use.

    Thread-safe. A file is checked against its CRC-32 before its first read in this process and again
    whenever its modification time changes.
    """

    def __init__(self, files: LocalFiles, bytes_max: int) -> None:
        self._files = files
        self._bytes_max = bytes_max
        self._lock = threading.Lock()
        self._items: OrderedDict[tuple[str, Any], tuple[Any, int]] = OrderedDict()
        self._bytes = 0
        self._pins: dict[str, int] = {}
        self._doomed: dict[str, Path] = {}
        self._verified: dict[str, tuple[int, int]] = {}

    @contextmanager
    def pinned(self, segments: Iterable[Segment]) -> Iterator[None]:
        """Keep the files of `segments` until the block ends."""
        held = self.pin(segments)
        try:
            yield
        finally:
            self.unpin(held)

    def pin(self, segments: Iterable[Segment]) -> list[str]:
        """Keep these files until `unpin` gets the returned ids."""
        ids = [segment.record.segment_id for segment in segments]
        with self._lock:
            for segment_id in ids:
                self._pins[segment_id] = self._pins.get(segment_id, 0) + 1
        return ids

    def unpin(self, ids: Sequence[str]) -> None:
        """Give back what `pin` returned; files that were un-named meanwhile are unlinked."""
        free: list[Path] = []
        with self._lock:
            for segment_id in ids:
                left = self._pins[segment_id] - 1
                if left:
                    self._pins[segment_id] = left
                    continue
                del self._pins[segment_id]
                if segment_id in self._doomed:
                    free.append(self._doomed.pop(segment_id))
        self._unlink(free)

    def unlink(self, segment_id: str, path: Path) -> bool:
        """Remove a file that no record names; later, when a reader holds it. True when it is gone now."""
        with self._lock:
            if segment_id in self._pins:
                self._doomed[segment_id] = path
                return False
        self._unlink([path])
        return True

    def _unlink(self, paths: Iterable[Path]) -> None:
        for path in paths:
            self._files.unlink(path)
            with self._lock:
                self._verified.pop(path.stem, None)
                for key in [key for key in self._items if key[0] == path.stem]:
                    self._bytes -= self._items.pop(key)[1]

    def verify(self, segment: Segment, *, again: bool = False) -> None:
        """Check size and CRC-32; unless `again`, only when this state of the file was not checked. Raises Corrupt."""
        segment_id = segment.record.segment_id
        try:
            state = segment.path.stat()
            stamp = (state.st_mtime_ns, state.st_size)
            if self._verified.get(segment_id) == stamp and not again:
                return
            may_block()
            crc32 = 0
            with segment.path.open("rb") as file:
                while chunk := file.read(1 << 22):
                    crc32 = zlib.crc32(chunk, crc32)
        except OSError as exc:
            raise Corrupt(f"segment file '{segment.path}' cannot be read: {exc.strerror}") from exc
        if state.st_size != segment.record.size_bytes or crc32 != segment.record.crc32:
            raise Corrupt(
                f"segment file '{segment.path}' is damaged: its checksum is {crc32:08x} over {state.st_size} bytes, "
                f"expected {segment.record.crc32:08x} over {segment.record.size_bytes}; restore it from a backup"
            )
        self._verified[segment_id] = stamp

    def _cached(self, key: tuple[str, Any], build: Callable[[], Any], size: Callable[[Any], int]) -> Any:
        with self._lock:
            hit = self._items.get(key)
            if hit is not None:
                self._items.move_to_end(key)
                return hit[0]
        may_block()
        value = build()
        bytes_ = size(value)
        with self._lock:
            if key not in self._items:
                self._items[key] = (value, bytes_)
                self._bytes += bytes_
            while self._bytes > self._bytes_max and len(self._items) > 1:
                self._bytes -= self._items.popitem(last=False)[1][1]
        return value

    def derived(self, segment: Segment, key: tuple[Any, ...], build: Callable[[], _T], bytes_: int) -> _T:
        """What `build` makes of a segment, kept while there is room; `bytes_` is what it takes, about."""
        kept: _T = self._cached((segment.record.segment_id, key), build, lambda value: bytes_)
        return kept

    def metadata(self, segment: Segment) -> pq.FileMetaData:
        """The footer of a segment."""
        self.verify(segment)
        return self._cached(
            (segment.record.segment_id, "footer"),
            lambda: _guarded(segment, lambda: pq.read_metadata(segment.path)),
            lambda footer: int(footer.serialized_size),
        )

    def group_bounds(self, segment: Segment) -> list[tuple[bytes, bytes]]:
        """(first, last) row key of each row group."""
        footer = self.metadata(segment)

        def build() -> list[tuple[bytes, bytes]]:
            found = [footer.row_group(group).column(0).statistics for group in range(footer.num_row_groups)]
            if all(stat is not None and stat.has_min_max for stat in found):
                return [(bytes(stat.min), bytes(stat.max)) for stat in found]
            tables = [self._read(segment, group, [KEY]).column(KEY) for group in range(footer.num_row_groups)]
            return [(column[0].as_py(), column[-1].as_py()) for column in tables]

        bounds: list[tuple[bytes, bytes]] = self._cached(
            (segment.record.segment_id, "bounds"), build, lambda value: 200 * len(value)
        )
        return bounds

    def separates(self, segment: Segment, start: bytes, end: bytes) -> bool:
        """Whether a reader that prunes by statistics reads nothing but [start, end).

        Each row group lies wholly inside, or wholly outside and then says so twice: in its statistics and in
        its page index. A reader gives up on statistics when another predicate cannot be evaluated on them.
        """
        footer = self.metadata(segment)
        for group, (low, high) in enumerate(self.group_bounds(segment)):
            if start <= low and high < end:
                continue
            key = footer.row_group(group).column(0)
            stated = key.statistics is not None and key.statistics.has_min_max and key.has_column_index
            if not stated or (high >= start and low < end):
                return False
        return True

    def _read(self, segment: Segment, group: int, columns: list[str] | None) -> pa.Table:
        def read() -> pa.Table:
            with pq.ParquetFile(segment.path, page_checksum_verification=True) as file:
                return file.read_row_group(group, columns=columns, use_threads=False)

        return _guarded(segment, read)

    def _index(self, segment: Segment, group: int) -> _GroupIndex:
        def build() -> _GroupIndex:
            table = self._read(segment, group, [KEY, SEQ, FLAGS]).combine_chunks()
            return _GroupIndex(
                table.column(KEY).combine_chunks() if table.column(KEY).num_chunks != 1 else table.column(KEY).chunk(0),
                table.column(SEQ).to_numpy() + segment.seq_base,
                table.column(FLAGS).to_numpy(),
            )

        index: _GroupIndex = self._cached(
            (segment.record.segment_id, ("index", group)),
            build,
            lambda value: int(value.keys.nbytes + value.seqs.nbytes + value.flags.nbytes),
        )
        return index

    def find(self, segment: Segment, key: bytes) -> Found | None:
        """The version of `key` in this segment."""
        if not segment.record.key_min <= key <= segment.record.key_max:
            return None
        bounds = self.group_bounds(segment)
        group = bisect_right(bounds, key, key=lambda bound: bound[0]) - 1
        if group < 0 or bounds[group][1] < key:
            return None
        index = self._index(segment, group)
        position = bisect_left(_KeyView(index.keys), key)
        if position == len(index.keys) or index.keys[position].as_py() != key:
            return None
        return Found(segment, group, position, int(index.seqs[position]), int(index.flags[position]))

    def find_many(self, segment: Segment, column: pa.ChunkedArray) -> Iterator[tuple[int, Found]]:
        """(index, version) of the keys of a sorted key column that this segment holds."""
        view = _KeyView(column)
        if not segment.overlaps(view[0], view[len(view) - 1] + b"\x00"):
            return
        for group, (low, high) in enumerate(self.group_bounds(segment)):
            first, last = bisect_left(view, low), bisect_right(view, high)
            if first == last:
                continue
            index = self._index(segment, group)
            for offset, position in matches(column.slice(first, last - first).combine_chunks(), index.keys):
                seq, flags = int(index.seqs[position]), int(index.flags[position])
                yield first + offset, Found(segment, group, position, seq, flags)

    def rows(self, found: Found) -> pa.Table:
        """The row group that holds what `find` found at `position`, in the segment's own schema version."""
        segment, group = found.segment, found.row_group
        table: pa.Table = self._cached(
            (segment.record.segment_id, ("rows", group)),
            lambda: self._read(segment, group, None),
            lambda value: int(value.nbytes),
        )
        return table

    def marks(self, segment: Segment, start: bytes, end: bytes | None) -> pa.Table | None:
        """Row key and `_seq` of the marks in [start, end); None when there are none."""
        if not segment.record.marks or not segment.overlaps(start, end):
            return None
        parts = []
        for group, (low, high) in enumerate(self.group_bounds(segment)):
            if high < start or (end is not None and low >= end):
                continue
            marks = self._group_marks(segment, group)
            view = _KeyView(marks.column(KEY))
            first = bisect_left(view, start)
            last = len(view) if end is None else bisect_left(view, end)
            parts.append(marks.slice(first, last - first))
        found = pa.concat_tables(parts) if parts else None
        return found if found is not None and len(found) else None

    def _group_marks(self, segment: Segment, group: int) -> pa.Table:
        def build() -> pa.Table:
            index = self._index(segment, group)
            chosen = pa.array((index.flags & RowFlags.SUPERSEDES) != 0)
            table = pa.table({KEY: index.keys, SEQ: pa.array(index.seqs)})
            return table.filter(chosen).combine_chunks()

        marks: pa.Table = self._cached(
            (segment.record.segment_id, ("marks", group)), build, lambda value: int(value.nbytes)
        )
        return marks

    def scan(self, segment: Segment, *, batch_rows: int = 16_384) -> Iterator[pa.Table]:
        """All rows in key order, in the segment's own schema version, with real `_seq`."""
        self.verify(segment)
        with pq.ParquetFile(segment.path, page_checksum_verification=True) as file:
            batches = file.iter_batches(batch_size=batch_rows, use_threads=False)
            while True:
                batch = _guarded(segment, lambda: next(batches, None))
                if batch is None:
                    return
                table = pa.Table.from_batches([batch])
                if segment.seq_base:
                    moved = pc.add(table.column(SEQ), segment.seq_base)
                    table = table.set_column(table.schema.get_field_index(SEQ), table.schema.field(SEQ), moved)
                yield table


def matches(wanted: pa.Array, among: pa.Array) -> Iterator[tuple[int, int]]:
    """(index in `wanted`, index in `among`) of the values that stand in both; `among` holds each once."""
    positions = pc.index_in(wanted, value_set=among)
    hits = np.flatnonzero(positions.is_valid().to_numpy(zero_copy_only=False))
    found = positions.take(pa.array(hits)).to_numpy()
    yield from zip(hits.tolist(), found.tolist(), strict=True)


def _guarded(segment: Segment, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (pa.ArrowException, OSError) as exc:
        raise Corrupt(f"segment file '{segment.path}' cannot be read: {exc}") from exc


def segment_path(root: Path, definition: TableDef, segment_id: str) -> Path:
    """Where a segment's file lies."""
    return table_folder(root, definition) / f"{segment_id}.parquet"


def table_folder(root: Path, definition: TableDef) -> Path:
    """The folder of one incarnation of a table."""
    return root / definition.namespace / definition.name / str(definition.uid)
