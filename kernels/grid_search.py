"""Searches for the grid of each group of a weight: in compiled code on the CPU, with whole tensors on other devices and for groups that are
no multiple of 16.

Dimension letters: `N` output features (rows), `K` input features (the reduction axis), `G` group size, `n` = K/G groups of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from dbrx_q.kernels.cpu import search as cpu_search
from dbrx_q.kernels.cpu.lanes import LANES
from dbrx_q.kernels.formats.format import GridLevels
from dbrx_q.kernels.formats.groups import grouped, steps_of

__all__ = ["half_quadratic", "half_quadratic_reference", "least_squares", "least_squares_reference"]

_Grid = tuple[torch.Tensor, torch.Tensor]  # scales and shifts
_PIECE_ELEMENTS = 1 << 24  # elements per search with whole tensors, which takes ten times their 4 bytes


def least_squares(
    weight: torch.Tensor, group_size: int, levels: GridLevels, shares: torch.Tensor, importance: torch.Tensor | None = None
) -> _Grid:
    """(scales [N, n], shifts [N, n]): for each group, the grid of least error.

    Shifts are zero-points in float32, which are 0 in a symmetric grid, or the offsets of a format that has them, in its dtype. The search
    tries the whole range of the group, then shares of it, each share with three zero-points, with all zero-points if the format has only
    some, or cut at the low end, at both or at the high end if it has offsets. The error is the sum of importance * (value - weight)^2 after
    rounding to nearest. Among grids of equal error the first is taken. A group whose first scale is infinite keeps it.

    Args:
        weight: [N, K], finite.
        group_size: divides K; compiled code takes multiples of 16.
        levels: of the format.
        shares: float32 [S] on the CPU, in the order in which they are tried.
        importance: float32 [K]; None weighs all elements alike.
    """
    if _has_compiled_code(weight, group_size):
        return cpu_search.least_squares(weight, group_size, levels, shares, importance)
    return _in_pieces(weight, lambda rows: least_squares_reference(rows, group_size, levels, shares, importance))


def half_quadratic(weight: torch.Tensor, group_size: int, levels: GridLevels, betas: torch.Tensor) -> _Grid:
    """(scales [N, n], shifts [N, n]): for each group, the grid with the least sum of |value - weight|^0.7; shifts as for `least_squares`.

    The first grid is that of the group's range. It is fitted once for every beta but the last, and the best of all these grids is returned.
    A group whose first scale is infinite keeps it. Grids with offsets are fitted with whole tensors on the CPU, too.

    Args:
        weight, group_size, levels: as for `least_squares`.
        betas: float32 [S] on the CPU; they determine which elements count as outliers (see `quantize/methods/hqq.py`).
    """
    if _has_compiled_code(weight, group_size) and levels.offsets is None:
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
        for tried in _of_shares(groups, levels, share):
            best, least = _better(_squares(groups, *tried, levels, importances), least, tried, best)
    return best


def half_quadratic_reference(weight: torch.Tensor, group_size: int, levels: GridLevels, betas: torch.Tensor) -> _Grid:
    """`half_quadratic` with whole tensors, on any device."""
    groups = grouped(weight.float(), group_size)
    scales, shifts = best = _of_ranges(groups, levels)
    least = torch.full(scales.shape, torch.inf, device=scales.device)
    for beta in betas.tolist():
        u = _rounded(groups, scales, shifts, levels)
        error, unit = groups - _values(u, scales, shifts, levels), steps_of(scales).unsqueeze(-1)
        best, least = _better(error.abs().pow(0.7).sum(-1), least, (scales, shifts), best)
        threshold = (error.abs() / unit).clamp(min=torch.finfo(torch.float32).eps).pow(-0.3) * unit / beta
        wanted = groups - error.sign() * (error.abs() - threshold).clamp(min=0)
        middles = (u.mean(-1, keepdim=True), wanted.mean(-1, keepdim=True)) if levels.offsets else (0, 0)
        moved = u - middles[0]
        squares = moved.square().sum(-1)
        fitted = torch.where(squares > 0, (moved * (wanted - middles[1])).sum(-1) / squares, scales.float())
        scales = torch.where(fitted > 0, fitted, scales.float()).to(scales.dtype)
        if levels.offsets:
            shifts = (wanted - u * scales.float().unsqueeze(-1)).mean(-1).to(levels.offsets)
        elif not levels.symmetric:
            min_zero, max_zero = levels.zeros or (0, levels.levels)
            shifts = ((u + shifts.unsqueeze(-1)) - wanted / steps_of(scales).unsqueeze(-1)).mean(-1).round().clamp(min_zero, max_zero)
    return best


def _has_compiled_code(weight: torch.Tensor, group_size: int) -> bool:
    """Whether compiled code, which loads 16 elements of a group at a time, serves the search."""
    return weight.device.type == "cpu" and group_size % LANES == 0


def _in_pieces(weight: torch.Tensor, search: Callable[[torch.Tensor], _Grid]) -> _Grid:
    grids = [search(rows) for rows in weight.split(max(1, _PIECE_ELEMENTS // weight.shape[1]))]
    return torch.cat([scales for scales, _ in grids]), torch.cat([shifts for _, shifts in grids])


def _of_ranges(groups: torch.Tensor, levels: GridLevels, share: float = 1.0) -> _Grid:
    """The grid of a share of each group's range, zero included unless the format has offsets; groups [N, n, G]."""
    if levels.offsets:
        return _of_part(groups.amin(-1), groups.amax(-1), levels)
    low, high = groups.amin(-1).clamp(max=0) * share, groups.amax(-1).clamp(min=0) * share
    if levels.symmetric:
        return (torch.maximum(high, -low) / levels.levels).half(), torch.zeros_like(low)
    if levels.zeros:
        candidates = [_of_zero(low, high, zero, levels) for zero in _zero_points(levels)]
        scales, zeros = candidates[0]
        for other, zero in candidates[1:]:
            scales, zeros = torch.where(other < scales, other, scales), torch.where(other < scales, zero, zeros)
        return scales.half(), zeros
    scales = ((high - low) / levels.levels).half()
    return scales, (-low / steps_of(scales)).round().clamp(0, levels.levels)


def _of_shares(groups: torch.Tensor, levels: GridLevels, share: float) -> Iterator[_Grid]:
    """The grids that `least_squares` tries for a share of each group's range."""
    if levels.offsets:
        low, high = groups.amin(-1), groups.amax(-1)
        cut = (high - low) * (1 - share)
        for below in (cut / 2, torch.zeros_like(cut), cut):
            yield _of_part(low + below, high - (cut - below), levels)
    elif levels.zeros:
        low, high = groups.amin(-1).clamp(max=0) * share, groups.amax(-1).clamp(min=0) * share
        for zero in _zero_points(levels):
            scales, zeros = _of_zero(low, high, zero, levels)
            yield scales.half(), zeros
    else:
        scales, nearest_zeros = _of_ranges(groups, levels, share)
        for shift in (0,) if levels.symmetric else (0, -1, 1):
            yield scales, (nearest_zeros + shift).clamp(0, levels.levels) if shift else nearest_zeros


def _of_part(low: torch.Tensor, high: torch.Tensor, levels: GridLevels) -> _Grid:
    """The grid with offsets from `low` to `high`."""
    assert levels.offsets is not None
    scales = ((high - low) / levels.levels).to(levels.offsets)
    return scales, torch.where(scales == 0, (low + high) / 2, low).to(levels.offsets)


def _of_zero(low: torch.Tensor, high: torch.Tensor, zero: int, levels: GridLevels) -> _Grid:
    """The finest grid with a zero-point that covers `low` to `high`; its scales are not yet rounded to float16."""
    return torch.maximum(-low / zero, high / (levels.levels - zero)), torch.full_like(low, zero)


def _zero_points(levels: GridLevels) -> range:
    assert levels.zeros is not None
    return range(levels.zeros[0], levels.zeros[1] + 1)


def _rounded(groups: torch.Tensor, scales: torch.Tensor, shifts: torch.Tensor, levels: GridLevels) -> torch.Tensor:
    """The nearest whole numbers of the grid, float32 [N, n, G]."""
    if levels.offsets:
        return ((groups - shifts.float().unsqueeze(-1)) / steps_of(scales).unsqueeze(-1)).round_().clamp_(0, levels.levels)
    low = torch.full_like(shifts, -levels.levels) if levels.symmetric else -shifts
    high = torch.full_like(shifts, levels.levels) if levels.symmetric else levels.levels - shifts
    return (groups / steps_of(scales).unsqueeze(-1)).round_().clamp_(low.unsqueeze(-1), high.unsqueeze(-1))


def _values(u: torch.Tensor, scales: torch.Tensor, shifts: torch.Tensor, levels: GridLevels) -> torch.Tensor:
    """The values of whole numbers u [N, n, G]."""
    values = u * scales.float().unsqueeze(-1)
    return values.add_(shifts.float().unsqueeze(-1)) if levels.offsets else values


def _squares(
    groups: torch.Tensor, scales: torch.Tensor, shifts: torch.Tensor, levels: GridLevels, importance: torch.Tensor | None
) -> torch.Tensor:
    error = _values(_rounded(groups, scales, shifts, levels), scales, shifts, levels).sub_(groups).square_()
    return (error if importance is None else error.mul_(importance)).sum(-1)


def _better(error: torch.Tensor, least: torch.Tensor, tried: _Grid, best: _Grid) -> tuple[_Grid, torch.Tensor]:
    less = error < least
    grid = torch.where(less, tried[0], best[0]), torch.where(less, tried[1], best[1])
    return grid, torch.where(less, error, least)
