"""Sensors: readings in a stream that forgets, averages in a table that keeps.

A STREAM table holds the readings of each device for some seconds; a job on a schedule writes averages into a
table before they are gone. Eviction is a job too: one range delete per bucket, however many rows it has.

    python examples/iot_stream.py [directory]
"""

from __future__ import annotations

import math
import sys
import threading
from pathlib import Path

import kalamdb
from kalamdb.jobs import Every, JobContext

DEVICES = [f"sensor-{n}" for n in range(1, 6)]
SCHEMA = """
CREATE STREAM TABLE IF NOT EXISTS readings (n INT, celsius DOUBLE) WITH (TTL_SECONDS = {ttl_s});
CREATE USER TABLE IF NOT EXISTS averages (id BIGINT PRIMARY KEY AUTO_INCREMENT, readings INT, celsius DOUBLE);
"""


def register(db: kalamdb.Database, every_s: float) -> None:
    """The job that keeps what the stream will forget."""

    @db.jobs.executor("average", prefix="AV", schedule=Every(every_s))
    def average(ctx: JobContext[dict]) -> None:
        # The averages of all devices and the end of the job are one commit.
        with ctx.transaction(complete=f"averages of {len(DEVICES)} devices") as tx:
            for device in DEVICES:
                ctx.check()
                count, celsius = ctx.execute("SELECT count(*), avg(celsius) FROM readings", user=device).rows[0]
                if count:
                    row = {"readings": count, "celsius": round(celsius, 2)}
                    tx.insert("averages", [{"device": device, **row}], user_column="device")


def main(directory: Path, ttl_s: int = 3, seconds: float = 4.0, every_s: float = 1.0) -> tuple[int, int]:
    """Let sensors send for some seconds; (averages kept, readings left when the stream has forgotten)."""
    pause = threading.Event()
    with kalamdb.connect(directory) as db:
        db.execute(SCHEMA.format(ttl_s=ttl_s))
        register(db, every_s)
        for n in range(int(seconds / 0.05)):
            rows = [{"device": d, "n": n, "celsius": 20 + math.sin(n / 9 + at)} for at, d in enumerate(DEVICES)]
            db.insert("readings", rows, user_column="device")  # one commit for all devices
            pause.wait(0.05)
        device = DEVICES[0]
        now = db.execute("SELECT count(*), round(avg(celsius), 2) FROM readings", user=device).rows[0]
        print(f"{device} has {now[0]} readings of the last {ttl_s} s, {now[1]} degrees on average")

        pause.wait(ttl_s + 0.5)
        evicted = db.jobs.wait(db.jobs.create_job("stream_eviction").id, timeout_s=30)
        print(f"{evicted.id} {evicted.status}: {evicted.message}")
        left = db.execute("SELECT count(*) FROM readings", user=device).scalar()
        kept = db.execute("SELECT readings, celsius FROM averages ORDER BY id", user=device).rows
        print(f"{left} readings are left, {len(kept)} averages are kept: {kept[:3]} ...")
        return len(kept), left


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "iot-data"))
