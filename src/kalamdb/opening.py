"""`connect`: opens a database, or attaches to the process that holds it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kalamdb.app_context import AppContext
from kalamdb.config import Settings
from kalamdb.database import Database
from kalamdb.errors import DirectoryLocked, InvalidRequest
from kalamdb.sharing import HoldingDatabase, SharedDatabase
from kalamdb.storage.directory import may_answer
from kalamdb.tables.codec import is_unicode, shown


def connect(path: str | os.PathLike[str], **settings: Any) -> Database:
    """Open the database in directory `path`, making it when there is none; ":memory:" keeps it in memory.

    `settings` are keys of docs/settings.md, as "jobs.max_concurrent" or jobs_max_concurrent; `config`
    names a TOML file. With `share=True` other processes may attach, see docs/sharing.md. When another process
    holds the directory and shares it, this one attaches to it. Raises DirectoryLocked, Corrupt, InvalidRequest,
    Unavailable. Blocks for at most `attach_timeout_s` while the other process is opening or closing.
    """
    file = settings.pop("config", None)
    for what, given in (("path", path), ("config", file)):
        if given is not None or what == "path":
            _check_path(what, given)
    loaded = Settings.load(settings, file=None if file is None else Path(file))
    if os.fspath(path) == ":memory:":
        return _in_memory(loaded)
    if not loaded["share"]:
        try:
            return Database(AppContext(Path(path), loaded))
        except DirectoryLocked:
            if not may_answer(Path(path)):
                raise
    return SharedDatabase(Path(path), loaded)


def hold(path: str | os.PathLike[str], settings: Mapping[str, Any]) -> Database:
    """Open the database in directory `path` for others to attach to, and never attach: what `kalamdb serve` does.

    Raises what `connect` raises, DirectoryLocked at once.
    """
    _check_path("path", path)
    directory = Path(path).absolute()
    try:
        return HoldingDatabase(directory, Settings.load({**settings, "share": True}))
    except DirectoryLocked as exc:
        if exc.pid is None or not may_answer(directory):
            raise
        raise DirectoryLocked(
            f"data directory '{path}' is held by process {exc.pid}, which shares it; stop that one to hold it here",
            exc.pid,
        ) from None


def _in_memory(settings: Settings) -> Database:
    if settings["share"]:
        raise InvalidRequest("a database in memory cannot be shared; give the path of a directory, or share=False")
    folder = Path(tempfile.mkdtemp(prefix="kalamdb-"))
    try:
        return Database(AppContext(None, settings, root=folder), lambda: shutil.rmtree(folder, ignore_errors=True))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _check_path(what: str, given: object) -> None:
    text = os.fspath(given) if isinstance(given, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text or "\x00" in text or not is_unicode(text):
        raise InvalidRequest(f"{what} {shown(given)} is not the path of a file or directory")


__all__ = ["connect", "hold"]
