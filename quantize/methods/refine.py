"""Refines a quantized matrix: the best scales (and offsets) for given whole numbers, and the best whole numbers for given scales.

Dimension letters: `N` rows, `K` the reduction axis, `G` group size, `n` = K/G groups of a row.
"""

from __future__ import annotations

import torch

from dbrx_q.kernels.formats.groups import grouped
from dbrx_q.kernels.rounding import descend_block

from .grid import Grid, levels_of

__all__ = ["descend", "fit_scales"]

_BLOCK = 128  # columns between two updates of all other columns
_ROWS, _ROWS_ON_GPU = 256, 2048  # rows whose linear systems are solved together
_RIDGE = 1e-6


def fit_scales(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, u: torch.Tensor) -> Grid:
    """The grid with the scales, and offsets if it has them, that minimize the error of `u`: for each row, linear least squares.

    Let U [n, K] hold the u of a row, with each group in a row of its own. The scales are (U H U^T)^-1 U H w, rounded to float16. A scale
    that would at least halve or double keeps its value. With offsets, n rows of ones are added to U, again one for each group.

    Args:
        weight: float32 [N, K].
        hessian: float32 [K, K].
        grid, u: the quantized matrix to be improved.
    """
    if grid.offsets is not None:
        return _fit_scales_and_offsets(weight, hessian, grid, u)
    n, G = grid.scales.shape[1], grid.group_size
    fitted, piece = [], _ROWS if u.device.type == "cpu" else _ROWS_ON_GPU
    for rows, weight_rows, old_scales in zip(u.split(piece), weight.split(piece), grid.scales.split(piece), strict=True):
        u_groups = grouped(rows, G)  # [R, n, G]
        system = torch.empty(len(rows), n, n, device=u.device)
        for a in range(n):
            products = (u_groups[:, a] @ hessian[a * G : (a + 1) * G, a * G :]).mul_(rows[:, a * G :])
            system[:, a, a:] = system[:, a:, a] = grouped(products, G).sum(-1)
        known = (u_groups * grouped(weight_rows @ hessian, G)).sum(-1)  # [R, n]
        solved = _solved(system, known)
        before = old_scales.float()
        fitted.append(torch.where((solved > before / 2) & (solved < before * 2), solved, before))
    return Grid(torch.cat(fitted).half(), grid.zeros, grid.fmt)


def _fit_scales_and_offsets(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, u: torch.Tensor) -> Grid:
    """`fit_scales` with offsets: linear least squares in the changes of 2n scales and middles of a row.

    The middle of a group is its value at u = levels / 2; scale and middle depend less on each other than scale and offset. A group whose
    scale would at least halve or double, or whose middle would leave its range, keeps both.
    """
    assert grid.offsets is not None
    n, G, middle = grid.scales.shape[1], grid.group_size, levels_of(grid.fmt).levels / 2
    sums = grouped(hessian, G).sum(-1)  # [K, n]
    blocks = sums.unflatten(0, (n, G)).sum(1)  # [n, n]
    scales, offsets, piece = [], [], _ROWS if u.device.type == "cpu" else _ROWS_ON_GPU
    errors = (weight - grid.dequantize(u)).split(piece)
    for rows, error, old_scales, old_offsets in zip(
        (u - middle).split(piece), errors, grid.scales.split(piece), grid.offsets.split(piece), strict=True
    ):
        u_groups = grouped(rows, G)  # [R, n, G]
        system = torch.empty(len(rows), 2 * n, 2 * n, device=u.device)
        system[:, n:, n:] = blocks
        for a in range(n):
            products = (u_groups[:, a] @ hessian[a * G : (a + 1) * G, a * G :]).mul_(rows[:, a * G :])
            system[:, a, a:n] = system[:, a:n, a] = grouped(products, G).sum(-1)
            system[:, a, n:] = system[:, n:, a] = u_groups[:, a] @ sums[a * G : (a + 1) * G]
        slope = grouped(error @ hessian, G)  # [R, n, G]
        changes = _solved(system, torch.cat(((u_groups * slope).sum(-1), slope.sum(-1)), -1))
        before, change, move = old_scales.float(), changes[:, :n], changes[:, n:]
        better = (change > before / -2) & (change < before) & (move.abs() <= middle * before)
        after = torch.where(better, before + change, before).to(old_scales.dtype)
        moved = old_offsets.float() + move + (before - after.float()) * middle
        scales.append(after)
        offsets.append(torch.where(better, moved.to(old_offsets.dtype), old_offsets))
    return Grid(torch.cat(scales), None, grid.fmt, torch.cat(offsets))


def _solved(system: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """The solutions of damped linear systems [R, n, n], which change in place, for right sides [R, n]."""
    diagonal = system.diagonal(dim1=1, dim2=2)
    diagonal.add_(_RIDGE * diagonal.mean(-1, keepdim=True) + torch.finfo(torch.float32).tiny)
    solved: torch.Tensor = torch.linalg.solve_ex(system, known)[0]
    return solved


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
