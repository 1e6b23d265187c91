"""int4 grouped weights: asymmetric, one float16 scale and one 4-bit zero-point per group of 32, 64 or 128 along the reduction axis.

Dimension letters: `N` output features (rows), `K` input features (the reduction axis), `G` group size; `...` is any number of leading
axes, such as the experts of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .groups import check_group_size, check_scales, check_weight, grouped, steps_of

__all__ = ["GROUP_SIZES", "Int4Weight", "dequantize", "pack", "quantize", "unpack"]

GROUP_SIZES = (32, 64, 128)
_LEVELS = 15


@dataclass(frozen=True)
class Int4Weight:
    """A weight [..., N, K] in 4 + 16/G + 4/G bits per element; decoded value = scale * (code - zero-point).

    Bit layout of one row (byte addresses grow to the right, the high nibble is drawn first):

        qweight  | e1 e0 | e3 e2 | e5 e4 | ...    uint8 [..., N, K/2]          codes 0..15 of elements 0..K-1
        scales   |  s0   |  s1   | ...            float16 [..., N, K/G]        one per group of G neighbouring elements
        zeros    | z1 z0 | z3 z2 | ...            uint8 [..., N, ceil(K/G/2)]  zero-points 0..15; an odd last nibble is 0
    """

    qweight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    group_size: int

    @property
    def shape(self) -> torch.Size:
        """[..., N, K] of the weight that this stands for."""
        return torch.Size((*self.qweight.shape[:-1], self.qweight.shape[-1] * 2))

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero-points."""
        return self.qweight.nbytes + self.scales.nbytes + self.zeros.nbytes

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return self.qweight.device

    def __getitem__(self, index: int) -> Int4Weight:
        """The weight at `index` of the first leading axis, without a copy."""
        return Int4Weight(self.qweight[index], self.scales[index], self.zeros[index], self.group_size)

    def contiguous(self) -> Int4Weight:
        """The same weight with every part contiguous, as the compiled kernels take it; no copy where it is."""
        return Int4Weight(self.qweight.contiguous(), self.scales.contiguous(), self.zeros.contiguous(), self.group_size)

    def rows(self, first: int, end: int) -> Int4Weight:
        """Rows first .. end-1 of a weight [N, K], without a copy."""
        return Int4Weight(self.qweight[first:end], self.scales[first:end], self.zeros[first:end], self.group_size)


def quantize(weight: torch.Tensor, group_size: int = 64) -> Int4Weight:
    """Round to nearest with the range of each group, zero included, as the grid.

    Args:
        weight: [..., N, K], bfloat16, float16 or float32.
        group_size: 32, 64 or 128; divides K.

    Raises:
        FormatError: a group size that is not offered or does not divide K, NaN or infinity, or a range wider than float16 scales reach.
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
    """The decoded weight [..., N, K]: scale * (code - zero-point), exact in float32, then rounded to `dtype`."""
    codes = grouped(unpack(weight.qweight, weight.shape[-1]).float(), weight.group_size)
    zeros = unpack(weight.zeros, weight.scales.shape[-1]).float()
    return ((codes - zeros.unsqueeze(-1)) * weight.scales.float().unsqueeze(-1)).flatten(-2).to(dtype)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Two codes a byte, the even element in the low nibble: uint8 [..., n] with values 0..15 to uint8 [..., ceil(n/2)]."""
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: torch.Tensor, n: int) -> torch.Tensor:
    """The inverse of `pack`: uint8 [..., ceil(n/2)] to uint8 [..., n]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :n]
