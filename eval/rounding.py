"""Weights rounded to a packed format and decoded again.

Dimension letters: `N` rows of a matrix, `K` its reduction axis; `...` is any number of leading axes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dbrx_q.kernels import cpu_quantize, int4, int8, nf4
from dbrx_q.kernels.groups import check_scales
from dbrx_q.layout import TensorFormat

__all__ = ["Rounding", "rounded"]

_PIECE = 1 << 22  # elements that are rounded together: one expert's matrix has 66 million, of which several float32 copies are made


@dataclass(frozen=True)
class Rounding:
    """What rounding did to one tensor. nbytes: packed. error, square: sums of squares of the errors and of the weights."""

    parameters: int
    nbytes: int
    error: float
    square: float


def rounded(weight: torch.Tensor, fmt: TensorFormat) -> tuple[torch.Tensor, Rounding]:
    """A weight as it would be decoded from `fmt`, in its own dtype, place and order in memory; and what that did to it.

    Args:
        weight: [..., N, K], finite, plain.
        fmt: rounded to nearest.

    Raises:
        FormatError: a group's range is too wide for float16 scales, or, for nf4, NaN.
    """
    out = torch.empty_like(weight)
    N, K = weight.shape[-2:]
    nbytes, error, square = 0, 0.0, 0.0
    step = max(1, _PIECE // K)
    for matrix, target in zip(weight.view(-1, N, K), out.view(-1, N, K), strict=True):
        for first in range(0, N, step):
            piece = matrix[first : first + step].cpu()
            values, packed_bytes = _round(piece, fmt)
            nbytes += packed_bytes
            error += float((values - piece.float()).double().square().sum())
            square += float(piece.double().square().sum())
            target[first : first + step] = values
    return out, Rounding(weight.numel(), nbytes, error, square)


def _round(weight: torch.Tensor, fmt: TensorFormat) -> tuple[torch.Tensor, int]:
    """(float32 [N, K] that the packed weight stands for, bytes of the packed weight)."""
    if fmt.format == "nf4":
        codes = nf4.quantize(weight, fmt.group_size)
        return nf4.dequantize(codes), codes.nbytes
    if fmt.format == "int4":
        four, _, _ = cpu_quantize.quantize_int4(weight, fmt.group_size)
        check_scales(four.scales)
        return int4.dequantize(four), four.nbytes
    eight, _, _ = cpu_quantize.quantize_int8(weight, fmt.group_size)
    check_scales(eight.scales)
    return int8.dequantize(eight), eight.nbytes
