"""A queue only: no table, no SQL. A shop sends mails and confirms payments outside of its request.

Jobs are on the disk before `create_job` returns. Kill the program at any moment and start it again: what was
accepted is done, and no order is confirmed by two jobs at once.

    python examples/work_queue.py [directory]
"""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path

import kalamdb
from kalamdb.jobs import Completed, JobContext, Permanent, RetryPolicy

ORDERS = 30
ADDRESSES = {5: "nobody", 11: ""}
"""What a few customers typed."""


def register(db: kalamdb.Database) -> None:
    """The two kinds of work. An executor is registered at each start, before or after its jobs exist."""

    @db.jobs.executor("mail", prefix="ML", queue="mail", retry=RetryPolicy(base_ms=20))
    def mail(ctx: JobContext[dict]) -> Completed:
        if "@" not in ctx.params["to"]:
            raise Permanent(f"'{ctx.params['to']}' is no address")  # trying again would not help
        if ctx.params["order"] % 10 == 0 and ctx.attempt == 1:
            raise ConnectionError("the mail server hung up")  # trying again will
        return Completed(f"mailed {ctx.params['to']}")

    @db.jobs.executor("payment", prefix="PA", priority=10)
    def payment(ctx: JobContext[dict]) -> Completed:
        # The next step is created under the lease of this one: never twice, whatever dies in between.
        order = ctx.params["order"]
        to = ADDRESSES.get(order, f"customer{order}@example.org")
        ctx.create_job("mail", {"order": order, "to": to}, f"mail:{order}", on_conflict="return")
        return Completed(f"order {order} is paid")


def main(directory: Path) -> dict[str, int]:
    """Take orders, wait until everything is done; how many jobs ended in which state."""
    with kalamdb.connect(directory) as db:
        register(db)
        db.jobs.limit_queue("mail", 2)  # the mail server allows two connections

        jobs = [{"job_type": "payment", "params": {"order": n}, "idempotency_key": f"pay:{n}"} for n in range(ORDERS)]
        created = db.jobs.create_jobs(jobs)  # one commit for all
        print(f"{len(created)} orders accepted")
        while active := db.jobs.list_jobs(status=["new", "queued", "running", "retrying"]):
            db.jobs.wait(active[0].id)

        for job in db.jobs.list_jobs(status="failed"):
            print(f"{job.id} failed: {job.message}")
        for job in (job for job in db.jobs.list_jobs(job_type="mail") if job.retry_count):
            print(f"{job.id} {job.message}, attempt {job.attempt}")

        later = datetime.fromisoformat("2100-01-01T00:00:00Z")
        reminder = db.jobs.create_job("mail", {"order": 7, "to": "me@example.org"}, run_at=later)
        print(f"{reminder.id} waits: {db.jobs.explain_job(reminder.id)[0].detail}")
        db.jobs.cancel_job(reminder.id)

        counts: dict[str, int] = {}
        for job in db.jobs.list_jobs(limit=None):
            counts[job.status.value] = counts.get(job.status.value, 0) + 1
        print(counts)
        return counts


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "queue-data"))
