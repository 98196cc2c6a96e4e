"""Tokens of this server: JSON Web Tokens signed with its secret by HMAC-SHA256."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import jwt

from kalamdb.clock import Clock
from kalamdb.errors import Unauthenticated
from kalamdb.users import UserRecord

ISSUER: Final = "kalamdb"
LEEWAY_S: Final = 60
"""How far clocks may be apart."""
TOKEN_LENGTH_MAX: Final = 8192
_VALID_FROM: Final = "valid_from_ms"
"""`tokens_valid_from` of the user when the token was made: `iat` counts in seconds, which is not exact enough."""
_ALGORITHM: Final = "HS256"
_REFRESH_FACTOR: Final = 7
"""A refresh token holds this many times as long as an access token."""


class TokenKind(StrEnum):
    """What a token is for."""

    ACCESS = "access"
    REFRESH = "refresh"


@dataclass(frozen=True, slots=True)
class IssuedToken:
    """A new token, and when it ends: seconds since 1970."""

    text: str
    expires_s: int


@dataclass(frozen=True, slots=True)
class Claims:
    """What a token says that was signed here."""

    user: str
    role: str
    kind: str
    issued_s: float
    expires_s: float
    valid_from_ms: int | None
    """None when somebody else signed it with the secret."""

    def is_older_than(self, user: UserRecord) -> bool:
        """Whether the user got another password, or was made anew or restored, after the token was made."""
        if self.valid_from_ms is not None:
            return self.valid_from_ms != user.tokens_valid_from
        return self.issued_s < user.tokens_valid_from // 1000


def invalid_token() -> Unauthenticated:
    """The one answer for whatever is wrong with a token but its age."""
    return Unauthenticated("the token is not valid")


def expired_token() -> Unauthenticated:
    """The answer for a token that was valid once."""
    return Unauthenticated("the token has expired; log in again or refresh it", "TOKEN_EXPIRED")


class Tokens:
    """Makes and reads tokens. Thread-safe. Whether the user still has the role is for the caller to check."""

    def __init__(self, secret: str, clock: Clock, *, access_s: float) -> None:
        self._secret = secret
        self._clock = clock
        self._access_s = access_s

    def lifetime_s(self, kind: TokenKind) -> int:
        """Seconds that a new token holds."""
        return int(self._access_s * (_REFRESH_FACTOR if kind is TokenKind.REFRESH else 1))

    def issue(self, user: UserRecord, kind: TokenKind) -> IssuedToken:
        """A new token of a user."""
        now_s = self._clock.now_ms() // 1000
        expires_s = now_s + self.lifetime_s(kind)
        claims: dict[str, Any] = {
            "iss": ISSUER, "sub": user.user_id, "role": user.role.value, "token_type": kind.value, "iat": now_s,
            "exp": expires_s, _VALID_FROM: user.tokens_valid_from,
        }  # fmt: skip
        if user.email is not None:
            claims["email"] = user.email
        return IssuedToken(jwt.encode(claims, self._secret, algorithm=_ALGORITHM), expires_s)

    def read(self, token: str) -> Claims:
        """What a token says. Raises Unauthenticated unless it was signed here and has not expired."""
        try:
            claims = jwt.decode(
                token, self._secret, algorithms=[_ALGORITHM], issuer=ISSUER,
                options={"require": ["exp", "iat", "sub", "iss"], "verify_exp": False, "verify_iat": False,
                         "verify_nbf": False, "verify_aud": False},
            )  # fmt: skip
            issued_s, expires_s = float(claims["iat"]), float(claims["exp"])
        except (jwt.InvalidTokenError, TypeError, ValueError, OverflowError, RecursionError):
            raise invalid_token() from None
        now_s = self._clock.now_ms() / 1000
        if not issued_s <= now_s + LEEWAY_S:
            raise invalid_token()
        if not now_s < expires_s + LEEWAY_S:
            raise expired_token()
        valid_from_ms = claims.get(_VALID_FROM)
        return Claims(
            str(claims["sub"]), str(claims.get("role")), str(claims.get("token_type")), issued_s, expires_s,
            valid_from_ms if isinstance(valid_from_ms, int) else None,
        )  # fmt: skip
