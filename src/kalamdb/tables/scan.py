"""What a statement reads of one table, as plain data that the SQL engine turns into a plan.

The tables layer decides which files and batches hold the rows, what hides what, and whose rows lie in
the same row groups; it knows nothing of the engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa


@dataclass(frozen=True, slots=True)
class ScanColumn:
    """A column as the statement sees it. `field` carries the metadata b"kalam": the SQL type."""

    name: str
    field: pa.Field


@dataclass(frozen=True, slots=True)
class Projection:
    """Where a scan column comes from in one part: a physical column, or a constant when it has none."""

    source: str | None
    fill: Any = None
    """Python value that the part's rows read when `source` is None."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class FilePart:
    """Rows of one Parquet segment. The same object in each plan, as long as it is in use, so that the engine can
    keep what it makes of it."""

    path: Path
    schema: pa.Schema
    """As in the file."""
    projections: tuple[Projection, ...]
    key_start: bytes | None
    """Only rows with key_start <= `_key` < key_end; None where the whole file belongs to the scope."""
    key_end: bytes | None
    seq_base: int
    """To be added to `_seq` of the file."""
    has_tombstones: bool
    has_hidden: bool
    """Marks may hide rows of it."""
    single_scope: bool
    """No row of another scope is read even if the caller's predicates stand beside the key range."""


@dataclass(frozen=True, slots=True)
class MemoryPart:
    """Hot rows, of one scope."""

    batches: tuple[pa.RecordBatch, ...]
    schema: pa.Schema
    projections: tuple[Projection, ...]
    has_tombstones: bool
    has_hidden: bool


@dataclass(frozen=True, slots=True)
class ScanPlan:
    """All rows of one table for one scope at one moment.

    A row is visible unless it is a tombstone or `marks` holds its `_key` with a greater `_seq`.
    The physical columns `_key`, `_seq` and `_flags` exist in every part.
    """

    columns: tuple[ScanColumn, ...]
    parts: tuple[FilePart | MemoryPart, ...]
    marks: pa.Table | None
    """Columns `_key`, `_seq`; None when nothing can be hidden."""
