"""What the operating system says of this process and its machine. Figures that it does not offer are left out."""

from __future__ import annotations

import os
import resource
import socket
import stat
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

_KIB_PER_MB = 1024
_FAMILIES = {socket.AF_UNIX: "unix", socket.AF_INET: "ipv4"}
_FILE_KINDS = ("regular", "directories", "kqueue", "unix", "ipv4", "other")


def machine_figures() -> dict[str, int]:
    """Memory in megabytes, processors and open files, by the names of system.stats. Reads /proc where there is one."""
    return {**_memory_figures(), **_processor_figures(), **_file_figures()}


def _memory_figures() -> dict[str, int]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    own = _kib_of(Path("/proc/self/status"))
    whole = _kib_of(Path("/proc/meminfo"))
    rss_kib = own.get("VmRSS", peak // 1024 if sys.platform == "darwin" else peak)
    figures = {"memory_usage_mb": rss_kib, "memory_rss_mb": rss_kib, "memory_physical_footprint_mb": rss_kib}
    figures["memory_rss_gap_mb"] = 0
    if "VmSize" in own:
        figures["memory_virtual_mb"] = own["VmSize"]
    if "RssAnon" in own:
        figures["memory_physical_footprint_mb"] = own["RssAnon"]
        figures["memory_rss_gap_mb"] = rss_kib - own["RssAnon"]
    if "MemTotal" in whole:
        figures["system_total_memory_mb"] = whole["MemTotal"]
        figures["system_used_memory_mb"] = whole["MemTotal"] - whole.get("MemAvailable", 0)
    return {name: kib // _KIB_PER_MB for name, kib in figures.items()}


def _kib_of(path: Path) -> Mapping[str, int]:
    """Lines "Name: 123 kB" of a file below /proc."""
    found = {}
    with suppress(OSError):
        for line in path.read_text().splitlines():
            name, _, rest = line.partition(":")
            words = rest.split()
            if len(words) == 2 and words[1] == "kB" and words[0].isdigit():
                found[name] = int(words[0])
    return found


def _processor_figures() -> dict[str, int]:
    logical = os.cpu_count() or 1
    cores = set()
    with suppress(OSError):
        for block in Path("/proc/cpuinfo").read_text().split("\n\n"):
            place = {line.partition(":")[0].strip(): line.partition(":")[2] for line in block.splitlines()}
            if "core id" in place:
                cores.add((place.get("physical id"), place["core id"]))
    return {"cpu_logical_cores": logical, "cpu_physical_cores": len(cores) or logical}


def _file_figures() -> dict[str, int]:
    counts = Counter(_kinds_of_files())
    figures = {f"open_files_{kind}": counts[kind] for kind in _FILE_KINDS}
    return {"open_files_total": sum(counts.values()), **figures}


def _kinds_of_files() -> Iterator[str]:
    folder = Path("/proc/self/fd") if Path("/proc/self/fd").is_dir() else Path("/dev/fd")
    with suppress(OSError):
        for name in os.listdir(folder):
            with suppress(OSError, ValueError):
                yield _kind_of_file(int(name))


def _kind_of_file(descriptor: int) -> str:
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return "regular"
    if stat.S_ISDIR(mode):
        return "directories"
    if not stat.S_ISSOCK(mode):
        return "other"
    # Only a socket is duplicated: closing any descriptor of RocksDB's lock file would give up its lock.
    with socket.socket(fileno=os.dup(descriptor)) as copy:
        return _FAMILIES.get(copy.family, "other")
