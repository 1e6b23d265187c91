"""The last of several programs adds up what all of them stored: `arrive` on the device, and which counters a launch takes.

Programs that share a sum store partial results and arrive at a counter; the last one sets it back to zero. Launches that overlap must not
share counters: the programs of one would be taken for those of the other, and sums would silently lack partial results. Therefore:

- launches on one stream, which run one after the other, share the counters of that stream;
- a captured graph, which may be replayed on any stream, has counters of its own (`Graph`).

A kernel leaves its counters at zero, so that a new stream with the handle of a destroyed one finds zeros.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["MOST_COUNTERS", "Graph", "arrive", "counters", "new_counters", "using_counters"]

MOST_COUNTERS = 1 << 16
"""Counters of a set, 256 KB."""

# A set for each (index of the device, handle of the stream) that has launched a kernel. Sets are never freed: torch has 32 streams of each
# priority on a device and hands them out in turn.
_BY_STREAM: dict[tuple[int | None, int], torch.Tensor] = {}

_CHOSEN: ContextVar[torch.Tensor | None] = ContextVar("counters", default=None)

# The handle of a device's current stream, as Triton's driver asks for it: a hundred nanoseconds, while `torch.cuda.current_stream` makes an
# object. A torch without CUDA lacks it.
_current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0)


def counters(device: torch.device, n: int) -> torch.Tensor:
    """At least `n` int32 zeros for a launch on the current stream of `device`; the kernel must leave them at zero.

    They are those of `using_counters`, or the stream's. A capture by other means than `Graph` gets new ones for every launch, which the
    graph sets to zero on each replay: one more node of the graph.
    """
    assert n <= MOST_COUNTERS
    if device.type == "meta":
        return torch.empty(n, dtype=torch.int32, device=device)
    chosen = _CHOSEN.get()
    if chosen is not None:
        assert chosen.device == device, "counters must be on the device of the launch"
        return chosen
    stream = _stream(device)
    if stream and _capturing(device):  # the default stream, of handle 0, cannot capture
        return torch.zeros(n, dtype=torch.int32, device=device)
    key = device.index, stream
    known = _BY_STREAM.get(key)
    return known if known is not None else _BY_STREAM.setdefault(key, new_counters(device))


def new_counters(device: torch.device) -> torch.Tensor:
    """A set of counters, 256 KB, set to zero on the current stream of `device`."""
    return torch.zeros(MOST_COUNTERS, dtype=torch.int32, device=device)


@contextmanager
def using_counters(chosen: torch.Tensor) -> Iterator[None]:
    """Launches of this thread take counters of `chosen`, from `new_counters`. No two of them may overlap."""
    token = _CHOSEN.set(chosen)
    try:
        yield
    finally:
        _CHOSEN.reset(token)


_CAPTURES = threading.Lock()  # torch allows one capture at a time in a process


@cache  # captures that share a memory pool must share the stream
def _capture_stream(index: int) -> torch.cuda.Stream:
    """The stream of captures on a device. Torch's own one is on the device of the first capture: on others it would capture nothing."""
    return torch.cuda.Stream(index)


class Graph:
    """A CUDA graph with arrival counters, which are freed with it.

    Replays of one graph must follow each other, as they share all memory. Replays of different graphs may overlap.

    Args:
        device: a CUDA device.
        counters: from `new_counters`, for graphs that are only replayed one after the other, such as those of a model's layers; by default
            new ones.
    """

    def __init__(self, device: torch.device, counters: torch.Tensor | None = None) -> None:
        self._device = device
        self._counters = new_counters(device) if counters is None else counters
        self._graph = torch.cuda.CUDAGraph()

    @contextmanager
    def capture(self, pool: Any = None) -> Iterator[None]:
        """Capture the work of this thread; other threads may use the device meanwhile.

        Args:
            pool: the memory pool of another graph (`pool`), where the graphs are only replayed in the order in which they were captured.
        """
        with _CAPTURES, torch.cuda.device(self._device), using_counters(self._counters):
            stream = _capture_stream(torch.cuda.current_device())
            with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                yield

    @property
    def pool(self) -> Any:
        """The memory pool of the graph."""
        return self._graph.pool()

    def replay(self) -> None:
        """Run the captured work on the current stream of the current device."""
        self._graph.replay()


def _stream(device: torch.device) -> int:
    """The handle of the current stream of `device`; 0 for the default stream, and for the CPU."""
    index = device.index
    return 0 if index is None else _current_stream(index)


def _capturing(device: torch.device) -> bool:
    """Whether the current stream of `device` is being captured."""
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


@triton.jit
def arrive(counter, others):
    """True in the last of `others` + 1 programs that arrive at `counter`, which it resets to 0. It sees what the others stored before."""
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == others
    if last:
        tl.store(counter, 0)
    tl.debug_barrier()
    return last
