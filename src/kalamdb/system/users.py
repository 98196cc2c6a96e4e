"""system.users and system.audit_log."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from kalamdb.system.shape import SYSTEM, SystemTable, columns_of
from kalamdb.types import TableId
from kalamdb.users import AuditRow, UserRecord

_USERS: Final = columns_of(
    "user_id T, password_hash T, role T, email T?, auth_type T, auth_data JSON?, storage_mode T, storage_id T?, "
    "failed_login_attempts INT, locked_until TS?, last_login_at TS?, created_at TS, updated_at TS, last_seen TS?, "
    "deleted_at TS?"
)
_AUDIT_LOG: Final = columns_of(
    "audit_id T, timestamp TS, actor_user_id T, action T, target T, details T?, ip_address T?, subject_user_id T?"
)
_HIDDEN: Final = "***"


def user_tables(
    users: Callable[[], Iterable[UserRecord]], audit: Callable[[], Iterable[AuditRow]]
) -> list[SystemTable]:
    """Both tables over their sources."""
    return [
        SystemTable(TableId(SYSTEM, "users"), _USERS, lambda _: map(_user_row, users())),
        SystemTable(TableId(SYSTEM, "audit_log"), _AUDIT_LOG, lambda _: map(msgspec.structs.astuple, audit())),
    ]


def _user_row(user: UserRecord) -> tuple[object, ...]:
    # A hash can be guessed against at leisure, so nobody is shown one.
    return (
        user.user_id,
        _HIDDEN if user.password_hash else "",
        user.role.value,
        user.email,
        user.auth_type.value,
        user.auth_data,
        "table",
        None,
        user.failed_login_attempts,
        user.locked_until,
        user.last_login_at,
        user.created_at,
        user.updated_at,
        user.last_seen,
        user.deleted_at,
    )
