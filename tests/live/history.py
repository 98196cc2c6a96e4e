"""Writers that note the whole truth about their rows, and what subscribers must see of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kalamdb.database import Database
from kalamdb.errors import TransactionConflict
from kalamdb.live import Change

Stored = dict[str, Any]
KEYS_EACH = 12


@dataclass(frozen=True)
class Version:
    """One version of a row; `row` is None for a deletion."""

    seq: int
    key: int
    row: Stored | None
    former_seq: int
    former: Stored | None


@dataclass(frozen=True)
class Filter:
    """A filter as SQL and as a Python test that is True, False or None."""

    sql: str
    test: Callable[[Stored], bool | None]


FILTERS = (
    Filter("", lambda row: True),
    Filter("WHERE s = 'a'", lambda row: None if row["s"] is None else row["s"] == "a"),
    Filter("WHERE NOT (s = 'a')", lambda row: None if row["s"] is None else row["s"] != "a"),
    Filter("WHERE s IS NULL OR s LIKE '_b%'", lambda row: row["s"] is None or row["s"][1:2] == "b"),
    Filter("WHERE id BETWEEN 3 AND 16", lambda row: 3 <= row["id"] <= 16),
    Filter("WHERE w = 1 AND s IN ('a', 'ab')", lambda row: row["w"] == 1 and row["s"] in ("a", "ab")),
)
KEY_ONLY = frozenset({FILTERS[0].sql, FILTERS[4].sql})


@dataclass
class History:
    """All versions of the rows of one table and scope."""

    versions: list[Version] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, found: Sequence[Version]) -> None:
        """Add what one writer did."""
        with self.lock:
            self.versions += found

    def events(self, filter_: Filter, after: int) -> list[dict[str, Any]]:
        """Live changes after a `_seq`, in order."""
        out = []
        for one in sorted(self.versions, key=lambda version: version.seq):
            tested = one.row if one.row is not None else one.former
            if one.seq <= after or tested is None or one.row == one.former or filter_.test(tested) is not True:
                continue
            out.append(_event(one))
        return out

    def stored(self, filter_: Filter, after: int, upto: int, deletes: bool) -> list[dict[str, Any]]:
        """What is read at `upto` by one who knows everything up to `after`: rows, then deletions."""
        newest: dict[int, Version] = {}
        for one in sorted(self.versions, key=lambda version: version.seq):
            if one.seq <= upto:
                newest[one.key] = one
        changed = sorted((one for one in newest.values() if one.seq > after), key=lambda version: version.seq)
        rows = [
            {"type": "snapshot", "row": {**one.row, "_seq": one.seq, "_deleted": False}, "old": None}
            for one in changed
            if one.row is not None and filter_.test(one.row) is True
        ]
        gone = [
            {"type": "delete", "row": None, "old": {"id": one.key, "_seq": one.seq, "_deleted": True}}
            for one in changed
            if one.row is None and (filter_.sql not in KEY_ONLY or filter_.test({"id": one.key}) is True)
        ]
        return rows + (gone if deletes else [])


def _event(one: Version) -> dict[str, Any]:
    if one.row is None:
        assert one.former is not None
        return {"type": "delete", "row": None, "old": {**one.former, "_seq": one.seq, "_deleted": True}}
    if one.former is None:
        return {"type": "insert", "row": {**one.row, "_seq": one.seq, "_deleted": False}, "old": None}
    former = one.former
    kept = {name: value for name, value in one.row.items() if value is not None}
    changed = {name: former[name] for name, value in one.row.items() if former[name] != value}
    return {
        "type": "update",
        "row": {**kept, "_seq": one.seq},
        "old": {"id": one.key, **changed, "_seq": one.former_seq},
    }


def seen(change: Change) -> dict[str, Any]:
    """A change in the form of the expectations."""
    return {"type": change.type.value, "row": change.row, "old": change.old_values}


Operation = tuple[str, str, list[int], str | None]
"""Verb, table, keys of the writer, text."""


class Writer:
    """Writes rows that nobody else writes, one statement after another, and notes what became of them."""

    def __init__(self, db: Database, number: int, histories: dict[str, History]) -> None:
        self._db = db
        self._number = number
        self._histories = histories
        self._known: dict[str, dict[int, tuple[int, Stored | None]]] = {"app.s": {}, "app.u": {}}
        self._values = 0

    @property
    def user(self) -> str:
        """Whose rows it writes in app.u."""
        return f"w{self._number}"

    def run(self, operations: Sequence[Operation]) -> None:
        """All operations."""
        for operation in operations:
            try:
                self._carry_out(operation)
            except TransactionConflict:
                pass
            for table in ("app.s", "app.u"):
                self._note(table)

    def _row(self, key: int, text: str | None) -> Stored:
        self._values += 1
        return {"id": self._key(key), "w": self._number, "v": self._values, "s": text}

    def _key(self, key: int) -> int:
        return self._number * KEYS_EACH + key

    def _carry_out(self, operation: Operation) -> None:
        verb, table, keys, text = operation
        if verb == "transaction":
            with self._db.transaction(self.user) as transaction:
                for one in ("app.s", "app.u"):
                    rows = [self._row(key, text) for key in keys]
                    transaction.insert(one, rows, on_conflict="update")
                    transaction.execute(f"DELETE FROM {one} WHERE id = $1", [self._key(keys[0])])
                    transaction.execute(f"UPDATE {one} SET s = $1 WHERE w = $2", [text, self._number])
            return
        execute = self._db.session(user=self.user).execute
        ids = ", ".join(str(self._key(key)) for key in keys)
        match verb:
            case "insert":
                rows = [self._row(key, text) for key in keys]
                self._db.insert(table, rows, user=self.user, on_conflict="ignore")
            case "upsert":
                rows = [self._row(key, text) for key in keys]
                self._db.insert(table, rows, user=self.user, on_conflict="update")
            case "same":
                execute(f"UPDATE {table} SET s = s WHERE id IN ({ids})")
            case "update":
                self._values += 1
                execute(f"UPDATE {table} SET s = $1, v = $2 WHERE id IN ({ids})", [text, self._values])
            case "update_all":
                execute(f"UPDATE {table} SET s = $1 WHERE w = $2", [text, self._number])
            case "delete":
                execute(f"DELETE FROM {table} WHERE id IN ({ids})")
            case "delete_all":
                execute(f"DELETE FROM {table} WHERE w = $1 AND v > 2", [self._number])

    def _note(self, table: str) -> None:
        """Nobody else writes these rows, so what is stored now is what the last statement made of them."""
        sql = (
            f"SELECT id, w, v, s, _seq, _deleted FROM {table} WHERE id >= $1 AND id < $2 AND _deleted IN (true, false)"
        )
        found = self._db.execute(sql, [self._key(0), self._key(KEYS_EACH)], user=self.user).rows
        known, fresh = self._known[table], []
        for key, w, v, s, seq, deleted in found:
            former_seq, former = known.get(key, (0, None))
            if seq != former_seq:
                row = None if deleted else {"id": key, "w": w, "v": v, "s": s}
                fresh.append(Version(seq, key, row, former_seq, former))
                known[key] = (seq, row)
        name = table if table == "app.s" else f"{table}:{self.user}"
        self._histories[name].note(fresh)
