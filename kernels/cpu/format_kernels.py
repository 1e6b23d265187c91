"""The formats with compiled code on the CPU; a weight in any other format is dequantized by its record and multiplied by torch.

Dimension letters: `P` pairs of a token and one of its experts, `E` experts, `N` output features, `K` input features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dbrx_q.kernels.formats.int4 import Int4Weight
from dbrx_q.kernels.formats.int8 import Int8Weight
from dbrx_q.kernels.formats.nf4 import dequantize_on_cpu
from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight
from dbrx_q.kernels.formats.weights import dequantize

from . import int4, int8
from .activations import QuantizedActivations

__all__ = ["DEQUANTIZERS", "DOT_KERNELS", "DotKernels", "dequantize_rows"]


@dataclass(frozen=True)
class DotKernels:
    """Compiled code for the weights of one format, for K a multiple of 128."""

    matvec: Callable[[QuantizedActivations, Any, np.ndarray, np.ndarray, torch.Tensor], None]
    """Takes (activations, weight [E, N, K] or [N, K] of contiguous matrices, experts, offsets, out [P, N]): `linear.matvec` into `out`."""
    dequantize_rows: Callable[[Any, torch.Tensor], None]
    """Takes (contiguous weight [N, K], tile [N, K] of bfloat16 or float32) and dequantizes the weight into the tile."""
    zero_points: bool
    """Whether dot products need the sum of the activations of every group."""
    interleaved: bool
    """Whether `dequantize_rows` writes position 16 k + l of a block of 128 from element 8 l + k."""
    amx: bool = False
    """Whether `amx.py` has code for the format, too; without it many tokens take tiles on every chip."""


def _expert_steps(*parts: torch.Tensor) -> list[int]:
    """Bytes from an expert to the next one in each part; of no meaning where the parts are of one matrix."""
    return [part.stride(0) * part.element_size() for part in parts]


def _int4_matvec(x: QuantizedActivations, weight: Int4Weight, experts: np.ndarray, offsets: np.ndarray, out: torch.Tensor) -> None:
    tensors = weight.qweight, weight.scales, weight.zeros, x.codes, x.scales, x.sums
    w, s, z, codes, scales, sums = (tensor.data_ptr() for tensor in tensors)
    N, groups = out.shape[1], weight.scales.shape[-1]
    steps = _expert_steps(weight.qweight, weight.scales, weight.zeros)
    int4.matvec(w, s, z, *steps, experts, offsets, codes, scales, sums, N, groups, x.sums.shape[1], out.data_ptr(), weight.group_size)


def _int4_rows(weight: Int4Weight, tile: torch.Tensor) -> None:
    w, s, z, out = (tensor.data_ptr() for tensor in (weight.qweight, weight.scales, weight.zeros, tile))
    int4.dequantize_rows(w, s, z, len(tile), weight.scales.shape[-1], out, weight.group_size, int(tile.dtype == torch.bfloat16))


def _int8_matvec(x: QuantizedActivations, weight: Int8Weight, experts: np.ndarray, offsets: np.ndarray, out: torch.Tensor) -> None:
    w, s, codes, scales = (tensor.data_ptr() for tensor in (weight.qweight, weight.scales, x.codes, x.scales))
    steps, groups = _expert_steps(weight.qweight, weight.scales), weight.scales.shape[-1]
    int8.matvec(w, s, *steps, experts, offsets, codes, scales, out.shape[1], groups, out.data_ptr(), weight.group_size)


def _int8_rows(weight: Int8Weight, tile: torch.Tensor) -> None:
    w, s, out = (tensor.data_ptr() for tensor in (weight.qweight, weight.scales, tile))
    int8.dequantize_rows(w, s, len(tile), weight.scales.shape[-1], out, weight.group_size, int(tile.dtype == torch.bfloat16))


DOT_KERNELS = {
    "int4": DotKernels(_int4_matvec, _int4_rows, zero_points=True, interleaved=True, amx=True),
    "int8": DotKernels(_int8_matvec, _int8_rows, zero_points=False, interleaved=False, amx=True),
}
"""By format: dot products on packed codes, and rows dequantized into a tile."""

DEQUANTIZERS: dict[str, Callable[[Any, torch.dtype], torch.Tensor]] = {"nf4": dequantize_on_cpu}
"""By format: a faster function than the record's `dequantize`, with the same float32 bits, for contiguous weights on the CPU."""


def dequantize_rows(weight: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous weight [N, K] on the CPU as a plain tensor, by the fastest function for its format."""
    return DEQUANTIZERS.get(weight.format, dequantize)(weight, dtype)
