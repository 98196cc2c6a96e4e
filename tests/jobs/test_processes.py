"""run_in="process": an attempt has a process, its context comes over a pipe, and the process can be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest

from kalamdb.errors import InvalidRequest
from kalamdb.jobs import Job, UnifiedJobManager
from tests.jobs import in_process
from tests.jobs.conftest import World, until

WAIT_S = 30.0


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def pid_of(job: Job) -> int:
    """The pid that `in_process.stand` said."""

    def said() -> list[int]:
        return [int(event.text[4:]) for event in job.events() if event.text.startswith("pid ")]

    until(lambda: bool(said()))
    return said()[-1]


def manager_of(world: World, **settings: Any) -> UnifiedJobManager:
    manager = world.manager(start=4, **settings)
    manager.executor("add_up", prefix="AD", run_in="process")(in_process.add_up)
    manager.executor("end", prefix="EN", run_in="process", max_retries=1)(in_process.end)
    manager.executor("stand", prefix="SA", run_in="process", max_retries=0)(in_process.stand)
    manager.registry.register(in_process.Square())
    return manager


def test_parameters_progress_checkpoint_log_and_result_cross_over(world: World) -> None:
    manager = manager_of(world)
    squared = manager.create_job("square", {"x": 12})
    job = manager.wait(manager.create_job("add_up", {"upto": 10}).id, WAIT_S)
    assert (job.status, job.message) == ("completed", "45")
    assert job.result["pid"] != os.getpid() and job.result["checkpoint"] == {"total": 45} == job.checkpoint
    assert job.progress.done == job.progress.total == 10 and job.progress.unit == "numbers"
    assert [event.text for event in job.events()] == [
        "Job created", "Job queued", "Job started", "attempt 1", "Job completed: 45",
    ]  # fmt: skip
    assert not is_alive(job.result["pid"])
    assert manager.wait(squared.id, WAIT_S).message == "144"


@pytest.mark.parametrize(
    ("how", "status", "message", "runs"),
    [
        ("none", "completed", None, 1),
        ("skip", "skipped", "nothing there", 1),
        ("retry", "completed", "attempt 2, checkpoint None", 2),
        ("snooze", "completed", "attempt 2, checkpoint None", 2),
        ("raise", "completed", "attempt 2, checkpoint None", 2),
        ("permanent", "failed", "never", 1),
        ("exit", "failed", "the process of the job ended with exit code 7", 2),
        ("abort", "failed", "the process of the job was killed by signal 6 (SIGABRT), exit code -6", 1),
        ("object", "failed", "the result cannot be stored, it has no JSON form: "
         "Encoding objects of type object is unsupported", 1),
        ("number", "failed", "the executor returned int, expected Completed, Skipped, Retry, Snooze or None", 1),
        ("sql", "failed", "ctx.execute is not there in a process of a job's own; use run_in='thread', or return "
         "what is to be stored", 1),
        ("checkpoint", "failed", "the checkpoint of job '{id}' would take 210 bytes, at most 100 are allowed", 1),
    ],
)  # fmt: skip
def test_what_the_process_does_ends_the_attempt(
    world: World, how: str, status: str, message: str | None, runs: int
) -> None:
    manager = manager_of(world, checkpoint_bytes_max=100)
    job = manager.wait(manager.create_job("end", {"how": how}, max_retries=runs - 1).id, WAIT_S)
    assert (job.status, job.message) == (status, None if message is None else message.format(id=job.id))
    assert job.attempt == runs


def test_the_traceback_of_the_process_is_kept_and_names_its_line(world: World) -> None:
    manager = manager_of(world)
    job = manager.wait(manager.create_job("end", {"how": "raise"}, max_retries=0).id, WAIT_S)
    assert job.message == "ValueError: no good"
    assert 'raise ValueError("no good")' in job.exception_trace and "in_process.py" in job.exception_trace


def test_a_process_that_checks_ends_when_it_is_cancelled_or_takes_too_long(world: World) -> None:
    manager = manager_of(world, cancel_timeout_s=20.0)
    cancelled = manager.create_job("stand", {"checks": True})
    late = manager.create_job("stand", {"checks": True}, timeout_s=0.01)
    pid = pid_of(cancelled)
    assert manager.cancel_job(cancelled.id).status == "cancelled"
    until(lambda: not is_alive(pid))
    job = manager.wait(late.id, WAIT_S)
    assert (job.status, job.message) == ("failed", "the attempt took longer than its time-out of 0.01 s")


def test_a_process_that_never_checks_is_killed_after_the_grace_of_a_cancellation(world: World) -> None:
    manager = manager_of(world, cancel_timeout_s=0.1)
    job = manager.create_job("stand")
    pid = pid_of(job)
    assert manager.cancel_job(job.id).status == "cancelled"
    until(lambda: not is_alive(pid) and manager.runner.abandoned_threads == 0)


def test_a_process_that_never_checks_is_killed_after_its_time_out(world: World) -> None:
    manager = manager_of(world, cancel_timeout_s=0.1)
    job = manager.create_job("stand", timeout_s=0.5)
    pid = pid_of(job)
    assert manager.wait(job.id, WAIT_S).message == "the attempt took longer than its time-out of 0.5 s"
    until(lambda: not is_alive(pid) and manager.runner.abandoned_threads == 0)


def test_stopping_the_manager_kills_what_does_not_end(world: World) -> None:
    manager = manager_of(world, cancel_timeout_s=0.1)
    job = manager.create_job("stand")
    pid = pid_of(job)
    manager.stop(0.05)
    until(lambda: not is_alive(pid))
    assert manager.get_job(job.id).message == "Server restarted during execution"


def test_a_process_that_is_killed_from_outside_is_a_failed_attempt(world: World) -> None:
    manager = manager_of(world)
    job = manager.create_job("stand")
    os.kill(pid_of(job), signal.SIGKILL)
    ended = manager.wait(job.id, WAIT_S)
    assert ended.status == "failed"
    assert ended.message == "the process of the job was killed by signal 9 (SIGKILL), exit code -9"


def test_only_what_another_process_can_import_is_accepted(world: World) -> None:
    manager = world.manager()

    def inner(ctx: Any) -> None: ...

    def main(ctx: Any) -> None: ...

    main.__module__, main.__qualname__ = "__main__", "main"
    for function, said in ((inner, "not in a function"), (main, "not in the main program")):
        with pytest.raises(InvalidRequest, match=f"must stand at the top of a module that can be imported, {said}"):
            manager.executor("x", prefix="XX", run_in="process")(function)
    with pytest.raises(InvalidRequest, match="'x' is async; run_in='process' is for sync executors"):
        manager.executor("x", prefix="XX", run_in="process")(in_process.awaits)
    with pytest.raises(InvalidRequest, match="run_in 'cloud' is not one of thread, process"):
        manager.executor("x", prefix="XX", run_in="cloud")(in_process.end)
    assert not manager.registry.contains("x")


def test_a_module_that_cannot_be_imported_there_fails_the_job_at_once(world: World) -> None:
    manager = world.manager(start=1)

    def moved(ctx: Any) -> None: ...

    moved.__module__, moved.__qualname__ = "tests.jobs.in_process", "gone"
    manager.executor("moved", prefix="MO", run_in="process")(moved)
    job = manager.wait(manager.create_job("moved").id, WAIT_S)
    assert job.status == "failed" and job.attempt == 1
    assert job.message.startswith("'tests.jobs.in_process.gone' cannot be had in the process of the job: Attribute")


def test_threads_are_free_while_a_process_works(world: World) -> None:
    manager = manager_of(world, cancel_timeout_s=0.1)
    ran = threading.Event()
    manager.executor("here", prefix="HE")(lambda ctx: ran.set())
    busy = manager.create_job("stand")
    pid_of(busy)
    manager.create_job("here")
    assert ran.wait(WAIT_S)
    manager.cancel_job(busy.id)


ORPHAN = """
import os
import kalamdb
from tests.jobs import in_process
from tests.jobs.test_processes import pid_of

db = kalamdb.connect(":memory:")
db.jobs.executor("stand", prefix="SA", run_in="process")(in_process.stand)
print(pid_of(db.jobs.create_job("stand")), flush=True)
os._exit(9)
"""


def test_a_process_ends_when_that_of_the_database_dies() -> None:
    died = subprocess.run(
        [sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True, timeout=WAIT_S, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert died.returncode == 9
    until(lambda: not is_alive(int(died.stdout)))
