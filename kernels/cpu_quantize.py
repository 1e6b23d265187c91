"""Rounding to nearest in one pass over memory; the same bits as `int4.quantize` and `int8.quantize`, several times faster.

Dimension letters: `N` output features (rows), `K` input features (the reduction axis), `G` group size.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from numba import prange, types
from numba.extending import intrinsic

from . import _cpu_vector as v
from .int4 import Int4Weight
from .int8 import Int8Weight

__all__ = ["quantize_int4", "quantize_int8"]

# Rows that are worked on together: of a weight that lies transposed, 32 neighbours fill a cache line of bfloat16.
_ROWS = 32


def quantize_int4(weight: torch.Tensor, group_size: int) -> tuple[Int4Weight, float, float]:
    """The packed weight, the sum of squared errors and the sum of squares.

    Args:
        weight: [N, K] on the CPU, or a transposed view of a contiguous [K, N]; bfloat16 is read as it lies, other dtypes are copied.
            NaN gives an unspecified result and an infinite range infinite scales: the caller checks both.
        group_size: 32, 64 or 128; divides K.
    """
    N, K = weight.shape
    qweight = torch.empty(N, K // 2, dtype=torch.uint8)
    scales = torch.empty(N, K // group_size, dtype=torch.float16)
    zeros = torch.zeros(N, (K // group_size + 1) // 2, dtype=torch.uint8)
    sums = np.zeros((N, 2))  # one row each, added in order: the same on any number of threads
    values, transposed = _as_it_lies(weight)
    _int4(values, transposed, group_size, qweight.numpy(), scales.view(torch.int16).numpy(), zeros.numpy(), sums)
    return (Int4Weight(qweight, scales, zeros, group_size), *sums.sum(axis=0).tolist())


def quantize_int8(weight: torch.Tensor, group_size: int) -> tuple[Int8Weight, float, float]:
    """The packed weight, the sum of squared errors and the sum of squares; see `quantize_int4`."""
    N, K = weight.shape
    qweight = torch.empty(N, K, dtype=torch.int8)
    scales = torch.empty(N, K // group_size, dtype=torch.float16)
    sums = np.zeros((N, 2))
    values, transposed = _as_it_lies(weight)
    _int8(values, transposed, group_size, qweight.numpy(), scales.view(torch.int16).numpy(), sums)
    return (Int8Weight(qweight, scales, group_size), *sums.sum(axis=0).tolist())


def _as_it_lies(weight: torch.Tensor) -> tuple[np.ndarray, bool]:
    """The memory of a weight [N, K] as an array (bfloat16 as its bits in int16), and whether that array is [K, N]."""
    transposed = not weight.is_contiguous() and weight.T.is_contiguous()
    memory = weight.T if transposed else weight.contiguous()
    return (memory.view(torch.int16) if memory.dtype == torch.bfloat16 else memory.float()).numpy(), transposed


@intrinsic
def _half_bits(typing_context, value):
    """float32 to the bits of the nearest float16."""

    def codegen(context, b, signature, args):
        return b.bitcast(b.fptrunc(args[0], v.F16), v.I16)

    return types.int16(types.float32), codegen


@intrinsic
def _from_half_bits(typing_context, bits):
    """The bits of a float16 to float32."""

    def codegen(context, b, signature, args):
        return b.fpext(b.bitcast(args[0], v.F16), v.F32)

    return types.float32(types.int16), codegen


@intrinsic
def _value(typing_context, element):
    """An element of `_as_it_lies` as float32."""

    def codegen(context, b, signature, args):
        if signature.args[0] == types.float32:
            return args[0]
        return b.bitcast(b.shl(b.zext(args[0], v.I32), v.I32(16)), v.F32)

    return types.float32(element), codegen


@numba.njit(nogil=True, cache=True)
def _gather(weight, transposed, n, rows, k, tile):
    """tile [rows, G] = rows n .. n+rows-1 and elements k .. k+G-1 of the weight."""
    G = tile.shape[1]
    if transposed:
        for i in range(G):
            neighbours = weight[k + i, n : n + rows]
            for r in range(rows):
                tile[r, i] = _value(neighbours[r])
    else:
        for r in range(rows):
            row = weight[n + r, k : k + G]
            for i in range(G):
                tile[r, i] = _value(row[i])


# nnan and nsz let minima and maxima run in vectors; neither changes a rounding. Short plain loops, so that each becomes vector code.
@numba.njit(nogil=True, parallel=True, cache=True, fastmath={"nnan", "nsz"})
def _int4(weight, transposed, G, qweight, scales, zeros, sums):
    N, K = qweight.shape[0], 2 * qweight.shape[1]
    for task in prange((N + _ROWS - 1) // _ROWS):
        first = task * _ROWS
        rows = min(_ROWS, N - first)
        tile = np.empty((_ROWS, G), np.float32)
        codes = np.empty(G, np.float32)
        for g in range(K // G):
            _gather(weight, transposed, first, rows, g * G, tile)
            for r in range(rows):
                n, group = first + r, tile[r]
                low, high = np.float32(0), np.float32(0)
                for i in range(G):
                    low, high = min(low, group[i]), max(high, group[i])
                bits = _half_bits((high - low) / np.float32(15))
                scales[n, g] = bits
                scale = _from_half_bits(bits)
                step = scale if scale != 0 else np.float32(1)
                zero = min(max(np.rint(-low / step), np.float32(0)), np.float32(15))
                zeros[n, g // 2] |= np.uint8(zero) << np.uint8(g % 2 * 4)
                for i in range(G):
                    codes[i] = min(max(np.rint(group[i] / step) + zero, np.float32(0)), np.float32(15))
                error, square = np.float32(0), np.float32(0)
                for i in range(G):
                    difference = (codes[i] - zero) * scale - group[i]
                    error += difference * difference
                    square += group[i] * group[i]
                packed = qweight[n, g * (G // 2) : (g + 1) * (G // 2)]
                for i in range(G // 2):
                    packed[i] = np.uint8(np.int32(codes[2 * i]) | (np.int32(codes[2 * i + 1]) << 4))
                sums[n, 0] += error
                sums[n, 1] += square


@numba.njit(nogil=True, parallel=True, cache=True, fastmath={"nnan", "nsz"})
def _int8(weight, transposed, G, qweight, scales, sums):
    N, K = qweight.shape
    for task in prange((N + _ROWS - 1) // _ROWS):
        first = task * _ROWS
        rows = min(_ROWS, N - first)
        tile = np.empty((_ROWS, G), np.float32)
        for g in range(K // G):
            _gather(weight, transposed, first, rows, g * G, tile)
            for r in range(rows):
                n, group = first + r, tile[r]
                largest = np.float32(0)
                for i in range(G):
                    largest = max(largest, abs(group[i]))
                bits = _half_bits(largest / np.float32(127))
                scales[n, g] = bits
                scale = _from_half_bits(bits)
                step = scale if scale != 0 else np.float32(1)
                codes = qweight[n, g * G : (g + 1) * G]
                error, square = np.float32(0), np.float32(0)
                for i in range(G):
                    code = min(max(np.rint(group[i] / step), np.float32(-127)), np.float32(127))
                    codes[i] = np.int8(code)
                    difference = code * scale - group[i]
                    error += difference * difference
                    square += group[i] * group[i]
                sums[n, 0] += error
                sums[n, 1] += square
