"""Subscriptions to system.jobs and system.job_events: their rows are made when they are read, so changes are looked up.

Commits say which jobs changed; at most four times a second the newest rows of those are read and handed out. States in
between are not seen, and neither is a job that leaves the history.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import pyarrow as pa

from kalamdb.catalog import CatalogEntry
from kalamdb.clock import Clock, seq_to_ms
from kalamdb.live.changes import Shape, same_row
from kalamdb.live.groups import LiveTable, RowChange
from kalamdb.live.reading import Block, Wanted
from kalamdb.schema import ColumnDef, TableDef
from kalamdb.sql.query import Filters, SystemTables
from kalamdb.storage import Commit, StorageBackend, keys
from kalamdb.storage.jobs import JobRow
from kalamdb.tables.layout import Layout, Row
from kalamdb.types import SHARED_SCOPE, JobId, Seq, TableId, TableKind, TableUid

INTERVAL_S: Final = 0.25
JOBS: Final = TableId("system", "jobs")
JOB_EVENTS: Final = TableId("system", "job_events")
_UIDS: Final = {JOBS: TableUid(-1), JOB_EVENTS: TableUid(-2)}
_KEYS: Final = {JOBS: ("job_id",), JOB_EVENTS: ("job_id", "event_number")}
_MOMENTS: Final = {JOBS: "updated_at", JOB_EVENTS: "created_at"}
_KNOWN_ROWS_MAX: Final = 10_000
_PREFIX: Final = keys.scope_prefix(SHARED_SCOPE)


@dataclass(slots=True)
class _Feed:
    """What is known of one of the tables since somebody subscribed to it."""

    entry: CatalogEntry
    layout: Layout
    since_ms: int
    known: OrderedDict[Row, tuple[Seq, Row]] = field(default_factory=OrderedDict)
    """Rows as they were handed out, by key; those that changed last."""


class SystemFeed:
    """See the module. Used by the publisher, and by subscriptions that read."""

    def __init__(self, system: SystemTables, backend: StorageBackend, clock: Clock) -> None:
        self._system = system
        self._backend = backend
        self._clock = clock
        self._feeds: dict[TableId, _Feed] = {}
        self._dirty: set[JobId] = set()
        self._handed_out_s = 0.0

    def entry(self, table_id: TableId) -> CatalogEntry | None:
        """The table as a subscription needs it, None for one that cannot be followed."""
        found = self._system.find(table_id)
        if found is None or found.table_id not in _UIDS:
            return None
        feed = self._feeds.get(found.table_id)
        if feed is None:
            columns = tuple(
                ColumnDef(id=number, name=column.name, type=column.type, ordinal=number)
                for number, column in enumerate(found.columns, 1)
            )
            names = [column.name for column in columns]
            definition = TableDef(
                uid=_UIDS[found.table_id], namespace=found.table_id.namespace, name=found.table_id.name,
                kind=TableKind.SYSTEM, version=1, columns=columns,
                primary_key=tuple(names.index(name) + 1 for name in _KEYS[found.table_id]),
            )  # fmt: skip
            feed = _Feed(CatalogEntry(definition, 0), Layout(definition), self._clock.now_ms())
            self._feeds[found.table_id] = feed
        return feed.entry

    def layout(self, definition: TableDef) -> Layout:
        """The layout of a table that `entry` gave."""
        return self._feeds[definition.table_id].layout

    @staticmethod
    def holds(uid: TableUid) -> bool:
        """Whether a table is one of these."""
        return uid < 0

    @staticmethod
    def watched(uids: Iterable[TableUid]) -> bool:
        """Whether one of these tables is among those that somebody is subscribed to."""
        return any(uid in uids for uid in _UIDS.values())

    def forget(self, table_id: TableId) -> None:
        """Nobody is subscribed any more."""
        self._feeds.pop(table_id, None)

    # Publishing

    def note(self, jobs: Sequence[JobRow]) -> None:
        """These jobs changed."""
        self._dirty.update(job.job_id for job in jobs)

    def due_in_s(self) -> float | None:
        """Seconds until `changes` is to be asked, None while nothing changed."""
        if not self._dirty:
            return None
        return max(self._handed_out_s + INTERVAL_S - self._clock.monotonic_s(), 0.0)

    def begin(self) -> frozenset[JobId]:
        """The jobs that changed since the last time."""
        jobs, self._dirty = frozenset(self._dirty), set()
        self._handed_out_s = self._clock.monotonic_s()
        return jobs

    def changes(self, table: LiveTable, jobs: frozenset[JobId]) -> list[RowChange]:
        """What became of the rows of these jobs. Durable when it returns; blocks for the disk."""
        table_id = table.entry.definition.table_id
        feed = self._feeds.get(table_id)
        if feed is None:
            return []
        rows, seq = self._rows(feed, {"job_id": jobs})
        moment = feed.layout.index_of_name[_MOMENTS[table_id]]
        out = []
        for row in rows:
            key = tuple(row[at] for at in feed.layout.pk_indexes)
            former_seq, former = feed.known.pop(key, (0, None))
            changed = former is None or not same_row(row, former)
            feed.known[key] = (seq if changed else former_seq, row)
            moved_us: Any = row[moment]
            if changed and moved_us >= feed.since_ms * 1000:
                out.append(RowChange(_PREFIX, seq, row, former_seq, former))
        while len(feed.known) > _KNOWN_ROWS_MAX:
            feed.known.popitem(last=False)
        return out

    def _rows(self, feed: _Feed, filters: Filters) -> tuple[list[Row], Seq]:
        found: pa.Table = self._system.table(feed.entry.definition.table_id, filters=filters)
        seq = self._backend.head()
        self._backend.wait_durable(Commit(seq, (), ()))
        columns = [
            codec.from_arrow(found.column(at).cast(codec.physical)) for at, codec in enumerate(feed.layout.codecs)
        ]
        return list(zip(*columns, strict=True)), seq

    # Reading

    def read(self, entry: CatalogEntry, shape: Shape, wanted: Wanted) -> Block:
        """All rows that pass, oldest first, or those that changed after a `_seq`. Blocks for the disk."""
        feed = self._feeds[entry.definition.table_id]
        rows, seq = self._rows(feed, {})
        moment = feed.layout.index_of_name[_MOMENTS[entry.definition.table_id]]
        since_us = seq_to_ms(wanted.rows_after) * 1000 if wanted.rows_after else 0
        chosen: list[tuple[Any, Row]] = [(row[moment], row) for row in rows if shape.passes(row) is True]
        chosen = sorted((one for one in chosen if one[0] >= since_us), key=lambda one: one[0])
        if wanted.last_rows is not None:
            chosen = chosen[-wanted.last_rows :]
        changes = (shape.whole(wanted.type, seq, tuple(row[at] for at in shape.indexes)) for _, row in chosen)
        return Block(seq, changes, len(chosen), complete=True, last_row=seq)
