"""The heart of live queries: each change once, in commit order; resumed, the newest version of each changed row."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import kalamdb
from kalamdb.database import Database
from kalamdb.errors import KalamDbError, Timeout
from kalamdb.live import Change, Subscription
from tests.live.history import FILTERS, KEYS_EACH, Filter, History, Operation, Writer, seen

WRITERS = 3
QUIET: dict[str, Any] = {
    "flush.scheduler_enabled": False, "compaction.enabled": False, "limits.batch_rows_max": 6,
    "compaction.level0_segments_max": 2, "jobs.schedules_enabled": False,
}  # fmt: skip
VERBS = "insert insert upsert update update delete same update_all delete_all transaction".split()
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(VERBS),
        st.sampled_from(["app.s", "app.u"]),
        st.lists(st.integers(0, KEYS_EACH - 1), min_size=1, max_size=KEYS_EACH, unique=True),
        st.sampled_from([None, "a", "ab", "b", "cba"]),
    ),
    min_size=4,
    max_size=12,
)


@dataclass
class Follower:
    """Follows one table with one filter through periods; `plan` says after how many changes each is cut."""

    db: Database
    history: History
    table: str
    user: str
    filter: Filter
    begin: str
    plan: Sequence[int]
    periods: list[tuple[Subscription, int | None, list[Change]]] = field(default_factory=list)

    def follow(self) -> None:
        """Cut and resume as planned; the last period stays open."""
        resume: int | None = None
        for count in [*self.plan, 0]:
            subscription = self._subscribe(resume)
            read: list[Change] = []
            self.periods.append((subscription, resume, read))
            if not count:
                self._look(subscription, read)
                return
            with suppress(Timeout):
                while len(read) < count:
                    read.append(subscription.next(timeout_s=0.05))
            resume = subscription.last_seq
            subscription.close()

    def _look(self, subscription: Subscription, read: list[Change]) -> None:
        """Read the stored part while the writers are at work."""
        while (change := subscription.poll()) is not None:
            read.append(change)

    def _subscribe(self, resume: int | None) -> Subscription:
        sql = f"SELECT * FROM {self.table} {self.filter.sql}"
        first = {"snapshot": {"snapshot": True}, "last_rows": {"last_rows": 5}, "now": {}}[self.begin]
        how: dict[str, Any] = first if resume is None else {"from_seq": resume}
        return self.db.subscribe(sql, user=self.user, batch_size=3, **how)

    def check(self) -> None:
        """Each period holds what the history says, the last one to the end."""
        for number, (subscription, resume, read) in enumerate(self.periods):
            is_last = number == len(self.periods) - 1
            began = subscription._inner.live_from
            if not began:
                # Cut while the stored part was read: it is the beginning of what was stored at some moment.
                assert not is_last
                continue
            expected = self._stored(resume, began) + self.history.events(self.filter, began)
            while is_last and len(read) < len(expected):
                read.append(subscription.next(timeout_s=5))
            assert [seen(one) for one in read] == expected[: len(read)]
            if is_last:
                assert subscription.poll() is None
                subscription.close()

    def _stored(self, resume: int | None, upto: int) -> list[dict[str, Any]]:
        if resume is not None:
            return self.history.stored(self.filter, resume, upto, deletes=True)
        rows = [] if self.begin == "now" else self.history.stored(self.filter, 0, upto, deletes=False)
        return rows[-5:] if self.begin == "last_rows" else rows


FOLLOWERS = st.lists(
    st.tuples(
        st.sampled_from(["app.s", "app.u:w0", "app.u:w1"]),
        st.sampled_from(FILTERS),
        st.sampled_from(["snapshot", "last_rows", "now"]),
        st.lists(st.integers(1, 8), max_size=4),
    ),
    min_size=2,
    max_size=5,
)


@pytest.mark.parametrize("where", ["memory", "disk"])
@settings(
    max_examples=10, deadline=None, phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(
    plans=st.tuples(*[OPERATIONS] * WRITERS),
    followers=FOLLOWERS,
    maintenance=st.lists(st.sampled_from(["FLUSH", "COMPACT"]), max_size=5),
)
def test_each_follower_sees_each_change_once_and_in_order(
    where: str,
    tmp_path_factory: pytest.TempPathFactory,
    plans: Sequence[Sequence[Operation]],
    followers: Sequence[tuple[str, Filter, str, list[int]]],
    maintenance: Sequence[str],
) -> None:
    path = ":memory:" if where == "memory" else str(tmp_path_factory.mktemp("live") / "data")
    with kalamdb.connect(path, **QUIET) as db:
        columns = "(id INT PRIMARY KEY, w INT, v INT, s TEXT)"
        db.execute(f"CREATE NAMESPACE app; CREATE SHARED TABLE app.s {columns}; CREATE USER TABLE app.u {columns}")
        names = ["app.s", *(f"app.u:w{number}" for number in range(WRITERS))]
        histories = {name: History() for name in names}
        following = [
            Follower(
                db, histories[name], name.partition(":")[0], name.partition(":")[2] or "root", filter_, begin, plan
            )
            for name, filter_, begin, plan in followers
        ]
        work: list[Callable[[], None]] = [one.follow for one in following]
        work += [
            lambda number=number, plan=plan: Writer(db, number, histories).run(plan)
            for number, plan in enumerate(plans)
        ]
        work.append(lambda: _maintain(db, maintenance))
        with ThreadPoolExecutor(len(work)) as pool:
            for done in [pool.submit(one) for one in work]:
                done.result(timeout=60)
        for one in following:
            one.check()
        assert db.check().problems == []


def _maintain(db: Database, operations: Sequence[str]) -> None:
    for operation in operations:
        for table in ("app.s", "app.u"):
            with suppress(KalamDbError):
                message = db.execute(f"STORAGE {operation} TABLE {table}").message or ""
                db.jobs.wait(message.rsplit(" ", 1)[1], timeout_s=30)


def _mirror(subscription: Subscription, stop: threading.Event) -> dict[int, Any]:
    rows: dict[int, Any] = {}
    while True:
        try:
            change = subscription.next(timeout_s=0.2)
        except Timeout:
            if stop.is_set():
                return rows
            continue
        if change.row is None:
            assert change.old_values is not None
            rows.pop(change.old_values["id"], None)
        elif change.type == "update":
            assert change.old_values is not None
            for name in change.old_values:
                rows[change.row["id"]][name] = None
            rows[change.row["id"]].update(change.row)
        else:
            rows[change.row["id"]] = dict(change.row)


@pytest.mark.parametrize("kept", ["ample", "scarce"])
def test_a_mirror_fed_by_pages_under_writes_is_the_table(kept: str) -> None:
    """With scarce memory changes are let go at each place where they may be, and looked up again."""
    limits = {"queue_bytes_max": 2000, "kept_bytes_max": 2000} if kept == "scarce" else {}
    with kalamdb.connect(":memory:", **QUIET) as db:
        db.execute("CREATE NAMESPACE app; CREATE SHARED TABLE app.s (id INT PRIMARY KEY, w INT, v INT, s TEXT)")
        db.execute("CREATE USER TABLE app.u (id INT PRIMARY KEY, w INT, v INT, s TEXT)")
        db.insert("app.s", [{"id": 1000 + key, "w": 9, "v": key, "s": "x"} for key in range(200)])
        live = db.context.live
        live.limits = type(live.limits)(**limits)
        live.reader.block_rows = 20
        verbs = [verb for verb in VERBS if verb != "insert"]
        plans: list[list[Operation]] = [
            [(verbs[(at + number) % len(verbs)], "app.s", list(range(at % 11 + 1)), "ab"[at % 2]) for at in range(20)]
            for number in range(WRITERS)
        ]
        stop = threading.Event()
        histories = {name: History() for name in ("app.s", *(f"app.u:w{number}" for number in range(WRITERS)))}
        with ThreadPoolExecutor(8) as pool:
            mirrors = [
                pool.submit(_mirror, db.subscribe("SELECT * FROM app.s", snapshot=True, batch_size=7), stop)
                for _ in range(3)
            ]
            writers = [pool.submit(Writer(db, number, histories).run, plan) for number, plan in enumerate(plans)]
            for writer in writers:
                writer.result(timeout=60)
            stop.set()
            found = [mirror.result(timeout=60) for mirror in mirrors]
        table = db.execute("SELECT *, _seq FROM app.s").dicts()
        wanted = {row["id"]: {**row, "_deleted": False} for row in table}
        for rows in found:
            assert {key: {**row, "_deleted": False} for key, row in rows.items()} == wanted
