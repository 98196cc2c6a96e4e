"""`/v1/ws`: live queries of one WebSocket (surface reference, section 2).

The loop reads and writes the socket. What touches the database (subscribing, pages of a snapshot) runs in the query
threads. Changes come from the publisher's thread, which only appends frames and rings.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import parse_qs

import msgspec
from starlette.types import Message, Receive, Scope, Send

from kalamdb.clock import Clock, ulid
from kalamdb.errors import InvalidRequest, KalamDbError, RateLimited, Unauthenticated
from kalamdb.live import Batch, Change, LiveCode, LiveOptions, LiveQueries, LiveRequest, LiveSubscription, code_of
from kalamdb.result import OutputColumn
from kalamdb.server.encode import schema_json
from kalamdb.server.identity import Authenticator, Identity
from kalamdb.server.live_frames import Compression, Format, Frame, Serialization, wire_row
from kalamdb.server.protocol import Wire
from kalamdb.server.sockets import Sockets
from kalamdb.sql.caller import Caller

_log = logging.getLogger("kalamdb.server")
_POLICY, _INVALID_DATA, _TRY_LATER, _NORMAL = 1008, 1007, 1013, 1000
_PER_CONNECTION_MAX = 100
_ID_LENGTH_MAX = 256
_GOODBYE_S = 2.0


class _Protocol(msgspec.Struct):
    serialization: Serialization = Serialization.JSON
    compression: Compression = Compression.GZIP


class _Authenticate(msgspec.Struct, tag="authenticate"):
    token: str
    method: Literal["jwt"] = "jwt"
    protocol: _Protocol | None = None


class _Options(msgspec.Struct):
    batch_size: int | None = None
    last_rows: int | None = None
    from_: int | str | None = msgspec.field(default=None, name="from")
    from_seq_id: int | str | None = None


class _Wanted(msgspec.Struct):
    id: str
    sql: str
    options: _Options | None = None


class _Subscribe(msgspec.Struct, tag="subscribe"):
    subscription: _Wanted


class _NextBatch(msgspec.Struct, tag="next_batch"):
    subscription_id: str
    last_seq_id: int | str | None = None


class _Unsubscribe(msgspec.Struct, tag="unsubscribe"):
    subscription_id: str


class _Ping(msgspec.Struct, tag="ping"):
    pass


_Incoming = _Authenticate | _Subscribe | _NextBatch | _Unsubscribe | _Ping
_from_json = msgspec.json.Decoder(_Incoming)
_from_msgpack = msgspec.msgpack.Decoder(_Incoming)


@dataclass(frozen=True, slots=True)
class SocketLimits:
    """Bounds of one socket; see [websocket], [rate_limit] and [limits]."""

    auth_timeout_s: float
    client_timeout_s: float
    heartbeat_interval_s: float
    queue_bytes_max: int
    message_bytes_max: int
    messages_per_s_max: int


@dataclass(frozen=True, slots=True)
class LiveServices:
    """What a socket needs of the server."""

    live: LiveQueries
    authenticator: Authenticator
    sockets: Sockets
    clock: Clock
    limits: SocketLimits
    run: Callable[[str, Callable[[], None]], Awaitable[None]]
    """Runs a blocking call of a user in the query threads."""
    origin_allowed: Callable[[Scope], bool]


class Unsupported(InvalidRequest):
    """A subscription of a kind that is not offered."""


class Doorbell:
    """Wakes sockets on the loop, many by one call: a commit may concern a hundred of them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._rung: deque[LiveSocket] = deque()
        self._pending = False

    def ring(self, socket: LiveSocket) -> None:
        """Have the socket look at its queue. From any thread."""
        self._rung.append(socket)
        if not self._pending:
            self._pending = True
            self._loop.call_soon_threadsafe(self._answer)

    def _answer(self) -> None:
        self._pending = False
        while self._rung:
            self._rung.popleft().wake()


@dataclass(slots=True)
class _Held:
    """A subscription of this socket. `LiveQueries.lock` guards `subscription`, `announced`, `closed` and `ended`."""

    head: bytes
    subscription: LiveSubscription | None = None
    """None until a query thread has made it."""
    announced: bool = False
    """The acknowledgement is queued, so its end may be told."""
    closed: bool = False
    """Not wanted any more, perhaps before it was made."""
    ended: tuple[LiveCode, str] | None = None
    """How it ended before it was announced."""
    pages: int = 0
    ready: bool = False


@dataclass(slots=True)
class _Queue:
    """Frames that wait for the loop. Thread-safe."""

    _lock: threading.Lock = field(default_factory=threading.Lock)
    _frames: list[Frame] = field(default_factory=list)
    _pages_bytes: int = 0
    changes_bytes: int = 0
    """Of changes, which come unasked."""

    def put(self, frames: Sequence[Frame], *, asked_for: bool) -> None:
        """Append frames; `asked_for` those that a client gets one by one as it asks."""
        size = sum(map(_size, frames))
        with self._lock:
            self._frames += frames
            if asked_for:
                self._pages_bytes += size
            else:
                self.changes_bytes += size

    def take(self) -> tuple[list[Frame], int]:
        """All of them, and how many bytes of it were asked for."""
        with self._lock:
            frames, self._frames = self._frames, []
            pages, self._pages_bytes, self.changes_bytes = self._pages_bytes, 0, 0
        return frames, pages


def _size(frame: Frame) -> int:
    return len(frame) if isinstance(frame, bytes) or frame.isascii() else len(frame.encode())


class LiveSocket:
    """One open WebSocket."""

    def __init__(self, services: LiveServices, doorbell: Doorbell, scope: Scope, receive: Receive, send: Send) -> None:
        self._services = services
        self._doorbell = doorbell
        self._scope = scope
        self._receive = receive
        self._asgi_send = send
        self._query = {key: values[-1] for key, values in parse_qs(scope["query_string"].decode("latin-1")).items()}
        packed = self._query.get("compress") != "false"
        self._format = Format(compression=Compression.GZIP if packed else Compression.NONE)
        self._may_pack = packed
        self._identity: Identity | None = None
        self._connection_id = ulid(services.clock)
        self._held: dict[str, _Held] = {}
        self._forgetting: asyncio.Future[None] | None = None
        """Closes the subscriptions of an expired token."""
        self._queue = _Queue()
        self._asked_bytes = 0
        """Of what the wire may still hold: bytes that were asked for."""
        self._wire: Wire = scope["state"]["wire"]
        self._closing: tuple[int, str] | None = None
        self._left: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the close frame is to be sent."""
        self._gone = asyncio.Event()
        self._tokens = float(services.limits.messages_per_s_max)
        self._refilled_s = services.clock.monotonic_s()
        self._is_late = False
        """The client was told that it sends too much."""
        self._expiry: asyncio.TimerHandle | None = None

    # The loop's side

    async def run(self) -> None:
        """Serve the socket until it is gone."""
        await self._receive()
        if not self._services.origin_allowed(self._scope):
            await self._refuse_upgrade(403, "Origin not allowed")
            return
        await self._asgi_send({"type": "websocket.accept"})
        self._services.sockets.add(self)
        reading = asyncio.ensure_future(self._read())
        try:
            await asyncio.wait([reading, self._left], return_when=asyncio.FIRST_COMPLETED)
            self.wake()
            await self._say_goodbye()
        finally:
            reading.cancel()
            self._services.sockets.discard(self)
            self._closing = self._closing or (_NORMAL, "")
            if self._expiry is not None:
                self._expiry.cancel()
            await asyncio.wait([reading])
            await self._forget_all()
            if self._forgetting is not None:
                await self._forgetting
            self._gone.set()
        if not reading.cancelled() and (failed := reading.exception()) is not None:
            raise failed

    async def _say_goodbye(self) -> None:
        """The close frame; a peer that takes nothing is cut off."""
        code, reason = self._closing or (_NORMAL, "")
        with contextlib.suppress(OSError, RuntimeError):
            try:
                async with asyncio.timeout(_GOODBYE_S):
                    await self._asgi_send({"type": "websocket.close", "code": code, "reason": reason})
            except TimeoutError:
                self._wire.abort()

    async def close(self, code: int, reason: str) -> None:
        """Send what is queued, then the close frame."""
        self._finish(code, reason)
        await self._gone.wait()

    async def _refuse_upgrade(self, status: int, text: str) -> None:
        headers = [(b"content-type", b"text/plain; charset=utf-8")]
        await self._asgi_send({"type": "websocket.http.response.start", "status": status, "headers": headers})
        await self._asgi_send({"type": "websocket.http.response.body", "body": text.encode()})

    def _finish(self, code: int, reason: str) -> None:
        if self._closing is None:
            self._closing = (code, reason)
        self.wake()

    def _overflow(self) -> None:
        # What was sent already is in order; the client's resume brings the rest.
        if self._closing is None:
            self._closing = (_TRY_LATER, "the client reads too slowly; reconnect and resume")

    def wake(self) -> None:
        """Send what is queued, in one write. What the other side has not taken counts as queued."""
        frames, asked_bytes = self._queue.take()
        if frames:
            # Pages are as long as they are; a client that takes them must not be cut off for it, again and again.
            self._asked_bytes = asked_bytes + (self._asked_bytes if self._wire.buffered_bytes() else 0)
            self._wire.send_all(frames)
        if self._wire.buffered_bytes() > self._services.limits.queue_bytes_max + self._asked_bytes:
            self._overflow()
        if self._closing is not None and not self._left.done():
            self._left.set_result(None)

    async def _read(self) -> None:
        if not await self._first_authentication():
            return
        while self._closing is None:
            message = await self._hear()
            if message is None:
                return
            await self._handle(message)

    async def _hear(self) -> Message | None:
        """The next message; None when the peer is gone or silent for too long."""
        limits, loop = self._services.limits, asyncio.get_running_loop()
        pending = asyncio.ensure_future(self._receive())
        try:
            while not (await asyncio.wait([pending], timeout=limits.heartbeat_interval_s))[0]:
                if loop.time() - self._wire.frame_at_s > limits.client_timeout_s:
                    self._finish(_POLICY, "nothing was heard of the client")
                    return None
            message = pending.result()
            return None if message["type"] == "websocket.disconnect" else message
        finally:
            pending.cancel()

    async def _first_authentication(self) -> bool:
        header = dict(self._scope["headers"]).get(b"authorization")
        if header is not None:
            protocol = _Protocol(
                Serialization.MSGPACK if self._query.get("serialization") == "msgpack" else Serialization.JSON,
                Compression.NONE if self._query.get("compression") == "none" else Compression.GZIP,
            )
            return await self._authenticate(header.decode("latin-1"), protocol)
        limits = self._services.limits
        try:
            async with asyncio.timeout(limits.auth_timeout_s):
                while self._identity is None and self._closing is None:
                    message = await self._hear()
                    if message is None:
                        return False
                    await self._handle(message)
        except TimeoutError:
            self._refuse(f"Authentication timeout - no auth message received within {limits.auth_timeout_s:g} seconds")
        return self._identity is not None

    async def _handle(self, raw: Message) -> None:
        data = raw.get("text")
        if data is None:
            data = raw.get("bytes") or b""
        await self._turn()
        now_ms = self._services.clock.now_ms()
        for held in list(self._held.values()):
            if held.subscription is not None:
                held.subscription.last_ping_ms = now_ms
        if len(data) > self._services.limits.message_bytes_max:
            self._error("protocol", "MESSAGE_TOO_LARGE", f"a message of {len(data)} bytes is too long")
            return
        msgpack = self._format.serialization is Serialization.MSGPACK
        if isinstance(data, bytes) and not msgpack:
            self._error("protocol", "UNSUPPORTED_DATA", "binary messages need serialization msgpack")
            return
        try:
            message = _from_msgpack.decode(data) if msgpack and isinstance(data, bytes) else _from_json.decode(data)
        except msgspec.ValidationError as exc:
            self._error("protocol", "PROTOCOL", str(exc))
            return
        except msgspec.DecodeError:
            self._finish(_INVALID_DATA, "a message is not valid JSON")
            return
        await self._dispatch(message)

    async def _turn(self) -> None:
        """Wait until a message may be handled. Those above the rate are late, not lost: a client with a hundred
        subscriptions sends them all when it comes back, and would wait for answers for ever."""
        now_s, rate = self._services.clock.monotonic_s(), self._services.limits.messages_per_s_max
        self._tokens = min(float(rate), self._tokens + (now_s - self._refilled_s) * rate) - 1
        self._refilled_s = now_s
        if self._tokens < 0:
            if self._tokens + 1 >= 0 and not self._is_late:
                self._error("protocol", "RATE_LIMIT_EXCEEDED", f"more than {rate} messages in a second; they wait")
            self._is_late = True
            await asyncio.sleep(-self._tokens / rate)
        elif self._tokens > rate / 2:
            self._is_late = False

    async def _dispatch(self, message: _Incoming) -> None:
        match message:
            case _Ping():
                pass
            case _Authenticate():
                await self._authenticate(f"Bearer {message.token}", message.protocol)
            case _ if self._identity is None:
                self._error("subscribe", "AUTH_REQUIRED", "authenticate first")
            case _Subscribe():
                await self._subscribe(message.subscription, self._identity)
            case _NextBatch():
                await self._next_batch(message.subscription_id, self._identity)
            case _Unsubscribe():
                held = self._held.pop(message.subscription_id, None)
                if held is not None:
                    await asyncio.to_thread(self._close_held, [held])

    # Who asks

    async def _authenticate(self, header: str, protocol: _Protocol | None) -> bool:
        try:
            identity = await self._services.authenticator.authenticate(header)
        except Unauthenticated as exc:
            self._refuse("Token expired" if exc.code == "TOKEN_EXPIRED" else "Invalid token")
            return False
        if self._identity is not None and identity.user != self._identity.user:
            self._refuse("the token is another user's; open a socket of its own")
            return False
        first = self._identity is None
        self._identity = identity
        if first and protocol is not None:
            compression = protocol.compression if self._may_pack else Compression.NONE
            self._format = Format(protocol.serialization, compression)
        answer = {
            "type": "auth_success", "user": identity.user, "role": str(identity.role),
            "protocol": {"serialization": str(self._format.serialization),
                         "compression": str(self._format.compression)},
        }  # fmt: skip
        self._enqueue(msgspec.json.encode(answer).decode())
        self._watch_expiry(identity)
        return True

    def _refuse(self, text: str) -> None:
        self._enqueue(msgspec.json.encode({"type": "auth_error", "message": text}).decode())
        self._finish(_POLICY, "authentication failed")

    def _watch_expiry(self, identity: Identity) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        left_s = identity.expires_s - self._services.clock.now_ms() / 1000
        loop = asyncio.get_running_loop()
        self._expiry = loop.call_later(max(0.0, left_s), self._expired)

    def _expired(self) -> None:
        if self._identity is None:
            return
        self._identity = None
        for subscription_id in list(self._held):
            self._error(subscription_id, "AUTH_REQUIRED", "the token has expired; authenticate and subscribe again")
        self._forgetting = asyncio.ensure_future(self._forget_all())
        loop, limits = asyncio.get_running_loop(), self._services.limits
        self._expiry = loop.call_later(limits.auth_timeout_s, self._refuse, "Token expired")

    async def _forget_all(self) -> None:
        held, self._held = list(self._held.values()), {}
        if held:
            await asyncio.to_thread(self._close_held, held)

    def _close_held(self, held: Sequence[_Held]) -> None:
        """End subscriptions; one that is being made ends when it is."""
        for one in held:
            with self._services.live.lock:
                one.closed = True
                subscription = one.subscription
            if subscription is not None:
                subscription.close()

    # Subscriptions

    async def _subscribe(self, wanted: _Wanted, identity: Identity) -> None:
        if not wanted.id or len(wanted.id) > _ID_LENGTH_MAX:
            self._error(
                "invalid_subscription", "INVALID_SUBSCRIPTION_ID", "a subscription has an id of 1 to 256 characters"
            )
            return
        if wanted.id in self._held:
            self._error(
                wanted.id, "INVALID_SUBSCRIPTION_ID", f"'{wanted.id}' is subscribed already; unsubscribe it first"
            )
            return
        if len(self._held) >= _PER_CONNECTION_MAX:
            self._error(wanted.id, "UNSUPPORTED", f"a connection carries at most {_PER_CONNECTION_MAX} subscriptions")
            return
        if self._forgetting is not None:
            # One of the same id may not be closed yet.
            await self._forgetting
        if not await self._room():
            return
        held = self._held[wanted.id] = _Held(self._format.head(wanted.id))
        try:
            await self._services.run(identity.user, lambda: self._begin(wanted, identity, held))
        except Exception as exc:  # noqa: BLE001 - whatever it was, the socket goes on
            await self._failed(wanted.id, held, exc, "SUBSCRIPTION_FAILED")

    async def _failed(self, subscription_id: str, held: _Held, exc: Exception, otherwise: str) -> None:
        await asyncio.to_thread(self._close_held, [held])
        if self._held.get(subscription_id) is held:
            del self._held[subscription_id]
            self._tell(subscription_id, exc, otherwise)

    async def _room(self) -> bool:
        """Wait until the client has taken what it asked for before; one that does not is cut off."""
        try:
            async with asyncio.timeout(self._services.limits.client_timeout_s):
                await self._wire.drained()
        except TimeoutError:
            self._overflow()
            self.wake()
        return self._closing is None

    def _begin(self, wanted: _Wanted, identity: Identity, held: _Held) -> None:
        """In a query thread: subscribe, and send what comes at once."""
        options = _options(wanted.options)
        if options is not None and options.last_rows is not None and options.last_rows > options.batch_size:
            raise Unsupported(f"last_rows is {options.last_rows}, more than one batch of {options.batch_size} rows")
        request = LiveRequest(
            wanted.sql, options, subscription_id=wanted.id, connection_id=self._connection_id, bound=True
        )
        caller = Caller(identity.user, identity.role, "default", None, self._services.clock.now_ms())
        live = self._services.live
        subscription = live.subscribe(request, caller, self)
        with live.lock:
            held.subscription = subscription
            unwanted = held.closed
        if unwanted:
            subscription.close()
            return
        has_batches = subscription.has_batches
        ack: dict[str, Any] = {
            "type": "subscription_ack", "subscription_id": wanted.id, "total_rows": 0,
            "batch_control": {"batch_num": 0, "has_more": has_batches, "status": "loading" if has_batches else "ready"},
            "schema": msgspec.json.decode(schema_json(_columns(subscription))),
        }  # fmt: skip
        if options is not None and options.from_seq is not None:
            ack["resumed"] = subscription.resumed
        if not has_batches:
            ack["resume_from"] = str(subscription.rows_after)
        frame = self._format.frame(ack)
        with live.lock:
            self._enqueue(frame)
            held.announced = True
            if held.ended is not None:
                self.ended(subscription, *held.ended)
                return
        if has_batches:
            self._page(wanted.id, held)
        else:
            held.ready = True
            subscription.go_live()

    def _page(self, subscription_id: str, held: _Held) -> None:
        """In a query thread: the next page of the snapshot; after the last one changes come.

        Deletions go before the frame that says "ready": until then a client that is cut off begins again where it
        began. They are in a page of their own, which is not waited to be asked for: not all clients do.
        """
        subscription = held.subscription
        assert subscription is not None
        batch = subscription.next_batch()
        options = subscription.request.options or LiveOptions()
        short = len(batch.rows) < options.batch_size
        while batch.has_more and not batch.deletes and short:
            self._send_page(subscription_id, held, batch)
            batch = subscription.next_batch()
            short = not batch.rows
        self._enqueue(*(self._format.change(held.head, change) for change in batch.deletes))
        self._send_page(subscription_id, held, batch)
        if not batch.has_more:
            held.ready = True
            subscription.go_live()

    def _send_page(self, subscription_id: str, held: _Held, batch: Batch) -> None:
        status = "ready" if not batch.has_more else "loading_batch" if held.pages else "loading"
        control: dict[str, Any] = {"batch_num": held.pages, "has_more": batch.has_more, "status": status}
        if batch.rows:
            control["last_seq_id"] = batch.rows[-1].seq
        held.pages += 1
        message = {
            "type": "initial_data_batch", "subscription_id": subscription_id,
            "rows": [wire_row(change.new) for change in batch.rows if change.new is not None],
            "batch_control": control,
        }  # fmt: skip
        if not batch.has_more:
            # Later than the last row: whoever resumes there need not come within its time.
            message["resume_from"] = str(batch.resume_seq)
        self._enqueue(self._format.frame(message))

    async def _next_batch(self, subscription_id: str, identity: Identity) -> None:
        held = self._held.get(subscription_id)
        if held is not None and held.ready:
            return  # Asked for while the last page was on its way.
        if held is None or held.subscription is None:
            self._error(subscription_id, "BATCH_FETCH_FAILED", f"'{subscription_id}' has no more batches")
            return
        if not await self._room():
            return
        try:
            await self._services.run(identity.user, lambda: self._page(subscription_id, held))
        except Exception as exc:  # noqa: BLE001 - whatever it was, the socket goes on
            await self._failed(subscription_id, held, exc, "BATCH_FETCH_FAILED")

    # The publisher's side: a LiveSink

    def deliver(self, changes: Sequence[tuple[LiveSubscription, Change]]) -> None:
        """Take over all changes of one commit."""
        if self._closing is not None:
            return
        frames = []
        for subscription, change in changes:
            held = self._held.get(subscription.request.subscription_id)
            if held is not None and held.subscription is subscription:
                frames.append(self._format.change(held.head, change))
        self._queue.put(frames, asked_for=False)
        if self._queue.changes_bytes > self._services.limits.queue_bytes_max:
            self._overflow()
        self._doorbell.ring(self)

    def behind(self, subscription: LiveSubscription) -> None:
        """See LiveSink. What was missed are rows and deletions, and where to resume is known only after all of them:
        the client's own resume brings them in that order."""
        self._overflow()
        self._doorbell.ring(self)

    def ended(self, subscription: LiveSubscription, code: LiveCode, message: str) -> None:
        """Nothing comes any more."""
        subscription_id = subscription.request.subscription_id
        held = self._held.get(subscription_id)
        if held is None or held.subscription not in (None, subscription):
            return
        if not held.announced:
            held.ended = (code, message)
            return
        self._held.pop(subscription_id, None)
        self._error(subscription_id, str(code), message)

    # Frames

    def _enqueue(self, *frames: Frame) -> None:
        """Send what answers a message. From any thread."""
        self._queue.put(frames, asked_for=True)
        self._doorbell.ring(self)

    def _error(self, subscription_id: str, code: str, message: str) -> None:
        message_ = {"type": "error", "subscription_id": subscription_id, "code": code, "message": message}
        self._queue.put([self._format.frame(message_)], asked_for=False)
        self._doorbell.ring(self)

    def _tell(self, subscription_id: str, exc: Exception, otherwise: str) -> None:
        if isinstance(exc, Unsupported):
            self._error(subscription_id, "UNSUPPORTED", str(exc))
        elif isinstance(exc, RateLimited):
            self._error(subscription_id, "RATE_LIMIT_EXCEEDED", str(exc))
        elif isinstance(exc, KalamDbError):
            code = code_of(exc)
            self._error(subscription_id, otherwise if code is LiveCode.FAILED else str(code), str(exc))
        else:
            _log.exception("subscription '%s' failed", subscription_id, exc_info=exc)
            self._error(subscription_id, otherwise, "the server failed on this subscription")


def _options(given: _Options | None) -> LiveOptions | None:
    if given is None:
        return None
    after = given.from_ if given.from_ is not None else given.from_seq_id
    named: dict[str, Any] = {"last_rows": given.last_rows}
    if after is not None:
        if isinstance(after, str) and not (after.isascii() and after.isdigit()):
            raise InvalidRequest(f"from is {after[:40]!r}; a whole number is expected")
        named["from_seq"] = int(after)
    if given.batch_size is not None:
        named["batch_size"] = given.batch_size
    return LiveOptions(**named)


def _columns(subscription: LiveSubscription) -> tuple[OutputColumn, ...]:
    """What a whole row is sent with."""
    definition = subscription.table.entry.definition
    flags: dict[str, tuple[str, ...]] = {}
    for column in definition.columns:
        if column.id in definition.primary_key:
            flags[column.name] = ("nn", "pk", "uq") if len(definition.primary_key) == 1 else ("nn", "pk")
        elif not column.nullable:
            flags[column.name] = ("nn",)
    return tuple(OutputColumn(one.name, one.type, flags.get(one.name, ())) for one in subscription.fields)
