"""`Weight`, plain or quantized, and its dequantization.

Dimension letters: `T` tokens, `N` output features (rows), `K` input features (the reduction axis).
"""

from __future__ import annotations

import torch

from .quantized_weight import QuantizedWeight
from .registry import FORMATS

__all__ = ["Weight", "dequantize", "dequantize_range", "gather_rows"]

Weight = torch.Tensor | QuantizedWeight
"""A weight [..., N, K]: a plain tensor, or a quantized one of any format."""


def dequantize(weight: Weight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A weight [..., N, K] of any format as a plain tensor."""
    return weight.to(dtype) if isinstance(weight, torch.Tensor) else FORMATS[weight.format].dequantize(weight, dtype)


def dequantize_range(weight: QuantizedWeight, first: int, end: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows first .. end-1 of a weight [N, K] as a plain tensor. In a format that holds several rows together, `first` is free nevertheless:
    the rows before it that share its entries are dequantized with them and left out.
    """
    unit = weight.row_unit()
    start = first // unit * unit
    return dequantize(weight.rows(start, end), dtype)[first - start :]


def gather_rows(weight: QuantizedWeight, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The dequantized rows [T, K] of a weight [N, K] at the indices `rows`, int64 [T]: the lookup of an embedding."""
    return dequantize(weight[rows], dtype)
