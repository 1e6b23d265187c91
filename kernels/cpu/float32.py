"""Products of plain float32 matrices by the faster of the two libraries that torch has: its own matmul, or oneDNN.

torch's matmul calls MKL on x86-64. On a Zen 5 MKL reaches 152 GFLOP/s on two cores and oneDNN 377; on a Zen 4 200 and 220; on Intel's chips
the two are alike. The first large product therefore times both, and the result is kept in the user's cache, so that later runs on this chip
repeat the same bits. Each library gives the same bits on any number of threads.

Dimension letters: `T` tokens, `N` output features, `K` input features.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import threading
import time
from contextlib import suppress
from enum import Enum
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

from dbrx_q.kernels.formats.errors import FormatError
from dbrx_q.kernels.formats.user_cache import user_cache, write_to_cache

__all__ = ["SWITCH", "Library", "library", "library_for", "product"]

SWITCH = "DBRX_Q_FLOAT32"
"""The environment variable that names a `Library` in place of the measurement."""


class Library(Enum):
    """What multiplies plain float32 matrices."""

    TORCH = "torch"
    """torch's matmul: MKL on x86-64."""
    ONEDNN = "onednn"
    """oneDNN, without a copy of the weight in another order."""


# Smaller products take microseconds in both, and models of such matrices are not worth a measurement.
_LEAST_ROWS = 16
_LEAST_WEIGHT = 1 << 20
# Between the ratios that were seen: 1.1 on a Zen 4, 2.5 on a Zen 5. Noise must not decide.
_LEAST_GAIN = 1.3
_SHAPE = 128, 512, 2048  # T, N, K of the product that is timed: 2 to 5 ms on one core
_TURNS = 5
_lock = threading.Lock()


def library_for(T: int, N: int, K: int) -> Library:
    """What multiplies float32 [T, K] by a weight [N, K]; the first call for a large product may measure."""
    return Library.TORCH if T < _LEAST_ROWS or N * K < _LEAST_WEIGHT else library()


def product(x: torch.Tensor, weight: torch.Tensor, by: Library) -> torch.Tensor:
    """[T, N] = x [T, K] @ weight [N, K].T in float32.

    oneDNN compiles code for every T and keeps it: pass a T of `choice.padded_rows`.
    """
    if by is Library.TORCH:
        return F.linear(x, weight)
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return y


def library() -> Library:
    """The faster library for large products on this chip: by `SWITCH`, as measured before, or measured now in 50 ms.

    Raises:
        FormatError: the environment variable names none.
    """
    named = os.environ.get(SWITCH, "")
    names = [member.value for member in Library]
    if named and named not in names:
        raise FormatError(f"{SWITCH} must be one of {', '.join(names)}; found {named!r}. Unset it for the faster one")
    if named:
        return Library(named) if _has_onednn() else Library.TORCH
    with _lock:
        return _measured()


@cache
def _measured() -> Library:
    if not _has_onednn():
        return Library.TORCH
    path = user_cache(note=False) / "float32" / f"{_chip()}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        return Library(json.loads(path.read_text(encoding="utf-8"))["library"])
    seconds = _seconds()
    faster = Library.ONEDNN if seconds[Library.ONEDNN] * _LEAST_GAIN < seconds[Library.TORCH] else Library.TORCH
    measured = {by.value: value for by, value in seconds.items()}
    write_to_cache(path, json.dumps({"library": faster.value, "seconds": measured, "torch": torch.__version__}).encode())
    return faster


def _seconds() -> dict[Library, float]:
    """Seconds of one product on one thread by each library: the least of several turns, since others may share the machine."""
    T, N, K = _SHAPE
    x, weight = torch.ones(T, K), torch.ones(N, K)
    seconds = dict.fromkeys(Library, float("inf"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for turn in range(1 + _TURNS):
            for by in Library:
                started = time.perf_counter()
                product(x, weight, by)
                if turn:  # the first compiles
                    seconds[by] = min(seconds[by], time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return seconds


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _chip() -> str:
    """A name for this chip with this version of torch. A home folder may be shared by several machines."""
    kinds = ("vendor_id", "cpu family", "model", "stepping", "flags", "CPU implementer", "CPU part", "Features")
    described = [platform.machine(), platform.processor()]
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        described += sorted({line for line in lines if line.startswith(kinds)})
    return hashlib.sha256(json.dumps([torch.__version__, *described]).encode()).hexdigest()[:32]
