"""GPTQ from grids that are searched by what an error costs GPTQ, and from several of them, of which each row keeps the best.

Dimension letters: `N` rows, `K` the reduction axis.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dbrx_q.layout import TensorFormat

from .gptq import gptq
from .grid import Grid, range_grid, searched_grid
from .moments import Moments
from .refine import descend, fit_scales

__all__ = ["best_of", "refined", "stakes", "start"]


def stakes(moments: Moments) -> torch.Tensor:
    """float32 [K]: what a squared error in each column costs once all columns that GPTQ rounds after it have made up for it.

    1 / U[i, i]^2 with U the Cholesky factor of the inverse Hessian (Frantar et al. 2022, "GPTQ", equation 2). It is far from the
    Hessian's diagonal where inputs depend on each other: an error in an early column is made up for almost for nothing.
    """
    found = torch.empty(len(moments.order))
    found[moments.order] = moments.factor.diagonal().square().reciprocal()
    return found


def start(target: torch.Tensor, moments: Moments, fmt: TensorFormat, share: float | None = None) -> Grid:
    """A grid for GPTQ to begin with: a share of each group's range, or without one what a search by `stakes` finds.

    Args:
        target: float32 [N, K].
        moments: of its inputs.
        fmt: int4 or int8.
        share: of each range.

    Raises:
        FormatError: the group size is not offered or does not divide K, or a range is too wide for float16 scales.
    """
    return searched_grid(target, fmt, stakes(moments)) if share is None else range_grid(target * share, fmt)


def refined(target: torch.Tensor, moments: Moments, grid: Grid) -> tuple[Grid, torch.Tensor]:
    """(grid, u [N, K]) of GPTQ on a grid, then scales that fit its codes and codes that fit those scales."""
    u = gptq(target, moments, grid)
    grid = fit_scales(target, moments.hessian, grid, u)
    return grid, descend(target, moments.hessian, grid, u, sweeps=2)


def best_of(target: torch.Tensor, moments: Moments, grids: Sequence[Grid]) -> tuple[Grid, torch.Tensor]:
    """(grid, u [N, K]): every row as `refined` leaves it from the one of `grids` that serves it best.

    What is compared is the error on the inputs, (value - target) H (value - target)^T; of equals the first. Rows are independent of each
    other, so that none is worse than from any of the grids alone; each grid costs as much as the first.

    Args:
        target: float32 [N, K].
        moments: of its inputs.
        grids: at least one, all of the same format.
    """
    best, least = refined(target, moments, grids[0]), torch.empty(0)
    if len(grids) > 1:
        least = _errors(target, moments, *best)
    for other in grids[1:]:
        found = refined(target, moments, other)
        errors = _errors(target, moments, *found)
        better = errors < least
        least = torch.where(better, errors, least)
        best = _merged(better[:, None], found, best)
    return best


def _errors(target: torch.Tensor, moments: Moments, grid: Grid, u: torch.Tensor) -> torch.Tensor:
    """float32 [N]."""
    error = grid.decode(u) - target
    return ((error @ moments.hessian) * error).sum(-1)


def _merged(first: torch.Tensor, one: tuple[Grid, torch.Tensor], other: tuple[Grid, torch.Tensor]) -> tuple[Grid, torch.Tensor]:
    """The rows of `one` where `first`, bool [N, 1], and of `other` elsewhere."""
    (grid, u), (grid_2, u_2) = one, other
    zeros = None if grid.zeros is None or grid_2.zeros is None else torch.where(first, grid.zeros, grid_2.zeros)
    return Grid(torch.where(first, grid.scales, grid_2.scales), zeros, grid.group_size), torch.where(first, u, u_2)
