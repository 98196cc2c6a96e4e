"""POST /v1/api/sql over a real process: shapes, types, batches, errors."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.conftest import Served
from tests.server.sql_client import TYPES, enter

VALUES = (
    "(9007199254740993, 7, 70000, 12.5, 0.000000000001, 0.5, 0.1, true, 'Ünï', x'00ff', '{\"a\": 1}', "
    "'1970-01-02 00:00:00.000001', '1970-01-01 00:00:01', '1970-01-03', '00:00:02.5', "
    "'6f0d3b3e-0000-4000-8000-000000000001', [0.5, 1, 2])"
)
SHOWN = [
    "9007199254740993", 7, 70000, "12.50", "0.000000000001", 0.5, 0.1, True, "Ünï", [0, 255], '{"a": 1}',
    86_400_000_001, 1_000_000, 2, 2_500_000, "6f0d3b3e-0000-4000-8000-000000000001", [0.5, 1.0, 2.0],
]  # fmt: skip
DATA_TYPES: list[Any] = [
    "BigInt", "SmallInt", "Int", {"Decimal": {"precision": 10, "scale": 2}},
    {"Decimal": {"precision": 30, "scale": 12}},
    "Float", "Double", "Boolean", "Text", "Bytes", "Json", "Timestamp", "DateTime", "Date", "Time", "Uuid",
    {"Embedding": 3},
]  # fmt: skip


@pytest.fixture
def app(served: Served) -> Served:
    return enter(served, {"alice": "user", "dora": "dba"})


def error(answer: Any) -> tuple[int, str]:
    body = answer.json()
    assert body["status"] == "error" and body["results"] == [] and isinstance(body["took"], float), body
    return answer.status_code, body["error"]["code"]


def test_a_row_has_the_same_form_by_key_by_scan_and_in_a_batch(app: Served) -> None:
    app.rows(f"CREATE TABLE app.t ({TYPES})")
    app.rows(f"INSERT INTO app.t VALUES {VALUES}")
    app.rows("INSERT INTO app.t (id, name) VALUES (2, 'nulls')")
    queries = ["SELECT * FROM app.t WHERE id = 9007199254740993", "SELECT * FROM app.t WHERE name = 'Ünï'"]
    for text in [*queries, f"SELECT 1; {queries[0]}", f"SELECT 1; {queries[1]}"]:
        answer = app.sql(text).json()
        result = answer["results"][-1]
        assert result["rows"][0][:-2] == SHOWN, text
        assert int(result["rows"][0][-2]) > 0 and result["rows"][0][-1] is False
        assert [field["data_type"] for field in result["schema"]] == [*DATA_TYPES, "BigInt", "Boolean"], text
        assert [field["index"] for field in result["schema"]] == list(range(19))
        flags = {field["name"]: field["flags"] for field in result["schema"] if "flags" in field}
        assert flags == {"id": ["nn", "pk", "uq"], "name": ["nn"], "_seq": ["nn"], "_deleted": ["nn"]}
        assert result["row_count"] == 1 and result["as_user"] == "root" and result.get("message") is None
        assert answer["status"] == "success" and round(answer["took"], 3) == answer["took"]
        assert ("error" in answer) == (";" not in text), "a single SELECT has the trailing error of a stream"
    [row] = app.rows("SELECT * FROM app.t WHERE name = 'nulls'")
    assert row[1:8] == [None] * 7 and row[9:17] == [None] * 8
    assert app.rows("SELECT COUNT(*) FROM app.t") == [["2"]]


def test_not_a_number_and_the_infinities_are_null(app: Served) -> None:
    assert app.rows("SELECT CAST('NaN' AS DOUBLE) AS n, CAST('inf' AS DOUBLE) AS i") == [[None, None]]


def test_dml_has_a_message_and_no_rows_and_is_summed_up_behind_the_rest_of_a_batch(app: Served) -> None:
    [made] = app.sql("CREATE TABLE app.t (id BIGINT PRIMARY KEY, n INT)").json()["results"]
    assert "rows" not in made and "schema" not in made and made["message"]
    [one] = app.sql("INSERT INTO app.t VALUES (1, 1), (2, 2)").json()["results"]
    assert one == {"row_count": 2, "message": "Inserted 2 row(s)", "as_user": "root"}
    batch = app.sql(
        "INSERT INTO app.t VALUES (3, 3); SELECT COUNT(*) FROM app.t; INSERT INTO app.t VALUES (4, 4); "
        "UPDATE app.t SET n = 9 WHERE id = 99; DELETE FROM app.t WHERE id = 1"
    ).json()
    assert "error" not in batch
    assert [(one["row_count"], one.get("message")) for one in batch["results"]] == [
        (1, None), (2, "Inserted 2 row(s)"), (1, "Deleted 1 row(s)"),
    ]  # fmt: skip


def test_bodies_that_are_not_understood_are_refused_by_name(app: Served) -> None:
    headers = {"Authorization": f"Bearer {app.login()}"}

    def post(content: bytes, kind: str = "application/json") -> tuple[int, str]:
        return error(app.client.post("/v1/api/sql", content=content, headers={**headers, "Content-Type": kind}))

    for content in (b"", b"{", b"[]", b'{"sql": 1}', b'{"sql": "SELECT 1", "params": {}}', b"\xff\xfe"):
        assert post(content) == (400, "INVALID_INPUT"), content
    for text in ("", "  ", ";", "-- nothing"):
        assert error(app.sql(text)) == (400, "EMPTY_SQL"), text
    assert error(app.sql("SELEC 1")) == (400, "INVALID_SQL")
    assert error(app.sql("SELECT $1; SELECT 2", [1])) == (400, "PARAMS_WITH_BATCH")
    for value in ([1], {"a": 1}):
        assert error(app.sql("SELECT $1", [value])) == (400, "INVALID_PARAMETER")
    assert error(app.sql("SELECT $1", [1, 2])) == (400, "INVALID_PARAMETER")
    assert error(app.sql("SELECT $1", list(range(51)))) == (400, "INVALID_PARAMETER")
    assert error(app.sql("SELECT $1", ["x" * (512 * 1024 + 1)])) == (400, "INVALID_PARAMETER")
    assert error(app.sql("SELECT 1", namespace_id="no-name")) == (400, "INVALID_INPUT")
    long = app.sql(f"SELECT '{'x' * (1 << 20)}'")
    assert error(long) == (400, "INVALID_SQL") and "too long" in long.json()["error"]["message"]
    assert error(app.client.post("/v1/api/sql", json={"sql": "SELECT 1"})) == (401, "MISSING_AUTHORIZATION")
    assert app.client.get("/v1/api/sql", headers=headers).status_code == 405


def test_a_form_is_taken_without_files(app: Served) -> None:
    headers = {"Authorization": f"Bearer {app.login()}"}
    form = {"sql": (None, "SELECT $1 + 1 AS n"), "params": (None, "[41]"), "namespace_id": (None, "app")}
    answer = app.client.post("/v1/api/sql", files=form, headers=headers)
    assert answer.json()["results"][0]["rows"] == [["42"]]
    upload = {"sql": (None, "SELECT 1"), "file:photo": ("a.png", b"\x89PNG", "image/png")}
    refused = app.client.post("/v1/api/sql", files=upload, headers=headers)
    assert error(refused) == (400, "INVALID_INPUT") and "file:photo" in refused.json()["error"]["message"]


def test_a_forbidden_statement_stops_the_whole_batch_before_it_starts(app: Served) -> None:
    app.rows("CREATE TABLE app.t (id BIGINT PRIMARY KEY) WITH (TYPE = 'USER')")
    refused = app.sql("INSERT INTO app.t VALUES (1); DROP TABLE app.t", user="alice")
    assert error(refused) == (403, "PERMISSION_DENIED")
    assert app.rows("SELECT COUNT(*) FROM app.t", user="alice") == [["0"]]


def test_the_first_failure_ends_a_batch_and_names_its_statement(app: Served) -> None:
    app.rows("CREATE TABLE app.t (id BIGINT PRIMARY KEY) WITH (TYPE = 'USER')")
    text = "INSERT INTO app.t VALUES (1); INSERT INTO app.t VALUES (1); INSERT INTO app.t VALUES (2)"
    for user, told in (("dora", True), ("alice", False)):
        failed = app.sql(text, user=user)
        assert error(failed) == (400, "SQL_EXECUTION_ERROR")
        found = failed.json()["error"]
        assert found["message"].startswith("Statement 2 failed: Primary key violation: value '1'"), found
        assert found.get("details") == ("INSERT INTO app.t VALUES (1)" if told else None)
        assert app.rows("SELECT id FROM app.t", user=user) == [["1"]]


def test_who_is_no_administrator_is_not_told_what_exists(app: Served) -> None:
    hidden = app.sql("SELECT * FROM app.nothing", user="alice")
    assert error(hidden) == (400, "SQL_EXECUTION_ERROR")
    assert hidden.json()["error"] == {"code": "SQL_EXECUTION_ERROR", "message": "SQL statement failed"}
    assert "app.nothing" in app.sql("SELECT * FROM app.nothing", user="dora").json()["error"]["message"]
    broken = app.sql("SELEC 1", user="alice").json()["error"]
    assert broken == {"code": "INVALID_SQL", "message": "SQL statement is invalid or not allowed"}
    app.rows("CREATE TABLE app.t (id BIGINT PRIMARY KEY, n INT NOT NULL) WITH (TYPE = 'USER')")
    for text, part in (
        ("SELECT nothing FROM app.t", "nothing"),
        ("INSERT INTO app.t (id) VALUES (1)", "NOT NULL"),
        ("CREATE TABLE app.t (id BIGINT PRIMARY KEY) WITH (TYPE = 'USER')", "already exists"),
        ("CREATE TABLE none.t (id BIGINT PRIMARY KEY) WITH (TYPE = 'USER')", "Namespace 'none'"),
    ):
        assert part in app.sql(text, user="alice").json()["error"]["message"], text


def test_the_namespace_of_a_request_holds_for_it_alone(app: Served) -> None:
    app.sql("CREATE TABLE t (id BIGINT PRIMARY KEY)", namespace_id="app")
    assert app.sql("SELECT * FROM t", namespace_id="app").status_code == 200
    assert error(app.sql("SELECT * FROM t")) == (400, "SQL_EXECUTION_ERROR")


# The shape of SELECTs


@pytest.fixture
def numbers(app: Served) -> Served:
    app.rows("CREATE TABLE app.n (id BIGINT PRIMARY KEY, k INT)")
    for at in range(0, 1200, 400):
        app.rows(f"INSERT INTO app.n VALUES {', '.join(f'({1200 - id}, {id % 7})' for id in range(at, at + 400))}")
    return app


def test_a_select_without_limit_has_fifty_rows_by_key_and_one_with_it_at_most_a_thousand(numbers: Served) -> None:
    def ids(text: str, params: list[Any] | None = None) -> list[int]:
        return [int(row[0]) for row in numbers.rows(text, params)]

    assert ids("SELECT * FROM app.n") == list(range(1, 51))
    assert ids("SELECT id FROM app.n LIMIT 5000") == list(range(1, 1001))
    assert ids("SELECT id FROM app.n LIMIT $1 OFFSET 3", [4]) == [4, 5, 6, 7]
    assert ids("SELECT id FROM app.n ORDER BY id DESC") == list(range(1200, 1150, -1))
    assert ids("SELECT id FROM app.n ORDER BY id DESC LIMIT 2") == [1200, 1199]
    assert ids("SELECT id FROM app.n WHERE k = 3 LIMIT 2") == sorted(ids("SELECT id FROM app.n WHERE k = 3"))[:2]
    assert len(ids("SELECT k FROM app.n")) == 50
    assert ids("SELECT COUNT(*) FROM app.n") == [1200]
    assert len(ids("SELECT id FROM app.n UNION ALL SELECT id FROM app.n LIMIT 1500")) == 1000
    assert len(ids("SELECT id FROM app.n LIMIT 5 + 5")) == 10
    assert len(ids("SELECT id FROM app.n WHERE id IN (SELECT id FROM app.n)")) == 50
    assert error(numbers.sql("SELECT id FROM app.n LIMIT $1", ["x"]))[0] == 400


def test_star_of_one_table_shows_the_system_columns_and_no_other_does(numbers: Served) -> None:
    def names(text: str) -> list[str]:
        return [field["name"] for field in numbers.sql(text).json()["results"][0]["schema"]]

    assert names("SELECT * FROM app.n") == ["id", "k", "_seq", "_deleted"]
    assert names("SELECT * FROM app.n WHERE id = 1") == ["id", "k", "_seq", "_deleted"]
    assert names("SELECT * FROM app.n WHERE id = 1 AND k = 1") == ["id", "k", "_seq", "_deleted"]
    assert names("SELECT * FROM (SELECT * FROM app.n) AS x") == ["id", "k"]
    assert names("SELECT * FROM app.n WHERE id IN (SELECT id FROM app.n)") == ["id", "k", "_seq", "_deleted"]
    assert names("SELECT k FROM app.n") == ["k"]
    numbers.rows("CREATE TABLE app.copy (id BIGINT PRIMARY KEY, k INT)")
    assert numbers.sql("INSERT INTO app.copy SELECT * FROM app.n").json()["results"][0]["row_count"] == 1200


def test_all_three_can_be_switched_off(serve: Any) -> None:
    settings = (
        "[limits]\ndefault_query_limit = 0\nmax_query_limit = 0\nsort_by_primary_key = false\n"
        "system_columns_shown = false\n"
    )
    app = enter(serve(settings=settings))
    app.rows("CREATE TABLE app.n (id BIGINT PRIMARY KEY)")
    for at in range(0, 1200, 400):
        app.rows(f"INSERT INTO app.n VALUES {', '.join(f'({id})' for id in range(at, at + 400))}")
    answer = app.sql("SELECT * FROM app.n").json()["results"][0]
    assert answer["row_count"] == 1200 and len(answer["schema"]) == 1


def test_a_large_result_is_streamed_and_an_error_in_it_ends_it_well(serve: Any) -> None:
    settings = "[limits]\ndefault_query_limit = 0\nmax_query_limit = 0\nresult_bytes_max = 2000000\n"
    app = enter(serve(settings=settings))
    app.rows("CREATE TABLE app.n (id BIGINT PRIMARY KEY, t TEXT)")
    text = "x" * 50
    for at in range(0, 20_000, 2000):
        values = ", ".join(f"({id}, '{text}')" for id in range(at, at + 2000))
        app.rows(f"INSERT INTO app.n VALUES {values}")
    whole = app.sql("SELECT id, t FROM app.n")
    assert "content-length" not in whole.headers
    body = whole.json()
    assert body["error"] is None and body["results"][0]["row_count"] == 20_000
    assert [int(row[0]) for row in body["results"][0]["rows"]] == list(range(20_000))
    cut = app.sql("SELECT id, t || t AS t FROM app.n")
    assert cut.status_code == 200
    body = cut.json()
    assert body["error"]["code"] == "SQL_EXECUTION_ERROR" and "result_bytes_max" in body["error"]["message"]
    assert 0 < len(body["results"][0]["rows"]) == body["results"][0]["row_count"] < 20_000
