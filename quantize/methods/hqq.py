"""HQQ: half-quadratic quantization, which fits scales to most of a group's elements and lets outliers be outliers. No calibration data."""

from __future__ import annotations

import torch

from dbrx_q.kernels.formats.groups import check_scales
from dbrx_q.kernels.formats.registry import TensorFormat
from dbrx_q.kernels.grid_search import half_quadratic

from .grid import Grid, levels_of

__all__ = ["hqq_grid"]

_ITERATIONS = 20
_BETA, _GROWTH = 10.0, 1.01  # as published


def hqq_grid(weight: torch.Tensor, fmt: TensorFormat) -> Grid:
    """The grid of which the sum of |value - weight|^0.7 is small (Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine
    Learning Models").

    In turns, the part e of the error that counts as an outlier is set by the generalised soft threshold, and the grid is fitted to
    weight - e by least squares. HQQ fits a zero-point of 16 bits there; the formats here have four bits for it or none, so the scale is
    fitted too, and the best grid on the way is taken.

    Args:
        weight: [N, K].
        fmt: a format with a uniform grid.

    Raises:
        FormatError: as for `grid.searched_grid`.
    """
    levels = levels_of(fmt)
    fmt.check(weight.shape[-1])
    betas = torch.tensor([_BETA * _GROWTH**n for n in range(_ITERATIONS)])
    scales, zeros = half_quadratic(weight, fmt.group_size, levels, betas)
    check_scales(scales)
    return Grid(scales, None if levels.symmetric else zeros, fmt)
