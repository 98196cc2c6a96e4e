"""Executors of installed distributions: found at the start, and never in its way."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kalamdb
from kalamdb.errors import NotFound
from tests.jobs.conftest import QUIET

MODULE = """
from kalamdb.jobs import Completed, JobExecutor
from kalamdb.jobs.registry import executor_of

class Thumbnail(JobExecutor[dict]):
    job_type = "thumbnail"
    prefix = "TH"

    def execute(self, ctx):
        return Completed("small")

class Thief(JobExecutor[dict]):
    job_type = "thief"
    prefix = "FL"

mail = executor_of(lambda ctx: Completed("sent"), "mail", prefix="MA")
number = 17
"""
POINTS = """[kalamdb.executors]
a_broken = plugin_of_a_test:missing
b_gone = module_that_is_not_there:Executor
c_number = plugin_of_a_test:number
d_exits = plugin_that_exits:Executor
e_thief = plugin_of_a_test:Thief
thumbnail = plugin_of_a_test:Thumbnail
z_mail = plugin_of_a_test:mail
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A distribution on sys.path, half of it broken."""
    info = tmp_path / "site" / "plugin_of_a_test-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin-of-a-test\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    (info.parent / "plugin_of_a_test.py").write_text(MODULE)
    (info.parent / "plugin_that_exits.py").write_text("raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(str(info.parent))
    yield
    sys.modules.pop("plugin_of_a_test", None)


def test_executors_of_installed_distributions_are_registered_and_broken_ones_are_named(
    plugin: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "kalamdb.jobs"), kalamdb.connect(":memory:", **QUIET) as db:
        for job_type, message in (("thumbnail", "small"), ("mail", "sent")):
            assert db.jobs.wait(db.jobs.create_job(job_type).id, 10).message == message
        assert db.jobs.wait(db.jobs.create_job("cleanup", {"operation": "sweep"}).id, 10).status == "completed"
        with pytest.raises(NotFound):
            db.jobs.create_job("thief")
    left_out = [record.getMessage() for record in caplog.records]
    assert [text.partition(" (")[0] for text in left_out] == [
        f"the executor '{name}'" for name in ("a_broken", "b_gone", "c_number", "d_exits", "e_thief")
    ]
    assert all(text.endswith("of 'plugin-of-a-test' is left out") for text in left_out)


def test_entry_points_can_be_switched_off(plugin: None) -> None:
    with kalamdb.connect(":memory:", **QUIET, jobs_entry_points_enabled=False) as db, pytest.raises(NotFound):
        db.jobs.create_job("thumbnail")
