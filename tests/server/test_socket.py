"""The WebSocket of live queries, over a real server process, message by message."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.server.conftest import Served

BATCH = {"batch_num": 0, "has_more": False, "status": "ready"}


class Socket:
    """A connection that speaks the protocol."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection

    def send(self, **message: Any) -> None:
        self.connection.send(json.dumps(message))

    def receive(self, timeout_s: float = 10) -> dict[str, Any]:
        frame = self.connection.recv(timeout=timeout_s)
        return json.loads(gzip.decompress(frame) if isinstance(frame, bytes) else frame)

    def authenticate(self, token: str, **protocol: str) -> dict[str, Any]:
        given = {"protocol": protocol} if protocol else {}
        self.send(type="authenticate", method="jwt", token=token, **given)
        return self.receive()

    def subscribe(self, id: str, sql: str, **options: Any) -> dict[str, Any]:
        self.send(type="subscribe", subscription={"id": id, "sql": sql, **options})
        return self.receive()

    def is_quiet(self) -> bool:
        try:
            self.receive(0.2)
        except TimeoutError:
            return True
        return False


@contextmanager
def opened(served: Served, query: str = "", **given: Any) -> Iterator[Socket]:
    url = served.url.replace("http", "ws") + "/v1/ws" + query
    with connect(url, compression=None, **given) as connection:
        yield Socket(connection)


@contextmanager
def authenticated(served: Served, user: str = "root", **protocol: str) -> Iterator[Socket]:
    with opened(served) as socket:
        assert socket.authenticate(served.login(user), **protocol)["type"] == "auth_success"
        yield socket


def table(served: Served, name: str, kind: str = "SHARED", options: str = "") -> str:
    served.sql("CREATE NAMESPACE IF NOT EXISTS ws")
    columns = "id BIGINT PRIMARY KEY, text TEXT, price DECIMAL(8, 2)"
    answer = served.sql(f"CREATE {kind} TABLE ws.{name} ({columns}) {options}")
    assert answer.status_code == 200, answer.text
    return f"ws.{name}"


def test_authentication_names_the_user_and_what_was_agreed(shared: Served) -> None:
    with opened(shared) as socket:
        assert socket.authenticate(shared.login(), serialization="json", compression="none") == {
            "type": "auth_success", "user": "root", "role": "system",
            "protocol": {"serialization": "json", "compression": "none"},
        }  # fmt: skip
        assert socket.authenticate(shared.login())["type"] == "auth_success"


def test_a_client_without_protocol_gets_json_and_gzip(shared: Served) -> None:
    with opened(shared) as socket:
        assert socket.authenticate(shared.login())["protocol"] == {"serialization": "json", "compression": "gzip"}
    with opened(shared, "?compress=false") as socket:
        assert socket.authenticate(shared.login())["protocol"]["compression"] == "none"


def test_a_header_authenticates_at_once_and_the_query_is_heard(shared: Served) -> None:
    headers = {"Authorization": f"Bearer {shared.login()}"}
    with opened(shared, "?serialization=msgpack&compression=none", additional_headers=headers) as socket:
        first = json.loads(socket.connection.recv(timeout=5))
        assert first["protocol"] == {"serialization": "msgpack", "compression": "none"}
        name = table(shared, "packed")
        wanted = {"type": "subscribe", "subscription": {"id": "m", "sql": f"SELECT * FROM {name}"}}
        socket.connection.send(msgspec.msgpack.encode(wanted))
        assert msgspec.msgpack.decode(socket.connection.recv(timeout=5))["type"] == "subscription_ack"
        shared.sql(f"INSERT INTO {name} VALUES (1, 'a', 2)")
        change = msgspec.msgpack.decode(socket.connection.recv(timeout=5))
        assert (change["subscription_id"], change["change_type"]) == ("m", "insert")
        assert change["rows"][0]["price"] == "2.00"


def test_a_wrong_token_is_told_and_the_socket_closed(shared: Served) -> None:
    with opened(shared) as socket:
        assert socket.authenticate("nonsense")["type"] == "auth_error"
        with pytest.raises(ConnectionClosed):
            socket.receive()


def test_nothing_but_authentication_comes_first(shared: Served) -> None:
    with opened(shared) as socket:
        found = socket.subscribe("s", "SELECT * FROM ws.t")
        assert (found["type"], found["subscription_id"], found["code"]) == ("error", "subscribe", "AUTH_REQUIRED")


def test_who_does_not_authenticate_in_time_is_told_why(shared: Served) -> None:
    with opened(shared) as socket:
        assert socket.receive(8) == {
            "type": "auth_error",
            "message": "Authentication timeout - no auth message received within 3 seconds",
        }
        with pytest.raises(ConnectionClosed):
            socket.receive()


def test_an_origin_that_is_not_listed_is_refused(shared: Served) -> None:
    with pytest.raises(InvalidStatus) as refused, opened(shared, origin="https://evil.example"):
        pass
    assert refused.value.response.status_code == 403
    with opened(shared, origin=shared.url):
        pass


def test_without_options_only_changes_come(shared: Served) -> None:
    name = table(shared, "plain")
    shared.sql(f"INSERT INTO {name} VALUES (1, 'old', 1)")
    with authenticated(shared) as socket:
        ack = socket.subscribe("s1", f"SELECT * FROM {name}")
        assert ack["batch_control"] == BATCH and ack["total_rows"] == 0
        assert [field["name"] for field in ack["schema"]] == ["id", "text", "price", "_seq", "_deleted"]
        assert ack["schema"][0] == {"name": "id", "data_type": "BigInt", "index": 0, "flags": ["nn", "pk", "uq"]}
        shared.sql(f"INSERT INTO {name} VALUES (2, 'new', NULL)")
        inserted = socket.receive()
        assert inserted["change_type"] == "insert" and "old_values" not in inserted
        row = inserted["rows"][0]
        assert (row["id"], row["text"], row["price"], row["_deleted"]) == ("2", "new", None, False)
        shared.sql(f"UPDATE {name} SET text = 'newer' WHERE id = 2")
        updated = socket.receive()
        assert updated["rows"][0].keys() == {"id", "text", "_seq"} and updated["rows"][0]["text"] == "newer"
        assert updated["old_values"][0].keys() == {"id", "_seq", "text"} and updated["old_values"][0]["text"] == "new"
        shared.sql(f"UPDATE {name} SET text = 'newer' WHERE id = 2")
        shared.sql(f"DELETE FROM {name} WHERE id = 2")
        deleted = socket.receive()
        assert deleted["change_type"] == "delete" and "rows" not in deleted
        assert deleted["old_values"][0]["_deleted"] is True and deleted["old_values"][0]["text"] == "newer"


def test_a_snapshot_comes_in_pages_when_they_are_asked_for_and_changes_follow(shared: Served) -> None:
    name = table(shared, "pages")
    shared.sql(f"INSERT INTO {name} VALUES " + ", ".join(f"({at}, 't{at}', {at})" for at in range(25)))
    with authenticated(shared) as socket:
        ack = socket.subscribe("s", f"SELECT id FROM {name} WHERE id >= 5", options={"batch_size": 8})
        assert ack["batch_control"]["status"] == "loading" and ack["batch_control"]["has_more"]
        found, seen = socket.receive(), []
        while True:
            seen.append((found["batch_control"]["batch_num"], found["batch_control"]["status"], len(found["rows"])))
            if not found["batch_control"]["has_more"]:
                break
            shared.sql(f"INSERT INTO {name} VALUES ({100 + len(seen)}, 'during', 0)")
            socket.send(type="next_batch", subscription_id="s", last_seq_id=found["batch_control"]["last_seq_id"])
            found = socket.receive()
        assert seen[0] == (0, "loading", 8) and seen[-1][1] == "ready"
        assert sum(rows for _, _, rows in seen) + len(list(drain(socket))) == 20 + len(seen) - 1
        shared.sql(f"DELETE FROM {name} WHERE id = 7")
        assert socket.receive()["old_values"][0]["id"] == "7"


def drain(socket: Socket) -> Iterator[dict[str, Any]]:
    """What comes until nothing does."""
    while True:
        try:
            yield socket.receive(0.3)
        except TimeoutError:
            return


def test_the_newest_rows_come_in_one_batch_and_too_many_are_unsupported(shared: Served) -> None:
    name = table(shared, "newest")
    shared.sql(f"INSERT INTO {name} VALUES " + ", ".join(f"({at}, 't', 0)" for at in range(9)))
    with authenticated(shared) as socket:
        socket.subscribe("s", f"SELECT id FROM {name}", options={"last_rows": 3})
        batch = socket.receive()
        assert [row["id"] for row in batch["rows"]] == ["6", "7", "8"] and not batch["batch_control"]["has_more"]
        assert socket.subscribe("t", f"SELECT id FROM {name}", options={"last_rows": 1001})["code"] == "UNSUPPORTED"


def test_a_resumed_subscription_gets_newest_versions_and_deletions(shared: Served) -> None:
    name = table(shared, "resumed")
    shared.sql(f"INSERT INTO {name} VALUES (1, 'a', 0), (2, 'b', 0), (3, 'c', 0)")
    with authenticated(shared) as socket:
        socket.subscribe("s", f"SELECT * FROM {name}", options={})
        last = max(int(row["_seq"]) for row in socket.receive()["rows"])
    shared.sql(f"UPDATE {name} SET text = 'b2' WHERE id = 2")
    shared.sql(f"UPDATE {name} SET text = 'b3' WHERE id = 2")
    shared.sql(f"DELETE FROM {name} WHERE id = 3")
    for spelling in ("from", "from_seq_id"):
        with authenticated(shared) as socket:
            ack = socket.subscribe("s", f"SELECT * FROM {name}", options={spelling: str(last)})
            assert ack["resumed"] is True
            assert [(row["id"], row["text"]) for row in socket.receive()["rows"]] == [("2", "b3")]
            gone = socket.receive()
            assert (gone["change_type"], gone["old_values"][0]["id"]) == ("delete", "3")


def test_long_payloads_are_packed_when_that_was_agreed(shared: Served) -> None:
    name = table(shared, "long")
    with authenticated(shared, serialization="json", compression="gzip") as socket:
        socket.subscribe("s", f"SELECT * FROM {name}")
        shared.sql(f"INSERT INTO {name} VALUES (1, '{'x' * 2000}', 0)")
        frame = socket.connection.recv(timeout=5)
        assert isinstance(frame, bytes) and len(frame) < 500
        change = json.loads(gzip.decompress(frame))
        assert change["rows"][0]["text"] == "x" * 2000 and change["subscription_id"] == "s"
    with authenticated(shared, serialization="json", compression="none") as socket:
        socket.subscribe("s", f"SELECT * FROM {name}", options={})
        assert isinstance(socket.connection.recv(timeout=5), str)


def test_an_unsubscribed_query_is_quiet_and_gone_from_system_live(shared: Served) -> None:
    name = table(shared, "gone")
    with authenticated(shared) as socket:
        socket.subscribe("quiet-one", f"SELECT * FROM {name}")
        listed = "SELECT live_id FROM system.live WHERE subscription_id = 'quiet-one'"
        assert shared.rows(listed)[0][0].startswith("root-")
        socket.send(type="unsubscribe", subscription_id="quiet-one")
        socket.send(type="ping")
        shared.sql(f"INSERT INTO {name} VALUES (1, 'a', 0)")
        assert socket.is_quiet() and shared.rows(listed) == []


def test_kill_live_query_ends_a_subscription_with_a_message(shared: Served) -> None:
    name = table(shared, "killed")
    with authenticated(shared) as socket:
        socket.subscribe("victim", f"SELECT * FROM {name}")
        live_id = shared.rows("SELECT live_id FROM system.live WHERE subscription_id = 'victim'")[0][0]
        assert shared.sql(f"KILL LIVE QUERY '{live_id}'").status_code == 200
        assert socket.receive()["subscription_id"] == "victim"


@pytest.mark.parametrize(
    "sql, code",
    [
        ("SELECT * FROM ws.nowhere", "NOT_FOUND"),
        ("SELECT COUNT(*) FROM ws.refused", "INVALID_SQL"),
        ("SELECT * FROM ws.refused LIMIT 3", "INVALID_SQL"),
        ("SELECT * FROM ws.refused JOIN ws.refused b ON TRUE", "INVALID_SQL"),
        ("SELECT DISTINCT id FROM ws.refused", "INVALID_SQL"),
        ("SELECT _seq FROM ws.refused", "INVALID_SQL"),
        ("DELETE FROM ws.refused", "INVALID_SQL"),
        ("not sql", "INVALID_SQL"),
        ("SELECT * FROM system.users", "UNAUTHORIZED"),
    ],
)
def test_what_cannot_be_subscribed_is_told_with_its_code(shared: Served, sql: str, code: str) -> None:
    served_has_refused(shared)
    with authenticated(shared) as socket:
        assert socket.subscribe("s", sql, options={})["code"] == code


def served_has_refused(served: Served) -> None:
    if not served.rows("SELECT table_name FROM system.tables WHERE table_name = 'refused'"):
        table(served, "refused")


def test_an_order_is_accepted_and_a_comment_too(shared: Served) -> None:
    served_has_refused(shared)
    with authenticated(shared) as socket:
        sql = "SELECT * FROM ws.refused ORDER BY id -- newest"
        assert socket.subscribe("s", sql)["type"] == "subscription_ack"


def test_bad_messages_are_told_and_what_is_no_json_closes(shared: Served) -> None:
    with authenticated(shared) as socket:
        socket.send(type="dance")
        assert socket.receive()["code"] == "PROTOCOL"
        assert socket.subscribe("", "SELECT 1")["code"] == "INVALID_SUBSCRIPTION_ID"
        socket.connection.send(b"binary")
        assert socket.receive()["code"] == "UNSUPPORTED_DATA"
        socket.connection.send("{not json")
        with pytest.raises(ConnectionClosed) as closed:
            socket.receive()
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1007


def test_a_user_may_hold_ten_subscriptions(shared: Served) -> None:
    name = table(shared, "many")
    shared.add_user("holder", role="service")
    with authenticated(shared, "holder") as socket:
        for at in range(10):
            assert socket.subscribe(f"s{at}", f"SELECT * FROM {name}")["type"] == "subscription_ack"
        assert socket.subscribe("s10", f"SELECT * FROM {name}")["code"] == "SUBSCRIPTION_LIMIT_EXCEEDED"


def test_rows_of_a_user_table_reach_their_owner_only(shared: Served) -> None:
    name = table(shared, "own", "USER")
    for user in ("olga", "pete"):
        shared.add_user(user)
    with authenticated(shared, "olga") as olga, authenticated(shared, "pete") as pete:
        for socket in (olga, pete):
            socket.subscribe("s", f"SELECT * FROM {name}", options={})
            assert socket.receive()["rows"] == []
        shared.sql(f"INSERT INTO {name} VALUES (1, 'olga', 0)", user="olga")
        assert olga.receive()["rows"][0]["text"] == "olga" and pete.is_quiet()


@pytest.mark.parametrize(
    "change, undo",
    [
        ("ALTER USER rights SET ROLE service", "ALTER USER rights SET ROLE user"),
        ("ALTER USER rights SET PASSWORD 'Another-secret-1'", "ALTER USER rights SET PASSWORD 'Secret-of-1'"),
        ("ALTER TABLE ws.public SET ACCESS LEVEL private", "ALTER TABLE ws.public SET ACCESS LEVEL public"),
        ("DROP USER rights", "RESTORE USER rights"),
        ("DROP TABLE ws.public", ""),
    ],
)
def test_what_takes_a_right_away_ends_the_subscription(shared: Served, change: str, undo: str) -> None:
    if not shared.rows("SELECT table_name FROM system.tables WHERE table_name = 'public'"):
        table(shared, "public", options="WITH (ACCESS_LEVEL = 'PUBLIC')")
    if not shared.rows("SELECT user_id FROM system.users WHERE user_id = 'rights'"):
        shared.add_user("rights")
    shared.tokens.pop("rights", None)
    shared.login("rights", "Secret-of-1")
    with authenticated(shared, "rights") as socket:
        assert socket.subscribe("s", "SELECT * FROM ws.public")["type"] == "subscription_ack"
        assert shared.sql(change).status_code == 200
        ended = socket.receive(1.5)
        assert (ended["type"], ended["subscription_id"]) == ("error", "s")
        assert ended["code"] in ("UNAUTHORIZED", "NOT_FOUND")
    if undo:
        assert shared.sql(undo).status_code == 200
