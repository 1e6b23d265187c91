"""The column loops of GPTQ and of coordinate descent, compiled, for sixteen rows of a weight at a time.

Rows are independent of each other, so threads share nothing.

Dimension letters: `B` columns of a block, `N` rows. Blocks are transposed, [B, N].
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from .compiled import compiled
from .lanes import LANES, fused, larger, load, nearest, smaller, splat, store, where_equal, where_less
from .lanes import VECTOR_BYTES as _VECTOR

__all__ = ["descend_block", "gptq_block"]


def gptq_block(columns: torch.Tensor, factor: torch.Tensor, steps: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """`dbrx_q.kernels.rounding.gptq_block` on the CPU: float32, `columns` contiguous."""
    left, *others = (_padded(part) for part in (columns, steps, low, high))
    u = torch.empty_like(left)
    addresses = [part.data_ptr() for part in (left, *others, u)]
    _gptq(*addresses, factor.contiguous().numpy(), left.shape[1])
    return _kept(u, (columns, left))


def descend_block(
    u: torch.Tensor, slope: torch.Tensor, hessian: torch.Tensor, steps: torch.Tensor, low: torch.Tensor, high: torch.Tensor
) -> torch.Tensor:
    """`dbrx_q.kernels.rounding.descend_block` on the CPU: float32, `u` and `slope` contiguous."""
    codes, slopes, *others = (_padded(part) for part in (u, slope, steps, low, high))
    moved = torch.empty_like(codes)
    addresses = [part.data_ptr() for part in (codes, slopes, *others, moved)]
    _descend(*addresses, hessian.contiguous().numpy(), codes.shape[1])
    return _kept(moved, (u, codes), (slope, slopes))


def _padded(part: torch.Tensor) -> torch.Tensor:
    """`part` padded with rows of zeros to a multiple of `LANES`; itself if it has that many."""
    missing = -part.shape[1] % LANES
    return F.pad(part, (0, missing)) if missing else part.contiguous()


def _kept(result: torch.Tensor, *changed: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """`result` without its padding; padded copies of parts that change in place are copied back."""
    for part, padded in changed:
        if padded is not part:
            part.copy_(padded[:, : part.shape[1]])
    return result[:, : changed[0][0].shape[1]]


@compiled()
def _gptq(columns, steps, low, high, u, factor, N):
    B, pitch = len(factor), 4 * N
    tile = np.empty((B, LANES), np.float32)
    tile_at = tile.ctypes.data
    zero, one = splat(np.float32(0)), splat(np.float32(1))
    for first in range(0, pitch, _VECTOR):
        for i in range(B):
            store(load(columns + i * pitch + first), tile_at + i * _VECTOR)
        for i in range(B):
            offset = i * pitch + first
            step, x = load(steps + offset), load(tile_at + i * _VECTOR)
            chosen = nearest(x / where_equal(step, zero, one, step))
            chosen = smaller(larger(chosen, load(low + offset)), load(high + offset))
            store(chosen, u + offset)
            error = fused(zero - chosen, step, x) / splat(factor[i, i])
            store(error, columns + offset)
            minus = zero - error
            for j in range(i + 1, B):
                residual_at = tile_at + j * _VECTOR
                store(fused(minus, splat(factor[i, j]), load(residual_at)), residual_at)


@compiled()
def _descend(u, slope, steps, low, high, moved, hessian, N):
    B, pitch = len(hessian), 4 * N
    tile = np.empty((B, LANES), np.float32)
    tile_at = tile.ctypes.data
    zero, one = splat(np.float32(0)), splat(np.float32(1))
    for first in range(0, pitch, _VECTOR):
        for i in range(B):
            store(load(slope + i * pitch + first), tile_at + i * _VECTOR)
        for i in range(B):
            offset = i * pitch + first
            code, step, curve = load(u + offset), load(steps + offset), splat(hessian[i, i])
            slant = curve * step
            best = nearest(code - load(tile_at + i * _VECTOR) / where_equal(slant, zero, one, slant))
            best = smaller(larger(best, load(low + offset)), load(high + offset))
            best = where_less(zero, curve, where_equal(step, zero, code, best), code)
            change = (best - code) * step
            store(best, u + offset)
            store(change, moved + offset)
            for j in range(B):
                slope_at = tile_at + j * _VECTOR
                store(fused(change, splat(hessian[i, j]), load(slope_at)), slope_at)
        for i in range(B):
            store(load(tile_at + i * _VECTOR), slope + i * pitch + first)
