"""`Format`: all that the rest of the project has to know of one weight format.

Dimension letters: `N` output features (rows), `K` input features (the reduction axis), `G` group size, `n` = K/G groups of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .quantized_weight import QuantizedWeight

__all__ = ["Format", "GridLevels", "Part", "StoredForm"]


@dataclass(frozen=True)
class Part:
    """One tensor of a quantized weight."""

    name: str
    """Its name: the last one, as "scales", in a format; the full one in a checkpoint."""
    dtype: torch.dtype
    """Of its elements."""
    shape: tuple[int, ...]
    """Of one matrix."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class GridLevels:
    """The values of a group in a format with a uniform grid: scale * u, u a whole number.

    Symmetric: u from -levels to levels. Otherwise u = code - zero-point, code and zero-point from 0 to levels.
    """

    levels: int
    """The largest code."""
    symmetric: bool
    """Whether codes are signed, without a zero-point."""
    pack: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, int], QuantizedWeight]
    """(u float32 [N, K], scales float16 [N, n], zero-points float32 [N, n] or None, G) to the weight."""


@dataclass(frozen=True)
class StoredForm:
    """How a format is stored whose parts on disk are not those in memory. Its rows are not independent: a matrix is stored as a whole."""

    in_memory: str
    """The name of the format that a loaded weight has."""
    store: Callable[[Any], dict[str, torch.Tensor]]
    """The weight of one matrix, as `Format.quantize` makes it, to the parts that are stored."""
    load: Callable[[Mapping[str, torch.Tensor], int], QuantizedWeight]
    """The inverse, up to its rounding: (stored parts with any leading axes, G) to the weight in memory."""


@dataclass(frozen=True)
class Format:
    """The record of a weight format.

    Kernels are not named here: `cpu/format_kernels.py` and `triton/codes.py` list the formats that they have code for. A weight of any
    other format is dequantized by `dequantize` and multiplied as a plain one.
    """

    name: str
    """As in config.json and on the command line."""
    bits: int
    """Of a code."""
    group_sizes: tuple[int, ...]
    """The group sizes on offer."""
    weight: type[QuantizedWeight]
    """The class of a weight in memory."""
    parts: Callable[[int, int, int], tuple[Part, ...]]
    """(N, K, G) to the parts that are stored of one matrix, in their order in the file."""
    quantize: Callable[[torch.Tensor, int], QuantizedWeight]
    """(weight [..., N, K], G) to the nearest weight of the format. Raises FormatError for a weight that the format cannot represent."""
    dequantize: Callable[[Any, torch.dtype], torch.Tensor]
    """(weight, dtype) to the plain weight [..., N, K], on the weight's device."""
    grid: GridLevels | None = None
    """The uniform grid that methods other than rtn choose scales for; None: only rtn makes the format."""
    embedding: bool = False
    """Whether the embedding may have it."""
    stored: StoredForm | None = None
    """How it is stored; None: as it is in memory."""
