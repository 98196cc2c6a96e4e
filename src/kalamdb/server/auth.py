"""The parts that know who calls, built from the settings."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from starlette.requests import Request
from starlette.routing import Route

from kalamdb.app_context import AppContext
from kalamdb.errors import InvalidRequest
from kalamdb.server.auth_routes import AuthRules, Sender, auth_routes
from kalamdb.server.identity import Authenticator
from kalamdb.server.logins import Logins
from kalamdb.server.oidc import OidcTokens, listed_issuers
from kalamdb.server.secret import signing_secret
from kalamdb.server.tokens import Tokens
from kalamdb.types import Role

_log = logging.getLogger("kalamdb.server.auth")


@dataclass(frozen=True, slots=True)
class Auth:
    """What other routes need to know who calls, and the routes below /v1/api/auth."""

    authenticator: Authenticator
    logins: Logins
    routes: list[Route]

    def close(self) -> None:
        """Release the threads."""
        self.logins.close()
        self.authenticator.close()


def open_auth(context: AppContext, *, host: str, sender_of: Callable[[Request], Sender]) -> Auth:
    """Everything about log-ins of a server that listens on `host`; gives root its first password when the settings
    hold one. Blocks for a hash then. Raises InvalidRequest for a secret or a password that may not be."""
    settings, users, clock = context.settings, context.users, context.clock
    assert context.directory is not None
    secret = signing_secret(settings["auth.jwt_secret"], host=host, data_dir=context.directory.path, clock=clock)
    if settings["auth.root_password"] and users.needs_setup:
        try:
            users.give_root_password(settings["auth.root_password"])
        except InvalidRequest as exc:
            raise InvalidRequest(f"KALAMDB_ROOT_PASSWORD (auth.root_password): {exc}") from None
    elif users.needs_setup:
        _log.warning("root has no password: POST /v1/api/auth/setup or set KALAMDB_ROOT_PASSWORD")
    tokens = Tokens(secret, clock, access_s=settings["auth.jwt_expiry_hours"] * 3600)
    issuers = listed_issuers(settings)
    foreign = OidcTokens(
        users, clock, issuers, auto_provision=settings["oauth.auto_provision"],
        default_role=Role(settings["oauth.default_role"]),
    )  # fmt: skip
    authenticator = Authenticator(users, tokens, clock, foreign if issuers else None)
    logins = Logins(users, clock)
    origins = [*settings["security.cors.allowed_origins"], settings["server.public_origin"]]
    rules = AuthRules(
        cookie_secure=settings["auth.cookie_secure"],
        allow_remote_setup=settings["auth.allow_remote_setup"],
        origins=tuple(origin.lower().rstrip("/") for origin in origins if origin),
    )
    return Auth(authenticator, logins, auth_routes(users, authenticator, tokens, logins, rules, sender_of))
