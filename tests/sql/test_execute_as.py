"""EXECUTE AS USER: whose rows it works on, what it takes, and what the audit log tells."""

from __future__ import annotations

from typing import Any

import pytest

import kalamdb
from kalamdb.database import Database
from tests.sql.conftest import refused, rows


@pytest.fixture
def world(db: Database) -> Database:
    """A user table, and a row of anna and one of root in it."""
    db.execute("CREATE USER TABLE app.notes (id INT PRIMARY KEY, text TEXT)")
    db.execute("CREATE SHARED TABLE app.shared (id INT PRIMARY KEY) WITH (ACCESS_LEVEL = 'public')")
    db.execute("INSERT INTO app.notes VALUES (1, 'of root')")
    db.execute("INSERT INTO app.notes VALUES (2, 'of anna')", user="anna")
    return db


def audit(db: Database) -> list[tuple[Any, ...]]:
    """What the audit log says of acting for others."""
    return rows(
        db,
        "SELECT actor_user_id, action, target, details, subject_user_id FROM system.audit_log "
        "WHERE action LIKE 'EXECUTE%' ORDER BY audit_id",
    )


def test_it_reads_and_writes_rows_of_the_target(world: Database) -> None:
    result = world.execute(
        "EXECUTE AS USER 'anna' (SELECT text, CURRENT_USER() AS u, CURRENT_ROLE() AS r FROM app.notes)"
    )
    assert (result.rows, result.as_user) == ([("of anna", "anna", "user")], "anna")
    done = world.execute("execute as user anna (INSERT INTO app.notes VALUES ($1, $2))", [3, "for (anna)"])
    assert (done.message, done.as_user) == ("Inserted 1 row(s)", "anna")
    assert rows(world, "SELECT id FROM app.notes ORDER BY id", user="anna") == [(2,), (3,)]
    assert rows(world, "SELECT id FROM app.notes") == [(1,)]
    assert audit(world) == [("root", "EXECUTE_AS_USER", "anna", None, "anna")] * 2


def test_the_target_need_not_exist_but_must_not_be_dropped(world: Database) -> None:
    assert rows(world, "EXECUTE AS USER nobody (SELECT * FROM app.notes)") == []
    world.execute("CREATE USER gone; DROP USER gone")
    with pytest.raises(kalamdb.Denied, match="was dropped"):
        world.execute("EXECUTE AS USER gone (SELECT * FROM app.notes)")


def test_it_is_an_element_of_a_batch_and_of_a_transaction(world: Database) -> None:
    found = world.execute(
        "USE app; BEGIN; INSERT INTO notes VALUES (4, 'x'); EXECUTE AS USER anna (INSERT INTO notes VALUES (4, 'y')); "
        "EXECUTE AS USER anna (SELECT count(*) FROM notes); COMMIT; SELECT count(*) FROM notes"
    )
    assert [one.as_user for one in found.results] == [None, None, None, "anna", "anna", None, None]
    assert [one.scalar() for one in found.results if one.columns] == [2, 2]
    with pytest.raises(kalamdb.UniqueViolation):
        world.execute(
            "BEGIN; EXECUTE AS USER anna (INSERT INTO app.notes VALUES (9, 'a')); INSERT INTO app.notes VALUES (1, 'b')"
        )
    assert rows(world, "SELECT count(*) FROM app.notes WHERE id = 9", user="anna") == [(0,)]


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT * FROM app.shared", "INSERT INTO app.shared VALUES (1)", "UPDATE app.shared SET id = 2 WHERE id = 1",
        "DELETE FROM app.shared WHERE id = 1", "SELECT * FROM app.notes WHERE id IN (SELECT id FROM app.shared)",
        "CREATE SHARED TABLE app.more (id INT PRIMARY KEY)", "INSERT INTO app.notes SELECT id, 'x' FROM app.shared",
        "SELECT id FROM app.shared WHERE id = 1", "SELECT * FROM app.peek",
    ],
)  # fmt: skip
def test_shared_tables_are_refused(world: Database, statement: str) -> None:
    world.execute("CREATE VIEW app.peek AS SELECT * FROM app.shared")
    with pytest.raises(kalamdb.InvalidRequest, match="EXECUTE AS USER is not allowed on SHARED tables"):
        world.execute(f"EXECUTE AS USER anna ({statement})")


@pytest.mark.parametrize(
    "sql, text",
    [
        ("EXECUTE AS USER anna SELECT 1", "exactly one statement in parentheses"),
        ("EXECUTE AS USER anna ()", "exactly one statement"),
        ("EXECUTE AS USER anna (SELECT 1; SELECT 2)", "exactly one statement"),
        ("EXECUTE AS USER anna (SELECT 1) (SELECT 2)", "exactly one statement"),
        ("EXECUTE AS USER anna (SELECT 1) LIMIT 1", "exactly one statement"),
        ("EXECUTE AS USER anna (SELECT 1", "exactly one statement"),
        ("EXECUTE AS USER anna", "exactly one statement"),
        ("EXECUTE AS anna (SELECT 1)", "USER is expected"),
        ("EXECUTE AS USER (SELECT 1)", "a user name is expected"),
        ("EXECUTE AS USER '' (SELECT 1)", "1 to 128 characters"),
        ("EXECUTE AS USER anna (EXECUTE AS USER bert (SELECT 1))", "cannot stand inside"),
        ("EXECUTE AS USER anna (BEGIN)", "cannot stand inside"),
        ("EXECUTE AS USER anna (USE app)", "cannot stand inside"),
    ],
)
def test_what_is_not_one_statement_of_rows_is_refused(world: Database, sql: str, text: str) -> None:
    assert text in refused(world, sql)
    assert audit(world) == []


def test_a_refusal_stops_the_batch_and_is_told(world: Database) -> None:
    world.execute("CREATE USER boss ROLE dba")
    text = "INSERT INTO app.notes VALUES (7, 'x'); EXECUTE AS USER boss (SELECT 1)"
    with pytest.raises(kalamdb.Denied, match="role service may not act for user 'boss' of role dba"):
        world.execute(text, user="robot", role="service")
    assert rows(world, "SELECT * FROM app.notes", user="robot") == []
    assert audit(world) == [("robot", "EXECUTE_AS_USER_DENIED", "boss", "role_not_allowed", "boss")]


def test_a_job_that_acts_for_a_user_writes_under_its_lease(world: Database) -> None:
    @world.jobs.executor("note", prefix="NT")
    def note(ctx: Any) -> None:
        ctx.execute("EXECUTE AS USER anna (INSERT INTO app.notes VALUES (8, 'by a job'))")

    job = world.jobs.wait(world.jobs.create_job("note").id, timeout_s=30)
    assert job.status == "completed", job.message
    assert rows(world, "SELECT text FROM app.notes WHERE id = 8", user="anna") == [("by a job",)]
