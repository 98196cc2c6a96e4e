"""Erasing a user: every row of one scope goes, from all tables and both tiers, and its bytes with them.

The order makes it safe against everything that runs beside it. First the user is marked as being
erased: no commit that writes a row of that scope is accepted from then on. Then the hot rows go, by range
delete, and the table's ERASED record moves, so that a flush that read them before cannot publish them.
Then the segments are rewritten; a compaction that took part in the race fails, as its inputs are gone.
Jobs that have ended lose the name, jobs.log too. The audit log keeps who was purged by whom.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kalamdb.storage import Batch, JobScrub, RecordKind, RecordOp, record_key
from kalamdb.tables.compact import erase_keys
from kalamdb.tables.flush import JobHandle, Message, Step
from kalamdb.tables.read import scope_range
from kalamdb.tables.store import TableStore
from kalamdb.types import JobId, Scope, TableKind
from kalamdb.users import Users

_TABLES_PER_COMMIT = 500
_JOBS_PER_COMMIT = 200


@dataclass(frozen=True, slots=True)
class EraseReport:
    """What erasing a user removed."""

    users: int = 0
    tables: int = 0
    """Tables that held cold rows of the user, or may have held hot ones."""
    rows: int = 0
    """Cold rows and versions of the user."""
    segments: int = 0
    """Segments that were rewritten."""


def erase_users(
    store: TableStore,
    users: Users,
    user_ids: Sequence[str],
    job: JobHandle,
    message: Message,
    scrub_log: Callable[[str], None],
) -> EraseReport:
    """Erase users one after another: rows, what names them in jobs that have ended, at last the record; ends the job.

    Interrupted anywhere, a repetition goes on: who is erased has no record and no mark any more. In the
    commit that forgets a user the job itself loses the name; what it does again for ERASED finds nothing. The
    bytes go from the store's files before the job ends. Blocks for the disk. Raises what `erase_rows` raises.
    """
    job_id, lease_id = job.intent_owner()
    total = EraseReport()
    for at, user_id in enumerate(user_ids):
        job.progress(at, len(user_ids), "users")
        found = erase_rows(store, Scope(user_id), Step(job) if len(user_ids) > 1 else job)
        _scrub_jobs(store, user_id, job)
        scrub_log(user_id)
        total = EraseReport(
            total.users + 1, total.tables + found.tables, total.rows + found.rows, total.segments + found.segments
        )
        batch = Batch(records=users.forget(user_id), jobs=[JobScrub(JobId(job_id), user_id, lease_id)])
        store.commit(batch)
    job.check()
    store.backend.purge((), records=True)
    batch = Batch()
    job.seal(batch, message=message(total), result=dataclasses.asdict(total))
    store.commit(batch)
    return total


def _scrub_jobs(store: TableStore, name: str, job: JobHandle) -> None:
    naming = store.backend.jobs.ended_naming(name)
    for at in range(0, len(naming), _JOBS_PER_COMMIT):
        job.check()
        batch = Batch(jobs=[JobScrub(job_id, name) for job_id in naming[at : at + _JOBS_PER_COMMIT]])
        job.seal(batch)
        store.commit(batch)


def erase_rows(store: TableStore, user: Scope, job: JobHandle) -> EraseReport:
    """Remove all rows of a user from USER and STREAM tables; the mark stays.

    Each step is one commit under the job's lease; a repetition finds less to do. Blocks for the disk.
    Raises TransactionConflict when another compaction of a table came first.
    """
    batch = Batch(records=[RecordOp(record_key(RecordKind.ERASING, user), b"")])
    job.seal(batch)
    store.commit(batch)
    entries = [one for one in store.catalog.tables() if one.definition.kind is not TableKind.SHARED]
    uids = [entry.definition.uid for entry in entries]
    for at in range(0, len(uids), _TABLES_PER_COMMIT):
        job.check()
        some = uids[at : at + _TABLES_PER_COMMIT]
        batch = Batch(delete_scopes=[(uid, user) for uid in some])
        batch.records = [RecordOp(record_key(RecordKind.ERASED, uid), b"") for uid in some]
        job.seal(batch)
        store.commit(batch)
    rows = segments = tables = 0
    for at, entry in enumerate(entries):
        job.check()
        job.progress(at, len(entries), "tables", str(entry.definition.table_id))
        report = erase_keys(store, entry.definition.uid, scope_range(user), Step(job))
        if report is not None:
            tables += 1
            segments += report.inputs
            rows += report.rows_before - report.rows_after
    store.backend.purge(uids)
    job.progress(len(entries), len(entries), "tables")
    return EraseReport(1, tables, rows, segments)
