"""Shared by the Triton kernels over weights: dequantization in registers, and the product with a tile of activations.

Dimension letters of tiles: `BN` rows of the weight, `BK` elements along the reduction axis, `BT` tokens, `NB` groups in BK.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from dbrx_q.kernels.formats.registry import FORMATS
from dbrx_q.kernels.formats.weights import Weight

from .codes import INT4, INT8, NF4, PLAIN, TRELLIS, code_of
from .launch import Chip
from .trellis import code_constant, level_table, trellis_code, trellis_tile

__all__ = ["bits_of", "constants_of", "dot_step", "group_of", "pointers_of", "row_unit_of", "scaled"]


def pointers_of(weight: Weight, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The three tensors that a kernel takes for `weight`: codes, scales, zero-points; the codes again in place of tensors that it lacks.

    Of a trellis format the streams in words of 32 bits, the scales, and the levels in `dtype`, which is that of the activations.
    """
    if isinstance(weight, torch.Tensor):
        return weight, weight, weight
    codes, scales, *zeros = weight.parts.values()
    if (code := trellis_code(weight)) is not None:
        return codes.view(torch.int32), scales, level_table(code, dtype, codes.device)
    return codes, scales, zeros[0] if zeros else codes


def constants_of(weight: Weight, chip: Chip, warps: int) -> dict[str, Any]:
    """The compile-time constants that every kernel over weights takes.

    FORMAT, GROUP: of the weight. STRIDE_N, STRIDE_K: of a plain weight, else 0. FAST: whether the kernel may use inline PTX. WARPGROUP:
    whether the matrix instructions are those of Hopper's warpgroups, of four warps each. CODE: of a trellis format, from `code_constant`.
    """
    warpgroup = chip.name == "sm_90" and warps % 4 == 0
    if isinstance(weight, torch.Tensor):
        strides = {"STRIDE_N": weight.stride(-2), "STRIDE_K": weight.stride(-1)}
        return {"FORMAT": code_of(weight), "GROUP": 1, **strides, "FAST": False, "WARPGROUP": warpgroup, "CODE": ()}
    fast, fmt = chip.vendor == "cuda", code_of(weight)
    code = trellis_code(weight)
    return {
        "FORMAT": fmt,
        "GROUP": group_of(weight),
        "STRIDE_N": 0,
        "STRIDE_K": 0,
        "FAST": fast,
        "WARPGROUP": fast and warpgroup,
        "CODE": () if code is None else code_constant(code),
    }


def group_of(weight: Weight) -> int:
    """Neighbouring elements that share a scale; 1 for a plain weight and for one with a scale per row."""
    return 1 if isinstance(weight, torch.Tensor) or trellis_code(weight) is not None else weight.group_size


def row_unit_of(weight: Weight) -> int:
    """Rows that can only be dequantized together."""
    return 1 if isinstance(weight, torch.Tensor) else weight.row_unit()


def bits_of(weight: Weight) -> int:
    """Bits of a stored code; 16 for a plain weight."""
    return 16 if isinstance(weight, torch.Tensor) else FORMATS[weight.format].bits


@triton.jit
def dot_step(
    acc,  # float32 [BN, BT]
    x,  # [BT, BK], zeros past the end
    q,  # first code of the matrix
    s,
    z,
    rows,  # [BN]
    k,  # first element of this step
    N,
    K: tl.constexpr,
    BK: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    STRIDE_N: tl.constexpr,
    STRIDE_K: tl.constexpr,
    FAST: tl.constexpr,
    WARPGROUP: tl.constexpr,
    CODE: tl.constexpr,
):
    """acc + weight[rows, k : k + BK] @ x.T; elements past K count as 0, and sums of rows past N mean nothing.

    Of a trellis format, `x` is rotated, `z` has the levels, and the sums are of levels, which `scaled` multiplies.
    """
    known: tl.constexpr = (FORMAT == PLAIN) | (FORMAT == INT8) | (FORMAT == INT4) | (FORMAT == NF4) | (FORMAT == TRELLIS)
    tl.static_assert(known, "a format in CODES needs a branch in dot_step or _halves")
    if FORMAT == PLAIN:
        columns = k + tl.arange(0, BK)
        inside = (rows < N)[:, None] & (columns < K)[None, :]
        w = tl.load(q + rows[:, None] * STRIDE_N + columns[None, :] * STRIDE_K, mask=inside, other=0.0)
        return tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    elif FORMAT == INT8:
        codes = _codes(q, rows, k, N, K, BK, WARPGROUP)
        scales = _spread(_scales(s, rows, k, N, K, BK, GROUP), BK)
        if FAST and x.dtype == tl.bfloat16:
            w = _int8_to_bfloat16(codes, scales)
        elif FAST and x.dtype == tl.float16:
            w = _int8_to_float16(codes, scales.to(tl.float16))
        else:
            w = (codes.to(tl.float32) * scales).to(x.dtype)
        return tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    elif FORMAT == TRELLIS:
        levels = trellis_tile(q, z, rows, k, N, K, BK, CODE, FAST and x.dtype != tl.float32)
        return tl.dot(levels, tl.trans(x), acc, input_precision="ieee")
    else:
        even, odd = _halves(q, s, z, rows, k, N, K, BK, FORMAT, GROUP, x.dtype, FAST, WARPGROUP)
        x_even, x_odd = tl.split(tl.reshape(x, (x.shape[0], BK // 2, 2)))
        acc = tl.dot(even, tl.trans(x_even), acc, input_precision="ieee")
        return tl.dot(odd, tl.trans(x_odd), acc, input_precision="ieee")


@triton.jit
def scaled(acc, s, rows, N, FORMAT: tl.constexpr):
    """The sums [BN, BT] of `dot_step` times what scales it left out: those of the rows of a trellis format."""
    if FORMAT == TRELLIS:
        return acc * tl.load(s + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    else:
        return acc


@triton.jit
def _halves(
    q,
    s,
    z,
    rows,
    k,
    N,
    K: tl.constexpr,
    BK: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    FAST: tl.constexpr,
    WARPGROUP: tl.constexpr,
):
    """Even and odd elements [BN, BK / 2] of a 4-bit weight: the float32 value rounded to DTYPE, bit for bit."""
    packed = _codes(q, rows, k // 2, N, K // 2, BK // 2, WARPGROUP)
    scales = _scales(s, rows, k, N, K, BK, GROUP)  # float32 [BN, NB]
    if FORMAT == NF4:
        spread = _spread(scales, BK // 2)
        return (_nf4_value(packed >> 4) * spread).to(DTYPE), (_nf4_value(packed & 15) * spread).to(DTYPE)
    zeros = _zeros(z, rows, k, N, K, BK, GROUP)  # float32 [BN, NB]
    if FAST and DTYPE == tl.bfloat16:
        # The code is in the low bits of 128.0. scale = high + low, both bfloat16: code * low is exact in bfloat16 (at most 4 by 3
        # bits), so the fused multiply-add rounds scale * code once, to the bits that float32 arithmetic would give.
        high = scales.to(tl.bfloat16)
        low = (scales - high.to(tl.float32)).to(tl.bfloat16)
        zero = (-128.0 - zeros).to(tl.bfloat16)
        return _int4_to_bfloat16(packed, _spread(zero, BK // 2), _spread(high, BK // 2), _spread(low, BK // 2))
    elif FAST and DTYPE == tl.float16:
        # The code is in the low bits of 1024.0; a float16 product of two exact values rounds once.
        zero = (-1024.0 - zeros).to(tl.float16)
        return _int4_to_float16(packed, _spread(zero, BK // 2), _spread(scales.to(tl.float16), BK // 2))
    else:
        spread, zero = _spread(scales, BK // 2), _spread(zeros, BK // 2)
        even = ((packed & 15).to(tl.float32) - zero) * spread
        odd = ((packed >> 4).to(tl.float32) - zero) * spread
        return even.to(DTYPE), odd.to(DTYPE)


@triton.jit
def _codes(q, rows, first, N, WIDTH: tl.constexpr, BLOCK: tl.constexpr, WARPGROUP: tl.constexpr):
    """Bytes [BN, BLOCK] of a matrix [N, WIDTH]."""
    columns = first + tl.arange(0, BLOCK)
    address = q + rows[:, None] * WIDTH + columns[None, :]
    codes = tl.load(address, mask=(rows < N)[:, None] & (columns < WIDTH)[None, :], other=0)
    return _opaque(codes) if WARPGROUP else codes


@triton.jit
def _scales(s, rows, k, N, K: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    """float32 scales [BN, NB]."""
    groups = k // GROUP + tl.arange(0, BK // GROUP)
    inside = (rows < N)[:, None] & (groups < K // GROUP)[None, :]
    return tl.load(s + rows[:, None] * (K // GROUP) + groups[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _zeros(z, rows, k, N, K: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    """float32 zero-points [BN, NB]."""
    groups = k // GROUP + tl.arange(0, BK // GROUP)
    inside = (rows < N)[:, None] & (groups < K // GROUP)[None, :]
    pairs: tl.constexpr = (K // GROUP + 1) // 2
    packed = tl.load(z + rows[:, None] * pairs + (groups // 2)[None, :], mask=inside, other=0)
    return ((packed >> ((groups % 2) * 4).to(tl.uint8)[None, :]) & 15).to(tl.float32)


@triton.jit
def _spread(values, WIDTH: tl.constexpr):
    """[BN, NB] to [BN, WIDTH], each value over its group."""
    BN: tl.constexpr = values.shape[0]
    NB: tl.constexpr = values.shape[1]
    return tl.reshape(tl.broadcast_to(values[:, :, None], (BN, NB, WIDTH // NB)), (BN, WIDTH))


@triton.jit
def _int4_to_bfloat16(packed, zero, high, low):
    """(even, odd) elements of bytes: (code - zero-point) * (high + low); `zero` is -128 - zero-point."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 p, r, a, b, c, d, t, one, none;
        mov.b32 one, 0x3F803F80;
        mov.b32 none, 0x80008000;
        prmt.b32 p, $4, 0, 0x4140;
        prmt.b32 r, $4, 0, 0x4342;
        lop3.b32 a, p, 0x000F000F, 0x43004300, 0xEA;
        lop3.b32 b, r, 0x000F000F, 0x43004300, 0xEA;
        shr.u32 p, p, 4;
        shr.u32 r, r, 4;
        lop3.b32 c, p, 0x000F000F, 0x43004300, 0xEA;
        lop3.b32 d, r, 0x000F000F, 0x43004300, 0xEA;
        fma.rn.bf16x2 a, a, one, $5;
        fma.rn.bf16x2 b, b, one, $6;
        fma.rn.bf16x2 c, c, one, $5;
        fma.rn.bf16x2 d, d, one, $6;
        fma.rn.bf16x2 t, a, $9, none;
        fma.rn.bf16x2 $0, a, $7, t;
        fma.rn.bf16x2 t, b, $10, none;
        fma.rn.bf16x2 $1, b, $8, t;
        fma.rn.bf16x2 t, c, $9, none;
        fma.rn.bf16x2 $2, c, $7, t;
        fma.rn.bf16x2 t, d, $10, none;
        fma.rn.bf16x2 $3, d, $8, t;
        }
        """,
        "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r",
        [packed, zero, high, low],
        dtype=(tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def _int4_to_float16(packed, zero, scale):
    """(even, odd) elements of bytes: (code - zero-point) * scale; `zero` is -1024 - zero-point."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 p, r, a, b, c, d;
        prmt.b32 p, $4, 0, 0x4140;
        prmt.b32 r, $4, 0, 0x4342;
        lop3.b32 a, p, 0x000F000F, 0x64006400, 0xEA;
        lop3.b32 b, r, 0x000F000F, 0x64006400, 0xEA;
        shr.u32 p, p, 4;
        shr.u32 r, r, 4;
        lop3.b32 c, p, 0x000F000F, 0x64006400, 0xEA;
        lop3.b32 d, r, 0x000F000F, 0x64006400, 0xEA;
        add.rn.f16x2 a, a, $5;
        add.rn.f16x2 b, b, $6;
        add.rn.f16x2 c, c, $5;
        add.rn.f16x2 d, d, $6;
        mul.rn.f16x2 $0, a, $7;
        mul.rn.f16x2 $1, b, $8;
        mul.rn.f16x2 $2, c, $7;
        mul.rn.f16x2 $3, d, $8;
        }
        """,
        "=&r,=&r,=&r,=&r,r,r,r,r,r",
        [packed, zero, scale],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def _int8_to_bfloat16(codes, scale):
    """code * scale in float32, rounded once. A code with its sign bit flipped is in the low bits of 2^23."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 u, magic;
        .reg .f32 a, b, c, d, offset;
        mov.b32 magic, 0x4B000000;
        mov.f32 offset, 0fCB000080;
        xor.b32 u, $2, 0x80808080;
        prmt.b32 a, u, magic, 0x7440;
        prmt.b32 b, u, magic, 0x7441;
        prmt.b32 c, u, magic, 0x7442;
        prmt.b32 d, u, magic, 0x7443;
        add.rn.f32 a, a, offset;
        add.rn.f32 b, b, offset;
        add.rn.f32 c, c, offset;
        add.rn.f32 d, d, offset;
        mul.rn.f32 a, a, $3;
        mul.rn.f32 b, b, $4;
        mul.rn.f32 c, c, $5;
        mul.rn.f32 d, d, $6;
        cvt.rn.bf16x2.f32 $0, b, a;
        cvt.rn.bf16x2.f32 $1, d, c;
        }
        """,
        "=&r,=&r,r,f,f,f,f",
        [codes, scale],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _int8_to_float16(codes, scale):
    """code * scale in float16, rounded once. A code with its sign bit flipped is in the low bits of 1024.0."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 u, a, b, magic, offset;
        mov.b32 magic, 0x64646464;
        mov.b32 offset, 0xE480E480;
        xor.b32 u, $2, 0x80808080;
        prmt.b32 a, u, magic, 0x4140;
        prmt.b32 b, u, magic, 0x4342;
        add.rn.f16x2 a, a, offset;
        add.rn.f16x2 b, b, offset;
        mul.rn.f16x2 $0, a, $3;
        mul.rn.f16x2 $1, b, $4;
        }
        """,
        "=&r,=&r,r,r,r",
        [codes, scale],
        dtype=tl.float16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _opaque(packed):
    """The same bytes, through an instruction that claims to have a side effect.

    The compiler then dequantizes the bytes in the layout in which they were loaded, 16 bytes a thread. Without it, the compiler would load
    them in the layout of Hopper's warpgroup operands, 8 bytes from global and 2 from shared memory at a time.
    """
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [packed], dtype=packed.dtype, is_pure=False, pack=4)


@triton.jit
def _nf4_value(code):
    """float32 value of NF4 codes 0..15 (Dettmers et al. 2023, QLoRA, appendix E), by halving the table with each bit."""
    b0, b1, b2, b3 = (code & 1) != 0, (code & 2) != 0, (code & 4) != 0, (code & 8) != 0
    v0 = tl.where(b0, -0.6961928009986877, -1.0)
    v1 = tl.where(b0, -0.39491748809814453, -0.5250730514526367)
    v2 = tl.where(b0, -0.18477343022823334, -0.28444138169288635)
    v3 = tl.where(b0, 0.0, -0.09105003625154495)
    v4 = tl.where(b0, 0.16093020141124725, 0.07958029955625534)
    v5 = tl.where(b0, 0.33791524171829224, 0.24611230194568634)
    v6 = tl.where(b0, 0.5626170039176941, 0.44070982933044434)
    v7 = tl.where(b0, 1.0, 0.7229568362236023)
    low = tl.where(b2, tl.where(b1, v3, v2), tl.where(b1, v1, v0))
    high = tl.where(b2, tl.where(b1, v7, v6), tl.where(b1, v5, v4))
    return tl.where(b3, high, low)
