"""The formats with compiled code on the CPU; a weight in any other format is dequantized by its record and multiplied by torch.

`row_codes.py` has what integer products need to know. Dimension letters: `N` output features, `K` input features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dbrx_q.kernels.formats import int2_int3
from dbrx_q.kernels.formats.int2_int3 import Int3Weight
from dbrx_q.kernels.formats.int4 import Int4Weight, pack
from dbrx_q.kernels.formats.int8 import Int8Weight
from dbrx_q.kernels.formats.nf4 import dequantize_on_cpu
from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight
from dbrx_q.kernels.formats.weights import dequantize

from . import int4, int8, trellis

__all__ = ["DEQUANTIZERS", "TILE_KERNELS", "TileKernels", "dequantize_rows"]


@dataclass(frozen=True)
class TileKernels:
    """Compiled code that dequantizes the weights of one format, for K a multiple of 128; for trellis formats of the
    group size."""

    dequantize_rows: Callable[[Any, torch.Tensor], None]
    """Takes (contiguous weight [N, K], tile [N, K] of bfloat16 or float32) and dequantizes the weight into the tile."""
    interleaved: bool
    """Whether `dequantize_rows` writes position 16 k + l of a block of 128 from element 8 l + k."""
    rotated: bool = False
    """Whether `dequantize_rows` writes the weight of rotated activations."""
    amx: bool = False
    """Whether `amx.py` has code for the format, too."""


def _int4_rows(weight: Int4Weight, tile: torch.Tensor) -> None:
    w, s, z, out = (tensor.data_ptr() for tensor in (weight.qweight, weight.scales, weight.zeros, tile))
    int4.dequantize_rows(w, s, z, len(tile), weight.scales.shape[-1], out, weight.group_size, int(tile.dtype == torch.bfloat16))


def _int8_rows(weight: Int8Weight, tile: torch.Tensor) -> None:
    w, s, out = (tensor.data_ptr() for tensor in (weight.qweight, weight.scales, tile))
    int8.dequantize_rows(w, s, len(tile), weight.scales.shape[-1], out, weight.group_size, int(tile.dtype == torch.bfloat16))


def _few_bits_rows(weight: Int3Weight, tile: torch.Tensor) -> None:
    """Rows of int3 or int2, as rows of int4 with the same codes and zero-points."""
    zeros = pack(int2_int3.unpack_bits(weight.zeros, weight.bits, weight.scales.shape[-1]))
    _int4_rows(Int4Weight(int2_int3.nibbles(weight.qweight, weight.bits), weight.scales, zeros, weight.group_size), tile)


TILE_KERNELS = {
    "int2": TileKernels(_few_bits_rows, interleaved=True),
    "int3": TileKernels(_few_bits_rows, interleaved=True),
    "int4": TileKernels(_int4_rows, interleaved=True, amx=True),
    "int8": TileKernels(_int8_rows, interleaved=False, amx=True),
    **{name: TileKernels(trellis.dequantize_rows, interleaved=False, rotated=True) for name in trellis.KINDS},
}
"""By format: rows dequantized into a tile."""

DEQUANTIZERS: dict[str, Callable[[Any, torch.dtype], torch.Tensor]] = {
    "nf4": dequantize_on_cpu,
    **dict.fromkeys(trellis.KINDS, trellis.dequantize),
}
"""By format: a faster function than the record's `dequantize`, with the same float32 bits, for contiguous weights on the CPU."""


def dequantize_rows(weight: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous weight [N, K] on the CPU as a plain tensor, by the fastest function for its format."""
    return DEQUANTIZERS.get(weight.format, dequantize)(weight, dtype)
