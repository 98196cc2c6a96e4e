"""Real processes on one directory: who holds it, who takes it over, what becomes of calls in flight."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import kalamdb
from kalamdb.sharing import SharedDatabase
from tests.sharing.conftest import HOLDER, QUIET, Child, Spawn

pytestmark = pytest.mark.timeout(180)
"""Processes that start together on a busy machine take their time."""
WORKERS = 4
TABLE = "CREATE SHARED TABLE IF NOT EXISTS t (id INT PRIMARY KEY, worker INT)"
WORKER = f"""
number = int(sys.argv[2])
wait()
with connect(path, share=True) as db:
    db.execute("{TABLE}")
    for at in range(25):
        key = number * 1000 + at
        db.execute("INSERT INTO t VALUES ($1, $2)", [key, number])
        assert db.execute("SELECT worker FROM t WHERE id = $1", [key]).scalar() == number
    with db.transaction() as tx:
        tx.insert("t", [(number * 1000 + 500, number)])
    say("holder" if db.is_holder else "attached")
    wait()
    assert db.execute("SELECT count(*) FROM t").scalar() == 4 * 26
    say("seen")
    wait()
"""
WRITER = """
number = int(sys.argv[2])
db = connect(path, share=True)
say("holder" if db.is_holder else "attached")
wait()
ended = threading.Event()
threading.Thread(target=lambda: (wait(), ended.set()), daemon=True).start()
lost, at = 0, 0
while not ended.is_set():
    at += 1
    key = number * 1000000 + at
    try:
        db.execute("INSERT INTO t VALUES ($1, $2)", [key, number])
        say("ack", key)
    except kalamdb.Unavailable as exc:
        assert "the outcome is unknown" in str(exc), exc
        lost += 1
        say("lost", key)
while True:
    try:
        db.execute("INSERT INTO t VALUES ($1, $2) ON CONFLICT (id) DO NOTHING", [number, number])
        break
    except kalamdb.Unavailable:
        pass
say("end", "holder" if db.is_holder else "attached", lost)
db.close()
"""


def test_four_processes_that_start_at_once_share_the_directory(tmp_path: Path, spawn: Spawn) -> None:
    workers = [spawn(WORKER, tmp_path / "data", str(number)) for number in range(WORKERS)]
    for worker in workers:
        worker.tell()
    assert sorted(worker.line() for worker in workers) == ["attached"] * 3 + ["holder"]
    for worker in workers:
        worker.tell()
    assert [worker.line() for worker in workers] == ["seen"] * WORKERS
    for worker in workers:
        worker.end()
    with kalamdb.connect(tmp_path / "data", **QUIET) as db:
        assert db.execute("SELECT worker, count(*) FROM t GROUP BY worker ORDER BY worker").rows == [
            (number, 26) for number in range(WORKERS)
        ]
        assert db.check().ok
    assert not (tmp_path / "data" / "kalamdb.sock").exists()


def until(child: Child, word: str) -> list[list[str]]:
    """What a child says up to a line that begins with `word`, that one included."""
    said = [child.line().split()]
    while said[-1][0] != word:
        said.append(child.line().split())
    return said


@pytest.mark.parametrize("end", ["SIGKILL", "close"])
def test_a_holder_that_ends_under_load_loses_no_acknowledged_write(tmp_path: Path, spawn: Spawn, end: str) -> None:
    first = spawn(HOLDER, tmp_path / "data")
    assert first.line() == "holds"
    with kalamdb.connect(tmp_path / "data", **QUIET) as db:
        db.execute(TABLE)
    writers = [spawn(WRITER, tmp_path / "data", str(number)) for number in (1, 2, 3)]
    assert [writer.line() for writer in writers] == ["attached"] * 3
    for writer in writers:
        writer.tell()
    acknowledged, doubtful = set[int](), set[int]()

    def note(said: list[list[str]]) -> None:
        acknowledged.update(int(words[1]) for words in said if words[0] == "ack")
        doubtful.update(int(words[1]) for words in said if words[0] == "lost")

    for writer in writers:
        note([writer.line().split() for _ in range(30)])
    if end == "SIGKILL":
        first.kill()
    else:
        first.end()
    for writer in writers:
        note([writer.line().split() for _ in range(60)])
    ends = []
    for writer in writers:
        writer.tell()
        said = until(writer, "end")
        note(said[:-1])
        ends.append(said[-1])
        if said[-1][1] == "attached":
            writer.end()
    assert sorted(words[1] for words in ends).count("holder") >= 1
    if end == "SIGKILL":
        assert sum(int(words[2]) for words in ends) <= 6
    for writer in writers:
        if writer.process.poll() is None:
            writer.end()
    with kalamdb.connect(tmp_path / "data", **QUIET) as db:
        stored = {key for (key,) in db.execute("SELECT id FROM t").rows}
        # Each writer ends with a row of its number, written when the first holder was gone.
        assert acknowledged | {1, 2, 3} <= stored <= acknowledged | doubtful | {1, 2, 3}
        assert db.check().ok


def test_a_directory_that_is_not_shared_names_its_holder_and_both_remedies(tmp_path: Path, spawn: Spawn) -> None:
    child = spawn("db = connect(path)\nsay('open')\nwait()\ndb.close()\n", tmp_path / "data")
    assert child.line() == "open"
    for share in (False, True):
        with pytest.raises(kalamdb.DirectoryLocked, match=r"share=True or by `kalamdb serve`") as refused:
            kalamdb.connect(tmp_path / "data", share=share)
        assert refused.value.pid == child.pid and f"process {child.pid}" in str(refused.value)
    child.end()
    kalamdb.connect(tmp_path / "data", share=True).close()


def test_a_stopped_holder_is_named_after_the_wait_and_in_time_outs(tmp_path: Path, spawn: Spawn) -> None:
    child = spawn(HOLDER, tmp_path / "data")
    assert child.line() == "holds"
    with kalamdb.connect(tmp_path / "data") as db:
        child.process.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(kalamdb.Timeout, match=f"process {child.pid}, which holds .* the outcome is unknown"):
                db.execute("SELECT 1", timeout_s=0.1)
            with pytest.raises(kalamdb.DirectoryLocked, match="did not answer within 0 s") as refused:
                kalamdb.connect(tmp_path / "data", attach_timeout_s=0)
            assert refused.value.pid == child.pid
        finally:
            child.process.send_signal(signal.SIGCONT)
        assert db.execute("SELECT 1").scalar() == 1
    child.end()


def test_who_does_not_share_waits_for_another_to_take_over(tmp_path: Path, spawn: Spawn) -> None:
    first = spawn(HOLDER, tmp_path / "data")
    assert first.line() == "holds"
    with kalamdb.connect(tmp_path / "data", attach_timeout_s=0.2) as db:
        db.execute(TABLE)
        first.kill()
        with pytest.raises(kalamdb.Unavailable, match="none took it over within 0.2 s"):
            db.execute("SELECT 1")
        second = spawn(HOLDER, tmp_path / "data")
        assert second.line() == "holds"
        assert db.execute("SELECT count(*) FROM t").scalar() == 0
        assert not db.is_holder
        second.end()


def test_who_takes_over_runs_the_jobs_and_the_job_manager_in_hand_goes_on(tmp_path: Path, spawn: Spawn) -> None:
    first = spawn(HOLDER, tmp_path / "data")
    assert first.line() == "holds"
    with kalamdb.connect(tmp_path / "data", share=True, **QUIET) as db:
        jobs = db.jobs
        job = jobs.create_job("later", {"n": 1}, allow_unknown=True)
        with pytest.raises(kalamdb.InvalidRequest, match=f"only in process {first.pid}, which holds"):
            jobs.executor("later", prefix="LA")
        with pytest.raises(kalamdb.InvalidRequest, match="is attached to it"):
            jobs.registry.register(object())  # type: ignore[arg-type]
        with pytest.raises(kalamdb.InvalidRequest, match="is attached to it"):
            _ = db.context
        first.kill()
        assert [event.text for event in job.events()][0] == "Job created"
        assert db.is_holder
        jobs.executor("later", prefix="LA")(lambda ctx: kalamdb.jobs.Completed("done"))
        assert jobs.wait(job.id, timeout_s=20).message == "done"
        assert db.context.job_manager is db.jobs
    assert not (tmp_path / "data" / "kalamdb.sock").exists()


def test_a_transaction_ends_with_the_holder(tmp_path: Path, spawn: Spawn) -> None:
    first = spawn(HOLDER, tmp_path / "data")
    assert first.line() == "holds"
    with kalamdb.connect(tmp_path / "data", share=True, **QUIET) as db:
        db.execute(TABLE)
        with pytest.raises(kalamdb.Unavailable):
            with db.transaction() as tx:
                tx.execute("INSERT INTO t VALUES (1, 1)")
                first.kill()
                with pytest.raises(kalamdb.Unavailable):
                    tx.execute("INSERT INTO t VALUES (2, 1)")
                with pytest.raises(kalamdb.Unavailable, match="rolled back"):
                    tx.execute("INSERT INTO t VALUES (3, 1)")
        assert db.execute("SELECT count(*) FROM t").scalar() == 0


def test_a_transaction_ends_with_the_attached_process(tmp_path: Path, spawn: Spawn) -> None:
    script = """
db = connect(path)
with db.transaction() as tx:
    tx.execute("INSERT INTO t VALUES (1, 1)")
    say("open")
    wait()
"""
    with kalamdb.connect(tmp_path / "data", share=True, **QUIET) as db:
        db.execute(TABLE)
        child = spawn(script, tmp_path / "data")
        assert child.line() == "open"
        assert len(db.context.session.open_transactions()) == 1
        child.kill()
        wait_until(lambda: not db.context.session.open_transactions())
        assert db.execute("SELECT count(*) FROM t").scalar() == 0


def wait_until(holds: Callable[[], bool]) -> None:
    """Look until it holds, for ten seconds: another process's death is told by the system, not by us."""
    for _ in range(1000):
        if holds():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it does not come to hold")


def test_ctrl_c_in_an_attached_process_ends_the_call_in_the_holder(tmp_path: Path, spawn: Spawn) -> None:
    script = """
db = connect(path)
db.execute("SELECT 1")
say("ready")
try:
    many = "SELECT a.value + b.value FROM generate_series(1, 1000000) a, generate_series(1, 1000) b"
    with db.stream(many) as batches:
        for batch in batches:
            say("batch")
except KeyboardInterrupt:
    say("interrupted", db.execute("SELECT 1").scalar())
try:
    db.jobs.wait(sys.argv[2])
except KeyboardInterrupt:
    say("interrupted", db.execute("SELECT 2").scalar())
db.close()
"""
    with kalamdb.connect(tmp_path / "data", share=True, **QUIET) as db:
        job = db.jobs.create_job("later", allow_unknown=True)
        child = spawn(script, tmp_path / "data", job.id)
        assert child.line() == "ready"
        assert child.line() == "batch"
        child.interrupt()
        said = until(child, "interrupted")
        assert said[-1] == ["interrupted", "1"]
        wait_until(lambda: calls_of(db) >= 1)
        child.interrupt()
        assert until(child, "interrupted")[-1] == ["interrupted", "2"]
        child.end()
        wait_until(lambda: calls_of(db) == 0)
        assert db.execute("SELECT 1").scalar() == 1


def calls_of(db: kalamdb.Database) -> int:
    """Connections that a holder serves."""
    assert isinstance(db, SharedDatabase)
    return db.connections


def test_what_was_opened_before_a_fork_is_closed_in_the_child(tmp_path: Path, spawn: Spawn) -> None:
    script = """
db = connect(path, share=True)
other = connect(path)
def child(databases):
    for one in databases:
        try:
            one.execute("SELECT 1")
            return 1
        except kalamdb.Closed as exc:
            assert "before fork()" in str(exc)
        one.close()
    with connect(path, share=True) as own:
        assert not own.is_holder
        assert own.execute("SELECT 41 + 1").scalar() == 42
    return 0
pid = os.fork()
if pid == 0:
    os._exit(child([db, other]))
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert db.execute("SELECT 1").scalar() == other.execute("SELECT 1").scalar() == 1
pid = os.fork()
if pid == 0:
    say("forked", os.getpid())
    wait()
    os._exit(0)
say("up")
wait()
"""
    child = spawn(script, tmp_path / "data")
    said = sorted([child.line(), child.line()])
    grandchild = int(said[0].split()[1])
    try:
        with kalamdb.connect(tmp_path / "data", share=True, **QUIET) as db:
            assert not db.is_holder
            child.process.kill()
            child.process.wait(20)
            # The child of the dead holder lives on and keeps neither its lock nor its connections.
            assert db.execute("SELECT 1").scalar() == 1
            assert db.is_holder
    finally:
        os.kill(grandchild, signal.SIGKILL)
