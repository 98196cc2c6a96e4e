"""Logging of a server process. A library installs no handlers; this is for the process that `serve` is."""

from __future__ import annotations

import datetime as dt
import logging
import logging.config
import sys
from collections import deque
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Final

import msgspec

from kalamdb.clock import Clock
from kalamdb.service import Loop

REQUEST_ID: Final[ContextVar[str]] = ContextVar("request_id", default="")
"""The request that the running code serves."""
_FILE_BYTES_MAX = 64 << 20
_FILES_MAX = 4
_LEVELS: Final = {
    "error": "ERROR", "warn": "WARNING", "info": "INFO", "debug": "DEBUG", "trace": "DEBUG"
}  # fmt: skip
_SHOWN: Final = {"WARNING": "WARN", "CRITICAL": "ERROR"}
_STANDARD = frozenset(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {"message", "asctime", "request_id"}


_READY = "is_ready"
"""Attribute of a record whose text is lines as they are to be written."""
_ACCESS_INTERVAL_S = 0.2
_ACCESS_WAITING_MAX = 100_000
_ACCESS = "kalamdb.access"


class RequestIdFilter(logging.Filter):
    """Gives each line the request that it belongs to."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Lets all lines pass."""
        record.request_id = REQUEST_ID.get()
        return True


class CompactFormatter(logging.Formatter):
    """`[time] [LEVEL] [thread - logger:line] - text`, then the fields of the line."""

    def format(self, record: logging.LogRecord) -> str:
        """One line; a trace follows it."""
        if getattr(record, _READY, False):
            return str(record.msg)
        level = _SHOWN.get(record.levelname, record.levelname)
        text = _one_line(record.getMessage())
        fields = "".join(f" {name}={_one_line(str(value))}" for name, value in _fields(record).items())
        where = f"{record.threadName} - {record.name}:{record.lineno}"
        line = f"[{_time(record.created * 1000)}] [{level:<5}] [{where}] - {text}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        """One line; a trace is a member of it."""
        if getattr(record, _READY, False):
            return str(record.msg)
        line: dict[str, Any] = {
            "timestamp": _time(record.created * 1000), "level": _SHOWN.get(record.levelname, record.levelname),
            "thread": record.threadName, "target": record.name, "line": record.lineno,
            "message": record.getMessage(), **_fields(record),
        }  # fmt: skip
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=str).decode()


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    request_id = getattr(record, "request_id", "")
    found = {"request_id": request_id} if request_id else {}
    return {**found, **{name: value for name, value in vars(record).items() if name not in _STANDARD}}


def _time(at_ms: float) -> str:
    moment = dt.datetime.fromtimestamp(at_ms / 1000, dt.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def _one_line(text: str) -> str:
    """What comes from outside must not look like a further line."""
    return (
        text
        if text.isprintable()
        else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    )


class AccessLog:
    """A line for each request, by logger kalamdb.access.

    A LogRecord per request would cost more than most requests. So lines are gathered for 0.2 s and written as one
    record, in a thread of its own.
    """

    def __init__(self, clock: Clock, *, is_json: bool) -> None:
        self._clock = clock
        self._line = _json_line if is_json else _compact_line
        self._waiting: deque[tuple[int, str, str, bytes, int, float, str]] = deque(maxlen=_ACCESS_WAITING_MAX)
        self._loop = Loop("access-log", self.step, _ACCESS_INTERVAL_S, clock)
        self._logger = logging.getLogger(_ACCESS)

    def start(self) -> None:
        """Begin to write."""
        self._loop.start()

    def add(self, ip: str, method: str, raw_path: bytes, status: int, took_s: float, request_id: str) -> None:
        """A request was answered. `raw_path` is as it was sent, without its query, which may hold secrets."""
        self._waiting.append((self._clock.now_ms(), ip, method, raw_path, status, took_s, request_id))

    def step(self) -> bool:
        """Write what waits; never returns True."""
        lines = [self._line(*self._waiting.popleft()) for _ in range(len(self._waiting))]
        if lines and self._logger.isEnabledFor(logging.INFO):
            text = "\n".join(lines)
            extra = {_READY: True}
            record = self._logger.makeRecord(_ACCESS, logging.INFO, "", 0, text, (), None, "", extra)
            self._logger.handle(record)
        return False

    def stop(self) -> None:
        """Write what waits, then end."""
        self._loop.stop()
        self.step()


def _compact_line(at_ms: int, ip: str, method: str, path: bytes, status: int, took_s: float, request_id: str) -> str:
    text = f'{ip} "{method} {path.decode("latin-1")}" {status} {took_s * 1000:.3f} ms request_id={request_id}'
    return f"[{_time(at_ms)}] [INFO ] [MainThread - {_ACCESS}] - {text}"


def _json_line(at_ms: int, ip: str, method: str, path: bytes, status: int, took_s: float, request_id: str) -> str:
    line = {
        "timestamp": _time(at_ms), "level": "INFO", "thread": "MainThread", "target": _ACCESS,
        "message": f"{method} {path.decode('latin-1')} {status}", "request_id": request_id, "client": ip,
        "method": method, "path": path.decode("latin-1"), "status": status, "took_ms": round(took_s * 1000, 3),
    }  # fmt: skip
    return msgspec.json.encode(line).decode()


def logs_folder(data_dir: Path, settings: Mapping[str, Any]) -> Path:
    """Where the server writes its log."""
    return Path(settings["logging.logs_path"]) if settings["logging.logs_path"] else data_dir / "logs"


def configure_logging(data_dir: Path, settings: Mapping[str, Any]) -> None:
    """Send the lines of this process to server.log (server.jsonl), 4 files of 64 MiB, and to the standard error.

    Raises OSError when the folder cannot be made or written.
    """
    is_json = settings["logging.format"] == "json"
    folder = logs_folder(data_dir, settings)
    folder.mkdir(parents=True, exist_ok=True)
    formatter = f"{__name__}.{'JsonFormatter' if is_json else 'CompactFormatter'}"
    common = {"formatter": "line", "filters": ["request"]}
    handlers: dict[str, dict[str, Any]] = {
        "file": {
            **common, "class": "logging.handlers.RotatingFileHandler", "encoding": "utf-8",
            "filename": str(folder / ("server.jsonl" if is_json else "server.log")),
            "maxBytes": _FILE_BYTES_MAX, "backupCount": _FILES_MAX - 1,
        }
    }  # fmt: skip
    if settings["logging.log_to_console"]:
        handlers["console"] = {**common, "class": "logging.StreamHandler", "stream": sys.stderr}
    targets: Mapping[str, str] = settings["logging.targets"]
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"line": {"()": formatter}},
            "filters": {"request": {"()": RequestIdFilter}},
            "handlers": handlers,
            "root": {"level": "WARNING", "handlers": list(handlers)},
            "loggers": {
                "kalamdb": {"level": _LEVELS[settings["logging.level"]]},
                # uvicorn tells of each connection and of each malformed request, which anybody can send.
                "uvicorn.error": {"level": "ERROR"},
                **{name: {"level": _LEVELS.get(str(level).lower(), "INFO")} for name, level in targets.items()},
            },
        }
    )
