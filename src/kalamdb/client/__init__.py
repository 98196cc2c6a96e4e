"""Python clients of a served database: `Client` blocks, `AsyncClient` is awaited.

`wire`, `calls` and `live` hold the protocol without input and output; the other modules send and read.
"""

from kalamdb.client.awaitable import AsyncClient
from kalamdb.client.awaitable_live import AsyncLiveQuery
from kalamdb.client.blocking import Client
from kalamdb.client.blocking_live import LiveQuery
from kalamdb.client.live import Change
from kalamdb.types import ChangeType

__all__ = ["AsyncClient", "AsyncLiveQuery", "Change", "ChangeType", "Client", "LiveQuery"]
