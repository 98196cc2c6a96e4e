"""What the tests of POST /v1/api/sql share: tokens without a log-in, and one table of each type."""

from __future__ import annotations

import time

import jwt

from tests.server.conftest import JWT_SECRET, Served

TYPES = (
    "id BIGINT PRIMARY KEY, small SMALLINT, whole INT, amount DECIMAL(10,2), tiny DECIMAL(30,12), real FLOAT, "
    "double DOUBLE, yes BOOLEAN, name TEXT NOT NULL, raw BYTES, doc JSON, at TIMESTAMP, moment DATETIME, day DATE, "
    "clock TIME, uid UUID, vec EMBEDDING(3)"
)


def sign(user: str, role: str) -> str:
    """An access token of a user."""
    now_s = int(time.time())
    claims = {
        "iss": "kalamdb", "sub": user, "role": role, "token_type": "access", "iat": now_s, "exp": now_s + 3600,
        "email": None,
    }  # fmt: skip
    return jwt.encode(claims, JWT_SECRET, algorithm="HS256")


def enter(served: Served, users: dict[str, str] | None = None) -> Served:
    """A server with namespace app, and users by role, all with tokens."""
    served.tokens["root"] = sign("root", "system")
    served.rows("CREATE NAMESPACE app")
    for user, role in (users or {}).items():
        served.rows(f"CREATE USER '{user}' WITH PASSWORD 'Secret-of-1' ROLE {role}")
        served.tokens[user] = sign(user, role)
    return served
