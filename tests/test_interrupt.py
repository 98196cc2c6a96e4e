"""Ctrl-C in the middle of calls: the call may or may not have happened, the database goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

INTERRUPTS = 60
CHILD = """
import os, signal, sys, threading
import kalamdb

path, interrupts = sys.argv[1], int(sys.argv[2])
quiet = {"flush.scheduler_enabled": False, "compaction.enabled": False, "storage.durability": "os"}
known, doubtful = {}, {}
stopped = threading.Event()
caught = turn = 0

def interrupt():
    for number in range(interrupts):
        if stopped.wait((number * 37 % 20 + 1) / 1000):
            return
        os.kill(os.getpid(), signal.SIGINT)

with kalamdb.connect(path, **quiet) as db:
    db.execute("CREATE SHARED TABLE t (id INT PRIMARY KEY, v INT)")
    db.execute("SELECT v FROM t")
    thread = threading.Thread(target=interrupt)
    try:
        thread.start()
        while thread.is_alive():
            turn += 1
            key, value = turn % 40, turn
            try:
                if turn % 7 == 0:
                    db.insert("t", [{"id": key, "v": value}], on_conflict="update")
                elif turn % 11 == 0:
                    assert len(db.execute("SELECT v FROM t").rows) <= 40
                    continue
                else:
                    sql = "INSERT INTO t VALUES ($1, $2) ON CONFLICT (id) DO UPDATE SET v = excluded.v"
                    db.execute(sql, [key, value])
                known[key] = value
                doubtful.pop(key, None)
            except KeyboardInterrupt:
                caught += 1
                doubtful.setdefault(key, {known.get(key)}).add(value)
    except KeyboardInterrupt:
        caught += 1
    finally:
        stopped.set()
        thread.join()
    rows = dict(db.execute("SELECT id, v FROM t").rows)
    for key in known.keys() | doubtful.keys():
        assert rows.get(key) in doubtful.get(key, {known.get(key)}), (key, rows.get(key), known, doubtful)
    db.execute("INSERT INTO t VALUES (1000, 1)")
    job = db.execute("STORAGE FLUSH TABLE t").message.rsplit(" ", 1)[1]
    assert db.jobs.wait(job, timeout_s=30).status == "completed"
    after = dict(db.execute("SELECT id, v FROM t").rows)
    assert after == {**rows, 1000: 1}
    assert db.check().ok
with kalamdb.connect(path, **quiet) as db:
    assert dict(db.execute("SELECT id, v FROM t").rows) == after
assert caught > 5
print(f"{turn} calls, {caught} of {interrupts} interrupts")
"""


def test_ctrl_c_during_calls_leaves_the_database_usable(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "data"), str(INTERRUPTS)],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr
