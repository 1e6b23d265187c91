"""The layers of DBRX for inference, named as in the checkpoint; `block.py` has the arithmetic.

Dimension letters: `T` real tokens of all sequences, `D` d_model, `V` vocabulary, `N` output features, `K` input features, `H` query heads,
`G` key/value heads, `L` tokens in the cache, `C` channels of a head, `E` experts, `F` ffn hidden, `B` sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import nn

from dbrx_q.checkpoint.layout import EXPERT_MATRICES, expert_weights
from dbrx_q.config import DbrxConfig
from dbrx_q.errors import UnsupportedError
from dbrx_q.experts import ExpertStore
from dbrx_q.kernels.attention import IMPLEMENTATIONS, Sequences, cached_attention
from dbrx_q.kernels.formats.expert_weights import ExpertWeights
from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight
from dbrx_q.kernels.formats.weights import Weight, gather_rows
from dbrx_q.kernels.linear import linear
from dbrx_q.kernels.qkv import store_qkv

from .block import Rotation, attend, normed, routed
from .kv_cache import KVCache

__all__ = ["Batch", "DbrxBlock", "DbrxEmbedding", "DbrxLayerNorm", "DbrxLinear", "PackedWeight", "batch_of"]


@dataclass(frozen=True)
class Batch:
    """The tokens of one call, one sequence after the other."""

    sequences: Sequences
    """Where each sequence begins and ends."""
    positions: torch.Tensor
    """int32 [T]: the position of each token in its sequence."""
    rows: torch.Tensor
    """int32 [T]: the row of the cache that stores each token's keys and values."""
    cache: KVCache | None
    """None where no keys and values are kept."""

    def to(self, device: torch.device) -> Batch:
        """The batch on another device; the cache's keys and values stay on the devices of their layers."""
        if self.positions.device == device:
            return self
        rows = None if self.sequences.rows is None else self.sequences.rows.to(device)
        sequences = replace(self.sequences, starts=self.sequences.starts.to(device), lengths=self.sequences.lengths.to(device), rows=rows)
        return Batch(sequences, self.positions.to(device), self.rows.to(device), self.cache)


def batch_of(counts: Sequence[int], past: Sequence[int], cache: KVCache | None, device: torch.device) -> Batch:
    """A batch of `counts[b]` new tokens for each sequence b, which follow `past[b]` tokens in the cache."""
    ends = [length + count for length, count in zip(past, counts, strict=True)]
    tokens = [(b, length + i) for b, (length, count) in enumerate(zip(past, counts, strict=True)) for i in range(count)]
    rows, positions = torch.tensor(tokens, dtype=torch.int32).view(-1, 2).T.contiguous().to(device)
    starts = torch.tensor([0, *accumulate(counts)], dtype=torch.int32).to(device)
    lengths = torch.tensor(ends, dtype=torch.int32).to(device)
    return Batch(Sequences(starts, lengths, tuple(counts), tuple(ends)), positions, rows, cache)


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


def _weight(holder: nn.Parameter | PackedWeight) -> Weight:
    return holder.value if isinstance(holder, PackedWeight) else holder.data


def _matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape), requires_grad=False)


class DbrxLinear(nn.Module):
    """y = x @ weight.T, weight [N, K] plain or packed."""

    def __init__(self, K: int, N: int) -> None:
        super().__init__()
        self.weight: nn.Parameter | PackedWeight = _matrix(N, K)

    def forward(self, x: torch.Tensor, *, clip: float | None = None, residual: torch.Tensor | None = None) -> torch.Tensor:
        return linear(x, _weight(self.weight), clip=clip, residual=residual)


class DbrxEmbedding(nn.Module):
    """Looks up rows of weight [V, D], plain or packed."""

    def __init__(self, V: int, D: int) -> None:
        super().__init__()
        self.weight: nn.Parameter | PackedWeight = _matrix(V, D)

    def forward(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        weight = _weight(self.weight)
        return F.embedding(ids, weight) if isinstance(weight, torch.Tensor) else gather_rows(weight, ids, dtype)


class DbrxLayerNorm(nn.Module):
    """Adds a layer's output to the residual stream and normalizes the sum: LayerNorm without bias."""

    def __init__(self, D: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D), requires_grad=False)

    def forward(self, x: torch.Tensor, delta: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(x + delta, its norm), both [T, D]; without `delta` the sum is `x` itself."""
        return normed(x, self.weight, delta)


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

    def forward(self, x: torch.Tensor, batch: Batch, rotation: Rotation, residual: torch.Tensor) -> torch.Tensor:
        """residual + attention, [T, D]."""
        return self.out_proj(self._attend(x, batch, rotation).flatten(1), residual=residual)

    def _attend(self, x: torch.Tensor, batch: Batch, rotation: Rotation) -> torch.Tensor:
        """[T, H, C]."""
        if batch.cache is None:
            qkv = self.Wqkv(x, clip=self.clip)  # [T, (H + 2G) C]
            return attend(qkv, rotation, batch.sequences.counts, heads=self.heads, implementation=self.implementation)
        layer = batch.cache.layers[self.layer]
        q = store_qkv(self.Wqkv(x), layer, batch.rows, batch.positions, *rotation, heads=self.heads, clip=self.clip)
        return cached_attention(q, layer, batch.sequences, implementation=self.implementation)


class DbrxNormAttentionNorm(nn.Module):
    """norm_1, attention and its residual, norm_2."""

    def __init__(self, config: DbrxConfig, layer: int) -> None:
        super().__init__()
        self.norm_1 = DbrxLayerNorm(config.d_model)
        self.attn = DbrxAttention(config, layer)
        self.norm_2 = DbrxLayerNorm(config.d_model)

    def forward(self, x: torch.Tensor, delta: torch.Tensor | None, batch: Batch, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor]:
        """(residual stream after attention, its norm_2), both [T, D]; `delta` is the previous block's output, not yet added to x."""
        x, h = self.norm_1(x, delta)
        return self.norm_2(self.attn(h, batch, rotation, x))


class DbrxRouter(nn.Module):
    """Holds the router's matrix [E, D]."""

    def __init__(self, config: DbrxConfig) -> None:
        super().__init__()
        self.layer = nn.Linear(config.d_model, config.ffn_config.moe_num_experts, bias=False)
        self.layer.weight.requires_grad_(False)


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


class DbrxExperts(nn.Module):
    """Holds the experts' matrices under the checkpoint's name."""

    def __init__(self, config: DbrxConfig) -> None:
        super().__init__()
        self.mlp = DbrxExpertMLP(config)


class DbrxFFN(nn.Module):
    """Router and experts of one layer."""

    def __init__(self, config: DbrxConfig, layer: int) -> None:
        super().__init__()
        self.index = layer
        self.config = config.ffn_config
        self.router = DbrxRouter(config)
        self.experts = DbrxExperts(config)

    def forward(self, x: torch.Tensor, store: ExpertStore) -> tuple[torch.Tensor, torch.Tensor]:
        """(output of the experts [T, D], float32 router logits [T, E])."""
        routing = routed(x, self.router.layer.weight, self.config)
        return store.forward(self.index, x, routing), routing.logits


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

    def forward(
        self, x: torch.Tensor, delta: torch.Tensor | None, batch: Batch, rotation: Rotation, store: ExpertStore
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(residual stream after attention [T, D], output of the experts [T, D], float32 router logits [T, E]).

        The next norm adds the experts' output to the stream, in the same pass over memory; `delta` is the output of the previous block's
        experts, None for the first block.
        """
        x, h = self.norm_attn_norm(x, delta, batch, rotation)
        out, logits = self.ffn(h, store)
        return x, out, logits
