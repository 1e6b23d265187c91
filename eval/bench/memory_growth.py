"""Measures memory in use and its peak, on the host and on every GPU."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import torch

__all__ = ["MemoryGrowth"]


class MemoryGrowth:
    """Growth in bytes since its creation, by device: "host" for this process's resident memory, "cuda:0" ... for torch's allocations.

    Args:
        device: GPUs are measured only if it is one.
    """

    def __init__(self, device: torch.device) -> None:
        self._gpus = range(torch.cuda.device_count()) if device.type == "cuda" else range(0)
        for index in self._gpus:
            torch.cuda.reset_peak_memory_stats(index)
        with suppress(OSError):  # resets the peak; without that, only a fresh process measures it correctly
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._before: dict[str, int] = {}
        self._before = self.used()

    def used(self) -> dict[str, int]:
        """Growth of the memory in use now."""
        used = {"host": _resident()} | {f"cuda:{index}": torch.cuda.memory_allocated(index) for index in self._gpus}
        return self._growth(used)

    def peak(self) -> dict[str, int]:
        """Growth of the peak so far."""
        peak = {"host": _peak_resident()} | {f"cuda:{index}": torch.cuda.max_memory_allocated(index) for index in self._gpus}
        return self._growth(peak)

    def _growth(self, bytes_by_device: dict[str, int]) -> dict[str, int]:
        """Growth by device, without GPUs that did not grow."""
        grown = {name: value - self._before.get(name, 0) for name, value in bytes_by_device.items()}
        return {name: value for name, value in grown.items() if value or name == "host"}


def _resident() -> int:
    if not os.path.exists("/proc/self/statm"):
        return _peak_resident()
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _peak_resident() -> int:
    if os.path.exists("/proc/self/status"):
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
