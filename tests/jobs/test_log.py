"""jobs.log is the history of all jobs, line by line, whatever happened to the process in between."""

from __future__ import annotations

from pathlib import Path

import pytest

from kalamdb.clock import SystemClock
from kalamdb.jobs import JobRegistry, UnifiedJobManager
from kalamdb.jobs.log import JobLogFile
from kalamdb.jobs.settings import JobSettings
from kalamdb.storage.kv import KvBackend
from kalamdb.storage.memory import MemoryKv
from tests.jobs.conftest import until


class Journal:
    """A store with a log; `lines` is what the log has to hold."""

    def __init__(self, folder: Path, *, bytes_max: int = 1 << 20) -> None:
        self.kv = MemoryKv()
        self.path = folder / "logs" / "jobs.log"
        self.bytes_max = bytes_max
        self.lines: list[str] = []
        self.made = 0
        self.open()

    def open(self) -> JobLogFile:
        """As after a crash: nothing of the process before is known."""
        clock = SystemClock()
        self.backend = KvBackend(self.kv, clock)
        self.manager = UnifiedJobManager(self.backend, JobRegistry(), clock, JobSettings())
        self.log = JobLogFile(self.backend, self.path, clock, bytes_max=self.bytes_max, files_max=3)
        return self.log

    def write(self, count: int = 1) -> None:
        """Create jobs: one event each."""
        for _ in range(count):
            self.made += 1
            job = self.manager.create_job("x", {"n": self.made}, allow_unknown=True)
            self.lines.append(f"[{job.id}] INFO - Job created")

    def found(self) -> list[str]:
        return self.path.read_text().splitlines()


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path)


def test_lines_appear_within_a_second_and_all_when_it_stops(journal: Journal) -> None:
    journal.write(3)
    journal.log.start()
    until(lambda: journal.path.exists() and len(journal.found()) == 3)
    journal.write(2500)
    journal.log.stop()
    assert journal.found() == journal.lines
    journal.log.stop()


def test_lines_that_a_crash_kept_from_the_file_are_appended(journal: Journal) -> None:
    journal.write(2)
    journal.log.start()
    journal.log.stop()
    journal.write(3)
    journal.open().start()
    journal.log.stop()
    assert journal.found() == journal.lines


@pytest.mark.parametrize("kept", ["whole", "torn", "nothing"])
def test_lines_that_were_written_but_not_recorded_are_neither_lost_nor_doubled(journal: Journal, kept: str) -> None:
    journal.write(2)
    journal.log.start()
    journal.log.stop()
    journal.write(3)
    with journal.path.open("a") as file:
        text = "".join(line + "\n" for line in journal.lines[2:])
        file.write({"whole": text, "torn": text[:-10], "nothing": ""}[kept])
    journal.open().start()
    journal.log.stop()
    assert journal.found() == journal.lines


def test_full_files_are_rotated_and_the_oldest_goes(tmp_path: Path) -> None:
    journal = Journal(tmp_path, bytes_max=300)
    journal.log.start()
    journal.log.stop()
    for _ in range(8):
        journal.write(10)
        journal.open().start()
        journal.log.stop()
    names = sorted(path.name for path in journal.path.parent.iterdir())
    assert names == ["jobs.log", "jobs.log.1", "jobs.log.2", "jobs.log.3"]
    found = [line for name in reversed(names) for line in (journal.path.parent / name).read_text().splitlines()]
    assert found == journal.lines[-len(found) :] and len(found) == 40


@pytest.mark.parametrize("made", [False, True])
def test_a_crash_between_rotation_and_record_loses_and_doubles_nothing(tmp_path: Path, made: bool) -> None:
    journal = Journal(tmp_path, bytes_max=300)
    journal.write(10)
    journal.log.start()
    journal.log.stop()
    journal.write(10)
    journal.path.rename(journal.path.with_name("jobs.log.1"))
    if made:
        journal.path.touch()
    journal.open().start()
    journal.log.stop()
    assert journal.found() == journal.lines[10:]


class _Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("first", [True, False])
def test_a_crash_after_the_lines_and_before_their_record_doubles_nothing(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    """Also of the first lines of a file, which no record knows yet."""
    if not first:
        journal.write(2)
        journal.log.start()
        journal.log.stop()
    else:
        journal.path.parent.mkdir()
    journal.write(3)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(_Killed()))
        journal.open()._mark = journal.log._mend()
        with pytest.raises(_Killed):
            journal.log.step()
    assert journal.found() == journal.lines
    journal.write(1)
    journal.open().start()
    journal.log.stop()
    assert journal.found() == journal.lines


@pytest.mark.parametrize("done", ["deleted", "emptied", "replaced"])
def test_a_file_that_somebody_changed_is_written_on(journal: Journal, done: str) -> None:
    journal.write(2)
    journal.log.start()
    journal.log.stop()
    journal.write(2)
    if done == "deleted":
        journal.path.unlink()
    elif done == "emptied":
        journal.path.write_text("")
    else:
        journal.path.rename(journal.path.with_name("kept"))
        journal.path.write_text("a note\n")
    journal.open().start()
    journal.log.stop()
    assert journal.found() == (["a note"] if done == "replaced" else []) + journal.lines[2:]


def test_the_log_lets_go_of_what_it_has_written(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalamdb.jobs.log._RELEASE_EVENTS", 5)
    journal.write(12)
    journal.log.start()
    journal.log.stop()
    assert journal.backend.jobs.events() == [] and journal.found() == journal.lines
    journal.write(1)
    journal.open().start()
    journal.log.stop()
    assert journal.found() == journal.lines
