"""The names that the product was ordered by exist, do what they say, and what they replace does not."""

from __future__ import annotations

import inspect
import threading
from pathlib import Path

import kalamdb
from kalamdb.app_context import AppContext
from kalamdb.config import Settings
from kalamdb.jobs import Completed, JobContext, JobExecutor, JobRegistry, UnifiedJobManager
from kalamdb.jobs.executors.backup import BackupExecutor
from kalamdb.jobs.executors.cleanup import CleanupExecutor
from kalamdb.jobs.executors.compact import CompactExecutor
from kalamdb.jobs.executors.flush import FlushExecutor
from kalamdb.jobs.executors.restore import RestoreExecutor
from kalamdb.jobs.executors.retention import RetentionExecutor
from kalamdb.jobs.executors.stream_eviction import StreamEvictionExecutor
from kalamdb.jobs.executors.user_cleanup import UserCleanupExecutor

SOURCE = Path(kalamdb.__file__).parent
REPLACED = ("TokioJobManager", "KalamSql", "class JobManager")


class _Echo(JobExecutor[dict[str, str]]):
    job_type = "echo"
    prefix = "EC"

    def execute(self, ctx: JobContext[dict[str, str]]) -> Completed:
        return Completed(ctx.params["say"])


def test_the_context_hands_out_the_one_job_manager_with_a_registry_of_executors(tmp_path: Path) -> None:
    context = AppContext(tmp_path / "data", Settings.load(environment={}))
    try:
        assert type(context.job_manager) is UnifiedJobManager
        assert type(context.job_registry) is JobRegistry
        assert context.job_manager.registry is context.job_registry
        kinds = (
            FlushExecutor, CleanupExecutor, RetentionExecutor, StreamEvictionExecutor, UserCleanupExecutor,
            CompactExecutor, BackupExecutor, RestoreExecutor,
        )  # fmt: skip
        by_type = {one.job_type: one for one in kinds}
        assert context.job_registry.job_types() == sorted(by_type)
        for job_type, kind in by_type.items():
            assert type(context.job_registry.get(job_type)) is kind
    finally:
        context.stop()


def test_a_job_waits_until_the_context_starts_the_loop_and_is_dispatched_by_its_type(tmp_path: Path) -> None:
    context = AppContext(tmp_path / "data", Settings.load(environment={}))
    try:
        context.job_registry.register(_Echo())
        job = context.job_manager.create_job("echo", {"say": "hello"})
        assert context.job_manager.get_job(job.id).status == "new"
        context.start()
        assert context.job_manager.wait(job.id, timeout_s=10).message == "hello"
    finally:
        context.stop()


def test_the_loop_runs_as_many_jobs_as_the_setting_says() -> None:
    with kalamdb.connect(":memory:", jobs_max_concurrent=2) as db:
        started, release = threading.Semaphore(0), threading.Event()

        @db.jobs.executor("hold", prefix="HO")
        def hold(ctx: JobContext[dict[str, str]]) -> None:
            started.release()
            release.wait(10)

        jobs = [db.jobs.create_job("hold") for _ in range(4)]
        assert started.acquire(timeout=10) and started.acquire(timeout=10)
        assert len(db.jobs.list_jobs(job_type="hold", status="running")) == 2
        release.set()
        assert {db.jobs.wait(job.id, timeout_s=10).status.value for job in jobs} == {"completed"}


def test_stopping_twice_and_stopping_without_starting_do_no_harm(tmp_path: Path) -> None:
    context = AppContext(tmp_path / "data", Settings.load(environment={}))
    context.stop()
    context.stop()
    again = AppContext(tmp_path / "data", Settings.load(environment={}))
    again.start()
    again.stop()
    again.stop()


def test_any_number_of_contexts_live_in_one_process(tmp_path: Path) -> None:
    contexts = [AppContext(tmp_path / str(number), Settings.load(environment={})) for number in range(3)]
    for context in contexts:
        context.start()
    assert len({id(context.job_manager) for context in contexts}) == 3
    for context in contexts:
        context.stop()


def test_run_loop_and_create_job_are_spelled_as_they_were_ordered() -> None:
    assert list(inspect.signature(UnifiedJobManager.run_loop).parameters)[:2] == ["self", "max_concurrent"]
    assert list(inspect.signature(UnifiedJobManager.create_job).parameters)[1:4] == [
        "job_type",
        "params",
        "idempotency_key",
    ]


def test_what_the_unified_manager_replaces_is_nowhere() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py"))
    assert [name for name in REPLACED if name in text] == []
