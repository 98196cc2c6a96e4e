"""The end of a server: by SIGTERM in order, by a second one at once, by SIGKILL without loss."""

from __future__ import annotations

import http.client
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

import kalamdb
from kalamdb.database import Database

from .conftest import STOP_TIMEOUT_S, Serve, Served

WRITERS = 4
ENOUGH = 40
"""Acknowledged rows of each writer before the server is ended."""
WAIT_S = 30.0
UNLIMITED = "[rate_limit]\nmax_queries_per_sec = 1000000"


class Writers:
    """Threads that insert over HTTP until the server is gone, and remember what it acknowledged."""

    def __init__(self, served: Served, first: int = 0) -> None:
        self._served = served
        self._token = served.login()
        self._acknowledged: list[list[int]] = [[] for _ in range(WRITERS)]
        self._enough = threading.Barrier(WRITERS + 1)
        self._threads = [threading.Thread(target=self._write, args=(at, first)) for at in range(WRITERS)]
        for thread in self._threads:
            thread.start()

    def _write(self, at: int, first: int) -> None:
        mine = self._acknowledged[at]
        connection = http.client.HTTPConnection("127.0.0.1", self._served.port, timeout=WAIT_S)
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        try:
            for number in range(1_000_000):
                key = first + number * WRITERS + at
                body = json.dumps({"sql": "INSERT INTO app.t (id, text) VALUES ($1, $2)", "params": [key, "x" * 100]})
                connection.request("POST", "/v1/api/sql", body, headers)
                answer = connection.getresponse()
                text = answer.read()
                if answer.status == 503:
                    return
                assert answer.status == 200, text
                mine.append(key)
                if len(mine) == ENOUGH:
                    self._enough.wait(WAIT_S)
        except (OSError, http.client.HTTPException):
            return
        finally:
            connection.close()

    def await_load(self) -> None:
        """Until all of them write."""
        self._enough.wait(WAIT_S)

    def acknowledged(self) -> set[int]:
        """What they know to be stored, once the server is gone."""
        for thread in self._threads:
            thread.join(WAIT_S)
        return {key for mine in self._acknowledged for key in mine}


def make_table(data: Path) -> None:
    """A table to write into."""
    with kalamdb.connect(data) as db:
        db.execute("CREATE NAMESPACE app; CREATE TABLE app.t (id BIGINT PRIMARY KEY, text TEXT) WITH (TYPE = 'SHARED')")


def stored(db: Database) -> set[int]:
    """The keys of the table."""
    return {key for (key,) in db.execute("SELECT id FROM app.t").rows}


def test_sigterm_under_load_loses_nothing_that_was_acknowledged_and_ends_with_0(serve: Serve, tmp_path: Path) -> None:
    make_table(tmp_path / "data")
    served = serve(settings=UNLIMITED)
    writers = Writers(served)
    writers.await_load()
    began_s = time.monotonic()
    assert served.stop() == 0
    assert time.monotonic() - began_s < 20
    acknowledged = writers.acknowledged()
    assert len(acknowledged) >= WRITERS * ENOUGH
    with kalamdb.connect(tmp_path / "data") as db:
        assert acknowledged <= stored(db)
        assert len(stored(db)) - len(acknowledged) <= WRITERS
        assert db.check().problems == []
    assert "the server has stopped" in (tmp_path / "data" / "logs" / "server.log").read_text()


def test_sigkill_under_load_and_a_restart_lose_nothing_that_was_acknowledged(serve: Serve, tmp_path: Path) -> None:
    make_table(tmp_path / "data")
    acknowledged: set[int] = set()
    for round_ in range(2):
        served = serve(settings=UNLIMITED)
        writers = Writers(served, round_ * 1_000_000)
        writers.await_load()
        served.kill()
        acknowledged |= writers.acknowledged()
    served = serve()
    assert served.stop() == 0
    with kalamdb.connect(tmp_path / "data") as db:
        assert acknowledged <= stored(db)
        assert db.check().problems == []


def half_a_request(served: Served) -> socket.socket:
    """A request whose body does not come, once the server has begun to receive it."""
    raw = socket.create_connection(("127.0.0.1", served.port), timeout=WAIT_S)
    raw.sendall(
        b"POST /v1/api/sql HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Authorization: Bearer " + served.login().encode() + b"\r\n"
        b"Expect: 100-continue\r\nContent-Length: 100\r\n\r\n"
    )
    assert raw.recv(1000).startswith(b"HTTP/1.1 100 ")
    return raw


def await_refusal(port: int) -> None:
    """Until nobody accepts connections: the server stops."""
    deadline_s = time.monotonic() + WAIT_S
    while time.monotonic() < deadline_s:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=WAIT_S).close()
        except ConnectionRefusedError:
            return
        except ConnectionResetError:
            # It was in the queue of those that are not accepted yet.
            continue
    raise AssertionError("the server still accepts")


def received(raw: socket.socket) -> bytes:
    """All until the other side closes."""
    with raw:
        return b"".join(iter(lambda: raw.recv(65_536), b""))


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_skips_the_wait_for_requests(serve: Serve, second: signal.Signals) -> None:
    served = serve(settings="[shutdown]\nrequests_s = 600")
    raw = half_a_request(served)
    served.process.send_signal(signal.SIGTERM)
    await_refusal(served.port)
    assert served.process.poll() is None
    served.process.send_signal(second)
    answer = received(raw)
    assert answer.startswith(b"HTTP/1.1 503 ") and b"the server stops" in answer
    assert served.process.wait(STOP_TIMEOUT_S) == 0


def test_a_request_that_does_not_finish_is_cancelled_after_its_time(serve: Serve) -> None:
    served = serve(settings="[shutdown]\nrequests_s = 0.3")
    raw = half_a_request(served)
    began_s = time.monotonic()
    assert served.stop() == 0
    assert time.monotonic() - began_s < 10
    assert received(raw).startswith(b"HTTP/1.1 503 ")


def test_a_request_that_began_before_the_signal_is_answered(serve: Serve, tmp_path: Path) -> None:
    make_table(tmp_path / "data")
    served = serve()
    body = json.dumps({"sql": "INSERT INTO app.t (id, text) VALUES (7, 'late')"}).encode().ljust(100)
    raw = half_a_request(served)
    served.process.send_signal(signal.SIGTERM)
    await_refusal(served.port)
    raw.sendall(body)
    answer = received(raw)
    assert answer.startswith(b"HTTP/1.1 200 ") and b"connection: close" in answer
    assert served.process.wait(STOP_TIMEOUT_S) == 0
    with kalamdb.connect(tmp_path / "data") as db:
        assert stored(db) == {7}


def test_a_store_that_refuses_writes_is_not_ready_and_still_alive(serve: Serve, tmp_path: Path) -> None:
    make_table(tmp_path / "data")
    served = serve()
    served.login()
    unlimited = resource.prlimit(served.process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    assert served.sql("INSERT INTO app.t (id, text) VALUES (1, 'x')").status_code >= 400
    answer = served.client.get("/ready")
    assert (answer.status_code, answer.json()["status"]) == (503, "not ready")
    assert "refuses writes" in answer.json()["reason"]
    assert served.client.get("/health").status_code == 200
    assert served.client.get("/v1/api/cluster/health").json()["status"] == "degraded"
    assert "kalamdb_writes_refused 1.0" in served.client.get("/metrics").text
    resource.prlimit(served.process.pid, resource.RLIMIT_FSIZE, unlimited)
    assert served.stop() == 0


def test_other_processes_attach_to_a_served_directory(served: Served) -> None:
    with kalamdb.connect(served.data_dir) as db:
        assert not db.is_holder
        db.execute("CREATE NAMESPACE app; CREATE TABLE app.s (id BIGINT PRIMARY KEY) WITH (TYPE = 'SHARED')")
        db.execute("INSERT INTO app.s (id) VALUES (1)")
        assert served.rows("SELECT id FROM app.s") == [["1"]]


# Starting


def start(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start `kalamdb serve` with these arguments."""
    command = [sys.executable, "-c", "from kalamdb.cli import app; app()", "serve", *arguments]
    return subprocess.Popen(
        command, env={**environment_of_tests(), **(environment or {})}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def environment_of_tests() -> dict[str, str]:
    """That of this process without settings."""
    return {name: value for name, value in os.environ.items() if not name.startswith("KALAMDB_")}


def test_port_0_takes_a_free_one_and_one_line_says_when_requests_may_come(tmp_path: Path) -> None:
    config = tmp_path / "server.toml"
    config.write_text("[cluster]\nnode_id = 3\n[logging]\nlog_to_console = true\n")
    process = start("--data-dir", str(tmp_path / "data"), "--port", "0", "--config", str(config))
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    assert line.startswith(f"KalamDB {kalamdb.__version__} serves {tmp_path / 'data'} on http://127.0.0.1:")
    url = line.rpartition(" ")[2]
    assert httpx.get(f"{url}/ready", trust_env=False).status_code == 200
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=STOP_TIMEOUT_S)
    assert (process.returncode, out) == (0, "")
    assert err.count("cluster.node_id = 3") == 1


def failing(arguments: list[str], prepare: Callable[[], None] = lambda: None) -> str:
    """What a server that cannot start says; it ends with status 1."""
    prepare()
    process = start(*arguments)
    out, err = process.communicate(timeout=STOP_TIMEOUT_S)
    assert (process.returncode, out) == (1, "")
    assert "Traceback" not in err
    return err


def test_a_server_that_cannot_start_says_why_in_a_line(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert "address already in use" in failing(["--data-dir", str(data), "--port", port])
    with kalamdb.connect(data):
        assert f"held by process {os.getpid()}" in failing(["--data-dir", str(data), "--port", "0"])
    with kalamdb.connect(data, share=True):
        assert f"held by process {os.getpid()}, which shares it; stop that one" in failing(
            ["--data-dir", str(data), "--port", "0"]
        )
    config = tmp_path / "server.toml"
    config.write_text("[logging.otlp]\nenabled = true\n[server]\nprot = 1\n")
    assert "did you mean 'server.port'" in failing(["--data-dir", str(data), "--config", str(config)])


def test_tracing_without_its_packages_is_refused_with_the_remedy(tmp_path: Path) -> None:
    config = tmp_path / "server.toml"
    config.write_text("[logging.otlp]\nenabled = true\n")
    said = failing(["--data-dir", str(tmp_path / "data"), "--port", "0", "--config", str(config)])
    assert "install kalamdb[otel]" in said
