"""`moe_experts`: the experts of a mixture-of-experts layer, with weights in any format; `router.py` has `route`.

Dimension letters: `T` tokens, `E` experts, `A` active experts of a token, `D` d_model, `F` ffn hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from dbrx_q.kernels.formats.expert_weights import ExpertWeights

from .backend import Backend, pick
from .linear import dequantized_linear

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

    On Triton, if the kernels have no code for a format of the layer, the active experts are dequantized one at a time, in pieces, and
    multiplied by torch. The host waits for the device to learn which experts are active, so a CUDA graph cannot capture such a call.

    Args:
        x: [T, D], float32, bfloat16 or float16; the result has the same dtype.
        experts: int64 [T, A], the experts of each token, no expert twice.
        weights: float32 [T, A].
        layer: the layer's experts. Only the experts of `experts` are read; the sum leaves out experts without a slot.
        missing: int32 [E]; for each expert, the number of tokens that it was left out for is added.
        backend: None picks by the device of `x`.
    """
    return _implementation(backend or pick(x.device))(x, experts, weights, layer, missing).to(x.dtype)


def moe_experts_reference(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, layer: ExpertWeights, missing: torch.Tensor | None = None
) -> torch.Tensor:
    """float32 y [T, D], computed in float32; arguments as for `moe_experts`."""
    return _expert_by_expert(x.float(), experts, weights, layer, missing)


def _expert_by_expert(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, layer: ExpertWeights, missing: torch.Tensor | None
) -> torch.Tensor:
    """float32 y [T, D]; products are computed in the dtype of `x`, with some rows of one active expert dequantized at a time."""
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    slots = range(layer.n_experts) if layer.slots is None else layer.slots.tolist()
    for e in experts.unique().tolist():
        tokens, rank = (experts == e).nonzero(as_tuple=True)
        slot = slots[e]
        if slot < 0:
            if missing is not None:
                missing[e] += len(tokens)
            continue
        gate = dequantized_linear(x[tokens], layer.w1[slot])  # [tokens of e, F]
        h = F.silu(gate) * dequantized_linear(x[tokens], layer.v1[slot])
        out = dequantized_linear(h, layer.w2[slot])  # [tokens of e, D]
        y.index_add_(0, tokens, out.float() * weights[tokens, rank, None])
    return y


_Implementation = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, ExpertWeights, torch.Tensor | None], torch.Tensor]


def _implementation(backend: Backend) -> _Implementation:
    if backend is Backend.TRITON:
        return _triton
    if backend is Backend.REFERENCE:
        return moe_experts_reference
    from dbrx_q.kernels.cpu import moe as cpu_moe  # imports numba, which a GPU does not need

    return cpu_moe.moe_experts


def _triton(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, layer: ExpertWeights, missing: torch.Tensor | None
) -> torch.Tensor:
    from dbrx_q.kernels.triton import moe_decode as triton_moe_decode
    from dbrx_q.kernels.triton import moe_prefill as triton_moe_prefill
    from dbrx_q.kernels.triton.codes import served
    from dbrx_q.kernels.triton.plans import planned
    from dbrx_q.kernels.triton.tiles import MATVEC_TOKENS, refused_op, without_measured

    if not all(served(weight) for weight in (layer.w1, layer.v1, layer.w2)):
        return _expert_by_expert(x, experts, weights, layer, missing)
    few = x.shape[0] <= MATVEC_TOKENS
    regime = triton_moe_decode.decode if few else triton_moe_prefill.prefill
    try:
        if few:
            inputs = (x, experts, weights, layer.slots, missing)
            return planned("experts", (layer.w1, layer.v1, layer.w2), inputs, lambda: regime(x, experts, weights, layer, missing))
        return regime(x, experts, weights, layer, missing)
    except Exception as error:
        op = refused_op(error)
    with without_measured(op):
        return regime(x, experts, weights, layer, missing if op == "gate_up" else None)  # `gate_up` has counted them
