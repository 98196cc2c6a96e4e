"""From a `ScanPlan` to a data frame of DataFusion with the rows that a scope may see.

What hides rows (other scopes, deletions, marks) lies below a limit that the optimizer cannot push the
caller's expressions through, so none of them is ever evaluated on a row that the caller must not see.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import pyarrow as pa
from datafusion import DataFrame, Expr, SessionContext, col, lit

from kalamdb.tables.layout import FLAGS, KEY, SEQ
from kalamdb.tables.scan import FilePart, MemoryPart, ScanPlan

DELETED = "_deleted"
_BARRIER = 1 << 62
"""A limit that never limits; the optimizer moves no filter below a limit."""
_MARK_KEY, _MARK_SEQ = "_mark_key", "_mark_seq"
_ZERO, _ONE, _TWO = (lit(pa.scalar(number, pa.int64())) for number in range(3))
"""From Arrow scalars: `lit` of a Python value looks for two modules that are not there, each time."""


@dataclass(frozen=True, slots=True)
class Visible:
    """What a statement may name and see besides the columns and live rows."""

    seq: bool = False
    deleted: bool = False
    key: bool = False
    """For rows of STREAM tables, whose `_key` is their bucket; the others' keys hold their owner."""
    include_deleted: bool = False
    """Tombstones are rows too."""


class Frames:
    """Makes data frames. Those of files are kept as long as their `FilePart`. Thread-safe."""

    def __init__(self, context: SessionContext) -> None:
        self._context = context
        self._lock = threading.Lock()
        self._kept: WeakKeyDictionary[FilePart, dict[Visible, DataFrame]] = WeakKeyDictionary()

    def of(self, plan: ScanPlan, visible: Visible) -> DataFrame:
        """The rows of `plan`, with the columns of the table and the system columns asked for."""
        marks = None
        if plan.marks is not None and any(part.has_hidden for part in plan.parts):
            renamed = plan.marks.rename_columns([_MARK_KEY, _MARK_SEQ])
            marks = self._context.read_batches(renamed.to_batches() or [empty_batch(renamed.schema)])
        frames = [self._part(plan, part, marks, visible) for part in plan.parts]
        if not frames:
            return self._context.read_batch(empty_batch(_target_schema(plan, visible)))
        whole = frames[0]
        for frame in frames[1:]:
            whole = whole.union(frame)
        return whole

    def _part(
        self, plan: ScanPlan, part: FilePart | MemoryPart, marks: DataFrame | None, visible: Visible
    ) -> DataFrame:
        if isinstance(part, MemoryPart) or (marks is not None and part.has_hidden):
            return self._build(plan, part, marks, visible)
        with self._lock:
            kept = self._kept.setdefault(part, {})
        frame = kept.get(visible)
        if frame is None:
            frame = kept[visible] = self._build(plan, part, None, visible)
        return frame

    def _build(
        self, plan: ScanPlan, part: FilePart | MemoryPart, marks: DataFrame | None, visible: Visible
    ) -> DataFrame:
        guarded = False
        if isinstance(part, FilePart):
            frame = self._context.read_parquet(part.path, schema=part.schema, skip_metadata=True)
            if part.key_start is not None:
                frame = frame.filter(col(KEY) >= lit(pa.scalar(part.key_start)))
                if part.key_end is not None:
                    frame = frame.filter(col(KEY) < lit(pa.scalar(part.key_end)))
                guarded = not part.single_scope
            base = part.seq_base
        else:
            batches = [batch for batch in part.batches if batch.num_rows] or [empty_batch(part.schema)]
            frame = self._context.read_batches(batches)
            base = 0
        if part.has_tombstones and not visible.include_deleted:
            frame = frame.filter((col(FLAGS) % _TWO) == _ZERO)
            guarded = True
        if marks is not None and part.has_hidden:
            if base:
                frame, base = frame.with_column(SEQ, _seq(base)), 0
            frame = frame.join_on(marks, col(KEY) == col(_MARK_KEY), col(SEQ) < col(_MARK_SEQ), how="anti")
            guarded = True
        if guarded:
            frame = frame.limit(_BARRIER)
        chosen = []
        for column, projection in zip(plan.columns, part.projections, strict=True):
            if projection.source is None:
                value = lit(pa.scalar(projection.fill, column.field.type))
            else:
                value = col(projection.source)
                if part.schema.field(projection.source).type != column.field.type:
                    value = value.cast(column.field.type)
            metadata = column.field.metadata
            chosen.append(value.alias(column.name, _texts(metadata)) if metadata else value.alias(column.name))
        if visible.key:
            chosen.append(col(KEY))
        if visible.seq:
            chosen.append(_seq(base).alias(SEQ))
        if visible.deleted:
            chosen.append(((col(FLAGS) % _TWO) == _ONE).alias(DELETED))
        return frame.select(*chosen)


def empty_batch(schema: pa.Schema) -> pa.RecordBatch:
    """No rows of a schema."""
    return pa.RecordBatch.from_arrays([pa.array([], field.type) for field in schema], schema=schema)


def _target_schema(plan: ScanPlan, visible: Visible) -> pa.Schema:
    fields = [column.field.with_name(column.name) for column in plan.columns]
    if visible.key:
        fields.append(pa.field(KEY, pa.binary()))
    if visible.seq:
        fields.append(pa.field(SEQ, pa.int64()))
    if visible.deleted:
        fields.append(pa.field(DELETED, pa.bool_()))
    return pa.schema(fields)


def _seq(base: int) -> Expr:
    return col(SEQ) + lit(pa.scalar(base, pa.int64())) if base else col(SEQ)


def _texts(metadata: Mapping[bytes, bytes]) -> dict[str, str]:
    return {key.decode(): value.decode() for key, value in metadata.items()}
