"""Finding jobs: which the index by status offers, which match, in which order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from heapq import merge, nlargest, nsmallest
from typing import Any

from kalamdb.errors import InvalidRequest
from kalamdb.storage import job_keys as jk
from kalamdb.storage.jobs import JobFilter, JobRow, JobStatus
from kalamdb.storage.ordered import KvReader
from kalamdb.types import JobId


def candidates(
    view: KvReader, wanted: JobFilter, floors: Mapping[JobStatus, bytes], totals: Mapping[JobStatus, int]
) -> Iterator[JobId]:
    """Ids from the status index, by created_at and id."""
    statuses = JobStatus if wanted.statuses is None else wanted.statuses
    low = jk.NUMBER.pack(max(wanted.created_after or 0, 0))
    high = None if wanted.created_before is None else jk.NUMBER.pack(max(wanted.created_before, 0))
    streams = []
    for status in statuses:
        prefix = jk.STATUS + jk.STATUS_BYTE[status]
        end = jk.after(prefix) if high is None else prefix + high
        start = max(prefix + low, floors[status])
        scan = view.scan(start, max(start, end), reverse=wanted.descending, limit=totals[status])
        streams.append(key[2:] for key, _ in scan)
    for key in merge(*streams, reverse=wanted.descending):
        yield JobId(key[jk.STATUS_KEY_BYTES - 2 :].decode())


def matches(row: JobRow, wanted: JobFilter) -> bool:
    """Whether a row is wanted, as far as the index does not say."""
    return (
        (wanted.job_type is None or row.job_type == wanted.job_type)
        and (wanted.queue is None or row.queue == wanted.queue)
        and (wanted.idempotency_key is None or row.idempotency_key == wanted.idempotency_key)
        and (wanted.table_uid is None or row.table_uid == wanted.table_uid)
    )


def in_order(rows: Iterator[JobRow], wanted: JobFilter) -> list[JobRow]:
    """By a column that no index has; keeps no more rows than are wanted."""

    def order(row: JobRow) -> tuple[bool, Any, JobId]:
        value = getattr(row, wanted.sort_by)
        return value is not None, 0 if value is None else value, row.job_id

    try:
        if wanted.limit is None:
            return sorted(rows, key=order, reverse=wanted.descending)
        return (nlargest if wanted.descending else nsmallest)(wanted.limit, rows, key=order)
    except TypeError:
        raise InvalidRequest(f"jobs cannot be sorted by '{wanted.sort_by}'") from None


__all__ = ["candidates", "in_order", "matches"]
