"""Backups of a target: finding, listing, verifying and pruning them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from kalamdb.backup.manifest import (
    MANIFEST_NAME,
    BackupFile,
    BackupManifest,
    backup_time_ms,
    decode_manifest,
    is_backup_id,
)
from kalamdb.backup.targets import Target, Targets
from kalamdb.errors import Corrupt, InvalidRequest, NotFound

_HALF_KEPT_MS = 24 * 3_600_000
"""A backup without manifest may be one that is being made, for this long after its last write."""

Step = Callable[[int], None]
"""Called with the bytes of each piece of work; raises to end it."""


class BackupStatus(StrEnum):
    """What there is of a backup."""

    COMPLETE = "complete"
    INCOMPLETE = "incomplete"
    """Without `backup.json`: being made, or cut short."""
    DAMAGED = "damaged"
    """Its `backup.json` cannot be read."""


@dataclass(frozen=True, slots=True)
class BackupEntry:
    """One backup of a target."""

    backup_id: str
    where: str
    status: BackupStatus
    manifest: BackupManifest | None


@dataclass(frozen=True, slots=True)
class Located:
    """A complete backup."""

    target: Target
    folder: str
    """Its folder in the target; '' when the target is the backup itself."""
    manifest: BackupManifest

    @property
    def where(self) -> str:
        """How messages spell it."""
        return self.target.where(self.folder) if self.folder else self.target.name

    def path(self, file: str) -> str:
        """A file of it as a path of the target."""
        return f"{self.folder}/{file}" if self.folder else file


def read_manifest(target: Target, folder: str) -> BackupManifest:
    """The manifest of a backup. Raises Corrupt when it is missing or damaged."""
    path = f"{folder}/{MANIFEST_NAME}" if folder else MANIFEST_NAME
    try:
        data = b"".join(target.read(path))
    except FileNotFoundError:
        raise Corrupt(f"'{target.where(path)}' is missing: the backup was not completed; use another one") from None
    return decode_manifest(data, target.where(path))


def backup_ids(target: Target) -> list[str]:
    """Ids of all backups, the oldest first, half ones too."""
    return [name for name in target.folders() if is_backup_id(name)]


def list_backups(target: Target) -> list[BackupEntry]:
    """All backups of a target, the oldest first."""
    found = []
    for backup_id in backup_ids(target):
        manifest = None
        try:
            manifest = read_manifest(target, backup_id)
            status = BackupStatus.COMPLETE
        except Corrupt:
            there = any(file.path == f"{backup_id}/{MANIFEST_NAME}" for file in target.files(backup_id))
            status = BackupStatus.DAMAGED if there else BackupStatus.INCOMPLETE
        found.append(BackupEntry(backup_id, target.where(backup_id), status, manifest))
    return found


def newest_of(target: Target, uids: Collection[str]) -> Located | None:
    """The newest complete backup of a database; damaged and half ones are passed over."""
    for entry in reversed(list_backups(target)):
        if entry.manifest is not None and entry.manifest.database_uid in uids:
            return Located(target, entry.backup_id, entry.manifest)
    return None


def locate(targets: Targets, text: str) -> Located:
    """The backup that `text` names: itself, or the newest complete one of the target.

    Raises NotFound, InvalidRequest, Corrupt that names the file.
    """
    local = targets.check(text)
    if local is not None:
        if not local.exists():
            raise NotFound(f"Backup path '{text}' does not exist")
        if not local.is_dir():
            raise InvalidRequest(f"Backup path '{text}' is not a directory")
    base, _, last = text.rstrip("/").rpartition("/")
    if is_backup_id(last):
        target = targets.open(base or str(Path(text).absolute().parent))
        return Located(target, last, read_manifest(target, last))
    target = targets.open(text)
    if any(True for _ in _try_read(target, MANIFEST_NAME)):
        return Located(target, "", read_manifest(target, ""))
    ids = backup_ids(target)
    if not ids:
        raise NotFound(f"there is no backup in '{target.name}'")
    entries = list_backups(target)
    newest = next((entry for entry in reversed(entries) if entry.status is not BackupStatus.INCOMPLETE), entries[-1])
    return Located(target, newest.backup_id, read_manifest(target, newest.backup_id))


def _try_read(target: Target, path: str) -> Iterator[bytes]:
    try:
        yield from target.read(path)
    except FileNotFoundError:
        return


def checked(backup: Located, file: BackupFile, step: Step) -> Iterator[bytes]:
    """The bytes of a file of a backup. Raises Corrupt at their end when they are not what was written."""
    path = backup.path(file.path)
    where = backup.target.where(path)
    digest, size = hashlib.sha256(), 0
    try:
        for chunk in backup.target.read(path):
            digest.update(chunk)
            size += len(chunk)
            step(len(chunk))
            yield chunk
    except FileNotFoundError:
        raise Corrupt(f"'{where}' is missing from the backup; use another one") from None
    if size != file.size_bytes or digest.hexdigest() != file.sha256:
        raise Corrupt(
            f"'{where}' is damaged: its SHA-256 is {digest.hexdigest()} over {size} bytes, "
            f"expected {file.sha256} over {file.size_bytes}; use another backup"
        )


def verify(backup: Located, step: Step) -> None:
    """Read every file of a backup. Raises Corrupt that names the first damaged or missing one."""
    for file in backup.manifest.files:
        for _ in checked(backup, file, step):
            pass


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What a pruning did."""

    removed: tuple[str, ...]
    """Ids of complete backups."""
    removed_halves: tuple[str, ...]
    """Ids of backups that were never completed."""
    kept: int
    """Complete backups of this database that stay."""


def prune(target: Target, uids: Collection[str], *, daily: int, weekly: int, now_ms: int) -> PruneReport:
    """Keep the newest backup of each of the last `daily` days and `weekly` weeks that have one, and the newest.

    Only backups of the databases `uids` go, and halves that nobody wrote to for a day. Days and weeks are UTC.
    """
    if daily < 0 or weekly < 0:
        raise InvalidRequest(f"KEEP {daily} DAILY {weekly} WEEKLY is not possible: 0 or more is allowed")
    entries = list_backups(target)
    own = [one for one in entries if one.manifest is not None and one.manifest.database_uid in uids]
    kept = _kept([one.backup_id for one in reversed(own)], daily, weekly)
    removed = [one.backup_id for one in own if one.backup_id not in kept]
    halves = [
        one.backup_id
        for one in entries
        if one.status is BackupStatus.INCOMPLETE and _last_write_ms(target, one.backup_id) < now_ms - _HALF_KEPT_MS
    ]
    for backup_id in [*removed, *halves]:
        remove_backup(target, backup_id)
    return PruneReport(tuple(removed), tuple(halves), len(kept))


def remove_backup(target: Target, backup_id: str) -> None:
    """Remove a backup; its manifest first, so that what a crash leaves counts as a half one."""
    target.unlink(f"{backup_id}/{MANIFEST_NAME}")
    target.remove(backup_id)


def _kept(newest_first: Sequence[str], daily: int, weekly: int) -> set[str]:
    kept = set(newest_first[:1])
    for count, period in ((daily, _day), (weekly, _week)):
        seen: dict[tuple[int, ...], str] = {}
        for backup_id in newest_first:
            seen.setdefault(period(backup_id), backup_id)
        kept |= set(list(seen.values())[:count])
    return kept


def _moment(backup_id: str) -> datetime:
    return datetime.fromtimestamp(backup_time_ms(backup_id) / 1000, UTC)


def _day(backup_id: str) -> tuple[int, ...]:
    return (_moment(backup_id).date().toordinal(),)


def _week(backup_id: str) -> tuple[int, ...]:
    return _moment(backup_id).isocalendar()[:2]


def _last_write_ms(target: Target, backup_id: str) -> int:
    return max([backup_time_ms(backup_id), *(file.modified_ms for file in target.files(backup_id))])
