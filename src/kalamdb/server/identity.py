"""Who calls: bearer tokens checked against the users as they are now."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Final, Protocol

from kalamdb.clock import Clock
from kalamdb.errors import Unauthenticated
from kalamdb.server.tokens import LEEWAY_S, TOKEN_LENGTH_MAX, Claims, TokenKind, Tokens, invalid_token
from kalamdb.types import Role
from kalamdb.users import UserRecord, Users

_CACHED_TOKENS_MAX: Final = 10_000
_DEFERRALS_MAX: Final = 2
"""The keys of an issuer, then a user that is made."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A caller whose token was verified."""

    user: str
    role: Role
    expires_s: float
    """When the token ends: seconds since 1970."""


class Deferred(Unauthenticated):
    """A token whose verification must first fetch or write something: `work`, which blocks, then verify again."""

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__("the token cannot be verified yet; try again")
        self.work = work


class ForeignTokens(Protocol):
    """Tokens that others have signed."""

    def knows(self, token: str) -> bool:
        """Whether a token says that it is of a listed issuer; nothing is proved by that."""
        ...

    def verify(self, token: str) -> tuple[UserRecord, float]:
        """The user of a token and when it ends. Raises Unauthenticated, Deferred; never blocks."""
        ...


class Authenticator:
    """Verifies tokens. Thread-safe.

    A verified token is remembered until it expires or its user changes, so that a request costs a look-up.
    """

    def __init__(self, users: Users, tokens: Tokens, clock: Clock, foreign: ForeignTokens | None = None) -> None:
        self._users = users
        self._tokens = tokens
        self._clock = clock
        self._foreign = foreign
        self._lock = Lock()
        self._known: dict[str, Identity] = {}
        self._of_user: dict[str, set[str]] = {}
        self._changes = 0
        self._fetchers = ThreadPoolExecutor(2, thread_name_prefix="kalamdb-issuer")
        users.observe(self._forget)

    def close(self) -> None:
        """Release its threads."""
        self._fetchers.shutdown(wait=False, cancel_futures=True)

    async def authenticate(self, header: str | None) -> Identity:
        """The caller named by an Authorization header; waits, off the loop, where a key must be fetched.
        Raises Unauthenticated."""
        return await self.authenticate_token(bearer_token(header))

    async def authenticate_token(self, token: str) -> Identity:
        """As `authenticate`, for the token alone."""
        for _ in range(_DEFERRALS_MAX):
            try:
                return self.verify(token)
            except Deferred as deferred:
                await asyncio.get_running_loop().run_in_executor(self._fetchers, deferred.work)
        return self.verify(token)

    def bearer(self, header: str | None) -> Identity:
        """The caller named by an Authorization header; never blocks. Raises Unauthenticated."""
        return self.verify(bearer_token(header))

    def verify(self, token: str) -> Identity:
        """The caller of an access token; never blocks. Raises Unauthenticated."""
        known = self._known.get(token)
        if known is not None and self._clock.now_ms() < (known.expires_s + LEEWAY_S) * 1000:
            return known
        if len(token) > TOKEN_LENGTH_MAX or not token.isascii():
            raise invalid_token()
        changes = self._changes
        if self._foreign is not None and self._foreign.knows(token):
            user, expires_s = self._foreign.verify(token)
        else:
            claims = self._tokens.read(token)
            if claims.kind != TokenKind.ACCESS:
                raise invalid_token()
            user, expires_s = self.user_of(claims), claims.expires_s
        identity = Identity(user.user_id, user.role, expires_s)
        self._remember(token, identity, changes)
        return identity

    def refresh(self, token: str) -> UserRecord:
        """The user of a refresh token. Raises Unauthenticated."""
        claims = self._tokens.read(token)
        if claims.kind != TokenKind.REFRESH:
            raise Unauthenticated("Refresh endpoint requires a refresh token")
        return self.user_of(claims)

    def user_of(self, claims: Claims) -> UserRecord:
        """The user that claims name, when they still hold for it. Raises Unauthenticated."""
        user = self._users.find(claims.user)
        if user is None or user.deleted_at is not None or user.role != claims.role or claims.is_older_than(user):
            raise invalid_token()
        return user

    def _remember(self, token: str, identity: Identity, changes: int) -> None:
        """Keep what was verified, unless a user changed meanwhile."""
        with self._lock:
            if changes != self._changes:
                return
            while len(self._known) >= _CACHED_TOKENS_MAX:
                oldest = next(iter(self._known))
                self._drop(oldest, self._known[oldest].user)
            self._known[token] = identity
            self._of_user.setdefault(identity.user, set()).add(token)

    def _drop(self, token: str, user: str) -> None:
        self._known.pop(token, None)
        tokens = self._of_user.get(user)
        if tokens is not None:
            tokens.discard(token)
            if not tokens:
                del self._of_user[user]

    def _forget(self, user: str) -> None:
        with self._lock:
            self._changes += 1
            for token in self._of_user.pop(user, ()):
                self._known.pop(token, None)


def bearer_token(header: str | None) -> str:
    """The token in an Authorization header. Raises Unauthenticated."""
    if not header:
        raise Unauthenticated("an Authorization header with a Bearer token is needed", "MISSING_AUTHORIZATION")
    scheme, _, token = header.partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token:
        raise Unauthenticated("only Bearer tokens are accepted; log in at /v1/api/auth/login")
    return token
