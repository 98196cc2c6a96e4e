"""`db.check()` reports each kind of damage that can be planted, and nothing on a sound database."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pytest

from kalamdb.app_context import AppContext
from kalamdb.clock import SystemClock
from kalamdb.config import Settings
from kalamdb.database import Database
from kalamdb.storage import RecordKind, keys, record_key, record_prefix
from kalamdb.storage import job_keys as jk
from kalamdb.storage.job_keys import JobSpace
from kalamdb.storage.jobs import Hold, JobAttempt, JobRow, JobStatus
from kalamdb.storage.kv import KvBackend
from kalamdb.storage.memory import MemoryKv
from kalamdb.storage.spaces import Space
from kalamdb.tables.layout import KEY
from kalamdb.tables.segments import IntentRecord, SegmentRecord, segment_path, write_segment
from kalamdb.types import SHARED_SCOPE, Scope, TableId
from tests.conftest import run_job

U64 = struct.Struct(">Q")
OWN = object()
"""Stands for the uid of app.t in a key."""


class World:
    """A database whose store can be written behind its back."""

    def __init__(self, root: Path) -> None:
        self.kv = MemoryKv()
        quiet = Settings.load({"flush.scheduler_enabled": False, "compaction.enabled": False}, environment={})
        context = AppContext(None, quiet, backend=KvBackend(self.kv, SystemClock()), root=root)
        self.db = Database(context)
        self.store = context.store
        db = self.db
        db.execute("CREATE NAMESPACE app")
        db.execute("CREATE USER TABLE app.t (id BIGINT PRIMARY KEY, v TEXT)")
        db.execute("CREATE SHARED TABLE app.s (id BIGINT PRIMARY KEY, v TEXT)")
        db.execute("CREATE STREAM TABLE app.e (x INT) WITH (TTL_SECONDS = 3600)")
        db.execute("INSERT INTO app.e VALUES (1)")
        for user in ("ann", "bob"):
            db.execute("INSERT INTO app.t VALUES (1, 'a'), (2, 'b'), (3, 'c')", user=user)
        run_job(db, "STORAGE FLUSH TABLE app.t")
        run_job(db, "STORAGE COMPACT TABLE app.t")
        db.execute("INSERT INTO app.t VALUES (9, 'z')", user="ann")
        db.execute("DELETE FROM app.t WHERE id = 2", user="ann")
        run_job(db, "STORAGE FLUSH TABLE app.t")
        db.execute("UPDATE app.t SET v = 'hot' WHERE id = 3", user="ann")
        db.execute("INSERT INTO app.s VALUES (1, 'shared')")
        self.t, self.s = (db.context.catalog.require(TableId("app", name)).definition for name in "ts")

    def problems(self) -> list[str]:
        return self.db.check().problems

    def put(self, space: int, key: bytes, value: bytes | None) -> None:
        self.kv.write([(bytes([space]) + key, value)])

    def put_record(self, key: bytes, value: bytes, version: int | None = None) -> None:
        self.put(Space.RECORD, key, U64.pack(self.last if version is None else version) + value)

    @property
    def last(self) -> int:
        return self.db.context.backend.head()

    def records(self, kind: RecordKind) -> list[tuple[bytes, int, bytes]]:
        with self.db.context.backend.snapshot() as snapshot:
            found = list(snapshot.scan_records(*record_prefix(kind)))
        return [(key, record.version, record.value) for key, record in found]

    def segment(self, level: int) -> tuple[bytes, int, SegmentRecord]:
        for key, version, value in self.records(RecordKind.SEGMENT):
            record = msgspec.msgpack.decode(value, type=SegmentRecord)
            if record.level == level:
                return key, version, record
        raise AssertionError(f"no segment of level {level}")

    def change_segment(self, level: int, /, **fields: Any) -> None:
        key, version, record = self.segment(level)
        self.put_record(key, msgspec.msgpack.encode(msgspec.structs.replace(record, **fields)), version)

    def file(self, level: int) -> Path:
        return segment_path(self.store.root, self.t, self.segment(level)[2].segment_id)

    def hot_row(self, user: str, pk: int, *, seq: int | None = None, flags: int = 0, payload: bytes = b"") -> None:
        key = keys.row_key(Scope(user), keys.encode_int(pk))
        self.raw_row(self.t.uid, key, seq, flags, payload or msgspec.msgpack.encode((1, pk, "x")))

    def raw_row(self, uid: int, key: bytes, seq: int | None, flags: int, payload: bytes) -> None:
        value = struct.pack(">QB", self.last if seq is None else seq, flags) + payload
        self.put(Space.ROW, U64.pack(uid) + key, value)

    def job(self) -> JobRow:
        return self.db.jobs.list_jobs(descending=True)[0].row

    def put_job(self, row: JobRow) -> None:
        self.put(JobSpace.JOB, row.job_id.encode(), msgspec.msgpack.encode(row))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    assert made.problems() == []
    yield made
    made.db.close()


def test_a_sound_database_is_reported_with_its_figures(world: World) -> None:
    report = world.db.check()
    assert report.ok
    assert (report.tables, report.segments, report.dropped, report.intents, report.strays) == (3, 2, 0, 0, 0)
    # Level 1 holds six, level 0 a new row and a tombstone, one is updated in the hot tier, one is shared.
    assert report.versions == 6 + 2 + 1 + 1


def flip(path: Path, at: int) -> None:
    body = bytearray(path.read_bytes())
    body[at] ^= 0x40
    path.write_bytes(bytes(body))


@pytest.mark.parametrize("at", [0, 100, -1])
def test_a_flipped_byte_of_a_segment_is_reported_with_its_file_though_it_was_read_before(world: World, at: int) -> None:
    path = world.file(1)
    before = path.stat()
    flip(path, at)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    (problem,) = [one for one in world.problems() if "is damaged" in one]
    assert str(path) in problem


def test_a_missing_segment_is_reported_with_its_file(world: World) -> None:
    path = world.file(0)
    path.unlink()
    assert any(str(path) in problem and "No such file" in problem for problem in world.problems())


@pytest.mark.parametrize(
    "field", ["rows", "tombstones", "marks", "users", "key_min", "key_max", "seq_min", "seq_max", "schema_version"]
)
def test_a_record_whose_figures_differ_from_its_file_is_reported(world: World, field: str) -> None:
    value = getattr(world.segment(0)[2], field)
    world.change_segment(0, **{field: value + 1 if isinstance(value, int) else value + b"\x00"})
    expected = {"schema_version": "unknown schema version 2"}.get(field, f"has {field} ")
    assert any(expected in problem for problem in world.problems())


def test_segments_of_level_1_may_not_overlap_nor_hold_tombstones_among_rows(world: World) -> None:
    world.change_segment(0, level=1)
    problems = world.problems()
    assert any("of level 1 overlap" in problem for problem in problems)
    assert any("holds tombstones among its rows" in problem for problem in problems)


def test_a_level_that_does_not_exist_is_reported(world: World) -> None:
    world.change_segment(0, level=7)
    assert any("is of level 7" in problem for problem in world.problems())


def test_a_segment_out_of_key_order_is_reported(world: World) -> None:
    layout = world.store.layout(world.s)
    row_keys = [keys.row_key(SHARED_SCOPE, keys.encode_int(pk)) for pk in (12, 11)]
    columns = [row_keys, [1, 2], [0, 0], [12, 11], ["x", "y"]]
    rows = pa.Table.from_arrays(
        [pa.array(values, column.type) for values, column in zip(columns, layout.schema, strict=True)],
        schema=layout.schema,
    )
    path = segment_path(world.store.root, world.s, "PLANTED")
    record = write_segment(world.store.files, path, layout, [rows], row_group_rows_max=1024)
    assert record is not None
    assert rows.column(KEY)[0].as_py() == row_keys[0]
    world.put_record(record_key(RecordKind.SEGMENT, world.s.uid, "PLANTED"), msgspec.msgpack.encode(record))
    world.put_record(record_key(RecordKind.MANIFEST, world.s.uid), b"")
    assert any("PLANTED" in problem and "strict key order" in problem for problem in world.problems())


Plant = Callable[[World], None]


def _record(kind: RecordKind, *parts: Any, value: bytes = b"") -> Plant:
    def plant(world: World) -> None:
        resolved = [world.t.uid if part is OWN else part for part in parts]
        world.put_record(record_key(kind, *resolved), value)

    return plant


def _gone(kind: RecordKind, *parts: Any) -> Plant:
    def plant(world: World) -> None:
        resolved = [world.t.uid if part is OWN else part for part in parts]
        world.put(Space.RECORD, record_key(kind, *resolved), None)

    return plant


def _intent_of_a_segment(world: World) -> None:
    segment_id = world.segment(0)[2].segment_id
    body = msgspec.msgpack.encode(IntentRecord(segment_id=segment_id))
    world.put_record(record_key(RecordKind.INTENT, world.t.uid, segment_id), body)


def _dropped_and_live(world: World) -> None:
    body = msgspec.msgpack.encode({"definition": msgspec.to_builtins(world.t), "dropped_at": 1})
    world.put_record(record_key(RecordKind.DROPPED, world.t.uid), body)


def _shared_row_of_a_user(world: World) -> None:
    key = keys.row_key(Scope("ann"), keys.encode_int(5))
    world.raw_row(world.s.uid, key, None, 0, msgspec.msgpack.encode((1, 5, "x")))


def _below_the_watermark(world: World) -> None:
    (watermark,) = [value for key, _, value in world.records(RecordKind.WATERMARK)]
    while world.db.context.backend.remove_retired():
        pass
    world.hot_row("ann", 1, seq=U64.unpack(watermark)[0], flags=2)


def _a_segment_twice(world: World) -> None:
    _, version, record = world.segment(1)
    path = world.file(1)
    shutil.copy(path, path.with_name("TWICE.parquet"))
    body = msgspec.msgpack.encode(msgspec.structs.replace(record, segment_id="TWICE"))
    world.put_record(record_key(RecordKind.SEGMENT, world.t.uid, "TWICE"), body, version)


TABLE_PLANTS: dict[str, tuple[Plant, str]] = {
    "a second visible version": (lambda w: w.hot_row("ann", 1), "shows version"),
    "two versions of one seq": (_a_segment_twice, "has two versions of row"),
    "a row of no table": (
        lambda w: w.raw_row(77, keys.row_key(Scope("a"), b""), None, 0, b"x"),
        "rows of table 77 are stored",
    ),
    "a key without a scope": (lambda w: w.raw_row(w.t.uid, b"\x00\x01junk", None, 0, b"x"), "a key without a scope"),
    "a wrong hash": (
        lambda w: w.raw_row(w.t.uid, b"\x00\x07" + keys.row_key(Scope("ann"), b"")[2:], None, 0, b"x"),
        "the hash of another scope than 'ann'",
    ),
    "a user's row in a shared table": (_shared_row_of_a_user, "outside the shared scope"),
    "a shared row in a user table": (
        lambda w: w.raw_row(w.t.uid, keys.row_key(SHARED_SCOPE, keys.encode_int(1)), None, 0, b"x"),
        "belongs to no user",
    ),
    "a payload that is no payload": (lambda w: w.hot_row("ann", 50, payload=b"\xc1"), "cannot be decoded"),
    "an unknown schema version": (
        lambda w: w.hot_row("ann", 50, payload=msgspec.msgpack.encode((8, 50, "x"))),
        "unknown schema version 8",
    ),
    "too few values": (lambda w: w.hot_row("ann", 50, payload=msgspec.msgpack.encode((1, 50))), "has 1 values, 2"),
    "another primary key": (
        lambda w: w.hot_row("ann", 50, payload=msgspec.msgpack.encode((1, 51, "x"))),
        "another primary key than its values",
    ),
    "a seq above the last": (lambda w: w.hot_row("ann", 50, seq=1 << 62), "the last seq is"),
    "unknown flags": (lambda w: w.hot_row("ann", 50, flags=64), "unknown flags 64"),
    "a dead row that nobody removes": (_below_the_watermark, "no removal is pending"),
    "a watermark above the last seq": (
        _record(RecordKind.WATERMARK, OWN, value=U64.pack(1 << 62)),
        "above the last seq",
    ),
    "records of no table": (_record(RecordKind.MANIFEST, 99), "records of table 99 exist"),
    "an intent that names a live segment": (_intent_of_a_segment, "names a live segment"),
    "a segment that is newer than the manifest": (
        lambda w: w.put_record(record_key(RecordKind.MANIFEST, w.t.uid), b"", 1),
        "after the manifest version 1",
    ),
    "a table without a name": (_gone(RecordKind.TABLE_NAME, "app", "t"), "is not found by its name"),
    "a name without a table": (
        _record(RecordKind.TABLE_NAME, "app", "x", value=msgspec.msgpack.encode(99)),
        "names table 99",
    ),
    "a table without its version": (_gone(RecordKind.TABLE_VERSION, OWN, 1), "lacks its schema version 1"),
    "a table without its namespace": (_gone(RecordKind.NAMESPACE, "app"), "which does not exist"),
    "a definition that cannot be read": (_record(RecordKind.TABLE, OWN, value=b"\xc1"), "cannot be decoded"),
    "a table that is live and dropped": (_dropped_and_live, "is live and dropped"),
    "a record of unknown kind": (lambda w: w.put_record(b"\xee", b""), "is of unknown kind"),
    "keys of an unknown space": (lambda w: w.put(0x55, b"x", b"y"), "keys of unknown kind 85"),
    "an outcome without its age": (
        lambda w: w.put(Space.OUTCOME, b"k", U64.pack(1) + msgspec.msgpack.encode((1, [], [], []))),
        "missing in the index by age",
    ),
}


@pytest.mark.parametrize("name", TABLE_PLANTS)
def test_damage_of_tables_is_reported(world: World, name: str) -> None:
    plant, expected = TABLE_PLANTS[name]
    plant(world)
    assert any(expected in problem for problem in world.problems()), world.problems()


def _job_field(**fields: Any) -> Plant:
    return lambda world: world.put_job(msgspec.structs.replace(world.job(), **fields))


def _history(world: World) -> tuple[bytes, tuple[int, int, list[tuple[str, str]]]]:
    """The second entry in the history of the newest job, and its key."""
    prefix = jk.history_prefix(world.job().job_id)
    key, value = list(world.kv.scan(prefix, jk.after(prefix)))[1]
    return key, msgspec.msgpack.decode(value, type=tuple[int, int, list[tuple[str, str]]])


def _lost_event(world: World) -> None:
    world.kv.write([(_history(world)[0], None)])


def _moved_event(world: World) -> None:
    key, (position, at, events) = _history(world)
    world.kv.write([(key, msgspec.msgpack.encode((position + 1000, at, events)))])


def _unordered_event(world: World) -> None:
    position = _history(world)[1][0]
    world.put(JobSpace.COMMITTED, U64.pack(position), None)


def _order_of_nothing(world: World) -> None:
    position = _history(world)[1][0]
    world.put(JobSpace.COMMITTED, U64.pack(position), msgspec.msgpack.encode([(world.job().job_id, 99, 1)]))


def _two_running_under_one_lease(world: World) -> None:
    for job in world.db.jobs.list_jobs()[:2]:
        world.put_job(msgspec.structs.replace(job.row, status=JobStatus.RUNNING, lease_id=1, finished_at=None))


def _parked_for_nobody(world: World) -> None:
    row = msgspec.structs.replace(
        world.job(), status=JobStatus.QUEUED, finished_at=None, concurrency_key="k", idempotency_key=None
    )
    world.put_job(row)
    key, lane = jk.parked_key(row), jk.queue_key(row)
    assert key is not None
    assert lane is not None
    world.kv.write([(key, lane)])


def _newest_attempt(world: World) -> None:
    row = world.job()
    key = jk.attempts_prefix(row.job_id) + U64.pack(row.attempt)
    world.kv.write([(key, msgspec.msgpack.encode(JobAttempt(job_id=row.job_id, attempt=row.attempt)))])


JOB_PLANTS: dict[str, tuple[Plant, str]] = {
    "running without a lease": (_job_field(status=JobStatus.RUNNING, finished_at=None), "is running without a lease"),
    "ended with a lease": (_job_field(lease_id=1), "is completed and holds lease 1"),
    "ended without its time": (_job_field(finished_at=None), "is completed and has finished_at None"),
    "ended and held": (_job_field(hold=Hold.PAUSED), "is completed and held as paused"),
    "completed with a trace": (_job_field(exception_trace="x"), "keeps the trace"),
    "too many retries": (_job_field(retry_count=9), "after 9 retries, 3 are allowed"),
    "a lease that was never given": (
        _job_field(status=JobStatus.RUNNING, finished_at=None, lease_id=1 << 40),
        "the last one given is",
    ),
    "one lease twice": (_two_running_under_one_lease, "hold lease 1"),
    "a row that cannot be read": (lambda w: w.put(JobSpace.JOB, b"FL-x", b"\xc1"), "job 'FL-x' cannot be decoded"),
    "the row of another job": (
        lambda w: w.put(JobSpace.JOB, b"FL-x", msgspec.msgpack.encode(w.job())),
        "job 'FL-x' holds the row of",
    ),
    "a status that the index lacks": (_job_field(status=JobStatus.FAILED), "the status index of jobs lacks"),
    "an entry of no job": (lambda w: w.put(JobSpace.STATUS, b"\x01" + b"x" * 20, b""), "which no job has"),
    "a queued job that nobody finds": (
        _job_field(status=JobStatus.QUEUED, finished_at=None),
        "is queued and neither queued nor parked",
    ),
    "a place in the queue of no job": (
        lambda w: w.put(JobSpace.QUEUE, b"q\x00\x01t\x00\x01" + b"x" * 20, b""),
        "the queue of jobs holds",
    ),
    "a parked job that nobody wakes": (_parked_for_nobody, "nothing of that key runs or waits"),
    "an active key that nobody holds": (
        lambda w: w.put(JobSpace.ACTIVE_KEY, b"k", b"FL-x"),
        "the active key index of jobs holds b'k'",
    ),
    "a wrong count": (
        lambda w: w.put(JobSpace.COUNT, b"\x04default", U64.pack(99)),
        "the store counts 99 jobs that are completed in queue 'default'",
    ),
    "no count": (
        lambda w: w.put(JobSpace.COUNT, b"\x04" + w.job().queue.encode(), None),
        "3 jobs are completed in queue",
    ),
    "the newest attempt among the older ones": (_newest_attempt, "which never was or is the newest"),
    "an attempt that cannot be read": (
        lambda w: w.kv.write([(jk.attempts_prefix(w.job().job_id) + U64.pack(1), b"\xc1")]),
        "attempt 1 of job",
    ),
    "a gap in the events": (_lost_event, "event 2 of job"),
    "fewer events than the job counts": (_job_field(events=99), "counts 99 events"),
    "an event at another place": (_moved_event, "the order of events says"),
    "an event that the order lacks": (_unordered_event, "is missing in the order of events"),
    "an order of events that never were": (_order_of_nothing, "which has none such"),
    "a position above the last one": (
        lambda w: w.put(JobSpace.META, b"event_position", U64.pack(1)),
        "the last one given is 1",
    ),
}


@pytest.mark.parametrize("name", JOB_PLANTS)
def test_damage_of_jobs_is_reported(world: World, name: str) -> None:
    plant, expected = JOB_PLANTS[name]
    plant(world)
    assert any(expected in problem for problem in world.problems()), world.problems()


def test_files_that_nothing_names_are_counted_until_a_sweep_removes_them(world: World) -> None:
    stray = world.file(0).with_name("01ARZ3NDEKTSV4RRFFQ69G5FAV.parquet")
    stray.write_bytes(b"never published")
    report = world.db.check()
    assert report.ok
    assert report.strays == 1
    job = world.db.jobs.create_job("cleanup", {"operation": "sweep"})
    assert world.db.jobs.wait(job.id, 30).status == "completed"
    assert world.db.check().strays == 0
    assert not stray.exists()
