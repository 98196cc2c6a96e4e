"""Who calls: tokens made at log-in and checked on every request."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

import jwt

from kalamdb.clock import Clock
from kalamdb.errors import Unauthenticated
from kalamdb.types import Role
from kalamdb.users import Users

_ISSUER = "kalamdb"
_ALGORITHM = "HS256"
_LEEWAY_S = 60


@dataclass(frozen=True, slots=True)
class Identity:
    """A caller whose token was verified."""

    user: str
    role: Role
    expires_s: float
    """When the token ends: seconds since 1970."""


class Authenticator:
    """Makes and verifies tokens. Thread-safe."""

    def __init__(self, users: Users, clock: Clock, *, secret: str | None, access_s: float) -> None:
        self._users = users
        self._clock = clock
        self._secret = secret or secrets.token_hex(32)
        self._access_s = access_s

    def bearer(self, header: str | None) -> Identity:
        """The caller named by an Authorization header. Raises Unauthenticated."""
        if not header:
            raise Unauthenticated("an Authorization header with a Bearer token is needed", "MISSING_AUTHORIZATION")
        scheme, _, token = header.partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthenticated("only Bearer tokens are accepted; log in at /v1/api/auth/login")
        return self.verify(token.strip())

    def verify(self, token: str) -> Identity:
        """The caller of an access token. Raises Unauthenticated."""
        try:
            claims: dict[str, Any] = jwt.decode(
                token, self._secret, algorithms=[_ALGORITHM], issuer=_ISSUER, leeway=_LEEWAY_S,
                options={"require": ["exp", "iat", "sub"]},
            )  # fmt: skip
        except jwt.ExpiredSignatureError:
            raise Unauthenticated("the token has expired; log in again or refresh it", "TOKEN_EXPIRED") from None
        except jwt.InvalidTokenError:
            raise Unauthenticated("the token is not valid") from None
        user = self._users.find(claims["sub"])
        if claims.get("token_type") != "access" or user is None or user.deleted_at or user.role != claims.get("role"):
            raise Unauthenticated("the token is not valid")
        return Identity(user.user_id, user.role, float(claims["exp"]))

    def token(self, user: str, role: Role, kind: str = "access") -> str:
        """A signed token of a user."""
        now_s = self._clock.now_ms() // 1000
        claims = {
            "iss": _ISSUER, "sub": user, "role": str(role), "token_type": kind,
            "iat": now_s, "exp": now_s + int(self._access_s),
        }  # fmt: skip
        return jwt.encode(claims, self._secret, algorithm=_ALGORITHM)
