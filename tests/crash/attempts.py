"""An operation on a copy of a database, stopped before one of its steps, and all that may be left of it."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from kalamdb.app_context import AppContext
from kalamdb.clock import SystemClock
from kalamdb.storage.kv import KvBackend
from kalamdb.testing.crash import DurableFiles, DurableKv, SteppedBackend, SteppedFiles, StopAt, Stopped
from tests.crash.support import Contents, EarlierClock, Operation, Work, contents, settings

_WAIT_S = 20.0
POINTS_MAX = 60
"""At so many points CI stops an operation that has more; `make test-long` stops it at all."""


def spread(count: int, most: int | None) -> list[int]:
    """Up to `most` of the numbers below `count`, all when it is None; the first and the last are among them."""
    if most is None or count <= most:
        return list(range(count))
    return [at * (count - 1) // (most - 1) for at in range(most)]


class Image:
    """A database at rest: what its store holds, and its files."""

    def __init__(self, kv: DurableKv, root: Path) -> None:
        self.kv = kv
        self.root = root


def old_image(folder: Path, fill: Operation) -> Image:
    """A database at rest that was filled two hours ago."""
    root, kv, clock = folder / "segments", DurableKv(), EarlierClock()
    root.mkdir()
    context = AppContext(None, settings(), clock=clock, backend=KvBackend(kv, clock), root=root)
    fill(context)
    context.stop()
    return Image(kv, root)


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
        self.before: Contents = {}
        """What was there, when nothing stops it."""
        self.after: Contents = {}
        try:
            if at is None:
                self.before = contents(context)
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


class HeldThread:
    """Runs work in a thread and holds it before its step number `at`, from 0: a commit, or one on files too.

    None holds it nowhere.
    """

    def __init__(self, at: int | None, *, on_files: bool = False) -> None:
        self._at = at
        self._on_files = on_files
        self.steps: list[str] = []
        """Names of the steps that it came to; it is held before the last one when it is held."""
        self._stopped, self._go = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self.is_held = False
        self.late: list[str] = []
        """Commits that were accepted after the worker was released."""
        self.error: BaseException | None = None

    def __call__(self, point: str, path: Path | None) -> None:
        """See OnStep."""
        if threading.current_thread() is not self._thread:
            return
        if self._go.is_set() and point.startswith("after commit"):
            self.late.append(point)
        when, _, step = point.partition(" ")
        if when == "before" and (step.startswith("commit") or (self._on_files and path is not None)):
            self.steps.append(step)
            if len(self.steps) - 1 == self._at:
                self.is_held = True
                self._stopped.set()
                assert self._go.wait(_WAIT_S)

    def start(self, work: Work) -> None:
        """Run until the hold or the end."""

        def run() -> None:
            try:
                work.run()
            except BaseException as exc:
                self.error = exc
            self._stopped.set()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        assert self._stopped.wait(_WAIT_S)

    def release(self) -> None:
        """Let it go on to its end."""
        self._go.set()
        assert self._thread is not None
        self._thread.join(_WAIT_S)
        assert not self._thread.is_alive()
