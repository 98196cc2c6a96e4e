"""A process that writes, flushes and compacts is killed at random moments; what it acknowledged is there.

The rounds of a test go on in one directory, so what is killed was itself recovered before.
"""

from __future__ import annotations

import multiprocessing
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import kalamdb
from kalamdb.database import Database
from tests.crash.children import start, write
from tests.crash.support import judge, settle

USERS = ("ann", "bob", "cid")
IDS = 120
OPERATIONS_MAX = 400
TEXT = "x" * 300
"""Long values fill RocksDB's buffers, so that its own files change too."""

BUSY = {
    "limits.batch_rows_max": 40,
    "flush.default_row_limit": 60,
    "flush.check_interval_seconds": 0.02,
    "compaction.level0_segments_max": 2,
    "compaction.segment_bytes_max": 1 << 16,
    "storage.rocksdb.write_buffer_size": 1 << 20,
}
QUIET = {**BUSY, "flush.scheduler_enabled": False, "compaction.enabled": False}

Key = tuple[str, str, int]
"""(table, user, id); the user is '' in the shared table."""
Row = tuple[int, str]
"""(n, v)"""
Model = dict[Key, Row]
SCOPES = [("app.u", user) for user in USERS] + [("app.s", "")]


@dataclass(frozen=True)
class Step:
    """An operation for the child, and the rows of all tables once it is acknowledged."""

    operation: dict[str, Any]
    after: Model
    has_extra: bool
    """Whether the table app.d exists."""


class Plan:
    """Random operations that all succeed, with what each leaves."""

    def __init__(self, seed: random.Random, model: Model, has_extra: bool) -> None:
        self._random = seed
        self._model = dict(model)
        self._has_extra = has_extra

    def steps(self, count: int) -> list[Step]:
        makers = [
            (self._insert, 20), (self._update, 20), (self._delete, 10), (self._update_where, 6),
            (self._delete_where, 3), (self._bulk, 5), (self._transaction, 8), (self._extra, 3), (self._job, 6),
        ]  # fmt: skip
        chosen = self._random.choices([make for make, _ in makers], [weight for _, weight in makers], k=count)
        return [Step(make(), dict(self._model), self._has_extra) for make in chosen]

    def _scope(self) -> tuple[str, str]:
        return self._random.choice(SCOPES)

    def _row(self) -> Row:
        number = self._random.randrange(1000)
        return number, f"{number}{TEXT}"

    def _present(self, table: str, user: str) -> list[int]:
        return [number for name, owner, number in self._model if (name, owner) == (table, user)]

    def _sql(self, user: str, sql: str, *params: Any) -> dict[str, Any]:
        return {"kind": "sql", "user": user or "root", "sql": sql, "params": list(params)}

    def _upsert(self, table: str, user: str) -> tuple[str, list[Any]]:
        number, row = self._random.randrange(IDS), self._row()
        self._model[table, user, number] = row
        return (
            f"INSERT INTO {table} (id, n, v) VALUES ($1, $2, $3) "
            "ON CONFLICT (id) DO UPDATE SET n = excluded.n, v = excluded.v",
            [number, *row],
        )

    def _insert(self) -> dict[str, Any]:
        table, user = self._scope()
        free = sorted(set(range(IDS)) - set(self._present(table, user)))
        chosen = self._random.sample(free, min(len(free), self._random.randint(1, 5)))
        if not chosen:
            return self._delete_where()
        values = []
        for number in chosen:
            row = self._model[table, user, number] = self._row()
            values.append(f"({number}, {row[0]}, '{row[1]}')")
        return self._sql(user, f"INSERT INTO {table} (id, n, v) VALUES {', '.join(values)}")

    def _update(self) -> dict[str, Any]:
        table, user = self._scope()
        present = self._present(table, user)
        if not present:
            return self._insert()
        number, row = self._random.choice(present), self._row()
        self._model[table, user, number] = row
        return self._sql(user, f"UPDATE {table} SET n = $2, v = $3 WHERE id = $1", number, *row)

    def _delete(self) -> dict[str, Any]:
        table, user = self._scope()
        present = self._present(table, user)
        if not present:
            return self._insert()
        number = self._random.choice(present)
        del self._model[table, user, number]
        return self._sql(user, f"DELETE FROM {table} WHERE id = $1", number)

    def _update_where(self) -> dict[str, Any]:
        table, user = self._scope()
        rest = self._random.randrange(3)
        for number in self._present(table, user):
            n, text = self._model[table, user, number]
            if n % 3 == rest:
                self._model[table, user, number] = n + 1, text
        return self._sql(user, f"UPDATE {table} SET n = n + 1 WHERE n % 3 = {rest}")

    def _delete_where(self) -> dict[str, Any]:
        table, user = self._scope()
        rest = self._random.randrange(7)
        for number in self._present(table, user):
            if self._model[table, user, number][0] % 7 == rest:
                del self._model[table, user, number]
        return self._sql(user, f"DELETE FROM {table} WHERE n % 7 = {rest}")

    def _bulk(self) -> dict[str, Any]:
        table, user = self._scope()
        rows = []
        for number in self._random.sample(range(IDS), self._random.randint(45, 90)):
            row = self._model[table, user, number] = self._row()
            rows.append([number, *row])
        return {"kind": "bulk", "table": table, "user": user or "root", "rows": rows}

    def _transaction(self) -> dict[str, Any]:
        user = self._random.choice(USERS)
        statements = [self._upsert("app.u", user), self._upsert("app.s", ""), self._upsert("app.u", user)]
        return {"kind": "transaction", "user": user, "statements": statements}

    def _extra(self) -> dict[str, Any]:
        """The table app.d comes with rows, or goes with all of them."""
        self._has_extra = not self._has_extra
        if not self._has_extra:
            for number in self._present("app.d", ""):
                del self._model["app.d", "", number]
            return self._sql("", "DROP TABLE app.d")
        return self._sql("", "CREATE SHARED TABLE app.d (id BIGINT PRIMARY KEY, n BIGINT, v TEXT)")

    def _job(self) -> dict[str, Any]:
        table = self._random.choice(["app.u", "app.s", *(["app.d"] if self._has_extra else [])])
        kind, params = self._random.choice(
            [("flush", {"table_id": table}), ("compact", {"table_id": table}), ("cleanup", {"operation": "sweep"})]
        )
        return {"kind": "job", "type": kind, "params": params, "wait": self._random.random() < 0.3}


def found_in(db: Database) -> tuple[Model, bool]:
    """All rows, each once, and whether app.d exists."""
    has_extra = any(entry.definition.name == "d" for entry in db.context.catalog.tables("app"))
    model: Model = {}
    for table, user in [*SCOPES, *([("app.d", "")] if has_extra else [])]:
        for number, n, text in db.execute(f"SELECT id, n, v FROM {table}", user=user or "root").rows:
            assert (table, user, number) not in model, f"row {number} of {table} of '{user}' is there twice"
            model[table, user, number] = (n, text)
    return model, has_extra


class Round:
    """One child, killed; how many operations it acknowledged."""

    def __init__(self, path: Path, seed: random.Random, steps: list[Step], settings: dict[str, Any]) -> None:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        self.acknowledged = 0
        self.while_opening = seed.random() < 0.2
        child = start(write, path, settings, [step.operation for step in steps], sender)
        sender.close()
        with open(receiver.fileno(), closefd=False) as lines:
            wanted = "opening\n" if self.while_opening else f"{seed.randrange(min(len(steps), 120))}\n"
            seen = []
            for line in lines:
                seen.append(line)
                if line == wanted:
                    break
            else:
                raise AssertionError(f"the child ended by itself with {child.exitcode}: {seen[-3:]}")
            time.sleep(seed.uniform(0, 0.06 if self.while_opening else 0.015))
            child.kill()
            seen += list(lines)
        child.join()
        receiver.close()
        self.acknowledged = sum(line.strip().isdigit() and line.endswith("\n") for line in seen)


def play(path: Path, seed_number: int, rounds: int) -> str:
    """Rounds of writing and killing in one directory; a line of figures. Prints the seed of a failing round."""
    seed = random.Random(seed_number)
    with kalamdb.connect(path, **QUIET) as db:
        db.execute("CREATE NAMESPACE app")
        db.execute("CREATE USER TABLE app.u (id BIGINT PRIMARY KEY, n BIGINT, v TEXT)")
        db.execute("CREATE SHARED TABLE app.s (id BIGINT PRIMARY KEY, n BIGINT, v TEXT)")
    model, has_extra = dict[Key, Row](), False
    figures = {"acknowledged": 0, "in doubt and there": 0, "while opening": 0}
    started = time.monotonic()
    for number in range(rounds):
        durability = seed.choice(["commit", "os"])
        steps = Plan(seed, model, has_extra).steps(OPERATIONS_MAX)
        where = f"seed {seed_number}, round {number}, durability {durability}"
        played = Round(path, seed, steps, {**BUSY, "storage.durability": durability})
        done = played.acknowledged
        with kalamdb.connect(path, **QUIET, **{"storage.durability": durability}) as db:
            assert db.check().problems == [], where
            found = found_in(db)
            states = [(model, has_extra), *((step.after, step.has_extra) for step in steps)]
            assert found in states[done : done + 2], f"{where}: {difference(found[0], states[done][0])}"
            figures["in doubt and there"] += found == states[done + 1] != states[done]
            settle(db)
            judge(db)
            assert found_in(db) == found, where
        model, has_extra = found
        figures["acknowledged"] += done
        figures["while opening"] += played.while_opening
    figures_text = ", ".join(f"{value} {name}" for name, value in figures.items())
    return f"seed {seed_number}: {rounds} kills in {time.monotonic() - started:.0f} s; {figures_text}"


def difference(found: Model, expected: Model) -> str:
    """Where the two differ, shortly."""
    keys = [key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key)]
    shown = [f"{key}: {str(found.get(key))[:20]}, expected {str(expected.get(key))[:20]}" for key in sorted(keys)[:5]]
    return f"{len(keys)} rows differ: {'; '.join(shown)}"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed_number", [1, 2, 3])
def test_every_acknowledged_row_outlives_a_kill(
    tmp_path: Path, seed_number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = play(tmp_path / "data", seed_number, 10)
    with capsys.disabled():
        print(f"\n{figures}")


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_every_acknowledged_row_outlives_three_hundred_kills(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed_number in range(10, 20):
        figures = play(tmp_path / str(seed_number), seed_number, 30)
        with capsys.disabled():
            print(f"\n{figures}")
