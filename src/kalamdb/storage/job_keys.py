"""Keys and values of jobs in an ordered key-value store. Part of the stored format.

Keys after the space byte:
    JOB         job id                                      value: encoded JobRow
    QUEUE       queue, type, priority, due time, job id     new, queued and retrying jobs without hold
    PARKED      concurrency key, order, job id              value: the QUEUE key that it had; see below
    STATUS      status, created_at, job id
    ACTIVE_KEY  idempotency key                             value: job id, of the active job only
    HISTORY     job id, number of the first event           value: events that one commit wrote
    COMMITTED   position of the first event                 value: the events of one commit, over all jobs
    ATTEMPT     job id, attempt                             value: encoded JobAttempt, of all but the newest
    COUNT       status, queue                               value: how many
    META        name                                        lease counter, highest event position

A due job whose concurrency key a running job has is parked: it leaves QUEUE, so that no claim meets it
again. When a job of that key stops running, or one that waits in QUEUE leaves it, the first parked one
returns. So a parked job always has another of its key that is running or due.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Final

import msgspec

from kalamdb.storage import keys
from kalamdb.storage.job_lanes import lane_key
from kalamdb.storage.jobs import AGEING_MS, JobAttempt, JobEvent, JobRow, JobStatus
from kalamdb.types import JobId


class JobSpace(IntEnum):
    """First byte of job keys; above those of kv.Space."""

    JOB = 0x10
    QUEUE = 0x11
    STATUS = 0x12
    ACTIVE_KEY = 0x13
    COMMITTED = 0x14
    HISTORY = 0x15
    COUNT = 0x16
    META = 0x17
    ATTEMPT = 0x18
    PARKED = 0x19


JOB: Final = bytes([JobSpace.JOB])
QUEUE: Final = bytes([JobSpace.QUEUE])
STATUS: Final = bytes([JobSpace.STATUS])
ACTIVE: Final = bytes([JobSpace.ACTIVE_KEY])
COMMITTED: Final = bytes([JobSpace.COMMITTED])
COUNT: Final = bytes([JobSpace.COUNT])
LEASE: Final = bytes([JobSpace.META]) + b"lease"
POSITION: Final = bytes([JobSpace.META]) + b"event_position"
_PARKED: Final = bytes([JobSpace.PARKED])
_HISTORY: Final = bytes([JobSpace.HISTORY])
_ATTEMPT: Final = bytes([JobSpace.ATTEMPT])

JOB_SPACES: Final = (JOB, bytes([max(JobSpace) + 1]))
"""The range of all keys of jobs."""

NAMING: Final = (JOB, _HISTORY, _ATTEMPT)
"""Spaces whose values are texts of a job; after the prefix each key begins with the job id."""

STATUSES: Final = tuple(JobStatus)
STATUS_BYTE: Final = {status: bytes([at]) for at, status in enumerate(STATUSES)}
NUMBER: Final = struct.Struct(">Q")
STATUS_KEY_BYTES: Final = 10
"""Bytes of a STATUS key before the job id."""
_PARKED_ZERO: Final = 1 << 62
_CLAIMABLE: Final = frozenset({JobStatus.NEW, JobStatus.QUEUED, JobStatus.RETRYING})

encode = msgspec.msgpack.Encoder().encode
decode_row = msgspec.msgpack.Decoder(JobRow).decode
decode_attempt = msgspec.msgpack.Decoder(JobAttempt).decode
decode_history = msgspec.msgpack.Decoder(tuple[int, int, list[tuple[str, str]]]).decode
"""Position of the first event, time, (level, text) of each."""
decode_committed = msgspec.msgpack.Decoder(list[tuple[str, int, int]]).decode
"""(job id, number of its first event, how many events)."""


def after(prefix: bytes) -> bytes:
    """The smallest key above all that begin so."""
    end = keys.prefix_end(prefix)
    assert end is not None
    return end


def queue_key(row: JobRow) -> bytes | None:
    """Where a job waits to be claimed; None for one that cannot be."""
    return lane_key(QUEUE, row) if row.status in _CLAIMABLE and row.hold is None else None


def parked_prefix(name: str) -> bytes:
    """First bytes of what is parked under a concurrency key."""
    return _PARKED + keys.encode_text(name)


def parked_key(row: JobRow) -> bytes | None:
    """Where a job is parked that another of its concurrency key keeps from running."""
    if row.concurrency_key is None:
        return None
    order = NUMBER.pack(_PARKED_ZERO + row.due_at - row.priority * AGEING_MS)
    return parked_prefix(row.concurrency_key) + order + row.job_id.encode()


def status_key(row: JobRow) -> bytes:
    """Entry in the index by state and age."""
    return STATUS + STATUS_BYTE[row.status] + NUMBER.pack(max(row.created_at, 0)) + row.job_id.encode()


def history_prefix(job_id: JobId) -> bytes:
    """First bytes of the events of a job."""
    return _HISTORY + job_id.encode() + b"\x00"


def attempts_prefix(job_id: JobId) -> bytes:
    """First bytes of the attempts of a job."""
    return _ATTEMPT + job_id.encode() + b"\x00"


def unpack_events(job_id: JobId, first: int, body: bytes) -> Iterator[JobEvent]:
    """The events of one HISTORY entry, whose first has number `first`."""
    position, at, events = decode_history(body)
    for offset, (level, text) in enumerate(events):
        yield JobEvent(job_id=job_id, number=first + offset, at=at, level=level, text=text, position=position + offset)
