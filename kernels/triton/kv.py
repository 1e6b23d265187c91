"""Shared by the attention kernels: the codes of a quantized KV cache, converted exactly in registers.

Two neighbouring bytes of a cache are loaded as one 16-bit number. Tiles then move like the other 16-bit operands of the matrix units and
can be transposed, which tiles of bytes cannot. One conversion gives a tile of the even and one of the odd bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import INT4, INT8, PLAIN

__all__ = ["as_loaded", "channels", "int4_parts", "int8_parts", "scales_of"]


@triton.jit
def int8_parts(pairs, DTYPE: tl.constexpr, FAST: tl.constexpr):
    """(even, odd) signed bytes of `pairs`, int16, as DTYPE."""
    if FAST and DTYPE == tl.bfloat16:
        # The low 7 bits in the mantissa of 128.0, minus 128.0, or minus 256.0 where the sign bit changes the exponent.
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 a, b, s, t, y, minus;
            mov.b32 minus, 0xBF80BF80;
            shr.u32 y, $2, 8;
            lop3.b32 a, $2, 0x007F007F, 0x43004300, 0xEA;
            lop3.b32 s, $2, 0x00800080, 0x43004300, 0xEA;
            lop3.b32 b, y, 0x007F007F, 0x43004300, 0xEA;
            lop3.b32 t, y, 0x00800080, 0x43004300, 0xEA;
            fma.rn.bf16x2 $0, s, minus, a;
            fma.rn.bf16x2 $1, t, minus, b;
            }
            """,
            "=&r,=&r,r",
            [pairs],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    elif FAST and DTYPE == tl.float16:
        # A code with its sign bit flipped is in the low bits of 1024.0.
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 u, a, b, magic, offset;
            mov.b32 magic, 0x64646464;
            mov.b32 offset, 0xE480E480;
            xor.b32 u, $2, 0x80808080;
            prmt.b32 a, u, magic, 0x4240;
            prmt.b32 b, u, magic, 0x4341;
            add.rn.f16x2 $0, a, offset;
            add.rn.f16x2 $1, b, offset;
            }
            """,
            "=&r,=&r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        return ((pairs << 8) >> 8).to(DTYPE), (pairs >> 8).to(DTYPE)


@triton.jit
def int4_parts(pairs, DTYPE: tl.constexpr, FAST: tl.constexpr):
    """(low nibbles of even bytes, low of odd, high of even, high of odd) of `pairs`, int16, as DTYPE."""
    if FAST and DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 a, b, c, d, x, y, z, one, offset;
            mov.b32 one, 0x3F803F80;
            mov.b32 offset, 0xC300C300;
            shr.u32 x, $4, 4;
            shr.u32 y, $4, 8;
            shr.u32 z, $4, 12;
            lop3.b32 a, $4, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 b, y, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 c, x, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 d, z, 0x000F000F, 0x43004300, 0xEA;
            fma.rn.bf16x2 $0, a, one, offset;
            fma.rn.bf16x2 $1, b, one, offset;
            fma.rn.bf16x2 $2, c, one, offset;
            fma.rn.bf16x2 $3, d, one, offset;
            }
            """,
            "=&r,=&r,=&r,=&r,r",
            [pairs],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    elif FAST and DTYPE == tl.float16:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 a, b, c, d, x, y, z, offset;
            mov.b32 offset, 0xE400E400;
            shr.u32 x, $4, 4;
            shr.u32 y, $4, 8;
            shr.u32 z, $4, 12;
            lop3.b32 a, $4, 0x000F000F, 0x64006400, 0xEA;
            lop3.b32 b, y, 0x000F000F, 0x64006400, 0xEA;
            lop3.b32 c, x, 0x000F000F, 0x64006400, 0xEA;
            lop3.b32 d, z, 0x000F000F, 0x64006400, 0xEA;
            add.rn.f16x2 $0, a, offset;
            add.rn.f16x2 $1, b, offset;
            add.rn.f16x2 $2, c, offset;
            add.rn.f16x2 $3, d, offset;
            }
            """,
            "=&r,=&r,=&r,=&r,r",
            [pairs],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        even = (pairs & 15).to(DTYPE)
        odd = ((pairs >> 8) & 15).to(DTYPE)
        return even, odd, ((pairs >> 4) & 15).to(DTYPE), ((pairs >> 12) & 15).to(DTYPE)


@triton.jit
def channels(part: tl.constexpr, C: tl.constexpr, FORMAT: tl.constexpr):
    """The channels [W] of a part."""
    if FORMAT == PLAIN:
        return tl.arange(0, C)
    elif FORMAT == INT8:
        return tl.arange(0, C // 2) * 2 + part
    else:
        return tl.arange(0, C // 4) * 2 + part % 2 + part // 2 * (C // 2)


@triton.jit
def scales_of(scales, tokens, end, FORMAT: tl.constexpr):
    """(steps, minimums), float32, of a head's `tokens`, zeros from `end` on; ones and zeros in a plain cache."""
    if FORMAT == INT8:
        return tl.load(scales + tokens, mask=tokens < end, other=0.0).to(tl.float32), tl.zeros(tokens.shape, tl.float32)
    elif FORMAT == INT4:
        both = tl.load(scales.to(tl.pointer_type(tl.int32)) + tokens, mask=tokens < end, other=0)
        steps = (both & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
        minimums = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        return steps.to(tl.float32), minimums.to(tl.float32)
    else:
        return tl.full(tokens.shape, 1.0, tl.float32), tl.zeros(tokens.shape, tl.float32)


@triton.jit
def as_loaded(pairs, FAST: tl.constexpr):
    """The same numbers, converted once in the layout of their load; otherwise each warp would convert the whole tile."""
    if FAST:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [pairs], dtype=tl.int16, is_pure=False, pack=2)
    return pairs
