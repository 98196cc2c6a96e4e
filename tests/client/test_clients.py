"""Client and AsyncClient over a real server: one set of tests, the awaitable one through a loop of its own."""

from __future__ import annotations

import asyncio
import datetime as dt
import threading
import uuid
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest

import kalamdb
from kalamdb.client import ChangeType
from tests.server.conftest import ROOT_PASSWORD, Served

COLUMNS = (
    "id BIGINT PRIMARY KEY, small SMALLINT, flag BOOLEAN, ratio DOUBLE, price DECIMAL(10, 2), text TEXT, raw BYTES, "
    "doc JSON, at TIMESTAMP, seen DATETIME, day DATE, clock TIME, token UUID, vector EMBEDDING(2)"
)
ROW: dict[str, Any] = {
    "id": 2**53 + 1, "small": -3, "flag": True, "ratio": 0.25, "price": Decimal("12.50"), "text": "it's",
    "raw": b"\0\xff", "doc": {"a": [1, None]}, "at": dt.datetime(2024, 2, 29, 1, 2, 3, 4),
    "seen": dt.datetime(2024, 1, 1, tzinfo=dt.UTC), "day": dt.date(1969, 12, 31),
    "clock": dt.time(23, 59, 59, 999999), "token": uuid.UUID(int=7), "vector": [0.5, -1.0],
}  # fmt: skip


class Driven:
    """An AsyncClient whose calls block, so that one set of tests serves both."""

    def __init__(self, url: str, **given: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.inner = self._run(self._made(url, given))

    async def _made(self, url: str, given: dict[str, Any]) -> kalamdb.AsyncClient:
        return kalamdb.AsyncClient(url, **given)

    def _run(self, call: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result(30)

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            found = self._run(getattr(self.inner, name)(*args, **named))
            return DrivenQuery(found, self._run) if name == "subscribe" else found

        return call

    def stop(self) -> None:
        self._run(self.inner.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


class DrivenQuery:
    def __init__(self, inner: Any, run: Any) -> None:
        self._inner, self._run = inner, run

    def next(self, timeout_s: float) -> Any:
        return self._run(self._inner.next(timeout_s))

    def close(self) -> None:
        self._run(self._inner.close())


@pytest.fixture(params=["Client", "AsyncClient"])
def client(request: pytest.FixtureRequest, shared: Served) -> Iterator[Any]:
    if request.param == "Client":
        with kalamdb.Client(shared.url, user="root", password=ROOT_PASSWORD) as found:
            yield found
        return
    driven = Driven(shared.url, user="root", password=ROOT_PASSWORD)
    yield driven
    driven.stop()


def table(client: Any, name: str, columns: str = COLUMNS) -> str:
    client.execute("CREATE NAMESPACE IF NOT EXISTS c")
    client.execute(f"DROP TABLE IF EXISTS c.{name}")
    client.execute(f"CREATE SHARED TABLE c.{name} ({columns})")
    return f"c.{name}"


def test_values_of_every_type_come_back_as_they_went(client: Any) -> None:
    name = table(client, "every_type")
    assert client.insert(name, [ROW, {**dict.fromkeys(ROW), "id": 1}]) == 2
    names = ", ".join(ROW)
    result = client.execute(f"SELECT {names} FROM {name} ORDER BY id DESC")
    assert result.dicts() == [ROW, {**dict.fromkeys(ROW), "id": 1}]
    assert result.arrow().num_rows == 2 and result.arrow().schema.field("price").type.scale == 2
    marks = ", ".join(f"${at}" for at in range(1, len(ROW) + 1))
    client.execute(f"DELETE FROM {name} WHERE id = $1", [ROW["id"]])
    client.execute(f"INSERT INTO {name} ({names}) VALUES ({marks})", list(ROW.values()))
    assert client.execute(f"SELECT {names} FROM {name} WHERE id = $1", [ROW["id"]]).dicts() == [ROW]
    assert client.execute(f"SELECT text FROM {name} WHERE id = :id", {"id": ROW["id"]}).scalar() == "it's"


def test_errors_are_those_of_the_embedded_database(client: Any) -> None:
    name = table(client, "errors", "id BIGINT PRIMARY KEY, text TEXT NOT NULL")
    client.execute(f"INSERT INTO {name} VALUES (1, 'a')")
    with pytest.raises(kalamdb.InvalidRequest):
        client.execute("SELEC 1")
    with pytest.raises(kalamdb.KalamDbError, match="already exists"):
        client.execute(f"INSERT INTO {name} VALUES (1, 'b')")
    with pytest.raises(kalamdb.InvalidRequest, match="was not given"):
        client.execute(f"SELECT * FROM {name} WHERE text = :gone", {"text": "a"})
    with pytest.raises(kalamdb.NotFound):
        client.get_job("FL-0000000000")


def test_insert_ignores_updates_or_refuses_what_is_there(client: Any) -> None:
    name = table(client, "conflicts", "id BIGINT PRIMARY KEY, text TEXT")
    rows = [{"id": at, "text": f"t{at}"} for at in range(5)]
    assert client.insert(name, rows) == 5
    assert client.insert(name, [{"id": 4, "text": "x"}, {"id": 5, "text": "y"}], on_conflict="ignore") == 1
    client.insert(name, [{"id": 0, "text": "new"}], on_conflict="update")
    assert client.execute(f"SELECT text FROM {name} WHERE id = 0").scalar() == "new"
    with pytest.raises(kalamdb.InvalidRequest):
        client.insert(name, [{"id": 9}, {"text": "z"}])


def test_a_write_with_a_key_happens_once(client: Any) -> None:
    name = table(client, "once", "id BIGINT PRIMARY KEY DEFAULT SNOWFLAKE_ID(), text TEXT")
    key = uuid.uuid4().hex
    for _ in range(2):
        assert client.execute(f"INSERT INTO {name} (text) VALUES ('a')", idempotency_key=key).row_count == 1
    assert client.execute(f"SELECT COUNT(*) FROM {name}").scalar() == 1


def test_a_live_query_gets_what_is_there_and_each_change(client: Any) -> None:
    name = table(client, "live", "id BIGINT PRIMARY KEY, price DECIMAL(8, 2)")
    client.execute(f"INSERT INTO {name} VALUES (1, 1.5)")
    live = client.subscribe(f"SELECT * FROM {name} WHERE price > 1")
    first = live.next(10)
    assert (first.type, first.row["price"]) == (ChangeType.SNAPSHOT, Decimal("1.50"))
    client.execute(f"UPDATE {name} SET price = 2 WHERE id = 1")
    client.execute(f"INSERT INTO {name} VALUES (2, 0.5)")
    client.execute(f"DELETE FROM {name} WHERE id = 1")
    updated, deleted = live.next(10), live.next(10)
    assert (updated.type, updated.row["price"], updated.old_values["price"]) == ("update", Decimal(2), Decimal("1.50"))
    assert (deleted.type, deleted.row, deleted.old_values["id"]) == ("delete", None, 1)
    with pytest.raises(kalamdb.Timeout):
        live.next(0.1)
    live.close()
    with pytest.raises(kalamdb.Closed):
        live.next(1)


def test_a_refused_live_query_says_why(client: Any) -> None:
    with pytest.raises(kalamdb.NotFound):
        client.subscribe("SELECT * FROM c.nowhere").next(10)


def test_a_job_is_made_waited_for_and_read(client: Any) -> None:
    name = table(client, "flushed", "id BIGINT PRIMARY KEY")
    client.execute(f"INSERT INTO {name} VALUES (1)")
    job = client.wait_job(client.create_job("flush", {"table_id": name}), 20)
    assert job["status"] == "completed" and "1 row" in job["message"]


def test_another_users_rows_by_execute_as(client: Any) -> None:
    client.execute("CREATE NAMESPACE IF NOT EXISTS c")
    client.execute("CREATE USER TABLE IF NOT EXISTS c.own (id BIGINT PRIMARY KEY)")
    client.execute("DELETE FROM c.own WHERE id = 1", user="maria")
    client.execute("INSERT INTO c.own VALUES (1)", user="maria")
    result = client.execute("SELECT id FROM c.own", user="maria")
    assert result.rows == [(1,)] and result.as_user == "maria"
    assert client.execute("SELECT id FROM c.own").rows == []


def test_a_client_logs_in_by_itself_and_says_who_it_is(shared: Served) -> None:
    with kalamdb.Client(shared.url) as nobody:
        with pytest.raises(kalamdb.Unauthenticated):
            nobody.execute("SELECT 1")
        with pytest.raises(kalamdb.Unauthenticated):
            nobody.login("root", "wrong")
        assert nobody.login("root", ROOT_PASSWORD)["role"] == "system"
        assert nobody.me()["id"] == "root" and nobody.execute("SELECT 1").scalar() == 1
    with kalamdb.Client("http://127.0.0.1:9", token="t") as lost, pytest.raises(kalamdb.Unavailable, match="reached"):
        lost.execute("SELECT 1")
