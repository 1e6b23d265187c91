"""int8 grouped weights on the CPU: rows dequantized into tiles."""

from __future__ import annotations

from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from . import vector as v
from .compiled import compiled

__all__ = ["dequantize_rows"]

_BLOCK = 128
# As measured for int4 (`int4.py`): the distance depends on the memory, not on the format.
_PREFETCH_BYTES = 4096


def _half(b, address):
    """One float16 as float32."""
    return b.fpext(b.load(b.inttoptr(address, v.F16.as_pointer()), align=2), v.F32)


@intrinsic(prefer_literal=True)
def _dequantize_row(typing_context, weights, scales, n_groups, out, group_size, bfloat16):
    """Dequantize one row to bfloat16 or float32, in the order of its elements. The last two arguments are literals."""
    if not isinstance(group_size, types.IntegerLiteral) or not isinstance(bfloat16, types.IntegerLiteral):
        return None
    G, narrow = group_size.literal_value, bool(bfloat16.literal_value)
    signature = types.void(*[types.intp] * 4, group_size, bfloat16)

    def codegen(context, b, signature, args):
        weights, scales, n_groups, out, _, _ = args
        size = 2 if narrow else 4
        with cgutils.for_range(b, n_groups) as step:
            address = b.add(weights, b.mul(step.index, v.I64(G)))
            v.prefetch(b, b.add(address, v.I64(_PREFETCH_BYTES)))
            scale = v.broadcast(b, _half(b, b.add(scales, b.mul(step.index, v.I64(2)))), [0] * 16)
            to = b.add(out, b.mul(step.index, v.I64(G * size)))
            for k in range(0, G, 16):
                codes = b.sext(v.load(b, b.add(address, v.I64(k)), v.vector(v.I8, 16)), v.V16I)
                v.store_rounded(b, b.fmul(b.sitofp(codes, v.V16F), scale), b.add(to, v.I64(k * size)), bfloat16=narrow)
        return context.get_dummy_value()

    return signature, codegen


@compiled(parallel=True)
def dequantize_rows(weights, scales, n_rows, n_groups, out, group_size, bfloat16):
    """out [n_rows, n_groups * group_size] = the dequantized weight."""
    row = n_groups * group_size
    size = 2 if bfloat16 else 4
    for n in prange(n_rows):
        w, s, o = weights + n * row, scales + n * n_groups * 2, out + n * row * size
        if group_size == 64:
            if bfloat16:
                _dequantize_row(w, s, n_groups, o, 64, 1)
            else:
                _dequantize_row(w, s, n_groups, o, 64, 0)
        elif group_size == 32:
            if bfloat16:
                _dequantize_row(w, s, n_groups, o, 32, 1)
            else:
                _dequantize_row(w, s, n_groups, o, 32, 0)
        elif bfloat16:
            _dequantize_row(w, s, n_groups, o, 128, 1)
        else:
            _dequantize_row(w, s, n_groups, o, 128, 0)
