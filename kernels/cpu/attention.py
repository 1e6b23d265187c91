"""Attention of few new tokens to a long KV cache on the CPU, read as it is stored.

The cache of a sequence is divided into chunks of `CHUNK` tokens. Each chunk of each key/value head is a task of its own, which reads the
chunk once for all query heads that share it (Dao et al. 2023, Flash-Decoding). The results of the chunks are added in the order of the
chunks, so that the sum has the same bits on any number of threads, and for a sequence alone and in a batch.

Dimension letters: `T` new tokens of all sequences, `B` sequences, `L` capacity of the cache in tokens, `H` query heads, `G` key/value
heads, `R` query heads that share a key/value head (H / G), `C` channels of a head.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import prange

from dbrx_q.kernels.formats.kv import KVLayer

from .attention_chunks import CHUNK, STORED, attend_to_chunk, combine_chunks
from .compiled import compiled
from .linear import use_threads

__all__ = ["attend"]


def attend(q: torch.Tensor, kv: KVLayer, counts: tuple[int, ...], ends: tuple[int, ...], rows: list[int]) -> torch.Tensor:
    """y [T, H, C] in the dtype of `q`, computed in float32.

    Args:
        q: [T, H, C], the rotated queries, one sequence after the other; float32, bfloat16 or float16.
        kv: the cache; a plain one has one of these dtypes. C is a multiple of 16, for int4 of 32.
        counts: new tokens of each sequence.
        ends: tokens of each sequence in the cache, its new ones included: at least one for each sequence with new tokens.
        rows: the row of the cache of each sequence.
    """
    (T, H, C), (_, G, L, _) = q.shape, kv.keys.shape
    out = torch.empty(T, H, C)
    sequences = np.array((counts, ends, rows), np.int64)
    parts = sum(count * -(-end // CHUNK) for count, end in zip(counts, ends, strict=True))
    queries = (q.float() * (math.log2(math.e) / math.sqrt(C))).contiguous()
    sums, stats = torch.empty(parts, H, C), torch.empty(parts, H, 2)
    key_scales, value_scales = (0 if scales is None else scales.data_ptr() for scales in (kv.key_scales, kv.value_scales))
    use_threads(2 * kv.keys[0, :, 0].nbytes * sum(count * end for count, end in zip(counts, ends, strict=True)))
    name = str(kv.keys.dtype).removeprefix("torch.") if kv.format == "plain" else kv.format
    _kernel(name)(
        queries.data_ptr(),
        kv.keys.data_ptr(),
        kv.values.data_ptr(),
        key_scales,
        value_scales,
        sequences,
        G,
        H // G,
        C,
        L,
        sums.data_ptr(),
        stats.data_ptr(),
        out.data_ptr(),
    )
    return out.to(q.dtype)


@cache
def _kernel(name: str) -> Any:
    """The kernel for a cache that is stored as `STORED[name]`."""
    stored = STORED[name]
    code, token_eighths, scale_bytes = stored.code, stored.unit_bytes // stored.parts // 2, 2 * stored.scales

    def attention(q, keys, values, key_scales, value_scales, sequences, G, R, C, L, parts, stats, out):
        """All arguments but `sequences`, int64 [3, B], are addresses and counts."""
        B, H, row_bytes = sequences.shape[1], G * R, C * token_eighths // 8
        tasks, tokens = 0, 0
        for b in range(B):
            count = sequences[0, b]
            tasks += G * ((sequences[1, b] + CHUNK - 1) // CHUNK) if count else 0
            tokens += count
        for task in prange(tasks):
            b, left, part, token = 0, task, 0, 0
            count, end = sequences[0, 0], sequences[1, 0]
            chunks = (end + CHUNK - 1) // CHUNK if count else 0
            while left >= chunks * G:
                left -= chunks * G
                part += chunks * count
                token += count
                b += 1
                count, end = sequences[0, b], sequences[1, b]
                chunks = (end + CHUNK - 1) // CHUNK if count else 0
            g, first = left // chunks, left % chunks * CHUNK
            part += left % chunks * count
            stored = (sequences[2, b] * G + g) * L + first
            k, ks = keys + stored * row_bytes, key_scales + stored * scale_bytes
            x, xs = values + stored * row_bytes, value_scales + stored * scale_bytes
            for s in range(count):
                n = min(CHUNK, end - count + s + 1 - first)
                if n > 0:
                    r = 0
                    while r < R:
                        row = g * R + r
                        qr = q + ((token + s) * H + row) * C * 4
                        pr, sr = parts + ((part + s) * H + row) * C * 4, stats + ((part + s) * H + row) * 8
                        if r + 6 <= R:
                            attend_to_chunk(qr, k, x, ks, xs, n, C, pr, sr, code, 6)
                            r += 6
                        else:
                            attend_to_chunk(qr, k, x, ks, xs, n, C, pr, sr, code, 1)
                            r += 1
        for query in prange(tokens * H):
            b, s, row, part = 0, query // H, query % H, 0
            while s >= sequences[0, b]:
                s -= sequences[0, b]
                part += (sequences[1, b] + CHUNK - 1) // CHUNK * sequences[0, b]
                b += 1
            count = sequences[0, b]
            chunks = (sequences[1, b] - count + s + CHUNK) // CHUNK
            at = (part + s) * H + row
            combine_chunks(parts + at * C * 4, stats + at * 8, chunks, count * H, C, out + query * C * 4)

    return compiled(parallel=True)(attention)
