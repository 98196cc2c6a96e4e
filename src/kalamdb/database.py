"""The public Python API: connect, execute, insert, transactions, jobs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pyarrow as pa

from kalamdb.app_context import AppContext
from kalamdb.backup import job_path
from kalamdb.check import CheckReport, check_database
from kalamdb.errors import Closed, Denied, InvalidRequest
from kalamdb.jobs import Job, UnifiedJobManager
from kalamdb.live import Change, LiveOptions, LiveRequest, Subscription, call_back
from kalamdb.live.subscription import BATCH_ROWS
from kalamdb.result import Result
from kalamdb.service import GiveUp
from kalamdb.sql import statements as st
from kalamdb.sql.caller import Caller
from kalamdb.sql.cursor import Cursor
from kalamdb.sql.ingest import columns_of
from kalamdb.sql.tokens import tokenize
from kalamdb.storage import Batch, Commit
from kalamdb.storage.jobs import JobFence, JobMove
from kalamdb.tables.codec import is_unicode, shown
from kalamdb.tables.transaction import Transaction as TableTransaction
from kalamdb.tables.write import OnConflict
from kalamdb.types import Role, Scope, TableId, TableKind

_DEFAULT_USER = "root"
_USER_LENGTH_MAX = 128
Params = Sequence[Any] | Mapping[str, Any] | None


class Database:
    """An open database. Thread-safe; a context manager that closes it."""

    def __init__(self, context: AppContext, on_close: Callable[[], None] = lambda: None) -> None:
        self._context = context
        self._pid = os.getpid()
        self._closed = False
        self._on_close = on_close
        context.start(_Services(self))

    @property
    def context(self) -> AppContext:
        """The parts of this database. Raises InvalidRequest in a process that is only attached to it."""
        return self._context

    @property
    def is_holder(self) -> bool:
        """Whether this process holds the data; False while it is attached to one that does."""
        return True

    @property
    def jobs(self) -> UnifiedJobManager:
        """The job manager."""
        self._check_open()
        return self._context.job_manager

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Finish what runs, then release the directory. Idempotent. Raises nothing after fork()."""
        if self._closed:
            return
        self._closed = True
        try:
            self._context.stop()
        finally:
            if os.getpid() == self._pid:
                self._on_close()

    def _check_open(self) -> None:
        if os.getpid() != self._pid:
            raise Closed("this database was opened before fork(); open it again in the child")
        if self._closed:
            raise Closed("the database is closed; open it again")

    def _caller(
        self, user: str | None, role: str | Role | None, namespace: str | None, params: Params,
        timeout_s: float | None, given_up: GiveUp | None = None,
    ) -> Caller:  # fmt: skip
        self._check_open()
        name = _DEFAULT_USER if user is None else user
        if not _is_user_name(name):
            raise InvalidRequest(f"user {shown(name)} is not a name of 1 to {_USER_LENGTH_MAX} characters")
        try:
            wanted = Role.SYSTEM if role is None else Role(role)
        except ValueError:
            raise InvalidRequest(f"role '{role}' is not one of {', '.join(Role)}") from None
        if namespace is not None and not (isinstance(namespace, str) and namespace.isidentifier()):
            raise InvalidRequest(f"namespace {shown(namespace)} is not a name of letters, digits and underscores")
        if timeout_s is not None and (type(timeout_s) not in (int, float) or not timeout_s >= 0):
            raise InvalidRequest(f"timeout_s is {shown(timeout_s)}, a number of seconds from 0 is expected")
        check_params(params)
        self._context.users.refuse_gone(name)
        clock = self._context.clock
        deadline = None if timeout_s is None else clock.monotonic_s() + timeout_s
        return Caller(
            name, wanted, namespace or "default", params, clock.now_ms(),
            deadline=lambda: deadline is not None and clock.monotonic_s() > deadline,
            cancelled=lambda: self._closed or (given_up is not None and given_up.is_set()),
        )  # fmt: skip

    def execute(
        self,
        sql: str,
        params: Params = None,
        *,
        user: str | None = None,
        role: str | Role | None = None,
        namespace: str | None = None,
        timeout_s: float | None = None,
    ) -> Result:
        """Run one or more statements; the last result, all of them in `.results`. Durable on return.

        `user` selects the rows of USER and STREAM tables (default 'root'). Raises KalamDbError.
        """
        return self._execute(sql, params, timeout_s, None, user=user, role=role, namespace=namespace)

    def _execute(
        self, sql: str, params: Params, timeout_s: float | None, given_up: GiveUp | None, *, user: str | None = None,
        role: str | Role | None = None, namespace: str | None = None,
    ) -> Result:  # fmt: skip
        """`execute` that ends with Closed when `given_up` is set; a write that has begun is completed."""
        caller = self._caller(user, role, namespace, params, timeout_s, given_up)
        return self._context.session.execute(sql, caller)

    def stream(
        self, sql: str, params: Params = None, *, user: str | None = None, role: str | Role | None = None,
        namespace: str | None = None, timeout_s: float | None = None,
    ) -> AbstractContextManager[Iterator[pa.RecordBatch]]:  # fmt: skip
        """The rows of a SELECT as Arrow batches, without a limit on their size; a context manager."""
        return self._stream(sql, params, timeout_s, None, user=user, role=role, namespace=namespace)

    @contextmanager
    def _stream(
        self, sql: str, params: Params, timeout_s: float | None, given_up: GiveUp | None, *, user: str | None = None,
        role: str | Role | None = None, namespace: str | None = None,
    ) -> Iterator[Iterator[pa.RecordBatch]]:  # fmt: skip
        with ExitStack() as stack:
            caller = self._caller(user, role, namespace, params, timeout_s, given_up)
            yield iter(self._context.session.stream(sql, caller, stack))

    def insert(
        self,
        table: str,
        data: Any,
        *,
        user: str | None = None,
        user_column: str | None = None,
        on_conflict: str = "error",
        role: str | Role | None = None,
        namespace: str | None = None,
    ) -> int:
        """Insert Arrow, pandas, polars, or a list of dicts or tuples; all rows or none. Returns the rows written.

        `user_column` names the column, not stored, that says whose row it is. `on_conflict` is "error",
        "ignore" or "update".
        """
        caller = self._caller(user, role, namespace, None, None)
        return self._insert(table, data, caller, user_column, on_conflict, None)

    def _insert(
        self,
        table: str,
        data: Any,
        caller: Caller,
        user_column: str | None,
        on_conflict: str,
        transaction: TableTransaction | None,
    ) -> int:
        table_id = _table_id(table, caller.namespace)
        if self._context.system_tables.find(table_id) is not None:
            raise self._context.system_tables.write_refusal("insert", table_id)
        entry = self._context.catalog.require(table_id)
        try:
            conflict = OnConflict(on_conflict)
        except ValueError:
            raise InvalidRequest(f"on_conflict '{on_conflict}' is not one of {', '.join(OnConflict)}") from None
        if user_column is not None and entry.definition.column(user_column) is not None:
            raise InvalidRequest(f"user_column '{user_column}' is a column of '{table_id}'; it must not be stored")
        columns = columns_of(data, self._context.store.layout(entry.definition), user_column)
        rows = columns.table
        if not rows.num_rows:
            return 0
        if user_column is None:
            scopes = [caller.scope(entry.definition)]
        else:
            if entry.definition.kind is TableKind.SHARED:
                raise InvalidRequest(f"user_column has no meaning for SHARED table '{table_id}'")
            if user_column not in rows.schema.names:
                raise InvalidRequest(f"the data has no column '{user_column}' (user_column)")
            names = rows.column(user_column).to_pylist()
            for name in names:
                if not _is_user_name(name):
                    raise InvalidRequest(f"column '{user_column}' holds {shown(name)}, which is not a user name")
            for name in set(names):
                self._context.users.refuse_gone(name)
            stranger = next((name for name in names if name != caller.user), None)
            if stranger is not None and not caller.has(Role.SERVICE):
                raise Denied(f"role {caller.role} may not insert rows of '{stranger}' as '{caller.user}'")
            scopes = [Scope(name) for name in names]
            rows = rows.drop_columns([user_column])
        columns = replace(columns, table=rows)
        return self._context.rows.insert_table(entry, columns, scopes, caller, conflict, transaction)

    def subscribe(
        self, sql: str, params: Params = None, *, user: str | None = None, role: str | Role | None = None,
        namespace: str | None = None, callback: Callable[[Change], Any] | None = None, from_seq: int | None = None,
        last_rows: int | None = None, snapshot: bool = False, batch_size: int = BATCH_ROWS,
    ) -> Subscription:  # fmt: skip
        """Follow the changes of the rows of a table that `SELECT * | columns FROM table [WHERE filter]` chooses.

        From now on each change comes once, when it is durable, in commit order: iterate over the result, or let
        `callback` be called in a thread of its own. Before them come the rows changed after `from_seq` and what was
        deleted since, or the newest `last_rows`, or with `snapshot` all rows, read `batch_size` at a time.
        Raises InvalidRequest, NotFound, Denied.
        """
        wanted = from_seq is not None or last_rows is not None or snapshot
        options = LiveOptions(from_seq, last_rows, batch_size) if wanted else None
        caller = self._caller(user, role, namespace, params, None)
        found = Subscription(self._context.live, LiveRequest(sql, options), caller)
        if callback is not None:
            call_back(found, callback)
        return found

    def session(
        self, *, user: str | None = None, role: str | Role | None = None, namespace: str | None = None
    ) -> BoundSession:
        """The same calls, bound to a user, role and namespace."""
        return BoundSession(self, {"user": user, "role": role, "namespace": namespace})

    def transaction(
        self, user: str | None = None, *, role: str | Role | None = None, namespace: str | None = None
    ) -> AbstractContextManager[Transaction]:
        """A transaction over any tables: snapshot reads, own writes visible, committed when the block ends.

        Raises TransactionConflict at the end when another writer came first; an exception rolls back.
        """
        return self._transaction(user, list, role=role, namespace=namespace)

    @contextmanager
    def _transaction(
        self,
        user: str | None,
        operations: Callable[[], list[Any]],
        *,
        role: str | Role | None = None,
        namespace: str | None = None,
    ) -> Iterator[Transaction]:
        self._check_open()
        with ExitStack() as stack:
            inner = self._context.session.begin(stack, owner=user or _DEFAULT_USER, origin="Api")
            transaction = Transaction(self, inner, {"user": user, "role": role, "namespace": namespace})
            yield transaction
            if not inner.ended:
                inner.jobs += operations()
                inner.commit()

    def backup(self, path: str | os.PathLike[str], *, wait: bool = True, incremental: bool = False) -> Job:
        """Back up the whole database into a new folder of the target `path`: a directory, or a URL of an object
        store. Writes go on meanwhile.

        Returns the job: as it ended, in whatever state, or with wait=False as it was accepted. `incremental`
        shares unchanged files with the backup before. Raises InvalidRequest for a path that may not be used,
        IdempotencyConflict while another backup to it runs.
        """
        self._check_open()
        text = os.fspath(path)
        self._context.backups.check_destination(text)
        job = self.jobs.create_job("backup", {"path": job_path(text), "incremental": incremental})
        return self.jobs.wait(job.id) if wait else job

    def check(self) -> CheckReport:
        """Verify that rows, segments, records and jobs fit together; changes nothing. Blocks while it reads all."""
        self._check_open()
        return check_database(self._context.store)

    def _tell_ends(self, tell: Callable[[str], None]) -> bool:
        """Call `tell` with the id of each job that ends from now on; False when that is not known here."""

        def on_commit(batch: Batch, commit: Commit) -> None:
            for row in commit.changed_jobs:
                if row.status.is_terminal:
                    tell(row.job_id)

        self._context.backend.observe(on_commit)
        return True


class BoundSession:
    """Calls of a Database with user, role and namespace filled in."""

    def __init__(self, database: Database, bound: dict[str, Any]) -> None:
        self._database = database
        self._bound = bound

    def execute(self, sql: str, params: Params = None, *, timeout_s: float | None = None) -> Result:
        """See Database.execute."""
        return self._database.execute(sql, params, timeout_s=timeout_s, **self._bound)

    def stream(
        self, sql: str, params: Params = None, *, timeout_s: float | None = None
    ) -> AbstractContextManager[Iterator[pa.RecordBatch]]:
        """See Database.stream."""
        return self._database.stream(sql, params, timeout_s=timeout_s, **self._bound)

    def subscribe(self, sql: str, params: Params = None, **options: Any) -> Subscription:
        """See Database.subscribe."""
        return self._database.subscribe(sql, params, **options, **self._bound)

    def transaction(self) -> AbstractContextManager[Transaction]:
        """See Database.transaction."""
        return self._database.transaction(**self._bound)

    def insert(self, table: str, data: Any, *, user_column: str | None = None, on_conflict: str = "error") -> int:
        """See Database.insert."""
        return self._database.insert(table, data, user_column=user_column, on_conflict=on_conflict, **self._bound)


class Transaction:
    """What `with db.transaction() as tx` gives."""

    def __init__(self, database: Database, inner: TableTransaction, bound: dict[str, Any]) -> None:
        self._database = database
        self._inner = inner
        self._bound = bound

    def execute(
        self, sql: str, params: Params = None, *, namespace: str | None = None, timeout_s: float | None = None
    ) -> Result:
        """Run statements inside the transaction."""
        return self._execute(sql, params, namespace, timeout_s, None)

    def _execute(
        self, sql: str, params: Params, namespace: str | None, timeout_s: float | None, given_up: GiveUp | None
    ) -> Result:
        self._inner.check_open()
        caller = self._caller(params, namespace, timeout_s, given_up)
        return self._database.context.session.execute(sql, caller, self._inner)

    def insert(self, table: str, data: Any, *, user_column: str | None = None, on_conflict: str = "error") -> int:
        """Insert rows inside the transaction; see Database.insert."""
        self._inner.check_open()
        return self._database._insert(
            table, data, self._caller(None, None, None), user_column, on_conflict, self._inner
        )

    def _caller(
        self, params: Params, namespace: str | None, timeout_s: float | None, given_up: GiveUp | None = None
    ) -> Caller:
        bound = self._bound
        namespace = namespace or bound["namespace"]
        return self._database._caller(bound["user"], bound["role"], namespace, params, timeout_s, given_up)

    def create_job(self, job_type: str, params: Any = None, idempotency_key: str | None = None, **options: Any) -> None:
        """Create a job that lives and dies with the transaction."""
        from kalamdb.jobs import JobRequest

        self._inner.check_open()
        request = JobRequest(job_type=job_type, params=params, idempotency_key=idempotency_key, **options)
        self._inner.jobs.append(self._database.jobs.prepare(request))

    def rollback(self) -> None:
        """Forget all changes."""
        self._inner.rollback()


class _Services:
    """The database as executors see it."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @property
    def maintenance(self) -> Any:
        return self._database.context.maintenance

    def execute(self, sql: str, params: Any, *, user: str | None, fence: JobFence) -> Result:
        statements = self._database.context.session.parsed(sql).statements
        if any(isinstance(one, st.TransactionControl) for one in statements):
            raise InvalidRequest("BEGIN and COMMIT cannot stand in SQL of a job; use ctx.transaction()")
        if any(isinstance(one, st.Insert | st.Update | st.Delete | st.CreateJob | st.ExecuteAs) for one in statements):
            with self._database._transaction(user, lambda: [fence]) as transaction:
                return transaction.execute(sql, params)
        with self._database.context.backend.under_lease(fence):
            return self._database.execute(sql, params, user=user)

    def insert(self, table: str, data: Any, *, user: str | None, fence: JobFence) -> int:
        with self._database._transaction(user, lambda: [fence]) as transaction:
            return transaction.insert(table, data)

    def transaction(self, *, user: str | None, operations: Callable[[], list[JobFence | JobMove]]) -> Any:
        return self._database._transaction(user, operations)


def _table_id(table: str, namespace: str) -> TableId:
    """[namespace.]table as SQL reads it."""
    if not isinstance(table, str) or not table.strip():
        raise InvalidRequest(f"the table is named by {shown(table)}; give a text like 'namespace.table'")
    cursor = Cursor(table, tokenize(table))
    name = cursor.table()
    cursor.end()
    return TableId(name.namespace or namespace, name.name)


def _is_user_name(name: object) -> bool:
    return isinstance(name, str) and 0 < len(name) <= _USER_LENGTH_MAX and is_unicode(name)


def check_params(params: object) -> None:
    """Raise InvalidRequest for what cannot be the parameters of a statement."""
    if params is None or isinstance(params, Mapping):
        return
    if isinstance(params, (str, bytes, bytearray)) or not isinstance(params, Sequence):
        raise InvalidRequest(
            f"params is {shown(params)}; a list or tuple for $1, $2 or ?, or a dict for :name is expected"
        )


__all__ = ["BoundSession", "CheckReport", "Database", "Params", "Transaction", "check_params"]
