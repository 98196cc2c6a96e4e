"""A user table and a shared table against dicts: random statements while flushes and compactions are under way.

A flush and a compaction are two rules each: one begins (snapshot and file), another publishes or dies,
and everything else falls in between. So does a transaction: begin, writes, commit or rollback.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

import kalamdb
from kalamdb.app_context import AppContext
from kalamdb.clock import SystemClock
from kalamdb.config import Settings
from kalamdb.database import Database, Transaction
from kalamdb.storage.kv import KvBackend
from kalamdb.storage.memory import MemoryKv
from kalamdb.tables.compact import compact_table
from kalamdb.tables.flush import flush_table
from kalamdb.tables.sweep import sweep
from kalamdb.testing.maintenance import HeldWork, Unwatched
from kalamdb.types import TableId

KEYS = st.integers(min_value=0, max_value=12)
VALUES = st.integers(min_value=0, max_value=3)
TABLES = st.sampled_from(["app.u", "app.s"])
USERS = st.sampled_from(["alice", "bob"])
COUNTS: Counter[str] = Counter()
QUIET = {
    "flush.scheduler_enabled": False,
    "compaction.enabled": False,
    "limits.batch_rows_max": 6,
    "compaction.level0_segments_max": 2,
    "jobs.schedules_enabled": False,
}
WAIT_S = 30.0
RULES = (
    "insert insert_many upsert update delete update_where delete_where alter drop_and_create transaction_begin "
    "transaction_write transaction_commit transaction_rollback flush_begin flush_publish "
    "compact_begin compact_publish remove_retired sweep clock_step reopen"
).split()
"""What must have happened at least a hundred times."""

Scope = tuple[str, str]
"""(table, user), the user '' for the shared table."""


class SteppedClock(SystemClock):
    """The machine's clock, moved by steps."""

    offset_ms = 0

    def now_ms(self) -> int:
        return super().now_ms() + self.offset_ms


@dataclass
class Open:
    """An open transaction: what it reads, what it wrote, and which versions those keys had at its beginning."""

    user: str
    stack: ExitStack
    transaction: Transaction
    base: dict[Scope, dict[int, int]]
    rows: dict[Scope, dict[int, int]]
    versions: dict[tuple[Scope, int], int]
    incarnations: dict[str, int]
    written: set[tuple[Scope, int]] = field(default_factory=set)


class Machine(RuleBasedStateMachine):
    """The database beside one dict per table and scope."""

    on_disk = False

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="kalamdb-machine-"))
        self.clock, self.kv = SteppedClock(), MemoryKv()
        self.db = self.open()
        self.db.execute("CREATE NAMESPACE app")
        self.model: dict[Scope, dict[int, int]] = {(t, u): {} for t, u in SCOPES}
        self.versions: Counter[tuple[Scope, int]] = Counter()
        self.value_name, self.extra = {}, {}
        self.incarnations: Counter[str] = Counter()
        self.running: dict[tuple[str, str], HeldWork] = {}
        self.turn = 0
        self.open_tx: Open | None = None
        for table in ("app.u", "app.s"):
            self.create(table)
        for table, user in SCOPES:
            self.insert_many(table, user or "bob", 0, 3, 1, False)

    def create(self, table: str) -> None:
        kind = "USER" if table == "app.u" else "SHARED"
        self.db.execute(f"CREATE {kind} TABLE {table} (id BIGINT PRIMARY KEY, v INT)")
        self.value_name[table], self.extra[table] = "v", {}
        self.incarnations[table] += 1

    def open(self) -> Database:
        loaded = Settings.load(QUIET, environment={})
        if self.on_disk:
            return Database(AppContext(self.folder / "data", loaded, clock=self.clock))
        backend = KvBackend(self.kv, self.clock)
        return Database(AppContext(None, loaded, clock=self.clock, backend=backend, root=self.folder))

    # The model

    def scope(self, table: str, user: str) -> Scope:
        return table, "" if table == "app.s" else user

    def put(self, scope: Scope, key: int, value: int | None) -> None:
        rows = self.model[scope]
        if rows.get(key) == value:
            return
        self.versions[(scope, key)] += 1
        if value is None:
            del rows[key]
        else:
            rows[key] = value

    def verify(self, scope: Scope, key: int | None = None) -> None:
        """What the table holds for one scope is what the model holds; of a single key each fourth time all."""
        table, user = scope[0], scope[1] or "alice"
        name, extra = self.value_name[table], self.extra[table]
        self.turn += 1
        if key is not None:
            found = self.db.execute(f"SELECT {name} FROM {table} WHERE id = $1", [key], user=user).rows
            assert found == [(value,) for one, value in self.model[scope].items() if one == key]
            if self.turn % 4:
                return
        result = self.db.execute(f"SELECT * FROM {table} ORDER BY id", user=user)
        assert result.columns == ["id", name, *extra]
        expected = [(one, value, *extra.values()) for one, value in sorted(self.model[scope].items())]
        assert result.rows == expected

    # Statements

    @rule(table=TABLES, user=USERS, key=KEYS, value=VALUES)
    def insert(self, table: str, user: str, key: int, value: int) -> None:
        COUNTS["insert"] += 1
        scope = self.scope(table, user)
        sql = f"INSERT INTO {table} (id, {self.value_name[table]}) VALUES ($1, $2)"
        if key in self.model[scope]:
            with pytest.raises(kalamdb.UniqueViolation):
                self.db.execute(sql, [key, value], user=user)
        else:
            self.db.execute(sql, [key, value], user=user)
            self.put(scope, key, value)
        self.verify(scope, key)

    def upsert_sql(self, table: str) -> str:
        name = self.value_name[table]
        return (
            f"INSERT INTO {table} (id, {name}) VALUES ($1, $2) ON CONFLICT (id) DO UPDATE SET {name} = excluded.{name}"
        )

    @rule(table=TABLES, user=USERS, key=KEYS, value=VALUES)
    def upsert(self, table: str, user: str, key: int, value: int) -> None:
        COUNTS["upsert"] += 1
        scope = self.scope(table, user)
        self.db.execute(self.upsert_sql(table), [key, value], user=user)
        self.put(scope, key, value)
        self.verify(scope, key)

    @rule(table=TABLES, user=USERS, start=KEYS, count=st.sampled_from([3, 8]), value=VALUES, update=st.booleans())
    def insert_many(self, table: str, user: str, start: int, count: int, value: int, update: bool) -> None:
        COUNTS["insert_many"] += 1
        scope = self.scope(table, user)
        data = [{"id": key, self.value_name[table]: value} for key in range(start, start + count)]
        written = self.db.insert(table, data, user=user, on_conflict="update" if update else "ignore")
        fresh = [key for key in range(start, start + count) if update or key not in self.model[scope]]
        assert written == len(fresh)
        for key in fresh:
            self.versions[(scope, key)] += 1
            self.model[scope][key] = value
        self.verify(scope, start)

    @rule(table=TABLES, user=USERS, key=KEYS, value=VALUES)
    def update(self, table: str, user: str, key: int, value: int) -> None:
        COUNTS["update"] += 1
        scope = self.scope(table, user)
        rows = self.model[scope]
        sql = f"UPDATE {table} SET {self.value_name[table]} = $1 WHERE id = $2"
        done = self.db.execute(sql, [value, key], user=user).row_count
        assert done == (key in rows and rows[key] != value)
        if key in rows:
            self.put(scope, key, value)
        self.verify(scope, key)

    @rule(table=TABLES, user=USERS, key=KEYS)
    def delete(self, table: str, user: str, key: int) -> None:
        COUNTS["delete"] += 1
        scope = self.scope(table, user)
        done = self.db.execute(f"DELETE FROM {table} WHERE id = $1", [key], user=user).row_count
        assert done == (key in self.model[scope])
        self.put(scope, key, None)
        self.verify(scope, key)

    @rule(table=TABLES, user=USERS, value=VALUES)
    def update_where(self, table: str, user: str, value: int) -> None:
        COUNTS["update_where"] += 1
        scope, name = self.scope(table, user), self.value_name[table]
        chosen = [key for key, old in self.model[scope].items() if old >= value]
        sql = f"UPDATE {table} SET {name} = {name} + 1 WHERE {name} >= $1"
        assert self.db.execute(sql, [value], user=user).row_count == len(chosen)
        for key in chosen:
            self.put(scope, key, self.model[scope][key] + 1)
        self.verify(scope)

    @rule(table=TABLES, user=USERS, value=VALUES, low=KEYS)
    def delete_where(self, table: str, user: str, value: int, low: int) -> None:
        COUNTS["delete_where"] += 1
        scope, name = self.scope(table, user), self.value_name[table]
        chosen = [key for key, old in self.model[scope].items() if old >= value and key >= low]
        sql = f"DELETE FROM {table} WHERE {name} >= $1 AND id >= $2"
        assert self.db.execute(sql, [value, low], user=user).row_count == len(chosen)
        for key in chosen:
            self.put(scope, key, None)
        self.verify(scope)

    # Schema

    @rule(table=TABLES, change=st.sampled_from(["add", "drop", "rename"]), value=VALUES)
    def alter(self, table: str, change: str, value: int) -> None:
        COUNTS["alter"] += 1
        extra = self.extra[table]
        if change == "rename":
            old, new = self.value_name[table], "w" if self.value_name[table] == "v" else "v"
            self.db.execute(f"ALTER TABLE {table} RENAME COLUMN {old} TO {new}")
            self.value_name[table] = new
        elif change == "drop" and extra:
            name = next(iter(extra))
            self.db.execute(f"ALTER TABLE {table} DROP COLUMN {name}")
            del extra[name]
        elif len(extra) < 3:
            name = next(name for name in ("a", "b", "c") if name not in extra)
            self.db.execute(f"ALTER TABLE {table} ADD COLUMN {name} INT NOT NULL DEFAULT {value}")
            extra[name] = value
        self.incarnations[table] += 1
        self.verify(self.scope(table, "bob"))

    @rule(table=TABLES, chance=st.integers(0, 7))
    def drop_and_create(self, table: str, chance: int) -> None:
        if chance:
            return
        COUNTS["drop_and_create"] += 1
        message = self.db.execute(f"DROP TABLE {table}").message or ""
        job = self.db.jobs.wait(message.rsplit(" ", 1)[1], timeout_s=WAIT_S)
        assert job.status == "completed"
        self.create(table)
        for (name, user), rows in self.model.items():
            if name == table:
                rows.clear()
                self.verify((name, user))

    # Transactions

    @precondition(lambda self: self.open_tx is None)
    @rule(user=USERS, table=TABLES, key=KEYS)
    def transaction_begin(self, user: str, table: str, key: int) -> None:
        COUNTS["transaction_begin"] += 1
        stack = ExitStack()
        transaction = stack.enter_context(self.db.transaction(user=user))
        base, rows = ({scope: dict(rows) for scope, rows in self.model.items()} for _ in range(2))
        self.open_tx = Open(user, stack, transaction, base, rows, dict(self.versions), dict(self.incarnations))
        self.transaction_write(table, key, 3, "upsert")

    @precondition(lambda self: self.open_tx is not None)
    @rule(table=TABLES, key=KEYS, value=VALUES, statement=st.sampled_from(["upsert", "delete", "update", "where"]))
    def transaction_write(self, table: str, key: int, value: int, statement: str) -> None:
        tx = self.open_tx
        assert tx is not None
        if tx.incarnations[table] != self.incarnations[table]:
            return
        COUNTS["transaction_write"] += 1
        scope = self.scope(table, tx.user)
        rows, name = tx.rows[scope], self.value_name[table]
        before = dict(rows)
        match statement:
            case "upsert":
                tx.transaction.execute(self.upsert_sql(table), [key, value])
                rows[key] = value
            case "delete":
                tx.transaction.execute(f"DELETE FROM {table} WHERE id = $1", [key])
                rows.pop(key, None)
            case "update":
                tx.transaction.execute(f"UPDATE {table} SET {name} = $1 WHERE id = $2", [value, key])
                if key in rows:
                    rows[key] = value
            case "where":
                tx.transaction.execute(f"UPDATE {table} SET {name} = {name} + 1 WHERE {name} >= $1", [value])
                rows.update({one: old + 1 for one, old in rows.items() if old >= value})
        tx.written |= {(scope, one) for one in before.keys() | rows.keys() if before.get(one) != rows.get(one)}
        seen = tx.transaction.execute(f"SELECT id, {name} FROM {table}").rows
        assert dict(seen) == rows and len(seen) == len(rows)
        found = tx.transaction.execute(f"SELECT {name} FROM {table} WHERE id = $1", [key]).rows
        assert found == [(rows[key],)] if key in rows else not found

    @precondition(lambda self: self.open_tx is not None)
    @rule()
    def transaction_commit(self) -> None:
        COUNTS["transaction_commit"] += 1
        tx, self.open_tx = self.open_tx, None
        assert tx is not None
        # A key that the transaction made and removed again is not written at all.
        written = {(s, k) for s, k in tx.written if k in tx.base[s] or k in tx.rows[s]}
        altered = any(tx.incarnations[scope[0]] != self.incarnations[scope[0]] for scope, _ in written)
        changed = any(self.versions[one] != tx.versions.get(one, 0) for one in written)
        try:
            tx.stack.close()
        except kalamdb.TransactionConflict:
            COUNTS["transaction_conflict"] += 1
            assert altered or changed
        else:
            assert not altered and not changed
            for scope, key in written:
                self.versions[(scope, key)] += 1
                if key in tx.rows[scope]:
                    self.model[scope][key] = tx.rows[scope][key]
                else:
                    self.model[scope].pop(key, None)
        for scope, key in tx.written:
            self.verify(scope, key)

    @precondition(lambda self: self.open_tx is not None)
    @rule()
    def transaction_rollback(self) -> None:
        COUNTS["transaction_rollback"] += 1
        tx, self.open_tx = self.open_tx, None
        assert tx is not None
        tx.transaction.rollback()
        tx.stack.close()
        for scope in {scope for scope, _ in tx.written}:
            self.verify(scope)

    # Maintenance

    def uid(self, table: str) -> Any:
        return self.db.context.catalog.require(TableId.parse(table)).definition.uid

    @rule(table=TABLES)
    def flush_begin(self, table: str) -> None:
        if (table, "flush") in self.running:
            return
        store, uid = self.db.context.store, self.uid(table)
        self.start(table, "flush", HeldWork(lambda job: flush_table(store, uid, job, str)))

    def start(self, table: str, kind: str, work: HeldWork) -> None:
        """Keep what waits to publish; what found nothing to do has ended already."""
        if work.waits:
            COUNTS[f"{kind}_begin"] += 1
            self.running[(table, kind)] = work
        else:
            work.end()
        self.verify(self.scope(table, "alice"))

    @rule(table=TABLES, full=st.booleans())
    def compact_begin(self, table: str, full: bool) -> None:
        if (table, "compact") in self.running:
            return
        store, uid = self.db.context.store, self.uid(table)
        if (table, "flush") not in self.running:
            flush_table(store, uid, Unwatched(), str)
        self.start(table, "compact", HeldWork(lambda job: compact_table(store, uid, job, str, full=full)))

    @precondition(lambda self: self.running)
    @rule(at=st.integers(0, 3))
    def publish(self, at: int) -> None:
        self.end(at, die=False)

    @precondition(lambda self: self.running)
    @rule(at=st.integers(0, 3), chance=st.integers(0, 2))
    def die(self, at: int, chance: int) -> None:
        self.end(at, die=chance > 0)

    def end(self, at: int, *, die: bool) -> None:
        """One of the running flushes and compactions publishes, or dies."""
        one = sorted(self.running)[at % len(self.running)]
        COUNTS[f"{one[1]}_{'die' if die else 'publish'}"] += 1
        work = self.running.pop(one)
        try:
            work.end(die=die)
        except (kalamdb.NotFound, kalamdb.TransactionConflict):
            COUNTS["maintenance_of_dropped_table"] += 1
        for table, user in SCOPES:
            if table == one[0]:
                self.verify((table, user))

    @rule()
    def remove_retired(self) -> None:
        COUNTS["remove_retired"] += 1
        self.db.context.backend.remove_retired(3)
        self.verify(("app.s", ""), 3)

    @rule()
    def sweep(self) -> None:
        COUNTS["sweep"] += 1
        sweep(self.db.context.store, None, Unwatched(), str)
        self.verify(("app.u", "alice"), 5)

    @rule(hours=st.sampled_from([-3, 1, 200]))
    def clock_step(self, hours: int) -> None:
        COUNTS["clock_step"] += 1
        self.clock.offset_ms += hours * 3_600_000
        self.verify(("app.u", "bob"), 4)

    @rule(chance=st.integers(0, 4))
    def reopen(self, chance: int) -> None:
        if chance:
            return
        COUNTS["reopen"] += 1
        self.let_go()
        self.db.close()
        self.db = self.open()
        for scope in SCOPES:
            self.verify(scope)

    def let_go(self) -> None:
        for work in self.running.values():
            work.end(die=True)
        self.running.clear()
        if self.open_tx is not None:
            self.open_tx.transaction.rollback()
            self.open_tx.stack.close()
            self.open_tx = None

    def teardown(self) -> None:
        if not hasattr(self, "db"):
            return
        try:
            self.let_go()
            for scope in SCOPES:
                self.verify(scope)
            report = self.db.check()
            assert report.ok, report.problems
        finally:
            self.db.close()
            shutil.rmtree(self.folder, ignore_errors=True)


SCOPES = [("app.u", "alice"), ("app.u", "bob"), ("app.s", "")]


class MachineOnDisk(Machine):
    """The same over RocksDB."""

    on_disk = True


def _run(machine: type[Machine], examples: int, steps: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
            phases=[Phase.generate] if os.environ.get("CI") else [Phase.generate, Phase.shrink],
        ),
    )


@pytest.mark.timeout(900)
def test_tables_hold_what_a_dict_holds_whatever_falls_into_flushes_and_compactions(
    capsys: pytest.CaptureFixture[str],
) -> None:
    COUNTS.clear()
    _run(MachineOnDisk, 50, 40)
    _run(Machine, 250, 60)
    for _ in range(5):
        if all(COUNTS[name] >= 100 for name in RULES) and sum(COUNTS[name] for name in RULES) >= 20_000:
            break
        _run(Machine, 50, 60)
    steps = sum(COUNTS[name] for name in RULES)
    with capsys.disabled():
        print(f"\n{steps} steps: {dict(COUNTS)}")
    assert steps >= 20_000
    assert all(COUNTS[name] >= 100 for name in RULES), COUNTS


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_tables_hold_what_a_dict_holds_in_long_histories() -> None:
    _run(Machine, 100, 300)
    _run(MachineOnDisk, 60, 100)
