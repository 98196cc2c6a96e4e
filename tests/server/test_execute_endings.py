"""How statements are ended before they are done: deadline, KILL QUERY, a lost client, a full queue, a stop."""

from __future__ import annotations

import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.conftest import Served
from tests.server.sql_client import enter

ENDLESS = {
    "series": "SELECT COUNT(*) FROM generate_series(1, 1000000) a CROSS JOIN generate_series(1, 1000000) b",
    "filtered": "SELECT SUM(a.value) FROM generate_series(1,1000000) a JOIN generate_series(1,1000000) b "
    "ON a.value + b.value < 0",
    "recursive": "WITH RECURSIVE r AS (SELECT 1 AS n UNION ALL SELECT n FROM r) SELECT COUNT(*) FROM r",
    "tables": "SELECT COUNT(*) FROM app.n a, app.n b, app.n c, app.n d WHERE a.k + b.k + c.k + d.k < 0",
    "equal": "SELECT COUNT(*) FROM app.n a JOIN app.n b ON a.k = b.k JOIN app.n c ON a.k = c.k "
    "JOIN app.n d ON d.k = a.k",
    "exists": "SELECT COUNT(*) FROM app.n a WHERE EXISTS (SELECT 1 FROM app.n b, app.n c, app.n d "
    "WHERE a.id + b.id + c.id + d.id < 0)",
    "sorted": "SELECT a.id FROM app.n a, app.n b, app.n c ORDER BY a.id * b.id * c.id LIMIT 1",
}


def with_numbers(served: Served, rows: int = 3000) -> Served:
    app = enter(served, {"alice": "user", "bob": "user"})
    app.rows("CREATE TABLE app.n (id BIGINT PRIMARY KEY, k INT) WITH (TYPE = 'SHARED', ACCESS_LEVEL = 'PUBLIC')")
    app.rows(f"INSERT INTO app.n VALUES {', '.join(f'({at}, 1)' for at in range(rows))}")
    return app


def cpu_s(pid: int) -> float:
    """CPU seconds of a process and its living children."""
    pids = [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    ticks = 0
    for one in pids:
        fields = Path(f"/proc/{one}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def running(app: Served) -> list[list[Any]]:
    return [
        row
        for row in app.rows(
            "SELECT query_id, user_id, state, sql FROM system.queries WHERE state IN ('queued', 'running')"
        )
        if "system.queries" not in row[3]
    ]


def wait_for(condition: Any, what: str, timeout_s: float = 20.0) -> Any:
    deadline_s = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline_s, what
        time.sleep(0.02)
    return found


@pytest.mark.timeout(180)
def test_endless_queries_end_at_their_deadline_and_the_cpu_is_free_soon_after(serve: Any) -> None:
    app = with_numbers(serve(settings="[execution]\nhandler_timeout_seconds = 2.0\n"))
    for name, text in ENDLESS.items():
        began = time.monotonic()
        answer = app.sql(text, user="alice")
        took = time.monotonic() - began
        assert answer.status_code == 400, (name, answer.text)
        assert "handler_timeout_seconds" in answer.json()["error"]["message"], name
        assert took < 4.0, (name, took)
        time.sleep(2.0)
        before = cpu_s(app.process.pid)
        time.sleep(1.0)
        assert cpu_s(app.process.pid) - before < 0.5, name
        assert not running(app), name


@pytest.mark.timeout(60)
def test_a_query_is_listed_and_killed_by_an_administrator_only(serve: Any) -> None:
    app = with_numbers(serve())
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(app.sql, ENDLESS["series"], user="alice")
        [[query_id, user, _, text]] = wait_for(lambda: running(app), "the query is not listed")
        assert user == "alice" and text == ENDLESS["series"]
        refused = app.sql(f"KILL QUERY '{query_id}'", user="bob")
        assert refused.status_code == 403
        killed = app.sql(f"KILL QUERY '{query_id}'").json()["results"][0]
        assert query_id in killed["message"]
        answer = sent.result(10)
    assert answer.status_code == 400 and "KILL QUERY by 'root'" in answer.json()["error"]["message"]
    assert not running(app)
    gone = app.sql(f"KILL QUERY '{query_id}'")
    assert gone.status_code == 400 and "does not run" in gone.json()["error"]["message"]


@pytest.mark.timeout(60)
def test_a_query_ends_when_its_client_goes_away(serve: Any) -> None:
    app = with_numbers(serve())
    with socket.create_connection(("127.0.0.1", app.port)) as raw:
        body = b'{"sql": "%b"}' % ENDLESS["series"].encode()
        head = f"POST /v1/api/sql HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {app.tokens['alice']}\r\n"
        raw.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        wait_for(lambda: [row for row in running(app) if row[2] == "running"], "the query does not run")
    wait_for(lambda: not running(app), "the query runs on", 3.0)


@pytest.mark.timeout(60)
def test_one_user_leaves_half_of_the_threads_to_others_and_waits_for_its_turn(serve: Any) -> None:
    app = with_numbers(serve(settings="[execution]\nquery_threads = 2\nqueue_wait_s = 1.0\nqueue_max = 2\n"))
    with ThreadPoolExecutor(4) as pool:
        sent = pool.submit(app.sql, ENDLESS["series"], user="alice")
        wait_for(lambda: [row for row in running(app) if row[1] == "alice"], "the query is not listed")
        assert app.rows("SELECT COUNT(*) FROM app.n", user="bob") == [["3000"]]
        waited = app.sql("SELECT COUNT(*) FROM app.n", user="alice")
        assert waited.status_code == 429 and waited.json()["error"]["code"] == "RATE_LIMIT_EXCEEDED"
        assert int(waited.headers["retry-after"]) >= 1
        assert app.rows("SELECT * FROM app.n WHERE id = 7", user="alice")[0][0] == "7", "by key it needs no thread"
        for query in running(app):
            app.rows(f"KILL QUERY '{query[0]}'")
        assert sent.result(10).status_code == 400


@pytest.mark.timeout(60)
def test_a_stop_ends_what_runs_and_answers_it(serve: Any) -> None:
    app = with_numbers(serve(settings="[shutdown]\nrequests_s = 0.5\n"))
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(_post, app)
        wait_for(lambda: running(app), "the query is not listed")
        began = time.monotonic()
        assert app.stop() == 0
        assert time.monotonic() - began < 15
        assert sent.result(10) in (400, 503, 0)


def _post(app: Served) -> int:
    headers = {"Authorization": f"Bearer {app.tokens['alice']}"}
    try:
        return httpx.post(
            f"{app.url}/v1/api/sql", json={"sql": ENDLESS["series"]}, headers=headers, timeout=30
        ).status_code
    except httpx.TransportError:
        return 0


@pytest.mark.timeout(120)
def test_no_acknowledged_write_is_lost_by_a_kill(serve: Any) -> None:
    app = enter(serve())
    app.rows("CREATE TABLE app.t (id BIGINT PRIMARY KEY)")
    acknowledged: list[int] = []
    stop = threading.Event()

    def write(start: int) -> None:
        headers = {"Authorization": f"Bearer {app.tokens['root']}"}
        with httpx.Client(base_url=app.url, headers=headers, trust_env=False) as client:
            for at in range(start, start + 100_000):
                if stop.is_set():
                    return
                try:
                    answer = client.post("/v1/api/sql", json={"sql": f"INSERT INTO app.t VALUES ({at})"})
                except httpx.TransportError:
                    return
                if answer.status_code == 200:
                    acknowledged.append(at)

    writers = [threading.Thread(target=write, args=(number * 1_000_000,)) for number in range(4)]
    for writer in writers:
        writer.start()
    wait_for(lambda: len(acknowledged) > 200, "nothing is written")
    app.kill()
    stop.set()
    for writer in writers:
        writer.join()
    again = serve()
    again.tokens.update(app.tokens)
    found = set()
    for number in range(4):
        low = number * 1_000_000
        text = f"SELECT id FROM app.t WHERE id >= {low} AND id < {low + 1_000_000} ORDER BY id LIMIT 1000"
        found |= {int(row[0]) for row in again.rows(text)}
    assert set(acknowledged) <= found
