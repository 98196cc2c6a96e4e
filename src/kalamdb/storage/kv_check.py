"""Whether what an ordered store holds agrees with itself: records and rows here, jobs in `job_check`."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from kalamdb.storage import RecordKind, keys, record_key
from kalamdb.storage.job_check import check_jobs
from kalamdb.storage.job_keys import JobSpace
from kalamdb.storage.ordered import KvReader
from kalamdb.storage.spaces import Space
from kalamdb.types import RowFlags, Seq

PROBLEMS_MAX = 200
"""Problems that one part of a check lists; a damaged store would list millions."""

_NUMBER = struct.Struct(">Q")
_ROW_HEADER = struct.Struct(">QB")
_ALL_FLAGS = int(RowFlags.DELETED | RowFlags.SUPERSEDES)
_SPACES = frozenset(Space) | frozenset(JobSpace)


def check_store(view: KvReader) -> list[str]:
    """Problems of one view of the store, in words. Reads everything; blocks accordingly. Raises Corrupt."""
    last = _number(view.get(bytes([Space.META]) + b"last_seq")) or 0
    problems: list[str] = []
    for part in (_unknown_spaces, _records, _rows, _stream_rows, _outcomes):
        problems += _first(part(view, last))
    return problems + _first(check_jobs(view))


def _first(found: Iterator[str]) -> list[str]:
    out: list[str] = []
    for problem in found:
        if len(out) == PROBLEMS_MAX:
            return [*out, f"... and more than {PROBLEMS_MAX} problems of this kind"]
        out.append(problem)
    return out


def _space(view: KvReader, space: int) -> Iterator[tuple[bytes, bytes]]:
    """Entries of a space; the keys without their first byte."""
    for key, value in view.scan(bytes([space]), bytes([space + 1])):
        yield key[1:], value


def _number(value: bytes | None) -> int | None:
    return None if value is None or len(value) != 8 else int(_NUMBER.unpack(value)[0])


def _unknown_spaces(view: KvReader, last: Seq) -> Iterator[str]:
    start = b""
    while (found := next(iter(view.scan(start, b"\xff")), None)) is not None:
        space = found[0][0] if found[0] else 0
        if space not in _SPACES:
            yield f"the store holds keys of unknown kind {space}"
        start = bytes([space + 1])


def _records(view: KvReader, last: Seq) -> Iterator[str]:
    for key, value in _space(view, Space.RECORD):
        if not key or key[0] not in RecordKind.__members__.values():
            yield f"record {key.hex()} is of unknown kind"
            continue
        name = f"{RecordKind(key[0]).name.lower()} record {key[1:].hex()}"
        if len(value) < 8:
            yield f"{name} has no version"
        elif _NUMBER.unpack_from(value)[0] > last:
            yield f"{name} is of version {_NUMBER.unpack_from(value)[0]}, above the last seq {last}"
        elif key[0] == RecordKind.WATERMARK and (_number(value[8:]) or 0) > last:
            yield f"the watermark of table {_uid(key[1:])} is {_number(value[8:])}, above the last seq {last}"


def _uid(key: bytes) -> int:
    return int(_NUMBER.unpack_from(key)[0]) - (1 << 63)


def _table_of(view: KvReader, uid: int) -> str | None:
    """What is wrong with rows of that table, None when it lives or waits for its cleanup."""
    prefix = bytes([Space.RECORD])
    for kind in (RecordKind.TABLE, RecordKind.DROPPED):
        if view.get(prefix + record_key(kind, uid)) is not None:
            return None
    return f"rows of table {uid} are stored, but there is no such table"


def _rows(view: KvReader, last: Seq) -> Iterator[str]:
    table, watermark, removal = -1, 0, False
    record = bytes([Space.RECORD])
    for key, value in _space(view, Space.ROW):
        uid = int(_NUMBER.unpack_from(key)[0]) if len(key) >= 8 else -1
        if uid != table:
            table = uid
            stored = view.get(record + record_key(RecordKind.WATERMARK, uid))
            watermark = (_number(stored[8:]) or 0) if stored is not None else 0
            removal = view.get(record + record_key(RecordKind.REMOVAL, uid)) is not None
            if (problem := _table_of(view, uid)) is not None:
                yield problem
        where = f"hot row {key[8:].hex()} of table {uid}"
        if len(value) < _ROW_HEADER.size:
            yield f"{where} has {len(value)} bytes, at least {_ROW_HEADER.size} belong to it"
            continue
        seq, flags = _ROW_HEADER.unpack_from(value)
        if not 0 < seq <= last:
            yield f"{where} has _seq {seq}, the last seq is {last}"
        if flags & ~_ALL_FLAGS:
            yield f"{where} has unknown flags {flags}"
        if seq <= watermark and not removal:
            yield f"{where} has _seq {seq}, at or below the watermark {watermark}, and no removal is pending"
        if (problem := scope_problem(key[8:])) is not None:
            yield f"{where} {problem}"


def scope_problem(row_key: bytes) -> str | None:
    """What is wrong with the scope part of a row key; None when it is sound."""
    try:
        scope, _ = keys.split_row_key(row_key)
    except (ValueError, UnicodeDecodeError):
        return "has a key without a scope"
    return None if row_key.startswith(keys.scope_prefix(scope)) else f"has the hash of another scope than '{scope}'"


def _stream_rows(view: KvReader, last: Seq) -> Iterator[str]:
    table = -1
    for key, _ in _space(view, Space.STREAM):
        uid = int(_NUMBER.unpack_from(key)[0]) if len(key) >= 8 else -1
        if uid != table:
            table = uid
            if (problem := _table_of(view, uid)) is not None:
                yield problem
        where = f"stream row {key[8:].hex()} of table {uid}"
        if (problem := scope_problem(key[16:-8])) is not None:
            yield f"{where} {problem}"
        elif _NUMBER.unpack(key[-8:])[0] > last:
            yield f"{where} has _seq {_NUMBER.unpack(key[-8:])[0]}, the last seq is {last}"


def _outcomes(view: KvReader, last: Seq) -> Iterator[str]:
    aged = {(key[8:], key[:8]) for key, _ in _space(view, Space.OUTCOME_AGE)}
    for key, value in _space(view, Space.OUTCOME):
        if (key, value[:8]) not in aged:
            yield f"the outcome of commit '{key.decode(errors='replace')}' is missing in the index by age"


__all__ = ["check_store", "scope_problem"]
