"""EXECUTE AS USER over HTTP: codes, `as_user`, and the address in the audit log."""

from __future__ import annotations

from tests.server.conftest import Served


def test_the_answer_names_the_target_and_refusals_have_their_codes(served: Served) -> None:
    served.rows("CREATE NAMESPACE app; CREATE USER TABLE app.notes (id INT PRIMARY KEY)")
    served.rows("CREATE SHARED TABLE app.shared (id INT PRIMARY KEY)")
    served.add_user("robot", role="service")
    text = "INSERT INTO app.notes VALUES (1); EXECUTE AS USER anna (INSERT INTO app.notes VALUES (2)); "
    answer = served.sql(text + "EXECUTE AS USER anna (SELECT id FROM app.notes)", user="robot")
    assert answer.status_code == 200, answer.text
    found = [(one.get("rows"), one.get("message"), one["as_user"]) for one in answer.json()["results"]]
    assert sorted(found, key=str) == sorted(
        [([[2]], None, "anna"), (None, "Inserted 1 row(s)", "anna"), (None, "Inserted 1 row(s)", "robot")], key=str
    )
    single = served.sql("EXECUTE AS USER anna (SELECT id FROM app.notes)", user="robot").json()["results"]
    assert [(one["rows"], one["as_user"]) for one in single] == [([[2]], "anna")]
    shared = served.sql("EXECUTE AS USER anna (SELECT * FROM app.shared)", user="robot")
    assert (shared.status_code, shared.json()["error"]["code"]) == (400, "SQL_EXECUTION_ERROR")
    assert "EXECUTE AS USER is not allowed on SHARED tables" in shared.json()["error"]["message"]
    denied = served.sql("EXECUTE AS USER root (SELECT 1)", user="robot")
    assert (denied.status_code, denied.json()["error"]["code"]) == (403, "PERMISSION_DENIED")
    assert served.sql("EXECUTE AS USER anna SELECT 1").status_code == 400
    audit = served.rows(
        "SELECT DISTINCT actor_user_id, action, ip_address, subject_user_id FROM system.audit_log "
        "WHERE action LIKE 'EXECUTE%' ORDER BY action, subject_user_id"
    )
    assert audit == [
        ["robot", "EXECUTE_AS_USER", "127.0.0.1", "anna"],
        ["robot", "EXECUTE_AS_USER_DENIED", "127.0.0.1", "root"],
    ]
