"""Activations for trellis weights: rotated (`formats/rotation.py`), and quantized to integers with one scale per token.

Rotated activations have no outliers, so one scale serves all of K. The rotation has the float32 bits of `formats/rotation.py`.

Dimension letters: `T` tokens, `K` input features, `G` inputs of one Hadamard matrix, `H` bytes of an integer.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from dbrx_q.kernels.formats.rotation import signs

from . import vector as v
from .activations import LARGEST, SMALLEST, QuantizedActivations, floats, ints, larger, llvm_function, pitch_of, silu
from .compiled import compiled

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
    rotated = torch.empty(T, K)
    addresses = x.data_ptr(), x.data_ptr() if up is None else up.data_ptr(), rotated.data_ptr(), signs(K).data_ptr()
    targets = result.codes.data_ptr(), result.scales.data_ptr(), result.sums.data_ptr()
    _quantizer(group_size, code_bytes)(*addresses, int(up is not None), *targets, T, K, result.pitch)
    return result


def rotate(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """float32 [T, K]: x [T, K] in the basis of a weight's levels."""
    x = x.float().contiguous()
    out = torch.empty_like(x)
    _rotator(group_size, 0)(x.data_ptr(), signs(x.shape[-1]).data_ptr(), out.data_ptr(), *x.shape)
    return out


def rotate_back(values: torch.Tensor, group_size: int) -> None:
    """Rotate rows back, contiguous float32 [N, K], in place."""
    _rotator(group_size, 1)(values.data_ptr(), signs(values.shape[-1]).data_ptr(), values.data_ptr(), *values.shape)


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
def _quantizer(group_size: int, code_bytes: int) -> Any:
    """The function that rotates and quantizes rows, compiled for one rotation and one size of integers."""

    @compiled(parallel=True)
    def quantize(x, up, rotated, signs_at, gated, codes, scales, sums, T, K, pitch):
        for t in prange(T):
            row, to = 4 * t * K, rotated + 4 * t * K
            for k in range(0, K, group_size):
                at = x + row + 4 * k
                if gated:
                    for i in range(0, group_size, 16):
                        _gate(at + 4 * i, up + row + 4 * (k + i), to + 4 * (k + i))
                    at = to + 4 * k
                _rotate_group(at, signs_at + 4 * k, to + 4 * k, group_size, 0)
            _quantize_row(to, K // 16, codes + t * pitch * code_bytes, pitch, scales + 4 * t, sums + 4 * code_bytes * t, code_bytes)

    return quantize


@cache
def _rotator(group_size: int, back: int) -> Any:
    """The function that rotates rows, or rotates them back, compiled for one rotation."""

    @compiled(parallel=True)
    def rotate(x, signs_at, out, rows, K):
        for n in prange(rows):
            for k in range(0, K, group_size):
                _rotate_group(x + 4 * (n * K + k), signs_at + 4 * k, out + 4 * (n * K + k), group_size, back)

    return rotate
