"""Many tokens on the CPU's matrix unit: packed weights times bfloat16 activations, through AMX tiles (Intel, Sapphire Rapids and later).

The product is computed transposed, so that neither operand needs a shuffle in the loop over the weight: a tile of 16 rows of decoded
weights, as they lie, times a tile of activations that hold pairs of neighbours along `K` for 16 tokens. Activations are brought into
that form once; weights are decoded a chunk of `K` at a time, into a buffer that the multiplication finds in the first-level cache.

Dimension letters: `T` tokens, `N` output features, `K` input features, `G` group size.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numba
import torch
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from . import _cpu_vector as v
from .int4 import Int4Weight
from .int8 import Int8Weight

__all__ = ["available", "matmul"]

_BLOCK = 128  # elements along K that a decoder writes at a time: four tiles wide
_TILE = 1024  # bytes of a full tile: 16 rows of 64
_ROWS = 32
_CHUNK_BLOCKS = 4
_PANEL_TOKENS = 512


@cache
def available() -> bool:
    """Whether this chip has AMX for bfloat16 and the operating system lets this process use it; asks for the permission."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    features = llvm.get_host_cpu_features()
    if not all(features.get(name) for name in ("amx-tile", "amx-bf16", "avx512bw", "avx512bf16")):
        return False
    return _permitted()


def _permitted() -> bool:
    """Ask Linux for the use of tile registers by all threads of this process (arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)."""
    arch_prctl, request, tile_data = 158, 0x1023, 18
    return bool(ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) == 0)


def matmul(x: torch.Tensor, weight: Int4Weight | Int8Weight) -> torch.Tensor:
    """bfloat16 y [T, N] = x [T, K] @ weight [N, K].T, the weight rounded to bfloat16, sums in float32; K is a multiple of 128.

    Call it only where `available`. Runs on as many threads as numba is set to.
    """
    (T, K), N = x.shape, weight.shape[0]
    assert available() and x.dtype == torch.bfloat16 and K % _BLOCK == 0
    x = x.contiguous()
    tensors = [weight.qweight.contiguous(), weight.scales.contiguous()]
    four_bits = isinstance(weight, Int4Weight)
    if isinstance(weight, Int4Weight):
        tensors.append(weight.zeros.contiguous())
    codes, scales, zeros = (tensors[min(i, len(tensors) - 1)].data_ptr() for i in range(3))
    out = torch.empty(_up(T, 16), _up(N, _ROWS), dtype=torch.bfloat16)
    panel = min(_PANEL_TOKENS, _up(T, 16))
    packed = torch.empty(panel * K * 2, dtype=torch.uint8)
    a_bytes = _ROWS * _BLOCK * _CHUNK_BLOCKS * 2
    scratch = torch.empty(numba.get_num_threads(), a_bytes + _ROWS * panel * 4, dtype=torch.uint8)
    for first in range(0, T, panel):
        tokens = min(panel, T - first)
        _pack(x.data_ptr() + first * K * 2, tokens, K, packed.data_ptr(), four_bits)
        _multiply(
            codes, scales, zeros, N, K, weight.group_size, four_bits, packed.data_ptr(), _up(tokens, 16) // 16,
            scratch.data_ptr(), a_bytes, scratch.stride(0), out[first:].data_ptr(), out.stride(0) * 2,
            _CHUNK_BLOCKS, _ROWS,
        )
    return out[:T, :N]


def _up(n: int, multiple: int) -> int:
    return (n + multiple - 1) // multiple * multiple


def _call(b: Any, name: str, arguments: list[Any], result: Any = ir.VoidType()) -> Any:
    kind = ir.FunctionType(result, [a.type for a in arguments])
    return b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.x86.{name}"), arguments)


def _pointer(b: Any, address: Any) -> Any:
    return b.inttoptr(address, v.I8.as_pointer())


def _transposed(b: Any, rows: list[Any]) -> list[Any]:
    """16 vectors of 16 lanes, with rows and lanes exchanged: at each distance, blocks off the diagonal change places."""
    for distance in (8, 4, 2, 1):
        keep = [lane if not lane & distance else 16 + lane - distance for lane in range(16)]
        swap = [lane + distance if not lane & distance else 16 + lane for lane in range(16)]
        new = list(rows)
        for i in range(16):
            if not i & distance:
                pair = rows[i], rows[i + distance]
                new[i], new[i + distance] = (b.shuffle_vector(*pair, v.constant(v.V16I, lanes)) for lanes in (keep, swap))
        rows = new
    return rows


@intrinsic
def _configure(typing_context):
    """Eight tiles of 16 rows of 64 bytes, for this thread."""

    def codegen(context, b, signature, args):
        layout = bytearray(64)
        layout[0] = 1  # palette
        for tile in range(8):
            layout[16 + 2 * tile], layout[48 + tile] = 64, 16
        constant = cgutils.global_constant(b, "amx_tiles", cgutils.make_bytearray(layout))
        _call(b, "ldtilecfg", [b.bitcast(constant, v.I8.as_pointer())])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _release(typing_context):
    """Give the tiles back, so that the thread's context switches stay cheap."""

    def codegen(context, b, signature, args):
        _call(b, "tilerelease", [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic(prefer_literal=True)
def _multiply_tiles(typing_context, weights, weights_stride, x, x_stride, sums, sums_stride, steps, fresh, columns):
    """sums [2 tiles, `columns` tiles] (+)= weights [2 tiles, steps tiles] @ x [columns tiles, steps tiles]; `columns` is the literal 1 or 2."""
    if not isinstance(columns, types.IntegerLiteral):
        return None
    M = columns.literal_value
    signature = types.void(*[types.intp] * 7, types.boolean, columns)

    def codegen(context, b, signature, args):
        weights, weights_stride, x, x_stride, sums, sums_stride, steps, fresh, _ = args
        tile_row = v.I64(64)
        total = [[v.I8(2 * i + j) for j in range(M)] for i in range(2)]
        sum_at = [[b.add(sums, b.add(b.mul(sums_stride, v.I64(i)), v.I64(_TILE * j))) for j in range(M)] for i in range(2)]
        with b.if_else(fresh) as (then, otherwise):
            with then:
                for i in range(2):
                    for j in range(M):
                        _call(b, "tilezero", [total[i][j]])
            with otherwise:
                for i in range(2):
                    for j in range(M):
                        _call(b, "tileloadd64", [total[i][j], _pointer(b, sum_at[i][j]), tile_row])
        with cgutils.for_range(b, steps) as step:
            at = b.mul(step.index, v.I64(_TILE))
            w_at = [b.add(b.add(weights, at), b.mul(weights_stride, v.I64(i))) for i in range(2)]
            x_at = [b.add(b.add(x, at), b.mul(x_stride, v.I64(j))) for j in range(M)]
            for j in range(M):
                _call(b, "tileloadd64", [v.I8(6 + j), _pointer(b, x_at[j]), tile_row])
            for i in range(2):
                _call(b, "tileloadd64", [v.I8(4 + i), _pointer(b, w_at[i]), tile_row])
                for j in range(M):
                    _call(b, "tdpbf16ps", [total[i][j], v.I8(4 + i), v.I8(6 + j)])
        for i in range(2):
            for j in range(M):
                _call(b, "tilestored64", [total[i][j], _pointer(b, sum_at[i][j]), tile_row])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def _store_tile(typing_context, tile, out, out_stride):
    """A tile of sums [16 rows of a weight, 16 tokens] as 16 rows of bfloat16, one for each token."""

    def codegen(context, b, signature, args):
        tile, out, out_stride = args
        rows = _transposed(b, [v.load(b, b.add(tile, v.I64(64 * i)), v.V16I) for i in range(16)])
        for i, row in enumerate(rows):
            v.store_rounded(b, b.bitcast(row, v.V16F), b.add(out, b.mul(out_stride, v.I64(i))), bfloat16=True)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), codegen


@intrinsic(prefer_literal=True)
def _pack_block(typing_context, x, last_token, x_stride, out, four_bits):
    """A block of 128 along K of 16 tokens as four tiles of pairs; tokens past the last repeat it. `four_bits` is a literal."""
    if not isinstance(four_bits, types.IntegerLiteral):
        return None
    signature = types.void(*[types.intp] * 4, four_bits)
    words = v.vector(v.I16, 32)

    def codegen(context, b, signature, args):
        x, last_token, x_stride, out, _ = args
        ordered = b.ptrtoint(cgutils.alloca_once(b, ir.ArrayType(v.I8, 16 * 2 * _BLOCK)), v.I64)
        with cgutils.for_range(b, v.I64(16)) as token:
            row = b.select(b.icmp_signed("<", token.index, last_token), token.index, last_token)
            at = b.add(x, b.mul(row, x_stride))
            parts = [v.load(b, b.add(at, v.I64(64 * s)), words) for s in range(4)]
            if four_bits.literal_value:
                wide = v.vector(v.I32, 64)
                halves = [b.shuffle_vector(*parts[i : i + 2], v.constant(wide, list(range(64)))) for i in (0, 2)]
                parts = [b.shuffle_vector(*halves, v.constant(v.vector(v.I32, 32), list(range(s, 128, 4)))) for s in range(4)]
            for s in range(4):
                v.store(b, parts[s], b.add(ordered, b.add(b.mul(token.index, v.I64(2 * _BLOCK)), v.I64(64 * s))))
        with cgutils.for_range(b, v.I64(4)) as part:
            column = b.add(ordered, b.mul(part.index, v.I64(64)))
            rows = _transposed(b, [v.load(b, b.add(column, v.I64(2 * _BLOCK * t)), v.V16I) for t in range(16)])
            to = b.add(out, b.mul(part.index, v.I64(_TILE)))
            for r in range(16):
                v.store(b, rows[r], b.add(to, v.I64(64 * r)))
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def _decode_int4(typing_context, weights, scales, zeros, first_block, n_blocks, out, group_size):
    """Some blocks of a row into one row of as many times four tiles; lane `l` of tile `s` of a block is element 4l+s.

    Sixteen codes have sixteen values within a group: they are looked up in a table of bfloat16, never computed one by one.
    """
    if not isinstance(group_size, types.IntegerLiteral):
        return None
    G = group_size.literal_value
    signature = types.void(*[types.intp] * 6, group_size)
    words = v.vector(v.I16, 32)

    def values(b, scales, zeros, group):
        """The 16 float32 values of a group's codes: exact, so that one rounding to bfloat16 follows."""
        scale = b.fpext(b.load(b.inttoptr(b.add(scales, b.mul(group, v.I64(2))), v.F16.as_pointer()), align=2), v.F32)
        pair = b.zext(b.load(_pointer(b, b.add(zeros, b.lshr(group, v.I64(1))))), v.I32)
        zero = b.and_(b.lshr(pair, b.mul(b.trunc(b.and_(group, v.I64(1)), v.I32), v.I32(4))), v.I32(15))
        steps = b.sub(v.constant(v.V16I, list(range(16))), v.broadcast(b, zero, [0] * 16))
        return b.fmul(b.sitofp(steps, v.V16F), v.broadcast(b, scale, [0] * 16))

    def codegen(context, b, signature, args):
        weights, scales, zeros, first_block, n_blocks, out, _ = args
        groups = _BLOCK // G
        with cgutils.for_range(b, n_blocks) as step:
            block = b.add(first_block, step.index)
            at = b.add(weights, b.mul(block, v.I64(64)))
            v.prefetch(b, b.add(at, b.mul(n_blocks, v.I64(64))))
            first = b.mul(block, v.I64(groups))
            each = [values(b, scales, zeros, b.add(first, v.I64(g))) for g in range(groups)]
            tables = []
            for g in range(0, groups, 2):
                both = b.shuffle_vector(each[g], each[min(g + 1, groups - 1)], v.constant(v.vector(v.I32, 32), list(range(32))))
                tables.append(v.round_to_bfloat16(b, both))
            group_of_lane = v.constant(words, [lane * 4 // G * 16 for lane in range(32)])
            codes = v.load(b, at, words)
            to = b.add(out, b.mul(step.index, v.I64(4 * _TILE)))
            for s in range(4):
                index = b.and_(b.lshr(codes, v.constant(words, [4 * s] * 32)), v.constant(words, [15] * 32))
                index = b.or_(index, group_of_lane)
                if len(tables) == 1:
                    value = _call(b, "avx512.permvar.hi.512", [tables[0], index], words)
                else:
                    value = _call(b, "avx512.vpermi2var.hi.512", [tables[0], index, tables[1]], words)
                v.store(b, value, b.add(to, v.I64(_TILE * s)))
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def _decode_int8(typing_context, weights, scales, first_block, n_blocks, out, group_size):
    """Some blocks of a row into one row of as many times four tiles, in their own order."""
    if not isinstance(group_size, types.IntegerLiteral):
        return None
    G = group_size.literal_value
    signature = types.void(*[types.intp] * 5, group_size)

    def codegen(context, b, signature, args):
        weights, scales, first_block, n_blocks, out, _ = args
        with cgutils.for_range(b, n_blocks) as step:
            block = b.add(first_block, step.index)
            at = b.add(weights, b.mul(block, v.I64(_BLOCK)))
            for line in range(2):
                v.prefetch(b, b.add(at, b.add(b.mul(n_blocks, v.I64(_BLOCK)), v.I64(64 * line))))
            to = b.add(out, b.mul(step.index, v.I64(4 * _TILE)))
            for s in range(4):
                group = b.add(b.mul(block, v.I64(_BLOCK // G)), v.I64(32 * s // G))
                scale = b.fpext(b.load(b.inttoptr(b.add(scales, b.mul(group, v.I64(2))), v.F16.as_pointer()), align=2), v.F32)
                for half in range(2):
                    codes = b.sext(v.load(b, b.add(at, v.I64(32 * s + 16 * half)), v.vector(v.I8, 16)), v.V16I)
                    value = b.fmul(b.sitofp(codes, v.V16F), v.broadcast(b, scale, [0] * 16))
                    v.store_rounded(b, value, b.add(to, v.I64(_TILE * s + 32 * half)), bfloat16=True)
        return context.get_dummy_value()

    return signature, codegen


@numba.njit(nogil=True, cache=True)
def _decode(weights, scales, zeros, row, K, first_block, n_blocks, out, group_size, four_bits):
    groups = K // group_size
    s = scales + row * groups * 2
    if four_bits:
        w, z = weights + row * (K // 2), zeros + row * ((groups + 1) // 2)
        if group_size == 64:
            _decode_int4(w, s, z, first_block, n_blocks, out, 64)
        elif group_size == 32:
            _decode_int4(w, s, z, first_block, n_blocks, out, 32)
        else:
            _decode_int4(w, s, z, first_block, n_blocks, out, 128)
    else:
        w = weights + row * K
        if group_size == 64:
            _decode_int8(w, s, first_block, n_blocks, out, 64)
        elif group_size == 32:
            _decode_int8(w, s, first_block, n_blocks, out, 32)
        else:
            _decode_int8(w, s, first_block, n_blocks, out, 128)


@numba.njit(nogil=True, parallel=True, cache=True)
def _pack(x, tokens, K, out, four_bits):
    """out [tokens/16, K/32] tiles = x [tokens, K], in the order in which weights are decoded."""
    blocks = K // _BLOCK
    for task in prange((tokens + 15) // 16 * blocks):
        first, block = task // blocks * 16, task % blocks
        at = x + first * K * 2 + block * _BLOCK * 2
        if four_bits:
            _pack_block(at, tokens - 1 - first, K * 2, out + task * (4 * _TILE), 1)
        else:
            _pack_block(at, tokens - 1 - first, K * 2, out + task * (4 * _TILE), 0)


@numba.njit(nogil=True, parallel=True, cache=True)
def _multiply(weights, scales, zeros, N, K, group_size, four_bits, x, n_columns, scratch, sums_at, scratch_stride, out, out_stride, _CHUNK_BLOCKS, _ROWS):
    """out [16 * n_columns, N] = the product; `x` is packed, rows of `out` may run on to the next multiple of 32."""
    blocks = K // _BLOCK
    x_stride = K // 32 * _TILE
    for task in prange((N + _ROWS - 1) // _ROWS):
        decoded = scratch + numba.get_thread_id() * scratch_stride
        sums = decoded + sums_at
        first = task * _ROWS
        _configure()
        for block in range(0, blocks, _CHUNK_BLOCKS):
            n = min(_CHUNK_BLOCKS, blocks - block)
            for r in range(_ROWS):
                to = decoded + r // 16 * (n * 4 * _TILE) + r % 16 * 64
                _decode(weights, scales, zeros, min(first + r, N - 1), K, block, n, to, group_size, four_bits)
            for column in range(0, n_columns - 1, 2):
                for r in range(0, _ROWS // 16, 2):
                    _multiply_tiles(
                        decoded + r * n * 4 * _TILE, n * 4 * _TILE, x + column * x_stride + block * 4 * _TILE, x_stride,
                        sums + (r * n_columns + column) * _TILE, n_columns * _TILE, n * 4, block == 0, 2,
                    )
            if n_columns % 2:
                column = n_columns - 1
                for r in range(0, _ROWS // 16, 2):
                    _multiply_tiles(
                        decoded + r * n * 4 * _TILE, n * 4 * _TILE, x + column * x_stride + block * 4 * _TILE, x_stride,
                        sums + (r * n_columns + column) * _TILE, n_columns * _TILE, n * 4, block == 0, 1,
                    )
        _release()
        for r in range(min(_ROWS, N + 31 - first) // 16):
            for column in range(n_columns):
                _store_tile(sums + (r * n_columns + column) * _TILE, out + column * 16 * out_stride + (first + r * 16) * 2, out_stride)
