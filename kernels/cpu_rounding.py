"""The sequential parts of rounding with a Hessian, row by row in one pass: each row is independent, so that threads share nothing.

Dimension letters: `N` rows, `B` columns of a block.
"""

from __future__ import annotations

import numba
import numpy as np
import torch

__all__ = ["descend_block", "gptq_block"]


def gptq_block(columns: torch.Tensor, factor: torch.Tensor, steps: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Whole numbers u, float32 [N, B], for the columns of a block in their order; each error is spread over the columns that follow.

    `columns` becomes the errors by which the columns after the block change: what is left is columns - errors @ factor's rows.

    Args:
        columns: float32 [N, B], contiguous; overwritten.
        factor: float32 [B, B], the block of the upper Cholesky factor.
        steps, low, high: float32 [N, B]: value = steps * u, u from low to high; a step of 0 stands for a value of 0.
    """
    u = torch.empty_like(columns)
    _gptq(*(part.numpy() for part in (columns, factor.contiguous(), steps, low, high, u)))
    return u


def descend_block(
    u: torch.Tensor, slope: torch.Tensor, hessian: torch.Tensor, steps: torch.Tensor, low: torch.Tensor, high: torch.Tensor
) -> torch.Tensor:
    """float32 [N, B]: by how much the values of a block's columns moved, each in turn to its best place, all others being as they are.

    Args:
        u: float32 [N, B], contiguous; overwritten.
        slope: float32 [N, B], half the gradient of the error with respect to the block's values, contiguous; overwritten.
        hessian: float32 [B, B], the block on the diagonal.
        steps, low, high: as for `gptq_block`.
    """
    moved = torch.empty_like(u)
    _descend(*(part.numpy() for part in (u, slope, hessian.contiguous(), steps, low, high, moved)))
    return moved


@numba.njit(nogil=True, cache=True)
def _gptq(columns, factor, steps, low, high, u):
    N, B = columns.shape
    for n in range(N):
        row = columns[n]
        for i in range(B):
            step = steps[n, i]
            nearest = np.rint(row[i] / (step if step != 0 else np.float32(1)))
            chosen = min(max(nearest, low[n, i]), high[n, i])
            u[n, i] = chosen
            error = (row[i] - chosen * step) / factor[i, i]
            row[i] = error
            for j in range(i + 1, B):
                row[j] -= error * factor[i, j]


@numba.njit(nogil=True, cache=True)
def _descend(u, slope, hessian, steps, low, high, moved):
    N, B = u.shape
    for n in range(N):
        row = slope[n]
        for i in range(B):
            step, curve = steps[n, i], hessian[i, i]
            moved[n, i] = 0
            if curve <= 0 or step == 0:
                continue
            best = min(max(np.rint(u[n, i] - row[i] / (curve * step)), low[n, i]), high[n, i])
            change = (best - u[n, i]) * step
            if change == 0:
                continue
            u[n, i] = best
            moved[n, i] = change
            for j in range(B):
                row[j] += change * hessian[i, j]
