"""What runs for the clients of a server: listed in system.queries, ended by KILL QUERY."""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Any

from kalamdb.clock import Clock
from kalamdb.errors import Cancelled, KalamDbError, NotFound, Timeout
from kalamdb.result import Result
from kalamdb.sql import statements as st
from kalamdb.sql.caller import Caller

_RECENT_MAX = 200
_SQL_SHOWN_MAX = 2000
_slow_log = logging.getLogger("kalamdb.slow")


class QueryState(StrEnum):
    """Where a query is."""

    QUEUED = "queued"
    RUNNING = "running"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


class RunningQuery:
    """One text that a client sent. Thread-safe."""

    def __init__(self, query_id: str, user: str, sql: str, clock: Clock, deadline_s: float) -> None:
        self.query_id = query_id
        self.user = user
        self.sql = sql
        self.state = QueryState.QUEUED
        self.started_ms = clock.now_ms()
        self.began_s = clock.monotonic_s()
        self.ended_s: float | None = None
        self.deadline_s = deadline_s
        """When it must have ended, on the monotonic clock."""
        self._clock = clock
        self._cause: str | None = None
        self._lock = threading.Lock()
        self._listeners: list[Callable[[], None]] = []

    def cancel(self, cause: str) -> None:
        """Ask it to end; `cause` says why. Idempotent."""
        with self._lock:
            if self._cause is not None or self.ended_s is not None:
                return
            self._cause = cause
            listeners = list(self._listeners)
        for listener in listeners:
            listener()

    def on_cancel(self, listener: Callable[[], None]) -> None:
        """Call `listener`, once, when it is cancelled: at once when it was."""
        with self._lock:
            if self._cause is None:
                self._listeners.append(listener)
                return
        listener()

    def cancelled(self) -> bool:
        """Whether somebody asked it to end."""
        return self._cause is not None

    def overdue(self) -> bool:
        """Whether its deadline has passed."""
        return self._clock.monotonic_s() > self.deadline_s

    def left_s(self) -> float:
        """Seconds to its deadline."""
        return max(self.deadline_s - self._clock.monotonic_s(), 0.0)

    def error(self) -> KalamDbError:
        """Why it is ended before it is done."""
        if self._cause is not None:
            return Cancelled(f"the statement was cancelled: {self._cause}")
        return Timeout(
            "the statement took longer than execution.handler_timeout_seconds allows; narrow it or raise the setting"
        )

    @property
    def duration_ms(self) -> int:
        """How long it has been there, or was."""
        end_s = self._clock.monotonic_s() if self.ended_s is None else self.ended_s
        return int((end_s - self.began_s) * 1000)


class RunningQueries:
    """All of them, and the slow ones that ended lately. Thread-safe."""

    def __init__(self, clock: Clock, slow_ms: float) -> None:
        self._clock = clock
        self._slow_ms = slow_ms
        self._lock = threading.Lock()
        self._running: dict[str, RunningQuery] = {}
        self._recent: deque[RunningQuery] = deque(maxlen=_RECENT_MAX)

    def begin(self, user: str, sql: str, timeout_s: float) -> RunningQuery:
        """List a query, as queued."""
        query_id = "Q-" + self._clock.random_bytes(6).hex()
        query = RunningQuery(query_id, user, sql, self._clock, self._clock.monotonic_s() + timeout_s)
        with self._lock:
            self._running[query_id] = query
        return query

    def end(self, query: RunningQuery, state: QueryState) -> None:
        """A query has ended; a slow one is logged and listed on."""
        with self._lock:
            if self._running.pop(query.query_id, None) is None:
                return
            query.ended_s = self._clock.monotonic_s()
            query.state = state
            slow = query.duration_ms >= self._slow_ms
            if slow:
                self._recent.append(query)
        if slow:
            _slow_log.warning(
                "%s of user '%s' took %d ms (%s): %s",
                query.query_id, query.user, query.duration_ms, state, shown_sql(query.sql),
            )  # fmt: skip

    def kill(self, query_id: str, by: str) -> RunningQuery:
        """Cancel a query. Raises NotFound when none of that id runs."""
        with self._lock:
            query = self._running.get(query_id)
        if query is None:
            raise NotFound(f"Query '{query_id}' does not run; SELECT query_id FROM system.queries")
        query.cancel(f"KILL QUERY by '{by}'")
        return query

    def cancel_all(self, cause: str) -> None:
        """Cancel all that run: the server stops."""
        with self._lock:
            running = list(self._running.values())
        for query in running:
            query.cancel(cause)

    def counts(self) -> dict[str, int]:
        """How many wait for a thread, and how many run."""
        with self._lock:
            states = Counter(query.state for query in self._running.values())
        return {state.value: states[state] for state in (QueryState.QUEUED, QueryState.RUNNING)}

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """For system.queries: those that run, then the slow ones, the newest first."""
        with self._lock:
            listed = [*self._running.values(), *reversed(self._recent)]
        for one in listed:
            yield one.query_id, one.user, one.state.value, one.started_ms, one.duration_ms, shown_sql(one.sql)


class QueryAdmin:
    """Runs KILL QUERY."""

    def __init__(self, queries: RunningQueries) -> None:
        self._queries = queries

    def run(self, statement: st.KillQuery, caller: Caller) -> Result:
        """See `RunningQueries.kill`."""
        query = self._queries.kill(statement.query_id, caller.user)
        return Result(message=f"Query '{query.query_id}' of user '{query.user}' was told to end")


def shown_sql(sql: str) -> str:
    """A text as logs and tables show it: cut, and not at all where it may hold a password."""
    upper = sql.upper()
    if "PASSWORD" in upper or "CREDENTIALS" in upper or "OAUTH" in upper:
        return f"[{len(sql)} characters, not shown: they may hold a secret]"
    return sql if len(sql) <= _SQL_SHOWN_MAX else sql[:_SQL_SHOWN_MAX] + "..."
