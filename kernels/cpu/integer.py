"""Products of packed weights with quantized activations: exact integer sums, scaled once per unit of 32 to 128 elements along K.

    y[t, n] = sum over the units u, in order, of (scale_w[n, u] * float32(D)) * scale_x[t, u], each step rounded once (fused multiply-add),
    D = sum over the unit of (code_w - zero-point) * code_x

For one token the rows are read as they lie: a lane holds neighbours along K, and sixteen rows are summed across lanes together. For more
tokens, sixteen rows are decoded into vectors whose lanes are rows (`row_codes.py`), which every token multiplies from the cache: 32 rows by
up to twelve rows of activations have their sums in registers. Both compute the formula above, so a token's result has the same bits alone,
in any batch and on any number of threads. Threads take the next task when they are done with one: a busy core holds nobody up.

Dimension letters: `T` tokens, `N` output features, `K` input features, `G` group size, `U` unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight

from . import vector as v
from .activations import QuantizedActivations
from .addresses import call, clear, copy_vector, integer, next_task, store_float, store_integer
from .compiled import compiled, compiled_address
from .row_codes import BLOCK, FORMATS, int4_block, int8_block, row_scales

__all__ = ["Product", "multiply"]

_ROWS = 32  # rows of a weight that are multiplied together
_CHUNK = 512  # elements along K whose codes, 32 rows of them, and twelve rows of activations fit the first-level cache together
_PANEL = 512  # tokens whose sums a thread keeps while it goes along K
_JOB_BYTES = 56  # of the numbers that describe a matrix
_SPAN = 128  # rows of a task, where there are enough for every thread to get several
_BLOCKS_AHEAD = 4  # blocks that a single token's rows are prefetched ahead; see docs/notes/cpu-kernels.md


def _row_tiles() -> tuple[int, ...]:
    """Rows of activations that are multiplied together, most first: as many as have registers for their sums."""
    return (12, 8, 4) if "avx512f" in v.chip_features() else (2,)


@dataclass(frozen=True)
class Product:
    """What `multiply` computes for some matrices of one weight: those of experts, or the only one."""

    weight: QuantizedWeight
    """[E, N, K] or [N, K] with contiguous matrices, in a format of `row_codes.FORMATS`."""
    matrices: Sequence[int]
    """Which of the E."""
    out: torch.Tensor
    """float32, contiguous, N columns."""


def multiply(x: QuantizedActivations, products: Sequence[Product], offsets: Sequence[int], x_rows: np.ndarray, out_rows: np.ndarray) -> None:
    """Multiply pairs of a token and a matrix: out[out_rows[p]] = x[x_rows[p]] @ matrix.T, on numba's current number of threads.

    Args:
        x: quantized in units that divide the weights' groups.
        products: of weights of one format, shape and group size, with equally many matrices.
        offsets: the pairs of matrix i are those from offsets[i] to offsets[i + 1], the same for each product.
        x_rows, out_rows: int64 [P].
    """
    weight = products[0].weight
    N, K = weight.shape[-2:]
    group_size, halves, unit = weight.group_size, x.codes.shape[1], x.unit
    four_bits, one_token = int(FORMATS[weight.format].four_bits), halves == 2 and unit == group_size
    jobs = []
    for product in products:
        parts, out = product.weight.parts, product.out.data_ptr()
        codes, scales = parts["qweight"], parts["scales"]
        zeros = parts.get("zeros", scales)
        bases = [(part.data_ptr(), part.stride(0) * part.element_size() if part.dim() == 3 else 0) for part in (codes, scales, zeros)]
        for matrix, begin, end in zip(product.matrices, offsets, offsets[1:], strict=False):
            function = _few_rows(four_bits) if one_token and end - begin == 1 else _many_rows(four_bits, halves)
            jobs.append((function, *(base + matrix * pitch for base, pitch in bases), out, begin, end))
    threads = numba.get_num_threads()
    longest = min(_PANEL, max(end - begin for begin, end in zip(offsets, offsets[1:], strict=False)))
    nbytes = _CHUNK * _ROWS + K // group_size * 256 + 384 + (longest + _row_tiles()[0]) * 128
    scratch = torch.empty(threads * (nbytes + 16) + 64, dtype=torch.uint8)
    base = -(-scratch.data_ptr() // 64) * 64
    span = _SPAN if len(jobs) * N >= 8 * _SPAN * threads else _ROWS
    rows = x_rows.ctypes.data, out_rows.ctypes.data
    arguments = np.array([N, K, group_size, unit, span, *(t.data_ptr() for t in (x.codes, x.scales, x.sums)), *rows, 0])
    table = np.array(jobs)
    assert table.strides[0] == _JOB_BYTES
    at = arguments.ctypes.data
    _run(at, table.ctypes.data, len(jobs), -(-N // span), base + threads * nbytes, base, nbytes, at + 80, threads)


def _splat(b: Any, address: Any, kind: Any) -> Any:
    return v.broadcast(b, b.load(b.inttoptr(address, kind.as_pointer()), align=1), [0] * 16)


@intrinsic(prefer_literal=True)
def _multiply_tile(
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
    halves,
    four_bits,
):
    """sums float32 [tokens, 2, 16] += the products of one chunk along K. The last two arguments are literals.

    codes: uint8 [units * U / 4, 2, 64]; scales, zeros: as `row_scales` writes those of the first sixteen rows, `second` bytes before those
    of the others; x_at: address of the addresses of each token's codes, 128 bytes before those of its scales and 256 before those of its
    sums; x_pitch: bytes from the first to the second half of a token's codes. `tokens` is at most that of the largest tile; the addresses
    of tokens up to the next tile are valid. ahead: address of the chunk of the weight that
    is prefetched, `pitch` bytes from row to row: spread over the products, the reads do not wait for each other.
    """
    if not all(isinstance(literal, types.IntegerLiteral) for literal in (halves, four_bits)):
        return None
    H, small = halves.literal_value, bool(four_bits.literal_value)

    def tile(b: Any, rows: int, args: Any) -> None:
        codes, scales, zeros, second, units, x_at, x_pitch, sums = args[:8]

        def address(table: Any, token: int) -> Any:
            return b.load(b.inttoptr(b.add(table, v.I64(8 * token)), v.I64.as_pointer()))

        ahead, pitch, unit_size, group_size = args[9:13]
        lines = 1 if small else 2  # of 64 bytes to prefetch in a step: a row's share of a chunk has four times as many
        tokens = rows // H
        x_rows = [b.add(address(x_at, r // H), b.mul(x_pitch, v.I64(r % H))) for r in range(rows)]
        x_scales, x_sums = ([address(b.add(x_at, v.I64(offset)), t) for t in range(tokens)] for offset in (128, 256))
        totals = [[cgutils.alloca_once(b, v.V16I) for _ in range(2)] for _ in range(rows)]
        steps, units_of_group = b.lshr(unit_size, v.I64(2)), b.udiv(group_size, unit_size)
        nothing = ir.Constant(v.V16I, None)
        with cgutils.for_range(b, units) as unit:
            group_at = b.mul(b.udiv(unit.index, units_of_group), v.I64(128))
            places = [group_at, b.add(group_at, second)]
            excess = [b.sub(nothing, v.load(b, b.add(zeros, places[j]), v.V16I)) for j in range(2)]
            for t in range(tokens):
                x_sum = _splat(b, b.add(x_sums[t], b.mul(unit.index, v.I64(4))), v.I32)
                for j in range(2):
                    for h in range(H):
                        b.store(nothing if h < H - 1 else b.mul(excess[j], x_sum), totals[t * H + h][j])
            first = b.mul(unit.index, steps)
            with cgutils.for_range(b, steps) as step:
                k = b.add(first, step.index)
                line_at = b.add(b.mul(b.lshr(k, v.I64(2)), pitch), b.mul(b.and_(k, v.I64(3)), v.I64(64 * lines)))
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
                    total = b.load(totals[t * H + H - 1][j])
                    if H == 2:
                        total = b.add(b.shl(b.load(totals[t * H][j]), v.constant(v.V16I, [8] * 16)), total)
                    to = b.add(sums, v.I64(128 * t + 64 * j))
                    scaled = b.fmul(b.sitofp(total, v.V16F), scale[j])
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

        choose(_row_tiles())
        return context.get_dummy_value()

    return types.void(*[types.intp] * 13, halves, four_bits), codegen


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
def _multiply_one(
    typing_context, codes, pitch, last, begin, blocks, row_blocks, scales, zeros, x, x_scales, x_sums, sums, group_size, four_bits
):
    """sums float32 [16] += the products of sixteen rows with one token, over `blocks` blocks from the block `begin`; the last argument is a
    literal.

    codes: address of the first row; pitch, row_blocks: bytes and blocks of a row; last: the last row, which those after it repeat; scales,
    zeros: as `row_scales` writes them, from the block `begin`; x: a token's codes in two halves, quantized in units of a group.
    """
    if not isinstance(four_bits, types.IntegerLiteral):
        return None
    small = bool(four_bits.literal_value)
    lines = 1 if small else 2  # of 64 bytes in a block of 128 elements

    def codegen(context, b, signature, args):
        codes, pitch, last, begin, blocks, row_blocks, scales, zeros, x, x_scales, x_sums, sums, group_size, _ = args
        K = b.mul(row_blocks, v.I64(BLOCK))
        rows = [b.add(codes, b.mul(b.select(b.icmp_signed("<", v.I64(row), last), v.I64(row), last), pitch)) for row in range(16)]
        product = cgutils.alloca_once(b, v.V16F)
        b.store(v.load(b, sums, v.V16F), product)
        next_rows = b.mul(pitch, v.I64(16))
        with cgutils.for_range(b, blocks) as loop:
            block = b.add(begin, loop.index)
            halves = []  # the activations of the block in the order of the codes
            for h in range(2):
                at = b.add(b.add(x, b.mul(K, v.I64(h))), b.mul(block, v.I64(BLOCK)))
                words = [v.load(b, b.add(at, v.I64(64 * i)), v.V16I) for i in range(2)]
                if small:
                    words = [b.shuffle_vector(*words, v.constant(v.V16I, list(range(i, 32, 2)))) for i in range(2)]
                halves.append([b.bitcast(word, v.V64) for word in words])
            line_at = b.mul(block, v.I64(64 * lines))
            # After the last block of these rows come the next sixteen rows.
            ahead = b.add(block, v.I64(_BLOCKS_AHEAD))
            over = b.icmp_signed(">=", ahead, row_blocks)
            ahead = b.mul(b.select(over, b.sub(ahead, row_blocks), ahead), v.I64(64 * lines))
            ahead = b.add(ahead, b.select(over, next_rows, v.I64(0)))
            totals: list[list[Any]] = [[] for _ in range(lines)]
            for row in range(16):
                values = []
                for line in range(lines):
                    v.prefetch(b, b.add(b.add(rows[row], ahead), v.I64(64 * line)))
                    loaded = v.load(b, b.add(b.add(rows[row], line_at), v.I64(64 * line)), v.V64)
                    if small:
                        shifted = b.bitcast(b.lshr(b.bitcast(loaded, v.V16I), v.constant(v.V16I, [4] * 16)), v.V64)
                        low = v.constant(v.V64, [15] * 64)
                        values += [b.and_(loaded, low), b.and_(shifted, low)]
                    else:
                        values.append(b.xor(loaded, v.constant(v.V64, [-128] * 64)))
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
                    excess = b.mul(v.load(b, b.add(zeros, at), v.V16I), _splat(b, b.add(x_sums, x_at), v.I32))
                    scaled = b.fmul(b.sitofp(b.sub(total, excess), v.V16F), v.load(b, b.add(scales, at), v.V16F))
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

    return types.void(*[types.intp] * 13, four_bits), codegen


@compiled()
def _store_sums(sums, out, rows):
    """Copy the sums of at most 32 rows."""
    if rows >= _ROWS:
        copy_vector(sums, out)
        copy_vector(sums + 64, out + 64)
    else:
        for n in range(rows):
            store_float(sums + 4 * n, out + 4 * n)


@cache
def _few_rows(four_bits: int) -> int:
    """The address of the function that multiplies the rows of a task with one token, for a format."""
    per_byte = 2 if four_bits else 1

    def few_rows(arguments, job, task):
        N, K, group_size, span = integer(arguments, 0), integer(arguments, 1), integer(arguments, 2), integer(arguments, 4)
        x, x_scales, x_sums, scratch = integer(arguments, 5), integer(arguments, 6), integer(arguments, 7), integer(task, 1)
        pair = integer(job, 5)
        x_row, out = integer(integer(arguments, 8), pair), integer(job, 4) + integer(integer(arguments, 9), pair) * N * 4
        groups, row_blocks = K // group_size, K // BLOCK
        code_pitch, zero_pitch = K // per_byte, (groups + 1) // 2
        x_codes, x_units = x + x_row * K * 2, x_row * groups * 4
        scales, sums, scale_blocks = scratch, scratch + 16 * 128, 16 * group_size // BLOCK
        top = integer(task, 0) * span
        for first in range(top, min(N, top + span), _ROWS):
            clear(sums, 2)
            for j in range(2):
                row = min(first + 16 * j, N - 1)
                last = min(15, N - 1 - row)
                codes, scale_row = integer(job, 1) + row * code_pitch, integer(job, 2) + row * groups * 2
                zero_row = integer(job, 3) + row * zero_pitch
                for begin in range(0, row_blocks, scale_blocks):
                    blocks = min(scale_blocks, row_blocks - begin)
                    group, count = begin * BLOCK // group_size, blocks * BLOCK // group_size
                    row_scales(scale_row + group * 2, zero_row + group // 2, count, groups, last, scales, scales + 64, four_bits)
                    _multiply_one(
                        codes,
                        code_pitch,
                        last,
                        begin,
                        blocks,
                        row_blocks,
                        scales,
                        scales + 64,
                        x_codes,
                        x_scales + x_units,
                        x_sums + x_units,
                        sums + 64 * j,
                        group_size,
                        four_bits,
                    )
            _store_sums(sums, out + first * 4, N - first)
        return 0

    return compiled_address(few_rows, 3)


@cache
def _many_rows(four_bits: int, halves: int) -> int:
    """The address of the function that multiplies the rows of a task with several tokens, for a format and a kind of activations."""
    tile_tokens = _row_tiles()[0] // halves
    per_byte = 2 if four_bits else 1
    chunk_blocks = _CHUNK // BLOCK

    def many_rows(arguments, job, task):
        N, K, group_size, unit, span = (
            integer(arguments, 0),
            integer(arguments, 1),
            integer(arguments, 2),
            integer(arguments, 3),
            integer(arguments, 4),
        )
        x, x_scales, x_sums, codes = integer(arguments, 5), integer(arguments, 6), integer(arguments, 7), integer(task, 1)
        x_rows, out_rows = integer(arguments, 8), integer(arguments, 9)
        groups, units, row_blocks = K // group_size, K // unit, K // BLOCK
        code_pitch, zero_pitch = K // per_byte, (groups + 1) // 2
        scales = codes + _CHUNK * _ROWS
        zeros, x_at = scales + 64, scales + groups * 256
        sums = x_at + 384
        top = integer(task, 0) * span
        for first in range(top, min(N, top + span), _ROWS):
            for j in range(2):
                row = min(first + 16 * j, N - 1)
                last = min(15, N - 1 - row)
                scale_row, zero_row = integer(job, 2) + row * groups * 2, integer(job, 3) + row * zero_pitch
                to = scales + groups * 128 * j
                row_scales(scale_row, zero_row, groups, groups, last, to, to + 64, four_bits)
            for begin in range(integer(job, 5), integer(job, 6), _PANEL):
                end = min(integer(job, 6), begin + _PANEL)
                clear(sums, 2 * (end - begin))
                for chunk in range(0, row_blocks, chunk_blocks):
                    blocks = min(chunk_blocks, row_blocks - chunk)
                    for j in range(2):
                        row = min(first + 16 * j, N - 1)
                        last = min(15, N - 1 - row)
                        base = integer(job, 1) + row * code_pitch
                        for i in range(blocks):
                            to = codes + i * (_ROWS * BLOCK) + 64 * j
                            if four_bits:
                                int4_block(base, code_pitch, last, chunk + i, to)
                            else:
                                int8_block(base, code_pitch, last, chunk + i, to)
                    # After the last chunk of these rows come the next 32 rows.
                    following = chunk + blocks if chunk + blocks < row_blocks else _ROWS * row_blocks
                    ahead, ahead_pitch = integer(job, 1) + first * code_pitch + following * (BLOCK // per_byte), code_pitch
                    group_at, first_unit = chunk * BLOCK // group_size * 128, chunk * BLOCK // unit
                    for pair in range(begin, end, tile_tokens):
                        for i in range(tile_tokens):
                            x_row = integer(x_rows, min(pair + i, end - 1))
                            x_unit = (x_row * units + first_unit) * 4
                            store_integer(x + x_row * (K * halves) + chunk * BLOCK, x_at + 8 * i)
                            store_integer(x_scales + x_unit, x_at + 128 + 8 * i)
                            store_integer(x_sums + x_unit, x_at + 256 + 8 * i)
                        _multiply_tile(
                            codes,
                            scales + group_at,
                            zeros + group_at,
                            groups * 128,
                            blocks * BLOCK // unit,
                            x_at,
                            K,
                            sums + (pair - begin) * 128,
                            min(tile_tokens, end - pair),
                            ahead,
                            ahead_pitch,
                            unit,
                            group_size,
                            halves,
                            four_bits,
                        )
                        ahead, ahead_pitch = codes, 0  # prefetched once
                for pair in range(begin, end):
                    out = integer(job, 4) + (integer(out_rows, pair) * N + first) * 4
                    _store_sums(sums + (pair - begin) * 128, out, N - first)
        return 0

    return compiled_address(many_rows, 3)


@compiled(parallel=True)
def _run(arguments, jobs, n_jobs, spans, tasks, scratch, thread_bytes, counter, threads):
    """Each thread takes the next task, calls the function of its job, and so on; all arguments are addresses and counts."""
    for thread in prange(threads):
        own = tasks + 16 * thread
        store_integer(scratch + thread * thread_bytes, own + 8)
        task = next_task(counter)
        while task < n_jobs * spans:
            job = jobs + task // spans * _JOB_BYTES
            store_integer(task % spans, own)
            call(integer(job, 0), arguments, job, own)
            task = next_task(counter)
