"""int8 grouped weights: symmetric, one float16 scale per group of 32, 64 or 128 along the reduction axis.

Dimension letters: `N` output features (rows), `K` input features (the reduction axis), `G` group size; `...` is any number of leading
axes, such as the experts of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .groups import check_group_size, check_scales, check_weight, grouped, steps_of

__all__ = ["GROUP_SIZES", "Int8Weight", "dequantize", "gather_rows", "quantize"]

GROUP_SIZES = (32, 64, 128)
_LEVELS = 127


@dataclass(frozen=True)
class Int8Weight:
    """A weight [..., N, K] in 8 + 16/G bits per element; decoded value = scale * code.

    Byte layout of one row:

        qweight  | e0 | e1 | e2 | ...     int8 [..., N, K]        codes -127..127
        scales   |   s0    |   s1   |     float16 [..., N, K/G]   one per group of G neighbouring elements

    There is no `pack`: a code is a byte.
    """

    qweight: torch.Tensor
    scales: torch.Tensor
    group_size: int

    @property
    def shape(self) -> torch.Size:
        """[..., N, K] of the weight that this stands for."""
        return self.qweight.shape

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.qweight.nbytes + self.scales.nbytes

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return self.qweight.device

    def __getitem__(self, index: int) -> Int8Weight:
        """The weight at `index` of the first leading axis, without a copy."""
        return Int8Weight(self.qweight[index], self.scales[index], self.group_size)

    def contiguous(self) -> Int8Weight:
        """The same weight with every part contiguous, as the compiled kernels take it; no copy where it is."""
        return Int8Weight(self.qweight.contiguous(), self.scales.contiguous(), self.group_size)

    def rows(self, first: int, end: int) -> Int8Weight:
        """Rows first .. end-1 of a weight [N, K], without a copy."""
        return Int8Weight(self.qweight[first:end], self.scales[first:end], self.group_size)


def quantize(weight: torch.Tensor, group_size: int = 64) -> Int8Weight:
    """Round to nearest on the grid of each group's largest magnitude.

    Args:
        weight: [..., N, K], bfloat16, float16 or float32.
        group_size: 32, 64 or 128; divides K.

    Raises:
        FormatError: a group size that is not offered or does not divide K, NaN or infinity, or a range wider than float16 scales reach.
    """
    check_group_size(weight.shape[-1], group_size, GROUP_SIZES)
    groups = grouped(check_weight(weight), group_size)  # [..., N, K/G, G]
    scales = (groups.abs().amax(-1, keepdim=True) / _LEVELS).half()
    check_scales(scales)
    steps = steps_of(scales)
    codes = (groups / steps).round().clamp(-_LEVELS, _LEVELS)
    return Int8Weight(codes.to(torch.int8).flatten(-2), scales.squeeze(-1), group_size)


def dequantize(weight: Int8Weight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The decoded weight [..., N, K]: scale * code, exact in float32, then rounded to `dtype`."""
    codes = grouped(weight.qweight.float(), weight.group_size)
    return (codes * weight.scales.float().unsqueeze(-1)).flatten(-2).to(dtype)


def gather_rows(weight: Int8Weight, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Decoded rows of a weight [N, K], as an embedding looks them up: int64 `rows` [T] to [T, K]."""
    return dequantize(Int8Weight(weight.qweight[rows], weight.scales[rows], weight.group_size), dtype)
