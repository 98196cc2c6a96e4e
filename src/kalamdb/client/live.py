"""Live queries over a WebSocket without the socket: which frames to send, what the frames that come mean.

The protocol is that of the surface reference, section 2. A `Feed` is one subscription over all the sockets that
carry it one after another; `LiveProtocol` is one socket.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from kalamdb.client.wire import reader
from kalamdb.errors import (
    Closed,
    Denied,
    InvalidRequest,
    KalamDbError,
    LimitExceeded,
    NotFound,
    Unauthenticated,
    Unavailable,
)
from kalamdb.types import ChangeType

PING_INTERVAL_S = 5.0
RECONNECT_MAX_S = 30.0
STEADY_S = 5.0
"""A socket that was open so long is opened again at once when it is lost."""
CHANGES_WAITING_MAX = 10_000
"""Changes that wait for their reader; beyond it the socket is not read, and the server ends it in the end."""
_ERRORS: Mapping[str, type[KalamDbError]] = {
    "UNAUTHORIZED": Denied, "NOT_FOUND": NotFound, "SUBSCRIPTION_LIMIT_EXCEEDED": LimitExceeded,
    "MESSAGE_TOO_LARGE": LimitExceeded, "CLOSED": Closed,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Change:
    """One change of one row."""

    type: ChangeType
    seq: int
    """`_seq` of the version that the change made."""
    row: dict[str, Any] | None
    """The row: whole for snapshot and insert; for update the key, `_seq` and what is not NULL; None for delete."""
    old_values: dict[str, Any] | None
    """For update the former values that changed; for delete the former row."""


@dataclass(eq=False)
class Feed:
    """One live query. What comes goes to `emit`, its end to `ended`; both are called by whoever reads the socket."""

    id: str
    sql: str
    emit: Callable[[Change], None]
    ended: Callable[[KalamDbError | None], None]
    from_seq: int | None = None
    last_rows: int | None = None
    batch_size: int | None = None
    snapshot: bool = True
    last_seq: int | None = None
    """All up to here has come."""
    ready: bool = False
    known: bool = False
    """The server has accepted it before."""
    _resumed_at: int | None = field(init=False)
    _readers: dict[str, Callable[[Any], Any] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._resumed_at = self.from_seq

    def subscribe(self) -> dict[str, Any]:
        """The message that begins it, or goes on after the last change that was seen."""
        if self.ready and self.last_seq is not None:
            # Before it was ready, deletions of rows that came may be missing: it begins where it began.
            self._resumed_at = self.last_seq
        self.ready = False
        options: dict[str, Any] = {} if self.batch_size is None else {"batch_size": self.batch_size}
        if self._resumed_at is not None:
            options["from"] = str(self._resumed_at)
        elif self.last_rows is not None:
            options["last_rows"] = self.last_rows
        subscription: dict[str, Any] = {"id": self.id, "sql": self.sql}
        if self.snapshot or self._resumed_at is not None:
            subscription["options"] = options
        return {"type": "subscribe", "subscription": subscription}

    def acknowledged(self, message: Mapping[str, Any]) -> None:
        """The server accepted it."""
        self._readers = {one["name"]: reader(one["data_type"]) for one in message.get("schema") or []}
        self._readers["_seq"] = int
        self.known = True
        if message.get("resumed") is False:
            self._resumed_at = self.last_seq = None
        if not message["batch_control"]["has_more"]:
            self._complete(message)

    def _complete(self, message: Mapping[str, Any]) -> None:
        self.ready = True
        self._has_come(int(message.get("resume_from", 0)))

    def _has_come(self, seq: int) -> None:
        if seq and (self.last_seq is None or seq > self.last_seq):
            self.last_seq = seq

    def batch(self, message: Mapping[str, Any]) -> dict[str, Any] | None:
        """Rows that are there; the message that asks for more of them."""
        kind = ChangeType.SNAPSHOT if self._resumed_at is None else ChangeType.INSERT
        for wire in message["rows"]:
            self._emit(kind, wire, None)
        control = message["batch_control"]
        if control["has_more"]:
            return {"type": "next_batch", "subscription_id": self.id, "last_seq_id": control.get("last_seq_id")}
        self._complete(message)
        return None

    def change(self, message: Mapping[str, Any]) -> None:
        """Rows that changed."""
        rows: Sequence[Any] = message.get("rows") or []
        olds: Sequence[Any] = message.get("old_values") or []
        for at in range(max(len(rows), len(olds))):
            row = rows[at] if at < len(rows) else None
            self._emit(ChangeType(message["change_type"]), row, olds[at] if at < len(olds) else None)

    def _emit(self, kind: ChangeType, row: Mapping[str, Any] | None, old: Mapping[str, Any] | None) -> None:
        version = row if row is not None else old
        assert version is not None
        seq = int(version["_seq"])
        if self._resumed_at is not None and seq <= self._resumed_at:
            return
        self._has_come(seq)
        self.emit(Change(kind, seq, self._values(row), self._values(old)))

    def _values(self, wire: Mapping[str, Any] | None) -> dict[str, Any] | None:
        if wire is None:
            return None
        out = {}
        for name, value in wire.items():
            read = self._readers.get(name)
            out[name] = value if read is None or value is None else read(value)
        return out


class LiveProtocol:
    """The live queries of one client and the socket that carries them now. Not thread-safe."""

    def __init__(self) -> None:
        self._feeds: dict[str, Feed] = {}
        self.online = False
        """Whether the socket is open and the server knows who asks."""

    def __len__(self) -> int:
        return len(self._feeds)

    def opened(self, token: str) -> list[str]:
        """A socket was opened: what to send."""
        self.online = False
        protocol = {"serialization": "json", "compression": "gzip"}
        return [_text({"type": "authenticate", "method": "jwt", "token": token, "protocol": protocol})]

    def lost(self) -> None:
        """The socket is gone."""
        self.online = False

    def add(self, feed: Feed) -> list[str]:
        """A live query begins: what to send now."""
        self._feeds[feed.id] = feed
        return [_text(feed.subscribe())] if self.online else []

    def remove(self, feed: Feed) -> list[str]:
        """A live query is not wanted any more: what to send now."""
        if self._feeds.pop(feed.id, None) is None:
            return []
        feed.ended(None)
        return [_text({"type": "unsubscribe", "subscription_id": feed.id})] if self.online else []

    def end(self, error: KalamDbError | None) -> None:
        """All live queries end."""
        feeds, self._feeds = list(self._feeds.values()), {}
        for feed in feeds:
            feed.ended(error)

    def received(self, frame: str | bytes) -> list[str]:
        """A frame came: what to send.

        Raises Unauthenticated when the server refuses the token, or no longer takes it; Unavailable when it is to be
        tried again on another socket.
        """
        message = msgspec.json.decode(gzip.decompress(frame) if isinstance(frame, bytes) else frame)
        match message["type"]:
            case "auth_success":
                if self.online:
                    return []
                self.online = True
                return [_text(feed.subscribe()) for feed in self._feeds.values()]
            case "auth_error":
                expired = "expired" in message["message"].lower()
                raise Unauthenticated(message["message"], "TOKEN_EXPIRED" if expired else "INVALID_CREDENTIALS")
            case _:
                return self._to_feed(message)

    def _to_feed(self, message: Mapping[str, Any]) -> list[str]:
        feed = self._feeds.get(message.get("subscription_id", ""))
        if feed is None:
            return []
        match message["type"]:
            case "subscription_ack":
                feed.acknowledged(message)
            case "initial_data_batch":
                more = feed.batch(message)
                return [] if more is None else [_text(more)]
            case "change":
                feed.change(message)
            case "error":
                self._refused(feed, message["code"], message["message"])
        return []

    def _refused(self, feed: Feed, code: str, text: str) -> None:
        match code:
            case "AUTH_REQUIRED":
                raise Unauthenticated(text, "TOKEN_EXPIRED")
            case "RATE_LIMIT_EXCEEDED":
                raise Unavailable(text)
            case "SUBSCRIPTION_LIMIT_EXCEEDED" if feed.known:
                # Its place is still taken by its former socket, which the server has not missed yet.
                raise Unavailable(text)
            case _:
                self._feeds.pop(feed.id, None)
                feed.ended(_ERRORS.get(code, InvalidRequest)(text))


PING = '{"type":"ping"}'


def _text(message: Mapping[str, Any]) -> str:
    return msgspec.json.encode(message).decode()
