"""Host memory for weights."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from functools import cache
from pathlib import Path

import torch

__all__ = ["allowed_bytes", "available_bytes", "empty_host", "peak_memory_bytes", "resident_bytes"]

_HUGE_PAGE = 1 << 21
_MADV_HUGEPAGE = 14


def empty_host(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised CPU tensor; a large one asks Linux for huge pages, since streaming weights through 4 KB pages misses the TLB."""
    out = torch.empty(shape, dtype=dtype)
    if math.prod(shape) * dtype.itemsize >= 8 * _HUGE_PAGE and sys.platform == "linux":
        first = -(-out.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        end = (out.data_ptr() + out.nbytes) // _HUGE_PAGE * _HUGE_PAGE
        # Advice only: a kernel that has no huge pages to give answers with an error, and small ones serve.
        _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _MADV_HUGEPAGE)
    return out


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def peak_memory_bytes() -> int:
    """The largest resident memory of this process so far. (Linux's getrusage tells the largest of the process that began it, too.)"""
    import resource

    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """The resident memory of this process now; where the system does not tell, the largest so far."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_memory_bytes()


def available_bytes() -> int:
    """Memory that can be given to this process without swapping: what Linux estimates, or its container is still allowed, elsewhere all
    that the machine has."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([free, *allowed_bytes()])


def allowed_bytes(groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What each control group around this process may still take, where one has a limit; what it caches of files counts as free.

    Args:
        groups: which they are, as Linux tells it.
        mounted: where they can be read.
    """
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, limit, usage, prefix = (  # of version 1, and of version 2
            (mounted / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
            if controllers
            else (mounted, "memory.max", "memory.current", "")
        )
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            if not folder.is_relative_to(root):
                break
            try:
                most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
                stat = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no limit, which is written as "max", or none that can be read
                continue
            cached = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
            found.append(max(0, most - used + cached))
    return found
