"""`Weight`, plain or quantized, and its dequantization.

Dimension letters: `T` tokens, `N` output features (rows), `K` input features (the reduction axis).
"""

from __future__ import annotations

import torch

from .quantized_weight import QuantizedWeight
from .registry import FORMATS

__all__ = ["Weight", "dequantize", "gather_rows"]

Weight = torch.Tensor | QuantizedWeight
"""A weight [..., N, K]: a plain tensor, or a quantized one of any format."""


def dequantize(weight: Weight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A weight [..., N, K] of any format as a plain tensor."""
    return weight.to(dtype) if isinstance(weight, torch.Tensor) else FORMATS[weight.format].dequantize(weight, dtype)


def gather_rows(weight: QuantizedWeight, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The dequantized rows [T, K] of a weight [N, K] at the indices `rows`, int64 [T]: the lookup of an embedding."""
    return dequantize(weight[rows], dtype)
