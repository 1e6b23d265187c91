"""`linear`: y = x @ weight.T for a weight in any format.

Dimension letters: `T` tokens (any leading axes), `K` input features, `N` output features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from dbrx_q.kernels.cpu.choice import matmul
from dbrx_q.kernels.formats.errors import FormatError
from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight
from dbrx_q.kernels.formats.weights import Weight, dequantize, dequantize_range

from .backend import Backend, pick

__all__ = ["dequantized_linear", "linear", "linear_reference", "warm_up"]

_PIECE_ELEMENTS = 1 << 24  # of a weight that are dequantized at a time: float32 temporaries of 64 MB each


def linear(
    x: torch.Tensor,
    weight: Weight,
    *,
    clip: float | None = None,
    residual: torch.Tensor | None = None,
    backend: Backend | None = None,
) -> torch.Tensor:
    """y [T, N] = x [T, K] @ weight [N, K].T, accumulated in float32 and returned in the dtype of `x`.

    Args:
        x: [..., K], float32 (not for packed weights on a GPU), bfloat16 or float16.
        weight: a plain tensor of the same dtype, or a packed weight.
        clip: clamps the product to +-clip.
        residual: [..., N] of the same dtype, added to the clamped product.
        backend: None picks by the device of `x`.

    Raises:
        FormatError: activations of another width than the packed weight's.
    """
    if not isinstance(weight, torch.Tensor) and x.shape[-1] != weight.shape[-1]:
        raise FormatError(f"x must have as many features as the weight [N, K] takes; found {list(x.shape)} and {list(weight.shape)}")
    flat = x.reshape(-1, x.shape[-1])  # [T, K]
    shape = *x.shape[:-1], weight.shape[-2]
    if isinstance(weight, torch.Tensor):
        y = matmul(flat, weight).view(shape) if x.device.type == "cpu" else F.linear(x, weight)
        return _finished(y, clip, residual)
    backend = backend or pick(x.device)
    if backend is Backend.TRITON:
        from dbrx_q.kernels.triton import linear as triton_linear
        from dbrx_q.kernels.triton.codes import served
        from dbrx_q.kernels.triton.plans import planned
        from dbrx_q.kernels.triton.tiles import MATVEC_TOKENS, refused_op, without_measured

        if not served(weight):
            return _finished(dequantized_linear(x, weight), clip, residual)
        rest = None if residual is None else residual.reshape(-1, weight.shape[-2])
        call = partial(triton_linear.linear, flat, weight, clip, rest)
        try:
            y = call() if len(flat) > MATVEC_TOKENS else planned(("linear", clip), (weight,), (flat, rest), call)
            return y.view(shape)
        except Exception as error:
            with without_measured(refused_op(error)):
                return call().view(shape)
    return _finished(_implementations()[backend](flat, weight).to(x.dtype).view(shape), clip, residual)


def _finished(y: torch.Tensor, clip: float | None, residual: torch.Tensor | None) -> torch.Tensor:
    if clip is not None:
        y = y.clamp(-clip, clip)
    return y if residual is None else y + residual


def dequantized_linear(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """y [..., N] = x [..., K] @ weight [N, K].T in the dtype of `x`, by torch, some rows of the weight dequantized at a time.

    For formats without kernels. The memory that it takes does not grow with N, so that a head of 100,352 rows needs no plan of its own.
    """
    N, K = weight.shape
    if isinstance(weight, torch.Tensor):
        return F.linear(x, weight.to(x.dtype))
    unit = weight.row_unit()
    step = max(1, _PIECE_ELEMENTS // K // unit) * unit
    if step >= N:
        return F.linear(x, dequantize(weight, x.dtype))
    y = x.new_empty(*x.shape[:-1], N)
    for first in range(0, N, step):
        end = min(first + step, N)
        y[..., first:end] = F.linear(x, dequantize_range(weight, first, end, x.dtype))
    return y


def linear_reference(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """float32 y [T, N] = x [T, K] @ weight [N, K].T, the whole weight dequantized."""
    return x.float() @ dequantize(weight).T


def warm_up(weight: QuantizedWeight, dtype: torch.dtype) -> None:
    """Compile, load from a cache or import the CPU's code for products with weights like `weight` [N, K], before a token needs it."""
    from dbrx_q.kernels.cpu import linear as cpu  # imports numba, which a GPU does not need

    cpu.warm_up(weight, dtype)


def _implementations() -> dict[Backend, Callable[[torch.Tensor, QuantizedWeight], torch.Tensor]]:
    from dbrx_q.kernels.cpu import linear as cpu

    return {Backend.REFERENCE: linear_reference, Backend.CPU: cpu.linear}
