"""POST /v1/api/sql: from a body to an answer, in one of the lanes."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from kalamdb.config import Settings
from kalamdb.database import Database
from kalamdb.errors import Cancelled, KalamDbError, LimitExceeded, RateLimited, TransactionConflict
from kalamdb.result import OutputColumn, Result
from kalamdb.server.answers import Answer, Phase, code_of, error_json, failure, result_json, results_json, success
from kalamdb.server.bodies import BadBody, BodyLimits, SqlBody, read_body
from kalamdb.server.edge import peer_of
from kalamdb.server.encode import encode, output_columns, rows_of, schema_json
from kalamdb.server.guards import Rate
from kalamdb.server.idempotency import Attempt, Idempotency
from kalamdb.server.identity import Authenticator, Identity
from kalamdb.server.lanes import DurableWaits, QueryThreads
from kalamdb.service import WouldBlock
from kalamdb.sql import statements as st
from kalamdb.sql.caller import Caller, Served
from kalamdb.sql.queries import QueryState, RunningQuery
from kalamdb.storage import Commit
from kalamdb.tables.transaction import Transaction
from kalamdb.types import Role, TableId, TableKind

_QUICK_ROWS_MAX = 20
"""Rows of an INSERT that runs on the loop."""
_QUICK_TEXT_MAX = 2_000
_QUICK_TEXT = re.compile(r"\s*(?:insert\s|update\s|delete\s|select\s[^(]*\Z)", re.IGNORECASE)
"""Texts that may be parsed on the loop: they never need the parser of queries, or not for long."""
_WHOLE_BYTES_MAX = 256 << 10
"""Up to this size a result is sent in one piece, with an honest status."""
_PIECES_AHEAD = 4
_CONFLICT_RETRIES = 20
_log = logging.getLogger("kalamdb.server")


@dataclass(slots=True)
class Call:
    """One request on its way."""

    identity: Identity
    body: SqlBody
    began_s: float
    query: RunningQuery
    caller: Caller
    key: str | None = None
    """Idempotency-Key."""
    script: st.Script | None = None
    phase: Phase = Phase.PARSE

    @property
    def admin(self) -> bool:
        """Whether errors are told in full."""
        return self.identity.role in (Role.DBA, Role.SYSTEM)


@dataclass(frozen=True, slots=True)
class Rows:
    """A piece of a streamed result: `count` rows, encoded, without the brackets."""

    data: bytes
    count: int


@dataclass(frozen=True, slots=True)
class Start:
    """A streamed result begins."""

    columns: tuple[OutputColumn, ...]


@dataclass(frozen=True, slots=True)
class End:
    """A streamed result ends, or fails."""

    error: Exception | None = None


Piece = Answer | Start | Rows | End


class Pipe:
    """Pieces of an answer from a query thread to the loop; the thread waits while the client is slow."""

    def __init__(self, loop: asyncio.AbstractEventLoop, query: RunningQuery) -> None:
        self._loop = loop
        self._query = query
        self._room = threading.Semaphore(_PIECES_AHEAD)
        self._pieces: asyncio.Queue[Piece] = asyncio.Queue()

    def put(self, piece: Piece) -> None:
        """Hand a piece over, in the thread. Raises what ended the query while it waited for room."""
        while not self._room.acquire(timeout=0.1):
            if self._query.cancelled() or self._query.overdue():
                raise self._query.error()
        self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    async def get(self) -> Piece:
        """The next piece, on the loop."""
        piece = await self._pieces.get()
        self._room.release()
        return piece


class SqlRoute:
    """The route. Made before the loop runs; parts that need the loop are made by the first request."""

    def __init__(
        self,
        database: Database,
        authenticator: Authenticator,
    ) -> None:
        context = database.context
        settings: Settings = context.settings
        self._session = context.session
        self._store = context.store
        self._queries = context.queries
        self._clock = context.clock
        self._authenticator = authenticator
        self._rate = Rate(
            settings["rate_limit.max_queries_per_sec"], self._clock,
            entries_max=settings["rate_limit.cache_max_entries"], ttl_s=settings["rate_limit.cache_ttl_seconds"],
        )  # fmt: skip
        self._limits = BodyLimits(
            settings["execution.max_parameters"],
            settings["execution.max_parameter_size_bytes"],
        )
        self._served = Served(
            settings["limits.default_query_limit"],
            settings["limits.max_query_limit"],
            settings["limits.sort_by_primary_key"],
            settings["limits.system_columns_shown"],
        )
        self._timeout_s: float = settings["execution.handler_timeout_seconds"]
        self._result_bytes_max: int = settings["limits.result_bytes_max"]
        self.threads = QueryThreads(
            settings["execution.query_threads"] or os.cpu_count() or 2,
            queue_max=settings["execution.queue_max"],
            wait_s=settings["execution.queue_wait_s"],
        )
        self._catalog = context.catalog
        self._idempotency = Idempotency(context.backend, self._clock, settings["execution.idempotency_hours"])
        self._waits_for_disk = settings["storage.durability"] == "commit"
        self._waits: DurableWaits | None = None

    def routes(self) -> Sequence[Route]:
        """What to mount."""
        return [Route("/v1/api/sql", self, methods=["POST"])]

    def stop(self) -> None:
        """Cancel what runs; new requests are refused. To be called on the loop, or after it. Idempotent."""
        self._queries.cancel_all("the server stops")
        self.threads.close()

    def close(self) -> None:
        """Stop, and let the last commits become durable. Blocks for the disk."""
        self.stop()
        if self._waits is not None:
            self._waits.stop()
            self._waits = None

    # A request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application of the route."""
        began_s = self._clock.monotonic_s()
        headers = dict(scope["headers"])
        call: Call | None = None
        try:
            authorization = headers.get(b"authorization")
            identity = await self._authenticator.authenticate(
                None if authorization is None else authorization.decode("latin-1")
            )
            self._check_rate(identity, scope)
            raw = await _receive_all(receive)
            content_type = headers.get(b"content-type", b"").decode("latin-1")
            call = self._call(identity, read_body(raw, content_type, self._limits), began_s, peer_of(scope).ip)
            if (key := headers.get(b"idempotency-key")) is not None:
                call.key = key.decode("latin-1")
            await self._run(call, receive, send)
        except ClientGone:
            self._end(call, Cancelled("the client went away"))
        except asyncio.CancelledError:
            self._end(call, Cancelled("the server stops"))
            raise
        except Exception as exc:  # noqa: BLE001 - every request is answered
            self._end(call, exc)
            phase = Phase.READ if call is None else call.phase
            await self._send(send, failure(exc, phase, admin=call is not None and call.admin), began_s)

    def _check_rate(self, identity: Identity, scope: Scope) -> None:
        if peer_of(scope).is_local:
            return
        wait_s = self._rate.wait_s(identity.user)
        if wait_s:
            raise RateLimited(
                f"user '{identity.user}' runs too many statements a second (rate_limit.max_queries_per_sec); "
                f"wait {wait_s:.2f} s",
                wait_s,
            )

    def _call(self, identity: Identity, body: SqlBody, began_s: float, address: str) -> Call:
        query = self._queries.begin(identity.user, body.sql, self._timeout_s)
        caller = Caller(
            identity.user, identity.role, body.namespace_id or "default", body.params, self._clock.now_ms(),
            deadline=query.overdue, cancelled=query.cancelled, served=self._served, address=address,
        )  # fmt: skip
        return Call(identity, body, began_s, query, caller)

    async def _run(self, call: Call, receive: Receive, send: Send) -> None:
        if self._prepare_here(call):
            found = self._run_here(call)
            if found is not None:
                answer, commit = found
                if commit is not None and self._waits_for_disk:
                    await self._until_durable(commit)
                self._queries.end(call.query, QueryState.FINISHED)
                await self._send(send, answer, call.began_s)
                return
        await self._run_in_thread(call, receive, send)

    def _end(self, call: Call | None, exc: Exception) -> None:
        """A request failed."""
        if call is not None:
            call.query.cancel(str(exc))
            self._queries.end(call.query, QueryState.CANCELLED if isinstance(exc, Cancelled) else QueryState.FAILED)
        if not isinstance(exc, KalamDbError):
            _log.error("a statement failed in an unforeseen way", exc_info=exc)

    async def _send(self, send: Send, answer: Answer, began_s: float) -> None:
        body = answer.body((self._clock.monotonic_s() - began_s) * 1000)
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        if answer.replayed:
            headers.append((b"idempotency-replayed", b"true"))
        if answer.retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % max(1, round(answer.retry_after_s))))
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    # On the loop

    def _prepare_here(self, call: Call) -> bool:
        """Parse and check rights, when that is quickly done; whether the statement may run here."""
        sql = call.body.sql
        script = self._session.seen(sql)
        if script is None:
            if len(sql) > _QUICK_TEXT_MAX or _QUICK_TEXT.match(sql) is None:
                return False
            script = self._session.parsed(sql)
        self._authorise(call, script)
        return is_quick(script) and call.key is None

    def _authorise(self, call: Call, script: st.Script) -> None:
        call.script = script
        if call.body.params and len(script.statements) > 1:
            raise BadBody("parameters cannot be used with several statements", "PARAMS_WITH_BATCH")
        call.phase = Phase.AUTHORISE
        self._session.authorise(script, call.caller)
        call.phase = Phase.RUN

    def _run_here(self, call: Call) -> tuple[Answer, Commit | None] | None:
        """Run a quick statement; None when it would wait for anything."""
        assert call.script is not None
        call.query.state = QueryState.RUNNING
        with self._store.unwaited() as pending:
            try:
                result = self._session.run(call.script, call.caller)
            except WouldBlock:
                assert not pending, "a statement was half done when it would have waited"
                return None
        answer = success([result_json(result, call.identity.user)], streamed=bool(result.outputs))
        return answer, pending[-1] if pending else None

    async def _until_durable(self, commit: Commit) -> None:
        if self._waits is None:
            self._waits = DurableWaits(self._store.backend.wait_durable, asyncio.get_running_loop())
        await self._waits.until_durable(commit)

    # In a thread

    async def _run_in_thread(self, call: Call, receive: Receive, send: Send) -> None:
        loop, query = asyncio.get_running_loop(), call.query
        ended: asyncio.Future[None] = loop.create_future()

        def end() -> None:
            if not ended.done():
                ended.set_result(None)

        def cancelled() -> None:
            loop.call_soon_threadsafe(end)

        query.on_cancel(cancelled)
        watching = asyncio.create_task(_watch(receive, query))
        timer = loop.call_later(query.left_s(), end)
        try:
            async with self.threads.slot(call.identity.user, query.left_s()) as start:
                query.state = QueryState.RUNNING
                pipe = Pipe(loop, query)
                start(partial(self._work, call, pipe))
                await self._pump(call, pipe, ended, send)
        finally:
            timer.cancel()
            watching.cancel()

    async def _pump(self, call: Call, pipe: Pipe, ended: asyncio.Future[None], send: Send) -> None:
        """Send the pieces of an answer until it is whole, or the query is ended."""
        rows, columns, first = 0, None, True
        while True:
            piece = await _first(pipe, ended, call.query)
            match piece:
                case Answer():
                    self._queries.end(call.query, _state_of(piece))
                    await self._send(send, piece, call.began_s)
                    return
                case Start():
                    columns = piece.columns
                    await send(_HEAD)
                    head = b'{"status":"success","results":[{"schema":%b,"rows":[' % bytes(schema_json(columns))
                    await send({"type": "http.response.body", "body": head, "more_body": True})
                case Rows():
                    data = piece.data if first else b"," + piece.data
                    first, rows = False, rows + piece.count
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                case End() if columns is None:
                    assert piece.error is not None
                    raise piece.error
                case End():
                    await send({"type": "http.response.body", "body": self._stream_end(call, rows, piece.error)})
                    return

    def _stream_end(self, call: Call, rows: int, error: Exception | None) -> bytes:
        told = None if error is None else error_json(error, call.phase, admin=call.admin)[1]
        if error is None:
            self._queries.end(call.query, QueryState.FINISHED)
        else:
            self._end(call, error)
        return b'],"row_count":%d,"as_user":%b}],"took":%.3f,"error":%b}' % (
            rows, encode(call.identity.user), (self._clock.monotonic_s() - call.began_s) * 1000, encode(told),
        )  # fmt: skip

    def _work(self, call: Call, pipe: Pipe) -> None:
        """Run a request, in a query thread."""
        try:
            if call.script is None:
                self._authorise(call, self._session.parsed(call.body.sql))
            assert call.script is not None
            statements = call.script.statements
            if len(statements) == 1 and isinstance(statements[0], st.Select) and not statements[0].explain:
                self._select(statements[0], call, pipe)
                return
            if call.key is not None and any(not isinstance(one, st.Select | st.Show) for one in statements):
                with self._idempotency.one(call.identity.user, call.key, call.body) as attempt:
                    pipe.put(attempt.earlier() or self._run_once(call, call.script, attempt))
                return
            pipe.put(self._run_whole(call, call.script))
        except Exception as exc:  # noqa: BLE001 - the loop answers
            try:
                pipe.put(End(exc))
            except KalamDbError:
                return

    def _run_whole(self, call: Call, script: st.Script, transaction: Transaction | None = None) -> Answer:
        result = self._session.run(script, call.caller, transaction)
        entries = results_json(script, result.results, call.identity.user)
        return success(entries, streamed=len(script.statements) == 1 and bool(result.columns))

    def _run_once(self, call: Call, script: st.Script, attempt: Attempt) -> Answer:
        """Run a request so that its answer is remembered: by the commit of its writes where one commit makes them
        all, else by a record before and one after."""
        try:
            if self._is_one_commit(script, call.caller):
                return self._run_in_transaction(call, script, attempt)
            attempt.begin()
            answer = self._run_whole(call, script)
        except KalamDbError as exc:
            if exc.retryable or isinstance(exc, Cancelled) or code_of(exc, call.phase)[0] not in (400, 403):
                if len(script.statements) == 1:
                    attempt.forget()
                raise
            answer = failure(exc, call.phase, admin=call.admin)
        attempt.end(answer)
        return answer

    def _is_one_commit(self, script: st.Script, caller: Caller) -> bool:
        for statement in script.statements:
            if not isinstance(statement, st.Insert | st.Update | st.Delete | st.Select):
                return False
            if not isinstance(statement, st.Select):
                name = statement.table
                entry = self._catalog.table(TableId(name.namespace or caller.namespace, name.name))
                if entry is not None and entry.definition.kind is TableKind.STREAM:
                    return False
        return True

    def _run_in_transaction(self, call: Call, script: st.Script, attempt: Attempt) -> Answer:
        for left in range(_CONFLICT_RETRIES, -1, -1):
            try:
                with ExitStack() as stack:
                    transaction = self._session.begin(stack, owner=call.identity.user, origin="SqlBatch")
                    answer = self._run_whole(call, script, transaction)
                    transaction.records = attempt.operations(answer)
                    transaction.commit()
                    return answer
            except TransactionConflict:
                if not left:
                    raise
        raise AssertionError

    def _select(self, statement: st.Select, call: Call, pipe: Pipe) -> None:
        with ExitStack() as stack:
            found = self._session.open(statement, call.caller, stack)
            if isinstance(found, Result):
                pipe.put(success([result_json(found, call.identity.user)], streamed=True))
                return
            columns = output_columns(found.schema, found.known)
            streaming, size, rows, waiting = False, 0, 0, list[bytes]()
            for batch in found:
                for piece in _pieces(columns, batch):
                    size += len(piece.data)
                    if size > self._result_bytes_max:
                        raise LimitExceeded(
                            f"the result takes more than {self._result_bytes_max} bytes (limits.result_bytes_max); "
                            "add a LIMIT or read it in parts"
                        )
                    rows += piece.count
                    waiting.append(piece.data)
                    if size > _WHOLE_BYTES_MAX:
                        if not streaming:
                            streaming = True
                            pipe.put(Start(columns))
                        pipe.put(Rows(b",".join(waiting), rows))
                        rows, waiting = 0, []
        if streaming:
            if waiting:
                pipe.put(Rows(b",".join(waiting), rows))
            pipe.put(End())
            return
        head = b'{"status":"success","results":[{"schema":%b,"rows":[%b],"row_count":%d,"as_user":%b}]' % (
            bytes(schema_json(columns)), b",".join(waiting), rows, encode(call.identity.user),
        )  # fmt: skip
        pipe.put(Answer(200, head, b',"error":null}'))


class ClientGone(Exception):
    """The client closed its connection."""


_HEAD: Message = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"application/json")],
}
_PIECE_ROWS = 2000


def is_quick(script: st.Script) -> bool:
    """Whether a text is one point read or write, which the loop runs itself unless it would wait."""
    if len(script.statements) != 1:
        return False
    match script.statements[0]:
        case st.Select(lookup=lookup):
            return lookup is not None
        case st.Insert(rows=rows, returning=None) if rows is not None:
            return len(rows) <= _QUICK_ROWS_MAX
        case st.Update(key=key, returning=None) | st.Delete(key=key, returning=None):
            return key is not None
        case _:
            return False


def _pieces(columns: tuple[OutputColumn, ...], batch: pa.RecordBatch) -> Sequence[Rows]:
    """The rows of a batch, some thousands at a time."""
    found = []
    for at in range(0, batch.num_rows, _PIECE_ROWS):
        rows = rows_of(columns, batch.slice(at, _PIECE_ROWS))
        found.append(Rows(encode(rows)[1:-1], len(rows)))
    return found


def _state_of(answer: Answer) -> QueryState:
    return QueryState.FINISHED if answer.status < 400 else QueryState.FAILED


async def _receive_all(receive: Receive) -> bytes:
    """The body; its size is bounded by the connection."""
    pieces: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        pieces.append(message.get("body", b""))
        if not message.get("more_body", False):
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)


async def _watch(receive: Receive, query: RunningQuery) -> None:
    """Cancel a query when its client goes away."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            query.cancel("the client went away")
            return


async def _first(pipe: Pipe, ended: asyncio.Future[None], query: RunningQuery) -> Piece:
    """The next piece, or the end of a query that was cancelled or is overdue."""
    getting: asyncio.Future[Any] = asyncio.ensure_future(pipe.get())
    await asyncio.wait([getting, ended], return_when=asyncio.FIRST_COMPLETED)
    if getting.done():
        piece: Piece = getting.result()
        return End(query.error()) if isinstance(piece, End) and piece.error and query.cancelled() else piece
    getting.cancel()
    return End(query.error())


__all__ = ["SqlRoute", "is_quick"]
