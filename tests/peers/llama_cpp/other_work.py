"""How much of the processors' time other programs take while something is measured, from Linux's /proc/stat."""

from __future__ import annotations

import os
import time
from pathlib import Path

__all__ = ["OtherWork"]

_STAT = Path("/proc/stat")
_IDLE = (3, 4)  # columns of /proc/stat: idle and iowait
_GUEST = 8  # from here on, columns that user and nice include


class OtherWork:
    """Counts from its creation on."""

    def __init__(self) -> None:
        self._begin = _now()

    def share(self) -> float | None:
        """Share of all processors' time so far that neither this process nor its children used, nor left idle; None without /proc/stat.

        On a virtual machine that includes what the host took away.
        """
        if not _STAT.exists():
            return None
        busy, own, wall = (now - begin for now, begin in zip(_now(), self._begin, strict=True))
        return max(0.0, busy - own) / (wall * (os.cpu_count() or 1))


def _now() -> tuple[float, float, float]:
    """Seconds: (of all processors at work, of this process and its children that have ended, of the clock)."""
    ticks = [int(column) for column in _STAT.read_text(encoding="ascii").split("\n", 1)[0].split()[1:]] if _STAT.exists() else []
    busy = sum(count for column, count in enumerate(ticks[:_GUEST]) if column not in _IDLE) / os.sysconf("SC_CLK_TCK")
    return busy, sum(os.times()[:4]), time.monotonic()
