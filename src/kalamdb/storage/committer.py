"""Group commit: one sync of the disk is shared by all that wait for one."""

from __future__ import annotations

import threading
from collections.abc import Callable

from kalamdb.errors import Closed, KalamDbError, Unavailable
from kalamdb.storage.ordered import OrderedKv
from kalamdb.types import Seq


def refused(cause: str) -> Unavailable:
    """The error of a store whose disk failed."""
    return Unavailable(
        f"writes are refused since a commit failed: {cause}; mend the cause, then close and open the database"
    )


class Committer:
    """Whoever wrote before a sync began is done by it.

    The first one that waits syncs for all, in its own thread: nobody is woken for a commit that has no company.
    Those that come meanwhile wait for the next sync, which one of them makes.
    """

    def __init__(self, kv: OrderedKv, head: Callable[[], Seq], fail: Callable[[str], None]) -> None:
        self._kv = kv
        self._head = head
        self._fail = fail
        self._condition = threading.Condition()
        # What was read back at the opening is on disk: RocksDB writes the recovered log to a file.
        self._synced: Seq = head()
        self._leader: object | None = None
        """Who syncs now."""
        self._stopping = False
        self._cause: str | None = None
        self.groups = 0

    def wait(self, seq: Seq) -> None:
        """Block until commits up to `seq` are durable. Raises Unavailable when the disk refuses."""
        me = object()
        while True:
            try:
                with self._condition:
                    while self._leader is not None and self._synced < seq:
                        self._condition.wait()
                    if seq <= self._synced:
                        return
                    if self._cause is not None:
                        raise refused(self._cause)
                    if self._stopping:
                        raise Closed("the database is closed; open it again")
                    self._leader = me
                self._sync()
            finally:
                # Also when Ctrl-C came in between: somebody else must be able to lead.
                if self._leader is me:
                    with self._condition:
                        self._leader = None
                        self._condition.notify_all()

    def _sync(self) -> None:
        upto = self._head()
        try:
            self._kv.sync()
        except KalamDbError as exc:
            self._cause = str(exc)
            self._fail(self._cause)
            return
        self._synced = max(self._synced, upto)
        self.groups += 1

    def stop(self) -> None:
        """Let the running sync end; later waits are refused."""
        with self._condition:
            self._stopping = True
            while self._leader is not None:
                self._condition.wait()
