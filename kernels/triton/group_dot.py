"""The product of int4 weights with few tokens, scaled once per group instead of once per weight.

A column of the tile of activations holds one token's elements of one group and zeros elsewhere. A column of the product is then the
contribution of one group to one token, which is multiplied by the group's scale in float32. With few tokens the matrix instructions have
columns to spare, and a weight takes two instructions less to dequantize.

Dimension letters of tiles: `BN` rows of the weight, `BK` elements along the reduction axis, `BT` tokens, `NB` groups in BK, `BC` columns
NB * BT.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dbrx_q.kernels.formats.weights import Weight

from .codes import INT4, code_of
from .launch import Chip
from .tiles import Tiles
from .weights import _codes, _scales, _spread, _zeros, group_of

__all__ = ["group_columns", "group_dot_step", "grouped_tokens", "load_columns", "over_groups"]

# With more columns the matrix instructions cost more than scaling every weight.
_MOST_COLUMNS = 16


def grouped_tokens(weights: tuple[Weight, ...], tokens: int, tiles: Tiles, chip: Chip) -> int:
    """BT if `group_dot_step` can multiply all of `weights` by the same activations, else 0."""
    group = group_of(weights[0])
    if chip.vendor == "hip" or any(code_of(weight) != INT4.value or group_of(weight) != group for weight in weights):
        return 0
    groups = tiles.depth // group
    fewest = max(1, chip.smallest_dot // groups)
    padded = max(fewest, triton.next_power_of_2(tokens))
    return padded if padded * groups <= _MOST_COLUMNS else 0


@triton.jit
def group_columns(values, NB: tl.constexpr):
    """[BT] repeated for every group: [BC]."""
    return tl.reshape(tl.broadcast_to(values[None, :], (NB, values.shape[0])), (NB * values.shape[0],))


@triton.jit
def load_columns(vectors, inside, k, K: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, BT: tl.constexpr):
    """The activations' tile [BC, BK] from element k on, of the vectors at the addresses [BC]; zeros outside a column's group."""
    groups = tl.arange(0, BK // GROUP * BT) // BT  # [BC]
    within = tl.arange(0, BK)
    mask = inside[:, None] & (groups[:, None] == (within // GROUP)[None, :]) & (k + within < K)[None, :]
    return tl.load(vectors[:, None] + (k + within)[None, :], mask=mask, other=0.0)


@triton.jit
def group_dot_step(
    acc,  # float32 [BN, BC]
    x,  # [BC, BK], from `load_columns`
    q,  # first code of the matrix
    s,
    z,
    rows,  # [BN]
    k,  # first element of this step
    N,
    K: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    FAST: tl.constexpr,
    WARPGROUP: tl.constexpr,
):
    """acc + weight[rows, group] @ x[group] for the group and the token of every column."""
    packed = _codes(q, rows, k // 2, N, K // 2, BK // 2, WARPGROUP)
    zeros = _zeros(z, rows, k, N, K, BK, GROUP)  # float32 [BN, NB]
    if FAST and x.dtype == tl.bfloat16:
        even, odd = _steps_in_bfloat16(packed, _spread((-128.0 - zeros).to(tl.bfloat16), BK // 2))
    elif FAST and x.dtype == tl.float16:
        even, odd = _steps_in_float16(packed, _spread((-1024.0 - zeros).to(tl.float16), BK // 2))
    else:
        zero = _spread(zeros, BK // 2)
        even, odd = ((packed & 15).to(tl.float32) - zero).to(x.dtype), ((packed >> 4).to(tl.float32) - zero).to(x.dtype)
    x_even, x_odd = tl.split(tl.reshape(x, (x.shape[0], BK // 2, 2)))
    product = tl.dot(even, tl.trans(x_even), input_precision="ieee")
    product = tl.dot(odd, tl.trans(x_odd), product, input_precision="ieee")
    return acc + product * _spread(_scales(s, rows, k, N, K, BK, GROUP), x.shape[0])


@triton.jit
def over_groups(acc, NB: tl.constexpr):
    """[BN, BC] summed over the groups: [BN, BT]."""
    return tl.sum(tl.reshape(acc, (acc.shape[0], NB, acc.shape[1] // NB)), 1)


@triton.jit
def _steps_in_bfloat16(packed, zero):
    """(even, odd) elements of bytes: code - zero-point, exactly; `zero` is -128 - zero-point."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 p, r, a, b, c, d, one;
        mov.b32 one, 0x3F803F80;
        prmt.b32 p, $4, 0, 0x4140;
        prmt.b32 r, $4, 0, 0x4342;
        lop3.b32 a, p, 0x000F000F, 0x43004300, 0xEA;
        lop3.b32 b, r, 0x000F000F, 0x43004300, 0xEA;
        shr.u32 p, p, 4;
        shr.u32 r, r, 4;
        lop3.b32 c, p, 0x000F000F, 0x43004300, 0xEA;
        lop3.b32 d, r, 0x000F000F, 0x43004300, 0xEA;
        fma.rn.bf16x2 $0, a, one, $5;
        fma.rn.bf16x2 $1, b, one, $6;
        fma.rn.bf16x2 $2, c, one, $5;
        fma.rn.bf16x2 $3, d, one, $6;
        }
        """,
        "=&r,=&r,=&r,=&r,r,r,r",
        [packed, zero],
        dtype=(tl.bfloat16, tl.bfloat16),
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
