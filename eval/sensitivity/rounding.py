"""Weights rounded to a format and dequantized again.

Dimension letters: `N` rows of a matrix, `K` its reduction axis; `...` is any number of leading axes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.kernels.formats.weights import dequantize
from dbrx_q.kernels.quantize import concatenate_rows, quantize

__all__ = ["Rounding", "rounded"]

_PIECE = 1 << 22  # elements that are rounded together: one expert's matrix has 66 million, of which several float32 copies are made


@dataclass(frozen=True)
class Rounding:
    """What rounding did to one tensor."""

    parameters: int
    """Weights of the tensor."""
    nbytes: int
    """Bytes of the packed tensor."""
    error: float
    """Sum of squared errors."""
    square: float
    """Sum of squares of the weights."""


def rounded(weight: torch.Tensor, fmt: TensorFormat) -> tuple[torch.Tensor, Rounding]:
    """A weight as it would be dequantized from `fmt`, in its own dtype, place and order in memory; and what that did to it.

    Args:
        weight: [..., N, K], finite, plain.
        fmt: rounded to nearest.

    Raises:
        FormatError: a group's range is too wide for float16 scales, or, for nf4, NaN.
    """
    out = torch.empty_like(weight)
    N, K = weight.shape[-2:]
    nbytes, error, square = 0, 0.0, 0.0
    unit = fmt.record.weight.row_unit()
    step = max(1, _PIECE // (K * unit)) * unit
    for matrix, target in zip(weight.view(-1, N, K), out.view(-1, N, K), strict=True):
        pieces = matrix.split(step)
        for piece, out_rows, (values, packed_bytes) in zip(pieces, target.split(step), _dequantized(pieces, fmt), strict=True):
            rows = piece.cpu()
            nbytes += packed_bytes
            error += float((values - rows.float()).double().square().sum())
            square += float(rows.double().square().sum())
            out_rows.copy_(values)
    return out, Rounding(weight.numel(), nbytes, error, square)


def _dequantized(pieces: Sequence[torch.Tensor], fmt: TensorFormat) -> Iterator[tuple[torch.Tensor, int]]:
    """For every piece [n, K] of a matrix: the float32 values that it is rounded to, and the bytes of its packed rows.

    In a format with a form of its own on disk the whole matrix is rounded together, and the first piece has the bytes of all.
    """
    stored = fmt.record.stored
    if stored is None:
        for piece in pieces:
            packed = quantize(piece.cpu(), fmt)
            yield dequantize(packed), packed.nbytes
        return
    parts = stored.store(concatenate_rows([quantize(piece.cpu(), fmt) for piece in pieces]))
    loaded, nbytes, first = fmt.load(parts), sum(part.nbytes for part in parts.values()), 0
    for piece in pieces:
        yield dequantize(loaded.rows(first, first + len(piece))), 0 if first else nbytes
        first += len(piece)
