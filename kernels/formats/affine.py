"""Affine grouped weights: value = scale * code + offset, with unsigned codes and a float scale and offset per group of 32, 64 or 128.

Unlike int4's zero-point, the offset is any number, so groups need not contain 0, and scales may be negative. llama.cpp's Q4_1 and Q5_1 and
MLX's affine formats have such groups. There are four formats: `affine4` and `affine8` have float16 scales and offsets, `affine4-bf16` and
`affine8-bf16` bfloat16 ones. The CPU has integer products for them; Triton has no code, and a GPU dequantizes them.

Dimension letters: `N` output features (rows), `K` input features (the reduction axis), `G` group size; `...` is any number of leading
axes, such as the experts of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from .format import Format, GridLevels, Part
from .groups import check_group_size, check_scales, check_weight, grouped, steps_of
from .int4 import pack, unpack
from .quantized_weight import QuantizedWeight

__all__ = [
    "FORMATS",
    "GROUP_SIZES",
    "Affine4Bf16Weight",
    "Affine4Weight",
    "Affine8Bf16Weight",
    "Affine8Weight",
    "dequantize",
    "quantize",
]

GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Affine4Weight(QuantizedWeight):
    """A weight [..., N, K] in 4 + 32/G bits per element; value = scale * code + offset.

    Bit layout of one row (byte addresses grow to the right, the high nibble is drawn first):

        qweight  | e1 e0 | e3 e2 | e5 e4 | ...    uint8 [..., N, K/2]      codes 0..15 of elements 0..K-1
        scales   |  s0   |  s1   | ...            float16 [..., N, K/G]    one per group of G neighbouring elements
        offsets  |  b0   |  b1   | ...            float16 [..., N, K/G]    the value of code 0
    """

    format: ClassVar[str] = "affine4"
    part_names: ClassVar[tuple[str, ...]] = ("qweight", "scales", "offsets")
    bits: ClassVar[int] = 4
    """Bits of a code."""
    dtype: ClassVar[torch.dtype] = torch.float16
    """The dtype of scales and offsets."""

    qweight: torch.Tensor
    """Codes, two per byte."""
    scales: torch.Tensor
    """The scale of each group; it may be negative."""
    offsets: torch.Tensor
    """The value of code 0 in each group."""
    group_size: int
    """G, elements that share a scale."""

    @property
    def shape(self) -> torch.Size:
        """[..., N, K] of the weight that the parts represent."""
        return torch.Size((*self.qweight.shape[:-1], self.qweight.shape[-1] * 8 // self.bits))


@dataclass(frozen=True)
class Affine4Bf16Weight(Affine4Weight):
    """`Affine4Weight` with scales and offsets in bfloat16."""

    format: ClassVar[str] = "affine4-bf16"
    dtype: ClassVar[torch.dtype] = torch.bfloat16


@dataclass(frozen=True)
class Affine8Weight(Affine4Weight):
    """A weight [..., N, K] in 8 + 32/G bits per element; value = scale * code + offset.

    Byte layout of one row; scales and offsets are those of `Affine4Weight`:

        qweight  | e0 | e1 | e2 | ...    uint8 [..., N, K]    codes 0..255 of elements 0..K-1
    """

    format: ClassVar[str] = "affine8"
    bits: ClassVar[int] = 8


@dataclass(frozen=True)
class Affine8Bf16Weight(Affine8Weight):
    """`Affine8Weight` with scales and offsets in bfloat16."""

    format: ClassVar[str] = "affine8-bf16"
    dtype: ClassVar[torch.dtype] = torch.bfloat16


def quantize(weight: torch.Tensor, group_size: int = 64, *, kind: type[Affine4Weight] = Affine4Weight) -> Affine4Weight:
    """`weight` rounded to nearest on the grid from the least to the largest element of each group.

    Scales and offsets are rounded to their dtype first. A group whose scale is rounded to 0, such as one of equal elements, gets the middle
    of its range as the offset.

    Args:
        weight: [..., N, K], bfloat16, float16 or float32.
        group_size: 32, 64 or 128; divides K.
        kind: the class of the result, which says the bits of a code and the dtype of scales and offsets.

    Raises:
        FormatError: a group size that is not offered or does not divide K, NaN or infinity, or a range that the dtype cannot hold.
    """
    check_group_size(weight.shape[-1], group_size, GROUP_SIZES)
    levels = 2**kind.bits - 1
    groups = grouped(check_weight(weight), group_size)  # [..., N, K/G, G]
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scales = (high / levels - low / levels).to(kind.dtype)
    offsets = torch.where(scales == 0, low / 2 + high / 2, low).to(kind.dtype)
    check_scales(scales)
    check_scales(offsets)
    codes = ((groups - offsets.float()) / steps_of(scales)).round().clamp(0, levels)
    return _pack_codes(kind, codes.flatten(-2), scales.squeeze(-1), offsets.squeeze(-1), group_size)


def dequantize(weight: Affine4Weight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The plain weight [..., N, K]: scale * code, exact in float32, plus the offset, rounded to float32, then to `dtype`."""
    codes = unpack(weight.qweight, weight.shape[-1]) if weight.bits == 4 else weight.qweight
    values = grouped(codes.float(), weight.group_size) * weight.scales.float().unsqueeze(-1)
    return values.add_(weight.offsets.float().unsqueeze(-1)).flatten(-2).to(dtype)


def _pack_codes(
    kind: type[Affine4Weight], codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None, group_size: int
) -> Affine4Weight:
    """See `GridLevels.pack`; u is the code."""
    assert offsets is not None
    unsigned = codes.to(torch.uint8)
    return kind(pack(unsigned) if kind.bits == 4 else unsigned, scales, offsets, group_size)


def _parts(N: int, K: int, group_size: int, *, kind: type[Affine4Weight]) -> tuple[Part, ...]:
    groups = K // group_size
    return (
        Part("qweight", torch.uint8, (N, K * kind.bits // 8)),
        Part("scales", kind.dtype, (N, groups)),
        Part("offsets", kind.dtype, (N, groups)),
    )


def _format(kind: type[Affine4Weight]) -> Format:
    return Format(
        name=kind.format,
        bits=kind.bits,
        group_sizes=GROUP_SIZES,
        weight=kind,
        parts=partial(_parts, kind=kind),
        quantize=partial(quantize, kind=kind),
        dequantize=dequantize,
        grid=GridLevels(2**kind.bits - 1, symmetric=False, pack=partial(_pack_codes, kind), offsets=kind.dtype),
        embedding=True,
    )


FORMATS = tuple(_format(kind) for kind in (Affine4Weight, Affine8Weight, Affine4Bf16Weight, Affine8Bf16Weight))
