"""GPTQ: rounds a matrix column by column; later columns compensate the error of each.

Dimension letters: `N` rows, `K` the reduction axis, `G` group size, `n` = K/G groups of a row.
"""

from __future__ import annotations

import torch

from dbrx_q.kernels.rounding import gptq_block

from .grid import Grid
from .moments import Moments

__all__ = ["gptq"]

_BLOCK = 128  # columns between two updates of all later columns


def gptq(weight: torch.Tensor, moments: Moments, grid: Grid) -> torch.Tensor:
    """Whole numbers u, float32 [N, K], on `grid`, whose values have a small (value - weight) H (value - weight)^T.

    Frantar et al. 2022, "GPTQ", algorithm 1. Columns are rounded in the order of H's diagonal, the largest first ("act-order"). Groups
    are still neighbouring columns, so the order costs nothing at run time. Rows are independent of each other.

    Args:
        weight: float32 [N, K], to be approximated.
        moments: the moments of its inputs.
        grid: the grid of all groups, chosen beforehand.
    """
    K = weight.shape[1]
    order, factor = moments.order, moments.factor
    groups, grids = order // grid.group_size, grid.transposed()
    left = grid.without_offsets(weight).T[order]
    u = torch.empty_like(left)
    for first in range(0, K, _BLOCK):
        end = min(first + _BLOCK, K)
        errors = left[first:end]
        u[first:end] = gptq_block(errors, factor[first:end, first:end], *(part[groups[first:end]] for part in grids))
        left[end:].addmm_(factor[first:end, end:].T, errors, alpha=-1)
    left[order] = u
    return left.T.contiguous()
