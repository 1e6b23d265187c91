"""q4_0: int4 weights in groups of 32 whose zero-points are 7 or 8, which llama.cpp's Q4_0 holds without loss.

A block of Q4_0 is value = d * (code - 8), with a float16 d of either sign and codes 0..15. Zero-point 8 is d = scale with the same codes;
zero-point 7 is d = -scale with codes 15 - code. In memory and on disk a weight is one of int4; only the grid differs.

Dimension letters: `N` output features (rows), `K` input features (the reduction axis); `...` is any number of leading axes.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from . import int4
from .groups import check_group_size, check_scales, check_weight, grouped, steps_of
from .int4 import Int4Weight

__all__ = ["FORMAT", "GROUP_SIZES", "LEVELS", "ZERO_POINTS", "quantize"]

GROUP_SIZES = (32,)
ZERO_POINTS = 7, 8


def quantize(weight: torch.Tensor, group_size: int = 32) -> Int4Weight:
    """`weight` rounded to nearest on the finest grid that covers the range of each group with a zero-point of 7 or 8.

    Args:
        weight: [..., N, K], bfloat16, float16 or float32.
        group_size: 32; divides K.

    Raises:
        FormatError: a group size that is not offered or does not divide K, NaN or infinity, or a range too wide for float16 scales.
    """
    check_group_size(weight.shape[-1], group_size, GROUP_SIZES)
    groups = grouped(check_weight(weight), group_size)  # [..., N, K/G, G]
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    high = groups.amax(-1, keepdim=True).clamp(min=0)
    with_7, with_8 = torch.maximum(-low / 7, high / 8), torch.maximum(-low / 8, high / 7)
    zeros = torch.where(with_8 < with_7, 8.0, 7.0)  # the side of the larger magnitude gets the level more
    scales = torch.minimum(with_7, with_8).half()
    check_scales(scales)
    u = (groups / steps_of(scales)).round().clamp(-zeros, LEVELS.levels - zeros)
    return LEVELS.pack(u.flatten(-2), scales.squeeze(-1), zeros.squeeze(-1), group_size)  # type: ignore[return-value]


LEVELS = replace(int4.LEVELS, zeros=ZERO_POINTS)
FORMAT = replace(int4.FORMAT, name="q4_0", group_sizes=GROUP_SIZES, quantize=quantize, grid=LEVELS)
