"""What a commit means, over any ordered key-value store.

RocksDB and memory differ in how they keep bytes (`OrderedKv`); expectations, `_seq`, watermarks, fences
and group commit are the same and live here.

Keys: one byte of space, then
    META     name
    RECORD   record key                       value: version (8) + bytes
    ROW      table uid (8), row key           value: _seq (8), flags (1), payload
    STREAM   table uid (8), bucket (8), scope prefix, _seq (8)
    OUTCOME  idempotency key                  value: time (8) + encoded commit
    OUTCOME_AGE  time (8), idempotency key    to find the outcomes that are old enough to go
    JOB...   see job_index
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import islice
from pathlib import Path

import msgspec

from kalamdb.clock import Clock, seq_at_ms
from kalamdb.errors import Closed, Internal, InvalidRequest, KalamDbError
from kalamdb.service import uninterrupted
from kalamdb.storage import (
    ABSENT,
    ANY,
    PRESENT,
    Batch,
    Commit,
    CommitObserver,
    ExpectationFailed,
    HotRow,
    Record,
    RecordKind,
    RecordOp,
    Retire,
    RowOp,
    Snapshot,
    StreamDelete,
    StreamRow,
    keys,
    record_key,
    record_prefix,
    record_uid,
)
from kalamdb.storage.bound import ThreadLease
from kalamdb.storage.committer import Committer, refused
from kalamdb.storage.former import ROW_HEADER, former_payloads
from kalamdb.storage.job_index import JobIndex, Staged
from kalamdb.storage.job_keys import JOB_SPACES
from kalamdb.storage.jobs import Claim, JobFence
from kalamdb.storage.kv_check import check_store
from kalamdb.storage.ordered import KvReader, OrderedKv, Range, Write
from kalamdb.storage.spaces import Space
from kalamdb.types import Scope, Seq, TableUid

_META = bytes([Space.META])
_RECORD = bytes([Space.RECORD])
_RECORD_END = bytes([Space.RECORD + 1])
_ROW = bytes([Space.ROW])
_STREAM = bytes([Space.STREAM])
_OUTCOME = bytes([Space.OUTCOME])
_OUTCOME_AGE = bytes([Space.OUTCOME_AGE])
_LAST_SEQ = _META + b"last_seq"
_NUMBER = struct.Struct(">Q")
_NUMBER_BLOCK = 1024
_OUTCOME_KEPT_MS = 24 * 3_600_000
_OUTCOMES_PRUNED_MAX = 8
"""Old outcomes that one commit with a key removes: more than it adds, so they never pile up."""
_REMOVAL_ROWS_MAX = 1000


def _table_key(uid: TableUid) -> bytes:
    return _NUMBER.pack(uid)


def _row_range(uid: TableUid, start: bytes = b"", end: bytes | None = None) -> Range:
    prefix = _ROW + _table_key(uid)
    if end is not None:
        return prefix + start, prefix + end
    above = keys.prefix_end(prefix)
    assert above is not None
    return prefix + start, above


class Reader:
    """Typed reads over raw ones; a `Snapshot` when the raw reader is one."""

    def __init__(
        self, kv: KvReader, seq: Seq, watermarks: Mapping[TableUid, Seq], check_open: Callable[[], None]
    ) -> None:
        self._kv = kv
        self._seq = seq
        self._watermarks = watermarks
        self._check_open = check_open

    @property
    def seq(self) -> Seq:
        """See Snapshot."""
        return self._seq

    def records(self, wanted: Sequence[bytes]) -> list[Record | None]:
        """See Snapshot."""
        self._check_open()
        return [_record(value) for value in self._kv.get_many([_RECORD + key for key in wanted])]

    def scan_records(
        self, start: bytes, end: bytes, *, reverse: bool = False, limit: int | None = None
    ) -> Iterator[tuple[bytes, Record]]:
        """See Snapshot."""
        self._check_open()
        for key, value in islice(self._kv.scan(_RECORD + start, _RECORD + end, reverse=reverse), limit):
            record = _record(value)
            assert record is not None
            yield key[1:], record

    def rows(self, table: TableUid, row_keys: Sequence[bytes]) -> list[HotRow | None]:
        """See Snapshot."""
        self._check_open()
        prefix, watermark = _ROW + _table_key(table), self.watermark(table)
        values = self._kv.get_many([prefix + key for key in row_keys])
        return [_hot_row(key, value, watermark) for key, value in zip(row_keys, values, strict=True)]

    def hot(
        self, table: TableUid, scope: Scope | None = None, *, after_key: bytes = b"", chunk_rows: int = 4096
    ) -> Iterator[list[HotRow]]:
        """See Snapshot."""
        self._check_open()
        watermark = self.watermark(table)
        first, last = b"", None
        if scope is not None:
            first = keys.scope_prefix(scope)
            last = keys.prefix_end(first)
        if after_key >= first and after_key:
            first = after_key + b"\x00"
        chunk: list[HotRow] = []
        for key, value in self._kv.scan(*_row_range(table, first, last)):
            row = _hot_row(key[9:], value, watermark)
            if row is None:
                continue
            chunk.append(row)
            if len(chunk) >= chunk_rows:
                yield chunk
                self._check_open()
                chunk = []
        if chunk:
            yield chunk

    def stream(
        self, table: TableUid, scope: Scope | None = None, *, from_bucket: int = 0, chunk_rows: int = 4096
    ) -> Iterator[list[StreamRow]]:
        """See Snapshot."""
        chunk: list[StreamRow] = []
        for bucket in self.buckets(table):
            if bucket < from_bucket:
                continue
            prefix = _STREAM + _table_key(table) + _NUMBER.pack(bucket)
            if scope is not None:
                prefix += keys.scope_prefix(scope)
            end = keys.prefix_end(prefix)
            assert end is not None
            for key, value in self._kv.scan(prefix, end):
                owner, _ = keys.split_row_key(key[17:])
                chunk.append(StreamRow(owner, _NUMBER.unpack(key[-8:])[0], value, bucket))
                if len(chunk) >= chunk_rows:
                    yield chunk
                    self._check_open()
                    chunk = []
        if chunk:
            yield chunk

    def buckets(self, table: TableUid) -> list[int]:
        """See Snapshot."""
        self._check_open()
        prefix = _STREAM + _table_key(table)
        end = keys.prefix_end(prefix)
        assert end is not None
        found: list[int] = []
        start = prefix
        while True:
            first = next(iter(self._kv.scan(start, end)), None)
            if first is None:
                return found
            bucket: int = _NUMBER.unpack(first[0][9:17])[0]
            found.append(bucket)
            start = prefix + _NUMBER.pack(bucket + 1)

    def watermark(self, table: TableUid) -> Seq:
        """See Snapshot."""
        return self._watermarks.get(table, 0)


def _record(value: bytes | None) -> Record | None:
    return None if value is None else Record(_NUMBER.unpack_from(value)[0], value[8:])


def _hot_row(key: bytes, value: bytes | None, watermark: Seq) -> HotRow | None:
    if value is None:
        return None
    seq, flags = ROW_HEADER.unpack_from(value)
    return HotRow(key, seq, flags, value[9:]) if seq > watermark else None


class KvBackend:
    """`StorageBackend` over an `OrderedKv`. `durability` is "commit" (each commit waits for the disk) or
    "os" (only commits that name files do). `on_close` runs last in close()."""

    def __init__(
        self,
        kv: OrderedKv,
        clock: Clock,
        *,
        durability: str = "commit",
        node_id: int = 0,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        if durability not in ("commit", "os"):
            raise InvalidRequest(f"storage.durability is '{durability}'; it must be 'commit' or 'os'")
        self.caps = kv.caps
        self._kv = kv
        self._clock = clock
        self._durable_always = durability == "commit"
        self._node_bits = (node_id & 0x3FF) << 12
        self._on_close = on_close
        self._pid = os.getpid()
        # Reentrant: an observer and a claim's callback may read through the backend.
        self._lock = threading.RLock()
        self._bound = ThreadLease()
        self._observers: list[CommitObserver] = []
        self._former_of: Set[TableUid] = frozenset()
        self._closed = False
        self._failure: str | None = None
        stored = kv.get(_LAST_SEQ)
        self._last: Seq = _NUMBER.unpack(stored)[0] if stored else 0
        self._opened_at = self._last
        self._heads: dict[TableUid, Seq] = {}
        self._watermarks: dict[TableUid, Seq] = {}
        self._removals: dict[TableUid, bytes] = {}
        """Where the removal of a table's dead versions goes on."""
        for key, value in kv.scan(*_record_range(RecordKind.WATERMARK)):
            self._watermarks[record_uid(key[1:])] = _NUMBER.unpack(value[8:])[0]
        for key, _ in kv.scan(*_record_range(RecordKind.REMOVAL)):
            self._removals[record_uid(key[1:])] = b""
        self._numbers: dict[str, tuple[int, int]] = {}
        self._commits = 0
        self._committer = Committer(kv, self.head, self._fail)
        self._jobs = JobIndex(kv, clock, self._lock, self._commit, self._check_open)

    @property
    def jobs(self) -> JobIndex:
        """Reading and claiming jobs."""
        return self._jobs

    def now_ms(self) -> int:
        """The clock of this process."""
        return self._clock.now_ms()

    @contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        """See StorageBackend."""
        with self._lock:
            self._check_open()
            raw = self._kv.snapshot()
            reader = Reader(raw, self._last, dict(self._watermarks), self._check_open)
        try:
            yield reader
        finally:
            raw.close()

    @contextmanager
    def checkpoint(self, path: Path, pin: Callable[[], None]) -> Iterator[Snapshot]:
        """See StorageBackend."""
        with ExitStack() as stack:
            with self._lock:
                self._check_writable()
                pin()
                self._kv.checkpoint(path)
                snapshot = stack.enter_context(self.snapshot())
            yield snapshot

    def latest(self) -> Snapshot:
        """See StorageBackend."""
        self._check_open()
        return Reader(self._kv, self._last, self._watermarks, self._check_open)

    def head(self) -> Seq:
        """See StorageBackend."""
        return self._last

    def observe(self, observer: CommitObserver) -> None:
        """See StorageBackend."""
        with self._lock:
            self._observers.append(observer)

    def keep_former(self, tables: Set[TableUid]) -> Seq:
        """See StorageBackend."""
        with self._lock:
            self._former_of = frozenset(tables)
            return self._last

    def commit(self, batch: Batch) -> Commit:
        """See StorageBackend. A batch whose idempotency key is known is not applied again."""
        with self._lock:
            if (fence := self._bound.fence) is not None:
                self._jobs.check_lease(fence)
            return self._commit(batch)

    def under_lease(self, fence: JobFence | None) -> AbstractContextManager[None]:
        """See StorageBackend."""
        return self._bound.under(fence)

    def claim(self, wanted: Claim, batch: Batch | None = None) -> Commit | None:
        """See StorageBackend."""
        done = self._commit(batch or Batch(), claim=wanted)
        return None if batch is None and not done.changed_jobs else done

    def _commit(
        self,
        batch: Batch,
        *,
        claim: Claim | None = None,
        prepared: Staged | None = None,
        ranges: Sequence[Range] = (),
    ) -> Commit:
        with self._lock:
            self._check_writable()
            known = self._known_outcome(batch.idempotency_key)
            if known is not None:
                return known
            # A lease that is gone is the first reason to refuse: what else does not hold follows from it.
            staged = prepared or self._jobs.stage(batch.jobs, claim)
            row_keys = _stored_keys(batch.rows)
            found, former = self._check(batch, row_keys)
            removed = self._removed(batch)
            first = max(seq_at_ms(self._clock.now_ms()) | self._node_bits, self._last + 1)
            seqs = range(first, first + len(batch.rows))
            seq = max(first, first + len(batch.rows) + batch.reserve - 1)
            if claim is not None and staged.is_empty and batch.is_empty():
                return Commit(self._last, (), ())
            writes: list[Write] = staged.writes
            for op, key, seq_ in zip(batch.rows, row_keys, seqs, strict=True):
                if op.bucket is None:
                    writes.append((key, ROW_HEADER.pack(seq_, op.flags) + op.payload))
                else:
                    writes.append((key + _NUMBER.pack(seq_), op.payload))
            for gone in batch.delete_stream:
                writes.append((_stream_key(gone), None))
            for change in batch.records:
                if not change.check:
                    writes.append(
                        (_RECORD + change.key, None if change.value is None else _NUMBER.pack(seq) + change.value)
                    )
            for retire in batch.retire:
                self._stage_retire(retire, seq, writes)
            commit = Commit(
                seq, seqs, found, tuple(staged.ids), staged.rows, tuple(staged.claimed), bool(staged.joined),
                former, removed,
            )  # fmt: skip
            if batch.idempotency_key is not None:
                self._stage_outcome(batch.idempotency_key, commit, writes)
            writes.append((_LAST_SEQ, _NUMBER.pack(seq)))
            assert seq > self._last
            self._apply(batch, commit, staged, writes, ranges)
        return commit

    def _apply(
        self, batch: Batch, commit: Commit, staged: Staged, writes: list[Write], ranges: Sequence[Range]
    ) -> None:
        """Write, and follow in memory: both or none, whatever Ctrl-C falls in between."""
        with uninterrupted():
            self._write(writes, [*self._deleted_ranges(batch), *ranges])
            try:
                self._last = commit.seq
                self._jobs.apply(staged)
                self._follow(batch, commit)
            except BaseException as exc:
                self._fail(f"memory is behind the store after {type(exc).__name__}: {exc}")
                raise

    def wait_durable(self, commit: Commit, *, names_files: bool = False) -> None:
        """See StorageBackend."""
        if self._durable_always or names_files:
            self._committer.wait(commit.seq)

    def outcome(self, key: str) -> Commit | None:
        """See StorageBackend."""
        self._check_open()
        return self._known_outcome(key)

    def next_numbers(self, name: str, count: int = 1) -> int:
        """See StorageBackend. Blocks for the disk once in a thousand numbers."""
        if count < 1:
            raise Internal(f"{count} numbers of counter '{name}' cannot be reserved")
        with self._lock:
            self._check_writable()
            following, end = self._numbers.get(name, (0, 0))
            if following + count > end:
                following, end = self._reserve_numbers(name, count)
            self._numbers[name] = (following + count, end)
            return following

    def _reserve_numbers(self, name: str, count: int) -> tuple[int, int]:
        # What is left of the block before is skipped: gaps are allowed, repetition is not.
        key = _META + b"number:" + name.encode()
        stored = self._kv.get(key)
        following: int = _NUMBER.unpack(stored)[0] if stored else 1
        end = following + max(count, _NUMBER_BLOCK)
        self._write([(key, _NUMBER.pack(end))], [])
        if self._durable_always:
            # A number may leave the process without a commit that would be durable after this write.
            try:
                self._kv.sync()
            except KalamDbError as exc:
                self._fail(str(exc))
                raise
        return following, end

    def remove_retired(self, rows_max: int = _REMOVAL_ROWS_MAX) -> bool:
        """See StorageBackend."""
        with self._lock:
            self._check_writable()
            if not self._removals:
                return False
            uid, start = next(iter(self._removals.items()))
            watermark = self._watermarks.get(uid, 0)
            if self._heads.get(uid, self._opened_at) <= watermark:
                return self._end_removal(uid, [], [_row_range(uid)])
        # Read without the lock; what is dead stays dead unless it is overwritten, which is checked below.
        limit = max(1, min(rows_max, _REMOVAL_ROWS_MAX))
        seen = list(islice(self._kv.scan(*_row_range(uid, start)), limit))
        dead = [key for key, value in seen if ROW_HEADER.unpack_from(value)[0] <= watermark]
        with self._lock:
            self._check_writable()
            if uid not in self._removals:
                return bool(self._removals)
            writes: list[Write] = [
                (key, None)
                for key, value in zip(dead, self._kv.get_many(dead), strict=True)
                if value is not None and ROW_HEADER.unpack_from(value)[0] <= watermark
            ]
            if self._watermarks.get(uid, 0) != watermark:
                # Another flush came in between: what was passed may be dead by now.
                self._removals[uid] = b""
            elif len(seen) == limit:
                self._removals[uid] = seen[-1][0][9:] + b"\x00"
            else:
                return self._end_removal(uid, writes, [])
            if writes:
                self._write(writes, [])
            return True

    def _end_removal(self, uid: TableUid, writes: list[Write], ranges: list[Range]) -> bool:
        self._write([*writes, (_RECORD + record_key(RecordKind.REMOVAL, uid), None)], ranges)
        del self._removals[uid]
        return bool(self._removals)

    def purge(self, tables: Sequence[TableUid], *, records: bool = False) -> None:
        """See StorageBackend."""
        self._check_writable()
        while any(uid in self._removals for uid in tables):
            self.remove_retired()
        ranges = [range_ for uid in tables for range_ in _table_ranges(uid)]
        if records:
            ranges += [(_RECORD, _RECORD_END), JOB_SPACES]
        self._kv.purge(ranges)

    def stats(self) -> Mapping[str, int]:
        """See StorageBackend."""
        self._check_open()
        return {
            **self._kv.stats(),
            "commits": self._commits,
            "commit_groups": self._committer.groups,
            "removals_pending": len(self._removals),
            "writes_refused": int(self._failure is not None),
        }

    def check(self) -> list[str]:
        """See StorageBackend."""
        with self._lock:
            self._check_open()
            raw = self._kv.snapshot()
        try:
            return check_store(raw)
        finally:
            raw.close()

    def close(self) -> None:
        """See StorageBackend."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
        try:
            self._committer.stop()
            self._kv.close()
        finally:
            self._on_close()

    # Checking

    def _check_open(self) -> None:
        if os.getpid() != self._pid:
            raise Closed(
                f"the database was opened by process {self._pid}; after fork() process {os.getpid()} must open its own"
            )
        if self._closed:
            raise Closed("the database is closed; open it again")

    def _check_writable(self) -> None:
        self._check_open()
        if self._failure is not None:
            raise refused(self._failure)

    def _fail(self, cause: str) -> None:
        """Refuse writes from now on: what reached the disk is not known before it is opened again."""
        self._failure = self._failure or cause

    def _write(self, writes: Sequence[Write], ranges: Sequence[Range]) -> None:
        try:
            self._kv.write(writes, ranges)
        except KalamDbError as exc:
            self._fail(str(exc))
            raise

    def _check(self, batch: Batch, row_keys: Sequence[bytes]) -> tuple[list[Seq], Sequence[bytes | None]]:
        """Expectations of the batch; returns the `_seq` of each row's hot version, 0 for none, and Commit.former."""
        checked = [op for op in batch.records if op.expect != ANY]
        for op, stored in zip(checked, self._kv.get_many([_RECORD + op.key for op in checked]), strict=True):
            _check_record(op, stored)
        for table, since in batch.quiet:
            head = self._heads.get(table, self._opened_at)
            if head > since:
                raise ExpectationFailed(
                    f"table {table} was written at {head}, after {since}", what="quiet", table=table, found=head
                )
        for retire in batch.retire:
            current = self._watermarks.get(retire.table, 0)
            if not current <= retire.watermark <= self._last:
                raise Internal(
                    f"the watermark of table {retire.table} cannot move from {current} to {retire.watermark} "
                    f"(the last seq is {self._last})"
                )
        return self._check_rows(batch, row_keys) if batch.rows else ([], ())

    def _check_rows(self, batch: Batch, row_keys: Sequence[bytes]) -> tuple[list[Seq], Sequence[bytes | None]]:
        checked = [at for at, op in enumerate(batch.rows) if op.bucket is None]
        wanted = [row_keys[at] for at in checked] if len(checked) < len(row_keys) else row_keys
        if len(set(wanted)) != len(wanted):
            raise Internal("a batch writes one row twice")
        current: set[TableUid] = set()
        found: list[Seq] = [0] * len(batch.rows)
        values = self._kv.get_many(wanted)
        for at, value in zip(checked, values, strict=True):
            op = batch.rows[at]
            if value is not None:
                seq, flags = ROW_HEADER.unpack_from(value)
                if seq > self._watermarks.get(op.table, 0):
                    found[at] = seq
                    if seq > op.expect != ANY:
                        raise ExpectationFailed(
                            f"a row is at version {seq}, expected {_expected(op.expect)}",
                            what="row", index=at, found=seq, found_flags=flags, table=op.table,
                        )  # fmt: skip
            # A hot version may be older than a cold one: large statements write segments. So the
            # manifest under which the newest version was found must hold for every row.
            if op.expect != ANY and op.table not in current:
                if self._manifest(op.table) != batch.manifests.get(op.table, 0):
                    raise ExpectationFailed(
                        f"the segments of table {op.table} changed since the row was looked up",
                        what="manifest", index=at, table=op.table,
                    )  # fmt: skip
                current.add(op.table)
        if not self._former_of or self._former_of.isdisjoint([op.table for op in batch.rows]):
            return found, ()
        return found, former_payloads(batch.rows, dict(zip(checked, values, strict=True)), found)

    def _removed(self, batch: Batch) -> Sequence[bytes | None]:
        if not self._former_of or self._former_of.isdisjoint([row.table for row in batch.delete_stream]):
            return ()
        return self._kv.get_many([_stream_key(row) for row in batch.delete_stream])

    def _manifest(self, uid: TableUid) -> Seq:
        stored = self._kv.get(_RECORD + record_key(RecordKind.MANIFEST, uid))
        return _NUMBER.unpack_from(stored)[0] if stored is not None else 0

    # Staging

    def _stage_retire(self, retire: Retire, seq: Seq, writes: list[Write]) -> None:
        for kind, value in ((RecordKind.WATERMARK, _NUMBER.pack(retire.watermark)), (RecordKind.REMOVAL, b"")):
            writes.append((_RECORD + record_key(kind, retire.table), _NUMBER.pack(seq) + value))

    def _deleted_ranges(self, batch: Batch) -> list[Range]:
        ranges: list[Range] = []
        for uid in batch.delete_tables:
            ranges += _table_ranges(uid)
        for uid, bucket in batch.delete_buckets:
            prefix = _STREAM + _table_key(uid)
            ranges.append((prefix + _NUMBER.pack(bucket), prefix + _NUMBER.pack(bucket + 1)))
        for uid, scope in batch.delete_scopes:
            start = keys.scope_prefix(scope)
            end = keys.prefix_end(start)
            ranges.append(_row_range(uid, start, end))
            for bucket in self.latest().buckets(uid):
                prefix = _STREAM + _table_key(uid) + _NUMBER.pack(bucket)
                assert end is not None
                ranges.append((prefix + start, prefix + end))
        return ranges

    def _follow(self, batch: Batch, commit: Commit) -> None:
        self._commits += 1
        for op in batch.rows:
            if op.bucket is None:
                self._heads[op.table] = commit.seq
        for retire in batch.retire:
            self._watermarks[retire.table] = retire.watermark
            self._removals[retire.table] = b""
        for uid in batch.delete_tables:
            self._heads[uid] = commit.seq
            self._watermarks.pop(uid, None)
            self._removals.pop(uid, None)
        for observer in self._observers:
            observer(batch, commit)

    # Outcomes

    def _stage_outcome(self, key: str, commit: Commit, writes: list[Write]) -> None:
        now_ms = self._clock.now_ms()
        name, now = key.encode(), _NUMBER.pack(now_ms)
        oldest = _OUTCOME_AGE + _NUMBER.pack(max(now_ms - _OUTCOME_KEPT_MS, 0))
        for aged, _ in islice(self._kv.scan(_OUTCOME_AGE, oldest), _OUTCOMES_PRUNED_MAX):
            writes.append((aged, None))
            stored = self._kv.get(_OUTCOME + aged[9:])
            if stored is not None and stored[:8] == aged[1:9]:
                writes.append((_OUTCOME + aged[9:], None))
        body = (commit.seq, list(commit.seqs), list(commit.replaced), list(commit.jobs))
        writes.append((_OUTCOME + name, now + msgspec.msgpack.encode(body)))
        writes.append((_OUTCOME_AGE + now + name, b""))

    def _known_outcome(self, key: str | None) -> Commit | None:
        stored = None if key is None else self._kv.get(_OUTCOME + key.encode())
        if stored is None or _NUMBER.unpack_from(stored)[0] < self._clock.now_ms() - _OUTCOME_KEPT_MS:
            return None
        seq, seqs, replaced, jobs = msgspec.msgpack.decode(stored[8:])
        return Commit(seq, seqs, replaced, tuple(jobs))


def _stored_keys(rows: Sequence[RowOp]) -> list[bytes]:
    """Where each row is stored; that of a stream row lacks its `_seq`."""
    prefixes = {uid: _ROW + _table_key(uid) for uid in {op.table for op in rows}}
    return [
        prefixes[op.table] + op.key
        if op.bucket is None
        else _STREAM + _table_key(op.table) + _NUMBER.pack(op.bucket) + op.key
        for op in rows
    ]


def _check_record(op: RecordOp, stored: bytes | None) -> None:
    version = _NUMBER.unpack_from(stored)[0] if stored is not None else ABSENT
    holds = version != ABSENT if op.expect == PRESENT else version == op.expect
    if not holds:
        kind = RecordKind(op.key[0]).name.lower()
        raise ExpectationFailed(
            f"a {kind} record is at version {version}, expected {_expected(op.expect)}",
            what="record", key=op.key, found=version,
        )  # fmt: skip


def _stream_key(row: StreamDelete) -> bytes:
    return _STREAM + _table_key(row.table) + _NUMBER.pack(row.bucket) + row.key + _NUMBER.pack(row.seq)


def _expected(expect: Seq) -> str:
    return {ABSENT: "none", PRESENT: "any"}.get(expect, str(expect))


def _record_range(kind: RecordKind) -> Range:
    start, end = record_prefix(kind)
    return _RECORD + start, _RECORD + end


def _table_ranges(uid: TableUid) -> list[Range]:
    """Where the store keeps hot rows and stream rows of a table."""
    ranges: list[Range] = []
    for space in (_ROW, _STREAM):
        prefix = space + _table_key(uid)
        end = keys.prefix_end(prefix)
        assert end is not None
        ranges.append((prefix, end))
    return ranges
