"""The values that a format with a uniform grid offers to each group of a matrix.

Dimension letters: `N` rows, `K` the reduction axis, `G` group size, `n` = K/G groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dbrx_q.errors import FormatError
from dbrx_q.kernels.formats.format import GridLevels
from dbrx_q.kernels.formats.groups import check_scales, grouped, steps_of
from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight
from dbrx_q.kernels.formats.registry import TensorFormat
from dbrx_q.kernels.grid_search import least_squares
from dbrx_q.kernels.quantize import quantize_to_grid

__all__ = ["Grid", "levels_of", "packed", "searched_grid", "to_nearest"]

# Shares of a group's range; no share below 0.6 was the best for any group of the bundled model.
_SHARES = [1 - 0.025 * step for step in range(17)]


@dataclass(frozen=True)
class Grid:
    """The values of every group: scale * u, plus an offset in some formats; u is a whole number within the bounds of `GridLevels`."""

    scales: torch.Tensor
    """[N, n], float16 or the dtype of the format's offsets."""
    zeros: torch.Tensor | None
    """float32 [N, n], whole numbers, the zero-points; None in a symmetric grid and in one with offsets."""
    fmt: TensorFormat
    """The format."""
    offsets: torch.Tensor | None = None
    """[N, n] in the dtype of the scales, the values of u = 0; None in a format without offsets, where they are 0."""

    @classmethod
    def of(cls, scales: torch.Tensor, shifts: torch.Tensor, fmt: TensorFormat) -> Grid:
        """The grid that a search of `kernels/grid_search.py` returns.

        Raises:
            FormatError: a scale or an offset is infinite.
        """
        levels = levels_of(fmt)
        check_scales(scales)
        if levels.offsets is not None:
            check_scales(shifts)
            return cls(scales, None, fmt, shifts)
        return cls(scales, None if levels.symmetric else shifts, fmt)

    @property
    def group_size(self) -> int:
        """G."""
        return self.fmt.group_size

    @property
    def steps(self) -> torch.Tensor:
        """float32 [N, n]: the scales, or 1 where a scale is 0."""
        return steps_of(self.scales)

    @property
    def low(self) -> torch.Tensor:
        """float32 [N, n], the least u."""
        if self.zeros is not None:
            return -self.zeros
        least = 0 if self.offsets is not None else -levels_of(self.fmt).levels
        return torch.full_like(self.scales, least, dtype=torch.float32)

    @property
    def high(self) -> torch.Tensor:
        """float32 [N, n], the largest u."""
        levels = levels_of(self.fmt).levels
        return torch.full_like(self.scales, levels, dtype=torch.float32) if self.zeros is None else levels - self.zeros

    def transposed(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """float32 [n, N] each: scale, least and largest u of every group."""
        scales, low, high = (part.T.contiguous() for part in (self.scales.float(), self.low, self.high))
        return scales, low, high

    def round(self, weight: torch.Tensor) -> torch.Tensor:
        """The nearest u, float32 [N, K], to each element of a weight [N, K]."""
        steps, low, high = (part.unsqueeze(-1) for part in (self.steps, self.low, self.high))
        return (grouped(self.without_offsets(weight.float()), self.group_size) / steps).round().clamp(low, high).flatten(-2)

    def without_offsets(self, weight: torch.Tensor) -> torch.Tensor:
        """float32 [N, K]: a weight [N, K] less the offsets, which scale * u approximates; the weight itself in a format without offsets."""
        if self.offsets is None:
            return weight
        return (grouped(weight, self.group_size) - self.offsets.float().unsqueeze(-1)).flatten(-2)

    def dequantize(self, u: torch.Tensor) -> torch.Tensor:
        """float32 [N, K]: the values of u [N, K]."""
        values = grouped(u, self.group_size) * self.scales.float().unsqueeze(-1)
        return (values if self.offsets is None else values.add_(self.offsets.float().unsqueeze(-1))).flatten(-2)


def searched_grid(weight: torch.Tensor, fmt: TensorFormat, importance: torch.Tensor | None = None) -> Grid:
    """For each group, the grid of least error among 17 shares of its range, from all of it to six tenths, and three zero-points for each.

    The error is the sum of importance * (value - weight)^2 after rounding to nearest, so that distant elements are clipped where the error
    of the others falls by more. A symmetric grid has no zero-points to choose from; `least_squares` says what is tried of other grids.

    Args:
        weight: [N, K].
        fmt: a format with a uniform grid.
        importance: float32 [K], such as the mean square of each input; None weighs all elements alike.

    Raises:
        FormatError: the format has no uniform grid, its group size does not divide K, or a range is too wide for the dtype of scales.
    """
    levels = levels_of(fmt)
    fmt.check(weight.shape[-1])
    return Grid.of(*least_squares(weight, fmt.group_size, levels, torch.tensor(_SHARES), importance), fmt)


def levels_of(fmt: TensorFormat) -> GridLevels:
    """The uniform grid of a format.

    Raises:
        FormatError: it has none.
    """
    levels = fmt.record.grid
    if levels is None:
        raise FormatError(f"the format must have a uniform grid; found {fmt}. Choose the method rtn")
    return levels


def to_nearest(weight: torch.Tensor, grid: Grid) -> tuple[QuantizedWeight, float, float]:
    """The packed weight of `grid.round(weight)`, its sum of squared errors and the sum of squares of the weight [N, K], in one pass."""
    return quantize_to_grid(weight, grid.scales, grid.zeros if grid.offsets is None else grid.offsets, grid.fmt)


def packed(grid: Grid, u: torch.Tensor) -> QuantizedWeight:
    """The packed weight of whole numbers u [N, K] on a grid."""
    return levels_of(grid.fmt).pack(u, grid.scales, grid.zeros if grid.offsets is None else grid.offsets, grid.group_size)
