"""Frames over a Unix socket: a length, a kind, a body. And where that socket is.

4 bytes  length of the body, big-endian
1 byte   kind
n bytes  MessagePack, as the kind says
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from pathlib import Path

from kalamdb.storage.directory import SOCKET_NAME

FRAME_BYTES_MAX = (1 << 30) + (64 << 20)
"""Bytes of a body; a result may have 1 GiB (limits.result_bytes_max) unless it is streamed."""
_HEAD = struct.Struct(">IB")
_CHUNK_BYTES = 1 << 16
_PIECE_BYTES = 1 << 20
_ADDRESS_BYTES_MAX = 100
"""Of the path of a socket: the system allows 107 on Linux, 103 on macOS."""
_CREDENTIALS = struct.Struct("3i")


class Kind(IntEnum):
    """What the body of a frame is."""

    HELLO = 1
    """Both sides: who speaks, in which version."""
    REQUEST = 2
    """To the holder: one call."""
    VALUE = 3
    """The end of a call: what it returned."""
    ERROR = 4
    """The end of a call, or of a greeting: what was raised."""
    ITEM = 5
    """One of many values of a call."""


class Lost(Exception):
    """The other side is gone, or did not keep to the form; the channel is of no use any more."""


class Channel:
    """A connection. One thread sends and receives at a time; `abort` and `is_open` may be called from others."""

    def __init__(self, connected: socket.socket, *, body_bytes_max: int = FRAME_BYTES_MAX) -> None:
        self._socket = connected
        self._left = b""
        self.body_bytes_max = body_bytes_max
        _sockets.add(connected)

    def limit(self, timeout_s: float | None) -> None:
        """How long `send` and `receive` wait for the other side from now on; None for ever. They raise TimeoutError."""
        self._socket.settimeout(timeout_s)

    def send(self, kind: Kind, body: bytes) -> None:
        """Send a frame. Blocks while the other side does not read. Raises Lost: it did not get the whole frame."""
        head = _HEAD.pack(len(body), kind)
        try:
            if len(body) < _CHUNK_BYTES:
                self._socket.sendall(head + body)
            else:
                self._socket.sendall(head)
                self._socket.sendall(body)
        except TimeoutError:
            raise
        except OSError as exc:
            raise Lost(str(exc)) from exc

    def receive(self) -> tuple[Kind, memoryview]:
        """The next frame. Raises Lost at the end of the connection and for what is not a frame."""
        data = self._left or self._some(_CHUNK_BYTES)
        while len(data) < _HEAD.size:
            data += self._some(_CHUNK_BYTES)
        length, number = _HEAD.unpack_from(data)
        if length > self.body_bytes_max:
            raise Lost(f"a frame has {length} bytes, at most {self.body_bytes_max} are allowed")
        try:
            kind = Kind(number)
        except ValueError:
            raise Lost(f"a frame is of the unknown kind {number}") from None
        end = _HEAD.size + length
        if len(data) < end:
            pieces = [data]
            got = len(data)
            while got < end:
                pieces.append(self._some(min(end - got, _PIECE_BYTES)))
                got += len(pieces[-1])
            data = b"".join(pieces)
        self._left = data[end:]
        return kind, memoryview(data)[_HEAD.size : end]

    def _some(self, bytes_max: int) -> bytes:
        try:
            data = self._socket.recv(bytes_max)
        except TimeoutError:
            raise
        except OSError as exc:
            raise Lost(str(exc)) from exc
        if not data:
            raise Lost("the connection was closed")
        return data

    def is_open(self) -> bool:
        """Whether the other side is still there; without a limit only."""
        return bool(self._left) or self._peek() != b""

    def is_quiet(self) -> bool:
        """Whether the other side is there and has sent nothing that nobody asked for; without a limit only."""
        return not self._left and self._peek() is None

    def _peek(self) -> bytes | None:
        """The next byte without taking it: none at the end of the connection, None when there is nothing yet."""
        try:
            return self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def peer_uid(self) -> int | None:
        """User id of the other process, None where the system does not tell."""
        if not sys.platform.startswith("linux"):
            return None
        raw = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return int(_CREDENTIALS.unpack(raw)[1])

    def abort(self) -> None:
        """Cut the connection: whoever waits on either side is told at once. Does not block. Idempotent."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Cut the connection and let go of it. Idempotent."""
        self.abort()
        self._socket.close()


_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _after_fork() -> None:
    # A child that kept the descriptors would keep the connections of its parent alive after its death.
    for one in list(_sockets):
        one.close()


os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def _address(directory: Path) -> Iterator[str]:
    """The path of the socket, by way of a short link where the system would not take it."""
    plain = str(directory / SOCKET_NAME)
    if len(os.fsencode(plain)) <= _ADDRESS_BYTES_MAX:
        yield plain
        return
    folder = tempfile.mkdtemp(prefix="kalamdb-")
    try:
        link = os.path.join(folder, "d")
        os.symlink(directory, link, target_is_directory=True)
        yield os.path.join(link, SOCKET_NAME)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def listen(directory: Path) -> socket.socket:
    """The socket of a directory that this process holds; only its own user may connect. Raises OSError."""
    (directory / SOCKET_NAME).unlink(missing_ok=True)
    opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _address(directory) as address:
            opened.bind(address)
        # Nobody can connect before `listen`, so nobody comes in by the mode that the umask gave.
        (directory / SOCKET_NAME).chmod(0o600)
        opened.listen(socket.SOMAXCONN)
    except BaseException:
        opened.close()
        raise
    _sockets.add(opened)
    return opened


def dial(directory: Path, timeout_s: float) -> Channel | None:
    """A connection to the process that listens in a directory; None when none does."""
    opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    opened.settimeout(timeout_s)
    try:
        with _address(directory) as address:
            opened.connect(address)
    except (FileNotFoundError, ConnectionRefusedError, BlockingIOError, TimeoutError):
        opened.close()
        return None
    except BaseException:
        opened.close()
        raise
    return Channel(opened)


class Turn:
    """Whether a connection is doing something, and whether it is to end after that."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_busy = False
        self._is_ending = False

    def begin(self) -> bool:
        """A call begins; False when no more are to be begun."""
        with self._lock:
            self._is_busy = not self._is_ending
            return self._is_busy

    def done(self) -> bool:
        """The call is over; whether another one may follow."""
        with self._lock:
            self._is_busy = False
            return not self._is_ending

    def end(self) -> bool:
        """Begin no more calls; whether one is going on."""
        with self._lock:
            self._is_ending = True
            return self._is_busy


__all__ = ["FRAME_BYTES_MAX", "Channel", "Kind", "Lost", "Turn", "dial", "listen"]
