"""The lease that what a thread commits is bound to."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from kalamdb.storage.jobs import JobFence


class ThreadLease(threading.local):
    """Of one store; each thread has its own."""

    fence: JobFence | None = None

    @contextmanager
    def under(self, fence: JobFence | None) -> Iterator[None]:
        """Inside, this thread is bound to `fence`; None binds it to nothing."""
        outer, self.fence = self.fence, fence
        try:
            yield
        finally:
            self.fence = outer


__all__ = ["ThreadLease"]
