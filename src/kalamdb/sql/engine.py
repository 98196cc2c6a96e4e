"""The SQL engine: the only place that knows DataFusion.

Every query is planned in a context that holds only the tables its caller may see, each as a view over
a `ScanPlan`, and nothing of any other query.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datafusion import RuntimeEnvBuilder, SessionConfig, SessionContext, SQLOptions, col

from kalamdb.errors import Closed, Internal, InvalidRequest, KalamDbError, LimitExceeded, Timeout
from kalamdb.result import OutputColumn
from kalamdb.service import may_block
from kalamdb.sql.frames import Frames, Visible, empty_batch
from kalamdb.sql.functions import Generators, register_functions
from kalamdb.sql.isolated import Children, Task
from kalamdb.sql.projection import quote
from kalamdb.tables.scan import FilePart, ScanPlan

CATALOG = "kalam"
_IDLE_CONTEXTS_MAX = 8
_PARSER_DEPTH = 4096
"""Never reached: statements are measured before. Near its own limit the parser tries every way of reading a
CAST again, which takes for ever."""
_FOOTER_CACHE_LIMIT = "16M"
"""Per idle context."""
_NOISE = re.compile(
    r"^(DataFusion error: |Exception: |Error during planning: |Optimizer rule '[^']*' failed\s*|caused by\s*|"
    r"Arrow error: |Execution error: |External error: |Schema error: |SQL error: |type_coercion\s*|"
    r"Context\(\"[^\"]*\",?\s*)+"
)
_PATH = re.compile(r"(?<![\w.])(?:file://)?/?(?:[\w.\-]+/)+[\w.\-]+\.parquet(?::\d+\.\.\d+)?")
_INTERNAL_NAME = re.compile(r"\b(?:_mark_key|_mark_seq|kalam\.)\b\.?|, (?:\w+\.)*(?:_row|_key|_flags)\b")
_ROWS = re.compile(r"metrics=\[[^\]]*\]")


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Bounds of the engine. `memory_bytes_max` is shared by all queries, beyond it they spill to disk."""

    memory_bytes_max: int = 1 << 30
    target_partitions: int = 2
    batch_rows: int = 8192


@dataclass(frozen=True, slots=True)
class TableSource:
    """One table of a query: its rows, and which system columns the statement may name."""

    namespace: str
    name: str
    plan: ScanPlan | pa.Table
    with_seq: bool = False
    with_deleted: bool = False
    with_key: bool = False
    include_deleted: bool = False
    """Tombstones are visible, with `_deleted` true."""
    rows: int = 0
    """About how many it has."""


class QueryFailed(InvalidRequest):
    """The SQL engine refused a statement, or a value met by it."""

    is_public = False


class EngineFault(Internal):
    """A mistake of the SQL engine, met by one statement; others are not concerned."""


Cancelled = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Shape:
    """What is done with the rows of a query: order by those columns, when the output has them; then skip, then stop."""

    sort_by: tuple[str, ...] = ()
    limit: int | None = None
    offset: int = 0

    def of(self, frame: Any) -> Any:
        """The frame with it."""
        names = [field.name for field in frame.schema()]
        if self.sort_by and all(names.count(name) == 1 for name in self.sort_by):
            frame = frame.sort(*(col(quote(name)).sort(ascending=True) for name in self.sort_by))
        if self.limit is not None or self.offset:
            frame = frame.limit(_ALL_ROWS if self.limit is None else self.limit, self.offset)
        return frame


_ALL_ROWS = (1 << 62) - 1


class QueryRun:
    """A running query: an iterator of record batches. Dropping it ends the query."""

    def __init__(
        self,
        schema: pa.Schema,
        batches: Iterator[pa.RecordBatch],
    ) -> None:
        self.schema = schema
        self.known: Mapping[str, OutputColumn] = {}
        """The columns of the table that is read, by name, when the caller is served."""
        self._batches = batches

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        return self._batches

    def table(self, bytes_max: int) -> pa.Table:
        """All rows. Raises LimitExceeded when they take more than `bytes_max` bytes."""
        batches, size = [], 0
        for batch in self._batches:
            size += batch.nbytes
            if size > bytes_max:
                raise LimitExceeded(
                    f"the result takes more than {bytes_max} bytes (limits.result_bytes_max); "
                    "add a LIMIT or read it with db.stream()"
                )
            batches.append(batch)
        return pa.Table.from_batches(batches, self.schema)


@dataclass(frozen=True, slots=True)
class _Request:
    """What a query says and reads."""

    sql: str
    sources: Sequence[TableSource]
    views: Mapping[tuple[str, str], str]
    shape: Shape | None = None


@dataclass(frozen=True, slots=True)
class _ContextKind:
    default_schema: str
    statistics: bool = False
    """Whether the planner knows those of files. It evaluates the caller's expressions on them, so that they
    must tell of the caller's scope alone. The context that plans decides, not the one that made a data frame."""
    parallel_sorts: bool = True
    information: bool = False


class Engine:
    """Makes contexts and runs queries. Thread-safe."""

    def __init__(self, limits: EngineLimits, generators: Generators) -> None:
        self.limits = limits
        self._generators = generators
        self._runtime = RuntimeEnvBuilder().with_disk_manager_os().with_fair_spill_pool(limits.memory_bytes_max)
        self.children = Children()
        """Processes of isolated queries."""
        self._lock = threading.Lock()
        self._idle: list[tuple[_ContextKind, SessionContext]] = []
        """The one used last first."""
        self._frames = Frames(self._context(_ContextKind("default")))

    def query(
        self,
        sql: str,
        sources: Sequence[TableSource],
        *,
        default_schema: str = "default",
        views: Mapping[tuple[str, str], str] | None = None,
        shape: Shape | None = None,
        isolate: bool = False,
        deadline: Callable[[], bool] = lambda: False,
        cancelled: Cancelled = lambda: False,
    ) -> QueryRun:
        """Plan and start a query over `sources` and nothing else.

        `deadline` and `cancelled` are asked between batches; with `isolate` the query runs in a process of its own
        and they are asked all the time. Raises InvalidRequest for what the engine
        refuses, LimitExceeded when memory does not suffice.
        """
        may_block()
        if isolate:
            arguments = {
                "sql": sql, "sources": sources, "default_schema": default_schema, "views": views, "shape": shape
            }  # fmt: skip
            return QueryRun(*self.children.run(Task(self.limits, arguments), partial(_ended, deadline, cancelled)))
        request = _Request(sql, sources, views or {}, shape)
        kind = _ContextKind(default_schema, statistics=_may_use_statistics(sources))
        while True:
            try:
                with self._borrowed(kind) as context:
                    stream, schema = self._start(request, context)
                return QueryRun(schema, _batches(stream, schema, deadline, cancelled))
            except KalamDbError:
                raise
            except Exception as exc:  # noqa: BLE001 - DataFusion raises bare Exception
                if kind.parallel_sorts and _is_refused_sort(exc):
                    kind = replace(kind, parallel_sorts=False)
                elif kind.statistics:
                    # The planner fails on some expressions over statistics although no row fails.
                    kind = replace(kind, statistics=False)
                else:
                    raise translate(exc) from exc

    @contextmanager
    def _borrowed(self, kind: _ContextKind) -> Iterator[SessionContext]:
        """A context without tables for one query's planning; a running query does not need it any more.

        Used again because it keeps the footers of Parquet files. One that saw an error is not.
        """
        with self._lock:
            at = next((at for at, (known, _) in enumerate(self._idle) if known == kind), None)
            context = self._context(kind) if at is None else self._idle.pop(at)[1]
        yield context
        catalog = context.catalog(CATALOG)
        for name in catalog.names():
            catalog.deregister_schema(name)
        self._schema(context, kind.default_schema)
        with self._lock:
            self._idle.insert(0, (kind, context))
            del self._idle[_IDLE_CONTEXTS_MAX:]

    def _start(self, request: _Request, context: SessionContext) -> tuple[Any, pa.Schema]:
        for source in request.sources:
            self._register(context, source)
        for (namespace, name), text in request.views.items():
            frame = context.sql_with_options(text, _READ_ONLY)
            self._schema(context, namespace).register_table(name, frame.into_view())
        frame = context.sql_with_options(request.sql, _READ_ONLY)
        if request.shape is not None:
            frame = request.shape.of(frame)
        schema = pa.schema([_result_field(one) for one in frame.schema()])
        return frame.execute_stream(), schema

    def information(self, name: str) -> list[tuple[Any, ...]]:
        """Rows of the engine's own information_schema table `name`: df_settings, routines or parameters."""
        context = self._context(_ContextKind("default", information=True))
        batches = context.sql_with_options(f"SELECT * FROM information_schema.{name}", _READ_ONLY).collect()
        return [tuple(row.values()) for batch in batches for row in batch.to_pylist()]

    def _context(self, kind: _ContextKind) -> SessionContext:
        limits = self.limits
        config = (
            SessionConfig()
            .with_default_catalog_and_schema(CATALOG, kind.default_schema)
            .with_information_schema(kind.information)
            .with_target_partitions(limits.target_partitions)
            .with_batch_size(limits.batch_rows)
            .with_repartition_sorts(kind.parallel_sorts)
            .set("datafusion.execution.parquet.schema_force_view_types", "false")
            .set("datafusion.sql_parser.map_string_types_to_utf8view", "false")
            .set("datafusion.execution.time_zone", "UTC")
            .set("datafusion.execution.collect_statistics", str(kind.statistics).lower())
            .set("datafusion.sql_parser.recursion_limit", str(_PARSER_DEPTH))
        )
        context = SessionContext(config, self._runtime)
        context.sql(f"SET datafusion.runtime.metadata_cache_limit = '{_FOOTER_CACHE_LIMIT}'")
        register_functions(context, self._generators)
        return context

    def _schema(self, context: SessionContext, namespace: str) -> Any:
        from datafusion.catalog import Schema

        catalog = context.catalog(CATALOG)
        if namespace not in catalog.names():
            catalog.register_schema(namespace, Schema.memory_schema())
        return catalog.schema(namespace)

    def _register(self, context: SessionContext, source: TableSource) -> None:
        plan = source.plan
        if isinstance(plan, pa.Table):
            frame = context.read_batches(plan.to_batches() or [empty_batch(plan.schema)])
        else:
            visible = Visible(source.with_seq, source.with_deleted, source.with_key, source.include_deleted)
            frame = self._frames.of(plan, visible)
        self._schema(context, source.namespace).register_table(source.name, frame.into_view())


def _may_use_statistics(sources: Sequence[TableSource]) -> bool:
    """Whether files are read, and each holds rows of the caller's scope alone."""
    plans = [source.plan for source in sources if isinstance(source.plan, ScanPlan)]
    files = [part for plan in plans for part in plan.parts if isinstance(part, FilePart)]
    return bool(files) and all(part.key_start is None for part in files)


_READ_ONLY = SQLOptions().with_allow_ddl(False).with_allow_dml(False).with_allow_statements(False)


def _is_refused_sort(exc: Exception) -> bool:
    """DataFusion 55 does not know a sort by a monotonic function of a CASE again when it merges sorted
    partitions, and refuses its own plan; it takes the plan that sorts after the merge."""
    return "SanityCheckPlan" in str(exc)


def _result_field(field: pa.Field) -> pa.Field:
    """A column of a result: nullable, and in the Arrow types that results promise."""
    kind = field.type
    if pa.types.is_timestamp(kind):
        kind = pa.timestamp("us", None if kind.tz is None else "UTC")
    elif pa.types.is_time(kind):
        kind = pa.time64("us")
    elif pa.types.is_string_view(kind) or pa.types.is_large_string(kind):
        kind = pa.string()
    elif pa.types.is_binary_view(kind) or pa.types.is_large_binary(kind):
        kind = pa.binary()
    return pa.field(field.name, kind, True, field.metadata)


def _ended(deadline: Callable[[], bool], cancelled: Cancelled) -> KalamDbError | None:
    if cancelled():
        return Closed("the query was cancelled")
    if deadline():
        return Timeout("the statement took longer than its deadline; narrow it or raise timeout_s")
    return None


def _batches(
    stream: Any, schema: pa.Schema, deadline: Callable[[], bool], cancelled: Cancelled
) -> Iterator[pa.RecordBatch]:
    while True:
        error = _ended(deadline, cancelled)
        if error is not None:
            raise error
        try:
            batch = next(stream, None)
        except Exception as exc:  # noqa: BLE001 - DataFusion raises bare Exception
            raise translate(exc) from exc
        if batch is None:
            return
        yield _in_schema(batch.to_pyarrow(), schema)


def _in_schema(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    # The engine's batches may deny NULL where its plan allows it, and count time in nanoseconds.
    columns = [
        column if column.type == field.type else pc.cast(column, field.type, safe=False)
        for column, field in zip(batch.columns, schema, strict=True)
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def translate(exc: Exception) -> KalamDbError:
    """An error of the engine as one of our tree, without paths and names of our own."""
    text = _INTERNAL_NAME.sub("", _PATH.sub("a segment", str(exc)))
    if "Resources exhausted" in text:
        return LimitExceeded(
            "the query needs more memory than datafusion.memory_limit allows and could not "
            "spill; narrow it or raise the limit"
        )
    text = _NOISE.sub("", text).strip().split("\nbacktrace")[0]
    if any(sign in text for sign in _BUGS):
        return EngineFault(f"the SQL engine failed on this statement: {_first(text)}; write it in another way")
    if _FIELD.search(text) is not None:
        return InvalidRequest(_plain(text))
    return QueryFailed(_plain(text) or "the engine refused the statement")


_TYPE_NAMES = {
    "Utf8View": "TEXT",
    "Utf8": "TEXT",
    "Int64": "BIGINT",
    "Int32": "INT",
    "Int16": "SMALLINT",
    "Float64": "DOUBLE",
    "Float32": "FLOAT",
    "Date32": "DATE",
    "Boolean": "BOOLEAN",
    "Binary": "BYTES",
}
_TYPE = re.compile(r"\b(" + "|".join(_TYPE_NAMES) + r")\b(?!\()")
_DECIMAL = re.compile(r"\bDecimal128\((\d+), ?(\d+)\)")
_PARSER = re.compile(r"ParserError\(\"(.*?)(?: at Line: \d+, Column: \d+)?\"\)", re.DOTALL)
_TOKENIZER = re.compile(r"TokenizerError\(\"(.*?)(?: at Line: \d+, Column: \d+)?\"\)", re.DOTALL)
_SIGNATURE = re.compile(r"Function '(\w+)' failed to match any signature, errors: .*?received (\w+)", re.DOTALL)
_FIELD = re.compile(
    r"No field named (.+?)\.(?: Did you mean '(.+?)'\?)?\s*(?:Valid fields are (.*)\.)?\s*\Z", re.DOTALL
)
_ERROR_TEXT_MAX = 1000
_BUGS = ("Assertion failed", "panicked", "SanityCheckPlan")
"""What the engine itself calls an internal error is often a statement of the wrong types."""


def _plain(text: str) -> str:
    """An error of the engine in the words of SQL."""
    if "Null byte at position" in text:
        return "a column of the result has a NUL character in its name; name it with AS"
    found = _PARSER.search(text) or _TOKENIZER.search(text)
    if found is not None:
        return f"the statement does not parse: {found.group(1)}"[:_ERROR_TEXT_MAX]
    found = _SIGNATURE.search(text)
    if found is not None:
        return f"function {found.group(1)} takes no argument of type {found.group(2).upper()}; add a CAST".replace(
            "STRING", "TEXT"
        )
    found = _FIELD.search(text)
    if found is not None:
        name, near, known = found.groups()
        names = [one for one in dict.fromkeys((known or "").split(", ")) if one and "._" not in one]
        remedy = f"; did you mean '{near}'?" if near else f"; there are {', '.join(names)}" if names else ""
        return f"there is no column {name}{remedy}"[:_ERROR_TEXT_MAX]
    text = _DECIMAL.sub(r"DECIMAL(\1,\2)", _TYPE.sub(lambda match: _TYPE_NAMES[match.group()], _first(text)))
    return text.replace(".\nDid you mean", "; did you mean").replace("\ncaused by\n", ": ")[:_ERROR_TEXT_MAX]


def _first(text: str) -> str:
    return text.split("\nThis issue was likely caused")[0].removeprefix("Internal error: ").strip()


def scrub_plan(text: str) -> str:
    """EXPLAIN output without paths, figures and names that tell of rows below the barrier."""
    text = _PATH.sub("segment", text)
    text = _ROWS.sub("metrics=[]", text)
    text = re.sub(r"file_groups=\{[^}]*\}", "file_groups={...}", text)
    text = re.sub(r", (pruning_predicate|required_guarantees|predicate)=.*?(?=, \w+=|\n|$)", "", text)
    text = re.sub(r"partition_sizes=\[[^\]]*\]", "partition_sizes=[...]", text)
    text = re.sub(r"Binary\(\"[^\"]*\"\)", "key", text)
    return re.sub(r"X'[0-9a-fA-F]*'|\b[0-9]{15,}\b", "...", text)


__all__ = ["Engine", "EngineLimits", "QueryRun", "TableSource", "scrub_plan", "translate"]
