"""Measuring: calls that take turns, medians, and one table of results at the end."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

console = Console(width=150 if not os.isatty(1) else None)


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the results. `peer` is the same work by something else in the same run, where there is one."""

    name: str
    ours: str
    peer: str = ""
    ratio: float | None = None
    """Ours to the peer: of times smaller is better, of rates larger is."""
    note: str = ""
    passed: bool | None = None
    """Whether the goal is met, None without one."""


def median_ms(*calls: Callable[[], object], rounds: int) -> list[float]:
    """Median time of each call in ms; they take turns, so that a busy machine hits all of them."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    gc.disable()
    try:
        for number in range(rounds):
            order = range(len(calls)) if number % 2 == 0 else reversed(range(len(calls)))
            for at in order:
                start = time.perf_counter()
                calls[at]()
                times[at].append((time.perf_counter() - start) * 1000)
    finally:
        gc.enable()
    return [statistics.median(each) for each in times]


def rate(call: Callable[[], int]) -> float:
    """Units per second of one call, which returns how many it did."""
    start = time.perf_counter()
    done = call()
    return done / (time.perf_counter() - start)


def machine() -> str:
    """What this runs on, for the table of results."""
    return f"{os.cpu_count()} cores {platform.machine()}, Python {platform.python_version()}"


def show(title: str, measured: Iterable[Figure]) -> bool:
    """Measure, and print the figures as a table; whether all goals are met."""
    start = time.perf_counter()
    with console.status(title):
        figures = list(measured)
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in ("what", "ours", "peer", "ratio", "note"):
        table.add_column(name, justify="left" if name in ("what", "note") else "right")
    for one in figures:
        style = {None: "", True: "green", False: "bold red"}[one.passed]
        ratio = "" if one.ratio is None else f"{one.ratio:.2f}"
        table.add_row(one.name, one.ours, one.peer, f"[{style}]{ratio}[/]" if style else ratio, one.note)
    console.print(table)
    console.print(f"[dim]{time.perf_counter() - start:.0f} s[/]\n")
    return all(one.passed is not False for one in figures)
