"""The layers of DBRX for inference, named as in the checkpoint; `block.py` has the arithmetic.

Each module's `forward` takes and returns what the module of the same name in transformers does, with the T real tokens of all sequences in
place of [B, S], so that a hook sees what a user expects. `run` computes the same and leaves out what would cost time: it adds to the
residual stream and normalizes in one pass over memory, and routes in one kernel. A module runs by `forward` only where a hook watches it
(`hooked`).

Dimension letters: `T` real tokens of all sequences, `W` tokens of these that are kept in the last layer, `D` d_model, `V` vocabulary,
`N` output features, `K` input features, `H` query heads, `G` key/value heads, `C` channels of a head, `E` experts, `A` active experts of a
token, `F` ffn hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from dbrx_q.checkpoint.layout import EXPERT_MATRICES, expert_weights
from dbrx_q.config import DbrxConfig
from dbrx_q.errors import UnsupportedError
from dbrx_q.experts import ExpertStore
from dbrx_q.kernels.attention import IMPLEMENTATIONS, cached_attention
from dbrx_q.kernels.formats.expert_weights import ExpertWeights, Routing
from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight
from dbrx_q.kernels.formats.weights import Weight, gather_rows
from dbrx_q.kernels.linear import linear
from dbrx_q.kernels.qkv import store_qkv
from dbrx_q.kernels.router import choose_experts, router_logits

from .batch import ForwardPass
from .block import attend, normed, normed_and_routed, routed

__all__ = ["DbrxBlock", "DbrxEmbedding", "DbrxLayerNorm", "DbrxLinear", "PackedWeight", "hooked"]


def hooked(module: nn.Module) -> bool:
    """Whether a hook of the user, or a wrapped `forward`, watches the module, so that it must be called as one."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in module.__dict__


class PackedWeight(nn.Module):
    """Holds a packed weight in place of a parameter; its parts are buffers with the checkpoint's names."""

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        for name, part in weight.parts.items():
            self.register_buffer(name, part)
        self.value = weight

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedWeight:
        raise UnsupportedError(
            "a model with packed weights keeps its device and dtype; found a call that moves or converts it. "
            "Give `device` and `dtype` to from_pretrained"
        )

    def extra_repr(self) -> str:
        return f"{type(self.value).__name__}, {list(self.value.shape)}, group_size={self.value.group_size}"


def _weight(holder: nn.Parameter | PackedWeight) -> Weight:
    return holder.value if isinstance(holder, PackedWeight) else holder.data


def _parameters_of(module: nn.Module) -> str:
    """The plain weights that a module holds itself, for `print(model)`."""
    return ", ".join(f"{name}={list(p.shape)}" for name, p in module.named_parameters(recurse=False))


def _matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape), requires_grad=False)


class DbrxLinear(nn.Module):
    """y = x @ weight.T, weight [N, K] plain or packed.

    Attributes:
        bias: None, as in `nn.Linear` without a bias.
    """

    bias: None = None

    def __init__(self, K: int, N: int) -> None:
        super().__init__()
        self.weight: nn.Parameter | PackedWeight = _matrix(N, K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, _weight(self.weight))

    def run(self, x: torch.Tensor, *, clip: float | None = None, residual: torch.Tensor | None = None) -> torch.Tensor:
        """The product, clamped to +-clip and added to `residual`."""
        if hooked(self):
            y = self(x) if clip is None else self(x).clamp(-clip, clip)
            return y if residual is None else y + residual
        return linear(x, _weight(self.weight), clip=clip, residual=residual)

    def extra_repr(self) -> str:
        return _parameters_of(self)


class DbrxEmbedding(nn.Module):
    """Looks up rows of weight [V, D], plain or packed.

    Attributes:
        dtype: of the rows of a packed weight.
    """

    def __init__(self, V: int, D: int) -> None:
        super().__init__()
        self.weight: nn.Parameter | PackedWeight = _matrix(V, D)
        self.dtype = torch.get_default_dtype()

    def forward(self, ids: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """[..., D] for ids [...]; `dtype` is that of a packed weight's rows, None for the module's."""
        weight = _weight(self.weight)
        return F.embedding(ids, weight) if isinstance(weight, torch.Tensor) else gather_rows(weight, ids, dtype or self.dtype)

    def extra_repr(self) -> str:
        return _parameters_of(self)


class DbrxLayerNorm(nn.Module):
    """LayerNorm without bias."""

    def __init__(self, D: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return normed(x, self.weight)[1]

    def run(self, x: torch.Tensor, delta: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(x + delta, its norm), both [T, D]; without `delta` the sum is `x` itself."""
        if hooked(self):
            total = _total(x, delta)
            return total, self(total)
        return normed(x, self.weight, delta)

    def extra_repr(self) -> str:
        return _parameters_of(self)


def _total(x: torch.Tensor, delta: torch.Tensor | None) -> torch.Tensor:
    return x if delta is None else x + delta


class DbrxAttention(nn.Module):
    """Grouped-query attention; Wqkv's output is clamped before it is split, then queries and keys are rotated."""

    def __init__(self, config: DbrxConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.clip = config.n_heads, config.attn_config.clip_qkv
        self.implementation = IMPLEMENTATIONS[0]
        D = config.d_model
        self.Wqkv = DbrxLinear(D, D + 2 * config.attn_config.kv_n_heads * config.head_dim)
        self.out_proj = DbrxLinear(D, D)

    def forward(self, x: torch.Tensor, shared: ForwardPass) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
        """(attention [T, D], the attention weights [H, S, L] of each sequence or None where they are not wanted)."""
        weights = shared.attention_weights()
        return self.out_proj.run(self._heads(x, shared, weights).flatten(1)), weights

    def run(self, x: torch.Tensor, shared: ForwardPass, residual: torch.Tensor) -> torch.Tensor:
        """residual + attention, [T, D], or [W, D] of the kept tokens."""
        if hooked(self):
            return residual + self(x, shared)[0]
        return self.out_proj.run(self._heads(x, shared, shared.attention_weights()).flatten(1), residual=residual)

    def _heads(self, x: torch.Tensor, shared: ForwardPass, weights: list[torch.Tensor] | None) -> torch.Tensor:
        """[T, H, C], or [W, H, C] of the kept tokens."""
        batch, rotation = shared.batch, shared.rotation
        sequences = batch.sequences
        if batch.cache is None:
            qkv = self.Wqkv.run(x, clip=self.clip)  # [T, (H + 2G) C]
            return attend(
                qkv,
                rotation,
                sequences.counts,
                heads=self.heads,
                implementation=self.implementation,
                masks=sequences.masks,
                weights=weights,
                kept=None if shared.kept is None else shared.kept.counts,
            )
        q = self.store(x, shared)
        if shared.kept is not None:
            q, sequences = q[shared.kept.rows], shared.kept.sequences
        return cached_attention(q, batch.cache.layers[self.layer], sequences, implementation=self.implementation, weights=weights)

    def store(self, x: torch.Tensor, shared: ForwardPass) -> torch.Tensor:
        """The rotated queries [T, H, C]; keys and values are stored in the cache."""
        batch = shared.batch
        assert batch.cache is not None
        layer = batch.cache.layers[self.layer]
        qkv = self.Wqkv.run(x)
        return store_qkv(qkv, layer, batch.rows, batch.stored_at, *shared.rotation, heads=self.heads, clip=self.clip)


class DbrxNormAttentionNorm(nn.Module):
    """norm_1, attention and its residual, norm_2."""

    def __init__(self, config: DbrxConfig, layer: int) -> None:
        super().__init__()
        self.norm_1 = DbrxLayerNorm(config.d_model)
        self.attn = DbrxAttention(config, layer)
        self.norm_2 = DbrxLayerNorm(config.d_model)

    def forward(self, x: torch.Tensor, shared: ForwardPass) -> tuple[torch.Tensor, torch.Tensor]:
        """(residual stream after attention, its norm_2), both [T, D]."""
        return self._normed(x, None, shared)

    def run(self, x: torch.Tensor, delta: torch.Tensor | None, shared: ForwardPass) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for the residual stream x + delta."""
        if hooked(self):
            after, h = self(_total(x, delta), shared)
            return after, h
        return self._normed(x, delta, shared)

    def attended(self, x: torch.Tensor, delta: torch.Tensor | None, shared: ForwardPass) -> torch.Tensor:
        """The residual stream after attention."""
        x, h = self.norm_1.run(x, delta)
        residual = x if shared.kept is None else x[shared.kept.rows]
        return self.attn.run(h, shared, residual)

    def _normed(self, x: torch.Tensor, delta: torch.Tensor | None, shared: ForwardPass) -> tuple[torch.Tensor, torch.Tensor]:
        return self.norm_2.run(self.attended(x, delta, shared))


class DbrxRouterLinear(nn.Linear):
    """The router's matrix [E, D]; the product is float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return router_logits(x, self.weight)


class DbrxRouter(nn.Module):
    """Scores the experts for each token."""

    def __init__(self, config: DbrxConfig) -> None:
        super().__init__()
        self.config = config.ffn_config
        self.layer = DbrxRouterLinear(config.d_model, config.ffn_config.moe_num_experts, bias=False)
        self.layer.weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32 logits [T, E]."""
        logits: torch.Tensor = self.layer(x)
        return logits

    def run(self, x: torch.Tensor) -> Routing:
        """The logits, the experts chosen by them, and the weights of these."""
        if hooked(self) or hooked(self.layer):
            return choose_experts(self(x).float(), self.config.moe_top_k, self.config.moe_normalize_expert_weights)
        return routed(x, self.layer.weight, self.config)


class DbrxExpertMLP(nn.Module):
    """The stacked matrices of all experts: w1, v1, w2 [E * F, D] as published, or packed with the reduction axis last."""

    def __init__(self, config: DbrxConfig) -> None:
        super().__init__()
        self.experts = config.ffn_config.moe_num_experts
        rows = self.experts * config.ffn_config.ffn_hidden_size
        self.w1: nn.Parameter | PackedWeight = _matrix(rows, config.d_model)
        self.v1: nn.Parameter | PackedWeight = _matrix(rows, config.d_model)
        self.w2: nn.Parameter | PackedWeight = _matrix(rows, config.d_model)

    def weights(self) -> ExpertWeights:
        """The same memory as [E, F, D], [E, F, D] and [E, D, F]."""
        return expert_weights({role: self._split(_weight(getattr(self, role))) for role in EXPERT_MATRICES})

    def _split(self, weight: Weight) -> Weight:
        return weight.unflatten(0, (self.experts, -1)) if isinstance(weight, torch.Tensor) else weight

    def extra_repr(self) -> str:
        return _parameters_of(self)


class DbrxExperts(nn.Module):
    """The experts of a layer, which an expert store computes. The matrices have the checkpoint's names."""

    def __init__(self, config: DbrxConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.mlp = DbrxExpertMLP(config)

    def forward(
        self, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, *, logits: torch.Tensor, store: ExpertStore
    ) -> torch.Tensor:
        """[T, D]: the weighted sum of each token's experts.

        Args:
            x: [T, D].
            experts: int64 [T, A], the experts of each token, best first.
            weights: float32 [T, A], the factors of their outputs.
            logits: float32 [T, E], the router's.
            store: computes the experts.
        """
        return store.forward(self.layer, x, Routing(logits, experts, weights))

    def run(self, x: torch.Tensor, routing: Routing, store: ExpertStore) -> torch.Tensor:
        """The same for a router's decision."""
        if hooked(self):
            y: torch.Tensor = self(x, routing.experts, routing.weights, logits=routing.logits, store=store)
            return y
        return store.forward(self.layer, x, routing)


class DbrxFFN(nn.Module):
    """Router and experts of one layer."""

    def __init__(self, config: DbrxConfig, layer: int) -> None:
        super().__init__()
        self.router = DbrxRouter(config)
        self.experts = DbrxExperts(config, layer)

    def forward(self, x: torch.Tensor, shared: ForwardPass) -> torch.Tensor:
        """The output of the experts [T, D]."""
        return self.routed(x, self.router.run(x), shared)

    def routed(self, x: torch.Tensor, routing: Routing, shared: ForwardPass) -> torch.Tensor:
        """The same, once the router has decided."""
        if shared.recorder is not None:
            shared.recorder.router_logits.append(routing.logits)
        return self.experts.run(x, routing, shared.store)

    def run(self, x: torch.Tensor, shared: ForwardPass) -> torch.Tensor:
        """The same."""
        y: torch.Tensor = self(x, shared) if hooked(self) else self.forward(x, shared)
        return y


class DbrxBlock(nn.Module):
    """One transformer block."""

    def __init__(self, config: DbrxConfig, layer: int) -> None:
        super().__init__()
        self.norm_attn_norm = DbrxNormAttentionNorm(config, layer)
        self.ffn = DbrxFFN(config, layer)

    @property
    def device(self) -> torch.device:
        """The device that computes the block."""
        return self.norm_attn_norm.norm_1.weight.device

    def forward(self, x: torch.Tensor, shared: ForwardPass) -> torch.Tensor:
        """The residual stream after the block [T, D]."""
        return _total(*self._parts(x, None, shared))

    def run(self, x: torch.Tensor, delta: torch.Tensor | None, shared: ForwardPass) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(residual stream after attention, output of the experts), both [T, D], whose sum is the residual stream after the block.

        The next norm adds them, in the same pass over memory. `delta` is the second result of the previous block, None for the first
        block. A block that a hook watches returns the sum and None.

        With `shared.kept`, both are [W, D]: keys and values are computed for all tokens, the rest for the kept ones.
        """
        if hooked(self):
            return self(_total(x, delta), shared), None
        return self._parts(x, delta, shared)

    def store(self, x: torch.Tensor, delta: torch.Tensor | None, shared: ForwardPass) -> None:
        """Store the keys and values of all tokens in the cache, and compute nothing else of the block."""
        layers = self.norm_attn_norm
        layers.attn.store(layers.norm_1.run(x, delta)[1], shared)

    def _parts(self, x: torch.Tensor, delta: torch.Tensor | None, shared: ForwardPass) -> tuple[torch.Tensor, torch.Tensor]:
        if shared.routes_in_norm and not self._watched_around_router():
            x, h, routing = self.route(x, delta, shared)
            return x, self.ffn.routed(h, routing, shared)
        x, h = self.norm_attn_norm.run(x, delta, shared)
        return x, self.ffn.run(h, shared)

    def route(self, x: torch.Tensor, delta: torch.Tensor | None, shared: ForwardPass) -> tuple[torch.Tensor, torch.Tensor, Routing]:
        """(residual stream after attention, its norm_2, how it is routed): all of the block before its experts."""
        x = self.norm_attn_norm.attended(x, delta, shared)
        router = self.ffn.router
        return x, *normed_and_routed(x, self.norm_attn_norm.norm_2.weight, router.layer.weight, router.config)

    def _watched_around_router(self) -> bool:
        """Whether a hook sees the tensors between which `route` calls one kernel."""
        ffn = self.ffn
        return any(map(hooked, (self.norm_attn_norm, self.norm_attn_norm.norm_2, ffn, ffn.router, ffn.router.layer)))
