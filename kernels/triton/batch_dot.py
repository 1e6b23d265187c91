"""The product of int4 and int8 weights with few tokens as a batch of small products, each of a run of a row's elements.

Codes are whole numbers, exact in 16 bits, so the matrix instructions take them without a scale, and the group's scale multiplies the small
product in float32. Zero-points are subtracted by a product of their own, or exactly from the codes. Where a run has several groups, a
column of its tile of activations holds one token's elements of one group and zeros elsewhere. Each warp multiplies runs of its own, all
rows of them; the sums of runs are added once, after the last step.

Dimension letters of tiles: `BN` rows of the weight, `BK` elements along the reduction axis, `BT` tokens, `NR` runs in BK, `G` groups in a
run, `BC` columns G * BT.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dbrx_q.kernels.formats.weights import Weight

from .codes import INT4, INT8, code_of
from .launch import Chip
from .tiles import RUN_BYTES
from .weights import bits_of, group_of

__all__ = ["batch_dot", "run_groups"]

# With more columns the matrix instructions cost more than scaling every weight.
_MOST_COLUMNS = 16


def run_groups(weight: Weight, tokens: int, chip: Chip) -> int:
    """G if `batch_dot` multiplies `weight` by this many tokens, else 0.

    The zero-points of int4 take as many matrix instructions as its codes. On sm_86, whose matrix units have half the rate of sm_80's where
    sums are float32, they would take as long as reading the weight.
    """
    if chip.name == "sm_86" and not isinstance(weight, torch.Tensor) and code_of(weight) == INT4.value:
        return 0
    if chip.vendor == "hip" or isinstance(weight, torch.Tensor) or code_of(weight) not in (INT4.value, INT8.value):
        return 0
    groups = max(1, RUN_BYTES * 8 // bits_of(weight) // group_of(weight))
    return groups if groups * triton.next_power_of_2(tokens) <= _MOST_COLUMNS else 0


@triton.jit
def batch_dot(
    x,  # [T, K]
    q,  # weight [N, K]
    s,
    z,
    rows,  # [BN]
    tokens,  # [BT]
    first,  # step
    end,
    T,
    N,
    K: tl.constexpr,
    BK: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    G: tl.constexpr,
    FAST: tl.constexpr,
):
    """float32 weight[rows] @ x[tokens].T over the elements of the steps from `first` to `end`, [BN, BT]; rows past N repeat the last."""
    RUN: tl.constexpr = G * GROUP
    BN: tl.constexpr = rows.shape[0]
    BT: tl.constexpr = tokens.shape[0]
    rows = tl.minimum(rows, N - 1)
    sums = tl.zeros((BK // RUN, BN, G * BT), tl.float32)
    # The compiler does not load scales and zero-points ahead, so that each step would wait for memory: the loop loads those of the next.
    last: tl.constexpr = (K + BK - 1) // BK - 1  # splits past it have no steps
    scales, zeros = _parameters(s, z, rows, min(first, last), K, BK, FORMAT, GROUP, G)
    for step in range(first, end):
        next_scales, next_zeros = _parameters(s, z, rows, min(step + 1, end - 1), K, BK, FORMAT, GROUP, G)
        codes, values = _tiles(x, q, rows, tokens, step, T, K, BK, FORMAT, GROUP, G)
        sums += _product(codes, zeros, values, FORMAT, FAST) * _spread(scales, G * BT)
        scales, zeros = next_scales, next_zeros
    if G > 1:
        sums = tl.sum(tl.reshape(sums, (BK // RUN, BN, G, BT)), 2)
    return tl.sum(sums, 0)


@triton.jit
def _spread(values, WIDTH: tl.constexpr):
    """[NR, BN, G] to [NR, BN, WIDTH], each value over its group."""
    NR: tl.constexpr = values.shape[0]
    BN: tl.constexpr = values.shape[1]
    G: tl.constexpr = values.shape[2]
    return tl.reshape(tl.broadcast_to(values[:, :, :, None], (NR, BN, G, WIDTH // G)), (NR, BN, WIDTH))


@triton.jit
def _parameters(s, z, rows, step, K: tl.constexpr, BK: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr, G: tl.constexpr):
    """(float32 scales, bfloat16 -128 - zero-point) [NR, BN, G]; the scales twice of a format without zero-points."""
    runs = tl.arange(0, BK // (G * GROUP))[:, None, None]
    groups = step * (BK // GROUP) + runs * G + tl.arange(0, G)[None, None, :]
    if K % BK != 0:
        groups = tl.minimum(groups, K // GROUP - 1)
    scales = tl.load(s + rows[None, :, None] * (K // GROUP) + groups)
    if FORMAT == INT4:
        zeros = tl.load(z + rows[None, :, None] * ((K // GROUP + 1) // 2) + groups // 2)
        zeros = (zeros >> ((groups % 2) * 4).to(tl.uint8)) & 15
        return scales.to(tl.float32), (zeros.to(tl.uint16) | 0xC300).to(tl.bfloat16, bitcast=True)  # the bits of the sum
    else:
        scales = scales.to(tl.float32)
        return scales, scales


@triton.jit
def _tiles(x, q, rows, tokens, step, T, K: tl.constexpr, BK: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr, G: tl.constexpr):
    """(codes [NR, BN, bytes of a run], activations [NR, BC, elements of a run]) of a step; activations past K are zeros."""
    RUN: tl.constexpr = G * GROUP
    BYTES: tl.constexpr = RUN // 2 if FORMAT == INT4 else RUN
    ROW: tl.constexpr = K // 2 if FORMAT == INT4 else K
    BT: tl.constexpr = tokens.shape[0]
    runs = step * (BK // RUN) + tl.arange(0, BK // RUN)[:, None, None]
    places = runs * BYTES + tl.arange(0, BYTES)[None, None, :]
    within = tl.arange(0, RUN)[None, None, :]
    elements = runs * RUN + within
    if G > 1:
        columns = tl.arange(0, G * BT)
        tokens = tl.reshape(tl.broadcast_to(tokens[None, :], (G, BT)), (G * BT,))
        inside = (tokens < T)[None, :, None] & ((columns // BT)[None, :, None] == within // GROUP)
    else:
        inside = (tokens < T)[None, :, None]
    if K % BK != 0:
        codes = tl.load(q + rows[None, :, None] * ROW + places, mask=places < ROW, other=0)
        inside = inside & (elements < K)
    else:
        codes = tl.load(q + rows[None, :, None] * ROW + places)
    return codes, tl.load(x + tokens[None, :, None] * K + elements, mask=inside, other=0.0)


@triton.jit
def _product(codes, zeros, x, FORMAT: tl.constexpr, FAST: tl.constexpr):
    """float32 (code - zero-point) @ x.T of every run, [NR, BN, BC]."""
    NR: tl.constexpr = codes.shape[0]
    BYTES: tl.constexpr = codes.shape[2]
    if FORMAT == INT8:
        if FAST and x.dtype == tl.bfloat16:
            whole = _int8_in_bfloat16(codes)
        elif FAST and x.dtype == tl.float16:
            whole = _int8_in_float16(codes)
        else:
            whole = codes.to(x.dtype)
        return tl.dot(whole, tl.permute(x, (0, 2, 1)), input_precision="ieee")
    else:
        x_even, x_odd = tl.split(tl.reshape(x, (NR, x.shape[1], BYTES, 2)))
        x_even, x_odd = tl.permute(x_even, (0, 2, 1)), tl.permute(x_odd, (0, 2, 1))
        if (x.dtype == tl.bfloat16) | ((not FAST) & (x.dtype == tl.float16)):
            # 128 + code, and -128 - zero-point: the matrix instructions have time for another product. In Triton's interpreter, which
            # multiplies no bfloat16, float16 comes here.
            if FAST:
                even, odd, zero = _int4_in_bfloat16(codes, _spread(zeros, BYTES))
            else:
                even, odd = ((codes & 15) + 128.0).to(x.dtype), ((codes >> 4) + 128.0).to(x.dtype)
                zero = _spread(zeros.to(x.dtype), BYTES)
            product = tl.dot(zero, x_even, input_precision="ieee")
            product = tl.dot(zero, x_odd, product, input_precision="ieee")
            product = tl.dot(even, x_even, product, input_precision="ieee")
            return tl.dot(odd, x_odd, product, input_precision="ieee")
        elif FAST & (x.dtype == tl.float16):
            # Beside 1024, sums would be less exact than the output's rounding.
            even, odd = _steps_in_float16(codes, _spread((zeros.to(tl.float32) - 896.0).to(tl.float16), BYTES))
        else:
            zero = _spread(-128.0 - zeros.to(tl.float32), BYTES)
            even, odd = ((codes & 15).to(tl.float32) - zero).to(x.dtype), ((codes >> 4).to(tl.float32) - zero).to(x.dtype)
        product = tl.dot(even, x_even, input_precision="ieee")
        return tl.dot(odd, x_odd, product, input_precision="ieee")


@triton.jit
def _int4_in_bfloat16(packed, zero):
    """(128 + code of the even, of the odd elements of bytes, `zero`), exactly: a code is in the low bits of 128.0.

    `zero` passes through, so that the compiler gives it the layout of the codes, and activations are read in one layout for both.
    """
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 p, r;
        prmt.b32 p, $6, 0, 0x4140;
        prmt.b32 r, $6, 0, 0x4342;
        lop3.b32 $0, p, 0x000F000F, 0x43004300, 0xEA;
        lop3.b32 $1, r, 0x000F000F, 0x43004300, 0xEA;
        shr.u32 p, p, 4;
        shr.u32 r, r, 4;
        lop3.b32 $2, p, 0x000F000F, 0x43004300, 0xEA;
        lop3.b32 $3, r, 0x000F000F, 0x43004300, 0xEA;
        mov.b32 $4, $7;
        mov.b32 $5, $8;
        }
        """,
        "=&r,=&r,=&r,=&r,=&r,=&r,r,r,r",
        [packed, zero],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def _steps_in_float16(packed, zero):
    """(even, odd) elements of bytes: code - zero-point, exactly; `zero` is -1024 - zero-point."""
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
        add.rn.f16x2 $0, a, $5;
        add.rn.f16x2 $1, b, $6;
        add.rn.f16x2 $2, c, $5;
        add.rn.f16x2 $3, d, $6;
        }
        """,
        "=&r,=&r,=&r,=&r,r,r,r",
        [packed, zero],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def _int8_in_bfloat16(codes):
    """Codes of bytes, exactly: 128 + the low seven bits, less 128 or 256 by the sign bit, which is moved into an exponent."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 p, r, a, b, c, d, one;
        mov.b32 one, 0x3F803F80;
        prmt.b32 p, $2, 0, 0x4140;
        prmt.b32 r, $2, 0, 0x4342;
        lop3.b32 a, p, 0x007F007F, 0x43004300, 0xEA;
        lop3.b32 b, r, 0x007F007F, 0x43004300, 0xEA;
        lop3.b32 c, p, 0x00800080, 0xC300C300, 0xEA;
        lop3.b32 d, r, 0x00800080, 0xC300C300, 0xEA;
        fma.rn.bf16x2 $0, a, one, c;
        fma.rn.bf16x2 $1, b, one, d;
        }
        """,
        "=&r,=&r,r",
        [codes],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _int8_in_float16(codes):
    """Codes of bytes, exactly. A code with its sign bit flipped is in the low bits of 1024.0."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 u, a, b, magic, offset;
        mov.b32 magic, 0x64646464;
        mov.b32 offset, 0xE480E480;
        xor.b32 u, $2, 0x80808080;
        prmt.b32 a, u, magic, 0x4140;
        prmt.b32 b, u, magic, 0x4342;
        add.rn.f16x2 $0, a, offset;
        add.rn.f16x2 $1, b, offset;
        }
        """,
        "=&r,=&r,r",
        [codes],
        dtype=tl.float16,
        is_pure=True,
        pack=4,
    )
