"""int4 grouped weights: asymmetric, one float16 scale and one 4-bit zero-point per group of 32, 64 or 128 along the reduction axis.

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

__all__ = ["FORMAT", "GROUP_SIZES", "LEVELS", "Int4Weight", "dequantize", "pack", "quantize", "unpack"]

GROUP_SIZES = (32, 64, 128)
_LEVELS = 15


@dataclass(frozen=True)
class Int4Weight(QuantizedWeight):
    """A weight [..., N, K] in 4 + 16/G + 4/G bits per element; value = scale * (code - zero-point).

    Scales may be negative: `quantize` makes none, but files of other programs have them.

    Bit layout of one row (byte addresses grow to the right, the high nibble is drawn first):

        qweight  | e1 e0 | e3 e2 | e5 e4 | ...    uint8 [..., N, K/2]          codes 0..15 of elements 0..K-1
        scales   |  s0   |  s1   | ...            float16 [..., N, K/G]        one per group of G neighbouring elements
        zeros    | z1 z0 | z3 z2 | ...            uint8 [..., N, ceil(K/G/2)]  zero-points 0..15; an odd last nibble is 0
    """

    format: ClassVar[str] = "int4"
    part_names: ClassVar[tuple[str, ...]] = ("qweight", "scales", "zeros")

    qweight: torch.Tensor
    """Codes, two per byte."""
    scales: torch.Tensor
    """The scale of each group."""
    zeros: torch.Tensor
    """Zero-points, two per byte."""
    group_size: int
    """G, elements that share a scale."""

    @property
    def shape(self) -> torch.Size:
        """[..., N, K] of the weight that the parts represent."""
        return torch.Size((*self.qweight.shape[:-1], self.qweight.shape[-1] * 2))


def quantize(weight: torch.Tensor, group_size: int = 64) -> Int4Weight:
    """`weight` rounded to nearest on the grid of each group's range, zero included.

    Args:
        weight: [..., N, K], bfloat16, float16 or float32.
        group_size: 32, 64 or 128; divides K.

    Raises:
        FormatError: a group size that is not offered or does not divide K, NaN or infinity, or a range too wide for float16 scales.
    """
    check_group_size(weight.shape[-1], group_size, GROUP_SIZES)
    groups = grouped(check_weight(weight), group_size)  # [..., N, K/G, G]
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    high = groups.amax(-1, keepdim=True).clamp(min=0)
    scales = ((high - low) / _LEVELS).half()
    check_scales(scales)
    steps = steps_of(scales)
    zeros = (-low / steps).round().clamp(0, _LEVELS)
    codes = ((groups / steps).round() + zeros).clamp(0, _LEVELS)
    return Int4Weight(
        qweight=pack(codes.to(torch.uint8).flatten(-2)),
        scales=scales.squeeze(-1),
        zeros=pack(zeros.to(torch.uint8).squeeze(-1)),
        group_size=group_size,
    )


def dequantize(weight: Int4Weight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The plain weight [..., N, K]: scale * (code - zero-point), exact in float32, then rounded to `dtype`."""
    codes = grouped(unpack(weight.qweight, weight.shape[-1]).float(), weight.group_size)
    zeros = unpack(weight.zeros, weight.scales.shape[-1]).float()
    return ((codes - zeros.unsqueeze(-1)) * weight.scales.float().unsqueeze(-1)).flatten(-2).to(dtype)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Pack two codes per byte, the even element in the low nibble: uint8 [..., n] with values 0..15 to uint8 [..., ceil(n/2)]."""
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: torch.Tensor, n: int) -> torch.Tensor:
    """The inverse of `pack`: uint8 [..., ceil(n/2)] to uint8 [..., n]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :n]


def _parts(N: int, K: int, group_size: int) -> tuple[Part, ...]:
    groups = K // group_size
    return (
        Part("qweight", torch.uint8, (N, K // 2)),
        Part("scales", torch.float16, (N, groups)),
        Part("zeros", torch.uint8, (N, (groups + 1) // 2)),
    )


def _pack_grid(u: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group_size: int) -> Int4Weight:
    """See `GridLevels.pack`."""
    assert zeros is not None
    codes = grouped(u, group_size) + zeros.unsqueeze(-1)
    return Int4Weight(pack(codes.flatten(-2).to(torch.uint8)), scales, pack(zeros.to(torch.uint8)), group_size)


LEVELS = GridLevels(_LEVELS, symmetric=False, pack=_pack_grid)
FORMAT = Format(
    name="int4",
    bits=4,
    group_sizes=GROUP_SIZES,
    weight=Int4Weight,
    parts=_parts,
    quantize=quantize,
    dequantize=dequantize,
    grid=LEVELS,
    embedding=True,
)
