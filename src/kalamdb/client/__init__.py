"""Python clients of a served database: `Client` blocks, `AsyncClient` is awaited.

`wire` and `calls` hold the protocol without input and output; `blocking` and `awaitable` send.
"""

from kalamdb.client.awaitable import AsyncClient
from kalamdb.client.blocking import Client

__all__ = ["AsyncClient", "Client"]
