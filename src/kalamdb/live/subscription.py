"""One subscription: what it asked for, how far it is, and what it waits for."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

from kalamdb.errors import Closed, InvalidRequest
from kalamdb.live.changes import Change, Field
from kalamdb.live.groups import Group, LiveTable
from kalamdb.live.reading import Block, Wanted
from kalamdb.sql.caller import Caller, Params
from kalamdb.types import ChangeType, Seq

if TYPE_CHECKING:
    from kalamdb.live.queries import LiveQueries

BATCH_ROWS = 1000
BATCH_BYTES_MAX = 512 << 10


class LiveCode(StrEnum):
    """Why a subscription was refused or ended."""

    UNAUTHORIZED = "UNAUTHORIZED"
    NOT_FOUND = "NOT_FOUND"
    INVALID_SQL = "INVALID_SQL"
    UNSUPPORTED = "UNSUPPORTED"
    LIMIT = "SUBSCRIPTION_LIMIT_EXCEEDED"
    FAILED = "SUBSCRIPTION_FAILED"
    CLOSED = "CLOSED"
    """By KILL LIVE QUERY, or with the database."""


@dataclass(frozen=True, slots=True)
class LiveOptions:
    """How a subscription begins: after a `_seq`, with the newest rows, or with all rows, in this precedence."""

    from_seq: Seq | None = None
    last_rows: int | None = None
    batch_size: int = BATCH_ROWS

    def check(self) -> None:
        """Raise InvalidRequest for numbers that have no meaning."""
        for name, value, low in (
            ("from", self.from_seq, 0), ("last_rows", self.last_rows, 1), ("batch_size", self.batch_size, 1),
        ):  # fmt: skip
            if value is not None and (type(value) is not int or value < low):
                raise InvalidRequest(f"{name} is {value!r}; a whole number from {low} is expected")

    def json(self) -> dict[str, int]:
        """As system.live shows them."""
        named = {"from": self.from_seq, "last_rows": self.last_rows, "batch_size": self.batch_size}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True, slots=True)
class LiveRequest:
    """What a subscriber asks for. `options` None: nothing but later changes."""

    sql: str
    options: LiveOptions | None = None
    params: Params = None
    subscription_id: str = ""
    connection_id: str = ""
    bound: bool = False
    """The caller proved who it is: a change of its password or role ends the subscription, and its number counts."""


class LiveSink(Protocol):
    """Where changes go. Called from the publisher's thread under its lock: must not block."""

    def deliver(self, changes: Sequence[tuple[LiveSubscription, Change]]) -> None:
        """Take over all changes of one commit for this sink, in order."""
        ...

    def behind(self, subscription: LiveSubscription) -> None:
        """The subscription has fallen behind: nothing comes until its batches were read and it went live again, or
        ever, when the sink leaves that to another subscription."""
        ...

    def ended(self, subscription: LiveSubscription, code: LiveCode, message: str) -> None:
        """Nothing comes any more."""
        ...


@dataclass(frozen=True, slots=True)
class Batch:
    """One page of what is stored: rows, or what was deleted, or, as the last one, neither.

    Deletions come after all rows, so whoever sends them on sends them before the end of the last batch: until then
    a receiver resumes where it did before.
    """

    number: int
    rows: list[Change]
    deletes: list[Change]
    has_more: bool
    last_seq: Seq | None
    """`_seq` of the last row, None when there is none."""
    resume_seq: Seq
    """Where to resume when this batch was taken: nothing up to here is missing."""


class State(StrEnum):
    """How a subscription gets its changes."""

    READING = "reading"
    """Not at all: they are in the store when it looks next."""
    KEEPING = "keeping"
    """They are kept until what was read before is handed over."""
    LIVE = "active"
    ENDED = "ended"


@dataclass(slots=True, eq=False, repr=False)
class LiveSubscription:
    """Made by `LiveQueries.subscribe`. After the last batch, or at once when none was asked for, `go_live`.

    Thread-safe. Fields under `_lock` of the queries: state, kept, live_from.
    """

    queries: LiveQueries
    request: LiveRequest
    caller: Caller
    sink: LiveSink
    table: LiveTable
    group: Group
    prefix: bytes
    live_id: str
    created_ms: int
    rows_after: Seq
    """Rows up to here were read; all commits up to here once it is KEEPING without pages left."""
    deletes_after: Seq | None
    resumed: bool = False
    """It goes on after `from`; False when that was too old and everything is read."""
    initial: bool = True
    state: State = State.READING
    live_from: Seq = 0
    kept: list[Change] = field(default_factory=list)
    kept_bytes: int = 0
    changes: int = 0
    last_update_ms: int = 0
    last_ping_ms: int = 0
    """When whoever holds it was heard of last, if it says so."""
    block: Block | None = None
    batches: int = 0
    resume_seq: Seq = 0
    credentials: tuple[Any, ...] | None = None
    """Role and password of a bound caller when it began."""
    _reading: threading.Lock = field(default_factory=threading.Lock)

    @property
    def fields(self) -> tuple[Field, ...]:
        """What a whole row is sent with."""
        return self.group.shape.fields

    @property
    def has_batches(self) -> bool:
        """Whether `next_batch` must be called before changes come."""
        return self.state is State.READING or (self.state is State.KEEPING and self.block is not None)

    def next_batch(self) -> Batch:
        """The next page. Blocks for the engine and the disk. Raises Closed when the subscription has ended."""
        with self._reading:
            block = self.block
            if block is None:
                block = self.block = self._read()
            options = self.request.options
            rows = block.page(options.batch_size if options is not None else BATCH_ROWS, BATCH_BYTES_MAX)
            deletes: list[Change] = []
            if not rows:
                deletes, block.deletes = block.deletes, []
            has_more = self._pages_left(block)
            self.batches += 1
            last = rows[-1].seq if rows else None
            known = min(last or 0, block.deletes_after) if has_more else block.seq
            self.resume_seq = max(known, self.resume_seq)
            return Batch(self.batches - 1, rows, deletes, has_more, last, self.resume_seq)

    def _pages_left(self, block: Block) -> bool:
        if block.left or block.deletes:
            return True
        with self.queries.lock:
            # What was kept meanwhile grew too large and was let go: the next look finds it.
            more = not block.complete or self.state is State.READING
            self.block = None
            return more

    def _read(self) -> Block:
        queries = self.queries
        with queries.lock:
            if self.state is State.ENDED:
                raise Closed(f"subscription '{self.live_id}' has ended")
            self.state, self.kept, self.kept_bytes = State.KEEPING, [], 0
            entry, shape = self.table.entry, self.group.shape
        wanted = Wanted(
            self.rows_after, self.deletes_after, self._last_rows(),
            ChangeType.SNAPSHOT if self.initial else ChangeType.INSERT,
        )  # fmt: skip
        if queries.feed.holds(entry.definition.uid):
            block = queries.feed.read(entry, shape, wanted)
        else:
            block = queries.reader.read(entry, shape, self.caller, wanted)
        block.deletes_after = block.seq if self.deletes_after is None else self.deletes_after
        if block.complete:
            self.rows_after = self.deletes_after = block.seq
        elif block.deletes:
            self.rows_after, self.deletes_after = block.seq, block.last_delete
        else:
            self.rows_after = block.last_row
        if self.deletes_after is None:
            # Rows of that moment are handed out: from now on it matters what is deleted of them.
            self.deletes_after = block.seq
        if not block.complete:
            with queries.lock:
                if self.state is State.KEEPING:
                    self.state, self.kept = State.READING, []
        return block

    def _last_rows(self) -> int | None:
        options = self.request.options
        if options is None or not self.initial or self.batches or options.from_seq is not None:
            return None
        return options.last_rows

    def go_live(self) -> None:
        """Changes come from now on. To be called when the last batch has been handed on, before any other."""
        with self.queries.lock:
            self.initial = False
            if self.state is State.READING:
                self.sink.behind(self)
            elif self.state is State.KEEPING:
                self.live_from = self.rows_after
                kept, self.kept, self.kept_bytes = self.kept, [], 0
                self.state = State.LIVE
                self.deliver([change for change in kept if change.seq > self.live_from])

    def deliver(self, changes: Sequence[Change]) -> None:
        """Hand changes to the sink, under the lock of the queries."""
        if changes:
            self.changes += len(changes)
            self.sink.deliver([(self, change) for change in changes])

    def fall_behind(self) -> None:
        """The sink is full: nothing comes until what is stored then was read. For a sink, inside `deliver`."""
        self.queries.let_behind(self)

    def keep(self, change: Change, bytes_max: int) -> None:
        """Remember a change until it goes live; beyond `bytes_max` look again instead. Under the lock."""
        self.kept.append(change)
        self.kept_bytes += change.size
        if self.kept_bytes > bytes_max:
            self.state, self.kept, self.kept_bytes = State.READING, [], 0

    def close(self) -> None:
        """End it without a word to the sink. Idempotent."""
        self.queries.remove(self)
