"""Order-preserving bytes for primary keys and row identities.

A *row key* names one row of a table: 16-bit hash of the scope, the scope, the primary key. Comparing
two row keys as bytes gives the same order as comparing (hash, scope, pk) part by part, so a scope is
one contiguous range, in RocksDB and in a sorted Parquet segment alike.
"""

from __future__ import annotations

import struct
import zlib

from kalamdb.types import SHARED_SCOPE, Scope

_TERMINATOR = b"\x00\x01"
_ESCAPED_ZERO = b"\x00\xff"
_SIGN_64 = 1 << 63
_SIGN_128 = 1 << 127


def encode_int(value: int) -> bytes:
    """Eight bytes; every integer type uses the same width, so widening a key changes nothing."""
    return (value + _SIGN_64).to_bytes(8, "big")


def decode_int(data: bytes) -> int:
    """Inverse of `encode_int`, from the first eight bytes."""
    return int.from_bytes(data[:8], "big") - _SIGN_64


def encode_wide_int(value: int) -> bytes:
    """Sixteen bytes, for unscaled decimals of up to 38 digits."""
    return (value + _SIGN_128).to_bytes(16, "big")


def encode_float(value: float) -> bytes:
    """Eight bytes in the order of IEEE 754 totalOrder; -0.0 and 0.0 are one key."""
    bits: int = struct.unpack(">Q", struct.pack(">d", value + 0.0))[0]
    bits ^= 0xFFFF_FFFF_FFFF_FFFF if bits & _SIGN_64 else _SIGN_64
    return bits.to_bytes(8, "big")


def encode_bytes(value: bytes) -> bytes:
    """Zero bytes escaped, then a terminator, so that a prefix sorts before its extensions."""
    return value.replace(b"\x00", _ESCAPED_ZERO) + _TERMINATOR


def encode_text(value: str) -> bytes:
    """UTF-8 through `encode_bytes`: the order of code points."""
    return encode_bytes(value.encode())


def decode_text(data: bytes) -> str:
    """Inverse of `encode_text`."""
    return data[: data.index(_TERMINATOR)].replace(_ESCAPED_ZERO, b"\x00").decode()


def scope_hash(scope: Scope) -> int:
    """16-bit hash of a user id, 0 for the shared scope. Part of the stored format: never change it."""
    return 0 if scope == SHARED_SCOPE else zlib.crc32(scope.encode()) & 0xFFFF


def scope_prefix(scope: Scope) -> bytes:
    """First bytes of each row key of `scope`, and of no other scope's."""
    return scope_hash(scope).to_bytes(2, "big") + encode_text(scope)


def row_key(scope: Scope, pk: bytes) -> bytes:
    """Identity of the row of `scope` whose encoded primary key is `pk`."""
    return scope_prefix(scope) + pk


def split_row_key(key: bytes) -> tuple[Scope, bytes]:
    """Inverse of `row_key`."""
    end = key.index(_TERMINATOR, 2)
    return Scope(decode_text(key[2 : end + 2])), key[end + 2 :]


def prefix_end(prefix: bytes) -> bytes | None:
    """The smallest bytes above everything that starts with `prefix`; None when there is none."""
    stripped = prefix.rstrip(b"\xff")
    return stripped[:-1] + bytes([stripped[-1] + 1]) if stripped else None
