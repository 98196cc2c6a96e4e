"""jobs.log: the events of all jobs, one line each, in commit order.

The file is a projection of the store. How far it is (position of the last event, identity and size of the
file) is a record in the store itself: after a crash the file is cut back to what the record says and
written on from there, so no line is lost and none is there twice.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import msgspec

from kalamdb.clock import Clock
from kalamdb.errors import KalamDbError, Unavailable
from kalamdb.service import Loop
from kalamdb.storage import Batch, Commit, RecordKind, RecordOp, StorageBackend, record_key
from kalamdb.storage.job_scrub import Scrubber

_log = logging.getLogger("kalamdb.jobs")
_GATHER_S = 0.1
"""An event waits this long for others to be written with it."""
_IDLE_S = 3600.0
_PASS_EVENTS = 4000
_RELEASE_EVENTS = 20_000
"""The order of events that were written is forgotten in steps of this many."""
_MARK = record_key(RecordKind.META, "job_log")


class _Mark(msgspec.Struct, frozen=True):
    """How far the file is."""

    position: int = 0
    file: int = 0
    """Inode of the file."""
    size: int = 0


class JobLogFile:
    """Writes the events of a store into `path`. One writer per file."""

    def __init__(self, backend: StorageBackend, path: Path, clock: Clock, *, bytes_max: int, files_max: int) -> None:
        self._backend = backend
        self._path = path
        self._clock = clock
        self._bytes_max = bytes_max
        self._files_max = files_max
        self._stopping = threading.Event()
        self._loop = Loop("job-log", self._gather, _IDLE_S, clock)
        self._lock = threading.Lock()
        self._mark = _Mark()
        self._released = 0
        self._started = False

    def start(self) -> None:
        """Mend the file after a crash, append what is missing, then follow."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            self._mark = self._mend()
            self._released = self._mark.position
        self._started = True
        self._backend.observe(self._on_commit)
        self._loop.start()
        self._loop.wake()

    def _on_commit(self, batch: Batch, commit: Commit) -> None:
        if commit.changed_jobs:
            self._loop.wake()

    def _mend(self) -> _Mark:
        stored = self._backend.latest().records([_MARK])[0]
        mark = _Mark() if stored is None else msgspec.msgpack.decode(stored.value, type=_Mark)
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return mark
        # Nothing is written into a file before the record names it, so what another one holds is not ours to cut.
        keep = min(mark.size, found.st_size) if found.st_ino == mark.file else found.st_size
        os.truncate(self._path, keep)
        mended = msgspec.structs.replace(mark, size=keep)
        if mended != mark:
            self._record(mended)
        return mended

    def _gather(self) -> bool:
        self._clock.wait(self._stopping, _GATHER_S)
        while self.step():
            pass
        return False

    def step(self) -> bool:
        """Append the next events; True when more wait."""
        with self._lock:
            mark = self._mark
            head = self._backend.head()
            events = self._backend.jobs.events(None, after=mark.position, limit=_PASS_EVENTS)
            if not events:
                return False
            self._backend.wait_durable(Commit(max(head, self._backend.head()), (), ()))
            text = "".join(f"[{one.job_id}] {one.level} - {_one_line(one.text)}\n" for one in events)
            self._append(text.encode(errors="backslashreplace"), events[-1].position)
            if self._mark.position - self._released >= _RELEASE_EVENTS:
                self._backend.jobs.release_events(self._mark.position)
                self._released = self._mark.position
            return len(events) == _PASS_EVENTS

    def _append(self, data: bytes, position: int) -> None:
        """Add lines, then record that the file is as far as `position`."""
        if self._path.exists() and self._path.stat().st_size >= self._bytes_max:
            self._rotate()
        with self._path.open("ab") as file:
            found = os.fstat(file.fileno())
            if found.st_ino != self._mark.file:
                self._backend.wait_durable(self._record(_Mark(self._mark.position, found.st_ino, found.st_size)))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            self._record(_Mark(position, found.st_ino, os.fstat(file.fileno()).st_size))

    def _record(self, mark: _Mark) -> Commit:
        commit = self._backend.commit(Batch(records=[RecordOp(_MARK, msgspec.msgpack.encode(mark))]))
        self._mark = mark
        return commit

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")

    def _rotate(self) -> None:
        for number in range(self._files_max - 1, 0, -1):
            older = self._numbered(number)
            if older.exists():
                older.replace(self._numbered(number + 1))
        self._path.replace(self._numbered(1))

    def scrub(self, name: str) -> None:
        """Take a name out of the lines that were written, in older files too. Blocks for the disk. Raises Unavailable.

        Lines that are not written yet come from the store, which has to be rid of the name before.
        """
        scrubber = Scrubber(_one_line(name))
        with self._lock:
            try:
                for path in [self._path, *(self._numbered(number) for number in range(1, self._files_max + 1))]:
                    if path.exists() and scrubber.may_be_in(body := path.read_bytes()):
                        self._rewrite(path, scrubber.text(body.decode(errors="replace")).encode())
            except OSError as exc:
                raise Unavailable(f"'{self._path}' cannot be rewritten: {exc.strerror}; free space there") from exc

    def _rewrite(self, path: Path, body: bytes) -> None:
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
            found = os.fstat(file.fileno())
        if path == self._path:
            # Named before it is there, as any file: after a crash in between the old one is taken as it is.
            self._backend.wait_durable(self._record(_Mark(self._mark.position, found.st_ino, found.st_size)))
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def stop(self) -> None:
        """Write all lines, then end; a log that was not started is left as it is."""
        self._stopping.set()
        self._loop.stop()
        try:
            while self._started and self.step():
                pass
        except (KalamDbError, OSError) as exc:
            # The events are in the store: the next start appends them.
            _log.warning("'%s' lacks its last lines: %s", self._path, exc)


def _one_line(text: str) -> str:
    if text.isprintable() and "\\" not in text:
        return text
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
