"""Taking a name out of what is stored of jobs.

A name counts where no letter or digit adjoins it: "ann" occurs in "mail:ann" and not in "annotate".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from kalamdb.storage import job_keys as jk
from kalamdb.storage.jobs import JobRow, JobStatus
from kalamdb.storage.ordered import KvReader, Write
from kalamdb.types import JobId

ERASED: Final = "[ERASED]"
"""What stands where a name was."""

_SCRUBBED_COLUMNS: Final = (
    "parameters", "message", "exception_trace", "result", "idempotency_key", "checkpoint", "progress", "created_by",
    "concurrency_key",
)  # fmt: skip
_SCRUBBED_OF_ATTEMPTS: Final = ("message", "exception_trace", "result", "progress")


class Scrubber:
    """Replaces one name by ERASED."""

    def __init__(self, name: str) -> None:
        self._raw = name.encode()
        self._pattern = re.compile(rf"(?<![^\W_]){re.escape(name)}(?![^\W_])")

    def may_be_in(self, stored: bytes) -> bool:
        """Whether a stored entry can name it; spares decoding the others."""
        return self._raw in stored

    def text(self, text: str) -> str:
        """A text without the name."""
        return self._pattern.sub(ERASED, text)

    def value(self, value: Any) -> Any:
        """A JSON-like value without the name, in keys too."""
        match value:
            case str():
                return self.text(value)
            case dict():
                return {self.value(key): self.value(one) for key, one in value.items()}
            case list() | tuple():
                return [self.value(one) for one in value]
            case msgspec.Struct():
                changes = {field: self.value(getattr(value, field)) for field in value.__struct_fields__}
                return msgspec.structs.replace(value, **changes)
            case _:
                return value

    def row(self, row: JobRow) -> JobRow:
        """A job without the name. One that runs keeps its concurrency key, by which others wait for it."""
        columns = [
            column for column in _SCRUBBED_COLUMNS if column != "concurrency_key" or row.status is not JobStatus.RUNNING
        ]
        return msgspec.structs.replace(row, **{column: self.value(getattr(row, column)) for column in columns})

    def writes(self, view: KvReader, job_id: JobId) -> Iterator[Write]:
        """The entries of a job's history and former attempts that change."""
        prefix = jk.history_prefix(job_id)
        for key, body in view.scan(prefix, jk.after(prefix)):
            if self.may_be_in(body):
                position, at, events = jk.decode_history(body)
                yield key, jk.encode((position, at, [(level, self.text(text)) for level, text in events]))
        prefix = jk.attempts_prefix(job_id)
        for key, body in view.scan(prefix, jk.after(prefix)):
            if self.may_be_in(body):
                attempt = jk.decode_attempt(body)
                changes = {name: self.value(getattr(attempt, name)) for name in _SCRUBBED_OF_ATTEMPTS}
                yield key, jk.encode(msgspec.structs.replace(attempt, **changes))

    def jobs_in(self, view: KvReader) -> list[JobId]:
        """Jobs of which an entry names it. Reads all entries."""
        found: dict[JobId, None] = {}
        for prefix in jk.NAMING:
            for key, body in view.scan(prefix, jk.after(prefix)):
                if self.may_be_in(body):
                    found[JobId(key[1:].partition(b"\x00")[0].decode())] = None
        return list(found)


__all__ = ["ERASED", "Scrubber"]
