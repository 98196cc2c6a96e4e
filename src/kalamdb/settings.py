"""The table of all settings: keys, defaults, ranges, other spellings, and keys that say nothing here.

Keys of the original keep their names. What `config` loads is checked against this table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

HIDDEN: Final = "***"
"""What is shown instead of a secret."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: its default gives the type, `low` and `high` (inclusive) the range.

    A tuple is a list of texts, a mapping has texts by name.
    """

    key: str
    default: Any
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    secret: bool = False
    """Whether its value is never shown."""

    @property
    def environment(self) -> str:
        """Name of its environment variable."""
        return environment_name(self.key)

    @property
    def category(self) -> str:
        """The part before the first dot."""
        return self.key.partition(".")[0]

    def shown(self, value: Any) -> str:
        """A value as system.settings shows it."""
        if self.secret:
            return HIDDEN if value else ""
        match value:
            case tuple():
                return ", ".join(value)
            case Mapping():
                return ", ".join(f"{name}={text}" for name, text in value.items())
            case _:
                return str(value)


def environment_name(key: str) -> str:
    """The environment variable of a key, as KALAMDB_SERVER_PORT of server.port."""
    return "KALAMDB_" + key.upper().replace(".", "_")


_S = Setting
_NONE: Final[Mapping[str, str]] = MappingProxyType({})
_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30

_SHARING: Final = (
    _S("share", False, "let other processes attach to the directory; take it over when its holder ends"),
    _S("attach_timeout_s", 30.0, "seconds that a process waits for the one that holds the directory to answer", 0),
)
_STORE: Final = (
    _S(
        "storage.durability",
        "commit",
        "'commit' waits for the disk at each commit, 'os' survives kill -9 only",
        choices=("commit", "os"),
    ),
    _S("storage.compression", True, "compress segments and the store's files; off leaves their texts searchable"),
    _S("storage.data_path", "./data", "directory that `kalamdb serve` opens; `connect` is told its own"),
    _S("storage.rocksdb.block_cache_size", 32 * _MIB, "bytes of RocksDB's block cache", _MIB),
    _S("storage.rocksdb.write_buffer_size", 64 * _MIB, "bytes of RocksDB's write buffer", _MIB),
    _S("storage.rocksdb.max_open_files", 512, "files that RocksDB keeps open", 16),
    _S("storage.rocksdb.max_background_jobs", 2, "flushes and compactions that RocksDB runs at a time", 1, 64),
    _S("hot.bytes_max", 256 * _MIB, "bytes of the hot tier; above it flushes are forced, then writers wait", _MIB),
    _S("hot.cache_bytes_max", 256 * _MIB, "bytes of decoded hot rows kept in memory", _MIB),
    _S("hot.wait_timeout_s", 30.0, "seconds that a writer waits for room in the hot tier", 0),
    _S("segment.cache_bytes_max", 128 * _MIB, "bytes of segment indexes and row groups kept in memory", _MIB),
    _S("segment.row_group_rows_max", 65_536, "rows of a row group of a segment", 1024, _MIB),
    _S("flush.scheduler_enabled", True, "flush tables by their policy in the background"),
    _S("flush.default_row_limit", 10_000, "rows after which a table without FLUSH_POLICY is flushed", 1),
    _S("flush.default_time_interval", 300, "seconds after which a table without FLUSH_POLICY is flushed", 1),
    _S("flush.check_interval_seconds", 60.0, "seconds between two looks of the flush scheduler; 0 ends them", 0),
    _S("compaction.enabled", True, "compact tables in the background"),
    _S("compaction.level0_segments_max", 5, "level-0 segments of a table before they are merged", 1),
    _S("compaction.segment_bytes_max", 128 * _MIB, "target size of a level-1 segment", 1 << 16),
    _S(
        "retention.default_deleted_retention_hours",
        168,
        "hours that a table without DELETED_RETENTION_HOURS keeps deleted rows",
        0,
        876_000,
    ),
    _S("retention.enable_dba_stats", True, "a served database samples its figures into dba.stats every 10 s"),
    _S("retention.dba_stats_retention_days", 7.0, "days that samples of dba.stats are kept; 0 keeps them", 0),
)
_STATEMENTS: Final = (
    _S("limits.batch_rows_max", 4096, "rows of a statement that go to the hot tier; more become a segment", 1, 65_536),
    _S("limits.sql_bytes_max", _MIB, "bytes of one SQL text", 1024),
    _S("limits.sql_tokens_max", 20_000, "tokens of one statement, literals in lists not counted", 100, 1_000_000),
    _S("limits.sql_depth_max", 256, "nesting and chained operators of one statement", 8, 512),
    _S("limits.sql_set_operands_max", 64, "SELECTs that one statement may join by UNION and the like", 2, 256),
    _S("limits.result_bytes_max", _GIB, "bytes of one result", 1 << 16),
    _S("limits.max_message_size", _MIB, "bytes of one message of a client", 1024),
    _S("limits.default_query_limit", 50, "rows of a served SELECT without LIMIT; 0 is all", 0),
    _S("limits.max_query_limit", 1000, "rows of a served SELECT at most; 0 is all", 0),
    _S("limits.sort_by_primary_key", True, "rows of a served SELECT without ORDER BY come in the order of the key"),
    _S("limits.system_columns_shown", True, "`SELECT *` of a served statement shows `_seq` and `_deleted`"),
    _S("datafusion.memory_limit", 0, "bytes that all queries share before they spill; 0 is a quarter of the memory", 0),
    _S("datafusion.query_parallelism", 2, "threads of one query; 0 is one per core", 0, 256),
    _S("execution.sql_plan_cache_max_entries", 200, "parsed statements kept", 1),
    _S("execution.query_threads", 0, "served statements that run at a time; 0 is one per core", 0, 1024),
    _S("execution.queue_max", 64, "served statements that may wait for a thread", 0, 100_000),
    _S("execution.queue_wait_s", 5.0, "seconds that a served statement waits for a thread", 0),
    _S("execution.handler_timeout_seconds", 30.0, "seconds that a served statement may take", 0.001),
    _S("execution.max_parameters", 50, "parameters of a served statement", 0, 65_535),
    _S("execution.max_parameter_size_bytes", 512 * _KIB, "bytes of one parameter of a served statement", 1),
    _S("execution.idempotency_hours", 24.0, "hours for which an Idempotency-Key is remembered", 0),
    _S("transaction_timeout_secs", 300.0, "seconds that a transaction may take", 0.001),
    _S("max_transaction_buffer_bytes", 100 * _MIB, "bytes of changes that a transaction may hold", 1024),
)
_JOBS: Final = (
    _S("jobs.max_concurrent", 10, "jobs that run at the same time", 1, 10_000),
    _S("jobs.max_retries", 3, "retries of a failed job", 0, 1000),
    _S("jobs.retry_backoff_ms", 100, "wait before the first retry, in milliseconds", 1),
    _S("jobs.cancel_timeout_s", 5.0, "seconds that a cancelled job gets to clean up", 0),
    _S("jobs.quarantine_after", 3, "process deaths after which a job is held back", 1),
    _S("jobs.schedules_enabled", True, "make the jobs of schedules when they are due"),
    _S("jobs.misfire_grace_s", 60.0, "seconds that a due time may be late before the misfire policy decides", 0),
    _S("jobs.entry_points_enabled", True, "register the executors of installed distributions at the start"),
    _S("jobs.queued_max", 1_000_000, "jobs that may wait", 1),
    _S("jobs.history_completed_days", 7.0, "days that completed, skipped and cancelled jobs are kept", 0),
    _S("jobs.history_failed_days", 90.0, "days that failed jobs are kept", 0),
    _S("jobs.history_rows_max", 1_000_000, "ended jobs of each state that are kept", 0),
    _S("shutdown.timeout_s", 30.0, "seconds that running jobs get at a clean stop", 0),
    _S("shutdown.requests_s", 10.0, "seconds that running requests get at a clean stop", 0),
)
_SERVER: Final = (
    _S("server.host", "127.0.0.1", "address that the server listens on"),
    _S("server.port", 8080, "port that the server listens on; 0 takes a free one", 0, 65_535),
    _S("server.public_origin", "", "origin under which browsers reach the server, as https://db.example.com"),
    _S("server.api_version", "v1", "first part of the paths of the API", choices=("v1",)),
    _S("server.tls_cert_file", "", "PEM file of the certificate chain; with a key the server speaks TLS"),
    _S("server.tls_key_file", "", "PEM file of the certificate's key"),
    _S("server.health_networks", ("127.0.0.0/8", "::1/128"), "networks that may ask /health, /ready and /metrics"),
    _S("server.allowed_hosts", (), "names in Host, beside loopback's, that are this server's"),
    _S("performance.request_timeout", 30.0, "seconds for a request and its answer, streams excepted", 0.001),
    _S("performance.keepalive_timeout", 75.0, "seconds that an idle connection stays open", 0),
    _S("performance.max_connections", 25_000, "open connections", 1),
    _S("performance.backlog", 4096, "connections that wait to be accepted", 1, 65_535),
    _S("performance.client_request_timeout", 5.0, "seconds for a request's header to arrive", 0.001),
    _S("performance.client_disconnect_timeout", 2.0, "seconds for a closing connection to end", 0),
    _S("performance.max_header_size", 16 * _KIB, "bytes of a request's header", 1024, _MIB),
    _S("websocket.client_timeout_secs", 10.0, "seconds without life after which a socket is closed", 0.001),
    _S("websocket.auth_timeout_secs", 3.0, "seconds that a socket may stay open without authentication", 0.001),
    _S("websocket.heartbeat_interval_secs", 5.0, "seconds between two looks for sockets without life", 0.001),
    _S("websocket.queue_bytes_max", _MIB, "bytes that wait for a slow socket before it is closed with 1013", _KIB),
    _S("rate_limit.max_queries_per_sec", 100, "statements per second of a user", 1),
    _S("rate_limit.max_messages_per_sec", 50, "messages per second of a socket", 1),
    _S("rate_limit.max_subscriptions_per_user", 10, "live queries of a user", 0),
    _S("rate_limit.max_auth_requests_per_ip_per_sec", 20, "requests for a login per second of an address", 1),
    _S("rate_limit.max_connections_per_ip", 100, "open connections of an address", 1),
    _S("rate_limit.max_requests_per_ip_per_sec", 200, "requests per second of an address", 1),
    _S("rate_limit.request_body_limit_bytes", 10 * _MIB, "bytes of a request's body", 1024),
    _S("rate_limit.ban_duration_seconds", 300.0, "seconds that an address is refused after ten excesses", 0),
    _S("rate_limit.enable_connection_protection", True, "hold the limits by address"),
    _S("rate_limit.cache_max_entries", 1000, "users and addresses whose rates are kept", 1),
    _S("rate_limit.cache_ttl_seconds", 600.0, "seconds that the rate of a silent user or address is kept", 1),
    _S("security.max_request_body_size", 10 * _MIB, "bytes of a request's body", 1024),
    _S("security.max_ws_message_size", _MIB, "bytes of one message of a socket", 1024),
    _S("security.strict_ws_origin_check", False, "refuse sockets without Origin"),
    _S("security.trusted_proxy_ranges", (), "addresses and networks whose X-Forwarded-For is believed"),
    _S("security.cors.allowed_origins", (), "origins whose pages may use the API; * is all"),
    _S("security.cors.allowed_methods", ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"), "methods they may use"),
    _S(
        "security.cors.allowed_headers",
        ("Authorization", "Content-Type", "Accept", "Origin", "X-Requested-With"),
        "headers they may send; * is all",
    ),
    _S("security.cors.expose_headers", (), "headers of an answer that they may read"),
    _S("security.cors.allow_credentials", True, "whether they may send cookies and Authorization"),
    _S("security.cors.max_age", 3600, "seconds that a browser keeps the answer of a preflight", 0),
    _S("security.cors.allow_private_network", False, "answer preflights for private networks"),
    _S("live.resume_window_s", 600.0, "seconds for which a deletion is remembered at least", 0),
)


def _provider(name: str) -> tuple[Setting, ...]:
    key = f"oauth.providers.{name}"
    return (
        _S(f"{key}.enabled", False, f"believe bearer tokens of {name}"),
        _S(f"{key}.issuer", "", "issuer of its tokens"),
        _S(f"{key}.jwks_uri", "", "address of its keys; empty asks the issuer"),
        _S(f"{key}.client_id", "", "audience that its tokens must name"),
        _S(f"{key}.client_secret", "", "secret of the client", secret=True),
        _S(f"{key}.tenant", "", "tenant that its tokens must name"),
    )


_USERS: Final = (
    _S("deletion_grace_period_days", 30.0, "days after DROP USER until the user is erased", 0),
    _S("audit.retention_days", 365.0, "days that entries of the audit log are kept", 0),
    _S("auth.root_password", "", "password that root has from the first start on", secret=True),
    _S("auth.jwt_secret", "", "secret that signs tokens; empty makes one in the data directory", secret=True),
    _S("auth.jwt_trusted_issuers", (), "issuers whose bearer tokens are believed"),
    _S("auth.jwt_expiry_hours", 24.0, "hours that an access token holds", 0.001),
    _S("auth.cookie_secure", True, "send cookies over TLS only"),
    _S("auth.min_password_length", 8, "characters of a password at least", 1, 72),
    _S("auth.max_password_length", 1024, "characters of a password at most; 72 bytes hold in any case", 8),
    _S("auth.bcrypt_cost", 12, "work factor of password hashes; each step doubles the time", 4, 16),
    _S(
        "auth.enforce_password_complexity",
        False,
        "passwords need upper and lower case, a digit and a special character",
    ),
    _S("auth.allow_remote_setup", False, "the first password of root may be set from another machine"),
    _S("oauth.enabled", False, "believe bearer tokens of the providers that are enabled"),
    _S("oauth.auto_provision", False, "make a user at the first login with a provider's token"),
    _S("oauth.default_role", "user", "role of a user so made", choices=("user", "service", "dba")),
    *(setting for name in ("google", "github", "azure", "firebase") for setting in _provider(name)),
)
_LOGGING: Final = (
    _S("logging.logs_path", "", "directory of the log files; empty is <data>/logs"),
    _S("logging.level", "info", "what the server logs", choices=("error", "warn", "info", "debug", "trace")),
    _S("logging.log_to_console", True, "log to the standard error too"),
    _S("logging.format", "compact", "lines or JSON", choices=("compact", "json")),
    _S("logging.slow_query_threshold_ms", 1200, "milliseconds after which a statement is logged as slow", 0),
    _S("logging.access_log", True, "log each request"),
    _S("logging.targets", _NONE, "level by the name of a logger"),
    _S("logging.otlp.enabled", False, "send traces to a collector"),
    _S("logging.otlp.endpoint", "http://127.0.0.1:4317", "address of the collector"),
    _S("logging.otlp.protocol", "grpc", "protocol of the collector", choices=("grpc", "http")),
    _S("logging.otlp.service_name", "kalamdb-server", "name of this server in traces"),
    _S("logging.otlp.timeout_ms", 3000, "milliseconds that sending may take", 1),
)
SETTINGS: Final[tuple[Setting, ...]] = (*_SHARING, *_STORE, *_STATEMENTS, *_JOBS, *_SERVER, *_USERS, *_LOGGING)
BY_KEY: Final[Mapping[str, Setting]] = {setting.key: setting for setting in SETTINGS}


def _durability(sync_writes: Any) -> str:
    word = str(sync_writes).lower()
    if word not in ("true", "false", "1", "0"):
        raise ValueError("true or false is expected")
    return "commit" if word in ("true", "1") else "os"


@dataclass(frozen=True, slots=True)
class Alias:
    """Another spelling of a key, and how its value becomes that of the key."""

    key: str
    convert: Callable[[Any], Any] = lambda value: value


ALIASES: Final[Mapping[str, Alias]] = {
    "shutdown.flush.timeout": Alias("shutdown.timeout_s"),
    "rocksdb.sync_writes": Alias("storage.durability", _durability),
    "storage.rocksdb.sync_writes": Alias("storage.durability", _durability),
    "user_management.deletion_grace_period_days": Alias("deletion_grace_period_days"),
    **{
        f"authentication.{setting.key.removeprefix('auth.')}": Alias(setting.key)
        for setting in SETTINGS
        if setting.category == "auth"
    },
}

ENVIRONMENT: Final[Mapping[str, str]] = {
    "KALAMDB_ROOT_PASSWORD": "auth.root_password",
    "KALAMDB_JWT_SECRET": "auth.jwt_secret",
    "KALAMDB_JWT_EXPIRY_HOURS": "auth.jwt_expiry_hours",
    "KALAMDB_JWT_TRUSTED_ISSUERS": "auth.jwt_trusted_issuers",
    "KALAMDB_COOKIE_SECURE": "auth.cookie_secure",
    "KALAMDB_ALLOW_REMOTE_SETUP": "auth.allow_remote_setup",
    "KALAMDB_PG_AUTH_TOKEN": "auth.pg_auth_token",
    "KALAMDB_DATA_DIR": "storage.data_path",
    "KALAMDB_LOGS_DIR": "logging.logs_path",
    "KALAMDB_LOG_LEVEL": "logging.level",
    "KALAMDB_LOG_FORMAT": "logging.format",
    "KALAMDB_LOG_TO_CONSOLE": "logging.log_to_console",
    "KALAMDB_SLOW_QUERY_THRESHOLD_MS": "logging.slow_query_threshold_ms",
    "KALAMDB_OTLP_ENABLED": "logging.otlp.enabled",
    "KALAMDB_OTLP_ENDPOINT": "logging.otlp.endpoint",
    "KALAMDB_OTLP_PROTOCOL": "logging.otlp.protocol",
    "KALAMDB_OTLP_SERVICE_NAME": "logging.otlp.service_name",
    "KALAMDB_OTLP_TIMEOUT_MS": "logging.otlp.timeout_ms",
    "KALAMDB_RATE_LIMIT_AUTH_REQUESTS_PER_IP_PER_SEC": "rate_limit.max_auth_requests_per_ip_per_sec",
    "KALAMDB_TRUSTED_PROXY_RANGES": "security.trusted_proxy_ranges",
    "KALAMDB_TOPIC_VISIBILITY_TIMEOUT_SECS": "topics.visibility_timeout_secs",
    "KALAMDB_VISIBILITY_TIMEOUT_SECS": "topics.visibility_timeout_secs",
    "KALAMDB_NODE_ID": "cluster.node_id",
    "KALAMDB_CLUSTER_ID": "cluster.cluster_id",
    "KALAMDB_TOKIO_WORKER_THREADS": "performance.tokio_worker_threads",
}
"""Names of the original beside KALAMDB_<KEY>."""

IGNORED: Final[Mapping[str, str]] = {
    "server.workers": "one process serves",
    "server.enable_http2": "HTTP/1.1 is spoken; a proxy before the server may speak HTTP/2",
    "server.ui_path": "no pages are served from a directory",
    "storage.shared_tables_template": "a table's directory is made of its names and its number",
    "storage.user_tables_template": "the rows of all users of a table share its segments",
    "storage.remote_timeouts.*": "tables are kept on file systems",
    "storage.rocksdb.disable_wal": "each commit is logged",
    "storage.rocksdb.compact_on_startup": "RocksDB compacts while it runs",
    "storage.rocksdb.cf_profiles.*": "storage.rocksdb.write_buffer_size holds for the whole store",
    "datafusion.max_partitions": "datafusion.query_parallelism is the number of partitions",
    "datafusion.batch_size": "the engine chooses its batches",
    "flush.flush_batch_size": "a flush takes all rows that wait",
    "manifest_cache.*": "manifests are part of the store; segment.cache_bytes_max bounds what is cached",
    "stream.default_ttl_seconds": "a STREAM table states its TTL_SECONDS",
    "stream.default_max_buffer": "the rows of a STREAM table end with their time to live",
    "stream.eviction_interval_seconds": "the schedule of job stream_eviction says when; ALTER SCHEDULE changes it",
    "user_management.cleanup_job_schedule": "the schedule of job user_cleanup says when; ALTER SCHEDULE changes it",
    "topics.*": "topics are not offered",
    "performance.tokio_worker_threads": "there is no such runtime",
    "performance.worker_max_blocking_threads": "execution.query_threads bounds the threads of statements",
    "auth.pg_auth_token": "the PostgreSQL bridge is not offered",
    "authentication.pg_auth_token": "the PostgreSQL bridge is not offered",
    "jobs.wal_cleanup_interval_seconds": "RocksDB removes logs that it does not need",
    "execution.sql_plan_cache_ttl_seconds": "parsed statements hold no data and leave by their number",
    "files.*": "FILE columns are not offered",
    "cluster.*": "one node holds the data",
    "rpc_tls.*": "one node holds the data",
}
"""Keys of the original without a meaning here, and why; `.*` stands for all keys below."""


def why_ignored(key: str) -> str | None:
    """The reason why a key says nothing here, None for one that is not in `IGNORED`."""
    if key in IGNORED:
        return IGNORED[key]
    return next((why for name, why in IGNORED.items() if name.endswith(".*") and key.startswith(name[:-1])), None)
