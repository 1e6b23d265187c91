"""A weight, plain or quantized.

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
    """Any weight [..., N, K] as a plain tensor."""
    return weight.to(dtype) if isinstance(weight, torch.Tensor) else FORMATS[weight.format].dequantize(weight, dtype)


def gather_rows(weight: QuantizedWeight, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Dequantized rows of a weight [N, K], as an embedding looks them up: int64 `rows` [T] to [T, K]."""
    return dequantize(weight[rows], dtype)
