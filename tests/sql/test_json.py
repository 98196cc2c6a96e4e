"""JSON operators and functions over both tiers (surface reference 3.11)."""

from __future__ import annotations

from typing import Any

import pytest

from kalamdb.database import Database
from tests.sql.conftest import flush, refused, rows

DOCUMENT = """{"a": {"b": [10, 20, {"c": "x"}]}, "s": "text", "n": 5, "f": 1.5, "t": true, "z": null, "it''s": 1}"""


@pytest.fixture(params=["hot", "cold"])
def documents(request: pytest.FixtureRequest, db: Database) -> Database:
    db.execute("CREATE TABLE app.d (id INT PRIMARY KEY, d JSON)")
    db.execute(f"INSERT INTO app.d VALUES (1, '{DOCUMENT}'), (2, NULL), (3, '[1, \"two\", [3]]'), (4, '\"bare\"')")
    if request.param == "cold":
        flush(db, "app.d")
    return db


EXPRESSIONS: list[tuple[str, Any]] = [
    ("d->'a'", {"b": [10, 20, {"c": "x"}]}),
    ("d->'a'->'b'->1", 20),
    ("d->'a'->'b'->2->>'c'", "x"),
    ("d->'a'->'b'->-1", {"c": "x"}),
    ("d->>'a'", '{"b":[10,20,{"c":"x"}]}'),
    ("d->>'s'", "text"),
    ("d->'s'", "text"),
    ("d->>'n'", "5"),
    ("d->>'t'", "true"),
    ("d->'z'", None),
    ("d->>'z'", None),
    ("d->'nope'", None),
    ("d->'a'->'nope'->'deeper'", None),
    ("d->0", None),
    ("d->>'it''s'", "1"),
    ("(d->>'n')::int + 1", 6),
    ("CAST(d->>'f' AS DOUBLE)", 1.5),
    ("d->('s')", "text"),
    ("d ? 's'", True),
    ("d ? 'z'", True),
    ("d ? 'nope'", False),
    ("d->'a' ? 'b'", True),
    ("json_get(d, 'a', 'b', 0)", 10),
    ("json_get_json(d, 'a', 'b')", [10, 20, {"c": "x"}]),
    ("json_as_text(d, 'a', 'b', 2, 'c')", "x"),
    ("json_get_str(d, 's')", "text"),
    ("json_get_str(d, 'n')", None),
    ("json_get_int(d, 'n')", 5),
    ("json_get_int(d, 'a', 'b', 1)", 20),
    ("json_get_int(d, 's')", None),
    ("json_get_float(d, 'f')", 1.5),
    ("json_get_float(d, 'n')", 5.0),
    ("json_get_bool(d, 't')", True),
    ("json_get_bool(d, 'n')", None),
    ("json_length(d)", 7),
    ("json_length(d, 'a', 'b')", 3),
    ("json_length(d, 's')", None),
    ("json_object_keys(d, 'a')", ["b"]),
    ("json_contains(d, 's')", True),
    ("json_contains(d, 'a', 'b')", True),
    ("json_contains(d, 'a', 'nope')", False),
    ("lower(upper(d->>'s')) || '!'", "text!"),
    ("CASE WHEN d ? 'a' THEN d->>'s' ELSE 'none' END", "text"),
]


@pytest.mark.parametrize(("expression", "value"), EXPRESSIONS)
def test_an_expression_of_a_document(documents: Database, expression: str, value: Any) -> None:
    assert rows(documents, f"SELECT {expression} FROM app.d WHERE id = 1") == [(value,)]
    assert rows(documents, f"SELECT x FROM (SELECT id, {expression} AS x FROM app.d) AS q WHERE id = 1") == [(value,)]


def test_null_arrays_and_bare_values_answer_too(documents: Database) -> None:
    items = "d->0, d->>1, d->-1, d ? 'two', json_length(d), d->'a', json_object_keys(d)"
    sql = f"SELECT {items} FROM app.d WHERE id > 1 ORDER BY id"
    nothing = (None, None, None, False, None, None, None)
    assert rows(documents, sql) == [(None,) * 7, (1, "two", [3], True, 3, None, None), nothing]


def test_documents_filter_group_and_sort(documents: Database) -> None:
    assert rows(documents, "SELECT id FROM app.d WHERE d ? 'a' AND d->>'s' = 'text'") == [(1,)]
    assert rows(documents, "SELECT id FROM app.d WHERE json_get_int(d, 'n') BETWEEN 5 AND 6") == [(1,)]
    grouped = "SELECT d->>'s' AS s, count(*), sum(json_get_int(d, 'n')) FROM app.d GROUP BY d->>'s' ORDER BY d->>'s'"
    assert rows(documents, grouped) == [("text", 1, 5), (None, 3, None)]
    assert documents.execute("SELECT d->>'s', d -> 'a' FROM app.d").columns == ["d->>'s'", "d -> 'a'"]


def test_documents_decide_what_is_changed(documents: Database) -> None:
    assert documents.execute("UPDATE app.d SET d = '{\"a\": 2}' WHERE d->>'s' = 'text'").row_count == 1
    assert documents.execute("UPDATE app.d SET d = d->'a' WHERE d ? 'a' RETURNING d").rows == [(2,)]
    assert documents.execute("DELETE FROM app.d WHERE d->>1 = 'two' RETURNING d->0, d->'x'").rows == [(1, None)]
    documents.execute("INSERT INTO app.d SELECT 9, '{\"k\": [1]}'")
    assert rows(documents, "SELECT d->'k'->0 FROM app.d WHERE id = 9") == [(1,)]


def test_parameters_are_documents_keys_and_indexes(documents: Database) -> None:
    documents.execute("INSERT INTO app.d VALUES (?, ?)", [7, {"k": ["v"]}])
    assert rows(documents, "SELECT d->$1->$2, d->>$1 FROM app.d WHERE id = 7", ["k", 0]) == [("v", '["v"]')]
    assert rows(documents, "SELECT d ? 'k' FROM app.d WHERE id = ? AND d->? IS NOT NULL", [7, "k"]) == [(True,)]
    assert rows(documents, "SELECT json_get_str($1, 'a', $2)", [{"a": ["x"]}, 0]) == [("x",)]


def test_text_that_is_not_json_is_refused_on_the_way_in(documents: Database) -> None:
    message = refused(documents, "INSERT INTO app.d VALUES (8, '{bad')")
    assert message.startswith("column 'd': '{bad' is not valid JSON")
    assert rows(documents, "SELECT '{bad'->'a', '[1]'->0, '{\"a\": 1}'::json->>'a'") == [(None, 1, "1")]
