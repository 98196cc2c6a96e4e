"""The work that built-in jobs do on tables, in one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kalamdb.schema import FlushPolicy
from kalamdb.tables.compact import CompactReport, compact_table, needs_compaction
from kalamdb.tables.erase import EraseReport, erase_users
from kalamdb.tables.flush import FlushReport, JobHandle, Message, flush_table
from kalamdb.tables.retention import EvictionReport, RetentionReport, evict_streams, expired_buckets, retain_tables
from kalamdb.tables.store import TableStore
from kalamdb.tables.sweep import CleanupReport, drop_leftovers, dropped_tables, sweep
from kalamdb.types import TableId, TableKind, TableUid
from kalamdb.users import Users

_DAY_MS = 86_400_000


@dataclass(frozen=True, slots=True)
class PendingTable:
    """A table with hot rows, for the flush scheduler."""

    table_uid: int
    table_id: str
    policy: FlushPolicy | None
    rows: int
    bytes: int
    oldest_ms: int
    """When the oldest hot row was written, milliseconds since 1970."""


class Maintenance:
    """What executors and schedulers call. Thread-safe."""

    def __init__(self, store: TableStore, users: Users, *, deletion_grace_period_days: float) -> None:
        self._store = store
        self._users = users
        self.scrub_log: Callable[[str], None] = lambda name: None
        """Takes a name out of the log of jobs; set where there is one."""
        self.remove_samples: Callable[[], None] = lambda: None
        """Deletes figures that were kept long enough; set where there are some."""
        self._grace_ms = int(deletion_grace_period_days * _DAY_MS)

    def flush(self, table_uid: int, job: JobHandle, message: Message) -> FlushReport | None:
        """See `flush_table`."""
        return flush_table(self._store, TableUid(table_uid), job, message)

    def compact(self, table_uid: int, job: JobHandle, message: Message, *, full: bool = True) -> CompactReport | None:
        """See `compact_table`."""
        return compact_table(self._store, TableUid(table_uid), job, message, full=full)

    def drop_leftovers(self, table_uid: int, job: JobHandle, message: Message) -> CleanupReport | None:
        """See `sweep.drop_leftovers`."""
        return drop_leftovers(self._store, TableUid(table_uid), job, message)

    def sweep(self, table_uid: int | None, job: JobHandle, message: Message) -> CleanupReport:
        """See `sweep.sweep`."""
        return sweep(self._store, _uid(table_uid), job, message)

    def retain(self, table_uid: int | None, job: JobHandle, *, retention_hours: float | None) -> RetentionReport:
        """See `retain_tables`; of all tables also samples of figures that are too old."""
        if table_uid is None:
            self.remove_samples()
        return retain_tables(self._store, _uid(table_uid), job, retention_hours=retention_hours)

    def evict_streams(self, table_uid: int | None, job: JobHandle, message: Message) -> EvictionReport:
        """See `retention.evict_streams`."""
        return evict_streams(self._store, _uid(table_uid), job, message)

    def erase_users(
        self, user_id: str | None, job: JobHandle, message: Message, *, is_repeated: bool = False
    ) -> EraseReport | None:
        """Erase one user, or all that were dropped longer than the grace time ago; None when there is none.

        A repetition finishes also what an attempt before it began: the last user may be forgotten already.
        """
        user_ids = [user_id] if user_id is not None else self._due_users()
        if not user_ids and not is_repeated:
            return None
        return erase_users(self._store, self._users, user_ids, job, message, self.scrub_log)

    def has_users_to_erase(self) -> bool:
        """Whether a user was dropped longer than the grace time ago."""
        return bool(self._due_users())

    def _due_users(self) -> list[str]:
        return self._users.dropped_before(self._store.backend.now_ms() - self._grace_ms)

    def has_expired_streams(self) -> bool:
        """Whether a stream has a bucket whose rows have all expired."""
        streams = (one for one in self._store.catalog.tables() if one.definition.kind is TableKind.STREAM)
        return any(expired_buckets(self._store, entry) for entry in streams)

    def resolve(self, table_id: str) -> int | None:
        """The uid of the live table "namespace.table"; None when there is none."""
        try:
            entry = self._store.catalog.table(TableId.parse(table_id))
        except ValueError:
            return None
        return None if entry is None else entry.definition.uid

    def exists(self, table_uid: int) -> bool:
        """Whether the table is live."""
        return self._store.catalog.by_uid(TableUid(table_uid)) is not None

    def pending(self) -> list[PendingTable]:
        """Tables that a flush would find rows in, those with the most bytes first."""
        found = []
        for entry in self._store.catalog.tables():
            definition = entry.definition
            if definition.kind is TableKind.STREAM or not self._store.has_pending(definition.uid):
                continue
            with self._store.hot.lock:
                figures = self._store.figures(definition.uid)
                rows, bytes_, oldest_ms = figures.rows, figures.bytes_, figures.oldest_ms
            policy = definition.options.flush_policy
            found.append(PendingTable(definition.uid, str(definition.table_id), policy, rows, bytes_, oldest_ms))
        return sorted(found, key=lambda pending: -pending.bytes)

    def crowded(self) -> list[tuple[int, str]]:
        """(uid, namespace.table) of tables whose level 0 has too many segments."""
        return [
            (entry.definition.uid, str(entry.definition.table_id))
            for entry in self._store.catalog.tables()
            if entry.definition.kind is not TableKind.STREAM and needs_compaction(self._store, entry.definition.uid)
        ]

    def may_flush(self, table_uid: int) -> bool:
        """Whether level 0 has room for one more segment: at most twice compaction.level0_segments_max."""
        state = self._store.state(TableUid(table_uid))
        level0 = sum(segment.record.level == 0 for segment in state.segments)
        return level0 < 2 * self._store.limits.level0_segments_max

    def dropped(self) -> list[int]:
        """Uids of dropped tables whose cleanup is not done."""
        return [int(uid) for uid in dropped_tables(self._store)]

    def hot_pressure(self) -> float:
        """Hot bytes as a share of hot.bytes_max."""
        return self._store.hot_bytes() / max(self._store.limits.hot_bytes_max, 1)


def _uid(table_uid: int | None) -> TableUid | None:
    return None if table_uid is None else TableUid(table_uid)
