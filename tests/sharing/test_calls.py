"""One suite over every way to reach a database: the same calls give the same."""

from __future__ import annotations

import datetime as dt
import decimal
import uuid
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

import kalamdb
from kalamdb.storage.jobs import JobStatus

ALL_TYPES = (
    "CREATE SHARED TABLE every (id INT PRIMARY KEY, b BOOLEAN, l BIGINT, f DOUBLE, t TEXT, x BYTES, d DECIMAL(20, 4), "
    "day DATE, clock TIME, at TIMESTAMP, moment DATETIME, u UUID, j JSON, e EMBEDDING(3))"
)
ROW = (
    1, True, -(2**63), 1.5, "naïve \U0001f600", b"\x00\xff", decimal.Decimal("12345678901234.5678"),
    dt.date(1969, 12, 31), dt.time(23, 59, 59, 999999), dt.datetime(2024, 2, 29, 1, 2, 3, 4),
    dt.datetime(2024, 2, 29, 1, 2, 3, 4, dt.UTC), uuid.UUID(int=7), {"a": [1, None, {"b": "c"}], "n": 2.5},
    [0.5, -1.0, 2.0],
)  # fmt: skip
QUESTION_MARKS = ", ".join("?" * len(ROW))


def notes(db: Any) -> None:
    """A table of private rows and a shared one."""
    db.execute("CREATE NAMESPACE app")
    db.execute("CREATE USER TABLE app.notes (id INT PRIMARY KEY, v TEXT)")
    db.execute("CREATE SHARED TABLE app.shared (id INT PRIMARY KEY, v TEXT)")


def test_every_type_arrives_as_it_left(opened: Any) -> None:
    opened.execute(ALL_TYPES)
    opened.execute(f"INSERT INTO every VALUES ({QUESTION_MARKS})", ROW)
    opened.execute(f"INSERT INTO every VALUES ({QUESTION_MARKS})", [2, *[None] * 13])
    by_key = opened.execute("SELECT * FROM every WHERE id = $1", [1])
    by_engine = opened.execute("SELECT * FROM every ORDER BY id")
    assert by_key.rows == [ROW]
    assert list(map(type, by_key.rows[0])) == list(map(type, ROW))
    assert by_engine.rows == [ROW, (2, *[None] * 13)]
    assert by_engine.arrow().slice(0, 1).equals(by_key.arrow())
    plain = "id, b, l, f, t, x, d, day, clock, at, moment, u, e"
    for number in (1, 2, 9):
        found = opened.execute(f"SELECT {plain} FROM every WHERE id = $1", [number])
        assert found.rows == [row for row in ((*ROW[:12], ROW[13]), (2, *[None] * 12)) if row[0] == number]
        assert found.arrow().equals(opened.execute(f"SELECT {plain} FROM every WHERE id + 0 = $1", [number]).arrow())
    assert opened.insert("every", [(3, *ROW[1:])]) == 1
    assert opened.insert("every", [dict(zip(by_key.columns, (4, *ROW[1:]), strict=True))]) == 1
    assert [row[1:] for row in opened.execute("SELECT * FROM every WHERE id > 2 ORDER BY id").rows] == [ROW[1:]] * 2


def test_parameters_by_name_and_large_integers(opened: Any) -> None:
    assert opened.execute("SELECT :a + 1, :b", {"a": 41, "b": "x"}).rows == [(42, "x")]
    opened.execute("CREATE SHARED TABLE n (id BIGINT PRIMARY KEY)")
    with pytest.raises(kalamdb.InvalidRequest):
        opened.execute("INSERT INTO n VALUES ($1)", [2**100])
    with pytest.raises(kalamdb.InvalidRequest, match="params is 'text'"):
        opened.execute("SELECT 1", "text")
    with pytest.raises(kalamdb.InvalidRequest):
        opened.execute("SELECT $1", [object()])
    with pytest.raises(kalamdb.InvalidRequest):
        opened.execute("SELECT $1", ["\ud800"])
    with pytest.raises(kalamdb.InvalidRequest):
        opened.execute(5)


def test_results_of_many_statements(opened: Any) -> None:
    notes(opened)
    result = opened.execute("INSERT INTO app.shared VALUES (1, 'a'); SELECT v FROM app.shared; SELECT 2 AS two")
    assert [one.message for one in result.results] == ["Inserted 1 row(s)", None, None]
    assert [one.rows for one in result.results] == [[], [("a",)], [(2,)]]
    assert result.results[-1] is result and result.columns == ["two"] and result.scalar() == 2
    assert opened.execute("UPDATE app.shared SET v = 'b' WHERE id = 1").row_count == 1
    assert opened.execute("SELECT id FROM app.shared WHERE id = 9").rows == []


def test_users_roles_namespaces_and_sessions(opened: Any) -> None:
    notes(opened)
    opened.execute("INSERT INTO app.notes VALUES (1, 'anna')", user="anna")
    assert opened.execute("SELECT count(*) FROM app.notes").scalar() == 0
    anna = opened.session(user="anna", role="user", namespace="app")
    assert anna.execute("SELECT v, CURRENT_ROLE FROM notes").rows == [("anna", "user")]
    assert anna.insert("notes", [{"id": 2, "v": "more"}]) == 1
    with anna.transaction() as tx:
        tx.execute("DELETE FROM notes WHERE id = 1")
    with anna.stream("SELECT id FROM notes") as batches:
        assert [value for batch in batches for value in batch.column("id").to_pylist()] == [2]
    with pytest.raises(kalamdb.Denied):
        anna.execute("DROP TABLE notes")
    for statement in ("SELECT v FROM app.notes WHERE id = 2", "SELECT max(v) FROM app.notes"):
        acted = opened.execute(f"EXECUTE AS USER anna ({statement})")
        assert (acted.rows, acted.as_user) == ([("more",)], "anna")


@pytest.mark.parametrize("form", ["arrow", "batch", "pandas", "polars", "dicts", "tuples"])
def test_data_in_all_forms(opened: Any, form: str) -> None:
    opened.execute("CREATE USER TABLE t (id INT PRIMARY KEY, name TEXT, price DECIMAL(10, 2), j JSON)")
    columns = {
        "who": ["anna", "ben"], "id": [1, 2], "name": ["a", None],
        "price": [decimal.Decimal("1.50"), None], "j": [{"k": [1]}, None],
    }  # fmt: skip
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    table = pa.table({**columns, "j": ['{"k":[1]}', None]})
    data = {
        "arrow": table,
        "batch": table.to_batches()[0],
        "pandas": pd.DataFrame(columns),
        "polars": pl.from_arrow(table),
        "dicts": rows,
        "tuples": [tuple(row.values()) for row in rows],
    }[form]
    assert opened.insert("t", data, user_column="who") == 2
    assert opened.execute("SELECT * FROM t", user="anna").rows == [(1, "a", decimal.Decimal("1.50"), {"k": [1]})]
    assert opened.execute("SELECT * FROM t", user="ben").rows == [(2, None, None, None)]
    with pytest.raises(kalamdb.UniqueViolation):
        opened.insert("t", data, user_column="who")
    assert opened.insert("t", data, user_column="who", on_conflict="ignore") == 0
    assert opened.insert("t", data, user_column="who", on_conflict="update") == 2


def test_absent_keys_take_defaults(opened: Any) -> None:
    opened.execute("CREATE SHARED TABLE t (id INT PRIMARY KEY, v TEXT DEFAULT 'none')")
    assert opened.insert("t", [{"id": 1}, {"id": 2, "v": None}]) == 2
    assert opened.execute("SELECT id, v FROM t ORDER BY id").rows == [(1, "none"), (2, None)]
    for bad in (5, "text", [1, 2], [(1, 2, 3)], [{"nope": 1}]):
        with pytest.raises(kalamdb.InvalidRequest):
            opened.insert("t", bad)


def test_a_stream_is_complete_and_may_be_left_early(opened: Any) -> None:
    notes(opened)
    rows = pa.table({"id": pa.array(range(200_000), pa.int32()), "v": ["x" * 20] * 200_000})
    assert opened.insert("app.shared", rows) == 200_000
    with opened.stream("SELECT id FROM app.shared WHERE id >= $1 ORDER BY id", [10]) as batches:
        ids = [value for batch in batches for value in batch.column("id").to_pylist()]
    assert ids == list(range(10, 200_000))
    with opened.stream("SELECT id FROM app.shared") as batches:
        next(batches)
    with pytest.raises(kalamdb.InvalidRequest, match="only one SELECT can be streamed"):
        with opened.stream("DELETE FROM app.shared WHERE true"):
            pass
    with opened.stream("SELECT id FROM app.shared WHERE id < 0") as batches:
        assert sum(batch.num_rows for batch in batches) == 0
    assert opened.execute("SELECT count(*) FROM app.shared").scalar() == 200_000


def test_a_transaction_commits_rolls_back_and_conflicts(opened: Any) -> None:
    notes(opened)
    with opened.transaction(user="ann") as tx:
        tx.execute("INSERT INTO app.notes VALUES (1, $1)", ["a"])
        assert tx.insert("app.notes", [(2, "b")]) == 1
        tx.create_job("later", {"n": 1}, "once", allow_unknown=True)
        assert tx.execute("SELECT count(*) FROM app.notes").scalar() == 2
        assert opened.execute("SELECT count(*) FROM app.notes", user="ann").scalar() == 0
        assert opened.jobs.list_jobs(job_type="later") == []
    assert [job.parameters for job in opened.jobs.list_jobs(job_type="later")] == [{"n": 1}]
    with pytest.raises(RuntimeError, match="stop"):
        with opened.transaction(user="ann") as tx:
            tx.execute("DELETE FROM app.notes WHERE true")
            raise RuntimeError("stop")
    with opened.transaction(user="ann") as tx:
        tx.execute("DELETE FROM app.notes WHERE true")
        tx.rollback()
    assert opened.execute("SELECT count(*) FROM app.notes", user="ann").scalar() == 2
    with pytest.raises(kalamdb.TransactionConflict):
        with opened.transaction(user="ann") as tx:
            tx.execute("UPDATE app.notes SET v = 'x' WHERE id = 1")
            opened.execute("UPDATE app.notes SET v = 'y' WHERE id = 1", user="ann")
    with pytest.raises(kalamdb.UniqueViolation):
        with opened.transaction(user="ann") as tx:
            tx.insert("app.notes", [(1, "again")])
    assert opened.execute("SELECT v FROM app.notes WHERE id = 1", user="ann").scalar() == "y"


def test_errors_keep_class_message_and_attributes(opened: Any) -> None:
    notes(opened)
    with pytest.raises(kalamdb.NotFound, match=r"^Table 'app\.nope' does not exist"):
        opened.execute("SELECT * FROM app.nope")
    with pytest.raises(kalamdb.InvalidRequest, match=r"^Statement 2 failed: "):
        opened.execute("SELECT 1; COMMIT; SELECT 2")
    with pytest.raises(kalamdb.InvalidRequest, match="role 'king' is not one of"):
        opened.execute("SELECT 1", role="king")
    first = opened.jobs.create_job("later", idempotency_key="k", allow_unknown=True)
    with pytest.raises(kalamdb.IdempotencyConflict, match="is already") as refused:
        opened.jobs.create_job("later", idempotency_key="k", allow_unknown=True)
    assert refused.value.job.id == first.id and refused.value.job.created_at == first.created_at
    with pytest.raises(kalamdb.Timeout):
        opened.execute("SELECT count(*) FROM generate_series(1, 900000) a WHERE a.value > 1", timeout_s=0)
    with pytest.raises(TypeError):
        opened.jobs.create_job("later", nonsense=1)


def test_jobs_are_created_found_steered_and_awaited(opened: Any) -> None:
    notes(opened)
    opened.execute("INSERT INTO app.shared VALUES (1, 'a')")
    done = opened.jobs.wait(opened.jobs.create_job("flush", {"table_id": "app.shared"}).id, timeout_s=30)
    assert done.status is JobStatus.COMPLETED and done.finished_at > done.created_at
    soon = dt.datetime(2999, 1, 1, tzinfo=dt.UTC)
    job = opened.jobs.create_job("later", [1, 2], run_at=soon, priority=3, queue="q", allow_unknown=True)
    assert (job.parameters, job.run_at, job.priority, job.queue) == ({"arg0": 1, "arg1": 2}, soon, 3, "q")
    assert opened.jobs.get_job(job.id).id == job.id
    assert opened.jobs.pause_job(job.id).hold == "paused"
    assert opened.jobs.resume_job(job.id).hold is None
    with pytest.raises(kalamdb.Timeout, match=f"job '{job.id}' is still"):
        opened.jobs.wait(job.id, timeout_s=0.05)
    assert opened.jobs.cancel_job(job.id).status == "cancelled"
    assert opened.jobs.wait(job.id).status == "cancelled"
    assert opened.jobs.retry_job(job.id).status == "queued"
    both = opened.jobs.create_jobs([{"job_type": "later", "params": {"n": n}, "allow_unknown": True} for n in (1, 2)])
    assert [one.parameters["n"] for one in both] == [1, 2]
    listed = opened.jobs.list_jobs(job_type="later", status=["queued", "new"], descending=True)
    assert {one.id for one in listed} == {job.id, *(one.id for one in both)}
    with pytest.raises(kalamdb.NotFound):
        opened.jobs.get_job("XX-0000000000")


def test_a_backup_and_a_check(opened: Any, tmp_path: Path) -> None:
    notes(opened)
    opened.execute("INSERT INTO app.shared VALUES (1, 'a')")
    job = opened.backup(tmp_path / "backups")
    assert job.status == "completed"
    assert [file.name for file in (tmp_path / "backups").iterdir()]
    assert opened.backup(tmp_path / "more", wait=False).status in ("new", "queued", "running", "completed")
    report = opened.check()
    assert report.ok and report.tables == 2


def test_a_closed_database_says_so(opened: Any) -> None:
    opened.close()
    with pytest.raises(kalamdb.Closed):
        opened.execute("SELECT 1")
    with pytest.raises(kalamdb.Closed):
        opened.insert("t", [])
    with pytest.raises(kalamdb.Closed):
        opened.jobs.get_job("x")
    opened.close()
