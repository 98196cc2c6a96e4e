"""Settings: defaults, then a TOML file, then the environment, then arguments; checked together."""

from __future__ import annotations

import difflib
import math
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kalamdb.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: its default gives the type, `low` and `high` (inclusive) the range."""

    key: str
    default: Any
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()

    @property
    def environment(self) -> str:
        """Name of its environment variable."""
        return "KALAMDB_" + self.key.upper().replace(".", "_")

    @property
    def category(self) -> str:
        """The part before the first dot."""
        return self.key.partition(".")[0]


_S = Setting
SETTINGS: Final[tuple[Setting, ...]] = (
    _S(
        "storage.durability",
        "commit",
        "'commit' waits for the disk at each commit, 'os' survives kill -9 only",
        choices=("commit", "os"),
    ),
    _S("storage.compression", True, "compress segments and the store's files; off leaves their texts searchable"),
    _S("storage.rocksdb.block_cache_size", 32 << 20, "bytes of RocksDB's block cache", 1 << 20),
    _S("storage.rocksdb.write_buffer_size", 64 << 20, "bytes of RocksDB's write buffer", 1 << 20),
    _S("storage.rocksdb.max_open_files", 512, "files that RocksDB keeps open", 16),
    _S("hot.bytes_max", 256 << 20, "bytes of the hot tier; above it flushes are forced, then writers wait", 1 << 20),
    _S("hot.cache_bytes_max", 256 << 20, "bytes of decoded hot rows kept in memory", 1 << 20),
    _S("hot.wait_timeout_s", 30.0, "seconds that a writer waits for room in the hot tier", 0),
    _S("segment.cache_bytes_max", 128 << 20, "bytes of segment indexes and row groups kept in memory", 1 << 20),
    _S("segment.row_group_rows_max", 65_536, "rows of a row group of a segment", 1024, 1 << 20),
    _S("flush.scheduler_enabled", True, "flush tables by their policy in the background"),
    _S("flush.default_row_limit", 10_000, "rows after which a table without FLUSH_POLICY is flushed", 1),
    _S("flush.default_time_interval", 300, "seconds after which a table without FLUSH_POLICY is flushed", 1),
    _S("flush.check_interval_seconds", 60.0, "seconds between two looks of the flush scheduler", 0.01),
    _S("compaction.enabled", True, "compact tables in the background"),
    _S("compaction.level0_segments_max", 5, "level-0 segments of a table before they are merged", 1),
    _S("compaction.segment_bytes_max", 128 << 20, "target size of a level-1 segment", 1 << 16),
    _S("limits.batch_rows_max", 4096, "rows of a statement that go to the hot tier; more become a segment", 1, 65_536),
    _S("limits.sql_bytes_max", 1 << 20, "bytes of one SQL text", 1024),
    _S("limits.sql_tokens_max", 20_000, "tokens of one statement, literals in lists not counted", 100, 1_000_000),
    _S("limits.sql_depth_max", 256, "nesting and chained operators of one statement", 8, 512),
    _S("limits.sql_set_operands_max", 64, "SELECTs that one statement may join by UNION and the like", 2, 256),
    _S("limits.result_bytes_max", 1 << 30, "bytes of one result", 1 << 16),
    _S("datafusion.memory_limit", 0, "bytes that all queries share before they spill; 0 is a quarter of the memory", 0),
    _S("datafusion.query_parallelism", 2, "threads of one query", 1, 256),
    _S("execution.sql_plan_cache_max_entries", 200, "parsed statements kept", 1),
    _S("jobs.max_concurrent", 10, "jobs that run at the same time", 1, 10_000),
    _S("jobs.max_retries", 3, "retries of a failed job", 0, 1000),
    _S("jobs.retry_backoff_ms", 100, "wait before the first retry, in milliseconds", 1),
    _S("jobs.cancel_timeout_s", 5.0, "seconds that a cancelled job gets to clean up", 0),
    _S("jobs.quarantine_after", 3, "process deaths after which a job is held back", 1),
    _S("jobs.schedules_enabled", True, "make the jobs of schedules when they are due"),
    _S("jobs.misfire_grace_s", 60.0, "seconds that a due time may be late before the misfire policy decides", 0),
    _S("jobs.entry_points_enabled", True, "register the executors of installed distributions at the start"),
    _S("jobs.queued_max", 1_000_000, "jobs that may wait", 1),
    _S("jobs.history_completed_days", 7.0, "days that completed, skipped and cancelled jobs are kept", 0),
    _S("jobs.history_failed_days", 90.0, "days that failed jobs are kept", 0),
    _S("jobs.history_rows_max", 1_000_000, "ended jobs of each state that are kept", 0),
    _S("shutdown.timeout_s", 30.0, "seconds that running jobs get at a clean stop", 0),
    _S("deletion_grace_period_days", 30.0, "days after DROP USER until the user is erased", 0),
    _S("auth.bcrypt_cost", 12, "work factor of password hashes; each step doubles the time", 4, 16),
    _S(
        "auth.enforce_password_complexity",
        False,
        "passwords need upper and lower case, a digit and a special character",
    ),
    _S("live.resume_window_s", 600.0, "seconds for which a deletion is remembered at least", 0),
    _S("logging.logs_path", "", "directory of jobs.log; empty is <data>/logs"),
    _S("transaction_timeout_secs", 300.0, "seconds that a transaction may take", 0.001),
    _S("max_transaction_buffer_bytes", 100 << 20, "bytes of changes that a transaction may hold", 1024),
)
_BY_KEY: Final[dict[str, Setting]] = {setting.key: setting for setting in SETTINGS}
_BY_ARGUMENT: Final[dict[str, str]] = {key.replace(".", "_"): key for key in _BY_KEY}


class Settings(Mapping[str, Any]):
    """Checked values by key, as in `settings["jobs.max_concurrent"]`. Immutable."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    @staticmethod
    def load(
        arguments: Mapping[str, Any] | None = None,
        *,
        file: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Settings:
        """Merge and check all sources. Raises InvalidRequest that lists every problem.

        Argument names are keys ("jobs.max_concurrent") or keys with underscores (jobs_max_concurrent).
        """
        problems: list[str] = []
        values = {setting.key: setting.default for setting in SETTINGS}
        environment = os.environ if environment is None else environment
        sources = [
            (f"file '{file}'", _flat(_read(file)) if file is not None else {}),
            ("environment", {s.key: environment[s.environment] for s in SETTINGS if s.environment in environment}),
            ("arguments", dict(arguments or {})),
        ]
        for where, given in sources:
            for name, value in given.items():
                key = name if name in _BY_KEY else _BY_ARGUMENT.get(name)
                if key is None:
                    near = difflib.get_close_matches(name, [*_BY_KEY, *_BY_ARGUMENT], 1)
                    problems.append(
                        f"{where}: unknown setting '{name}'" + (f"; did you mean '{near[0]}'?" if near else "")
                    )
                    continue
                try:
                    values[key] = _checked(_BY_KEY[key], value)
                except ValueError as exc:
                    problems.append(f"{where}: {key} = {value!r}: {exc}")
        if problems:
            raise InvalidRequest("the settings are not valid: " + "; ".join(problems))
        return Settings(values)

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise InvalidRequest(f"the settings file '{file}' (config) cannot be read: {reason}") from exc


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in tree.items():
        out.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return out


def _checked(setting: Setting, value: Any) -> Any:
    kind = type(setting.default)
    if kind is bool:
        if isinstance(value, str) and value.lower() in ("true", "false", "1", "0"):
            value = value.lower() in ("true", "1")
        if not isinstance(value, bool):
            raise ValueError("true or false is expected")
    elif kind is str:
        if not isinstance(value, (str, os.PathLike)):
            raise ValueError("a text is expected")
        value = str(value)
    else:
        expected = "a whole number is expected" if kind is int else "a number is expected"
        if isinstance(value, bool):
            raise ValueError(expected)
        try:
            number = kind(value)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(expected) from None
        if not math.isfinite(number) or (isinstance(value, float) and number != value):
            raise ValueError(expected)
        value = number
    if setting.choices and value not in setting.choices:
        raise ValueError(f"one of {', '.join(setting.choices)} is expected")
    if setting.low is not None and value < setting.low:
        raise ValueError(f"at least {setting.low} is expected")
    if setting.high is not None and value > setting.high:
        raise ValueError(f"at most {setting.high} is expected")
    return value
