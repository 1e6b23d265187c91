"""The search of trellis streams, compiled: the bits of `formats/viterbi.py`, for single columns or with GPTQ's feedback between them.

A call runs on its caller's thread, without the interpreter lock. One column of 128 rows is searched after the other; the sums of a position
stay in the first-level cache, those that the way back needs in the second. `viterbi_steps.py` has the vector code of a position.

Dimension letters: `B` columns of a block, `N` rows, `S` states, `Q` states without their last k bits, `n` levels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch

from dbrx_q.kernels.formats.trellis import by_position, cost_units
from dbrx_q.kernels.formats.trellis_codes import TrellisCode
from dbrx_q.kernels.formats.viterbi import NARROW_BITS, NARROW_RENEW, NARROW_SHIFT, RENEW, ROWS, most_word

from .compiled import compiled
from .viterbi_steps import SearchShape, level_costs, narrow_costs, step, word

__all__ = ["search_bytes", "trellis_block"]

_HALF = ROWS // 2
_LINE = 64
_KEPT = threading.local()


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
        _levels(code),
        _levels_of_states(code),
        _places_of_states(code),
        symbols.numpy(),
        *_scratch(shape, B),
    )
    return symbols


def search_bytes(code: TrellisCode, columns: int) -> int:
    """Bytes that a thread keeps for calls with blocks of so many columns."""
    return sum(nbytes + _LINE for _, nbytes in _scratch_parts(SearchShape.of(code), columns))


def _scratch_parts(shape: SearchShape, columns: int) -> tuple[tuple[Any, int], ...]:
    """(dtype, bytes) of each array: a tile, one element of each row, costs, the same in bytes, permuted costs, sums, the least of them."""
    n, Q = 1 << shape.index_bits, shape.ends
    return (
        (np.float32, columns * ROWS * 4),
        (np.float32, ROWS * 4),
        (np.uint16, ROWS * n * 2),
        (np.uint8, ROWS * n),
        (np.uint16, n * _LINE),
        (np.uint16, (ROWS // _stride(shape) + _stride(shape)) * Q * 2),
        (np.int64, (ROWS + 1) * 8),
    )


def _stride(shape: SearchShape) -> int:
    """How many steps of the second pass share the sums that are kept for the way back: a second-level cache of 1 MB has room for half."""
    return 2 if shape.ends * 2 * ROWS >= 1 << 20 else 1


def _scratch(shape: SearchShape, columns: int) -> list[np.ndarray]:
    """The scratch arrays of this thread, kept for calls of the same kind: fresh pages cost as much as 5 % of a search of 128 rows."""
    key, arrays = getattr(_KEPT, "scratch", (None, []))
    if key != (shape, columns):
        arrays = []
        for dtype, nbytes in _scratch_parts(shape, columns):
            memory = np.empty(nbytes + _LINE, np.uint8)
            first = -memory.ctypes.data % _LINE
            arrays.append(memory[first : first + nbytes].view(dtype))
        _KEPT.scratch = (shape, columns), arrays
    return arrays


@cache
def _levels(code: TrellisCode) -> np.ndarray:
    """float32 [n]: the levels, in `SearchShape.level_order`."""
    return code.level_table(torch.device("cpu")).float()[list(SearchShape.of(code).level_order)].numpy()


@cache
def _levels_of_states(code: TrellisCode) -> np.ndarray:
    """int8 [S]: the level of every state."""
    cpu = torch.device("cpu")
    return code.level_table(cpu)[code.index_table(cpu).long()].numpy()


@cache
def _places_of_states(code: TrellisCode) -> np.ndarray:
    """uint8 [S]: where `SearchShape.level_order` has the level of every state."""
    places = np.empty(1 << code.index_bits, np.uint8)
    places[list(SearchShape.of(code).level_order)] = np.arange(len(places), dtype=np.uint8)
    return places[code.index_table(torch.device("cpu")).numpy()]


@cache
def _block(shape: SearchShape) -> Callable[..., None]:
    """The compiled loop over tiles and columns for codes of a shape."""
    bits, state_bits, index_bits = shape.bits, shape.state_bits, shape.index_bits
    low_columns, high_columns = shape.low_columns, shape.high_columns
    n, Q, stride = 1 << index_bits, shape.ends, _stride(shape)
    most = most_word(bits)
    narrow = bits == NARROW_BITS
    first_width, first_renew = (1, NARROW_RENEW) if narrow else (2, RENEW)
    choices = (1 << bits) - 1
    places_of_choices = tuple(shape.place(choice * Q) for choice in range(1 << bits))

    @compiled()
    def trace(sums_at, leasts, costs, places, end, symbols):
        """Write the bits of all positions, from the path that ends with `end` at position 0.

        With a stride of 2, an odd step's sums are computed again where the path may come from; no even step renews them.
        """
        costs_at = np.int64(costs.ctypes.data)
        for t in range(ROWS - stride, -1, -stride):
            old_at, before = sums_at + _slot(t, stride) * (2 * Q), costs_at + (ROWS - 1 - t) * (2 * n)
            if stride == 2:
                symbols[ROWS - 2 - t] = end & choices
                best, place = np.int64(most), np.int64(places[end])
                for choice in range(1 << bits):
                    end_before = (choice * Q + end) >> bits
                    word_before = word(
                        old_at, leasts[t], before, end_before, places[end_before],
                        2, bits, state_bits, index_bits, low_columns, high_columns,
                    )  # fmt: skip
                    total = (word_before >> bits) + np.int64(costs[(ROWS - 2 - t) * n + (place ^ places_of_choices[choice])])
                    best = min(best, total << bits | choice)
                end = ((best & choices) * Q + end) >> bits
            symbols[ROWS - 1 - t] = end & choices
            best = word(old_at, leasts[t], before, end, places[end], 2, bits, state_bits, index_bits, low_columns, high_columns)
            end = ((best & choices) * Q + end) >> bits

    @compiled()
    def block(columns, factor, scales, units, levels, state_levels, places, symbols, tile, x, costs, octets, table, sums, leasts):
        """Fill `symbols`; the last seven arguments are scratch memory."""
        B, N = columns.shape
        levels_at, costs_at, table_at = np.int64(levels.ctypes.data), np.int64(costs.ctypes.data), np.int64(table.ctypes.data)
        sums_at, octets_at = np.int64(sums.ctypes.data), np.int64(octets.ctypes.data)
        first_costs_at = octets_at if narrow else costs_at
        leasts[0] = 0
        for number in range(len(symbols)):
            first = number * ROWS
            rows = min(ROWS, N - first)
            _read_tile(columns, first, rows, tile)
            for column in range(B):
                _divide(tile, column, scales, first, rows, x)
                for p in range(ROWS):
                    level_costs(x[p], units[number, p], levels_at, costs_at + p * (2 * n), bits, index_bits)
                if narrow:
                    narrow_costs(costs_at, octets_at, ROWS * n // 64, NARROW_SHIFT)
                sums[:Q] = 0
                for t in range(ROWS):
                    before = first_costs_at + ((_HALF - 1 - t) & (ROWS - 1)) * (first_width * n)
                    old_at = sums_at + (t if t >= _HALF else t & 1) * (first_width * Q)
                    new_at = sums_at + (t + 1 if t + 1 >= _HALF else t + 1 & 1) * (first_width * Q)
                    if t % first_renew == first_renew - 1:
                        leasts[t + 1] = step(
                            old_at, before, new_at, leasts[t], table_at,
                            first_width, 1, bits, state_bits, index_bits, low_columns, high_columns,
                        )  # fmt: skip
                    else:
                        leasts[t + 1] = step(
                            old_at, before, new_at, leasts[t], table_at,
                            first_width, 0, bits, state_bits, index_bits, low_columns, high_columns,
                        )  # fmt: skip
                ends = _least_at(sums.view(np.uint8), ROWS * Q, Q) if narrow else _least_at(sums, ROWS * Q, Q)
                for t in range(ROWS - 1, _HALF - 1, -1):
                    before = first_costs_at + ((_HALF - 1 - t) & (ROWS - 1)) * (first_width * n)
                    best = word(
                        sums_at + t * (first_width * Q), leasts[t], before, ends, places[ends],
                        first_width, bits, state_bits, index_bits, low_columns, high_columns,
                    )  # fmt: skip
                    ends = ((best & choices) * Q + ends) >> bits
                start = Q * (stride - 1)
                sums[start : start + Q] = most >> bits
                sums[start + ends] = 0
                for t in range(ROWS):
                    before = costs_at + (ROWS - 1 - t) * (2 * n)
                    old_at = sums_at + _slot(t, stride) * (2 * Q)
                    new_at = sums_at + _slot(t + 1, stride) * (2 * Q)
                    if t % RENEW == RENEW - 1:
                        leasts[t + 1] = step(
                            old_at, before, new_at, leasts[t], table_at, 2, 1, bits, state_bits, index_bits, low_columns, high_columns
                        )
                    else:
                        leasts[t + 1] = step(
                            old_at, before, new_at, leasts[t], table_at, 2, 0, bits, state_bits, index_bits, low_columns, high_columns
                        )
                trace(sums_at, leasts, costs, places, ends, symbols[number, column])
                if len(factor):
                    _feed_back(tile, column, factor, scales, first, rows, symbols[number, column], state_levels, bits, columns)

    return block


@compiled()
def _slot(t, stride):
    """Which of the kept vectors of Q sums has those before step t; a stride of 2 keeps every second one, and all others in the first."""
    return t if stride == 1 else 0 if t & 1 else 1 + (t >> 1)


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
def _least_at(sums, first, Q):
    """The lowest number of the least of Q sums."""
    least = sums[first]
    for q in range(Q):
        least = min(least, sums[first + q])
    q = 0
    while sums[first + q] != least:
        q += 1
    return q


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
