"""When subscriptions end, and what they go on through: rights, definitions, limits, the disk."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

import kalamdb
from kalamdb.app_context import AppContext
from kalamdb.clock import SystemClock
from kalamdb.config import Settings
from kalamdb.database import Database
from kalamdb.errors import Closed, Denied, InvalidRequest, LimitExceeded, NotFound, Timeout
from kalamdb.live import Change, LiveCode, LiveOptions, LiveRequest, LiveSubscription
from kalamdb.storage.kv import KvBackend
from kalamdb.storage.memory import MemoryKv
from kalamdb.types import Role
from tests.conftest import Open

SHARED = "SELECT * FROM app.s"


class Collected:
    """A sink as a server has it: it takes what comes."""

    def __init__(self) -> None:
        self.calls: list[list[tuple[str, Change]]] = []
        self.ends: list[tuple[LiveCode, str]] = []
        self.came = threading.Event()

    def deliver(self, changes: Sequence[tuple[LiveSubscription, Change]]) -> None:
        self.calls.append([(one.request.subscription_id, change) for one, change in changes])
        self.came.set()

    def behind(self, subscription: LiveSubscription) -> None:
        pass

    def ended(self, subscription: LiveSubscription, code: LiveCode, message: str) -> None:
        self.ends.append((code, message))
        self.came.set()


def make(db: Database) -> None:
    db.execute("CREATE NAMESPACE app; CREATE SHARED TABLE app.s (id INT PRIMARY KEY, v INT, t TEXT)")
    db.execute("CREATE USER TABLE app.u (id INT PRIMARY KEY, v INT)")


def remote(
    db: Database, sink: Collected, sql: str = SHARED, *, user: str = "anna", name: str = "s1",
    options: LiveOptions | None = None,
) -> LiveSubscription:  # fmt: skip
    request = LiveRequest(sql, options, subscription_id=name, connection_id="c1", bound=True)
    found = db.context.live.subscribe(request, db._caller(user, Role.SERVICE, None, None, None), sink)
    if options is None:
        found.go_live()
    return found


@pytest.mark.parametrize(
    ("statement", "code"),
    [
        ("DROP USER anna", LiveCode.UNAUTHORIZED),
        ("ALTER USER anna SET ROLE dba", LiveCode.UNAUTHORIZED),
        ("ALTER USER anna SET PASSWORD 'quokka-17-elm'", LiveCode.UNAUTHORIZED),
        ("ALTER TABLE app.s SET TBLPROPERTIES (ACCESS_LEVEL = 'dba')", LiveCode.UNAUTHORIZED),
        ("DROP TABLE app.s", LiveCode.NOT_FOUND),
        ("TRUNCATE TABLE app.s", LiveCode.NOT_FOUND),
        ("DROP NAMESPACE app CASCADE", LiveCode.NOT_FOUND),
        ("ALTER TABLE app.s DROP COLUMN t", LiveCode.INVALID_SQL),
        ("KILL LIVE QUERY 'anna-c1-s1'", LiveCode.CLOSED),
    ],
)
def test_a_subscription_ends_with_its_right(open_db: Open, statement: str, code: LiveCode) -> None:
    db = open_db(auth_bcrypt_cost=4)
    make(db)
    db.execute("CREATE USER anna WITH PASSWORD 'wombat-42-rye' ROLE service")
    sink = Collected()
    remote(db, sink, f"{SHARED} WHERE t = 'a'")
    db.execute("ALTER USER anna SET EMAIL 'anna@example.com'")
    assert not sink.came.is_set()
    db.execute(statement)
    assert sink.came.wait(1)
    assert [found for found, _ in sink.ends] == [code]
    assert db.execute("SELECT * FROM system.live").rows == []


def test_what_may_not_be_read_may_not_be_subscribed(open_db: Open) -> None:
    db = open_db()
    make(db)
    with pytest.raises(Denied):
        db.subscribe(SHARED, user="anna", role="user")
    with pytest.raises(NotFound):
        db.subscribe("SELECT * FROM app.nothing")
    with pytest.raises(Denied):
        db.subscribe("SELECT * FROM system.users", role="dba")
    db.execute("CREATE VIEW app.v AS SELECT * FROM app.s")
    with pytest.raises(InvalidRequest):
        db.subscribe("SELECT * FROM app.v")


def test_users_get_their_own_rows_and_equal_subscriptions_share_their_changes(open_db: Open) -> None:
    db = open_db()
    make(db)
    sink, other = Collected(), Collected()
    for name in ("s1", "s2"):
        remote(db, sink, "SELECT id FROM app.u WHERE v >= 1", name=name)
    remote(db, other, "SELECT id FROM app.u WHERE v >= 1", user="bob")
    db.execute("INSERT INTO app.u VALUES (1, 1), (2, 0), (3, 5)", user="anna")
    assert sink.came.wait(10)
    assert [[(name, change.row["id"]) for name, change in call if change.row] for call in sink.calls] == [
        [("s1", 1), ("s2", 1), ("s1", 3), ("s2", 3)]
    ]
    [[(_, first), (_, second), *_]] = sink.calls
    assert first is second
    encoded = [first.encoded("json", lambda change: msgspec.json.encode(change.row)) for _ in range(2)]
    assert encoded[0] is encoded[1]
    assert other.calls == []


def test_a_column_that_comes_is_sent_and_one_that_goes_is_not(open_db: Open) -> None:
    db = open_db()
    make(db)
    with db.subscribe(SHARED) as all_, db.subscribe("SELECT t, v FROM app.s WHERE v > 0") as some:
        db.execute("ALTER TABLE app.s ADD COLUMN n INT DEFAULT 7")
        db.execute("ALTER TABLE app.s DROP COLUMN t")
        db.execute("ALTER TABLE app.s RENAME COLUMN v TO value")
        db.execute("INSERT INTO app.s (id, value) VALUES (1, 5)")
        assert list(all_.next(timeout_s=10).row or {}) == ["id", "value", "n", "_seq", "_deleted"]
        assert list(some.next(timeout_s=10).row or {}) == ["value", "_seq"]


def test_streams_tell_of_what_is_inserted_and_removed(open_db: Open) -> None:
    db = open_db()
    make(db)
    db.execute("CREATE STREAM TABLE app.e (id INT, v INT) WITH (TTL_SECONDS = 60)")
    db.execute("INSERT INTO app.e VALUES (1, 1)")
    with db.subscribe("SELECT id FROM app.e WHERE v > 0", snapshot=True) as events:
        assert events.next(timeout_s=10).type == "snapshot"
        db.execute("INSERT INTO app.e VALUES (2, 0), (3, 1)")
        assert (events.next(timeout_s=10).row or {})["id"] == 3
        db.execute("DELETE FROM app.e WHERE id = 1")
        assert (events.next(timeout_s=10).old_values or {})["id"] == 1


def test_a_segment_of_deletions_alone_is_read_when_resuming(open_db: Open) -> None:
    db = open_db()
    make(db)
    db.insert("app.s", [{"id": key, "v": key} for key in range(3)])
    db.jobs.wait((db.execute("STORAGE FLUSH TABLE app.s").message or "").rsplit(" ", 1)[1])
    seq = db.execute("SELECT max(_seq) FROM app.s").scalar()
    db.execute("DELETE FROM app.s WHERE id > 0")
    db.jobs.wait((db.execute("STORAGE FLUSH TABLE app.s").message or "").rsplit(" ", 1)[1])
    with db.subscribe(SHARED, from_seq=seq) as found:
        assert [(found.next(timeout_s=10).old_values or {})["id"] for _ in range(2)] == [1, 2]
        assert found.resumed
    assert db.execute("SELECT id FROM app.s WHERE _deleted = true ORDER BY id").rows == [(1,), (2,)]


def test_an_old_position_and_one_before_truncate_get_everything(open_db: Open) -> None:
    db = open_db(live_resume_window_s=0)
    make(db)
    db.execute("INSERT INTO app.s (id) VALUES (1), (2)")
    last = db.execute("SELECT max(_seq) FROM app.s").scalar()
    with db.subscribe(SHARED, from_seq=last - (1 << 32)) as found:
        assert [found.next(timeout_s=10).seq for _ in range(2)] == [last - 1, last]
        assert not found.resumed
    with db.subscribe(SHARED, from_seq=last + (1 << 40)) as found:
        assert not found.resumed


def test_limits_and_positions_are_checked(open_db: Open) -> None:
    db = open_db(rate_limit_max_subscriptions_per_user=2)
    make(db)
    sink = Collected()
    first = remote(db, sink, name="s0")
    remote(db, sink, name="s1")
    with pytest.raises(LimitExceeded):
        remote(db, sink, name="s2")
    first.close()
    remote(db, sink, name="s2")
    with pytest.raises(InvalidRequest):
        remote(db, sink, user="bob", options=LiveOptions(last_rows=0))
    many = [db.subscribe(SHARED) for _ in range(20)]
    assert db.execute("SELECT count(*) FROM system.live").scalar() == 22
    for one in many:
        one.close()


class HeldKv(MemoryKv):
    """A store whose disk waits until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.go.set()
        self.waits = threading.Event()

    def sync(self) -> None:
        self.waits.set()
        assert self.go.wait(30)


def test_nothing_is_sent_before_it_is_durable(tmp_path: Path) -> None:
    kv, clock = HeldKv(), SystemClock()
    settings = Settings.load({"jobs.schedules_enabled": False, "flush.scheduler_enabled": False})
    context = AppContext(None, settings, backend=KvBackend(kv, clock), root=tmp_path, background=False)
    with Database(context) as db:
        make(db)
        live = db.subscribe(SHARED)
        kv.waits.clear()
        kv.go.clear()
        writer = threading.Thread(target=db.execute, args=("INSERT INTO app.s (id) VALUES (1)",))
        writer.start()
        assert kv.waits.wait(10)
        # The row is in the store, and seen by queries; a snapshot of it waits as its change does.
        began = threading.Event()
        rows: list[Change] = []
        reader = db.subscribe(SHARED, snapshot=True)
        reading = threading.Thread(target=lambda: (began.set(), rows.append(reader.next())))
        reading.start()
        assert began.wait(10)
        with pytest.raises(Timeout):
            live.next(timeout_s=0.3)
        assert not rows
        kv.go.set()
        assert live.next(timeout_s=10).type == "insert"
        reading.join(10)
        writer.join(10)
        assert [one.type for one in rows] == ["snapshot"]


def test_closing_wakes_whoever_waits(open_db: Open) -> None:
    db = open_db()
    make(db)
    ends: list[type[BaseException] | None] = []

    def wait(found: kalamdb.live.Subscription) -> None:
        try:
            ends.append(next(iter(found), None) and None)
        except Closed as exc:
            ends.append(type(exc))

    own, databases = db.subscribe(SHARED), db.subscribe(SHARED)
    threads = [threading.Thread(target=wait, args=(one,)) for one in (own, databases)]
    for thread in threads:
        thread.start()
    own.close()
    threads[0].join(10)
    db.close()
    threads[1].join(10)
    assert ends == [None, Closed]


def test_a_callback_gets_each_change_and_its_error_ends_it(open_db: Open) -> None:
    db = open_db()
    make(db)
    came: list[int] = []
    third = threading.Event()

    def callback(change: Change) -> None:
        came.append((change.row or {})["id"])
        if len(came) == 3:
            third.set()

    found = db.subscribe(SHARED, callback=callback)
    db.execute("INSERT INTO app.s (id) VALUES (1), (2), (3)")
    assert third.wait(10)
    assert came == [1, 2, 3]
    found.close()


def test_the_async_database_gives_changes_by_async_for(open_db: Open) -> None:
    db = open_db()
    make(db)
    db.execute("INSERT INTO app.s (id) VALUES (1)")

    async def main() -> list[int]:
        found = []
        async with (
            kalamdb.AsyncDatabase(db) as async_db,
            await async_db.subscribe(SHARED, snapshot=True) as changes,
        ):
            found.append(((await changes.next(timeout_s=10)).row or {})["id"])
            with pytest.raises(Timeout):
                await changes.next(timeout_s=0.01)
            await async_db.execute("INSERT INTO app.s (id) VALUES (2), (3)")
            async for change in changes:
                found.append((change.row or {})["id"])
                if len(found) == 3:
                    break
        return found

    assert asyncio.run(main()) == [1, 2, 3]


def test_subscribe_to_says_what_a_client_sends(open_db: Open) -> None:
    db = open_db()
    make(db)
    [row] = db.execute("SUBSCRIBE TO app.s WHERE v > 1 OPTIONS (last_rows = 5, from_seq_id = 7)").dicts()
    assert row["status"] == "active" and row["subscription"]["sql"] == "SELECT * FROM app.s WHERE v > 1"
    assert row["subscription"]["options"] == {"last_rows": 5, "from_seq_id": 7}
    [row] = db.execute("SUBSCRIBE TO SELECT id FROM app.s").dicts()
    assert row["subscription"]["id"].startswith("sub-app-s-")
    for refused in ("SUBSCRIBE TO app.s LIMIT 1", "SUBSCRIBE TO app.s OPTIONS (x = 1)", "SUBSCRIBE TO SELECT 1"):
        with pytest.raises(InvalidRequest):
            db.execute(refused)
    with pytest.raises(Denied):
        db.execute("KILL LIVE QUERY 'x'", role="service")
    with pytest.raises(NotFound):
        db.execute("KILL LIVE QUERY 'x'")
