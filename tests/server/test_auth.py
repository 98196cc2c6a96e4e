"""Log-in, refresh, log-out, who am I: shapes, codes, cookies, and what is refused."""

from __future__ import annotations

import datetime as dt
import statistics
import time
from collections.abc import Callable
from typing import Any

import httpx
import jwt
import pytest

from tests.server.conftest import JWT_SECRET, ROOT_PASSWORD, Serve, Served

LOGIN = "/v1/api/auth/login"


def login(served: Served, user: str, password: str, **more: Any) -> httpx.Response:
    """The answer to a log-in."""
    return served.client.post(LOGIN, json={"user": user, "password": password}, **more)


def me(served: Served, token: str | None = None, **more: Any) -> httpx.Response:
    """The answer to who am I."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    return served.client.get("/v1/api/auth/me", headers=headers, **more)


def sql_code(served: Served, headers: dict[str, str]) -> tuple[int, str]:
    """Status and error code of a statement sent with these headers."""
    answer = served.client.post("/v1/api/sql", json={"sql": "SELECT 1"}, headers=headers)
    return answer.status_code, (answer.json().get("error") or {}).get("code", "")


def test_a_login_gives_tokens_cookies_and_the_user(served: Served) -> None:
    answer = login(served, "root", ROOT_PASSWORD)
    body = answer.json()
    assert answer.status_code == 200
    assert set(body) == {
        "user", "admin_ui_access", "expires_at", "access_token", "refresh_token", "refresh_expires_at",
    }  # fmt: skip
    assert set(body["user"]) == {"id", "role", "email", "created_at", "updated_at"}
    assert (body["user"]["id"], body["user"]["role"], body["user"]["email"]) == ("root", "system", "root@localhost")
    assert body["admin_ui_access"] is True
    ends = [dt.datetime.fromisoformat(body[name]).timestamp() for name in ("expires_at", "refresh_expires_at")]
    assert [round((end - time.time()) / 3600) for end in ends] == [24, 7 * 24]
    claims = jwt.decode(body["access_token"], JWT_SECRET, algorithms=["HS256"], issuer="kalamdb")
    assert set(claims) == {"iss", "sub", "role", "token_type", "iat", "exp", "email", "valid_from_ms"}
    assert (claims["sub"], claims["role"], claims["token_type"]) == ("root", "system", "access")
    cookies = {header.partition("=")[0]: header for header in answer.headers.get_list("set-cookie")}
    assert set(cookies) == {"kalamdb_auth", "kalamdb_refresh"}
    for header in cookies.values():
        assert all(word in header for word in ("HttpOnly", "SameSite=strict", "Secure", "Path=/"))


def test_cookies_go_without_tls_when_the_settings_say_so(serve: Serve) -> None:
    served = serve(environment={"KALAMDB_COOKIE_SECURE": "false"})
    answer = served.client.post(LOGIN, json={"username": "root", "password": ROOT_PASSWORD})
    assert "Secure" not in answer.headers["set-cookie"]
    assert me(served).json() == {"user": answer.json()["user"], "admin_ui_access": True}
    refreshed = served.client.post("/v1/api/auth/refresh", json={})
    assert refreshed.status_code == 200
    logout = served.client.post("/v1/api/auth/logout")
    assert (logout.status_code, logout.json()) == (200, {"message": "Logged out successfully"})
    assert not served.client.cookies
    assert me(served).status_code == 401


def test_a_wrong_password_an_unknown_and_a_dropped_user_get_one_answer(served: Served) -> None:
    served.add_user("ann")
    served.add_user("bert")
    assert served.sql("DROP USER bert").status_code == 200
    served.sql("CREATE USER robot WITH INTERNAL")
    expected = {"error": "unauthorized", "message": "Invalid credentials"}
    for user, password in [
        ("ann", "wrong"), ("ann", ""), ("ann", "ü" * 100), ("nobody", "Secret-of-1"), ("bert", "Secret-of-1"),
        ("robot", ""), ("", ""), ("ann\x00", "Secret-of-1"), ("a\ud7ff", "x"),
    ]:  # fmt: skip
        answer = login(served, user, password)
        assert (answer.status_code, answer.json()) == (401, expected), user


@pytest.mark.parametrize(
    "body",
    [
        b"", b"no json", b"[]", b"{}", b'{"user":"root"}', b'{"user":"root","password":1}',
        b'{"user":"root","username":"root","password":"x"}', b'{"user":"root","password":"x","role":"system"}',
        b'{"user":"' + b"u" * 129 + b'","password":"x"}', b'{"user":"u","password":"' + b"p" * 257 + b'"}',
        b'{"user":"root","password":"\xff"}', b"[" * 5000, b'{"user":"' + b"u" * 70_000 + b'"}',
    ],
)  # fmt: skip
def test_a_body_of_another_shape_is_refused(shared: Served, body: bytes) -> None:
    answer = shared.client.post(LOGIN, content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")


@pytest.mark.parametrize("path", ["login", "setup", "refresh"])
def test_pages_of_other_sites_and_forms_cannot_log_in(shared: Served, path: str) -> None:
    url = f"/v1/api/auth/{path}"
    for origin in ("https://evil.example", "null", "http://127.0.0.1.evil.example", "http://[", "file://"):
        answer = shared.client.post(url, json={}, headers={"Origin": origin})
        assert (answer.status_code, answer.json()["error"]) == (403, "forbidden"), origin
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/json-seq", ""):
        headers = {"Content-Type": kind, "Cookie": "kalamdb_refresh=x"}
        answer = shared.client.post(url, content=b"{}", headers=headers)
        assert (answer.status_code, answer.json()["error"]) == (415, "unsupported_media_type"), kind


def test_pages_of_the_same_host_and_listed_origins_may_log_in(serve: Serve) -> None:
    settings = '[security.cors]\nallowed_origins = ["https://app.example"]'
    served = serve(settings=settings)
    for origin in (served.url, "http://127.0.0.1:5173", "http://localhost:3000", "https://app.example"):
        assert login(served, "root", ROOT_PASSWORD, headers={"Origin": origin}).status_code == 200, origin


def test_refresh_takes_a_refresh_token_only(shared: Served) -> None:
    pair = login(shared, "root", ROOT_PASSWORD).json()
    answer = shared.client.post("/v1/api/auth/refresh", headers={"Authorization": f"Bearer {pair['refresh_token']}"})
    assert answer.status_code == 200
    assert set(answer.json()) == set(pair)
    refused = shared.client.post("/v1/api/auth/refresh", headers={"Authorization": f"Bearer {pair['access_token']}"})
    assert refused.status_code == 401
    assert refused.json() == {"error": "unauthorized", "message": "Refresh endpoint requires a refresh token"}
    assert shared.client.post("/v1/api/auth/refresh").status_code == 401
    assert sql_code(shared, {"Authorization": f"Bearer {pair['refresh_token']}"}) == (401, "INVALID_CREDENTIALS")


def forged(secret: str = JWT_SECRET, algorithm: str = "HS256", **claims: Any) -> str:
    """A token of root with some claims other; None leaves one out."""
    now_s = int(time.time())
    stated = {
        "iss": "kalamdb", "sub": "root", "role": "system", "token_type": "access", "iat": now_s, "exp": now_s + 600,
        **claims,
    }  # fmt: skip
    given = {name: value for name, value in stated.items() if value is not None}
    return jwt.encode(given, secret if algorithm != "none" else "", algorithm=algorithm)


@pytest.mark.parametrize(
    "make, code",
    [
        (lambda: forged(), ""),
        (lambda: forged(exp=int(time.time()) - 30), ""),
        (lambda: forged(exp=int(time.time()) - 600, iat=int(time.time()) - 900), "TOKEN_EXPIRED"),
        (lambda: forged(algorithm="none"), "INVALID_CREDENTIALS"),
        (lambda: forged(algorithm="HS512"), "INVALID_CREDENTIALS"),
        (lambda: forged(JWT_SECRET[::-1]), "INVALID_CREDENTIALS"),
        (lambda: forged(iss="https://evil.example"), "INVALID_CREDENTIALS"),
        (lambda: forged(iss=None), "INVALID_CREDENTIALS"),
        (lambda: forged(sub=None), "INVALID_CREDENTIALS"),
        (lambda: forged(sub="nobody"), "INVALID_CREDENTIALS"),
        (lambda: forged(role="dba"), "INVALID_CREDENTIALS"),
        (lambda: forged(role=None), "INVALID_CREDENTIALS"),
        (lambda: forged(token_type="refresh"), "INVALID_CREDENTIALS"),
        (lambda: forged(token_type=None), "INVALID_CREDENTIALS"),
        (lambda: forged(iat=int(time.time()) + 3600), "INVALID_CREDENTIALS"),
        (lambda: forged(exp="soon"), "INVALID_CREDENTIALS"),
        (lambda: forged()[:-4] + "AAAA", "INVALID_CREDENTIALS"),
        (lambda: "x", "INVALID_CREDENTIALS"),
        (lambda: "a.b.c", "INVALID_CREDENTIALS"),
        (lambda: forged(email="e" * 9000), "INVALID_CREDENTIALS"),
    ],
)
def test_a_token_that_is_not_quite_right_is_refused(shared: Served, make: Callable[[], str], code: str) -> None:
    found = sql_code(shared, {"Authorization": f"Bearer {make()}"})
    assert found == ((401, code) if code else (200, ""))


def test_requests_without_a_bearer_token_are_refused(shared: Served) -> None:
    assert sql_code(shared, {}) == (401, "MISSING_AUTHORIZATION")
    for header in ("Basic cm9vdDpSb290LVNlY3JldC0x", "Bearer", forged()):
        assert sql_code(shared, {"Authorization": header}) == (401, "INVALID_CREDENTIALS"), header
    assert sql_code(shared, {"Cookie": f"kalamdb_auth={forged()}"}) == (401, "MISSING_AUTHORIZATION")


@pytest.mark.parametrize(
    "change, again",
    [
        ("ALTER USER ann SET ROLE service", "ALTER USER ann SET ROLE service"),
        ("ALTER USER ann SET PASSWORD 'Secret-of-1'", "SELECT 1"),
        ("DROP USER ann", "RESTORE USER ann"),
    ],
)
def test_a_change_of_a_user_ends_its_tokens_at_once(shared: Served, change: str, again: str) -> None:
    shared.sql("DROP USER IF EXISTS ann")
    shared.tokens.pop("ann", None)
    if shared.rows("SELECT user_id FROM system.users WHERE user_id = 'ann'"):
        shared.sql("RESTORE USER ann")
        shared.sql("ALTER USER ann SET ROLE user")
        shared.login("ann", "Secret-of-1")
    else:
        shared.add_user("ann")
    pair = login(shared, "ann", "Secret-of-1").json()
    bearer = {"Authorization": f"Bearer {pair['access_token']}"}
    assert sql_code(shared, bearer) == (200, "")
    assert shared.sql(change).status_code == 200
    assert sql_code(shared, bearer) == (401, "INVALID_CREDENTIALS")
    refresh = {"Authorization": f"Bearer {pair['refresh_token']}"}
    assert shared.client.post("/v1/api/auth/refresh", headers=refresh).status_code == 401
    assert shared.sql(again).status_code == 200
    assert sql_code(shared, bearer) == (401, "INVALID_CREDENTIALS")
    fresh = login(shared, "ann", "Secret-of-1").json()["access_token"]
    assert sql_code(shared, {"Authorization": f"Bearer {fresh}"}) == (200, "")


def test_five_failures_lock_a_user_but_not_root_on_its_own_machine(served: Served) -> None:
    served.add_user("ann")
    for _ in range(5):
        assert login(served, "ann", "wrong").json()["error"] == "unauthorized"
        assert login(served, "root", "wrong").json()["error"] == "unauthorized"
    for password in ("wrong", "Secret-of-1"):
        answer = login(served, "ann", password)
        assert (answer.status_code, answer.json()["error"]) == (401, "account_locked")
    assert login(served, "root", ROOT_PASSWORD).status_code == 200
    [row] = served.rows("SELECT failed_login_attempts, locked_until FROM system.users WHERE user_id = 'ann'")
    assert row[0] == 5 and row[1] > time.time() * 1e6 + 800e6
    audit = "SELECT actor_user_id, ip_address, subject_user_id FROM system.audit_log WHERE action = 'LOGIN_LOCKED'"
    assert served.rows(audit) == [["ann", "127.0.0.1", "ann"]]
    assert served.sql("ALTER USER ann SET PASSWORD 'Secret-of-2'").status_code == 200
    assert login(served, "ann", "Secret-of-2").status_code == 200
    state = "SELECT failed_login_attempts, locked_until, last_login_at > created_at FROM system.users"
    assert served.rows(f"{state} WHERE user_id = 'ann'") == [[0, None, True]]


def test_an_unknown_user_takes_as_long_as_a_wrong_password(serve: Serve) -> None:
    served = serve(environment={"KALAMDB_AUTH_BCRYPT_COST": "9"})
    for number in range(10):
        served.add_user(f"ann{number}")
    took: dict[str, list[float]] = {"known": [], "unknown": []}
    for number in range(30):
        for kind, user in (("known", f"ann{number % 10}"), ("unknown", f"bert{number % 10}")):
            began_s = time.perf_counter()
            assert login(served, user, "wrong").json()["error"] == "unauthorized"
            took[kind].append(time.perf_counter() - began_s)
    known, unknown = (statistics.median(took[kind]) for kind in ("known", "unknown"))
    assert abs(known - unknown) <= 0.2 * max(known, unknown), (known, unknown)
