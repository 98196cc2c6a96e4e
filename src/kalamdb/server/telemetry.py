"""Traces for OpenTelemetry: a span for each request and for each attempt of a job. Needs `kalamdb[otel]`."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from starlette.types import Scope

from kalamdb.clock import Clock
from kalamdb.errors import InvalidRequest
from kalamdb.storage import Batch, Commit
from kalamdb.storage.jobs import JobRow, JobStatus
from kalamdb.version import VERSION

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_NS_PER_MS = 1_000_000
_WAITING_MAX = 10_000
"""Ended jobs whose spans are not made yet; further ones go without."""


class Tracing:
    """Makes spans. `request` is called on the loop, `on_commit` under the commit lock."""

    def __init__(self, provider: TracerProvider, clock: Clock) -> None:
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind, StatusCode

        self._provider = provider
        self._tracer = provider.get_tracer("kalamdb", VERSION)
        self._extract = extract
        self._kind = SpanKind.SERVER
        self._error = StatusCode.ERROR
        self._clock = clock
        self._ended: deque[JobRow] = deque(maxlen=_WAITING_MAX)
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="kalamdb-spans", daemon=True)
        self._thread.start()

    def request(self, scope: Scope, route: str, status: int, took_s: float) -> None:
        """The span of a request that was answered just now."""
        end_ns = self._clock.now_ms() * _NS_PER_MS
        carrier = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in (b"traceparent", b"tracestate")
        }
        span = self._tracer.start_span(
            f"{scope['method']} {route}", context=self._extract(carrier), kind=self._kind,
            start_time=end_ns - int(took_s * 1e9),
            attributes={
                "http.request.method": scope["method"], "http.route": route, "http.response.status_code": status,
                "client.address": scope["state"]["peer"].ip, "kalamdb.request_id": scope["state"]["request_id"],
            },
        )  # fmt: skip
        if status >= 500:
            span.set_status(self._error)
        span.end(end_ns)

    def on_commit(self, batch: Batch, commit: Commit) -> None:
        """Remember jobs that ended, as an observer of commits; their spans are made elsewhere."""
        for job in commit.changed_jobs:
            if job.status.is_terminal and job.started_at is not None:
                self._ended.append(job)
                self._wake.set()

    def _run(self) -> None:
        while not self._stopping:
            self._clock.wait(self._wake, 3600.0)
            self._wake.clear()
            self._make_spans()

    def _make_spans(self) -> None:
        while self._ended:
            self._job(self._ended.popleft())

    def _job(self, job: JobRow) -> None:
        started_ms, ended_ms = job.started_at or 0, job.finished_at or job.started_at or 0
        span = self._tracer.start_span(
            f"job {job.job_type}", start_time=started_ms * _NS_PER_MS,
            attributes={
                "kalamdb.job.id": job.job_id, "kalamdb.job.type": job.job_type, "kalamdb.job.status": str(job.status),
                "kalamdb.job.attempt": job.attempt, "kalamdb.job.queue": job.queue,
            },
        )  # fmt: skip
        if job.status is JobStatus.FAILED:
            span.set_status(self._error, job.message or "")
        span.end(ended_ms * _NS_PER_MS)

    def stop(self) -> None:
        """Make the spans that wait and send all; blocks as long as the exporter may take."""
        self._stopping = True
        self._wake.set()
        self._thread.join()
        self._make_spans()
        self._provider.shutdown()


def make_tracing(settings: Mapping[str, Any], clock: Clock) -> Tracing | None:
    """Tracing as [logging.otlp] says; None when it is off. Raises InvalidRequest when the packages are missing."""
    if not settings["logging.otlp.enabled"]:
        return None
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        exporter = _exporter(settings)
    except ImportError as exc:
        raise InvalidRequest(
            f"logging.otlp.enabled is true and '{exc.name}' is not installed; install kalamdb[otel], or set it to false"
        ) from exc
    resource = Resource.create({"service.name": settings["logging.otlp.service_name"], "service.version": VERSION})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracing(provider, clock)


def _exporter(settings: Mapping[str, Any]) -> Any:
    endpoint, timeout_s = settings["logging.otlp.endpoint"], settings["logging.otlp.timeout_ms"] / 1000
    if settings["logging.otlp.protocol"] == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return GrpcExporter(endpoint=endpoint, insecure=not endpoint.startswith("https://"), timeout=timeout_s)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

    path = "" if endpoint.rstrip("/").endswith("/v1/traces") else "/v1/traces"
    return HttpExporter(endpoint=endpoint.rstrip("/") + path, timeout=timeout_s)


__all__ = ["Tracing", "make_tracing"]
