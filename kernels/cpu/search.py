"""Grid searches in one pass over memory: each group of a weight stays in the first-level cache until its grid is found.

Dimension letters: `N` output features (rows), `K` input features (the reduction axis), `G` group size, `n` = K/G groups of a row.
A search runs on one thread. Groups are independent of each other, so callers may split a weight into pieces without a change of the result.
"""

from __future__ import annotations

import numpy as np
import torch

from dbrx_q.kernels.formats.format import GridLevels

from .compiled import compiled
from .lanes import (
    LANES,
    absolute,
    fill_tile,
    fused,
    in_memory_order,
    inverse_power,
    larger,
    load,
    nearest,
    smaller,
    splat,
    store,
    store_half,
    through_bfloat16,
    through_half,
    where_equal,
    where_less,
)
from .lanes import VECTOR_BYTES as _VECTOR

__all__ = ["group_ranges", "half_quadratic", "least_squares", "range_scale_and_zero", "step_of"]


def least_squares(
    weight: torch.Tensor, group_size: int, levels: GridLevels, shares: torch.Tensor, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`grid_search.least_squares` on the CPU."""
    weight, layout = in_memory_order(weight)
    importances = torch.ones(weight.shape[1]) if importance is None else importance.float().contiguous()
    if levels.offsets is not None:
        shape, half = (weight.shape[0], weight.shape[1] // group_size), levels.offsets == torch.float16
        rounded_scales, offsets = torch.empty(shape), torch.empty(shape)
        parts = (part.numpy() for part in (shares, importances, rounded_scales, offsets))
        _least_squares_with_offsets(*layout, group_size, levels.levels, half, *parts)
        return rounded_scales.to(levels.offsets), offsets.to(levels.offsets)
    scales, zeros = _empty_grid(weight, group_size)
    grid = group_size, levels.levels, levels.symmetric, *(levels.zeros or (0, levels.levels))
    _least_squares(*layout, *grid, shares.numpy(), importances.numpy(), scales.view(torch.int16).numpy(), zeros.numpy())
    return scales, zeros


def half_quadratic(weight: torch.Tensor, group_size: int, levels: GridLevels, betas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`grid_search.half_quadratic` on the CPU, for grids without offsets."""
    weight, layout = in_memory_order(weight)
    scales, zeros = _empty_grid(weight, group_size)
    grid = group_size, levels.levels, levels.symmetric, *(levels.zeros or (0, levels.levels))
    _half_quadratic(*layout, *grid, betas.numpy(), scales.view(torch.int16).numpy(), zeros.numpy())
    return scales, zeros


def _empty_grid(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = weight.shape[0], weight.shape[1] // group_size
    return torch.empty(shape, dtype=torch.float16), torch.empty(shape)


@compiled()
def _least_squares(address, item, row_pitch, column_pitch, G, levels, symmetric, min_zero, max_zero, shares, importance, scales, zeros):
    """min_zero, max_zero: the least and the largest zero-point; unless they are 0 and `levels`, all zero-points are tried."""
    N, n_groups = scales.shape
    tile, half, single = np.empty((G, LANES), np.float32), np.empty(LANES, np.int16), np.empty(LANES, np.float32)
    tile_at = tile.ctypes.data
    none, one, top = splat(np.float32(0)), splat(np.float32(1)), splat(np.float32(levels))
    for n in range(0, N, LANES):
        rows = min(LANES, N - n)
        for g in range(n_groups):
            group_importance = importance[g * G : (g + 1) * G]
            fill_tile(tile_at, address + n * row_pitch + g * G * column_pitch, item, row_pitch, column_pitch, rows, G)
            low, high = group_ranges(tile_at, G)
            best_scale, best_zero = range_scale_and_zero(low, high, levels, symmetric, min_zero, max_zero)
            least = _error(tile_at, best_scale, best_zero, levels, symmetric, group_importance)
            for s in range(len(shares)):
                share = splat(shares[s])
                if has_few_zeros(levels, min_zero, max_zero):
                    for point in range(min_zero, max_zero + 1):
                        scale, zero = zero_scale(low * share, high * share, levels, point), splat(np.float32(point))
                        scale = through_half(scale)
                        error = _error(tile_at, scale, zero, levels, symmetric, group_importance)
                        best_scale, best_zero = where_less(error, least, scale, best_scale), where_less(error, least, zero, best_zero)
                        least = smaller(error, least)
                    continue
                scale, zero = range_scale_and_zero(low * share, high * share, levels, symmetric, min_zero, max_zero)
                if symmetric:
                    error = _error(tile_at, scale, zero, levels, symmetric, group_importance)
                    best_scale, least = where_less(error, least, scale, best_scale), smaller(error, least)
                    continue
                less, more = larger(zero - one, none), smaller(zero + one, top)
                errors = _errors(tile_at, scale, zero, less, more, levels, group_importance)
                for error, tried in ((errors[0], zero), (errors[1], less), (errors[2], more)):
                    best_scale, best_zero = where_less(error, least, scale, best_scale), where_less(error, least, tried, best_zero)
                    least = smaller(error, least)
            _put(best_scale, best_zero, scales, zeros, n, rows, g, half, single)


@compiled()
def _least_squares_with_offsets(address, item, row_pitch, column_pitch, G, levels, half, shares, importance, scales, offsets):
    """scales, offsets: float32 [N, n], rounded to float16 if `half` is set, else to bfloat16."""
    N, n_groups = scales.shape
    tile, single = np.empty((G, LANES), np.float32), np.empty((2, LANES), np.float32)
    tile_at, single_at = tile.ctypes.data, single.ctypes.data
    whole, middle = splat(np.float32(1)), splat(np.float32(2))
    for n in range(0, N, LANES):
        rows = min(LANES, N - n)
        for g in range(n_groups):
            group_importance = importance[g * G : (g + 1) * G]
            fill_tile(tile_at, address + n * row_pitch + g * G * column_pitch, item, row_pitch, column_pitch, rows, G)
            low = high = load(tile_at)
            for i in range(1, G):
                x = load(tile_at + i * _VECTOR)
                low, high = smaller(x, low), larger(x, high)
            best_scale, best_offset = _part_scale_and_offset(low, high, levels, half)
            least = _error_with_offset(tile_at, best_scale, best_offset, levels, group_importance)
            for s in range(len(shares)):
                cut = (high - low) * (whole - splat(shares[s]))
                for below in (cut / middle, cut - cut, cut):
                    scale, offset = _part_scale_and_offset(low + below, high - (cut - below), levels, half)
                    error = _error_with_offset(tile_at, scale, offset, levels, group_importance)
                    best_scale, best_offset = where_less(error, least, scale, best_scale), where_less(error, least, offset, best_offset)
                    least = smaller(error, least)
            store(best_scale, single_at)
            store(best_offset, single_at + _VECTOR)
            for r in range(rows):
                scales[n + r, g], offsets[n + r, g] = single[0, r], single[1, r]


@compiled()
def _part_scale_and_offset(low, high, levels, half):
    """The grid of each lane with offsets, from `low` to `high`."""
    scale = _through((high - low) / splat(np.float32(levels)), half)
    return scale, _through(where_equal(scale, splat(np.float32(0)), (low + high) / splat(np.float32(2)), low), half)


@compiled()
def _through(value, half):
    if half:
        return through_half(value)
    return through_bfloat16(value)


@compiled()
def _error_with_offset(tile, scale, offset, levels, weights):
    """The weighted squared error of each lane."""
    none, top = splat(np.float32(0)), splat(np.float32(levels))
    inverse, minus = _inverse(scale), none - scale
    error = none
    for i in range(len(weights)):
        x = load(tile + i * _VECTOR) - offset
        d = fused(smaller(larger(nearest(x * inverse), none), top), minus, x)
        error = fused(d * splat(weights[i]), d, error)
    return error


@compiled()
def _error(tile, scale, zero, levels, symmetric, weights):
    """The weighted squared error of each lane."""
    none = splat(np.float32(0))
    low, high = _limits(zero, levels, symmetric)
    inverse, minus = _inverse(scale), none - scale
    error = none
    for i in range(len(weights)):
        x = load(tile + i * _VECTOR)
        d = fused(smaller(larger(nearest(x * inverse), low), high), minus, x)
        error = fused(d * splat(weights[i]), d, error)
    return error


@compiled()
def _errors(tile, scale, zero, less, more, levels, weights):
    """The weighted squared errors of each lane with three zero-points."""
    none = splat(np.float32(0))
    (low, high), (low1, high1), (low2, high2) = _limits(zero, levels, False), _limits(less, levels, False), _limits(more, levels, False)
    inverse, minus = _inverse(scale), none - scale
    error = error1 = error2 = none
    for i in range(len(weights)):
        x, w = load(tile + i * _VECTOR), splat(weights[i])
        u = nearest(x * inverse)
        d, d1, d2 = (
            fused(smaller(larger(u, low), high), minus, x),
            fused(smaller(larger(u, low1), high1), minus, x),
            fused(smaller(larger(u, low2), high2), minus, x),
        )
        error, error1, error2 = fused(d * w, d, error), fused(d1 * w, d1, error1), fused(d2 * w, d2, error2)
    return error, error1, error2


@compiled()
def _half_quadratic(address, item, row_pitch, column_pitch, G, levels, symmetric, min_zero, max_zero, betas, scales, zeros):
    N, n_groups = scales.shape
    tile, half, single = np.empty((G, LANES), np.float32), np.empty(LANES, np.int16), np.empty(LANES, np.float32)
    tile_at = tile.ctypes.data
    none, size = splat(np.float32(0)), splat(np.float32(G))
    bottom, top = splat(np.float32(min_zero)), splat(np.float32(max_zero))
    for n in range(0, N, LANES):
        rows = min(LANES, N - n)
        for g in range(n_groups):
            fill_tile(tile_at, address + n * row_pitch + g * G * column_pitch, item, row_pitch, column_pitch, rows, G)
            low, high = group_ranges(tile_at, G)
            scale, zero = range_scale_and_zero(low, high, levels, symmetric, min_zero, max_zero)
            best_scale, best_zero, least = scale, zero, splat(np.float32(np.inf))
            for s in range(len(betas)):
                step = step_of(scale)
                cost, moved, squares, u_sum, moves = _fitted(tile_at, G, scale, step, zero, levels, symmetric, betas[s])
                best_scale, best_zero = where_less(cost, least, scale, best_scale), where_less(cost, least, zero, best_zero)
                least = smaller(cost, least)
                # The least squares scale of weight - outlier = u * scale + moved, with sums of u * moved and of u * u.
                fitted = where_less(none, squares, scale + moved / squares, scale)
                fitted = through_half(where_less(none, fitted, fitted, scale))
                if not symmetric:
                    # The mean of u + zero - (weight - outlier) / fitted.
                    shift = (u_sum - fused(u_sum, scale, moves) / step_of(fitted)) / size
                    zero = smaller(larger(nearest(zero + shift), bottom), top)
                scale = fitted
            _put(best_scale, best_zero, scales, zeros, n, rows, g, half, single)


@compiled()
def _fitted(tile, G, scale, step, zero, levels, symmetric, beta):
    """For each lane, the sums of |error|^0.7, u * moved, u * u, u and moved, where `moved` is the part of the error that is not an outlier.

    `moved` is the error clamped to plus and minus the threshold, so that the soft threshold of the error is error - moved.
    """
    none = splat(np.float32(0))
    low, high = _limits(zero, levels, symmetric)
    inverse, minus = _inverse(scale), none - scale
    lot, unit = splat(np.finfo(np.float32).eps), step / splat(beta)
    cost = products = squares = u_sum = moves = none
    for i in range(G):
        x = load(tile + i * _VECTOR)
        u = smaller(larger(nearest(x * inverse), low), high)
        error = fused(u, minus, x)
        size = absolute(error)
        power = inverse_power(larger(size * inverse, lot))
        cost = fused(size, power, cost)
        threshold = power * unit
        moved = larger(smaller(error, threshold), none - threshold)
        products, squares = fused(u, moved, products), fused(u, u, squares)
        u_sum, moves = u_sum + u, moves + moved
    return cost * inverse_power(step), products, squares, u_sum, moves


@compiled()
def group_ranges(tile, G):
    """The least and the largest element of each lane, zero included."""
    low = high = splat(np.float32(0))
    for i in range(G):
        x = load(tile + i * _VECTOR)
        low, high = smaller(x, low), larger(x, high)
    return low, high


@compiled()
def range_scale_and_zero(low, high, levels, symmetric, min_zero, max_zero):
    """The grid of each lane's range: scale and zero-point, 0 in a symmetric grid.

    min_zero, max_zero: the least and the largest zero-point, 0 and `levels` or within those.
    """
    none, top = splat(np.float32(0)), splat(np.float32(levels))
    if symmetric:
        return through_half(larger(high, none - low) / top), none
    if has_few_zeros(levels, min_zero, max_zero):
        scale, zero = zero_scale(low, high, levels, min_zero), splat(np.float32(min_zero))
        for point in range(min_zero + 1, max_zero + 1):
            other = zero_scale(low, high, levels, point)
            scale, zero = smaller(other, scale), where_less(other, scale, splat(np.float32(point)), zero)
        return through_half(scale), zero
    scale = through_half((high - low) / top)
    zero = nearest((none - low) / step_of(scale))
    return scale, smaller(larger(zero, none), top)


@compiled()
def has_few_zeros(levels, min_zero, max_zero):
    """Whether the format has fewer zero-points than codes."""
    return min_zero > 0 or max_zero < levels


@compiled()
def zero_scale(low, high, levels, zero):
    """The least scale with which a zero-point covers each lane's range, not yet rounded to float16."""
    none = splat(np.float32(0))
    return larger((none - low) / splat(np.float32(zero)), high / splat(np.float32(levels - zero)))


@compiled()
def step_of(scale):
    """The divisor: the scale, or 1 where it is 0."""
    return where_equal(scale, splat(np.float32(0)), splat(np.float32(1)), scale)


@compiled()
def _inverse(scale):
    return splat(np.float32(1)) / step_of(scale)


@compiled()
def _limits(zero, levels, symmetric):
    """The least and the largest whole number of each lane's grid."""
    if symmetric:
        return splat(np.float32(-levels)), splat(np.float32(levels))
    return splat(np.float32(0)) - zero, splat(np.float32(levels)) - zero


@compiled()
def _put(scale, zero, scales, zeros, n, rows, g, half, single):
    store_half(scale, half.ctypes.data)
    store(zero, single.ctypes.data)
    for r in range(rows):
        scales[n + r, g] = half[r]
        zeros[n + r, g] = single[r]
