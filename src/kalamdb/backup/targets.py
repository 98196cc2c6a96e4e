"""Where backups lie: a directory, or an object store through obstore.

A target is a flat set of paths "<backup id>/<file>". What a path holds is written once and never changed,
so a later backup may share it: by a hard link in a directory, by a copy inside the store elsewhere.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from kalamdb.errors import InvalidRequest, Unavailable
from kalamdb.files import FileOps, LocalFiles, system_folder_of

_CHUNK_BYTES = 1 << 22
_PART_BYTES = 8 << 20
_PATH_LENGTH_MAX = 4096
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_OBJECT_SCHEMES = frozenset({"s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "memory"})


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a target."""

    path: str
    size_bytes: int
    modified_ms: int


class Target(Protocol):
    """A place for backups. Paths are relative to it, with '/'."""

    name: str
    """How messages and tables spell it."""

    def where(self, path: str) -> str:
        """How messages spell a path of it."""
        ...

    def put(self, path: str, chunks: Iterable[bytes]) -> None:
        """Write a new file, durable on return; nothing of it stays when `chunks` raises. Raises Unavailable."""
        ...

    def publish(self, path: str, body: bytes) -> None:
        """Write a small file in one step, durable on return: it is there whole or not at all. Raises Unavailable."""
        ...

    def reuse(self, source: str, path: str, sha256: str) -> bool:
        """Let `path` be what `source` is, without sending its bytes; False when that cannot be done."""
        ...

    def read(self, path: str) -> Iterator[bytes]:
        """The bytes of a file. Raises FileNotFoundError, Unavailable."""
        ...

    def folders(self) -> list[str]:
        """First parts of all paths, sorted; none when the target does not exist yet."""
        ...

    def files(self, folder: str) -> list[StoredFile]:
        """All files below a folder."""
        ...

    def unlink(self, path: str) -> None:
        """Remove a file; fine when there is none."""
        ...

    def remove(self, folder: str) -> None:
        """Remove all files below a folder."""
        ...


class DirectoryTarget:
    """A directory of a local filesystem. Everything is fsynced."""

    def __init__(self, path: Path, files: LocalFiles) -> None:
        self.path = path
        self.name = str(path)
        self._files = files

    def where(self, path: str) -> str:
        return str(self.path / path)

    def put(self, path: str, chunks: Iterable[bytes]) -> None:
        with self._files.create(self.path / path) as file:
            for chunk in chunks:
                file.write(chunk)

    def publish(self, path: str, body: bytes) -> None:
        self._files.replace(self.path / path, body)

    def reuse(self, source: str, path: str, sha256: str) -> bool:
        if not self._files.link(self.path / source, self.path / path):
            return False
        # The older backup may be damaged: this one must not begin so.
        if digest_of(self.read(path)) == sha256:
            return True
        self._files.unlink(self.path / path)
        return False

    def read(self, path: str) -> Iterator[bytes]:
        try:
            with (self.path / path).open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    yield chunk
        except FileNotFoundError:
            raise
        except OSError as exc:
            raise Unavailable(f"'{self.where(path)}' cannot be read: {exc.strerror}; check the disk") from exc

    def folders(self) -> list[str]:
        return sorted(path.name for path in self._files.folders(self.path, depth=1))

    def files(self, folder: str) -> list[StoredFile]:
        found = []
        for path in sorted((self.path / folder).rglob("*")):
            if path.is_file():
                state = path.stat()
                name = path.relative_to(self.path).as_posix()
                found.append(StoredFile(name, state.st_size, state.st_mtime_ns // 1_000_000))
        return found

    def unlink(self, path: str) -> None:
        self._files.unlink(self.path / path)

    def remove(self, folder: str) -> None:
        self._files.remove_tree(self.path / folder)


class ObjectTarget:
    """A prefix of an object store. An object is there whole or not at all."""

    def __init__(self, name: str, store: Any) -> None:
        self.name = name.rstrip("/") if not name.endswith("://") else name
        self._store = store

    def where(self, path: str) -> str:
        return f"{self.name.rstrip('/')}/{path}" if not self.name.endswith("://") else self.name + path

    def put(self, path: str, chunks: Iterable[bytes]) -> None:
        import obstore

        with self._translated(path):
            obstore.put(self._store, path, iter(chunks), chunk_size=_PART_BYTES)

    def publish(self, path: str, body: bytes) -> None:
        self.put(path, [body])

    def reuse(self, source: str, path: str, sha256: str) -> bool:
        import obstore

        with self._translated(path):
            try:
                obstore.copy(self._store, source, path)
            except FileNotFoundError:
                return False
            return True

    def read(self, path: str) -> Iterator[bytes]:
        import obstore

        with self._translated(path):
            for chunk in obstore.get(self._store, path).stream(min_chunk_size=_CHUNK_BYTES):
                yield bytes(chunk)

    def folders(self) -> list[str]:
        import obstore

        with self._translated(""):
            found = obstore.list_with_delimiter(self._store)
            return sorted(str(prefix).rstrip("/").rsplit("/", 1)[-1] for prefix in found["common_prefixes"])

    def files(self, folder: str) -> list[StoredFile]:
        import obstore

        with self._translated(folder):
            return [
                StoredFile(one["path"], one["size"], int(one["last_modified"].timestamp() * 1000))
                for chunk in obstore.list(self._store, folder)
                for one in chunk
            ]

    def unlink(self, path: str) -> None:
        import obstore

        with self._translated(path):
            try:
                obstore.delete(self._store, path)
            except FileNotFoundError:
                return

    def remove(self, folder: str) -> None:
        import obstore

        paths = [one.path for one in self.files(folder)]
        with self._translated(folder):
            if paths:
                obstore.delete(self._store, paths)

    @contextmanager
    def _translated(self, path: str) -> Iterator[None]:
        from obstore.exceptions import BaseError

        try:
            yield
        except FileNotFoundError:
            raise
        except (BaseError, OSError) as exc:
            reason = str(exc).partition("\n")[0]
            raise Unavailable(
                f"the object store refuses '{self.where(path)}': {reason}; check its address and credentials"
            ) from exc


class Targets:
    """Opens targets by their text. Stores of memory:// live as long as this object."""

    def __init__(self, operations: FileOps | None = None, *, data_directory: Path | None = None) -> None:
        self._operations = operations
        self._data_directory = data_directory
        self._memory: dict[str, Any] = {}
        self._lock = threading.Lock()

    def open(self, text: str) -> Target:
        """The target that `text` names. Raises InvalidRequest for one that may not be used."""
        local = self.check(text)
        if local is not None:
            return DirectoryTarget(local, LocalFiles.below(local, self._operations))
        return ObjectTarget(text, self._object_store(text))

    def check(self, text: str) -> Path | None:
        """The directory that `text` names, None for an object store. Raises InvalidRequest."""
        if not isinstance(text, str) or not text.strip():
            raise InvalidRequest("Backup path cannot be empty")
        if "\0" in text:
            raise InvalidRequest("Backup path must not contain a NUL character")
        if len(text) > _PATH_LENGTH_MAX:
            raise InvalidRequest(f"Backup path has {len(text)} characters, at most {_PATH_LENGTH_MAX} are allowed")
        if ".." in re.split(r"[/\\]", unquote(text)):
            raise InvalidRequest(f"Backup path '{text}' must not contain '..'")
        scheme = _SCHEME.match(text)
        if scheme is not None and scheme.group(1).lower() != "file":
            if scheme.group(1).lower() not in _OBJECT_SCHEMES:
                raise InvalidRequest(
                    f"Backup path '{text}' is of unknown scheme '{scheme.group(1)}'; "
                    f"a directory, file, {', '.join(sorted(_OBJECT_SCHEMES))} are known"
                )
            return None
        path = Path(os.path.abspath(unquote(urlsplit(text).path) if scheme is not None else text))
        self._refuse(text, path)
        return path

    def _refuse(self, text: str, path: Path) -> None:
        real = path.resolve()
        folder = system_folder_of(text, path)
        if folder is not None:
            raise InvalidRequest(f"Backup path '{text}' lies in the system directory {folder}")
        if real == Path(real.anchor):
            raise InvalidRequest(f"Backup path '{text}' is the root of the filesystem; choose a directory in it")

    def check_destination(self, text: str) -> None:
        """Refuse also what a backup may not be written to. Raises InvalidRequest."""
        local = self.check(text)
        if local is None or self._data_directory is None:
            return
        home, real = self._data_directory.resolve(), local.resolve()
        if real == home or home in real.parents:
            raise InvalidRequest(
                f"Backup path '{text}' lies inside the data directory '{self._data_directory}'; choose one outside it"
            )

    def _object_store(self, text: str) -> Any:
        from obstore.exceptions import BaseError
        from obstore.store import MemoryStore, from_url

        if text.lower().startswith("memory:"):
            with self._lock:
                return self._memory.setdefault(text.rstrip("/").lower(), MemoryStore())
        try:
            return from_url(text)
        except (BaseError, ValueError) as exc:
            raise InvalidRequest(
                f"Backup path '{text}' cannot be used: {str(exc).partition(chr(10))[0]}; object stores take their "
                "credentials from the environment"
            ) from exc


def job_path(text: str) -> str:
    """The path as parameters of a job keep it: it means the same in whatever directory a later process runs."""
    return text if _SCHEME.match(text) else os.path.abspath(text)


def digest_of(chunks: Iterable[bytes]) -> str:
    """SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


__all__ = ["DirectoryTarget", "ObjectTarget", "StoredFile", "Target", "Targets", "digest_of", "job_path"]
