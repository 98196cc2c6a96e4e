"""Statements that are deep or long, and a child process that survives them: `python -m` this with sizes.

Prints one JSON object per statement: name, bytes, error (class and message, or null), seconds.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import kalamdb

STATEMENTS: dict[str, Callable[[int], str]] = {
    "plus": lambda n: "SELECT " + "+".join(["1"] * n),
    "or": lambda n: "SELECT id FROM app.t WHERE " + " OR ".join(f"id = {i}" for i in range(n)),
    "and": lambda n: "SELECT id FROM app.t WHERE " + " AND ".join(f"id <> {i}" for i in range(n)),
    "concatenation": lambda n: "SELECT " + "||".join(["'a'"] * n),
    "union": lambda n: " UNION ALL ".join(["SELECT 1"] * n),
    "parentheses": lambda n: "SELECT " + "(" * n + "1" + ")" * n,
    "open parentheses": lambda n: "SELECT " + "(" * n,
    "closed parentheses": lambda n: "SELECT 1" + ")" * n,
    "case": lambda n: "SELECT " + "CASE WHEN true THEN " * n + "1" + " END" * n,
    "open case": lambda n: "SELECT " + "CASE " * n,
    "end": lambda n: "SELECT 1 " + "END " * n,
    "not": lambda n: "SELECT id FROM app.t WHERE " + "NOT " * n + "true",
    "minus": lambda n: "SELECT " + "- " * n + "1",
    "sign": lambda n: "SELECT " + "+ " * n + "1",
    "cast": lambda n: "SELECT 1" + "::INT" * n,
    "nested cast": lambda n: "SELECT " + "CAST(" * n + "1" + " AS INT)" * n,
    "function": lambda n: "SELECT " + "abs(" * n + "1" + ")" * n,
    "sub-query": lambda n: "SELECT * FROM " + "(SELECT * FROM " * n + "app.t" + ") q" * n,
    "exists": lambda n: "SELECT 1 WHERE " + "EXISTS (SELECT 1 WHERE " * n + "true" + ")" * n,
    "in sub-query": lambda n: "SELECT 1 WHERE 1 " + "IN (SELECT 1 WHERE 1 " * n + "= 1" + ")" * n,
    "common tables": lambda n: (
        "WITH c0 AS (SELECT 1 AS x)"
        + "".join(f", c{i} AS (SELECT * FROM c{i - 1})" for i in range(1, n))
        + f" SELECT * FROM c{n - 1}"
    ),
    "joins": lambda n: (
        "SELECT count(*) FROM app.t a0" + "".join(f" JOIN app.t a{i} ON a{i}.id = a0.id" for i in range(1, n))
    ),
    "cross joins": lambda n: "SELECT count(*) FROM " + ", ".join(f"app.t a{i}" for i in range(n)),
    "in list": lambda n: "SELECT id FROM app.t WHERE id IN (" + ",".join(str(i) for i in range(n)) + ")",
    "in list of sums": lambda n: "SELECT id FROM app.t WHERE id IN (" + ",".join(f"{i}+1" for i in range(n)) + ")",
    "values": lambda n: "INSERT INTO app.t (id) VALUES " + ",".join(f"({i})" for i in range(n)),
    "values of sums": lambda n: "INSERT INTO app.t (id) VALUES " + ",".join(f"({i}+1)" for i in range(n)),
    "selected values": lambda n: "SELECT count(*) FROM (VALUES " + ",".join(f"({i})" for i in range(n)) + ") v(a)",
    "columns": lambda n: "SELECT " + ", ".join(f"id AS c{i}" for i in range(n)) + " FROM app.t",
    "order": lambda n: "SELECT id FROM app.t ORDER BY " + ",".join(["id"] * n),
    "group": lambda n: "SELECT 1 FROM app.t GROUP BY " + ",".join(["id"] * n),
    "json path": lambda n: "SELECT j" + "->'a'" * n + " FROM app.t",
    "index": lambda n: "SELECT e" + "[1]" * n + " FROM app.t",
    "array": lambda n: "SELECT " + "[" * n + "1" + "]" * n,
    "between": lambda n: "SELECT id FROM app.t WHERE " + "id BETWEEN 1 AND " * n + "1",
    "like": lambda n: "SELECT 'a' " + "LIKE 'a' " * n,
    "is null": lambda n: "SELECT 1 " + "IS NULL " * n,
    "interval": lambda n: "SELECT " + "INTERVAL " * n + "'1 day'",
    "dots": lambda n: "SELECT " + ".".join(["a"] * n),
    "commas": lambda n: "SELECT " + "," * n,
    "select": lambda n: "SELECT " * n,
    "array type": lambda n: "SELECT CAST(1 AS " + "ARRAY<" * n + "INT" + ">" * n + ")",
    "list type": lambda n: "SELECT CAST(NULL AS INT" + "[]" * n + ")",
    "lambda": lambda n: "SELECT " + "x -> " * n + "1",
    "pipe": lambda n: "SELECT id FROM app.t WHERE id = 1 " + "|> WHERE id = 1 " * n,
    "window": lambda n: "SELECT sum(id) OVER (ORDER BY " + "(" * n + "id" + ")" * n + ") FROM app.t",
    "digits": lambda n: "SELECT " + "9" * n,
    "name": lambda n: "SELECT " + "a" * n,
    "pattern": lambda n: "SELECT 'a' ~ '" + "(" * n + "a" + ")" * n + "'",
    "document": lambda n: "INSERT INTO app.t (id, j) VALUES (2, '" + "[" * n + "]" * n + "')",
    "statements": lambda n: "SELECT 1;" * n + "garbage",
    "comments": lambda n: "SELECT " + "/* x */" * n + "garbage",
    "update": lambda n: "UPDATE app.t SET v = 'a' WHERE " + " OR ".join(["id = 1"] * n),
    "assignment": lambda n: "UPDATE app.t SET v = " + "||".join(["'a'"] * n) + " WHERE id > 0",
    "delete": lambda n: "DELETE FROM app.t WHERE " + "(" * n + "id = 1" + ")" * n,
    "check": lambda n: "CREATE TABLE app.z (id INT PRIMARY KEY, CHECK (" + "(" * n + "id = 1" + ")" * n + "))",
    "default": lambda n: "CREATE TABLE app.z (id INT PRIMARY KEY DEFAULT " + "(" * n + "1" + ")" * n + ")",
    "view": lambda n: "CREATE VIEW app.z AS SELECT " + "+".join(["1"] * n),
    "returning": lambda n: "INSERT INTO app.t (id) VALUES (3) RETURNING " + "+".join(["id"] * n),
}


def of_size(name: str, bytes_: int) -> str:
    """The statement with about that many bytes, a little less."""
    shape = STATEMENTS[name]
    unit = (len(shape(200)) - len(shape(100))) / 100
    count = max(int(bytes_ / max(unit, 1)), 1)
    while len(shape(count)) > bytes_ and count > 1:
        count = int(count * 0.95)
    return shape(count)


def main() -> None:
    """Run every statement named in the arguments, at every size."""
    with kalamdb.connect(":memory:", **{"flush.scheduler_enabled": False, "compaction.enabled": False}) as db:
        db.execute("CREATE NAMESPACE app")
        db.execute(
            "CREATE TABLE app.t (id INT PRIMARY KEY, v TEXT NOT NULL DEFAULT 'x', j JSON, e EMBEDDING(2)) "
            "WITH (TYPE = 'SHARED')"
        )
        db.execute("INSERT INTO app.t (id) VALUES (1)")
        before = db.execute("SELECT * FROM app.t").rows
        names = [name for name in sys.argv[2].split(",") if name] or list(STATEMENTS)
        for name in names:
            for size in map(int, sys.argv[1].split(",")):
                sql = of_size(name, size)
                started = time.perf_counter()
                error = None
                try:
                    db.execute(sql)
                except kalamdb.KalamDbError as exc:
                    error = [type(exc).__name__, str(exc)]
                    if db.execute("SELECT * FROM app.t").rows != before:
                        error = ["changed", str(exc)]
                took = time.perf_counter() - started
                print(
                    json.dumps({"name": name, "bytes": len(sql), "error": error, "seconds": round(took, 2)}), flush=True
                )
                before = db.execute("SELECT * FROM app.t").rows


if __name__ == "__main__":
    main()
