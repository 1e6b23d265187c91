"""The search of trellis streams, compiled: the bits of `formats/viterbi.py`, for single columns or with GPTQ's feedback between them.

A call runs on its caller's thread, without the interpreter lock. One column of 128 rows is searched after the other; its sums stay in the
first-level cache, its masks in the second. `viterbi_steps.py` has the vector code of a position.

Dimension letters: `B` columns of a block, `N` rows, `S` states, `Q` states without their last k bits, `n` levels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch

from dbrx_q.kernels.formats.trellis import by_position, cost_units
from dbrx_q.kernels.formats.trellis_codes import TrellisCode
from dbrx_q.kernels.formats.viterbi import NARROW_RENEW, RENEW, ROWS

from .compiled import compiled
from .viterbi_steps import SearchShape, level_costs, narrow_costs, renew, step

__all__ = ["search_bytes", "trellis_block"]

_HALF = ROWS // 2
_LINE = 64


def trellis_block(columns: torch.Tensor, factor: torch.Tensor | None, scales: torch.Tensor, code: TrellisCode) -> torch.Tensor:
    """`dbrx_q.kernels.trellis.trellis_block` on the CPU; without a factor, columns are searched by themselves and left as they are.

    Args:
        columns: float32 [B, N], contiguous.
        factor: float32 [B, B].
        scales: float16 [N].
        code: the code.
    """
    B, N = columns.shape
    shape = SearchShape.of(code)
    symbols = torch.empty(-(-N // ROWS), B, ROWS, dtype=torch.uint8)
    _block(shape)(
        columns.numpy(),
        np.empty((0, 0), np.float32) if factor is None else factor.contiguous().numpy(),
        scales.float().numpy(),
        by_position(cost_units(scales, code)).contiguous().numpy(),
        code.level_table(columns.device).float()[list(shape.level_order)].numpy(),
        _levels_of_states(code),
        symbols.numpy(),
        *_scratch(shape, B),
    )
    return symbols


def search_bytes(code: TrellisCode, columns: int) -> int:
    """Bytes that a call with blocks of so many columns needs beside its arguments and its result."""
    return sum(nbytes + _LINE for _, nbytes in _scratch_parts(SearchShape.of(code), columns))


def _scratch_parts(shape: SearchShape, columns: int) -> tuple[tuple[Any, int], ...]:
    """(dtype, bytes) of each array: a tile, one element of each row, costs, costs of the first pass, permuted costs, sums, masks."""
    n, Q = 1 << shape.index_bits, shape.ends
    mask_bytes = ROWS * Q // 8 * ((1 << shape.bits) - 1)
    return (
        (np.float32, columns * ROWS * 4),
        (np.float32, ROWS * 4),
        (np.uint8, ROWS * n * 2),
        (np.uint8, ROWS * n),
        (np.uint8, n * _LINE),
        (np.uint16, 2 * Q * 2),
        (np.uint32, mask_bytes),
    )


def _scratch(shape: SearchShape, columns: int) -> list[np.ndarray]:
    arrays = []
    for dtype, nbytes in _scratch_parts(shape, columns):
        memory = np.empty(nbytes + _LINE, np.uint8)
        first = -memory.ctypes.data % _LINE
        arrays.append(memory[first : first + nbytes].view(dtype))
    return arrays


@cache
def _levels_of_states(code: TrellisCode) -> np.ndarray:
    """int8 [S]: the level of every state."""
    cpu = torch.device("cpu")
    return code.level_table(cpu)[code.index_table(cpu).long()].numpy()


@cache
def _block(shape: SearchShape) -> Callable[..., None]:
    """The compiled loop over tiles and columns for codes of a shape."""
    bits, state_bits, index_bits = shape.bits, shape.state_bits, shape.index_bits
    low_columns, high_columns = shape.low_columns, shape.high_columns
    n, Q, choices = 1 << index_bits, shape.ends, 1 << bits
    row_bytes = Q // 8 * (choices - 1)

    @compiled()
    def block(columns, factor, scales, units, levels, state_levels, symbols, tile, x, wide, narrow, table, sums, masks):
        """Fill `symbols`; the last seven arguments are scratch memory."""
        B, N = columns.shape
        levels_at, wide_at, narrow_at, table_at = levels.ctypes.data, wide.ctypes.data, narrow.ctypes.data, table.ctypes.data
        sums_at, masks_at = sums.ctypes.data, masks.ctypes.data
        for number in range(len(symbols)):
            first = number * ROWS
            rows = min(ROWS, N - first)
            _read_tile(columns, first, rows, tile)
            for column in range(B):
                _divide(tile, column, scales, first, rows, x)
                for p in range(ROWS):
                    level_costs(x[p], units[number, p], levels_at, wide_at + p * (2 * n), n)
                narrow_costs(wide_at, narrow_at, ROWS * n // 64)
                old_at, new_at = sums_at, sums_at + 2 * Q
                sums[:] = 0
                for t in range(ROWS):
                    p = (_HALF - 1 - t) & (ROWS - 1)
                    masks_of = masks_at + t * row_bytes
                    step(old_at, narrow_at + p * n, new_at, masks_of, table_at, 1, bits, state_bits, index_bits, low_columns, high_columns)
                    old_at, new_at = new_at, old_at
                    if t % NARROW_RENEW == NARROW_RENEW - 1:
                        renew(old_at, Q // 64, 1)
                ends = _seam(sums, masks, bits, Q)
                sums[:] = 65535
                sums[ends] = 0
                for t in range(ROWS):
                    masks_of = masks_at + t * row_bytes
                    costs_at = wide_at + (ROWS - 1 - t) * (2 * n)
                    step(old_at, costs_at, new_at, masks_of, table_at, 2, bits, state_bits, index_bits, low_columns, high_columns)
                    old_at, new_at = new_at, old_at
                    if t % RENEW == RENEW - 1:
                        renew(old_at, Q // 32, 2)
                _trace(masks, ends, bits, Q, symbols[number, column])
                if len(factor):
                    _feed_back(tile, column, factor, scales, first, rows, symbols[number, column], state_levels, bits, columns)

    return block


@compiled()
def _read_tile(columns, first, rows, tile):
    """Copy the rows of a tile; rows that fill up the last one are zero."""
    for i in range(len(columns)):
        for row in range(rows):
            tile[i * ROWS + row] = columns[i, first + row]
        for row in range(rows, ROWS):
            tile[i * ROWS + row] = 0


@compiled()
def _divide(tile, column, scales, first, rows, x):
    """Write a column by position, in units of the rows' scales."""
    for row in range(ROWS):
        scale = scales[first + row] if row < rows else np.float32(0)
        x[row % 16 * 8 + row // 16] = tile[column * ROWS + row] / (scale if scale != 0 else np.float32(1))


@compiled()
def _winner(masks, t, end, lanes_log, bits, Q):
    """The highest k bits of the state that wins at an end; the masks have 2^lanes_log bits."""
    choices = 1 << bits
    words = 1 << (lanes_log - 5)  # of 32 bits in a mask
    first = (t * (Q >> lanes_log) + (end >> lanes_log)) * (choices - 1)
    lane = end & ((1 << lanes_log) - 1)
    winner, distance = 0, choices >> 1
    while distance:
        mask = first + choices - choices // distance + winner // (2 * distance)
        if not masks[mask * words + (lane >> 5)] >> (lane & 31) & 1:
            winner += distance
        distance >>= 1
    return winner


@compiled()
def _seam(sums, masks, bits, Q):
    """The state's bits at position 0 on the best path of the first pass, without the last k."""
    octets = sums.view(np.uint8)
    end = 0
    for q in range(1, Q):
        if octets[q] < octets[end]:
            end = q
    for t in range(ROWS - 1, _HALF - 1, -1):
        end = (_winner(masks, t, end, 6, bits, Q) * Q + end) >> bits
    return end


@compiled()
def _trace(masks, end, bits, Q, symbols):
    """Write the bits of all positions, from the path that ends with `end` at position 0."""
    for t in range(ROWS - 1, -1, -1):
        symbols[ROWS - 1 - t] = end & ((1 << bits) - 1)
        end = (_winner(masks, t, end, 5, bits, Q) * Q + end) >> bits


@compiled()
def _feed_back(tile, column, factor, scales, first, rows, symbols, state_levels, bits, columns):
    """Write a column's errors to `columns` and subtract their share from the tile's later columns."""
    B, last = len(factor), len(state_levels) - 1
    state = 0
    for p in range(ROWS - 1, -1, -1):
        state = (state << bits | symbols[p]) & last
    for p in range(ROWS - 1, -1, -1):
        state = (state << bits | symbols[p]) & last
        row = p % 8 * 16 + p // 8
        if row < rows:
            value = scales[first + row] * np.float32(state_levels[state])
            error = (tile[column * ROWS + row] - value) / factor[column, column]
            columns[column, first + row] = error
            tile[column * ROWS + row] = error
        else:
            tile[column * ROWS + row] = 0
    errors = tile[column * ROWS : (column + 1) * ROWS]
    for later in range(column + 1, B):
        share = factor[column, later]
        left = tile[later * ROWS : (later + 1) * ROWS]
        for row in range(ROWS):
            left[row] -= share * errors[row]
