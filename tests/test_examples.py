"""The examples run, end well, and show what they say."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path
from types import ModuleType

import httpx
import pytest

FOLDER = Path(__file__).parent.parent / "examples"
LINES_MAX = 80


def example(name: str) -> ModuleType:
    """An example as a module; its main is not called yet."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_short_and_has_a_test() -> None:
    files = sorted(FOLDER.glob("*.py"))
    assert [file.stem for file in files] == ["agent", "fastapi_app", "iot_stream", "nightly_backup", "work_queue"]
    long = {file.name: lines for file in files if (lines := len(file.read_text().splitlines())) > LINES_MAX}
    assert long == {}


def test_a_queue_does_each_order_once_and_goes_on_where_it_was(tmp_path: Path) -> None:
    queue = example("work_queue")
    assert queue.main(tmp_path) == {"completed": 58, "failed": 2, "cancelled": 1}
    assert queue.main(tmp_path) == {"completed": 116, "failed": 4, "cancelled": 2}


def test_an_agent_answers_every_question_but_the_refused_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = example("agent").main(tmp_path, questions=8)
    assert [one["status"] for one in ended] == ["completed"] * 8 + ["failed"]
    assert ended[0]["result"]["answer"] == "<answer: question 0>"
    assert "anna reads 4 answers" in capsys.readouterr().out


def test_a_stream_forgets_and_the_averages_stay(tmp_path: Path) -> None:
    kept, left = example("iot_stream").main(tmp_path, ttl_s=1, seconds=0.5, every_s=0.1)
    assert kept >= 2 and left == 0


def test_a_nightly_backup_is_pruned_and_restores_what_a_mistake_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = example("nightly_backup").main(tmp_path)
    assert notes == ["note 0", "note 1", "note 2", "written by day"]
    said = capsys.readouterr().out
    assert "1 older removed" in said and "all writes up to _seq" in said and "sound" in said


def test_a_web_application_shows_each_caller_its_own_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTES_DATA", str(tmp_path / "data"))
    app = example("fastapi_app").app

    async def visit() -> None:
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as http,
        ):
            anna, ben = {"X-User": "anna"}, {"X-User": "ben"}
            written = (await http.post("/notes", json={"text": "milk"}, headers=anna)).json()["id"]
            await http.post("/notes", json={"text": "bread"}, headers=ben)
            assert [note["text"] for note in (await http.get("/notes", headers=anna)).json()] == ["milk"]
            assert (await http.delete(f"/notes/{written}", headers=ben)).status_code == 404
            assert (await http.delete(f"/notes/{written}", headers=anna)).status_code == 204
            assert (await http.get("/notes", headers=anna)).json() == []

    asyncio.run(visit())
