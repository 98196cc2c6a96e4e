"""Executors of installed distributions: entry points of the group `kalamdb.executors`."""

from __future__ import annotations

import logging
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from kalamdb.errors import InvalidRequest
from kalamdb.jobs.registry import JobExecutor, JobRegistry

GROUP = "kalamdb.executors"
_log = logging.getLogger("kalamdb.jobs")


def register_installed(registry: JobRegistry) -> list[str]:
    """Register what the entry points name, a JobExecutor or a class of them; the job types, by entry point.

    One that cannot be loaded or registered is logged with its name and its distribution, and left out.
    """
    found = []
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        try:
            executor = _executor(point)
            registry.register(executor)
        except (Exception, SystemExit):
            # A distribution that is broken must not keep a database, and the jobs of all others, from starting.
            where = point.dist.name if point.dist is not None else "an unknown distribution"
            _log.exception("the executor '%s' (%s) of '%s' is left out", point.name, point.value, where)
        else:
            found.append(executor.job_type)
    return found


def _executor(point: EntryPoint) -> JobExecutor[Any]:
    target = point.load()
    made = target() if isinstance(target, type) and issubclass(target, JobExecutor) else target
    if not isinstance(made, JobExecutor):
        raise InvalidRequest(
            f"'{point.value}' is a {type(made).__name__}; a JobExecutor or a class of them is expected"
        )
    return made
