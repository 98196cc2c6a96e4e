"""First bytes of the keys of an ordered store. Part of the stored format: never change one."""

from __future__ import annotations

from enum import IntEnum


class Space(IntEnum):
    """What the keys of `kv` hold."""

    META = 1
    RECORD = 2
    ROW = 3
    STREAM = 4
    OUTCOME = 5
    OUTCOME_AGE = 6
