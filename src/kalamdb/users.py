"""Users and the audit log: who there is, with which role, and who changed that.

A user is a record; its rows in USER and STREAM tables are found by the user id and need no record. DROP
USER only marks the record: the rows stay until the user is restored, purged, or past the grace time.
Every change carries its audit row in the same commit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import Any

import bcrypt
import msgspec

from kalamdb.clock import Clock, ulid
from kalamdb.errors import Conflict, Denied, InvalidRequest, NotFound
from kalamdb.storage import (
    ABSENT,
    Batch,
    Commit,
    ExpectationFailed,
    JobInsert,
    Record,
    RecordKind,
    RecordOp,
    StorageBackend,
    record_key,
    record_prefix,
)
from kalamdb.types import Role

ROOT = "root"
USER_ID_LENGTH_MAX = 128
PASSWORD_BYTES_MAX = 72
"""What bcrypt reads of a password; a longer one would be cut in silence."""
_EMAIL_LENGTH_MAX = 320
_SCAN_RECORDS = 500
_CHANGE_ATTEMPTS = 16
_PASSWORD_KINDS = (r"[a-z]", r"[A-Z]", r"[0-9]", r"[^A-Za-z0-9]")


class AuthType(StrEnum):
    """How a user proves who it is."""

    PASSWORD = "password"
    OAUTH = "oauth"
    INTERNAL = "internal"
    """Not at all: the user exists for rights and cannot log in."""


class UserRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A user as stored. Times are milliseconds since 1970."""

    user_id: str
    role: Role = Role.USER
    auth_type: AuthType = AuthType.INTERNAL
    password_hash: str = ""
    auth_data: dict[str, Any] | None = None
    """OAUTH: provider and subject."""
    email: str | None = None
    created_at: int = 0
    updated_at: int = 0
    deleted_at: int | None = None
    failed_login_attempts: int = 0
    locked_until: int | None = None
    last_login_at: int | None = None
    last_seen: int | None = None


class AuditRow(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the audit log."""

    audit_id: str
    timestamp: int
    actor_user_id: str
    action: str
    target: str
    details: str | None = None
    ip_address: str | None = None
    subject_user_id: str | None = None


class Credentials(msgspec.Struct, frozen=True, kw_only=True):
    """How a new user will prove who it is; the password is plain text and never stored."""

    auth_type: AuthType = AuthType.INTERNAL
    password: str | None = None
    auth_data: dict[str, Any] | None = None


class Users:
    """Creates, changes and finds users. Thread-safe; a change is durable on return."""

    def __init__(
        self, backend: StorageBackend, clock: Clock, *, bcrypt_cost: int = 12, enforce_complexity: bool = False
    ) -> None:
        self._backend = backend
        self._clock = clock
        self._bcrypt_cost = bcrypt_cost
        self._enforce_complexity = enforce_complexity
        self._gone: frozenset[str] = frozenset()

    def start(self) -> None:
        """Make the root user of a new database; learn who is deleted. Blocks for a scan of the users."""
        self._backend.observe(self._on_commit)
        if self.find(ROOT) is None:
            now_ms = self._clock.now_ms()
            root = UserRecord(
                user_id=ROOT, role=Role.SYSTEM, email="root@localhost", created_at=now_ms, updated_at=now_ms
            )
            self._backend.wait_durable(self._backend.commit(Batch(records=[_put(root, ABSENT)])))
        self._gone = frozenset(user.user_id for user in self.all() if user.deleted_at is not None)

    def _on_commit(self, batch: Batch, commit: Commit) -> None:
        for op in batch.records:
            if op.check or op.key[0] != RecordKind.USER:
                continue
            if op.value is None:
                self._gone = frozenset(user for user in self._gone if record_key(RecordKind.USER, user) != op.key)
                continue
            user = msgspec.msgpack.decode(op.value, type=UserRecord)
            self._gone = self._gone - {user.user_id} if user.deleted_at is None else self._gone | {user.user_id}

    def refuse_gone(self, user_id: str) -> None:
        """Raise Denied for a user who was dropped. A name without record is nobody's and passes."""
        if user_id in self._gone:
            raise Denied(f"user '{user_id}' was dropped; RESTORE USER brings the user back")

    # Finding

    def find(self, user_id: str) -> UserRecord | None:
        """The user, dropped ones too; None when there is none."""
        found = self._stored(user_id)
        return None if found is None else msgspec.msgpack.decode(found.value, type=UserRecord)

    def all(self) -> Iterator[UserRecord]:
        """All users by name, dropped ones too."""
        start, end = record_prefix(RecordKind.USER)
        while True:
            with self._backend.snapshot() as snapshot:
                found = list(snapshot.scan_records(start, end, limit=_SCAN_RECORDS))
            for _, stored in found:
                yield msgspec.msgpack.decode(stored.value, type=UserRecord)
            if len(found) < _SCAN_RECORDS:
                return
            start = found[-1][0] + b"\x00"

    def dropped_before(self, moment_ms: int) -> list[str]:
        """Users that were dropped at or before a time, by name."""
        return [user.user_id for user in self.all() if user.deleted_at is not None and user.deleted_at <= moment_ms]

    def _stored(self, user_id: str) -> Record | None:
        return self._backend.latest().records([record_key(RecordKind.USER, user_id)])[0]

    # Changing

    def create(self, user_id: str, credentials: Credentials, role: Role, email: str | None, *, actor: Actor) -> None:
        """Add a user. Raises InvalidRequest, Conflict for a name that is taken, by a dropped user too, Denied."""
        _check_name(user_id)
        actor.check_may_grant(role)
        now_ms = self._clock.now_ms()
        user = UserRecord(
            user_id=user_id,
            role=role,
            auth_type=credentials.auth_type,
            password_hash="" if credentials.password is None else self._hashed(credentials.password),
            auth_data=_checked_auth_data(credentials),
            email=_checked_email(email),
            created_at=now_ms,
            updated_at=now_ms,
        )
        taken = self.find(user_id)
        if taken is None:
            details = f"role={role} auth_type={credentials.auth_type}"
            try:
                self._commit([_put(user, ABSENT)], actor, "CREATE_USER", user_id, details)
                return
            except ExpectationFailed:
                taken = self.find(user_id)
        if taken is not None and taken.deleted_at is not None:
            raise Conflict(f"user '{user_id}' was dropped; RESTORE USER or PURGE USER it first")
        raise Conflict(f"user '{user_id}' already exists")

    def set_password(self, user_id: str, password: str, *, actor: Actor) -> None:
        """Change a password; the user logs in by password from now on. Raises NotFound, InvalidRequest, Denied."""
        hashed = self._hashed(password)
        changes = {"password_hash": hashed, "auth_type": AuthType.PASSWORD, "auth_data": None}
        self._change(user_id, actor, "ALTER_USER", "password=[REDACTED]", changes)

    def set_role(self, user_id: str, role: Role, *, actor: Actor) -> None:
        """Change a role. Raises NotFound, Denied; the root user keeps its own."""
        actor.check_may_grant(role)
        if user_id == ROOT:
            raise InvalidRequest("the role of user 'root' cannot be changed")
        self._change(user_id, actor, "ALTER_USER", f"role={role}", {"role": role})

    def set_email(self, user_id: str, email: str, *, actor: Actor) -> None:
        """Change an e-mail address. Raises NotFound, InvalidRequest, Denied."""
        self._change(user_id, actor, "ALTER_USER", "email changed", {"email": _checked_email(email)})

    def drop(self, user_id: str, *, actor: Actor) -> None:
        """Mark a user as dropped; nothing of it is removed. Raises NotFound, InvalidRequest for root, Denied."""
        _refuse_root(user_id)
        self._change(user_id, actor, "DROP_USER", None, {"deleted_at": self._clock.now_ms()})

    def restore(self, user_id: str, *, actor: Actor) -> None:
        """Take a drop back. Raises NotFound, Conflict when the user is not dropped, Denied."""
        self._change(user_id, actor, "RESTORE_USER", None, {"deleted_at": None}, dropped=True)

    def purge(self, user_id: str, cleanup: JobInsert, *, actor: Actor) -> str:
        """Drop a user for good: from now on no row of it is written, and a job removes what there is.

        Returns the job's id. The user need not have a record: rows alone can be purged. Raises
        IdempotencyConflict while it is being purged already, InvalidRequest for root, Denied.
        """
        _check_name(user_id)
        _refuse_root(user_id)
        stored = self._stored(user_id)
        records = [RecordOp(record_key(RecordKind.ERASING, user_id), b"")]
        if stored is not None:
            user = msgspec.msgpack.decode(stored.value, type=UserRecord)
            actor.check_may_change(user.role)
            now_ms = self._clock.now_ms()
            user = msgspec.structs.replace(user, deleted_at=user.deleted_at or now_ms, updated_at=now_ms)
            records.append(_put(user, stored.version))
        commit = self._commit(records, actor, "PURGE_USER", user_id, None, jobs=[cleanup])
        return commit.jobs[0]

    def forget(self, user_id: str) -> list[RecordOp]:
        """The operations that remove the record and the mark of an erased user, for the erasure's last commit."""
        return [
            RecordOp(record_key(RecordKind.USER, user_id), None),
            RecordOp(record_key(RecordKind.ERASING, user_id), None),
        ]

    def _change(
        self,
        user_id: str,
        actor: Actor,
        action: str,
        details: str | None,
        changes: dict[str, Any],
        *,
        dropped: bool = False,
    ) -> None:
        for _ in range(_CHANGE_ATTEMPTS):
            stored = self._stored(user_id)
            user = None if stored is None else msgspec.msgpack.decode(stored.value, type=UserRecord)
            if stored is None or user is None or (user.deleted_at is not None and not dropped):
                raise NotFound(f"user '{user_id}' does not exist")
            if dropped and user.deleted_at is None:
                raise Conflict(f"user '{user_id}' is not dropped")
            actor.check_may_change(user.role)
            changed = msgspec.structs.replace(user, updated_at=self._clock.now_ms(), **changes)
            erasing = RecordOp(record_key(RecordKind.ERASING, user_id), expect=ABSENT, check=True)
            try:
                self._commit([_put(changed, stored.version), erasing], actor, action, user_id, details)
                return
            except ExpectationFailed as failed:
                if failed.key == erasing.key:
                    raise Conflict(f"user '{user_id}' is being erased") from failed
        raise Conflict(f"user '{user_id}' kept changing; try again")

    def _commit(
        self,
        records: list[RecordOp],
        actor: Actor,
        action: str,
        target: str,
        details: str | None,
        *,
        jobs: Sequence[JobInsert] = (),
    ) -> Commit:
        row = AuditRow(
            audit_id=ulid(self._clock),
            timestamp=self._clock.now_ms(),
            actor_user_id=actor.user_id,
            action=action,
            target=target,
            details=details,
        )
        commit = self._backend.commit(Batch(records=[*records, audit_op(row)], jobs=list(jobs)))
        self._backend.wait_durable(commit)
        return commit

    # Passwords

    def _hashed(self, password: str) -> str:
        data = password.encode()
        if not 0 < len(data) <= PASSWORD_BYTES_MAX:
            raise InvalidRequest(f"a password has 1 to {PASSWORD_BYTES_MAX} bytes of UTF-8, this one has {len(data)}")
        if self._enforce_complexity and not all(re.search(kind, password) for kind in _PASSWORD_KINDS):
            raise InvalidRequest(
                "a password needs an upper-case and a lower-case letter, a digit and a special character"
            )
        return bcrypt.hashpw(data, bcrypt.gensalt(self._bcrypt_cost)).decode()


class Actor(msgspec.Struct, frozen=True):
    """Who changes users."""

    user_id: str
    role: Role

    def check_may_grant(self, role: Role) -> None:
        """Raise Denied when this role is not theirs to give."""
        if self.role is not Role.SYSTEM and role is Role.SYSTEM:
            raise Denied(f"role {self.role} may not grant role system; a user of role system may")

    def check_may_change(self, role: Role) -> None:
        """Raise Denied when a user of this role is not theirs to change."""
        if self.role is not Role.SYSTEM and role is Role.SYSTEM:
            raise Denied(f"role {self.role} may not change a user of role system; a user of role system may")


def audit_rows(backend: StorageBackend) -> Iterator[AuditRow]:
    """The audit log, oldest first."""
    with backend.snapshot() as snapshot:
        for _, stored in snapshot.scan_records(*record_prefix(RecordKind.AUDIT)):
            yield msgspec.msgpack.decode(stored.value, type=AuditRow)


def expired_audit_ops(backend: StorageBackend, before_ms: int, limit: int) -> list[RecordOp]:
    """The operations that remove up to `limit` of the oldest entries of the audit log from before a time."""
    ops = []
    with backend.snapshot() as snapshot:
        for key, stored in snapshot.scan_records(*record_prefix(RecordKind.AUDIT), limit=limit):
            if msgspec.msgpack.decode(stored.value, type=AuditRow).timestamp >= before_ms:
                break
            ops.append(RecordOp(key, None))
    return ops


def audit_op(row: AuditRow) -> RecordOp:
    """The operation that adds an entry, for the commit of what it tells."""
    return RecordOp(record_key(RecordKind.AUDIT, row.audit_id), msgspec.msgpack.encode(row))


def _put(user: UserRecord, expect: int) -> RecordOp:
    return RecordOp(record_key(RecordKind.USER, user.user_id), msgspec.msgpack.encode(user), expect)


def _check_name(user_id: str) -> None:
    if not 0 < len(user_id) <= USER_ID_LENGTH_MAX or not user_id.isprintable():
        raise InvalidRequest(f"user id {user_id!r} is not a name of 1 to {USER_ID_LENGTH_MAX} printable characters")


def _refuse_root(user_id: str) -> None:
    if user_id == ROOT:
        raise InvalidRequest("user 'root' cannot be dropped")


def _checked_email(email: str | None) -> str | None:
    if email is not None and (len(email) > _EMAIL_LENGTH_MAX or not re.fullmatch(r"[^@\s]+@[^@\s]+", email)):
        raise InvalidRequest(f"'{email[:60]}' is not an e-mail address of at most {_EMAIL_LENGTH_MAX} characters")
    return email


def _checked_auth_data(credentials: Credentials) -> dict[str, Any] | None:
    if credentials.auth_type is not AuthType.OAUTH:
        return None
    data = credentials.auth_data or {}
    for member in ("provider", "subject"):
        if not isinstance(data.get(member), str) or not data[member]:
            raise InvalidRequest(f"WITH OAUTH needs a JSON object with 'provider' and 'subject'; '{member}' is missing")
    return data
