"""system.jobs and system.job_events as subscriptions: the newest state of each job, a few times a second."""

from __future__ import annotations

import pytest

from kalamdb.errors import Denied
from kalamdb.jobs import Completed, JobContext
from tests.conftest import Open


def test_a_dba_follows_jobs_and_their_events(open_db: Open) -> None:
    db = open_db()

    @db.jobs.executor("count", prefix="CN")
    def count(ctx: JobContext[dict[str, int]]) -> Completed:
        ctx.log.info("counting")
        return Completed("counted")

    first = db.jobs.create_job("count", {"n": 1})
    db.jobs.wait(first.id, timeout_s=30)
    sql = "SELECT job_id, status, message FROM system.jobs WHERE job_type = 'count'"
    jobs = db.subscribe(sql, role="dba", snapshot=True)
    events = db.subscribe("SELECT * FROM system.job_events", role="dba")
    assert (jobs.next(timeout_s=10).row or {})["job_id"] == first.id
    second = db.jobs.create_job("count", {"n": 2})
    db.jobs.wait(second.id, timeout_s=30)
    states = []
    while not states or states[-1] != "completed":
        change = jobs.next(timeout_s=10)
        assert change.row is not None and change.row["job_id"] == second.id
        states.append(change.row["status"])
    assert jobs.poll() is None
    texts: list[str] = []
    while "counting" not in " ".join(texts):
        row = events.next(timeout_s=10).row or {}
        assert row["job_id"] == second.id
        texts.append(row["message"])
    with db.subscribe(sql, role="dba", from_seq=jobs.last_seq - (60_000 << 22)) as resumed:
        assert {(resumed.next(timeout_s=10).row or {})["job_id"] for _ in range(2)} == {first.id, second.id}


def test_other_system_tables_and_other_roles_are_refused(open_db: Open) -> None:
    db = open_db()
    for table, role in (("system.jobs", "service"), ("system.users", "dba"), ("information_schema.tables", "dba")):
        with pytest.raises(Denied):
            db.subscribe(f"SELECT * FROM {table}", role=role)
