"""What a subscriber gets of a change, made once for all subscriptions that ask the same."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from kalamdb.live.filters import Filter, Test, columns_of, compile_filter, equality
from kalamdb.schema import DataType, TypeName
from kalamdb.tables.codec import Stored, ValueCodec, codec_of
from kalamdb.tables.layout import Layout, Row
from kalamdb.types import ChangeType, Seq

T = TypeVar("T")

SEQ_NAME, DELETED_NAME = "_seq", "_deleted"
_CHANGE_BYTES = 300
_VALUE_BYTES = 40


@dataclass(frozen=True, slots=True)
class Field:
    """One named value of a row that is sent."""

    name: str
    type: DataType
    codec: ValueCodec


@dataclass(frozen=True, slots=True)
class Values:
    """The sent part of a row: stored values by field."""

    fields: tuple[Field, ...]
    stored: tuple[Stored, ...]

    def dict(self) -> dict[str, Any]:
        """Python values by name."""
        return {field.name: field.codec.load(value) for field, value in zip(self.fields, self.stored, strict=True)}


class Change:
    """One change of one row, as all subscriptions of a group see it. Immutable but for its cached encodings."""

    __slots__ = ("_encoded", "former", "new", "seq", "size", "type")

    def __init__(self, type_: ChangeType, seq: Seq, new: Values | None, former: Values | None) -> None:
        self.type = type_
        self.seq = seq
        """`_seq` of the version that the change made."""
        self.new = new
        self.former = former
        self.size = _CHANGE_BYTES + sum(_size(values) for values in (new, former) if values is not None)
        """Bytes that it takes in memory, about."""
        self._encoded: dict[Hashable, Any] | None = None

    @property
    def row(self) -> dict[str, Any] | None:
        """The row: whole for snapshot and insert; for update the key, `_seq` and what is not NULL; None for delete."""
        return None if self.new is None else self.new.dict()

    @property
    def old_values(self) -> dict[str, Any] | None:
        """For update the key, the former `_seq` and the former values that changed; for delete the former row with
        `_seq` of the deletion."""
        return None if self.former is None else self.former.dict()

    def encoded(self, key: Hashable, encoder: Callable[[Change], T]) -> T:
        """What `encoder` makes of the change, made once per `key`. For calls from any threads."""
        known = self._encoded
        if known is None:
            known = self._encoded = {}
        found = known.get(key)
        if found is None:
            found = known[key] = encoder(self)
        return cast(T, found)

    def __repr__(self) -> str:
        return f"Change({self.type}, {self.seq}, {self.row}, {self.old_values})"


def _size(values: Values) -> int:
    return sum(
        _VALUE_BYTES + (len(value) if isinstance(value, (str, bytes)) else 0) for value in values.stored
    )  # fmt: skip


_SEQ_TYPE, _DELETED_TYPE = DataType(TypeName.BIGINT), DataType(TypeName.BOOLEAN)
_SEQ_FIELD = Field(SEQ_NAME, _SEQ_TYPE, codec_of(_SEQ_TYPE))
_DELETED_FIELD = Field(DELETED_NAME, _DELETED_TYPE, codec_of(_DELETED_TYPE))


class Shape:
    """A projection and a filter over one schema version: from rows to changes."""

    def __init__(self, layout: Layout, columns: Sequence[int] | None, filter_: Filter) -> None:
        self.layout = layout
        self.passes: Test = compile_filter(filter_, layout)
        self.filter = filter_
        self.equality = equality(filter_, layout)
        chosen = [column.id for column in layout.columns] if columns is None else columns
        # A column that was dropped since is not sent any more.
        self.indexes = tuple(layout.index_of_id[one] for one in chosen if one in layout.index_of_id)
        self.key_only = columns_of(filter_) <= set(layout.definition.primary_key)
        """Whether a row's key decides about the filter."""
        fields = [_field(layout, at) for at in self.indexes]
        self._whole = (*fields, _SEQ_FIELD, *([_DELETED_FIELD] if columns is None else []))
        self._deleted = (*fields, _SEQ_FIELD, _DELETED_FIELD)
        self._key_fields = tuple(_field(layout, at) for at in layout.pk_indexes)
        self._rest = tuple(at for at in self.indexes if at not in layout.pk_indexes)
        self._field_at = {at: _field(layout, at) for at in self._rest}

    @property
    def fields(self) -> tuple[Field, ...]:
        """What an inserted row is sent with."""
        return self._whole

    def whole(self, type_: ChangeType, seq: Seq, chosen: tuple[Stored, ...]) -> Change:
        """An insert, or a row of the snapshot, from the values of its chosen columns."""
        stored = (*chosen, seq, False)[: len(self._whole)]
        return Change(type_, seq, Values(self._whole, stored), None)

    def insert(self, seq: Seq, row: Row) -> Change:
        """A new row."""
        return self.whole(ChangeType.INSERT, seq, tuple(row[at] for at in self.indexes))

    def update(self, seq: Seq, row: Row, former_seq: Seq, former: Row) -> Change:
        """A row that replaced another."""
        key = tuple(row[at] for at in self.layout.pk_indexes)
        kept = [at for at in self._rest if row[at] is not None]
        changed = [at for at in self._rest if not same(row[at], former[at])]
        return Change(
            ChangeType.UPDATE,
            seq,
            self._partial(key, seq, [(at, row[at]) for at in kept]),
            self._partial(key, former_seq, [(at, former[at]) for at in changed]),
        )

    def _partial(self, key: tuple[Stored, ...], seq: Seq, rest: Sequence[tuple[int, Stored]]) -> Values:
        fields = (*self._key_fields, _SEQ_FIELD, *(self._field_at[at] for at, _ in rest))
        return Values(fields, (*key, seq, *(value for _, value in rest)))

    def delete(self, seq: Seq, former: Row) -> Change:
        """A row that was deleted."""
        stored = (*(former[at] for at in self.indexes), seq, True)
        return Change(ChangeType.DELETE, seq, None, Values(self._deleted, stored))

    def gone(self, seq: Seq, key: Sequence[Stored]) -> Change:
        """A deletion of which only the primary key is left."""
        return Change(
            ChangeType.DELETE, seq, None, Values((*self._key_fields, _SEQ_FIELD, _DELETED_FIELD), (*key, seq, True))
        )


def _field(layout: Layout, at: int) -> Field:
    return Field(layout.columns[at].name, layout.columns[at].type, layout.codecs[at])


def same(one: Stored, other: Stored) -> bool:
    """Whether two stored values are the same; NaN is itself."""
    return one == other or (one != one and other != other)


def same_row(one: Row, other: Row) -> bool:
    """Whether nothing changed from one row to the other."""
    return one == other or all(map(same, one, other))
