"""A real server process on a free port of 127.0.0.1, with ways to talk to it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT_PASSWORD = "Root-Secret-1"
JWT_SECRET = "a secret of the tests that has more than the 64 characters of the longest hash"
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 40.0
ENVIRONMENT = {
    "KALAMDB_ROOT_PASSWORD": ROOT_PASSWORD,
    "KALAMDB_JWT_SECRET": JWT_SECRET,
    "KALAMDB_AUTH_BCRYPT_COST": "4",
    "KALAMDB_FLUSH_SCHEDULER_ENABLED": "false",
    "KALAMDB_COMPACTION_ENABLED": "false",
}


@dataclass
class Served:
    """A running server. Only `stop` and `kill` end it, by its own process id."""

    process: subprocess.Popen[bytes]
    port: int
    data_dir: Path
    log: Path
    client: httpx.Client
    tokens: dict[str, str] = field(default_factory=dict)
    """Access tokens by user, made by `login`."""

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def login(self, user: str = "root", password: str = ROOT_PASSWORD) -> str:
        """An access token; logs in once per user."""
        if user not in self.tokens:
            answer = self.client.post("/v1/api/auth/login", json={"user": user, "password": password})
            assert answer.status_code == 200, answer.text
            self.tokens[user] = answer.json()["access_token"]
        return self.tokens[user]

    def add_user(self, user: str, role: str = "user", password: str = "Secret-of-1") -> str:
        """Make a user; an access token of it."""
        answer = self.sql(f"CREATE USER '{user}' WITH PASSWORD '{password}' ROLE {role}")
        assert answer.status_code == 200, answer.text
        return self.login(user, password)

    def sql(self, text: str, params: list[Any] | None = None, *, user: str = "root", **body: Any) -> httpx.Response:
        """The answer of POST /v1/api/sql to a user that has logged in."""
        if params is not None:
            body["params"] = params
        headers = {"Authorization": f"Bearer {self.login(user)}"}
        return self.client.post("/v1/api/sql", json={"sql": text, **body}, headers=headers)

    def rows(self, text: str, params: list[Any] | None = None, *, user: str = "root") -> list[list[Any]]:
        """The rows of a statement that must succeed."""
        answer = self.sql(text, params, user=user)
        assert answer.status_code == 200, answer.text
        rows: list[list[Any]] = answer.json()["results"][-1].get("rows", [])
        return rows

    def stop(self) -> int:
        """End it by SIGTERM; its exit status."""
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_TIMEOUT_S)

    def kill(self) -> None:
        """End it by SIGKILL."""
        self.client.close()
        self.process.kill()
        self.process.wait(STOP_TIMEOUT_S)


Serve = Callable[..., Served]


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _launch(data_dir: Path, log: Path, environment: dict[str, str], config: Path | None) -> Served:
    port = free_port()
    command = [sys.executable, "-c", "from kalamdb.cli import app; app()", "serve"]
    command += ["--data-dir", str(data_dir), "--port", str(port)]
    if config is not None:
        command += ["--config", str(config)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("KALAMDB_")}
    with log.open("ab") as out:
        process = subprocess.Popen(command, env={**clean, **environment}, stdout=out, stderr=subprocess.STDOUT)
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30.0, trust_env=False)
    return Served(process, port, data_dir, log, client)


def _wait_until_healthy(served: Served) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            if served.client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        if served.process.poll() is not None or time.monotonic() > deadline_s:
            served.kill()
            raise AssertionError(f"the server did not start: {served.log.read_text(errors='replace')[-4000:]}")
        time.sleep(0.02)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts servers that are stopped at the end: `serve(data=..., environment={...}, settings="TOML text")`.

    The same `data` again is a restart over the same directory. A variable given as None is not set.
    """
    started: list[Served] = []

    def start(
        data: str = "data", *, environment: dict[str, str | None] | None = None, settings: str | None = None
    ) -> Served:
        config = None
        if settings is not None:
            config = tmp_path / f"{data}-{len(started)}.toml"
            config.write_text(settings)
        wanted = {**ENVIRONMENT, **(environment or {})}
        given = {name: value for name, value in wanted.items() if value is not None}
        served = _launch(tmp_path / data, tmp_path / f"{data}.log", given, config)
        started.append(served)
        _wait_until_healthy(served)
        return served

    yield start
    for served in started:
        served.client.close()
        if served.process.poll() is None:
            served.stop()


@pytest.fixture
def served(serve: Serve) -> Served:
    """One server over an empty directory."""
    return serve()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for all tests of a module that leave nothing behind which another of them could see."""
    folder = tmp_path_factory.mktemp("shared")
    server = _launch(folder / "data", folder / "data.log", ENVIRONMENT, None)
    _wait_until_healthy(server)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def unset_shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """As `shared`, but root has no password."""
    folder = tmp_path_factory.mktemp("unset")
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "KALAMDB_ROOT_PASSWORD"}
    server = _launch(folder / "data", folder / "data.log", environment, None)
    _wait_until_healthy(server)
    yield server
    server.stop()
