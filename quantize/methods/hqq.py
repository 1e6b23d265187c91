"""HQQ, half-quadratic quantization: fits scales to most elements of a group and accepts the errors of outliers.

It needs no calibration data.
"""

from __future__ import annotations

import torch

from dbrx_q.kernels.formats.registry import TensorFormat
from dbrx_q.kernels.grid_search import half_quadratic

from .grid import Grid, levels_of

__all__ = ["hqq_grid"]

_ITERATIONS = 20
_BETA, _GROWTH = 10.0, 1.01  # as published


def hqq_grid(weight: torch.Tensor, fmt: TensorFormat) -> Grid:
    """The grid with a small sum of |value - weight|^0.7.

    Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models".

    Each iteration sets the part e of the error that counts as an outlier by the generalised soft threshold, then fits the grid to
    weight - e by least squares. HQQ fits a zero-point of 16 bits; the formats here have an offset, a zero-point of four bits or none, so
    the scale is fitted too, and the best grid of all iterations is returned.

    Args:
        weight: [N, K].
        fmt: a format with a uniform grid.

    Raises:
        FormatError: as for `grid.searched_grid`.
    """
    levels = levels_of(fmt)
    fmt.check(weight.shape[-1])
    betas = torch.tensor([_BETA * _GROWTH**n for n in range(_ITERATIONS)])
    return Grid.of(*half_quadratic(weight, fmt.group_size, levels, betas), fmt)
