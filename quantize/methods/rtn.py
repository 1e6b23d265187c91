"""Round to nearest: each group's own range is its grid. No calibration data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from dbrx_q.checkpoint.layout import GROUP_SIZES, TensorFormat
from dbrx_q.kernels.cpu import quantize as cpu_quantize
from dbrx_q.kernels.formats import nf4
from dbrx_q.kernels.formats.groups import check_group_size, check_scales
from dbrx_q.kernels.formats.nf4 import Nf4DoubleWeight, Nf4Weight
from dbrx_q.kernels.formats.weights import PackedFormat

__all__ = ["nf4_double", "rtn"]

_NF4_ELEMENTS = 1 << 20  # that bitsandbytes gets at once: it makes several copies, of 4 bytes an element


def rtn(weight: torch.Tensor, fmt: TensorFormat) -> tuple[PackedFormat, float, float]:
    """The packed weight, its sum of squared errors and the sum of squares of the weight.

    Args:
        weight: [N, K], finite; a transposed view costs no copy. Rows are independent of each other in every format but nf4-double, where
            they are taken for the whole matrix.
        fmt: what to pack it in.

    Raises:
        FormatError: the group size is not offered or does not divide K, a group's range is too wide for float16 scales, or, for nf4, NaN.
    """
    check_group_size(weight.shape[-1], fmt.group_size, GROUP_SIZES[fmt.format])
    if fmt.format == "nf4":
        return _nf4(weight, fmt.group_size)
    if fmt.format == "nf4-double":
        double, error, square = nf4_double([weight], fmt.group_size)
        return double.decoded(), error, square
    pack = cpu_quantize.quantize_int4 if fmt.format == "int4" else cpu_quantize.quantize_int8
    packed, error, square = pack(weight, fmt.group_size)
    check_scales(packed.scales)
    return packed, error, square


def nf4_double(blocks: Sequence[torch.Tensor], group_size: int) -> tuple[Nf4DoubleWeight, float, float]:
    """A whole matrix, whose scales are rounded together when all its codes are there; what is given and raised is as for `rtn`.

    Args:
        blocks: [n, K] each, together the matrix' rows.
        group_size: 64.
    """
    pieces = [nf4.quantize(rows, group_size) for rows in _pieces(blocks)]
    qweight, absmax = (torch.cat([getattr(piece, part) for piece in pieces]) for part in ("qweight", "absmax"))
    del pieces
    double = Nf4DoubleWeight(qweight, *nf4.compress_absmax(absmax), group_size)
    decoded = double.decoded()
    error = square = 0.0
    first = 0
    for rows in _pieces(blocks):
        more = _errors(decoded.rows(first, first + len(rows)), rows)
        error, square, first = error + more[0], square + more[1], first + len(rows)
    return double, error, square


def _nf4(weight: torch.Tensor, group_size: int) -> tuple[Nf4Weight, float, float]:
    pieces = []
    error = square = 0.0
    for rows in _pieces([weight]):
        packed = nf4.quantize(rows, group_size)
        more = _errors(packed, rows)
        error, square = error + more[0], square + more[1]
        pieces.append(packed)
    whole = Nf4Weight(torch.cat([piece.qweight for piece in pieces]), torch.cat([piece.absmax for piece in pieces]), group_size)
    return whole, error, square


def _pieces(blocks: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """As many rows as bitsandbytes gets at once."""
    for block in blocks:
        yield from block.split(max(1, _NF4_ELEMENTS // block.shape[-1]))


def _errors(packed: Nf4Weight, rows: torch.Tensor) -> tuple[float, float]:
    """Sums of squares of what the rows lost, and of the rows."""
    wide = rows.double()
    return float((nf4.dequantize_on_cpu(packed, torch.float32) - wide).square().sum()), float(wide.square().sum())
