"""Idempotency-Key: the same request again is answered as the first time, without running; also after a restart."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.server.conftest import Served
from tests.server.sql_client import enter


@pytest.fixture
def app(served: Served) -> Served:
    enter(served, {"alice": "user", "bob": "user"})
    served.rows("CREATE TABLE app.t (id BIGINT PRIMARY KEY DEFAULT SNOWFLAKE_ID(), n INT) WITH (TYPE = 'USER')")
    return served


def send(app: Served, text: str, key: str, user: str = "alice") -> httpx.Response:
    headers = {"Authorization": f"Bearer {app.login(user)}", "Idempotency-Key": key}
    return app.client.post("/v1/api/sql", json={"sql": text}, headers=headers)


def same(first: httpx.Response, again: httpx.Response) -> bool:
    one, other = first.json(), again.json()
    one.pop("took"), other.pop("took")
    return first.status_code == again.status_code and one == other and again.headers["idempotency-replayed"] == "true"


def test_a_write_sent_again_is_not_run_again_and_answered_alike(app: Served) -> None:
    insert = "INSERT INTO app.t (n) VALUES (1) RETURNING id"
    first = send(app, insert, "k1")
    assert first.status_code == 200 and "idempotency-replayed" not in first.headers
    assert same(first, send(app, insert, "k1"))
    assert app.rows("SELECT COUNT(*) FROM app.t", user="alice") == [["1"]]
    assert send(app, insert, "k2").json()["results"] != first.json()["results"]
    assert send(app, insert, "k1", "bob").status_code == 200, "keys belong to their user"
    assert app.rows("SELECT COUNT(*) FROM app.t", user="bob") == [["1"]]


def test_a_batch_an_error_and_ddl_are_remembered_too(app: Served) -> None:
    for text, key, user in (
        ("INSERT INTO app.t VALUES (1, 1); UPDATE app.t SET n = n + 1 WHERE id = 1", "batch", "alice"),
        ("INSERT INTO app.t VALUES (1, 1)", "twice", "alice"),
        ("CREATE TABLE app.u (id BIGINT PRIMARY KEY)", "ddl", "root"),
        ("BEGIN; INSERT INTO app.t VALUES (7, 7); COMMIT", "transaction", "alice"),
        ("CREATE STREAM TABLE app.s (id INT) WITH (TTL_SECONDS = 60); INSERT INTO app.s VALUES (1)", "stream", "alice"),
    ):
        first = send(app, text, key, user)
        assert first.status_code == (400 if key == "twice" else 200), first.text
        assert same(first, send(app, text, key, user)), key
    assert app.rows("SELECT id, n FROM app.t", user="alice") == [["1", 2], ["7", 7]]
    assert app.rows("SELECT COUNT(*) FROM app.s", user="alice") == [["1"]]


def test_the_same_key_with_another_body_is_refused_and_reads_need_none(app: Served) -> None:
    assert send(app, "INSERT INTO app.t VALUES (1, 1)", "k").status_code == 200
    other = send(app, "INSERT INTO app.t VALUES (2, 2)", "k")
    assert other.status_code == 409 and other.json()["error"]["code"] == "IDEMPOTENCY_CONFLICT"
    assert send(app, "SELECT 1", "k").status_code == 200
    assert send(app, "INSERT INTO app.t VALUES (3, 3)", "").status_code == 400
    assert send(app, "INSERT INTO app.t VALUES (3, 3)", "x" * 256).status_code == 400


def test_of_many_at_a_time_one_runs(app: Served) -> None:
    text = "INSERT INTO app.t (n) VALUES (1)"
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: send(app, text, "same"), range(16)))
    assert {answer.status_code for answer in answers} <= {200, 409}
    assert sum(answer.status_code == 200 and "idempotency-replayed" not in answer.headers for answer in answers) == 1
    assert app.rows("SELECT COUNT(*) FROM app.t", user="alice") == [["1"]]


def test_a_kill_right_after_the_answer_does_not_forget_it(app: Served, serve: Any) -> None:
    text = "INSERT INTO app.t (n) VALUES (1) RETURNING id"
    first = send(app, text, "k")
    app.kill()
    again = serve()
    again.tokens.update(app.tokens)
    assert same(first, send(again, text, "k"))
    assert again.rows("SELECT COUNT(*) FROM app.t", user="alice") == [["1"]]
