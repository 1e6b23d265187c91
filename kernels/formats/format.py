"""`Format`: all that the rest of the project has to know about one weight format.

Dimension letters: `N` output features (rows), `K` input features (the reduction axis), `G` group size, `n` = K/G groups of a row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .errors import FormatError
from .quantized_weight import QuantizedWeight
from .trellis_codes import TrellisCode

__all__ = ["PLAIN", "Format", "GridLevels", "Part", "StoredForm"]

PLAIN = "plain"
"""The name that stands for an unquantized tensor where a format is expected."""


@dataclass(frozen=True)
class Part:
    """One tensor of a quantized weight."""

    name: str
    """In a format the last name, such as "scales"; in a checkpoint the full name."""
    dtype: torch.dtype
    """The dtype of its elements."""
    shape: tuple[int, ...]
    """The shape for one matrix."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class GridLevels:
    """The values of a group in a format with a uniform grid: scale * u, u a whole number, plus an offset if the format has offsets.

    Symmetric: u from -levels to levels. With offsets: u = code, from 0 to levels. Otherwise u = code - zero-point, code from 0 to levels.
    """

    levels: int
    """The largest code."""
    symmetric: bool
    """Whether codes are signed, without a zero-point."""
    pack: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, int], QuantizedWeight]
    """Takes (u float32 [N, K], scales [N, n], shifts, G) and returns the weight. Shifts: None in a symmetric grid, offsets [N, n] in the
    dtype of the scales, or zero-points float32 [N, n]."""
    zeros: tuple[int, int] | None = None
    """The least and the largest zero-point, if a format has fewer than there are codes; both lie between 0 and levels. None: 0 and levels,
    or no zero-points in a symmetric grid and in one with offsets."""
    offsets: torch.dtype | None = None
    """The dtype of scales and offsets in a format with offsets; None: float16 scales and no offsets."""


@dataclass(frozen=True)
class StoredForm:
    """The form on disk of a format whose stored parts differ from those in memory. Rows depend on each other, so a matrix is stored as a
    whole."""

    store: Callable[[Any], dict[str, torch.Tensor]]
    """Takes the weight of one matrix, as `Format.quantize` makes it, and returns the parts to store."""
    load: Callable[[Mapping[str, torch.Tensor], int], QuantizedWeight]
    """The inverse up to rounding: takes (stored parts with any leading axes, G) and returns the weight in memory."""


@dataclass(frozen=True)
class Format:
    """The record of a weight format.

    The record names no kernels: `cpu/format_kernels.py` and `triton/codes.py` list the formats that they have code for. A weight in any
    other format is dequantized by `dequantize` and multiplied as a plain one.

    Raises:
        FormatError: a name that `--tensor NAME=FORMAT:GROUP` cannot spell, or that stands for an unquantized tensor there.
    """

    name: str
    """The name in config.json and on the command line."""
    bits: int
    """Bits of a code."""
    group_sizes: tuple[int, ...]
    """The group sizes on offer."""
    weight: type[QuantizedWeight]
    """The class of a weight in memory. Its `format` is the format of a loaded weight, which kernels are chosen by; another name than this
    record's where several formats on disk have one form in memory."""
    parts: Callable[[int, int, int], tuple[Part, ...]]
    """Takes (N, K, G) and returns the parts that are stored for one matrix, in their order in the file."""
    quantize: Callable[[torch.Tensor, int], QuantizedWeight]
    """Takes (weight [..., N, K], G) and rounds to nearest. Raises FormatError for a weight that the format cannot represent."""
    dequantize: Callable[[Any, torch.dtype], torch.Tensor]
    """Takes (weight, dtype) and returns the plain weight [..., N, K] on the same device."""
    grid: GridLevels | None = None
    """The uniform grid that methods other than rtn choose scales for; None: only rtn makes the format."""
    trellis: TrellisCode | None = None
    """The code of a format whose rows are streams, which methods search; None for all others."""
    fast: str | None = None
    """The name of the format of the same layout with a quicker search; None where there is none."""
    embedding: bool = False
    """Whether the embedding may have the format."""
    stored: StoredForm | None = None
    """The form on disk; None: the same as in memory."""

    @property
    def default_group_size(self) -> int:
        """The group size where none is named: 64 if it is offered and no larger one is the format's own first choice."""
        return 64 if 64 in self.group_sizes and self.trellis is None else self.group_sizes[0]

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w-]+", self.name) or self.name == PLAIN:
            raise FormatError(f"a format's name must be letters, digits, '_' and '-', and not {PLAIN!r}; found {self.name!r}")
