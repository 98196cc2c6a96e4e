"""Settings come from four sources, under the names of the original too, and secrets among them are not shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import kalamdb
from kalamdb.config import Settings
from kalamdb.errors import InvalidRequest
from kalamdb.settings import ALIASES, BY_KEY, ENVIRONMENT, IGNORED, SETTINGS, why_ignored

WHOLE = Path(__file__).parent / "data" / "server.toml"


def load(environment: dict[str, str] | None = None, file: Path | None = None, **arguments: Any) -> Settings:
    """Settings of these sources alone."""
    return Settings.load(arguments, file=file, environment=environment or {})


def written(folder: Path, text: str) -> Path:
    """A settings file."""
    path = folder / "server.toml"
    path.write_text(text)
    return path


def test_the_whole_of_the_originals_configuration_as_one_file_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with kalamdb.connect(tmp_path / "data", config=WHOLE) as db:
        settings = db.context.settings
        assert db.execute("SELECT 1").scalar() == 1
    assert settings["storage.durability"] == "os"
    assert settings["shutdown.timeout_s"] == 300
    assert settings["security.cors.allowed_origins"] == ("http://localhost:5173", "http://127.0.0.1:5173")
    assert settings["auth.jwt_trusted_issuers"] == ("https://accounts.google.com", "https://issuer.example.com")
    assert dict(settings["logging.targets"]) == {"datafusion": "info", "kalamdb.server": "debug"}
    assert settings["oauth.providers.azure.tenant"] == "tenant"


def test_keys_without_a_meaning_here_are_listed_with_their_values_and_a_reason() -> None:
    ignored = load(file=WHOLE).ignored
    assert "cluster.node_id = 1: one node holds the data" in ignored
    assert "server.workers = 0: one process serves" in ignored
    assert any(one.startswith("cluster.peers = [{'node_id': 2") for one in ignored)
    assert any(one.startswith("storage.rocksdb.cf_profiles.raft.write_buffer_size = 262144: ") for one in ignored)
    assert not any("of-the-test" in one for one in ignored)
    assert load().ignored == ()


def test_keys_of_both_kinds_do_not_meet() -> None:
    assert not [key for key in BY_KEY if why_ignored(key) is not None]
    assert not [name for name in ALIASES if name in BY_KEY or name in IGNORED]
    assert all(key in BY_KEY or why_ignored(key) is not None for key in ENVIRONMENT.values())
    assert all(alias.key in BY_KEY for alias in ALIASES.values())


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.key)
def test_each_default_is_a_value_that_the_setting_allows(setting: Any) -> None:
    assert load(**{setting.key: setting.default})[setting.key] == setting.default


@pytest.mark.parametrize(
    ("variable", "value", "key", "wanted"),
    [
        ("KALAMDB_ROOT_PASSWORD", "open sesame", "auth.root_password", "open sesame"),
        ("KALAMDB_AUTHENTICATION_ROOT_PASSWORD", "open sesame", "auth.root_password", "open sesame"),
        ("KALAMDB_JWT_SECRET", "s" * 40, "auth.jwt_secret", "s" * 40),
        ("KALAMDB_JWT_EXPIRY_HOURS", "2", "auth.jwt_expiry_hours", 2),
        ("KALAMDB_SERVER_HOST", "0.0.0.0", "server.host", "0.0.0.0"),
        ("KALAMDB_SERVER_PORT", "0", "server.port", 0),
        ("KALAMDB_DATA_DIR", "/var/lib/kalamdb", "storage.data_path", "/var/lib/kalamdb"),
        ("KALAMDB_LOGS_DIR", "/var/log/kalamdb", "logging.logs_path", "/var/log/kalamdb"),
        ("KALAMDB_LOG_TO_CONSOLE", "no", "logging.log_to_console", False),
        ("KALAMDB_COOKIE_SECURE", "false", "auth.cookie_secure", False),
        ("KALAMDB_WEBSOCKET_CLIENT_TIMEOUT_SECS", "7", "websocket.client_timeout_secs", 7),
        ("KALAMDB_TRUSTED_PROXY_RANGES", "10.0.0.1, ::1", "security.trusted_proxy_ranges", ("10.0.0.1", "::1")),
        ("KALAMDB_SECURITY_CORS_ALLOWED_ORIGINS", "*", "security.cors.allowed_origins", ("*",)),
        ("KALAMDB_LOGGING_TARGETS", "a=debug, b.c=warn", "logging.targets", {"a": "debug", "b.c": "warn"}),
        ("KALAMDB_OTLP_ENABLED", "1", "logging.otlp.enabled", True),
        ("KALAMDB_SHUTDOWN_FLUSH_TIMEOUT", "9", "shutdown.timeout_s", 9),
        ("KALAMDB_JOBS_MAX_CONCURRENT", "4", "jobs.max_concurrent", 4),
    ],
)  # fmt: skip
def test_the_environment_is_read_under_its_own_and_the_originals_names(
    variable: str, value: str, key: str, wanted: object
) -> None:
    assert load({variable: value})[key] == wanted


@pytest.mark.parametrize(
    ("variable", "line"),
    [
        ("KALAMDB_NODE_ID", "cluster.node_id = 3: one node holds the data"),
        ("KALAMDB_CLUSTER_ID", "cluster.cluster_id = 3: one node holds the data"),
        ("KALAMDB_CLUSTER_RPC_ADDR", "cluster.rpc_addr = 3: one node holds the data"),
        ("KALAMDB_RPC_TLS_SERVER_KEY", "rpc_tls.server_key = ***: one node holds the data"),
        ("KALAMDB_SERVER_WORKERS", "server.workers = 3: one process serves"),
        ("KALAMDB_PG_AUTH_TOKEN", "auth.pg_auth_token = ***: the PostgreSQL bridge is not offered"),
        ("KALAMDB_TOPIC_VISIBILITY_TIMEOUT_SECS", "topics.visibility_timeout_secs = 3: topics are not offered"),
        ("KALAMDB_TOKIO_WORKER_THREADS", "performance.tokio_worker_threads = 3: there is no such runtime"),
    ],
)
def test_names_of_the_environment_that_say_nothing_here_are_listed(variable: str, line: str) -> None:
    assert load({variable: "3"}).ignored == (line,)


def test_a_later_source_wins_whatever_the_spelling(tmp_path: Path) -> None:
    file = written(tmp_path, "[rocksdb]\nsync_writes = false\n[shutdown.flush]\ntimeout = 1\n")
    assert load(file=file)["storage.durability"] == "os"
    merged = load({"KALAMDB_SHUTDOWN_TIMEOUT_S": "2"}, file, storage_durability="commit", shutdown_flush_timeout=3)
    assert (merged["storage.durability"], merged["shutdown.timeout_s"]) == ("commit", 3)


def test_one_source_must_not_spell_a_key_in_two_ways_with_two_values(tmp_path: Path) -> None:
    file = written(tmp_path, "[auth]\njwt_secret = 'one'\n[authentication]\njwt_secret = 'two'\n")
    with pytest.raises(InvalidRequest, match="'auth.jwt_secret' and 'authentication.jwt_secret' say different"):
        load(file=file)


def test_an_unknown_key_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"unknown setting 'server.prot'; did you mean 'server.port'\?"):
        load(file=written(tmp_path, "[server]\nprot = 1\n"))
    with pytest.raises(InvalidRequest, match="unknown setting 'nonsense'"):
        load(nonsense=1)


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("server.port", 65_536, "at most 65535"),
        ("security.cors.allowed_origins", [1], "a list of texts"),
        ("logging.targets", "debug", "name=text"),
        ("logging.targets", {"a": 1}, "texts by name"),
        ("logging.level", "loud", "one of error, warn"),
        ("rocksdb.sync_writes", "maybe", "true or false"),
        ("oauth.default_role", "system", "one of user, service, dba"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_with_what_is(key: str, value: object, wanted: str) -> None:
    with pytest.raises(InvalidRequest, match=wanted):
        load(**{key: value})


def test_secrets_are_shown_nowhere(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as caught:
        load(**{"auth.jwt_secret": 815, "authentication.root_password": 4711})
    assert "815" not in str(caught.value) and "4711" not in str(caught.value)
    with kalamdb.connect(":memory:", auth_jwt_secret="hush" * 10) as db:
        shown = dict(db.execute("SELECT name, value FROM system.settings").rows)
        assert "hush" not in str(db.execute("SHOW ALL").rows)
    assert shown["auth.jwt_secret"] == "***"
    assert shown["auth.root_password"] == ""
    assert set(shown) == set(BY_KEY)
