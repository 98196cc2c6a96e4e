"""Attempts in a process of their own, for work that would keep the other threads from the processor.

The thread of the attempt starts the process and serves it: what the executor does with its context comes
over a socket, one call at a time, and is done here under the lease. The other way, on the standard input,
comes why the attempt must stop; its end means that this process is gone, and the child ends too. The child
imports the executor by name and never the program that made the database.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Final

import msgspec

from kalamdb import errors
from kalamdb.errors import InvalidRequest, KalamDbError, LeaseLost, Unavailable
from kalamdb.jobs.context import JobContext, JobLog
from kalamdb.jobs.model import (
    EXPECTED_OUTCOMES,
    Completed,
    InterruptReason,
    JobInterrupted,
    Outcome,
    Permanent,
    ProcessFailure,
    Retry,
    Skipped,
    Snooze,
)

_START: Final = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from kalamdb.jobs.processes import child; child(int(sys.argv[2]))"
)
_OUTCOMES: Final = {kind.__name__: kind for kind in (Completed, Skipped, Retry, Snooze)}
_RAISED: Final = "raised"
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """What the child is told first."""

    module: str
    name: str
    """Of a function, or of a class of executors, in the module."""
    parameters: Any
    job_id: str
    attempt: int
    lease_id: int
    checkpoint: Any


class _Call(msgspec.Struct, frozen=True, array_like=True):
    """The child calls a method of the context, or says with `name` "end" what the attempt came to."""

    name: str
    arguments: list[Any]


class _Answer(msgspec.Struct, frozen=True, array_like=True):
    """What the call came to: nothing, or an error."""

    error: str | None = None
    """Name of a class of kalamdb.errors."""
    text: str = ""


def reference_to(target: Callable[..., Any] | type, job_type: str) -> tuple[str, str]:
    """(module, name) under which another process can import it. Raises InvalidRequest when it cannot."""
    module, name = str(getattr(target, "__module__", "")), str(getattr(target, "__qualname__", ""))
    if module in ("", "__main__") or not name or "<" in name:
        raise InvalidRequest(
            f"'{name or target}' of job type '{job_type}' cannot run in a process: it must stand at the top of a "
            f"module that can be imported, not in {'the main program' if module == '__main__' else 'a function'}; "
            "move it there or use run_in='thread'"
        )
    return module, name


# The side of the database


def run_in_process(
    context: JobContext[Any], reference: tuple[str, str], attach: Callable[[Callable[[], None]], None]
) -> Outcome:
    """Run one attempt in a child and return what it came to. Blocks. `attach` is given what kills the child.

    Raises ProcessFailure for what the executor raised and when the child died, JobInterrupted.
    """
    row = context.row
    start = Start(
        module=reference[0], name=reference[1], parameters=row.parameters, job_id=row.job_id, attempt=context.attempt,
        lease_id=context.lease_id, checkpoint=context.checkpoint_state,
    )  # fmt: skip
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-c", _START, json.dumps(sys.path), str(theirs.fileno())]
        # In a session of its own, so that Ctrl-C at the terminal is ours to answer.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, pass_fds=[theirs.fileno()], start_new_session=True, bufsize=0
        )
    try:
        attach(process.kill)
        context.on_interrupt = lambda reason: _tell(process, reason)
        if context.interrupt_reason is not None:
            _tell(process, context.interrupt_reason)
        with Connection(ours.detach()) as connection:
            connection.send_bytes(_encode(start))
            return _serve(context, connection)
    except (EOFError, OSError):
        raise ProcessFailure(_how_it_died(process.wait())) from None
    finally:
        context.on_interrupt = None
        process.kill()
        process.wait()
        assert process.stdin is not None
        with suppress(OSError):
            process.stdin.close()


def _tell(process: subprocess.Popen[bytes], reason: InterruptReason) -> None:
    assert process.stdin is not None
    with suppress(OSError, ValueError):
        process.stdin.write(f"{reason.value}\n".encode())


def _how_it_died(code: int) -> str:
    if code >= 0:
        return f"the process of the job ended with exit code {code}"
    try:
        name = f" ({signal.Signals(-code).name})"
    except ValueError:
        name = ""
    return f"the process of the job was killed by signal {-code}{name}, exit code {code}"


def _serve(context: JobContext[Any], connection: Connection) -> Outcome:
    calls: Mapping[str, Callable[..., None]] = {
        "progress": context.progress,
        "checkpoint": context.checkpoint,
        "write_event": context.write_event,
    }
    while True:
        call = msgspec.msgpack.decode(connection.recv_bytes(), type=_Call)
        if call.name == "end":
            return _end(*call.arguments)
        try:
            calls[call.name](*call.arguments)
            answer = _Answer()
        except KalamDbError as exc:
            answer = _Answer(type(exc).__name__, str(exc))
        connection.send_bytes(_encode(answer))


def _end(kind: str, *fields: Any) -> Outcome:
    if kind == "None":
        return None
    if kind in _OUTCOMES:
        outcome: Outcome = _OUTCOMES[kind](*fields)
        return outcome
    if kind == JobInterrupted.__name__:
        raise JobInterrupted(InterruptReason(fields[0]))
    text, trace, is_permanent = fields
    raise ProcessFailure(text, trace, is_permanent=is_permanent)


# The side of the child


class ProcessContext:
    """What the executor holds in the child: a JobContext without the database."""

    params: Any

    def __init__(self, start: Start, connection: Connection) -> None:
        self.job_id = start.job_id
        self.attempt = start.attempt
        self.lease_id = start.lease_id
        self.checkpoint_state = start.checkpoint
        self._connection = connection
        self._lock = threading.Lock()
        self._interrupt: InterruptReason | None = None

    @property
    def log(self) -> JobLog:
        """Writes lines into the job's history."""
        return JobLog(self)

    @property
    def cancelled(self) -> bool:
        """Whether the attempt was asked to stop."""
        return self._interrupt is not None

    @property
    def interrupt_reason(self) -> InterruptReason | None:
        """Why the attempt was asked to stop."""
        return self._interrupt

    def check(self) -> None:
        """Raise JobInterrupted when the attempt must stop."""
        if self._interrupt is not None:
            raise JobInterrupted(self._interrupt)

    def progress(self, done: int, total: int | None = None, unit: str = "", text: str = "") -> None:
        """See JobContext."""
        self._call("progress", int(done), None if total is None else int(total), str(unit), str(text))

    def checkpoint(self, state: Any) -> None:
        """See JobContext."""
        self._call("checkpoint", state)
        self.checkpoint_state = state

    def write_event(self, level: str, text: str) -> None:
        """See JobContext."""
        self._call("write_event", level, str(text))

    def _call(self, name: str, *arguments: Any) -> None:
        try:
            message = _encode(_Call(name, list(arguments)))
        except (TypeError, ValueError, OverflowError) as exc:
            raise InvalidRequest(f"what is given to {name} cannot be stored, it has no JSON form: {exc}") from exc
        with self._lock:
            self._connection.send_bytes(message)
            answer = msgspec.msgpack.decode(self._connection.recv_bytes(), type=_Answer)
        if answer.error is not None:
            kind: type[KalamDbError] = getattr(errors, answer.error, LeaseLost)
            raise kind(answer.text)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(JobContext, name):
            raise AttributeError(name)
        raise Unavailable(
            f"ctx.{name} is not there in a process of a job's own; use run_in='thread', or return what is to be stored"
        )

    def follow(self) -> None:
        """Take in why the attempt must stop, from the standard input; its end ends this process."""
        for line in sys.stdin.buffer:
            self._interrupt = self._interrupt or InterruptReason(line.decode().strip())
        os._exit(1)


def child(handle: int) -> None:
    """The whole life of a child: read what to run, run it, say what it came to."""
    with Connection(handle) as connection:
        start = msgspec.msgpack.decode(connection.recv_bytes(), type=Start)
        context = ProcessContext(start, connection)
        threading.Thread(target=context.follow, name="kalamdb-job-follow", daemon=True).start()
        end = _attempt(start, context)
        try:
            message = _encode(_Call("end", end))
        except (TypeError, ValueError, OverflowError) as exc:
            text = f"the result cannot be stored, it has no JSON form: {exc}"
            message = _encode(_Call("end", [_RAISED, text, None, True]))
        connection.send_bytes(message)


def _attempt(start: Start, context: ProcessContext) -> list[Any]:
    try:
        execute, context.params = _resolved(start)
    except BaseException as exc:
        text = f"'{start.module}.{start.name}' cannot be had in the process of the job: {type(exc).__name__}: {exc}"
        return [_RAISED, text, _trace(exc), True]
    try:
        return _said(execute(context))
    except JobInterrupted as exc:
        return [JobInterrupted.__name__, exc.reason.value]
    except BaseException as exc:
        is_bare = isinstance(exc, (KalamDbError, Permanent))
        text = str(exc) if is_bare else f"{type(exc).__name__}: {exc}"
        return [_RAISED, text, _trace(exc), isinstance(exc, Permanent)]


def _resolved(start: Start) -> tuple[Callable[[Any], Any], Any]:
    # Here, because a registry knows this module.
    from kalamdb.jobs.registry import JobExecutor, executor_of

    target: Any = importlib.import_module(start.module)
    for part in start.name.split("."):
        target = getattr(target, part)
    executor: JobExecutor[Any] = target() if isinstance(target, type) else executor_of(target, "child", prefix="CH")
    return executor.execute, executor.decode(start.parameters)


def _said(outcome: Any) -> list[Any]:
    match outcome:
        case None:
            return ["None"]
        case Completed(message, result):
            return ["Completed", None if message is None else str(message), result]
        case Skipped(message):
            return ["Skipped", str(message)]
        case Retry(after_s, reason):
            return ["Retry", after_s, str(reason)]
        case Snooze(after_s):
            return ["Snooze", after_s]
        case _:
            text = f"the executor returned {type(outcome).__name__}, expected {EXPECTED_OUTCOMES}"
            return [_RAISED, text, None, True]


def _trace(exc: BaseException) -> str:
    return "".join(traceback.format_exception(exc))
