"""Users and the audit log: who there is, with which role, and who changed that.

A user is a record; its rows in USER and STREAM tables are found by the user id and need no record. DROP
USER only marks the record: the rows stay until the user is restored, purged, or past the grace time.
Every change carries its audit row in the same commit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

import msgspec

from kalamdb.clock import Clock, Ulids
from kalamdb.errors import Conflict, Denied, InvalidRequest, NotFound
from kalamdb.passwords import Passwords
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
from kalamdb.storage.keys import decode_text
from kalamdb.types import Role

ROOT = "root"
USER_ID_LENGTH_MAX = 128
LOGIN_FAILURES_MAX = 5
"""Failed log-ins in a row that lock a user."""
LOCK_MS = 15 * 60 * 1000
"""How long a user stays locked."""
_EMAIL_LENGTH_MAX = 320
_SCAN_RECORDS = 500
_CHANGE_ATTEMPTS = 16


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
    tokens_valid_from: int = 0
    """Tokens that were made before are refused: the user was made, got another password or was restored then.
    A later one differs, whatever the clock does."""

    def is_locked(self, now_ms: int) -> bool:
        """Whether log-ins are refused after too many failures."""
        return self.locked_until is not None and self.locked_until > now_ms


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


class OAuthSubject(NamedTuple):
    """Who a user is at a provider."""

    provider: str
    subject: str


class Users:
    """Creates, changes and finds users. Thread-safe; a change is durable on return."""

    def __init__(self, backend: StorageBackend, clock: Clock, passwords: Passwords) -> None:
        self._backend = backend
        self._clock = clock
        self._audit_ids = Ulids(clock)
        self.passwords = passwords
        self._gone: frozenset[str] = frozenset()
        self._user_by_subject: dict[OAuthSubject, str] = {}
        self._subject_by_user: dict[str, OAuthSubject] = {}
        self._observers: list[Callable[[str], None]] = []

    def start(self) -> None:
        """Make the root user of a new database; learn who is deleted. Blocks for a scan of the users."""
        self._backend.observe(self._on_commit)
        if self.find(ROOT) is None:
            now_ms = self._clock.now_ms()
            root = UserRecord(
                user_id=ROOT, role=Role.SYSTEM, email="root@localhost", created_at=now_ms, updated_at=now_ms
            )
            self._backend.wait_durable(self._backend.commit(Batch(records=[_put(root, ABSENT)])))
        gone = set()
        for user in self.all():
            self._index_subject(user.user_id, user)
            if user.deleted_at is not None:
                gone.add(user.user_id)
        self._gone = frozenset(gone)

    def observe(self, observer: Callable[[str], None]) -> None:
        """Call `observer` with the id of each user whose record changes or goes from now on, log-ins too.

        It is called under the commit lock, when the new record can be read; it must not block or commit.
        """
        self._observers.append(observer)

    def _on_commit(self, batch: Batch, commit: Commit) -> None:
        for op in batch.records:
            if op.check or op.key[0] != RecordKind.USER:
                continue
            user_id = decode_text(op.key[1:])
            user = None if op.value is None else msgspec.msgpack.decode(op.value, type=UserRecord)
            gone = user is not None and user.deleted_at is not None
            if gone != (user_id in self._gone):
                self._gone = self._gone | {user_id} if gone else self._gone - {user_id}
            self._index_subject(user_id, user)
            for observer in self._observers:
                observer(user_id)

    def _index_subject(self, user_id: str, user: UserRecord | None) -> None:
        subject, former = None if user is None else _subject_of(user), self._subject_by_user.get(user_id)
        if subject == former:
            return
        if former is not None:
            del self._subject_by_user[user_id]
            if self._user_by_subject.get(former) == user_id:
                del self._user_by_subject[former]
        if subject is not None:
            self._subject_by_user[user_id] = subject
            self._user_by_subject[subject] = user_id

    def refuse_gone(self, user_id: str) -> None:
        """Raise Denied for a user who was dropped. A name without record is nobody's and passes."""
        if user_id in self._gone:
            raise Denied(f"user '{user_id}' was dropped; RESTORE USER brings the user back")

    # Finding

    def find(self, user_id: str) -> UserRecord | None:
        """The user, dropped ones too; None when there is none."""
        found = self._stored(user_id)
        return None if found is None else msgspec.msgpack.decode(found.value, type=UserRecord)

    def of_subject(self, subject: OAuthSubject) -> UserRecord | None:
        """The user that logs in as `subject` of a provider; None when there is none, or it was dropped."""
        user_id = self._user_by_subject.get(subject)
        user = None if user_id is None else self.find(user_id)
        return None if user is None or user.deleted_at is not None or _subject_of(user) != subject else user

    @property
    def needs_setup(self) -> bool:
        """Whether root has no password yet."""
        root = self.find(ROOT)
        return root is None or not root.password_hash

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
            password_hash="" if credentials.password is None else self.passwords.hashed(credentials.password),
            auth_data=_checked_auth_data(credentials),
            email=_checked_email(email),
            created_at=now_ms,
            updated_at=now_ms,
            tokens_valid_from=now_ms,
        )
        self._refuse_known_subject(user)
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

    def _refuse_known_subject(self, user: UserRecord) -> None:
        subject = _subject_of(user)
        owner = None if subject is None else self._user_by_subject.get(subject)
        if owner is not None and owner != user.user_id:
            raise Conflict(
                f"user '{owner}' logs in as this subject of '{user.auth_data and user.auth_data['provider']}'"
            )

    def set_password(self, user_id: str, password: str, *, actor: Actor) -> None:
        """Change a password; the user logs in by password from now on. Raises NotFound, InvalidRequest, Denied."""
        hashed = self.passwords.hashed(password)
        changes = {
            "password_hash": hashed, "auth_type": AuthType.PASSWORD, "auth_data": None, "failed_login_attempts": 0,
            "locked_until": None,
        }  # fmt: skip
        self._change(user_id, actor, "ALTER_USER", "password=[REDACTED]", changes, ends_tokens=True)

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
        """Take a drop back. Raises NotFound, Conflict when the user is not dropped, Denied. Tokens
        from before the drop stay refused."""
        self._change(user_id, actor, "RESTORE_USER", None, {"deleted_at": None}, dropped=True, ends_tokens=True)

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
        ends_tokens: bool = False,
    ) -> None:
        for _ in range(_CHANGE_ATTEMPTS):
            stored = self._stored(user_id)
            user = None if stored is None else msgspec.msgpack.decode(stored.value, type=UserRecord)
            if stored is None or user is None or (user.deleted_at is not None and not dropped):
                raise NotFound(f"user '{user_id}' does not exist")
            if dropped and user.deleted_at is None:
                raise Conflict(f"user '{user_id}' is not dropped")
            actor.check_may_change(user.role)
            now_ms = self._clock.now_ms()
            if ends_tokens:
                changes = {**changes, "tokens_valid_from": max(now_ms, user.tokens_valid_from + 1)}
            changed = msgspec.structs.replace(user, updated_at=now_ms, **changes)
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
        row = audit_op(self._audit_row(actor, action, target, details))
        commit = self._backend.commit(Batch(records=[*records, row], jobs=list(jobs)))
        self._backend.wait_durable(commit)
        return commit

    def _audit_row(self, actor: Actor, action: str, user_id: str, details: str | None) -> AuditRow:
        return AuditRow(
            audit_id=self._audit_ids.next(),
            timestamp=self._clock.now_ms(),
            actor_user_id=actor.user_id,
            action=action,
            target=user_id,
            details=details,
            ip_address=actor.address,
            subject_user_id=user_id,
        )

    def audit(self, actor: Actor, action: str, user_id: str, details: str | None = None) -> None:
        """Add an entry about a user without a change of it. Not durable on return, but before any later commit."""
        self._backend.commit(Batch(records=[audit_op(self._audit_row(actor, action, user_id, details))]))

    # The first password, log-ins

    def set_up(
        self, user_id: str, password: str, root_password: str, email: str | None, *, address: str | None
    ) -> None:
        """Give root its first password and make a user of role dba, both or none. Blocks for two hashes.

        Raises InvalidRequest for names and passwords that may not be, Conflict when the user exists or root has
        a password.
        """
        _check_name(user_id)
        if user_id == ROOT:
            raise InvalidRequest("user 'root' is there already; name the administrator otherwise")
        root, now_ms = self._stored(ROOT), self._clock.now_ms()
        assert root is not None
        user = UserRecord(
            user_id=user_id, role=Role.DBA, auth_type=AuthType.PASSWORD, email=_checked_email(email),
            password_hash=self.passwords.hashed(password, refuse_common=True),
            created_at=now_ms, updated_at=now_ms, tokens_valid_from=now_ms,
        )  # fmt: skip
        hashed = self.passwords.hashed(root_password, refuse_common=True)
        actor = Actor(ROOT, Role.SYSTEM, address)
        made = audit_op(self._audit_row(actor, "CREATE_USER", user_id, "role=dba auth_type=password"))
        records = [self._with_first_password(root, hashed), _put(user, ABSENT), made]
        try:
            self._commit(records, actor, "ALTER_USER", ROOT, "password=[REDACTED]")
        except ExpectationFailed as failed:
            if failed.key == record_key(RecordKind.USER, user_id):
                raise Conflict(f"user '{user_id}' already exists") from failed
            raise Conflict("root has a password already") from failed

    def give_root_password(self, password: str) -> bool:
        """Give root its first password; False when it has one, which stays. Raises InvalidRequest."""
        root = self._stored(ROOT)
        if root is None or msgspec.msgpack.decode(root.value, type=UserRecord).password_hash:
            return False
        hashed = self.passwords.hash_of(password)
        actor = Actor(ROOT, Role.SYSTEM)
        self._commit([self._with_first_password(root, hashed)], actor, "ALTER_USER", ROOT, "password=[REDACTED]")
        return True

    def _with_first_password(self, root: Record, hashed: str) -> RecordOp:
        user = msgspec.msgpack.decode(root.value, type=UserRecord)
        if user.password_hash:
            raise Conflict("root has a password already")
        now_ms = self._clock.now_ms()
        changed = msgspec.structs.replace(
            user, password_hash=hashed, auth_type=AuthType.PASSWORD, updated_at=now_ms, tokens_valid_from=now_ms
        )
        return _put(changed, root.version)

    def note_login(self, user_id: str) -> None:
        """Remember that a log-in succeeded. Not durable on return."""
        changes = {"failed_login_attempts": 0, "locked_until": None, "last_login_at": self._clock.now_ms()}
        self._note(user_id, lambda user: changes, None)

    def note_failure(self, user_id: str, *, address: str | None) -> None:
        """Remember that a log-in failed; the fifth in a row locks for 15 minutes. Not durable on return."""
        now_ms = self._clock.now_ms()

        def failed(user: UserRecord) -> dict[str, Any]:
            over = user.locked_until is not None and user.locked_until <= now_ms
            failures = 1 if over else user.failed_login_attempts + 1
            until = now_ms + LOCK_MS if failures >= LOGIN_FAILURES_MAX else None
            return {"failed_login_attempts": failures, "locked_until": until}

        self._note(user_id, failed, address)

    def _note(self, user_id: str, change: Callable[[UserRecord], dict[str, Any]], address: str | None) -> None:
        for _ in range(_CHANGE_ATTEMPTS):
            stored = self._stored(user_id)
            if stored is None:
                return
            user = msgspec.msgpack.decode(stored.value, type=UserRecord)
            changed = msgspec.structs.replace(user, **change(user))
            records = [_put(changed, stored.version)]
            if changed.locked_until is not None:
                details = f"locked after {changed.failed_login_attempts} failed log-ins"
                actor = Actor(user_id, user.role, address)
                records.append(audit_op(self._audit_row(actor, "LOGIN_LOCKED", user_id, details)))
            try:
                self._backend.commit(Batch(records=records))
                return
            except ExpectationFailed:
                continue


class Actor(msgspec.Struct, frozen=True):
    """Who changes users."""

    user_id: str
    role: Role
    address: str | None = None
    """IP address that the request came from; None for calls of the program itself."""

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


def _subject_of(user: UserRecord) -> OAuthSubject | None:
    if user.auth_type is not AuthType.OAUTH or user.auth_data is None:
        return None
    return OAuthSubject(user.auth_data["provider"], user.auth_data["subject"])


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
