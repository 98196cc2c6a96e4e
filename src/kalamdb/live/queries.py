"""Live queries: who is subscribed, and the one thread that brings durable changes to them.

The observer of commits only notes what concerns a subscribed table. The publisher takes the notes in commit order,
waits until the commit is durable, looks up what is missing, and hands each sink all changes of the commit at once.
Notes beyond a bound of bytes are let go; the subscriptions then look up what they missed by `_seq`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import Any

import msgspec

from kalamdb.catalog import Catalog, CatalogEntry
from kalamdb.clock import Clock, ulid
from kalamdb.errors import Closed, Denied, InvalidRequest, KalamDbError, LimitExceeded, NotFound
from kalamdb.live.capture import Capture, Captured, LargeRows, Part
from kalamdb.live.changes import Change
from kalamdb.live.groups import GroupKey, LiveTable, RowChange, ScopeGroups
from kalamdb.live.reading import LiveReader
from kalamdb.live.statement import LiveSelect, parse_live
from kalamdb.live.subscription import LiveCode, LiveOptions, LiveRequest, LiveSink, LiveSubscription, State
from kalamdb.live.system_feed import JOB_EVENTS, JOBS, SystemFeed
from kalamdb.sql.caller import Caller, denied, may_read
from kalamdb.sql.query import SystemTables
from kalamdb.sql.tokens import SqlLimits
from kalamdb.storage import Batch, Commit, keys
from kalamdb.tables.layout import Layout
from kalamdb.tables.store import TableStore
from kalamdb.types import SHARED_SCOPE, Role, Seq, TableUid
from kalamdb.users import UserRecord, Users

_log = logging.getLogger("kalamdb.live")


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveLimits:
    """Bounds of live queries."""

    subscriptions_per_user_max: int = 10
    """Of callers who proved who they are; a program that embeds the database has no such bound."""
    queue_bytes_max: int = 32 << 20
    """Notes of commits that are not published yet."""
    kept_bytes_max: int = 1 << 20
    """Changes that one subscription keeps until it is live."""


class _Gap:
    """Notes were let go from here on."""


class _Stop:
    """The end."""


def code_of(error: KalamDbError) -> LiveCode:
    """The code under which the protocol names an error of `subscribe` or of an ended subscription."""
    match error:
        case Denied():
            return LiveCode.UNAUTHORIZED
        case NotFound():
            return LiveCode.NOT_FOUND
        case LimitExceeded():
            return LiveCode.LIMIT
        case InvalidRequest():
            return LiveCode.INVALID_SQL
        case Closed():
            return LiveCode.CLOSED
        case _:
            return LiveCode.FAILED


class LiveQueries:
    """See the module. Thread-safe. `lock` guards the subscriptions and is held while changes are handed out."""

    def __init__(
        self,
        store: TableStore,
        catalog: Catalog,
        users: Users,
        reader: LiveReader,
        clock: Clock,
        *,
        system: SystemTables,
        limits: LiveLimits,
        sql_limits: SqlLimits,
    ) -> None:
        self.reader = reader
        self.lock = threading.RLock()
        self.limits = limits
        self._store = store
        self._catalog = catalog
        self._users = users
        self.clock = clock
        self._system = system
        self.feed = SystemFeed(system, store.backend, clock)
        self._sql_limits = sql_limits
        self._capture = Capture(store)
        self._tables: dict[TableUid, LiveTable] = {}
        self._subscriptions: dict[str, LiveSubscription] = {}
        self._watching = False
        self._queue: SimpleQueue[Captured | _Gap | _Stop] = SimpleQueue()
        self._noted_bytes = self._done_bytes = 0
        """Of all notes, written under the commit lock; of those that are through, written by the publisher."""
        self._gap = False
        """Notes of rows are being let go; until the publisher meets the gap."""
        self._published: Seq = 0
        """What lies behind was handed out: the last commit, or row of a large one."""
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._peak = 0
        self._delivered = 0
        store.backend.observe(self._on_commit)

    # Noting commits

    def _on_commit(self, batch: Batch, commit: Commit) -> None:
        if not self._watching or not self._capture.may_concern(batch, commit, self._tables.keys()):
            return
        room = not self._gap and self._noted_bytes - self._done_bytes <= self.limits.queue_bytes_max
        noted = self._capture.note(batch, commit, self._tables.keys(), rows=room)
        if not room and not self._gap:
            self._gap = True
            self._queue.put(_Gap())
        if not noted.is_empty:
            self._noted_bytes += noted.size
            self._queue.put(noted)

    # Subscribing

    def subscribe(self, request: LiveRequest, caller: Caller, sink: LiveSink) -> LiveSubscription:
        """Begin a subscription; its batches are to be read, then `go_live` to be called.

        Raises InvalidRequest, NotFound, Denied, LimitExceeded, Closed: see `code_of`.
        """
        if request.options is not None:
            request.options.check()
        select = parse_live(request.sql, caller, self._sql_limits)
        entry = self._entry(select, caller)
        with self.lock:
            self._check_room(request, caller)
            self._start()
            found = self._add(select, entry, request, caller, sink)
        try:
            self._check_still(found)
            self._begin(found)
        except BaseException:
            found.close()
            raise
        return found

    def check(self, sql: str, caller: Caller) -> CatalogEntry:
        """The table of a SELECT that the caller may subscribe to. Raises what `subscribe` raises."""
        select = parse_live(sql, caller, self._sql_limits)
        entry = self._entry(select, caller)
        layout = self._layout(entry)
        select.filter(layout)
        select.column_ids(layout)
        return entry

    def _entry(self, select: LiveSelect, caller: Caller) -> CatalogEntry:
        if self._system.find(select.table_id) is not None:
            return self._system_entry(select, caller)
        if self._catalog.view(select.table_id) is not None:
            raise InvalidRequest(f"'{select.table_id}' is a view; subscribe to its table")
        entry = self._catalog.require(select.table_id)
        if not may_read(caller, entry.definition):
            raise denied(caller, "read", entry.definition)
        return entry

    def _system_entry(self, select: LiveSelect, caller: Caller) -> CatalogEntry:
        if not caller.has(Role.DBA):
            raise Denied(f"Admin privileges required to subscribe to '{select.table_id}'; the caller has {caller.role}")
        with self.lock:
            entry = self.feed.entry(select.table_id)
        if entry is None:
            raise Denied(f"'{select.table_id}' cannot be subscribed; {JOBS} and {JOB_EVENTS} can")
        return entry

    def _layout(self, entry: CatalogEntry) -> Layout:
        definition = entry.definition
        return self.feed.layout(definition) if SystemFeed.holds(definition.uid) else self._store.layout(definition)

    def _check_room(self, request: LiveRequest, caller: Caller) -> None:
        if self._stopped:
            raise Closed("the database is closed; open it again")
        if request.bound:
            limit = self.limits.subscriptions_per_user_max
            same_user = (one for one in self._subscriptions.values() if one.caller.user == caller.user)
            used = sum(one.request.bound for one in same_user)
            if used >= limit:
                raise LimitExceeded(
                    f"user '{caller.user}' has {used} subscriptions, at most {limit} are allowed "
                    "(rate_limit.max_subscriptions_per_user)"
                )

    def _add(
        self, select: LiveSelect, entry: CatalogEntry, request: LiveRequest, caller: Caller, sink: LiveSink
    ) -> LiveSubscription:
        uid = entry.definition.uid
        table = self._tables.get(uid)
        if table is None:
            table = LiveTable(entry, self._layout(entry))
        elif table.entry.definition.version < entry.definition.version:
            self._bind(table, entry)
        key = GroupKey(select.filter(table.layout), select.column_ids(table.layout))
        subscription_id = request.subscription_id or ulid(self.clock)
        live_id = f"{caller.user}-{request.connection_id or 'local'}-{subscription_id}"
        if live_id in self._subscriptions:
            raise InvalidRequest(f"there is a subscription '{live_id}' already; close it first")
        is_system = SystemFeed.holds(uid)
        prefix = keys.scope_prefix(SHARED_SCOPE if is_system else caller.scope(entry.definition))
        group = table.scopes.setdefault(prefix, ScopeGroups()).group(key, table.layout)
        own = replace(caller, params=None, deadline=lambda: False, cancelled=lambda: self._stopped)
        found = LiveSubscription(
            self, replace(request, subscription_id=subscription_id), own, sink, table, group, prefix, live_id,
            self.clock.now_ms(), rows_after=0, deletes_after=None,
        )  # fmt: skip
        group.subscriptions.append(found)
        self._subscriptions[live_id] = found
        self._peak = max(self._peak, len(self._subscriptions))
        self._tables[uid] = table
        self._watching = True
        # From the commit after this one on all that concerns the table is noted.
        found.rows_after = self._store.backend.keep_former(self._tables.keys())
        found.state = State.KEEPING
        return found

    def _check_still(self, found: LiveSubscription) -> None:
        """What was changed before the commits were noted would go unnoticed."""
        definition = found.table.entry.definition
        if not SystemFeed.holds(definition.uid):
            entry = self._catalog.by_uid(definition.uid)
            if entry is None:
                raise NotFound(f"table '{definition.table_id}' was dropped")
            if not may_read(found.caller, entry.definition):
                raise denied(found.caller, "read", entry.definition)
        self._users.refuse_gone(found.caller.user)
        if found.request.bound:
            user = self._users.find(found.caller.user)
            found.credentials = None if user is None else _credentials(user)

    def _begin(self, found: LiveSubscription) -> None:
        options = found.request.options
        if options is None:
            return
        found.rows_after = 0
        uid = found.table.entry.definition.uid
        if options.from_seq is not None and (SystemFeed.holds(uid) or self.reader.covers(uid, options.from_seq)):
            found.resumed = True
            found.rows_after = found.deletes_after = options.from_seq
        with self.lock:
            if found.state is State.KEEPING:
                found.state, found.kept = State.READING, []

    # Ending

    def remove(self, found: LiveSubscription) -> bool:
        """Forget a subscription; False when it had ended before."""
        with self.lock:
            if found.state is State.ENDED:
                return False
            found.state, found.kept = State.ENDED, []
            del self._subscriptions[found.live_id]
            group = found.group
            group.subscriptions.remove(found)
            if not group.subscriptions:
                scope = found.table.scopes[found.prefix]
                scope.drop(group)
                if not scope.groups:
                    del found.table.scopes[found.prefix]
                if not found.table.scopes:
                    del self._tables[found.table.entry.definition.uid]
                    self.feed.forget(found.table.entry.definition.table_id)
                    self._store.backend.keep_former(self._tables.keys())
            self._watching = bool(self._subscriptions)
            return True

    def end(self, found: LiveSubscription, code: LiveCode, message: str) -> None:
        """End a subscription and tell its sink why."""
        with self.lock:
            if self.remove(found):
                found.sink.ended(found, code, message)

    def kill(self, live_id: str, by: str) -> None:
        """End a subscription by its id. Raises NotFound."""
        with self.lock:
            found = self._subscriptions.get(live_id)
            if found is None:
                raise NotFound(f"there is no live query '{live_id}'; see system.live")
            self.end(found, LiveCode.CLOSED, f"live query '{live_id}' was killed by '{by}'")

    def stop(self) -> None:
        """End all subscriptions and the threads. Idempotent."""
        with self.lock:
            if self._stopped:
                return
            self._stopped = True
            for one in list(self._subscriptions.values()):
                self.end(one, LiveCode.CLOSED, "the database is closed")
            thread = self._thread
        self._queue.put(_Stop())
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    # Publishing

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kalamdb-live", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            noted: Captured | _Gap | _Stop | None = None
            with suppress(Empty):
                noted = self._queue.get(timeout=self.feed.due_in_s())
            if self.feed.due_in_s() == 0:
                self._publish_system()
            match noted:
                case None:
                    pass
                case _Stop():
                    return
                case _Gap():
                    self._meet_gap()
                case Captured():
                    with noted.held:
                        self._publish(noted)
                    self._done_bytes += noted.size

    def _meet_gap(self) -> None:
        with self.lock:
            # Whatever is noted from here on comes after what a look from here on finds.
            self._gap = False
            for one in list(self._subscriptions.values()):
                if one.state is State.LIVE:
                    self.let_behind(one)
                elif one.state is State.KEEPING:
                    one.state, one.kept, one.kept_bytes = State.READING, [], 0

    def _publish(self, noted: Captured) -> None:
        try:
            self._store.backend.wait_durable(noted.commit, names_files=noted.names_files)
        except KalamDbError as exc:
            # Whether the commit is durable is not known, so nothing of it may be sent.
            self._end_all(self._all(), code_of(exc), str(exc))
            return
        self.feed.note(noted.jobs)
        for uid in noted.tables:
            self._follow_table(uid, renewed=noted.renewed)
        for user in noted.users:
            self._follow_user(msgspec.msgpack.decode(user, type=UserRecord))
        outgoing = _Outgoing(self.limits.kept_bytes_max, self.clock.now_ms)
        for part in noted.parts:
            try:
                self._publish_part(part, outgoing)
            except Exception as exc:
                if self._catalog.by_uid(part.uid) is None:
                    # Dropped meanwhile: the note that says so follows.
                    continue
                _log.exception("changes of table %s cannot be published", part.uid)
                with self.lock:
                    table = self._tables.get(part.uid)
                    reason = str(exc) if isinstance(exc, KalamDbError) else "an internal error; see the log"
                    self._end_all(table.subscriptions() if table is not None else (), LiveCode.FAILED, reason)
        with self.lock:
            self._published = noted.commit.seq
            outgoing.send()
            self._delivered += outgoing.delivered

    def _publish_part(self, part: Part, outgoing: _Outgoing) -> None:
        table = self._tables.get(part.uid)
        if table is None:
            return
        layout = table.layout
        for rows in self._capture.rows(part, layout, table.scopes.keys()):
            if not rows:
                continue
            with self.lock:
                if table.layout is not layout:
                    rows = self._again(part, table, rows)
                for group, change in table.changes(rows):
                    for one in group.subscriptions:
                        outgoing.add(one, change)
                if isinstance(part, LargeRows):
                    # All of it at once might take any amount of memory.
                    self._published = rows[-1].seq
                    outgoing.send()

    def _publish_system(self) -> None:
        jobs = self.feed.begin()
        outgoing = _Outgoing(self.limits.kept_bytes_max, self.clock.now_ms)
        for table in [table for uid, table in list(self._tables.items()) if SystemFeed.holds(uid)]:
            try:
                rows = self.feed.changes(table, jobs)
            except Exception as exc:
                _log.exception("changes of jobs cannot be published")
                self._end_all(table.subscriptions(), LiveCode.FAILED, str(exc))
                continue
            with self.lock:
                for group, change in table.changes(rows):
                    for one in group.subscriptions:
                        outgoing.add(one, change)
        with self.lock:
            outgoing.send()
            self._delivered += outgoing.delivered

    def _again(self, part: Part, table: LiveTable, rows: list[RowChange]) -> list[RowChange]:
        """The same rows in the schema version that the table has got meanwhile."""
        wanted = {row.seq for row in rows}
        found = self._capture.rows(part, table.layout, table.scopes.keys())
        return [row for chunk in found for row in chunk if row.seq in wanted]

    def let_behind(self, one: LiveSubscription) -> None:
        """Hand nothing out to a subscription until it has looked up what comes after what it got."""
        with self.lock:
            if one.state is State.LIVE:
                one.rows_after = one.deletes_after = max(self._published, one.live_from)
                one.state = State.READING
                one.sink.behind(one)

    # Following definitions and rights

    def _follow_table(self, uid: TableUid, *, renewed: bool) -> None:
        with self.lock:
            table = self._tables.get(uid)
            if table is None:
                return
            entry = self._catalog.by_uid(uid)
            table_id = table.entry.definition.table_id
            if entry is None:
                how = "emptied by TRUNCATE; subscribe again" if renewed else "dropped"
                self._end_all(table.subscriptions(), LiveCode.NOT_FOUND, f"table '{table_id}' was {how}")
                return
            self._bind(table, entry)
            for one in table.subscriptions():
                if not may_read(one.caller, entry.definition):
                    self.end(one, LiveCode.UNAUTHORIZED, str(denied(one.caller, "read", entry.definition)))

    def _bind(self, table: LiveTable, entry: CatalogEntry) -> None:
        for one, reason in table.bind(entry, self._store.layout(entry.definition)):
            self.end(one, LiveCode.INVALID_SQL, f"table '{entry.definition.table_id}' was altered: {reason}")

    def _follow_user(self, user: UserRecord) -> None:
        for one in self._all():
            if one.caller.user != user.user_id:
                continue
            if user.deleted_at is not None:
                self.end(one, LiveCode.UNAUTHORIZED, f"user '{user.user_id}' was dropped")
            elif one.request.bound and one.credentials != _credentials(user):
                self.end(one, LiveCode.UNAUTHORIZED, f"the role or password of user '{user.user_id}' was changed")

    def _all(self) -> list[LiveSubscription]:
        with self.lock:
            return list(self._subscriptions.values())

    def _end_all(self, found: Iterable[LiveSubscription], code: LiveCode, message: str) -> None:
        for one in found:
            self.end(one, code, message)

    # What there is

    def figures(self) -> dict[str, int]:
        """For system.stats."""
        return {
            "active_subscriptions": len(self._subscriptions),
            "active_subscriptions_peak": self._peak,
            "total_live_queries": len(self._subscriptions),
            "live_changes_delivered": self._delivered,
            "live_queue_bytes": self._noted_bytes - self._done_bytes,
        }

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """Rows of system.live."""
        for one in self._all():
            table_id = one.table.entry.definition.table_id
            options = one.request.options
            yield (
                one.live_id, one.request.connection_id or "local", one.request.subscription_id, table_id.namespace,
                table_id.name, one.caller.user, one.request.sql, None if options is None else options.json(),
                one.state.value, one.created_ms, one.last_update_ms or one.created_ms, one.changes, 0,
                one.last_ping_ms or one.created_ms,
            )  # fmt: skip


class _Outgoing:
    """Changes of one commit, by sink."""

    def __init__(self, kept_bytes_max: int, now_ms: Callable[[], int]) -> None:
        self._kept_bytes_max = kept_bytes_max
        self._now_ms = now_ms
        self.delivered = 0
        self._by_sink: dict[int, tuple[LiveSink, list[tuple[LiveSubscription, Change]]]] = {}

    def add(self, one: LiveSubscription, change: Change) -> None:
        """Take a change for a subscription, if it is to get it."""
        if one.state is State.LIVE:
            if change.seq > one.live_from:
                known = self._by_sink.get(id(one.sink))
                if known is None:
                    known = self._by_sink[id(one.sink)] = (one.sink, [])
                known[1].append((one, change))
        elif one.state is State.KEEPING:
            one.keep(change, self._kept_bytes_max)

    def send(self) -> None:
        """Hand out what was taken."""
        if not self._by_sink:
            return
        now_ms = self._now_ms()
        outgoing, self._by_sink = self._by_sink, {}
        for sink, changes in outgoing.values():
            # A sink may have closed a subscription since.
            live = [(one, change) for one, change in changes if one.state is State.LIVE]
            for one, _ in live:
                one.changes += 1
                one.last_update_ms = now_ms
            self.delivered += len(live)
            if live:
                sink.deliver(live)


def _credentials(user: UserRecord) -> tuple[Any, ...]:
    return user.role, user.password_hash, user.auth_type


__all__ = ["LiveLimits", "LiveOptions", "LiveQueries", "code_of"]
