"""`quantize` and `quantize_to_grid`: quantize a weight to any format, in compiled code if the CPU has code for the format.

Dimension letters: `N` output features (rows), `K` input features (the reduction axis), `G` group size, `n` = K/G groups of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dbrx_q.kernels.cpu import quantize as cpu_quantize
from dbrx_q.kernels.cpu.format_kernels import dequantize_rows
from dbrx_q.kernels.formats import trellis as trellis_format
from dbrx_q.kernels.formats.errors import FormatError
from dbrx_q.kernels.formats.groups import check_scales, grouped, steps_of
from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight
from dbrx_q.kernels.formats.registry import TensorFormat
from dbrx_q.kernels.formats.weights import dequantize
from dbrx_q.kernels.trellis import encode

__all__ = ["concatenate_rows", "has_compiled_code", "quantize", "quantize_measured", "quantize_to_grid", "squared_errors"]


def quantize(weight: torch.Tensor, fmt: TensorFormat) -> QuantizedWeight:
    """`weight` in a format, with every element rounded to nearest.

    Args:
        weight: [N, K] on the CPU, finite.
        fmt: the format; the result of one with a `StoredForm` is in the form before `StoredForm.store`.

    Raises:
        FormatError: the format cannot represent the weight: its group size does not divide K, or a group's range is too wide.
    """
    fmt.check(weight.shape[-1])
    kernels = cpu_quantize.KERNELS.get(fmt.format)
    if fmt.record.trellis is not None:
        return trellis_format.quantize(weight, fmt.group_size, kind=trellis_format.WEIGHTS[fmt.format], search=encode)
    if kernels is None:
        return fmt.record.quantize(weight, fmt.group_size)
    return _checked(kernels.to_nearest(weight, fmt.group_size))[0]


def quantize_measured(weight: torch.Tensor, fmt: TensorFormat) -> tuple[QuantizedWeight, float, float]:
    """The result of `quantize`, the sum of squared errors and the sum of squares of the weight."""
    kernels = cpu_quantize.KERNELS.get(fmt.format)
    if kernels is None:
        packed = quantize(weight, fmt)
        return packed, *squared_errors(packed, weight)
    fmt.check(weight.shape[-1])
    return _checked(kernels.to_nearest(weight, fmt.group_size))


def quantize_to_grid(
    weight: torch.Tensor, scales: torch.Tensor, shifts: torch.Tensor | None, fmt: TensorFormat
) -> tuple[QuantizedWeight, float, float]:
    """`weight` rounded to the nearest values of a grid, the sum of squared errors and the sum of squares of the weight.

    Args:
        weight: [N, K], finite.
        scales: [N, n], in the format's dtype.
        shifts: float32 [N, n], zero-points, or [N, n] in the dtype of the scales, offsets; None in a symmetric grid.
        fmt: a format with a uniform grid.

    Raises:
        FormatError: the format has no uniform grid.
    """
    kernels = cpu_quantize.KERNELS.get(fmt.format)
    if weight.device.type == "cpu" and kernels is not None:
        return kernels.to_grid(weight, scales, shifts, fmt.group_size)
    levels = fmt.record.grid
    if levels is None:
        raise FormatError(f"the format must have a uniform grid; found {fmt}")
    most = torch.full_like(scales, levels.levels, dtype=torch.float32)  # [N, n]
    offsets = torch.zeros_like(most)
    if shifts is None:
        low, high = -most, most
    elif levels.offsets is None:
        low, high = -shifts, most - shifts
    else:
        low, high, offsets = torch.zeros_like(most), most, shifts.float()
    wide, offsets = weight.float(), offsets.unsqueeze(-1)
    u = ((grouped(wide, fmt.group_size) - offsets) / steps_of(scales).unsqueeze(-1)).round().clamp(low.unsqueeze(-1), high.unsqueeze(-1))
    values = (u * scales.float().unsqueeze(-1) + offsets).flatten(-2)
    error, square = (float(part.square().sum(dtype=torch.float64)) for part in (values - wide, wide))
    return levels.pack(u.flatten(-2), scales, shifts, fmt.group_size), error, square


def has_compiled_code(fmt: TensorFormat) -> bool:
    """Whether the CPU quantizes to a format in one pass, without temporary copies."""
    return fmt.format in cpu_quantize.KERNELS


def concatenate_rows(pieces: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """The pieces [n, K], all of one format, concatenated to a weight [N, K]."""
    parts = {name: torch.cat([piece.parts[name] for piece in pieces]) for name in pieces[0].part_names}
    return type(pieces[0]).of(parts, pieces[0].group_size)


def squared_errors(packed: QuantizedWeight, weight: torch.Tensor) -> tuple[float, float]:
    """(sum of squared errors, sum of squares of the weight) of a quantized weight [N, K] and the weight that it represents."""
    values = dequantize_rows(packed, torch.float32) if packed.device.type == "cpu" else dequantize(packed)
    wide = weight.double()
    return float((values - wide).square().sum()), float(wide.square().sum())


def _checked(result: tuple[QuantizedWeight, float, float]) -> tuple[QuantizedWeight, float, float]:
    check_scales(result[0].parts["scales"])
    return result
