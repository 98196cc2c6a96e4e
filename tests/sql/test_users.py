"""Users without log-in: statements, roles, the audit log, and what a dropped or purged user leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import kalamdb
from kalamdb.clock import Ulids
from kalamdb.database import Database
from kalamdb.testing.clock import SimulatedClock

QUIET: dict[str, Any] = {"flush.scheduler_enabled": False, "compaction.enabled": False, "auth.bcrypt_cost": 4}


@pytest.fixture
def db() -> Any:
    with kalamdb.connect(":memory:", **QUIET) as opened:
        yield opened


def users(db: Database) -> dict[str, dict[str, Any]]:
    return {row["user_id"]: row for row in db.execute("SELECT * FROM system.users").dicts()}


def actions(db: Database) -> list[tuple[Any, ...]]:
    return db.execute("SELECT action, target, details FROM system.audit_log ORDER BY audit_id").rows


def test_a_new_database_has_the_root_user(db: Database) -> None:
    root = users(db)["root"]
    assert (root["role"], root["auth_type"], root["password_hash"]) == ("system", "internal", "")


@pytest.mark.parametrize(
    "sql, role, auth_type, email",
    [
        ("CREATE USER anna WITH PASSWORD 'Secret-1' ROLE dba EMAIL 'a@x.org'", "dba", "password", "a@x.org"),
        ("CREATE USER 'anna' WITH INTERNAL", "user", "internal", None),
        ("CREATE USER anna", "user", "internal", None),
        ("""CREATE USER anna WITH OAUTH '{"provider":"p","subject":"s"}' ROLE analyst""", "service", "oauth", None),
        ("CREATE USER anna EMAIL 'a@x.org' ROLE readonly WITH PASSWORD 'long enough'", "user", "password", "a@x.org"),
    ],
)
def test_create_user_states_role_proof_and_email(
    db: Database, sql: str, role: str, auth_type: str, email: str | None
) -> None:
    assert db.execute(sql).message == "User 'anna' created"
    anna = users(db)["anna"]
    assert (anna["role"], anna["auth_type"], anna["email"]) == (role, auth_type, email)
    assert anna["password_hash"] in ("", "***")


def test_a_password_may_be_a_parameter_and_is_shown_nowhere(db: Database) -> None:
    db.execute("CREATE USER anna WITH PASSWORD $1", ["Very-Secret-1"])
    db.execute("ALTER USER anna SET PASSWORD 'Very-Secret-2'")
    for table in ("users", "audit_log", "jobs"):
        assert "Very-Secret" not in str(db.execute(f"SELECT * FROM system.{table}").rows)
    assert ("ALTER_USER", "anna", "password=[REDACTED]") in actions(db)


@pytest.mark.parametrize(
    "sql, text",
    [
        ("CREATE USER root", "already exists"),
        ("CREATE USER x ROLE king", "role 'king' is not one of"),
        ("CREATE USER x WITH OAUTH '{}'", "'provider'"),
        ("CREATE USER x WITH OAUTH 'no json'", "needs a JSON object"),
        ("CREATE USER x WITH PASSWORD ''", "1 to 72 bytes"),
        ("CREATE USER x WITH PASSWORD 'sevenly'", "8 to 72 characters, this one has 7"),
        ("CREATE USER x WITH PASSWORD 'long enough' WITH INTERNAL", "one way to log in"),
        ("CREATE USER x EMAIL 'nobody'", "is not an e-mail address"),
        ("CREATE USER x ROLE dba ROLE dba", "twice"),
        ("ALTER USER nobody SET ROLE dba", "does not exist"),
        ("ALTER USER root SET ROLE user", "cannot be changed"),
        ("ALTER USER root SET NAME 'x'", "PASSWORD or ROLE or EMAIL"),
        ("DROP USER root", "cannot be dropped"),
        ("DROP USER nobody", "does not exist"),
        ("RESTORE USER root", "is not dropped"),
        ("PURGE USER root", "cannot be dropped"),
    ],
)
def test_a_statement_that_cannot_be_says_why_and_changes_nothing(db: Database, sql: str, text: str) -> None:
    before = users(db), actions(db)
    with pytest.raises(kalamdb.KalamDbError, match=text):
        db.execute(sql)
    assert (users(db), actions(db)) == before


def test_a_password_of_more_than_72_bytes_is_refused(db: Database) -> None:
    with pytest.raises(kalamdb.InvalidRequest, match="this one has 74"):
        db.execute("CREATE USER anna WITH PASSWORD $1", ["ü" * 37])


def test_password_complexity_is_a_setting() -> None:
    with kalamdb.connect(":memory:", **QUIET, **{"auth.enforce_password_complexity": True}) as db:
        with pytest.raises(kalamdb.InvalidRequest, match="upper-case"):
            db.execute("CREATE USER anna WITH PASSWORD 'simple12'")
        db.execute("CREATE USER anna WITH PASSWORD 'Complex-1'")


def test_only_a_dba_changes_users_and_only_system_makes_system_users(db: Database) -> None:
    for role in ("user", "service"):
        with pytest.raises(kalamdb.Denied, match="needs role dba"):
            db.execute("CREATE USER anna", role=role)
    for sql in ("CREATE USER anna ROLE system", "ALTER USER root SET EMAIL 'x@y'", "DROP USER boss"):
        db.execute("CREATE USER boss ROLE system") if "boss" not in users(db) else None
        with pytest.raises(kalamdb.Denied, match="role dba may not"):
            db.execute(sql, role="dba")
    db.execute("CREATE USER anna ROLE dba", role="dba", user="berta")
    assert ("CREATE_USER", "anna", "role=dba auth_type=internal") in actions(db)


def test_a_dropped_user_is_refused_until_it_is_restored(db: Database) -> None:
    db.execute("CREATE NAMESPACE app")
    db.execute("CREATE USER TABLE app.t (id INT PRIMARY KEY)")
    db.execute("CREATE USER anna")
    db.execute("INSERT INTO app.t VALUES (1)", user="anna")
    assert db.execute("DROP USER anna").message == "User 'anna' dropped (soft delete)"
    assert db.execute("DROP USER IF EXISTS anna").message == "User 'anna' does not exist"
    for call in (
        lambda: db.execute("SELECT * FROM app.t", user="anna"),
        lambda: db.insert("app.t", [{"u": "anna", "id": 2}], user_column="u"),
    ):
        with pytest.raises(kalamdb.Denied, match="was dropped"):
            call()
    with pytest.raises(kalamdb.Conflict, match="RESTORE USER or PURGE USER it first"):
        db.execute("CREATE USER anna")
    assert db.execute("RESTORE USER anna").message == "User 'anna' restored"
    assert db.execute("SELECT id FROM app.t", user="anna").rows == [(1,)]


def test_a_purged_user_is_erased_by_a_job_and_the_name_is_free_again(db: Database) -> None:
    db.execute("CREATE NAMESPACE app")
    db.execute("CREATE USER TABLE app.t (id INT PRIMARY KEY)")
    db.execute("CREATE USER anna")
    db.execute("INSERT INTO app.t VALUES (1)", user="anna")
    message = db.execute("PURGE USER anna").message or ""
    job = db.jobs.wait(message.rsplit(" ", 1)[1], timeout_s=30)
    assert job.status == "completed" and job.id.startswith("UC-")
    assert "anna" not in users(db)
    assert db.execute("SELECT count(*) FROM app.t", user="anna").scalar() == 0
    db.execute("CREATE USER anna")
    db.execute("INSERT INTO app.t VALUES (2)", user="anna")


def test_users_past_the_grace_time_are_erased_and_others_stay() -> None:
    with kalamdb.connect(":memory:", **QUIET, deletion_grace_period_days=0) as db:
        for name in ("anna", "berta", "carla"):
            db.execute(f"CREATE USER {name}")
        db.execute("DROP USER anna")
        db.execute("DROP USER berta")
        job = db.jobs.wait(db.jobs.create_job("user_cleanup").id, timeout_s=30)
        assert job.status == "completed" and str(job.message).startswith("Erased 2 users")
        assert set(users(db)) == {"root", "carla"}
        job = db.jobs.wait(db.jobs.create_job("user_cleanup").id, timeout_s=30)
        assert (job.status, job.message) == ("skipped", "no dropped user is past the grace time")


def test_users_and_the_audit_log_survive_reopening(tmp_path: Path) -> None:
    with kalamdb.connect(tmp_path / "data", **QUIET) as db:
        db.execute("CREATE USER anna")
        db.execute("DROP USER anna")
        before = users(db), actions(db)
    with kalamdb.connect(tmp_path / "data", **QUIET) as db:
        assert (users(db), actions(db)) == before
        with pytest.raises(kalamdb.Denied):
            db.execute("SELECT 1", user="anna")


def test_entries_of_the_audit_log_sort_as_they_were_made() -> None:
    ids = Ulids(SimulatedClock())
    made = [ids.next() for _ in range(5000)]
    assert made == sorted(set(made)) and {len(one) for one in made} == {26}
