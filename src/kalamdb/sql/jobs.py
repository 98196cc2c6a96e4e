"""Statements about jobs and queues, and STORAGE FLUSH and COMPACT, which create them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, assert_never

import msgspec
import pyarrow as pa

from kalamdb.catalog import CatalogEntry, NamespaceNotFound
from kalamdb.errors import IdempotencyConflict, InvalidRequest
from kalamdb.jobs import Job, JobRequest, UnifiedJobManager
from kalamdb.jobs.model import counted
from kalamdb.result import Result
from kalamdb.sql import statements as st
from kalamdb.sql.caller import Caller
from kalamdb.sql.query import Reader
from kalamdb.storage.jobs import JobInsert
from kalamdb.tables.compact import choose
from kalamdb.tables.store import TableStore
from kalamdb.types import TableKind

JOB_STATEMENTS = (st.ControlJob, st.ControlQueue, st.LimitQueue, st.ExplainJob, st.CreateJob, st.Maintain)


class JobAdmin:
    """Runs statements about jobs for callers."""

    def __init__(self, manager: UnifiedJobManager, store: TableStore, reader: Reader) -> None:
        self._manager = manager
        self._store = store
        self._reader = reader

    def run(self, statement: st.Statement, caller: Caller) -> Result:
        """Run one statement; the role of the caller was checked."""
        match statement:
            case st.ControlJob(verb=verb, job_id=job_id):
                return Result(row_count=1, message=_told(verb, self._control(verb, job_id)))
            case st.ControlQueue(queue=queue, paused=paused):
                if paused:
                    self._manager.pause_queue(queue, by=caller.user)
                else:
                    self._manager.resume_queue(queue)
                return Result(row_count=1, message=f"Queue {queue} {'paused' if paused else 'resumed'}")
            case st.LimitQueue(queue=queue, limit=limit):
                self._manager.limit_queue(queue, limit)
                told = "has no limit" if limit is None else f"runs at most {counted(limit, 'job')} at once"
                return Result(row_count=1, message=f"Queue {queue} {told}")
            case st.ExplainJob(job_id=job_id):
                return Result(_reasons(job_id, self._manager.explain_job(job_id)))
            case st.CreateJob():
                job_type, params = _arguments(statement, caller)
                job = self._manager.create_job(job_type, params, created_by=caller.user)
                return Result(row_count=1, message=f"Job created. Job ID: {job.id}")
            case st.Maintain():
                return self._maintain(statement, caller)
            case _:
                raise InvalidRequest(f"'{statement.sql[:60]}' cannot run here")

    def prepare(self, statement: st.CreateJob, caller: Caller) -> JobInsert:
        """The operation of CALL create_job, for a transaction."""
        job_type, params = _arguments(statement, caller)
        return self._manager.prepare(JobRequest(job_type=job_type, params=params, created_by=caller.user))

    def _control(self, verb: st.JobVerb, job_id: str) -> Job:
        match verb:
            case st.JobVerb.CANCEL:
                return self._manager.cancel_job(job_id)
            case st.JobVerb.PAUSE:
                return self._manager.pause_job(job_id)
            case st.JobVerb.RESUME:
                return self._manager.resume_job(job_id)
            case st.JobVerb.RETRY:
                return self._manager.retry_job(job_id)
            case _:
                assert_never(verb)

    def _maintain(self, statement: st.Maintain, caller: Caller) -> Result:
        word = "flush" if statement.operation == "flush" else "compaction"
        if statement.table is not None:
            entry = self._reader.entry(statement.table, caller)
            return Result(message=self._maintain_one(statement.operation, word, entry))
        namespace = statement.namespace or caller.namespace
        if not self._store.catalog.has_namespace(namespace):
            raise NamespaceNotFound(f"Namespace '{namespace}' does not exist")
        entries = [one for one in self._store.catalog.tables(namespace) if one.definition.kind is not TableKind.STREAM]
        wanted = [one for one in entries if self._has_work(statement.operation, one)]
        if not wanted:
            if statement.operation == "compact":
                raise InvalidRequest(f"No compactable tables found in namespace '{namespace}'")
            return Result(message=f"Storage flush skipped: no pending writes in namespace '{namespace}'")
        ids = []
        for entry in wanted:
            try:
                ids.append(self._create(statement.operation, entry))
            except IdempotencyConflict as conflict:
                ids.append(conflict.job.id)
        return Result(message=f"Storage {word} started for {len(ids)} table(s). Job IDs: [{', '.join(ids)}]")

    def _has_work(self, operation: str, entry: CatalogEntry) -> bool:
        if operation == "flush":
            return self._store.has_pending(entry.definition.uid)
        store = self._store
        return choose(store.state(entry.definition.uid), store.limits.level0_segments_max, full=True) is not None

    def _create(self, operation: str, entry: CatalogEntry) -> str:
        return self._manager.create_job(operation, {"table_id": str(entry.definition.table_id)}).id

    def _maintain_one(self, operation: str, word: str, entry: CatalogEntry) -> str:
        table_id = entry.definition.table_id
        if entry.definition.kind is TableKind.STREAM:
            raise InvalidRequest(f"STORAGE {operation.upper()} does not apply to STREAM table '{table_id}'")
        if operation == "flush" and not self._has_work(operation, entry):
            return f"Storage flush skipped for table '{table_id}': no pending writes"
        try:
            job_id = self._create(operation, entry)
        except IdempotencyConflict as conflict:
            return f"Storage {word} skipped for table '{table_id}': already queued or running ({conflict.job.id})"
        return f"Storage {word} started for table '{table_id}'. Job ID: {job_id}"


def _arguments(statement: st.CreateJob, caller: Caller) -> tuple[str, Any]:
    job_type, params = caller.bind(statement.job_type), caller.bind(statement.params)
    if not isinstance(job_type, str):
        raise InvalidRequest("the first argument of create_job is the job type, as a text")
    if isinstance(params, str):
        try:
            params = msgspec.json.decode(params)
        except msgspec.DecodeError as exc:
            raise InvalidRequest(f"the parameters of create_job are not JSON: {exc}") from None
    if params is not None and not isinstance(params, dict):
        raise InvalidRequest("the second argument of create_job is a JSON object, as a text")
    return job_type, params


def _told(verb: st.JobVerb, job: Job) -> str:
    """What happened to a job, which may have been faster."""
    match verb:
        case st.JobVerb.CANCEL:
            text = "killed: cancelled" if job.status == "cancelled" else f"had ended before: {job.status}"
        case st.JobVerb.PAUSE if job.hold != "paused":
            text = f"had ended before: {job.status}"
        case st.JobVerb.PAUSE:
            text = "pauses at its next check" if job.status == "running" else "paused"
        case st.JobVerb.RESUME:
            text = "resumed"
        case st.JobVerb.RETRY:
            text = "queued again"
        case _:
            assert_never(verb)
    return f"Job {job.id} {text}"


def _reasons(job_id: str, reasons: Sequence[Any]) -> pa.Table:
    return pa.table(
        {
            "job_id": pa.array([job_id] * len(reasons), pa.string()),
            "reason": pa.array([str(one.kind) for one in reasons], pa.string()),
            "detail": pa.array([one.detail for one in reasons], pa.string()),
            "until": pa.array([one.until for one in reasons], pa.timestamp("us", "UTC")),
        }
    )
