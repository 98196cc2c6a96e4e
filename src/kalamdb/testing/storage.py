"""The contract of `StorageBackend`, as tests: whatever passes may carry the database.

Subclass `StorageContract` (jobs: `kalamdb.testing.job_store`) in a test module and say how to open.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kalamdb.clock import seq_at_ms
from kalamdb.errors import Closed, Internal
from kalamdb.storage import (
    ABSENT,
    ANY,
    PRESENT,
    Batch,
    Busy,
    Claim,
    Commit,
    ExpectationFailed,
    HotRow,
    RecordKind,
    RecordOp,
    Retire,
    RowOp,
    Snapshot,
    StorageBackend,
    StreamDelete,
    UnknownOutcome,
    keys,
    record_key,
    record_prefix,
)
from kalamdb.testing.clock import SimulatedClock
from kalamdb.testing.faults import is_injected
from kalamdb.types import SHARED_SCOPE, RowFlags, Scope, Seq, TableUid

TABLE = TableUid(7)
OTHER = TableUid(8)
ATTEMPTS_MAX = 200


def key_of(number: int, scope: Scope = SHARED_SCOPE) -> bytes:
    """Row key of an integer primary key."""
    return keys.row_key(scope, keys.encode_int(number))


def row(
    number: int,
    payload: bytes = b"v",
    *,
    table: TableUid = TABLE,
    scope: Scope = SHARED_SCOPE,
    expect: Seq = ANY,
    flags: RowFlags = RowFlags.NONE,
) -> RowOp:
    """One row version."""
    return RowOp(table, key_of(number, scope), payload, flags, expect)


def stream_row(bucket: int, payload: bytes, scope: Scope = SHARED_SCOPE, table: TableUid = TABLE) -> RowOp:
    """One row of a STREAM table."""
    return RowOp(table, keys.scope_prefix(scope), payload, bucket=bucket)


def commit(backend: StorageBackend, batch: Batch) -> Commit:
    """Commit as a caller has to: again when busy or in doubt, wait until durable. Real refusals are raised."""
    if not backend.caps.inline and batch.idempotency_key is None:
        batch.idempotency_key = f"commit-{id(batch)}-{backend.head()}"
    for _ in range(ATTEMPTS_MAX):
        try:
            done = backend.commit(batch)
        except Busy:
            continue
        except UnknownOutcome as unknown:
            found = backend.outcome(unknown.key)
            if found is None:
                continue
            done = found
        except ExpectationFailed as failed:
            if is_injected(failed):
                continue
            raise
        backend.wait_durable(done, names_files=batch.names_files)
        return done
    raise AssertionError(f"the store refused {ATTEMPTS_MAX} times")


def hot(reader: Snapshot, table: TableUid = TABLE, scope: Scope | None = None, after_key: bytes = b"") -> list[HotRow]:
    """All hot versions of a table."""
    return [one for chunk in reader.hot(table, scope, after_key=after_key, chunk_rows=3) for one in chunk]


def payloads(backend: StorageBackend, table: TableUid = TABLE) -> list[bytes]:
    """Payloads of all hot versions, in key order."""
    with backend.snapshot() as snapshot:
        return [one.payload for one in hot(snapshot, table)]


def set_manifest(backend: StorageBackend, table: TableUid = TABLE) -> Seq:
    """Let the table's manifest move; returns its version."""
    return commit(backend, Batch(records=[RecordOp(record_key(RecordKind.MANIFEST, table), b"m")])).seq


class Store:
    """The store of one test: opened, reopened and closed."""

    def __init__(self, open_backend: Callable[[Path, SimulatedClock], StorageBackend], path: Path) -> None:
        self._open_backend = open_backend
        self.path = path
        self.clock = SimulatedClock(auto_advance=True)
        self.backend = open_backend(path, self.clock)

    def reopen(self) -> StorageBackend:
        """Close and open again."""
        self.backend.close()
        self.backend = self._open_backend(self.path, self.clock)
        return self.backend


class StorageContract:
    """What each backend does the same way."""

    def open_backend(self, path: Path, clock: SimulatedClock) -> StorageBackend:
        """Open the store that `path` stands for, making it the first time."""
        raise AssertionError("a subclass says how its backend is opened")

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        """An empty store."""
        store = Store(self.open_backend, tmp_path / "store")
        yield store
        store.backend.close()

    @pytest.fixture
    def backend(self, store: Store) -> StorageBackend:
        """The store's backend, for tests that do not reopen."""
        return store.backend

    # Commits and `_seq`

    def test_a_committed_row_is_read_back(self, backend: StorageBackend) -> None:
        done = commit(backend, Batch(rows=[row(1, b"one"), row(2, b"two", flags=RowFlags.SUPERSEDES)]))
        assert backend.latest().rows(TABLE, [key_of(2), key_of(9), key_of(1)]) == [
            HotRow(key_of(2), done.seqs[1], RowFlags.SUPERSEDES, b"two"),
            None,
            HotRow(key_of(1), done.seqs[0], RowFlags.NONE, b"one"),
        ]

    def test_seqs_rise_with_the_rows_and_end_with_the_commit(self, backend: StorageBackend) -> None:
        first = commit(backend, Batch(rows=[row(1), row(2), row(3)]))
        second = commit(backend, Batch(rows=[row(4)]))
        assert list(first.seqs) == sorted(set(first.seqs)) and first.seqs[-1] == first.seq
        assert second.seqs[0] > first.seq and backend.head() == second.seq

    def test_a_commit_without_rows_takes_a_seq_too(self, backend: StorageBackend) -> None:
        first = commit(backend, Batch(records=[RecordOp(record_key(RecordKind.META, "a"), b"1")]))
        second = commit(backend, Batch(records=[RecordOp(record_key(RecordKind.META, "a"), b"2")]))
        assert 0 < first.seq < second.seq

    def test_reserved_numbers_end_with_the_commit(self, backend: StorageBackend) -> None:
        before = commit(backend, Batch(rows=[row(1)])).seq
        done = commit(backend, Batch(rows=[row(2)], reserve=100))
        assert done.seqs[0] > before and done.seq >= done.seqs[0] + 100
        assert commit(backend, Batch(rows=[row(3)])).seqs[0] > done.seq

    def test_seq_follows_the_clock_and_never_falls(self, store: Store) -> None:
        first = commit(store.backend, Batch(rows=[row(1)])).seq
        assert first >= seq_at_ms(store.clock.now_ms() - 1000)
        store.clock.step_wall_ms(-3_600_000)
        second = commit(store.backend, Batch(rows=[row(2)])).seq
        backend = store.reopen()
        assert backend.head() == second > first
        third = commit(backend, Batch(rows=[row(3)])).seq
        store.clock.step_wall_ms(7_200_000)
        now = seq_at_ms(store.clock.now_ms())
        assert second < third < now <= commit(backend, Batch(rows=[row(4)])).seq

    def test_a_refused_batch_changes_nothing_of_any_kind(self, backend: StorageBackend) -> None:
        meta = record_key(RecordKind.META, "x")
        kept = commit(backend, Batch(rows=[row(1, b"old"), stream_row(1, b"s")]))
        bad = Batch(
            rows=[row(2, b"new"), row(1, b"new", expect=ABSENT), stream_row(2, b"t")],
            records=[RecordOp(meta, b"r")],
            retire=[Retire(TABLE, kept.seq)],
            delete_tables=[OTHER],
            delete_buckets=[(TABLE, 1)],
        )
        with pytest.raises(ExpectationFailed):
            commit(backend, bad)
        with backend.snapshot() as snapshot:
            assert [one.payload for one in hot(snapshot)] == [b"old"]
            assert snapshot.records([meta]) == [None]
            assert snapshot.watermark(TABLE) == 0 and snapshot.buckets(TABLE) == [1]
        assert backend.head() == kept.seq

    def test_a_refused_record_keeps_rows_out(self, backend: StorageBackend) -> None:
        with pytest.raises(ExpectationFailed) as caught:
            commit(
                backend,
                Batch(rows=[row(1)], records=[RecordOp(record_key(RecordKind.META, "x"), b"r", PRESENT)]),
            )
        assert caught.value.what == "record" and caught.value.key == record_key(RecordKind.META, "x")
        assert payloads(backend) == []

    def test_everything_survives_reopening(self, store: Store) -> None:
        meta = record_key(RecordKind.META, "x")
        done = commit(store.backend, Batch(rows=[row(1), stream_row(3, b"s")], records=[RecordOp(meta, b"r")]))
        commit(store.backend, Batch(rows=[row(2)], retire=[Retire(TABLE, done.seqs[0])]))
        backend = store.reopen()
        with backend.snapshot() as snapshot:
            assert [one.key for one in hot(snapshot)] == [key_of(2)]
            assert snapshot.watermark(TABLE) == done.seqs[0]
            found = snapshot.records([meta])[0]
            assert found is not None and found.version == done.seq and found.value == b"r"
            assert [one.payload for chunk in snapshot.stream(TABLE) for one in chunk] == [b"s"]

    # Expectations of rows

    def test_absent_holds_for_a_key_never_written(self, backend: StorageBackend) -> None:
        assert commit(backend, Batch(rows=[row(1, expect=ABSENT)])).replaced == [0]

    @pytest.mark.parametrize("flags", [RowFlags.NONE, RowFlags.DELETED])
    def test_absent_fails_over_a_hot_version_and_says_which(self, backend: StorageBackend, flags: RowFlags) -> None:
        seq = commit(backend, Batch(rows=[row(1, flags=flags)])).seq
        with pytest.raises(ExpectationFailed) as caught:
            commit(backend, Batch(rows=[row(0), row(1, expect=ABSENT)]))
        failed = caught.value
        assert (failed.what, failed.index, failed.found, failed.found_flags) == ("row", 1, seq, flags)

    def test_an_expected_seq_must_be_the_newest(self, backend: StorageBackend) -> None:
        first = commit(backend, Batch(rows=[row(1, b"a")])).seq
        second = commit(backend, Batch(rows=[row(1, b"b", expect=first)])).seq
        with pytest.raises(ExpectationFailed) as caught:
            commit(backend, Batch(rows=[row(1, b"c", expect=first)]))
        assert (caught.value.what, caught.value.found) == ("row", second)
        assert payloads(backend) == [b"b"]

    def test_any_replaces_whatever_there_is_and_says_what(self, backend: StorageBackend) -> None:
        first = commit(backend, Batch(rows=[row(1, b"a")])).seq
        assert commit(backend, Batch(rows=[row(1, b"b"), row(2)])).replaced == [first, 0]

    @pytest.mark.parametrize("expect", [ABSENT, 12345])
    def test_a_key_without_hot_version_needs_the_manifest_that_the_caller_saw(
        self, backend: StorageBackend, expect: Seq
    ) -> None:
        version = set_manifest(backend)
        for seen in ({}, {TABLE: version - 1}, {OTHER: version}):
            with pytest.raises(ExpectationFailed) as caught:
                commit(backend, Batch(rows=[row(1, expect=expect)], manifests=seen))
            assert (caught.value.what, caught.value.table) == ("manifest", TABLE)
        commit(backend, Batch(rows=[row(1, expect=expect)], manifests={TABLE: version}))
        assert payloads(backend) == [b"v"]

    def test_a_table_without_manifest_record_is_at_version_zero(self, backend: StorageBackend) -> None:
        commit(backend, Batch(rows=[row(1, expect=ABSENT)], manifests={TABLE: 0}))
        with pytest.raises(ExpectationFailed):
            commit(backend, Batch(rows=[row(2, expect=ABSENT)], manifests={TABLE: 5}))

    def test_a_lost_update_across_a_flush_is_refused(self, backend: StorageBackend) -> None:
        cold = commit(backend, Batch(rows=[row(1, b"cold")])).seq
        manifest = _flush(backend, cold)
        newer = commit(backend, Batch(rows=[row(1, b"newer", expect=cold)], manifests={TABLE: manifest})).seq
        _flush(backend, newer)
        while backend.remove_retired():
            pass
        with pytest.raises(ExpectationFailed) as caught:
            commit(backend, Batch(rows=[row(1, b"stale", expect=cold)], manifests={TABLE: manifest}))
        assert caught.value.what in ("manifest", "row")

    def test_one_row_twice_in_a_batch_is_refused(self, backend: StorageBackend) -> None:
        with pytest.raises(Internal):
            commit(backend, Batch(rows=[row(1, b"a"), row(1, b"b")]))
        assert payloads(backend) == []
        both = [row(1, b"a", scope=Scope("a")), row(1, b"b", scope=Scope("b")), row(1, b"c", table=OTHER)]
        commit(backend, Batch(rows=both))

    def test_quiet_holds_until_the_table_is_written(self, backend: StorageBackend) -> None:
        head = commit(backend, Batch(rows=[row(1)])).seq
        commit(backend, Batch(rows=[row(1, table=OTHER)], quiet=[(TABLE, head)]))
        newest = commit(backend, Batch(rows=[row(2)])).seq
        with pytest.raises(ExpectationFailed) as caught:
            commit(backend, Batch(rows=[row(3)], quiet=[(TABLE, head)]))
        assert (caught.value.what, caught.value.table, caught.value.found) == ("quiet", TABLE, newest)
        assert len(payloads(backend)) == 2

    def test_quiet_takes_the_opening_as_a_write(self, store: Store) -> None:
        head = commit(store.backend, Batch(rows=[row(1)])).seq
        last = commit(store.backend, Batch(rows=[row(1, table=OTHER)])).seq
        backend = store.reopen()
        with pytest.raises(ExpectationFailed):
            commit(backend, Batch(rows=[row(2)], quiet=[(TABLE, head)]))
        commit(backend, Batch(rows=[row(2)], quiet=[(TABLE, last)]))

    # Records

    def test_the_version_of_a_record_is_the_seq_of_its_commit(self, backend: StorageBackend) -> None:
        key = record_key(RecordKind.TABLE, 7)
        done = commit(backend, Batch(rows=[row(1)], records=[RecordOp(key, b"x", ABSENT)]))
        found = backend.latest().records([key, record_key(RecordKind.TABLE, 8)])
        assert found[0] is not None and found[0].version == done.seq and found[1] is None

    def test_records_are_changed_only_at_the_expected_version(self, backend: StorageBackend) -> None:
        key = record_key(RecordKind.TABLE, 7)
        first = commit(backend, Batch(records=[RecordOp(key, b"1", ABSENT)])).seq
        for refused in (
            RecordOp(key, b"2", ABSENT),
            RecordOp(key, b"2", first - 1),
            RecordOp(key, None, first + 1),
        ):
            with pytest.raises(ExpectationFailed) as caught:
                commit(backend, Batch(records=[refused]))
            assert (caught.value.what, caught.value.key) == ("record", key)
        second = commit(backend, Batch(records=[RecordOp(key, b"2", first)])).seq
        commit(backend, Batch(records=[RecordOp(key, b"3", PRESENT)]))
        commit(backend, Batch(records=[RecordOp(key, None, ANY)]))
        assert second > first and backend.latest().records([key]) == [None]
        with pytest.raises(ExpectationFailed):
            commit(backend, Batch(records=[RecordOp(key, b"4", PRESENT)]))

    def test_a_check_writes_nothing(self, backend: StorageBackend) -> None:
        key = record_key(RecordKind.ERASING, "anna")
        commit(backend, Batch(records=[RecordOp(key, expect=ABSENT, check=True)], rows=[row(1)]))
        assert backend.latest().records([key]) == [None]
        commit(backend, Batch(records=[RecordOp(key, b"since")]))
        with pytest.raises(ExpectationFailed):
            commit(backend, Batch(records=[RecordOp(key, expect=ABSENT, check=True)], rows=[row(2)]))
        found = backend.latest().records([key])[0]
        assert found is not None and found.value == b"since"

    def test_records_are_scanned_in_key_order_within_bounds(self, backend: StorageBackend) -> None:
        ops = [RecordOp(record_key(RecordKind.SEGMENT, 7, name), name.encode()) for name in "cabd"]
        ops.append(RecordOp(record_key(RecordKind.SEGMENT, 8, "a"), b"other table"))
        ops.append(RecordOp(record_key(RecordKind.INTENT, 7, "a"), b"other kind"))
        commit(backend, Batch(records=ops))
        start, end = record_prefix(RecordKind.SEGMENT, 7)
        reader = backend.latest()
        assert [one.value for _, one in reader.scan_records(start, end)] == [b"a", b"b", b"c", b"d"]
        backwards = list(reader.scan_records(start, end, reverse=True, limit=2))
        assert [one.value for _, one in backwards] == [b"d", b"c"]
        assert [one.value for _, one in reader.scan_records(start, end, limit=1)] == [b"a"]
        exact = record_key(RecordKind.SEGMENT, 7, "b"), record_key(RecordKind.SEGMENT, 7, "d")
        assert [key for key, _ in reader.scan_records(*exact)] == [
            exact[0],
            record_key(RecordKind.SEGMENT, 7, "c"),
        ]

    # Snapshots

    def test_a_snapshot_does_not_change(self, backend: StorageBackend) -> None:
        key = record_key(RecordKind.META, "x")
        first = commit(backend, Batch(rows=[row(1, b"a"), stream_row(1, b"s")], records=[RecordOp(key, b"1")]))
        with backend.snapshot() as snapshot:
            commit(
                backend,
                Batch(
                    rows=[row(1, b"b"), row(2, b"c"), stream_row(2, b"t")],
                    records=[RecordOp(key, None)],
                    delete_buckets=[(TABLE, 1)],
                ),
            )
            commit(backend, Batch(retire=[Retire(TABLE, backend.head())]))
            commit(backend, Batch(delete_tables=[TABLE]))
            assert snapshot.seq == first.seq
            assert [one.payload for one in hot(snapshot)] == [b"a"]
            assert [one and one.payload for one in snapshot.rows(TABLE, [key_of(1), key_of(2)])] == [b"a", None]
            assert [one.payload for chunk in snapshot.stream(TABLE) for one in chunk] == [b"s"]
            assert snapshot.buckets(TABLE) == [1] and snapshot.watermark(TABLE) == 0
            found = snapshot.records([key])[0]
            assert found is not None and found.value == b"1"
            assert [one.value for _, one in snapshot.scan_records(*record_prefix(RecordKind.META))] == [b"1"]
        assert payloads(backend) == []

    def test_a_running_scan_of_a_snapshot_is_not_disturbed(self, backend: StorageBackend) -> None:
        commit(backend, Batch(rows=[row(number, b"old") for number in range(10)]))
        with backend.snapshot() as snapshot:
            chunks = snapshot.hot(TABLE, chunk_rows=2)
            seen = next(chunks)
            commit(backend, Batch(rows=[row(number, b"new") for number in range(20)]))
            seen += [one for chunk in chunks for one in chunk]
        assert [one.payload for one in seen] == [b"old"] * 10

    def test_latest_sees_each_commit(self, backend: StorageBackend) -> None:
        reader = backend.latest()
        for payload in (b"a", b"b"):
            commit(backend, Batch(rows=[row(1, payload)]))
            found = reader.rows(TABLE, [key_of(1)])[0]
            assert found is not None and found.payload == payload

    def test_hot_rows_come_in_key_order_by_scope_and_in_chunks(self, backend: StorageBackend) -> None:
        names = [Scope(name) for name in ("anna", "bob", "")]
        commit(backend, Batch(rows=[row(n, scope=name) for n in (3, -1, 2, 0, 1) for name in names]))
        commit(backend, Batch(rows=[row(1, table=OTHER)]))
        with backend.snapshot() as snapshot:
            found = [one.key for one in hot(snapshot)]
            assert found == sorted(found) and len(found) == 15
            for name in names:
                own = [one.key for one in hot(snapshot, TABLE, name)]
                assert own == [key_of(n, name) for n in (-1, 0, 1, 2, 3)]
                assert [one.key for one in hot(snapshot, TABLE, name, own[2])] == own[3:]
            assert [one.key for one in hot(snapshot, TABLE, None, found[6])] == found[7:]
            assert {len(chunk) for chunk in snapshot.hot(TABLE, chunk_rows=5)} == {5}
            assert hot(snapshot, TABLE, Scope("nobody")) == []

    # Watermarks

    def test_a_watermark_hides_what_a_flush_wrote_out(self, backend: StorageBackend) -> None:
        old = commit(backend, Batch(rows=[row(1, b"old"), row(2, b"old")])).seq
        commit(backend, Batch(rows=[row(2, b"new")]))
        commit(backend, Batch(rows=[row(1, b"x", table=OTHER)], retire=[Retire(TABLE, old)]))
        reader = backend.latest()
        assert [one and one.payload for one in reader.rows(TABLE, [key_of(1), key_of(2)])] == [None, b"new"]
        assert payloads(backend) == [b"new"] and payloads(backend, OTHER) == [b"x"]
        assert (reader.watermark(TABLE), reader.watermark(OTHER)) == (old, 0)

    def test_a_dead_version_counts_as_none_that_was_replaced(self, backend: StorageBackend) -> None:
        old = commit(backend, Batch(rows=[row(1, b"old")])).seq
        manifest = _flush(backend, old)
        done = commit(backend, Batch(rows=[row(1, b"new", expect=old)], manifests={TABLE: manifest}))
        assert list(done.replaced) == [0]

    def test_absent_fails_over_a_version_that_was_just_flushed(self, backend: StorageBackend) -> None:
        old = commit(backend, Batch(rows=[row(1, b"old")])).seq
        _flush(backend, old)
        with pytest.raises(ExpectationFailed):
            commit(backend, Batch(rows=[row(1, b"new", expect=ABSENT)]))

    def test_a_watermark_never_moves_back(self, backend: StorageBackend) -> None:
        first = commit(backend, Batch(rows=[row(1)])).seq
        second = commit(backend, Batch(rows=[row(2)])).seq
        commit(backend, Batch(retire=[Retire(TABLE, second)]))
        with pytest.raises(Internal):
            commit(backend, Batch(retire=[Retire(TABLE, first)]))
        assert backend.latest().watermark(TABLE) == second

    def test_a_watermark_above_the_last_seq_is_refused(self, backend: StorageBackend) -> None:
        head = commit(backend, Batch(rows=[row(1)])).seq
        with pytest.raises(Internal):
            commit(backend, Batch(retire=[Retire(TABLE, head + (1 << 40))]))

    @pytest.mark.parametrize("step", [1, 3, 1000])
    def test_removal_takes_the_dead_and_leaves_the_living(self, store: Store, step: int) -> None:
        backend = store.backend
        old = commit(backend, Batch(rows=[row(number, b"old") for number in range(10)])).seq
        manifest = _flush(backend, old)
        commit(backend, Batch(rows=[row(3, b"new"), row(11, b"new")]))
        backend.remove_retired(step)
        backend = store.reopen()
        for _ in range(100):
            if not backend.remove_retired(step):
                break
        else:
            raise AssertionError("the removal does not end")
        assert payloads(backend) == [b"new", b"new"]
        # A removed key has no version of any kind: ABSENT holds under the manifest that was looked at.
        commit(backend, Batch(rows=[row(5, b"again", expect=ABSENT)], manifests={TABLE: manifest}))
        assert payloads(backend) == [b"new", b"again", b"new"]

    def test_a_second_flush_during_a_removal_is_taken_up(self, backend: StorageBackend) -> None:
        first = commit(backend, Batch(rows=[row(number) for number in range(10)])).seq
        _flush(backend, first)
        second = commit(backend, Batch(rows=[row(0, b"late"), row(99, b"late")])).seq
        backend.remove_retired(4)
        manifest = _flush(backend, second)
        commit(backend, Batch(rows=[row(98, b"live")]))
        while backend.remove_retired(4):
            pass
        commit(backend, Batch(rows=[row(0, expect=ABSENT)], manifests={TABLE: manifest}))

    def test_nothing_is_removed_without_a_watermark(self, backend: StorageBackend) -> None:
        commit(backend, Batch(rows=[row(1)]))
        assert backend.remove_retired() is False and payloads(backend) == [b"v"]

    # Streams and deletes of many

    def test_stream_rows_come_by_bucket_scope_and_seq(self, backend: StorageBackend) -> None:
        anna, bob = sorted((Scope("anna"), Scope("bob")), key=keys.scope_prefix)
        commit(backend, Batch(rows=[stream_row(2, b"2b", bob), stream_row(1, b"1b", bob)]))
        done = commit(backend, Batch(rows=[stream_row(1, b"1a", anna), stream_row(1, b"1a2", anna)]))
        with backend.snapshot() as snapshot:
            found = [one for chunk in snapshot.stream(TABLE, chunk_rows=1) for one in chunk]
            assert [one.payload for one in found] == [b"1a", b"1a2", b"1b", b"2b"]
            assert [one.seq for one in found[:2]] == list(done.seqs) and found[3].scope == bob
            own = [one.payload for chunk in snapshot.stream(TABLE, bob) for one in chunk]
            assert own == [b"1b", b"2b"]
            late = [one.payload for chunk in snapshot.stream(TABLE, from_bucket=2) for one in chunk]
            assert late == [b"2b"] and snapshot.buckets(TABLE) == [1, 2] and snapshot.buckets(OTHER) == []

    def test_a_bucket_or_a_row_of_a_stream_goes_alone(self, backend: StorageBackend) -> None:
        commit(backend, Batch(rows=[stream_row(bucket, b"%d" % bucket) for bucket in (1, 2, 3)] + [row(1, b"hot")]))
        commit(backend, Batch(rows=[stream_row(2, b"other", table=OTHER)], delete_buckets=[(TABLE, 2)]))
        with backend.snapshot() as snapshot:
            assert snapshot.buckets(TABLE) == [1, 3] and snapshot.buckets(OTHER) == [2]
            assert len(hot(snapshot)) == 1
            [[first], [third]] = list(snapshot.stream(TABLE, chunk_rows=1))
        gone = StreamDelete(TABLE, third.bucket, keys.scope_prefix(SHARED_SCOPE), third.seq)
        commit(backend, Batch(delete_stream=[gone]))
        with backend.snapshot() as snapshot:
            assert list(snapshot.stream(TABLE)) == [[first]] and snapshot.buckets(TABLE) == [1]

    def test_a_deleted_table_leaves_its_neighbours(self, store: Store) -> None:
        backend = store.backend
        for table in (TableUid(6), TABLE, OTHER):
            commit(backend, Batch(rows=[row(1, table=table), stream_row(1, b"s", table=table)]))
        commit(backend, Batch(delete_tables=[TABLE]))
        _expect_neighbours(backend)
        _expect_neighbours(store.reopen())

    # Counters

    def test_numbers_start_at_one_and_counters_are_independent(self, backend: StorageBackend) -> None:
        assert [backend.next_numbers("a"), backend.next_numbers("a", 10), backend.next_numbers("a")] == [1, 2, 12]
        assert backend.next_numbers("b") == 1

    def test_a_number_is_never_given_twice(self, store: Store) -> None:
        given: list[int] = []
        for count in (1, 3000, 5, 1024, 1):
            first = store.backend.next_numbers("n", count)
            given += range(first, first + count)
            store.reopen()
        assert len(set(given)) == len(given) and given == sorted(given)

    def test_threads_get_different_numbers(self, backend: StorageBackend) -> None:
        given: list[int] = []

        def draw() -> None:
            for _ in range(50):
                first = backend.next_numbers("n", 7)
                given.extend(range(first, first + 7))

        _run_threads(4, draw)
        assert len(set(given)) == 4 * 50 * 7

    # Observers

    def test_observers_hear_each_commit_in_order(self, backend: StorageBackend) -> None:
        heard: list[tuple[int, Seq]] = []
        backend.observe(lambda batch, done: heard.append((len(batch.rows), done.seq)))
        with pytest.raises(ExpectationFailed):
            commit(backend, Batch(rows=[row(1, expect=5)], manifests={TABLE: 9}))
        seqs = [commit(backend, Batch(rows=[row(n) for n in range(count)])).seq for count in (1, 2, 3)]
        assert heard == list(zip((1, 2, 3), seqs, strict=True))

    def test_observers_hear_commits_of_many_threads_in_seq_order(self, backend: StorageBackend) -> None:
        heard: list[Seq] = []
        backend.observe(lambda _, done: heard.append(done.seq))
        numbers = iter(range(10_000))
        lock = threading.Lock()

        def write() -> None:
            for _ in range(25):
                with lock:
                    number = next(numbers)
                commit(backend, Batch(rows=[row(number)]))

        _run_threads(4, write)
        assert heard == sorted(heard) and len(heard) == 100 == len(payloads(backend))

    # Durability, outcomes, closing

    def test_many_writers_share_the_waits_for_the_disk(self, backend: StorageBackend) -> None:
        def write(scope: Scope) -> None:
            for number in range(20):
                commit(backend, Batch(rows=[row(number, scope=scope)], names_files=number % 5 == 0))

        _run_threads(8, *(lambda at=at: write(Scope(f"user{at}")) for at in range(8)))
        assert len(payloads(backend)) == 160 and backend.stats()["commits"] >= 160

    def test_increments_of_many_threads_are_not_lost(self, backend: StorageBackend) -> None:
        commit(backend, Batch(rows=[row(1, b"0")]))

        def increment() -> None:
            for _ in range(10):
                while True:
                    found = backend.latest().rows(TABLE, [key_of(1)])[0]
                    assert found is not None
                    changed = row(1, b"%d" % (int(found.payload) + 1), expect=found.seq)
                    try:
                        commit(backend, Batch(rows=[changed]))
                        break
                    except ExpectationFailed:
                        continue

        _run_threads(4, increment)
        assert payloads(backend) == [b"40"]

    def test_the_outcome_of_a_commit_is_known_by_its_key(self, store: Store) -> None:
        assert store.backend.outcome("k") is None
        done = commit(store.backend, Batch(rows=[row(1), row(2)], idempotency_key="k"))
        assert _same(store.backend.outcome("k"), done) and store.backend.outcome("other") is None
        assert _same(store.reopen().outcome("k"), done)

    def test_a_commit_with_a_known_key_is_not_applied_again(self, backend: StorageBackend) -> None:
        first = commit(backend, Batch(rows=[row(1, b"a")], idempotency_key="k"))
        commit(backend, Batch(rows=[row(1, b"b")]))
        again = commit(backend, Batch(rows=[row(1, b"a")], idempotency_key="k"))
        assert again.seq == first.seq and payloads(backend) == [b"b"]

    def test_an_outcome_is_forgotten_after_a_day(self, store: Store) -> None:
        commit(store.backend, Batch(rows=[row(1)], idempotency_key="old"))
        store.clock.advance(23 * 3600)
        assert store.backend.outcome("old") is not None
        store.clock.advance(2 * 3600)
        commit(store.backend, Batch(rows=[row(1)], idempotency_key="new"))
        assert store.backend.outcome("old") is None and store.backend.outcome("new") is not None

    def test_a_closed_store_says_so(self, backend: StorageBackend) -> None:
        done = commit(backend, Batch(rows=[row(1)]))
        backend.close()
        backend.close()
        refused = (
            lambda: backend.commit(Batch(rows=[row(1)])),
            lambda: backend.snapshot().__enter__(),
            lambda: backend.latest(),
            lambda: backend.next_numbers("n"),
            lambda: backend.remove_retired(),
            lambda: backend.outcome("k"),
            lambda: backend.stats(),
            lambda: backend.claim(Claim(limit=1, types=frozenset())),
        )
        for call in refused:
            _expect_closed(call)
        assert done.seq == backend.head()

    def test_a_snapshot_that_outlives_its_store_is_closed(self, store: Store) -> None:
        commit(store.backend, Batch(rows=[row(number) for number in range(20)]))
        with store.backend.snapshot() as snapshot:
            chunks = snapshot.hot(TABLE, chunk_rows=1)
            next(chunks)
            backend = store.reopen()
            with pytest.raises(Closed):
                list(chunks)
            with pytest.raises(Closed):
                snapshot.rows(TABLE, [key_of(1)])
        assert len(payloads(backend)) == 20

    def test_the_store_reports_figures(self, backend: StorageBackend) -> None:
        commit(backend, Batch(rows=[row(1)]))
        figures = backend.stats()
        assert figures["commits"] >= 1 and all(isinstance(value, int) for value in figures.values())


def _flush(backend: StorageBackend, watermark: Seq) -> Seq:
    """What a flush commits: a new manifest and the watermark. Returns the manifest's version."""
    key = record_key(RecordKind.MANIFEST, TABLE)
    return commit(backend, Batch(records=[RecordOp(key, b"m")], retire=[Retire(TABLE, watermark)])).seq


def _expect_neighbours(backend: StorageBackend) -> None:
    tables = (TableUid(6), TABLE, OTHER)
    with backend.snapshot() as snapshot:
        assert [len(hot(snapshot, table)) for table in tables] == [1, 0, 1]
        assert [snapshot.buckets(table) for table in tables] == [[1], [], [1]]


def _same(found: Commit | None, done: Commit) -> bool:
    return found is not None and (found.seq, list(found.seqs)) == (done.seq, list(done.seqs))


def _expect_closed(call: Callable[[], object]) -> None:
    for _ in range(ATTEMPTS_MAX):
        try:
            call()
        except Closed:
            return
        except Busy:
            continue
        except (UnknownOutcome, ExpectationFailed) as error:
            raise AssertionError("a closed store must not seem to work") from error
        raise AssertionError("a closed store answered")
    raise AssertionError("a closed store is busy for ever")


def _run_threads(count: int, *targets: Callable[[], object]) -> None:
    """Run targets (one: in `count` threads) at once; the first error is raised."""
    errors: list[BaseException] = []

    def guarded(target: Callable[[], object]) -> None:
        try:
            target()
        except BaseException as error:  # noqa: BLE001 - handed to the test's own thread
            errors.append(error)

    chosen = targets if len(targets) > 1 else targets * count
    threads = [threading.Thread(target=guarded, args=(target,)) for target in chosen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"


__all__ = ["StorageContract", "Store", "commit", "hot", "key_of", "payloads", "row", "stream_row"]
