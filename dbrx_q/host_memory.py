"""Host memory for weights."""

from __future__ import annotations

import ctypes
import math
import sys
from functools import cache

import torch

__all__ = ["empty_host"]

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
