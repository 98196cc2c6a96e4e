"""The database of a process that holds its directory and lets others attach."""

from __future__ import annotations

import os
from pathlib import Path

from kalamdb.app_context import AppContext
from kalamdb.config import Settings
from kalamdb.database import Database
from kalamdb.errors import Closed
from kalamdb.sharing.listener import Listener


class HoldingDatabase(Database):
    """A Database with a listener for processes that attach; `settings` have `share`.

    Raises what opening raises, and Closed when the directory holds another database than `database_uid`.
    """

    def __init__(self, path: Path, settings: Settings, *, database_uid: str | None = None) -> None:
        super().__init__(AppContext(path, settings))
        try:
            assert self.context.directory is not None
            self.database_uid = self.context.directory.database_uid
            if database_uid not in (None, self.database_uid):
                raise Closed(f"'{path}' holds another database now: it was restored or made anew; connect again")
            self._listener = Listener(self, path, database_uid=self.database_uid)
        except BaseException:
            super().close()
            raise

    @property
    def connections(self) -> int:
        """How many connections of attached processes it serves."""
        return self._listener.connections

    def close(self) -> None:
        """See Database.close. Nobody is let in any more; calls of attached processes get five seconds."""
        if os.getpid() == self._pid:
            self._listener.close()
        super().close()


__all__ = ["HoldingDatabase"]
