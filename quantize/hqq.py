"""HQQ: half-quadratic quantization, which fits scales to most of a group's elements and lets outliers be outliers. No calibration data."""

from __future__ import annotations

import torch

from dbrx_q.kernels.groups import grouped, steps_of
from dbrx_q.layout import TensorFormat

from .grid import Grid, range_grid

__all__ = ["hqq_grid"]

_ITERATIONS = 20
_NORM = 0.7  # p of the norm that is made small
_BETA, _GROWTH = 10.0, 1.01  # as published


def hqq_grid(weight: torch.Tensor, fmt: TensorFormat) -> Grid:
    """The grid of which the sum of |value - weight|^0.7 is small (Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine
    Learning Models").

    In turns, the part e of the error that counts as an outlier is set by the generalised soft threshold, and the grid is fitted to
    weight - e by least squares. HQQ fits a zero-point of 16 bits there; the formats here have four bits for it or none, so the scale is
    fitted too, and the best grid on the way is taken.

    Args:
        weight: [N, K].
        fmt: int4 or int8.

    Raises:
        FormatError: as for `grid.range_grid`.
    """
    groups = grouped(weight.float(), fmt.group_size)  # [N, n, G]
    grid = best = range_grid(weight, fmt)
    least = torch.full(grid.scales.shape, torch.inf)
    beta = _BETA
    for _ in range(_ITERATIONS):
        u = grouped(grid.round(weight), fmt.group_size)
        error = groups - u * grid.scales.float().unsqueeze(-1)
        cost = error.abs().pow(_NORM).sum(-1)
        better = cost < least
        least = torch.where(better, cost, least)
        zeros = None if grid.zeros is None or best.zeros is None else torch.where(better, grid.zeros, best.zeros)
        best = Grid(torch.where(better, grid.scales, best.scales), zeros, fmt.group_size)
        # In units of the step, so that weights of any size are treated alike.
        unit = steps_of(grid.scales).unsqueeze(-1)
        threshold = (error.abs() / unit).clamp(min=torch.finfo(torch.float32).eps).pow(_NORM - 1) * unit / beta
        outlier = error.sign() * (error.abs() - threshold).clamp(min=0)
        wanted = groups - outlier
        squares = u.square().sum(-1)
        scales = torch.where(squares > 0, (u * wanted).sum(-1) / squares, grid.scales.float())
        scales = torch.where(scales > 0, scales, grid.scales.float()).half()
        zeros = None
        if grid.zeros is not None:
            steps = torch.where(scales == 0, 1.0, scales.float()).unsqueeze(-1)
            zeros = ((u + grid.zeros.unsqueeze(-1)) - wanted / steps).mean(-1).round().clamp(0, 15)
        grid = Grid(scales, zeros, fmt.group_size)
        beta = beta * _GROWTH
    return best
