"""Attention of new tokens that may follow cached ones, in Triton: causal flash attention over a cache (Dao 2023, FlashAttention-2).

Dimension letters: `T` new tokens of all sequences, `B` sequences, `L` capacity in tokens, `H` query heads, `G` key/value heads, `C`
channels of a head; of tiles: `BM` queries, `BL` tokens of the cache, `W` channels of one part as in `triton/attention_decode.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dbrx_q.kernels.formats.kv import KVLayer

from .attention_tiles import prefill_tiles
from .codes import CODES, INT8, PLAIN
from .kv import as_loaded, channels, int4_parts, int8_parts, scales_of
from .launch import chip_of, launch

__all__ = ["prefill", "prefill_kernel"]


def prefill(
    q: torch.Tensor, cache: KVLayer, starts: torch.Tensor, lengths: torch.Tensor, rows: torch.Tensor | None, longest: int
) -> torch.Tensor:
    """y [T, H, C]; `starts`, `lengths` and `rows` as in `Sequences`; `longest` is the largest count of new tokens."""
    _, H, C = q.shape
    _, G, L, _ = cache.keys.shape
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    chip = chip_of(q.device)
    tiles = prefill_tiles(cache.format, C, chip)
    launch(
        prefill_kernel,
        (triton.cdiv(longest, tiles.queries), H, lengths.shape[0]),
        q.contiguous(),
        cache.keys,
        cache.values,
        cache.keys if cache.key_scales is None else cache.key_scales,
        cache.values if cache.value_scales is None else cache.value_scales,
        starts,
        lengths,
        lengths if rows is None else rows,
        y,
        C**-0.5 * 1.4426950408889634,
        L,
        H=H,
        G=G,
        C=C,
        BM=tiles.queries,
        BL=tiles.tokens,
        ROWS=rows is not None,
        FORMAT=CODES[cache.format],
        FAST=chip.vendor == "cuda",
        warps=tiles.warps,
        stages=tiles.stages,
    )
    return y


@triton.jit(do_not_specialize=["scale", "L"])
def prefill_kernel(
    q,  # [T, H, C]
    keys,  # [rows of the cache, G, L, C or C / 2]
    values,
    key_scales,  # [rows of the cache, G, L] or [rows of the cache, G, L, 2]
    value_scales,
    starts,  # [B + 1]
    lengths,  # [B]
    rows,  # [B]
    y,  # [T, H, C]
    scale,  # of the scores, in base 2
    L,
    H: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
    BL: tl.constexpr,
    ROWS: tl.constexpr,
    FORMAT: tl.constexpr,
    FAST: tl.constexpr,
):
    PARTS: tl.constexpr = 1 if FORMAT == PLAIN else 2 if FORMAT == INT8 else 4
    W: tl.constexpr = C // PARTS
    head, sequence = tl.program_id(1), tl.program_id(2)
    start, end = tl.load(starts + sequence), tl.load(lengths + sequence)
    count = tl.load(starts + sequence + 1) - start
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM  # tiles with the most work are first
    if first >= count:
        return
    row = sequence
    if ROWS:
        row = tl.load(rows + sequence)
        end = tl.where(row < 0, 0, end)
        row = tl.maximum(row, 0)
    queries = first + tl.arange(0, BM)
    valid = (queries < count)[:, None]
    positions = end - count + queries  # in the sequence
    place = (start + queries).to(tl.int64)[:, None] * (H * C) + head * C

    q0 = tl.load(q + place + channels(0, C, FORMAT)[None, :], mask=valid, other=0.0)  # [BM, W]
    q1, q2, q3 = q0, q0, q0
    total = tl.sum(q0.to(tl.float32), 1)  # [BM]
    if PARTS > 1:
        q1 = tl.load(q + place + channels(1, C, FORMAT)[None, :], mask=valid, other=0.0)
    if PARTS > 2:
        q2 = tl.load(q + place + channels(2, C, FORMAT)[None, :], mask=valid, other=0.0)
        q3 = tl.load(q + place + channels(3, C, FORMAT)[None, :], mask=valid, other=0.0)
        total += tl.sum(q1.to(tl.float32), 1) + tl.sum(q2.to(tl.float32), 1) + tl.sum(q3.to(tl.float32), 1)

    base = (row * G + head // (H // G)).to(tl.int64) * L
    if FORMAT == PLAIN:
        keys += base * C
        values += base * C
    else:
        keys = keys.to(tl.pointer_type(tl.int16)) + base * (C // 2 if FORMAT == INT8 else C // 4)
        values = values.to(tl.pointer_type(tl.int16)) + base * (C // 2 if FORMAT == INT8 else C // 4)
        key_scales += base * (1 if FORMAT == INT8 else 2)
        value_scales += base * (1 if FORMAT == INT8 else 2)

    peak = tl.full((BM,), -float("inf"), tl.float32)
    mass = tl.zeros((BM,), tl.float32)
    least = tl.zeros((BM,), tl.float32)
    a0 = tl.zeros((BM, W), tl.float32)
    a1, a2, a3 = a0, a0, a0
    seen = tl.maximum(tl.minimum(end - count + first + BM, end), 0)  # tokens that any query of the tile attends to
    clear = tl.minimum(tl.maximum(end - count + first + 1, 0), seen) // BL  # blocks that all queries attend to as a whole
    for MASKED in tl.static_range(2):
        for block in range(clear if MASKED else 0, tl.cdiv(seen, BL) if MASKED else clear):
            tokens = block * BL + tl.arange(0, BL)
            at_k = tokens[None, :] * W + tl.arange(0, W)[:, None]
            at_v = tokens[:, None] * W + tl.arange(0, W)[None, :]
            if MASKED:
                k = tl.load(keys + at_k, mask=(tokens < end)[None, :], other=0)  # [W, BL]
                v = tl.load(values + at_v, mask=(tokens < end)[:, None], other=0)  # [BL, W]
            else:
                k = tl.load(keys + at_k)
                v = tl.load(values + at_v)
            key_step, key_least = scales_of(key_scales, tokens, end, FORMAT)
            value_step, value_least = scales_of(value_scales, tokens, end, FORMAT)
            scores = _scores(k, q0, q1, q2, q3, FORMAT, FAST)
            if FORMAT == PLAIN:
                scores *= scale
            elif FORMAT == INT8:
                scores *= (key_step * scale)[None, :]
            else:
                scores = scores * (key_step * scale)[None, :] + (key_least * scale)[None, :] * total[:, None]
            if MASKED:
                scores = tl.where(tokens[None, :] <= positions[:, None], scores, -float("inf"))
            higher = tl.maximum(peak, tl.max(scores, 1))
            if MASKED:  # a query of padding may attend to nothing
                higher = tl.maximum(higher, -1e30)
            fade = tl.exp2(peak - higher)
            peak = higher
            p = tl.exp2(scores - peak[:, None])
            mass = mass * fade + tl.sum(p, 1)
            unit = 1.0
            if FORMAT != PLAIN:
                if PARTS == 4:
                    least = least * fade + tl.sum(p * value_least[None, :], 1)
                if q.dtype.element_ty == tl.float16:  # small steps would leave the range of float16
                    unit = tl.maximum(tl.max(value_step, 0), 1e-30)
                    p *= (value_step / unit)[None, :]
                else:
                    p *= value_step[None, :]
            a0, a1, a2, a3 = _gathered(v, p.to(q.dtype.element_ty), a0, a1, a2, a3, fade[:, None], unit, FORMAT, FAST)

    over = 1.0 / tl.where(mass > 0, mass, 1.0)[:, None]
    TYPE: tl.constexpr = y.dtype.element_ty
    y += place
    tl.store(y + channels(0, C, FORMAT)[None, :], ((a0 + least[:, None]) * over).to(TYPE), mask=valid)
    if PARTS > 1:
        tl.store(y + channels(1, C, FORMAT)[None, :], ((a1 + least[:, None]) * over).to(TYPE), mask=valid)
    if PARTS > 2:
        tl.store(y + channels(2, C, FORMAT)[None, :], ((a2 + least[:, None]) * over).to(TYPE), mask=valid)
        tl.store(y + channels(3, C, FORMAT)[None, :], ((a3 + least[:, None]) * over).to(TYPE), mask=valid)


@triton.jit
def _scores(k, q0, q1, q2, q3, FORMAT: tl.constexpr, FAST: tl.constexpr):
    """q @ codes of k, [BM, BL]."""
    if FORMAT == PLAIN:
        return tl.dot(q0, k, input_precision="ieee")
    elif FORMAT == INT8:
        k0, k1 = int8_parts(as_loaded(k, FAST), q0.dtype, FAST)
        return tl.dot(q1, k1, tl.dot(q0, k0, input_precision="ieee"), input_precision="ieee")
    else:
        k0, k1, k2, k3 = int4_parts(as_loaded(k, FAST), q0.dtype, FAST)
        scores = tl.dot(q1, k1, tl.dot(q0, k0, input_precision="ieee"), input_precision="ieee")
        return tl.dot(q3, k3, tl.dot(q2, k2, scores, input_precision="ieee"), input_precision="ieee")


@triton.jit
def _gathered(v, p, a0, a1, a2, a3, fade, unit, FORMAT: tl.constexpr, FAST: tl.constexpr):
    """a * fade + (p @ codes of v) * unit, part by part."""
    if FORMAT == PLAIN:
        a0 = tl.dot(p, v, a0 * fade, input_precision="ieee")
    elif FORMAT == INT8:
        v0, v1 = int8_parts(as_loaded(v, FAST), p.dtype, FAST)
        a0, a1 = _add(p, v0, a0 * fade, unit), _add(p, v1, a1 * fade, unit)
    else:
        v0, v1, v2, v3 = int4_parts(as_loaded(v, FAST), p.dtype, FAST)
        a0, a1 = _add(p, v0, a0 * fade, unit), _add(p, v1, a1 * fade, unit)
        a2, a3 = _add(p, v2, a2 * fade, unit), _add(p, v3, a3 * fade, unit)
    return a0, a1, a2, a3


@triton.jit
def _add(p, v, acc, unit):
    """acc + (p @ v) * unit."""
    if p.dtype == tl.float16:
        return acc + tl.dot(p, v, input_precision="ieee") * unit
    else:
        return tl.dot(p, v, acc, input_precision="ieee")
