"""What the operating system says about another process, and order statistics. Linux only."""

from __future__ import annotations

import collections.abc as cabc
import math
import os
import statistics
import time
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")


def cpu(pid: int) -> float:
    """Seconds of CPU (user and system) of *pid*, its ended threads included.

    The process's own clock (clock_getcpuclockid(3)): nanoseconds, where /proc counts in 10 ms.
    """
    return time.clock_gettime((~pid << 3) | 2)


def settled_cpu(pid: int, *, quiet: float = 0.05, limit: float = 5.0) -> float:
    """The same, once the process has done next to nothing for *quiet* seconds."""
    until = time.monotonic() + limit
    before = cpu(pid)
    while time.monotonic() < until:
        time.sleep(quiet)
        now = cpu(pid)
        if now - before < quiet * 0.02:
            return now
        before = now
    return before


def rss(pid: int) -> int:
    """Bytes of memory of *pid* that are resident."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE


def children(pid: int) -> list[int]:
    """The processes whose parent is *pid*."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            stat = (entry / "stat").read_text()
        except OSError:
            continue
        if int(stat.rpartition(")")[2].split()[1]) == pid:
            found.append(int(entry.name))
    return found


def percentile(values: cabc.Iterable[float], percent: float) -> float:
    """The nearest-rank percentile; nan of nothing."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    rank = max(1, math.ceil(percent / 100 * len(ordered)))
    return ordered[rank - 1]


def median(values: cabc.Iterable[float]) -> float:
    """The median; nan of nothing."""
    ordered = list(values)
    return statistics.median(ordered) if ordered else math.nan
