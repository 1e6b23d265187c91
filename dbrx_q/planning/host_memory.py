"""Host memory: tensors for weights, how much this process uses, and how much it may still take."""

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
    """An uninitialized CPU tensor. A large one asks Linux for huge pages, because streaming weights through 4 KB pages misses the TLB."""
    out = torch.empty(shape, dtype=dtype)
    if math.prod(shape) * dtype.itemsize >= 8 * _HUGE_PAGE and sys.platform == "linux":
        first = -(-out.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        end = (out.data_ptr() + out.nbytes) // _HUGE_PAGE * _HUGE_PAGE
        # Advice only: a kernel without huge pages returns an error, and small pages work, too.
        _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _MADV_HUGEPAGE)
    return out


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def peak_memory_bytes() -> int:
    """The largest resident memory of this process so far. (On Linux, getrusage also counts the peak of the parent process.)"""
    import resource

    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """The resident memory of this process now; its peak where the system does not report the current value."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_memory_bytes()


def available_bytes() -> int:
    """Memory that this process can take without swapping: the smaller of Linux's estimate and the rest of its container's limit.

    On other systems, all memory of the machine.
    """
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([free, *allowed_bytes()])


def allowed_bytes(cgroups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What each control group of this process may still take, for every group with a limit. Cached file contents count as free.

    Args:
        cgroups: the file in which Linux lists the groups of this process.
        mount: where the groups' files are mounted.
    """
    try:
        lines = cgroups.read_text().splitlines()
    except OSError:
        return []
    remaining = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, limit_file, usage_file, prefix = (  # version 1, or version 2
            (mount / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
            if controllers
            else (mount, "memory.max", "memory.current", "")
        )
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            try:
                limit, used = int((folder / limit_file).read_text()), int((folder / usage_file).read_text())
                stat = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no limit, which is written as "max", or an unreadable one
                continue
            cached = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
            remaining.append(max(0, limit - used + cached))
    return remaining
