"""Weights rounded to a packed format and decoded again.

Dimension letters: `N` rows of a matrix, `K` its reduction axis; `...` is any number of leading axes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.kernels.cpu import quantize as cpu_quantize
from dbrx_q.kernels.formats import int4, int8, nf4
from dbrx_q.kernels.formats.groups import check_scales
from dbrx_q.kernels.formats.nf4 import Nf4DoubleWeight

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
        pieces = matrix.split(step)
        found = _round_double(pieces, fmt.group_size) if fmt.format == "nf4-double" else (_round(piece.cpu(), fmt) for piece in pieces)
        for piece, place, (values, packed_bytes) in zip(pieces, target.split(step), found, strict=True):
            own = piece.cpu()
            nbytes += packed_bytes
            error += float((values - own.float()).double().square().sum())
            square += float(own.double().square().sum())
            place.copy_(values)
    return out, Rounding(weight.numel(), nbytes, error, square)


def _round_double(pieces: Sequence[torch.Tensor], group_size: int) -> Iterator[tuple[torch.Tensor, int]]:
    """As `_round` of every piece of one matrix, whose scales are rounded together; the first has the bytes of all."""
    packed = [nf4.quantize(piece.cpu(), group_size) for piece in pieces]
    qweight, absmax = (torch.cat([getattr(some, part) for some in packed]) for part in ("qweight", "absmax"))
    whole = Nf4DoubleWeight(qweight, *nf4.compress_absmax(absmax), group_size)
    decoded, first = whole.decoded(), 0
    for piece in pieces:
        yield nf4.dequantize(decoded.rows(first, first + len(piece))), 0 if first else whole.nbytes
        first += len(piece)


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
