"""`route`: selects the experts of each token and their weights; `norm_route`: after a norm; `choose_experts`: from router logits.

Dimension letters: `T` tokens, `E` experts, `A` active experts of a token, `D` d_model.
"""

from __future__ import annotations

import torch

from dbrx_q.kernels.cpu.choice import FEW_TOKENS
from dbrx_q.kernels.formats.expert_weights import Routing
from dbrx_q.kernels.triton.tiles import MATVEC_TOKENS

from .backend import Backend, pick
from .norm import add_norm

__all__ = ["choose_experts", "fused_with_norm", "norm_route", "route", "router_logits"]


def route(x: torch.Tensor, router: torch.Tensor, top_k: int, norm_order: float | None, *, backend: Backend | None = None) -> Routing:
    """The top k experts by logit, the lower index first among equals, weighted by a softmax over all experts; float32 throughout.

    Args:
        x: [T, D].
        router: [E, D].
        top_k: A, at most E.
        norm_order: the order p > 0 of the norm by which the weights of a token's experts are divided; None for no division.
        backend: None picks by the device of `x`.
    """
    if (backend or pick(x.device)) is Backend.TRITON:
        from dbrx_q.kernels.triton import router as triton_router

        return Routing(*triton_router.route(x, router, top_k, norm_order))
    return choose_experts(router_logits(x, router), top_k, norm_order)


def norm_route(
    x: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    router: torch.Tensor,
    top_k: int,
    norm_order: float | None,
    *,
    backend: Backend | None = None,
) -> tuple[torch.Tensor, Routing]:
    """(the LayerNorm of x without bias, how its tokens are routed): `add_norm`, then `route`; one kernel in place of two for few tokens.

    The bits are those of the two on the same backend.

    Args:
        x: [T, D].
        norm: [D], weight of the norm.
        eps: added to the variance.
        router, top_k, norm_order, backend: see `route`.
    """
    backend = backend or pick(x.device)
    if fused_with_norm(len(x), backend):
        from dbrx_q.kernels.triton import norm_route as triton_norm_route

        normed, *routing = triton_norm_route.norm_route(x, norm, eps, router, top_k, norm_order)
        return normed, Routing(*routing)
    normed = add_norm(x, None, norm, eps, backend=backend)[1]
    return normed, route(normed, router, top_k, norm_order, backend=backend)


def fused_with_norm(tokens: int, backend: Backend) -> bool:
    """Whether `norm_route` is one kernel."""
    return backend is Backend.TRITON and 0 < tokens <= MATVEC_TOKENS


def router_logits(x: torch.Tensor, router: torch.Tensor) -> torch.Tensor:
    """float32 [T, E], the product of x [T, D] and router [E, D] in torch."""
    x, matrix = x.float(), router.float().T
    if x.device.type == "cpu" and 1 < len(x) <= FEW_TOKENS:
        # A library's product of several rows may have other bits than that of one; sequences that decode together get those of each alone.
        return torch.cat([row @ matrix for row in x.split(1)])
    return x @ matrix


def choose_experts(logits: torch.Tensor, top_k: int, norm_order: float | None) -> Routing:
    """The top k experts by router logits, in torch; arguments as for `route`.

    Args:
        logits: float32 [T, E].
    """
    # Selected by logits, not by their softmax, the experts are the same on every backend.
    experts = logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]  # [T, A]
    weights = logits.softmax(-1).gather(-1, experts)  # [T, A]
    if norm_order is not None:
        weights = weights / torch.linalg.vector_norm(weights, ord=norm_order, dim=-1, keepdim=True)
    return Routing(logits, experts, weights)
