"""Backups that run by themselves: a schedule takes one every night, prunes old ones, and a restore proves them.

python examples/nightly_backup.py [directory]
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path

import kalamdb


def run_nightly(db: kalamdb.Database) -> None:
    """What happens at half past two, now."""
    job_id = (db.execute("RUN SCHEDULE nightly").message or "").rsplit(" ", 1)[1]
    job = db.jobs.wait(job_id, timeout_s=60)
    if job.status != "completed":
        raise SystemExit(f"the backup failed: {job.message}")
    print(f"{job.id} {job.message}")


def main(directory: Path) -> list[str]:
    """Set up the schedule, take two backups, restore the newest; the notes in the restored database."""
    live, target, copy = directory / "live", directory / "backups", directory / "restored"
    with kalamdb.connect(live) as db:
        db.execute("CREATE USER TABLE IF NOT EXISTS notes (id INT PRIMARY KEY, text TEXT)")
        db.insert("notes", [(n, f"note {n}") for n in range(3)], user="anna", on_conflict="ignore")

        # Unchanged files are shared with the backup before; a week of days and a month of weeks are kept.
        wanted = {"path": str(target.resolve()), "incremental": True, "keep_daily": 7, "keep_weekly": 4}
        db.execute(
            "CREATE SCHEDULE IF NOT EXISTS nightly FOR JOB backup WITH PARAMETERS $1 "
            "CRON '30 2 * * *' TIME ZONE 'Europe/Berlin'",
            [json.dumps(wanted)],
        )
        for moment in db.context.schedules.next_times("nightly", 2):
            print(f"a backup is due at {datetime.fromtimestamp(moment / 1000, UTC):%Y-%m-%d %H:%M} UTC")

        run_nightly(db)
        db.execute("INSERT INTO notes VALUES (100, 'written by day') ON CONFLICT DO NOTHING", user="anna")
        run_nightly(db)  # the newest of a day stays, so the first one of today goes
        db.execute("DELETE FROM notes WHERE true", user="anna")  # a mistake

        for backup in db.execute(f"SHOW BACKUPS IN '{target}'").dicts():
            print(f"{backup['backup_id']}: {backup['kind']}, {backup['size_bytes']:,} bytes, {backup['status']}")
        print(db.execute(f"VERIFY BACKUP '{target}'").message)

    # A restore into another directory needs no open database, and leaves the live one alone.
    kalamdb.restore(target, copy, overwrite=True)
    with kalamdb.connect(copy) as db:
        notes = [text for (text,) in db.execute("SELECT text FROM notes ORDER BY id", user="anna")]
        report = db.check()
    print(f"restored: {notes}; {'sound' if report.ok else report.problems}")
    return notes


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "backup-data"))
