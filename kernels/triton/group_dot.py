"""Sums of int4 weights times the activations of few tokens; zero-points and scales enter once per group instead of once per weight.

A 16-bit word of packed codes holds four neighbouring elements of a row. Plane p of a tile holds element 4 j + p of each word j, so shifts
and masks of a whole word make a plane, in the order in which the matrix instructions take their operand. A plane of the activations holds
the same elements. With `group` the elements of one group,

    sum(scale * (code - zero) * x over group) = scale * (sum((offset + code) * x) - (offset + zero) * sum(x)).

The matrix instructions compute both sums: sum(x) is the product with a matrix of ones. `offset` is 128 in bfloat16, where a code in the low
bits of 128.0 is 128 + code, and 0 in float16 and float32.

Rounding. Every operand of the products is exact. Tensor cores keep about 23 bits below the largest term of a sum and truncate the rest, so
that a product of a group is off by at most about 2^-22 * (128 + 15) * sum(|x|) in bfloat16: 2^-15 * sum(|x|), less than rounding every
weight to bfloat16 would cost (2^-9 * |code - zero| * |x| each). In float16 the same offset would be 1024, so codes are made exact instead.

Dimension letters of tiles: `BN` rows of the weight, `BK` elements along the reduction axis, `BT` tokens, `NB` groups in one product, `BC`
columns NB * BT: with groups of 32, whose planes are shorter than a matrix instruction, a column holds one token's elements of one group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dbrx_q.kernels.formats.weights import Weight

from .codes import INT4, code_of
from .launch import Chip
from .weights import group_of

__all__ = ["group_sums", "span_groups"]

# Columns of two matrix instructions. A third one would cost more than scaling every weight.
_MOST_COLUMNS = 16
_SHORTEST = 64
"""Elements in one product: four planes of 16, the depth of a matrix instruction."""


def span_groups(weights: tuple[Weight, ...], tokens: int, chip: Chip, dtype: torch.dtype = torch.bfloat16) -> int:
    """Groups in one product if `group_sums` multiplies all of `weights` by this many tokens in `dtype`, else 0.

    No matrix instruction takes float32: planes of float32 do not fit the registers.
    """
    group = group_of(weights[0])
    if chip.vendor == "hip" or (chip.vendor == "cuda" and dtype == torch.float32):
        return 0
    if any(code_of(weight) != INT4.value or group_of(weight) != group for weight in weights):
        return 0
    groups = max(1, _SHORTEST // group)
    return groups if groups * triton.next_power_of_2(tokens) <= _MOST_COLUMNS else 0


@triton.jit
def group_sums(
    x,  # activations; 16-bit ones are aligned to 8 bytes
    vectors,  # [BT], the place of each token's vector in x, a multiple of 4
    inside,  # [BT]; other tokens count as zeros
    q1,  # first code of a matrix [N, K]
    s1,
    z1,
    rows1,  # [BN]
    q2,  # of another one, or the same
    s2,
    z2,
    rows2,  # [BN]
    first,
    end,
    N: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    FAST: tl.constexpr,
):
    """(matrix1[rows1, k] @ x[k], matrix2[rows2, k] @ x[k]), both float32 [BN, BT], with k from first * BK to end * BK.

    Two matrices share the planes of the activations and their sums. EVEN: all rows are below N, and BK divides K.
    """
    NB: tl.constexpr = max(1, 64 // GROUP)
    SPAN: tl.constexpr = NB * GROUP
    WIDE: tl.constexpr = (BK // GROUP == 2 or BK // GROUP == 4) and K % BK == 0
    BN: tl.constexpr = rows1.shape[0]
    BC: tl.constexpr = NB * vectors.shape[0]
    places, mask = _places(vectors, inside, GROUP, NB, x.dtype.element_ty != tl.float32)
    acc1 = tl.zeros((BN, BC), tl.float32)
    acc2 = tl.zeros((BN, BC), tl.float32)
    last: tl.constexpr = (K + BK - 1) // BK - 1
    start = min(first, last) * BK
    following1 = _terms(s1, z1, rows1, start, N, K, BK, GROUP, EVEN, WIDE)
    following2 = _terms(s2, z2, rows2, start, N, K, BK, GROUP, EVEN, WIDE)
    for step in range(first, end):
        k = step * BK
        scales1, zeros1 = following1
        scales2, zeros2 = following2
        # Those of the next step are loaded a step ahead, so that no product waits for memory.
        start = min(step + 1, last) * BK
        following1 = _terms(s1, z1, rows1, start, N, K, BK, GROUP, EVEN, WIDE)
        following2 = _terms(s2, z2, rows2, start, N, K, BK, GROUP, EVEN, WIDE)
        for span in tl.static_range(BK // SPAN):
            at = k + span * SPAN
            x0, x1, x2, x3 = _activations(x, places, mask, at, K, EVEN)
            ones = tl.full((BN, SPAN // 4), 1.0, x0.dtype)
            nothing = tl.zeros((BN, BC), tl.float32)
            sums = _product(nothing, ones, ones, ones, ones, x0, x1, x2, x3)
            w0, w1, w2, w3 = _codes(q1, rows1, at, N, K, SPAN, EVEN, FAST, x0.dtype)
            scale, zero = _columns(scales1, zeros1, s1, z1, rows1, k, span, N, K, GROUP, NB, BC, EVEN, WIDE, x0.dtype)
            acc1 += _product(sums * zero, w0, w1, w2, w3, x0, x1, x2, x3) * scale
            w0, w1, w2, w3 = _codes(q2, rows2, at, N, K, SPAN, EVEN, FAST, x0.dtype)
            scale, zero = _columns(scales2, zeros2, s2, z2, rows2, k, span, N, K, GROUP, NB, BC, EVEN, WIDE, x0.dtype)
            acc2 += _product(sums * zero, w0, w1, w2, w3, x0, x1, x2, x3) * scale
    return _over_groups(acc1, NB), _over_groups(acc2, NB)


@triton.jit
def _product(acc, w0, w1, w2, w3, x0, x1, x2, x3):
    """acc + four products of planes, [BN, words] @ [words, BC]."""
    product = tl.dot(w0, x0, acc, input_precision="ieee")
    product = tl.dot(w1, x1, product, input_precision="ieee")
    product = tl.dot(w2, x2, product, input_precision="ieee")
    return tl.dot(w3, x3, product, input_precision="ieee")


@triton.jit
def _over_groups(acc, NB: tl.constexpr):
    """[BN, NB * BT] summed over the groups: [BN, BT]."""
    if NB == 1:
        return acc
    else:
        return tl.sum(tl.reshape(acc, (acc.shape[0], NB, acc.shape[1] // NB)), 1)


@triton.jit
def _places(vectors, inside, GROUP: tl.constexpr, NB: tl.constexpr, WORDS: tl.constexpr):
    """(offsets, mask) [words, BC] of the first span's activations."""
    BT: tl.constexpr = vectors.shape[0]
    word = tl.arange(0, NB * GROUP // 4)[:, None]
    if NB > 1:
        vectors = tl.reshape(tl.broadcast_to(vectors[None, :], (NB, BT)), (NB * BT,))
        inside = tl.reshape(tl.broadcast_to(inside[None, :], (NB, BT)), (NB * BT,))
    places = vectors[None, :] // 4 + word if WORDS else vectors[None, :] + 4 * word
    mask = inside[None, :] & (word // (GROUP // 4) == (tl.arange(0, NB * BT) // BT)[None, :])
    return places, mask if NB > 1 else tl.broadcast_to(inside[None, :], places.shape)


@triton.jit
def _activations(x, places, mask, k, K: tl.constexpr, EVEN: tl.constexpr):
    """The four planes [words, BC] of the elements from k on; zeros outside a column's group."""
    if not EVEN:
        mask = mask & (k + 4 * tl.arange(0, places.shape[0]) < K)[:, None]
    DTYPE: tl.constexpr = x.dtype.element_ty
    if DTYPE == tl.float32:
        x0 = tl.load(x + k + places, mask=mask, other=0.0)
        x1 = tl.load(x + k + 1 + places, mask=mask, other=0.0)
        x2 = tl.load(x + k + 2 + places, mask=mask, other=0.0)
        x3 = tl.load(x + k + 3 + places, mask=mask, other=0.0)
        return x0, x1, x2, x3
    else:
        words = tl.load((x + k).to(tl.pointer_type(tl.int64)) + places, mask=mask, other=0)
        x0 = words.to(tl.int16).to(DTYPE, bitcast=True)
        x1 = (words >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        x2 = (words >> 32).to(tl.int16).to(DTYPE, bitcast=True)
        x3 = (words >> 48).to(tl.int16).to(DTYPE, bitcast=True)
        return x0, x1, x2, x3


@triton.jit
def _codes(q, rows, k, N: tl.constexpr, K: tl.constexpr, SPAN: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr, DTYPE: tl.constexpr):
    """The four planes [BN, words] of offset + code in DTYPE, from element k on."""
    word = tl.arange(0, SPAN // 4)
    place = (q + rows * (K // 2) + k // 2).to(tl.pointer_type(tl.int16))[:, None] + word[None, :]
    if EVEN:
        words = tl.load(place)
    else:
        words = tl.load(place, mask=(rows < N)[:, None] & (k + 4 * word < K)[None, :], other=0)
    if FAST and DTYPE == tl.bfloat16:
        return _planes_in_bfloat16(words)
    elif FAST and DTYPE == tl.float16:
        return _planes_in_float16(words)
    else:
        OFFSET: tl.constexpr = 128 if DTYPE == tl.bfloat16 else 0
        w0 = (OFFSET + (words & 15)).to(tl.float32).to(DTYPE)
        w1 = (OFFSET + ((words >> 4) & 15)).to(tl.float32).to(DTYPE)
        w2 = (OFFSET + ((words >> 8) & 15)).to(tl.float32).to(DTYPE)
        w3 = (OFFSET + ((words >> 12) & 15)).to(tl.float32).to(DTYPE)
        return w0, w1, w2, w3


@triton.jit
def _terms(s, z, rows, k, N: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr):
    """Words [BN] of the scales and of the zero-points of all groups in a tile, if a word can hold them (WIDE)."""
    if WIDE:
        scales = s + (rows * (K // GROUP) + k // GROUP)
        zeros = z + (rows * (K // GROUP // 2) + k // GROUP // 2)
        if BK // GROUP == 4:
            scales, zeros = scales.to(tl.pointer_type(tl.int64)), zeros.to(tl.pointer_type(tl.int16))
        else:
            scales = scales.to(tl.pointer_type(tl.int32))
        if EVEN:
            return tl.load(scales), tl.load(zeros).to(tl.int32)
        else:
            return tl.load(scales, mask=rows < N, other=0), tl.load(zeros, mask=rows < N, other=0).to(tl.int32)
    else:
        return rows, rows


@triton.jit
def _columns(
    scales,
    zeros,
    s,
    z,
    rows,
    k,
    span: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    NB: tl.constexpr,
    BC: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """float32 (scale, offset + zero-point) of every row and column, [BN, 1] or [BN, BC]."""
    scale, zero = _term(scales, zeros, s, z, rows, k, span * NB, N, K, GROUP, EVEN, WIDE, DTYPE)
    if NB == 1:
        return scale[:, None], zero[:, None]
    else:
        tl.static_assert(NB == 2)
        other_scale, other_zero = _term(scales, zeros, s, z, rows, k, span * NB + 1, N, K, GROUP, EVEN, WIDE, DTYPE)
        other = (tl.arange(0, BC) >= BC // 2)[None, :]
        return tl.where(other, other_scale[:, None], scale[:, None]), tl.where(other, other_zero[:, None], zero[:, None])


@triton.jit
def _term(
    scales,
    zeros,
    s,
    z,
    rows,
    k,
    index: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """float32 [BN] (scale, offset + zero-point) of the group of the given index in a tile."""
    if WIDE:
        scale = (scales >> (16 * index)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        # The zero-point in the low bits of a float32 whose last place is 1 is 128 + zero-point.
        zero = (((zeros << (16 - 4 * index)) & 0xF0000) | -0x3D000000).to(tl.float32, bitcast=True)
    else:
        group = k // GROUP + index + tl.zeros_like(rows)
        mask = (rows < N) & (group < K // GROUP)
        scale = tl.load(s + rows * (K // GROUP) + group, mask=mask, other=0.0).to(tl.float32)
        pair = tl.load(z + rows * ((K // GROUP + 1) // 2) + group // 2, mask=mask, other=0)
        zero = ((pair.to(tl.int32) >> (group % 2 * 4)) & 15).to(tl.float32) * -1.0 - 128
    return scale, zero if DTYPE == tl.bfloat16 else zero + 128


@triton.jit
def _planes_in_bfloat16(words):
    """128 + code of the four codes of each word."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 t;
        lop3.b32 $0, $4, 0x000F000F, 0x43004300, 0xEA;
        shr.u32 t, $4, 4;
        lop3.b32 $1, t, 0x000F000F, 0x43004300, 0xEA;
        shr.u32 t, $4, 8;
        lop3.b32 $2, t, 0x000F000F, 0x43004300, 0xEA;
        shr.u32 t, $4, 12;
        lop3.b32 $3, t, 0x000F000F, 0x43004300, 0xEA;
        }
        """,
        "=&r,=&r,=&r,=&r,r",
        [words],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _planes_in_float16(words):
    """The four codes of each word. In the low bits of 1024.0 a code is 1024 + code, four bits higher 1024 + 16 * code."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 t, a, b, c, d, sixteenth, low, high;
        mov.b32 sixteenth, 0x2C002C00;
        mov.b32 low, 0xE400E400;
        mov.b32 high, 0xD400D400;
        shr.u32 t, $4, 8;
        lop3.b32 a, $4, 0x000F000F, 0x64006400, 0xEA;
        lop3.b32 b, $4, 0x00F000F0, 0x64006400, 0xEA;
        lop3.b32 c, t, 0x000F000F, 0x64006400, 0xEA;
        lop3.b32 d, t, 0x00F000F0, 0x64006400, 0xEA;
        add.rn.f16x2 $0, a, low;
        fma.rn.f16x2 $1, b, sixteenth, high;
        add.rn.f16x2 $2, c, low;
        fma.rn.f16x2 $3, d, sixteenth, high;
        }
        """,
        "=&r,=&r,=&r,=&r,r",
        [words],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )
