"""Round to nearest: each group's own range is its grid. No calibration data."""

from __future__ import annotations

import torch

from dbrx_q.kernels import cpu_quantize, nf4
from dbrx_q.kernels.groups import check_group_size, check_scales
from dbrx_q.kernels.linear import PackedFormat
from dbrx_q.kernels.nf4 import Nf4Weight
from dbrx_q.layout import GROUP_SIZES, TensorFormat

__all__ = ["rtn"]

_NF4_ELEMENTS = 1 << 20  # that bitsandbytes gets at once: it makes several copies, of 4 bytes an element


def rtn(weight: torch.Tensor, fmt: TensorFormat) -> tuple[PackedFormat, float, float]:
    """The packed weight, its sum of squared errors and the sum of squares of the weight.

    Args:
        weight: [N, K], finite; a transposed view costs no copy.
        fmt: what to pack it in.

    Raises:
        FormatError: the group size is not offered or does not divide K, a group's range is too wide for float16 scales, or, for nf4, NaN.
    """
    check_group_size(weight.shape[-1], fmt.group_size, GROUP_SIZES[fmt.format])
    if fmt.format == "nf4":
        return _nf4(weight, fmt.group_size)
    pack = cpu_quantize.quantize_int4 if fmt.format == "int4" else cpu_quantize.quantize_int8
    packed, error, square = pack(weight, fmt.group_size)
    check_scales(packed.scales)
    return packed, error, square


def _nf4(weight: torch.Tensor, group_size: int) -> tuple[Nf4Weight, float, float]:
    pieces = []
    error = square = 0.0
    for rows in weight.split(max(1, _NF4_ELEMENTS // weight.shape[-1])):
        packed = nf4.quantize(rows, group_size)
        wide = rows.double()
        error += float((nf4.dequantize_on_cpu(packed, torch.float32) - wide).square().sum())
        square += float(wide.square().sum())
        pieces.append(packed)
    whole = Nf4Weight(torch.cat([piece.qweight for piece in pieces]), torch.cat([piece.absmax for piece in pieces]), group_size)
    return whole, error, square
