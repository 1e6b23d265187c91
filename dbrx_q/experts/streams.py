"""The current device and stream of a GPU, and the order of work on its streams."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["StreamOrder", "on_device"]


class StreamOrder:
    """Makes a GPU's streams take turns where callers change the current stream: what they share is ready for the next stream.

    Args:
        device: a GPU, whose current stream is the first; or the CPU, which has none.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def follow(self) -> None:
        """Let the current stream go on after all work of the stream that was current at the last call."""
        if self._last is None or _handle(self._device) == self._last.cuda_stream:
            return
        stream = torch.cuda.current_stream(self._device)
        stream.wait_stream(self._last)
        self._last = stream


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one for the block; does nothing for the CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _handle(device: torch.device) -> int:
    """The handle of a GPU's current stream, without the object that `torch.cuda.current_stream` makes: every layer of a token asks."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch._C._cuda_getCurrentRawStream(index)
