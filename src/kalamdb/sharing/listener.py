"""The side of the process that holds the directory: a thread that accepts, and one per connection."""

from __future__ import annotations

import logging
import os
import socket
import threading
from contextlib import suppress
from pathlib import Path

import msgspec

from kalamdb.database import Database
from kalamdb.errors import Denied, Internal, InvalidRequest, KalamDbError, LimitExceeded, Unavailable
from kalamdb.service import GiveUp
from kalamdb.sharing.calls import CALLS, Conversation, form_of
from kalamdb.sharing.channel import FRAME_BYTES_MAX, Channel, Kind, Lost, Turn, listen
from kalamdb.sharing.values import Hello, encode, error_form, request_of
from kalamdb.storage.directory import SOCKET_NAME
from kalamdb.version import VERSION

PROTOCOL = 1
"""Raised whenever a frame, a value or a call comes to mean something else."""
CONNECTIONS_MAX = 512
GREETING_TIMEOUT_S = 3.0
_GREETING_BYTES_MAX = 4096
_DRAIN_S = 5.0
_ABORT_S = 2.0
_log = logging.getLogger("kalamdb.sharing")


class Listener:
    """Lets other processes attach to a database that this one holds. `close` it before the database.

    Raises Unavailable when the socket cannot be made.
    """

    def __init__(self, database: Database, directory: Path, *, database_uid: str) -> None:
        self._database = database
        self._directory = directory
        self._hello = Hello(PROTOCOL, VERSION, os.getpid(), database_uid)
        self._lock = threading.Lock()
        self._connections: set[_Connection] = set()
        self._is_closing = False
        try:
            self._socket = listen(directory)
        except OSError as exc:
            raise Unavailable(
                f"'{directory / SOCKET_NAME}' cannot be made: {exc.strerror or exc}; check its rights"
            ) from exc
        self._thread = threading.Thread(target=self._accept, name="kalamdb-listener", daemon=True)
        self._thread.start()

    @property
    def connections(self) -> int:
        """How many connections there are."""
        return len(self._connections)

    def close(self) -> None:
        """Let nobody in any more; calls that run get five seconds, open transactions are rolled back. Idempotent."""
        with self._lock:
            if self._is_closing:
                return
            self._is_closing = True
        (self._directory / SOCKET_NAME).unlink(missing_ok=True)
        with suppress(OSError):
            # On Linux this wakes the thread that accepts; elsewhere closing does.
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        with self._lock:
            left = list(self._connections)
        for one in left:
            one.end()
        for one in left:
            one.join(_DRAIN_S)
        for one in left:
            one.channel.abort()
        for one in left:
            one.join(_ABORT_S)
        self._thread.join(_ABORT_S)

    def _accept(self) -> None:
        while not self._is_closing:
            try:
                connected, _ = self._socket.accept()
            except OSError as exc:
                if self._is_closing:
                    return
                _log.warning("a process that wants to attach cannot be accepted: %s", exc)
                threading.Event().wait(0.1)
                continue
            connection = _Connection(self, self._database, self._hello, Channel(connected))
            with self._lock:
                if self._is_closing:
                    connection.channel.close()
                    return
                self._connections.add(connection)
                connection.start(is_crowded=len(self._connections) > CONNECTIONS_MAX)

    def forget(self, connection: _Connection) -> None:
        """It has ended."""
        with self._lock:
            self._connections.discard(connection)


class _PeerGone(GiveUp):
    """Set as soon as the other side has closed the connection; nothing is to be read meanwhile."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel

    def is_set(self) -> bool:
        return not self._channel.is_open()


class _Connection:
    """One connection, served by a thread of its own."""

    def __init__(self, listener: Listener, database: Database, hello: Hello, channel: Channel) -> None:
        self.channel = channel
        self._listener = listener
        self._hello = hello
        self._turn = Turn()
        self._conversation = Conversation(database, _PeerGone(channel))
        self._thread: threading.Thread | None = None

    def start(self, *, is_crowded: bool) -> None:
        self._thread = threading.Thread(target=self._run, args=(is_crowded,), name="kalamdb-attached", daemon=True)
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def end(self) -> None:
        """End when the call that runs is answered; at once when none does."""
        if not self._turn.end():
            self.channel.abort()

    def _run(self, is_crowded: bool) -> None:
        try:
            if self._greet(is_crowded):
                while self._serve():
                    pass
        except (Lost, TimeoutError) as exc:
            _log.debug("an attached process is gone: %s", exc)
        finally:
            try:
                self._conversation.abandon()
            except KalamDbError as exc:
                _log.warning("the transaction of an attached process ended: %s", exc)
            self.channel.close()
            self._listener.forget(self)

    def _greet(self, is_crowded: bool) -> bool:
        self.channel.limit(GREETING_TIMEOUT_S)
        self.channel.body_bytes_max = _GREETING_BYTES_MAX
        kind, body = self.channel.receive()
        try:
            other = msgspec.msgpack.decode(body, type=Hello)
        except msgspec.DecodeError as exc:
            raise Lost(f"no greeting: {exc}") from exc
        if kind is not Kind.HELLO:
            raise Lost("no greeting")
        refusal = self._refusal(other, is_crowded)
        if refusal is not None:
            self.channel.send(Kind.ERROR, encode(error_form(refusal)))
            return False
        self.channel.send(Kind.HELLO, encode(self._hello))
        self.channel.limit(None)
        self.channel.body_bytes_max = FRAME_BYTES_MAX
        return True

    def _refusal(self, other: Hello, is_crowded: bool) -> KalamDbError | None:
        uid = self.channel.peer_uid()
        if uid is not None and uid != os.geteuid():
            return Denied(f"the data directory is held by user {os.geteuid()}; user {uid} may not attach to it")
        if other.protocol != PROTOCOL:
            return Unavailable(
                f"process {self._hello.pid} holds the data directory with KalamDB {VERSION} (protocol {PROTOCOL}), "
                f"this one has {other.version} (protocol {other.protocol}); run one version in all of them"
            )
        if is_crowded:
            return LimitExceeded(
                f"process {self._hello.pid} serves {CONNECTIONS_MAX} connections already, at most so many are allowed; "
                "use fewer threads or processes"
            )
        return None

    def _serve(self) -> bool:
        kind, body = self.channel.receive()
        if not self._turn.begin():
            return False
        if kind is not Kind.REQUEST:
            raise Lost(f"a frame of kind {kind.name} came where a request is expected")
        try:
            ended, answer = Kind.VALUE, self._answer(body)
        except (Lost, TimeoutError):
            raise
        except Exception as exc:
            form = error_form(exc)
            if form.code == Internal.code:
                _log.exception("a call of an attached process failed")
            ended, answer = Kind.ERROR, encode(form)
        self.channel.send(ended, answer)
        return self._turn.done()

    def _answer(self, body: memoryview) -> bytes:
        try:
            request = request_of(body)
        except ValueError as exc:
            raise Lost(str(exc)) from exc
        call = CALLS.get(request.name)
        if call is None:
            raise InvalidRequest(f"there is no call '{request.name}' between processes")
        value = call.run(self._conversation, *request.args, **request.named)
        if not call.many:
            return encode(form_of(value))
        try:
            for item in value:
                self.channel.send(Kind.ITEM, item)
        finally:
            value.close()
        return encode(None)


__all__ = ["CONNECTIONS_MAX", "GREETING_TIMEOUT_S", "PROTOCOL", "Listener"]
