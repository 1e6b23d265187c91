"""Activations for the CPU's dot products: 16-bit integers with one scale per block of 128.

The largest magnitude of a block maps to 32767, so a value within a factor of 128 of it keeps at least the 8 significant bits of bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numba import prange

from .compiled import compiled

__all__ = ["QuantizedActivations", "quantize_activations"]

_BLOCK = 128
_SUMS_MULTIPLE = 16  # the int4 kernel reads the sums of 16 groups at a time


@dataclass(frozen=True)
class QuantizedActivations:
    """`T` rows of `K` activations."""

    codes: torch.Tensor
    """int16 [T, K]. For int4 weights, lane `l` of vector `s` of a block of 128 is element 4l+s; for others, elements are in order."""
    scales: torch.Tensor
    """float32 [T, K/128]."""
    sums: torch.Tensor
    """float32 [T, K/G rounded up to 16]: the sum of each group of dequantized activations; empty unless asked for."""


def quantize_activations(x: torch.Tensor, *, sums_of: int = 0) -> QuantizedActivations:
    """Quantize `x` [T, K], K a multiple of 128; `sums_of` is the group size of int4 weights, 0 for weights without zero-points."""
    T, K = x.shape
    groups = K // sums_of if sums_of else 0
    codes = torch.empty(T, K, dtype=torch.int16)
    scales = torch.empty(T, K // _BLOCK)
    sums = torch.zeros(T, (groups + _SUMS_MULTIPLE - 1) // _SUMS_MULTIPLE * _SUMS_MULTIPLE)
    _quantize(x.float().contiguous().numpy(), codes.numpy(), scales.numpy(), sums.numpy(), sums_of)
    return QuantizedActivations(codes, scales, sums)


@compiled(parallel=True)
def _quantize(x, codes, scales, sums, group_size):
    T, K = x.shape
    for t in prange(T):
        for block in range(K // _BLOCK):
            first = block * _BLOCK
            largest = np.float32(0)
            for i in range(first, first + _BLOCK):
                magnitude = abs(x[t, i])
                if magnitude > largest or magnitude != magnitude:  # keep NaN: the scale propagates it to the result
                    largest = magnitude
            scale = largest / np.float32(32767)
            inverse = np.float32(32767) / largest if largest > 0 else np.float32(0)
            scales[t, block] = scale
            if group_size:
                for i in range(_BLOCK):
                    code = np.int16(np.rint(x[t, first + i] * inverse))
                    codes[t, first + i % 4 * 32 + i // 4] = code
                    sums[t, (first + i) // group_size] += np.float32(code)
            else:
                for i in range(first, first + _BLOCK):
                    codes[t, i] = np.int16(np.rint(x[t, i] * inverse))
        if group_size:
            for g in range(K // group_size):
                sums[t, g] *= scales[t, g * group_size // _BLOCK]
