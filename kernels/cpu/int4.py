"""int4 grouped weights on the CPU: rows dequantized into tiles."""

from __future__ import annotations

from typing import Any

from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from . import vector as v
from .compiled import compiled

__all__ = ["dequantize_rows"]

_BLOCK = 128  # elements that one 64-byte load holds
_SCALE_GROUPS = 16  # groups whose scales are converted together
# Distance that hides memory latency on a 2-core Xeon (Sapphire Rapids): 10.6 GB/s at 0, 12.9 at 2048, 14.4 at 4096, 14.2 at 16384.
_PREFETCH_BYTES = 4096


def _scales_and_offsets(b: Any, scales: Any, zeros: Any, first_group: Any, n_groups: Any) -> tuple[Any, Any]:
    """float32 scales and scales * zero-points of 16 groups; lanes past `n_groups` are zero."""
    left = b.sub(n_groups, first_group)
    full = b.icmp_signed(">=", left, v.I64(_SCALE_GROUPS))
    scale_at = b.add(scales, b.mul(first_group, v.I64(2)))
    zero_at = b.add(zeros, b.lshr(first_group, v.I64(1)))
    scale_slot, zero_slot = cgutils.alloca_once(b, v.I64), cgutils.alloca_once(b, v.I64)
    with b.if_else(full) as (then, otherwise):
        with then:
            b.store(scale_at, scale_slot)
            b.store(zero_at, zero_slot)
        with otherwise:
            b.store(v.padded_copy(b, scale_at, b.mul(left, v.I64(2)), 2 * _SCALE_GROUPS), scale_slot)
            b.store(v.padded_copy(b, zero_at, b.lshr(b.add(left, v.I64(1)), v.I64(1)), _SCALE_GROUPS // 2), zero_slot)
    scale = v.half_to_float(b, v.load(b, b.load(scale_slot), v.vector(v.I16, _SCALE_GROUPS)))
    packed = v.load(b, b.load(zero_slot), v.vector(v.I8, _SCALE_GROUPS // 2))
    low = b.and_(packed, v.constant(packed.type, [15] * 8))
    high = b.lshr(packed, v.constant(packed.type, [4] * 8))
    order = [lane // 2 + 8 * (lane % 2) for lane in range(_SCALE_GROUPS)]
    zero = b.shuffle_vector(low, high, v.constant(v.V16I, order))
    return scale, b.fmul(scale, b.uitofp(b.zext(zero, v.V16I), v.V16F))


def _group_lanes(group_size: int) -> list[int]:
    """The group within a block that each of the 16 lanes belongs to."""
    return [lane * 8 // group_size for lane in range(16)]


@intrinsic(prefer_literal=True)
def _dequantize_row(typing_context, weights, scales, zeros, n_groups, out, group_size, bfloat16):
    """Dequantize one row to bfloat16 or float32; position 16k+l of a block of 128 holds element 8l+k. The last two are literals."""
    if not isinstance(group_size, types.IntegerLiteral) or not isinstance(bfloat16, types.IntegerLiteral):
        return None
    G, narrow = group_size.literal_value, bool(bfloat16.literal_value)
    signature = types.void(*[types.intp] * 5, group_size, bfloat16)

    def codegen(context, b, signature, args):
        weights, scales, zeros, n_groups, out, _, _ = args
        size = 2 if narrow else 4
        n_blocks = b.sdiv(b.mul(n_groups, v.I64(G)), v.I64(_BLOCK))
        chunk_blocks = _SCALE_GROUPS * G // _BLOCK
        tables = [cgutils.alloca_once(b, v.V16F) for _ in range(2)]
        groups = _BLOCK // G
        n_chunks = b.sdiv(b.add(n_groups, v.I64(_SCALE_GROUPS - 1)), v.I64(_SCALE_GROUPS))
        with cgutils.for_range(b, n_chunks) as chunk:
            pair = _scales_and_offsets(b, scales, zeros, b.mul(chunk.index, v.I64(_SCALE_GROUPS)), n_groups)
            for value, table in zip(pair, tables, strict=True):
                b.store(value, table)
            first_block = b.mul(chunk.index, v.I64(chunk_blocks))
            left = b.sub(n_blocks, first_block)
            count = b.select(b.icmp_signed("<", left, v.I64(chunk_blocks)), left, v.I64(chunk_blocks))
            with cgutils.for_range(b, count) as step:
                block = b.add(first_block, step.index)
                address = b.add(weights, b.mul(block, v.I64(64)))
                v.prefetch(b, b.add(address, v.I64(_PREFETCH_BYTES)))
                words = v.load(b, address, v.V16I)
                first = b.mul(step.index, v.I64(groups))
                scale, offset = (v.broadcast(b, v.lookup(b, b.ptrtoint(table, v.I64), first, groups), _group_lanes(G)) for table in tables)
                to = b.add(out, b.mul(block, v.I64(_BLOCK * size)))
                for k in range(8):
                    code = b.and_(b.lshr(words, v.constant(v.V16I, [4 * k] * 16)), v.constant(v.V16I, [15] * 16))
                    # code * scale and offset are exact in float32, so the order of the two roundings does not matter.
                    value = b.fsub(b.fmul(b.sitofp(code, v.V16F), scale, flags=("contract",)), offset, flags=("contract",))
                    v.store_rounded(b, value, b.add(to, v.I64(16 * k * size)), bfloat16=narrow)
        return context.get_dummy_value()

    return signature, codegen


@compiled(parallel=True)
def dequantize_rows(weights, scales, zeros, n_rows, n_groups, out, group_size, bfloat16):
    """out [n_rows, n_groups * group_size] = the dequantized weight, in the order of `_dequantize_row`."""
    row_bytes = n_groups * group_size // 2
    zero_bytes = (n_groups + 1) // 2
    size = 2 if bfloat16 else 4
    for n in prange(n_rows):
        w, s, z = weights + n * row_bytes, scales + n * n_groups * 2, zeros + n * zero_bytes
        o = out + n * n_groups * group_size * size
        if group_size == 64:
            if bfloat16:
                _dequantize_row(w, s, z, n_groups, o, 64, 1)
            else:
                _dequantize_row(w, s, z, n_groups, o, 64, 0)
        elif group_size == 32:
            if bfloat16:
                _dequantize_row(w, s, z, n_groups, o, 32, 1)
            else:
                _dequantize_row(w, s, z, n_groups, o, 32, 0)
        elif bfloat16:
            _dequantize_row(w, s, z, n_groups, o, 128, 1)
        else:
            _dequantize_row(w, s, z, n_groups, o, 128, 0)
