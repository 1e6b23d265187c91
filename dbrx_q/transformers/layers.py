"""The layers of transformers' DBRX, computing with our kernels. `adopt` turns a model's modules into them.

Each class extends the one that it replaces and keeps its attributes, so that what transformers records (hidden states, attentions, router
logits) and the hooks of users work. Weights may be plain or packed.

Dimension letters: `B` sequences, `S` new tokens, `L` tokens in the cache with the new ones, `D` d_model, `H` query heads, `G` key/value
heads, `C` channels of a head, `E` experts, `A` active experts, `F` ffn hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.dbrx import modeling_dbrx as reference

from dbrx_q.checkpoint.layout import EXPERT_MATRICES, expert_weights
from dbrx_q.errors import UnsupportedError
from dbrx_q.experts import ExpertStore
from dbrx_q.kernels.formats.expert_weights import ExpertWeights, Routing
from dbrx_q.kernels.formats.weights import Weight
from dbrx_q.kernels.linear import linear
from dbrx_q.kernels.moe import moe_experts
from dbrx_q.kernels.qkv import split_and_rotate
from dbrx_q.kernels.router import choose_experts

from .availability import check_transformers
from .packed import PackedWeight

__all__ = [
    "DbrxAttention",
    "DbrxBlock",
    "DbrxEmbedding",
    "DbrxExperts",
    "DbrxFFN",
    "DbrxLinear",
    "DbrxNormAttentionNorm",
    "DbrxRotaryEmbedding",
    "DbrxRouter",
    "SharedStore",
    "adopt",
]

check_transformers()


class SharedStore:
    """An expert store that all layers of a model and its copies share."""

    def __init__(self, store: ExpertStore) -> None:
        self.store = store

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedStore:
        return self

    def __reduce__(self) -> Any:
        raise UnsupportedError(
            "a model that is pickled must hold all its experts; this one reads some from the files of its checkpoint. "
            "Load it again with from_pretrained instead, or load it without a limit of memory"
        )


class DbrxLinear(nn.Linear):
    """y = x @ weight.T, weight [N, K] plain, computed as in `dbrx_q.DbrxForCausalLM`. It has gradients; `PackedLinear` has none."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., N] for x [..., K]."""
        return linear(x, self.weight, residual=self.bias)


class DbrxEmbedding(nn.Embedding):
    """Looks up rows of weight [V, D], plain; the row of `padding_idx` gets no gradient."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[..., D] for ids [...]."""
        return F.embedding(ids, self.weight, self.padding_idx)


class Float32Linear(nn.Linear):
    """x @ weight.T in float32, whatever the dtypes of both."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float() @ self.weight.float().T


class DbrxRotaryEmbedding(reference.DbrxRotaryEmbedding):
    """float32 cosines and sines; transformers rounds them to the dtype of activations."""

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both float32 [B or 1, S, C / 2].

        Args:
            x: on the device of the result.
            position_ids: int64 [B or 1, S].
        """
        if self.rope_type != "default":  # transformers scales the frequencies, some by the longest position; both halves are the same
            whole = super().forward(torch.empty(0, device=x.device), position_ids)
            return tuple(part[..., : part.shape[-1] // 2] for part in whole)
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float32)
        return angles.cos(), angles.sin()


class DbrxAttention(reference.DbrxAttention):
    """Attention by the implementation that the config names; queries and keys are rotated in float32.

    A decode step with "sdpa" reads every key and value once for all the query heads that share it.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """([B, S, D], attention weights [B, H, S, L] or None).

        Args:
            hidden_states: [B, S, D].
            attention_mask: as transformers' mask functions make it for the implementation.
            position_embeddings: of `DbrxRotaryEmbedding`.
            past_key_values, cache: transformers' cache, by its name before and from transformers 5.24.
        """
        assert position_embeddings is not None
        B, S, _ = hidden_states.shape
        heads, channels = self.num_heads, self.head_dim
        qkv = self.Wqkv(hidden_states)
        if self.clip_qkv is not None:
            qkv = qkv.clamp(-self.clip_qkv, self.clip_qkv)
        cos, sin = (part.expand(B, S, -1).reshape(B * S, -1) for part in position_embeddings)
        q, k, v = split_and_rotate(qkv.view(B * S, -1), cos, sin, heads=heads, channels=channels)  # [B * S, H or G, C]
        q, k, v = (part.view(B, S, -1, channels).transpose(1, 2) for part in (q, k, v))  # [B, H or G, S, C]
        cache = past_key_values if cache is None else cache
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        implementation = self.config._attn_implementation
        weights = None
        if S == 1 and implementation == "sdpa" and not self.training:
            grouped = q.reshape(B, k.shape[1], -1, channels)
            y = F.scaled_dot_product_attention(grouped, k, v, attn_mask=attention_mask, scale=self.scaling)
        else:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, reference.eager_attention_forward)
            dropout = self.attention_dropout if self.training else 0.0
            y, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.out_proj(y.reshape(B, S, -1)), weights


class DbrxNormAttentionNorm(reference.DbrxNormAttentionNorm):
    """norm_1, attention, its residual and norm_2, without dropout for inference."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(residual stream after attention, its norm_2), both [B, S, D]; other arguments by keyword, as for `DbrxAttention`."""
        if self.training or args:
            return super().forward(hidden_states, *args, **kwargs)
        y, _ = self.attn(self.norm_1(hidden_states), **kwargs)
        hidden_states = hidden_states + y
        return hidden_states, self.norm_2(hidden_states)


class DbrxBlock(reference.DbrxBlock):
    """One transformer block, without dropout for inference."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[B, S, D]; other arguments by keyword, as for `DbrxAttention`."""
        if self.training or args:
            return super().forward(hidden_states, *args, **kwargs)
        residual, h = self.norm_attn_norm(hidden_states, **kwargs)
        return residual + self.ffn(h)


class DbrxRouter(reference.DbrxRouter):
    """float32 router logits; transformers routes by logits in the dtype of activations."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """float32 [B * S, E]."""
        return self.layer(hidden_states.reshape(-1, hidden_states.shape[-1]))


class DbrxExperts(reference.DbrxExperts):
    """The experts of a layer: those of `mlp`, or those that an expert store serves."""

    layer: int
    served_by: SharedStore | None
    packed: ExpertWeights | None
    """The experts of `mlp` once they were used, where all are packed."""

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """[B, S, D] in the dtype of `hidden_states` [B, S, D].

        Args:
            top_k_index: int64 [B * S, A], the experts of each token.
            top_k_weights: [B * S, A].
        """
        routing = Routing(top_k_weights.new_empty(0, self.num_experts), top_k_index, top_k_weights.float())
        return self.of(hidden_states, routing)

    def of(self, hidden_states: torch.Tensor, routing: Routing) -> torch.Tensor:
        """As `forward`, by a routing."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        with torch.no_grad():
            if self.served_by is not None:
                y = self.served_by.store.forward(self.layer, x, routing)
            else:
                y = moe_experts(x, routing.experts, routing.weights, self.packed or self._weights())
        return y.view(hidden_states.shape)

    def _weights(self) -> ExpertWeights:
        """[E, F, D], [E, F, D] and [E, D, F], views of the weights that the modules hold."""

        def stack(role: str) -> Weight:
            holder = getattr(self.mlp, role)
            return holder.value if isinstance(holder, PackedWeight) else holder.detach().unflatten(0, (self.num_experts, -1))

        weights = expert_weights({role: stack(role) for role in EXPERT_MATRICES})
        self.packed = weights if all(isinstance(getattr(self.mlp, role), PackedWeight) for role in EXPERT_MATRICES) else None
        return weights

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> DbrxExperts:
        """The packed weights may have moved."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.packed = None
        return self


class DbrxFFN(reference.DbrxFFN):
    """Router and experts of one layer."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, S, D]."""
        routing = choose_experts(self.router(hidden_states), self.top_k, self.moe_normalize_expert_weights)
        return self.experts(hidden_states, routing.experts, routing.weights)


def adopt(model: nn.Module) -> None:
    """Let the layers of a transformers DBRX compute with our kernels, on the weights that they hold.

    Args:
        model: transformers' `DbrxModel` or `DbrxForCausalLM`, or a model that contains one.
    """
    for module in model.modules():
        ours = _OURS.get(type(module))
        if ours is not None:
            module.__class__ = ours
    for module in model.modules():
        if isinstance(module, DbrxRouter):
            module.layer.__class__ = Float32Linear
        for owner, names in _PLAIN_LAYERS.items():
            for layer in (getattr(module, name) for name in names) if isinstance(module, owner) else ():
                layer.__class__ = _OURS_PLAIN.get(type(layer), type(layer))
        if isinstance(module, reference.DbrxBlock):
            experts: Any = module.ffn.experts
            experts.layer, experts.served_by, experts.packed = module.layer_idx, None, None


_OURS = {
    reference.DbrxAttention: DbrxAttention,
    reference.DbrxBlock: DbrxBlock,
    reference.DbrxExperts: DbrxExperts,
    reference.DbrxFFN: DbrxFFN,
    reference.DbrxNormAttentionNorm: DbrxNormAttentionNorm,
    reference.DbrxRotaryEmbedding: DbrxRotaryEmbedding,
    reference.DbrxRouter: DbrxRouter,
}

_PLAIN_LAYERS: dict[type[nn.Module], tuple[str, ...]] = {
    reference.DbrxAttention: ("Wqkv", "out_proj"),
    reference.DbrxModel: ("wte",),
    reference.DbrxForCausalLM: ("lm_head",),
}
_OURS_PLAIN: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: DbrxLinear, nn.Embedding: DbrxEmbedding}
