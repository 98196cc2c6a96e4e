"""The routes below /v1/api/auth: log-in, refresh, log-out, who am I, first set-up."""

from __future__ import annotations

import datetime as dt
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Protocol, TypeVar
from urllib.parse import urlsplit

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kalamdb.errors import Conflict, InvalidRequest, KalamDbError, Unauthenticated
from kalamdb.server.identity import Authenticator, bearer_token
from kalamdb.server.logins import AuthFailure, Logins
from kalamdb.server.secret import is_loopback
from kalamdb.server.tokens import TokenKind, Tokens
from kalamdb.types import Role
from kalamdb.users import USER_ID_LENGTH_MAX, UserRecord, Users

AUTH_COOKIE: Final = "kalamdb_auth"
REFRESH_COOKIE: Final = "kalamdb_refresh"
_BODY_BYTES_MAX: Final = 64 << 10

UserName = Annotated[str, msgspec.Meta(max_length=USER_ID_LENGTH_MAX)]
GivenPassword = Annotated[str, msgspec.Meta(max_length=256)]


class Sender(Protocol):
    """Who sent a request, as the network says."""

    @property
    def ip(self) -> str:
        """Address of the client."""
        ...

    @property
    def is_local(self) -> bool:
        """Whether it is this machine for certain."""
        ...


class _Named(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    user: UserName | None = None
    username: UserName | None = None

    def __post_init__(self) -> None:
        if (self.user is None) == (self.username is None):
            raise ValueError("`user` is needed, once")

    @property
    def name(self) -> str:
        """The user, under either spelling."""
        return self.user or self.username or ""


class LoginBody(_Named, forbid_unknown_fields=True, kw_only=True):
    """Body of a log-in."""

    password: GivenPassword


class SetupBody(_Named, forbid_unknown_fields=True, kw_only=True):
    """Body of the first set-up."""

    password: GivenPassword
    root_password: GivenPassword
    email: str | None = None


Body = TypeVar("Body", LoginBody, SetupBody)


@dataclass(frozen=True, slots=True)
class AuthRules:
    """Settings of the routes."""

    cookie_secure: bool = True
    allow_remote_setup: bool = False
    origins: tuple[str, ...] = ()
    """Origins beside the server's own whose pages may log in; * is all."""


def auth_routes(
    users: Users,
    authenticator: Authenticator,
    tokens: Tokens,
    logins: Logins,
    rules: AuthRules,
    sender_of: Callable[[Request], Sender],
) -> list[Route]:
    """The routes, to be mounted by the application."""
    routes = AuthRoutes(users, authenticator, tokens, logins, rules, sender_of)
    return [
        Route("/v1/api/auth/login", _answering(routes.login), methods=["POST"]),
        Route("/v1/api/auth/refresh", _answering(routes.refresh), methods=["POST"]),
        Route("/v1/api/auth/logout", _answering(routes.logout), methods=["POST"]),
        Route("/v1/api/auth/me", _answering(routes.me), methods=["GET"]),
        Route("/v1/api/auth/setup", _answering(routes.setup), methods=["POST"]),
        Route("/v1/api/auth/status", _answering(routes.status), methods=["GET"]),
    ]


Endpoint = Callable[[Request], Awaitable[Response]]


def _answering(endpoint: Endpoint) -> Endpoint:
    """The endpoint with its failures as answers."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except AuthFailure as exc:
            return _json({"error": exc.slug, "message": str(exc)}, exc.status)
        except Unauthenticated as exc:
            return _json({"error": "unauthorized", "message": str(exc)}, 401)
        except KalamDbError:
            return _json({"error": "internal_error", "message": "The server cannot do this now"}, 500)

    return answer


class AuthRoutes:
    """What the routes do."""

    def __init__(
        self,
        users: Users,
        authenticator: Authenticator,
        tokens: Tokens,
        logins: Logins,
        rules: AuthRules,
        sender_of: Callable[[Request], Sender],
    ) -> None:
        self._users = users
        self._authenticator = authenticator
        self._tokens = tokens
        self._logins = logins
        self._rules = rules
        self._sender_of = sender_of

    async def login(self, request: Request) -> Response:
        """Name and password for a pair of tokens."""
        body = await self._body(request, LoginBody)
        sender = self._sender_of(request)
        user = await self._logins.check(body.name, body.password, address=sender.ip, is_local=sender.is_local)
        return self._logged_in(user)

    async def refresh(self, request: Request) -> Response:
        """A refresh token for a new pair. A browser sends cookies by itself but no Authorization header, so that
        only the cookie needs the proof that a page of ours asks."""
        self._check_origin(request)
        token = request.cookies.get(REFRESH_COOKIE)
        if token is not None:
            _check_content_type(request)
        else:
            token = bearer_token(request.headers.get("authorization"))
        return self._logged_in(self._authenticator.refresh(token))

    async def logout(self, request: Request) -> Response:
        """Clear the cookies; tokens hold until they expire."""
        response = _json({"message": "Logged out successfully"})
        for name in (AUTH_COOKIE, REFRESH_COOKIE):
            self._set_cookie(response, name, "", 0)
        return response

    async def me(self, request: Request) -> Response:
        """Who the caller is, by header or cookie."""
        header, cookie = request.headers.get("authorization"), request.cookies.get(AUTH_COOKIE)
        token = cookie if header is None and cookie is not None else bearer_token(header)
        identity = await self._authenticator.authenticate_token(token)
        user = self._users.find(identity.user)
        if user is None:
            raise Unauthenticated("the token is not valid")
        return _json({"user": _user_json(user), "admin_ui_access": _is_admin(user)})

    async def status(self, request: Request) -> Response:
        """Whether the server needs its set-up."""
        needs_setup = self._users.needs_setup
        message = "Root has no password yet; set the server up" if needs_setup else "The server is set up"
        return _json({"needs_setup": needs_setup, "message": message})

    async def setup(self, request: Request) -> Response:
        """Root's first password and the first administrator."""
        sender = self._sender_of(request)
        if not (sender.is_local or self._rules.allow_remote_setup):
            raise AuthFailure(403, "forbidden", "The server is set up from its own machine only")
        body = await self._body(request, SetupBody)
        if not self._users.needs_setup:
            raise AuthFailure(409, "already_configured", "The server is set up already; log in")
        user = await self._logins.run(lambda: self._set_up(body, sender.ip))
        return _json({"user": _user_json(user), "message": "The server is set up; log in to go on"})

    def _set_up(self, body: SetupBody, address: str) -> UserRecord:
        for password in (body.password, body.root_password):
            try:
                self._users.passwords.check(password, refuse_common=True)
            except InvalidRequest as exc:
                raise AuthFailure(400, "weak_password", str(exc)) from None
        try:
            self._users.set_up(body.name, body.password, body.root_password, body.email, address=address)
        except InvalidRequest as exc:
            raise AuthFailure(400, "invalid_user", str(exc)) from None
        except Conflict as exc:
            slug = "user_exists" if self._users.needs_setup else "already_configured"
            raise AuthFailure(409, slug, str(exc)) from None
        user = self._users.find(body.name)
        assert user is not None
        return user

    def _logged_in(self, user: UserRecord) -> Response:
        access = self._tokens.issue(user, TokenKind.ACCESS)
        refresh = self._tokens.issue(user, TokenKind.REFRESH)
        response = _json(
            {
                "user": _user_json(user),
                "admin_ui_access": _is_admin(user),
                "expires_at": _time_text(access.expires_s * 1000),
                "access_token": access.text,
                "refresh_token": refresh.text,
                "refresh_expires_at": _time_text(refresh.expires_s * 1000),
            }
        )
        self._set_cookie(response, AUTH_COOKIE, access.text, self._tokens.lifetime_s(TokenKind.ACCESS))
        self._set_cookie(response, REFRESH_COOKIE, refresh.text, self._tokens.lifetime_s(TokenKind.REFRESH))
        return response

    def _set_cookie(self, response: Response, name: str, value: str, age_s: int) -> None:
        response.set_cookie(
            name, value, max_age=age_s, path="/", secure=self._rules.cookie_secure, httponly=True, samesite="strict"
        )

    async def _body(self, request: Request, kind: type[Body]) -> Body:
        """The body of a request that a page of another site cannot have sent. Raises AuthFailure."""
        self._check_origin(request)
        _check_content_type(request)
        raw = bytearray()
        async for chunk in request.stream():
            raw += chunk
            if len(raw) > _BODY_BYTES_MAX:
                raise AuthFailure(400, "invalid_request", f"The body has more than {_BODY_BYTES_MAX} bytes")
        try:
            return msgspec.json.decode(raw, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise AuthFailure(400, "invalid_request", f"The body is not valid: {exc}") from None

    def _check_origin(self, request: Request) -> None:
        """Raise AuthFailure when a browser says that the page is of another site."""
        origin = request.headers.get("origin")
        if origin is None or "*" in self._rules.origins or origin.lower() in self._rules.origins:
            return
        page, server = _host_of(origin), _host_of(f"//{request.headers.get('host', '')}")
        if page is None or not (page == server or (is_loopback(page) and is_loopback(server or ""))):
            raise AuthFailure(403, "forbidden", "Pages of another site may not log in here")


def _host_of(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _check_content_type(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise AuthFailure(415, "unsupported_media_type", "Content-Type: application/json is needed")


def _is_admin(user: UserRecord) -> bool:
    return user.role in (Role.DBA, Role.SYSTEM)


def _user_json(user: UserRecord) -> dict[str, Any]:
    return {
        "id": user.user_id,
        "role": user.role.value,
        "email": user.email,
        "created_at": _time_text(user.created_at),
        "updated_at": _time_text(user.updated_at),
    }


def _time_text(moment_ms: int) -> str:
    """RFC 3339 of milliseconds since 1970."""
    return dt.datetime.fromtimestamp(moment_ms / 1000, dt.UTC).isoformat()


def _json(answer: dict[str, Any], status: int = 200) -> Response:
    headers = {"Cache-Control": "no-store"}
    return Response(msgspec.json.encode(answer), status, headers, media_type="application/json")


__all__: Sequence[str] = ["AuthRules", "Sender", "auth_routes"]
