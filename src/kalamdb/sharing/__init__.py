"""One data directory for several processes: one holds it, the others attach to it through a Unix socket."""

from kalamdb.sharing.database import SharedDatabase
from kalamdb.sharing.holding import HoldingDatabase

__all__ = ["HoldingDatabase", "SharedDatabase"]
