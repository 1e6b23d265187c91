"""Attention of one new token per sequence in Triton: flash decoding, split over the cache (Dao et al. 2023, Flash-Decoding).

Dimension letters: `B` sequences, `L` capacity in tokens, `H` query heads, `G` key/value heads, `C` channels of a head; of tiles: `BL`
tokens, `HP` query heads of a key/value head, padded; `W` channels of one part: all in a plain cache, the even or the odd ones in int8, half
of the even or of the odd ones in int4.

Keys are the left operand of the scores, and values the left operand of the weighted sum, so that few query heads fill few columns of a
matrix instruction.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dbrx_q.kernels.formats.kv import KVLayer

from .arrival import arrive, counters
from .attention_tiles import decode_tiles
from .codes import CODES, INT8, PLAIN
from .dependent_launch import start_next, wait_for_previous
from .kv import channels, int4_parts, int8_parts, scales_of
from .launch import chip_of, launch

__all__ = ["decode", "decode_kernel"]


def decode(q: torch.Tensor, cache: KVLayer, lengths: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """y [B, H, C] for the last token of every sequence; `q` [B, H, C], `lengths` and `rows` as in `Sequences`."""
    B, H, C = q.shape
    _, G, L, _ = cache.keys.shape
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    chip = chip_of(q.device)
    tiles = decode_tiles(cache.format, B, H, G, L, C, chip)
    partial, arrived = lengths, lengths
    if tiles.splits > 1:
        partial = torch.empty(B * G * tiles.splits * (H // G) * (C + 2), dtype=torch.float32, device=q.device)
        arrived = counters(q.device, B * G)
    launch(
        decode_kernel,
        (tiles.splits, G, B),
        q.contiguous(),
        cache.keys,
        cache.values,
        cache.keys if cache.key_scales is None else cache.key_scales,
        cache.values if cache.value_scales is None else cache.value_scales,
        lengths,
        lengths if rows is None else rows,
        y,
        partial,
        arrived,
        C**-0.5 * 1.4426950408889634,
        L,
        H=H,
        G=G,
        C=C,
        BL=tiles.tokens,
        HP=tiles.heads,
        SPLITS=tiles.splits,
        TOGETHER=tiles.together,
        ROWS=rows is not None,
        FORMAT=CODES[cache.format],
        FAST=chip.vendor == "cuda",
        warps=tiles.warps,
        stages=tiles.stages,
    )
    return y


@triton.jit(do_not_specialize=["scale", "L"])
def decode_kernel(
    q,  # [B, H, C]
    keys,  # [rows of the cache, G, L, C or C / 2]
    values,
    key_scales,  # [rows of the cache, G, L] or [rows of the cache, G, L, 2]
    value_scales,
    lengths,  # [B]
    rows,  # [B]
    y,  # [B, H, C]
    partial,  # float32 [B, G, SPLITS, H / G, C], then the largest scores and the sums, [B, G, SPLITS, 2, H / G]
    arrived,  # int32 [B, G], zeros
    scale,  # of the scores, in base 2
    L,
    H: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    BL: tl.constexpr,
    HP: tl.constexpr,
    SPLITS: tl.constexpr,
    TOGETHER: tl.constexpr,
    ROWS: tl.constexpr,
    FORMAT: tl.constexpr,
    FAST: tl.constexpr,
    PDL: tl.constexpr,
):
    start_next(PDL)
    wait_for_previous(PDL)
    HQ: tl.constexpr = H // G
    PARTS: tl.constexpr = 1 if FORMAT == PLAIN else 2 if FORMAT == INT8 else 4
    W: tl.constexpr = C // PARTS
    DTYPE: tl.constexpr = q.dtype.element_ty
    split, group, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    end = tl.load(lengths + sequence)
    row = sequence
    if ROWS:
        row = tl.load(rows + sequence)
        end = tl.where(row < 0, 0, end)
        row = tl.maximum(row, 0)
    blocks = tl.cdiv(end, BL)
    blocks_per_split = tl.cdiv(blocks, SPLITS)
    busy = tl.cdiv(blocks, tl.maximum(blocks_per_split, 1))  # splits that have blocks
    if split >= tl.maximum(busy, 1):  # the host chose SPLITS without the lengths
        return

    heads = tl.arange(0, HP)
    mine = q + (sequence * G + group) * HQ * C + heads[None, :] * C
    q0 = tl.load(mine + channels(0, C, FORMAT)[:, None], mask=(heads < HQ)[None, :], other=0.0)  # [W, HP]
    q1, q2, q3 = q0, q0, q0
    total = tl.sum(q0.to(tl.float32), 0)  # [HP]
    if PARTS > 1:
        q1 = tl.load(mine + channels(1, C, FORMAT)[:, None], mask=(heads < HQ)[None, :], other=0.0)
    if PARTS > 2:
        q2 = tl.load(mine + channels(2, C, FORMAT)[:, None], mask=(heads < HQ)[None, :], other=0.0)
        q3 = tl.load(mine + channels(3, C, FORMAT)[:, None], mask=(heads < HQ)[None, :], other=0.0)
        total += tl.sum(q1.to(tl.float32), 0) + tl.sum(q2.to(tl.float32), 0) + tl.sum(q3.to(tl.float32), 0)

    head = (row * G + group).to(tl.int64) * L
    if FORMAT == PLAIN:
        keys += head * C
        values += head * C
    else:
        keys = keys.to(tl.pointer_type(tl.int16)) + head * (C // 2 if FORMAT == INT8 else C // 4)
        values = values.to(tl.pointer_type(tl.int16)) + head * (C // 2 if FORMAT == INT8 else C // 4)
        key_scales += head * (1 if FORMAT == INT8 else 2)
        value_scales += head * (1 if FORMAT == INT8 else 2)

    peak = tl.full((HP,), -float("inf"), tl.float32)
    mass = tl.zeros((BL, HP), tl.float32)  # summed over tokens at the end
    least = tl.zeros((BL, HP), tl.float32)
    a0 = tl.zeros((W, HP), tl.float32)
    a1, a2, a3 = a0, a0, a0
    tokens = split * blocks_per_split * BL + tl.arange(0, BL)
    # The kernel itself loads scales one block ahead: two bytes are too few for an asynchronous copy.
    key_step, key_least = scales_of(key_scales, tokens, end, FORMAT)
    value_step, value_least = scales_of(value_scales, tokens, end, FORMAT)
    for block in range(split * blocks_per_split, tl.minimum(split * blocks_per_split + blocks_per_split, blocks)):
        tokens = block * BL + tl.arange(0, BL)
        place = tokens[:, None] * W + tl.arange(0, W)[None, :]
        k = tl.load(keys + place, mask=(tokens < end)[:, None], other=0)
        place = tokens[None, :] * W + tl.arange(0, W)[:, None]
        v = tl.load(values + place, mask=(tokens < end)[None, :], other=0)  # [W, BL]
        next_key_step, next_key_least = scales_of(key_scales, tokens + BL, end, FORMAT)
        next_value_step, next_value_least = scales_of(value_scales, tokens + BL, end, FORMAT)

        if FORMAT == PLAIN:
            scores = tl.dot(k, q0, input_precision="ieee") * scale  # [BL, HP]
        elif FORMAT == INT8:
            k0, k1 = int8_parts(k, DTYPE, FAST)
            scores = tl.dot(k1, q1, tl.dot(k0, q0, input_precision="ieee"), input_precision="ieee")
            scores = scores * (key_step * scale)[:, None]
        else:
            k0, k1, k2, k3 = int4_parts(k, DTYPE, FAST)
            scores = tl.dot(k1, q1, tl.dot(k0, q0, input_precision="ieee"), input_precision="ieee")
            scores = tl.dot(k3, q3, tl.dot(k2, q2, scores, input_precision="ieee"), input_precision="ieee")
            scores = scores * (key_step * scale)[:, None] + (key_least * scale)[:, None] * total[None, :]
        scores = tl.where((tokens < end)[:, None], scores, -float("inf"))
        higher = tl.maximum(peak, tl.max(scores, 0))
        fade = tl.exp2(peak - higher)[None, :]
        peak = higher
        p = tl.exp2(scores - peak[None, :])
        mass = mass * fade + p
        unit = 1.0
        if FORMAT != PLAIN:
            if DTYPE == tl.float16:  # small steps would leave the range of float16
                unit = tl.maximum(tl.max(value_step, 0), 1e-30)
                p *= (value_step / unit)[:, None]
            else:
                p *= value_step[:, None]
            if PARTS == 4:
                least = least * fade + tl.exp2(scores - peak[None, :]) * value_least[:, None]
        p = p.to(DTYPE)
        if FORMAT == PLAIN:
            a0 = tl.dot(v, p, a0 * fade, input_precision="ieee")
        elif FORMAT == INT8:
            v0, v1 = int8_parts(v, DTYPE, FAST)
            a0 = _add(v0, p, a0 * fade, unit)
            a1 = _add(v1, p, a1 * fade, unit)
        else:
            v0, v1, v2, v3 = int4_parts(v, DTYPE, FAST)
            a0 = _add(v0, p, a0 * fade, unit)
            a1 = _add(v1, p, a1 * fade, unit)
            a2 = _add(v2, p, a2 * fade, unit)
            a3 = _add(v3, p, a3 * fade, unit)
        key_step, key_least = next_key_step, next_key_least
        value_step, value_least = next_value_step, next_value_least

    sums = tl.sum(mass, 0)  # [HP]
    if PARTS == 4:
        low = tl.sum(least, 0)[None, :]
        a0, a1, a2, a3 = a0 + low, a1 + low, a2 + low, a3 + low
    program = sequence * G + group
    out = y + program.to(tl.int64) * HQ * C
    if SPLITS == 1 or busy <= 1:
        over = 1.0 / tl.where(sums > 0, sums, 1.0)[None, :]
        _store(out, a0 * over, a1 * over, a2 * over, a3 * over, heads, HQ, C, FORMAT)
    else:
        tops = partial + tl.num_programs(2).to(tl.int64) * G * SPLITS * HQ * C + program.to(tl.int64) * SPLITS * 2 * HQ
        accs = partial + program.to(tl.int64) * SPLITS * HQ * C
        _store(accs + split * HQ * C, a0, a1, a2, a3, heads, HQ, C, FORMAT)
        tl.store(tops + split * 2 * HQ + heads, peak, mask=heads < HQ)
        tl.store(tops + (split * 2 + 1) * HQ + heads, sums, mask=heads < HQ)
        if arrive(arrived + program, busy - 1):
            _combine(accs, tops, out, busy, HQ, C, TOGETHER)


@triton.jit
def _add(v, p, acc, unit):
    """acc + (v @ p) * unit."""
    if p.dtype == tl.float16:
        return acc + tl.dot(v, p, input_precision="ieee") * unit
    else:
        return tl.dot(v, p, acc, input_precision="ieee")


@triton.jit
def _store(place, a0, a1, a2, a3, heads, HQ: tl.constexpr, C: tl.constexpr, FORMAT: tl.constexpr):
    """The parts, [W, HP] each, to [HQ, C]."""
    inside = (heads < HQ)[None, :]
    place += heads[None, :] * C
    TYPE: tl.constexpr = place.dtype.element_ty
    tl.store(place + channels(0, C, FORMAT)[:, None], a0.to(TYPE), mask=inside)
    if FORMAT != PLAIN:
        tl.store(place + channels(1, C, FORMAT)[:, None], a1.to(TYPE), mask=inside)
        if FORMAT != INT8:
            tl.store(place + channels(2, C, FORMAT)[:, None], a2.to(TYPE), mask=inside)
            tl.store(place + channels(3, C, FORMAT)[:, None], a3.to(TYPE), mask=inside)


@triton.jit
def _combine(accs, tops, out, busy, HQ: tl.constexpr, C: tl.constexpr, TOGETHER: tl.constexpr):
    """Combine the partial results of `busy` splits, in their order.

    TOGETHER splits are loaded at a time. No value crosses warps, so that the loads need not wait for each other.
    """
    HP: tl.constexpr = triton.next_power_of_2(HQ)
    heads, channels = tl.arange(0, HP), tl.arange(0, C)
    peak = tl.full((HP,), -1e38, tl.float32)
    mass = tl.zeros((HP,), tl.float32)
    acc = tl.zeros((HP, C), tl.float32)
    top = tops + heads
    place = accs + heads[:, None] * C + channels[None, :]
    for first in range(0, busy, TOGETHER):
        higher = peak
        for offset in tl.static_range(TOGETHER):
            valid = heads < tl.where(first + offset < busy, HQ, 0)
            higher = tl.maximum(higher, tl.load(top + offset * (2 * HQ), mask=valid, other=-1e38, cache_modifier=".cg"))
        fade = tl.exp2(peak - higher)
        peak = higher
        mass *= fade
        acc *= fade[:, None]
        for offset in tl.static_range(TOGETHER):
            valid = heads < tl.where(first + offset < busy, HQ, 0)
            part = tl.load(place + offset * (HQ * C), mask=valid[:, None], other=0.0, cache_modifier=".cg")
            share = tl.exp2(tl.load(top + offset * (2 * HQ), mask=valid, other=-1e38, cache_modifier=".cg") - peak)
            mass += share * tl.load(top + (offset * 2 + 1) * HQ, mask=valid, other=0.0, cache_modifier=".cg")
            acc += part * share[:, None]
        top += TOGETHER * 2 * HQ
        place += TOGETHER * HQ * C
    acc *= 1.0 / tl.where(mass > 0, mass, 1.0)[:, None]
    place = out + heads[:, None] * C + channels[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=(heads < HQ)[:, None])
