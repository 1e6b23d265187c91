"""Round to nearest, on the grid of each group's range; in trellis formats the streams of least error. It needs no calibration data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight
from dbrx_q.kernels.formats.registry import TensorFormat
from dbrx_q.kernels.quantize import concatenate_rows, has_compiled_code, quantize, quantize_measured, squared_errors

from .trellis import trellis_nearest

__all__ = ["rtn", "rtn_whole"]

_PIECE_ELEMENTS = 1 << 20  # elements quantized at a time without compiled code, in several copies of 4 bytes each


def rtn(weight: torch.Tensor, fmt: TensorFormat) -> tuple[QuantizedWeight, float, float]:
    """The quantized weight, its sum of squared errors and the sum of squares of the weight.

    Args:
        weight: [N, K], finite; a transposed view costs no copy. Rows are independent of each other, except in a format with a `StoredForm`:
            there they are taken for a whole matrix, and in trellis formats, where those of a tile of 128 weigh by their scales.
        fmt: the format.

    Raises:
        FormatError: the group size is not offered or does not divide K, a group's range is too wide for float16 scales, or, for nf4, NaN.
    """
    if fmt.record.stored is not None:
        parts, error, square = rtn_whole([weight], fmt)
        return fmt.load(parts), error, square
    if fmt.record.trellis is not None:
        return trellis_nearest(weight, fmt)
    if has_compiled_code(fmt):
        return quantize_measured(weight, fmt)
    pieces, sums = [], [0.0, 0.0]
    for rows in _pieces([weight]):
        packed, *more = quantize_measured(rows, fmt)
        pieces.append(packed)
        sums = [a + b for a, b in zip(sums, more, strict=True)]
    return concatenate_rows(pieces), sums[0], sums[1]


def rtn_whole(blocks: Sequence[torch.Tensor], fmt: TensorFormat) -> tuple[dict[str, torch.Tensor], float, float]:
    """The stored parts of a whole matrix in a format with a `StoredForm`; errors and sums as for `rtn`.

    Args:
        blocks: [n, K] each, together the rows of the matrix.
        fmt: the format.
    """
    stored = fmt.record.stored
    assert stored is not None
    parts = stored.store(concatenate_rows([quantize(rows, fmt) for rows in _pieces(blocks)]))
    loaded = fmt.load(parts)
    error = square = 0.0
    first = 0
    for rows in _pieces(blocks):
        more = squared_errors(loaded.rows(first, first + len(rows)), rows)
        error, square, first = error + more[0], square + more[1], first + len(rows)
    return parts, error, square


def _pieces(blocks: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The rows, in pieces that are quantized one at a time."""
    for block in blocks:
        yield from block.split(max(1, _PIECE_ELEMENTS // block.shape[-1]))
