"""Memory as addresses (int64) in numba functions: numbers and vectors of 64 bytes read and written at them, and a counter of tasks."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from . import vector as v

__all__ = ["call", "clear", "copy_vector", "half_to_float", "integer", "next_task", "store_float", "store_half_integer", "store_integer"]


def _at(b: Any, address: Any, kind: Any) -> Any:
    return b.inttoptr(address, kind.as_pointer())


@intrinsic
def integer(typing_context, address, index):
    """The int64 at a place of an array."""

    def codegen(context, b, signature, args):
        return b.load(_at(b, b.add(args[0], b.mul(args[1], v.I64(8))), v.I64), align=1)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def call(typing_context, function, x, y, z):
    """Call a function of three int64 by its address (`compiled_address`)."""

    def codegen(context, b, signature, args):
        kind = ir.FunctionType(v.I64, [v.I64] * 3)
        return b.call(b.inttoptr(args[0], kind.as_pointer()), args[1:])

    return types.int64(*[types.int64] * 4), codegen


@intrinsic
def store_integer(typing_context, value, address):
    """Store an int64."""

    def codegen(context, b, signature, args):
        b.store(args[0], _at(b, args[1], v.I64), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def store_half_integer(typing_context, value, address):
    """Store the lower 4 bytes of an int64."""

    def codegen(context, b, signature, args):
        b.store(b.trunc(args[0], v.I32), _at(b, args[1], v.I32), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def store_float(typing_context, source, address):
    """Copy a float32."""

    def codegen(context, b, signature, args):
        b.store(b.load(_at(b, args[0], v.F32), align=4), _at(b, args[1], v.F32), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def half_to_float(typing_context, source, address):
    """Store a float16 as float32."""

    def codegen(context, b, signature, args):
        b.store(b.fpext(b.load(_at(b, args[0], v.F16), align=2), v.F32), _at(b, args[1], v.F32), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def clear(typing_context, address, vectors):
    """Fill a number of vectors with zeros."""

    def codegen(context, b, signature, args):
        with cgutils.for_range(b, args[1]) as loop:
            v.store(b, ir.Constant(v.V16I, None), b.add(args[0], b.mul(loop.index, v.I64(64))))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def copy_vector(typing_context, source, address):
    """Copy 64 bytes."""

    def codegen(context, b, signature, args):
        v.store(b, v.load(b, args[0], v.V16I), args[1])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def next_task(typing_context, counter):
    """The number at an address, which is then one more: every thread gets another one."""

    def codegen(context, b, signature, args):
        return b.atomic_rmw("add", _at(b, args[0], v.I64), v.I64(1), "monotonic")

    return types.int64(types.int64), codegen
