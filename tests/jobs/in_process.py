"""Executors that run in processes of their own: what such a process can import."""

from __future__ import annotations

import os
import threading
from typing import Any

import msgspec

from kalamdb.jobs import Completed, JobContext, JobExecutor, Permanent, Retry, Skipped, Snooze
from kalamdb.jobs.model import Outcome, RunIn


class Sum(msgspec.Struct):
    """Parameters of `add_up`."""

    upto: int
    step: int = 1


def add_up(ctx: JobContext[Sum]) -> Completed:
    params = ctx.params
    numbers = range(0, params.upto, params.step)
    total = sum(numbers)
    ctx.progress(len(numbers), len(numbers), "numbers")
    ctx.log.info(f"attempt {ctx.attempt}")
    ctx.checkpoint({"total": total})
    return Completed(f"{total}", {"pid": os.getpid(), "checkpoint": ctx.checkpoint_state})


def end(ctx: JobContext[dict[str, Any]]) -> Outcome | Any:
    match ctx.params["how"]:
        case "none":
            return None
        case "skip":
            return Skipped("nothing there")
        case "retry" if ctx.attempt == 1:
            return Retry(0.0, "once more")
        case "snooze" if ctx.attempt == 1:
            return Snooze(0.0)
        case "raise" if ctx.attempt == 1:
            raise ValueError("no good")
        case "permanent":
            raise Permanent("never")
        case "exit":
            os._exit(7)
        case "abort":
            os.abort()
        case "object":
            return Completed("x", object())
        case "number":
            return 17
        case "sql":
            ctx.execute("SELECT 1")
        case "checkpoint":
            ctx.checkpoint({"big": "x" * 200})
    return Completed(f"attempt {ctx.attempt}, checkpoint {ctx.checkpoint_state}")


def stand(ctx: JobContext[dict[str, Any]]) -> None:
    """Says its pid, then works on until it is told to stop, or for ever."""
    ctx.log.info(f"pid {os.getpid()}")
    pause = threading.Event()
    while True:
        pause.wait(0.005)
        if ctx.params.get("checks"):
            ctx.check()


class Square(JobExecutor[dict[str, Any]]):
    """A class."""

    job_type = "square"
    prefix = "SQ"
    run_in = RunIn.PROCESS

    def execute(self, ctx: JobContext[dict[str, Any]]) -> Completed:
        return Completed(str(ctx.params["x"] ** 2))


async def awaits(ctx: JobContext[dict[str, Any]]) -> None:
    """Async executors share one loop and cannot have a process."""
