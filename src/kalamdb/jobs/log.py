"""jobs.log: the events of all jobs, one line each, in commit order.

The file is a projection: each line ends where the next event begins, and the position of the last
event in it is kept beside it, so lines missing after a crash are appended at the next start.
"""

from __future__ import annotations

from pathlib import Path

from kalamdb.clock import Clock
from kalamdb.service import Loop
from kalamdb.storage import StorageBackend

_INTERVAL_S = 0.2
_PASS_EVENTS = 1000


class JobLogFile:
    """Writes the events of a store into `path`. One writer per file."""

    def __init__(self, backend: StorageBackend, path: Path, clock: Clock, *, bytes_max: int, files_max: int) -> None:
        self._backend = backend
        self._path = path
        self._mark = path.with_name(path.name + ".position")
        self._bytes_max = bytes_max
        self._files_max = files_max
        self._loop = Loop("job-log", self.step, _INTERVAL_S, clock)
        self._position = 0

    def start(self) -> None:
        """Append what is missing, then follow."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._mark.exists() and self._path.exists():
            text = self._mark.read_text().strip()
            self._position = int(text) if text.isdigit() else 0
        self._loop.start()

    def wake(self) -> None:
        """There may be new events."""

    def step(self) -> bool:
        """Append the next events; True when more wait."""
        events = self._backend.jobs.events(None, after=self._position, limit=_PASS_EVENTS)
        if not events:
            return False
        lines = [f"[{event.job_id}] {event.level} - {_one_line(event.text)}\n" for event in events]
        if self._path.exists() and self._path.stat().st_size > self._bytes_max:
            self._rotate()
        with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(lines)
        self._position = max(event.position for event in events)
        self._mark.write_text(str(self._position))
        return len(events) == _PASS_EVENTS

    def _rotate(self) -> None:
        for number in range(self._files_max - 1, 0, -1):
            older = self._path.with_name(f"{self._path.name}.{number}")
            if older.exists():
                older.replace(self._path.with_name(f"{self._path.name}.{number + 1}"))
        self._path.replace(self._path.with_name(f"{self._path.name}.1"))

    def stop(self) -> None:
        """Write all lines, then end."""
        self._loop.stop()
        while self.step():
            pass


def _one_line(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
