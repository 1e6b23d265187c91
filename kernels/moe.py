"""`route` and `moe_experts`: a mixture-of-experts layer for expert weights in any format.

Dimension letters: `T` tokens, `E` experts, `A` active experts of a token, `D` d_model, `F` ffn hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from dbrx_q.kernels.formats.expert_weights import ExpertWeights
from dbrx_q.kernels.formats.weights import dequantize

from .backend import Backend, pick

__all__ = [
    "moe_experts",
    "moe_experts_reference",
]


def moe_experts(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    layer: ExpertWeights,
    *,
    missing: torch.Tensor | None = None,
    backend: Backend | None = None,
) -> torch.Tensor:
    """y [T, D]: for each token the sum over its active experts of weight * w2 @ (silu(w1 @ x) * (v1 @ x)).

    Args:
        x: [T, D], float32, bfloat16 or float16; the result has its dtype.
        experts: int64 [T, A], the experts of each token, no expert twice.
        weights: float32 [T, A].
        layer: the layer's experts. Only those that got tokens are read; the share of those that have no slot is left out.
        missing: int32 [E], to which the number of pairs of a token and an expert is added that were left out.
        backend: None picks by the device of `x`.
    """
    return _implementations()[backend or pick(x.device)](x, experts, weights, layer, missing).to(x.dtype)


def moe_experts_reference(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, layer: ExpertWeights, missing: torch.Tensor | None = None
) -> torch.Tensor:
    """float32 y [T, D], each expert decoded whole."""
    x = x.float()
    y = torch.zeros_like(x)
    slots = range(layer.n_experts) if layer.slots is None else layer.slots.tolist()
    for e in experts.unique().tolist():
        tokens, rank = (experts == e).nonzero(as_tuple=True)
        if slots[e] < 0:
            if missing is not None:
                missing[e] += len(tokens)
            continue
        w1, v1, w2 = (dequantize(w[slots[e]]) for w in (layer.w1, layer.v1, layer.w2))
        h = F.silu(x[tokens] @ w1.T) * (x[tokens] @ v1.T)  # [tokens of e, F]
        y.index_add_(0, tokens, (h @ w2.T) * weights[tokens, rank, None])
    return y


_Implementation = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, ExpertWeights, torch.Tensor | None], torch.Tensor]


def _implementations() -> dict[Backend, _Implementation]:
    from dbrx_q.kernels.cpu import moe as cpu_moe

    return {Backend.REFERENCE: moe_experts_reference, Backend.CPU: cpu_moe.moe_experts, Backend.TRITON: _triton}


def _triton(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, layer: ExpertWeights, missing: torch.Tensor | None
) -> torch.Tensor:
    from dbrx_q.kernels.triton import moe_decode as triton_moe_decode
    from dbrx_q.kernels.triton import moe_prefill as triton_moe_prefill
    from dbrx_q.kernels.triton.tiles import MATVEC_TOKENS

    regime = triton_moe_decode.decode if x.shape[0] <= MATVEC_TOKENS else triton_moe_prefill.prefill
    y: torch.Tensor = regime(x, experts, weights, layer, missing)
    return y
