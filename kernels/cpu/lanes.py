"""Sixteen float32 as one value of a numba function, with `+`, `-`, `*`, `/` and the functions below.

A loop over such values does not depend on a vectoriser: it runs in registers as it is written, with the same bits on every chip (LLVM
lowers the vectors to AVX-512, AVX2 or NEON; no sum is reordered, and `fused` rounds once everywhere). Lanes are independent: they hold
sixteen rows of a weight, and nothing is summed across lanes. Functions take memory as addresses, int64.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from . import vector as v
from .compiled import compiled

__all__ = [
    "LANES",
    "VECTOR_BYTES",
    "absolute",
    "fill_tile",
    "fused",
    "in_memory_order",
    "inverse_power",
    "larger",
    "load",
    "load_half",
    "nearest",
    "smaller",
    "splat",
    "store",
    "store_half",
    "through_bfloat16",
    "through_half",
    "where_equal",
    "where_less",
    "with_code",
]

LANES = 16
VECTOR_BYTES = 4 * LANES
_HALVES = v.vector(v.F16, LANES)
_SHORTS = v.vector(v.I16, LANES)

# Polynomials for m^-0.3, m from 1 to 2, and for 2^f, f from -1/2 to 1/2, lowest power first. They minimize the largest relative error,
# which is 3.2e-5 and 2.6e-6.
_MANTISSA = (1.59494577, -1.0344345, 0.60697696, -0.19232724, 0.02480698)
_EXP2 = (0.99999926, 0.69312181, 0.24024745, 0.05591786, 0.0095701)


def in_memory_order(weight: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int, int]]:
    """A weight [N, K] and the arguments by which `fill_tile` reads it: address, item and both pitches.

    The caller keeps the returned weight while the address is in use. bfloat16 and float32 are read in place if rows or columns are
    contiguous; anything else is copied.
    """
    if weight.dtype != torch.bfloat16:
        weight = weight.float()
    if 1 not in weight.stride():
        weight = weight.contiguous()
    item = weight.element_size()
    row, column = (stride * item for stride in weight.stride())
    return weight, (weight.data_ptr(), item, row, column)


class _Lanes(types.Type):
    def __init__(self) -> None:
        super().__init__(name="float32x16")


_lanes = _Lanes()


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, v.V16F)


def _operator(function: Any, instruction: str) -> None:
    class _OnLanes(ConcreteTemplate):
        cases = (signature(_lanes, _lanes, _lanes),)

    infer_global(function)(_OnLanes)
    lower_builtin(function, _lanes, _lanes)(lambda context, b, sig, args: getattr(b, instruction)(*args))


for _function, _instruction in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul"), (operator.truediv, "fdiv")):
    _operator(_function, _instruction)


def _llvm(b: Any, name: str, *values: Any) -> Any:
    """LLVM's function of that name."""
    kind = ir.FunctionType(v.V16F, [v.V16F] * len(values))
    return b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.{name}.v16f32"), values)


def _floats(value: float) -> Any:
    return v.constant(v.V16F, [value] * LANES)


def _ints(value: int) -> Any:
    return v.constant(v.V16I, [value] * LANES)


@intrinsic
def splat(typing_context, value):
    """A float32 in all lanes."""

    def codegen(context, b, sig, args):
        return v.broadcast(b, args[0], [0] * LANES)

    return _lanes(types.float32), codegen


@intrinsic
def load(typing_context, address):
    """The lanes stored at an address."""

    def codegen(context, b, sig, args):
        return v.load(b, args[0], v.V16F)

    return _lanes(types.int64), codegen


@intrinsic
def load_half(typing_context, address):
    """The lanes stored at an address as float16."""

    def codegen(context, b, sig, args):
        return v.half_to_float(b, v.load(b, args[0], _SHORTS))

    return _lanes(types.int64), codegen


@intrinsic
def store(typing_context, value, address):
    """Store the lanes at an address."""

    def codegen(context, b, sig, args):
        v.store(b, *args)
        return context.get_dummy_value()

    return types.void(_lanes, types.int64), codegen


@intrinsic
def store_half(typing_context, value, address):
    """Store the lanes at an address as float16."""

    def codegen(context, b, sig, args):
        v.store(b, b.fptrunc(args[0], _HALVES), args[1])
        return context.get_dummy_value()

    return types.void(_lanes, types.int64), codegen


@intrinsic
def through_half(typing_context, value):
    """Rounded to the nearest float16."""

    def codegen(context, b, sig, args):
        return b.fpext(b.fptrunc(args[0], _HALVES), v.V16F)

    return _lanes(_lanes), codegen


@intrinsic
def through_bfloat16(typing_context, value):
    """Rounded to the nearest bfloat16, ties to even; not for NaN."""

    def codegen(context, b, sig, args):
        bits = b.bitcast(args[0], v.V16I)
        odd = b.and_(b.lshr(bits, _ints(16)), _ints(1))
        rounded = b.and_(b.add(bits, b.add(odd, _ints(0x7FFF))), _ints(-0x10000))
        return b.bitcast(rounded, v.V16F)

    return _lanes(_lanes), codegen


@intrinsic
def nearest(typing_context, value):
    """Rounded to whole numbers, ties to even."""

    def codegen(context, b, sig, args):
        return _llvm(b, "rint", args[0])

    return _lanes(_lanes), codegen


@intrinsic
def absolute(typing_context, value):
    """|value|."""

    def codegen(context, b, sig, args):
        return _llvm(b, "fabs", args[0])

    return _lanes(_lanes), codegen


@intrinsic
def fused(typing_context, x, y, z):
    """x * y + z, rounded once."""

    def codegen(context, b, sig, args):
        return _llvm(b, "fma", *args)

    return _lanes(_lanes, _lanes, _lanes), codegen


@intrinsic
def smaller(typing_context, x, y):
    """min(x, y); y where one is NaN."""

    def codegen(context, b, sig, args):
        return b.select(b.fcmp_ordered("<", *args), *args)

    return _lanes(_lanes, _lanes), codegen


@intrinsic
def larger(typing_context, x, y):
    """max(x, y); y where one is NaN."""

    def codegen(context, b, sig, args):
        return b.select(b.fcmp_ordered(">", *args), *args)

    return _lanes(_lanes, _lanes), codegen


@intrinsic
def where_less(typing_context, x, y, yes, no):
    """`yes` where x < y, else `no`."""

    def codegen(context, b, sig, args):
        x, y, yes, no = args
        return b.select(b.fcmp_ordered("<", x, y), yes, no)

    return _lanes(_lanes, _lanes, _lanes, _lanes), codegen


@intrinsic
def where_equal(typing_context, x, y, yes, no):
    """`yes` where x = y, else `no`."""

    def codegen(context, b, sig, args):
        x, y, yes, no = args
        return b.select(b.fcmp_ordered("==", x, y), yes, no)

    return _lanes(_lanes, _lanes, _lanes, _lanes), codegen


@intrinsic
def with_code(typing_context, word, code, shift, bits):
    """32-bit words, carried as the bits of float32, with the low `bits` bits of the whole numbers `code` inserted at bit `shift`."""

    def codegen(context, b, sig, args):
        word, code, shift, bits = args
        mask = b.sub(b.shl(v.I64(1), bits), v.I64(1))
        mask, shift = (v.broadcast(b, b.trunc(value, v.I32), [0] * LANES) for value in (mask, shift))
        placed = b.shl(b.and_(b.fptosi(code, v.V16I), mask), shift)
        return b.bitcast(b.or_(b.bitcast(word, v.V16I), placed), v.V16F)

    return _lanes(_lanes, _lanes, types.int64, types.int64), codegen


@intrinsic
def inverse_power(typing_context, value):
    """value^-0.3 of positive normal numbers, with a relative error of at most 4e-5."""

    def polynomial(b, x, coefficients):
        result = _floats(coefficients[-1])
        for coefficient in reversed(coefficients[:-1]):
            result = _llvm(b, "fma", result, x, _floats(coefficient))
        return result

    def codegen(context, b, sig, args):
        bits = b.bitcast(args[0], v.V16I)
        exponent = b.sitofp(b.sub(b.lshr(bits, _ints(23)), _ints(127)), v.V16F)
        mantissa = b.bitcast(b.or_(b.and_(bits, _ints(0x7FFFFF)), _ints(127 << 23)), v.V16F)
        power = b.fmul(exponent, _floats(-0.3))
        integer = _llvm(b, "rint", power)
        scaled = b.fmul(polynomial(b, mantissa, _MANTISSA), polynomial(b, b.fsub(power, integer), _EXP2))
        raised = b.add(b.bitcast(scaled, v.V16I), b.shl(b.fptosi(integer, v.V16I), _ints(23)))
        return b.bitcast(raised, v.V16F)

    return _lanes(_lanes), codegen


def _widened(b: Any, address: Any, item: Any, lanes: int) -> Any:
    """`lanes` neighbours as float32: an `item` of 4 bytes is float32, one of 2 bytes bfloat16."""
    slot = cgutils.alloca_once(b, v.vector(v.F32, lanes))
    with b.if_else(b.icmp_signed("==", item, v.I64(4))) as (wide, narrow):
        with wide:
            b.store(v.load(b, address, v.vector(v.F32, lanes)), slot)
        with narrow:
            bits = b.zext(v.load(b, address, v.vector(v.I16, lanes)), v.vector(v.I32, lanes))
            b.store(b.bitcast(b.shl(bits, v.constant(bits.type, [16] * lanes)), v.vector(v.F32, lanes)), slot)
    return b.load(slot)


@intrinsic
def _load_widened(typing_context, address, item):
    """Sixteen neighbours as float32."""

    def codegen(context, b, sig, args):
        return _widened(b, *args, LANES)

    return _lanes(types.int64, types.int64), codegen


@intrinsic
def _copy_one(typing_context, address, item, target):
    """Copy one element to `target` as float32."""

    def codegen(context, b, sig, args):
        v.store(b, _widened(b, args[0], args[1], 1), args[2])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def _turn(typing_context, address, item, pitch, last, target):
    """Transpose 16 x 16 elements into float32 at `target`: lane l of vector i is element i of row l.

    Rows are `pitch` bytes apart. Rows after the `last` repeat it.
    """

    def codegen(context, b, sig, args):
        address, item, pitch, last, target = args
        rows = []
        for lane in range(LANES):
            row = b.select(b.icmp_signed("<", v.I64(lane), last), v.I64(lane), last)
            rows.append(_widened(b, b.add(address, b.mul(row, pitch)), item, LANES))
        for i, row in enumerate(v.transposed(b, rows)):
            v.store(b, row, b.add(target, v.I64(i * VECTOR_BYTES)))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@compiled()
def fill_tile(tile, address, item, row_pitch, column_pitch, rows, columns):
    """Fill the tile at an address: lane l of vector i becomes element i of row l of a piece of a weight; lanes without a row repeat the
    last.

    address: of the piece's first element. item: its bytes, 4 for float32, 2 for bfloat16. row_pitch, column_pitch: bytes from one row, and
    from one column, to the next; one of the two equals `item`. rows: 1 to 16. columns: a multiple of 16.
    """
    if column_pitch == item:
        for i in range(0, columns, LANES):
            _turn(address + i * item, item, row_pitch, rows - 1, tile + i * VECTOR_BYTES)
    elif rows == LANES:
        for i in range(columns):
            store(_load_widened(address + i * column_pitch, item), tile + i * VECTOR_BYTES)
    else:
        for i in range(columns):
            for lane in range(LANES):
                _copy_one(address + i * column_pitch + min(lane, rows - 1) * row_pitch, item, tile + i * VECTOR_BYTES + lane * 4)
