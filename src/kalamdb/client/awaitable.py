"""`AsyncClient`: the calls of `Client`, awaitable."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping
from typing import Any, TypeVar

import httpx

from kalamdb.client import wire
from kalamdb.client.awaitable_live import AsyncLiveQuery, AsyncLiveSocket
from kalamdb.client.blocking import ATTEMPTS, POLL_S, unreachable
from kalamdb.client.calls import Answer, Call, Calls, Request
from kalamdb.client.live import Feed
from kalamdb.errors import Timeout
from kalamdb.result import Result

_T = TypeVar("_T")


class AsyncClient:
    """A served database for programs on an event loop; see `Client` for what the calls do.

    Any number of tasks may use it. An async context manager that closes it.
    """

    def __init__(
        self, url: str, *, user: str | None = None, password: str | None = None, token: str | None = None,
        namespace: str | None = None, timeout_s: float = 30.0,
    ) -> None:  # fmt: skip
        self.url = wire.base_url(url)
        self._calls = Calls(user, password, token, namespace)
        self._http = httpx.AsyncClient(base_url=self.url, timeout=timeout_s, trust_env=False)
        self._socket = AsyncLiveSocket(wire.socket_url(self.url), self._token)
        self._numbers = itertools.count(1)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End all live queries and close the connections. Idempotent."""
        await self._socket.close()
        await self._http.aclose()

    async def login(self, user: str, password: str) -> Mapping[str, Any]:
        """See Client.login."""
        return await self._run(self._calls.login(user, password))

    async def logout(self) -> None:
        """See Client.logout."""
        await self._run(self._calls.logout())

    async def me(self) -> Mapping[str, Any]:
        """See Client.me."""
        return await self._run(self._calls.me())

    async def setup(self, user: str, password: str, root_password: str, email: str | None = None) -> Mapping[str, Any]:
        """See Client.setup."""
        return await self._run(self._calls.setup(user, password, root_password, email))

    async def execute(
        self, sql: str, params: wire.Params = None, *, user: str | None = None, namespace: str | None = None,
        timeout_s: float | None = None, idempotency_key: str | None = None,
    ) -> Result:  # fmt: skip
        """See Client.execute."""
        return await self._run(
            self._calls.execute(
                sql, params, user=user, namespace=namespace, timeout_s=timeout_s, idempotency_key=idempotency_key
            )
        )

    async def insert(
        self, table: str, data: Any, *, user: str | None = None, on_conflict: str = "error",
        namespace: str | None = None,
    ) -> int:  # fmt: skip
        """See Client.insert."""
        return await self._run(self._calls.insert(table, data, user=user, on_conflict=on_conflict, namespace=namespace))

    async def subscribe(
        self, sql: str, *, from_seq: int | None = None, last_rows: int | None = None,
        batch_size: int | None = None, snapshot: bool = True,
    ) -> AsyncLiveQuery:  # fmt: skip
        """See Client.subscribe."""
        live = AsyncLiveQuery(self._socket)
        live.feed = Feed(
            f"sub-{next(self._numbers)}", sql, live.emit, live.ended, from_seq, last_rows, batch_size, snapshot
        )
        await self._socket.add(live.feed)
        return live

    async def _token(self, fresh: bool) -> str:
        if fresh:
            await self._run(self._calls.renew())
        return await self._run(self._calls.access_token())

    async def create_job(self, job_type: str, params: Any = None) -> str:
        """See Client.create_job."""
        return await self._run(self._calls.create_job(job_type, params))

    async def get_job(self, job_id: str) -> dict[str, Any]:
        """See Client.get_job."""
        return await self._run(self._calls.job(job_id))

    async def cancel_job(self, job_id: str) -> str:
        """See Client.cancel_job."""
        return await self._run(self._calls.control_job("CANCEL", job_id))

    async def pause_job(self, job_id: str) -> str:
        """See Client.pause_job."""
        return await self._run(self._calls.control_job("PAUSE", job_id))

    async def resume_job(self, job_id: str) -> str:
        """See Client.resume_job."""
        return await self._run(self._calls.control_job("RESUME", job_id))

    async def retry_job(self, job_id: str) -> str:
        """See Client.retry_job."""
        return await self._run(self._calls.control_job("RETRY", job_id))

    async def wait_job(self, job_id: str, timeout_s: float | None = None) -> dict[str, Any]:
        """See Client.wait_job."""
        try:
            async with asyncio.timeout(timeout_s):
                while not self._calls.ended(job := await self.get_job(job_id)):
                    await asyncio.sleep(POLL_S)
                return job
        except TimeoutError:
            raise Timeout(f"job '{job_id}' has not ended after {timeout_s:g} s") from None

    async def _run(self, call: Call[_T]) -> _T:
        try:
            request = next(call)
            while True:
                request = call.send(await self._send(request))
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]

    async def _send(self, request: Request) -> Answer:
        for attempt in range(ATTEMPTS):
            try:
                answer = await self._http.request(
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
            await asyncio.sleep(0.1 * 2**attempt)
        raise AssertionError("unreachable")
