"""Namespaces and USE (surface reference 3.1)."""

from __future__ import annotations

import pytest

import kalamdb
from kalamdb.database import Database
from tests.sql.conftest import refused, rows

RESERVED = (
    "system sys root kalamdb kalam main default sql admin internal information_schema pg_catalog datafusion".split()
)


def test_a_namespace_is_made_once_and_if_not_exists_keeps_it(db: Database) -> None:
    assert db.execute("CREATE NAMESPACE shop").message == "Namespace 'shop' created successfully"
    assert db.execute("CREATE NAMESPACE IF NOT EXISTS shop").message == "Namespace 'shop' already exists"
    with pytest.raises(kalamdb.Conflict, match="Namespace 'shop' already exists"):
        db.execute("CREATE NAMESPACE shop")


@pytest.mark.parametrize("name", [*(f'"{one}"' for one in RESERVED), '"select"', "_x", '"1x"', '"a-b"', "n" * 65])
def test_names_that_are_reserved_or_malformed_are_refused(db: Database, name: str) -> None:
    before = rows(db, "SHOW NAMESPACES")
    refused(db, f"CREATE NAMESPACE {name}")
    assert rows(db, "SHOW NAMESPACES") == before


def test_the_longest_name_is_allowed(db: Database) -> None:
    name = "n" * 64
    db.execute(f"CREATE NAMESPACE {name}")
    assert name in [row[0] for row in rows(db, "SHOW NAMESPACES")]


def test_options_are_merged_and_shown(db: Database) -> None:
    db.execute("ALTER NAMESPACE app SET OPTIONS (owner = 'ann', level = 3)")
    assert db.execute("ALTER NAMESPACE app SET OPTIONS (level = 4)").message == "Namespace 'app' altered successfully"
    found = rows(db, "SELECT options FROM system.namespaces WHERE namespace_id = 'app'")
    assert found == [({"owner": "ann", "level": 4},)]
    assert refused(db, "ALTER NAMESPACE nope SET OPTIONS (a = 1)") == "Namespace 'nope' does not exist"
    refused(db, "ALTER NAMESPACE app SET DESCRIPTION 'x'")


@pytest.mark.parametrize("tail", ["", " CASCADE"])
def test_drop_takes_tables_and_views_along(db: Database, tail: str) -> None:
    db.execute("CREATE TABLE app.t (id INT PRIMARY KEY); CREATE VIEW app.v AS SELECT id FROM app.t")
    message = db.execute(f"DROP NAMESPACE app{tail}").message or ""
    assert message.startswith("Namespace 'app' dropped successfully") and "CL-" in message
    assert refused(db, "SELECT * FROM app.t") == "Table 'app.t' does not exist"
    assert refused(db, "DROP NAMESPACE app") == "Namespace 'app' does not exist"
    assert db.execute("DROP NAMESPACE IF EXISTS app").message == "Namespace 'app' does not exist"
    db.execute("CREATE NAMESPACE app; CREATE TABLE app.t (id INT PRIMARY KEY)")
    assert rows(db, "SELECT * FROM app.t") == [] and refused(db, "SELECT * FROM app.v")


@pytest.mark.parametrize("name", ["default", "system", "information_schema"])
def test_namespaces_of_the_system_stay(db: Database, name: str) -> None:
    assert "cannot be dropped" in refused(db, f'DROP NAMESPACE "{name}"')


@pytest.mark.parametrize("use", ["USE app", "USE NAMESPACE app", "SET NAMESPACE app"])
def test_use_holds_for_the_rest_of_the_text_alone(db: Database, use: str) -> None:
    db.execute("CREATE TABLE app.t (id INT PRIMARY KEY)")
    results = db.execute(f"{use}; INSERT INTO t VALUES (1); SELECT * FROM t").results
    assert [one.message for one in results[:2]] == ["Namespace 'app' selected", "Inserted 1 row(s)"]
    assert results[2].rows == [(1,)]
    assert refused(db, "SELECT * FROM t") == "Table 'default.t' does not exist"
    assert rows(db, "SELECT * FROM t", namespace="app") == [(1,)]


def test_use_of_an_unknown_namespace_is_refused(db: Database) -> None:
    assert refused(db, "USE nope") == "Namespace 'nope' does not exist"


def test_show_namespaces_counts_tables(db: Database) -> None:
    db.execute("CREATE TABLE app.a (id INT PRIMARY KEY); CREATE TABLE app.b (id INT PRIMARY KEY)")
    found = db.execute("SHOW NAMESPACES")
    assert found.columns == ["namespace_id", "name", "created_at", "options", "table_count"]
    assert {row[0]: row[4] for row in found}["app"] == 2
    assert {"app", "default", "system"} <= {row[0] for row in found}
