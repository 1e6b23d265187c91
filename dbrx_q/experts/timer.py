"""Time that a GPU and the CPU spend, without making either wait for the other."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

__all__ = ["TimedWork", "Timer", "on_device"]

_MANY = 256  # pieces of work that may wait to be read off


@dataclass
class TimedWork:
    """A piece of work. end: when a GPU is through with it; None on the CPU, or before it was begun."""

    end: torch.cuda.Event | None = None


class Timer:
    """Adds up how long work took.

    Args:
        device: a GPU, whose work is timed by its own clock; or the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @property
    def seconds(self) -> float:
        """So far; waits for a GPU that is still at work."""
        while self._pending:
            self._pending[0][1].synchronize()
            self._read_off()
        return self._seconds

    def add(self, seconds: float) -> None:
        """Time that was measured elsewhere."""
        self._seconds += seconds

    @contextmanager
    def of_gpu(self) -> Iterator[TimedWork]:
        """Time what is begun within it on the device."""
        timed = TimedWork()
        if self._device.type != "cuda":
            started = time.perf_counter()
            yield timed
            self._seconds += time.perf_counter() - started
            return
        stream = torch.cuda.current_stream(self._device)
        begin, timed.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(stream)
        yield timed
        timed.end.record(stream)
        self._pending.append((begin, timed.end))
        while len(self._pending) > _MANY and self._pending[0][1].query():
            self._read_off()

    def _read_off(self) -> None:
        begin, end = self._pending.popleft()
        self._seconds += begin.elapsed_time(end) / 1000  # of milliseconds


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Within it a GPU is the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
