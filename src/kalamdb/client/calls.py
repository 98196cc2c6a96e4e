"""What each call of a client does, as a generator that yields requests and is sent answers.

`Client` and `AsyncClient` differ only in how they send: both drive these.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from kalamdb.client import wire
from kalamdb.errors import Conflict, InvalidRequest, NotFound, Unauthenticated
from kalamdb.result import Result

_T = TypeVar("_T")
_JSON = {"Content-Type": "application/json"}
_ENDED = frozenset({"completed", "failed", "cancelled", "skipped"})


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request."""

    method: str
    path: str
    content: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    repeatable: bool = False
    """Whether it may be sent again when no answer came."""
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    status: int
    content: bytes
    retry_after: str | None = None

    def decoded(self) -> Any:
        """The body. Raises the error that it tells."""
        return wire.answer_of(self.status, self.content, self.retry_after)


Call = Generator[Request, Answer, _T]


class Calls:
    """The calls of one client: who it is, and what it sends."""

    def __init__(self, user: str | None, password: str | None, token: str | None, namespace: str | None) -> None:
        if (user is None) != (password is None):
            raise InvalidRequest("user and password are given together, or a token instead")
        self._credentials = None if user is None else (user, password)
        self._tokens = None if token is None else wire.Tokens(token)
        self._namespace = namespace
        self._lock = threading.Lock()

    def login(self, user: str, password: str) -> Call[Mapping[str, Any]]:
        """Log in as a user; later calls are this user's."""
        body = msgspec.json.encode({"user": user, "password": password})
        answer = (yield Request("POST", "/v1/api/auth/login", body, _JSON)).decoded()
        with self._lock:
            self._credentials = (user, password)
            self._tokens = wire.tokens_of(answer)
        return answer["user"]  # type: ignore[no-any-return]

    def logout(self) -> Call[None]:
        """Forget the tokens."""
        (yield Request("POST", "/v1/api/auth/logout", b"{}", _JSON)).decoded()
        self._tokens = self._credentials = None

    def me(self) -> Call[Mapping[str, Any]]:
        """Who the token belongs to."""
        answer = yield from self._authorised(Request("GET", "/v1/api/auth/me", repeatable=True))
        return answer["user"]  # type: ignore[no-any-return]

    def access_token(self) -> Call[str]:
        """A token that is not known to have expired, by logging in when there is none."""
        if self._tokens is None:
            if self._credentials is None:
                raise Unauthenticated(
                    "the client has neither a token nor user and password; call login()", "MISSING_AUTHORIZATION"
                )
            user, password = self._credentials
            assert password is not None
            yield from self.login(user, password)
        assert self._tokens is not None
        return self._tokens.access

    def renew(self) -> Call[None]:
        """New tokens in place of expired ones: by the refresh token, else by logging in again."""
        tokens = self._tokens
        if tokens is not None and tokens.refresh is not None:
            headers = {**_JSON, "Authorization": f"Bearer {tokens.refresh}"}
            answer = yield Request("POST", "/v1/api/auth/refresh", b"{}", headers)
            if answer.status == 200:
                self._tokens = wire.tokens_of(answer.decoded())
                return
        if self._credentials is None:
            raise Unauthenticated("the token has expired and cannot be renewed; log in again", "TOKEN_EXPIRED")
        user, password = self._credentials
        assert password is not None
        yield from self.login(user, password)

    def _authorised(self, request: Request) -> Call[Any]:
        for attempt in range(2):
            token = yield from self.access_token()
            headers = {**request.headers, "Authorization": f"Bearer {token}"}
            sent = Request(
                request.method, request.path, request.content, headers, request.repeatable, request.timeout_s
            )
            try:
                return (yield sent).decoded()
            except Unauthenticated as exc:
                if exc.code != "TOKEN_EXPIRED" or attempt:
                    raise
                yield from self.renew()
        raise AssertionError("unreachable")

    def execute(
        self, sql: str, params: wire.Params, *, user: str | None = None, namespace: str | None = None,
        timeout_s: float | None = None, idempotency_key: str | None = None,
    ) -> Call[Result]:  # fmt: skip
        """Run one or more statements."""
        text = sql if user is None else wire.as_user_sql(sql, user)
        headers = dict(_JSON) if idempotency_key is None else {**_JSON, "Idempotency-Key": idempotency_key}
        body = wire.sql_body(text, params, namespace or self._namespace)
        repeatable = idempotency_key is not None or wire.may_repeat(text)
        answer = yield from self._authorised(Request("POST", "/v1/api/sql", body, headers, repeatable, timeout_s))
        return wire.result_of(answer)

    def insert(self, table: str, data: Any, *, user: str | None, on_conflict: str, namespace: str | None) -> Call[int]:
        """Insert rows, in statements of at most about half a megabyte, each all or nothing."""
        columns, rows = wire.table_of(data)
        done = 0
        for text in wire.insert_texts(table, columns, rows, on_conflict):
            try:
                result = yield from self.execute(text, None, user=user, namespace=namespace)
            except Conflict as exc:
                if done:
                    exc.args = (f"{exc} (after {done} rows were written)",)
                raise
            done += result.row_count
        return done

    def setup(self, user: str, password: str, root_password: str, email: str | None) -> Call[Mapping[str, Any]]:
        """First set-up of a server: root's password and a first administrator."""
        body = {"user": user, "password": password, "root_password": root_password}
        content = msgspec.json.encode(body if email is None else {**body, "email": email})
        return (yield Request("POST", "/v1/api/auth/setup", content, _JSON)).decoded()["user"]  # type: ignore[no-any-return]

    # Jobs, by SQL

    def create_job(self, job_type: str, params: Any) -> Call[str]:
        """The id of a new job."""
        text = msgspec.json.encode({} if params is None else params).decode()
        result = yield from self.execute(f"CALL create_job({wire.literal(job_type)}, {wire.literal(text)})", None)
        return (result.message or "").rpartition(" ")[2]

    def job(self, job_id: str) -> Call[dict[str, Any]]:
        """A job as system.jobs has it. Raises NotFound."""
        result = yield from self.execute("SELECT * FROM system.jobs WHERE job_id = $1", [job_id])
        found = result.dicts()
        if not found:
            raise NotFound(f"job '{job_id}' does not exist")
        return found[0]

    def control_job(self, verb: str, job_id: str) -> Call[str]:
        """CANCEL, PAUSE, RESUME or RETRY a job; the server's answer."""
        result = yield from self.execute(f"{verb} JOB {wire.literal(job_id)}", None)
        return result.message or ""

    def ended(self, job: Mapping[str, Any]) -> bool:
        """Whether a job is in a terminal state."""
        return job["status"] in _ENDED
