"""Products of packed weights with bfloat16 activations of many tokens, on the CPU's matrix unit: AMX (Intel, Sapphire Rapids and later).

The product is computed transposed, so that the loop over the weight shuffles neither operand: it multiplies a tile of 16 rows of
dequantized weights, in their order, by a tile of activations that holds pairs of neighbours along `K` for 16 tokens. Activations are
converted to that form once. Weights are dequantized one chunk of `K` at a time, into a buffer that is still in the first-level cache when
it is multiplied.

Dimension letters: `T` tokens, `N` output features, `K` input features, `G` group size.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache
from typing import Any

import numba
import torch
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.ufunc.parallel import get_thread_id

from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight

from . import vector as v
from .compiled import compiled

__all__ = ["available", "matmul"]

_BLOCK = 128  # elements along K that are dequantized at a time: four tiles wide
_TILE = 1024  # bytes of a full tile: 16 rows of 64
# int4 [10752, 6144], groups of 64, two cores, 512 (128) tokens: 32, 64, 128, 256 rows take 89, 68, 64, 65 (21, 22, 20, 19) ms at 3 blocks;
# 1, 2, 3 blocks 70, 62, 64 (26, 21, 20) ms at 128 rows; panels of 256 tokens 67 ms.
_ROWS = 128
_CHUNK_BLOCKS = 3
_PANEL_TOKENS = 512


@cache
def available() -> bool:
    """Whether this chip has AMX for bfloat16 and the operating system lets this process use it. Requests the permission."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    if not v.chip_features() >= {"amx-tile", "amx-bf16", "avx512bw", "avx512bf16"}:
        return False
    # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA), for all threads: without it the first tile instruction ends the process.
    call = (ctypes.c_long(n) for n in (158, 0x1023, 18))
    return bool(ctypes.CDLL(None).syscall(*call) == 0)


def matmul(x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """bfloat16 y [T, N] = x [T, K] @ weight [N, K].T for bfloat16 `x`; the weight is rounded to bfloat16, sums are float32.

    It needs a chip on which AMX is `available`, a weight in int4 or int8, and K a multiple of 128. It runs on numba's current number of
    threads.
    """
    (T, K), N = x.shape, weight.shape[0]
    assert available()
    assert x.dtype == torch.bfloat16
    assert K % _BLOCK == 0
    x, parts = x.contiguous(), weight.contiguous().parts
    codes, scales, four_bits = parts["qweight"], parts["scales"], weight.format == "int4"
    zeros = parts.get("zeros", scales)  # the int8 code does not read zero-points
    threads = numba.get_num_threads()
    rows = min(_ROWS, _up(N // (4 * threads), 32))  # several tasks per thread, which balance the load
    panel = min(_PANEL_TOKENS, _up(T, 16))
    out = torch.empty(_up(T, 16), _up(N, 32), dtype=torch.bfloat16)
    packed = torch.empty(panel * K, dtype=torch.bfloat16)
    decoded_bytes, sums_bytes = rows * _CHUNK_BLOCKS * _BLOCK * 2, rows * panel * 4
    scratch = torch.empty(threads, decoded_bytes + sums_bytes, dtype=torch.uint8)
    for first in range(0, T, panel):
        tokens = min(panel, T - first)
        _pack(x[first:].data_ptr(), tokens, K, _CHUNK_BLOCKS, packed.data_ptr(), four_bits)
        _multiply(
            *(codes.data_ptr(), scales.data_ptr(), zeros.data_ptr(), N, K, weight.group_size, four_bits, rows, _CHUNK_BLOCKS),
            *(packed.data_ptr(), _up(tokens, 16) // 16, scratch.data_ptr(), scratch.stride(0), decoded_bytes),
            *(out[first:].data_ptr(), out.stride(0) * 2),
        )
    return out[:T, :N]


def _up(n: int, multiple: int) -> int:
    return max(1, (n + multiple - 1) // multiple) * multiple


def _call(b: Any, name: str, arguments: list[Any], result: Any = None) -> Any:
    kind = ir.FunctionType(result or ir.VoidType(), [a.type for a in arguments])
    return b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.x86.{name}"), arguments)


def _pointer(b: Any, address: Any) -> Any:
    return b.inttoptr(address, v.I8.as_pointer())


@intrinsic
def _configure(typing_context):
    """Configure eight tiles of 16 rows of 64 bytes for this thread."""

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
    """Release the tiles, so that context switches of the thread stay cheap."""

    def codegen(context, b, signature, args):
        _call(b, "tilerelease", [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _multiply_tiles(typing_context, weights, x, sums, steps, fresh):
    """sums [2 tiles] (+)= weights [2 tiles, steps tiles] times x [steps tiles], all contiguous; `fresh` starts from zero.

    Few tiles hold values at a time, and each is zeroed right after its use: while another hyperthread of the core is busy, there are no
    spare registers for renaming tiles.
    """

    def codegen(context, b, signature, args):
        weights, x, sums, steps, fresh = args
        tile_row = v.I64(64)
        # Two cores whose other hyperthreads were busy: 2.1 TFLOP/s from the first-level cache, 1.7 without zeroing, 0.8 for 2 x 2 tiles.
        totals, x_tile, weight_tiles = [v.I8(0), v.I8(1)], v.I8(2), [v.I8(3), v.I8(4)]
        sums_at = [_pointer(b, b.add(sums, v.I64(_TILE * i))) for i in range(2)]
        with b.if_else(fresh) as (then, otherwise):
            with then:
                for i in range(2):
                    _call(b, "tilezero", [totals[i]])
            with otherwise:
                for i in range(2):
                    _call(b, "tileloadd64", [totals[i], sums_at[i], tile_row])
        second = b.mul(steps, v.I64(_TILE))
        with cgutils.for_range(b, steps) as step:
            offset = b.mul(step.index, v.I64(_TILE))
            _call(b, "tileloadd64", [x_tile, _pointer(b, b.add(x, offset)), tile_row])
            weights_at = b.add(weights, offset)
            for i in range(2):
                _call(b, "tileloadd64", [weight_tiles[i], _pointer(b, b.add(weights_at, second) if i else weights_at), tile_row])
                _call(b, "tdpbf16ps", [totals[i], weight_tiles[i], x_tile])
                _call(b, "tilezero", [weight_tiles[i]])
            _call(b, "tilezero", [x_tile])
        for i in range(2):
            _call(b, "tilestored64", [totals[i], sums_at[i], tile_row])
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4, types.boolean), codegen


@intrinsic
def _store_tile(typing_context, tile, out, out_stride):
    """Store a tile of sums [16 rows of a weight, 16 tokens] as 16 rows of bfloat16, one for each token."""

    def codegen(context, b, signature, args):
        tile, out, out_stride = args
        rows = v.transposed(b, [v.load(b, b.add(tile, v.I64(64 * i)), v.V16I) for i in range(16)])
        for i, row in enumerate(rows):
            v.store_rounded(b, b.bitcast(row, v.V16F), b.add(out, b.mul(out_stride, v.I64(i))), bfloat16=True)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), codegen


@intrinsic(prefer_literal=True)
def _pack_block(typing_context, x, last_token, x_stride, out, four_bits):
    """Pack a block of 128 along K of 16 tokens into four tiles of pairs; tokens past the last repeat it. `four_bits` is a literal."""
    if not isinstance(four_bits, types.IntegerLiteral):
        return None
    signature = types.void(*[types.intp] * 4, four_bits)
    words = v.vector(v.I16, 32)

    def codegen(context, b, signature, args):
        x, last_token, x_stride, out, _ = args
        ordered = b.ptrtoint(cgutils.alloca_once(b, ir.ArrayType(v.I8, 16 * 2 * _BLOCK)), v.I64)
        with cgutils.for_range(b, v.I64(16)) as token:
            row = b.select(b.icmp_signed("<", token.index, last_token), token.index, last_token)
            row_at = b.add(x, b.mul(row, x_stride))
            parts = [v.load(b, b.add(row_at, v.I64(64 * s)), words) for s in range(4)]
            if four_bits.literal_value:
                wide = v.vector(v.I32, 64)
                halves = [b.shuffle_vector(*parts[i : i + 2], v.constant(wide, list(range(64)))) for i in (0, 2)]
                parts = [b.shuffle_vector(*halves, v.constant(v.vector(v.I32, 32), list(range(s, 128, 4)))) for s in range(4)]
            for s in range(4):
                v.store(b, parts[s], b.add(ordered, b.add(b.mul(token.index, v.I64(2 * _BLOCK)), v.I64(64 * s))))
        with cgutils.for_range(b, v.I64(4)) as part:
            column = b.add(ordered, b.mul(part.index, v.I64(64)))
            rows = v.transposed(b, [v.load(b, b.add(column, v.I64(2 * _BLOCK * t)), v.V16I) for t in range(16)])
            to = b.add(out, b.mul(part.index, v.I64(_TILE)))
            for r in range(16):
                v.store(b, rows[r], b.add(to, v.I64(64 * r)))
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def _decode_int4(typing_context, weights, scales, zeros, first_block, n_blocks, out, group_size):
    """Dequantize `n_blocks` blocks of a row into one row of 4 * n_blocks tiles; lane `l` of tile `s` of a block is element 4l+s.

    Within a group the sixteen codes have sixteen values. These are looked up in a table of bfloat16, not computed one by one.
    """
    if not isinstance(group_size, types.IntegerLiteral):
        return None
    G = group_size.literal_value
    signature = types.void(*[types.intp] * 6, group_size)
    words = v.vector(v.I16, 32)

    def values(b, scales, zeros, group):
        """The 16 float32 values of a group's codes. They are exact: only the conversion to bfloat16 rounds."""
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
            address = b.add(weights, b.mul(block, v.I64(64)))
            v.prefetch(b, b.add(address, b.mul(n_blocks, v.I64(64))))
            first = b.mul(block, v.I64(groups))
            values_of_groups = [values(b, scales, zeros, b.add(first, v.I64(g))) for g in range(groups)]
            tables = []
            for g in range(0, groups, 2):
                pair = values_of_groups[g], values_of_groups[min(g + 1, groups - 1)]
                both = b.shuffle_vector(*pair, v.constant(v.vector(v.I32, 32), list(range(32))))
                tables.append(v.round_to_bfloat16(b, both))
            group_of_lane = v.constant(words, [lane * 4 // G * 16 for lane in range(32)])
            codes = v.load(b, address, words)
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
    """Dequantize `n_blocks` blocks of a row into one row of 4 * n_blocks tiles, in the order of the elements."""
    if not isinstance(group_size, types.IntegerLiteral):
        return None
    G = group_size.literal_value
    signature = types.void(*[types.intp] * 5, group_size)

    def codegen(context, b, signature, args):
        weights, scales, first_block, n_blocks, out, _ = args
        with cgutils.for_range(b, n_blocks) as step:
            block = b.add(first_block, step.index)
            address = b.add(weights, b.mul(block, v.I64(_BLOCK)))
            for line in range(2):
                v.prefetch(b, b.add(address, b.add(b.mul(n_blocks, v.I64(_BLOCK)), v.I64(64 * line))))
            to = b.add(out, b.mul(step.index, v.I64(4 * _TILE)))
            for s in range(4):
                group = b.add(b.mul(block, v.I64(_BLOCK // G)), v.I64(32 * s // G))
                scale = b.fpext(b.load(b.inttoptr(b.add(scales, b.mul(group, v.I64(2))), v.F16.as_pointer()), align=2), v.F32)
                for half in range(2):
                    codes = b.sext(v.load(b, b.add(address, v.I64(32 * s + 16 * half)), v.vector(v.I8, 16)), v.V16I)
                    value = b.fmul(b.sitofp(codes, v.V16F), v.broadcast(b, scale, [0] * 16))
                    v.store_rounded(b, value, b.add(to, v.I64(_TILE * s + 32 * half)), bfloat16=True)
        return context.get_dummy_value()

    return signature, codegen


@compiled()
def _decode(codes, scales, zeros, first_block, n_blocks, out, group_size, four_bits):
    if four_bits:
        if group_size == 64:
            _decode_int4(codes, scales, zeros, first_block, n_blocks, out, 64)
        elif group_size == 32:
            _decode_int4(codes, scales, zeros, first_block, n_blocks, out, 32)
        else:
            _decode_int4(codes, scales, zeros, first_block, n_blocks, out, 128)
    elif group_size == 64:
        _decode_int8(codes, scales, first_block, n_blocks, out, 64)
    elif group_size == 32:
        _decode_int8(codes, scales, first_block, n_blocks, out, 32)
    else:
        _decode_int8(codes, scales, first_block, n_blocks, out, 128)


@compiled(parallel=True)
def _pack(x, tokens, K, chunk_blocks, out, four_bits):
    """Write x [tokens, K] to `out` as tiles: by chunk of K, then by 16 tokens, then along K in the order of dequantized weights."""
    blocks, columns = K // _BLOCK, (tokens + 15) // 16
    for task in prange(blocks * columns):
        column, block = task // blocks, task % blocks
        chunk = block // chunk_blocks * chunk_blocks
        to = out + (chunk * columns + column * min(chunk_blocks, blocks - chunk) + block - chunk) * (4 * _TILE)
        address = x + (column * 16 * K + block * _BLOCK) * 2
        if four_bits:
            _pack_block(address, tokens - 1 - column * 16, K * 2, to, 1)
        else:
            _pack_block(address, tokens - 1 - column * 16, K * 2, to, 0)


@compiled(parallel=True)
def _multiply(
    codes, scales, zeros, N, K, group_size, four_bits, rows, chunk_blocks, x, columns, scratch, thread_bytes, decoded_bytes, out, out_stride
):
    """out [16 * columns, N] = the product; `x` is packed; rows of `out` may extend to the next multiple of 32.

    A task computes `rows` rows of the weight, a multiple of 32: all of them for one chunk of K, then for the next.
    """
    blocks, groups = K // _BLOCK, K // group_size
    code_bytes, zero_bytes = K // 2 if four_bits else K, (groups + 1) // 2
    for task in prange((N + rows - 1) // rows):
        decoded = scratch + get_thread_id() * thread_bytes
        sums = decoded + decoded_bytes
        first = task * rows
        pairs = (min(rows, N - first) + 31) // 32
        _configure()
        for block in range(0, blocks, chunk_blocks):
            tiles = 4 * min(chunk_blocks, blocks - block)
            for r in range(32 * pairs):
                row, to = min(first + r, N - 1), decoded + r // 16 * tiles * _TILE + r % 16 * 64
                c, s, z = codes + row * code_bytes, scales + row * groups * 2, zeros + row * zero_bytes
                _decode(c, s, z, block, tiles // 4, to, group_size, four_bits)
            for pair in range(pairs):
                for column in range(columns):
                    x_at = x + (block * columns * 4 + column * tiles) * _TILE
                    sums_at = sums + (pair * columns + column) * (2 * _TILE)
                    _multiply_tiles(decoded + pair * 2 * tiles * _TILE, x_at, sums_at, tiles, block == 0)
        _release()
        for pair in range(pairs):
            for column in range(columns):
                for i in range(2):
                    tile = sums + (2 * (pair * columns + column) + i) * _TILE
                    _store_tile(tile, out + column * 16 * out_stride + (first + pair * 32 + i * 16) * 2, out_stride)
