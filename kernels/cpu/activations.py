"""Activations for the CPU's integer products: integers of 8, 16 or 24 bits with one scale per unit of 32 to 128 neighbours along K.

An integer of several bytes is stored in as many rows, since the chips multiply bytes: 256 times the first plus the second, both signed, and
so on. The largest magnitude of a unit maps to 32639, the largest integer with two signed bytes, so a value within a factor of 127 of it
keeps at least the 8 significant bits of bfloat16. With three bytes products err as float32 products do.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from . import vector as v
from .compiled import compiled

__all__ = [
    "LARGEST",
    "SMALLEST",
    "QuantizedActivations",
    "floats",
    "ints",
    "larger",
    "llvm_function",
    "pitch_of",
    "quantize_activations",
    "quantize_gated",
    "silu",
]

LARGEST = {1: 127, 2: 127 * 256 + 127, 3: (127 * 256 + 127) * 256}
"""What the largest magnitude maps to, by the number of bytes; with three, float32 rounding must not pass the largest integer, 127 more."""
SMALLEST = 1e-30
"""Units whose largest magnitude is less become zeros: the inverse of their scale could be infinite."""
_LOG2_E = 1.4426950408889634
_LN_2 = 0.6931471805599453


@dataclass(frozen=True)
class QuantizedActivations:
    """`T` rows of `K` activations."""

    codes: torch.Tensor
    """int8 [T, H, K], H from 1 to 3, rows at a distance (`pitch_of`): a row is 256 times as much as the next. For int4 weights every eight
    neighbours stand in the order 0, 2, 4, 6, 1, 3, 5, 7; for other formats in their own."""
    scales: torch.Tensor
    """float32 [T, K/U]."""
    sums: torch.Tensor
    """int32 [T, K/U], the sum of the integers of each unit; for H = 3 [T, 2 K/U], of each unit that of their first two bytes and that of
    their last. For trellis weights [T, H], of all integers those of each of their bytes."""

    @property
    def pitch(self) -> int:
        """Bytes from a row of codes to the next one."""
        return self.codes.stride(1)

    @property
    def unit(self) -> int:
        """U, activations that share a scale."""
        return self.codes.shape[-1] // self.scales.shape[-1]


def quantize_activations(x: torch.Tensor, *, unit: int, code_bytes: int, interleaved: bool) -> QuantizedActivations:
    """Quantize `x` [T, K] on numba's current number of threads.

    Args:
        unit: U, a power of two from 32 to 128; K is a multiple of it.
        code_bytes: bytes of an integer, 1 to 3.
        interleaved: whether the weight is int4.
    """
    x = x.float().contiguous()
    result = _empty(x, unit, code_bytes)
    _quantizer(unit, code_bytes, int(interleaved))(x.data_ptr(), x.data_ptr(), 0, *_arguments(result))
    return result


def quantize_gated(gate: torch.Tensor, up: torch.Tensor, *, unit: int, code_bytes: int, interleaved: bool) -> QuantizedActivations:
    """Quantize silu(gate) * up, both float32 [T, K] and contiguous; otherwise as `quantize_activations`."""
    result = _empty(gate, unit, code_bytes)
    _quantizer(unit, code_bytes, int(interleaved))(gate.data_ptr(), up.data_ptr(), 1, *_arguments(result))
    return result


def _empty(x: torch.Tensor, unit: int, code_bytes: int) -> QuantizedActivations:
    T, K = x.shape
    codes = torch.empty(T, code_bytes, pitch_of(K), dtype=torch.int8)[..., :K]
    sums = torch.empty(T, K // unit * (2 if code_bytes == 3 else 1), dtype=torch.int32)
    return QuantizedActivations(codes, torch.empty(T, K // unit), sums)


def _arguments(x: QuantizedActivations) -> tuple[int, ...]:
    T, _, K = x.codes.shape
    return x.codes.data_ptr(), x.scales.data_ptr(), x.sums.data_ptr(), T, K, x.pitch


def pitch_of(K: int) -> int:
    """Bytes from row to row: an odd multiple of 512, so that 512 bytes of several rows do not fall on the same lines of the first cache."""
    parts = -(-K // 512)
    return 512 * (parts + 1 - parts % 2)


def floats(value: float) -> Any:
    """A float32 in all lanes."""
    return v.constant(v.V16F, [value] * 16)


def ints(value: int) -> Any:
    """An int32 in all lanes."""
    return v.constant(v.V16I, [value] * 16)


def llvm_function(b: Any, name: str, kind: Any, *values: Any) -> Any:
    """What LLVM's function of that name returns, of the type `kind`."""
    function = ir.FunctionType(kind, [value.type for value in values])
    return b.call(cgutils.get_or_insert_function(b.module, function, name), values)


def silu(b: Any, x: Any) -> Any:
    """x / (1 + exp(-x)), exp(-x) = 2^n * 2^f, 2^f by its Taylor series; relative error about 1e-7, or absolute error below 1e-36."""
    power = b.fmul(x, floats(-_LOG2_E))
    power = llvm_function(b, "llvm.maxnum.v16f32", v.V16F, power, floats(-126.0))
    power = llvm_function(b, "llvm.minnum.v16f32", v.V16F, power, floats(127.0))
    whole = llvm_function(b, "llvm.rint.v16f32", v.V16F, power)
    fraction = b.fmul(b.fsub(power, whole), floats(_LN_2))
    result, factor = floats(1 / 5040), 5040.0
    for k in range(7, 0, -1):
        factor /= k
        result = v.fused(b, result, fraction, floats(1 / factor))
    exponent = b.shl(b.fptosi(whole, v.V16I), ints(23))
    raised = b.bitcast(b.add(b.bitcast(result, v.V16I), exponent), v.V16F)
    return b.fdiv(x, b.fadd(raised, floats(1.0)))


def larger(b: Any, x: Any, y: Any) -> Any:
    """max(x, y), and NaN where one of them is: the scale carries it to the result."""
    return b.select(b.or_(b.fcmp_ordered(">", x, y), b.fcmp_unordered("uno", x, x)), x, y)


@intrinsic(prefer_literal=True)
def _quantize_unit(typing_context, x, up, gated, codes, pitch, scale_at, sum_at, unit, code_bytes, interleaved):
    """Quantize one unit. Addresses, but `pitch`: bytes from the first to the second byte's row; three literals at the end."""
    if not all(isinstance(literal, types.IntegerLiteral) for literal in (unit, code_bytes, interleaved)):
        return None
    U, H, int4 = unit.literal_value, code_bytes.literal_value, bool(interleaved.literal_value)
    octets = [8 * (i // 8) + [0, 2, 4, 6, 1, 3, 5, 7][i % 8] for i in range(16)]

    def codegen(context, b, signature, args):
        x, up, gated, codes, pitch, scale_at, sum_at, _, _, _ = args
        slots = [cgutils.alloca_once(b, v.V16F) for _ in range(U // 16)]
        for i, slot in enumerate(slots):
            b.store(v.load(b, b.add(x, v.I64(64 * i)), v.V16F), slot)
        with b.if_then(b.icmp_signed("!=", gated, v.I64(0))):
            for i, slot in enumerate(slots):
                b.store(b.fmul(silu(b, b.load(slot)), v.load(b, b.add(up, v.I64(64 * i)), v.V16F)), slot)
        values = [b.load(slot) for slot in slots]
        largest = floats(0.0)
        for value in values:
            largest = larger(b, llvm_function(b, "llvm.fabs.v16f32", v.V16F, value), largest)
        for distance in (8, 4, 2, 1):
            largest = larger(b, v.broadcast(b, largest, [lane ^ distance for lane in range(16)]), largest)
        largest = b.select(b.fcmp_ordered("<", largest, floats(SMALLEST)), floats(0.0), largest)
        inverse = b.select(b.fcmp_ordered("==", largest, floats(0.0)), floats(0.0), b.fdiv(floats(float(LARGEST[H])), largest))
        scale = b.fmul(largest, floats(1 / LARGEST[H]))
        v.store(b, b.extract_element(scale, v.I32(0)), scale_at)
        totals = [ir.Constant(v.V16I, None)] * (2 if H == 3 else 1)
        for i, value in enumerate(values):
            whole = llvm_function(b, "llvm.rint.v16f32", v.V16F, b.fmul(value, inverse))
            code = llvm_function(b, "llvm.fptosi.sat.v16i32.v16f32", v.V16I, whole)
            rows = [code]
            for _ in range(H - 1):
                rows.insert(0, b.ashr(b.add(rows[0], ints(128)), ints(8)))
            parts = [rows[1], b.sub(code, b.shl(rows[1], ints(8)))] if H == 3 else [code]
            totals = [b.add(total, part) for total, part in zip(totals, parts, strict=True)]
            for h, row in enumerate(rows):
                octet = b.trunc(row, v.vector(v.I8, 16))
                if int4:
                    octet = v.broadcast(b, octet, octets)
                v.store(b, octet, b.add(b.add(codes, b.mul(pitch, v.I64(h))), v.I64(16 * i)))
        for i, total in enumerate(totals):
            v.store(b, llvm_function(b, "llvm.vector.reduce.add.v16i32", v.I32, total), b.add(sum_at, v.I64(4 * i)))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 7, unit, code_bytes, interleaved), codegen


@cache
def _quantizer(unit: int, code_bytes: int, interleaved: int) -> Any:
    """The function that quantizes rows, compiled for one kind of result."""
    sum_bytes = 8 if code_bytes == 3 else 4

    @compiled(parallel=True)
    def quantize(x, up, gated, codes, scales, sums, T, K, pitch):
        units = K // unit
        for t in prange(T):
            for u in range(units):
                at, to = (t * K + u * unit) * 4, codes + t * pitch * code_bytes + u * unit
                scale_at, sum_at = scales + (t * units + u) * 4, sums + (t * units + u) * sum_bytes
                _quantize_unit(x + at, up + at, gated, to, pitch, scale_at, sum_at, unit, code_bytes, interleaved)

    return quantize
