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
from dbrx_q.kernels.formats.viterbi import NARROW_BITS, NARROW_RENEW, NARROW_SHIFT, RENEW, ROWS, most_word

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
    """(dtype, bytes) of each array: a tile, one element of each row, costs, the same in bytes, permuted costs, two times words, masks."""
    n, Q = 1 << shape.index_bits, shape.ends
    return (
        (np.float32, columns * ROWS * 4),
        (np.float32, ROWS * 4),
        (np.uint16, ROWS * n * 2),
        (np.uint8, ROWS * n),
        (np.uint16, n * _LINE),
        (np.uint16, 2 * Q * 2),
        (np.uint32, ROWS * Q // 8 * max(shape.bits, (1 << shape.bits) - 1 if shape.bits == NARROW_BITS else 0)),
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
    n, Q = 1 << index_bits, shape.ends
    mask_bytes, most = Q // 8 * bits, most_word(bits)
    narrow = bits == NARROW_BITS
    first_width, first_renew = (1, NARROW_RENEW) if narrow else (2, RENEW)
    first_mask_bytes = Q // 8 * ((1 << bits) - 1) if narrow else mask_bytes

    @compiled()
    def block(columns, factor, scales, units, levels, state_levels, symbols, tile, x, costs, octets, table, words, masks):
        """Fill `symbols`; the last seven arguments are scratch memory."""
        B, N = columns.shape
        levels_at, costs_at, table_at = np.int64(levels.ctypes.data), np.int64(costs.ctypes.data), np.int64(table.ctypes.data)
        masks_at, words_at, octets_at = np.int64(masks.ctypes.data), np.int64(words.ctypes.data), np.int64(octets.ctypes.data)
        first_costs_at = octets_at if narrow else costs_at
        for number in range(len(symbols)):
            first = number * ROWS
            rows = min(ROWS, N - first)
            _read_tile(columns, first, rows, tile)
            for column in range(B):
                _divide(tile, column, scales, first, rows, x)
                for p in range(ROWS):
                    level_costs(x[p], units[number, p], levels_at, costs_at + p * (2 * n), bits, index_bits)
                old_at, new_at = words_at, words_at + 2 * Q
                if narrow:
                    narrow_costs(costs_at, octets_at, ROWS * n // 64, bits + NARROW_SHIFT)
                    words[:] = 0
                else:
                    _begin(words, -1, most, bits, state_bits)
                for t in range(ROWS):
                    before = first_costs_at + ((_HALF - 1 - t) & (ROWS - 1)) * (first_width * n)
                    if t < _HALF - 1:
                        step(
                            old_at, before, new_at, masks_at, table_at,
                            first_width, 0, bits, state_bits, index_bits, low_columns, high_columns,
                        )  # fmt: skip
                    else:
                        step(
                            old_at, before, new_at, masks_at + t * first_mask_bytes, table_at,
                            first_width, 1, bits, state_bits, index_bits, low_columns, high_columns,
                        )  # fmt: skip
                    old_at, new_at = new_at, old_at
                    if t % first_renew == first_renew - 1:
                        renew(old_at, first_width, bits, state_bits)
                ends = _seam_of_bytes(words.view(np.uint8), masks, bits, Q) if narrow else _seam(words, masks, bits, Q)
                _begin(words, ends, most, bits, state_bits)
                for t in range(ROWS):
                    before, masks_of = costs_at + (ROWS - 1 - t) * (2 * n), masks_at + t * mask_bytes
                    step(old_at, before, new_at, masks_of, table_at, 2, 1, bits, state_bits, index_bits, low_columns, high_columns)
                    old_at, new_at = new_at, old_at
                    if t % RENEW == RENEW - 1:
                        renew(old_at, 2, bits, state_bits)
                _trace(masks, ends, bits, Q, symbols[number, column])
                if len(factor):
                    _feed_back(tile, column, factor, scales, first, rows, symbols[number, column], state_levels, bits, columns)

    return block


@compiled()
def _begin(words, ends, most, bits, state_bits):
    """Set the words before the first position, with sums of 0 for `ends`, for all if that is -1, and else of `most`; and the choices."""
    shift, sums = state_bits - 2 * bits, 0 if ends < 0 else most >> bits << bits
    for choice in range(1 << bits):
        words[choice << shift : (choice + 1) << shift] = sums | choice
    if ends >= 0:
        words[ends] = ends >> shift


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
def _choice(masks, t, end, bits, Q):
    """The highest k bits of the state that wins at an end."""
    first = (t * (Q // 32) + end // 32) * bits
    lane, choice = end % 32, 0
    for bit in range(bits):
        choice |= (masks[first + bit] >> lane & 1) << bit
    return choice


@compiled()
def _seam(words, masks, bits, Q):
    """The state's bits at position 0 on the best path of the first pass, without the last k."""
    least = np.uint16(65535)
    for q in range(Q):
        least = min(least, words[q])
    end = 0
    while words[end] >> bits != least >> bits:
        end += 1
    for t in range(ROWS - 1, _HALF - 1, -1):
        end = (_choice(masks, t, end, bits, Q) * Q + end) >> bits
    return end


@compiled()
def _seam_of_bytes(sums, masks, bits, Q):
    """`_seam` of a first pass in bytes."""
    least = np.uint8(255)
    for q in range(Q):
        least = min(least, sums[q])
    end = 0
    while sums[end] != least:
        end += 1
    choices = 1 << bits
    for t in range(ROWS - 1, _HALF - 1, -1):
        first, lane = (t * (Q // 64) + end // 64) * (choices - 1), end % 64
        winner, distance = 0, choices >> 1
        while distance:
            mask = first + choices - choices // distance + winner // (2 * distance)
            if not masks[2 * mask + lane // 32] >> (lane % 32) & 1:
                winner += distance
            distance >>= 1
        end = (winner * Q + end) >> bits
    return end


@compiled()
def _trace(masks, end, bits, Q, symbols):
    """Write the bits of all positions, from the path that ends with `end` at position 0."""
    for t in range(ROWS - 1, -1, -1):
        symbols[ROWS - 1 - t] = end & ((1 << bits) - 1)
        end = (_choice(masks, t, end, bits, Q) * Q + end) >> bits


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
