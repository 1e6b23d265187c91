"""Host memory for weights."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from functools import cache

import torch

__all__ = ["available_bytes", "empty_host", "peak_memory_bytes", "resident_bytes"]

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
    """Memory that this machine can give to processes without swapping: what Linux estimates, elsewhere all that it has."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
