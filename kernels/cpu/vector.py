"""Short-vector building blocks for the CPU kernels, written as portable LLVM IR.

LLVM lowers the same vectors to AVX-512 (with VNNI and BF16 where the chip has them), AVX2 or NEON. `dot_bytes` alone names instructions of
chips, for which LLVM has no pattern, beside a form that runs everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, config

__all__ = [
    "F16",
    "F32",
    "I8",
    "I16",
    "I32",
    "I64",
    "V16F",
    "V16I",
    "V64",
    "broadcast",
    "chip_features",
    "constant",
    "dot_bytes",
    "dot_signed_bytes",
    "fused",
    "half_to_float",
    "has_bfloat16",
    "has_byte_products",
    "load",
    "lookup",
    "padded_copy",
    "prefetch",
    "round_to_bfloat16",
    "store",
    "store_rounded",
    "transposed",
    "vector",
    "x86",
]

Value = Any  # llvmlite's values carry no static types
Builder = Any

F32 = ir.FloatType()
F16 = ir.HalfType()
I8 = ir.IntType(8)
I16 = ir.IntType(16)
I32 = ir.IntType(32)
I64 = ir.IntType(64)
V16F = ir.VectorType(F32, 16)
V16I = ir.VectorType(I32, 16)
V64 = ir.VectorType(I8, 64)


class _BFloat(ir.types.Type):  # type: ignore[misc] # llvmlite ships no types
    """LLVM's bfloat, which llvmlite has no type for."""

    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


@cache
def chip_features() -> frozenset[str]:
    """The features of the chip that numba compiles for: this machine's, or the one that NUMBA_CPU_FEATURES describes."""
    described: str | None = config.CPU_FEATURES  # type: ignore[attr-defined] # numba sets it when it is imported
    if described is not None:
        return frozenset(name[1:] for name in described.split(",") if name.startswith("+"))
    return frozenset(name for name, offered in llvm.get_host_cpu_features().items() if offered)


def has_bfloat16() -> bool:
    """Whether the chip multiplies and converts bfloat16 in hardware."""
    return not chip_features().isdisjoint({"avx512bf16", "bf16"})


def has_byte_products() -> bool:
    """Whether the chip multiplies bytes and adds four products to a 32-bit sum in one instruction that `dot_bytes` uses."""
    return not chip_features().isdisjoint({"avx512vnni", "avxvnni"})


def vector(element: Any, lanes: int) -> Any:
    """The type of `lanes` elements side by side."""
    return ir.VectorType(element, lanes)


def constant(kind: Any, values: list[int] | list[float]) -> Value:
    """A vector constant."""
    return ir.Constant(kind, [ir.Constant(kind.element, v) for v in values])


def load(b: Builder, address: Value, kind: Any) -> Value:
    """Load a vector from an unaligned address."""
    return b.load(b.inttoptr(address, kind.as_pointer()), align=1)


def store(b: Builder, value: Value, address: Value) -> None:
    """Store a vector or scalar to an unaligned address."""
    b.store(value, b.inttoptr(address, value.type.as_pointer()), align=1)


def broadcast(b: Builder, value: Value, lanes: list[int]) -> Value:
    """Lane `i` of the result is lane `lanes[i]` of `value`; a scalar counts as a vector of one."""
    if not isinstance(value.type, ir.VectorType):
        value = b.insert_element(ir.Constant(ir.VectorType(value.type, 1), ir.Undefined), value, I32(0))
    return b.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), constant(ir.VectorType(I32, len(lanes)), lanes))


def padded_copy(b: Builder, source: Value, size: Value, limit: int) -> Value:
    """The address of a zeroed buffer of `limit` bytes that begins with `size` bytes of `source`: no read passes the end of a row."""
    buffer = cgutils.alloca_once(b, ir.ArrayType(I8, limit))
    b.store(ir.Constant(ir.ArrayType(I8, limit), None), buffer)
    address = b.ptrtoint(buffer, I64)
    with cgutils.for_range(b, size) as loop:
        byte = b.load(b.inttoptr(b.add(source, loop.index), I8.as_pointer()))
        b.store(byte, b.inttoptr(b.add(address, loop.index), I8.as_pointer()))
    return address


def prefetch(b: Builder, address: Value, *, level: int = 1) -> None:
    """Prefetch the cache line at `address` into the cache of that level; never faults."""
    pointer = I8.as_pointer()
    hint = cgutils.get_or_insert_function(b.module, ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32]), "llvm.prefetch.p0")
    read, locality, data = I32(0), I32(4 - level), I32(1)
    b.call(hint, [b.inttoptr(address, pointer), read, locality, data])


def dot_bytes(b: Builder, total: Value, unsigned: Value, signed: Value, *, four_bits: bool) -> Value:
    """total <16 x i32> + the sums of four neighbouring products of <64 x i8>, the first factor unsigned, the second signed; exact.

    Args:
        four_bits: whether one factor has magnitudes of at most 15, so that 16-bit sums of two products cannot overflow.
    """
    features = chip_features()
    if "avx512vnni" in features:
        return x86(b, "avx512.vpdpbusd.512", V16I, total, b.bitcast(unsigned, V16I), b.bitcast(signed, V16I))
    eight = vector(I32, 8)
    if "avxvnni" in features:
        return _halves(
            b, total, unsigned, signed, lambda t, u, s: x86(b, "avx512.vpdpbusd.256", eight, t, b.bitcast(u, eight), b.bitcast(s, eight))
        )
    if "avx2" in features and four_bits:
        words = vector(I16, 16)
        ones = constant(words, [1] * 16)

        def sums(part: Value, u: Value, s: Value) -> Value:
            return b.add(part, x86(b, "avx2.pmadd.wd", eight, x86(b, "avx2.pmadd.ub.sw", words, u, s), ones))

        return _halves(b, total, unsigned, signed, sums)
    wide, half = vector(I16, 64), vector(I32, 32)
    x, y = b.zext(unsigned, wide), b.sext(signed, wide)
    for first in (0, 32):
        x_half, y_half = (broadcast(b, value, list(range(first, first + 32))) for value in (x, y))
        product = b.mul(b.sext(x_half, half), b.sext(y_half, half), flags=("nsw",))
        pairs = b.add(broadcast(b, product, list(range(0, 32, 2))), broadcast(b, product, list(range(1, 32, 2))))
        fours = b.add(broadcast(b, pairs, list(range(0, 16, 2))), broadcast(b, pairs, list(range(1, 16, 2))))
        zero = ir.Constant(fours.type, None)
        order = list(range(16)) if first == 0 else [*range(8, 16), *range(8)]
        total = b.add(total, b.shuffle_vector(fours, zero, constant(V16I, order)))
    return total


def dot_signed_bytes(b: Builder, total: Value, x: Value, y: Value) -> Value:
    """total <16 x i32> + the sums of four neighbouring products of signed <64 x i8>; exact where no element of `y` is -128."""
    if "avx2" in chip_features():
        eight, words, octets = vector(I32, 8), vector(I16, 16), vector(I8, 32)
        ones = constant(words, [1] * 16)

        def sums(part: Value, x: Value, y: Value) -> Value:
            # Factors of at most 128 and 127, so that 16-bit sums of two products cannot overflow.
            size = b.select(b.icmp_signed("<", x, ir.Constant(octets, None)), b.neg(x), x)
            turned = x86(b, "avx2.psign.b", octets, y, x)
            return b.add(part, x86(b, "avx2.pmadd.wd", eight, x86(b, "avx2.pmadd.ub.sw", words, size, turned), ones))

        return _halves(b, total, x, y, sums)
    wide = vector(I16, 64)
    product = b.mul(b.sext(x, wide), b.sext(y, wide))
    pairs = b.add(*(broadcast(b, product, list(range(first, 64, 2))) for first in range(2)))
    pairs = b.sext(pairs, vector(I32, 32))
    return b.add(total, b.add(*(broadcast(b, pairs, list(range(first, 32, 2))) for first in range(2))))


def _halves(b: Builder, total: Value, x: Value, y: Value, function: Callable[[Value, Value, Value], Value]) -> Value:
    """`function` of the lower and of the upper halves, side by side."""
    parts = []
    for half in range(2):
        words, octets = list(range(8 * half, 8 * half + 8)), list(range(32 * half, 32 * half + 32))
        parts.append(function(broadcast(b, total, words), broadcast(b, x, octets), broadcast(b, y, octets)))
    return b.shuffle_vector(*parts, constant(V16I, list(range(16))))


def x86(b: Builder, name: str, result: Any, *arguments: Value) -> Value:
    """An instruction of x86 chips by LLVM's name for it; `result` is its type."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.x86.{name}"), arguments)


def fused(b: Builder, x: Value, y: Value, z: Value) -> Value:
    """x * y + z, rounded once."""
    kind = ir.FunctionType(V16F, [V16F] * 3)
    return b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.fma.v16f32"), [x, y, z])


def transposed(b: Builder, rows: list[Value]) -> list[Value]:
    """16 vectors of 16 lanes, transposed: at each distance, the blocks off the diagonal are swapped."""
    for distance in (8, 4, 2, 1):
        keep = [lane if not lane & distance else 16 + lane - distance for lane in range(16)]
        swap = [lane + distance if not lane & distance else 16 + lane for lane in range(16)]
        new = list(rows)
        for i in range(16):
            if not i & distance:
                pair = rows[i], rows[i + distance]
                new[i], new[i + distance] = (b.shuffle_vector(*pair, constant(V16I, lanes)) for lanes in (keep, swap))
        rows = new
    return rows


def half_to_float(b: Builder, value: Value) -> Value:
    """float16 bits in a vector of i16 as float32."""
    lanes = value.type.count
    return b.fpext(b.bitcast(value, ir.VectorType(F16, lanes)), ir.VectorType(F32, lanes))


def lookup(b: Builder, table: Value, first: Value, count: int) -> Value:
    """`count` neighbouring float32 from an address: a scalar for 1, else a vector."""
    address = b.add(table, b.mul(first, I64(4)))
    if count == 1:
        return b.load(b.inttoptr(address, F32.as_pointer()), align=4)
    return load(b, address, ir.VectorType(F32, count))


def round_to_bfloat16(b: Builder, value: Value) -> Value:
    """float32 lanes as bfloat16 bits in a vector of i16; for chips with `has_bfloat16`, slow on others."""
    lanes = value.type.count
    return b.bitcast(b.fptrunc(value, ir.VectorType(_BFloat(), lanes)), ir.VectorType(I16, lanes))


def store_rounded(b: Builder, value: Value, address: Value, *, bfloat16: bool) -> None:
    """Store float32 lanes as they are, or rounded to the nearest bfloat16 (ties to even)."""
    if not bfloat16:
        store(b, value, address)
        return
    lanes = value.type.count
    if has_bfloat16():
        store(b, round_to_bfloat16(b, value), address)
        return
    wide = ir.VectorType(I32, lanes)
    bits = b.bitcast(value, wide)
    last_kept = b.and_(b.lshr(bits, constant(wide, [16] * lanes)), constant(wide, [1] * lanes))
    rounded = b.add(b.add(bits, constant(wide, [0x7FFF] * lanes)), last_kept)
    store(b, b.trunc(b.lshr(rounded, constant(wide, [16] * lanes)), ir.VectorType(I16, lanes)), address)
