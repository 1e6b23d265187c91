"""The loops of integer products (`integer.py`): 32 rows of decoded codes by a tile of activations, and sixteen rows of packed codes by one
token's. Sums of bytes are exact, and both scale them alike, so both give the same bits.

Dimension letters: `K` input features, `G` group size, `U` unit of activations.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from . import vector as v
from .row_codes import BLOCK, RowCodes, nibble_line, nibble_values

__all__ = ["multiply_one", "multiply_tile", "row_tiles"]

_BLOCKS_AHEAD = 24  # blocks that a single token's rows are prefetched ahead; see docs/notes/cpu-kernels.md


def row_tiles(code_bytes: int) -> tuple[int, ...]:
    """Rows of activations that are multiplied together, most first: as many as have registers for their sums, of whole tokens."""
    if code_bytes == 3:
        return (12, 6, 3) if "avx512f" in v.chip_features() else (3,)
    return (12, 8, 4) if "avx512f" in v.chip_features() else (2,)


def _splat(b: Any, address: Any, kind: Any) -> Any:
    return v.broadcast(b, b.load(b.inttoptr(address, kind.as_pointer()), align=1), [0] * 16)


@intrinsic(prefer_literal=True)
def multiply_tile(
    typing_context,
    codes,
    scales,
    zeros,
    second,
    units,
    x_at,
    x_pitch,
    sums,
    tokens,
    ahead,
    pitch,
    unit_size,
    group_size,
    code_bytes,
    kind,
):
    """sums float32 [tokens, 2, 16] += the products of one chunk along K. The last two arguments are literals.

    codes: uint8 [units * U / 4, 2, 64]; scales, zeros: as `row_scales` writes those of the first sixteen rows, `second` bytes before those
    of the others; x_at: address of the addresses of each token's codes, 128 bytes before those of its scales and 256 before those of its
    sums; x_pitch: bytes from row to row of a token's codes. `tokens` is at most that of the largest tile; the addresses
    of tokens up to the next tile are valid. ahead: address of the chunk of the weight that
    is prefetched, `pitch` bytes from row to row: spread over the products, the reads do not wait for each other.
    """
    if not all(isinstance(literal, types.IntegerLiteral) for literal in (code_bytes, kind)):
        return None
    H, codes_of_rows = code_bytes.literal_value, RowCodes.of_kind(kind.literal_value)
    small, has_offsets, block_bytes = codes_of_rows.nibbles, codes_of_rows.offsets is not None, codes_of_rows.block_bytes

    def tile(b: Any, rows: int, args: Any) -> None:
        codes, scales, zeros, second, units, x_at, x_pitch, sums = args[:8]

        def address(table: Any, token: int) -> Any:
            return b.load(b.inttoptr(b.add(table, v.I64(8 * token)), v.I64.as_pointer()))

        ahead, pitch, unit_size, group_size = args[9:13]
        lines = -(-block_bytes // 64)  # to prefetch in a step: a row's share of a chunk has four times as many, or fewer
        tokens = rows // H
        x_rows = [b.add(address(x_at, r // H), b.mul(x_pitch, v.I64(r % H))) for r in range(rows)]
        x_scales, x_sums = ([address(b.add(x_at, v.I64(offset)), t) for t in range(tokens)] for offset in (128, 256))
        totals = [[cgutils.alloca_once(b, v.V16I) for _ in range(2)] for _ in range(rows)]
        steps, units_of_group = b.lshr(unit_size, v.I64(2)), b.udiv(group_size, unit_size)
        nothing = ir.Constant(v.V16I, None)

        def whole_sum(sums_at: Any, unit_index: Any) -> Any:
            """float32: the sum of a unit's integers."""
            at = b.add(sums_at, b.mul(unit_index, v.I64(8 if H == 3 else 4)))
            total = b.sitofp(_splat(b, at, v.I32), v.V16F)
            if H < 3:
                return total
            return v.fused(b, total, v.constant(v.V16F, [256.0] * 16), b.sitofp(_splat(b, b.add(at, v.I64(4)), v.I32), v.V16F))

        with cgutils.for_range(b, units) as unit:
            group_at = b.mul(b.udiv(unit.index, units_of_group), v.I64(128))
            places = [group_at, b.add(group_at, second)]
            excess = [nothing if has_offsets else b.sub(nothing, v.load(b, b.add(zeros, places[j]), v.V16I)) for j in range(2)]
            for t in range(tokens):
                words = 2 if H == 3 else 1  # sums of a token's unit: of the last row, or of the first two rows and of the last
                sum_at = b.add(x_sums[t], b.mul(unit.index, v.I64(4 * words)))
                x_sum = [nothing] * (H - words) + [_splat(b, b.add(sum_at, v.I64(4 * i)), v.I32) for i in range(words)]
                for j in range(2):
                    for h in range(H):
                        counts = h >= H - words and not has_offsets
                        b.store(b.mul(excess[j], x_sum[h]) if counts else nothing, totals[t * H + h][j])
            first = b.mul(unit.index, steps)
            with cgutils.for_range(b, steps) as step:
                k = b.add(first, step.index)
                line_at = b.add(b.mul(b.lshr(k, v.I64(2)), pitch), b.mul(b.and_(k, v.I64(3)), v.I64(block_bytes)))
                for line in range(lines):
                    v.prefetch(b, b.add(b.add(ahead, line_at), v.I64(64 * line)))
                code_at = b.add(codes, b.mul(k, v.I64(128)))
                values = [v.load(b, b.add(code_at, v.I64(64 * j)), v.V64) for j in range(2)]
                for r in range(rows):
                    x = b.bitcast(_splat(b, b.add(x_rows[r], b.mul(k, v.I64(4))), v.I32), v.V64)
                    for j in range(2):
                        b.store(v.dot_bytes(b, b.load(totals[r][j]), values[j], x, four_bits=small), totals[r][j])
            scale = [v.load(b, b.add(scales, places[j]), v.V16F) for j in range(2)]
            for t in range(tokens):
                x_scale = _splat(b, b.add(x_scales[t], b.mul(unit.index, v.I64(4))), v.F32)
                for j in range(2):
                    total = b.load(totals[t * H][j])
                    if H > 1:
                        total = b.add(b.shl(total, v.constant(v.V16I, [8] * 16)), b.load(totals[t * H + 1][j]))
                    value = b.sitofp(total, v.V16F)
                    if H == 3:  # more than 32 bits
                        value = v.fused(b, value, v.constant(v.V16F, [256.0] * 16), b.sitofp(b.load(totals[t * H + 2][j]), v.V16F))
                    to = b.add(sums, v.I64(128 * t + 64 * j))
                    scaled = b.fmul(value, scale[j])
                    if has_offsets:
                        scaled = v.fused(b, whole_sum(x_sums[t], unit.index), v.load(b, b.add(zeros, places[j]), v.V16F), scaled)
                    v.store(b, v.fused(b, scaled, x_scale, v.load(b, to, v.V16F)), to)

    def codegen(context, b, signature, args):
        def choose(tiles: tuple[int, ...]) -> None:
            if len(tiles) == 1:
                tile(b, tiles[0], args)
                return
            with b.if_else(b.icmp_signed(">", args[8], v.I64(tiles[1] // H))) as (large, smaller):
                with large:
                    tile(b, tiles[0], args)
                with smaller:
                    choose(tiles[1:])

        choose(row_tiles(H))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 13, code_bytes, kind), codegen


def _quarter_totals(b: Any, rows: list[Any]) -> list[Any]:
    """The sums of each quarter of sixteen int32 vectors: for each quarter a vector whose lane r is of vector r."""

    def shuffled(x: Any, y: Any, lanes: list[int]) -> Any:
        return b.shuffle_vector(x, y, v.constant(v.V16I, lanes))

    def within(pattern: list[int]) -> list[int]:
        """A pattern of the four lanes of a quarter, for all quarters."""
        return [lane % 4 + 16 * (lane // 4) + 4 * quarter for quarter in range(4) for lane in pattern]

    def whole(pattern: list[int]) -> list[int]:
        """A pattern of quarters."""
        return [4 * quarter + lane for quarter in pattern for lane in range(4)]

    pairs = [b.add(*(shuffled(*rows[i : i + 2], within(pattern)) for pattern in ([0, 4, 1, 5], [2, 6, 3, 7]))) for i in range(0, 16, 2)]
    fours = [b.add(*(shuffled(*pairs[i : i + 2], within(pattern)) for pattern in ([0, 1, 4, 5], [2, 3, 6, 7]))) for i in range(0, 8, 2)]
    patterns = [whole([0, 2, 4, 6]), whole([1, 3, 5, 7])]
    halves = [[shuffled(*fours[i : i + 2], lanes) for i in (0, 2)] for lanes in patterns]
    return [shuffled(*halves[quarter % 2], patterns[quarter // 2]) for quarter in range(4)]


@intrinsic(prefer_literal=True)
def multiply_one(
    typing_context, codes, pitch, last, begin, blocks, row_blocks, scales, zeros, x, x_pitch, x_scales, x_sums, sums, group_size, kind
):
    """sums float32 [16] += the products of sixteen rows with one token, over `blocks` blocks from the block `begin`; the last argument is a
    literal.

    codes: address of the first row; pitch, row_blocks: bytes and blocks of a row; last: the last row, which those after it repeat; scales,
    zeros: as `row_scales` writes them, from the block `begin`; x: a token's codes in two halves, `x_pitch` bytes apart, quantized in
    units of a group.
    """
    if not isinstance(kind, types.IntegerLiteral):
        return None
    codes_of_rows = RowCodes.of_kind(kind.literal_value)
    small, has_offsets, block_bytes = codes_of_rows.nibbles, codes_of_rows.offsets is not None, codes_of_rows.block_bytes
    lines = -(-block_bytes // 64)  # that a block of 128 elements takes

    def codegen(context, b, signature, args):
        codes, pitch, last, begin, blocks, row_blocks, scales, zeros, x, x_pitch, x_scales, x_sums, sums, group_size, _ = args
        rows = [b.add(codes, b.mul(b.select(b.icmp_signed("<", v.I64(row), last), v.I64(row), last), pitch)) for row in range(16)]
        product = cgutils.alloca_once(b, v.V16F)
        b.store(v.load(b, sums, v.V16F), product)
        next_rows = b.mul(pitch, v.I64(16))
        with cgutils.for_range(b, blocks) as loop:
            block = b.add(begin, loop.index)
            halves = []  # the activations of the block in the order of the codes
            for h in range(2):
                at = b.add(b.add(x, b.mul(x_pitch, v.I64(h))), b.mul(block, v.I64(BLOCK)))
                words = [v.load(b, b.add(at, v.I64(64 * i)), v.V16I) for i in range(2)]
                if small:
                    words = [b.shuffle_vector(*words, v.constant(v.V16I, list(range(i, 32, 2)))) for i in range(2)]
                halves.append([b.bitcast(word, v.V64) for word in words])
            line_at = b.mul(block, v.I64(block_bytes))
            # After the last block of these rows come the next sixteen rows.
            ahead = b.add(block, v.I64(_BLOCKS_AHEAD))
            over = b.icmp_signed(">=", ahead, row_blocks)
            ahead = b.mul(b.select(over, b.sub(ahead, row_blocks), ahead), v.I64(block_bytes))
            ahead = b.add(ahead, b.select(over, next_rows, v.I64(0)))
            totals: list[list[Any]] = [[] for _ in range(lines)]
            for row in range(16):
                values = []
                for line in range(lines):
                    v.prefetch(b, b.add(b.add(rows[row], ahead), v.I64(64 * line)), level=2)
                    at = b.add(b.add(rows[row], line_at), v.I64(64 * line))
                    if small:
                        values += nibble_values(b, nibble_line(b, at, codes_of_rows.bits), codes_of_rows.bits)
                    else:
                        loaded = v.load(b, at, v.V64)
                        values.append(loaded if has_offsets else b.xor(loaded, v.constant(v.V64, [-128] * 64)))
                for line, chain in enumerate([[0, 1]] if small else [[0], [1]]):
                    total = ir.Constant(v.V16I, None)
                    for h in range(2):
                        if h:
                            total = b.shl(total, v.constant(v.V16I, [8] * 16))
                        for i in chain:
                            total = v.dot_bytes(b, total, values[i], halves[h][i], four_bits=small)
                    totals[line].append(total)
            quarters = [total for line in totals for total in _quarter_totals(b, line)]
            if not small:
                quarters = [b.add(*quarters[i : i + 2]) for i in range(0, 8, 2)]

            def add_groups(sums_of_groups: list[Any]) -> None:
                groups = len(sums_of_groups)
                for g, total in enumerate(sums_of_groups):
                    at = b.mul(b.add(b.mul(loop.index, v.I64(groups)), v.I64(g)), v.I64(128))
                    x_at = b.mul(b.add(b.mul(block, v.I64(groups)), v.I64(g)), v.I64(4))
                    x_sum = _splat(b, b.add(x_sums, x_at), v.I32)
                    if not has_offsets:
                        total = b.sub(total, b.mul(v.load(b, b.add(zeros, at), v.V16I), x_sum))
                    scaled = b.fmul(b.sitofp(total, v.V16F), v.load(b, b.add(scales, at), v.V16F))
                    if has_offsets:
                        scaled = v.fused(b, b.sitofp(x_sum, v.V16F), v.load(b, b.add(zeros, at), v.V16F), scaled)
                    b.store(v.fused(b, scaled, _splat(b, b.add(x_scales, x_at), v.F32), b.load(product)), product)

            pairs = [b.add(*quarters[i : i + 2]) for i in (0, 2)]
            with b.if_else(b.icmp_signed("==", group_size, v.I64(64))) as (two, others):
                with two:
                    add_groups(pairs)
                with others, b.if_else(b.icmp_signed("==", group_size, v.I64(32))) as (four, one):
                    with four:
                        add_groups(quarters)
                    with one:
                        add_groups([b.add(*pairs)])
        v.store(b, b.load(product), sums)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 14, kind), codegen
