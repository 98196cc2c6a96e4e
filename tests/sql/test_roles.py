"""What each role may do with the statements of tables and the system (surface reference 5.2)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import kalamdb
from kalamdb.database import Database
from kalamdb.types import Role
from tests.role_matrix import MATRIX, WORLD, check
from tests.sql.conftest import rows


@pytest.fixture
def world(db: Database) -> Database:
    """A table of each access level, a user table, a stream, all with one row of root."""
    for statement in WORLD[1:]:
        db.execute(statement)
    return db


@pytest.fixture(scope="module")
def shared_world() -> Iterator[Database]:
    """The same for all statements of the matrix, which change nothing that another of them looks at."""
    quiet = {"flush.scheduler_enabled": False, "compaction.enabled": False}
    with kalamdb.connect(":memory:", **quiet) as database:
        for statement in WORLD:
            database.execute(statement)
        yield database


@pytest.mark.parametrize(("statement", "roles"), MATRIX)
def test_a_statement_is_for_certain_roles(shared_world: Database, statement: str, roles: str) -> None:
    def run(sql: str, role: Role) -> bool:
        try:
            shared_world.execute(sql, user="ann", role=role)
        except kalamdb.Denied:
            return False
        return True

    check(run, statement, roles)


def test_a_forbidden_statement_anywhere_stops_the_whole_text(world: Database) -> None:
    text = "INSERT INTO app.own VALUES (50, 50); SHOW ALL; INSERT INTO app.own VALUES (51, 51)"
    with pytest.raises(kalamdb.Denied, match="Admin privileges"):
        world.execute(text, user="ann", role="user")
    assert rows(world, "SELECT * FROM app.own", user="ann") == []


@pytest.mark.parametrize("role", [Role.USER, Role.SERVICE])
def test_an_untyped_table_in_ones_own_namespace_is_a_user_table(db: Database, role: Role) -> None:
    db.execute("CREATE NAMESPACE ann")
    db.execute("CREATE TABLE ann.notes (id INT PRIMARY KEY)", user="ann", role=role)
    assert rows(db, "SELECT table_type FROM system.tables WHERE table_name = 'notes'") == [("user",)]


def test_an_admin_in_a_namespace_of_that_name_makes_a_shared_table(db: Database) -> None:
    db.execute("CREATE NAMESPACE ann")
    db.execute("CREATE TABLE ann.notes (id INT PRIMARY KEY)", user="ann", role="dba")
    assert rows(db, "SELECT table_type FROM system.tables WHERE table_name = 'notes'") == [("shared",)]


def test_no_role_sees_rows_of_another_user(world: Database) -> None:
    for role in (Role.USER, Role.SERVICE, Role.DBA, Role.SYSTEM):
        assert rows(world, "SELECT * FROM app.own", user="ann", role=role) == []
        assert world.execute("UPDATE app.own SET v = 9 WHERE true", user="ann", role=role).row_count == 0
        assert world.execute("DELETE FROM app.own WHERE true", user="ann", role=role).row_count == 0
    assert rows(world, "SELECT * FROM app.own") == [(1, 1)]


def test_a_view_gives_no_rights(world: Database) -> None:
    world.execute("CREATE VIEW app.peek AS SELECT * FROM app.dba_t; CREATE VIEW app.jobs AS SELECT * FROM system.jobs")
    for view in ("peek", "jobs"):
        with pytest.raises(kalamdb.Denied):
            world.execute(f"SELECT * FROM app.{view}", role="service")
        world.execute(f"SELECT * FROM app.{view}", role="dba")


def test_the_role_anonymous_has_no_rights(world: Database) -> None:
    for statement in ("SELECT 1", "SELECT * FROM app.public_t", "SHOW TABLES", "USE app", "BEGIN; COMMIT"):
        with pytest.raises(kalamdb.Denied, match="the caller has anonymous"):
            world.execute(statement, user="ann", role="anonymous")
    with pytest.raises(kalamdb.Denied):
        world.insert("app.own", [(5, 5)], user="ann", role="anonymous")


@pytest.mark.parametrize(
    "refused",
    [
        "SELECT * FROM system.users", "SELECT * FROM app.dba_t", "UPDATE app.public_t SET v = 1 WHERE id = 1",
        "INSERT INTO app.private_t VALUES (9, 9)", "USE system; SELECT * FROM users", "USE app; SELECT * FROM dba_t",
        "EXECUTE AS USER a_dba (SELECT 1)", "DELETE FROM app.own WHERE id IN (SELECT id FROM app.dba_t)",
        "INSERT INTO app.own SELECT * FROM app.private_t", "SELECT * FROM app.peek",
    ],
)  # fmt: skip
def test_nothing_of_a_text_runs_when_one_statement_is_forbidden(world: Database, refused: str) -> None:
    world.execute("CREATE VIEW app.peek AS SELECT * FROM app.dba_t")
    with pytest.raises(kalamdb.Denied):
        world.execute(f"INSERT INTO app.own VALUES (50, 50); {refused}", user="ann", role="user")
    assert rows(world, "SELECT * FROM app.own", user="ann") == []


def test_unknown_roles_and_users_are_refused(db: Database) -> None:
    with pytest.raises(kalamdb.InvalidRequest, match="user, service, dba, system"):
        db.execute("SELECT 1", role="king")
    for user in ("", "x" * 129):
        with pytest.raises(kalamdb.InvalidRequest, match="is not a name"):
            db.execute("SELECT 1", user=user)
