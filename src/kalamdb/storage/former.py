"""What a row batch replaces, for those who follow the changes of a table."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

from kalamdb.storage import ABSENT, ANY, RowOp
from kalamdb.types import RowFlags, Seq

ROW_HEADER = struct.Struct(">QB")
"""Head of a stored hot row: `_seq` and flags."""


def former_payloads(
    rows: Sequence[RowOp], stored: Mapping[int, bytes | None], found: Sequence[Seq]
) -> list[bytes | None]:
    """Commit.former: `stored` is what the store holds under the key of a row, by its index; `found` the `_seq` of
    that above the watermark, else 0."""
    return [
        b"" if op.expect == ABSENT or op.bucket is not None else _former(op.expect, stored[at], found[at])
        for at, op in enumerate(rows)
    ]


def _former(expect: Seq, value: bytes | None, found: Seq) -> bytes | None:
    if value is None:
        return None
    seq, flags = ROW_HEADER.unpack_from(value)
    # At or below the watermark it was flushed; it still is the newest version when that one was expected.
    if seq == expect or (expect == ANY and found):
        return b"" if flags & RowFlags.DELETED else value[ROW_HEADER.size :]
    return None
