"""Whether a RocksDB log (WAL or MANIFEST) is sound in the two ways that RocksDB cannot tell.

RocksDB checks the bytes of a record against its checksum, but it believes the header first. A length
that reaches past the end of the file passes for a write that a crash cut off, and a type that only
recycled logs use passes for the remains of an older log; either way the rest of the file is forgotten
without a word. Both are told apart here: a write that was cut off lacks its end, so no shorter length
fits its checksum, and logs are never recycled.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

_BLOCK_BYTES = 32 * 1024
_HEADER = struct.Struct("<IHB")
_HEADER_BYTES = _HEADER.size
_LENGTH_TYPE = struct.Struct("<HB")
_RECYCLED_TYPES = frozenset({5, 6, 7, 8, 11, 131})
_MASK_DELTA = 0xA282_EAD8
_POLYNOMIAL = 0x82F6_3B78


@dataclass(frozen=True, slots=True)
class LogCheck:
    """What is odd about a log; offsets in bytes, None when there is no such thing."""

    damaged_at: int | None = None
    """A record whose header was changed."""
    torn_at: int | None = None
    """A record that the file does not hold to its end: the last write before a crash."""


def check_log(path: Path) -> LogCheck:
    """Walk the record headers of a log. Costs about a second per million records. Raises OSError."""
    with path.open("rb") as file:
        if not file.seek(0, 2):
            return LogCheck()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as log:
            return _check(log)


def first_damaged(path: Path) -> int | None:
    """Offset of the first whole record whose bytes do not fit its checksum. Slow: for naming what was found damaged."""
    body, at, table = path.read_bytes(), 0, _crc32c_table()
    while at + _HEADER_BYTES <= len(body):
        left = _BLOCK_BYTES - at % _BLOCK_BYTES
        if left < _HEADER_BYTES:
            at += left
            continue
        stored, length, kind = _HEADER.unpack_from(body, at)
        if kind == 0 and length == 0:
            at += left
            continue
        end = at + _HEADER_BYTES + length
        if length + _HEADER_BYTES > left:
            return at
        if end > len(body):
            return None
        crc = 0xFFFF_FFFF
        for byte in body[at + _HEADER_BYTES - 1 : end]:
            crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
        if crc ^ 0xFFFF_FFFF != _unmasked(stored):
            return at
        at = end
    return None


def _unmasked(stored: int) -> int:
    rotated = (stored - _MASK_DELTA) & 0xFFFF_FFFF
    return ((rotated >> 17) | (rotated << 15)) & 0xFFFF_FFFF


def _check(log: mmap.mmap) -> LogCheck:
    size, at = len(log), 0
    read = _LENGTH_TYPE.unpack_from
    while at < size:
        left = _BLOCK_BYTES - at % _BLOCK_BYTES
        if left < _HEADER_BYTES:
            at += left
            continue
        if size - at < _HEADER_BYTES:
            return LogCheck(torn_at=at)
        length, kind = read(log, at + 4)
        if kind in _RECYCLED_TYPES:
            return LogCheck(damaged_at=at)
        if kind == 0 and length == 0:
            # Space that was allocated ahead of the writes; RocksDB takes the block to be over, too.
            at += left
            continue
        end = at + _HEADER_BYTES + length
        if end > size:
            return LogCheck(damaged_at=at) if _fits_shorter(log, at) else LogCheck(torn_at=at)
        if length + _HEADER_BYTES > left:
            # A record never crosses a block: RocksDB reports this one itself.
            return LogCheck()
        at = end
    return LogCheck()


def _fits_shorter(log: mmap.mmap, at: int) -> bool:
    """Whether the checksum of the record at `at` is that of fewer bytes than its header says."""
    wanted = _unmasked(_HEADER.unpack_from(log, at)[0])
    table = _crc32c_table()
    crc = 0xFFFF_FFFF
    for byte in log[at + _HEADER_BYTES - 1 : at + _BLOCK_BYTES]:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
        if crc ^ 0xFFFF_FFFF == wanted:
            return True
    return False


def _crc32c_table() -> list[int]:
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = (crc >> 1) ^ (_POLYNOMIAL if crc & 1 else 0)
        table.append(crc)
    return table
