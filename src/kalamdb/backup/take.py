"""Taking a backup: one moment of the store, its segments pinned, every file copied and hashed."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from kalamdb.backup.listing import Located, backup_ids, newest_of, remove_backup
from kalamdb.backup.manifest import (
    MANIFEST_NAME,
    BackupFile,
    BackupManifest,
    BackupTable,
    encode_manifest,
    new_backup_id,
)
from kalamdb.backup.targets import Target, digest_of
from kalamdb.catalog import CatalogEntry
from kalamdb.errors import Corrupt, KalamDbError, Unavailable
from kalamdb.schema import TableDef
from kalamdb.storage import Batch, RecordKind, Snapshot, record_prefix
from kalamdb.storage.directory import FORMAT_VERSION
from kalamdb.tables.flush import JobHandle
from kalamdb.tables.mirror import MIRROR_NAME, mirror_body
from kalamdb.tables.store import TableStore
from kalamdb.types import Seq, TableKind

_CHUNK_BYTES = 1 << 20
_NOT_STORED = ("LOCK", "LOG")
"""What an opened store adds to its folder beside the data."""


@dataclass(frozen=True, slots=True)
class DatabaseIdentity:
    """Which database it is."""

    uid: str
    lineage: tuple[str, ...] = ()
    """Uids of the databases that it was restored from, the nearest first."""


BackupMessage = Callable[[BackupManifest, str], str]
"""The last words of the job, from what it made and where that lies; the backup holds them too."""


@dataclass(frozen=True, slots=True)
class _Source:
    """A file to copy."""

    path: Path
    name: str
    size_bytes: int
    crc32: int | None = None
    """What the store knows of a segment."""
    body: bytes | None = None
    """The content of a file that is made for the backup."""


def take_backup(
    store: TableStore,
    target: Target,
    job: JobHandle,
    *,
    scratch: Path,
    identity: DatabaseIdentity,
    incremental: bool,
    message: BackupMessage,
) -> BackupManifest:
    """Write a backup of now into a new folder of `target`; its `backup.json` comes last.

    Writers wait only while the store is frozen. Nothing stays of a backup that fails. Raises Corrupt when a
    file of the database is damaged, Unavailable.
    """
    started_at = store.clock.now_ms()
    previous = newest_of(target, {identity.uid}) if incremental else None
    backup_id = new_backup_id(store.clock, backup_ids(target))
    copy = scratch / backup_id
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise Unavailable(f"'{copy.parent}' cannot be made: {exc.strerror}; check its rights") from exc
    try:
        with store.checkpoint(copy, lambda snapshot: _contents(store, snapshot)) as contents:
            files = _copy_all([*_store_files(copy), *contents.segments], target, backup_id, previous, job)
            fence = Batch()
            job.seal(fence)
            store.commit(fence)
            manifest = BackupManifest(
                backup_id=backup_id,
                database_uid=identity.uid,
                lineage=identity.lineage,
                format_version=FORMAT_VERSION,
                snapshot_seq=contents.seq,
                started_at=started_at,
                finished_at=store.clock.now_ms(),
                previous=None if previous is None else previous.manifest.backup_id,
                job_id=job.intent_owner()[0],
                files=files,
                tables=contents.tables,
            )
            manifest = msgspec.structs.replace(manifest, message=message(manifest, target.where(backup_id)))
            target.publish(f"{backup_id}/{MANIFEST_NAME}", encode_manifest(manifest))
    except BaseException:
        with suppress(KalamDbError, OSError):
            remove_backup(target, backup_id)
        raise
    finally:
        with suppress(KalamDbError):
            store.files.remove_tree(copy)
    return manifest


@dataclass(frozen=True, slots=True)
class _Contents:
    """What there is at one moment beside the store's own files."""

    seq: Seq
    tables: tuple[BackupTable, ...]
    segments: tuple[_Source, ...]


def _contents(store: TableStore, snapshot: Snapshot) -> _Contents:
    """Tables of a moment, and the files of their segments. Dropped tables are left out."""
    tables, sources = [], []
    for _, stored in snapshot.scan_records(*record_prefix(RecordKind.TABLE)):
        definition = msgspec.msgpack.decode(stored.value, type=TableDef)
        entry = CatalogEntry(definition, stored.version)
        state = store.state_in(snapshot, entry)
        segments = state.segments
        root = store.root_of(definition)
        for segment in segments:
            name = f"segments/{segment.path.relative_to(root).as_posix()}"
            sources.append(_Source(segment.path, name, segment.record.size_bytes, segment.record.crc32))
        if segments:
            mirror = store.folder_of(definition) / MIRROR_NAME
            name = f"segments/{mirror.relative_to(root).as_posix()}"
            body = mirror_body(entry, state)
            sources.append(_Source(mirror, name, len(body), body=body))
        is_stream = definition.kind is TableKind.STREAM
        hot = snapshot.stream(definition.uid) if is_stream else snapshot.hot(definition.uid)
        tables.append(
            BackupTable(
                table_id=str(definition.table_id),
                table_uid=definition.uid,
                kind=definition.kind.value,
                segments=len(segments),
                hot_versions=sum(len(chunk) for chunk in hot),
                cold_versions=sum(segment.record.rows for segment in segments),
            )
        )
    return _Contents(snapshot.seq, tuple(tables), tuple(sources))


def _store_files(copy: Path) -> Iterator[_Source]:
    for path in sorted(copy.iterdir()):
        if path.is_file() and not path.name.startswith(_NOT_STORED):
            yield _Source(path, f"rocksdb/{path.name}", path.stat().st_size)


def _copy_all(
    sources: list[_Source], target: Target, backup_id: str, previous: Located | None, job: JobHandle
) -> tuple[BackupFile, ...]:
    known = {} if previous is None else {file.path: file for file in previous.manifest.files}
    total = sum(source.size_bytes for source in sources)
    done = 0
    files = []
    for source in sources:
        older = known.get(source.name)
        file = None
        if previous is not None and older is not None and older.size_bytes == source.size_bytes:
            file = _reused(source, older, previous, target, backup_id, job)
        if file is None:
            file = _copied(source, target, backup_id, _Progress(job, done, total))
        files.append(file)
        done += source.size_bytes
        job.progress(done, total, "bytes")
    return tuple(files)


def _reused(
    source: _Source, older: BackupFile, previous: Located, target: Target, backup_id: str, job: JobHandle
) -> BackupFile | None:
    """The file shared with an older backup, when that holds the same bytes."""
    if digest_of(_read(source, _Progress(job, 0, None))) != older.sha256:
        return None
    if not target.reuse(previous.path(older.path), f"{backup_id}/{source.name}", older.sha256):
        return None
    return msgspec.structs.replace(older, reused=True)


def _copied(source: _Source, target: Target, backup_id: str, progress: _Progress) -> BackupFile:
    digest = hashlib.sha256()

    def hashed() -> Iterator[bytes]:
        for chunk in _read(source, progress):
            digest.update(chunk)
            yield chunk

    target.put(f"{backup_id}/{source.name}", hashed())
    return BackupFile(path=source.name, size_bytes=source.size_bytes, sha256=digest.hexdigest())


class _Progress:
    """Bytes done so far, told to the job, which may end the work."""

    def __init__(self, job: JobHandle, done: int, total: int | None) -> None:
        self._job = job
        self._done = done
        self._total = total

    def add(self, bytes_: int) -> None:
        self._job.check()
        self._done += bytes_
        if self._total is not None:
            self._job.progress(self._done, self._total, "bytes")


def _read(source: _Source, progress: _Progress) -> Iterator[bytes]:
    """The bytes of a file of the database. Raises Corrupt when they are not what the store knows."""
    size = crc32 = 0
    progress.add(0)
    if source.body is not None:
        yield source.body
        progress.add(len(source.body))
        return
    try:
        with source.path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                size += len(chunk)
                crc32 = zlib.crc32(chunk, crc32)
                yield chunk
                progress.add(len(chunk))
    except FileNotFoundError:
        raise Corrupt(f"'{source.path}' is missing; restore the database from an older backup") from None
    except OSError as exc:
        raise Unavailable(f"'{source.path}' cannot be read: {exc.strerror}; check the disk") from exc
    if size != source.size_bytes or (source.crc32 is not None and crc32 != source.crc32):
        raise Corrupt(
            f"'{source.path}' is damaged: {size} bytes, expected {source.size_bytes}, or another checksum; "
            "restore the database from an older backup"
        )


__all__ = ["BackupMessage", "DatabaseIdentity", "take_backup"]
