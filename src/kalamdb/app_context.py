"""Builds every part of a database, hands the parts to each other, starts and stops them in order."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from kalamdb.backup import Backups, DatabaseIdentity
from kalamdb.backup.adopt import adopt
from kalamdb.backup.restore import Probation, waiting_generation
from kalamdb.catalog import DEFAULT_NAMESPACE, Catalog
from kalamdb.check import check_database
from kalamdb.clock import Clock, SystemClock, ulid, uuid_v7
from kalamdb.config import Settings
from kalamdb.dba import StatsSampler
from kalamdb.files import FileOps
from kalamdb.introspection import Introspection
from kalamdb.jobs import JobRegistry, UnifiedJobManager
from kalamdb.jobs.discovery import register_installed
from kalamdb.jobs.executors.backup import BackupExecutor
from kalamdb.jobs.executors.cleanup import CleanupExecutor
from kalamdb.jobs.executors.compact import CompactExecutor
from kalamdb.jobs.executors.flush import FlushExecutor
from kalamdb.jobs.executors.restore import RestoreExecutor
from kalamdb.jobs.executors.retention import RetentionExecutor
from kalamdb.jobs.executors.stream_eviction import StreamEvictionExecutor
from kalamdb.jobs.executors.user_cleanup import UserCleanupExecutor
from kalamdb.jobs.history import History
from kalamdb.jobs.log import JobLogFile
from kalamdb.jobs.queues import MAINTENANCE_QUEUE
from kalamdb.jobs.scheduler import Schedulers
from kalamdb.jobs.schedules import JobSchedules
from kalamdb.jobs.settings import JobSettings
from kalamdb.jobs.workers import WorkersFactory
from kalamdb.live import LiveAdmin, LiveLimits, LiveQueries, LiveReader
from kalamdb.passwords import PasswordRules, Passwords
from kalamdb.result import Result
from kalamdb.service import Loop
from kalamdb.sql.admin import Admin
from kalamdb.sql.backups import BackupAdmin
from kalamdb.sql.caller import Caller, Params
from kalamdb.sql.engine import Engine, EngineLimits
from kalamdb.sql.execute_as import Impersonation
from kalamdb.sql.jobs import JobAdmin
from kalamdb.sql.queries import QueryAdmin, RunningQueries
from kalamdb.sql.query import Reader
from kalamdb.sql.rows import Rows
from kalamdb.sql.schedules import ScheduleAdmin
from kalamdb.sql.session import Session
from kalamdb.sql.statements import (
    BackupStatement,
    KillLiveQuery,
    KillQuery,
    ScheduleStatement,
    StorageStatement,
    SubscribeTo,
    UserStatement,
)
from kalamdb.sql.storages import StorageAdmin
from kalamdb.sql.tokens import SqlLimits
from kalamdb.sql.users import UserAdmin
from kalamdb.storage import StorageBackend
from kalamdb.storage.directory import DataDirectory
from kalamdb.storage.kv import KvBackend
from kalamdb.storage.memory import MemoryKv
from kalamdb.storages import Storages
from kalamdb.system import SystemSources, SystemTablesRegistry, figure_rows
from kalamdb.system.users import user_tables
from kalamdb.tables.maintenance import Maintenance
from kalamdb.tables.store import TableLimits, TableStore
from kalamdb.tables.write import snowflake_id
from kalamdb.types import Role
from kalamdb.users import ROOT, Users, audit_rows

_REMOVAL_INTERVAL_S = 1.0
_SCHEDULER_IDLE_S = 60.0
"""Between two looks for compactions when the flush scheduler is off."""


class AppContext:
    """All parts of one database. Any number may live in one process; nothing is global.

    Start order: directory, store, catalog, tables, engine and SQL, jobs, schedulers. `stop` goes the
    other way round and is idempotent.
    """

    def __init__(
        self,
        path: Path | None,
        settings: Settings,
        *,
        clock: Clock | None = None,
        operations: FileOps | None = None,
        backend: StorageBackend | None = None,
        root: Path | None = None,
        workers: WorkersFactory | None = None,
        background: bool = True,
    ) -> None:
        self.settings = settings
        self._workers = workers
        self._background = background
        """Whether `start` begins threads; else whoever holds this makes the passes of runner and schedules."""
        self.clock = clock or SystemClock()
        self._pid = os.getpid()
        self._stopping = threading.Lock()
        self._stopped = False
        with ExitStack() as stack:
            root = self._open_store(path, root, backend, operations, stack)
            self._make_tables(root, operations)
            self.backups = self._make_backups(root, operations)
            self.probation = None if self.directory is None else self._make_probation(self.directory)
            self._job_settings = self._make_job_settings()
            self.history = History(self.backend, self._job_settings)
            self.job_registry = self._registry()
            self._job_manager = self._make_jobs(path)
            self.schedules = JobSchedules(
                self.backend, self._job_manager, self.clock, misfire_grace_s=settings["jobs.misfire_grace_s"]
            )
            self._adopt_restored()
            self.system_tables = self._system()
            self.session = self._make_session()
            self.introspection = Introspection(
                clock=self.clock, store=self.store, session=self.session, engine=self._engine, queries=self.queries,
                manager=self._job_manager, backups=self.backups, directory=self.directory, probation=self.probation,
                live=self.live, made_s=self.clock.monotonic_s(), users_counted=lambda: sum(1 for _ in self.users.all()),
                logs_folder=self._logs_folder(path),
            )  # fmt: skip
            for table in self.introspection.tables():
                self.system_tables.register(table)
            self.sampler = StatsSampler(
                self._execute, self.catalog, lambda: dict(figure_rows(self.system_sources)), self.clock,
                sampled=settings["retention.enable_dba_stats"],
                retention_days=settings["retention.dba_stats_retention_days"],
            )  # fmt: skip
            self.maintenance.remove_samples = self.sampler.remove_old
            self.schedulers = self._make_schedulers()
            self.store.pressure = self.schedulers.press
            self._remover = Loop("removal", lambda: self.backend.remove_retired(), _REMOVAL_INTERVAL_S, self.clock)
            # A table that is quiet right after its flush is emptied by one range delete instead of row by row.
            self.backend.observe(lambda batch, _: self._remover.wake() if batch.retire else None)
            stack.pop_all()

    def _open_store(
        self,
        path: Path | None,
        root: Path | None,
        backend: StorageBackend | None,
        operations: FileOps | None,
        stack: ExitStack,
    ) -> Path:
        """Hold the directory, open the store; the folder of the segments."""
        self.directory = None
        if path is not None:
            self.directory = DataDirectory.open(path, self.clock, operations, shares=self.settings["share"])
        if self.directory is not None:
            stack.callback(self.directory.close)
        self.backend = backend or self._open_backend()
        stack.callback(lambda: self.backend.close())
        if self.directory is not None:
            self._enter_generation(self.directory)
            root = self.directory.generation.segments
        assert root is not None
        return root

    def _make_tables(self, root: Path, operations: FileOps | None) -> None:
        settings, directory = self.settings, self.directory
        self._database_uid = self.clock.random_bytes(8).hex() if directory is None else directory.database_uid
        self.storages = Storages(
            self.backend, self.clock, root, database_uid=self._database_uid,
            home=root if directory is None else directory.path, operations=operations,
        )  # fmt: skip
        self.storages.start()
        self.catalog = Catalog(self.backend, self.clock, self.storages)
        self.catalog.start()
        self.store = TableStore(self.backend, self.catalog, self.storages, self.clock, self._table_limits())
        self.store.start()
        rules = PasswordRules(
            settings["auth.bcrypt_cost"], settings["auth.min_password_length"], settings["auth.max_password_length"],
            settings["auth.enforce_password_complexity"],
        )  # fmt: skip
        self.users = Users(self.backend, self.clock, Passwords(rules))
        self.users.start()
        self.maintenance = Maintenance(
            self.store, self.users, deletion_grace_period_days=settings["deletion_grace_period_days"]
        )

    def _make_schedulers(self) -> Schedulers:
        settings = self.settings
        return Schedulers(
            self.maintenance, self._job_manager, self.clock,
            flush_enabled=settings["flush.scheduler_enabled"] and settings["flush.check_interval_seconds"] > 0,
            compaction_enabled=settings["compaction.enabled"],
            rows_default=settings["flush.default_row_limit"],
            interval_default_s=settings["flush.default_time_interval"],
            check_interval_s=settings["flush.check_interval_seconds"] or _SCHEDULER_IDLE_S,
        )  # fmt: skip

    def _enter_generation(self, directory: DataDirectory) -> None:
        """Take over the restored generation that waits, if one does, and remove what nobody needs."""
        directory.finish_creation()
        waiting = waiting_generation(directory, self.backend)
        if waiting is not None:
            self.backend.close()
            directory.switch(waiting)
            self.backend = self._open_backend()
        directory.remove_strays()

    def _make_backups(self, root: Path, operations: FileOps | None) -> Backups:
        directory = self.directory
        if directory is None:
            scratch, identity = root / ".checkpoints", DatabaseIdentity(self._database_uid)
        else:
            lineage = directory.origin.lineage if directory.origin is not None else ()
            scratch = directory.generation.path / "checkpoints"
            identity = DatabaseIdentity(self._database_uid, lineage)
        backups = Backups(self.store, directory, scratch=scratch, identity=identity, operations=operations)
        backups.remove_scratch()
        return backups

    def _make_probation(self, directory: DataDirectory) -> Probation:
        return Probation(directory, lambda: check_database(self.store).problems, self.clock)

    def _adopt_restored(self) -> None:
        if self.directory is None or self.directory.origin is None:
            return
        adopt(
            self.backend, self.directory.origin, self.clock, pause_queues=self._pause_queues,
            built_in=self.job_registry.job_types(), running_queue=MAINTENANCE_QUEUE,
        )  # fmt: skip

    def _pause_queues(self) -> None:
        names = {queue.name for queue in self._job_manager.queues.all()}
        names |= {schedule.queue for schedule in self.schedules.all() if schedule.queue is not None}
        for name in sorted(names - {MAINTENANCE_QUEUE}):
            self._job_manager.pause_queue(name, reason="the database was restored; RESUME QUEUE when all is well")

    def _open_backend(self) -> StorageBackend:
        settings = self.settings
        if self.directory is None:
            return KvBackend(MemoryKv(), self.clock, durability=settings["storage.durability"])
        from kalamdb.storage.rocks import RocksKv

        kv = RocksKv(
            self.directory.generation.rocksdb,
            create=self.directory.is_new,
            block_cache_bytes=settings["storage.rocksdb.block_cache_size"],
            write_buffer_bytes=settings["storage.rocksdb.write_buffer_size"],
            open_files_max=settings["storage.rocksdb.max_open_files"],
            background_jobs_max=settings["storage.rocksdb.max_background_jobs"],
            compressed=settings["storage.compression"],
        )
        try:
            return KvBackend(kv, self.clock, durability=settings["storage.durability"])
        except BaseException:
            kv.close()
            raise

    def _table_limits(self) -> TableLimits:
        s = self.settings
        return TableLimits(
            batch_rows_max=s["limits.batch_rows_max"],
            row_group_rows_max=s["segment.row_group_rows_max"],
            segment_compression="zstd" if s["storage.compression"] else "none",
            segment_bytes_max=s["compaction.segment_bytes_max"],
            level0_segments_max=s["compaction.level0_segments_max"],
            hot_bytes_max=s["hot.bytes_max"],
            hot_cache_bytes_max=s["hot.cache_bytes_max"],
            segment_cache_bytes_max=s["segment.cache_bytes_max"],
            hot_wait_timeout_s=s["hot.wait_timeout_s"],
            tombstone_window_s=s["live.resume_window_s"],
        )

    def _registry(self) -> JobRegistry:
        registry = JobRegistry()
        registry.register(FlushExecutor())
        registry.register(CompactExecutor())
        registry.register(CleanupExecutor())
        registry.register(RetentionExecutor(self.history))
        registry.register(StreamEvictionExecutor())
        registry.register(UserCleanupExecutor())
        registry.register(BackupExecutor(self.backups))
        registry.register(RestoreExecutor(self.backups))
        if self.settings["jobs.entry_points_enabled"]:
            register_installed(registry)
        return registry

    def _logs_folder(self, path: Path | None) -> Path | None:
        """Where log files are written; a database in memory writes none."""
        if path is None:
            return None
        return Path(self.settings["logging.logs_path"] or path / "logs")

    def _make_job_settings(self) -> JobSettings:
        s = self.settings
        return JobSettings(
            max_concurrent=s["jobs.max_concurrent"],
            max_retries=s["jobs.max_retries"],
            retry_backoff_ms=s["jobs.retry_backoff_ms"],
            cancel_timeout_s=s["jobs.cancel_timeout_s"],
            quarantine_after=s["jobs.quarantine_after"],
            queued_max=s["jobs.queued_max"],
            history_completed_days=s["jobs.history_completed_days"],
            history_failed_days=s["jobs.history_failed_days"],
            history_rows_max=s["jobs.history_rows_max"],
            shutdown_timeout_s=s["shutdown.timeout_s"],
            audit_retention_days=s["audit.retention_days"],
        )

    def _make_jobs(self, path: Path | None) -> UnifiedJobManager:
        job_settings = self._job_settings
        log = None
        folder = self._logs_folder(path)
        if folder is not None:
            log = JobLogFile(
                self.backend,
                folder / "jobs.log",
                self.clock,
                bytes_max=job_settings.log_bytes_max,
                files_max=job_settings.log_files_max,
            )
        if log is not None:
            self.maintenance.scrub_log = log.scrub
        return UnifiedJobManager(
            self.backend, self.job_registry, self.clock, job_settings, log=log, resolve_table=self.maintenance.resolve,
            workers=self._workers, history=self.history,
        )  # fmt: skip

    def _system(self) -> SystemTablesRegistry:
        self.system_sources = SystemSources(
            catalog=self.catalog,
            jobs=self.backend.jobs,
            store=self.store,
            settings=self.settings,
            stats=lambda: self.introspection.figures(),
            job_queues=self._job_manager.queues.table_rows,
            job_executors=self.job_registry.table_rows,
            job_schedules=self.schedules.table_rows,
        )
        registry = SystemTablesRegistry(self.system_sources)
        for table in user_tables(self.users.all, lambda: audit_rows(self.backend)):
            registry.register(table)
        return registry

    def _query_bytes_max(self) -> int:
        quarter = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
        return int(self.settings["datafusion.memory_limit"] or quarter)

    def _make_session(self) -> Session:
        s = self.settings
        cores = os.cpu_count() or 1
        self._engine = engine = Engine(
            EngineLimits(
                memory_bytes_max=self._query_bytes_max(), target_partitions=s["datafusion.query_parallelism"] or cores
            ),
            {
                "snowflake_id": lambda: snowflake_id(self.backend, self.clock),
                "uuid_v7": lambda: str(uuid_v7(self.clock)),
                "ulid": lambda: ulid(self.clock),
            },
        )
        self._reader = reader = Reader(
            self.store, self.catalog, engine, self.system_tables, s["limits.result_bytes_max"]
        )
        rows = Rows(self.store, reader, self.clock)
        manager = self._job_manager
        self.queries = RunningQueries(self.clock, s["logging.slow_query_threshold_ms"])
        admin = Admin(
            self.store, self.catalog, reader, self.system_tables, manager, self.clock,
            retention_hours=s["retention.default_deleted_retention_hours"],
        )  # fmt: skip
        self.rows = rows
        self.live = self._make_live()
        live = LiveAdmin(self.live)
        return Session(
            self.store, reader, rows, admin, JobAdmin(manager, self.store, reader), self.clock,
            impersonation=Impersonation(self.users),
            runners={
                UserStatement: UserAdmin(self.users, manager),
                ScheduleStatement: ScheduleAdmin(self.schedules),
                StorageStatement: StorageAdmin(self.storages, self.catalog),
                BackupStatement: BackupAdmin(self.backups, manager),
                KillQuery: QueryAdmin(self.queries),
                SubscribeTo: live,
                KillLiveQuery: live,
            },
            limits=self._sql_limits(),
            cache_entries_max=s["execution.sql_plan_cache_max_entries"],
            transaction_timeout_s=s["transaction_timeout_secs"],
            transaction_bytes_max=s["max_transaction_buffer_bytes"],
        )  # fmt: skip

    def _execute(self, sql: str, params: Params) -> Result:
        """Run SQL as the system."""
        return self.session.execute(sql, Caller(ROOT, Role.SYSTEM, DEFAULT_NAMESPACE, params, self.clock.now_ms()))

    def _sql_limits(self) -> SqlLimits:
        s = self.settings
        return SqlLimits(
            bytes_max=s["limits.sql_bytes_max"], tokens_max=s["limits.sql_tokens_max"],
            depth_max=s["limits.sql_depth_max"], set_operands_max=s["limits.sql_set_operands_max"],
        )  # fmt: skip

    def _make_live(self) -> LiveQueries:
        return LiveQueries(
            self.store, self.catalog, self.users,
            LiveReader(self.store, self._reader, self.settings["live.resume_window_s"]), self.clock,
            system=self.system_tables,
            limits=LiveLimits(subscriptions_per_user_max=self.settings["rate_limit.max_subscriptions_per_user"]),
            sql_limits=self._sql_limits(),
        )  # fmt: skip

    @property
    def job_manager(self) -> UnifiedJobManager:
        """The manager of all jobs of this database."""
        return self._job_manager

    def start(self, services: Any = None) -> None:
        """Begin the background work. `services` is the database as user executors see it."""
        self._job_manager.runner.services = services
        if self._job_manager.log is not None:
            self._job_manager.log.start()
        if not self._background:
            self._job_manager.runner.begin(self.settings["jobs.max_concurrent"])
            self.schedules.start(running=False)
            return
        self._remover.start()
        self._job_manager.run_loop(self.settings["jobs.max_concurrent"])
        self.schedulers.start()
        self.schedules.start(running=self.settings["jobs.schedules_enabled"])
        if self.probation is not None:
            self.probation.start()

    def stop(self) -> None:
        """End the background work, then release the store and the directory. Idempotent, also after fork()."""
        with self._stopping:
            if self._stopped:
                return
            self._stopped = True
        if os.getpid() != self._pid:
            return
        with ExitStack() as stack:
            if self.directory is not None:
                stack.callback(self.directory.close)
            stack.callback(self.backend.close)
            stack.callback(self._engine.children.close)
            if self._job_manager.log is not None:
                stack.callback(self._job_manager.log.stop)
            stack.callback(self._remover.stop)
            stack.callback(self.live.stop)
            stack.callback(self._job_manager.stop)
            stack.callback(self.schedulers.stop)
            stack.callback(self.schedules.stop)
            if self.probation is not None:
                stack.callback(self.probation.stop)
            stack.callback(self.sampler.stop)


__all__ = ["AppContext"]
