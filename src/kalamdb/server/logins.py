"""Log-ins by password: one thread that hashes, a bounded queue before it, and users that get locked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from kalamdb.clock import Clock
from kalamdb.users import ROOT, AuthType, UserRecord, Users

_WAITING_MAX: Final = 32

T = TypeVar("T")


class AuthFailure(Exception):
    """An answer of the routes below /auth other than 200: `slug` and `status` say which."""

    def __init__(self, status: int, slug: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.slug = slug


def unauthorized() -> AuthFailure:
    """The one answer for a wrong password, an unknown user and a dropped one."""
    return AuthFailure(401, "unauthorized", "Invalid credentials")


class Logins:
    """Checks passwords. A hash takes a core for a third of a second, so one thread makes them all, and no more
    than 32 callers wait for it."""

    def __init__(self, users: Users, clock: Clock) -> None:
        self._users = users
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kalamdb-password")
        self._inside = 0

    def close(self) -> None:
        """Refuse those that wait and release the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` returns, in the thread of the passwords. Raises AuthFailure when too many wait for it."""
        if self._inside > _WAITING_MAX:
            raise AuthFailure(429, "rate_limited", "Too many log-ins at this moment; try again")
        self._inside += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        finally:
            self._inside -= 1

    async def check(self, user_id: str, password: str, *, address: str, is_local: bool) -> UserRecord:
        """The user whose name and password these are. Raises AuthFailure."""
        return await self.run(lambda: self._checked(user_id, password, address, is_local))

    def _checked(self, user_id: str, password: str, address: str, is_local: bool) -> UserRecord:
        user = self._users.find(user_id) if user_id.isprintable() else None
        if user is not None and user_id == ROOT and not user.password_hash and not password:
            raise AuthFailure(428, "setup_required", "Root has no password yet; set the server up first")
        if user is None or user.deleted_at is not None or user.auth_type is not AuthType.PASSWORD:
            self._users.passwords.matches(password, None)
            raise unauthorized()
        # Whoever sits at the machine must not be shut out by others' guesses.
        counts = not (user_id == ROOT and is_local)
        if counts and user.is_locked(self._clock.now_ms()):
            raise AuthFailure(401, "account_locked", "Too many failed log-ins; try again in 15 minutes")
        if not self._users.passwords.matches(password, user.password_hash):
            if counts:
                self._users.note_failure(user_id, address=address)
            raise unauthorized()
        self._users.note_login(user_id)
        return user
