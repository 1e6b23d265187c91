"""`add_norm`: the residual add and the LayerNorm that follows it.

Dimension letters: `T` tokens, `D` d_model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .backend import Backend, pick

__all__ = ["add_norm", "add_norm_reference"]


def add_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float, *, backend: Backend | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + delta, its LayerNorm without bias), both [T, D] in the dtype of `x` (Ba et al. 2016, Layer Normalization, eq. 4).

    The sum is rounded to its dtype before the LayerNorm, as two separate ops would round it; statistics are float32.

    Args:
        x: [T, D], float32, bfloat16 or float16.
        delta: [T, D] of the same dtype; None adds nothing; the returned sum is then `x` itself.
        weight: [D] of the same dtype.
        eps: added to the variance.
        backend: None picks by the device of `x`.
    """
    if (backend or pick(x.device)) is Backend.TRITON:
        from dbrx_q.kernels.triton import norm as triton_norm

        return triton_norm.add_norm(x, delta, weight, eps)
    return add_norm_reference(x, delta, weight, eps)


def add_norm_reference(x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_norm` in torch, which serves the CPU as well."""
    total = x if delta is None else x + delta
    return total, F.layer_norm(total, weight.shape, weight, None, eps)
