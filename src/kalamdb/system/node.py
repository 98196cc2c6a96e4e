"""The tables of a cluster, of sessions and of the log file: one node, no sessions beside requests."""

from __future__ import annotations

import os
import platform
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from kalamdb.system.shape import SYSTEM, Rows, SystemTable, columns_of
from kalamdb.types import TableId

CLUSTER_ID: Final = "standalone"
NODE_ID: Final = 0

_CLUSTER: Final = columns_of(
    "cluster_id T, node_id BIGINT, role T, status T, rpc_addr T, api_addr T, is_self BOOL, is_leader BOOL, "
    "groups_leading INT, total_groups INT, current_term BIGINT?, last_applied_log BIGINT?, "
    "leader_last_log_index BIGINT?, snapshot_index BIGINT?, catchup_progress_pct SMALLINT?, replication_lag BIGINT?, "
    "hostname T?, version T?, memory_mb BIGINT?, memory_usage_mb BIGINT?, cpu_usage_percent FLOAT?, "
    "uptime_seconds BIGINT?, uptime_human T?, os T?, arch T?"
)
_GROUPS: Final = columns_of(
    "group_id BIGINT, cluster_id T, node_id BIGINT, group_type T, current_term BIGINT?, vote JSON?, "
    "last_log_index BIGINT?, last_applied BIGINT?, snapshot BIGINT?, purged BIGINT?, committed BIGINT?, state T?, "
    "current_leader BIGINT?, millis_since_quorum_ack BIGINT?"
)
_SESSIONS: Final = columns_of(
    "session_id T, backend_pid BIGINT?, current_schema T?, state T, transaction_id T?, transaction_state T?, "
    "transaction_has_writes BOOL, client_addr T?, transport T, opened_at TS, last_seen_at TS, last_method T?"
)
_SERVER_LOGS: Final = columns_of("timestamp T, level T, thread T?, target T?, line BIGINT?, message T")

_LOG_NAMES: Final = ("server.jsonl", "server.log")
_LOG_BYTES_MAX: Final = 4 << 20
"""Of the end of each log file."""
_COMPACT: Final = re.compile(r"\[([^\]]+)\] \[(\w+)\s*\] \[(?:(.*?) - )?([^\]:]*(?:::[^\]:]+)*)(?::(\d+))?\] - (.*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """What the tables say of this node beside what the machine says."""

    figures: Callable[[], Mapping[str, object]]
    """Those of system.stats."""
    head: Callable[[], int]
    """The newest `_seq`."""
    version: str
    logs_folder: Path | None


def node_tables(facts: NodeFacts) -> list[SystemTable]:
    """cluster, cluster_groups, sessions, server_logs."""
    return [
        SystemTable(TableId(SYSTEM, "cluster"), _CLUSTER, lambda _: [_node_row(facts)]),
        SystemTable(TableId(SYSTEM, "cluster_groups"), _GROUPS, lambda _: [_group_row(facts)]),
        SystemTable(TableId(SYSTEM, "sessions"), _SESSIONS, lambda _: ()),
        SystemTable(TableId(SYSTEM, "server_logs"), _SERVER_LOGS, lambda _: _log_rows(facts.logs_folder)),
    ]


def _node_row(facts: NodeFacts) -> tuple[Any, ...]:
    figures, head = facts.figures(), facts.head()
    place = (CLUSTER_ID, NODE_ID, "leader", "active", "", str(figures.get("cluster_api_addr", "")), True, True, 1, 1)
    log = (1, head, head, None, 100, 0)
    machine = (
        socket.gethostname(),
        facts.version,
        figures.get("system_total_memory_mb"),
        figures.get("memory_usage_mb"),
        None,
        figures.get("server_uptime_seconds"),
        figures.get("server_uptime_human"),
        platform.system().lower(),
        platform.machine(),
    )
    return (*place, *log, *machine)


def _group_row(facts: NodeFacts) -> tuple[Any, ...]:
    head = facts.head()
    return (0, CLUSTER_ID, NODE_ID, "all", 1, None, head, head, None, None, head, "leader", NODE_ID, 0)


def _log_rows(folder: Path | None) -> Rows:
    """The lines of the server's log files, oldest first; none when there is no file."""
    rows: list[list[Any]] = []
    for path in [] if folder is None else [folder / name for name in _LOG_NAMES]:
        for line in _last_lines(path):
            row = _log_row(line)
            if row is not None:
                rows.append(row)
            elif rows:
                # What belongs to the line before, as the trace of an exception.
                rows[-1][-1] += f"\n{line}"
    return sorted(rows, key=lambda row: str(row[0]))


def _last_lines(path: Path) -> Iterator[str]:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _LOG_BYTES_MAX))
            lines = file.read(_LOG_BYTES_MAX).decode(errors="replace").splitlines()
    except OSError:
        return
    # The first line may have lost its head.
    yield from lines[1:] if size > _LOG_BYTES_MAX else lines


def _log_row(line: str) -> list[Any] | None:
    if line.startswith("{"):
        try:
            found = msgspec.json.decode(line, type=dict[str, Any])
        except msgspec.MsgspecError:
            return None
        number = found.get("line")
        texts = [_text(found.get(name)) for name in ("timestamp", "level", "thread", "target")]
        rest = [number if isinstance(number, int) else None, _text(found.get("message")) or ""]
        return [texts[0] or "", texts[1] or "", *texts[2:], *rest]
    compact = _COMPACT.fullmatch(line)
    if compact is None:
        return None
    timestamp, level, thread, target, number, message = compact.groups()
    return [timestamp, level, thread, target, None if number is None else int(number), message]


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
