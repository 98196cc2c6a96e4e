"""Live queries: subscriptions to the changes of a table that match a filter.

`LiveQueries.subscribe` is the whole of it for a server; `Subscription` is the same for the program that embeds the
database. Nothing is handed out before it is durable, and each change once, in commit order.
"""

from __future__ import annotations

from kalamdb.live.admin import LiveAdmin, live_options, live_table
from kalamdb.live.changes import Change, Field, Values
from kalamdb.live.iterator import Subscription, call_back
from kalamdb.live.queries import LiveLimits, LiveQueries, code_of
from kalamdb.live.reading import LiveReader
from kalamdb.live.statement import LiveSelect, parse_live
from kalamdb.live.subscription import Batch, LiveCode, LiveOptions, LiveRequest, LiveSink, LiveSubscription
from kalamdb.types import ChangeType

__all__ = [
    "Batch",
    "Change",
    "ChangeType",
    "Field",
    "LiveAdmin",
    "LiveCode",
    "LiveLimits",
    "LiveOptions",
    "LiveQueries",
    "LiveReader",
    "LiveRequest",
    "LiveSelect",
    "LiveSink",
    "LiveSubscription",
    "Subscription",
    "Values",
    "call_back",
    "code_of",
    "live_options",
    "live_table",
    "parse_live",
]
