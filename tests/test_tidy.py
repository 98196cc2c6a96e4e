"""House rules that a machine can hold: sizes, names, docstrings, and what must not stand in the code."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "kalamdb"
FILE_LINES_MAX = 700
FUNCTION_LINES_MAX = 70
EXEMPT_FILES: dict[str, int] = {}
"""Path -> lines that it may have. May only shrink."""
EXEMPT_FUNCTIONS: dict[str, int] = {}
"""path:function -> lines that it may have. May only shrink."""
BANNED_NAMES = frozenset({"utils", "util", "helpers", "helper", "common", "misc", "shared_code", "base", "models"})
BANNED_SUFFIXES = ("_utils", "_helpers", "_manager")
BANNED_IMPORTS = frozenset({"random", "pickle", "sqlite3", "pandas", "polars", "duckdb", "requests", "pytest"})
"""Product code may import pandas, polars and pytest only inside a function, for those who have them."""
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
MACHINE_PATH = re.compile(r"(?<![\w.$])/(tmp|work|root|home|Users)/\w")
TEXT_SUFFIXES = frozenset({".py", ".md", ".toml", ".yml", ".yaml", ".cfg", ".txt", ""})


def tracked() -> list[Path]:
    """Files of the project; without git (an unpacked archive) those of its folders."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        found = [ROOT / line for line in listed.stdout.splitlines()]
    else:
        found = [
            path
            for name in ("src", "tests", "demo", "examples", "soak", "bench", "docs")
            for path in (ROOT / name).rglob("*")
        ]
        found += list(ROOT.glob("*"))
    return [path for path in found if path.is_file() and ".venv" not in path.parts]


FILES = tracked()
PYTHON = sorted(path for path in FILES if path.suffix == ".py")
PRODUCT = [path for path in PYTHON if path.is_relative_to(SOURCE)]


def short(path: Path) -> str:
    """The path as messages and the exemptions spell it."""
    return path.relative_to(ROOT).as_posix()


def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions and methods of a tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_no_file_is_longer_than_700_lines_but_those_that_were() -> None:
    lines = {short(path): len(path.read_text(encoding="utf-8").splitlines()) for path in PYTHON}
    long = {name: count for name, count in lines.items() if count > EXEMPT_FILES.get(name, FILE_LINES_MAX)}
    assert long == {}
    shrunk = [name for name in EXEMPT_FILES if lines.get(name, 0) < EXEMPT_FILES[name]]
    assert shrunk == [], "these became shorter: lower or remove their exemptions"


def test_no_function_is_longer_than_70_lines_but_those_that_were() -> None:
    lines = {
        f"{short(path)}:{function.name}": (function.end_lineno or 0) - function.lineno + 1
        for path in PYTHON
        for function in functions(parsed(path))
    }
    long = {name: count for name, count in lines.items() if count > EXEMPT_FUNCTIONS.get(name, FUNCTION_LINES_MAX)}
    assert long == {}
    shrunk = [name for name in EXEMPT_FUNCTIONS if lines.get(name, 0) < EXEMPT_FUNCTIONS[name]]
    assert shrunk == [], "these became shorter: lower or remove their exemptions"


def test_modules_are_named_by_what_they_hold() -> None:
    bad = [
        short(path)
        for path in PRODUCT
        for part in path.relative_to(SOURCE).with_suffix("").parts
        if part in BANNED_NAMES or part.endswith(BANNED_SUFFIXES)
    ]
    assert bad == []


def test_each_module_says_what_it_is_for() -> None:
    bare = [
        short(path)
        for path in PYTHON
        if path.read_text(encoding="utf-8").strip() and not ast.get_docstring(parsed(path))
    ]
    assert bare == []


def test_public_classes_and_functions_of_the_product_have_docstrings() -> None:
    bare = [
        f"{short(path)}:{owner}{node.name}"
        for path in PRODUCT
        for owner, node in _public(parsed(path))
        if not ast.get_docstring(node)
        and not (owner and node.name in SEAM_METHODS)
        and not node.name.startswith("test_")
    ]
    assert bare == []


def _seam_methods() -> frozenset[str]:
    """Methods that a Protocol documents: its implementations need not say it again."""
    return frozenset(
        inner.name
        for path in PRODUCT
        for node in parsed(path).body
        if isinstance(node, ast.ClassDef)
        and any(isinstance(one, ast.Name) and one.id == "Protocol" for one in node.bases)
        for inner in functions(node)
        if ast.get_docstring(inner)
    )


SEAM_METHODS = _seam_methods()


def _public(tree: ast.Module) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Top-level functions and classes, and methods of classes that are not Protocols' or overriding ones."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield "", node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield "", node
            if not node.bases:
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) and not inner.name.startswith("_"):
                        yield f"{node.name}.", inner


def test_nothing_is_left_to_be_done_later() -> None:
    found = [
        f"{short(path)}:{number}"
        for path in PYTHON
        if path != Path(__file__)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if UNFINISHED.search(line)
    ]
    assert found == []


def test_no_file_names_a_path_of_the_machine_it_was_written_on() -> None:
    found = [
        f"{short(path)}:{number}"
        for path in FILES
        if path.suffix in TEXT_SUFFIXES and path != Path(__file__) and "format-" not in str(path)
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []


def test_tests_are_neither_skipped_nor_expected_to_fail() -> None:
    marked = re.compile(r"pytest\.(mark\.)?(skip|xfail)\w*|unittest\.mock")
    found = [
        short(path)
        for path in PYTHON
        if path.is_relative_to(ROOT / "tests")
        and path != Path(__file__)
        and marked.search(path.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize("path", PRODUCT, ids=short)
def test_the_product_imports_no_library_that_it_must_not_need(path: Path) -> None:
    found: list[str] = []
    for node in parsed(path).body:
        if isinstance(node, ast.Import):
            found += [alias.name.partition(".")[0] for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{short(path)}:{node.lineno} has a relative import"
            found.append((node.module or "").partition(".")[0])
    allowed = frozenset({"pytest"}) if "testing" in path.parts else frozenset()
    assert (BANNED_IMPORTS - allowed).isdisjoint(found)
