"""Rounding to nearest in one pass over memory; the same bits as `int4.quantize` and `int8.quantize`, several times faster."""

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


def quantize_int4(weight: torch.Tensor, group_size: int) -> tuple[Int4Weight, float, float]:
    """The packed weight, the sum of squared errors and the sum of squares, for a contiguous float32 weight [N, K] with a valid group size.

    NaN gives an unspecified result and an infinite range infinite scales: the caller checks both.
    """
    N, K = weight.shape
    qweight = torch.empty(N, K // 2, dtype=torch.uint8)
    scales = torch.empty(N, K // group_size, dtype=torch.float16)
    zeros = torch.zeros(N, (K // group_size + 1) // 2, dtype=torch.uint8)
    sums = np.empty((N, 2))  # one row each, added in order: the same on any number of threads
    _int4(weight.numpy(), group_size, qweight.numpy(), scales.view(torch.int16).numpy(), zeros.numpy(), sums)
    return (Int4Weight(qweight, scales, zeros, group_size), *sums.sum(axis=0).tolist())


def quantize_int8(weight: torch.Tensor, group_size: int) -> tuple[Int8Weight, float, float]:
    """The packed weight, the sum of squared errors and the sum of squares; see `quantize_int4`."""
    N, K = weight.shape
    qweight = torch.empty(N, K, dtype=torch.int8)
    scales = torch.empty(N, K // group_size, dtype=torch.float16)
    sums = np.empty((N, 2))  # one row each, added in order: the same on any number of threads
    _int8(weight.numpy(), group_size, qweight.numpy(), scales.view(torch.int16).numpy(), sums)
    return (Int8Weight(qweight, scales, group_size), *sums.sum(axis=0).tolist())


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


# nnan and nsz let minima and maxima run in vectors; neither changes a rounding.
@numba.njit(nogil=True, parallel=True, cache=True, fastmath={"nnan", "nsz"})
def _int4(weight, group_size, qweight, scales, zeros, sums):
    N, K = weight.shape
    half = group_size // 2
    for n in prange(N):
        total, squares = 0.0, 0.0
        for g in range(K // group_size):
            group = weight[n, g * group_size : (g + 1) * group_size]
            low, high = np.float32(0), np.float32(0)
            for i in range(group_size):
                low, high = min(low, group[i]), max(high, group[i])
            bits = _half_bits((high - low) / np.float32(15))
            scales[n, g] = bits
            scale = _from_half_bits(bits)
            step = scale if scale != 0 else np.float32(1)
            zero = min(max(np.rint(-low / step), np.float32(0)), np.float32(15))
            zeros[n, g // 2] |= np.uint8(zero) << np.uint8(g % 2 * 4)
            error, square = np.float32(0), np.float32(0)
            packed = qweight[n, g * half : (g + 1) * half]
            for i in range(half):
                a = min(max(np.rint(group[2 * i] / step) + zero, np.float32(0)), np.float32(15))
                c = min(max(np.rint(group[2 * i + 1] / step) + zero, np.float32(0)), np.float32(15))
                packed[i] = np.uint8(a) | (np.uint8(c) << np.uint8(4))
                da, dc = (a - zero) * scale - group[2 * i], (c - zero) * scale - group[2 * i + 1]
                error += da * da + dc * dc
                square += group[2 * i] * group[2 * i] + group[2 * i + 1] * group[2 * i + 1]
            total += error
            squares += square
        sums[n, 0], sums[n, 1] = total, squares


@numba.njit(nogil=True, parallel=True, cache=True, fastmath={"nnan", "nsz"})
def _int8(weight, group_size, qweight, scales, sums):
    N, K = weight.shape
    for n in prange(N):
        total, squares = 0.0, 0.0
        for g in range(K // group_size):
            group = weight[n, g * group_size : (g + 1) * group_size]
            largest = np.float32(0)
            for i in range(group_size):
                largest = max(largest, abs(group[i]))
            bits = _half_bits(largest / np.float32(127))
            scales[n, g] = bits
            scale = _from_half_bits(bits)
            step = scale if scale != 0 else np.float32(1)
            error, square = np.float32(0), np.float32(0)
            codes = qweight[n, g * group_size : (g + 1) * group_size]
            for i in range(group_size):
                code = min(max(np.rint(group[i] / step), np.float32(-127)), np.float32(127))
                codes[i] = np.int8(code)
                difference = code * scale - group[i]
                error += difference * difference
                square += group[i] * group[i]
            total += error
            squares += square
        sums[n, 0], sums[n, 1] = total, squares
