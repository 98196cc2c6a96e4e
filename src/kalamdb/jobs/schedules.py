"""Schedules: jobs that come back, by cron expression or interval. Kept in the store.

The commit that creates the job of a due time also moves the schedule to its next one, so each due time
makes one job, whatever dies in between. Cron times are those of the schedule's time zone, as Debian's cron
has them: what falls into the hour that a clock skips runs right after it, what falls into the hour that it
repeats runs once. Intervals count seconds and know no clock changes.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Any, assert_never
from zoneinfo import ZoneInfo

import msgspec
from cronsim import CronSim

from kalamdb.clock import Clock
from kalamdb.errors import Conflict, IdempotencyConflict, InvalidRequest, KalamDbError, NotFound
from kalamdb.jobs.manager import JobRequest, UnifiedJobManager
from kalamdb.jobs.model import Cron, Every
from kalamdb.jobs.registry import JobExecutor
from kalamdb.service import Loop
from kalamdb.storage import (
    ABSENT,
    Batch,
    Commit,
    ExpectationFailed,
    JobInsert,
    RecordKind,
    RecordOp,
    StorageBackend,
    record_key,
    record_prefix,
)
from kalamdb.types import JobId, Seq

_NAME_LENGTH_MAX = 64
_CATCH_UP_MAX = 1000
_SCANNED_TIMES_MAX = 100_000
"""Due times that are walked through after a long pause; beyond it the schedule goes on from now."""
_IDLE_S = 60.0
_OFTEN_S = 600.0
_CHANGE_ATTEMPTS = 16
_log = logging.getLogger("kalamdb.jobs")


class Misfire(StrEnum):
    """What happens with due times that passed while nothing could run."""

    SKIP = "skip"
    """They are dropped."""
    ONCE = "once"
    """One job stands for all of them."""
    ALL = "all"
    """One job each, of the newest `catch_up_max`."""


class Schedule(msgspec.Struct, frozen=True, kw_only=True):
    """A schedule as stored. Either `cron` or `interval_s` is set. Times are milliseconds since 1970."""

    name: str
    job_type: str
    parameters: dict[str, Any] = {}
    cron: str | None = None
    interval_s: float | None = None
    time_zone: str = "UTC"
    misfire: Misfire = Misfire.ONCE
    catch_up_max: int = 10
    queue: str | None = None
    priority: int | None = None
    paused: bool = False
    declared: bool = False
    """By an executor: it can be changed and paused, not dropped."""
    created_by: str = "system"
    created_at: int = 0
    updated_at: int = 0
    next_run_at: int = 0
    last_run_at: int | None = None
    last_job_id: str | None = None
    last_skipped: str | None = None
    """Why the last due time made no job."""

    def times_after(self, moment_ms: int) -> Iterator[int]:
        """Due times after a moment, rising, without end."""
        if self.interval_s is not None:
            step_ms = int(self.interval_s * 1000)
            first = self.created_at + ((moment_ms - self.created_at) // step_ms + 1) * step_ms
            while True:
                yield first
                first += step_ms
        start = datetime.fromtimestamp(moment_ms / 1000, ZoneInfo(self.time_zone))
        for due in CronSim(self.cron or "", start):
            yield int(due.timestamp() * 1000)


def declared_schedule(executor: JobExecutor[Any]) -> Schedule | None:
    """The schedule that an executor comes with."""
    kind = executor.job_type
    match executor.schedule:
        case None:
            return None
        case Every(seconds, params):
            # What comes back this often has nothing to catch up.
            misfire = Misfire.SKIP if seconds <= _OFTEN_S else Misfire.ONCE
            return Schedule(
                name=kind, job_type=kind, parameters=dict(params), interval_s=seconds, misfire=misfire, declared=True
            )
        case Cron(expression, time_zone, params):
            return Schedule(
                name=kind, job_type=kind, parameters=dict(params), cron=expression, time_zone=time_zone, declared=True
            )
        case other:
            assert_never(other)


class JobSchedules:
    """All schedules of a database, and the loop that makes their jobs. Thread-safe; changes are durable on return."""

    def __init__(
        self, backend: StorageBackend, manager: UnifiedJobManager, clock: Clock, *, misfire_grace_s: float
    ) -> None:
        self._backend = backend
        self._manager = manager
        self._clock = clock
        self._grace_ms = int(misfire_grace_s * 1000)
        self._lock = threading.Lock()
        self._known: dict[str, tuple[Schedule, Seq]] = {}
        self._loop = Loop("schedules", self.step, _IDLE_S, clock)

    def start(self, *, running: bool = True) -> None:
        """Read what is stored, add the schedules that executors declare, begin. Blocks for the disk.

        Without `running` no job is made but by `run`, or by whoever calls `step`.
        """
        self._backend.observe(self._on_commit)
        with self._backend.snapshot() as snapshot:
            for _, record in snapshot.scan_records(*record_prefix(RecordKind.SCHEDULE)):
                self._take(record.value, record.version)
        self._declare()
        self._manager.registry.on_register.append(self._declare)
        if running:
            self._loop.start()

    def _declare(self) -> None:
        """Make the schedules of executors that have none yet."""
        declared = [declared_schedule(executor) for executor in self._manager.registry.executors()]
        for schedule in declared:
            if schedule is not None and schedule.name not in self._known:
                self.create(schedule)

    def stop(self) -> None:
        """End after the running pass."""
        self._loop.stop()

    def _on_commit(self, batch: Batch, commit: Commit) -> None:
        for op in batch.records:
            if op.check or op.key[0] != RecordKind.SCHEDULE:
                continue
            if op.value is not None:
                self._take(op.value, commit.seq)
            else:
                with self._lock:
                    self._known = {name: known for name, known in self._known.items() if _key(name) != op.key}
            self._loop.wake()

    def _take(self, value: bytes, version: Seq) -> None:
        schedule = msgspec.msgpack.decode(value, type=Schedule)
        with self._lock:
            self._known[schedule.name] = (schedule, version)

    # Looking

    def all(self) -> list[Schedule]:
        """All schedules, by name."""
        with self._lock:
            return [schedule for _, (schedule, _) in sorted(self._known.items())]

    def get(self, name: str) -> Schedule:
        """One schedule. Raises NotFound."""
        return self._require(name)[0]

    def _require(self, name: str) -> tuple[Schedule, Seq]:
        with self._lock:
            known = self._known.get(name)
        if known is None:
            raise NotFound(f"Schedule '{name}' does not exist")
        return known

    def next_times(self, name: str, count: int) -> list[int]:
        """The next `count` due times in milliseconds since 1970; none while it is paused. Raises NotFound."""
        schedule = self.get(name)
        if schedule.paused:
            return []
        times = schedule.times_after(self._clock.now_ms())
        return [moment for moment, _ in zip(times, range(count), strict=False)]

    def table_rows(self) -> list[Sequence[Any]]:
        """Rows of system.job_schedules."""
        return [
            (
                one.name,
                one.job_type,
                one.parameters,
                one.cron,
                one.interval_s,
                one.time_zone,
                one.misfire.value,
                one.catch_up_max,
                one.queue,
                one.priority,
                one.paused,
                one.declared,
                None if one.paused else one.next_run_at,
                one.last_run_at,
                one.last_job_id,
                one.last_skipped,
                one.created_by,
                one.created_at,
                one.updated_at,
            )
            for one in self.all()
        ]

    # Changing

    def create(self, schedule: Schedule) -> Schedule:
        """Add a schedule. Raises InvalidRequest, NotFound for a job type without executor, Conflict."""
        checked = self._checked(schedule)
        fresh = _started(checked, self._clock.now_ms())
        try:
            self._commit(Batch(records=[_put(fresh, ABSENT)]))
        except ExpectationFailed:
            raise Conflict(f"Schedule '{schedule.name}' already exists") from None
        return fresh

    def alter(self, name: str, **changes: Any) -> Schedule:
        """Change fields of a schedule; a changed time begins anew from now. Raises NotFound, InvalidRequest."""
        for _ in range(_CHANGE_ATTEMPTS):
            schedule, version = self._require(name)
            if "cron" in changes or "interval_s" in changes:
                changes = {"cron": None, "interval_s": None, **changes}
            now_ms = self._clock.now_ms()
            changed = self._checked(msgspec.structs.replace(schedule, updated_at=now_ms, **changes))
            if changes.keys() & {"cron", "interval_s", "time_zone", "paused"}:
                changed = msgspec.structs.replace(changed, next_run_at=next(changed.times_after(now_ms)))
            try:
                self._commit(Batch(records=[_put(changed, version)]))
                return changed
            except ExpectationFailed:
                continue
        raise Conflict(f"schedule '{name}' kept changing; try again")

    def drop(self, name: str) -> None:
        """Remove a schedule; its jobs stay. Raises NotFound, InvalidRequest for one that an executor declares."""
        schedule, _ = self._require(name)
        if schedule.declared:
            raise InvalidRequest(f"schedule '{name}' comes with its executor and cannot be dropped; pause it instead")
        self._commit(Batch(records=[RecordOp(_key(name), None)]))

    def run(self, name: str, *, by: str) -> str:
        """Create the job of a schedule now, whatever its times; its id. Raises IdempotencyConflict, NotFound."""
        schedule = self.get(name)
        commit = self._commit(Batch(jobs=[self._insert(schedule, created_by=by)]))
        return commit.jobs[0]

    def _commit(self, batch: Batch) -> Commit:
        commit = self._backend.commit(batch)
        self._backend.wait_durable(commit)
        return commit

    def _checked(self, schedule: Schedule) -> Schedule:
        name = schedule.name
        if not 0 < len(name) <= _NAME_LENGTH_MAX or not name.isprintable():
            raise InvalidRequest(f"schedule {name!r} is not a printable name of 1 to {_NAME_LENGTH_MAX} characters")
        if not 1 <= schedule.catch_up_max <= _CATCH_UP_MAX:
            raise InvalidRequest(
                f"schedule '{name}' catches up {schedule.catch_up_max} times; 1 to {_CATCH_UP_MAX} are allowed"
            )
        if (schedule.cron is None) == (schedule.interval_s is None):
            raise InvalidRequest(f"schedule '{name}' needs a cron expression or an interval, one of both")
        if schedule.interval_s is not None:
            Every(schedule.interval_s)
        if schedule.cron is not None:
            Cron(schedule.cron, schedule.time_zone)
        self._insert(schedule, created_by=schedule.created_by)
        return schedule

    def _insert(self, schedule: Schedule, *, created_by: str, due_ms: int | None = None) -> JobInsert:
        request = JobRequest(
            job_type=schedule.job_type,
            params=schedule.parameters,
            queue=schedule.queue,
            priority=schedule.priority,
            created_by=created_by,
        )
        insert = self._manager.prepare(request)
        if insert.row.idempotency_key is not None:
            return insert
        # Without a key of its own a slow job would pile up behind itself; ALL asks for just that.
        key = f"schedule:{schedule.name}"
        if schedule.misfire is Misfire.ALL and due_ms is not None:
            key += f":{due_ms}"
        keyed = msgspec.structs.replace(insert.row, idempotency_key=key)
        return JobInsert(keyed, insert.draw_id, insert.events)

    # Running

    def step(self) -> bool:
        """Make the jobs that are due; True while more may be."""
        now_ms = self._clock.now_ms()
        for schedule in self.all():
            if not schedule.paused and schedule.next_run_at <= now_ms:
                try:
                    self._fire(schedule, now_ms)
                except ExpectationFailed:
                    return True
                except KalamDbError as exc:
                    _log.warning("schedule '%s' made no job: %s", schedule.name, exc)
        self._loop.interval_s = self._pause_s()
        return False

    def _pause_s(self) -> float:
        due = [schedule.next_run_at for schedule in self.all() if not schedule.paused]
        left_s = (min(due) - self._clock.now_ms()) / 1000 if due else _IDLE_S
        return min(max(left_s, 0.005), _IDLE_S)

    def _fire(self, schedule: Schedule, now_ms: int) -> None:
        version = self._require(schedule.name)[1]
        due, following = _due_times(schedule, now_ms)
        chosen = self._chosen(schedule, due, now_ms)
        moved = msgspec.structs.replace(schedule, next_run_at=following)
        skipped = "its due times passed while nothing could run" if not chosen else None
        job_id: JobId | None = None
        for moment in chosen:
            skipped = self._refusal(schedule)
            if skipped is not None:
                break
            last = msgspec.structs.replace(moved, last_run_at=moment, last_skipped=None)
            try:
                insert = self._insert(schedule, created_by=f"schedule:{schedule.name}", due_ms=moment)
                commit = self._backend.commit(Batch(jobs=[insert], records=[_put(last, version)]))
            except IdempotencyConflict as conflict:
                skipped = f"job '{conflict.job.job_id}' is still {conflict.job.status}"
                break
            moved, version, job_id = last, commit.seq, commit.jobs[0]
        final = msgspec.structs.replace(moved, last_skipped=skipped, last_job_id=job_id or moved.last_job_id)
        if final != self._known.get(schedule.name, (None, 0))[0]:
            self._backend.commit(Batch(records=[_put(final, version)]))

    def _chosen(self, schedule: Schedule, due: Sequence[int], now_ms: int) -> Sequence[int]:
        late = due[:-1] if now_ms - due[-1] <= self._grace_ms else due
        on_time = due[len(late) :]
        match schedule.misfire:
            case Misfire.SKIP:
                return on_time
            case Misfire.ONCE:
                return due[-1:]
            case Misfire.ALL:
                return [*late, *on_time][-schedule.catch_up_max :]

    def _refusal(self, schedule: Schedule) -> str | None:
        executor = self._manager.registry.get(schedule.job_type)
        if executor is None:
            return f"there is no executor for job type '{schedule.job_type}'"
        return executor.pre_validate(executor.decode(schedule.parameters), self._manager.runner.services)


def _due_times(schedule: Schedule, now_ms: int) -> tuple[list[int], int]:
    """Due times up to now, and the first after it."""
    due = [schedule.next_run_at]
    for moment in schedule.times_after(schedule.next_run_at):
        if moment > now_ms:
            return due, moment
        if len(due) >= _SCANNED_TIMES_MAX:
            return due, next(schedule.times_after(now_ms))
        due.append(moment)
    raise InvalidRequest(f"cron expression '{schedule.cron}' of schedule '{schedule.name}' is never due again")


def _started(schedule: Schedule, now_ms: int) -> Schedule:
    begun = msgspec.structs.replace(schedule, created_at=now_ms, updated_at=now_ms)
    return msgspec.structs.replace(begun, next_run_at=next(begun.times_after(now_ms)))


def _key(name: str) -> bytes:
    return record_key(RecordKind.SCHEDULE, name)


def _put(schedule: Schedule, expect: Seq) -> RecordOp:
    return RecordOp(_key(schedule.name), msgspec.msgpack.encode(schedule), expect)
