"""Flushes and compactions that nobody asked for: by policy, under pressure, after a crash."""

from __future__ import annotations

from typing import Any, Protocol

from kalamdb.clock import Clock
from kalamdb.errors import IdempotencyConflict, KalamDbError
from kalamdb.jobs.manager import UnifiedJobManager
from kalamdb.service import Loop

_PRESSURE = 0.75


class MaintenanceView(Protocol):
    """What there is to do."""

    def pending(self) -> list[Any]: ...
    def crowded(self) -> list[tuple[int, str]]: ...
    def may_flush(self, table_uid: int) -> bool: ...
    def hot_pressure(self) -> float: ...


class Schedulers:
    """The flush scheduler and automatic compaction. `step` does one pass."""

    def __init__(
        self,
        maintenance: MaintenanceView,
        manager: UnifiedJobManager,
        clock: Clock,
        *,
        flush_enabled: bool,
        compaction_enabled: bool,
        rows_default: int,
        interval_default_s: int,
        check_interval_s: float,
    ) -> None:
        self._maintenance = maintenance
        self._manager = manager
        self._clock = clock
        self._flush_enabled = flush_enabled
        self._compaction_enabled = compaction_enabled
        self._rows_default = rows_default
        self._interval_default_s = interval_default_s
        self._pressed = False
        self._loop = Loop("scheduler", self.step, min(check_interval_s, 3600.0), clock)

    def start(self) -> None:
        """Begin; does nothing when neither flush nor compaction is enabled but pressure."""
        self._loop.start()

    def stop(self) -> None:
        """End after the running pass."""
        self._loop.stop()

    def press(self) -> None:
        """The hot tier is over its bound: flush now."""
        self._pressed = True
        self._loop.wake()

    def step(self) -> bool:
        """Create the jobs that are due; never returns True."""
        pressed, self._pressed = self._pressed, False
        if self._flush_enabled or pressed:
            pressed = pressed or self._maintenance.hot_pressure() > _PRESSURE
            for pending in self._maintenance.pending():
                if pressed or self._is_due(pending):
                    self._create("flush", {"table_id": pending.table_id}, pending.table_uid)
        if self._compaction_enabled:
            for uid, table_id in self._maintenance.crowded():
                self._create("compact", {"table_id": table_id, "full": False}, uid)
        return False

    def _is_due(self, pending: Any) -> bool:
        policy = pending.policy
        rows = policy.rows if policy is not None else self._rows_default
        interval_s = policy.interval_s if policy is not None else self._interval_default_s
        age_s = (self._clock.now_ms() - pending.oldest_ms) / 1000
        return (rows is not None and pending.rows >= rows) or (interval_s is not None and age_s >= interval_s)

    def _create(self, job_type: str, params: dict[str, Any], uid: int) -> None:
        if job_type == "flush" and not self._maintenance.may_flush(uid):
            return
        try:
            self._manager.create_job(job_type, params)
        except IdempotencyConflict:
            return
        except KalamDbError:
            # The table may be gone, or the store be closing; the next pass looks again.
            return
