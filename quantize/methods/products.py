"""The large matrix products of calibration: on the CPU in pieces that do not depend on the number of threads, or on a GPU.

Dimension letters: `T` tokens, `N` rows of a weight, `K` the reduction axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from dbrx_q.kernels.cpu.linear import has_matrix_unit

from .workers import Workers

__all__ = ["Products", "fastest_dtype"]

_ROWS, _TOKENS = 2048, 2048  # of a product, for one thread
_COLUMNS = 1024  # of a sum of outer products, for one thread
_LARGE = 1024  # channels from which bfloat16 pays off


class Products:
    """Multiplies with float32 sums.

    Args:
        workers: the threads that share the work.
        bfloat16: whether factors are rounded to bfloat16, as DBRX itself has them (for sums of outer products on a GPU to TF32),
            for chips with a matrix unit for it.
        device: multiplies and holds the results; None for the CPU's threads.
    """

    def __init__(self, workers: Workers, *, bfloat16: bool, device: torch.device | None = None) -> None:
        self.workers, self.bfloat16, self.device = workers, bfloat16, device

    @classmethod
    def fastest(cls, workers: Workers, channels: int, device: torch.device | None = None) -> Products:
        """bfloat16 where this chip has a matrix unit and the model has enough channels for it to pay, otherwise float32."""
        return cls(
            workers, bfloat16=channels >= _LARGE and (device is not None or fastest_dtype(channels) == torch.bfloat16), device=device
        )

    @property
    def place(self) -> torch.device:
        """The device that holds the results."""
        return self.device or torch.device("cpu")

    def on_cpu(self) -> Products:
        """The same products on the CPU's threads."""
        return Products.fastest(self.workers, _LARGE if self.bfloat16 else 0)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the factors."""
        return torch.bfloat16 if self.bfloat16 else torch.float32

    def prepared(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight in the dtype of its products and, if there is room, on their device: it is converted once for many products."""
        try:
            return weight.to(self.place, self.dtype)
        except torch.OutOfMemoryError:
            return weight.to(self.dtype)

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x @ weight.T, float32 [T, N], for x [T, K] and a weight [N, K] of any floating dtype, best the dtype of `prepared`."""
        dtype = self.dtype
        if self.device is not None and weight.device == self.device:
            try:
                return (x.to(self.device, dtype) @ weight.to(dtype).T).float()
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
        x, weight = x.to("cpu", dtype), weight.cpu()
        out = torch.empty(len(x), len(weight))

        def multiply(place: tuple[slice, slice]) -> None:
            tokens, rows = place
            out[tokens, rows] = x[tokens] @ weight[rows].to(dtype).T

        self.workers.map(multiply, [(tokens, rows) for rows in _slices(len(weight), _ROWS) for tokens in _slices(len(x), _TOKENS)])
        return out

    def add_outer(self, into: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, upper: bool = False) -> None:
        """into [K, K] += left.T @ right for float32 left, right [T, K], all on `place`; `upper`: only above the diagonal is needed."""
        if self.device is not None:
            with self._rounding():
                into.addmm_(left.T, right)
            return

        def accumulate(columns: slice) -> None:
            rows = slice(0, columns.stop if upper else len(into))
            into[rows, columns].addmm_(left[:, rows].T, right[:, columns])

        with self._rounding():
            self.workers.map(accumulate, list(_slices(into.shape[1], _COLUMNS))[::-1])

    def add_outers(self, sums: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
        """into += left.T @ right for each (into [K, K], left [T, K], right [T, K]), as `add_outer` does; threads share small matrices."""
        if self.device is not None or any(len(into) > _COLUMNS for into, _, _ in sums):
            for into, left, right in sums:
                self.add_outer(into, left, right)
            return
        with self._rounding():
            self.workers.map(lambda item: item[0].addmm_(item[1].T, item[2]), sums)

    @contextmanager
    def _rounding(self) -> Iterator[None]:
        before = torch.get_float32_matmul_precision()
        if self.bfloat16:
            # "medium" is bfloat16 on the CPU, "high" is TF32 on a GPU.
            torch.set_float32_matmul_precision("medium" if self.device is None else "high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def fastest_dtype(channels: int) -> torch.dtype:
    """The dtype of the factors on this CPU."""
    return torch.bfloat16 if channels >= _LARGE and has_matrix_unit() else torch.float32


def _slices(length: int, step: int) -> Iterator[slice]:
    for first in range(0, length, step):
        yield slice(first, min(first + step, length))
