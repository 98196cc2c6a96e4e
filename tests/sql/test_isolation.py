"""No statement of a user shows, counts, changes or trips over a row of another user.

Two databases get the same statements of alice: in one she is alone, in the other three more users hold the
same keys, with cells that can be recognised anywhere and on which her expressions fail. Every answer must
be the same in both, and nothing of the others may show.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import kalamdb
from kalamdb.database import Database
from kalamdb.storage import keys
from kalamdb.types import Scope
from tests.conftest import run_job
from tests.sql.grammar import DDL, MARKERS, Grammar, cells, marked_cells

ALICE = "alice"
ROWS = range(1, 13)
STATEMENTS = 50
WORLDS = {"hot": 2, "cold": 4, "mixed": 3, "marked": 2, "compacted": 2, "segments": 1, "large": 2}
"""States of the tiers, and how many worlds of each are tried."""


def neighbours() -> tuple[str, str, str]:
    """Users whose rows lie right before, right after and in the same hash slot as those of alice."""
    own = keys.scope_hash(ALICE)
    names = [f"peer{number}" for number in range(200_000)]
    before = max((name for name in names[:400] if keys.scope_hash(name) < own), key=keys.scope_hash)
    after = min((name for name in names[:400] if keys.scope_hash(name) > own), key=keys.scope_hash)
    return before, after, next(name for name in names if keys.scope_hash(name) == own)


PEERS = neighbours()


class Pair:
    """The same rows of alice in a database of her own and in one that she shares."""

    def __init__(self, alone: Database, shared: Database) -> None:
        self.alone = alone
        self.shared = shared

    def both(self, sql: str) -> None:
        """Run a statement of the administrator in both."""
        for db in (self.alone, self.shared):
            if sql.startswith("STORAGE"):
                run_job(db, sql)
            else:
                db.execute(sql)

    def load(self, at: range, on_conflict: str = "error") -> None:
        """Give each user rows under the same keys."""
        for db in (self.alone, self.shared):
            db.insert("iso.t", [cells(key) for key in at], user=ALICE, on_conflict=on_conflict)
        for peer in PEERS:
            self.shared.insert("iso.t", [marked_cells(key) for key in at], user=peer, on_conflict=on_conflict)

    def churn(self) -> None:
        """Update, delete and insert a few rows of each user."""
        script = "UPDATE iso.t SET dc = dc + 1 WHERE id IN (2, 3); DELETE FROM iso.t WHERE id IN (4, 5)"
        for db in (self.alone, self.shared):
            db.execute(script, user=ALICE)
        for peer in PEERS:
            self.shared.execute(script, user=peer)
        self.load(range(13, 16))

    def rows_of(self, peer: str) -> list[tuple[Any, ...]]:
        """All rows of another user."""
        return self.shared.execute("SELECT * FROM iso.t ORDER BY id", user=peer).rows


@contextmanager
def opened(state: str) -> Iterator[Pair]:
    settings: dict[str, Any] = {"flush.scheduler_enabled": False, "compaction.enabled": False}
    if state == "segments":
        settings["limits.batch_rows_max"] = 4
    if state == "large":
        settings["segment.row_group_rows_max"] = 1024
    with kalamdb.connect(":memory:", **settings) as alone, kalamdb.connect(":memory:", **settings) as shared:
        pair = Pair(alone, shared)
        fill(pair, state)
        yield pair


def fill(pair: Pair, state: str) -> None:
    """Bring the rows into a state of the tiers."""
    pair.both("CREATE NAMESPACE iso")
    pair.both(DDL)
    pair.both("CREATE STREAM TABLE iso.s (v TEXT, z INT) WITH (TTL_SECONDS = 3600)")
    pair.both("CREATE SHARED TABLE iso.p (id BIGINT PRIMARY KEY, name TEXT) WITH (ACCESS_LEVEL = 'public')")
    pair.both("INSERT INTO iso.p VALUES (1, 'one'), (2, 'two'), (3, 'three'), (40, 'forty')")
    pair.both("CREATE VIEW iso.w AS SELECT id, n, z, v, j, d, dc, da, ts, dtm, ti, u, by, b, e FROM iso.t WHERE id > 2")
    for db in (pair.alone, pair.shared):
        db.execute("INSERT INTO iso.s VALUES ('3', 2), ('8', 4)", user=ALICE)
    for peer in PEERS:
        pair.shared.execute("INSERT INTO iso.s VALUES ('MARKER', 0), ('MARKER2', 0)", user=peer)
    pair.load(range(1, 1100) if state == "large" else ROWS)
    if state not in ("hot", "segments"):
        pair.both("STORAGE FLUSH TABLE iso.t")
    if state in ("mixed", "marked", "compacted"):
        pair.churn()
    if state in ("marked", "compacted"):
        pair.both("STORAGE FLUSH TABLE iso.t")
    if state == "compacted":
        pair.both("STORAGE COMPACT TABLE iso.t")


def outcome(db: Database, sql: str, how: str) -> tuple[Any, str]:
    """(what must be the same in both databases, every text that alice gets to see)."""
    try:
        if how == "stream":
            with db.stream(sql, user=ALICE) as batches:
                rows = [tuple(row.values()) for batch in batches for row in batch.to_pylist()]
            message = None
        else:
            result = db.execute(sql, user=ALICE, role=how)
            rows, message = [row for one in result.results for row in one.rows], result.message
    except kalamdb.KalamDbError as exc:
        return type(exc).__name__, f"{exc} {exc.__cause__}"
    return (sorted(map(repr, rows)), None if message and "ransaction" in message else message), f"{rows} {message}"


def statement(grammar: Grammar) -> tuple[str, str]:
    """(SQL, how to run it)"""
    role = grammar.pick(("user", "service", "dba", "system"))
    match grammar.below(20):
        case 0:
            return grammar.faulty_query(), role
        case 1 | 2:
            return grammar.query(), "stream"
        case 3 | 4 | 5 | 6:
            return grammar.write(), role
        case 7 | 8:
            end = grammar.pick(("COMMIT", "COMMIT", "ROLLBACK"))
            return f"BEGIN; {grammar.write()}; {grammar.query()}; {grammar.write()}; {grammar.query()}; {end}", role
        case _:
            return grammar.query(), role


def hear_alice(pair: Pair, seed: int, count: int) -> int:
    """Let alice run statements of the grammar; how many of them succeeded."""
    grammar = Grammar(seed)
    before = {peer: pair.rows_of(peer) for peer in PEERS}
    succeeded = 0
    for number in range(count):
        sql, how = statement(grammar)
        wanted, _ = outcome(pair.alone, sql, how)
        found, text = outcome(pair.shared, sql, how)
        told = f"statement {number} of seed {seed} ({how}): {sql}\n{text[:2000]}"
        assert not MARKERS.search(text), told
        assert found == wanted, f"{told}\nalone: {wanted}"
        succeeded += not isinstance(found, str)
        if not sql.startswith(("SELECT", "WITH")):
            peer = PEERS[number % len(PEERS)]
            assert pair.rows_of(peer) == before[peer], told
            if pair.alone.execute("SELECT count(*) FROM iso.t", user=ALICE).scalar() < 8:
                for db in (pair.alone, pair.shared):
                    db.insert("iso.t", [cells(key) for key in ROWS], user=ALICE, on_conflict="update")
    assert {peer: pair.rows_of(peer) for peer in PEERS} == before
    return succeeded


@pytest.mark.parametrize(
    ("state", "world"), [(state, world) for state, many in WORLDS.items() for world in range(many)]
)
def test_answers_do_not_depend_on_the_rows_of_other_users(state: str, world: int) -> None:
    with opened(state) as pair:
        succeeded = hear_alice(pair, zlib.crc32(state.encode()) + world, STATEMENTS)
        assert succeeded > STATEMENTS * 0.8
        assert pair.shared.check().ok


@pytest.mark.long
@pytest.mark.parametrize("seed", range(70))
def test_answers_do_not_depend_on_the_rows_of_other_users_while_the_tiers_change(seed: int) -> None:
    with opened(list(WORLDS)[seed % len(WORLDS)]) as pair:
        for round_ in range(8):
            hear_alice(pair, 1000 * (seed + 1) + round_, STATEMENTS)
            for operation in ("FLUSH", "COMPACT") if round_ % 3 == 2 else ("FLUSH",):
                for db in (pair.alone, pair.shared):
                    table = next(one.definition for one in db.context.catalog.tables() if one.definition.name == "t")
                    if operation == "COMPACT" or db.context.store.has_pending(table.uid):
                        run_job(db, f"STORAGE {operation} TABLE iso.t")


# What the grammar does not reach


def quiet(**settings: Any) -> Database:
    return kalamdb.connect(":memory:", **{"flush.scheduler_enabled": False, "compaction.enabled": False, **settings})


def test_row_groups_of_others_are_cut_out_even_when_their_keys_have_no_statistics() -> None:
    with quiet(**{"segment.row_group_rows_max": 1024}) as db:
        db.execute("CREATE NAMESPACE app")
        db.execute("CREATE USER TABLE app.t (id TEXT PRIMARY KEY, v TEXT, n BIGINT)")
        for user, value, number in ((ALICE, "7", 5), *((peer, "MARKER", 7770001112220) for peer in PEERS)):
            names = [f"{at:05}" + "x" * 5000 * (at in (0, 2499)) for at in range(2500)]
            db.insert("app.t", [(name, value, number) for name in names], user=user)
        run_job(db, "STORAGE FLUSH TABLE app.t")
        for predicate in ("CAST(v AS INT) = 7", "CAST(n AS DECIMAL(5,2)) > 1 AND CAST(v AS INT) > 3"):
            assert db.execute(f"SELECT count(*) FROM app.t WHERE {predicate}", user=ALICE).scalar() == 2500


def test_predicates_that_statistics_of_others_refuse_do_not_open_their_row_groups() -> None:
    with opened("large") as pair:
        for predicate in (
            "CAST(n AS DECIMAL(5,2)) > 0 AND CAST(v AS INT) >= 0",
            "CAST(d AS SMALLINT) >= 0 AND CAST(v AS INT) >= 0",
            "CAST(da AS TIMESTAMP) > TIMESTAMP '2000-01-01 00:00:00' AND 10 / z > 0",
        ):
            sql = f"SELECT count(*), sum(id) FROM iso.t WHERE {predicate}"
            found = pair.shared.execute(sql, user=ALICE).rows
            assert found == pair.alone.execute(sql, user=ALICE).rows
            assert found[0][0] > 800


def test_the_planner_knows_no_statistics_of_a_file_that_users_share() -> None:
    with opened("cold") as pair:
        for predicate in (
            "(CAST(d AS SMALLINT)) - 3 = 16",
            "CAST(da AS TIMESTAMP) > TIMESTAMP '2000-01-01'",
            "10 / z = n",
        ):
            for sql in (
                f"SELECT count(*) FROM iso.t WHERE {predicate}",
                f"SELECT count(*) FROM iso.p JOIN iso.t ON p.id = t.id WHERE {predicate}",
                f"UPDATE iso.t SET v = v WHERE {predicate}",
            ):
                assert pair.shared.execute(sql, user=ALICE).rows == pair.alone.execute(sql, user=ALICE).rows


@pytest.mark.parametrize("state", ["hot", "marked", "large"])
def test_plans_tell_nothing_of_other_users(state: str) -> None:
    grammar = Grammar(7)
    with opened(state) as pair:
        secrets = [text for peer in PEERS for text in (peer, peer.encode().hex())]
        secrets += [str(pair.shared.context.store.root), ".parquet", "output_rows=", "row_groups"]
        for number in range(40):
            plan = ("EXPLAIN", "EXPLAIN ANALYZE", "EXPLAIN VERBOSE", "EXPLAIN ANALYZE VERBOSE")[number % 4]
            sql = f"{plan} {grammar.query()}"
            try:
                text = repr(pair.shared.execute(sql, user=ALICE).rows)
            except kalamdb.InvalidRequest as exc:
                text = str(exc)
            assert not MARKERS.search(text), f"{sql}\n{text}"
            assert not [secret for secret in secrets if secret.lower() in text.lower()], f"{sql}\n{text}"


@pytest.mark.parametrize("role", ["user", "service", "dba", "system"])
def test_system_tables_and_show_statements_hold_no_cell_and_no_name_of_a_user(role: str) -> None:
    with opened("marked") as pair:
        db = pair.shared
        names = db.execute("SELECT namespace_id, table_name FROM system.tables WHERE table_type = 'system'").rows
        statements = [f"SELECT * FROM {namespace}.{name}" for namespace, name in names]
        statements += ["SHOW MANIFEST", "SHOW TABLES IN iso", "SHOW NAMESPACES", "SHOW ALL", "SHOW JOBS"]
        for table in ("t", "s", "w"):
            statements += [f"SHOW STATS FOR TABLE iso.{table}", f"SHOW COLUMNS FROM iso.{table}"]
            statements += [f"DESCRIBE TABLE iso.{table}", f"DESCRIBE TABLE iso.{table} HISTORY"]
        refused = 0
        for sql in statements:
            try:
                text = repr(db.execute(sql, user=ALICE, role=role).rows)
            except (kalamdb.Denied, kalamdb.NotFound) as exc:
                text = str(exc)
                refused += isinstance(exc, kalamdb.Denied)
            assert not MARKERS.search(text), f"{sql}\n{text}"
            assert not [peer for peer in PEERS if peer in text], f"{sql}\n{text}"
        assert (refused > 0) == (role in ("user", "service"))


def test_statistics_that_a_user_may_see_count_only_rows_of_that_user() -> None:
    with opened("marked") as pair:
        for table in ("t", "s"):
            sql = f"SHOW STATS FOR TABLE iso.{table}"
            own = pair.shared.execute(sql, user=ALICE, role="user").rows
            assert own == pair.alone.execute(sql, user=ALICE, role="user").rows
            assert own[0][1] > 0


@pytest.mark.parametrize(
    "forged",
    [
        "false UNION ALL SELECT X'{key}', {seq}, id, v FROM app.t",
        "false UNION ALL SELECT {seq}, id, v FROM app.t",
        "false) UNION ALL (SELECT X'{key}', {seq}, id, v FROM app.t",
        "v = E'\\'' ) UNION ALL SELECT X'{key}', {seq}, id, v FROM app.t --'",
        "v = 'a' /* /* */ ) UNION ALL SELECT {seq}, id, v FROM app.t -- */",
        "_key = X'{key}'",
        "_key < X'ff' OR true) OR (_key IS NOT NULL",
    ],
)
@pytest.mark.parametrize("verb", ["DELETE FROM app.t WHERE {}", "UPDATE app.t SET v = 'evil' WHERE {}"])
def test_no_predicate_can_name_a_row_of_somebody_else(verb: str, forged: str) -> None:
    with quiet() as db:
        db.execute("CREATE NAMESPACE app")
        db.execute("CREATE USER TABLE app.t (id BIGINT PRIMARY KEY, v TEXT)")
        for user in (ALICE, "bob"):
            db.execute("INSERT INTO app.t VALUES (1, $1)", [user], user=user)
        seq = db.execute("SELECT _seq FROM app.t", user="bob").scalar()
        key = (keys.scope_prefix(Scope("bob")) + keys.encode_int(1)).hex()
        with pytest.raises(kalamdb.InvalidRequest):
            db.execute(verb.format(forged.format(key=key, seq=seq)), user=ALICE)
        assert db.execute("SELECT * FROM app.t", user="bob").rows == [(1, "bob")]
        assert db.execute("SELECT * FROM app.t", user=ALICE).rows == [(1, ALICE)]


def test_users_whose_names_begin_alike_or_hold_odd_characters_stay_apart() -> None:
    names = [
        "a",
        "a\x00",
        "a\x00\x01",
        "a\x00\xff",
        "ab",
        "a ",
        "A",
        "å",
        "a'; DROP TABLE app.t; --",
        "a/../b",
        "%",
        "_",
    ]
    with quiet() as db:
        db.execute("CREATE NAMESPACE app")
        db.execute("CREATE USER TABLE app.t (id TEXT PRIMARY KEY, v TEXT)")
        for name in names:
            db.execute("INSERT INTO app.t VALUES ('k', $1), ('\u0001', CURRENT_USER())", [name], user=name)
        for _ in range(2):
            for name in names:
                assert db.execute("SELECT v FROM app.t", user=name).rows == [(name,), (name,)]
                assert db.execute("SELECT count(*) FROM app.t WHERE v <> CURRENT_USER", user=name).scalar() == 0
            if db.context.store.has_pending(db.context.catalog.tables()[0].definition.uid):
                run_job(db, "STORAGE FLUSH TABLE app.t")
        for name in names[1:]:
            assert db.execute("DELETE FROM app.t WHERE true", user=name).row_count == 2
        assert db.execute("SELECT count(*) FROM app.t", user="a").scalar() == 2


def test_a_refused_row_is_told_without_a_word_of_the_row_that_another_user_holds() -> None:
    with quiet() as db:
        db.execute("CREATE NAMESPACE app")
        db.execute("CREATE USER TABLE app.t (id INT PRIMARY KEY, v TEXT NOT NULL, n INT CHECK (n < 10))")
        for user, value in ((ALICE, "own"), ("bob", "MARKER")):
            db.execute("INSERT INTO app.t VALUES (1, $1, 1)", [value], user=user)
        run_job(db, "STORAGE FLUSH TABLE app.t")
        db.execute("INSERT INTO app.t VALUES (2, 'MARKER', 1)", user="bob")
        for sql in (
            "INSERT INTO app.t VALUES (1, 'again', 1)",
            "INSERT INTO app.t VALUES (2, NULL, 1)",
            "INSERT INTO app.t VALUES (2, 'x', 11)",
            "UPDATE app.t SET n = 99 WHERE true",
            "UPDATE app.t SET v = NULL WHERE n = 1",
            "UPDATE app.t SET n = CAST(v AS INT) WHERE true",
        ):
            with pytest.raises(kalamdb.KalamDbError) as refused:
                db.execute(sql, user=ALICE)
            assert not MARKERS.search(f"{refused.value} {refused.value.__cause__}")
        db.execute("INSERT INTO app.t VALUES (2, 'own too', 1)", user=ALICE)
        assert db.execute("SELECT * FROM app.t ORDER BY id", user="bob").rows == [(1, "MARKER", 1), (2, "MARKER", 1)]
