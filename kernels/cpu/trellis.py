"""Products with trellis weights on the CPU, and their rows dequantized.

    y[t, n] = (float32(D) * scale_w[n]) * scale_x[t], D = sum over K of level_w * code_x

The sum of each byte of the integers is exact; with several bytes float32(D) is put together from theirs in float32.

The activations are rotated and quantized with one scale per token (`rotation.py`), so the sums are over all of K. For one token the streams
of 128 rows are decoded in registers and multiplied at once; for more tokens their levels are written to the cache, 512 inputs at a time.
Both compute the formula above, so a token's result has the same bits alone, in any batch and on any number of threads.

Dimension letters: `T` tokens, `N` output features, `K` input features, `H` bytes of an integer.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from dbrx_q.kernels.formats.trellis import TrellisWeight
from dbrx_q.kernels.formats.trellis_codes import CODES

from . import rotation
from .addresses import call, clear, copy_vector, half_to_float, integer, store_float, store_integer
from .compiled import compiled, compiled_address, for_each
from .integer_tiles import row_tiles
from .trellis_decode import KINDS
from .trellis_tiles import decode_steps, multiply_levels, multiply_stream, scaled_sums, write_rows

__all__ = ["KINDS", "LARGEST_K", "PANEL", "ROWS", "decoder", "dequantize", "dequantize_rows", "few_rows", "many_rows", "scratch_bytes"]

ROWS = 128
"""Rows of a tile."""
LARGEST_K = 1 << 16
"""Most inputs whose sums of products of bytes fit 32 bits."""
PANEL = 256
"""Tokens whose sums a thread keeps while it goes along K."""
_CHUNK_STEPS = 128  # of four inputs, whose levels of 32 rows, and twelve rows of activations, fit the first-level cache together
_PAIR_BYTES = 128 * _CHUNK_STEPS
_TILE_BYTES = 512 + 4 * _PAIR_BYTES  # of the scales of 128 rows, and of the levels of a chunk


def scratch_bytes(tokens: int, code_bytes: int) -> int:
    """Bytes that a thread needs for products of a weight with at most so many tokens."""
    return 4 * _PAIR_BYTES + 2 * 512 + 128 + (min(tokens, PANEL) * code_bytes + row_tiles(code_bytes)[0]) * 512


@compiled()
def _load_scales(scales, rows, out):
    """float32 scales of at most 128 rows; rows that fill up the tile have 0."""
    clear(out, 8)
    for n in range(min(rows, 128)):
        half_to_float(scales + 2 * n, out + 4 * n)


@compiled()
def _store_outputs(values, out, rows):
    """Copy the results of at most 128 rows."""
    if rows >= 128:
        for i in range(8):
            copy_vector(values + 64 * i, out + 64 * i)
    else:
        for n in range(rows):
            store_float(values + 4 * n, out + 4 * n)


@cache
def decoder(format: str) -> int:
    """The address of a function of (streams, steps, levels): `decode_steps` with panels of a chunk for each 32 rows."""
    kind = KINDS[format]

    def decode(streams, steps, levels):
        decode_steps(streams, steps, levels, _PAIR_BYTES, kind)
        return 0

    return compiled_address(decode, 3)


@cache
def few_rows(format: str) -> int:
    """The address of the function that multiplies the rows of a task with one token, for `integer.multiply`."""
    kind, tile_bytes = KINDS[format], 16 * CODES[format].bits

    def few_rows(arguments, job, task):
        N, K, span = integer(arguments, 0), integer(arguments, 1), integer(arguments, 4)
        x, x_scales, x_sums, scratch = integer(arguments, 5), integer(arguments, 6), integer(arguments, 7), integer(task, 1)
        pair, x_pitch = integer(job, 5), integer(arguments, 10)
        x_row, out = integer(integer(arguments, 8), pair), integer(job, 4) + integer(integer(arguments, 9), pair) * N * 4
        scales, values, sums = scratch, scratch + 512, scratch + 1024
        top = integer(task, 0) * span
        for first in range(top, min(N, top + span), 128):
            streams = integer(job, 1) + first // 128 * (K * tile_bytes)
            multiply_stream(streams, K // 4, x + x_row * x_pitch * 2, x_pitch, sums, kind)
            _load_scales(integer(job, 2) + first * 2, N - first, scales)
            scaled_sums(sums, x_sums + x_row * 8, x_scales + x_row * 4, scales, values, 2)
            _store_outputs(values, out + first * 4, N - first)
        return 0

    return compiled_address(few_rows, 3)


@cache
def many_rows(code_bytes: int) -> int:
    """The address of the function that multiplies the rows of a task with several tokens, for `integer.multiply`; a job has a `decoder`."""
    tile_tokens, sum_bytes = row_tiles(code_bytes)[0] // code_bytes, 512 * code_bytes

    def many_rows(arguments, job, task):
        N, K, span = integer(arguments, 0), integer(arguments, 1), integer(arguments, 4)
        x, x_scales, x_sums, levels = integer(arguments, 5), integer(arguments, 6), integer(arguments, 7), integer(task, 1)
        x_rows, out_rows, x_pitch, bits = integer(arguments, 8), integer(arguments, 9), integer(arguments, 10), integer(arguments, 12)
        scales = levels + 4 * _PAIR_BYTES
        values, x_at = scales + 512, scales + 1024
        sums = x_at + 128
        top = integer(task, 0) * span
        for first in range(top, min(N, top + span), 128):
            streams = integer(job, 1) + first // 128 * (K * 16 * bits)
            _load_scales(integer(job, 2) + first * 2, N - first, scales)
            for begin in range(integer(job, 5), integer(job, 6), PANEL):
                end = min(integer(job, 6), begin + PANEL)
                clear(sums, 8 * code_bytes * (end - begin))
                for chunk in range(0, K // 4, _CHUNK_STEPS):
                    steps = min(_CHUNK_STEPS, K // 4 - chunk)
                    chunk_streams = streams + chunk * (64 * bits)
                    call(integer(job, 3), chunk_streams, steps, levels)
                    ahead, ahead_pitch = chunk_streams + steps * (64 * bits), 16 * bits  # a quarter of the next chunk with each 32 rows
                    for token in range(begin, end, tile_tokens):
                        for i in range(tile_tokens):
                            x_row = integer(x_rows, min(token + i, end - 1))
                            store_integer(x + x_row * (x_pitch * code_bytes) + chunk * 4, x_at + 8 * i)
                        for pair in range(4):
                            multiply_levels(
                                levels + pair * _PAIR_BYTES,
                                steps,
                                x_at,
                                x_pitch,
                                sums + (token - begin) * sum_bytes + 128 * pair,
                                min(tile_tokens, end - token),
                                ahead + pair * steps * ahead_pitch,
                                ahead_pitch,
                                code_bytes,
                            )
                        ahead, ahead_pitch = levels, 0  # prefetched once
                for token in range(begin, end):
                    x_row = integer(x_rows, token)
                    at = sums + (token - begin) * sum_bytes
                    scaled_sums(at, x_sums + x_row * (4 * code_bytes), x_scales + x_row * 4, scales, values, code_bytes)
                    out = integer(job, 4) + (integer(out_rows, token) * N + first) * 4
                    _store_outputs(values, out, N - first)
        return 0

    return compiled_address(many_rows, 3)


def dequantize_rows(weight: TrellisWeight, tile: torch.Tensor) -> None:
    """Dequantize a contiguous weight [N, K] into a tile [N, K] of bfloat16 or float32, in the basis of rotated activations."""
    N, K = weight.shape
    tiles = -(-N // ROWS)
    scratch = torch.empty(tiles * _TILE_BYTES, dtype=torch.uint8)
    addresses = (tensor.data_ptr() for tensor in (weight.qweight, weight.scales, tile, scratch))
    arguments = np.array([*addresses, N, K, weight.code.bits, decoder(weight.format)], np.int64)
    for_each(_dequantizer(int(tile.dtype == torch.bfloat16)), arguments.ctypes.data, tiles)


def dequantize(weight: TrellisWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The plain weight [N, K] of a contiguous one, with the float32 bits of the format's own `dequantize`."""
    values = torch.empty(*weight.shape)
    dequantize_rows(weight, values)
    rotation.rotate_back(values, weight.group_size)
    return values.to(dtype)


@cache
def _dequantizer(bfloat16: int) -> int:
    """The address of the function that dequantizes a tile to one dtype, for `for_each`."""
    size = 2 if bfloat16 else 4

    def dequantize_tile(arguments, tile, _):
        streams, scales, out = integer(arguments, 0), integer(arguments, 1), integer(arguments, 2)
        N, K, bits = integer(arguments, 4), integer(arguments, 5), integer(arguments, 6)
        own = integer(arguments, 3) + tile * _TILE_BYTES
        _load_scales(scales + tile * 256, N - tile * 128, own)
        for chunk in range(0, K // 4, _CHUNK_STEPS):
            steps = min(_CHUNK_STEPS, K // 4 - chunk)
            call(integer(arguments, 7), streams + (tile * K + chunk * 4) * 16 * bits, steps, own + 512)
            for step in range(0, steps, 16):
                to = out + (tile * 128 * K + (chunk + step) * 4) * size
                write_rows(own + 512 + 128 * step, _PAIR_BYTES, own, to, K * size, N - tile * 128, bfloat16)
        return 0

    return compiled_address(dequantize_tile, 3)
