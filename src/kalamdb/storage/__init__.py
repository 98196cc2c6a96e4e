"""The storage seam: one way to read, one way to change anything.

Every change in the product is a `Batch`, committed atomically or not at all. Backends differ in how
they keep bytes; what a commit means (expectations, `_seq`, fences, job moves) is the same for all,
and `kalamdb.testing.storage` holds each backend to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Final, Protocol

import msgspec

from kalamdb.errors import Conflict, KalamDbError, LeaseLost, Unavailable
from kalamdb.storage import keys
from kalamdb.storage.jobs import Claim, JobFence, JobInsert, JobMove, JobOp, JobRow, JobScrub, JobStore
from kalamdb.types import JobId, RowFlags, Scope, Seq, TableUid

__all__ = [
    "ABSENT",
    "ANY",
    "PRESENT",
    "Batch",
    "Busy",
    "Caps",
    "Claim",
    "Commit",
    "ExpectationFailed",
    "Fenced",
    "HotRow",
    "JobFence",
    "JobInsert",
    "JobMove",
    "JobOp",
    "JobScrub",
    "JobStore",
    "Record",
    "RecordKind",
    "RecordOp",
    "Retire",
    "RowOp",
    "Snapshot",
    "StorageBackend",
    "StreamDelete",
    "StreamRow",
    "UnknownOutcome",
    "record_key",
    "record_prefix",
    "record_uid",
]

ABSENT: Final = 0
"""Expectation: there is no version at all."""

ANY: Final = -1
"""Expectation: none."""

PRESENT: Final = -2
"""Expectation of a record: it exists, whatever its version."""


class ExpectationFailed(Conflict):
    """An expectation of the batch did not hold; nothing was written.

    `what` says which kind: "row" (`index` into Batch.rows, `found` its hot `_seq` or 0), "manifest"
    (`table` moved on since the batch's snapshot), "quiet" (`table`, `found` its newest write), "record" (`key`).
    """

    retryable = True

    def __init__(
        self,
        message: str,
        *,
        what: str,
        index: int = -1,
        found: Seq = 0,
        found_flags: int = RowFlags.NONE,
        table: TableUid | None = None,
        key: bytes = b"",
    ) -> None:
        super().__init__(message)
        self.what = what
        self.index = index
        self.found = found
        self.found_flags = found_flags
        self.table = table
        self.key = key


class Fenced(LeaseLost):
    """A job of the batch is not running under the lease that the batch carries."""


class Busy(Unavailable):
    """The store asks to try again later; nothing was written."""


class UnknownOutcome(KalamDbError):
    """The commit may or may not have happened; ask `outcome(key)`."""

    code = "UNKNOWN_OUTCOME"
    http_status = 503
    retryable = True

    def __init__(self, key: str) -> None:
        super().__init__(f"the outcome of the commit with key '{key}' is not known")
        self.key = key


class RecordKind(IntEnum):
    """What a record describes; the first byte of its key. Part of the stored format."""

    META = 1
    NAMESPACE = 2
    TABLE = 3
    """uid -> the newest TableDef."""
    TABLE_NAME = 4
    """(namespace, name) -> uid."""
    TABLE_VERSION = 5
    """(uid, version) -> TableDef of that version."""
    SEGMENT = 6
    """(uid, segment id) -> SegmentRecord."""
    INTENT = 7
    """(uid, segment id) -> IntentRecord: a file that may come to exist."""
    MANIFEST = 8
    """uid -> manifest version; moves with each change of the table's segments."""
    WATERMARK = 9
    """uid -> watermark W: hot versions at or below it are dead. Kept by the store."""
    REMOVAL = 10
    """uid -> a removal of dead hot versions is pending. Kept by the store."""
    DROPPED = 11
    """uid -> what a DROP left behind, until cleanup is done."""
    STORAGE = 12
    SEQUENCE = 13
    ERASING = 14
    """user id -> that user's rows are being erased; no new row is accepted."""
    SCHEDULE = 15
    USER = 16
    AUDIT = 17
    VIEW = 18
    ERASED = 19
    """uid -> rows of a scope were erased from the hot tier; moves with each erasure, so that a flush whose
    snapshot is older does not publish them."""
    JOB_QUEUE = 20
    """name -> limit and pause of a queue."""
    IDEMPOTENT = 24
    """(user, Idempotency-Key) -> a request over HTTP and its answer."""
    IDEMPOTENT_AGE = 25
    """(time in ms, key of an IDEMPOTENT record): to find those that are old enough to go."""


def record_key(kind: RecordKind, *parts: str | int) -> bytes:
    """Key of a record: order-preserving in its parts (text, or integers of at most 64 bits)."""
    out = bytes([kind])
    for part in parts:
        out += keys.encode_int(part) if isinstance(part, int) else keys.encode_text(part)
    return out


def record_prefix(kind: RecordKind, *parts: str | int) -> tuple[bytes, bytes]:
    """Start (inclusive) and end (exclusive) of all record keys that begin with these parts."""
    prefix = record_key(kind, *parts)
    end = keys.prefix_end(prefix)
    assert end is not None
    return prefix, end


def record_uid(key: bytes) -> TableUid:
    """The table uid that stands first in a record key."""
    return TableUid(keys.decode_int(key[1:]))


@dataclass(frozen=True, slots=True)
class Caps:
    """What a backend can do."""

    inline: bool
    """Calls return without waiting for a network: they may run on an event loop."""
    multi_node: bool
    batch_rows_max: int
    """Rows that one batch may carry."""
    snapshot_age_max_s: float


class Record(msgspec.Struct, frozen=True, gc=False):
    """A stored record; `version` is the `_seq` of the commit that wrote it."""

    version: Seq
    value: bytes


class HotRow(msgspec.Struct, frozen=True, gc=False):
    """The newest hot version of a row. `payload` is opaque to the store."""

    key: bytes
    """Row key: hash, scope and primary key (`storage.keys.row_key`)."""
    seq: Seq
    flags: int
    """Bits of RowFlags."""
    payload: bytes


class StreamRow(msgspec.Struct, frozen=True, gc=False):
    """One row of a STREAM table."""

    scope: Scope
    seq: Seq
    payload: bytes
    bucket: int


class RowOp(msgspec.Struct, frozen=True, gc=False):
    """Write one version of a row.

    `expect` is about the newest version, hot or cold: its `_seq`, ABSENT or ANY. The store refuses a
    hot version above it, and demands that the table's manifest version still is the one in
    `Batch.manifests`, under which the caller looked for the newest version in both tiers.
    With `bucket` the row goes to a STREAM table: no key, no expectation, `key` holds the scope prefix.
    """

    table: TableUid
    key: bytes
    payload: bytes
    flags: int = RowFlags.NONE
    expect: Seq = ANY
    bucket: int | None = None


class RecordOp(msgspec.Struct, frozen=True, gc=False):
    """Put (`value`), delete (`value=None`) or only check (`check=True`) one record.

    `expect`: the record's version, ABSENT, PRESENT or ANY.
    """

    key: bytes
    value: bytes | None = None
    expect: Seq = ANY
    check: bool = False


@dataclass(frozen=True, slots=True)
class StreamDelete:
    """Remove one row of a STREAM table; nothing when it is gone already."""

    table: TableUid
    bucket: int
    key: bytes
    """The scope prefix."""
    seq: Seq


@dataclass(frozen=True, slots=True)
class Retire:
    """Hot versions of `table` with `_seq` at or below `watermark` are in the cold tier now.

    They are dead from this commit on; the store removes them later by `remove_retired`. It is an
    error to move a watermark backwards.
    """

    table: TableUid
    watermark: Seq


@dataclass(slots=True)
class Batch:
    """All that one commit changes, and what must hold for it."""

    rows: list[RowOp] = field(default_factory=list)
    manifests: dict[TableUid, Seq] = field(default_factory=dict)
    """Manifest version under which the expectations of a table's rows were found (see RowOp)."""
    retire: list[Retire] = field(default_factory=list)
    records: list[RecordOp] = field(default_factory=list)
    delete_tables: list[TableUid] = field(default_factory=list)
    """All hot rows and stream rows of these tables go, by one range delete each."""
    delete_buckets: list[tuple[TableUid, int]] = field(default_factory=list)
    """STREAM buckets that go: (table, bucket) removes that bucket, by range delete."""
    delete_scopes: list[tuple[TableUid, Scope]] = field(default_factory=list)
    """All hot rows and stream rows of a scope of a table go, by range delete."""
    delete_stream: list[StreamDelete] = field(default_factory=list)
    jobs: list[JobOp] = field(default_factory=list)
    quiet: list[tuple[TableUid, Seq]] = field(default_factory=list)
    """No hot row of the table was written after that `_seq`; else ExpectationFailed(what="quiet").
    A table about whose past the store knows nothing (just opened) counts as written at the opening."""
    reserve: int = 0
    """Further `_seq` numbers that the commit takes; they end with Commit.seq."""
    idempotency_key: str | None = None
    names_files: bool = False
    """The batch names or un-names files: its commit waits for the disk whatever the durability."""
    hints: set[tuple[TableUid, Scope]] = field(default_factory=set)
    """Whose rows changed: for notification."""

    def is_empty(self) -> bool:
        """Whether committing would change nothing and check nothing."""
        changes = (self.rows, self.retire, self.records, self.delete_tables, self.delete_buckets)
        deletes = (self.delete_scopes, self.delete_stream)
        return not (any(changes) or any(deletes) or self.jobs)


@dataclass(frozen=True, slots=True)
class Commit:
    """A batch that was applied. Not durable before `wait_durable` returns."""

    seq: Seq
    """Last `_seq` of the commit; each commit takes at least one."""
    seqs: Sequence[Seq]
    """`_seq` of each row of the batch, in order; rising."""
    replaced: Sequence[Seq]
    """For each row the `_seq` of the hot version that it replaced, 0 for none (or one at or below the watermark)."""
    jobs: Sequence[JobId] = ()
    """Ids given to the jobs inserted by the batch, in order."""
    changed_jobs: Sequence[JobRow] = ()
    """Jobs that the commit inserted, moved or claimed, as they are now."""
    claimed: Sequence[JobId] = ()
    """Those of them that were claimed, in the order to start them."""
    jobs_wait: bool = False
    """Whether some job may be claimed that could not be before."""
    former: Sequence[bytes | None] = ()
    """When rows of a table in `keep_former` were written: for each row of the batch the payload that it replaced,
    b"" when there was none or a tombstone, None when only the segments know."""
    removed: Sequence[bytes | None] = ()
    """Likewise for each of Batch.delete_stream: the payload that it removed, None when there was none."""


CommitObserver = Callable[[Batch, Commit], None]
"""Called after each commit, in commit order, under the commit lock. Must not block, raise or call the backend."""


class Snapshot(Protocol):
    """A consistent view of the store at `seq`. Short: collect, leave, then read Parquet."""

    @property
    def seq(self) -> Seq:
        """Last `_seq` that was committed when the snapshot was taken."""
        ...

    def records(self, keys: Sequence[bytes]) -> list[Record | None]:
        """The records of `keys`, in order."""
        ...

    def scan_records(
        self, start: bytes, end: bytes, *, reverse: bool = False, limit: int | None = None
    ) -> Iterator[tuple[bytes, Record]]:
        """Records with start <= key < end, in key order. Raises Corrupt on a damaged block."""
        ...

    def rows(self, table: TableUid, keys: Sequence[bytes]) -> list[HotRow | None]:
        """Hot versions (tombstones included) of row keys; None where there is none above the watermark."""
        ...

    def hot(
        self, table: TableUid, scope: Scope | None = None, *, after_key: bytes = b"", chunk_rows: int = 4096
    ) -> Iterator[list[HotRow]]:
        """Hot versions above the watermark, tombstones included, in key order, in chunks of at most
        `chunk_rows`. `scope=None` means every scope. Starts after `after_key`."""
        ...

    def stream(
        self, table: TableUid, scope: Scope | None = None, *, from_bucket: int = 0, chunk_rows: int = 4096
    ) -> Iterator[list[StreamRow]]:
        """Rows of a STREAM table from bucket `from_bucket` (inclusive) on, by bucket, scope and `_seq`."""
        ...

    def buckets(self, table: TableUid) -> list[int]:
        """Buckets of a STREAM table that hold rows, rising. Cost depends on buckets, not rows."""
        ...

    def watermark(self, table: TableUid) -> Seq:
        """The table's watermark, 0 before its first flush."""
        ...


class StorageBackend(Protocol):
    """A store. Thread-safe. Raises Closed after close(), Unavailable after a failed commit."""

    caps: Caps

    @property
    def jobs(self) -> JobStore:
        """Reading jobs."""
        ...

    def now_ms(self) -> int:
        """The store's clock, for leases, run_at and schedules: milliseconds since 1970."""
        ...

    def snapshot(self) -> AbstractContextManager[Snapshot]:
        """A consistent view; released when the context ends."""
        ...

    def latest(self) -> Snapshot:
        """An unisolated reader: each call sees the newest commits. For point reads."""
        ...

    def commit(self, batch: Batch) -> Commit:
        """Apply `batch` atomically. Blocks for the commit lock only, not for the disk.

        Raises ExpectationFailed, Fenced, IdempotencyConflict, Busy (nothing was written),
        UnknownOutcome, or Unavailable (after a failed write, until reopened).
        """
        ...

    def under_lease(self, fence: JobFence | None) -> AbstractContextManager[None]:
        """Inside, each `commit` of this thread holds only under that lease (None: of none), else LeaseLost.

        For statements, whose commits are made in many places; who makes a batch itself puts the fence into it.
        """
        ...

    def claim(self, wanted: Claim, batch: Batch | None = None) -> Commit | None:
        """Apply `batch` and start jobs as `wanted` says, each under a new lease, in one commit.

        None when there was no batch and nothing to do. Raises what `commit` raises.
        """
        ...

    def wait_durable(self, commit: Commit, *, names_files: bool = False) -> None:
        """Block until `commit` is on disk in the configured sense; always so when it `names_files`."""
        ...

    def outcome(self, key: str) -> Commit | None:
        """The commit that carried idempotency key `key`, None if there was none. Kept for 24 hours."""
        ...

    def observe(self, observer: CommitObserver) -> None:
        """Call `observer` on each later commit."""
        ...

    def keep_former(self, tables: Set[TableUid]) -> Seq:
        """Let later commits carry what their rows of `tables` replace, and no others; the last `_seq` before them."""
        ...

    def next_numbers(self, name: str, count: int = 1) -> int:
        """Reserve `count` numbers of the named persistent counter; returns the first. Starts at 1."""
        ...

    def remove_retired(self, rows_max: int = 1000) -> bool:
        """Physically remove up to `rows_max` hot versions at or below a watermark; True if more remain."""
        ...

    def checkpoint(self, path: Path, pin: Callable[[], None]) -> AbstractContextManager[Snapshot]:
        """Write the store as it is now into the new folder `path`, which RocksDB opens; a view of the same moment.

        `pin` is called at that moment, before any later commit; it must not block. Blocks for the disk, and
        commits wait meanwhile. Raises Unavailable.
        """
        ...

    def purge(self, tables: Sequence[TableUid], *, records: bool = False) -> None:
        """Rewrite the store's files so that no replaced, deleted or retired row of `tables` is left in
        them; with `records` no former record and nothing former of a job either. Idempotent. Blocks for the
        disk; what a reader holds open goes when it ends."""
        ...

    def head(self) -> Seq:
        """Last `_seq` given out."""
        ...

    def stats(self) -> Mapping[str, int]:
        """Figures for system.stats: bytes, files, commits, group sizes."""
        ...

    def check(self) -> list[str]:
        """What does not agree in the store, in words: rows, records, jobs, indexes. Reads all of it."""
        ...

    def close(self) -> None:
        """Release everything. Idempotent. Blocks until running commits are through."""
        ...


class StorageKind(StrEnum):
    """The backends that exist."""

    ROCKSDB = "rocksdb"
    MEMORY = "memory"
