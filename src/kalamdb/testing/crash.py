"""Stopping a database between any two of its steps, and losing what was not on disk yet.

A *step* is one operation on a file or one commit. Its name follows from what it does, so that no hook
lives in the product: `SteppedFiles` and `SteppedBackend` announce each step before and after it happens.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from kalamdb.app_context import AppContext
from kalamdb.backup.restore import PENDING_KEY
from kalamdb.config import Settings
from kalamdb.files import FileOps
from kalamdb.storage import Batch, Caps, Commit, CommitObserver, JobStore, RecordKind, Snapshot, StorageBackend
from kalamdb.storage.jobs import TERMINAL, Claim, JobFence, JobMove
from kalamdb.storage.memory import MemoryKv
from kalamdb.types import Seq, TableUid

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

OnStep = Callable[[str, Path | None], None]
"""Called with "before <step>" and "after <step>", and the path of a step on files; may end everything."""


class Stopped(BaseException):
    """The process is dead from here on. Not an Exception: nobody may handle it."""


class StopAt:
    """An OnStep that stops before step number `at` (from 0), and before each later one. Counts and records."""

    def __init__(self, at: int | None = None) -> None:
        self.at = at
        self.steps: list[str] = []
        """Names of the steps that were begun."""

    @property
    def is_stopped(self) -> bool:
        """Whether the step was reached."""
        return self.at is not None and len(self.steps) > self.at

    def __call__(self, point: str, path: Path | None) -> None:
        if self.is_stopped:
            raise Stopped
        when, _, step = point.partition(" ")
        if when == "before":
            self.steps.append(step)
            if self.is_stopped:
                raise Stopped


def _kind(path: Path) -> str:
    """What a file is for: a segment, a mirror, one of the store, or one that decides, by its own name."""
    if path.parent.name == "rocksdb" or path.parent.parent.name.endswith("checkpoints"):
        return "store file"
    name = path.name.removeprefix(".").removesuffix(".tmp")
    if name in ("backup.json", "CURRENT", "ORIGIN"):
        return name
    return {".parquet": "segment", ".tmp": "mirror", ".json": "mirror"}.get(path.suffix, "file")


class SteppedFiles(FileOps):
    """File operations that are announced."""

    def __init__(self, on_step: OnStep, inner: FileOps | None = None) -> None:
        self._on_step = on_step
        self._inner = inner or FileOps()

    def _step(self, name: str, path: Path, act: Callable[[], None]) -> None:
        self._on_step(f"before {name}", path)
        act()
        self._on_step(f"after {name}", path)

    def open_write(self, path: Path) -> BinaryIO:
        self._on_step(f"before create {_kind(path)}", path)
        file = self._inner.open_write(path)
        try:
            self._on_step(f"after create {_kind(path)}", path)
        except BaseException:
            file.close()
            raise
        return io.BufferedWriter(_SteppedFile(file, path, self._on_step))

    def fsync_file(self, file: BinaryIO, path: Path) -> None:
        self._step(f"fsync {_kind(path)}", path, lambda: self._inner.fsync_file(file, path))

    def fsync_dir(self, path: Path) -> None:
        self._step("fsync folder", path, lambda: self._inner.fsync_dir(path))

    def mkdir(self, path: Path) -> None:
        self._step("make folder", path, lambda: self._inner.mkdir(path))

    def rename(self, source: Path, target: Path) -> None:
        self._step(f"rename {_kind(target)}", target, lambda: self._inner.rename(source, target))

    def link(self, source: Path, target: Path) -> None:
        self._step(f"link {_kind(target)}", target, lambda: self._inner.link(source, target))

    def unlink(self, path: Path) -> None:
        self._step(f"unlink {_kind(path)}", path, lambda: self._inner.unlink(path))

    def rmdir(self, path: Path) -> None:
        self._step("remove folder", path, lambda: self._inner.rmdir(path))


class _SteppedFile(io.RawIOBase):
    """A file whose writes are announced, each as the system sees it."""

    def __init__(self, file: BinaryIO, path: Path, on_step: OnStep) -> None:
        super().__init__()
        self._file = file
        self._path = path
        self._on_step = on_step

    def writable(self) -> bool:
        return True

    def write(self, data: Buffer) -> int:
        self._on_step(f"before write {_kind(self._path)}", self._path)
        count = self._file.write(data)
        self._file.flush()
        self._on_step(f"after write {_kind(self._path)}", self._path)
        return count

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()
        super().close()


def commit_name(batch: Batch) -> str:
    """What a batch is for."""
    put = {RecordKind(op.key[0]) for op in batch.records if op.value is not None and not op.check}
    gone = {RecordKind(op.key[0]) for op in batch.records if op.value is None and not op.check}
    if RecordKind.SEGMENT in put:
        return "publication"
    if RecordKind.INTENT in put:
        return "intent"
    if RecordKind.DROPPED in put:
        return "drop"
    if RecordKind.DROPPED in gone:
        return "end of the dropped table"
    if gone & {RecordKind.SEGMENT, RecordKind.INTENT}:
        return "un-naming"
    decided = {op.value is not None for op in batch.records if op.key == PENDING_KEY}
    if decided:
        return "decision to restore" if True in decided else "adoption"
    if RecordKind.ERASING in put | gone:
        return "mark of the erasure" if RecordKind.ERASING in put else "end of the user"
    if batch.delete_scopes:
        return "removal of the hot rows"
    if batch.delete_buckets:
        return "eviction"
    if batch.rows:
        return "rows"
    if any(isinstance(job, JobMove) and job.changes.get("status") in TERMINAL for job in batch.jobs):
        return "end of the job"
    return "job" if batch.jobs and not batch.records else "records"


class SteppedBackend:
    """A `StorageBackend` around another whose commits are announced."""

    def __init__(self, inner: StorageBackend, on_step: OnStep) -> None:
        self.inner = inner
        self.caps: Caps = inner.caps
        self._on_step = on_step
        self._names: dict[Seq, str] = {}

    @property
    def jobs(self) -> JobStore:
        """See StorageBackend."""
        return self.inner.jobs

    def now_ms(self) -> int:
        """See StorageBackend."""
        return self.inner.now_ms()

    def snapshot(self) -> AbstractContextManager[Snapshot]:
        """See StorageBackend."""
        return self.inner.snapshot()

    def latest(self) -> Snapshot:
        """See StorageBackend."""
        return self.inner.latest()

    def commit(self, batch: Batch) -> Commit:
        """See StorageBackend."""
        name = commit_name(batch)
        self._on_step(f"before commit of the {name}", None)
        commit = self.inner.commit(batch)
        self._names[commit.seq] = name
        self._on_step(f"after commit of the {name}", None)
        return commit

    def wait_durable(self, commit: Commit, *, names_files: bool = False) -> None:
        """See StorageBackend."""
        name = self._names.pop(commit.seq, "commit")
        self._on_step(f"before durability of the {name}", None)
        self.inner.wait_durable(commit, names_files=names_files)
        self._on_step(f"after durability of the {name}", None)

    def under_lease(self, fence: JobFence | None) -> AbstractContextManager[None]:
        """See StorageBackend."""
        return self.inner.under_lease(fence)

    def claim(self, wanted: Claim, batch: Batch | None = None) -> Commit | None:
        """See StorageBackend; not announced: starting jobs is no step of theirs."""
        return self.inner.claim(wanted, batch)

    def outcome(self, key: str) -> Commit | None:
        """See StorageBackend."""
        return self.inner.outcome(key)

    def observe(self, observer: CommitObserver) -> None:
        """See StorageBackend."""
        self.inner.observe(observer)

    def keep_former(self, tables: Set[TableUid]) -> Seq:
        """See StorageBackend."""
        return self.inner.keep_former(tables)

    def next_numbers(self, name: str, count: int = 1) -> int:
        """See StorageBackend."""
        return self.inner.next_numbers(name, count)

    def remove_retired(self, rows_max: int = 1000) -> bool:
        """See StorageBackend."""
        self._on_step("before removal of dead rows", None)
        more = self.inner.remove_retired(rows_max)
        self._on_step("after removal of dead rows", None)
        return more

    def purge(self, tables: Sequence[TableUid], *, records: bool = False) -> None:
        """See StorageBackend."""
        self._on_step("before purge", None)
        self.inner.purge(tables, records=records)
        self._on_step("after purge", None)

    @contextmanager
    def checkpoint(self, path: Path, pin: Callable[[], None]) -> Iterator[Snapshot]:
        """See StorageBackend."""
        self._on_step("before checkpoint", path)
        with self.inner.checkpoint(path, pin) as snapshot:
            self._on_step("after checkpoint", path)
            yield snapshot

    def head(self) -> Seq:
        """See StorageBackend."""
        return self.inner.head()

    def stats(self) -> Mapping[str, int]:
        """See StorageBackend."""
        return self.inner.stats()

    def check(self) -> list[str]:
        """See StorageBackend."""
        return self.inner.check()

    def close(self) -> None:
        """See StorageBackend."""
        self.inner.close()


class SteppedContext(AppContext):
    """The parts of a database on disk, each step of which is announced."""

    def __init__(self, path: Path, settings: Settings, on_step: OnStep) -> None:
        self._announce = on_step
        super().__init__(path, settings, operations=SteppedFiles(on_step))

    def _open_backend(self) -> StorageBackend:
        return SteppedBackend(super()._open_backend(), self._announce)


class DurableKv(MemoryKv):
    """A memory store that knows what it held at its last `sync`."""

    def __init__(self) -> None:
        super().__init__()
        self._durable = self.snapshot()

    def sync(self) -> None:
        # A view of the map is never changed: the next write copies it.
        self._durable = self.snapshot()

    def copy(self, *, synced_only: bool) -> DurableKv:
        """A store with what this one holds now, or only with what would outlive a power cut."""
        view = self._durable if synced_only else self.snapshot()
        other = DurableKv()
        other.write(list(view.entries.items()))
        other.sync()
        return other


class DurableFiles(FileOps):
    """Real files under `root`, and what of them would outlive a power cut.

    The bytes of a file do once the file was fsynced, its name once its folder was. A name that was
    removed or replaced is back unless the folder was fsynced after that. What is there at the beginning
    is on disk.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._counter = count()
        self._bytes: dict[int, bytes] = {}
        """Durable bytes of each file that was opened, by a number of our own."""
        self._numbers: dict[Path, int] = {}
        self._names: dict[Path, dict[str, int | None]] = {}
        """Durable names in each folder: the file's number, None for a folder."""
        for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
            for path in folder.iterdir():
                if path.is_file():
                    self._bytes[self._number(path)] = path.read_bytes()
            self._remember(folder)

    def _number(self, path: Path) -> int:
        number = self._numbers.get(path)
        if number is None:
            number = self._numbers[path] = next(self._counter)
            self._bytes[number] = b""
        return number

    def _remember(self, folder: Path) -> None:
        self._names[folder] = {
            path.name: None if path.is_dir() else self._number(path) for path in sorted(folder.iterdir())
        }

    def open_write(self, path: Path) -> BinaryIO:
        file = super().open_write(path)
        self._numbers.pop(path, None)
        self._number(path)
        return file

    def fsync_file(self, file: BinaryIO, path: Path) -> None:
        self._bytes[self._number(path)] = path.read_bytes()

    def fsync_dir(self, path: Path) -> None:
        self._remember(path)

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self._numbers[target] = self._numbers.pop(source)

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self._numbers.pop(path, None)

    def copy_durable(self, target: Path) -> None:
        """Write what a power cut would leave into the new folder `target`."""
        self._copy_folder(self._root, target)

    def _copy_folder(self, folder: Path, target: Path) -> None:
        target.mkdir(parents=True)
        for name, number in self._names.get(folder, {}).items():
            if number is None:
                self._copy_folder(folder / name, target / name)
            else:
                (target / name).write_bytes(self._bytes[number])

    def copy_all(self, target: Path) -> None:
        """Write what is there now into the new folder `target`: what a killed process leaves."""
        shutil.copytree(self._root, target)


__all__ = [
    "DurableFiles",
    "DurableKv",
    "OnStep",
    "StopAt",
    "Stopped",
    "SteppedBackend",
    "SteppedContext",
    "SteppedFiles",
    "commit_name",
]
