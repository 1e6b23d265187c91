"""`route` and `moe_experts`: a mixture-of-experts layer for expert weights in any format.

Dimension letters: `T` tokens, `E` experts, `A` active experts of a token, `D` d_model, `F` ffn hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from dbrx_q.kernels.formats.expert_weights import ExpertWeights
from dbrx_q.kernels.formats.weights import Weight, dequantize

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
    """float32 y [T, D], each expert dequantized whole."""
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
    from dbrx_q.kernels.triton.codes import served
    from dbrx_q.kernels.triton.tiles import MATVEC_TOKENS

    if not all(served(weight) for weight in (layer.w1, layer.v1, layer.w2)):
        layer = _plain_layer(layer, x.dtype)
    regime = triton_moe_decode.decode if x.shape[0] <= MATVEC_TOKENS else triton_moe_prefill.prefill
    y: torch.Tensor = regime(x, experts, weights, layer, missing)
    return y


def _plain_layer(layer: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
    """The E experts of a layer as plain weights, expert e in slot e where it has one: for formats without kernels.

    It takes the memory of a plain layer. The host waits for nothing, so that a CUDA graph can hold it.
    """
    E = layer.n_experts
    device = layer.w1.device
    slots = torch.arange(E, device=device) if layer.slots is None else layer.slots.long().clamp(min=0)

    def plain(weight: Weight) -> torch.Tensor:
        out = torch.empty(E, *weight.shape[1:], dtype=dtype, device=device)
        for e in range(E):
            out[e] = dequantize(weight[slots[e : e + 1]], dtype)[0]
        return out

    experts = torch.arange(E, dtype=torch.int32, device=device)
    present = None if layer.slots is None else torch.where(layer.slots < 0, -1, experts).to(torch.int32)
    return ExpertWeights(plain(layer.w1), plain(layer.v1), plain(layer.w2), present)
