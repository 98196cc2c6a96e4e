"""The side of an attached process: connections to the process that holds the directory, one per call that runs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from kalamdb.errors import Closed, Corrupt, Denied, Timeout, Unavailable
from kalamdb.jobs import Job
from kalamdb.result import Result
from kalamdb.service import GiveUp
from kalamdb.sharing.calls import CALLS
from kalamdb.sharing.channel import Channel, Kind, Lost, dial
from kalamdb.sharing.listener import GREETING_TIMEOUT_S, PROTOCOL
from kalamdb.sharing.values import Hello, encode, error_of, request_bytes, result_of
from kalamdb.storage.jobs import JobRow
from kalamdb.version import VERSION

IDLE_MAX = 8
"""Connections that are kept for later calls."""
_GRACE_S = 2.0
"""How much longer than its own deadline a call may keep us waiting."""
_decoders: dict[str, msgspec.msgpack.Decoder[Any]] = {
    name: msgspec.msgpack.Decoder(call.returns) for name, call in CALLS.items() if call.returns is not Result
}


View = Callable[[JobRow], Job]
"""Makes of a stored row the job that users see."""


class Gone(Exception):
    """Nobody answers, and nothing was done: the call may be made elsewhere."""


class Line:
    """One connection as a call uses it. One thread at a time."""

    def __init__(self, channel: Channel, pid: int, view: View) -> None:
        self._channel = channel
        self._view = view
        self._lock = threading.Lock()
        self._is_owed = False
        """Whether a call was sent and its answer has not come yet."""
        self.pid = pid
        self.is_usable = True

    def is_quiet(self) -> bool:
        """Whether a call may begin on it."""
        return self.is_usable and self._channel.is_quiet()

    def abort(self) -> None:
        """End the call that runs; does not block."""
        self.is_usable = False
        self._channel.abort()

    def close(self) -> None:
        """Let go of it."""
        self.is_usable = False
        self._channel.close()

    def call(self, name: str, *args: Any, timeout_s: float | None = None, **named: Any) -> Any:
        """Make a call and wait for its value.

        Raises what it raised, Gone, and Unavailable when the answer is lost. Whatever interrupts it, as Ctrl-C does,
        closes the connection, which ends the call there.
        """
        body = request_bytes(name, args, named)
        with self._lock, self._asking(name, timeout_s):
            self._send(body)
            return self._value(name, *self._receive(name))

    def items(self, name: str, *args: Any, timeout_s: float | None) -> Generator[memoryview, None, None]:
        """Make a call whose values come one by one. Who closes it early ends the call there."""
        body = request_bytes(name, args, {})
        with self._lock, self._asking(name, timeout_s):
            self._send(body)
            while True:
                kind, answer = self._receive(name)
                if kind is not Kind.ITEM:
                    self._value(name, kind, answer)
                    return
                yield answer

    @contextmanager
    def _asking(self, name: str, timeout_s: float | None) -> Iterator[None]:
        is_limited = isinstance(timeout_s, (int, float)) and timeout_s >= 0
        try:
            if is_limited and timeout_s is not None:
                self._channel.limit(timeout_s + _GRACE_S)
            yield
        except TimeoutError:
            raise Timeout(
                f"process {self.pid}, which holds the data directory, did not answer '{name}' within {_GRACE_S:g} s "
                "after the deadline; the outcome is unknown"
            ) from None
        finally:
            if self._is_owed:
                self.close()
            elif is_limited:
                self._channel.limit(None)

    def _send(self, body: bytes) -> None:
        if not self.is_usable:
            raise Unavailable("the connection was lost before; a transaction on it was rolled back")
        self._is_owed = True
        try:
            self._channel.send(Kind.REQUEST, body)
        except Lost as exc:
            raise Gone(str(exc)) from exc

    def _receive(self, name: str) -> tuple[Kind, memoryview]:
        try:
            kind, answer = self._channel.receive()
        except Lost as exc:
            raise Unavailable(
                f"the connection to process {self.pid}, which holds the data directory, was lost during '{name}' "
                f"({exc}); the outcome is unknown: look whether it was done, or repeat what may be done twice"
            ) from exc
        self._is_owed = kind is Kind.ITEM
        return kind, answer

    def _value(self, name: str, kind: Kind, answer: memoryview) -> Any:
        match kind:
            case Kind.VALUE:
                return result_of(answer) if CALLS[name].returns is Result else _decoders[name].decode(answer)
            case Kind.ERROR:
                raise error_of(answer, self._view)
            case _:
                self.close()
                raise Unavailable(f"process {self.pid} answered '{name}' with a frame of kind {kind.name}")


class Link:
    """All connections of one attached process."""

    def __init__(self, directory: Path, view: View, database_uid: str | None = None) -> None:
        self._directory = directory
        self._view = view
        self._lock = threading.Lock()
        self._idle: list[Line] = []
        self._in_use: set[Line] = set()
        self._is_closed = False
        self.database_uid = database_uid
        self.pid = 0

    def open(self) -> bool:
        """Make a first connection; False when nobody answers. Raises Unavailable, Denied, LimitExceeded."""
        try:
            self._put(self._take())
        except Gone:
            return False
        return True

    @contextmanager
    def line(self, given_up: GiveUp | None = None) -> Iterator[Line]:
        """A connection for one call, or for as many as belong together. Raises Gone."""
        line = self._take()
        try:
            if given_up is None:
                yield line
            else:
                with given_up.telling(line.abort):
                    yield line
        finally:
            self._put(line)

    def _take(self) -> Line:
        while True:
            with self._lock:
                line = self._idle.pop() if self._idle else None
            if line is None:
                line = self._connect()
            elif not line.is_quiet():
                line.close()
                continue
            with self._lock:
                self._in_use.add(line)
            return line

    def _put(self, line: Line) -> None:
        with self._lock:
            self._in_use.discard(line)
            if line.is_usable and not self._is_closed and len(self._idle) < IDLE_MAX:
                self._idle.append(line)
                return
        line.close()

    def _connect(self) -> Line:
        try:
            channel = dial(self._directory, GREETING_TIMEOUT_S)
        except OSError as exc:
            raise Unavailable(f"the socket of '{self._directory}' cannot be reached: {exc.strerror or exc}") from exc
        if channel is None:
            raise Gone("nobody listens")
        try:
            hello = self._greet(channel)
        except BaseException:
            channel.close()
            raise
        channel.limit(None)
        self.pid = hello.pid
        return Line(channel, hello.pid, self._view)

    def _greet(self, channel: Channel) -> Hello:
        uid = channel.peer_uid()
        if uid is not None and uid != os.geteuid():
            raise Denied(f"the socket of '{self._directory}' belongs to user {uid}; only the same user may attach")
        try:
            channel.send(Kind.HELLO, encode(Hello(PROTOCOL, VERSION, os.getpid())))
            kind, body = channel.receive()
        except (Lost, TimeoutError) as exc:
            raise Gone(str(exc)) from exc
        if kind is Kind.ERROR:
            raise error_of(body, self._view)
        try:
            hello = msgspec.msgpack.decode(body, type=Hello)
        except msgspec.DecodeError as exc:
            raise Corrupt(f"what answers at the socket of '{self._directory}' is no KalamDB: {exc}") from exc
        if self.database_uid not in (None, hello.database_uid):
            raise Closed(f"'{self._directory}' holds another database now: it was restored or made anew; connect again")
        self.database_uid = hello.database_uid
        return hello

    def close(self) -> None:
        """Close all connections; calls that run end with Unavailable. Idempotent."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
            in_use = list(self._in_use)
        for line in idle:
            line.close()
        for line in in_use:
            line.abort()


__all__ = ["Gone", "Line", "Link", "View"]
