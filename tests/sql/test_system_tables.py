"""`system.*` and `information_schema.*` (surface reference 4.1 to 4.3)."""

from __future__ import annotations

import datetime as dt

import pytest

from kalamdb.database import Database
from tests.sql.conftest import flush, refused, rows

COLUMNS = {
    "system.namespaces": "namespace_id name created_at options table_count",
    "system.schemas": "table_id table_name namespace_id table_type created_at schema_version columns table_comment "
    "updated_at options access_level is_latest storage_id use_user_storage",
    "system.tables": "namespace_id table_name table_type storage_id version options comment updated_at created_at",
    "system.columns": "namespace_id table_name version column_id column_name comment data_type default_value ordinal "
    "nullable primary_key primary_key_pos",
    "system.describe": "column_name ordinal_position column_id data_type is_nullable is_primary_key column_default "
    "column_comment schema_version",
    "system.storages": "storage_id storage_name description storage_type base_directory credentials config_json "
    "shared_tables_template user_tables_template created_at updated_at",
    "system.manifest": "cache_key namespace_id table_name scope etag last_refreshed last_accessed in_memory sync_state "
    "manifest_json",
    "system.settings": "name value description category",
    "system.stats": "metric_name metric_value",
    "system.datatypes": "arrow_type kalam_type sql_name description",
    "system.transactions": "transaction_id owner_id origin state age_ms idle_ms write_count write_bytes "
    "touched_tables_count snapshot_commit_seq",
    "system.jobs": "job_id job_type status leader_status parameters message exception_trace idempotency_key queue "
    "priority retry_count max_retries memory_used cpu_used created_at updated_at started_at finished_at node_id "
    "leader_node_id",
    "information_schema.tables": "table_catalog table_schema table_name table_type",
    "information_schema.columns": "table_catalog table_schema table_name column_name ordinal_position column_default "
    "is_nullable data_type",
    "information_schema.schemata": "catalog_name schema_name",
    "information_schema.views": "table_catalog table_schema table_name definition",
    "information_schema.routines": "specific_catalog specific_schema specific_name",
    "information_schema.parameters": "specific_catalog specific_schema specific_name ordinal_position",
    "information_schema.df_settings": "name value description",
}


@pytest.fixture
def world(db: Database) -> Database:
    db.execute(
        "CREATE TABLE app.t (id INT PRIMARY KEY, v TEXT DEFAULT 'x' COMMENT 'note') WITH (FLUSH_POLICY = 'rows:9')"
    )
    db.execute("CREATE USER TABLE app.u (a TEXT, b INT, PRIMARY KEY (b, a)); ALTER TABLE app.u ADD COLUMN c DOUBLE")
    db.execute("CREATE STREAM TABLE app.s (x INT) WITH (TTL_SECONDS = 60); CREATE VIEW app.v AS SELECT id FROM app.t")
    return db


def test_every_system_table_has_the_columns_of_the_reference(world: Database) -> None:
    for table, columns in COLUMNS.items():
        wanted = columns.split()
        assert world.execute(f"SELECT * FROM {table} LIMIT 3").columns[: len(wanted)] == wanted, table
        described = [row[0] for row in rows(world, f"DESCRIBE TABLE {table}")]
        assert described[: len(wanted)] == wanted


def test_tables_and_their_versions_are_listed(world: Database) -> None:
    found = rows(world, "SELECT table_name, table_type, version FROM system.tables WHERE namespace_id = 'app'")
    assert sorted(found) == [("s", "stream", 1), ("t", "shared", 1), ("u", "user", 2)]
    versions = "SELECT table_id, schema_version, is_latest FROM system.schemas WHERE table_name = 'u' ORDER BY 2"
    assert rows(world, versions) == [("app:u", 1, False), ("app:u", 2, True)]
    (options,) = rows(world, "SELECT options FROM system.schemas WHERE table_name = 's'")[0]
    assert options["table_type"] == "STREAM" and options["ttl_seconds"] == 60
    (policy,) = rows(world, "SELECT options FROM system.schemas WHERE table_name = 't'")[0]
    assert policy["flush_policy"] == {"type": "row_limit", "row_limit": 9} and policy["access_level"] == "private"


def test_columns_are_listed_with_their_place_in_the_key(world: Database) -> None:
    found = rows(
        world,
        "SELECT column_name, data_type, default_value, ordinal, nullable, primary_key, primary_key_pos, comment "
        "FROM system.columns WHERE namespace_id = 'app' AND table_name IN ('t', 'u') ORDER BY table_name, ordinal",
    )
    assert found == [
        ("id", "INT", None, 1, False, True, 1, None),
        ("v", "TEXT", "'x'", 2, True, False, None, "note"),
        ("a", "TEXT", None, 1, False, True, 2, None),
        ("b", "INT", None, 2, False, True, 1, None),
        ("c", "DOUBLE", None, 3, True, False, None, None),
    ]


def test_the_manifest_follows_the_tiers_and_shows_no_values_of_users(world: Database) -> None:
    world.execute("INSERT INTO app.t VALUES (1, 'shared'); INSERT INTO app.u VALUES ('secret', 1, 1.5)")
    state = "SELECT table_name, scope, sync_state FROM system.manifest ORDER BY table_name"
    assert rows(world, state) == [("t", "shared", "pending_write"), ("u", "all", "pending_write")]
    flush(world, "app.t")
    flush(world, "app.u")
    assert [row[2] for row in rows(world, state)] == ["in_sync", "in_sync"]
    manifests = dict(rows(world, "SELECT cache_key, manifest_json FROM system.manifest"))
    [segment] = manifests["app:t:shared"]["segments"]
    assert segment["row_count"] == 1 and segment["size_bytes"] > 0 and segment["path"].endswith(".parquet")
    assert "secret" not in str(manifests["app:u:all"])
    assert rows(world, "SELECT count(*) FROM system.manifest_cache") == [(2,)]
    assert rows(world, "SHOW MANIFEST")[0][0] == rows(world, "SHOW MANIFEST CACHE")[0][0] == "app:t:shared"


def test_settings_and_figures_are_shown(world: Database) -> None:
    assert rows(world, "SELECT value FROM system.settings WHERE name = 'jobs.max_concurrent'") == [("10",)]
    assert len(rows(world, "SHOW ALL")) == len(rows(world, "SELECT * FROM system.settings"))
    stats = dict(rows(world, "SELECT * FROM system.stats"))
    assert stats["total_tables"] == "3" and stats["total_namespaces"] == "2" and stats["open_transactions"] == "0"
    assert {"server_version", "server_uptime_seconds", "jobs_running", "jobs_failed", "hot_bytes"} <= set(stats)


def test_storages_and_types_are_shown(world: Database) -> None:
    [local] = rows(world, "SELECT storage_id, storage_type, user_tables_template FROM system.storages")
    assert local == ("local", "filesystem", "{namespace}/{tableName}/{userId}")
    types = dict(rows(world, "SELECT sql_name, kalam_type FROM system.datatypes"))
    assert types["BIGINT"] == "BigInt" and types["DATETIME"] == "DateTime" and "EMBEDDING(n)" in types


def test_the_standard_schema_lists_tables_views_and_the_engine(world: Database) -> None:
    tables = dict(
        rows(world, "SELECT table_name, table_type FROM information_schema.tables WHERE table_schema = 'app'")
    )
    assert tables == {"t": "BASE TABLE", "u": "BASE TABLE", "s": "BASE TABLE", "v": "VIEW"}
    columns = rows(
        world,
        "SELECT column_name, is_nullable, data_type, column_default FROM information_schema.columns "
        "WHERE table_schema = 'app' AND table_name = 't' ORDER BY ordinal_position",
    )
    assert columns == [("id", "NO", "INT", None), ("v", "YES", "TEXT", "'x'")]
    assert rows(world, "SELECT definition FROM information_schema.views") == [("SELECT id FROM app.t",)]
    schemas = {row[0] for row in rows(world, "SELECT schema_name FROM information_schema.schemata")}
    assert {"app", "default", "system", "information_schema"} <= schemas
    known = (
        "SELECT DISTINCT routine_name FROM information_schema.routines WHERE routine_name IN ('abs', 'json_get_int')"
    )
    assert len(rows(world, known)) == 2
    assert rows(world, "SELECT count(*) > 0 FROM information_schema.tables WHERE table_schema = 'system'") == [(True,)]


def test_system_tables_join_and_aggregate_like_others(world: Database) -> None:
    found = rows(
        world,
        "SELECT t.table_name, count(*) FROM system.tables t JOIN system.columns c USING (namespace_id, table_name) "
        "WHERE t.namespace_id = 'app' GROUP BY t.table_name ORDER BY 1",
    )
    assert found == [("s", 1), ("t", 2), ("u", 3)]
    [(created,)] = rows(world, "SELECT created_at FROM system.tables WHERE table_name = 't'")
    assert isinstance(created, dt.datetime) and created.tzinfo is None


def test_older_names_are_understood_and_unknown_ones_are_not(world: Database) -> None:
    assert rows(world, "SELECT count(*) FROM system.system_jobs") == [(0,)]
    assert refused(world, "SELECT * FROM system.nope") == "Table 'system.nope' does not exist"
