"""Quantization to int2, int3, int4, q4_0 and int8 in one pass over memory: the bits of their `quantize` functions, many times faster.

Dimension letters: `N` output features (rows), `K` input features (the reduction axis), `G` group size, `n` = K/G groups of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numba import prange

from dbrx_q.kernels.formats import int2_int3, int4, q4_0
from dbrx_q.kernels.formats.int2_int3 import Int2Weight, Int3Weight
from dbrx_q.kernels.formats.int4 import Int4Weight
from dbrx_q.kernels.formats.int8 import Int8Weight
from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight

from .compiled import compiled
from .lanes import LANES, fill_tile, fused, in_memory_order, larger, load, load_half, nearest, smaller, splat, store, store_half, with_code
from .lanes import VECTOR_BYTES as _VECTOR
from .search import group_ranges, range_scale_and_zero, step_of

__all__ = ["KERNELS", "QuantizationKernels", "quantize_int4", "quantize_int8", "quantize_q4_0", "round_int4", "round_int8"]

# Rows of a task: in a transposed weight, 32 neighbours in bfloat16 fill a cache line.
_ROWS = 32


def quantize_int4(weight: torch.Tensor, group_size: int) -> tuple[Int4Weight, float, float]:
    """The packed weight, the sum of squared errors and the sum of squares; on several threads, with the same bits on any number of them.

    Args:
        weight: [N, K] on the CPU; bfloat16 and float32 are read in place, also if they are transposed; other dtypes are copied. NaN gives
            an unspecified result, and an infinite range gives infinite scales: the caller checks for both.
        group_size: 32, 64 or 128; divides K.
    """
    return _int4(weight, group_size, None, None)


def quantize_int8(weight: torch.Tensor, group_size: int) -> tuple[Int8Weight, float, float]:
    """The packed weight, the sum of squared errors and the sum of squares; see `quantize_int4`."""
    return _int8(weight, group_size, None)


def quantize_q4_0(weight: torch.Tensor, group_size: int) -> tuple[Int4Weight, float, float]:
    """`quantize_int4` with zero-points of 7 and 8 alone."""
    return _int4(weight, group_size, None, None, q4_0.ZERO_POINTS)


def round_int4(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, group_size: int) -> tuple[Int4Weight, float, float]:
    """`quantize_int4` on a given grid: scales, float16 [N, n], and zero-points, whole numbers [N, n] of any dtype; on one thread."""
    return _int4(weight, group_size, scales, zeros)


def round_int8(weight: torch.Tensor, scales: torch.Tensor, group_size: int) -> tuple[Int8Weight, float, float]:
    """`quantize_int8` on a given grid: scales, float16 [N, n]; on one thread."""
    return _int8(weight, group_size, scales)


_Result = tuple[QuantizedWeight, float, float]


@dataclass(frozen=True)
class QuantizationKernels:
    """Compiled code that quantizes to one format; results as for `quantize_int4`."""

    to_nearest: Callable[[torch.Tensor, int], _Result]
    """Takes (weight [N, K], G); the grid of each group is that of its range."""
    to_grid: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, int], _Result]
    """Takes (weight [N, K], scales [N, n], zero-points [N, n] or None, G)."""


def _int4_to_grid(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group_size: int) -> _Result:
    assert zeros is not None
    return round_int4(weight, scales, zeros, group_size)


def _int8_to_grid(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group_size: int) -> _Result:
    return round_int8(weight, scales, group_size)


def _few_bits(kind: type[Int3Weight]) -> QuantizationKernels:
    """The code for int3 or int2: int4's on fewer levels, whose codes and zero-points are packed again."""
    levels = 2**kind.bits - 1

    def pack(result: tuple[Int4Weight, float, float]) -> _Result:
        weight, error, square = result
        zeros = int2_int3.pack_bits(int4.unpack(weight.zeros, weight.scales.shape[1]), kind.bits)
        return kind(int2_int3.planes(weight.qweight, kind.bits), weight.scales, zeros, weight.group_size), error, square

    def to_nearest(weight: torch.Tensor, group_size: int) -> _Result:
        return pack(_int4(weight, group_size, None, None, (0, levels), levels))

    def to_grid(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group_size: int) -> _Result:
        assert zeros is not None
        return pack(_int4(weight, group_size, scales, zeros, (0, levels), levels))

    return QuantizationKernels(to_nearest, to_grid)


KERNELS = {
    "int2": _few_bits(Int2Weight),
    "int3": _few_bits(Int3Weight),
    "int4": QuantizationKernels(quantize_int4, _int4_to_grid),
    "int8": QuantizationKernels(quantize_int8, _int8_to_grid),
    "q4_0": QuantizationKernels(quantize_q4_0, _int4_to_grid),
}
"""The compiled code, by format."""


def _int4(
    weight: torch.Tensor,
    group_size: int,
    scales: torch.Tensor | None,
    zeros: torch.Tensor | None,
    zero_points: tuple[int, int] = (0, 15),
    levels: int = 15,
) -> tuple[Int4Weight, float, float]:
    """The result of int4 with codes 0 .. `levels`; zero_points: the least and the largest."""
    N, K = weight.shape
    packed_zeros = torch.zeros(N, (K // group_size + 1) // 2, dtype=torch.uint8) if zeros is None else int4.pack(zeros.to(torch.uint8))
    qweight = torch.empty(N, K // 2, dtype=torch.uint8)
    rounded_scales, error, square = _rounded(weight, group_size, levels, qweight, scales, packed_zeros, zero_points)
    return Int4Weight(qweight, rounded_scales, packed_zeros, group_size), error, square


def _int8(weight: torch.Tensor, group_size: int, scales: torch.Tensor | None) -> tuple[Int8Weight, float, float]:
    qweight = torch.empty(weight.shape, dtype=torch.int8)
    rounded_scales, error, square = _rounded(
        weight, group_size, 127, qweight, scales, torch.empty(len(weight), 0, dtype=torch.uint8), (0, 127)
    )
    return Int8Weight(qweight, rounded_scales, group_size), error, square


def _rounded(
    weight: torch.Tensor,
    group_size: int,
    levels: int,
    qweight: torch.Tensor,
    scales: torch.Tensor | None,
    zeros: torch.Tensor,
    zero_points: tuple[int, int],
) -> tuple[torch.Tensor, float, float]:
    """Fill `qweight` and, without given scales, `zeros`. Returns the scales, the sum of squared errors and the sum of squares.

    zero_points: the least and the largest.
    """
    N, K = weight.shape
    weight, layout = in_memory_order(weight)
    grid_scales = torch.empty(N, K // group_size, dtype=torch.float16) if scales is None else scales.contiguous()
    sums = np.zeros((N, 2))  # one row for each row of the weight, added in order: the same sums on any number of threads
    words = qweight.view(torch.int32).numpy()
    run = _round if scales is None else _round_here
    run(*layout, group_size, levels, *zero_points, scales is not None, words, grid_scales.view(torch.int16).numpy(), zeros.numpy(), sums)
    error, square = sums.sum(axis=0).tolist()
    return grid_scales, error, square


@compiled(parallel=True)
def _round(address, item, row_pitch, column_pitch, G, levels, min_zero, max_zero, given, words, scales, zeros, sums):
    for task in prange((len(sums) + _ROWS - 1) // _ROWS):
        _round_rows(task * _ROWS, address, item, row_pitch, column_pitch, G, levels, min_zero, max_zero, given, words, scales, zeros, sums)


@compiled()
def _round_here(address, item, row_pitch, column_pitch, G, levels, min_zero, max_zero, given, words, scales, zeros, sums):
    for first in range(0, len(sums), _ROWS):
        _round_rows(first, address, item, row_pitch, column_pitch, G, levels, min_zero, max_zero, given, words, scales, zeros, sums)


@compiled()
def _round_rows(first, address, item, row_pitch, column_pitch, G, levels, min_zero, max_zero, given, words, scales, zeros, sums):
    """Quantize rows first .. first+31.

    levels: 127 for signed codes of 8 bits, at most 15 for unsigned ones of 4 bits. min_zero, max_zero: the least and the largest
    zero-point. given: whether scales and zeros hold the grid; otherwise the grid is written to them. words: int32 [N, K/8 or K/4], the
    packed codes.
    """
    N, n_groups = scales.shape
    symmetric = levels > 15
    bits = 8 if symmetric else 4
    per_word = 32 // bits
    tile, packed = np.empty((G, LANES), np.float32), np.empty((G // per_word, LANES), np.int32)
    half, single = np.empty(LANES, np.int16), np.empty((4, LANES), np.float32)
    tile_at, packed_at, single_at = tile.ctypes.data, packed.ctypes.data, single.ctypes.data
    least, most = splat(np.float32(-levels if symmetric else 0)), splat(np.float32(levels))
    for g in range(n_groups):
        for n in range(first, min(first + _ROWS, N), LANES):
            rows = min(LANES, N - n)
            fill_tile(tile_at, address + n * row_pitch + g * G * column_pitch, item, row_pitch, column_pitch, rows, G)
            if given:
                for r in range(rows):
                    half[r] = scales[n + r, g]
                    single[0, r] = 0 if symmetric else zeros[n + r, g // 2] >> (g % 2 * 4) & 15
                scale, zero = load_half(half.ctypes.data), load(single_at)
            else:
                low, high = group_ranges(tile_at, G)
                scale, zero = range_scale_and_zero(low, high, levels, symmetric, min_zero, max_zero)
                store_half(scale, half.ctypes.data)
                store(zero, single_at)
                for r in range(rows):
                    scales[n + r, g] = half[r]
                    if not symmetric:
                        zeros[n + r, g // 2] |= np.uint8(single[0, r]) << np.uint8(g % 2 * 4)
            step = step_of(scale)
            error = square = splat(np.float32(0))
            for w in range(G // per_word):
                word = splat(np.float32(0))
                for c in range(per_word):
                    x = load(tile_at + (w * per_word + c) * _VECTOR)
                    code = smaller(larger(nearest(x / step) + zero, least), most)
                    word = with_code(word, code, c * bits, bits)
                    difference = (code - zero) * scale - x
                    error, square = fused(difference, difference, error), fused(x, x, square)
                store(word, packed_at + w * _VECTOR)
            store(error, single_at + 2 * _VECTOR)
            store(square, single_at + 3 * _VECTOR)
            for r in range(rows):
                for w in range(G // per_word):
                    words[n + r, g * (G // per_word) + w] = packed[w, r]
                sums[n + r, 0] += single[2, r]
                sums[n + r, 1] += single[3, r]
