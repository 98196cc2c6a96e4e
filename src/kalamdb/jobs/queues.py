"""Queues: how many of their jobs may run at once, and whether they are paused. Kept in the store."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import msgspec

from kalamdb.clock import Clock
from kalamdb.errors import InvalidRequest
from kalamdb.storage import Batch, RecordKind, RecordOp, StorageBackend, record_key, record_prefix
from kalamdb.storage.jobs import JobStatus

DEFAULT_QUEUE = "default"
MAINTENANCE_QUEUE = "maintenance"
"""Queue of the built-in executors."""
_NAME_LENGTH_MAX = 64


class QueueRow(msgspec.Struct, frozen=True, kw_only=True):
    """What is stored of a queue; one without a row has no limit and runs."""

    name: str
    max_concurrent: int | None = None
    paused: bool = False
    paused_by: str | None = None
    paused_at: int | None = None
    reason: str | None = None


def check_queue_name(name: Any) -> str:
    """The name, if it is one. Raises InvalidRequest."""
    if not isinstance(name, str) or not 0 < len(name) <= _NAME_LENGTH_MAX or not name.isprintable():
        raise InvalidRequest(f"queue {name!r} is not a printable name of 1 to {_NAME_LENGTH_MAX} characters")
    return name


class JobQueues:
    """All queues of a database. Thread-safe; changes are durable on return."""

    def __init__(self, backend: StorageBackend, clock: Clock) -> None:
        self._backend = backend
        self._clock = clock
        self._lock = threading.Lock()
        self._rows: dict[str, QueueRow] = {}
        start, end = record_prefix(RecordKind.JOB_QUEUE)
        with backend.snapshot() as snapshot:
            for _, record in snapshot.scan_records(start, end):
                row = msgspec.msgpack.decode(record.value, type=QueueRow)
                self._rows[row.name] = row

    def get(self, name: str) -> QueueRow:
        """One queue, whether it was ever named or not."""
        return self._rows.get(name) or QueueRow(name=name)

    def limit(self, name: str) -> int | None:
        """How many jobs of it may run at once: 0 when it is paused, None without a limit."""
        row = self._rows.get(name)
        return None if row is None else 0 if row.paused else row.max_concurrent

    def all(self) -> list[QueueRow]:
        """Queues that have jobs, a limit or a pause, by name."""
        return [self.get(name) for name in sorted({DEFAULT_QUEUE, *self._backend.jobs.queues(), *self._rows})]

    def table_rows(self) -> list[Sequence[Any]]:
        """Rows of system.job_queues."""
        count = self._backend.jobs.count
        return [
            (
                row.name,
                row.max_concurrent,
                row.paused,
                row.paused_by,
                row.paused_at,
                row.reason,
                *(count(status, row.name) for status in JobStatus if status.is_active),
            )
            for row in self.all()
        ]

    def pause(self, name: str, *, by: str, reason: str | None) -> QueueRow:
        """Start no further job of it; those that run go on."""
        return self._change(name, paused=True, paused_by=by, paused_at=self._clock.now_ms(), reason=reason)

    def resume(self, name: str) -> QueueRow:
        """Start its jobs again."""
        return self._change(name, paused=False, paused_by=None, paused_at=None, reason=None)

    def set_limit(self, name: str, max_concurrent: int | None) -> QueueRow:
        """At most so many of its jobs run at once; None lifts the limit. Running ones go on."""
        if max_concurrent is not None and (isinstance(max_concurrent, bool) or max_concurrent < 1):
            raise InvalidRequest(f"max_concurrent is {max_concurrent!r}; 1 or more is allowed (pause the queue for 0)")
        return self._change(name, max_concurrent=max_concurrent)

    def _change(self, name: str, **changes: Any) -> QueueRow:
        with self._lock:
            row = msgspec.structs.replace(self.get(check_queue_name(name)), **changes)
            key = record_key(RecordKind.JOB_QUEUE, name)
            commit = self._backend.commit(Batch(records=[RecordOp(key, msgspec.msgpack.encode(row))]))
            self._rows[name] = row
        self._backend.wait_durable(commit)
        return row
