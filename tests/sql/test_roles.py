"""What each role may do with the statements of tables and the system (surface reference 5.2)."""

from __future__ import annotations

import pytest

import kalamdb
from kalamdb.database import Database
from kalamdb.types import Role
from tests.sql.conftest import rows

LEVELS = ("public", "private", "restricted", "dba")


@pytest.fixture
def world(db: Database) -> Database:
    """A table of each access level, a user table, a stream, all with one row of root."""
    for level in LEVELS:
        db.execute(f"CREATE TABLE app.{level}_t (id INT PRIMARY KEY, v INT) WITH (ACCESS_LEVEL = '{level}')")
        db.execute(f"INSERT INTO app.{level}_t VALUES (1, 1)")
    db.execute("CREATE USER TABLE app.own (id INT PRIMARY KEY, v INT); INSERT INTO app.own VALUES (1, 1)")
    db.execute("CREATE STREAM TABLE app.st (x INT) WITH (TTL_SECONDS = 60)")
    return db


def allowed(db: Database, sql: str, role: Role) -> bool:
    """Whether a role may run a statement; any other refusal than Denied is a mistake of the test."""
    try:
        db.execute(sql, user="ann", role=role)
    except kalamdb.Denied:
        return False
    return True


MATRIX: list[tuple[str, str]] = [
    # statement, roles that may run it
    ("SELECT * FROM app.public_t", "user service dba system"),
    ("SELECT * FROM app.private_t", "service dba system"),
    ("SELECT * FROM app.restricted_t", "service dba system"),
    ("SELECT * FROM app.dba_t", "dba system"),
    ("SELECT v FROM app.private_t WHERE id = 1", "service dba system"),
    ("SELECT count(*) FROM app.public_t WHERE id IN (SELECT id FROM app.dba_t)", "dba system"),
    ("WITH q AS (SELECT * FROM app.private_t) SELECT * FROM q", "service dba system"),
    ("INSERT INTO app.public_t VALUES (2, 2) ON CONFLICT DO NOTHING", "service dba system"),
    ("UPDATE app.public_t SET v = 2 WHERE id = 1", "service dba system"),
    ("DELETE FROM app.private_t WHERE id = 99", "service dba system"),
    ("UPDATE app.dba_t SET v = 2 WHERE v > 0", "dba system"),
    ("INSERT INTO app.own SELECT id + 100, v FROM app.dba_t WHERE false", "dba system"),
    ("INSERT INTO app.own VALUES (7, 7) ON CONFLICT DO NOTHING", "user service dba system"),
    ("UPDATE app.own SET v = 3 WHERE id = 1", "user service dba system"),
    ("DELETE FROM app.own WHERE v IN (SELECT v FROM app.private_t)", "service dba system"),
    ("INSERT INTO app.st VALUES (1)", "user service dba system"),
    ("DELETE FROM app.st WHERE x = 1", "user service dba system"),
    ("CREATE USER TABLE IF NOT EXISTS app.n1 (id INT PRIMARY KEY)", "user service dba system"),
    ("CREATE STREAM TABLE IF NOT EXISTS app.n2 (x INT) WITH (TTL_SECONDS = 5)", "user service dba system"),
    ("CREATE TABLE IF NOT EXISTS app.n3 (id INT PRIMARY KEY)", "service dba system"),
    ("ALTER TABLE app.own ALTER COLUMN v DROP DEFAULT", "user service dba system"),
    ("ALTER TABLE app.public_t ALTER COLUMN v DROP DEFAULT", "service dba system"),
    ("ALTER TABLE app.private_t SET ACCESS LEVEL private", "service dba system"),
    ("DROP TABLE IF EXISTS app.nope", "dba system"),
    ("TRUNCATE TABLE app.own", "dba system"),
    ("CREATE OR REPLACE VIEW app.v AS SELECT 1", "dba system"),
    ("DROP VIEW IF EXISTS app.v", "dba system"),
    ("CREATE NAMESPACE IF NOT EXISTS n", "dba system"),
    ("ALTER NAMESPACE app SET OPTIONS (a = 1)", "dba system"),
    ("DROP NAMESPACE IF EXISTS n", "dba system"),
    ("USE app", "user service dba system"),
    ("SHOW NAMESPACES", "user service dba system"),
    ("SHOW TABLES IN app", "user service dba system"),
    ("DESCRIBE TABLE app.public_t", "user service dba system"),
    ("DESCRIBE TABLE app.public_t HISTORY", "user service dba system"),
    ("DESCRIBE app.public_t", "dba system"),
    ("SHOW COLUMNS FROM app.public_t", "dba system"),
    ("SHOW STATS FOR TABLE app.own", "user service dba system"),
    ("SHOW STATS FOR TABLE app.dba_t", "dba system"),
    ("SHOW ALL", "dba system"),
    ("EXPLAIN SELECT * FROM app.own", "dba system"),
    ("EXPLAIN ANALYZE SELECT 1", "dba system"),
    ("SHOW MANIFEST", "service dba system"),
    ("STORAGE FLUSH TABLE app.own", "service dba system"),
    ("STORAGE FLUSH ALL IN app", "service dba system"),
    ("STORAGE COMPACT TABLE app.own", "service dba system"),
    ("SHOW JOBS", "dba system"),
    ("SELECT * FROM system.tables", "dba system"),
    ("SELECT count(*) FROM app.public_t WHERE id IN (SELECT 1 FROM system.jobs)", "dba system"),
    ("SELECT (SELECT count(*) FROM system.settings)", "dba system"),
    ("SELECT * FROM information_schema.tables", "user service dba system"),
    ("SELECT 1; DROP TABLE IF EXISTS app.nope", "dba system"),
]


@pytest.mark.parametrize(("statement", "roles"), MATRIX)
def test_a_statement_is_for_certain_roles(world: Database, statement: str, roles: str) -> None:
    for role in Role:
        assert allowed(world, statement, role) == (role.value in roles.split()), f"{role}: {statement}"


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
    for role in Role:
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


def test_unknown_roles_and_users_are_refused(db: Database) -> None:
    with pytest.raises(kalamdb.InvalidRequest, match="user, service, dba, system"):
        db.execute("SELECT 1", role="king")
    for user in ("", "x" * 129):
        with pytest.raises(kalamdb.InvalidRequest, match="is not a name"):
            db.execute("SELECT 1", user=user)
