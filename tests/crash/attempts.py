"""An operation on a copy of a database, stopped before one of its steps, and all that may be left of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from kalamdb.app_context import AppContext
from kalamdb.clock import SystemClock
from kalamdb.storage.kv import KvBackend
from kalamdb.testing.crash import DurableFiles, DurableKv, SteppedBackend, SteppedFiles, StopAt, Stopped
from tests.crash.support import Contents, Operation, contents, settings


class Image:
    """A database at rest: what its store holds, and its files."""

    def __init__(self, kv: DurableKv, root: Path) -> None:
        self.kv = kv
        self.root = root


class Attempt:
    """The operation on a copy of the image, stopped before step `at`."""

    def __init__(self, image: Image, folder: Path, operation: Operation, at: int | None) -> None:
        self.root = root = folder / "segments"
        shutil.copytree(image.root, root)
        self.kv = image.kv.copy(synced_only=False)
        self.files = DurableFiles(root)
        self.stop = StopAt(at)
        backend = SteppedBackend(KvBackend(self.kv, SystemClock()), self.stop)
        context = AppContext(
            None, settings(), backend=backend, operations=SteppedFiles(self.stop, self.files), root=root
        )
        self.before = contents(context)
        self.after: Contents = {}
        try:
            operation(context)
            self.after = contents(context)
        except Stopped:
            pass
        backend.inner.close()

    def remains(self, folder: Path) -> Iterator[tuple[str, DurableKv, Path]]:
        """(name, store, files) for each way in which the process or the machine may have died.

        Ways that leave the same are given once, and those that left the same a step ago not again.
        """
        last = self.stop.steps[: self.stop.at][-1:] if self.stop.at is not None else []
        on_disk = not last or last[0].startswith(("fsync", "durability", "removal"))
        known = []
        for kv_synced in (False, True):
            for files_synced in (False, True):
                if files_synced and not on_disk and (kv_synced or not last[0].startswith("commit")):
                    continue
                kv, root = self.kv.copy(synced_only=kv_synced), folder / f"{kv_synced}-{files_synced}"
                (self.files.copy_durable if files_synced else self.files.copy_all)(root)
                left = (
                    kv.snapshot().entries,
                    {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()},
                )
                if left not in known:
                    known.append(left)
                    name = f"store {'synced' if kv_synced else 'all'}, files {'synced' if files_synced else 'all'}"
                    yield name, kv, root
