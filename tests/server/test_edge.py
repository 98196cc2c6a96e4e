"""What every answer has, whatever its route: ids, headers, errors as JSON, health, readiness and figures."""

from __future__ import annotations

import json
import re
import socket
import time
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kalamdb.version import VERSION

from .conftest import Serve, Served

CORS = """
[security.cors]
allowed_origins = ["https://app.example.com"]
expose_headers = ["X-Request-Id"]
allow_private_network = true
"""


def test_health_says_what_clients_of_the_original_read(shared: Served) -> None:
    for path in ("/health", "/v1/api/healthcheck"):
        answer = shared.client.get(path)
        found = answer.json()
        assert answer.status_code == 200
        assert (found["status"], found["version"], found["api_version"]) == ("healthy", VERSION, "v1")
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", found["build_date"])
        assert (found["abandoned_job_threads"], found["restart_required"]) == (0, False)
    assert shared.client.get("/ready").json() == {"status": "ready"}


def test_the_cluster_is_one_node(shared: Served) -> None:
    found = shared.client.get("/v1/api/cluster/health").json()
    assert set(found) == {
        "status", "version", "build_date", "is_cluster_mode", "cluster_id", "node_id", "is_leader", "total_groups",
        "groups_leading", "current_term", "last_applied", "millis_since_quorum_ack", "nodes",
    }  # fmt: skip
    (node,) = found["nodes"]
    assert set(node) == {
        "node_id", "role", "status", "api_addr", "is_self", "is_leader", "replication_lag", "catchup_progress_pct",
        "hostname", "memory_usage_mb", "cpu_usage_percent", "uptime_seconds", "uptime_human",
    }  # fmt: skip
    assert (found["status"], node["api_addr"], node["is_self"]) == ("healthy", shared.url, True)


@pytest.mark.parametrize("path", ["/health", "/v1/api/healthcheck", "/v1/api/cluster/health", "/ready"])
@pytest.mark.parametrize(
    "headers",
    [
        {"X-Forwarded-For": "127.0.0.1"},
        {"Forwarded": "for=127.0.0.1"},
        {"X-Real-IP": "127.0.0.1"},
        {"X-Forwarded-Host": "localhost"},
        {"Host": "rebound.example"},
        {"Host": "localhost.rebound.example"},
    ],
)
def test_health_is_for_this_machine_only(shared: Served, path: str, headers: dict[str, str]) -> None:
    answer = shared.client.get(path, headers=headers)
    assert answer.status_code == 403
    assert answer.json() == {"error": "Access denied. Health endpoint is localhost-only."}


def test_figures_need_a_token_of_a_dba_from_elsewhere(shared: Served) -> None:
    forwarded = {"X-Forwarded-For": "9.9.9.9"}
    assert shared.client.get("/metrics", headers=forwarded).status_code == 401
    assert shared.client.get("/metrics", headers={**forwarded, "Authorization": "Bearer nonsense"}).status_code == 401
    assert shared.client.get("/metrics").status_code == 200


def test_figures_count_requests_by_route_and_status_and_read_the_store(shared: Served) -> None:
    shared.client.get("/v1/exports/a/1")
    shared.client.get("/v1/exports/b/2")
    families = {one.name: one for one in text_string_to_metric_families(shared.client.get("/metrics").text)}
    counts = {
        (one.labels["method"], one.labels["route"], one.labels["status"]): one.value
        for one in families["kalamdb_http_request_seconds"].samples
        if one.name.endswith("_count")
    }
    assert counts["GET", "/v1/exports/{user_id}/{export_id}", "501"] == 2
    buckets = [
        one.value
        for one in families["kalamdb_http_request_seconds"].samples
        if one.name.endswith("_bucket") and one.labels["route"].startswith("/v1/exports")
    ]
    assert buckets == sorted(buckets) and buckets[-1] == 2
    states = {one.labels["status"] for one in families["kalamdb_jobs"].samples}
    assert {"new", "queued", "running", "completed", "failed"} <= states
    for name in (
        "kalamdb_hot_rows", "kalamdb_segments", "kalamdb_flushed_bytes", "kalamdb_commits", "kalamdb_job_seconds",
        "kalamdb_job_wait_seconds", "kalamdb_queries", "kalamdb_connections", "process_resident_memory_bytes",
    ):  # fmt: skip
        assert name in families, name


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/nowhere",
        "/health/",
        "/v1/api/sql/../../etc/passwd",
        "/..%2f..%2fetc/passwd",
        "/v1/api//sql",
        "/%00",
        "/%ff",
    ],
)
def test_an_unknown_path_is_404_as_json(shared: Served, path: str) -> None:
    status, headers, body = raw_get(shared, path)
    assert (status, headers["content-type"]) == (404, "application/json")
    assert json.loads(body) == {"error": "there is nothing at this path", "code": "NOT_FOUND"}


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/v1/api/sql", {"POST"}),
        ("GET", "/v1/api/topics/ack", {"POST"}),
        ("POST", "/health", {"GET", "HEAD"}),
        ("PATCH", "/ready", {"GET", "HEAD"}),
    ],
)
def test_a_wrong_method_is_405_and_names_the_right_ones(
    shared: Served, method: str, path: str, allowed: set[str]
) -> None:
    answer = shared.client.request(method, path)
    assert answer.status_code == 405
    assert set(answer.headers["allow"].split(", ")) == allowed
    assert "METHOD_NOT_ALLOWED" in answer.text


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/api/topics/consume"),
        ("POST", "/v1/api/topics/ack"),
        ("GET", "/v1/files/app/notes/f0001/1-a.png"),
        ("GET", "/api/v1/files/app/notes/f0001/1"),
        ("GET", "/ui"),
        ("GET", "/ui/index.html"),
    ],
)
def test_features_that_are_not_there_say_so(shared: Served, method: str, path: str) -> None:
    answer = shared.client.request(method, path)
    assert answer.status_code == 501
    assert answer.json()["code"] == "UNSUPPORTED"
    assert "not offered" in answer.json()["error"]


def test_each_answer_has_an_id_that_its_log_line_has(shared: Served) -> None:
    given = shared.client.get("/health", headers={"X-Request-Id": "trace-1.2:3"})
    assert given.headers["x-request-id"] == "trace-1.2:3"
    made = [shared.client.get(path).headers["x-request-id"] for path in ("/health", "/nowhere")]
    assert len(set(made)) == 2
    insane = shared.client.get("/health", headers={"X-Request-Id": "a b" + "c" * 100})
    assert insane.headers["x-request-id"] not in ("", "a b" + "c" * 100)
    for request_id in ("trace-1.2:3", *made):
        assert logged(shared, f"request_id={request_id}\n")


def test_a_line_of_the_log_cannot_be_forged_by_a_path(shared: Served) -> None:
    raw_get(shared, "/a%0a%5bforged%5d")
    assert "\n[forged]" not in logged(shared, '"GET /a%0a%5bforged%5d" 404')


def test_each_answer_has_the_headers_of_safety(shared: Served) -> None:
    for path in ("/health", "/nowhere", "/ui"):
        headers = shared.client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "server" not in headers and "strict-transport-security" not in headers


def test_no_origin_may_read_answers_unless_it_is_listed(serve: Serve, shared: Served) -> None:
    stranger = {"Origin": "https://app.example.com"}
    assert "access-control-allow-origin" not in shared.client.get("/health", headers=stranger).headers
    listed = serve(settings=CORS)
    answer = listed.client.get("/nowhere", headers=stranger)
    assert answer.headers["access-control-allow-origin"] == "https://app.example.com"
    assert answer.headers["access-control-expose-headers"] == "X-Request-Id"
    other = listed.client.get("/health", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers
    ask = {
        **stranger, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization",
        "Access-Control-Request-Private-Network": "true",
    }  # fmt: skip
    preflight = listed.client.options("/v1/api/sql", headers=ask)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-private-network"] == "true"


def test_too_many_requests_are_429_in_the_shape_of_their_path(serve: Serve) -> None:
    limits = "[rate_limit]\nmax_requests_per_ip_per_sec = 1\n[security]\ntrusted_proxy_ranges = ['127.0.0.1']"
    served = serve(settings=limits)
    codes = {}
    for number, path in enumerate(("/nowhere", "/v1/api/sql", "/v1/api/auth/login")):
        proxied = {"X-Forwarded-For": f"9.9.9.{number}"}
        served.client.get(path, headers=proxied)
        answer = served.client.get(path, headers=proxied)
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        found: dict[str, Any] = answer.json()
        codes[path] = found["error"]["code"] if path == "/v1/api/sql" else found.get("code", found["error"])
    assert codes == {
        "/nowhere": "RATE_LIMIT_EXCEEDED",
        "/v1/api/sql": "RATE_LIMIT_EXCEEDED",
        "/v1/api/auth/login": "rate_limited",
    }
    assert all(served.client.get("/health").status_code == 200 for _ in range(20))


def test_an_unknown_path_of_a_websocket_is_refused(shared: Served) -> None:
    headers = {
        "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
    }  # fmt: skip
    answer = httpx.get(f"{shared.url}/nowhere", headers=headers, trust_env=False)
    assert (answer.status_code, answer.json()["code"]) == (404, "NOT_FOUND")


def logged(served: Served, text: str) -> str:
    """The log of a server once `text` is in it."""
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s:
        lines = (served.data_dir / "logs" / "server.log").read_text()
        if text in lines:
            return lines
        time.sleep(0.02)
    raise AssertionError(f"'{text}' was not logged")


def raw_get(served: Served, path: str) -> tuple[int, dict[str, str], bytes]:
    """GET a path exactly as it is written."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as raw:
        raw.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        received = b"".join(iter(lambda: raw.recv(65_536), b""))
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return int(status.split(" ")[1]), dict(line.lower().split(": ", 1) for line in lines), body
