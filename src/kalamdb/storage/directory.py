"""The data directory: who may open it, what format it has, which generation is current.

FORMAT   format version and database uid, written last when a directory is made
LOCK     flock of the process that holds the directory
CURRENT  name of the generation: gen-N/rocksdb, gen-N/segments

A restore makes a further generation beside the current one. Where it comes from, and the database uid that
it gives the directory, stand in gen-N/ORIGIN: so the one rename of CURRENT decides about everything.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
import threading
import weakref
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from kalamdb.clock import Clock
from kalamdb.errors import Corrupt, DirectoryLocked, InvalidRequest, Unavailable
from kalamdb.files import FileOps, LocalFiles

FORMAT_VERSION = 1
_FORMAT, _LOCK, _CURRENT, _ORIGIN = "FORMAT", "LOCK", "CURRENT", "ORIGIN"
_UNFINISHED = f".{_FORMAT}.new"
"""FORMAT until the directory is made. It comes first, so data without either is a directory that lost its FORMAT."""
_FIRST_GENERATION = "gen-1"
_GENERATION = re.compile(r"gen-([1-9][0-9]*)\Z")
SOCKET_NAME = "kalamdb.sock"
"""Where the holder listens for processes that attach."""
_OURS = frozenset({_LOCK, SOCKET_NAME, _CURRENT, _FIRST_GENERATION, "logs", f".{_FORMAT}.tmp", f".{_CURRENT}.tmp"})
"""What a creation that was cut short may have left."""


class _Format(msgspec.Struct, frozen=True):
    format_version: int
    database_uid: str
    created_at: int


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """Where a restored generation comes from."""

    database_uid: str
    """Uid of the restored database: a new one."""
    lineage: tuple[str, ...] = ()
    """Uids of the databases that it descends from, the nearest first."""
    previous: str | None = None
    """The generation that it replaced; kept until this one has passed a check."""
    backup: str
    """Where the backup lay."""
    backup_id: str
    backup_job: str | None = None
    """Job that made the backup: in the backup itself it still runs."""
    backup_message: str = ""
    snapshot_seq: int
    restored_at: int
    resume_jobs: bool = False
    restore_job: dict[str, Any] | None = None
    """Columns of the job that restored it: job_id, parameters, queue, times."""


class _Holder(msgspec.Struct, frozen=True):
    pid: int
    host: str
    started_at: int
    shares: bool = False


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


class Generations:
    """The generations of a held directory. Every step on files goes through `files`."""

    def __init__(self, path: Path, files: LocalFiles) -> None:
        self.path = path
        self._files = files

    def names(self) -> list[str]:
        """All of them, the oldest first."""
        found = [match for path in self.path.iterdir() if path.is_dir() and (match := _GENERATION.match(path.name))]
        return [match.group(0) for match in sorted(found, key=lambda match: int(match.group(1)))]

    def next(self) -> Generation:
        """A name that none has; its folder is not made yet."""
        names = self.names()
        name = f"gen-{int(names[-1].removeprefix('gen-')) + 1}" if names else _FIRST_GENERATION
        return Generation(name, self.path / name)

    def seal(self, generation: Generation, origin: Origin) -> None:
        """Say where a new generation comes from; all its files are on disk by now."""
        self._files.replace(generation.path / _ORIGIN, _checked_body(msgspec.json.encode(origin)))

    def origin(self, generation: Generation) -> Origin | None:
        """Where a generation comes from; None when no restore made it. Raises Corrupt."""
        path = generation.path / _ORIGIN
        if not path.exists():
            return None
        try:
            return msgspec.json.decode(_read_checked(path), type=Origin)
        except msgspec.DecodeError as exc:
            raise Corrupt(f"'{path}' is damaged: {exc}; restore the directory from a backup") from exc

    def switch(self, generation: Generation) -> None:
        """Make it the current one, by one rename; durable on return."""
        self._files.replace(self.path / _CURRENT, _checked_body(generation.name.encode()))

    def discard(self, name: str) -> None:
        """Remove a generation that is not the current one."""
        self._files.remove_tree(self.path / name)


class DataDirectory:
    """A held data directory. Make one by `open`; `close` releases it last of all."""

    def __init__(self, path: Path, lock: int, found: _Format, files: LocalFiles, created: bool) -> None:
        self.path = path
        self.is_new = created
        self.generations = Generations(path, files)
        self.generation = _read_current(path)
        self.origin = self.generations.origin(self.generation)
        """Where the current generation comes from, when a restore made it."""
        self._format_uid = found.database_uid
        self._lock = lock
        self._pid = os.getpid()
        self._closing = threading.Lock()
        _open_directories.add(self)

    @property
    def database_uid(self) -> str:
        """Names the database; a restored one has a new uid."""
        return self._format_uid if self.origin is None else self.origin.database_uid

    @staticmethod
    def open(
        path: Path, clock: Clock, operations: FileOps | None = None, *, create: bool = True, shares: bool = False
    ) -> DataDirectory:
        """Hold the directory, making it when there is none. `shares` tells others that they will be able to attach.

        Raises DirectoryLocked (with the holder's pid), InvalidRequest for a folder that is not ours or
        of a newer format, Corrupt, Unavailable. A refused folder is left as it was.
        """
        path = path.absolute()
        try:
            _refuse_stranger(path, create)
            path.mkdir(parents=True, exist_ok=True)
            lock = _take_lock(path, clock, shares)
        except OSError as exc:
            raise Unavailable(f"data directory '{path}' cannot be opened: {exc.strerror}; check its rights") from exc
        try:
            created = not (path / _FORMAT).exists()
            if created:
                _refuse_headless(path)
                _create(path, clock)
            return DataDirectory(path, lock, _read_format(path), LocalFiles(path, operations), created)
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

    def switch(self, generation: Generation) -> None:
        """Make another generation the current one, by one rename; its store is opened after that."""
        self.generations.switch(generation)
        self.generation, self.origin = generation, self.generations.origin(generation)

    def remove_strays(self) -> None:
        """Remove what restores that were cut short left: all but the current generation and the one before a
        restore."""
        kept = {self.generation.name, self.origin.previous if self.origin is not None else None}
        for name in self.generations.names():
            if name not in kept:
                self.generations.discard(name)

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


@contextmanager
def held_for_restore(path: Path, clock: Clock, files: LocalFiles, *, overwrite: bool) -> Iterator[Generations]:
    """Hold a directory whose database is replaced from outside, even a damaged one, or make one.

    Raises InvalidRequest for one that is not empty unless `overwrite`, and for one that is not ours;
    DirectoryLocked, Unavailable.
    """
    path = path.absolute()
    _refuse_restore(path, overwrite)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = _take_lock(path, clock)
    except OSError as exc:
        raise Unavailable(f"data directory '{path}' cannot be opened: {exc.strerror}; check its rights") from exc
    try:
        yield Generations(path, files)
    finally:
        _release(lock)


def _refuse_restore(path: Path, overwrite: bool) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise InvalidRequest(f"'{path}' is not a directory")
    names = sorted(entry.name for entry in path.iterdir() if entry.name != _LOCK)
    if not names:
        return
    if not overwrite:
        raise InvalidRequest(
            f"'{path}' is not empty: it holds '{names[0]}'; choose another path, or pass overwrite=True to replace the "
            "database in it"
        )
    if not any(name in (_FORMAT, _CURRENT) or _GENERATION.match(name) for name in names):
        raise InvalidRequest(f"'{path}' holds '{names[0]}' and no database; choose an empty directory")
    with suppress(Corrupt):
        _read_format(path)


def replaced_name(path: Path) -> str | None:
    """The generation that a restore replaces; None when there is none that can be read."""
    if not (path / _FORMAT).exists():
        return None
    try:
        return _read_current(path).name
    except (Corrupt, OSError):
        return None


def publish_restored(generations: Generations, generation: Generation, origin: Origin, files: LocalFiles) -> None:
    """Make a restored generation the database of a directory held by `held_for_restore`; durable on return.

    One rename decides: that of CURRENT, or that of FORMAT where there was no readable one.
    """
    path = generations.path
    is_readable = False
    if (path / _FORMAT).exists():
        with suppress(Corrupt):
            _read_format(path)
            is_readable = True
    generations.switch(generation)
    if not is_readable:
        found = _Format(FORMAT_VERSION, origin.database_uid, origin.restored_at)
        files.replace(path / _FORMAT, _checked_body(msgspec.json.encode(found)))


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


def _take_lock(path: Path, clock: Clock, shares: bool = False) -> int:
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
    holder = _Holder(os.getpid(), socket.gethostname(), clock.now_ms(), shares)
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


def lock_holder(path: Path) -> int | None:
    """The process that holds a directory, as far as LOCK tells; None when nobody does."""
    holder = _read_holder(path)
    return None if holder is None or _is_gone(holder) else holder.pid


def may_answer(path: Path) -> bool:
    """Whether it is worth waiting for the process that holds a directory: it shares it, or it is only just taking or
    leaving it, so that nobody can tell."""
    holder = _read_holder(path)
    return holder is None or holder.shares or _is_gone(holder)


def _read_holder(path: Path) -> _Holder | None:
    try:
        return msgspec.json.decode((path / _LOCK).read_bytes(), type=_Holder)
    except (OSError, msgspec.DecodeError):
        return None


def _is_gone(holder: _Holder) -> bool:
    return holder.host == socket.gethostname() and not _is_alive(holder.pid)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _release(lock: int) -> None:
    # Whoever reads it now learns that nobody holds the directory, instead of who did.
    os.ftruncate(lock, 0)
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


def _checked_body(body: bytes) -> bytes:
    return body + f"\n{zlib.crc32(body):08x}\n".encode()


def _replace(path: Path, body: bytes) -> None:
    temporary = path.with_name(f".{path.name.lstrip('.')}.tmp")
    with temporary.open("wb") as file:
        file.write(_checked_body(body))
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


__all__ = [
    "FORMAT_VERSION",
    "SOCKET_NAME",
    "DataDirectory",
    "Generation",
    "Generations",
    "Origin",
    "replaced_name",
    "held_for_restore",
    "lock_holder",
    "may_answer",
    "publish_restored",
]
