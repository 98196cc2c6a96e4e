"""The first start: root's password, the set-up over HTTP, and the secret of the tokens."""

from __future__ import annotations

import os
import stat
from typing import Any

import httpx
import jwt
import pytest

from kalamdb.clock import SystemClock
from kalamdb.errors import InvalidRequest
from kalamdb.server.secret import signing_secret
from tests.server.conftest import ROOT_PASSWORD, Serve, Served

SETUP = "/v1/api/auth/setup"
BODY = {"user": "admin", "password": "Admin-Secret-1", "root_password": "Root-Secret-2", "email": "a@example.org"}


@pytest.fixture
def unset(serve: Serve) -> Served:
    """A server whose root has no password."""
    return serve(environment={"KALAMDB_ROOT_PASSWORD": None})


def setup(served: Served, headers: dict[str, str] | None = None, **changes: Any) -> httpx.Response:
    """The answer to a set-up; None leaves a member out."""
    body = {name: value for name, value in {**BODY, **changes}.items() if value is not None}
    return served.client.post(SETUP, json=body, headers=headers)


def login(served: Served, user: str, password: str) -> httpx.Response:
    """The answer to a log-in."""
    return served.client.post("/v1/api/auth/login", json={"user": user, "password": password})


def test_set_up_gives_root_a_password_and_makes_an_administrator_once(unset: Served) -> None:
    status = unset.client.get("/v1/api/auth/status").json()
    assert status["needs_setup"] is True and set(status) == {"needs_setup", "message"}
    answer = login(unset, "root", "")
    assert (answer.status_code, answer.json()["error"]) == (428, "setup_required")
    assert login(unset, "root", "guess").status_code == 401
    done = setup(unset)
    assert done.status_code == 200 and set(done.json()) == {"user", "message"}
    assert (done.json()["user"]["id"], done.json()["user"]["role"]) == ("admin", "dba")
    assert done.json()["user"]["email"] == "a@example.org"
    assert "set-cookie" not in done.headers
    assert unset.client.get("/v1/api/auth/status").json()["needs_setup"] is False
    again = setup(unset, user="other")
    assert (again.status_code, again.json()["error"]) == (409, "already_configured")
    assert login(unset, "admin", "Admin-Secret-1").json()["admin_ui_access"] is True
    unset.login("root", "Root-Secret-2")
    audit = unset.rows("SELECT action, ip_address, subject_user_id FROM system.audit_log ORDER BY audit_id")
    assert sorted(audit) == [["ALTER_USER", "127.0.0.1", "root"], ["CREATE_USER", "127.0.0.1", "admin"]]


@pytest.mark.parametrize(
    "changes, status, slug",
    [
        ({"password": "short"}, 400, "weak_password"),
        ({"root_password": "Password123"}, 400, "weak_password"),
        ({"password": "12345678"}, 400, "weak_password"),
        ({"password": "p" * 73}, 400, "weak_password"),
        ({"password": "ü" * 37}, 400, "weak_password"),
        ({"user": "root"}, 400, "invalid_user"),
        ({"user": ""}, 400, "invalid_user"),
        ({"user": "a\nb"}, 400, "invalid_user"),
        ({"email": "nobody"}, 400, "invalid_user"),
        ({"role": "system"}, 400, "invalid_request"),
        ({"root_password": None}, 400, "invalid_request"),
        ({"username": "admin"}, 400, "invalid_request"),
    ],
)
def test_a_set_up_that_cannot_be_changes_nothing(
    unset_shared: Served, changes: dict[str, Any], status: int, slug: str
) -> None:
    answer = setup(unset_shared, **changes)
    assert (answer.status_code, answer.json()["error"]) == (status, slug)
    assert unset_shared.client.get("/v1/api/auth/status").json()["needs_setup"] is True


@pytest.mark.parametrize(
    "headers",
    [{"X-Forwarded-For": "10.0.0.1"}, {"Forwarded": "for=127.0.0.1"}, {"Host": "evil.example"}],
    ids=["X-Forwarded-For", "Forwarded", "Host"],
)
def test_set_up_is_for_the_machine_itself(unset_shared: Served, headers: dict[str, str]) -> None:
    answer = setup(unset_shared, headers)
    assert (answer.status_code, answer.json()["error"]) == (403, "forbidden")
    assert unset_shared.client.get("/v1/api/auth/status").json()["needs_setup"] is True


def test_set_up_from_elsewhere_is_a_setting(serve: Serve) -> None:
    served = serve(environment={"KALAMDB_ROOT_PASSWORD": None, "KALAMDB_ALLOW_REMOTE_SETUP": "true"})
    assert setup(served, {"X-Forwarded-For": "10.0.0.1"}).status_code == 200


def test_the_password_of_the_environment_is_for_a_root_that_has_none(serve: Serve) -> None:
    served = serve()
    assert login(served, "root", ROOT_PASSWORD).status_code == 200
    served.stop()
    served = serve(environment={"KALAMDB_ROOT_PASSWORD": "Another-Secret-1"})
    assert login(served, "root", "Another-Secret-1").status_code == 401
    assert login(served, "root", ROOT_PASSWORD).status_code == 200


def test_a_secret_that_was_made_is_kept_for_its_owner_and_outlives_a_restart(serve: Serve) -> None:
    served = serve(environment={"KALAMDB_JWT_SECRET": None})
    token = served.login()
    path = served.data_dir / "jwt_secret"
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert jwt.decode(token, path.read_text(), algorithms=["HS256"])["sub"] == "root"
    served.stop()
    again = serve(environment={"KALAMDB_JWT_SECRET": None})
    answer = again.client.get("/v1/api/auth/me", headers={"Authorization": f"Bearer {token}"})
    assert answer.status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "db.example"])
@pytest.mark.parametrize(
    "secret, text",
    [
        ("", "needs a secret"),
        ("short", "has 5 characters"),
        ("change-me-in-production-please-now", "placeholder"),
        ("a" * 64, "placeholder"),
    ],
)
def test_beyond_loopback_a_secret_must_be_one(tmp_path: Any, host: str, secret: str, text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        signing_secret(secret, host=host, data_dir=tmp_path, clock=SystemClock())
    good = "0f2b9c1d7e6a4853b1c0d9e8f7a6b5c4"
    assert signing_secret(good, host=host, data_dir=tmp_path, clock=SystemClock()) == good
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.2"])
def test_on_loopback_any_secret_will_do(tmp_path: Any, host: str) -> None:
    assert signing_secret("short", host=host, data_dir=tmp_path, clock=SystemClock()) == "short"
