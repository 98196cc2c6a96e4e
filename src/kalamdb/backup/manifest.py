"""`backup.json`: what a backup holds. It is written last: a folder without it is no backup.

The file holds its own SHA-256 beside the manifest, so that a changed byte of it is found like any other.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from datetime import UTC, datetime

import msgspec

from kalamdb.clock import Clock
from kalamdb.errors import Corrupt, InvalidRequest
from kalamdb.types import Seq

MANIFEST_NAME = "backup.json"
MANIFEST_VERSION = 1
_ID = re.compile(r"(\d{8}T\d{6})(\d{3})Z-[0-9a-f]{4}\Z")
_FILE = re.compile(r"(rocksdb|segments)(/[^/\0]+)+\Z")


class BackupFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a backup."""

    path: str
    """Relative to the folder of the backup; as in a generation of a data directory."""
    size_bytes: int
    sha256: str
    reused: bool = False
    """Shared with an older backup of the same target."""


class BackupTable(msgspec.Struct, frozen=True, kw_only=True):
    """One table of a backup. Versions count deletions and replaced rows too."""

    table_id: str
    table_uid: int
    kind: str
    segments: int
    hot_versions: int
    cold_versions: int


class BackupManifest(msgspec.Struct, frozen=True, kw_only=True):
    """The content of `backup.json`. Times are milliseconds since 1970."""

    manifest_version: int = MANIFEST_VERSION
    backup_id: str
    database_uid: str
    lineage: tuple[str, ...] = ()
    """Uids of the databases that this one was restored from, the nearest first."""
    format_version: int
    snapshot_seq: Seq
    """Every write up to this `_seq` is in the backup, and none above."""
    started_at: int
    finished_at: int
    previous: str | None = None
    """The backup whose unchanged files this one shares; None for a full one."""
    job_id: str | None = None
    message: str = ""
    """The last words of the job that made it."""
    files: tuple[BackupFile, ...]
    tables: tuple[BackupTable, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size_bytes for file in self.files)

    @property
    def new_bytes(self) -> int:
        """Bytes that no older backup had."""
        return sum(file.size_bytes for file in self.files if not file.reused)

    @property
    def kind(self) -> str:
        """full or incremental."""
        return "full" if self.previous is None else "incremental"


class _Enclosed(msgspec.Struct, frozen=True):
    sha256: str
    manifest: msgspec.Raw


def encode_manifest(manifest: BackupManifest) -> bytes:
    """The bytes of `backup.json`."""
    return _enclose(msgspec.json.encode(manifest))


def _enclose(body: bytes) -> bytes:
    return b'{"sha256":"%s","manifest":%s}' % (hashlib.sha256(body).hexdigest().encode(), body)


def decode_manifest(data: bytes, where: str) -> BackupManifest:
    """The manifest in the bytes of `backup.json`. Raises Corrupt, InvalidRequest for a newer version."""
    try:
        body = bytes(msgspec.json.decode(data, type=_Enclosed).manifest)
        if data != _enclose(body):
            raise Corrupt(f"'{where}' is damaged: its checksum does not match; use another backup")
        version = msgspec.json.decode(body, type=dict).get("manifest_version")
        if not isinstance(version, int) or version > MANIFEST_VERSION:
            raise InvalidRequest(
                f"'{where}' is of version {version}, this version reads up to {MANIFEST_VERSION}; "
                "install a newer KalamDB"
            )
        manifest = msgspec.json.decode(body, type=BackupManifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise Corrupt(f"'{where}' is damaged: {exc}; use another backup") from exc
    for file in manifest.files:
        if not _FILE.match(file.path) or {".", ".."} & set(file.path.split("/")):
            raise Corrupt(f"'{where}' names the file '{file.path}', which is none of a database; use another backup")
    return manifest


def is_backup_id(name: str) -> bool:
    """Whether a folder of a target may be a backup."""
    return _ID.match(name) is not None


def new_backup_id(clock: Clock, taken: Sequence[str]) -> str:
    """A fresh id above all of `taken`: ids sort by creation even when the clock was set back."""
    now_ms = max([clock.now_ms(), *(backup_time_ms(one) + 1 for one in taken)])
    moment = datetime.fromtimestamp(now_ms / 1000, UTC)
    return f"{moment:%Y%m%dT%H%M%S}{now_ms % 1000:03d}Z-{clock.random_bytes(2).hex()}"


def backup_time_ms(backup_id: str) -> int:
    """When a backup was begun, milliseconds since 1970."""
    found = _ID.match(backup_id)
    assert found is not None
    moment = datetime.strptime(found.group(1), "%Y%m%dT%H%M%S").replace(tzinfo=UTC)
    return int(moment.timestamp()) * 1000 + int(found.group(2))


__all__ = [
    "MANIFEST_NAME",
    "BackupFile",
    "BackupManifest",
    "BackupTable",
    "backup_time_ms",
    "decode_manifest",
    "encode_manifest",
    "is_backup_id",
    "new_backup_id",
]
