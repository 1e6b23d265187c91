"""A weight in any format.

Dimension letters: `N` output features (rows), `K` input features (the reduction axis).
"""

from __future__ import annotations

import torch

from . import int4, int8, nf4
from .int4 import Int4Weight
from .int8 import Int8Weight
from .nf4 import Nf4Weight

__all__ = ["PackedFormat", "Weight", "dequantize"]


PackedFormat = Int4Weight | Int8Weight | Nf4Weight
"""A packed weight [..., N, K]."""


Weight = torch.Tensor | PackedFormat
"""A weight [..., N, K]: a plain tensor or a packed format."""


def dequantize(weight: Weight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Any weight [..., N, K] as a plain tensor."""
    if isinstance(weight, Int4Weight):
        return int4.dequantize(weight, dtype)
    if isinstance(weight, Int8Weight):
        return int8.dequantize(weight, dtype)
    if isinstance(weight, Nf4Weight):
        return nf4.dequantize(weight, dtype)
    return weight.to(dtype)
