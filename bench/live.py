"""Live queries: what they cost a writer, and how long a change takes to its subscribers."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median, quantiles

import kalamdb
from bench.harness import Figure
from bench.scans import QUIET
from kalamdb.database import Database
from kalamdb.live import Change, LiveCode, LiveRequest, LiveSubscription
from kalamdb.sql.caller import Caller
from kalamdb.types import Role

SINKS = 100
"""As many sockets a server would have."""
ROUNDS = 5


class Socket:
    """Counts what it gets and when."""

    def __init__(self) -> None:
        self.left = 0
        self.at_s = 0.0
        self.done = threading.Event()

    def expect(self, changes: int) -> None:
        """Be done after so many changes."""
        self.left = changes
        self.done.clear()

    def deliver(self, changes: Sequence[tuple[LiveSubscription, Change]]) -> None:
        """See LiveSink."""
        self.left -= len(changes)
        if self.left == 0:
            self.at_s = time.perf_counter()
            self.done.set()

    def behind(self, subscription: LiveSubscription) -> None:
        """See LiveSink."""

    def ended(self, subscription: LiveSubscription, code: LiveCode, message: str) -> None:
        """See LiveSink."""


class _Bench:
    def __init__(self, db: Database) -> None:
        self._db = db
        self._next = 0
        self.committed_s = 0.0
        self._caller = Caller("root", Role.SYSTEM, "b")
        db.context.backend.observe(lambda batch, commit: self._stamp())

    def _stamp(self) -> None:
        self.committed_s = time.perf_counter()

    def insert(self) -> None:
        self._next += 1
        self._db.execute("INSERT INTO b.t VALUES ($1, 1, 'abc')", [self._next])

    def cpu_us(self, count: int) -> float:
        """Processor time of one insert, all threads."""
        began_s = time.process_time()
        for _ in range(count):
            self.insert()
        return (time.process_time() - began_s) / count * 1e6

    def subscribe(self, sql: str, sink: Socket) -> LiveSubscription:
        found = self._db.context.live.subscribe(LiveRequest(sql), self._caller, sink)
        found.go_live()
        return found

    def latencies_ms(self, sinks: Sequence[Socket], each: int, count: int) -> list[float]:
        """From the commit to the last sink."""
        found = []
        for _ in range(count):
            for sink in sinks:
                sink.expect(each)
            self.insert()
            for sink in sinks:
                assert sink.done.wait(10)
            found.append((max(sink.at_s for sink in sinks) - self.committed_s) * 1000)
        return found


def live(durability: str, *, inserts: int, changes: int) -> Iterator[Figure]:
    """Cost of inserts beside subscriptions, and latencies of 1, 100 and 1,000 that match."""
    settings = {**QUIET, "storage.durability": durability}
    note = f"durability {durability}"
    with tempfile.TemporaryDirectory() as folder, kalamdb.connect(Path(folder) / "ours", **settings) as db:
        db.execute("CREATE NAMESPACE b; CREATE SHARED TABLE b.t (id INT PRIMARY KEY, v INT, s TEXT)")
        db.execute("CREATE SHARED TABLE b.other (id INT PRIMARY KEY)")
        bench = _Bench(db)
        bench.cpu_us(inserts)
        alone, beside, watched = [], [], []
        for _ in range(ROUNDS):
            alone.append(bench.cpu_us(inserts))
            other = bench.subscribe("SELECT * FROM b.other", Socket())
            beside.append(bench.cpu_us(inserts))
            own = bench.subscribe("SELECT * FROM b.t", Socket())
            watched.append(bench.cpu_us(inserts))
            other.close()
            own.close()
        plain = f"{median(alone):,.0f} µs"
        for name, found in (("another table", beside), ("the table", watched)):
            ratio = median(found) / median(alone)
            yield Figure(f"insert, one subscription of {name}", f"{median(found):,.0f} µs CPU", plain, ratio, note)
        for count, where in ((1, "v >= 0"), (100, "v >= 0"), (1000, "v >= 0"), (1000, "v >= -{}")):
            sinks = [Socket() for _ in range(min(count, SINKS))]
            made = [
                bench.subscribe(f"SELECT * FROM b.t WHERE {where.format(number)}", sinks[number % len(sinks)])
                for number in range(count)
            ]
            ms = bench.latencies_ms(sinks, count // len(sinks), changes)
            kind = "equal" if where == "v >= 0" else "different"
            said = f"p50 {median(ms):.2f} ms, p99 {quantiles(ms, n=100)[98]:.2f} ms"
            yield Figure(f"commit to sink, {count:,} {kind} subscriptions", said, "", None, note)
            for one in made:
                one.close()
