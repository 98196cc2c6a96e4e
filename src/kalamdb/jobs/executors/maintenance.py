"""What the built-in executors of table maintenance have in common."""

from __future__ import annotations

from kalamdb.jobs.queues import MAINTENANCE_QUEUE
from kalamdb.jobs.registry import JobExecutor, Params
from kalamdb.storage.jobs import OnInterrupt


class MaintenanceExecutor(JobExecutor[Params]):
    """Its jobs wait in a queue of their own, before those of the application, and can always begin again."""

    on_interrupt = OnInterrupt.REQUEUE
    queue = MAINTENANCE_QUEUE
    priority = 100
    """The hot tier must not fill because the application has a long backlog."""
