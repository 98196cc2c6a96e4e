"""What time removes: deletions past their retention, and stream rows past their time to live."""

from __future__ import annotations

from dataclasses import dataclass

from kalamdb.catalog import CatalogEntry
from kalamdb.storage import Batch
from kalamdb.tables.compact import compact_table, expired_seq
from kalamdb.tables.flush import JobHandle, Message, Step, flush_table
from kalamdb.tables.read import bucket_of, bucket_width_ms
from kalamdb.tables.store import TableStore
from kalamdb.types import TableKind, TableUid


@dataclass(frozen=True, slots=True)
class RetentionReport:
    """What a retention removed for good."""

    seen: int = 0
    """Tables that were looked at."""
    tables: int = 0
    rows: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class EvictionReport:
    """What a stream eviction removed."""

    streams: int = 0
    buckets: int = 0


def retain_tables(
    store: TableStore, uid: TableUid | None, job: JobHandle, *, retention_hours: float | None = None
) -> RetentionReport:
    """Remove rows that were deleted longer ago than the retention of their table, of one table or of all.

    Each table is one flush and one compaction, each a commit of its own; a table that is done holds
    nothing expired, so a repetition goes on where the last one stopped. The job's end is left to the caller.
    Blocks for the disk. Raises TransactionConflict when another compaction came first.
    """
    entries = _chosen(store, uid, TableKind.USER, TableKind.SHARED)
    tables = rows = bytes_ = 0
    purged: list[TableUid] = []
    for at, entry in enumerate(entries):
        job.check()
        job.progress(at, len(entries), "tables", str(entry.definition.table_id))
        removed = _retain(store, entry, Step(job), retention_hours)
        if removed is not None:
            purged.append(entry.definition.uid)
            tables, rows, bytes_ = tables + 1, rows + removed[0], bytes_ + removed[1]
    if purged:
        store.backend.purge(purged)
    job.progress(len(entries), len(entries), "tables")
    return RetentionReport(len(entries), tables, rows, bytes_)


def _retain(
    store: TableStore, entry: CatalogEntry, job: JobHandle, retention_hours: float | None
) -> tuple[int, int] | None:
    """(rows, bytes) removed; None when nothing of the table has expired."""
    uid = entry.definition.uid
    expired = expired_seq(store, entry, retention_hours)
    with store.hot.lock:
        oldest = store.figures(uid).oldest_seq
    if oldest and oldest <= expired:
        flush_table(store, uid, job)
    if not any(one.record.tombstones and one.seq_min <= expired for one in store.state(uid).segments):
        return None
    report = compact_table(store, uid, job, full=True, retention_hours=retention_hours)
    if report is None:
        return None
    removed = report.tombstones_before - report.tombstones_after
    return (removed, report.bytes_before - report.bytes_after) if removed else None


def evict_streams(store: TableStore, uid: TableUid | None, job: JobHandle, message: Message) -> EvictionReport:
    """Remove the buckets of streams whose rows have all outlived their TTL, by range delete; ends the job.

    What it costs depends on the number of buckets, at most 64 per TTL, not on the number of rows.
    """
    entries = _chosen(store, uid, TableKind.STREAM)
    streams = buckets = 0
    for at, entry in enumerate(entries):
        job.check()
        expired = expired_buckets(store, entry)
        if expired:
            batch = Batch(delete_buckets=[(entry.definition.uid, bucket) for bucket in expired])
            job.seal(batch)
            store.commit(batch)
            streams, buckets = streams + 1, buckets + len(expired)
        job.progress(at + 1, len(entries), "streams")
    report = EvictionReport(streams, buckets)
    batch = Batch()
    job.seal(batch, message=message(report), result={"streams": streams, "buckets": buckets})
    store.commit(batch)
    return report


def expired_buckets(store: TableStore, entry: CatalogEntry) -> list[int]:
    """Buckets of a stream that hold no row that is younger than its TTL."""
    ttl_s = entry.definition.options.ttl_s or 0
    oldest_ms = store.backend.now_ms() - ttl_s * 1000
    first_kept = bucket_of(oldest_ms, ttl_s)
    assert first_kept + bucket_width_ms(ttl_s) > oldest_ms
    with store.backend.snapshot() as snapshot:
        return [bucket for bucket in snapshot.buckets(entry.definition.uid) if bucket < first_kept]


def _chosen(store: TableStore, uid: TableUid | None, *kinds: TableKind) -> list[CatalogEntry]:
    entries = store.catalog.tables() if uid is None else [store.entry(uid)]
    return [entry for entry in entries if entry.definition.kind in kinds]
