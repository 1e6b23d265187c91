"""The arithmetic of a DBRX block, step by step.

The model (`layers.py`), calibration and the measurement of output errors (`dbrx_q.quantize.calibration`) compute a block from these
functions. Between them stand the products with weights, which each caller makes itself: the model with packed weights, calibration with
one plain matrix at a time on threads or a GPU. Where a fused op does several steps at once the model calls the op: `store_qkv` and
`cached_attention` with a KV cache, `moe_experts` for the experts; `tests/dbrx_q/model/test_block.py` holds both to the same result.

    x, h = normed(x, norm_1)
    x, h = normed(attend(h Wqkv^T) out_proj^T, norm_2, delta=x)
    routing = routed(h, router)
    x = x + sum over the chosen experts e of weight[e] * expert_hidden(h, w1[e], v1[e]) w2[e]^T

Dimension letters: `T` tokens of all sequences, `D` d_model, `H` query heads, `G` key/value heads, `C` channels of a head, `E` experts,
`F` ffn hidden, `N` output features, `K` input features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F

from dbrx_q.config import NORM_EPS, DbrxConfig, DbrxFFNConfig
from dbrx_q.kernels.attention import IMPLEMENTATIONS, attention
from dbrx_q.kernels.flash_attention import flash_attention
from dbrx_q.kernels.formats.expert_weights import Routing
from dbrx_q.kernels.norm import add_norm
from dbrx_q.kernels.qkv import split_and_rotate
from dbrx_q.kernels.router import norm_route, route

from .rope import scaled_frequencies

__all__ = ["Linear", "Rotation", "activate", "attend", "expert_hidden", "normed", "normed_and_routed", "rotation_of", "routed"]

Linear = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(x [T, K], weight [N, K]) to a new tensor x @ weight.T [T, N]."""

Rotation = tuple[torch.Tensor, torch.Tensor]
"""float32 cosines and sines [T, C / 2]."""


def rotation_of(positions: torch.Tensor, config: DbrxConfig) -> Rotation:
    """float32 cosines and sines [T, C / 2] of the rotary embedding (Su et al. 2021, RoFormer, eq. 34).

    Args:
        positions: int32 [T], of each token in its sequence.
        config: gives C, the base of the angles and their scaling.
    """
    if config.rope_type != "default":
        frequencies, factor = scaled_frequencies(positions, config)
        scaled = positions.float()[:, None] * frequencies  # [T, C/2]
        return scaled.cos() * factor, scaled.sin() * factor
    angles = positions.float()[:, None] * _frequencies(config.head_dim, config.rope_theta, positions.device)  # [T, C/2]
    return angles.cos(), angles.sin()


@cache  # never freed: captured graphs hold its address
def _frequencies(channels: int, base: float, device: torch.device) -> torch.Tensor:
    """float32 [C / 2]: the angle per position of each pair of channels."""
    with torch.inference_mode(False):
        return base ** -(torch.arange(0, channels, 2, dtype=torch.float32, device=device) / channels)


def normed(x: torch.Tensor, weight: torch.Tensor, delta: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + delta, its LayerNorm without bias), both [T, D] in the dtype of `x`; without `delta` the sum is `x` itself.

    Args:
        x: [T, D], the residual stream.
        weight: [D], of the norm.
        delta: [T, D], the output of a layer that was not yet added to the stream.
    """
    return add_norm(x, delta, weight, NORM_EPS)


def attend(
    qkv: torch.Tensor,
    rotation: Rotation,
    counts: Sequence[int] | None = None,
    *,
    heads: int,
    clip: float | None = None,
    implementation: str = IMPLEMENTATIONS[0],
    masks: Sequence[torch.Tensor | None] | None = None,
    weights: list[torch.Tensor] | None = None,
    kept: Sequence[int] | None = None,
) -> torch.Tensor:
    """[T, H, C]: causal grouped-query attention within each of some whole sequences, in the dtype of `qkv`.

    Args:
        qkv: [T, (H + 2G) C], the output of Wqkv.
        rotation: of each token's position.
        counts: tokens of each sequence, T in all; None for one sequence.
        heads: H.
        clip: clamps `qkv` to +-clip first; None where it is clamped already, or where the model does not clamp.
        implementation: one of `kernels.attention.IMPLEMENTATIONS`.
        masks: for each sequence what its tokens attend to, as `Sequences.masks` has them; None for causal attention.
        weights: gets the attention weights [H, S, S] of every sequence appended; only for "eager".
        kept: how many last tokens of each sequence attend, which the result has; None for all. Not for "flash_attention_2".
    """
    qkv = qkv if clip is None else qkv.clamp(-clip, clip)
    q, k, v = split_and_rotate(qkv, *rotation, heads=heads, channels=2 * rotation[0].shape[1])  # [T, H or G, C]
    counts = [len(qkv)] if counts is None else list(counts)
    if implementation == "flash_attention_2" and masks is None and weights is None:
        return flash_attention(q, k, v, counts)
    queries = q.split(counts)
    masks = masks or [None] * len(counts)
    if kept is not None:
        queries = tuple(part[len(part) - count :] for part, count in zip(queries, kept, strict=True))
        masks = [None if mask is None else mask[:, mask.shape[1] - count :] for mask, count in zip(masks, kept, strict=True)]
    parts = zip(queries, k.split(counts), v.split(counts), masks, strict=True)
    outputs = [
        attention(q, k.transpose(0, 1), v.transpose(0, 1), implementation=implementation, mask=mask, weights=weights)
        for q, k, v, mask in parts
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def routed(x: torch.Tensor, router: torch.Tensor, config: DbrxFFNConfig) -> Routing:
    """The experts of each token and their weights, for the norm_2 output x [T, D] and the router's matrix [E, D]."""
    return route(x, router, config.moe_top_k, config.moe_normalize_expert_weights)


def normed_and_routed(x: torch.Tensor, weight: torch.Tensor, router: torch.Tensor, config: DbrxFFNConfig) -> tuple[torch.Tensor, Routing]:
    """(norm_2 of x [T, D], its routing): `normed` and `routed` in one kernel where `ForwardPass.routes_in_norm`; the same bits."""
    return norm_route(x, weight, NORM_EPS, router, config.moe_top_k, config.moe_normalize_expert_weights)


def activate(gate: torch.Tensor, *, inplace: bool = False) -> torch.Tensor:
    """silu, DBRX's activation, of x @ w1.T."""
    return F.silu(gate, inplace=inplace)


def expert_hidden(x: torch.Tensor, w1: torch.Tensor, v1: torch.Tensor, linear: Linear) -> torch.Tensor:
    """[T, F]: silu(x @ w1.T) * (x @ v1.T), the input of an expert's w2, on the device of the product with w1.

    Args:
        x: [T, D], tokens that go to the expert.
        w1, v1: [F, D], as `linear` takes them.
        linear: multiplies.
    """
    gate = activate(linear(x, w1), inplace=True)
    return gate.mul_(linear(x, v1).to(gate.device))
