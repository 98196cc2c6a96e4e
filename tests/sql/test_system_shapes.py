"""Each system table has the columns of the original, in order, with their types (surface reference 4.1 to 4.3)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import kalamdb
from kalamdb.database import Database
from tests.sql.conftest import rows

WANTED = {
    "users": "user_id T, password_hash T, role T, email T?, auth_type T, auth_data JSON?, storage_mode T, "
    "storage_id T?, failed_login_attempts INT, locked_until TS?, last_login_at TS?, created_at TS, updated_at TS, "
    "last_seen TS?, deleted_at TS?",
    "namespaces": "namespace_id T, name T, created_at TS, options JSON?, table_count INT",
    "schemas": "table_id T, table_name T, namespace_id T, table_type T, created_at TS, schema_version INT, "
    "columns JSON, table_comment T?, updated_at TS, options JSON?, access_level T?, is_latest BOOL, storage_id T?, "
    "use_user_storage BOOL?",
    "table_schemas": "table_id T, table_name T, namespace_id T, table_type T, created_at TS, schema_version INT, "
    "columns JSON, table_comment T?, updated_at TS, options JSON?, access_level T?, is_latest BOOL, storage_id T?, "
    "use_user_storage BOOL?",
    "storages": "storage_id T, storage_name T, description T?, storage_type T, base_directory T, credentials JSON?, "
    "config_json JSON?, shared_tables_template T, user_tables_template T, created_at TS, updated_at TS",
    "jobs": "job_id T, job_type T, status T, leader_status T?, parameters JSON?, message T?, exception_trace T?, "
    "idempotency_key T?, queue T?, priority INT?, retry_count SMALLINT, max_retries SMALLINT, memory_used BIGINT?, "
    "cpu_used BIGINT?, created_at TS, updated_at TS, started_at TS?, finished_at TS?, node_id BIGINT, "
    "leader_node_id BIGINT?",
    "job_nodes": "job_id T, node_id BIGINT, status T, error_message T?, created_at TS, started_at TS?, "
    "finished_at TS?, updated_at TS",
    "audit_log": "audit_id T, timestamp TS, actor_user_id T, action T, target T, details T?, ip_address T?, "
    "subject_user_id T?",
    "manifest": "cache_key T, namespace_id T, table_name T, scope T, etag T?, last_refreshed TS, last_accessed TS, "
    "in_memory BOOL, sync_state T, manifest_json JSON",
    "stats": "metric_name T, metric_value T",
    "tables": "namespace_id T, table_name T, table_type T, storage_id T?, version BIGINT, options T?, comment T?, "
    "updated_at TS, created_at TS",
    "columns": "namespace_id T, table_name T, version BIGINT, column_id BIGINT, column_name T, comment T?, "
    "data_type T, default_value T?, ordinal BIGINT, nullable BOOL, primary_key BOOL, primary_key_pos BIGINT?",
    "describe": "column_name T, ordinal_position INT, column_id BIGINT, data_type T, is_nullable BOOL, "
    "is_primary_key BOOL, column_default T?, column_comment T?, schema_version INT",
    "datatypes": "arrow_type T, kalam_type T, sql_name T, description T",
    "settings": "name T, value T, description T, category T",
    "server_logs": "timestamp T, level T, thread T?, target T?, line BIGINT?, message T",
    "sessions": "session_id T, backend_pid BIGINT?, current_schema T?, state T, transaction_id T?, "
    "transaction_state T?, transaction_has_writes BOOL, client_addr T?, transport T, opened_at TS, last_seen_at TS, "
    "last_method T?",
    "transactions": "transaction_id T, owner_id T, origin T, state T, age_ms BIGINT, idle_ms BIGINT, "
    "write_count BIGINT, write_bytes BIGINT, touched_tables_count BIGINT, snapshot_commit_seq BIGINT",
    "cluster": "cluster_id T, node_id BIGINT, role T, status T, rpc_addr T, api_addr T, is_self BOOL, "
    "is_leader BOOL, groups_leading INT, total_groups INT, current_term BIGINT?, last_applied_log BIGINT?, "
    "leader_last_log_index BIGINT?, snapshot_index BIGINT?, catchup_progress_pct SMALLINT?, "
    "replication_lag BIGINT?, hostname T?, version T?, memory_mb BIGINT?, memory_usage_mb BIGINT?, "
    "cpu_usage_percent FLOAT?, uptime_seconds BIGINT?, uptime_human T?, os T?, arch T?",
    "cluster_groups": "group_id BIGINT, cluster_id T, node_id BIGINT, group_type T, current_term BIGINT?, "
    "vote JSON?, last_log_index BIGINT?, last_applied BIGINT?, snapshot BIGINT?, purged BIGINT?, "
    "committed BIGINT?, state T?, current_leader BIGINT?, millis_since_quorum_ack BIGINT?",
}
STATS = (
    "server_uptime_seconds server_uptime_human memory_usage_mb memory_rss_mb memory_physical_footprint_mb "
    "memory_rss_gap_mb cpu_logical_cores cpu_physical_cores server_workers_configured server_workers_effective "
    "max_connections connection_backlog worker_max_blocking_threads datafusion_query_parallelism "
    "datafusion_max_partitions datafusion_memory_limit_mb open_files_total open_files_regular open_files_directories "
    "open_files_kqueue open_files_unix open_files_ipv4 open_files_other total_users total_namespaces total_tables "
    "total_jobs jobs_running jobs_queued jobs_failed total_storages total_live_queries active_connections "
    "active_connections_peak max_connections_configured active_subscriptions active_subscriptions_peak "
    "websocket_sessions websocket_sessions_peak schema_cache_size schema_registry_size schema_cache_total_entries "
    "plan_cache_size topic_cache_topic_count topic_cache_table_route_count topic_cache_total_routes "
    "string_interner_unique_strings node_id server_version server_build_date server_git_branch server_git_commit "
    "cluster_mode cluster_id cluster_rpc_addr cluster_api_addr user_shards shared_shards raft_group_count"
).split()


@pytest.fixture(scope="module")
def opened() -> Iterator[Database]:
    with kalamdb.connect(":memory:") as db:
        yield db


@pytest.mark.parametrize("table", WANTED)
def test_columns_and_types_are_those_of_the_original(opened: Database, table: str) -> None:
    wanted = [tuple(part.split()) for part in WANTED[table].split(",")]
    spelled = {"T": "TEXT", "TS": "TIMESTAMP", "BOOL": "BOOLEAN"}
    found = rows(opened, f"DESCRIBE TABLE system.{table}")[: len(wanted)]
    assert [(row[0], row[3], row[4]) for row in found] == [
        (name, spelled.get(kind.rstrip("?"), kind.rstrip("?")), kind.endswith("?")) for name, kind in wanted
    ]
    assert opened.execute(f"SELECT * FROM system.{table} LIMIT 1").columns[: len(wanted)] == [one[0] for one in wanted]
    assert opened.execute(f"SELECT count(*) FROM system.system_{table}").scalar() is not None


def test_the_figures_of_the_original_are_there(opened: Database) -> None:
    found = dict(rows(opened, "SELECT * FROM system.stats"))
    assert [name for name in STATS if name not in found] == []
    assert int(found["memory_rss_mb"]) > 0 and int(found["open_files_total"]) > 0
    assert int(found["total_users"]) == 1


def test_this_node_is_the_whole_cluster(opened: Database) -> None:
    found = rows(opened, "SELECT is_self, is_leader, role, status, total_groups, version FROM system.cluster")
    assert found == [(True, True, "leader", "active", 1, kalamdb.__version__)]
    assert rows(opened, "SELECT state, current_leader FROM system.cluster_groups") == [("leader", 0)]
    assert rows(opened, "SELECT * FROM system.sessions") == []


def test_a_job_has_one_node(opened: Database) -> None:
    job = opened.jobs.wait(opened.jobs.create_job("cleanup", {"operation": "sweep"}).id)
    found = rows(opened, f"SELECT status, error_message, node_id FROM system.job_nodes WHERE job_id = '{job.id}'")
    assert found == [("completed", None, 0)]


def test_catalog_name_is_kalam(opened: Database) -> None:
    assert rows(opened, "SELECT DISTINCT table_catalog FROM information_schema.columns") == [("kalam",)]


def test_lines_of_the_servers_log_are_rows(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "server.log").write_text(
        "[2026-01-02T03:04:05Z] [INFO ] [main - kalamdb.server:17] - listens on 8080\n"
        "[2026-01-02T03:04:06Z] [ERROR] [worker-1 - kalamdb.sql] - it failed\nTraceback\n  of it\n"
    )
    line = {"timestamp": "2026-01-02T03:04:07Z", "level": "WARN", "thread": None, "target": "a", "line": 3}
    (logs / "server.jsonl").write_text(json.dumps({**line, "message": "slow"}) + "\n{ half\n")
    with kalamdb.connect(tmp_path / "data", logging_logs_path=str(logs)) as db:
        assert rows(db, "SELECT level, thread, target, line, message FROM system.server_logs") == [
            ("INFO", "main", "kalamdb.server", 17, "listens on 8080"),
            ("ERROR", "worker-1", "kalamdb.sql", None, "it failed\nTraceback\n  of it"),
            ("WARN", None, "a", 3, "slow\n{ half"),
        ]
