"""Log lines and traces of a server."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import kalamdb
from kalamdb.clock import SystemClock
from kalamdb.config import Settings
from kalamdb.server.guards import Peer
from kalamdb.server.logs import REQUEST_ID, AccessLog, CompactFormatter, JsonFormatter, configure_logging
from kalamdb.server.telemetry import Tracing
from kalamdb.testing.clock import SimulatedClock


def record(
    text: str, *, level: int = logging.INFO, error: BaseException | None = None, **fields: Any
) -> logging.LogRecord:
    """A record of logger kalamdb.x."""
    info = None if error is None else (type(error), error, error.__traceback__)
    made = logging.getLogger("kalamdb.x").makeRecord("kalamdb.x", level, "x.py", 12, text, (), info, extra=fields)
    made.threadName = "main"
    return made


@pytest.fixture
def quiet_logging() -> Iterator[None]:
    """Puts the logging of this process back as it was."""
    root, ours = logging.getLogger(), logging.getLogger("kalamdb")
    handlers, levels = list(root.handlers), (root.level, ours.level)
    yield
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


def test_a_compact_line_has_its_fields_and_stays_one_line() -> None:
    line = CompactFormatter().format(record("first\nsecond", level=logging.WARNING, job_id="FL-1", request_id="r1"))
    assert line.endswith("Z] [WARN ] [main - kalamdb.x:12] - first\\nsecond request_id=r1 job_id=FL-1")
    assert "\n" not in line


def test_a_json_line_has_its_fields_and_its_trace() -> None:
    found = json.loads(JsonFormatter().format(record("text", level=logging.ERROR, error=ValueError("no"), user="anna")))
    assert (found["level"], found["target"], found["message"], found["user"]) == ("ERROR", "kalamdb.x", "text", "anna")
    assert "ValueError: no" in found["trace"]


@pytest.mark.parametrize(("format_", "name"), [("compact", "server.log"), ("json", "server.jsonl")])
def test_lines_go_to_a_file_that_system_server_logs_reads(
    tmp_path: Path, quiet_logging: None, format_: str, name: str
) -> None:
    wanted = {"logging.format": format_, "logging.log_to_console": False, "logging.targets": {"kalamdb.loud": "error"}}
    configure_logging(tmp_path, Settings.load(wanted, environment={}))
    token = REQUEST_ID.set("r-1")
    logging.getLogger("kalamdb.x").info("told %s", "this")
    REQUEST_ID.reset(token)
    logging.getLogger("kalamdb.x").debug("not this")
    logging.getLogger("kalamdb.loud").warning("nor this")
    access = AccessLog(SystemClock(), is_json=format_ == "json")
    access.add("9.9.9.9", "GET", b"/a", 200, 0.0015, "r-2")
    access.add("9.9.9.9", "GET", b"/b", 404, 0.0015, "r-3")
    access.step()
    text = (tmp_path / "logs" / name).read_text()
    assert "r-1" in text and "not this" not in text and "nor this" not in text
    with kalamdb.connect(tmp_path) as db:
        rows = db.execute("SELECT level, target, message FROM system.server_logs WHERE target LIKE 'kalamdb.%'").rows
    ours = [row for row in rows if row[1] in ("kalamdb.x", "kalamdb.access")]
    assert [row[:2] for row in ours] == [("INFO", "kalamdb.x"), *[("INFO", "kalamdb.access")] * 2]
    assert "told this" in ours[0][2] and "/b" in ours[2][2] and "404" in ours[2][2]


def test_the_library_installs_no_handlers_by_itself(tmp_path: Path) -> None:
    before = list(logging.getLogger().handlers)
    with kalamdb.connect(tmp_path / "data"):
        assert logging.getLogger("kalamdb").handlers == [] and logging.getLogger().handlers == before


def test_requests_and_jobs_become_spans() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing = Tracing(provider, SimulatedClock())
    parent = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    state = {"peer": Peer("9.9.9.9", False, True), "request_id": "r-1"}
    scope = {"type": "http", "method": "POST", "headers": [(b"traceparent", parent)], "state": state}
    tracing.request(scope, "/v1/api/sql", 503, 0.25)
    with kalamdb.connect(":memory:") as db:
        db.context.backend.observe(tracing.on_commit)
        db.jobs.executor("greet", prefix="GR")(lambda ctx: None)
        db.jobs.wait(db.jobs.create_job("greet").id, 10)
    tracing.stop()
    spans = {span.name: span for span in exporter.get_finished_spans()}
    request = spans["POST /v1/api/sql"]
    assert request.context is not None and f"{request.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert request.end_time is not None and request.start_time is not None
    assert request.end_time - request.start_time == 250_000_000
    assert not request.status.is_ok
    assert request.attributes is not None and request.attributes["kalamdb.request_id"] == "r-1"
    job = spans["job greet"]
    assert job.attributes is not None and job.attributes["kalamdb.job.status"] == "completed"
