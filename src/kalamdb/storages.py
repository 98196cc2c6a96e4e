"""Storages: directories that the segments of tables lie in.

`local` is in the data directory and always there. A further one is a directory of a file system, marked as
this database's by a file in it, as two databases in one directory would remove each other's files. The mark
names the database's uid, and a restored database has another: its tables are all kept in its own directory,
and what lies in the storage stays the first database's.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import msgspec

from kalamdb.alter import check_name
from kalamdb.clock import Clock
from kalamdb.errors import Conflict, InvalidRequest, KalamDbError, NotFound
from kalamdb.files import FileOps, LocalFiles, system_folder_of
from kalamdb.storage import (
    ABSENT,
    Batch,
    Commit,
    ExpectationFailed,
    RecordKind,
    RecordOp,
    StorageBackend,
    record_key,
    record_prefix,
)
from kalamdb.types import Seq

LOCAL: Final = "local"
MARK_NAME: Final = ".kalamdb-storage"
_SHARED_TEMPLATE: Final = "{namespace}/{tableName}"
_USER_TEMPLATE: Final = "{namespace}/{tableName}/{userId}"
_PROBE_NAME: Final = ".kalamdb-check"
_DEGRADED_MS: Final = 1000


class StorageKind(StrEnum):
    """What a storage is. The original knows more than are offered for tables."""

    FILESYSTEM = "filesystem"
    S3 = "s3"
    GCS = "gcs"
    AZURE = "azure"


class StorageDef(msgspec.Struct, frozen=True, kw_only=True):
    """A storage as stored."""

    storage_id: str
    name: str
    base_directory: str
    owner: str
    """Uid of the database whose files lie in it."""
    description: str | None = None
    kind: StorageKind = StorageKind.FILESYSTEM
    credentials: dict[str, Any] | None = None
    config: dict[str, Any] | None = None
    shared_tables_template: str = _SHARED_TEMPLATE
    user_tables_template: str = _USER_TEMPLATE
    created_at: int = 0
    updated_at: int = 0


class StorageStatus(StrEnum):
    """What STORAGE CHECK finds."""

    HEALTHY = "healthy"
    DEGRADED = "degraded"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageHealth:
    """What a check of a storage found."""

    status: StorageStatus
    readable: bool = False
    writable: bool = False
    listable: bool = False
    deletable: bool = False
    latency_ms: int = 0
    total_bytes: int | None = None
    used_bytes: int | None = None
    error: str | None = None
    tested_at: int = 0


class Storages:
    """All storages of a database. Thread-safe; changes are durable on return."""

    def __init__(
        self,
        backend: StorageBackend,
        clock: Clock,
        local: Path,
        *,
        database_uid: str,
        home: Path,
        operations: FileOps | None = None,
    ) -> None:
        self._backend = backend
        self._clock = clock
        self._local = local
        self._database_uid = database_uid
        self._home = home
        self._operations = operations
        self._known: dict[str, tuple[StorageDef, Seq]] = {}
        self.files = LocalFiles(local, operations)
        """Files of all storages."""
        self.membership = threading.Lock()
        """Held by who adds a storage, or a table to a storage or a namespace, and by who drops one of those."""

    def start(self) -> None:
        """Load what is stored and follow later commits."""
        self._backend.observe(self._on_commit)
        with self._backend.snapshot() as snapshot:
            for _, record in snapshot.scan_records(*record_prefix(RecordKind.STORAGE)):
                self._take(record.value, record.version)

    # Looking up

    def all(self) -> list[StorageDef]:
        """All storages, `local` first."""
        others = sorted(name for name in self._known if name != LOCAL)
        return [self.get(name) for name in (LOCAL, *others)]

    def get(self, storage_id: str) -> StorageDef:
        """One storage. Raises NotFound."""
        found = self._known.get(storage_id)
        if found is not None:
            return self._here(found[0])
        if storage_id == LOCAL:
            return StorageDef(
                storage_id=LOCAL,
                name="Local storage",
                description="Segments in the data directory",
                base_directory=str(self._local),
                owner=self._database_uid,
            )
        raise NotFound(f"Storage '{storage_id}' does not exist; SHOW STORAGES names those that do")

    def _here(self, definition: StorageDef) -> StorageDef:
        if definition.storage_id != LOCAL:
            return definition
        return msgspec.structs.replace(definition, base_directory=str(self._local), owner=self._database_uid)

    def root_of(self, storage_id: str) -> Path:
        """The folder below which the segments of its tables lie."""
        found = self._known.get(storage_id)
        if storage_id == LOCAL or found is None or found[0].owner != self._database_uid:
            return self._local
        return Path(found[0].base_directory)

    def roots(self) -> list[Path]:
        """The folders of all storages that hold files of this database."""
        return list(dict.fromkeys([self._local, *(self.root_of(name) for name in list(self._known))]))

    # Changing

    def create(self, definition: StorageDef, *, if_not_exists: bool = False) -> bool:
        """Add a storage and mark its directory; False when it exists and `if_not_exists`.

        Blocks for the disk. Raises InvalidRequest, Conflict, and Unavailable for a directory that does not
        let files be written, read, listed and removed.
        """
        check_name("storage", definition.storage_id)
        # One at a time: two must not take one directory.
        with self.membership:
            if definition.storage_id == LOCAL or definition.storage_id in self._known:
                if if_not_exists:
                    return False
                raise Conflict(f"Storage '{definition.storage_id}' already exists")
            _check_definition(definition)
            self._create(definition)
        return True

    def _create(self, definition: StorageDef) -> None:
        base = self._checked_base(definition.base_directory)
        now_ms = self._clock.now_ms()
        stored = msgspec.structs.replace(
            definition, base_directory=str(base), owner=self._database_uid, created_at=now_ms, updated_at=now_ms
        )
        with self._marked(base):
            health = self._probe(base, extended=False)
            if health.error is not None:
                raise InvalidRequest(f"the directory '{base}' of storage '{stored.storage_id}' fails: {health.error}")
            try:
                self._commit(stored, ABSENT)
            except ExpectationFailed:
                raise Conflict(f"Storage '{stored.storage_id}' already exists") from None

    def alter(self, storage_id: str, changes: Mapping[str, Any]) -> None:
        """Change fields of a storage; those that say where its files lie cannot be changed. Raises NotFound,
        InvalidRequest, Conflict."""
        version = self._known[storage_id][1] if storage_id in self._known else ABSENT
        changed = msgspec.structs.replace(self.get(storage_id), updated_at=self._clock.now_ms(), **changes)
        if changed.created_at == 0:
            changed = msgspec.structs.replace(changed, created_at=changed.updated_at)
        _check_definition(changed)
        try:
            self._commit(changed, version)
        except ExpectationFailed:
            raise Conflict(f"storage '{storage_id}' was changed meanwhile; try again") from None

    def drop(self, storage_id: str) -> None:
        """Forget a storage that no table uses; its directory is free for another database. Raises NotFound,
        InvalidRequest for `local`."""
        definition = self.get(storage_id)
        if storage_id == LOCAL:
            raise InvalidRequest("storage 'local' cannot be dropped")
        batch = Batch(
            records=[RecordOp(record_key(RecordKind.STORAGE, storage_id), None, self._known[storage_id][1])],
            names_files=True,
        )
        self._backend.wait_durable(self._backend.commit(batch), names_files=True)
        if definition.owner == self._database_uid:
            with suppress(KalamDbError):
                self.files.unlink(Path(definition.base_directory) / MARK_NAME)

    def check(self, storage_id: str, *, extended: bool = False) -> StorageHealth:
        """Write, read, list and remove a file in a storage; `extended` counts bytes too. Blocks for the disk.
        Raises NotFound."""
        definition = self.get(storage_id)
        base = Path(definition.base_directory)
        if storage_id != LOCAL and _read_mark(base) != self._database_uid:
            error = f"'{base / MARK_NAME}' does not name this database; is the directory mounted?"
            if definition.owner != self._database_uid:
                error = f"'{base}' is of the database that this one was restored from; its tables are in 'local' here"
            return StorageHealth(status=StorageStatus.UNREACHABLE, error=error, tested_at=self._clock.now_ms())
        return self._probe(base, extended=extended)

    def _checked_base(self, text: str) -> Path:
        if not text.strip():
            raise InvalidRequest("the PATH of a storage cannot be empty")
        if "\0" in text or ".." in Path(text).parts:
            raise InvalidRequest(f"the PATH '{text}' of a storage must not contain '..' or a NUL character")
        base = Path(os.path.abspath(text))
        folder = system_folder_of(text, base)
        if folder is not None:
            raise InvalidRequest(f"the PATH '{text}' of a storage lies in the system directory {folder}")
        real = base.resolve()
        if real == Path(real.anchor):
            raise InvalidRequest(f"the PATH '{text}' of a storage is the root of the filesystem; choose a directory")
        for name, other in [("data directory", self._home), *self._places()]:
            taken = other.resolve()
            if real == taken or taken in real.parents or real in taken.parents:
                raise InvalidRequest(f"the PATH '{text}' of a storage overlaps the {name} '{other}'; choose another")
        return base

    def _places(self) -> list[tuple[str, Path]]:
        return [(f"storage '{one.storage_id}' in", Path(one.base_directory)) for one in self.all()[1:]]

    @contextmanager
    def _marked(self, base: Path) -> Iterator[None]:
        """Make a directory and mark it as this database's; taken back when the block fails."""
        holder = _read_mark(base)
        # A mark of this database, where none of its storages is, was left by a crash.
        if holder is not None and holder != self._database_uid:
            raise Conflict(
                f"the directory '{base}' holds files of database {holder}; choose another, or remove "
                f"'{MARK_NAME}' in it when no database uses it any more"
            )
        LocalFiles.below(base, self._operations).make_folder(base)
        self.files.add_root(base)
        self.files.replace(base / MARK_NAME, self._database_uid.encode())
        try:
            yield
        except BaseException:
            with suppress(KalamDbError):
                self.files.unlink(base / MARK_NAME)
            raise

    def _probe(self, base: Path, *, extended: bool) -> StorageHealth:
        passed: dict[str, bool] = {}
        error = None
        began_s = self._clock.monotonic_s()
        # Each check has a name of its own, so that two at a time do not meet.
        path = base / f"{_PROBE_NAME}-{self._clock.random_bytes(8).hex()}"
        body = self._clock.random_bytes(64)
        try:
            if not base.is_dir():
                raise NotADirectoryError(f"'{base}' is not a directory")
            with self.files.create(path) as file:
                file.write(body)
            passed["writable"] = True
            passed["readable"] = path.read_bytes() == body
            passed["listable"] = path in self.files.names(base)
            self.files.unlink(path)
            passed["deletable"] = not path.exists()
        except (OSError, KalamDbError) as exc:
            error = str(exc)
            with suppress(OSError):
                path.unlink()
        latency_ms = int((self._clock.monotonic_s() - began_s) * 1000)
        if not passed:
            status = StorageStatus.UNREACHABLE
        elif len(passed) == 4 and all(passed.values()) and latency_ms < _DEGRADED_MS:
            status = StorageStatus.HEALTHY
        else:
            status = StorageStatus.DEGRADED
        health = StorageHealth(
            status=status, latency_ms=latency_ms, error=error, tested_at=self._clock.now_ms(), **passed
        )
        if not extended or status is StorageStatus.UNREACHABLE:
            return health
        usage = shutil.disk_usage(base)
        return replace(health, total_bytes=usage.total, used_bytes=_bytes_in(base))

    def _commit(self, definition: StorageDef, expect: Seq) -> Commit:
        key = record_key(RecordKind.STORAGE, definition.storage_id)
        commit = self._backend.commit(Batch(records=[RecordOp(key, msgspec.msgpack.encode(definition), expect)]))
        self._backend.wait_durable(commit, names_files=True)
        return commit

    def _on_commit(self, batch: Batch, commit: Commit) -> None:
        for op in batch.records:
            if op.key[0] != RecordKind.STORAGE or op.check:
                continue
            if op.value is None:
                gone = [name for name in self._known if record_key(RecordKind.STORAGE, name) == op.key]
                for name in gone:
                    del self._known[name]
            else:
                self._take(op.value, commit.seq)

    def _take(self, value: bytes, version: Seq) -> None:
        definition = msgspec.msgpack.decode(value, type=StorageDef)
        self._known[definition.storage_id] = (definition, version)
        if definition.storage_id != LOCAL and definition.owner == self._database_uid:
            self.files.add_root(Path(definition.base_directory))


def _check_definition(definition: StorageDef) -> None:
    if definition.kind is not StorageKind.FILESYSTEM:
        raise InvalidRequest(
            f"tables cannot be kept in a storage of TYPE {definition.kind} yet; TYPE filesystem is offered, and "
            "backups can be written to object stores"
        )
    if "{userId}" not in definition.user_tables_template:
        raise InvalidRequest(
            f"USER_TABLES_TEMPLATE '{definition.user_tables_template}' of storage '{definition.storage_id}' must "
            "contain {userId}"
        )
    for name, text in (("NAME", definition.name), ("SHARED_TABLES_TEMPLATE", definition.shared_tables_template)):
        if not text.strip():
            raise InvalidRequest(f"{name} of storage '{definition.storage_id}' cannot be empty")


def _read_mark(base: Path) -> str | None:
    """Uid of the database that a directory belongs to."""
    with suppress(OSError):
        return (base / MARK_NAME).read_text().strip()
    return None


def _bytes_in(base: Path) -> int:
    """Bytes of the files below a folder."""
    total = 0
    for folder, _, names in os.walk(base):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


__all__ = [
    "LOCAL",
    "MARK_NAME",
    "StorageDef",
    "StorageHealth",
    "StorageKind",
    "StorageStatus",
    "Storages",
]
