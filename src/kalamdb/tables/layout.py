"""How the rows of one table are laid out: hot payloads, key bytes, and the columns of a segment.

A hot payload is the MessagePack array [schema version, value, value, ...] with the values in the
column order of that version, so it names its columns by id through the version. A segment has the
columns `_key`, `_seq`, `_flags` and one column `c<id>` per table column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from kalamdb.alter import widened
from kalamdb.errors import Corrupt, InvalidRequest
from kalamdb.schema import ColumnDef, TableDef
from kalamdb.storage import HotRow, keys
from kalamdb.tables.codec import Stored, ValueCodec, column_codec
from kalamdb.types import RowFlags

KEY = "_key"
SEQ = "_seq"
FLAGS = "_flags"
KEY_BYTES_MAX = 16_384

Row = tuple[Stored, ...]
"""One row in stored form, in the column order of its layout."""

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[Any])


def physical_name(column_id: int) -> str:
    """Name of a column inside segments and the hot cache."""
    return f"c{column_id}"


class Layout:
    """Layout of one schema version. Immutable."""

    def __init__(self, definition: TableDef) -> None:
        self.definition = definition
        self.version = definition.version
        self.columns = definition.columns
        self.codecs: tuple[ValueCodec, ...] = tuple(column_codec(column) for column in self.columns)
        self.physical_names = tuple(physical_name(column.id) for column in self.columns)
        self.index_of_id = {column.id: index for index, column in enumerate(self.columns)}
        self.index_of_name = {column.name: index for index, column in enumerate(self.columns)}
        self.pk_indexes = tuple(self.index_of_id[column_id] for column_id in definition.primary_key)
        self.schema = pa.schema(
            [
                pa.field(KEY, pa.binary(), nullable=False),
                pa.field(SEQ, pa.int64(), nullable=False),
                pa.field(FLAGS, pa.uint8(), nullable=False),
                *(
                    pa.field(physical_name(column.id), codec.physical)
                    for column, codec in zip(self.columns, self.codecs, strict=True)
                ),
            ]
        )

        # A struct that the garbage collector does not follow: a list per row costs five times as much.
        fields: list[tuple[str, Any, Any]] = [("version", int, 0)]
        fields += [(name, Any, None) for name in self.physical_names]
        record = msgspec.defstruct("StoredRow", fields, array_like=True, gc=False)
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(record)

    def decode_columns(self, payloads: Sequence[bytes]) -> list[list[Stored]] | None:
        """Hot payloads as one list per column; None unless all are of this schema version. Raises Corrupt."""
        try:
            rows: list[Any] = list(map(self._decoder.decode, payloads))
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise Corrupt(f"a hot row cannot be decoded: {exc}") from exc
        if any(row.version != self.version for row in rows):
            return None
        return [list(map(attrgetter(name), rows)) for name in self.physical_names]

    def payload(self, row: Sequence[Stored]) -> bytes:
        """A row as the store keeps it."""
        return _encoder.encode((self.version, *row))

    def pk_bytes(self, row: Sequence[Stored]) -> bytes:
        """Encoded primary key of a row in stored form. Raises InvalidRequest on NULL or a huge key."""
        return self.pk_bytes_of([row[index] for index in self.pk_indexes])

    def pk_bytes_of(self, values: Sequence[Stored]) -> bytes:
        """Encoded primary key from its values in key order."""
        out = b""
        for index, value in zip(self.pk_indexes, values, strict=True):
            if value is None:
                raise InvalidRequest(
                    f"NOT NULL constraint violation: column '{self.columns[index].name}' cannot be NULL"
                )
            out += self.codecs[index].key_bytes(value)
        if len(out) > KEY_BYTES_MAX:
            raise InvalidRequest(
                f"the primary key of a row of '{self.definition.table_id}' takes {len(out)} bytes, "
                f"at most {KEY_BYTES_MAX} are allowed"
            )
        return out

    def pk_text(self, row: Sequence[Stored]) -> str:
        """Primary key for an error message."""
        return ", ".join(str(self.codecs[index].load(row[index])) for index in self.pk_indexes)

    def pk_names(self) -> str:
        """Names of the key columns for an error message."""
        return ", ".join(self.columns[index].name for index in self.pk_indexes)

    def arrow_columns(self, rows: Sequence[Sequence[Stored]]) -> list[pa.Array]:
        """Rows in stored form as one array per column."""
        if not rows:
            return [pa.array([], codec.physical) for codec in self.codecs]
        return [codec.to_arrow(values) for codec, values in zip(self.codecs, zip(*rows, strict=True), strict=True)]


LayoutOf = Callable[[int], Layout]
"""Layout of a schema version of one table."""


def decode_payload(payload: bytes) -> tuple[int, list[Stored]]:
    """Schema version and values of a hot payload. Raises Corrupt."""
    try:
        values = _decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise Corrupt(f"a hot row cannot be decoded: {exc}") from exc
    return values[0], values[1:]


def upgrade_row(row: Sequence[Stored], written: Layout, wanted: Layout) -> Row:
    """A row of an older schema version as `wanted` reads it."""
    if written.version == wanted.version:
        return tuple(row)
    out: list[Stored] = []
    for column in wanted.columns:
        index = written.index_of_id.get(column.id)
        out.append(column.fill if index is None else widened(row[index], column.type))
    return tuple(out)


def read_payload(payload: bytes, layout_of: LayoutOf, wanted: Layout) -> Row:
    """A hot payload as a row of the schema version `wanted`."""
    version, values = decode_payload(payload)
    return tuple(values) if version == wanted.version else upgrade_row(values, layout_of(version), wanted)


def rows_to_batch(rows: Sequence[HotRow], layout_of: LayoutOf, wanted: Layout) -> pa.RecordBatch:
    """Hot rows, in their order, as a batch in the segment schema of `wanted`."""
    payloads = [row.payload for row in rows]
    columns = wanted.decode_columns(payloads)
    if columns is None:
        upgraded = [read_payload(payload, layout_of, wanted) for payload in payloads]
        columns = list(map(list, zip(*upgraded, strict=True)))
    arrays = [
        pa.array([row.key for row in rows], pa.binary()),
        pa.array([row.seq for row in rows], pa.int64()),
        pa.array([row.flags for row in rows], pa.uint8()),
        *(codec.to_arrow(values) for codec, values in zip(wanted.codecs, columns, strict=True)),
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=wanted.schema)


def row_at(table: pa.Table, position: int, wanted: Layout) -> Row:
    """One row in stored form of a segment's table, whatever schema version it was written with."""
    names = table.schema.names
    values: list[Stored] = []
    for name, column, codec in zip(wanted.physical_names, wanted.columns, wanted.codecs, strict=True):
        if name not in names:
            values.append(column.fill)
            continue
        stored = table.column(name)
        if stored.type == codec.physical:
            values.append(codec.from_scalar(stored[position]))
        else:
            values.append(codec.from_arrow(pc.cast(stored.slice(position, 1), codec.physical))[0])
    return tuple(values)


def conform(batch: pa.Table, wanted: Layout, written_version: int) -> pa.Table:
    """A segment's table of an older schema version in the segment schema of `wanted`."""
    arrays: list[pa.ChunkedArray | pa.Array] = [batch.column(KEY), batch.column(SEQ), batch.column(FLAGS)]
    for column, codec in zip(wanted.columns, wanted.codecs, strict=True):
        name = physical_name(column.id)
        if name not in batch.schema.names:
            arrays.append(fill_array(column, codec, batch.num_rows))
            continue
        stored = batch.column(name)
        arrays.append(stored if stored.type == codec.physical else pc.cast(stored, codec.physical))
    return pa.Table.from_arrays(arrays, schema=wanted.schema)


def fill_array(column: ColumnDef, codec: ValueCodec, rows: int) -> pa.Array:
    """What rows written before `column` existed read in it."""
    if column.fill is None:
        return pa.nulls(rows, codec.physical)
    return codec.to_arrow([column.fill] * rows)


def encode_keys(prefix: bytes, layout: Layout, rows: Iterable[Sequence[Stored]]) -> list[bytes]:
    """Row keys of rows that share the scope prefix `prefix`."""
    pk_bytes = layout.pk_bytes
    return [prefix + pk_bytes(row) for row in rows]


def is_tombstone(flags: int) -> bool:
    """Whether a version is a deletion."""
    return bool(flags & RowFlags.DELETED)


def scope_of_key(key: bytes) -> str:
    """The user id inside a row key."""
    return keys.split_row_key(key)[0]
