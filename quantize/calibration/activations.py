"""Activations of the calibration tokens, in memory or in a file.

Dimension letters: `T` tokens, `D` channels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from dbrx_q.errors import CheckpointError

__all__ = ["ActivationStore"]

_STEP_BYTES = 32 << 20


class ActivationStore:
    """A float32 matrix [T, D], zeros at first.

    Args:
        tokens: T.
        channels: D.
        path: the file to create for them; None for memory.
    """

    def __init__(self, tokens: int, channels: int, path: Path | None = None) -> None:
        self.tokens, self.channels = tokens, channels
        self._memory = torch.zeros(tokens, channels) if path is None else None
        self._fd = -1
        if path is not None:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            os.ftruncate(self._fd, self.nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return self.tokens * self.channels * 4

    def read(self, first: int, count: int) -> torch.Tensor:
        """Rows first .. first + count - 1, which the caller must not change."""
        if self._memory is not None:
            return self._memory[first : first + count]
        out = torch.empty(min(count, self.tokens - first), self.channels)
        _read(self._fd, out, first * self.channels * 4)
        return out

    def write(self, first: int, values: torch.Tensor) -> None:
        """Replace rows first .. by values [n, D], on any device."""
        if self._memory is not None:
            self._memory[first : first + len(values)] = values
        else:
            _write(self._fd, values.cpu().contiguous(), first * self.channels * 4)

    def gather(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rows [n, D] of the tokens, int64 [n], ascending."""
        if self._memory is not None:
            return self._memory[tokens]
        out = torch.empty(len(tokens), self.channels)
        for into, first, count in _runs(tokens):
            _read(self._fd, out[into : into + count], first * self.channels * 4)
        return out

    def add(self, tokens: torch.Tensor, values: torch.Tensor) -> None:
        """Add values [n, D], on any device, to the rows of tokens, int64 [n], ascending and no token twice."""
        if self._memory is not None:
            self._memory.index_add_(0, tokens, values.cpu())
            return
        sums = self.gather(tokens) + values.cpu()
        for into, first, count in _runs(tokens):
            _write(self._fd, sums[into : into + count], first * self.channels * 4)

    def pieces(self, count: int) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows) of `count` rows at a time."""
        for first in range(0, self.tokens, count):
            yield first, self.read(first, min(count, self.tokens - first))

    def fill(self, count: int, values: Callable[[int, int], torch.Tensor]) -> None:
        """Replace all rows by those that `values`, called with (first row, number of rows), returns for `count` rows at a time."""
        for first in range(0, self.tokens, count):
            self.write(first, values(first, min(count, self.tokens - first)))

    def save(self, path: Path) -> None:
        """Write all rows to a file, which gets this name when it is complete."""
        incomplete = path.with_suffix(".begun")
        with open(incomplete, "wb", buffering=0) as file:
            n_written = 0
            for _, rows in self.pieces(self._step):
                _write(file.fileno(), rows, n_written)
                n_written += rows.nbytes
            os.fsync(file.fileno())
        os.replace(incomplete, path)

    def load(self, path: Path) -> None:
        """Replace all rows by those that `save` wrote.

        Raises:
            CheckpointError: a file of another size.
        """
        with open(path, "rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size != self.nbytes:
                raise CheckpointError(
                    f"{path}: must hold {self.nbytes} bytes of activations; it is damaged. Remove the folder and start again"
                )

            def rows(first: int, count: int) -> torch.Tensor:
                out = torch.empty(count, self.channels)
                _read(file.fileno(), out, first * self.channels * 4)
                return out

            self.fill(self._step, rows)

    def close(self) -> None:
        """Free the memory or close the file."""
        self._memory = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def _step(self) -> int:
        return max(1, _STEP_BYTES // (4 * self.channels))


def _runs(tokens: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """(index in `tokens`, first token, number) of every run of consecutive tokens."""
    if not len(tokens):
        return
    breaks = (tokens.diff() != 1).nonzero(as_tuple=True)[0] + 1
    starts = [0, *breaks.tolist()]
    for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        yield start, int(tokens[start]), end - start


def _read(fd: int, out: torch.Tensor, offset: int) -> None:
    view = out.numpy().data.cast("B") if out.numel() else memoryview(b"")
    n_read = 0
    while n_read < len(view):
        n = os.preadv(fd, [view[n_read:]], offset + n_read)
        if not n:
            raise CheckpointError(f"the file of activations ended at byte {offset + n_read}. Remove the folder and start again")
        n_read += n


def _write(fd: int, values: torch.Tensor, offset: int) -> None:
    view = values.numpy().data.cast("B") if values.numel() else memoryview(b"")
    n_written = 0
    while n_written < len(view):
        n_written += os.pwrite(fd, view[n_written:], offset + n_written)
