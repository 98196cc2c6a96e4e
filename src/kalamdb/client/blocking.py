"""`Client`: calls of a server that block."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import httpx

from kalamdb.client import wire
from kalamdb.client.blocking_live import LiveQuery, LiveSocket
from kalamdb.client.calls import Answer, Call, Calls, Request
from kalamdb.client.live import Change, Feed
from kalamdb.clock import Clock, SystemClock
from kalamdb.errors import Timeout, Unavailable
from kalamdb.result import Result

_T = TypeVar("_T")
ATTEMPTS = 3
POLL_S = 0.2


class Client:
    """A served database for programs that block. Thread-safe; a context manager that closes it.

    `user` and `password` log in at the first call; a `token` is used as it is. `namespace` stands for tables
    without one. Expired tokens are renewed; a SELECT is repeated when the connection broke.
    """

    def __init__(
        self, url: str, *, user: str | None = None, password: str | None = None, token: str | None = None,
        namespace: str | None = None, timeout_s: float = 30.0, clock: Clock | None = None,
    ) -> None:  # fmt: skip
        self.url = wire.base_url(url)
        self._calls = Calls(user, password, token, namespace)
        self._http = httpx.Client(base_url=self.url, timeout=timeout_s, trust_env=False)
        self._clock = clock or SystemClock()
        self._socket = LiveSocket(wire.socket_url(self.url), self._token, self._clock)
        self._numbers = itertools.count(1)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End all live queries and close the connections. Idempotent."""
        self._socket.close()
        self._http.close()

    def login(self, user: str, password: str) -> Mapping[str, Any]:
        """Log in; later calls are this user's. The user. Raises Unauthenticated."""
        return self._run(self._calls.login(user, password))

    def logout(self) -> None:
        """Forget the tokens, here and in the server's cookies."""
        self._run(self._calls.logout())

    def me(self) -> Mapping[str, Any]:
        """Who this client is: id, role, email. Raises Unauthenticated."""
        return self._run(self._calls.me())

    def setup(self, user: str, password: str, root_password: str, email: str | None = None) -> Mapping[str, Any]:
        """First set-up of a server, from the same machine; the new administrator. Raises Conflict when it was done."""
        return self._run(self._calls.setup(user, password, root_password, email))

    def execute(
        self, sql: str, params: wire.Params = None, *, user: str | None = None, namespace: str | None = None,
        timeout_s: float | None = None, idempotency_key: str | None = None,
    ) -> Result:  # fmt: skip
        """Run one or more statements; the last result, all of them in `.results`.

        `user` runs one statement as another user (EXECUTE AS USER). With `idempotency_key` a write that is sent
        again is answered with its first outcome. Raises KalamDbError.
        """
        return self._run(
            self._calls.execute(
                sql, params, user=user, namespace=namespace, timeout_s=timeout_s, idempotency_key=idempotency_key
            )
        )

    def insert(
        self, table: str, data: Any, *, user: str | None = None, on_conflict: str = "error",
        namespace: str | None = None,
    ) -> int:  # fmt: skip
        """Insert dicts, Arrow, pandas or polars; the number of rows written.

        Rows go in statements of about half a megabyte of text; each is all or nothing, the whole is not.
        """
        return self._run(self._calls.insert(table, data, user=user, on_conflict=on_conflict, namespace=namespace))

    def subscribe(
        self, sql: str, *, callback: Callable[[Change], None] | None = None, from_seq: int | None = None,
        last_rows: int | None = None, batch_size: int | None = None, snapshot: bool = True,
    ) -> LiveQuery:  # fmt: skip
        """Follow `SELECT ... FROM table [WHERE ...]`: the rows that are there, then each change.

        `last_rows` begins with the newest rows only, `from_seq` with what changed after that `_seq`,
        `snapshot=False` with nothing. With `callback` each change is handed to it in a thread of the client.
        """
        live = LiveQuery(self._socket, callback)
        live.feed = Feed(
            f"sub-{next(self._numbers)}", sql, live.emit, live.ended, from_seq, last_rows, batch_size, snapshot
        )
        self._socket.add(live.feed)
        return live

    def _token(self, fresh: bool) -> str:
        if fresh:
            self._run(self._calls.renew())
        return self._run(self._calls.access_token())

    # Jobs

    def create_job(self, job_type: str, params: Any = None) -> str:
        """Create a job; its id. Needs role dba."""
        return self._run(self._calls.create_job(job_type, params))

    def get_job(self, job_id: str) -> dict[str, Any]:
        """A job, by the columns of system.jobs. Raises NotFound."""
        return self._run(self._calls.job(job_id))

    def cancel_job(self, job_id: str) -> str:
        """Cancel a job; what the server says."""
        return self._run(self._calls.control_job("CANCEL", job_id))

    def pause_job(self, job_id: str) -> str:
        """Hold a job back; what the server says."""
        return self._run(self._calls.control_job("PAUSE", job_id))

    def resume_job(self, job_id: str) -> str:
        """Let a held job go on; what the server says."""
        return self._run(self._calls.control_job("RESUME", job_id))

    def retry_job(self, job_id: str) -> str:
        """Run a failed or cancelled job again; what the server says."""
        return self._run(self._calls.control_job("RETRY", job_id))

    def wait_job(self, job_id: str, timeout_s: float | None = None) -> dict[str, Any]:
        """Block until a job has ended, in whatever state. Raises Timeout."""
        deadline = None if timeout_s is None else self._clock.monotonic_s() + timeout_s
        while True:
            job = self.get_job(job_id)
            if self._calls.ended(job):
                return job
            if deadline is not None and self._clock.monotonic_s() > deadline:
                raise Timeout(f"job '{job_id}' is {job['status']} after {timeout_s:g} s")
            self._pause(POLL_S)

    def _pause(self, seconds: float) -> None:
        self._clock.wait(threading.Event(), seconds)

    def _run(self, call: Call[_T]) -> _T:
        """Drive a call: send what it yields, give it what comes back."""
        try:
            request = next(call)
            while True:
                request = call.send(self._send(request))
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]

    def _send(self, request: Request) -> Answer:
        for attempt in range(ATTEMPTS):
            try:
                answer = self._http.request(
                    request.method, request.path, content=request.content, headers=dict(request.headers),
                    timeout=httpx.USE_CLIENT_DEFAULT if request.timeout_s is None else request.timeout_s,
                )  # fmt: skip
                return Answer(answer.status_code, answer.content, answer.headers.get("retry-after"))
            except httpx.ConnectError as exc:
                if attempt == ATTEMPTS - 1:
                    raise unreachable(self.url, exc) from exc
            except httpx.TimeoutException as exc:
                raise Timeout(f"'{self.url}' did not answer in time; the outcome is not known") from exc
            except httpx.TransportError as exc:
                if not request.repeatable or attempt == ATTEMPTS - 1:
                    raise unreachable(self.url, exc) from exc
            self._pause(0.1 * 2**attempt)
        raise AssertionError("unreachable")


def unreachable(url: str, exc: Exception) -> Unavailable:
    """The error for a server that cannot be reached."""
    return Unavailable(f"the server at '{url}' cannot be reached: {exc or type(exc).__name__}; does it run?")
