"""BACKUP, RESTORE, VERIFY, SHOW BACKUPS, PRUNE and EXPLAIN RESTORE: parsing and running them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, assert_never

import pyarrow as pa

from kalamdb.backup import Backups, job_path
from kalamdb.backup.listing import BackupEntry
from kalamdb.backup.service import PlanStep
from kalamdb.errors import InvalidRequest
from kalamdb.jobs import UnifiedJobManager
from kalamdb.result import Result
from kalamdb.sql import statements as st
from kalamdb.sql.caller import Caller
from kalamdb.sql.cursor import Cursor
from kalamdb.sql.parse_table import parse_options
from kalamdb.sql.tokens import TokenKind

_DAILY_DEFAULT, _WEEKLY_DEFAULT = 7, 4
_MS_TO_US = 1000


def parse_backup(cursor: Cursor) -> st.BackupStatement:
    """BACKUP DATABASE TO 'path' [INCREMENTAL | FULL] [WITH (INCREMENTAL, KEEP_DAILY, KEEP_WEEKLY)]."""
    cursor.expect("BACKUP", "DATABASE", "TO")
    path = cursor.string("a path in quotes")
    options: dict[str, Any] = {"incremental": True} if cursor.accept("INCREMENTAL") else {}
    if not options:
        cursor.accept("FULL")
    options |= _options(cursor, incremental=bool, keep_daily=int, keep_weekly=int)
    cursor.end()
    return st.BackupStatement(cursor.sql, st.BackupVerb.BACKUP, path, options)


def parse_restore(cursor: Cursor) -> st.BackupStatement:
    """RESTORE DATABASE FROM 'path' [WITH (RESUME_JOBS)]."""
    cursor.expect("RESTORE", "DATABASE", "FROM")
    path = cursor.string("a path in quotes")
    options = _options(cursor, resume_jobs=bool)
    cursor.end()
    return st.BackupStatement(cursor.sql, st.BackupVerb.RESTORE, path, options)


def parse_verify(cursor: Cursor) -> st.BackupStatement:
    """VERIFY BACKUP 'path'."""
    cursor.expect("VERIFY", "BACKUP")
    path = cursor.string("a path in quotes")
    cursor.end()
    return st.BackupStatement(cursor.sql, st.BackupVerb.VERIFY, path, {})


def parse_prune(cursor: Cursor) -> st.BackupStatement:
    """PRUNE BACKUPS IN 'path' [KEEP n DAILY [m WEEKLY] | KEEP m WEEKLY]."""
    cursor.expect("PRUNE", "BACKUPS", "IN")
    path = cursor.string("a path in quotes")
    daily, weekly = _DAILY_DEFAULT, _WEEKLY_DEFAULT
    if cursor.accept("KEEP"):
        daily = weekly = 0
        count = _count(cursor)
        if cursor.accept("DAILY"):
            daily = count
            if cursor.token is not None:
                weekly = _count(cursor)
                cursor.expect("WEEKLY")
        else:
            weekly = count
            cursor.expect("WEEKLY")
    cursor.end()
    return st.BackupStatement(cursor.sql, st.BackupVerb.PRUNE, path, {"daily": daily, "weekly": weekly})


def parse_show_backups(cursor: Cursor) -> st.BackupStatement:
    """SHOW BACKUPS [IN 'path'], from behind BACKUPS."""
    path = cursor.string("a path in quotes") if cursor.accept("IN") else None
    cursor.end()
    return st.BackupStatement(cursor.sql, st.BackupVerb.SHOW, path, {})


def parse_explain_restore(cursor: Cursor) -> st.BackupStatement:
    """EXPLAIN RESTORE [DATABASE] FROM 'path', from behind RESTORE."""
    cursor.accept("DATABASE")
    cursor.expect("FROM")
    path = cursor.string("a path in quotes")
    cursor.end()
    return st.BackupStatement(cursor.sql, st.BackupVerb.EXPLAIN, path, {})


def _count(cursor: Cursor) -> int:
    token = cursor.token
    if token is None or token.kind is not TokenKind.NUMBER or not token.text.isdigit():
        raise cursor.unexpected("a number of backups")
    cursor.take()
    return int(token.text)


def _options(cursor: Cursor, **known: type) -> dict[str, Any]:
    if not cursor.accept("WITH"):
        return {}
    found = {name.lower(): value for name, value in parse_options(cursor).items()}
    for name, value in found.items():
        if name not in known:
            raise InvalidRequest(
                f"option {name.upper()} is not known here; there are {', '.join(sorted(known)).upper()}"
            )
        if type(value) is not known[name]:
            wanted = "true or false" if known[name] is bool else "a number"
            raise InvalidRequest(f"option {name.upper()} is {value!r}; {wanted} is expected")
    return found


class BackupAdmin:
    """Runs the statements."""

    def __init__(self, backups: Backups, manager: UnifiedJobManager) -> None:
        self._backups = backups
        self._manager = manager

    def _create(self, job_type: str, path: str, options: dict[str, Any], caller: Caller) -> str:
        params = {"path": job_path(path), **options}
        return self._manager.create_job(job_type, params, created_by=caller.user).id

    def run(self, statement: st.BackupStatement, caller: Caller) -> Result:
        """Run one statement; the role of the caller was checked."""
        path, options = statement.path, statement.options
        if statement.verb is st.BackupVerb.SHOW:
            return Result(_listed(self._backups.entries(path)))
        assert path is not None
        match statement.verb:
            case st.BackupVerb.BACKUP:
                self._backups.check_destination(path)
                job_id = self._create("backup", path, options, caller)
                return Result(row_count=1, message=f"Database backup started to '{path}'. Job ID: {job_id}")
            case st.BackupVerb.RESTORE:
                self._backups.locate(path)
                job_id = self._create("restore", path, options, caller)
                text = f"Database restore started from '{path}'; restart required for it to take effect"
                return Result(row_count=1, message=f"{text}. Job ID: {job_id}")
            case st.BackupVerb.VERIFY:
                manifest = self._backups.verify(path).manifest
                return Result(
                    row_count=1,
                    message=f"Backup '{manifest.backup_id}' verified: {len(manifest.files):,} files, "
                    f"{manifest.size_bytes:,} bytes, all writes up to _seq {manifest.snapshot_seq}",
                )
            case st.BackupVerb.PRUNE:
                report = self._backups.prune(path, **options)
                halves = len(report.removed_halves)
                return Result(
                    row_count=len(report.removed) + halves,
                    message=f"Removed {len(report.removed)} backups and {halves} incomplete ones, kept {report.kept}",
                )
            case st.BackupVerb.EXPLAIN:
                return Result(_planned(self._backups.plan_restore(path)))
            case _:
                assert_never(statement.verb)


def _planned(steps: Sequence[PlanStep]) -> pa.Table:
    return pa.table(
        {
            "step": pa.array(range(1, len(steps) + 1), pa.int32()),
            "action": pa.array([step.action for step in steps], pa.string()),
            "detail": pa.array([step.detail for step in steps], pa.string()),
        }
    )


def _listed(entries: Sequence[BackupEntry]) -> pa.Table:
    manifests = [entry.manifest for entry in entries]

    def column(value: Callable[[Any], Any], kind: pa.DataType) -> pa.Array:
        return pa.array([None if one is None else value(one) for one in manifests], kind)

    moment = pa.timestamp("us")
    return pa.table(
        {
            "backup_id": pa.array([entry.backup_id for entry in entries], pa.string()),
            "path": pa.array([entry.where for entry in entries], pa.string()),
            "status": pa.array([entry.status.value for entry in entries], pa.string()),
            "kind": column(lambda one: one.kind, pa.string()),
            "started_at": column(lambda one: one.started_at * _MS_TO_US, pa.int64()).view(moment),
            "finished_at": column(lambda one: one.finished_at * _MS_TO_US, pa.int64()).view(moment),
            "snapshot_seq": column(lambda one: one.snapshot_seq, pa.int64()),
            "database_uid": column(lambda one: one.database_uid, pa.string()),
            "tables": column(lambda one: len(one.tables), pa.int64()),
            "files": column(lambda one: len(one.files), pa.int64()),
            "size_bytes": column(lambda one: one.size_bytes, pa.int64()),
            "new_bytes": column(lambda one: one.new_bytes, pa.int64()),
        }
    )


__all__ = [
    "BackupAdmin",
    "parse_backup",
    "parse_explain_restore",
    "parse_prune",
    "parse_restore",
    "parse_show_backups",
    "parse_verify",
]
