"""Who is subscribed to what: tables, scopes, groups of equal subscriptions, and which of them a row concerns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from kalamdb.catalog import CatalogEntry
from kalamdb.errors import InvalidRequest, KalamDbError
from kalamdb.live.changes import Change, Shape
from kalamdb.live.filters import Filter
from kalamdb.tables.codec import Stored
from kalamdb.tables.layout import Layout, Row
from kalamdb.types import Seq

if TYPE_CHECKING:
    from kalamdb.live.subscription import LiveSubscription


class RowChange(NamedTuple):
    """One row that a commit changed; `new` is None for a deletion, `former` when there was no live row."""

    prefix: bytes
    """Whose row: the first bytes of its key."""
    seq: Seq
    new: Row | None
    former_seq: Seq
    former: Row | None


class GroupKey(NamedTuple):
    """What equal subscriptions of one scope of a table have in common."""

    filter: Filter
    columns: tuple[int, ...] | None


class Group:
    """Subscriptions that ask the same; a change is tested once for all of them."""

    __slots__ = ("key", "shape", "subscriptions")

    def __init__(self, key: GroupKey, layout: Layout) -> None:
        self.key = key
        self.shape = Shape(layout, key.columns, key.filter)
        self.subscriptions: list[LiveSubscription] = []

    def bind(self, layout: Layout) -> None:
        """Go on with another schema version. Raises NotFound, InvalidRequest when the filter does not fit it."""
        shape = Shape(layout, self.key.columns, self.key.filter)
        if not shape.indexes:
            raise InvalidRequest(f"no column of the subscription is left in '{layout.definition.table_id}'")
        self.shape = shape

    def change_of(self, row: RowChange) -> Change:
        """A change that the filter lets pass, as this group sees it: the same for all groups with its columns."""
        shape = self.shape
        if row.new is None:
            assert row.former is not None
            return shape.delete(row.seq, row.former)
        if row.former is None:
            return shape.insert(row.seq, row.new)
        return shape.update(row.seq, row.new, row.former_seq, row.former)


@dataclass(slots=True)
class ScopeGroups:
    """The groups of one scope of a table, by the value that they want where they want one."""

    groups: dict[GroupKey, Group] = field(default_factory=dict)
    _by_value: dict[int, dict[Stored, list[Group]]] | None = None
    _others: list[Group] = field(default_factory=list)

    def group(self, key: GroupKey, layout: Layout) -> Group:
        """The group of that key, made when there is none."""
        found = self.groups.get(key)
        if found is None:
            found = self.groups[key] = Group(key, layout)
            self._by_value = None
        return found

    def drop(self, group: Group) -> None:
        """Forget a group."""
        self.groups.pop(group.key, None)
        self._by_value = None

    def concerned(self, row: Row) -> Iterator[Group]:
        """The groups whose filter may let the row pass."""
        if self._by_value is None:
            self._by_value = self._indexed()
        yield from self._others
        for at, groups in self._by_value.items():
            yield from groups.get(row[at], ())

    def _indexed(self) -> dict[int, dict[Stored, list[Group]]]:
        by_value: dict[int, dict[Stored, list[Group]]] = {}
        self._others = []
        for group in self.groups.values():
            wanted = group.shape.equality
            if wanted is None:
                self._others.append(group)
            else:
                by_value.setdefault(wanted[0], {}).setdefault(wanted[1], []).append(group)
        return by_value


class LiveTable:
    """A table that somebody is subscribed to."""

    def __init__(self, entry: CatalogEntry, layout: Layout) -> None:
        self.entry = entry
        self.layout = layout
        self.scopes: dict[bytes, ScopeGroups] = {}

    def subscriptions(self) -> list[LiveSubscription]:
        """All subscriptions of the table."""
        return [one for scope in self.scopes.values() for group in scope.groups.values() for one in group.subscriptions]

    def bind(self, entry: CatalogEntry, layout: Layout) -> list[tuple[LiveSubscription, KalamDbError]]:
        """Go on with another schema version; the subscriptions that cannot, and why."""
        failed: list[tuple[LiveSubscription, KalamDbError]] = []
        self.entry, self.layout = entry, layout
        for scope in self.scopes.values():
            for group in list(scope.groups.values()):
                try:
                    group.bind(layout)
                except KalamDbError as exc:
                    failed += [(one, exc) for one in group.subscriptions]
            scope._by_value = None
        return failed

    def changes(self, rows: Sequence[RowChange]) -> Iterator[tuple[Group, Change]]:
        """What each concerned group sees of the rows, row after row."""
        for row in rows:
            scope = self.scopes.get(row.prefix)
            tested = row.new if row.new is not None else row.former
            if scope is None or tested is None:
                continue
            made: dict[tuple[int, ...] | None, Change] = {}
            for group in scope.concerned(tested):
                if group.shape.passes(tested) is True:
                    change = made.get(group.key.columns)
                    if change is None:
                        change = made[group.key.columns] = group.change_of(row)
                    yield group, change
