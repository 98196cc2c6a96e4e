"""What a claim reads does not depend on how many jobs have ended, nor do questions about the active ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kalamdb.app_context import AppContext
from kalamdb.config import Settings
from kalamdb.database import Database
from kalamdb.storage import Batch
from kalamdb.storage.jobs import JobFilter, JobMove, JobStatus
from kalamdb.storage.kv import KvBackend
from kalamdb.storage.memory import MemoryKv
from kalamdb.storage.ordered import OrderedKv
from kalamdb.storage.rocks import RocksKv
from kalamdb.testing.clock import SimulatedClock
from kalamdb.testing.counting import CountingKv, claim_reads, fill_jobs
from kalamdb.types import JobId
from tests.jobs.conftest import QUIET

ENDED = 20_000
CLAIMED = 300


def memory(path: Path) -> OrderedKv:
    return MemoryKv()


def rocks(path: Path) -> OrderedKv:
    return RocksKv(path, create=True)


@pytest.mark.parametrize(
    ("open_kv", "ended"), [(memory, ENDED), (rocks, ENDED), pytest.param(rocks, 1_000_000, marks=pytest.mark.long)]
)
def test_a_claim_reads_the_same_keys_and_bytes_however_many_jobs_have_ended(
    open_kv: Callable[[Path], OrderedKv], ended: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh = claim_reads(open_kv(tmp_path / "fresh"), ended=0, claimed=CLAIMED)
    full = claim_reads(open_kv(tmp_path / "full"), ended=ended, claimed=CLAIMED)
    assert full == fresh
    keys = [reads.keys_read for reads in fresh]
    # Admissions come in the first claims, and the first entries of the lane are read 256 at a time.
    assert sorted(keys)[CLAIMED // 2] <= 2 and sum(keys) < 10 * CLAIMED
    with capsys.disabled():
        print(
            f"\n{CLAIMED} claims beside 0 and {ended:,} ended jobs, {open_kv.__name__}: {sum(keys)} keys and "
            f"{sum(reads.bytes_read for reads in full):,} bytes read in both, median {sorted(keys)[CLAIMED // 2]} keys"
        )


@pytest.fixture
def counted(tmp_path: Path) -> tuple[Database, CountingKv]:
    """A database over a counting store with 500 completed jobs and one queued, whose runner starts none."""
    counting = CountingKv(MemoryKv())
    clock = SimulatedClock()
    backend = KvBackend(counting, clock)
    fill_jobs(backend, JobStatus.COMPLETED, 500)
    fill_jobs(backend, JobStatus.QUEUED, 1, first=5000)
    settings = Settings.load({**QUIET, "jobs.schedules_enabled": False}, environment={})
    context = AppContext(None, settings, clock=clock, backend=backend, root=tmp_path)
    return Database(context), counting


@pytest.mark.parametrize(
    ("sql", "params", "rows"),
    [
        ("SHOW JOBS WHERE status = 'queued'", None, 1),
        ("SHOW JOBS WHERE status IN ('new', 'queued', 'running', 'retrying')", None, 1),
        ("SELECT * FROM system.jobs WHERE status = $1 AND priority = 0", ["queued"], 1),
        ("SELECT * FROM system.jobs WHERE job_id = :id", {"id": "XX-00000007"}, 1),
        ("SELECT j.message FROM system.jobs AS j WHERE 'queued' = (j.status)", None, 1),
        ("SELECT * FROM system.job_events WHERE job_id = 'XX-00000007'", None, 1),
        ("SELECT * FROM system.jobs WHERE status = 'queued' AND status = 'completed'", None, 0),
        ("WITH w AS (SELECT * FROM system.jobs WHERE status = 'queued') SELECT * FROM w", None, 1),
        ("SELECT 1 WHERE EXISTS (SELECT 1 FROM system.jobs WHERE system.jobs.status = 'queued')", None, 1),
    ],
)
def test_conditions_on_text_columns_of_system_tables_reach_the_store(
    counted: tuple[Database, CountingKv], sql: str, params: object, rows: int
) -> None:
    db, counting = counted
    with db:
        counting.reset()
        found = db.execute(sql, params)
        assert len(found.rows) == rows and counting.reads.keys_read < 50


@pytest.mark.parametrize(
    ("sql", "count"),
    [
        ("SELECT count(*) FROM system.jobs WHERE status = 'queued' OR job_id = 'XX-00000007'", 2),
        ("SELECT count(*) FROM system.jobs WHERE NOT status = 'queued'", 500),
        ("SELECT count(*) FROM system.jobs WHERE status <> 'queued'", 500),
        ("SELECT count(*) FROM system.jobs WHERE lower(status) = 'queued'", 1),
        ("SELECT count(*) FROM system.jobs WHERE status = $1", 0),
        ("SELECT count(*) FROM system.jobs WHERE status IN (SELECT 'queued')", 1),
        ("SELECT (SELECT count(*) FROM system.jobs) FROM system.jobs WHERE status = 'queued'", 501),
        (
            "SELECT count(*) FROM system.jobs AS a LEFT JOIN system.jobs AS b ON a.job_id = b.job_id "
            "WHERE a.status = 'completed'",
            500,
        ),
        ("SELECT count(*) FROM (SELECT CASE status WHEN 'queued' THEN 'x' ELSE status END AS status FROM system.jobs) "
         "WHERE status = 'x'", 1),
    ],
)  # fmt: skip
def test_other_conditions_on_system_tables_keep_their_meaning(
    counted: tuple[Database, CountingKv], sql: str, count: int
) -> None:
    db, _ = counted
    with db:
        assert db.execute(sql, [None] if "$1" in sql else None).scalar() == count


def test_a_view_and_a_query_over_one_system_table_do_not_share_their_conditions(
    counted: tuple[Database, CountingKv],
) -> None:
    db, _ = counted
    with db:
        db.execute("CREATE NAMESPACE app; CREATE VIEW app.waiting AS SELECT * FROM system.jobs WHERE status = 'queued'")
        assert db.execute("SELECT count(*) FROM app.waiting").scalar() == 1
        sql = "SELECT count(*) FROM system.jobs AS j, app.waiting AS w WHERE j.status = 'completed'"
        assert db.execute(sql).scalar() == 500


@pytest.mark.parametrize("open_kv", [memory, rocks])
def test_a_scan_with_a_limit_ends_there_in_both_directions(
    open_kv: Callable[[Path], OrderedKv], tmp_path: Path
) -> None:
    kv = open_kv(tmp_path / "kv")
    try:
        kv.write([(b"k%03d" % number, b"v") for number in range(100)])
        view = kv.snapshot()
        for limit in (0, 1, 16, 17, 99, 100, 1000):
            for reader in (kv, view):
                keys = [key for key, _ in reader.scan(b"k", b"l", limit=limit)]
                assert keys == [b"k%03d" % number for number in range(min(limit, 100))]
                back = [key for key, _ in reader.scan(b"k", b"l", reverse=True, limit=limit)]
                assert back == [b"k%03d" % number for number in reversed(range(100))][:limit]
        view.close()
    finally:
        kv.close()


@pytest.mark.parametrize("open_kv", [memory, rocks])
def test_a_job_that_returns_to_a_state_is_found_before_those_that_came_later(
    open_kv: Callable[[Path], OrderedKv], tmp_path: Path
) -> None:
    clock = SimulatedClock()
    backend = KvBackend(open_kv(tmp_path / "kv"), clock, durability="os")
    active = JobFilter(statuses=frozenset({JobStatus.NEW, JobStatus.QUEUED, JobStatus.RUNNING}), limit=None)

    def move(job_id: str, old: JobStatus, new: JobStatus) -> None:
        backend.commit(Batch(jobs=[JobMove(JobId(job_id), old, None, {"status": new})]))

    try:
        fill_jobs(backend, JobStatus.QUEUED, 1500)
        clock.advance(1)
        fill_jobs(backend, JobStatus.QUEUED, 5, first=1500)
        ids = [f"XX-{number:08d}" for number in range(1505)]
        gone = [JobMove(JobId(one), JobStatus.QUEUED, None, {"status": JobStatus.CANCELLED}) for one in ids[:1500]]
        backend.commit(Batch(jobs=list(gone)))
        assert [row.job_id for row in backend.jobs.query(active)] == ids[1500:]
        move(ids[3], JobStatus.CANCELLED, JobStatus.QUEUED)
        assert [row.job_id for row in backend.jobs.query(active)] == [ids[3], *ids[1500:]]
        for one in (ids[3], *ids[1500:]):
            move(one, JobStatus.QUEUED, JobStatus.CANCELLED)
        assert backend.jobs.query(active) == []
        move(ids[4], JobStatus.CANCELLED, JobStatus.QUEUED)
        assert [row.job_id for row in backend.jobs.query(active)] == [ids[4]]
        assert backend.check() == []
    finally:
        backend.close()
