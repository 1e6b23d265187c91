"""Round to nearest: each group's own range is its grid. No calibration data."""

from __future__ import annotations

import torch

from dbrx_q.kernels import cpu_quantize
from dbrx_q.kernels.groups import check_group_size, check_scales
from dbrx_q.kernels.int4 import GROUP_SIZES, Int4Weight
from dbrx_q.kernels.int8 import Int8Weight
from dbrx_q.layout import TensorFormat

__all__ = ["rtn"]


def rtn(weight: torch.Tensor, fmt: TensorFormat) -> tuple[Int4Weight | Int8Weight, float, float]:
    """The packed weight, its sum of squared errors and the sum of squares of the weight.

    Args:
        weight: [N, K], finite; a transposed view costs no copy.
        fmt: what to pack it in.

    Raises:
        FormatError: the group size does not divide K, or a group's range is too wide for float16 scales.
    """
    check_group_size(weight.shape[-1], fmt.group_size, GROUP_SIZES)
    pack = cpu_quantize.quantize_int4 if fmt.format == "int4" else cpu_quantize.quantize_int8
    packed, error, square = pack(weight, fmt.group_size)
    check_scales(packed.scales)
    return packed, error, square
