"""Products of packed weights with quantized activations: exact integer sums, scaled once per unit of 32 to 128 elements along K.

    y[t, n] = sum over the units u, in order, of (scale_w[n, u] * float32(D)) * scale_x[t, u], each step rounded once (fused multiply-add),
    D = sum over the unit of (code_w - zero-point) * code_x

In a format with offsets the sum of the unit's code_x times the offset is added before scale_x:

    fma(float32(sum of code_x), offset_w[n, u], scale_w[n, u] * float32(D)), D = sum over the unit of code_w * code_x

For one token the rows are read as they lie: a lane holds neighbours along K, and sixteen rows are summed across lanes together. For more
tokens, sixteen rows are decoded into vectors whose lanes are rows (`row_codes.py`), which every token multiplies from the cache: 32 rows by
up to twelve rows of activations have their sums in registers. Both compute the formula above, so a token's result has the same bits alone,
in any batch and on any number of threads. Threads take the next task when they are done with one, so a thread on a busy core takes fewer.

Dimension letters: `T` tokens, `N` output features, `K` input features, `G` group size, `U` unit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numba
import numpy as np
import torch
from numba import prange

from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight
from dbrx_q.kernels.formats.trellis import TrellisWeight

from . import trellis
from .activations import QuantizedActivations
from .addresses import call, clear, copy_vector, integer, next_task, store_float, store_integer
from .compiled import compiled, compiled_address
from .integer_tiles import multiply_one, multiply_tile, row_tiles
from .row_codes import BLOCK, KINDS, RowCodes, int8_block, nibble_block, row_scales, uint8_block

__all__ = ["Job", "multiply"]

_ROWS = 32  # rows of a weight that are multiplied together
_CHUNK = 512  # elements along K whose codes, 32 rows of them, and twelve rows of activations fit the first-level cache together
_PANEL = 512  # tokens whose sums a thread keeps while it goes along K
_JOB_BYTES = 56  # of the numbers that describe a matrix
_SPANS = (512, 256, 128, 64, 32)  # rows of a task: the most with which every thread gets eight tasks


@dataclass(frozen=True)
class Job:
    """What `multiply` computes for some matrices of one weight: those of experts, or the only one."""

    weight: QuantizedWeight
    """[E, N, K] or [N, K] with contiguous matrices, in a format of `row_codes.FORMATS` or of `trellis.KINDS`."""
    matrices: Sequence[int]
    """Which of the E."""
    out: torch.Tensor
    """float32, contiguous, N columns."""


def multiply(x: QuantizedActivations, jobs: Sequence[Job], offsets: Sequence[int], x_rows: np.ndarray, out_rows: np.ndarray) -> None:
    """Multiply pairs of a token and a matrix: out[out_rows[p]] = x[x_rows[p]] @ matrix.T, on numba's current number of threads.

    Args:
        x: quantized in units that divide the weights' groups; for trellis weights rotated, and quantized with one scale per token.
        jobs: of weights of one format, shape and group size, with equally many matrices.
        offsets: the pairs of matrix i are those from offsets[i] to offsets[i + 1], the same for each job.
        x_rows, out_rows: int64 [P].
    """
    weight = jobs[0].weight
    N, K = weight.shape[-2:]
    group_size, code_bytes, unit = weight.group_size, x.codes.shape[1], x.unit
    few, many, one_token = _functions(weight, x)
    rows_of_table = []
    for job in jobs:
        parts, out = job.weight.parts, job.out.data_ptr()
        codes, scales = parts["qweight"], parts["scales"]
        zeros = parts.get("zeros", parts.get("offsets", scales))
        bases = [(part.data_ptr(), part.stride(0) * part.element_size() if part.dim() == 3 else 0) for part in (codes, scales, zeros)]
        if isinstance(job.weight, TrellisWeight):
            bases[2] = trellis.decoder(job.weight.format), 0
        for matrix, begin, end in zip(job.matrices, offsets[:-1], offsets[1:], strict=True):
            function = few() if one_token and end - begin == 1 else many()
            rows_of_table.append((function, *(base + matrix * pitch for base, pitch in bases), out, begin, end))
    threads = numba.get_num_threads()
    longest = max(end - begin for begin, end in itertools.pairwise(offsets))
    nbytes = _CHUNK * _ROWS + K // group_size * 256 + 384 + (min(_PANEL, longest) + row_tiles(code_bytes)[0]) * 128
    least, bits = _ROWS, 0
    if isinstance(weight, TrellisWeight):
        nbytes, least, bits = trellis.scratch_bytes(longest, code_bytes), trellis.ROWS, weight.code.bits
    scratch = torch.empty(threads * (nbytes + 16) + 64, dtype=torch.uint8)
    base = -(-scratch.data_ptr() // 64) * 64
    span = next((span for span in _SPANS if len(rows_of_table) * N >= 8 * span * threads), least)
    span = max(span, least)
    rows = x_rows.ctypes.data, out_rows.ctypes.data
    arguments = np.array(
        [N, K, group_size, unit, span, *(t.data_ptr() for t in (x.codes, x.scales, x.sums)), *rows, x.pitch, 0, bits], np.int64
    )
    table = np.array(rows_of_table, np.int64)
    assert table.strides[0] == _JOB_BYTES
    at = arguments.ctypes.data
    _run(at, table.ctypes.data, len(table), -(-N // span), base + threads * nbytes, base, nbytes, at + 88, threads)


def _functions(weight: QuantizedWeight, x: QuantizedActivations) -> tuple[Callable[[], int], Callable[[], int], bool]:
    """What multiplies one token and several tokens, as functions that return addresses, and whether the first takes such activations."""
    code_bytes = x.codes.shape[1]
    if weight.format in trellis.KINDS:
        return partial(trellis.few_rows, weight.format), partial(trellis.many_rows, code_bytes), code_bytes == 2
    kind = KINDS[weight.format]
    return partial(_few_rows, kind), partial(_many_rows, kind, code_bytes), code_bytes == 2 and x.unit == weight.group_size


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
def _few_rows(kind: int) -> int:
    """The address of the function that multiplies the rows of a task with one token, for a kind of `RowCodes`."""
    codes_of_rows = RowCodes.of_kind(kind)
    block_bytes, zero_bits = codes_of_rows.block_bytes, codes_of_rows.zero_bits

    def few_rows(arguments, job, task):
        N, K, group_size, span = integer(arguments, 0), integer(arguments, 1), integer(arguments, 2), integer(arguments, 4)
        x, x_scales, x_sums, scratch = integer(arguments, 5), integer(arguments, 6), integer(arguments, 7), integer(task, 1)
        pair = integer(job, 5)
        x_row, out = integer(integer(arguments, 8), pair), integer(job, 4) + integer(integer(arguments, 9), pair) * N * 4
        groups, row_blocks = K // group_size, K // BLOCK
        code_pitch, zero_pitch = row_blocks * block_bytes, (groups * zero_bits + 7) // 8
        x_pitch = integer(arguments, 10)
        x_codes, x_units = x + x_row * x_pitch * 2, x_row * groups * 4
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
                    zeros = zero_row + group * zero_bits // 8
                    row_scales(scale_row + group * 2, zeros, count, groups, last, scales, scales + 64, kind)
                    multiply_one(
                        codes,
                        code_pitch,
                        last,
                        begin,
                        blocks,
                        row_blocks,
                        scales,
                        scales + 64,
                        x_codes,
                        x_pitch,
                        x_scales + x_units,
                        x_sums + x_units,
                        sums + 64 * j,
                        group_size,
                        kind,
                    )
            _store_sums(sums, out + first * 4, N - first)
        return 0

    return compiled_address(few_rows, 3)


@cache
def _many_rows(kind: int, code_bytes: int) -> int:
    """The address of the function that multiplies the rows of a task with several tokens, for kinds of `RowCodes` and of activations."""
    tile_tokens, sum_bytes = row_tiles(code_bytes)[0] // code_bytes, 8 if code_bytes == 3 else 4
    codes_of_rows = RowCodes.of_kind(kind)
    nibbles, bits, has_offsets = codes_of_rows.nibbles, codes_of_rows.bits, codes_of_rows.offsets is not None
    block_bytes, zero_bits = codes_of_rows.block_bytes, codes_of_rows.zero_bits
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
        x_rows, out_rows, x_pitch = integer(arguments, 8), integer(arguments, 9), integer(arguments, 10)
        groups, units, row_blocks = K // group_size, K // unit, K // BLOCK
        code_pitch, zero_pitch = row_blocks * block_bytes, (groups * zero_bits + 7) // 8
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
                row_scales(scale_row, zero_row, groups, groups, last, to, to + 64, kind)
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
                            if nibbles:
                                nibble_block(base, code_pitch, last, chunk + i, to, bits)
                            elif has_offsets:
                                uint8_block(base, code_pitch, last, chunk + i, to)
                            else:
                                int8_block(base, code_pitch, last, chunk + i, to)
                    # After the last chunk of these rows come the next 32 rows.
                    following = chunk + blocks if chunk + blocks < row_blocks else _ROWS * row_blocks
                    ahead, ahead_pitch = integer(job, 1) + first * code_pitch + following * block_bytes, code_pitch
                    group_at, first_unit = chunk * BLOCK // group_size * 128, chunk * BLOCK // unit
                    for pair in range(begin, end, tile_tokens):
                        for i in range(tile_tokens):
                            x_row = integer(x_rows, min(pair + i, end - 1))
                            x_unit = x_row * units + first_unit
                            store_integer(x + x_row * (x_pitch * code_bytes) + chunk * BLOCK, x_at + 8 * i)
                            store_integer(x_scales + x_unit * 4, x_at + 128 + 8 * i)
                            store_integer(x_sums + x_unit * sum_bytes, x_at + 256 + 8 * i)
                        multiply_tile(
                            codes,
                            scales + group_at,
                            zeros + group_at,
                            groups * 128,
                            blocks * BLOCK // unit,
                            x_at,
                            x_pitch,
                            sums + (pair - begin) * 128,
                            min(tile_tokens, end - pair),
                            ahead,
                            ahead_pitch,
                            unit,
                            group_size,
                            code_bytes,
                            kind,
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
