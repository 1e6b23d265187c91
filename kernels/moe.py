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
    """Experts of one layer, every matrix with its reduction axis last. A matrix lies in one of S slots; S = E where all experts are here.

    w1: [S, F, D], the gate. v1: [S, F, D], up. w2: [S, D, F], down (the transpose of what a DBRX checkpoint stores).
    slots: int32 [E], the slot of every expert, -1 for one that is not here; None: expert e lies in slot e.
    """

    w1: Weight
    v1: Weight
    w2: Weight
    slots: torch.Tensor | None = None

    @property
    def n_experts(self) -> int:
        """E, the experts that a router chooses from."""
        return self.w1.shape[0] if self.slots is None else self.slots.shape[0]


@dataclass(frozen=True)
class Routing:
    """The router's decision. logits: float32 [T, E]. experts: int64 [T, A], best first. weights: float32 [T, A]."""

    logits: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor


def route(x: torch.Tensor, router: torch.Tensor, top_k: int, norm_order: float | None, *, backend: Backend | None = None) -> Routing:
    """The top k experts by logit, the lower index first among equals, weighted by a softmax over all experts; float32 throughout.

    Args:
        x: [T, D].
        router: [E, D].
        top_k: A, at most E.
        norm_order: p > 0 of the norm that a token's chosen weights are divided by; None for no division.
        backend: None picks by the device of `x`.
    """
    if (backend or pick(x.device)) is Backend.TRITON:
        from . import _triton_router

        return Routing(*_triton_router.route(x, router, top_k, norm_order))
    logits = x.float() @ router.float().T  # [T, E]
    # By logits, not by what exp makes of them, the choice is the same on every backend.
    experts = logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]  # [T, A]
    weights = logits.softmax(-1).gather(-1, experts)  # [T, A]
    if norm_order is not None:
        weights = weights / torch.linalg.vector_norm(weights, ord=norm_order, dim=-1, keepdim=True)
    return Routing(logits, experts, weights)


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
    from . import cpu_moe

    return {Backend.REFERENCE: moe_experts_reference, Backend.CPU: cpu_moe.moe_experts, Backend.TRITON: _triton}


def _triton(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, layer: ExpertWeights, missing: torch.Tensor | None
) -> torch.Tensor:
    from . import _triton_moe_decode, _triton_moe_prefill
    from .tiles import MATVEC_TOKENS

    regime = _triton_moe_decode.decode if x.shape[0] <= MATVEC_TOKENS else _triton_moe_prefill.prefill
    y: torch.Tensor = regime(x, experts, weights, layer, missing)
    return y
