"""Searches for the grid of each group of a weight: in compiled code on the CPU, with whole tensors on other devices and for groups that are
no multiple of 16.

Dimension letters: `N` output features (rows), `K` input features (the reduction axis), `G` group size, `n` = K/G groups of a row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dbrx_q.kernels.cpu import search as cpu_search
from dbrx_q.kernels.cpu.lanes import LANES
from dbrx_q.kernels.formats.format import GridLevels
from dbrx_q.kernels.formats.groups import grouped, steps_of

__all__ = ["half_quadratic", "half_quadratic_reference", "least_squares", "least_squares_reference"]

_Grid = tuple[torch.Tensor, torch.Tensor]
_PIECE_ELEMENTS = 1 << 24  # elements per search with whole tensors, which takes ten times their 4 bytes


def least_squares(
    weight: torch.Tensor, group_size: int, levels: GridLevels, shares: torch.Tensor, importance: torch.Tensor | None = None
) -> _Grid:
    """(scales float16 [N, n], zeros float32 [N, n]): for each group, the grid of least error.

    The search tries the whole range of the group, then shares of it, each share with three zero-points. The error is the sum of
    importance * (value - weight)^2 after rounding to nearest. Among grids of equal error the first is taken. A group whose first scale is
    infinite keeps it.

    Args:
        weight: [N, K], finite.
        group_size: divides K; compiled code takes multiples of 16.
        levels: of the format; the zero-points of a symmetric grid are 0.
        shares: float32 [S] on the CPU, in the order in which they are tried.
        importance: float32 [K]; None weighs all elements alike.
    """
    if _has_compiled_code(weight, group_size):
        return cpu_search.least_squares(weight, group_size, levels, shares, importance)
    return _in_pieces(weight, lambda rows: least_squares_reference(rows, group_size, levels, shares, importance))


def half_quadratic(weight: torch.Tensor, group_size: int, levels: GridLevels, betas: torch.Tensor) -> _Grid:
    """(scales float16 [N, n], zeros float32 [N, n]): for each group, the grid with the least sum of |value - weight|^0.7.

    The first grid is that of the group's range. It is fitted once for every beta but the last, and the best of all these grids is returned.
    A group whose first scale is infinite keeps it.

    Args:
        weight, group_size, levels: as for `least_squares`.
        betas: float32 [S] on the CPU; they determine which elements count as outliers (see `quantize/methods/hqq.py`).
    """
    if _has_compiled_code(weight, group_size):
        return cpu_search.half_quadratic(weight, group_size, levels, betas)
    return _in_pieces(weight, lambda rows: half_quadratic_reference(rows, group_size, levels, betas))


def least_squares_reference(
    weight: torch.Tensor, group_size: int, levels: GridLevels, shares: torch.Tensor, importance: torch.Tensor | None = None
) -> _Grid:
    """`least_squares` with whole tensors, on any device."""
    groups = grouped(weight.float(), group_size)
    importances = None if importance is None else grouped(importance.float(), group_size)
    best = _of_ranges(groups, levels)
    least = _squares(groups, *best, levels, importances)
    for share in shares.tolist():
        scales, nearest_zeros = _of_ranges(groups, levels, share)
        for shift in (0,) if levels.symmetric else (0, -1, 1):
            zeros = (nearest_zeros + shift).clamp(0, levels.levels) if shift else nearest_zeros
            error = _squares(groups, scales, zeros, levels, importances)
            best, least = _better(error, least, (scales, zeros), best)
    return best


def half_quadratic_reference(weight: torch.Tensor, group_size: int, levels: GridLevels, betas: torch.Tensor) -> _Grid:
    """`half_quadratic` with whole tensors, on any device."""
    groups = grouped(weight.float(), group_size)
    scales, zeros = best = _of_ranges(groups, levels)
    least = torch.full_like(zeros, torch.inf)
    for beta in betas.tolist():
        u = _rounded(groups, scales, zeros, levels)
        error, unit = groups - u * scales.float().unsqueeze(-1), steps_of(scales).unsqueeze(-1)
        best, least = _better(error.abs().pow(0.7).sum(-1), least, (scales, zeros), best)
        threshold = (error.abs() / unit).clamp(min=torch.finfo(torch.float32).eps).pow(-0.3) * unit / beta
        wanted = groups - error.sign() * (error.abs() - threshold).clamp(min=0)
        squares = u.square().sum(-1)
        fitted = torch.where(squares > 0, (u * wanted).sum(-1) / squares, scales.float())
        scales = torch.where(fitted > 0, fitted, scales.float()).half()
        if not levels.symmetric:
            zeros = ((u + zeros.unsqueeze(-1)) - wanted / steps_of(scales).unsqueeze(-1)).mean(-1).round().clamp(0, levels.levels)
    return best


def _has_compiled_code(weight: torch.Tensor, group_size: int) -> bool:
    """Whether compiled code, which loads 16 elements of a group at a time, serves the search."""
    return weight.device.type == "cpu" and group_size % LANES == 0


def _in_pieces(weight: torch.Tensor, search: Callable[[torch.Tensor], _Grid]) -> _Grid:
    grids = [search(rows) for rows in weight.split(max(1, _PIECE_ELEMENTS // weight.shape[1]))]
    return torch.cat([scales for scales, _ in grids]), torch.cat([zeros for _, zeros in grids])


def _of_ranges(groups: torch.Tensor, levels: GridLevels, share: float = 1.0) -> _Grid:
    """The grid of a share of each group's range, zero included; groups [N, n, G]."""
    low, high = groups.amin(-1).clamp(max=0) * share, groups.amax(-1).clamp(min=0) * share
    if levels.symmetric:
        return (torch.maximum(high, -low) / levels.levels).half(), torch.zeros_like(low)
    scales = ((high - low) / levels.levels).half()
    return scales, (-low / steps_of(scales)).round().clamp(0, levels.levels)


def _rounded(groups: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, levels: GridLevels) -> torch.Tensor:
    """The nearest whole numbers of the grid, float32 [N, n, G]."""
    low = torch.full_like(zeros, -levels.levels) if levels.symmetric else -zeros
    high = torch.full_like(zeros, levels.levels) if levels.symmetric else levels.levels - zeros
    return (groups / steps_of(scales).unsqueeze(-1)).round_().clamp_(low.unsqueeze(-1), high.unsqueeze(-1))


def _squares(
    groups: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, levels: GridLevels, importance: torch.Tensor | None
) -> torch.Tensor:
    error = (_rounded(groups, scales, zeros, levels) * scales.float().unsqueeze(-1)).sub_(groups).square_()
    return (error if importance is None else error.mul_(importance)).sum(-1)


def _better(error: torch.Tensor, least: torch.Tensor, tried: _Grid, best: _Grid) -> tuple[_Grid, torch.Tensor]:
    less = error < least
    grid = torch.where(less, tried[0], best[0]), torch.where(less, tried[1], best[1])
    return grid, torch.where(less, error, least)
