"""The values that a grouped format offers to each group of a matrix, and how they become a packed weight.

Dimension letters: `N` rows, `K` the reduction axis, `G` group size, `n` = K/G groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dbrx_q.checkpoint.layout import GROUP_SIZES, TensorFormat
from dbrx_q.kernels.cpu import quantize as cpu_quantize
from dbrx_q.kernels.formats import int4
from dbrx_q.kernels.formats.groups import check_group_size, check_scales, grouped, steps_of
from dbrx_q.kernels.formats.int4 import Int4Weight
from dbrx_q.kernels.formats.int8 import Int8Weight
from dbrx_q.kernels.grid_search import least_squares

__all__ = ["Grid", "levels_of", "packed", "range_grid", "searched_grid", "to_nearest"]

_INT4_LEVELS = 15
_INT8_LEVEL = 127
# Of the range of a group; below 0.6 no group of the bundled model was served best.
_SHARES = [1 - 0.025 * step for step in range(17)]


@dataclass(frozen=True)
class Grid:
    """Value = scale * u with a whole number u from low to high, per group; int4: u = code - zero-point, int8: u = code.

    scales: float16 [N, n]. zeros: float32 [N, n], whole numbers 0..15; None for int8. group_size: G.
    """

    scales: torch.Tensor
    zeros: torch.Tensor | None
    group_size: int

    @property
    def steps(self) -> torch.Tensor:
        """float32 [N, n]: the scales, 1 where a scale is 0."""
        return steps_of(self.scales)

    @property
    def low(self) -> torch.Tensor:
        """float32 [N, n], the least u."""
        return torch.full_like(self.scales, -_INT8_LEVEL, dtype=torch.float32) if self.zeros is None else -self.zeros

    @property
    def high(self) -> torch.Tensor:
        """float32 [N, n], the largest u."""
        return torch.full_like(self.scales, _INT8_LEVEL, dtype=torch.float32) if self.zeros is None else _INT4_LEVELS - self.zeros

    def transposed(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """float32 [n, N] each: scale, least and largest u of every group."""
        scales, low, high = (part.T.contiguous() for part in (self.scales.float(), self.low, self.high))
        return scales, low, high

    def round(self, weight: torch.Tensor) -> torch.Tensor:
        """The nearest u, float32 [N, K], to each element of a weight [N, K]."""
        steps, low, high = (part.unsqueeze(-1) for part in (self.steps, self.low, self.high))
        return (grouped(weight.float(), self.group_size) / steps).round().clamp(low, high).flatten(-2)

    def decode(self, u: torch.Tensor) -> torch.Tensor:
        """float32 [N, K]: the values of u [N, K]."""
        return (grouped(u, self.group_size) * self.scales.float().unsqueeze(-1)).flatten(-2)


def range_grid(weight: torch.Tensor, fmt: TensorFormat) -> Grid:
    """The grid of rounding to nearest: each group's own range, zero included, as `int4.quantize` and `int8.quantize` cut it.

    Args:
        weight: [N, K].
        fmt: int4 or int8.

    Raises:
        FormatError: the group size is not offered or does not divide K, or a range is too wide for float16 scales.
    """
    return _grid(*_ranges(weight, fmt), fmt)


def searched_grid(weight: torch.Tensor, fmt: TensorFormat, importance: torch.Tensor | None = None) -> Grid:
    """Of 17 shares of each group's range, from all of it to six tenths, and of three zero-points for int4, those of the least error.

    The error is the sum of importance * (value - weight)^2 after rounding to nearest, so that far elements are clipped where that serves
    the others.

    Args:
        weight: [N, K].
        fmt: int4 or int8.
        importance: float32 [K], such as the mean square of what each input brings; None weighs all elements alike.

    Raises:
        FormatError: as for `range_grid`.
    """
    check_group_size(weight.shape[-1], fmt.group_size, GROUP_SIZES[fmt.format])
    scales, zeros = least_squares(weight, fmt.group_size, levels_of(fmt), torch.tensor(_SHARES), importance)
    check_scales(scales)
    return Grid(scales, zeros if fmt.format == "int4" else None, fmt.group_size)


def levels_of(fmt: TensorFormat) -> int:
    """The largest code: 15 for int4, whose codes have a zero-point, 127 for int8."""
    return _INT8_LEVEL if fmt.format == "int8" else _INT4_LEVELS


def to_nearest(weight: torch.Tensor, grid: Grid) -> tuple[Int4Weight | Int8Weight, float, float]:
    """The packed weight of `grid.round(weight)`, its sum of squared errors and the sum of squares of the weight [N, K], in one pass."""
    if weight.device.type != "cpu":
        wide, u = weight.float(), grid.round(weight)
        error, square = (float(part.square().sum(dtype=torch.float64)) for part in (grid.decode(u) - wide, wide))
        return packed(grid, u), error, square
    if grid.zeros is None:
        return cpu_quantize.round_int8(weight, grid.scales, grid.group_size)
    return cpu_quantize.round_int4(weight, grid.scales, grid.zeros, grid.group_size)


def packed(grid: Grid, u: torch.Tensor) -> Int4Weight | Int8Weight:
    """The packed weight of whole numbers u [N, K] on a grid."""
    if grid.zeros is None:
        return Int8Weight(u.to(torch.int8), grid.scales, grid.group_size)
    codes = grouped(u, grid.group_size) + grid.zeros.unsqueeze(-1)
    return Int4Weight(int4.pack(codes.flatten(-2).to(torch.uint8)), grid.scales, int4.pack(grid.zeros.to(torch.uint8)), grid.group_size)


def _ranges(weight: torch.Tensor, fmt: TensorFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [N, n] each: the least and the largest element of every group, zero included."""
    check_group_size(weight.shape[-1], fmt.group_size, GROUP_SIZES[fmt.format])
    groups = grouped(weight.float(), fmt.group_size)
    return groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)


def _grid(low: torch.Tensor, high: torch.Tensor, fmt: TensorFormat) -> Grid:
    if fmt.format == "int8":
        scales = (torch.maximum(high, -low) / _INT8_LEVEL).half()
        check_scales(scales)
        return Grid(scales, None, fmt.group_size)
    scales = ((high - low) / _INT4_LEVELS).half()
    check_scales(scales)
    return Grid(scales, (-low / steps_of(scales)).round().clamp(0, _INT4_LEVELS), fmt.group_size)
