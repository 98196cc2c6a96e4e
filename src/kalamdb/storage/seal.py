"""The seal of a cleanly closed store: its files with sizes and checksums.

A log that lost its end looks like one whose last write a crash cut off, and a log that is gone like one
that was never there. After a clean close there is no such doubt: the seal says what must be there. It is
broken before the store is opened for writing, so what it says is never out of date.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from kalamdb.errors import Corrupt

_NAME = "SEAL"
_READ_BYTES = 1 << 20
_SealedFile = tuple[int, int | None]
"""Size, and CRC-32 of files that no checksum of their own protects to the end."""


def _sealed_files(store: Path) -> Iterator[tuple[Path, bool]]:
    """Files whose loss would lose data; with each whether it is read whole."""
    for path in sorted(store.iterdir()):
        if path.suffix == ".sst":
            yield path, False
        elif path.suffix == ".log" or path.name == "CURRENT" or path.name.startswith("MANIFEST-"):
            yield path, True


def _crc32(path: Path) -> int:
    crc32 = 0
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            crc32 = zlib.crc32(chunk, crc32)
    return crc32


def seal(store: Path) -> None:
    """Seal a closed store. A disk that refuses leaves it without a seal, which is no harm."""
    found = {path.name: (path.stat().st_size, _crc32(path) if whole else None) for path, whole in _sealed_files(store)}
    body = msgspec.json.encode(found)
    target = store / _NAME
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(body + f"\n{zlib.crc32(body):08x}\n".encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError:
        with suppress(OSError):
            temporary.unlink()


def check_seal(store: Path) -> None:
    """Compare a store with its seal, if it has one. Raises Corrupt naming the file; changes nothing."""
    path = store / _NAME
    try:
        body, _, tail = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return
    if tail != f"{zlib.crc32(body):08x}\n".encode():
        raise Corrupt(f"'{path}' is damaged: its checksum does not match; restore the directory from a backup")
    for name, (size, crc32) in msgspec.json.decode(body, type=dict[str, _SealedFile]).items():
        file = store / name
        try:
            found = file.stat().st_size
        except FileNotFoundError:
            raise Corrupt(f"'{file}' is missing; restore the directory from a backup") from None
        if found != size:
            raise Corrupt(
                f"'{file}' is damaged: it has {found} bytes, {size} when it was closed; "
                "restore the directory from a backup"
            )
        if crc32 is not None and _crc32(file) != crc32:
            raise Corrupt(
                f"'{file}' is damaged: its checksum is not the one when it was closed; "
                "restore the directory from a backup"
            )


def break_seal(store: Path) -> None:
    """The store is about to change. Raises OSError."""
    path = store / _NAME
    if not path.exists():
        return
    path.unlink()
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
