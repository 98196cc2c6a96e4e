"""Erasing a user: every row of one scope goes, from all tables and both tiers, and its bytes with them.

The order makes it safe against everything that runs beside it. First the user is marked as being
erased: no commit that writes a row of that scope is accepted from then on. Then the hot rows go, by range
delete, and the table's ERASED record moves, so that a flush that read them before cannot publish them.
Then the segments are rewritten; a compaction that took part in the race fails, as its inputs are gone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from kalamdb.storage import Batch, RecordKind, RecordOp, record_key
from kalamdb.tables.compact import erase_keys
from kalamdb.tables.flush import JobHandle, Message, Step
from kalamdb.tables.read import scope_range
from kalamdb.tables.store import TableStore
from kalamdb.types import Scope, TableKind
from kalamdb.users import Users

_TABLES_PER_COMMIT = 500


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
    store: TableStore, users: Users, user_ids: Sequence[str], job: JobHandle, message: Message
) -> EraseReport:
    """Erase users one after another, rows first, the record last; ends the job.

    Interrupted anywhere, a repetition goes on: who is erased has no record and no mark any more.
    Blocks for the disk. Raises what `erase_rows` raises.
    """
    total = EraseReport()
    for at, user_id in enumerate(user_ids):
        job.progress(at, len(user_ids), "users")
        found = erase_rows(store, Scope(user_id), Step(job) if len(user_ids) > 1 else job)
        total = EraseReport(
            total.users + 1, total.tables + found.tables, total.rows + found.rows, total.segments + found.segments
        )
        batch = Batch(records=users.forget(user_id))
        if at + 1 < len(user_ids):
            job.seal(batch)
        else:
            job.seal(batch, message=message(total), result=dataclasses.asdict(total))
        store.commit(batch)
    return total


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
