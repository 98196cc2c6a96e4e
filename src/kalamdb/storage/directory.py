"""The data directory: who may open it, what format it has, which generation is current.

FORMAT   format version and database uid, written last when a directory is made
LOCK     flock of the process that holds the directory
CURRENT  name of the generation: gen-N/rocksdb, gen-N/segments
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import threading
import weakref
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from kalamdb.clock import Clock
from kalamdb.errors import Corrupt, DirectoryLocked, InvalidRequest, Unavailable

FORMAT_VERSION = 1
_FORMAT, _LOCK, _CURRENT = "FORMAT", "LOCK", "CURRENT"
_UNFINISHED = f".{_FORMAT}.new"
"""FORMAT until the directory is made. It comes first, so data without either is a directory that lost its FORMAT."""
_FIRST_GENERATION = "gen-1"
_OURS = frozenset({_LOCK, _CURRENT, _FIRST_GENERATION, "logs", f".{_FORMAT}.tmp", f".{_CURRENT}.tmp"})
"""What a creation that was cut short may have left."""


class _Format(msgspec.Struct, frozen=True):
    format_version: int
    database_uid: str
    created_at: int


class _Holder(msgspec.Struct, frozen=True):
    pid: int
    host: str
    started_at: int


@dataclass(frozen=True, slots=True)
class Generation:
    """One copy of the data; only a restore makes a second one."""

    name: str
    path: Path

    @property
    def rocksdb(self) -> Path:
        """Folder of the key-value store."""
        return self.path / "rocksdb"

    @property
    def segments(self) -> Path:
        """Folder of the cold files."""
        return self.path / "segments"


class DataDirectory:
    """A held data directory. Make one by `open`; `close` releases it last of all."""

    def __init__(self, path: Path, lock: int, found: _Format, generation: Generation, created: bool) -> None:
        self.path = path
        self.database_uid = found.database_uid
        self.generation = generation
        self.is_new = created
        self._lock = lock
        self._pid = os.getpid()
        self._closing = threading.Lock()
        _open_directories.add(self)

    @staticmethod
    def open(path: Path, clock: Clock, *, create: bool = True) -> DataDirectory:
        """Hold the directory, making it when there is none.

        Raises DirectoryLocked (with the holder's pid), InvalidRequest for a folder that is not ours or
        of a newer format, Corrupt, Unavailable. A refused folder is left as it was.
        """
        path = path.absolute()
        try:
            _refuse_stranger(path, create)
            path.mkdir(parents=True, exist_ok=True)
            lock = _take_lock(path, clock)
        except OSError as exc:
            raise Unavailable(f"data directory '{path}' cannot be opened: {exc.strerror}; check its rights") from exc
        try:
            created = not (path / _FORMAT).exists()
            if created:
                _refuse_headless(path)
                _create(path, clock)
            found = _read_format(path)
            return DataDirectory(path, lock, found, _read_current(path), created)
        except OSError as exc:
            _release(lock)
            raise Unavailable(f"data directory '{path}' cannot be opened: {exc.strerror}; check its rights") from exc
        except BaseException:
            _release(lock)
            raise

    def finish_creation(self) -> None:
        """Make all of it durable, then name FORMAT: from now on the directory counts as made."""
        if self.is_new:
            _sync_folder(self.generation.path)
            with suppress(PermissionError):
                _sync_folder(self.path.parent)
            (self.path / _UNFINISHED).replace(self.path / _FORMAT)
            _sync_folder(self.path)

    def close(self) -> None:
        """Release the directory. Idempotent."""
        with self._closing:
            lock, self._lock = self._lock, -1
        if lock >= 0 and os.getpid() == self._pid:
            _release(lock)
        _open_directories.discard(self)

    def close_in_child(self) -> None:
        """Drop the descriptor in a fork child without releasing the parent's lock."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


_open_directories: weakref.WeakSet[DataDirectory] = weakref.WeakSet()


def _after_fork() -> None:
    for directory in list(_open_directories):
        directory.close_in_child()


os.register_at_fork(after_in_child=_after_fork)


def _refuse_stranger(path: Path, create: bool) -> None:
    if not path.exists():
        if not create:
            raise InvalidRequest(f"there is no data directory '{path}'")
        return
    if not path.is_dir():
        raise InvalidRequest(f"'{path}' is not a directory")
    if (path / _FORMAT).exists():
        return
    strangers = sorted(
        entry.name for entry in path.iterdir() if entry.name not in _OURS and not entry.name.startswith(f".{_FORMAT}")
    )
    if strangers:
        raise InvalidRequest(
            f"'{path}' holds '{strangers[0]}' and no FORMAT file: it is not a KalamDB directory; choose an empty one"
        )


def _take_lock(path: Path, clock: Clock) -> int:
    descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raw = os.read(descriptor, 4096)
        os.close(descriptor)
        raise _locked(path, raw) from None
    except OSError:
        os.close(descriptor)
        raise
    holder = _Holder(os.getpid(), socket.gethostname(), clock.now_ms())
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, msgspec.json.encode(holder), 0)
    return descriptor


def _locked(path: Path, raw: bytes) -> DirectoryLocked:
    try:
        pid: int | None = msgspec.json.decode(raw, type=_Holder).pid
    except msgspec.DecodeError:
        pid = None
    who = f"process {pid}" if pid is not None else "another process"
    if pid == os.getpid():
        who = f"this process ({pid})"
    return DirectoryLocked(
        f"data directory '{path}' is held by {who}; close it there, or open it there with share=True "
        "or by `kalamdb serve` so that others can attach",
        pid,
    )


def _release(lock: int) -> None:
    fcntl.flock(lock, fcntl.LOCK_UN)
    os.close(lock)


def _refuse_headless(path: Path) -> None:
    """Raise Corrupt for a directory that was made and lost its FORMAT: to make it anew would delete its data."""
    if not (path / _UNFINISHED).exists() and ((path / _CURRENT).exists() or (path / _FIRST_GENERATION).exists()):
        raise Corrupt(f"'{path / _FORMAT}' is missing; restore the directory from a backup")


def _create(path: Path, clock: Clock) -> None:
    """Start anew whatever an earlier creation left; nothing in it was ever acknowledged."""
    found = _Format(FORMAT_VERSION, clock.random_bytes(8).hex(), clock.now_ms())
    _replace(path / _UNFINISHED, msgspec.json.encode(found))
    shutil.rmtree(path / _FIRST_GENERATION, ignore_errors=True)
    (path / _FIRST_GENERATION / "segments").mkdir(parents=True)
    _replace(path / _CURRENT, _FIRST_GENERATION.encode())


def _read_format(path: Path) -> _Format:
    target = path / _FORMAT
    if not target.exists():
        target = path / _UNFINISHED
    try:
        found = msgspec.json.decode(_read_checked(target), type=_Format)
    except msgspec.DecodeError as exc:
        raise Corrupt(f"'{target}' is damaged: {exc}; restore the directory from a backup") from exc
    if found.format_version > FORMAT_VERSION:
        raise InvalidRequest(
            f"'{path}' has format {found.format_version}, this version reads up to "
            f"{FORMAT_VERSION}; install a newer KalamDB"
        )
    return found


def _read_current(path: Path) -> Generation:
    name = _read_checked(path / _CURRENT).decode()
    generation = Generation(name, path / name)
    if not generation.path.is_dir():
        raise Corrupt(f"'{path / _CURRENT}' names '{name}', which does not exist; restore the directory from a backup")
    return generation


def _read_checked(path: Path) -> bytes:
    """Body of a file whose second line is the CRC-32 of the first. Raises Corrupt."""
    try:
        body, _, tail = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        raise Corrupt(f"'{path}' is missing; restore the directory from a backup") from None
    if tail != f"{zlib.crc32(body):08x}\n".encode():
        raise Corrupt(f"'{path}' is damaged: its checksum does not match; restore the directory from a backup")
    return body


def _replace(path: Path, body: bytes) -> None:
    temporary = path.with_name(f".{path.name.lstrip('.')}.tmp")
    with temporary.open("wb") as file:
        file.write(body + f"\n{zlib.crc32(body):08x}\n".encode())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


__all__ = ["DataDirectory", "Generation"]
