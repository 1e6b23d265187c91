"""int8 grouped weights: symmetric, one float16 scale per group of 32, 64 or 128 along the reduction axis.

Dimension letters: `N` output features (rows), `K` input features (the reduction axis), `G` group size; `...` is any number of leading
axes, such as the experts of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .format import Format, GridLevels, Part
from .groups import check_group_size, check_scales, check_weight, grouped, steps_of
from .quantized_weight import QuantizedWeight

__all__ = ["FORMAT", "GROUP_SIZES", "LEVELS", "Int8Weight", "dequantize", "quantize"]

GROUP_SIZES = (32, 64, 128)
_LEVELS = 127


@dataclass(frozen=True)
class Int8Weight(QuantizedWeight):
    """A weight [..., N, K] in 8 + 16/G bits per element; value = scale * code.

    Scales may be negative and a code may be -128: `quantize` makes neither, but files of other programs have them.

    Byte layout of one row:

        qweight  | e0 | e1 | e2 | ...     int8 [..., N, K]        codes -128..127
        scales   |   s0    |   s1   |     float16 [..., N, K/G]   one per group of G neighbouring elements

    There is no `pack`: a code is a byte.
    """

    format: ClassVar[str] = "int8"
    part_names: ClassVar[tuple[str, ...]] = ("qweight", "scales")

    qweight: torch.Tensor
    """Codes, one per byte."""
    scales: torch.Tensor
    """The scale of each group."""
    group_size: int
    """G, elements that share a scale."""

    @property
    def shape(self) -> torch.Size:
        """[..., N, K] of the weight that the parts represent."""
        return self.qweight.shape


def quantize(weight: torch.Tensor, group_size: int = 64) -> Int8Weight:
    """`weight` rounded to nearest on the grid of each group's largest magnitude.

    Args:
        weight: [..., N, K], bfloat16, float16 or float32.
        group_size: 32, 64 or 128; divides K.

    Raises:
        FormatError: a group size that is not offered or does not divide K, NaN or infinity, or a range too wide for float16 scales.
    """
    check_group_size(weight.shape[-1], group_size, GROUP_SIZES)
    groups = grouped(check_weight(weight), group_size)  # [..., N, K/G, G]
    scales = (groups.abs().amax(-1, keepdim=True) / _LEVELS).half()
    check_scales(scales)
    steps = steps_of(scales)
    codes = (groups / steps).round().clamp(-_LEVELS, _LEVELS)
    return Int8Weight(codes.to(torch.int8).flatten(-2), scales.squeeze(-1), group_size)


def dequantize(weight: Int8Weight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The plain weight [..., N, K]: scale * code, exact in float32, then rounded to `dtype`."""
    codes = grouped(weight.qweight.float(), weight.group_size)
    return (codes * weight.scales.float().unsqueeze(-1)).flatten(-2).to(dtype)


def _parts(N: int, K: int, group_size: int) -> tuple[Part, ...]:
    return Part("qweight", torch.int8, (N, K)), Part("scales", torch.float16, (N, K // group_size))


def _pack_grid(u: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group_size: int) -> Int8Weight:
    """See `GridLevels.pack`; a code is u."""
    return Int8Weight(u.to(torch.int8), scales, group_size)


LEVELS = GridLevels(_LEVELS, symmetric=True, pack=_pack_grid)
FORMAT = Format(
    name="int8",
    bits=8,
    group_sizes=GROUP_SIZES,
    weight=Int8Weight,
    parts=_parts,
    quantize=quantize,
    dequantize=dequantize,
    grid=LEVELS,
    embedding=True,
)
