"""The loops of products with trellis weights (`trellis.py`): exact sums of levels times integers of 128 rows.

Dimension letters: `K` input features, `H` bytes of an integer, `k` bits per element.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from . import vector as v
from .integer_tiles import row_tiles
from .trellis_decode import TURNS, code_of, decoded, level_offset

__all__ = ["STEP_BYTES", "decode_steps", "multiply_levels", "multiply_stream", "scaled_sums", "write_rows"]

STEP_BYTES = 64 * TURNS
"""Bytes of the levels of 128 rows and four inputs, and of the sums of 128 rows."""
_BYTES_AHEAD = 4096  # that the streams of one token's rows are prefetched ahead


def _splat(b: Any, address: Any, kind: Any) -> Any:
    return v.broadcast(b, b.load(b.inttoptr(address, kind.as_pointer()), align=1), [0] * 16)


def _dot(b: Any, total: Any, levels: Any, x: Any) -> Any:
    if level_offset():
        return v.dot_bytes(b, total, levels, x, four_bits=False)
    return v.dot_signed_bytes(b, total, x, levels)


def _lines(b: Any, address: Any, bits: int) -> list[Any]:
    return [v.load(b, b.add(address, v.I64(64 * j)), v.V64) for j in range(bits)]


@intrinsic(prefer_literal=True)
def multiply_stream(typing_context, streams, steps, x, x_pitch, sums, code):
    """sums int32 [2, 128] = the products of 128 rows with one token's integers of two bytes.

    streams: of the tile; steps: K / 4; x: the integers, whose second bytes come `x_pitch` bytes after the first; code: a literal of
    `trellis_decode.KINDS`.
    """
    if not isinstance(code, types.IntegerLiteral):
        return None
    format_code = code_of(code.literal_value)

    def codegen(context, b, signature, args):
        streams, steps, x, x_pitch, sums, _ = args
        totals = [[cgutils.alloca_once(b, v.V16I) for _ in range(TURNS)] for _ in range(2)]
        for slots in totals:
            for slot in slots:
                b.store(ir.Constant(v.V16I, None), slot)
        with cgutils.for_range(b, steps) as loop:
            address = b.add(streams, b.mul(loop.index, v.I64(64 * format_code.bits)))
            for j in range(format_code.bits):
                v.prefetch(b, b.add(address, v.I64(_BYTES_AHEAD + 64 * j)))
            at = b.add(x, b.mul(loop.index, v.I64(4)))
            words = [b.bitcast(_splat(b, b.add(at, b.mul(x_pitch, v.I64(h))), v.I32), v.V64) for h in range(2)]
            for turn, levels in enumerate(decoded(b, format_code, _lines(b, address, format_code.bits), level_offset())):
                for slots, word in zip(totals, words, strict=True):
                    b.store(_dot(b, b.load(slots[turn]), levels, word), slots[turn])
        for h, slots in enumerate(totals):
            for turn, slot in enumerate(slots):
                v.store(b, b.load(slot), b.add(sums, v.I64(STEP_BYTES * h + 64 * turn)))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5, code), codegen


@intrinsic(prefer_literal=True)
def decode_steps(typing_context, streams, steps, out, pitch, code):
    """Write the levels of 128 rows: for each 32 rows, `pitch` bytes apart, uint8 [steps, 2, 64].

    code: a literal of `trellis_decode.KINDS`.
    """
    if not isinstance(code, types.IntegerLiteral):
        return None
    format_code = code_of(code.literal_value)

    def codegen(context, b, signature, args):
        streams, steps, out, pitch, _ = args
        with cgutils.for_range(b, steps) as loop:
            address = b.add(streams, b.mul(loop.index, v.I64(64 * format_code.bits)))
            to = b.add(out, b.mul(loop.index, v.I64(128)))
            for turn, levels in enumerate(decoded(b, format_code, _lines(b, address, format_code.bits), level_offset())):
                v.store(b, levels, b.add(b.add(to, b.mul(pitch, v.I64(turn // 2))), v.I64(64 * (turn % 2))))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4, code), codegen


@intrinsic(prefer_literal=True)
def multiply_levels(typing_context, levels, steps, x_at, x_pitch, sums, tokens, ahead, pitch, code_bytes):
    """sums int32 [tokens, H, 128] += the products of 32 rows, which `sums` begins with, and one chunk along K.

    levels: uint8 [steps, 2, 64]; x_at: address of the addresses of each token's integers, whose bytes are `x_pitch` apart. `tokens` is at
    most that of the largest tile; the addresses of tokens up to the next tile, and their sums, are valid. ahead: what is prefetched,
    `pitch` bytes further in each step. code_bytes: H, a literal.
    """
    if not isinstance(code_bytes, types.IntegerLiteral):
        return None
    H = code_bytes.literal_value

    def tile(b: Any, rows: int, args: Any) -> None:
        levels, steps, x_at, x_pitch, sums, _, ahead, pitch, _ = args
        addresses = [b.load(b.inttoptr(b.add(x_at, v.I64(8 * t)), v.I64.as_pointer())) for t in range(rows // H)]
        x_rows = [b.add(addresses[r // H], b.mul(x_pitch, v.I64(r % H))) for r in range(rows)]
        totals = [[cgutils.alloca_once(b, v.V16I) for _ in range(2)] for _ in range(rows)]
        places = [[b.add(sums, v.I64(STEP_BYTES * r + 64 * j)) for j in range(2)] for r in range(rows)]
        for r in range(rows):
            for j in range(2):
                b.store(v.load(b, places[r][j], v.V16I), totals[r][j])
        with cgutils.for_range(b, steps) as loop:
            v.prefetch(b, b.add(ahead, b.mul(loop.index, pitch)))
            at = b.add(levels, b.mul(loop.index, v.I64(128)))
            values = [v.load(b, b.add(at, v.I64(64 * j)), v.V64) for j in range(2)]
            for r in range(rows):
                x = b.bitcast(_splat(b, b.add(x_rows[r], b.mul(loop.index, v.I64(4))), v.I32), v.V64)
                for j in range(2):
                    b.store(_dot(b, b.load(totals[r][j]), values[j], x), totals[r][j])
        for r in range(rows):
            for j in range(2):
                v.store(b, b.load(totals[r][j]), places[r][j])

    def codegen(context, b, signature, args):
        def choose(tiles: tuple[int, ...]) -> None:
            if len(tiles) == 1:
                tile(b, tiles[0], args)
                return
            with b.if_else(b.icmp_signed(">", args[5], v.I64(tiles[1] // H))) as (large, smaller):
                with large:
                    tile(b, tiles[0], args)
                with smaller:
                    choose(tiles[1:])

        choose(row_tiles(H))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 8, code_bytes), codegen


@intrinsic(prefer_literal=True)
def scaled_sums(typing_context, sums, x_sums, x_scale, scales, out, code_bytes):
    """float32 [128] at `out`: the sums int32 [H, 128], less the offset of levels, times the scales of the rows and of the token.

    x_sums: int32 [H], the sums of the token's bytes; scales: float32 [128]; code_bytes: H, a literal.

    With more than 32 bits a sum is 256 times that of the first bytes plus that of the next ones, each step rounded once.
    """
    if not isinstance(code_bytes, types.IntegerLiteral):
        return None
    H = code_bytes.literal_value

    def codegen(context, b, signature, args):
        sums, x_sums, x_scale, scales, out, _ = args
        factor = v.constant(v.V16I, [level_offset()] * 16)
        excess = [b.mul(factor, _splat(b, b.add(x_sums, v.I64(4 * h)), v.I32)) for h in range(H)]
        scale_of_x = _splat(b, x_scale, v.F32)
        for turn in range(TURNS):
            value = None
            for h in range(H):
                total = b.sub(v.load(b, b.add(sums, v.I64(STEP_BYTES * h + 64 * turn)), v.V16I), excess[h])
                part = b.sitofp(total, v.V16F)
                value = part if value is None else v.fused(b, value, v.constant(v.V16F, [256.0] * 16), part)
            scaled = b.fmul(b.fmul(value, v.load(b, b.add(scales, v.I64(64 * turn)), v.V16F)), scale_of_x)
            v.store(b, scaled, b.add(out, v.I64(64 * turn)))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5, code_bytes), codegen


@intrinsic(prefer_literal=True)
def write_rows(typing_context, levels, panel, scales, out, pitch, rows, bfloat16):
    """Write 64 inputs of 128 rows in the order of rows: level times scale as float32, or rounded to bfloat16.

    levels: as `decode_steps` writes those of 16 steps, `panel` bytes after each other; scales: float32 [128]; out: of the first row,
    `pitch` bytes from row to row; rows after the first `rows` are left out; bfloat16: a literal.
    """
    if not isinstance(bfloat16, types.IntegerLiteral):
        return None
    narrow = bool(bfloat16.literal_value)
    size = 2 if narrow else 4

    def codegen(context, b, signature, args):
        levels, panel, scales, out, pitch, rows, _ = args
        with cgutils.for_range(b, v.I64(TURNS)) as loop:
            first = b.mul(loop.index, v.I64(16))
            at = b.add(b.mul(b.lshr(loop.index, v.I64(1)), panel), b.mul(b.and_(loop.index, v.I64(1)), v.I64(64)))
            vectors = [v.load(b, b.add(b.add(levels, at), v.I64(128 * step)), v.V16I) for step in range(16)]
            for row, words in enumerate(v.transposed(b, vectors)):
                n = b.add(first, v.I64(row))
                with b.if_then(b.icmp_signed("<", n, rows)):
                    octets = b.bitcast(words, v.V64)
                    scale = _splat(b, b.add(scales, b.mul(n, v.I64(4))), v.F32)
                    to = b.add(out, b.mul(n, pitch))
                    for i in range(0, 64, 16):
                        part = v.broadcast(b, octets, list(range(i, i + 16)))
                        whole = b.zext(part, v.V16I) if level_offset() else b.sext(part, v.V16I)
                        whole = b.sub(whole, v.constant(v.V16I, [level_offset()] * 16))
                        v.store_rounded(b, b.fmul(b.sitofp(whole, v.V16F), scale), b.add(to, v.I64(i * size)), bfloat16=narrow)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 6, bfloat16), codegen
