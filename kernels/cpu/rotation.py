"""Activations for trellis weights: rotated (`formats/rotation.py`), and quantized to integers with one scale per token.

Rotated activations have no outliers, so one scale serves all of K. The rotation has the float32 bits of `formats/rotation.py`.

Dimension letters: `T` tokens, `K` input features, `G` inputs of one Hadamard matrix, `H` bytes of an integer.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from dbrx_q.kernels.formats.rotation import signs

from . import vector as v
from .activations import LARGEST, SMALLEST, QuantizedActivations, floats, ints, larger, llvm_function, pitch_of, silu
from .addresses import integer
from .compiled import compiled_address, for_each

__all__ = ["quantize_rotated", "rotate", "rotate_back"]


def quantize_rotated(x: torch.Tensor, up: torch.Tensor | None = None, *, group_size: int, code_bytes: int) -> QuantizedActivations:
    """Rotate and quantize on numba's current number of threads.

    Args:
        x: [T, K].
        up: float32 [T, K] and contiguous, as `x` is then; silu(x) * up is quantized instead of `x`.
        group_size: G.
        code_bytes: H, 1 to 3.
    """
    x = x.float().contiguous()
    T, K = x.shape
    codes = torch.empty(T, code_bytes, pitch_of(K), dtype=torch.int8)[..., :K]
    result = QuantizedActivations(codes, torch.empty(T, 1), torch.empty(T, code_bytes, dtype=torch.int32))
    tensors = x, x if up is None else up, torch.empty(T, K), signs(K), result.codes, result.scales, result.sums
    arguments = np.array([*(tensor.data_ptr() for tensor in tensors), K, result.pitch], np.int64)
    for_each(_quantizer(group_size, code_bytes), arguments.ctypes.data, T)
    return result


def rotate(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """float32 [T, K]: x [T, K] in the basis of a weight's levels."""
    x = x.float().contiguous()
    out = torch.empty_like(x)
    _rotate_rows(x, out, _rotator(group_size, 0))
    return out


def rotate_back(values: torch.Tensor, group_size: int) -> None:
    """Rotate rows back, contiguous float32 [N, K], in place."""
    _rotate_rows(values, values, _rotator(group_size, 1))


def _rotate_rows(x: torch.Tensor, out: torch.Tensor, function: int) -> None:
    T, K = x.shape
    arguments = np.array([x.data_ptr(), signs(K).data_ptr(), out.data_ptr(), K], np.int64)
    for_each(function, arguments.ctypes.data, T)


def _hadamard(b: Any, values: list[Any]) -> list[Any]:
    """The product of neighbours in vectors of 16 lanes with the Hadamard matrix, in the order of `formats/rotation.py`."""
    for distance in (1, 2, 4, 8):
        turned = v.constant(v.V16F, [-1.0 if lane & distance else 1.0 for lane in range(16)])
        values = [b.fadd(v.broadcast(b, x, [lane ^ distance for lane in range(16)]), b.fmul(x, turned)) for x in values]
    distance = 1
    while distance < len(values):
        result = list(values)
        for i in range(len(values)):
            if not i & distance:
                x, y = values[i], values[i + distance]
                result[i], result[i + distance] = b.fadd(x, y), b.fsub(x, y)
        values, distance = result, 2 * distance
    factor = floats((16 * len(values)) ** -0.5)
    return [b.fmul(value, factor) for value in values]


def _load(b: Any, address: Any, count: int) -> list[Any]:
    return [v.load(b, b.add(address, v.I64(64 * i)), v.V16F) for i in range(count)]


@intrinsic(prefer_literal=True)
def _rotate_group(typing_context, x, signs_at, out, group_size, back):
    """Rotate G values, or rotate them back. The last two arguments are literals."""
    if not all(isinstance(literal, types.IntegerLiteral) for literal in (group_size, back)):
        return None
    count = group_size.literal_value // 16

    def codegen(context, b, signature, args):
        x, signs_at, out, _, _ = args
        values, factors = _load(b, x, count), _load(b, signs_at, count)
        if not back.literal_value:
            values = [b.fmul(value, factor) for value, factor in zip(values, factors, strict=True)]
        values = _hadamard(b, values)
        if back.literal_value:
            values = [b.fmul(value, factor) for value, factor in zip(values, factors, strict=True)]
        for i, value in enumerate(values):
            v.store(b, value, b.add(out, v.I64(64 * i)))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3, group_size, back), codegen


@intrinsic
def _gate(typing_context, gate, up, out):
    """silu(gate) * up of 16 values."""

    def codegen(context, b, signature, args):
        gate, up, out = args
        v.store(b, b.fmul(silu(b, v.load(b, gate, v.V16F)), v.load(b, up, v.V16F)), out)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), codegen


@intrinsic(prefer_literal=True)
def _quantize_row(typing_context, x, vectors, codes, pitch, scale_at, sums, code_bytes):
    """Quantize 16 * `vectors` values with one scale; `pitch`: from byte to byte of an integer; code_bytes: H, a literal."""
    if not isinstance(code_bytes, types.IntegerLiteral):
        return None
    H = code_bytes.literal_value

    def codegen(context, b, signature, args):
        x, vectors, codes, pitch, scale_at, sums, _ = args
        slot = cgutils.alloca_once(b, v.V16F)
        b.store(floats(0.0), slot)
        with cgutils.for_range(b, vectors) as loop:
            value = v.load(b, b.add(x, b.mul(loop.index, v.I64(64))), v.V16F)
            b.store(larger(b, llvm_function(b, "llvm.fabs.v16f32", v.V16F, value), b.load(slot)), slot)
        largest = b.load(slot)
        for distance in (8, 4, 2, 1):
            largest = larger(b, v.broadcast(b, largest, [lane ^ distance for lane in range(16)]), largest)
        largest = b.select(b.fcmp_ordered("<", largest, floats(SMALLEST)), floats(0.0), largest)
        zero = b.fcmp_ordered("==", largest, floats(0.0))
        inverse = b.select(zero, floats(0.0), b.fdiv(floats(float(LARGEST[H])), largest))
        scale = b.fmul(largest, floats(1 / LARGEST[H]))
        v.store(b, b.extract_element(scale, v.I32(0)), scale_at)
        totals = [cgutils.alloca_once(b, v.V16I) for _ in range(H)]
        for total in totals:
            b.store(ir.Constant(v.V16I, None), total)
        with cgutils.for_range(b, vectors) as loop:
            value = v.load(b, b.add(x, b.mul(loop.index, v.I64(64))), v.V16F)
            whole = llvm_function(b, "llvm.rint.v16f32", v.V16F, b.fmul(value, inverse))
            rows = [llvm_function(b, "llvm.fptosi.sat.v16i32.v16f32", v.V16I, whole)]
            for _ in range(H - 1):
                rows.insert(0, b.ashr(b.add(rows[0], ints(128)), ints(8)))
            for h, row in enumerate(rows):
                octets = b.trunc(row, v.vector(v.I8, 16))
                b.store(b.add(b.load(totals[h]), b.sext(octets, v.V16I)), totals[h])
                v.store(b, octets, b.add(b.add(codes, b.mul(pitch, v.I64(h))), b.mul(loop.index, v.I64(16))))
        for h, total in enumerate(totals):
            v.store(b, llvm_function(b, "llvm.vector.reduce.add.v16i32", v.I32, b.load(total)), b.add(sums, v.I64(4 * h)))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 6, code_bytes), codegen


@cache
def _quantizer(group_size: int, code_bytes: int) -> int:
    """The address of the function that rotates and quantizes a row, compiled for one rotation and one size of integers, for `for_each`."""

    def quantize_row(arguments, t, _):
        K, pitch = integer(arguments, 7), integer(arguments, 8)
        x, up = integer(arguments, 0) + 4 * t * K, integer(arguments, 1) + 4 * t * K
        rotated, signs_at = integer(arguments, 2) + 4 * t * K, integer(arguments, 3)
        if up != x:
            for k in range(0, 4 * K, 64):
                _gate(x + k, up + k, rotated + k)
            x = rotated
        for k in range(0, 4 * K, 4 * group_size):
            _rotate_group(x + k, signs_at + k, rotated + k, group_size, 0)
        codes, scale, sums = integer(arguments, 4) + t * pitch * code_bytes, integer(arguments, 5) + 4 * t, integer(arguments, 6)
        _quantize_row(rotated, K // 16, codes, pitch, scale, sums + 4 * code_bytes * t, code_bytes)
        return 0

    return compiled_address(quantize_row, 3)


@cache
def _rotator(group_size: int, back: int) -> int:
    """The address of the function that rotates a row, or rotates it back, compiled for one rotation, for `for_each`."""

    def rotate_row(arguments, n, _):
        K = integer(arguments, 3)
        x, signs_at, out = integer(arguments, 0) + 4 * n * K, integer(arguments, 1), integer(arguments, 2) + 4 * n * K
        for k in range(0, 4 * K, 4 * group_size):
            _rotate_group(x + k, signs_at + k, out + k, group_size, back)
        return 0

    return compiled_address(rotate_row, 3)
