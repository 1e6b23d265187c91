"""`store_qkv` in Triton: clamp, split, rotary embedding, quantization and cache store of Wqkv's output in one kernel.

Dimension letters: `T` tokens, `B` sequences, `H` query heads, `G` key/value heads, `L` capacity in tokens, `C` channels of a head; of
tiles: `BH` heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dbrx_q.kernels.formats.kv import KVLayer

from .codes import CODES, INT8, PLAIN
from .dependent_launch import start_next, wait_for_previous
from .launch import chip_of, launch

__all__ = ["qkv_kernel", "store_qkv"]

_HEADS = 8  # heads of one program, on one warp: 16 bytes per thread and load


def store_qkv(
    qkv: torch.Tensor,
    cache: KVLayer,
    rows: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    clip: float | None,
) -> torch.Tensor:
    """q [T, H, C]; see `dbrx_q.kernels.qkv.store_qkv`."""
    T, C = qkv.shape[0], cos.shape[1] * 2
    _, G, L, _ = cache.keys.shape
    q = torch.empty(T, heads, C, dtype=qkv.dtype, device=qkv.device)
    launch(
        qkv_kernel,
        (T, triton.cdiv(heads, _HEADS) + 2 * triton.cdiv(G, _HEADS)),
        qkv.contiguous(),
        q,
        cache.keys,
        cache.values,
        cache.keys if cache.key_scales is None else cache.key_scales,
        cache.values if cache.value_scales is None else cache.value_scales,
        rows,
        positions,
        cos.contiguous(),
        sin.contiguous(),
        0.0 if clip is None else clip,
        L,
        H=heads,
        G=G,
        C=C,
        BH=_HEADS,
        CLIP=clip is not None,
        FORMAT=CODES[cache.format],
        FAST=chip_of(qkv.device).vendor == "cuda",
        warps=1,
        stages=1,
    )
    return q


@triton.jit(do_not_specialize=["clip", "L"])
def qkv_kernel(
    qkv,  # [T, (H + 2G) C]
    q,  # [T, H, C]
    keys,  # [B, G, L, C or C / 2]
    values,
    key_scales,  # [B, G, L] or [B, G, L, 2]
    value_scales,
    rows,  # [T]
    positions,  # [T]
    cos,  # [T, C / 2]
    sin,
    clip,
    L,
    H: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    BH: tl.constexpr,
    CLIP: tl.constexpr,
    FORMAT: tl.constexpr,
    FAST: tl.constexpr,
    PDL: tl.constexpr,
):
    start_next(PDL)
    wait_for_previous(PDL)
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    of_q: tl.constexpr = (H + BH - 1) // BH
    of_kv: tl.constexpr = (G + BH - 1) // BH
    half = tl.arange(0, C // 2)[None, :]
    source = qkv + token * ((H + 2 * G) * C)
    angles = token * (C // 2) + half
    if part < of_q:
        heads = part * BH + tl.arange(0, BH)
        left, right = _load(source, heads, H, half, clip, C, CLIP)
        left, right = _rotate(left, right, tl.load(cos + angles), tl.load(sin + angles), FAST)
        place = q + (token * H + heads[:, None]) * C + half
        tl.store(place, left.to(q.dtype.element_ty), mask=(heads < H)[:, None])
        tl.store(place + C // 2, right.to(q.dtype.element_ty), mask=(heads < H)[:, None])
        return
    row = tl.load(rows + token).to(tl.int64)
    if row < 0:
        return
    position = tl.load(positions + token)
    if part < of_q + of_kv:
        heads = (part - of_q) * BH + tl.arange(0, BH)
        left, right = _load(source + H * C, heads, G, half, clip, C, CLIP)
        left, right = _rotate(left, right, tl.load(cos + angles), tl.load(sin + angles), FAST)
        left, right = left.to(q.dtype.element_ty), right.to(q.dtype.element_ty)
        _store(keys, key_scales, left, right, heads, (row * G + heads) * L + position, half, G, C, FORMAT)
    else:
        heads = (part - of_q - of_kv) * BH + tl.arange(0, BH)
        left, right = _load(source + (H + G) * C, heads, G, half, clip, C, CLIP)
        left, right = left.to(q.dtype.element_ty), right.to(q.dtype.element_ty)
        _store(values, value_scales, left, right, heads, (row * G + heads) * L + position, half, G, C, FORMAT)


@triton.jit
def _load(source, heads, n, half, clip, C: tl.constexpr, CLIP: tl.constexpr):
    """The two halves of the channels, float32 [BH, C / 2]."""
    place = source + heads[:, None] * C + half
    left = tl.load(place, mask=(heads < n)[:, None], other=0.0).to(tl.float32)
    right = tl.load(place + C // 2, mask=(heads < n)[:, None], other=0.0).to(tl.float32)
    if CLIP:
        nan: tl.constexpr = tl.PropagateNan.ALL
        left, right = tl.clamp(left, -clip, clip, nan), tl.clamp(right, -clip, clip, nan)
    return left, right


@triton.jit
def _rotate(left, right, cos, sin, FAST: tl.constexpr):
    return _product(left, cos, FAST) - _product(right, sin, FAST), _product(right, cos, FAST) + _product(left, sin, FAST)


@triton.jit
def _product(a, b, FAST: tl.constexpr):
    """a * b rounded by itself: a fused multiply-add would give other bits than the reference."""
    a, b = tl.broadcast(a, b)
    if FAST:
        return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1)
    return a * b


@triton.jit
def _store(codes, scales, left, right, heads, index, half, G: tl.constexpr, C: tl.constexpr, FORMAT: tl.constexpr):
    """Heads [BH] to token `index` [BH] of the cache; the arithmetic of `dbrx_q.kernels.formats.kv.quantize_kv`."""
    inside = heads < G
    if FORMAT == PLAIN:
        place = codes + index[:, None] * C + half
        tl.store(place, left, mask=inside[:, None])
        tl.store(place + C // 2, right, mask=inside[:, None])
    elif FORMAT == INT8:
        left, right = left.to(tl.float32), right.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(left), 1), tl.max(tl.abs(right), 1))
        step = tl.minimum(tl.div_rn(largest, tl.full(largest.shape, 127.0, tl.float32)), 65504.0).to(tl.float16)
        tl.store(scales + index, step, mask=inside)
        place = codes + index[:, None] * C + half
        tl.store(place, _code(left, step, -127.0, 127.0).to(tl.int8), mask=inside[:, None])
        tl.store(place + C // 2, _code(right, step, -127.0, 127.0).to(tl.int8), mask=inside[:, None])
    else:
        left, right = left.to(tl.float32), right.to(tl.float32)
        minimum = tl.minimum(tl.min(left, 1), tl.min(right, 1))
        minimum = tl.minimum(tl.maximum(minimum, -65504.0), 65504.0).to(tl.float16)
        low = minimum.to(tl.float32)
        spread = tl.maximum(tl.max(left, 1), tl.max(right, 1)) - low
        step = tl.div_rn(spread, tl.full(spread.shape, 15.0, tl.float32))
        step = tl.minimum(tl.maximum(step, 0.0), 65504.0).to(tl.float16)
        tl.store(scales + index * 2, step, mask=inside)
        tl.store(scales + index * 2 + 1, minimum, mask=inside)
        first = _code(left - low[:, None], step, 0.0, 15.0).to(tl.int32)
        second = _code(right - low[:, None], step, 0.0, 15.0).to(tl.int32)
        tl.store(codes + index[:, None] * (C // 2) + half, (first | (second << 4)).to(tl.uint8), mask=inside[:, None])


@triton.jit
def _code(x, step, LOW: tl.constexpr, HIGH: tl.constexpr):
    """x / step, clamped and rounded to nearest, ties to even; 0 where the step is 0."""
    step = step.to(tl.float32)[:, None]
    x, divisor = tl.broadcast(x, tl.where(step > 0, step, 1.0))
    code = tl.where(step > 0, tl.div_rn(x, divisor), 0.0)
    code = tl.minimum(tl.maximum(code, LOW), HIGH)
    return (code + 12582912.0) - 12582912.0  # 1.5 * 2^23, whose last bit is worth 1
