"""CREATE TABLE, DROP, TRUNCATE, DESCRIBE, SHOW and views (surface reference 3.2 and 3.3)."""

from __future__ import annotations

from decimal import Decimal

import pytest

import kalamdb
from kalamdb.database import Database
from tests.sql.conftest import flush, refused, rows


def kind_of(db: Database, table: str) -> str:
    return str(db.execute("SELECT table_type FROM system.tables WHERE table_name = $1", [table]).scalar())


@pytest.mark.parametrize(
    ("statement", "kind"),
    [
        ("CREATE TABLE app.t (id INT PRIMARY KEY)", "shared"),
        ("CREATE USER TABLE app.t (id INT PRIMARY KEY)", "user"),
        ("CREATE SHARED TABLE app.t (id INT, PRIMARY KEY (id))", "shared"),
        ("CREATE TABLE app.t (id INT PRIMARY KEY) WITH (TYPE = 'USER')", "user"),
        ("CREATE USER TABLE app.t (id INT PRIMARY KEY) WITH (TYPE = 'user')", "user"),
        ("CREATE STREAM TABLE app.t (id INT) WITH (TTL_SECONDS = 5)", "stream"),
        ("CREATE TABLE app.t (id INT) WITH (TYPE = 'STREAM', TTL_SECONDS = 5)", "stream"),
        ("create user table if not exists app.t (id int primary key not null)", "user"),
        ("CREATE TABLE app.t (id INT PRIMARY KEY) USING rocksdb", "shared"),
    ],
)
def test_the_kind_of_a_table_comes_from_its_prefix_or_type(db: Database, statement: str, kind: str) -> None:
    assert db.execute(statement).message == "Table app.t created successfully"
    assert kind_of(db, "t") == kind


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("CREATE USER TABLE app.b (id INT PRIMARY KEY) WITH (TYPE = 'SHARED')", "state one of them"),
        ("CREATE TABLE app.b (id INT PRIMARY KEY) WITH (TYPE = 'x')", "not one of 'USER', 'SHARED', 'STREAM'"),
        ("CREATE TABLE nope.t (id INT PRIMARY KEY)", "Create it first with CREATE NAMESPACE nope"),
        ("CREATE TABLE app.b (id INT)", "needs a PRIMARY KEY"),
        ("CREATE TABLE app.b (id INT PRIMARY KEY, x INT PRIMARY KEY)", "PRIMARY KEY (id, x)"),
        ("CREATE TABLE app.b (id INT PRIMARY KEY, PRIMARY KEY (id))", "PRIMARY KEY twice"),
        ("CREATE TABLE app.b (id INT, PRIMARY KEY (nope))", "does not have"),
        ("CREATE TABLE app.b (id INT, PRIMARY KEY (id, id))", "names a column twice"),
        ("CREATE TABLE app.b (id JSON PRIMARY KEY)", "cannot be part of the PRIMARY KEY"),
        ("CREATE TABLE app.b (id INT PRIMARY KEY, id TEXT)", "'id' stands twice"),
        ("CREATE TABLE app.b (id INT PRIMARY KEY) WITH (COLOUR = 'red')", "unknown table option COLOUR"),
        ("CREATE TABLE app.b (id INT PRIMARY KEY) WITH (STORAGE = 'x')", "did you mean STORAGE_ID?"),
        ("CREATE TABLE app.b (id INT PRIMARY KEY) WITH (STORAGE_ID = 'x')", "Storage 'x' does not exist"),
        ("CREATE TABLE app.b (id INT PRIMARY KEY) WITH (TTL_SECONDS = 5)", "belongs to STREAM tables"),
        ("CREATE STREAM TABLE app.b (id INT)", "needs WITH (TTL_SECONDS"),
        ("CREATE STREAM TABLE app.b (id INT) WITH (TTL_SECONDS = 0)", "TTL_SECONDS"),
        ("CREATE STREAM TABLE app.b (id INT) WITH (TTL_SECONDS = 5, FLUSH_POLICY = 'rows:5')", "FLUSH_POLICY"),
        ("CREATE USER TABLE app.b (id INT PRIMARY KEY) WITH (ACCESS_LEVEL = 'public')", "belongs to SHARED tables"),
        ("CREATE TABLE app.b (id INT PRIMARY KEY) WITH (ACCESS_LEVEL = 'open')", "PUBLIC, PRIVATE, RESTRICTED, DBA"),
        ("CREATE TABLE app.b (id INT PRIMARY KEY) WITH (USE_USER_STORAGE = true)", "belongs to USER tables"),
        ("CREATE TABLE app.b (id INT PRIMARY KEY) WITH (FLUSH_POLICY = 'rows:0')", "0 < N < 1000000"),
        ("CREATE TABLE app.b (id INT PRIMARY KEY) WITH (FLUSH_POLICY = 'interval:86400')", "0 < S < 86400"),
        ("CREATE TABLE app.b (id INT PRIMARY KEY) WITH (FLUSH_POLICY = 'often')", "FLUSH_POLICY 'often'"),
        ("CREATE TABLE app.b (id INT PRIMARY KEY, CHECK (nope > 1))", "nope"),
        ("CREATE TABLE app.b (id INT PRIMARY KEY, CHECK (id + 1))", "is not a condition"),
        ("CREATE TABLE app.b (id WIBBLE PRIMARY KEY)", "'WIBBLE' is not a data type"),
        ("CREATE TABLE app.b (id BIGNIT PRIMARY KEY)", "did you mean BIGINT?"),
        ("CREATE TABLE app.b ()", "a column name"),
        ("CREATE TABLE app.b (id INT PRIMARY KEY", "ends where"),
        ("CREATE TABLE system.b (id INT PRIMARY KEY)", "namespace 'system'"),
        ("CREATE TABLE app._b (id INT PRIMARY KEY)", "must begin with a letter"),
    ],
)  # fmt: skip
def test_a_malformed_table_is_refused_and_leaves_nothing(db: Database, statement: str, message: str) -> None:
    assert message in refused(db, statement)
    assert rows(db, "SHOW TABLES IN app") == [] and rows(db, "SHOW JOBS") == []


RESERVED = "_seq _deleted _commit_seq _id _row_id _rowid _key _updated _created _timestamp _version _hash _x".split()


@pytest.mark.parametrize("name", RESERVED)
def test_column_names_with_an_underscore_in_front_are_reserved(db: Database, name: str) -> None:
    assert f"column name '{name}' is reserved" in refused(db, f"CREATE TABLE app.t (id INT PRIMARY KEY, {name} INT)")


def test_an_existing_table_is_kept(db: Database) -> None:
    db.execute("CREATE TABLE app.t (id INT PRIMARY KEY)")
    with pytest.raises(kalamdb.Conflict, match="already exists"):
        db.execute("CREATE TABLE app.t (id INT PRIMARY KEY)")
    message = db.execute("CREATE TABLE IF NOT EXISTS app.t (other TEXT PRIMARY KEY)").message
    assert message == "Table app.t already exists"
    assert db.execute("SELECT * FROM app.t").columns == ["id"]


def test_options_are_kept_and_shown(db: Database) -> None:
    db.execute(
        "CREATE TABLE app.t (id INT PRIMARY KEY) WITH (TYPE = 'USER', STORAGE_ID = 'local', USE_USER_STORAGE = true, "
        "FLUSH_POLICY = 'rows:5,interval:30', DELETED_RETENTION_HOURS = 3)"
    )
    (options,) = rows(db, "SELECT options FROM system.schemas WHERE table_name = 't'")[0]
    assert options == {
        "table_type": "USER", "storage_id": "local", "use_user_storage": True, "compression": "zstd",
        "flush_policy": {"type": "combined", "row_limit": 5, "interval_seconds": 30}, "deleted_retention_hours": 3,
    }  # fmt: skip


def test_ignored_clauses_are_accepted(db: Database) -> None:
    db.execute("CREATE TABLE app.a (id INT PRIMARY KEY)")
    db.execute(
        "CREATE TABLE app.t (id INT PRIMARY KEY, a INT UNIQUE REFERENCES app.a (id), b TEXT NULL COMMENT 'note', "
        "UNIQUE (a, b), FOREIGN KEY (a) REFERENCES app.a (id))"
    )
    assert [row[7] for row in rows(db, "DESCRIBE TABLE app.t")] == [None, None, "note"]


@pytest.mark.parametrize(
    "column",
    ["id BIGINT AUTO_INCREMENT PRIMARY KEY", "id SERIAL PRIMARY KEY", "id BIGSERIAL PRIMARY KEY",
     "id INT IDENTITY PRIMARY KEY", "id BIGINT PRIMARY KEY DEFAULT SNOWFLAKE_ID()"],
)  # fmt: skip
def test_generated_keys_rise(db: Database, column: str) -> None:
    db.execute(f"CREATE TABLE app.t ({column}, v TEXT)")
    given = rows(db, "INSERT INTO app.t (v) VALUES ('a'), ('b') RETURNING id")
    given += rows(db, "INSERT INTO app.t (v) VALUES ('c') RETURNING id")
    assert sorted(set(given)) == given and len(given) == 3
    assert rows(db, "SELECT v FROM app.t ORDER BY id") == [("a",), ("b",), ("c",)]


def test_auto_increment_needs_an_integer(db: Database) -> None:
    assert "needs an integer type" in refused(db, "CREATE TABLE app.t (id TEXT AUTO_INCREMENT PRIMARY KEY)")


def test_a_composite_key_is_unique_as_a_whole(db: Database) -> None:
    db.execute("CREATE TABLE app.t (a TEXT, b INT, v TEXT, PRIMARY KEY (a, b))")
    db.execute("INSERT INTO app.t VALUES ('x', 1, 'p'), ('x', 2, 'q'), ('y', 1, 'r')")
    assert "value 'x, 2' already exists in column 'a, b'" in refused(db, "INSERT INTO app.t VALUES ('x', 2, 'z')")
    for move in (None, flush):
        if move is not None:
            move(db, "app.t")
        assert rows(db, "SELECT v FROM app.t WHERE b = 2 AND a = 'x'") == [("q",)]
        assert rows(db, "SELECT v FROM app.t WHERE a = 'x' ORDER BY b") == [("p",), ("q",)]
    assert db.execute("UPDATE app.t SET v = 'new' WHERE a = 'x' AND b = 1").row_count == 1
    assert db.execute("DELETE FROM app.t WHERE a = 'y' AND b = 1").row_count == 1
    assert rows(db, "SELECT * FROM app.t ORDER BY b") == [("x", 1, "new"), ("x", 2, "q")]
    assert "cannot be NULL" in refused(db, "INSERT INTO app.t VALUES ('x', NULL, 'z')")


def test_checks_hold_for_every_way_to_write(db: Database) -> None:
    db.execute(
        "CREATE TABLE app.t (id INT PRIMARY KEY, low INT CHECK (low >= 0), high INT, "
        "CONSTRAINT ordered CHECK (low < high))"
    )
    db.execute("INSERT INTO app.t VALUES (1, 1, 5), (2, NULL, NULL)")
    for bad in (
        "INSERT INTO app.t VALUES (3, 1, 2), (4, -1, 5)",
        "INSERT INTO app.t VALUES (3, 7, 5)",
        "INSERT INTO app.t SELECT 3, 9, 5",
        "UPDATE app.t SET low = 9 WHERE id = 1",
        "UPDATE app.t SET low = low + 9 WHERE low > 0",
        "INSERT INTO app.t VALUES (1, 1, 2) ON CONFLICT (id) DO UPDATE SET high = 0",
    ):
        assert "is violated by the row with primary key" in refused(db, bad)
    with pytest.raises(kalamdb.InvalidRequest, match="'ordered'"):
        db.insert("app.t", [{"id": 9, "low": 5, "high": 4}])
    assert rows(db, "SELECT * FROM app.t ORDER BY id") == [(1, 1, 5), (2, None, None)]
    assert "CHECK" in refused(db, "ALTER TABLE app.t DROP COLUMN low")
    assert "CHECK" in refused(db, "ALTER TABLE app.t RENAME COLUMN high TO top")


def test_quoted_names_keep_their_case(db: Database) -> None:
    db.execute('CREATE TABLE app."Orders" ("Id" INT PRIMARY KEY, "Price" DECIMAL(6, 2))')
    db.execute('INSERT INTO app."Orders" ("Id", "Price") VALUES (1, 2.5)')
    assert rows(db, 'SELECT "Price" FROM app."Orders" WHERE "Id" = 1') == [(Decimal("2.50"),)]
    assert rows(db, 'SELECT o."Price" FROM app."Orders" AS o WHERE o."Id" > 0') == [(Decimal("2.50"),)]
    assert refused(db, "SELECT * FROM app.orders") == "Table 'app.orders' does not exist"


# DROP and TRUNCATE


def test_drop_names_its_cleanup_job_and_if_exists_forgives(db: Database) -> None:
    db.execute("CREATE TABLE app.t (id INT PRIMARY KEY)")
    message = db.execute("DROP TABLE app.t").message or ""
    assert message.startswith("Table app.t dropped successfully. Cleanup job: CL-")
    assert db.jobs.wait(message.rsplit(" ", 1)[1], 20).status == "completed"
    assert refused(db, "DROP TABLE app.t") == "Table 'app.t' does not exist"
    assert db.execute("DROP TABLE IF EXISTS app.t").message == "Table app.t does not exist"
    assert rows(db, "SELECT * FROM system.schemas WHERE table_name = 't'") == []


def test_drop_with_another_kind_is_refused(db: Database) -> None:
    db.execute("CREATE TABLE app.t (id INT PRIMARY KEY)")
    assert "is a SHARED table, not a USER table" in refused(db, "DROP USER TABLE app.t")
    db.execute("DROP SHARED TABLE app.t")


def test_a_table_of_the_same_name_begins_empty(db: Database) -> None:
    for number in range(3):
        db.execute("CREATE TABLE app.t (id INT PRIMARY KEY, v TEXT)")
        assert rows(db, "SELECT * FROM app.t") == []
        db.execute("INSERT INTO app.t VALUES ($1, 'x')", [number])
        if number:
            flush(db, "app.t")
        db.execute("DROP TABLE app.t")
    db.execute("CREATE TABLE app.t (name TEXT PRIMARY KEY)")
    assert rows(db, "SELECT * FROM app.t") == []


def test_truncate_empties_both_tiers_and_keeps_the_table(db: Database) -> None:
    db.execute("CREATE USER TABLE app.t (id INT PRIMARY KEY, v TEXT DEFAULT 'd')")
    db.execute("INSERT INTO app.t (id) VALUES (1)", user="ann")
    flush(db, "app.t")
    db.execute("INSERT INTO app.t (id) VALUES (2)", user="bob")
    assert "Cleanup job: CL-" in (db.execute("TRUNCATE TABLE app.t").message or "")
    assert rows(db, "SELECT * FROM app.t", user="ann") == rows(db, "SELECT * FROM app.t", user="bob") == []
    db.execute("INSERT INTO app.t (id) VALUES (1)", user="ann")
    flush(db, "app.t")
    assert rows(db, "SELECT * FROM app.t", user="ann") == [(1, "d")]


@pytest.mark.parametrize("verb", ["DROP TABLE {}", "TRUNCATE TABLE {}", "ALTER TABLE {} ADD COLUMN x INT"])
def test_system_tables_cannot_be_changed(db: Database, verb: str) -> None:
    word = verb.split()[0].lower()
    assert refused(db, verb.format("system.jobs")).startswith(f"Cannot {word} system table 'system.jobs'")


# Showing


def test_describe_shows_columns_and_history_shows_versions(db: Database) -> None:
    db.execute("CREATE TABLE app.t (id BIGINT AUTO_INCREMENT PRIMARY KEY, d DECIMAL(8, 2) NOT NULL DEFAULT 1.5)")
    found = db.execute("DESCRIBE TABLE app.t")
    assert found.columns == [
        "column_name", "ordinal_position", "column_id", "data_type", "is_nullable", "is_primary_key",
        "column_default", "column_comment", "schema_version",
    ]  # fmt: skip
    expected = [
        ("id", 1, 1, "BIGINT", False, True, "SNOWFLAKE_ID()", None, 1),
        ("d", 2, 2, "DECIMAL(8,2)", False, False, "1.5", None, 1),
    ]
    assert found.rows == expected == rows(db, "DESC TABLE app.t") == rows(db, "SHOW COLUMNS FROM app.t")
    db.execute("ALTER TABLE app.t ADD COLUMN x TEXT")
    history = db.execute("DESCRIBE TABLE app.t HISTORY").dicts()
    assert [(one["schema_version"], one["is_latest"]) for one in history] == [(1, False), (2, True)]
    assert [column["column_name"] for column in history[0]["columns"]] == ["id", "d", "_seq", "_deleted"]
    assert refused(db, "DESCRIBE TABLE app.nope") == "Table 'app.nope' does not exist"


def test_show_tables_lists_one_namespace(db: Database) -> None:
    db.execute("CREATE TABLE app.t (id INT PRIMARY KEY); CREATE NAMESPACE other")
    for statement in ("SHOW TABLES IN app", "SHOW TABLES IN NAMESPACE app"):
        found = db.execute(statement).dicts()
        assert [(one["table_id"], one["table_type"], one["is_latest"]) for one in found] == [("app:t", "shared", True)]
    assert rows(db, "SHOW TABLES IN other") == rows(db, "SHOW TABLES") == []
    assert db.execute("SHOW TABLES", namespace="app").row_count == 1
    assert refused(db, "SHOW TABLES IN nope") == "Namespace 'nope' does not exist"


def test_show_stats_counts_hot_and_cold_rows(db: Database) -> None:
    db.execute("CREATE USER TABLE app.t (id INT PRIMARY KEY)")
    db.execute("INSERT INTO app.t VALUES (1), (2)", user="ann")
    db.execute("INSERT INTO app.t VALUES (3)", user="bob")
    flush(db, "app.t")
    db.execute("DELETE FROM app.t WHERE id = 1", user="ann")
    stats = dict(rows(db, "SHOW STATS FOR TABLE app.t", user="ann"))
    assert (stats["rows"], stats["hot_rows"], stats["cold_rows"], stats["segments"]) == (1, 1, 3, 1)
    assert rows(db, "SHOW STATS FOR TABLE app.t", user="ann", role="user") == [("rows", 1)]


# Views


def test_a_view_reads_what_its_caller_may_read(db: Database) -> None:
    db.execute("CREATE USER TABLE app.t (id INT PRIMARY KEY, v TEXT)")
    message = db.execute("CREATE VIEW app.mine AS SELECT id, upper(v) AS name, CURRENT_USER AS who FROM t").message
    assert message == "View app.mine created successfully"
    for user in ("ann", "bob"):
        db.execute("INSERT INTO app.t VALUES (1, $1)", [user], user=user)
    assert rows(db, "SELECT * FROM app.mine", user="ann") == [(1, "ANN", "ann")]
    assert rows(db, "SELECT m.who FROM app.mine m JOIN app.t ON t.id = m.id", user="bob") == [("bob",)]
    described = rows(db, "DESCRIBE TABLE app.mine")
    assert [(row[0], row[3]) for row in described] == [("id", "INT"), ("name", "TEXT"), ("who", "TEXT")]


def test_a_view_reads_other_views_and_system_columns(db: Database) -> None:
    db.execute("CREATE TABLE app.t (id INT PRIMARY KEY); INSERT INTO app.t VALUES (1), (2)")
    db.execute("CREATE VIEW app.inner_view AS SELECT *, _seq AS version FROM app.t")
    db.execute("CREATE VIEW app.outer_view AS SELECT id FROM inner_view WHERE version > 0 AND id > 1")
    assert rows(db, "SELECT * FROM app.outer_view") == [(2,)]
    assert db.execute("SELECT * FROM app.inner_view").columns == ["id", "version"]
    assert rows(db, "SELECT t.*, i.version > 0 FROM app.t JOIN app.inner_view i ON i.id = t.id WHERE t.id = 1") == [
        (1, True)
    ]


def test_views_are_checked_when_they_are_made(db: Database) -> None:
    db.execute("CREATE TABLE app.t (id INT PRIMARY KEY); CREATE VIEW app.v AS SELECT id FROM app.t")
    for bad in (
        "CREATE VIEW app.w AS SELECT nope FROM app.t",
        "CREATE VIEW app.w AS SELECT * FROM app.nope",
        "CREATE VIEW app.w AS DELETE FROM app.t",
        "CREATE VIEW app.w AS SELECT * FROM app.w",
        "CREATE VIEW app.w AS SELECT $1",
        "CREATE VIEW app.v AS SELECT 1",
        "CREATE VIEW app.t AS SELECT 1",
        "CREATE TABLE app.v (id INT PRIMARY KEY)",
    ):
        refused(db, bad)
    db.execute("CREATE VIEW app.w AS SELECT * FROM app.v")
    assert "cannot read itself" in refused(db, "CREATE OR REPLACE VIEW app.v AS SELECT * FROM app.w")
    db.execute("CREATE OR REPLACE VIEW app.v AS SELECT id, id * 2 AS twice FROM app.t")
    assert db.execute("SELECT * FROM app.w").columns == ["id", "twice"]
    assert db.execute("DROP VIEW app.v").message == "View app.v dropped successfully"
    assert db.execute("DROP VIEW IF EXISTS app.v").message == "View app.v does not exist"
    refused(db, "DROP VIEW app.v")
    assert refused(db, "SELECT * FROM app.w") == "Table 'app.v' does not exist"


def test_a_table_that_does_not_say_how_long_keeps_deleted_rows_as_the_setting_says() -> None:
    with kalamdb.connect(":memory:", **{"retention.default_deleted_retention_hours": 5}) as db:
        db.execute("CREATE TABLE a (id INT PRIMARY KEY)")
        db.execute("CREATE TABLE b (id INT PRIMARY KEY) WITH (DELETED_RETENTION_HOURS = 7)")
        found = {one.definition.name: one.definition.options for one in db.context.catalog.tables()}
    assert (found["a"].deleted_retention_hours, found["b"].deleted_retention_hours) == (5, 7)
