"""int3 and int2: asymmetric grouped weights as int4, with codes of 3 and 2 bits and zero-points of as many bits.

The codes lie in bit planes of int4's bytes, so that a few shifts of a whole register turn 128 codes into the 64 bytes that int4 has for
them (`nibbles`): the kernels for int4 continue from there. The CPU has integer products for both formats; Triton has no code, and a GPU
dequantizes them.

Dimension letters: `N` output features (rows), `K` input features (the reduction axis), `G` group size, `n` = K/G groups of a row, `B` =
ceil(K/128) blocks of a row; `...` is any number of leading axes, such as the experts of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F

from . import int4
from .format import Format, GridLevels, Part
from .groups import check_group_size, check_scales, check_weight, grouped, steps_of
from .quantized_weight import QuantizedWeight

__all__ = [
    "BLOCK",
    "FORMATS",
    "GROUP_SIZES",
    "Int2Weight",
    "Int3Weight",
    "dequantize",
    "nibbles",
    "pack_bits",
    "planes",
    "quantize",
    "unpack_bits",
]

GROUP_SIZES = (32, 64, 128)
BLOCK = 128
"""Elements whose codes are packed together."""


@dataclass(frozen=True)
class Int3Weight(QuantizedWeight):
    """A weight [..., N, K] in 3 + 16/G + 3/G bits per element; value = scale * (code - zero-point). Scales may be negative.

    A row has 48 bytes for each block of 128 elements e0 .. e127: a plane of the two low bits of each code, then one of the high bits. The
    last block of K that is no multiple of 128 is padded with codes 0 (the highest bits of a byte are drawn first):

        byte j,      j = 0 .. 31   | e(65 + 2j) | e(1 + 2j) | e(64 + 2j) | e(2j) |                              bits 1 and 0 of each code
        byte 32 + j, j = 0 .. 15   | e(97 + 2j) | e(65 + 2j) | e(33 + 2j) | e(1 + 2j) |
                                   | e(96 + 2j) | e(64 + 2j) | e(32 + 2j) | e(2j) |                             bit 2 of each code

        qweight  uint8 [..., N, 48 B]            codes 0..7
        scales   float16 [..., N, n]             one per group of G neighbouring elements
        zeros    uint8 [..., N, ceil(3 n / 8)]   zero-points 0..7: that of group g is bits 3 g .. 3 g + 2 of the row's bytes, counted from
                                                 the lowest bit of the first; bits that are left over are 0
    """

    format: ClassVar[str] = "int3"
    part_names: ClassVar[tuple[str, ...]] = ("qweight", "scales", "zeros")
    bits: ClassVar[int] = 3
    """Bits of a code and of a zero-point."""

    qweight: torch.Tensor
    """Codes, as planes of bits."""
    scales: torch.Tensor
    """The scale of each group."""
    zeros: torch.Tensor
    """Zero-points, as a stream of bits."""
    group_size: int
    """G, elements that share a scale."""

    @property
    def shape(self) -> torch.Size:
        """[..., N, K] of the weight that the parts represent."""
        return torch.Size((*self.scales.shape[:-1], self.scales.shape[-1] * self.group_size))


@dataclass(frozen=True)
class Int2Weight(Int3Weight):
    """A weight [..., N, K] in 2 + 16/G + 2/G bits per element; value = scale * (code - zero-point). Scales may be negative.

    As `Int3Weight` without the plane of high bits: a row has 32 bytes for each block of 128 elements. Codes and zero-points are 0..3, four
    zero-points a byte, that of the first of four groups in the lowest bits.

        qweight  uint8 [..., N, 32 B]
        scales   float16 [..., N, n]
        zeros    uint8 [..., N, ceil(n / 4)]
    """

    format: ClassVar[str] = "int2"
    bits: ClassVar[int] = 2


def quantize(weight: torch.Tensor, group_size: int = 64, *, kind: type[Int3Weight] = Int3Weight) -> Int3Weight:
    """`weight` rounded to nearest on the grid of each group's range, zero included, as `int4.quantize` does.

    Args:
        weight: [..., N, K], bfloat16, float16 or float32.
        group_size: 32, 64 or 128; divides K.
        kind: the class of the result.

    Raises:
        FormatError: a group size that is not offered or does not divide K, NaN or infinity, or a range too wide for float16 scales.
    """
    check_group_size(weight.shape[-1], group_size, GROUP_SIZES)
    levels = 2**kind.bits - 1
    groups = grouped(check_weight(weight), group_size)  # [..., N, n, G]
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    high = groups.amax(-1, keepdim=True).clamp(min=0)
    scales = ((high - low) / levels).half()
    check_scales(scales)
    steps = steps_of(scales)
    zeros = (-low / steps).round().clamp(0, levels)
    codes = ((groups / steps).round() + zeros).clamp(0, levels)
    return _packed(kind, codes.flatten(-2), scales.squeeze(-1), zeros.squeeze(-1), group_size)


def dequantize(weight: Int3Weight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The plain weight [..., N, K]: scale * (code - zero-point), exact in float32, then rounded to `dtype`."""
    codes = int4.unpack(nibbles(weight.qweight, weight.bits), weight.shape[-1])
    zeros = unpack_bits(weight.zeros, weight.bits, weight.scales.shape[-1]).float()
    values = grouped(codes.float(), weight.group_size) - zeros.unsqueeze(-1)
    return (values * weight.scales.float().unsqueeze(-1)).flatten(-2).to(dtype)


def planes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The planes uint8 [..., 16 `bits` B] of codes that int4 packs, uint8 [..., ceil(K/2)] with values of at most `bits` bits."""
    packed = F.pad(packed, (0, -packed.shape[-1] % (BLOCK // 2)))
    low = (packed & 0x33).unflatten(-1, (-1, 2, 32))
    low = low[..., 0, :] | low[..., 1, :] << 2  # [..., B, 32]
    if bits == 2:
        return low.flatten(-2)
    high = (packed >> 2 & 0x11).unflatten(-1, (-1, 4, 16))
    high = high[..., 0, :] | high[..., 1, :] << 1 | high[..., 2, :] << 2 | high[..., 3, :] << 3  # [..., B, 16]
    return torch.cat((low, high), -1).flatten(-2)


def nibbles(qweight: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `planes`: uint8 [..., 64 B], two codes per byte as int4 packs them, with those of padding."""
    blocks = qweight.unflatten(-1, (-1, 16 * bits))
    low = blocks[..., :32]
    packed = torch.cat((low & 0x33, low >> 2 & 0x33), -1)  # [..., B, 64]
    if bits == 3:
        high = torch.cat([blocks[..., 32:] >> quarter & 0x11 for quarter in range(4)], -1)
        packed |= high << 2
    return packed.flatten(-2)


def pack_bits(values: torch.Tensor, bits: int) -> torch.Tensor:
    """A stream of values of `bits` bits, uint8 [..., n], as bytes: uint8 [..., ceil(n * bits / 8)], the lowest bit first."""
    digits = (values.unsqueeze(-1) >> _places(bits, values.device) & 1).flatten(-2)
    eights = F.pad(digits, (0, -digits.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (eights << _places(8, values.device)).sum(-1).to(torch.uint8)


def unpack_bits(packed: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """The inverse of `pack_bits`: uint8 [..., ceil(n * bits / 8)] to uint8 [..., n]."""
    digits = (packed.unsqueeze(-1) >> _places(8, packed.device) & 1).flatten(-2)[..., : n * bits]
    return (digits.unflatten(-1, (n, bits)) << _places(bits, packed.device)).sum(-1).to(torch.uint8)


def _places(count: int, device: torch.device) -> torch.Tensor:
    return torch.arange(count, dtype=torch.uint8, device=device)


def _packed(kind: type[Int3Weight], codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, group_size: int) -> Int3Weight:
    """The weight with codes [..., N, K] and zero-points [..., N, n], whole numbers of any dtype."""
    qweight = planes(int4.pack(codes.to(torch.uint8)), kind.bits)
    return kind(qweight, scales, pack_bits(zeros.to(torch.uint8), kind.bits), group_size)


def _pack_grid(kind: type[Int3Weight], u: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group_size: int) -> Int3Weight:
    """See `GridLevels.pack`."""
    assert zeros is not None
    return _packed(kind, (grouped(u, group_size) + zeros.unsqueeze(-1)).flatten(-2), scales, zeros, group_size)


def _parts(N: int, K: int, group_size: int, *, kind: type[Int3Weight]) -> tuple[Part, ...]:
    groups = K // group_size
    return (
        Part("qweight", torch.uint8, (N, -(-K // BLOCK) * 16 * kind.bits)),
        Part("scales", torch.float16, (N, groups)),
        Part("zeros", torch.uint8, (N, -(-groups * kind.bits // 8))),
    )


def _format(kind: type[Int3Weight]) -> Format:
    return Format(
        name=kind.format,
        bits=kind.bits,
        group_sizes=GROUP_SIZES,
        weight=kind,
        parts=partial(_parts, kind=kind),
        quantize=partial(quantize, kind=kind),
        dequantize=dequantize,
        grid=GridLevels(2**kind.bits - 1, symmetric=False, pack=partial(_pack_grid, kind)),
        embedding=True,
    )


FORMATS = tuple(_format(kind) for kind in (Int3Weight, Int2Weight))
