"""SUBSCRIBE TO and KILL LIVE QUERY as statements, and system.live."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, assert_never

import msgspec
import pyarrow as pa

from kalamdb.clock import ulid
from kalamdb.errors import InvalidRequest
from kalamdb.live.queries import LiveQueries
from kalamdb.live.subscription import BATCH_ROWS, LiveOptions
from kalamdb.result import Result
from kalamdb.sql import statements as st
from kalamdb.sql.caller import Caller
from kalamdb.system import SYSTEM, SystemTable, columns_of
from kalamdb.types import TableId

_LIVE = columns_of(
    "live_id T, connection_id T, subscription_id T, namespace_id T, table_name T, user_id T, query T, options JSON?, "
    "status T, created_at TS, last_update TS, changes BIGINT, node_id BIGINT, last_ping_at TS"
)
_URL = "ws://localhost:8080/ws"
_OPTIONS = {"LAST_ROWS": "last_rows", "BATCH_SIZE": "batch_size", "FROM": "from_seq", "FROM_SEQ_ID": "from_seq"}


class LiveAdmin:
    """Runs the statements about live queries."""

    def __init__(self, queries: LiveQueries) -> None:
        self._queries = queries

    def run(self, statement: st.LiveStatement, caller: Caller) -> Result:
        """Run one. Raises NotFound, InvalidRequest, Denied."""
        match statement:
            case st.SubscribeTo():
                return self._subscribe(statement, caller)
            case st.KillLiveQuery():
                self._queries.kill(statement.live_id, caller.user)
                return Result(row_count=1, message=f"Live query '{statement.live_id}' killed")
            case _:
                assert_never(statement)

    def _subscribe(self, statement: st.SubscribeTo, caller: Caller) -> Result:
        """What a client needs to open the subscription on a WebSocket; nothing is subscribed yet."""
        live_options(statement.options).check()
        entry = self._queries.check(statement.query, caller)
        name = f"sub-{entry.definition.namespace}-{entry.definition.name}-{ulid(self._queries.clock).lower()}"
        said: dict[str, Any] = {"id": name, "sql": statement.query}
        if statement.options:
            said["options"] = {key.lower(): value for key, value in statement.options.items()}
        as_json = pa.field("subscription", pa.string(), metadata={b"kalam": b"JSON"})
        return Result(
            pa.table(
                [["active"], [_URL], [msgspec.json.encode(said).decode()], ["Open the WebSocket and subscribe there"]],
                schema=pa.schema([("status", pa.string()), ("ws_url", pa.string()), as_json, ("message", pa.string())]),
            )
        )


def live_options(stated: dict[str, Any]) -> LiveOptions:
    """OPTIONS (...) of SUBSCRIBE TO. Raises InvalidRequest for an unknown one."""
    unknown = stated.keys() - _OPTIONS.keys()
    if unknown:
        raise InvalidRequest(f"option {min(unknown)} is unknown; there are {', '.join(_OPTIONS)}")
    named = {_OPTIONS[name]: value for name, value in stated.items()}
    return LiveOptions(named.get("from_seq"), named.get("last_rows"), named.get("batch_size", BATCH_ROWS))


def live_table(rows: Callable[[], Iterator[tuple[Any, ...]]]) -> SystemTable:
    """system.live over the rows of `LiveQueries`."""
    return SystemTable(TableId(SYSTEM, "live"), _LIVE, lambda _: rows())
