"""POST /v1/api/sql: from a body to an answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kalamdb.clock import Clock
from kalamdb.database import Database
from kalamdb.errors import Denied, KalamDbError, Unauthenticated
from kalamdb.result import Result
from kalamdb.server.encode import encode, result_json
from kalamdb.server.identity import Authenticator, Identity


class SqlRequest(msgspec.Struct):
    """The body."""

    sql: str
    params: list[None | bool | int | float | str] | None = None
    namespace_id: str | None = None


class SqlRoute:
    """Runs the SQL of requests in a pool of threads."""

    def __init__(self, database: Database, authenticator: Authenticator, clock: Clock, threads: int) -> None:
        self._database = database
        self._authenticator = authenticator
        self._clock = clock
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="kalamdb-query")

    def routes(self) -> Sequence[Route]:
        """What to mount."""
        return [Route("/v1/api/sql", self.post, methods=["POST"])]

    async def post(self, request: Request) -> Response:
        """Run one body."""
        began_s = self._clock.monotonic_s()
        status = 200
        try:
            identity = self._authenticator.bearer(request.headers.get("authorization"))
            body = msgspec.json.decode(await request.body(), type=SqlRequest)
            loop = asyncio.get_running_loop()
            results = await loop.run_in_executor(self._threads, self._run, body, identity)
            answer: dict[str, Any] = {"status": "success", "results": results}
        except msgspec.DecodeError as exc:
            status, answer = 400, _failure("INVALID_INPUT", str(exc))
        except Unauthenticated as exc:
            status, answer = 401, _failure(exc.code, str(exc))
        except Denied as exc:
            status, answer = 403, _failure("PERMISSION_DENIED", str(exc))
        except KalamDbError as exc:
            status, answer = 400, _failure("SQL_EXECUTION_ERROR", str(exc))
        answer["took"] = round((self._clock.monotonic_s() - began_s) * 1000, 3)
        return Response(encode(answer), status, media_type="application/json")

    def _run(self, body: SqlRequest, identity: Identity) -> list[dict[str, Any]]:
        result: Result = self._database.execute(
            body.sql, body.params, user=identity.user, role=identity.role, namespace=body.namespace_id
        )
        return [result_json(one, identity.user) for one in result.results]

    def close(self) -> None:
        """Wait for what runs."""
        self._threads.shutdown(wait=True)


def _failure(code: str, message: str) -> dict[str, Any]:
    return {"status": "error", "results": [], "error": {"code": code, "message": message}}
