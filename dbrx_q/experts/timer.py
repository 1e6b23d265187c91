"""The time that a GPU and the CPU spend, measured without making either wait for the other."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

__all__ = ["TimedWork", "Timer"]

_MAX_PENDING = 256  # pairs of events that may wait to be evaluated


@dataclass
class TimedWork:
    """A piece of work that is timed."""

    end: torch.cuda.Event | None = None
    """The GPU passes it after the work; None on the CPU, or before the work was started."""


class Timer:
    """Adds up how long work took.

    Args:
        device: a GPU, whose work is timed by events on its stream; or the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @property
    def seconds(self) -> float:
        """The sum so far; waits for the GPU to finish its timed work."""
        while self._pending:
            self._pending[0][1].synchronize()
            self._evaluate_first()
        return self._seconds

    def add(self, seconds: float) -> None:
        """Add time that was measured elsewhere."""
        self._seconds += seconds

    @contextmanager
    def gpu_work(self) -> Iterator[TimedWork]:
        """Time the work that the block starts on the device."""
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
        while len(self._pending) > _MAX_PENDING and self._pending[0][1].query():
            self._evaluate_first()

    def _evaluate_first(self) -> None:
        begin, end = self._pending.popleft()
        self._seconds += begin.elapsed_time(end) / 1000  # events measure milliseconds
