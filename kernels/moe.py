"""`route` and `moe_experts`: a mixture-of-experts layer for expert weights in any format.

Dimension letters: `T` tokens, `E` experts, `A` active experts of a token, `D` d_model, `F` ffn hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .backend import Backend, pick
from .linear import Weight, dequantize

__all__ = ["ExpertWeights", "Routing", "moe_experts", "moe_experts_reference", "route"]


@dataclass(frozen=True)
class ExpertWeights:
    """The experts of one layer, every matrix with its reduction axis last.

    w1: [E, F, D], the gate. v1: [E, F, D], up. w2: [E, D, F], down (the transpose of what a DBRX checkpoint stores).
    """

    w1: Weight
    v1: Weight
    w2: Weight


@dataclass(frozen=True)
class Routing:
    """The router's decision. logits: float32 [T, E]. experts: int64 [T, A], best first. weights: float32 [T, A]."""

    logits: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor


def route(x: torch.Tensor, router: torch.Tensor, top_k: int, norm_order: float | None) -> Routing:
    """Softmax over all experts, then the top k, in float32 throughout; among equal probabilities the lower index wins.

    Args:
        x: [T, D].
        router: [E, D].
        top_k: A.
        norm_order: p of the norm that a token's chosen weights are divided by; None for no division.
    """
    logits = x.float() @ router.float().T  # [T, E]
    weights, experts = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    weights, experts = weights[:, :top_k], experts[:, :top_k]  # [T, A]
    if norm_order is not None:
        weights = weights / torch.linalg.vector_norm(weights, ord=norm_order, dim=-1, keepdim=True)
    return Routing(logits, experts, weights)


def moe_experts(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, layer: ExpertWeights, *, backend: Backend | None = None
) -> torch.Tensor:
    """y [T, D]: for each token the sum over its active experts of weight * w2 @ (silu(w1 @ x) * (v1 @ x)).

    Args:
        x: [T, D], float32, bfloat16 or float16; the result has its dtype.
        experts: int64 [T, A], the experts of each token, no expert twice.
        weights: float32 [T, A].
        layer: the layer's experts. Only those that got tokens are read.
        backend: None picks by the device of `x`.
    """
    return _implementations()[backend or pick(x.device)](x, experts, weights, layer).to(x.dtype)


def moe_experts_reference(x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, layer: ExpertWeights) -> torch.Tensor:
    """float32 y [T, D], each expert decoded whole."""
    x = x.float()
    y = torch.zeros_like(x)
    for e in experts.unique().tolist():
        tokens, rank = (experts == e).nonzero(as_tuple=True)
        w1, v1, w2 = (dequantize(w[e]) for w in (layer.w1, layer.v1, layer.w2))
        h = F.silu(x[tokens] @ w1.T) * (x[tokens] @ v1.T)  # [tokens of e, F]
        y.index_add_(0, tokens, (h @ w2.T) * weights[tokens, rank, None])
    return y


def _implementations() -> dict[Backend, Callable[[torch.Tensor, torch.Tensor, torch.Tensor, ExpertWeights], torch.Tensor]]:
    from . import cpu

    return {Backend.REFERENCE: moe_experts_reference, Backend.CPU: cpu.moe_experts}
