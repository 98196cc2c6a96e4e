"""Files of the cold tier on a local filesystem: what is written is on disk before anybody names it.

Every operation goes through `FileOps`, so that a test can record the order of operations, make the
disk refuse, or stop the process between two of them.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from kalamdb.errors import Corrupt, Unavailable

_REASONS = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EFBIG: "the file would be larger than this process may write; raise its limit",
    errno.EACCES: "permission is denied; check the rights of the directory",
    errno.EPERM: "permission is denied; check the rights of the directory",
    errno.EROFS: "the filesystem is read-only; mount it writable",
    errno.EIO: "the disk reports an input/output error; check it",
}

_SYSTEM_FOLDERS = (
    "/etc", "/root", "/var/log", "/bin", "/boot", "/dev", "/lib", "/lib64", "/proc", "/sbin", "/sys", "/usr/bin",
    "/usr/lib", "/usr/sbin", "c:/windows",
)  # fmt: skip
_UNLINKABLE = frozenset({errno.ENOENT, errno.EXDEV, errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS})


_MAKE_ATTEMPTS = 3


def system_folder_of(text: str, path: Path) -> str | None:
    """The folder of the operating system that a path lies in, as it is spelled, absolute or resolved."""
    for one in (text.replace("\\", "/"), path.as_posix(), path.resolve().as_posix()):
        for folder in _SYSTEM_FOLDERS:
            if f"{one.lower()}/".startswith(f"{folder}/"):
                return folder
    return None


class FileOps:
    """The operations on files, one system call each."""

    def open_write(self, path: Path) -> BinaryIO:
        """A new file; it is an error when there is one already."""
        return path.open("xb")

    def fsync_file(self, file: BinaryIO, path: Path) -> None:
        """Make the file's bytes durable."""
        os.fsync(file.fileno())

    def fsync_dir(self, path: Path) -> None:
        """Make the names in a directory durable."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def mkdir(self, path: Path) -> None:
        """Make one directory."""
        path.mkdir()

    def rename(self, source: Path, target: Path) -> None:
        """Replace `target` by `source`."""
        source.replace(target)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name."""
        os.link(source, target)

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        path.unlink()

    def rmdir(self, path: Path) -> None:
        """Remove an empty directory."""
        path.rmdir()


class LocalFiles:
    """Files below `root`, a folder that is on disk. Errors of the disk become Unavailable with the remedy."""

    def __init__(self, root: Path, operations: FileOps | None = None) -> None:
        self._operations = operations or FileOps()
        self._roots = {root}
        self._synced = {root}
        """Folders whose name this process saw on disk. One that is there may be of a process that was killed
        before it synced it, and not outlive a power cut."""

    @staticmethod
    def below(path: Path, operations: FileOps | None = None) -> LocalFiles:
        """Files below a folder that may not be there yet."""
        while not path.is_dir() and path != path.parent:
            path = path.parent
        return LocalFiles(path, operations)

    @contextmanager
    def create(self, path: Path) -> Iterator[BinaryIO]:
        """A new file to write; its bytes and its name are on disk when the block ends, and it is gone when
        the block fails. Blocks for the disk. Raises Unavailable."""
        with _translated(path):
            self._make_parents(path.parent)
            file = self._operations.open_write(path)
        try:
            with _translated(path), file:
                yield file
                file.flush()
                self._operations.fsync_file(file, path)
            with _translated(path):
                self._operations.fsync_dir(path.parent)
        except BaseException:
            with suppress(OSError):
                self._operations.unlink(path)
            raise

    @staticmethod
    def temporary(path: Path) -> Path:
        """Where `replace` writes the new body first; a crash may leave it."""
        return path.with_name(f".{path.name}.tmp")

    def replace(self, path: Path, body: bytes) -> None:
        """Write a small file in one step: the old or the new body is there, whatever happens."""
        temporary = self.temporary(path)
        with _translated(path):
            self._make_parents(path.parent)
            with suppress(FileNotFoundError):
                self._operations.unlink(temporary)
            with self._operations.open_write(temporary) as file:
                file.write(body)
                file.flush()
                self._operations.fsync_file(file, temporary)
            self._operations.rename(temporary, path)
            self._operations.fsync_dir(path.parent)

    def _make_parents(self, folder: Path) -> None:
        for attempt in range(_MAKE_ATTEMPTS):
            try:
                self._make(folder)
                return
            except FileNotFoundError:
                # An empty parent was removed after the look: a dropped table of that name is cleaned up.
                if attempt == _MAKE_ATTEMPTS - 1:
                    raise

    def add_root(self, root: Path) -> None:
        """A further folder on disk, below which files are made. One that is gone is not made anew: it may be a
        disk that is not mounted."""
        self._roots.add(root)
        self._synced.add(root)

    def _make(self, folder: Path) -> None:
        if folder in self._roots and not folder.is_dir():
            raise FileNotFoundError(errno.ENOENT, "the directory is gone; is it mounted?", str(folder))
        if folder in self._synced and folder.exists():
            return
        self._make(folder.parent)
        if not folder.exists():
            with suppress(FileExistsError):
                self._operations.mkdir(folder)
        self._operations.fsync_dir(folder.parent)
        self._synced.add(folder)

    def check_size(self, path: Path, size_bytes: int) -> None:
        """Raise Corrupt unless the file has this size."""
        found = self.size(path)
        if found != size_bytes:
            raise Corrupt(f"'{path}' has {found} bytes after it was written, expected {size_bytes}")

    def size(self, path: Path) -> int:
        """Bytes of a file, 0 when there is none."""
        try:
            return path.stat().st_size
        except FileNotFoundError:
            return 0

    def unlink(self, path: Path) -> None:
        """Remove a file; fine when there is none. Raises Unavailable."""
        with _translated(path), suppress(FileNotFoundError):
            self._operations.unlink(path)

    def make_folder(self, folder: Path) -> None:
        """Make a folder and its parents, durable on return; fine when it is there. Raises Unavailable."""
        with _translated(folder):
            self._make_parents(folder)

    def link(self, source: Path, path: Path) -> bool:
        """Give a file that is never written again a second name, durable on return; False where the
        filesystem cannot, or `source` is gone. Raises Unavailable."""
        with _translated(path):
            self._make_parents(path.parent)
            try:
                self._operations.link(source, path)
            except OSError as exc:
                if exc.errno in _UNLINKABLE:
                    return False
                raise
            self._operations.fsync_dir(path.parent)
            return True

    def remove_tree(self, folder: Path) -> None:
        """Remove a folder with all that is in it; fine when there is none. Raises Unavailable."""
        with _translated(folder):
            if not folder.is_dir():
                return
            for path in sorted(folder.iterdir()):
                if path.is_dir() and not path.is_symlink():
                    self.remove_tree(path)
                else:
                    self._operations.unlink(path)
            self._operations.rmdir(folder)

    def names(self, folder: Path) -> list[Path]:
        """Files directly in a folder, by name; none when there is no such folder."""
        with _translated(folder):
            return sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []

    def folders(self, root: Path, *, depth: int) -> list[Path]:
        """Folders exactly `depth` levels below `root`."""
        with _translated(root):
            return sorted(path for path in root.glob("/".join("*" * depth)) if path.is_dir())

    def remove_empty(self, folder: Path, *, stop: Path) -> None:
        """Remove a folder and its parents below `stop` as far as they are empty."""
        while folder != stop and stop in folder.parents:
            try:
                self._operations.rmdir(folder)
            except OSError:
                return
            self._synced.discard(folder)
            folder = folder.parent


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        reason = _REASONS.get(exc.errno or 0, exc.strerror or str(exc))
        raise Unavailable(f"'{path}' cannot be written: {reason}") from exc
