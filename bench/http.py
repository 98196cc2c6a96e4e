"""Statements over HTTP beside a bare echo behind the same connection code: `python -m bench.http [--quick]`.

Raw keep-alive sockets, so that the client costs little. The echo reads the body and answers fixed bytes.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count, cycle

import httpx
import msgspec

from bench.harness import Figure, machine, show
from kalamdb.clock import SystemClock

_SECRET = "the secret of the benchmark, longer than 32 characters"
_PASSWORD = "Bench-Secret-1"
_GOAL = 0.35
_ROWS = 200
_clock = SystemClock()


class Wire:
    """One keep-alive connection."""

    def __init__(self, port: int, token: str) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._head = (
            "POST /v1/api/sql HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {token}\r\nContent-Length: "
        ).encode()

    def post(self, body: bytes) -> bytes:
        """The body of the answer. Raises RuntimeError unless it is 200."""
        self._socket.sendall(self._head + b"%d\r\n\r\n" % len(body) + body)
        data = b""
        while b"\r\n\r\n" not in data:
            data += self._receive()
        head, _, rest = data.partition(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        while len(rest) < length:
            rest += self._receive()
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(rest.decode())
        return rest

    def _receive(self) -> bytes:
        found = self._socket.recv(1 << 18)
        if not found:
            raise RuntimeError("the server closed the connection")
        return found

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


@contextmanager
def server(arguments: list[str], environment: dict[str, str]) -> Iterator[int]:
    """A server process; its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    process = subprocess.Popen(
        [*arguments, "--port", str(port)], env={**os.environ, **environment}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _ in range(1500):
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                _clock.wait(threading.Event(), 0.02)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


@contextmanager
def database(durability: str) -> Iterator[tuple[int, str]]:
    """A served database with a table of 200 rows; its port, and a token for it."""
    with tempfile.TemporaryDirectory(prefix="kalamdb-bench-") as folder:
        environment = {
            "KALAMDB_JWT_SECRET": _SECRET, "KALAMDB_STORAGE_DURABILITY": durability,
            "KALAMDB_ROOT_PASSWORD": _PASSWORD, "KALAMDB_AUTH_BCRYPT_COST": "4",
            "KALAMDB_LOGGING_ACCESS_LOG": "false", "KALAMDB_LIMITS_DEFAULT_QUERY_LIMIT": "0",
        }  # fmt: skip
        command = [sys.executable, "-c", "from kalamdb.cli import app; app()", "serve", "--data-dir", folder]
        with server(command, environment) as port:
            token = log_in(port)
            wire = Wire(port, token)
            run(wire, "CREATE NAMESPACE bench")
            run(wire, "CREATE SHARED TABLE bench.t (id BIGINT PRIMARY KEY, name TEXT, score DOUBLE, n INT)")
            run(wire, "CREATE SHARED TABLE bench.read (id BIGINT PRIMARY KEY, name TEXT, score DOUBLE, n INT)")
            rows = ", ".join(f"({id}, 'name {id}', {id}.5, {id})" for id in range(_ROWS))
            run(wire, f"INSERT INTO bench.read VALUES {rows}")
            wire.close()
            yield port, token


@contextmanager
def echo() -> Iterator[int]:
    """The bare echo; its port."""
    with server([sys.executable, "-m", "bench.http", "--echo"], {}) as port:
        yield port


def log_in(port: int) -> str:
    """An access token of root."""
    answer = httpx.post(
        f"http://127.0.0.1:{port}/v1/api/auth/login", json={"user": "root", "password": _PASSWORD}, trust_env=False
    )
    token: str = answer.raise_for_status().json()["access_token"]
    return token


def body(sql: str, *params: object) -> bytes:
    """A request."""
    return msgspec.json.encode({"sql": sql, "params": params} if params else {"sql": sql})


def run(wire: Wire, sql: str) -> bytes:
    """Run one statement."""
    return wire.post(body(sql))


_ids = count(1_000_000)


def _insert() -> bytes:
    return body("INSERT INTO bench.t (id, name, score, n) VALUES ($1, $2, $3, $4)", next(_ids), "a name", 1.5, 7)


def _insert_literals() -> bytes:
    return body(f"INSERT INTO bench.t (id, name, score, n) VALUES ({next(_ids)}, 'a name', 1.5, 7)")


def _insert_50() -> bytes:
    rows = [f"({next(_ids)}, 'a name', 1.5, 7)" for _ in range(50)]
    return body(f"INSERT INTO bench.t VALUES {', '.join(rows)}")


def _ids_of(ids: Iterator[int], text: str) -> Callable[[], bytes]:
    return lambda: body(text, next(ids))


def workloads() -> dict[str, Callable[[], bytes]]:
    """What is measured: name -> the next request."""
    return {
        "INSERT of one row": _insert,
        "INSERT of one row as literals": _insert_literals,
        "INSERT of 50 rows as literals": _insert_50,
        "SELECT by key": _ids_of(cycle(range(_ROWS)), "SELECT * FROM bench.read WHERE id = $1"),
        "SELECT of 200 rows": lambda: body("SELECT * FROM bench.read"),
        "UPDATE by key": _ids_of(count(1_000_000), "UPDATE bench.t SET score = 2.5 WHERE id = $1"),
        "DELETE by key": _ids_of(count(1_000_000), "DELETE FROM bench.t WHERE id = $1"),
    }


def rate(port: int, token: str, make: Callable[[], bytes], connections: int, seconds: float) -> float:
    """Requests a second over so many connections. Raises RuntimeError when one fails."""
    wires = [Wire(port, token) for _ in range(connections)]
    start = time.perf_counter()

    def work(wire: Wire) -> int:
        done = 0
        while time.perf_counter() - start < seconds:
            wire.post(make())
            done += 1
        return done

    with ThreadPoolExecutor(connections) as pool:
        done = sum(pool.map(work, wires))
    taken = time.perf_counter() - start
    for wire in wires:
        wire.close()
    return done / taken


_ECHOED = body("INSERT INTO bench.t (id, name, score, n) VALUES ($1, $2, $3, $4)", 1, "a name", 1.5, 7)


def compare(durability: str, seconds: float) -> Iterator[Figure]:
    """Each workload with 1 and 10 connections; the echo is measured right before it."""
    with database(durability) as (port, token), echo() as other:
        for name, make in workloads().items():
            for connections in (1, 10):
                bare = rate(other, token, lambda: _ECHOED, connections, seconds)
                ours = rate(port, token, make, connections, seconds)
                aimed = durability == "commit" and connections == 10 and make is _insert
                yield Figure(
                    f"{name}, {connections} connection{'s' * (connections > 1)}, durability {durability}",
                    f"{ours:,.0f}/s", f"{bare:,.0f}/s", ours / bare, f"goal {_GOAL}" if aimed else "",
                    ours / bare >= _GOAL if aimed else None,
                )  # fmt: skip


async def _echo(scope: dict[str, object], receive: Callable[[], object], send: Callable[[object], object]) -> None:
    while (await receive()).get("more_body"):  # type: ignore[misc, attr-defined]
        pass
    answer = b'{"status":"success","results":[{"row_count":1,"message":"Inserted 1 row(s)","as_user":"root"}]}'
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})  # type: ignore[misc]
    await send({"type": "http.response.body", "body": answer})  # type: ignore[misc]


def serve_echo(port: int) -> None:
    """Answer each request with the same bytes, behind the connection code of the server."""
    import uvloop

    from kalamdb.config import Settings
    from kalamdb.server.guards import Guards
    from kalamdb.server.listener import Listener, connection_limits
    from kalamdb.server.protocol import Door

    async def serve() -> None:
        settings = Settings.load({})
        guards = Guards(settings, SystemClock())
        door = Door(connection_limits(settings), is_exempt=guards.is_exempt, banned_s=guards.banned_s)
        await Listener(_echo, door, settings, SystemClock(), host="127.0.0.1", port=port).start()  # type: ignore[arg-type]
        await asyncio.Event().wait()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())


def main(quick: bool) -> bool:
    """Measure both durabilities; whether the goal is met."""
    seconds = 0.7 if quick else 3.0
    return all(
        [
            show(f"HTTP on {machine()}; peer: a bare echo; ratio of rates", compare(durability, seconds))
            for durability in ("commit", "os")
        ]
    )


if __name__ == "__main__":
    if "--echo" in sys.argv:
        serve_echo(int(sys.argv[-1]))
    else:
        sys.exit(0 if main("--quick" in sys.argv) else 1)

__all__ = ["compare", "main"]
