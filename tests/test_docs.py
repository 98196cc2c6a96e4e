"""The pages are true: their examples run, their links resolve, and they name what the code has.

Blocks of ```python and ```sql run in order, one namespace per page, in a directory of its own; `db` is an
open database unless the page connects itself. A line `print(...)  # text` must print `text`.
"""

from __future__ import annotations

import contextlib
import io
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import kalamdb
from kalamdb.database import Database
from kalamdb.errors import KalamDbError
from kalamdb.settings import ALIASES, ENVIRONMENT, IGNORED, SETTINGS, Setting
from kalamdb.storage.jobs import LEGAL_MOVES

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
SAID = re.compile(r"^\s*print\(.*\)  # (.+)$")
QUIET = {"flush.scheduler_enabled": False, "compaction.enabled": False}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    line: int


def short(page: Path) -> str:
    """The page as messages spell it."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """The examples of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(found.group(1), found.group(2), text.count("\n", 0, found.start()) + 1)
        for found in BLOCK.finditer(text)
        if found.group(1) in ("python", "sql")
    ]


WITH_EXAMPLES = [page for page in PAGES if blocks(page)]


@contextlib.contextmanager
def namespace_of(page: Path) -> Iterator[dict[str, Any]]:
    """Names that the examples of a page find; what they leave open is closed."""
    names: dict[str, Any] = {"__name__": "__main__", "kalamdb": kalamdb}
    if not any(block.language == "python" and "kalamdb.connect(" in block.text for block in blocks(page)):
        names["db"] = kalamdb.connect("data", **QUIET)
    try:
        yield names
    finally:
        for value in list(names.values()):
            if isinstance(value, Database):
                value.close()


def run_python(block: Block, names: dict[str, Any], where: str) -> None:
    """Run an example and compare what it says with what the page says."""
    wanted = [found.group(1) for line in block.text.splitlines() if (found := SAID.match(line))]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile("\n" * block.line + block.text, where, "exec"), names)
    if wanted:
        assert said.getvalue().splitlines() == wanted, f"{where}:{block.line}"


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=short)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with namespace_of(page) as names:
        for block in blocks(page):
            if block.language == "python":
                run_python(block, names, short(page))
            else:
                names["db"].execute(block.text)


def anchors(page: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub makes them."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", found.lower()).replace(" ", "-") for found in HEADING.findall(text)}


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_links_resolve(page: Path) -> None:
    broken = []
    for target in LINK.findall(BLOCK.sub("", page.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    assert broken == []


def test_each_page_is_linked_from_another() -> None:
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in PAGES
        for target in LINK.findall(page.read_text(encoding="utf-8"))
        if "://" not in target
    }
    folders = {path for path in linked if path.is_dir()}
    alone = [
        short(page)
        for page in PAGES
        if page not in linked and page.parent not in folders and page != ROOT / "README.md"
    ]
    assert alone == []


def page_text(name: str) -> str:
    """A page of docs."""
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


# Agreement with the code


def setting_row(setting: Setting) -> str:
    """How docs/settings.md shows a setting."""
    match setting.default:
        case str():
            default = f'"{setting.default}"'
        case tuple():
            default = "[" + ", ".join(f'"{text}"' for text in setting.default) + "]"
        case Mapping():
            default = "{}"
        case _:
            default = str(setting.default).lower()
    if setting.choices:
        allowed = ", ".join(f'"{choice}"' for choice in setting.choices)
    elif setting.low is None:
        allowed = {bool: "true, false", str: "any", tuple: "texts"}.get(type(setting.default), "texts by name")
    else:
        allowed = (
            f"{_number(setting.low)} and more"
            if setting.high is None
            else f"{_number(setting.low)} to {_number(setting.high)}"
        )
    return f"| `{setting.key}` | {default} | {allowed} | {setting.help} |"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def test_the_page_of_settings_is_that_of_the_code() -> None:
    rows = [line for line in page_text("settings.md").splitlines() if line.startswith("| `")]
    wanted = [setting_row(setting) for setting in SETTINGS]
    wanted += [f"| `{name}` | `{alias.key}` |" for name, alias in ALIASES.items()]
    wanted += [f"| `{variable}` | `{key}` |" for variable, key in ENVIRONMENT.items()]
    wanted += [f"| `{key}` | {why} |" for key, why in IGNORED.items()]
    assert sorted(rows) == sorted(wanted)


def errors(root: type[KalamDbError] = KalamDbError) -> Iterator[type[KalamDbError]]:
    """The public error classes, a parent before its children."""
    for kind in root.__subclasses__():
        if kind.__module__ == "kalamdb.errors":
            yield kind
            yield from errors(kind)


def test_the_page_of_errors_is_that_of_the_code() -> None:
    found = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (\d+) \| (yes|no) \|", page_text("errors.md"), re.MULTILINE)
    assert found == [
        (kind.__name__, kind.code, str(kind.http_status), "yes" if kind.retryable else "no") for kind in errors()
    ]
    assert {kind.__name__ for kind in errors()} | {"KalamDbError"} == {
        name
        for name in kalamdb.__all__
        if isinstance(getattr(kalamdb, name), type) and issubclass(getattr(kalamdb, name), Exception)
    }


def test_every_job_type_is_described() -> None:
    text = page_text("jobs/README.md")
    with kalamdb.connect(":memory:") as db:
        for job_type in db.jobs.registry.job_types():
            executor = db.jobs.registry.get_or_error(job_type)
            assert f"| `{job_type}` | {executor.prefix} |" in text


def test_every_move_between_states_is_listed() -> None:
    text = page_text("jobs/README.md")
    for status, targets in LEGAL_MOVES.items():
        listed = ", ".join(f"`{target}`" for target in sorted(targets)) or "none"
        assert f"| `{status}` | {listed} |" in text


def test_every_system_table_is_described_with_its_columns() -> None:
    text = page_text("system.md")
    with kalamdb.connect(":memory:") as db:
        tables = db.context.system_tables.tables()
    for table in tables:
        columns = ", ".join(f"`{column.name}`" for column in table.columns)
        assert f"| `{table.table_id}` | {columns} |" in text


def test_the_layers_of_the_page_are_those_that_are_enforced() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    assert "```text\n" + "\n".join(layers).replace("kalamdb.", "") + "\n```" in page_text("architecture.md")


def test_the_map_of_the_seed_and_the_plan_name_files_that_exist() -> None:
    for name in ("seed-map.md", "architecture.md", "status.md"):
        for path in re.findall(r"`((?:src|tests|soak|demo|docs)/[\w./-]+)`", page_text(name)):
            assert (ROOT / path).exists(), f"docs/{name} names {path}"


def test_the_readme_and_the_pages_name_only_targets_that_make_has() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for target in re.findall(r"`make ([a-z-]+)", page.read_text(encoding="utf-8")):
            assert target in targets | {"bench", "bench-quick"}, f"{short(page)} names make {target}"


def test_the_version_is_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == kalamdb.__version__
    assert f"## [{kalamdb.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
