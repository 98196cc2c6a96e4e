"""Runs SQL for a caller: parse once, check the rights of the whole batch, then statement by statement."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import count
from threading import Lock
from typing import Any, Protocol

from kalamdb.clock import Clock
from kalamdb.errors import Conflict, InvalidRequest, KalamDbError
from kalamdb.result import Result
from kalamdb.sql import statements as st
from kalamdb.sql.admin import Admin
from kalamdb.sql.caller import Caller, check_role
from kalamdb.sql.engine import QueryRun
from kalamdb.sql.execute_as import Impersonation
from kalamdb.sql.jobs import JOB_STATEMENTS, JobAdmin
from kalamdb.sql.parse import parse
from kalamdb.sql.query import Reader
from kalamdb.sql.rows import Rows
from kalamdb.sql.tokens import SqlLimits
from kalamdb.tables.store import TableStore
from kalamdb.tables.transaction import Transaction

_SECRET = (st.UserStatement, st.StorageStatement)
"""Texts that may hold a password or credentials are not kept."""
_CACHED_TEXT_MAX = 10_000
"""Longer texts are not worth keeping: they hold their values."""


class StatementRunner(Protocol):
    """Runs one kind of statement for callers."""

    def run(self, statement: Any, caller: Caller) -> Result:
        """Run one statement; the role of the caller was checked."""
        ...


@dataclass(frozen=True, slots=True)
class OpenTransaction:
    """A transaction that has begun, as system.transactions shows it."""

    number: int
    owner: str
    origin: str
    """SqlBatch for BEGIN ... COMMIT, Api for db.transaction()."""
    began_s: float
    transaction: Transaction


class Session:
    """Executes SQL text. One per database; callers are passed in. Thread-safe."""

    def __init__(
        self,
        store: TableStore,
        reader: Reader,
        rows: Rows,
        admin: Admin,
        jobs: JobAdmin,
        clock: Clock,
        *,
        impersonation: Impersonation,
        runners: Mapping[type[st.Statement], StatementRunner],
        limits: SqlLimits,
        cache_entries_max: int,
        transaction_timeout_s: float,
        transaction_bytes_max: int,
    ) -> None:
        self._store = store
        self._reader = reader
        self._rows = rows
        self._admin = admin
        self._jobs = jobs
        self._runners = {**dict.fromkeys(JOB_STATEMENTS, jobs), **runners}
        self._clock = clock
        self._impersonation = impersonation
        self._limits = limits
        self._cache: OrderedDict[str, st.Script] = OrderedDict()
        self._cache_entries_max = cache_entries_max
        self._cache_lock = Lock()
        self._transaction_timeout_s = transaction_timeout_s
        self._transaction_bytes_max = transaction_bytes_max
        self._open: dict[int, OpenTransaction] = {}
        self._begun = count(1)

    def execute(self, sql: str, caller: Caller, transaction: Transaction | None = None) -> Result:
        """Run all statements; the last result, with all of them in `.results`.

        BEGIN ... COMMIT works within the text; a text that ends inside a transaction is rolled back.
        Inside `transaction` BEGIN and COMMIT are refused.
        """
        script = self.parsed(sql)
        self.authorise(script, caller)
        return self.run(script, caller, transaction)

    def authorise(self, script: st.Script, caller: Caller) -> None:
        """Check the rights of the caller for all statements, and the parameters. Raises Denied, InvalidRequest."""
        self._check_rights(script.statements, caller)
        caller.check_parameters(script.parameters)

    def run(self, script: st.Script, caller: Caller, transaction: Transaction | None = None) -> Result:
        """Run an authorised script; see `execute`."""
        statements = script.statements
        if len(statements) == 1 and not isinstance(statements[0], st.TransactionControl | st.UseNamespace):
            return self._run(statements[0], caller, transaction)
        return self._run_batch(statements, caller, transaction)

    def seen(self, sql: str) -> st.Script | None:
        """The statements of a text that was seen lately."""
        with self._cache_lock:
            known = self._cache.get(sql)
            if known is not None:
                self._cache.move_to_end(sql)
            return known

    def _check_rights(self, statements: Sequence[st.Statement], caller: Caller) -> None:
        """Raise Denied, before anything runs, for a statement that the caller may not run, and for a table that
        there is and the caller may not read or write."""
        pairs: list[tuple[st.Statement, Caller]] = []
        for statement in statements:
            inner, actor = statement, caller
            if isinstance(statement, st.ExecuteAs):
                inner, actor = statement.inner, self._impersonation.check(statement, caller)
            check_role(actor, inner)
            pairs.append((inner, actor))
        if len(statements) == 1:
            return
        namespace = caller.namespace
        for statement, actor in pairs:
            actor = replace(actor, namespace=namespace)
            match statement:
                case st.UseNamespace():
                    namespace = statement.name
                case st.Select():
                    self._reader.check_reads(statement.tables, actor)
                case st.Insert():
                    self._rows.check_writes(statement.table, actor)
                    self._reader.check_reads(() if statement.query is None else statement.query.tables, actor)
                case st.Update() | st.Delete():
                    self._rows.check_writes(statement.table, actor)
                    self._reader.check_reads(statement.tables, actor)
                case _:
                    pass

    def parsed(self, sql: str) -> st.Script:
        """The statements of a text, from the cache when it was seen lately."""
        if not isinstance(sql, str):
            raise InvalidRequest(f"SQL is text; a value of type {type(sql).__name__} was given")
        known = self.seen(sql)
        if known is not None:
            return known
        script = parse(sql, self._limits)
        if len(sql) <= _CACHED_TEXT_MAX and not any(map(_holds_secret, script.statements)):
            with self._cache_lock:
                self._cache[sql] = script
                while len(self._cache) > self._cache_entries_max:
                    self._cache.popitem(last=False)
        return script

    @property
    def plans_cached(self) -> int:
        """How many texts are kept parsed."""
        return len(self._cache)

    def _run_batch(self, statements: Sequence[st.Statement], caller: Caller, outer: Transaction | None) -> Result:
        results: list[Result] = []
        with ExitStack() as stack:
            transaction = outer
            for number, statement in enumerate(statements, 1):
                try:
                    if isinstance(statement, st.TransactionControl):
                        transaction = self._control(statement, caller, transaction, outer, stack, results)
                    elif isinstance(statement, st.UseNamespace):
                        caller = replace(caller, namespace=self._admin.use(statement))
                        results.append(Result(message=f"Namespace '{statement.name}' selected"))
                    else:
                        results.append(self._run(statement, caller, transaction))
                except KalamDbError as exc:
                    exc.failed_sql = statement.sql
                    if len(statements) > 1:
                        exc.args = (f"Statement {number} failed: {exc}",)
                    raise
            if transaction is not None and outer is None:
                transaction.rollback()
                raise InvalidRequest("Request completed with an open explicit transaction; rolled back automatically")
        last = results[-1]
        last.results = results
        return last

    def _control(
        self,
        statement: st.TransactionControl,
        caller: Caller,
        transaction: Transaction | None,
        outer: Transaction | None,
        stack: ExitStack,
        results: list[Result],
    ) -> Transaction | None:
        verb = statement.verb.upper()
        if outer is not None:
            raise InvalidRequest(f"{verb} cannot stand inside db.transaction(); leave the block instead")
        if statement.verb is st.TransactionVerb.BEGIN:
            if transaction is not None:
                raise Conflict("a transaction is open already; COMMIT or ROLLBACK it first")
            transaction = self.begin(stack, owner=caller.user, origin="SqlBatch")
            results.append(Result(message=f"Transaction started ({transaction.number})"))
            return transaction
        if transaction is None:
            raise InvalidRequest(f"{verb} without BEGIN")
        if statement.verb is st.TransactionVerb.COMMIT:
            transaction.commit()
            results.append(Result(message=f"Transaction committed ({transaction.number})"))
        else:
            transaction.rollback()
            results.append(Result(message=f"Transaction rolled back ({transaction.number})"))
        return None

    def begin(self, stack: ExitStack, *, owner: str, origin: str) -> Transaction:
        """A transaction over the database as it is now; its snapshot lives until `stack` closes."""
        moment = stack.enter_context(self._store.frozen())
        began_s = self._clock.monotonic_s()
        number = next(self._begun)
        transaction = Transaction(
            self._store, moment, number=number, bytes_max=self._transaction_bytes_max,
            deadline_s=began_s + self._transaction_timeout_s,
        )  # fmt: skip
        self._open[number] = OpenTransaction(number, owner, origin, began_s, transaction)
        stack.callback(self._open.pop, number, None)
        stack.callback(transaction.rollback)
        return transaction

    def open_transactions(self) -> list[OpenTransaction]:
        """The transactions that have begun and not ended, oldest first."""
        return [one for one in list(self._open.values()) if not one.transaction.ended]

    def stream(self, sql: str, caller: Caller, stack: ExitStack) -> QueryRun:
        """A running SELECT whose rows come batch by batch until `stack` closes."""
        script = self.parsed(sql)
        statements = script.statements
        if len(statements) != 1 or not isinstance(statements[0], st.Select) or statements[0].explain:
            raise InvalidRequest("only one SELECT can be streamed")
        self.authorise(script, caller)
        return self._reader.open(statements[0], caller, None, stack)

    def open(self, statement: st.Select, caller: Caller, stack: ExitStack) -> Result | QueryRun:
        """An authorised SELECT: its row found by key, or running until `stack` closes."""
        found = self._reader.look_up(statement, caller, None, caller.served)
        return self._reader.open(statement, caller, None, stack, caller.served) if found is None else found

    def _run(self, statement: st.Statement, caller: Caller, transaction: Transaction | None) -> Result:
        if transaction is not None:
            transaction.check_open()
        match statement:
            case st.Select():
                return self._reader.select(statement, caller, transaction, caller.served)
            case st.Insert():
                return self._rows.insert(statement, caller, transaction)
            case st.Update():
                return self._rows.update(statement, caller, transaction)
            case st.Delete():
                return self._rows.delete(statement, caller, transaction)
            case st.ExecuteAs():
                target = self._impersonation.check(statement, caller)
                self._impersonation.note(statement, caller)
                result = self._run(statement.inner, target, transaction)
                result.as_user = statement.user
                return result
            case st.Show():
                return self._admin.run(statement, caller)
            case st.ExplainJob():
                return self._jobs.run(statement, caller)
            case st.CreateJob() if transaction is not None:
                transaction.jobs.append(self._jobs.prepare(statement, caller))
                return Result(row_count=1, message="Job accepted; it is created when the transaction commits")
            case _:
                if transaction is not None:
                    words = " ".join(statement.sql.split()[:2]).upper()
                    raise InvalidRequest(f"{words} cannot stand inside a transaction; COMMIT first")
                return self._runners.get(type(statement), self._admin).run(statement, caller)


def _holds_secret(statement: st.Statement) -> bool:
    return isinstance(statement.inner if isinstance(statement, st.ExecuteAs) else statement, _SECRET)
