"""int8 grouped weights on the CPU: dot products against 16-bit activations, and rows dequantized into tiles."""

from __future__ import annotations

from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from . import vector as v
from .compiled import compiled

__all__ = ["dequantize_rows", "matvec"]

_BLOCK = 128
# As measured for int4 (`int4.py`): the distance depends on the memory, not on the format.
_PREFETCH_BYTES = 4096
_ROWS_PER_TASK = 16


def _half(b, address):
    """One float16 as float32."""
    return b.fpext(b.load(b.inttoptr(address, v.F16.as_pointer()), align=2), v.F32)


@intrinsic(prefer_literal=True)
def _dot_rows(typing_context, weights, scales, x, x_scales, n_groups, out, out_stride, group_size, tokens):
    """Dot products of one row with `tokens` activation rows; all arguments are addresses or counts; the last two are literals."""
    if not isinstance(group_size, types.IntegerLiteral) or not isinstance(tokens, types.IntegerLiteral):
        return None
    G, M = group_size.literal_value, tokens.literal_value
    signature = types.void(*[types.intp] * 7, group_size, tokens)

    def codegen(context, b, signature, args):
        weights, scales, x, x_scales, n_groups, out, out_stride, _, _ = args
        n_blocks = b.sdiv(b.mul(n_groups, v.I64(G)), v.I64(_BLOCK))
        totals = [v.new_accumulator(b) for _ in range(M)]
        words = v.vector(v.I16, 32)
        with cgutils.for_range(b, n_blocks) as step:
            block = step.index
            address = b.add(weights, b.mul(block, v.I64(_BLOCK)))
            scale_at = b.add(scales, b.mul(block, v.I64(2 * _BLOCK // G)))
            for line in range(2):
                v.prefetch(b, b.add(address, v.I64(_PREFETCH_BYTES + 64 * line)))
            x_rows = [b.add(b.mul(n_blocks, v.I64(m)), block) for m in range(M)]
            x_scale = [v.lookup(b, x_scales, row, 1) for row in x_rows]
            for group in range(_BLOCK // G):
                scale = _half(b, b.add(scale_at, v.I64(2 * group)))
                integers = [ir.Constant(v.V16I, None) for _ in range(M)]
                for first in range(group * G, (group + 1) * G, 32):
                    codes = b.sext(v.load(b, b.add(address, v.I64(first)), v.vector(v.I8, 32)), words)
                    for m in range(M):
                        values = v.load(b, b.add(x, b.add(b.mul(x_rows[m], v.I64(2 * _BLOCK)), v.I64(2 * first))), words)
                        integers[m] = v.dot_i16(b, integers[m], codes, values)
                for m in range(M):
                    v.add_into(b, totals[m], v.broadcast(b, b.fmul(scale, x_scale[m]), [0] * 16), b.sitofp(integers[m], v.V16F))
        for m in range(M):
            v.store(b, v.reduce_add(b, b.load(totals[m])), b.add(out, b.mul(b.mul(out_stride, v.I64(m)), v.I64(4))))
        return context.get_dummy_value()

    return signature, codegen


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


@compiled()
def dot_tokens(weights, scales, x, x_scales, n_groups, out, out_stride, group_size, tokens):
    """`_dot_rows` for any number of tokens: four at a time, then one by one."""
    x_stride = n_groups * group_size * 2
    blocks = n_groups * group_size // 128
    m = 0
    while m < tokens:
        xm, sm, om = x + m * x_stride, x_scales + m * blocks * 4, out + m * out_stride * 4
        if tokens - m >= 4:
            if group_size == 64:
                _dot_rows(weights, scales, xm, sm, n_groups, om, out_stride, 64, 4)
            elif group_size == 32:
                _dot_rows(weights, scales, xm, sm, n_groups, om, out_stride, 32, 4)
            else:
                _dot_rows(weights, scales, xm, sm, n_groups, om, out_stride, 128, 4)
            m += 4
        else:
            if group_size == 64:
                _dot_rows(weights, scales, xm, sm, n_groups, om, out_stride, 64, 1)
            elif group_size == 32:
                _dot_rows(weights, scales, xm, sm, n_groups, om, out_stride, 32, 1)
            else:
                _dot_rows(weights, scales, xm, sm, n_groups, om, out_stride, 128, 1)
            m += 1


@compiled(parallel=True)
def matvec(weights, scales, w_step, s_step, experts, offsets, x, x_scales, n_rows, n_groups, out, group_size):
    """Rows offsets[i] to offsets[i+1] of out [P, n_rows] float32 = the same rows of x @ weights[experts[i]].T.

    `experts` and `offsets` are int64 arrays, the rest addresses and counts; the rows of an expert are contiguous, and `w_step` and `s_step`
    bytes separate the experts in `weights` and `scales`.
    """
    row_bytes = n_groups * group_size
    blocks = row_bytes // _BLOCK
    tasks = (n_rows + _ROWS_PER_TASK - 1) // _ROWS_PER_TASK
    for task in prange(tasks * len(experts)):
        which, first = task // tasks, task % tasks * _ROWS_PER_TASK
        p = offsets[which]
        for n in range(first, min(n_rows, first + _ROWS_PER_TASK)):
            e = experts[which]
            dot_tokens(
                weights + e * w_step + n * row_bytes,
                scales + e * s_step + n * n_groups * 2,
                x + p * row_bytes * 2,
                x_scales + p * blocks * 4,
                n_groups,
                out + (p * n_rows + n) * 4,
                n_rows,
                group_size,
                offsets[which + 1] - p,
            )


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
