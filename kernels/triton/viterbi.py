"""The search of the trellis formats in Triton: one program rounds the columns of a tile of 128 rows one after the other.

`formats/viterbi.py` has the arithmetic. A word holds the sum of a path, then the choice of its last step, then an end that the path has
passed: one minimum finds the least sum, decides between equal ones and takes that end along. The first pass takes along the ends in the
middle of the column, so it traces no path back. The second takes along the ends before each segment of 16 positions: its path is traced
from segment to segment, then in all segments at once, in 8 + 16 dependent loads in place of 128.

Dimension letters: `N` rows, `B` columns; of the code `S` states, `Q` states without their last k bits (ends), `J` = 2^k, `M` levels; `W`
words that hold the choices of a position.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from dbrx_q.kernels.formats.trellis import by_position, cost_units
from dbrx_q.kernels.formats.trellis_codes import TrellisCode
from dbrx_q.kernels.formats.viterbi import NARROW_BITS, NARROW_CAP, NARROW_RENEW, NARROW_SHIFT, RENEW, ROWS, cost_cap, most_word

from .launch import chip_of, launch

__all__ = ["SearchTiles", "encode", "search_bytes", "search_tiles", "trellis_block", "viterbi_kernel"]

_ROWS = tl.constexpr(ROWS)
_RENEW = tl.constexpr(RENEW)
_NARROW_BITS = tl.constexpr(NARROW_BITS)
_NARROW_CAP = tl.constexpr(NARROW_CAP)
_NARROW_HALF = tl.constexpr((1 << NARROW_SHIFT) >> 1)
_NARROW_MOST = tl.constexpr(255)
_NARROW_RENEW = tl.constexpr(NARROW_RENEW)
_NARROW_SHIFT = tl.constexpr(NARROW_SHIFT)
_SEGMENT = tl.constexpr(16)
_SEGMENTS = tl.constexpr(ROWS // 16)
_LANES = tl.constexpr(16)  # rows 16 v + i of a tile have position 8 i + v
_TURNS = tl.constexpr(ROWS // 16)
_TOGETHER = tl.constexpr(8)  # later columns that are compensated at a time


@dataclass(frozen=True)
class SearchTiles:
    """The work of one program."""

    programs: int
    """Programs that share the columns of a tile."""
    words: int
    """W: each holds the choices of neighbouring ends, which one thread computes."""
    positions: int
    """Positions whose costs are computed together."""
    warps: int
    """Warps of the program."""


_STATES_PER_THREAD = 16
_COSTS_PER_THREAD = 16
_MOST_THREADS = 512


def search_tiles(code: TrellisCode, tiles: int, columns: int, multiprocessors: int) -> SearchTiles:
    """Threads have few states each, so that several warps hide the latency of shared memory; no two threads have the same end.

    Args:
        code: the code.
        tiles: tiles of 128 rows.
        columns: columns that are independent of each other: 1 with feedback.
        multiprocessors: of the chip.
    """
    threads = max(32, min(code.ends, code.states // _STATES_PER_THREAD, _MOST_THREADS))
    positions = min(ROWS, max(1, _COSTS_PER_THREAD * threads // len(code.levels)))
    programs = max(1, min(columns, triton.cdiv(2 * multiprocessors, tiles)))
    return SearchTiles(programs, threads, positions, threads // 32)


def search_bytes(code: TrellisCode, rows: int) -> int:
    """Bytes of GPU memory that `trellis_block` takes beside its arguments for so many rows."""
    tiles = -(-rows // ROWS)
    return tiles * sum(dtype.itemsize * n for dtype, n in _scratch(code, search_tiles(code, tiles, 1, 1).words).values())


def _scratch(code: TrellisCode, words: int) -> dict[str, tuple[torch.dtype, int]]:
    """Type and number of elements of what one program keeps in global memory."""
    return {
        "costs": (torch.int16, ROWS * len(code.levels)),
        "choices": (torch.int16, ROWS * words),
        "passed": (torch.int16, ROWS // _SEGMENT.value * code.ends),
    }


def trellis_block(columns: torch.Tensor, factor: torch.Tensor, scales: torch.Tensor, code: TrellisCode) -> torch.Tensor:
    """`dbrx_q.kernels.trellis.trellis_block`, uint8 [tiles, B, 128]."""
    return _search(columns.T, scales, code, factor)


def encode(rotated: torch.Tensor, scales: torch.Tensor, code: TrellisCode) -> torch.Tensor:
    """`dbrx_q.kernels.trellis.encode`, uint8 [tiles, K, 128]."""
    return _search(rotated, scales, code, None)


def _search(rows: torch.Tensor, scales: torch.Tensor, code: TrellisCode, factor: torch.Tensor | None) -> torch.Tensor:
    """The streams of rows [N, B]; with a factor, rows are overwritten by their errors."""
    (N, B), device = rows.shape, rows.device
    count = triton.cdiv(N, ROWS)
    tiles = search_tiles(code, count, 1 if factor is not None else B, chip_of(device).multiprocessors)
    scratch = {
        name: torch.empty(count * tiles.programs, n, dtype=dtype, device=device) for name, (dtype, n) in _scratch(code, tiles.words).items()
    }
    symbols = torch.empty(count, B, ROWS, dtype=torch.uint8, device=device)
    launch(
        viterbi_kernel,
        (count, tiles.programs),
        rows,
        rows if factor is None else factor,
        scales,
        by_position(cost_units(scales, code)).contiguous(),
        code.index_table(device),
        code.level_table(device),
        symbols,
        scratch["costs"],
        scratch["choices"],
        scratch["passed"],
        N,
        B,
        rows.stride(0),
        rows.stride(1),
        0 if factor is None else factor.stride(0),
        CAP=cost_cap(code.bits),
        MOST=most_word(code.bits) >> code.bits,
        BITS=code.bits,
        STATE_BITS=code.state_bits,
        M=len(code.levels),
        W=tiles.words,
        POSITIONS=tiles.positions,
        PROGRAMS=tiles.programs,
        FEEDBACK=factor is not None,
        warps=tiles.warps,
        stages=1,
        fusion=False,
    )
    return symbols


@triton.jit(do_not_specialize=["N", "B", "row_stride", "column_stride", "factor_stride"])
def viterbi_kernel(
    rows,  # float32 [N, B], by row_stride and column_stride
    factor,  # float32 [B, B], by factor_stride and 1
    scales,  # float16 [N]
    units,  # float32 [tiles, 128], by position
    index,  # int16 [S]
    levels,  # int8 [M]
    symbols,  # uint8 [tiles, B, 128]
    costs,  # int16 [tiles * PROGRAMS, 128, M]; states of the path thereafter
    choices,  # int16 [tiles * PROGRAMS, 128, W]
    passed,  # int16 [tiles * PROGRAMS, segments, Q]
    N,
    B,
    row_stride,
    column_stride,
    factor_stride,
    CAP: tl.constexpr,
    MOST: tl.constexpr,
    BITS: tl.constexpr,
    STATE_BITS: tl.constexpr,
    M: tl.constexpr,
    W: tl.constexpr,
    POSITIONS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    FEEDBACK: tl.constexpr,
):
    Q: tl.constexpr = 1 << (STATE_BITS - BITS)
    tile, program = tl.program_id(0), tl.program_id(1)
    column_stride = column_stride.to(tl.int64)
    place = (tile * PROGRAMS + program).to(tl.int64)
    costs += place * _ROWS * M
    choices += place * _ROWS * W
    passed += place * _SEGMENTS * Q
    units += tile * _ROWS
    # One thread has the Q // W ends of a word, so neighbouring states are loaded no further than that.
    states = tl.max_contiguous(tl.arange(0, 1 << STATE_BITS), Q // W)
    indices = tl.load(index + states).to(tl.int32)

    position = tl.arange(0, _ROWS)
    row = _row_of(tile, position)
    inside = row < N
    at = rows + row.to(tl.int64) * row_stride
    for i in range(program, B, PROGRAMS):
        column = i * column_stride
        _store_costs(costs, rows + column, scales, units, levels, tile, N, row_stride, M, POSITIONS, CAP)
        tl.debug_barrier()
        ends = _first_pass(costs, indices, MOST, BITS, STATE_BITS, M)
        _second_pass(costs, choices, passed, ends, indices, MOST, BITS, STATE_BITS, M, W)
        tl.debug_barrier()
        _trace(costs, choices, passed, ends, BITS, STATE_BITS, W)
        tl.debug_barrier()
        state = tl.load(costs + position).to(tl.int32)
        symbol = (state & ((1 << BITS) - 1)).to(tl.uint8)
        tl.store(symbols + (tile.to(tl.int64) * B + i) * _ROWS + position, symbol)
        if FEEDBACK:
            scale = tl.load(scales + row, mask=inside, other=0.0).to(tl.float32)
            level = tl.load(levels + tl.load(index + state)).to(tl.float32)
            x = tl.load(at + column, mask=inside, other=0.0)
            error = tl.div_rn(x - scale * level, tl.load(factor + i * factor_stride + i))
            tl.store(at + column, error, mask=inside)
            for first in range((i + 1) // _TOGETHER * _TOGETHER, B, _TOGETHER):
                later = first + tl.arange(0, _TOGETHER)
                exists = (later > i) & (later < B)
                weight = tl.load(factor + i * factor_stride + later, mask=exists, other=0.0)[:, None]
                places, exist = at[None, :] + later[:, None] * column_stride, exists[:, None] & inside[None, :]
                left = tl.load(places, mask=exist, other=0.0)
                tl.store(places, left - weight * error[None, :], mask=exist)
        tl.debug_barrier()  # before the costs and the next column are overwritten and read


@triton.jit
def _row_of(tile, position):
    """Rows 16 v + i of a tile have position 8 i + v."""
    return tile * _ROWS + position % _TURNS * _LANES + position // _TURNS


@triton.jit
def _store_costs(
    costs,
    column,
    scales,
    units,
    levels,
    tile,
    N,
    row_stride,
    M: tl.constexpr,
    POSITIONS: tl.constexpr,
    CAP: tl.constexpr,
):
    """Stores the cost of each level at each position, min(CAP, floor(unit (x - level)^2 + 1/2) - the least of these)."""
    places = tl.arange(0, M)
    level = tl.load(levels + places).to(tl.float32)[None, :]
    for first in range(0, _ROWS, POSITIONS):
        position = first + tl.arange(0, POSITIONS)
        row = _row_of(tile, position)
        inside = row < N
        scale = tl.load(scales + row, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(column + row.to(tl.int64) * row_stride, mask=inside, other=0.0)
        x = tl.div_rn(x, tl.where(scale == 0, 1.0, scale))
        away = x[:, None] - level
        cost = tl.floor(away * away * tl.load(units + position)[:, None] + 0.5)
        cost = tl.minimum(cost - tl.min(cost, axis=1)[:, None], 1.0 * CAP)
        tl.store(costs + position[:, None] * M + places[None, :], cost.to(tl.int16))


@triton.jit
def _step(words, cost, indices, MOST: tl.constexpr, SATURATED: tl.constexpr, BITS: tl.constexpr, STATE_BITS: tl.constexpr):
    """uint32 [Q]: words of the ends after one more position, from words [Q] and costs [M].

    An end whose states all have sums above MOST gets that sum and the choice SATURATED, so this choice alone has to saturate.
    """
    J: tl.constexpr = 1 << BITS
    Q: tl.constexpr = 1 << (STATE_BITS - BITS)
    kept: tl.constexpr = 0xFFFFFFFF - (J - 1) * Q  # all but the last choice
    before = tl.reshape(words & kept, (J, Q // J, 1))
    before = tl.reshape(tl.broadcast_to(before, (J, Q // J, J)), (J, Q))  # state s follows the end s >> k
    added = tl.reshape(tl.gather(cost.to(tl.int32) << STATE_BITS, indices, 0), (J, Q)).to(tl.uint32, bitcast=True)
    choice = tl.arange(0, J)[:, None]
    sums = before + added + (choice * Q).to(tl.uint32)
    largest = (sums & ((1 << STATE_BITS) - 1)) | (MOST << STATE_BITS)
    return tl.min(tl.where(choice == SATURATED, tl.minimum(sums, largest), sums), axis=0)


@triton.jit
def _renewed(words, ends, STATE_BITS: tl.constexpr, restart):
    """Words less the least sum; where `restart`, words that take along their own ends."""
    sums = words >> STATE_BITS
    sums = (sums - tl.min(sums, axis=0)) << STATE_BITS
    passed = words & ((1 << STATE_BITS) - 1)
    return sums | tl.where(restart, ends, passed)


@triton.jit
def _first_pass(costs, indices, MOST: tl.constexpr, BITS: tl.constexpr, STATE_BITS: tl.constexpr, M: tl.constexpr):
    """The end between the positions 0 and 127 of the cheapest path that begins at position 63 and goes around once."""
    MIDDLE: tl.constexpr = _ROWS // 2
    END_BITS: tl.constexpr = STATE_BITS - BITS
    Q: tl.constexpr = 1 << END_BITS
    ends = tl.arange(0, Q).to(tl.uint32)
    NARROW: tl.constexpr = BITS == _NARROW_BITS
    LARGEST: tl.constexpr = _NARROW_MOST if NARROW else MOST
    SATURATED: tl.constexpr = 0 if NARROW else (1 << BITS) - 1
    STEPS: tl.constexpr = _NARROW_RENEW if NARROW else _RENEW
    level = tl.arange(0, M)
    words = tl.zeros((Q,), tl.uint32)
    cost = tl.load(costs + (MIDDLE - 1) * M + level)
    for first in range(0, _ROWS, STEPS):
        for t in range(first, first + STEPS):
            following = tl.load(costs + ((MIDDLE - 2 - t) & (_ROWS - 1)) * M + level)
            if NARROW:
                cost = tl.minimum((cost.to(tl.int32) + _NARROW_HALF) >> _NARROW_SHIFT, _NARROW_CAP).to(tl.int16)
            words = _step(words, cost, indices, LARGEST, SATURATED, BITS, STATE_BITS)
            cost = following
        words = _renewed(words, ends, STATE_BITS, first < MIDDLE)
    # The least sum is 0; of several ends that have it, the lowest.
    best = tl.min(tl.where(words >> STATE_BITS == 0, (ends << END_BITS) | (words & (Q - 1)), 0xFFFFFFFF), axis=0)
    return (best & (Q - 1)).to(tl.int32)


@triton.jit
def _second_pass(
    costs,
    choices,
    passed,
    ends,
    indices,
    MOST: tl.constexpr,
    BITS: tl.constexpr,
    STATE_BITS: tl.constexpr,
    M: tl.constexpr,
    W: tl.constexpr,
):
    """Stores the choices of all ends at all positions, from 127 down to 0, and the ends that paths have passed before each segment."""
    Q: tl.constexpr = 1 << (STATE_BITS - BITS)
    P: tl.constexpr = Q // W
    end = tl.arange(0, Q)
    level = tl.arange(0, M)
    shifts = (tl.arange(0, P) * BITS).to(tl.uint32)[None, :]
    words = (tl.where(end == ends, 0, MOST << STATE_BITS) | end).to(tl.uint32)
    cost = tl.load(costs + (_ROWS - 1) * M + level)
    for segment in range(_SEGMENTS):
        for renewal in range(_SEGMENT // _RENEW):
            words = _renewed(words, end.to(tl.uint32), STATE_BITS, renewal == 0)
            first = segment * _SEGMENT + renewal * _RENEW
            for t in range(first, first + _RENEW):
                following = tl.load(costs + ((_ROWS - 2 - t) & (_ROWS - 1)) * M + level)
                words = _step(words, cost, indices, MOST, (1 << BITS) - 1, BITS, STATE_BITS)
                choice = (words >> (STATE_BITS - BITS)) & ((1 << BITS) - 1)
                packed = tl.sum(tl.reshape(choice, (W, P)) << shifts, axis=1)
                tl.store(choices + t * W + tl.arange(0, W), packed.to(tl.int16))
                cost = following
        tl.store(passed + segment * Q + end, (words & (Q - 1)).to(tl.int16))


@triton.jit
def _trace(states, choices, passed, ends, BITS: tl.constexpr, STATE_BITS: tl.constexpr, W: tl.constexpr):
    """Stores the states of the path that ends with `ends`, by position."""
    Q: tl.constexpr = 1 << (STATE_BITS - BITS)
    P: tl.constexpr = Q // W
    segments = tl.arange(0, _SEGMENTS)
    end = tl.zeros((_SEGMENTS,), tl.int32)
    for n in range(_SEGMENTS):
        segment = _SEGMENTS - 1 - n
        end = tl.where(segments == segment, ends, end)
        ends = tl.load(passed + segment * Q + ends).to(tl.int32)
    for n in range(_SEGMENT):
        t = segments * _SEGMENT + (_SEGMENT - 1 - n)
        packed = tl.load(choices + t * W + end // P).to(tl.int32)
        state = (((packed >> (end % P * BITS)) & ((1 << BITS) - 1)) * Q) | end
        tl.store(states + (_ROWS - 1 - t), state.to(tl.int16))
        end = state >> BITS
