"""The numbers that stand for formats in Triton kernels, the same for weights and KV caches."""

from __future__ import annotations

import torch
import triton.language as tl

from dbrx_q.kernels.formats.registry import FORMATS
from dbrx_q.kernels.formats.weights import Weight

__all__ = ["CODES", "INT4", "INT8", "NF4", "PLAIN", "TRELLIS", "code_of", "served"]

PLAIN = tl.constexpr(0)
INT4 = tl.constexpr(1)
INT8 = tl.constexpr(2)
NF4 = tl.constexpr(3)
TRELLIS = tl.constexpr(4)

CODES = {"plain": PLAIN.value, "int4": INT4.value, "int8": INT8.value, "nf4": NF4.value}
CODES |= {name: TRELLIS.value for name, record in FORMATS.items() if record.trellis is not None}
"""The numbers by name of the format. A weight in any other format is dequantized before it is multiplied."""


def code_of(weight: Weight) -> int:
    """The number of the weight's format, which must be in `CODES`."""
    return CODES["plain" if isinstance(weight, torch.Tensor) else weight.format]


def served(weight: Weight) -> bool:
    """Whether the kernels have code for the weight's format."""
    return isinstance(weight, torch.Tensor) or weight.format in CODES
