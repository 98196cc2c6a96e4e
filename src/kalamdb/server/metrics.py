"""Figures for Prometheus. Requests and ended jobs are counted as they happen; all else is read when it is asked for."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from kalamdb.database import Database
from kalamdb.errors import Denied
from kalamdb.server.guards import Guards, Peer
from kalamdb.storage import Batch, Commit
from kalamdb.storage.jobs import JobStatus
from kalamdb.types import Role

_REQUEST_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_JOB_BOUNDS_S = (0.01, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 1800.0, 7200.0)
_SERIES_MAX = 500
"""Label combinations of one family; what comes then is counted as `other`."""
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
Reading = float | Mapping[str, float]


@dataclass(slots=True)
class _Series:
    """A histogram: how many were within each bound and not within a lower one, and the sum of all."""

    bounds: Sequence[float]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        found, sum_ = [], 0
        for bound, count in zip([*map(str, self.bounds), "+Inf"], list(self.counts), strict=True):
            sum_ += count
            found.append((bound, float(sum_)))
        return found


class _Histogram:
    """Series by labels, bounded in number."""

    def __init__(self, name: str, text: str, labels: Sequence[str], bounds: Sequence[float]) -> None:
        self._name, self._text, self._labels, self._bounds = name, text, labels, bounds
        self._series: dict[tuple[str, ...], _Series] = {}

    def add(self, labels: tuple[str, ...], value: float) -> None:
        series = self._series.get(labels)
        if series is None:
            if len(self._series) >= _SERIES_MAX:
                labels = ("other",) * len(labels)
            series = self._series.setdefault(labels, _Series(self._bounds))
        series.add(value)

    def collect(self) -> Metric:
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        for labels, series in list(self._series.items()):
            family.add_metric(labels, series.buckets(), series.total)
        return family


@dataclass(frozen=True, slots=True)
class _Gauge:
    name: str
    text: str
    label: str
    read: Callable[[], Reading]


class Metrics:
    """The figures of one server. `observe` is called on the loop, `on_commit` under the commit lock."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._requests = _Histogram(
            "kalamdb_http_request_seconds", "Time from a request's header to the end of its answer",
            ("method", "route", "status"), _REQUEST_BOUNDS_S,
        )  # fmt: skip
        self._durations = _Histogram(
            "kalamdb_job_seconds", "Time from the last start of a job to its end", ("job_type", "status"), _JOB_BOUNDS_S
        )
        self._waits = _Histogram(
            "kalamdb_job_wait_seconds", "Time from when a job was due to its start", ("job_type",), _JOB_BOUNDS_S
        )
        self._flushed = {"bytes": 0, "rows": 0, "segments": 0}
        self._gauges: list[_Gauge] = []
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(self)

    def gauge(self, name: str, text: str, read: Callable[[], Reading], *, label: str = "") -> None:
        """Show what `read` returns at each scrape: a number, or with `label` one for each of its values.

        `read` runs in a thread of its own; it must be quick and not raise.
        """
        self._gauges.append(_Gauge(name, text, label, read))

    def observe(self, method: str, route: str, status: int, took_s: float) -> None:
        """Count a request. `route` is the path with its parameters as names, "none" when there was none."""
        self._requests.add((method if method in _METHODS else "other", route, str(status)), took_s)

    def on_commit(self, batch: Batch, commit: Commit) -> None:
        """Count jobs that started or ended, as an observer of commits."""
        for job in commit.changed_jobs:
            if job.status is JobStatus.RUNNING:
                if job.job_id in commit.claimed and job.started_at is not None:
                    wait_ms = job.started_at - max(job.created_at, job.run_at)
                    self._waits.add((job.job_type,), max(wait_ms, 0) / 1000)
            elif job.status.is_terminal:
                took_ms = (job.finished_at or 0) - job.started_at if job.started_at is not None else 0
                self._durations.add((job.job_type, str(job.status)), max(took_ms, 0) / 1000)
                if job.job_type == "flush" and isinstance(job.result, dict):
                    for name in self._flushed:
                        self._flushed[name] += int(job.result.get(name) or 0)

    def text(self) -> bytes:
        """All figures in the text format of Prometheus. Reads the store: not on the loop."""
        return generate_latest(self._registry)

    def describe(self) -> Iterator[Metric]:
        """Nothing: names are not needed before the first scrape, and reading them would read the store."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """All families but those of the process, as the registry asks for them."""
        yield self._requests.collect()
        yield self._durations.collect()
        yield self._waits.collect()
        for name, count in self._flushed.items():
            yield CounterMetricFamily(f"kalamdb_flushed_{name}", f"{name.capitalize()} that flushes wrote", value=count)
        yield from self._of_jobs()
        yield from self._of_tables()
        yield from self._of_store()
        for gauge in self._gauges:
            family = GaugeMetricFamily(gauge.name, gauge.text, labels=[gauge.label] if gauge.label else [])
            reading = gauge.read()
            for label, value in reading.items() if isinstance(reading, Mapping) else [("", reading)]:
                family.add_metric([label] if gauge.label else [], value)
            yield family

    def _of_jobs(self) -> Iterator[Metric]:
        context = self._database.context
        family = GaugeMetricFamily("kalamdb_jobs", "Jobs by state", labels=["status"])
        for status in JobStatus:
            family.add_metric([str(status)], context.backend.jobs.count(status))
        yield family
        runner = context.job_manager.runner
        yield GaugeMetricFamily("kalamdb_job_slots", "Jobs that may run at a time", value=runner.slots)
        yield GaugeMetricFamily(
            "kalamdb_job_threads_abandoned", "Threads that outlived their lease", value=runner.abandoned_threads
        )

    def _of_tables(self) -> Iterator[Metric]:
        store = self._database.context.store
        uids = [entry.definition.uid for entry in store.catalog.tables()]
        figures = [store.figures(uid) for uid in uids]
        yield GaugeMetricFamily("kalamdb_tables", "Tables", value=len(uids))
        yield GaugeMetricFamily("kalamdb_hot_rows", "Row versions in the hot tier", value=sum(f.rows for f in figures))
        yield GaugeMetricFamily("kalamdb_hot_bytes", "Bytes of the hot tier", value=store.hot_bytes())
        segments = [segment for uid in uids for segment in store.state(uid).segments]
        yield GaugeMetricFamily("kalamdb_segments", "Segments of all tables", value=len(segments))
        size = sum(segment.record.size_bytes for segment in segments)
        yield GaugeMetricFamily("kalamdb_segment_bytes", "Bytes of their files", value=size)

    def _of_store(self) -> Iterator[Metric]:
        stats = self._database.context.backend.stats()
        yield CounterMetricFamily("kalamdb_commits", "Commits since the start", value=stats["commits"])
        yield CounterMetricFamily(
            "kalamdb_commit_groups", "Syncs of the disk since the start", value=stats["commit_groups"]
        )
        yield GaugeMetricFamily(
            "kalamdb_writes_refused", "1 when the store takes no writes", value=stats["writes_refused"]
        )


class MetricsRoute:
    """GET /metrics: for this machine, the networks of server.health_networks, and role dba with a Bearer token."""

    def __init__(self, metrics: Metrics, guards: Guards, role_of: Callable[[str | None], Role]) -> None:
        self._metrics = metrics
        self._guards = guards
        self._role_of = role_of

    def routes(self) -> Sequence[BaseRoute]:
        """What to mount."""
        return [Route("/metrics", self.get)]

    async def get(self, request: Request) -> Response:
        """The figures. Raises Unauthenticated, Denied."""
        peer: Peer = request.scope["state"]["peer"]
        if not self._guards.peers.may_ask_health(peer):
            role = self._role_of(request.headers.get("authorization"))
            if role not in (Role.DBA, Role.SYSTEM):
                raise Denied(f"role {role} may not read the figures of the server; role dba may")
        # Reads counters and lists of the store, some milliseconds with many tables.
        text = await asyncio.to_thread(self._metrics.text)
        return Response(text, media_type=CONTENT_TYPE_LATEST)
