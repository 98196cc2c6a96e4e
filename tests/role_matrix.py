"""Who may do what: the generated table (role, object, operation) of surface reference 5.2 and 3.7, for every way
to run SQL. A runner says for a statement and a role whether it was allowed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kalamdb.types import Role

Runner = Callable[[str, Role], bool]
"""Runs a statement as user 'ann' with a role; False when it was refused for lack of rights."""

LEVELS = ("public", "private", "restricted", "dba")
WORLD = [
    "CREATE NAMESPACE app",
    *(
        f"CREATE TABLE app.{level}_t (id INT PRIMARY KEY, v INT) WITH (ACCESS_LEVEL = '{level}'); "
        f"INSERT INTO app.{level}_t VALUES (1, 1)"
        for level in LEVELS
    ),
    "CREATE USER TABLE app.own (id INT PRIMARY KEY, v INT); INSERT INTO app.own VALUES (1, 1)",
    "CREATE STREAM TABLE app.st (x INT) WITH (TTL_SECONDS = 60)",
    *(f"CREATE USER a_{role} WITH INTERNAL ROLE {role}" for role in Role),
]
"""What must be there: a table of each access level, a user table, a stream, a user of each role."""

NOBODY, ANYBODY, SERVICES, ADMINS = "", "user service dba system", "service dba system", "dba system"

STATED: list[tuple[str, str]] = [
    ("SELECT v FROM app.private_t WHERE id = 1", "service dba system"),
    ("SELECT count(*) FROM app.public_t WHERE id IN (SELECT id FROM app.dba_t)", "dba system"),
    ("WITH q AS (SELECT * FROM app.private_t) SELECT * FROM q", "service dba system"),
    ("UPDATE app.public_t SET v = 2 WHERE id = 1", "service dba system"),
    ("DELETE FROM app.private_t WHERE id = 99", "service dba system"),
    ("UPDATE app.dba_t SET v = 2 WHERE v > 0", "dba system"),
    ("INSERT INTO app.own SELECT id + 100, v FROM app.dba_t WHERE false", "dba system"),
    ("INSERT INTO app.own VALUES (7, 7) ON CONFLICT DO NOTHING", "user service dba system"),
    ("UPDATE app.own SET v = 3 WHERE id = 1", "user service dba system"),
    ("DELETE FROM app.own WHERE v IN (SELECT v FROM app.private_t)", "service dba system"),
    ("INSERT INTO app.st VALUES (1)", "user service dba system"),
    ("DELETE FROM app.st WHERE x = 1", "user service dba system"),
    ("CREATE USER TABLE IF NOT EXISTS app.n1 (id INT PRIMARY KEY)", "user service dba system"),
    ("CREATE STREAM TABLE IF NOT EXISTS app.n2 (x INT) WITH (TTL_SECONDS = 5)", "user service dba system"),
    ("CREATE TABLE IF NOT EXISTS app.n3 (id INT PRIMARY KEY)", "service dba system"),
    ("ALTER TABLE app.own ALTER COLUMN v DROP DEFAULT", "user service dba system"),
    ("ALTER TABLE app.public_t ALTER COLUMN v DROP DEFAULT", "service dba system"),
    ("ALTER TABLE app.private_t SET ACCESS LEVEL private", "service dba system"),
    ("DROP TABLE IF EXISTS app.nope", "dba system"),
    ("TRUNCATE TABLE app.own", "dba system"),
    ("CREATE OR REPLACE VIEW app.v AS SELECT 1", "dba system"),
    ("DROP VIEW IF EXISTS app.v", "dba system"),
    ("CREATE NAMESPACE IF NOT EXISTS n", "dba system"),
    ("ALTER NAMESPACE app SET OPTIONS (a = 1)", "dba system"),
    ("DROP NAMESPACE IF EXISTS n", "dba system"),
    ("USE app", "user service dba system"),
    ("SHOW NAMESPACES", "user service dba system"),
    ("SHOW TABLES IN app", "user service dba system"),
    ("DESCRIBE TABLE app.public_t", "user service dba system"),
    ("DESCRIBE TABLE app.public_t HISTORY", "user service dba system"),
    ("DESCRIBE app.public_t", "dba system"),
    ("SHOW COLUMNS FROM app.public_t", "dba system"),
    ("SHOW STATS FOR TABLE app.own", "user service dba system"),
    ("SHOW STATS FOR TABLE app.dba_t", "dba system"),
    ("SHOW ALL", "dba system"),
    ("EXPLAIN SELECT * FROM app.own", "dba system"),
    ("EXPLAIN ANALYZE SELECT 1", "dba system"),
    ("SHOW MANIFEST", "service dba system"),
    ("STORAGE FLUSH TABLE app.own", "service dba system"),
    ("STORAGE FLUSH ALL IN app", "service dba system"),
    ("STORAGE COMPACT TABLE app.own", "service dba system"),
    ("SHOW JOBS", "dba system"),
    ("SELECT * FROM information_schema.tables", "user service dba system"),
    ("SELECT 1; DROP TABLE IF EXISTS app.nope", "dba system"),
]

# object -> roles that may read, roles that may write
_TABLES = {
    "app.public_t": (ANYBODY, SERVICES),
    "app.private_t": (SERVICES, SERVICES),
    "app.restricted_t": (SERVICES, SERVICES),
    "app.dba_t": (ADMINS, ADMINS),
    "app.own": (ANYBODY, ANYBODY),
}
_READS = [
    "SELECT * FROM {0}",
    "SELECT v FROM {0} WHERE id = 1",
    "SELECT count(*) FROM app.own WHERE id IN (SELECT id FROM {0})",
    "SELECT (SELECT max(v) FROM {0})",
    "WITH q AS (SELECT * FROM {0}) SELECT * FROM q",
    "SELECT o.id FROM app.own o JOIN {0} t ON o.id = t.id",
    "SELECT id FROM app.own UNION ALL SELECT id FROM {0}",
    "SELECT * FROM (SELECT id FROM {0}) q",
    "SELECT 1; SELECT count(*) FROM {0}",
    "INSERT INTO app.own SELECT id + 1000, v FROM {0} WHERE false",
    "UPDATE app.own SET v = (SELECT max(v) FROM {0}) WHERE id = 77",
    "DELETE FROM app.own WHERE id = 77 AND v IN (SELECT v FROM {0})",
    "BEGIN; SELECT count(*) FROM {0}; COMMIT",
]
_WRITES = [
    "INSERT INTO {0} VALUES (2, 2) ON CONFLICT DO NOTHING",
    "UPDATE {0} SET v = 2 WHERE id = 1",
    "UPDATE {0} SET v = 2 WHERE v > 0",
    "DELETE FROM {0} WHERE id = 99",
    "DELETE FROM {0} WHERE v > 1000",
    "SELECT 1; DELETE FROM {0} WHERE id = 99",
]
_SYSTEM = ("system.tables", "system.users", "system.jobs", "system.settings", "system.audit_log")
_SYSTEM_READS = [
    "SELECT count(*) FROM {0}",
    "SELECT (SELECT count(*) FROM {0})",
    "SELECT count(*) FROM app.public_t WHERE EXISTS (SELECT 1 FROM {0})",
    "WITH q AS (SELECT count(*) AS n FROM {0}) SELECT * FROM q",
    "SELECT count(*) FROM app.public_t p JOIN {0} s ON true",
    "SELECT 1 UNION ALL SELECT count(*) FROM {0}",
    "SELECT 1; SELECT count(*) FROM {0}",
    "BEGIN; SELECT count(*) FROM {0}; COMMIT",
    "INSERT INTO app.own SELECT 5000, count(*) FROM {0} HAVING false",
    "DELETE FROM app.own WHERE id = 77 AND EXISTS (SELECT 1 FROM {0})",
    "EXPLAIN SELECT * FROM {0}",
]
# role of the target -> roles that may act for it
_ACTING = {
    Role.ANONYMOUS: SERVICES, Role.USER: SERVICES, Role.SERVICE: SERVICES, Role.DBA: ADMINS, Role.SYSTEM: "system",
}  # fmt: skip
_INNER = [
    # statement inside, whether role user may run it
    ("SELECT * FROM app.own", True),
    ("INSERT INTO app.own VALUES (3, 3) ON CONFLICT DO NOTHING", True),
    ("SELECT * FROM system.users", False),
    ("DROP TABLE IF EXISTS app.nope", False),
    ("CREATE USER eve", False),
    ("SHOW ALL", False),
]


def _generated() -> Iterator[tuple[str, str]]:
    for table, (readers, writers) in _TABLES.items():
        yield from ((form.format(table), readers) for form in _READS)
        yield from ((form.format(table), writers) for form in _WRITES)
        yield f"EXPLAIN SELECT * FROM {table}", ADMINS
    for table in _SYSTEM:
        yield from ((form.format(table), ADMINS) for form in _SYSTEM_READS)
    for target, roles in _ACTING.items():
        yield f"EXECUTE AS USER 'a_{target}' (SELECT count(*) FROM app.own)", roles
    for inner, possible in _INNER:
        yield f"EXECUTE AS USER 'a_user' ({inner})", SERVICES if possible else NOBODY
        yield f"SELECT 1; EXECUTE AS USER nobody_yet ({inner})", SERVICES if possible else NOBODY
        yield f"EXECUTE AS USER ann ({inner})", ANYBODY if possible else NOBODY


MATRIX = list(dict.fromkeys([*STATED, *_generated()]))
"""(statement, roles that may run it)."""


def check(run: Runner, statement: str, roles: str) -> None:
    """Fail unless exactly these roles may run the statement."""
    found = [role.value for role in Role if run(statement, role)]
    assert found == [role.value for role in Role if role.value in roles.split()], statement
