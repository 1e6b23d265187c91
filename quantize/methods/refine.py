"""Refines a quantized matrix: the best scales for given whole numbers, and the best whole numbers for given scales.

Dimension letters: `N` rows, `K` the reduction axis, `G` group size, `n` = K/G groups of a row.
"""

from __future__ import annotations

import torch

from dbrx_q.kernels.formats.groups import grouped
from dbrx_q.kernels.rounding import descend_block

from .grid import Grid

__all__ = ["descend", "fit_scales"]

_BLOCK = 128  # columns between two updates of all other columns
_ROWS, _ROWS_ON_GPU = 256, 2048  # rows whose linear systems are solved together
_RIDGE = 1e-6


def fit_scales(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, u: torch.Tensor) -> Grid:
    """The grid with the scales that minimize the error of `u`: for each row, linear least squares in its n scales.

    Let U [n, K] hold the u of a row, with each group in a row of its own. The scales are (U H U^T)^-1 U H w, rounded to float16. A scale
    that would at least halve or double keeps its value.

    Args:
        weight: float32 [N, K].
        hessian: float32 [K, K].
        grid, u: the quantized matrix to be improved.
    """
    n, G = grid.scales.shape[1], grid.group_size
    fitted, piece = [], _ROWS if u.device.type == "cpu" else _ROWS_ON_GPU
    for rows, weight_rows, old_scales in zip(u.split(piece), weight.split(piece), grid.scales.split(piece), strict=True):
        u_groups = grouped(rows, G)  # [R, n, G]
        system = torch.empty(len(rows), n, n, device=u.device)
        for a in range(n):
            products = (u_groups[:, a] @ hessian[a * G : (a + 1) * G, a * G :]).mul_(rows[:, a * G :])
            system[:, a, a:] = system[:, a:, a] = grouped(products, G).sum(-1)
        known = (u_groups * grouped(weight_rows @ hessian, G)).sum(-1)  # [R, n]
        diagonal = system.diagonal(dim1=1, dim2=2)
        diagonal.add_(_RIDGE * diagonal.mean(-1, keepdim=True) + torch.finfo(torch.float32).tiny)
        solved = torch.linalg.solve_ex(system, known)[0]
        before = old_scales.float()
        fitted.append(torch.where((solved > before / 2) & (solved < before * 2), solved, before))
    return Grid(torch.cat(fitted).half(), grid.zeros, grid.fmt)


def descend(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, u: torch.Tensor, *, sweeps: int = 1) -> torch.Tensor:
    """Better u, float32 [N, K], by coordinate descent: each in turn moves to its best place on the grid, with all others fixed.

    The error (value - w) H (value - w)^T does not grow for any row.

    Args:
        weight: float32 [N, K].
        hessian: float32 [K, K].
        grid, u: the quantized matrix to be improved.
        sweeps: the number of passes over all columns.
    """
    K = weight.shape[1]
    grids, groups = grid.transposed(), torch.arange(K, device=u.device) // grid.group_size
    slope = hessian @ (grid.dequantize(u) - weight).T  # half the gradient
    u = u.T.contiguous()
    for _ in range(sweeps):
        for first in range(0, K, _BLOCK):
            end = min(first + _BLOCK, K)
            parts = (part[groups[first:end]] for part in grids)
            moved = descend_block(u[first:end], slope[first:end], hessian[first:end, first:end], *parts)
            slope[:first].addmm_(hessian[:first, first:end], moved)
            slope[end:].addmm_(hessian[end:, first:end], moved)
    return u.T.contiguous()
