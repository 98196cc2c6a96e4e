"""Loading of settings: defaults, then a TOML file, then the environment, then arguments; checked together."""

from __future__ import annotations

import difflib
import math
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from kalamdb.errors import InvalidRequest
from kalamdb.settings import (
    ALIASES,
    BY_KEY,
    ENVIRONMENT,
    HIDDEN,
    IGNORED,
    SETTINGS,
    Setting,
    environment_name,
    why_ignored,
)

_NAMES: Final[tuple[str, ...]] = (*BY_KEY, *ALIASES, *(key for key in IGNORED if not key.endswith(".*")))
_BY_ARGUMENT: Final[Mapping[str, str]] = {name.replace(".", "_"): name for name in reversed(_NAMES)}
_SECRET_WORDS: Final = ("secret", "password", "token", "key")


class Settings(Mapping[str, Any]):
    """Checked values by key, as in `settings["jobs.max_concurrent"]`. Immutable."""

    def __init__(self, values: Mapping[str, Any], ignored: Sequence[str] = ()) -> None:
        self._values = dict(values)
        self.ignored: tuple[str, ...] = tuple(ignored)
        """Given keys that say nothing here, as "cluster.node_id = 2: one node holds the data"."""

    @staticmethod
    def load(
        arguments: Mapping[str, Any] | None = None,
        *,
        file: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Settings:
        """Merge and check all sources. Raises InvalidRequest that lists every problem.

        Argument names are keys ("jobs.max_concurrent") or keys with underscores (jobs_max_concurrent).
        """
        loading = _Loading()
        environment = os.environ if environment is None else environment
        if file is not None:
            loading.take(f"file '{file}'", list(_flat(_read(file))))
        loading.take("environment", list(_of_environment(environment)))
        loading.take("arguments", [(_BY_ARGUMENT.get(name, name), name, v) for name, v in (arguments or {}).items()])
        if loading.problems:
            raise InvalidRequest("the settings are not valid: " + "; ".join(loading.problems))
        return Settings(loading.values, [f"{key} = {text}" for key, text in sorted(loading.ignored.items())])

    def shown(self, key: str) -> str:
        """The value of a key as text; a secret is not shown."""
        return BY_KEY[key].shown(self._values[key])

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


_Given = tuple[str, str, Any]
"""A name of the table, how the source spells it, and the value."""


class _Loading:
    """Values so far, what is wrong with them, and what says nothing here."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {setting.key: setting.default for setting in SETTINGS}
        self.problems: list[str] = []
        self.ignored: dict[str, str] = {}

    def take(self, where: str, given: Sequence[_Given]) -> None:
        """Merge one source. A key that it spells in two ways must have one value."""
        taken: dict[str, tuple[str, Any]] = {}
        for name, spelled, value in given:
            alias = ALIASES.get(name)
            key = name if alias is None else alias.key
            if key not in BY_KEY:
                self._outside(where, name, spelled, value)
                continue
            setting = BY_KEY[key]
            try:
                checked = checked_value(setting, value if alias is None else alias.convert(value))
            except ValueError as exc:
                shown = HIDDEN if setting.secret else repr(value)
                self.problems.append(f"{where}: {spelled} = {shown}: {exc}")
                continue
            before = taken.setdefault(key, (spelled, checked))
            if before[1] != checked:
                self.problems.append(f"{where}: '{before[0]}' and '{spelled}' say different things; leave one out")
            self.values[key] = checked

    def _outside(self, where: str, name: str, spelled: str, value: Any) -> None:
        why = why_ignored(name)
        if why is not None:
            secret = any(word in name.rpartition(".")[2] for word in _SECRET_WORDS)
            self.ignored[name] = f"{HIDDEN if secret and value else value}: {why}"
            return
        near = difflib.get_close_matches(name, [*_NAMES, *_BY_ARGUMENT], 1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        self.problems.append(f"{where}: unknown setting '{spelled}'{hint}")


def _of_environment(environment: Mapping[str, str]) -> Iterator[_Given]:
    for name in _NAMES:
        variable = environment_name(name)
        if variable in environment and variable not in ENVIRONMENT:
            yield name, variable, environment[variable]
    for variable, key in ENVIRONMENT.items():
        if variable in environment:
            yield key, variable, environment[variable]
    for key in IGNORED:
        if key.endswith(".*"):
            start = environment_name(key.removesuffix("*"))
            for variable in sorted(environment):
                if variable.startswith(start) and variable not in ENVIRONMENT:
                    yield key[:-1] + variable.removeprefix(start).lower(), variable, environment[variable]


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise InvalidRequest(f"the settings file '{file}' (config) cannot be read: {reason}") from exc


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[_Given]:
    for name, value in tree.items():
        key = prefix + name
        if isinstance(value, dict) and not (key in BY_KEY and isinstance(BY_KEY[key].default, Mapping)):
            yield from _flat(value, f"{key}.")
        else:
            yield key, key, value


def checked_value(setting: Setting, value: Any) -> Any:
    """A value as the setting keeps it. Raises ValueError that says what is expected."""
    match setting.default:
        case bool():
            value = _truth(value)
        case str():
            if not isinstance(value, (str, os.PathLike)):
                raise ValueError("a text is expected")
            value = os.fspath(value)
        case tuple():
            return _texts(value)
        case Mapping():
            return _texts_by_name(value)
        case int() | float():
            value = _number(type(setting.default), value)
    if setting.choices and value not in setting.choices:
        raise ValueError(f"one of {', '.join(setting.choices)} is expected")
    if setting.low is not None and value < setting.low:
        raise ValueError(f"at least {setting.low} is expected")
    if setting.high is not None and value > setting.high:
        raise ValueError(f"at most {setting.high} is expected")
    return value


def _truth(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false", "1", "0", "yes", "no"):
        return value.lower() in ("true", "1", "yes")
    if not isinstance(value, bool):
        raise ValueError("true or false is expected")
    return value


def _number(kind: type[int] | type[float], value: Any) -> int | float:
    expected = "a whole number is expected" if kind is int else "a number is expected"
    if isinstance(value, bool):
        raise ValueError(expected)
    try:
        number = kind(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(expected) from None
    if not math.isfinite(number) or (isinstance(value, float) and number != value):
        raise ValueError(expected)
    return number


def _texts(value: Any) -> tuple[str, ...]:
    """A list of texts; one text is split at its commas, as the environment needs it."""
    if isinstance(value, str):
        return tuple(part for part in (one.strip() for one in value.split(",")) if part)
    if not isinstance(value, (list, tuple)) or not all(isinstance(one, str) for one in value):
        raise ValueError("a list of texts is expected")
    return tuple(value)


def _texts_by_name(value: Any) -> Mapping[str, str]:
    """Texts by name; a text is split as "name=text,name=text"."""
    if isinstance(value, str):
        pairs = [part.partition("=") for part in _texts(value)]
        if not all(sign and name.strip() for name, sign, _ in pairs):
            raise ValueError("name=text, separated by commas, is expected")
        value = {name.strip(): text.strip() for name, _, text in pairs}
    if not isinstance(value, Mapping) or not all(isinstance(one, str) for pair in value.items() for one in pair):
        raise ValueError("texts by name are expected")
    return MappingProxyType(dict(value))
