"""ALTER TABLE over hot rows, cold rows and both (surface reference 3.3): no row is rewritten, each reads right.

Every test runs three times: what was written before the change is still hot, lies cold, or is mixed.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from decimal import Decimal

import pytest

import kalamdb
from kalamdb.database import Database
from tests.sql.conftest import compact, flush, refused, rows

Settle = Callable[[Database], None]


@pytest.fixture(params=["hot", "cold", "mixed"])
def settle(request: pytest.FixtureRequest) -> Settle:
    """Puts the rows 1 to 3 of app.t into the tier of this run."""

    def put(db: Database) -> None:
        db.execute("INSERT INTO app.t (id) VALUES (1), (2)")
        if request.param != "hot":
            flush(db, "app.t")
        db.execute("INSERT INTO app.t (id) VALUES (3)")
        if request.param == "cold":
            flush(db, "app.t")

    return put


def altered(db: Database, change: str) -> str:
    return db.execute(f"ALTER TABLE app.t {change}").message or ""


def same_after_compaction(db: Database, sql: str) -> list[tuple[object, ...]]:
    """The answer, which flushing and compacting must not change."""
    before = rows(db, sql)
    for move in (flush, compact):
        if rows(db, "SELECT sync_state FROM system.manifest") == [("pending_write",)] or move is compact:
            move(db, "app.t")
        assert rows(db, sql) == before
    assert db.check().ok
    return before


def test_add_column_gives_old_rows_null_or_the_default_of_that_moment(db: Database, settle: Settle) -> None:
    db.execute("CREATE TABLE app.t (id INT PRIMARY KEY)")
    settle(db)
    assert altered(db, "ADD COLUMN a TEXT DEFAULT 'new'").startswith("Table app.t altered successfully:")
    assert altered(db, "ADD COLUMN b INT NOT NULL DEFAULT 7").endswith("(version 3)")
    altered(db, "ADD c TIMESTAMP NOT NULL DEFAULT NOW()")
    altered(db, "ADD COLUMN j JSON NOT NULL DEFAULT '{\"k\": 1}'")
    altered(db, "ADD COLUMN u TEXT NOT NULL DEFAULT CURRENT_USER()")
    altered(db, "ADD COLUMN e EMBEDDING(2) NOT NULL DEFAULT '[0.5, 1]'")
    altered(db, "ALTER COLUMN b SET DEFAULT 8")
    db.execute("INSERT INTO app.t (id) VALUES (4)", user="ann")
    found = same_after_compaction(db, "SELECT id, a, b, j, u, e FROM app.t ORDER BY id")
    old, new = (None, 7, {"k": 1}, "root", [0.5, 1.0]), ("new", 8, {"k": 1}, "ann", [0.5, 1.0])
    assert found == [(1, *old), (2, *old), (3, *old), (4, *new)]
    assert rows(db, "SELECT count(DISTINCT c) FROM app.t WHERE id < 4") == [(1,)]
    assert rows(db, "SELECT a, b, j FROM app.t WHERE id = 1") == [(None, 7, {"k": 1})]


def test_a_not_null_column_without_default_needs_an_empty_table(db: Database, settle: Settle) -> None:
    db.execute("CREATE TABLE app.t (id INT PRIMARY KEY)")
    altered(db, "ADD COLUMN a INT NOT NULL")
    assert "cannot be NULL" in refused(db, "INSERT INTO app.t (id) VALUES (1)")
    altered(db, "DROP COLUMN a")
    settle(db)
    assert "give it a DEFAULT" in refused(db, "ALTER TABLE app.t ADD COLUMN a INT NOT NULL")


def test_a_dropped_column_never_comes_back_under_its_name(db: Database, settle: Settle) -> None:
    db.execute("CREATE TABLE app.t (id INT PRIMARY KEY, v TEXT DEFAULT 'old', w TEXT DEFAULT 'w')")
    settle(db)
    assert "dropped column v" in altered(db, "DROP COLUMN v")
    assert rows(db, "SELECT * FROM app.t ORDER BY id") == [(1, "w"), (2, "w"), (3, "w")]
    altered(db, "ADD COLUMN v INT")
    db.execute("INSERT INTO app.t VALUES (4, 'x', 9)")
    assert [row[2] for row in rows(db, "DESCRIBE TABLE app.t")] == [1, 3, 4]
    found = same_after_compaction(db, "SELECT v, w FROM app.t ORDER BY id")
    assert found == [(None, "w"), (None, "w"), (None, "w"), (9, "x")]


def test_rename_moves_the_values_along(db: Database, settle: Settle) -> None:
    db.execute("CREATE TABLE app.t (id INT PRIMARY KEY, a TEXT DEFAULT 'a', b TEXT DEFAULT 'b')")
    settle(db)
    assert "renamed column a to c" in altered(db, "RENAME COLUMN a TO c")
    altered(db, "RENAME COLUMN b TO a")
    altered(db, "ADD COLUMN b TEXT")
    altered(db, "RENAME COLUMN id TO pk")
    assert "has no column 'id'" in refused(db, "INSERT INTO app.t (id) VALUES (9)")
    db.execute("UPDATE app.t SET b = a || c WHERE pk = 2")
    found = same_after_compaction(db, "SELECT pk, a, b, c FROM app.t ORDER BY pk")
    assert found == [(1, "b", None, "a"), (2, "b", "ba", "a"), (3, "b", None, "a")]
    assert rows(db, "SELECT c FROM app.t WHERE pk = 1") == [("a",)]


@pytest.mark.parametrize(
    ("old", "new", "value", "read"),
    [
        ("SMALLINT", "INT", "-3", -3),
        ("SMALLINT", "BIGINT", "7", 7),
        ("INT", "BIGINT", "2147483647", 2147483647),
        ("INT", "DOUBLE", "5", 5.0),
        ("FLOAT", "DOUBLE", "0.5", 0.5),
        ("DECIMAL(5,2)", "DECIMAL(12,2)", "1.25", Decimal("1.25")),
        ("JSON", "TEXT", "'[1]'", "[1]"),
        ("UUID", "TEXT", f"'{uuid.UUID(int=5)}'", str(uuid.UUID(int=5))),
    ],
)
def test_types_widen(db: Database, settle: Settle, old: str, new: str, value: str, read: object) -> None:
    db.execute(f"CREATE TABLE app.t (id INT PRIMARY KEY, v {old} DEFAULT {value})")
    settle(db)
    altered(db, f"MODIFY COLUMN v {new}")
    db.execute("INSERT INTO app.t (id) VALUES (4)")
    found = same_after_compaction(db, "SELECT v FROM app.t ORDER BY id")
    assert found == [(read,)] * 4 and {type(row[0]) for row in found} == {type(read)}
    assert rows(db, "SELECT v FROM app.t WHERE id = 1") == [(read,)]


def test_a_key_widens_and_stays_unique(db: Database, settle: Settle) -> None:
    db.execute("CREATE TABLE app.t (id SMALLINT PRIMARY KEY)")
    settle(db)
    altered(db, "ALTER COLUMN id TYPE INT")
    altered(db, "ALTER COLUMN id SET DATA TYPE BIGINT")
    assert "already exists" in refused(db, "INSERT INTO app.t VALUES (2)")
    db.execute("INSERT INTO app.t VALUES (10000000000)")
    db.execute("DELETE FROM app.t WHERE id = 1")
    assert same_after_compaction(db, "SELECT id FROM app.t ORDER BY id") == [(2,), (3,), (10_000_000_000,)]


@pytest.mark.parametrize(
    ("column", "wanted"),
    [("b BIGINT", "INT"), ("b BIGINT", "DOUBLE"), ("b TEXT", "INT"), ("b DOUBLE", "FLOAT"), ("b TEXT", "JSON"),
     ("b DECIMAL(9,2)", "DECIMAL(9,3)"), ("b DECIMAL(9,2)", "DECIMAL(8,2)"), ("b TIMESTAMP", "DATE")],
)  # fmt: skip
def test_narrowing_is_refused(db: Database, column: str, wanted: str) -> None:
    db.execute(f"CREATE TABLE app.t (id INT PRIMARY KEY, {column})")
    assert f"cannot become {wanted}: only widening" in refused(db, f"ALTER TABLE app.t MODIFY COLUMN b {wanted}")
    assert "cannot become DOUBLE" in refused(db, "ALTER TABLE app.t MODIFY COLUMN id DOUBLE")


def test_not_null_looks_at_every_row(db: Database, settle: Settle) -> None:
    db.execute("CREATE TABLE app.t (id INT PRIMARY KEY, v TEXT)")
    settle(db)
    assert "holds NULL" in refused(db, "ALTER TABLE app.t ALTER COLUMN v SET NOT NULL")
    db.execute("UPDATE app.t SET v = 'x' WHERE id <> 3")
    assert "holds NULL" in refused(db, "ALTER TABLE app.t MODIFY COLUMN v TEXT NOT NULL")
    db.execute("DELETE FROM app.t WHERE id = 3")
    for move in (flush, compact):
        move(db, "app.t")
    altered(db, "MODIFY COLUMN v TEXT NOT NULL")
    message = "NOT NULL constraint violation: column 'v' cannot be NULL"
    for bad in (
        "INSERT INTO app.t (id) VALUES (4)",
        "INSERT INTO app.t VALUES (4, NULL)",
        "INSERT INTO app.t SELECT 4, NULL",
        "UPDATE app.t SET v = NULL WHERE id = 1",
        "UPDATE app.t SET v = NULL WHERE id > 0",
    ):
        assert refused(db, bad) == message
    altered(db, "ALTER COLUMN v DROP NOT NULL")
    db.execute("UPDATE app.t SET v = NULL WHERE id = 1")
    assert rows(db, "SELECT v FROM app.t ORDER BY id") == [(None,), ("x",)]


def test_defaults_are_set_and_dropped_for_later_rows(db: Database) -> None:
    db.execute("CREATE TABLE app.t (id INT PRIMARY KEY, v DECIMAL(6, 2))")
    db.execute("INSERT INTO app.t (id) VALUES (1)")
    altered(db, "ALTER COLUMN v SET DEFAULT 2.5")
    db.execute("INSERT INTO app.t (id) VALUES (2)")
    altered(db, "ALTER COLUMN v DROP DEFAULT")
    db.execute("INSERT INTO app.t (id) VALUES (3)")
    assert rows(db, "SELECT v FROM app.t ORDER BY id") == [(None,), (Decimal("2.50"),), (None,)]
    for bad in ("'x'", "UUID_V7()", "1 + 1", "99999"):
        refused(db, f"ALTER TABLE app.t ALTER COLUMN v SET DEFAULT {bad}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("ADD COLUMN v INT", "column 'v' already exists"),
        ("ADD COLUMN _x INT", "is reserved"),
        ("ADD COLUMN k INT PRIMARY KEY", "cannot be added to the PRIMARY KEY"),
        ("ADD COLUMN k INT CHECK (k > 0)", "state it in CREATE TABLE"),
        ("ADD COLUMN k WIBBLE", "not a data type"),
        ("DROP COLUMN id", "part of the PRIMARY KEY"),
        ("DROP COLUMN nope", "it has id, v"),
        ("DROP COLUMN _seq", "'_seq' is a system column"),
        ("RENAME COLUMN _deleted TO x", "'_deleted' is a system column"),
        ("RENAME COLUMN v TO id", "column 'id' already exists"),
        ("RENAME COLUMN v TO _v", "is reserved"),
        ("RENAME TO other", "cannot be renamed"),
        ("MODIFY COLUMN id BIGINT NULL", "stays NOT NULL"),
        ("ALTER COLUMN v SET NOTHING", "SET or DROP"),
        ("SET TBLPROPERTIES (OWNER = 'x')", "ACCESS_LEVEL alone"),
        ("SET ACCESS LEVEL open", "is not one of"),
        ("ADD COLUMN a INT, ADD COLUMN b INT", "the end of the statement"),
        ("CREATE INDEX v", "is expected"),
    ],
)
def test_a_malformed_change_is_refused_and_leaves_the_version(db: Database, change: str, message: str) -> None:
    db.execute("CREATE TABLE app.t (id INT PRIMARY KEY, v TEXT)")
    assert message in refused(db, f"ALTER TABLE app.t {change}")
    assert rows(db, "SELECT version FROM system.tables WHERE table_name = 't'") == [(1,)]


def test_a_change_that_changes_nothing_keeps_the_version(db: Database) -> None:
    db.execute("CREATE TABLE app.t (id INT PRIMARY KEY, v TEXT)")
    for change in ("MODIFY COLUMN v TEXT", "RENAME COLUMN v TO v", "ALTER COLUMN v DROP DEFAULT"):
        assert altered(db, change) == "Table app.t unchanged"
    assert altered(db, "SET ACCESS LEVEL private") == "Table app.t unchanged"


def test_access_levels_belong_to_shared_tables(db: Database) -> None:
    db.execute("CREATE TABLE app.t (id INT PRIMARY KEY); CREATE USER TABLE app.u (id INT PRIMARY KEY)")
    altered(db, "SET TBLPROPERTIES (ACCESS_LEVEL = 'public')")
    assert rows(db, "SELECT * FROM app.t", role="user") == []
    altered(db, "SET ACCESS LEVEL DBA")
    assert "may not read" in refused(db, "SELECT * FROM app.t", role="service")
    assert "only SHARED" in refused(db, "ALTER TABLE app.u SET ACCESS LEVEL public")


def test_streams_are_altered_too(db: Database) -> None:
    db.execute("CREATE STREAM TABLE app.t (x INT, v TEXT) WITH (TTL_SECONDS = 3600)")
    db.execute("INSERT INTO app.t VALUES (1, 'a')")
    altered(db, "ADD COLUMN n INT NOT NULL DEFAULT 4")
    altered(db, "RENAME COLUMN v TO w")
    altered(db, "MODIFY COLUMN x BIGINT")
    assert rows(db, "SELECT x, w, n FROM app.t") == [(1, "a", 4)]


def test_a_long_history_reads_right_in_both_tiers(db: Database) -> None:
    """Forty changes with a row after each, flushed now and then; a dict per row says what it must read."""
    db.execute("CREATE TABLE app.t (id INT PRIMARY KEY, keep TEXT)")
    expected: dict[int, dict[str, object]] = {}
    present: list[str] = []
    for step in range(40):
        name = f"c{step % 7}"
        if name in present:
            change = step % 3
            if change == 0:
                altered(db, f"DROP COLUMN {name}")
                present.remove(name)
                for row in expected.values():
                    row.pop(name, None)
            else:
                altered(db, f"RENAME COLUMN {name} TO r{step}")
                altered(db, f"RENAME COLUMN r{step} TO {name}")
        else:
            altered(db, f"ADD COLUMN {name} INT NOT NULL DEFAULT {step}")
            present.append(name)
            for row in expected.values():
                row[name] = step
        names = ["id", "keep", *present]
        values = [step, f"row {step}", *(step * 100 + at for at in range(len(present)))]
        marks = ", ".join(f"${at + 1}" for at in range(len(values)))
        db.execute(f"INSERT INTO app.t ({', '.join(names)}) VALUES ({marks})", values)
        expected[step] = dict(zip(names, values, strict=True))
        if step % 9 == 8:
            flush(db, "app.t")
    chosen = ", ".join(["id", "keep", *sorted(present)])
    wanted = [tuple(row[name.strip()] for name in chosen.split(",")) for _, row in sorted(expected.items())]
    assert same_after_compaction(db, f"SELECT {chosen} FROM app.t ORDER BY id") == wanted
    assert rows(db, f"SELECT {chosen} FROM app.t WHERE id = 3") == [wanted[3]]


def test_not_null_is_never_won_against_a_writer_of_null(db: Database) -> None:
    """SET NOT NULL while NULLs are written: one of the two is refused, and no NULL is left behind it."""
    db.execute("CREATE TABLE app.t (id INT PRIMARY KEY, v TEXT)")
    written: list[int] = []

    def write() -> None:
        for number in range(200):
            try:
                db.execute("INSERT INTO app.t VALUES ($1, NULL)", [number])
                written.append(number)
            except kalamdb.KalamDbError:
                return

    thread = threading.Thread(target=write)
    thread.start()
    set_ = False
    while thread.is_alive() and not set_:
        try:
            altered(db, "ALTER COLUMN v SET NOT NULL")
            set_ = True
        except kalamdb.KalamDbError:
            db.execute("DELETE FROM app.t WHERE true")
    thread.join()
    if set_:
        assert rows(db, "SELECT count(*) FROM app.t WHERE v IS NULL") == [(0,)]
