"""Messages of live queries as the frames of a WebSocket (surface reference 2.2, 2.4, 2.7).

A change is encoded once for all subscriptions that ask the same; each then gets its own id in front. That holds for
packed frames too: a gzip member may begin with a stored block (the id) and go on with blocks that were made before.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgspec

from kalamdb.live.changes import Change, Values
from kalamdb.server.encode import row_encoder
from kalamdb.types import ChangeType

PACKED_BYTES_MIN = 512
"""Shorter payloads are sent as they are."""
_GZIP_LEVEL = 1
_GZIP_HEAD = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x04\xff"
_STORED_MAX = 65_535
_json = msgspec.json.Encoder()
_msgpack = msgspec.msgpack.Encoder()


class Serialization(StrEnum):
    """How messages are written."""

    JSON = "json"
    MSGPACK = "msgpack"


class Compression(StrEnum):
    """Whether long payloads are packed."""

    GZIP = "gzip"
    NONE = "none"


Frame = bytes | str
"""What leaves in one message: text, or bytes."""


@dataclass(frozen=True, slots=True)
class _Tail:
    """What follows the subscription's id in the frame of a change."""

    plain: bytes
    members: int
    """Entries of the whole map."""
    packed: bytes | None
    """The end of a raw deflate stream, when packing makes it smaller."""


@dataclass(frozen=True, slots=True)
class Format:
    """What a socket agreed on."""

    serialization: Serialization = Serialization.JSON
    compression: Compression = Compression.GZIP

    def frame(self, message: Mapping[str, Any]) -> Frame:
        """A message as a frame. Packs long ones: not for the event loop."""
        json = self.serialization is Serialization.JSON
        payload = _json.encode(message) if json else _msgpack.encode(message)
        if self.compression is Compression.GZIP and len(payload) >= PACKED_BYTES_MIN:
            packed = gzip.compress(payload, _GZIP_LEVEL, mtime=0)
            if len(packed) < len(payload):
                return packed
        return payload.decode() if json else payload

    def head(self, subscription_id: str) -> bytes:
        """What precedes the tail in frames of a subscription; the map's own head is not in it."""
        if self.serialization is Serialization.JSON:
            return b'"type":"change","subscription_id":' + _json.encode(subscription_id)
        parts = ("type", "change", "subscription_id", subscription_id)
        return b"".join(_msgpack.encode(part) for part in parts)

    def change(self, head: bytes, change: Change) -> Frame:
        """The frame of a change for the subscription of that `head`."""
        tail: _Tail = change.encoded(self.serialization, self._tail)
        if self.serialization is Serialization.JSON:
            start = b"{" + head
        else:
            start = bytes((0x80 | tail.members,)) + head
        if self.compression is Compression.GZIP and tail.packed is not None and len(start) <= _STORED_MAX:
            return _member(start, tail)
        payload = start + tail.plain
        return payload.decode() if self.serialization is Serialization.JSON else payload

    def _tail(self, change: Change) -> _Tail:
        parts: dict[str, Any] = {"change_type": _WIRE_TYPES[change.type]}
        if change.new is not None:
            parts["rows"] = [wire_row(change.new)]
        if change.former is not None:
            parts["old_values"] = [wire_row(change.former)]
        if self.serialization is Serialization.JSON:
            plain = b"," + _json.encode(parts)[1:]
        else:
            plain = _msgpack.encode(parts)[1:]
        packed = None
        if len(plain) >= PACKED_BYTES_MIN:
            packer = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
            packed = packer.compress(plain) + packer.flush()
            if len(packed) >= len(plain):
                packed = None
        return _Tail(plain, len(parts) + 2, packed)


_WIRE_TYPES: Mapping[ChangeType, str] = {
    ChangeType.SNAPSHOT: "insert",
    ChangeType.INSERT: "insert",
    ChangeType.UPDATE: "update",
    ChangeType.DELETE: "delete",
}


def wire_row(values: Values) -> dict[str, Any]:
    """A row as the wire has it: an object by column."""
    encoder = row_encoder(tuple(field.type for field in values.fields), stored=True)
    return dict(zip((field.name for field in values.fields), encoder(values.stored), strict=True))


def _member(start: bytes, tail: _Tail) -> bytes:
    """A gzip member (RFC 1952) of `start`, as one stored block (RFC 1951, 3.2.4), and the packed tail."""
    assert tail.packed is not None
    checksum = zlib.crc32(tail.plain, zlib.crc32(start))
    size = len(start)
    return b"".join(
        (
            _GZIP_HEAD,
            struct.pack("<BHH", 0, size, size ^ 0xFFFF),
            start,
            tail.packed,
            struct.pack("<II", checksum, (size + len(tail.plain)) & 0xFFFFFFFF),
        )
    )
