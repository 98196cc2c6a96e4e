"""User clean-up jobs: a user's rows leave every table, and the user with them."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from kalamdb.errors import TransactionConflict
from kalamdb.jobs.context import JobContext, JobServices
from kalamdb.jobs.executors.maintenance import MaintenanceExecutor
from kalamdb.jobs.model import Cron, Outcome, Skipped, Snooze, counted

_BUSY_S = 1.0


class UserCleanupParams(msgspec.Struct, frozen=True):
    """One user; without, every user who was dropped longer than the grace time ago."""

    user_id: Annotated[str, msgspec.Meta(min_length=1)] | None = None


class UserCleanupExecutor(MaintenanceExecutor[UserCleanupParams]):
    """Erases users: rows of USER and STREAM tables in both tiers, what names them in ended jobs, the record."""

    job_type = "user_cleanup"
    prefix = "UC"
    Params = UserCleanupParams
    schedule = Cron("0 2 * * *")

    def idempotency_key(self, params: UserCleanupParams, table_uid: int | None) -> str | None:
        return "erase" if params.user_id is None else f"erase:{params.user_id}"

    def concurrency_key(self, params: UserCleanupParams, table_uid: int | None) -> str | None:
        return "erase"

    def pre_validate(self, params: UserCleanupParams, services: JobServices | None) -> str | None:
        due = params.user_id is not None or services is None or services.maintenance.has_users_to_erase()
        return None if due else "no dropped user is past the grace time"

    def execute(self, ctx: JobContext[UserCleanupParams]) -> Outcome:
        assert ctx.services is not None
        try:
            report = ctx.services.maintenance.erase_users(
                ctx.params.user_id, ctx, _message, is_repeated=ctx.attempt > 1
            )
        except TransactionConflict:
            return Snooze(_BUSY_S)
        return None if report is not None else Skipped("no dropped user is past the grace time")


def _message(report: Any) -> str:
    return (
        f"Erased {counted(report.users, 'user')}: {counted(report.rows, 'cold row')} of "
        f"{counted(report.tables, 'table')}, {counted(report.segments, 'segment')} rewritten"
    )
