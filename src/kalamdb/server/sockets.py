"""The open WebSockets as the end of the server sees them."""

from __future__ import annotations

import asyncio
from typing import Protocol


class OpenSocket(Protocol):
    """A WebSocket that can be told to end."""

    async def close(self, code: int, reason: str) -> None:
        """Send what is queued, then the close frame. Takes nothing more to send from now on."""
        ...


class Sockets:
    """Which are open. Lives on the loop."""

    def __init__(self) -> None:
        self._open: set[OpenSocket] = set()

    def add(self, socket: OpenSocket) -> None:
        """A socket was opened."""
        self._open.add(socket)

    def discard(self, socket: OpenSocket) -> None:
        """It is gone."""
        self._open.discard(socket)

    def __len__(self) -> int:
        return len(self._open)

    async def close_all(self, code: int, reason: str, *, timeout_s: float) -> None:
        """Close all of them at the same time; returns after `timeout_s` at the latest."""
        closing = [asyncio.ensure_future(socket.close(code, reason)) for socket in self._open]
        if closing:
            _, late = await asyncio.wait(closing, timeout=timeout_s)
            for task in late:
                task.cancel()
