"""The DBRX model: modules with the names of the checkpoint, for inference.

Dimension letters: `B` sequences, `S` columns of a padded batch, `T` real tokens of all sequences, `D` d_model, `V` vocabulary, `H` query
heads, `G` key/value heads, `C` channels of a head, `E` experts, `F` ffn hidden.

Padding never reaches a layer: a padded batch [B, S] becomes its T real tokens, one sequence after the other, and only attention knows
where a sequence begins. A token's result therefore does not depend on what it is batched with.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .config import DbrxConfig
from .errors import RequestError, UnsupportedError
from .experts import ExpertStore, ResidentExpertStore
from .kernels.attention import IMPLEMENTATIONS, attention
from .kernels.int4 import Int4Weight
from .kernels.int8 import Int8Weight, gather_rows
from .kernels.linear import Weight, linear
from .kernels.moe import ExpertWeights, moe_experts, route
from .kv_cache import KVCache

__all__ = ["CausalLMOutput", "DbrxForCausalLM", "DbrxModel", "ModelOutput", "PackedWeight"]

_NORM_EPS = 1e-5


@dataclass
class ModelOutput:
    """What `DbrxModel` returns.

    last_hidden_state: [B, S, D], zeros where the mask is 0. past_key_values: the cache that holds these tokens, or None.
    router_logits: float32 [T, E] per layer of the real tokens, or None.
    """

    last_hidden_state: torch.Tensor
    past_key_values: KVCache | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


@dataclass
class CausalLMOutput:
    """What `DbrxForCausalLM` returns: float32 logits [B, S or logits_to_keep, V], zeros where the mask is 0; the rest as `ModelOutput`."""

    logits: torch.Tensor
    past_key_values: KVCache | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


@dataclass(frozen=True)
class _Batch:
    """The real tokens of one call. rows: their places in the flattened [B * S], None for all. counts: per sequence."""

    rows: torch.Tensor | None
    counts: list[int]
    positions: torch.Tensor  # int64 [T]
    cache: KVCache | None


class PackedWeight(nn.Module):
    """Holds a packed weight in place of a parameter, its parts as buffers named as in the checkpoint."""

    def __init__(self, weight: Int4Weight | Int8Weight) -> None:
        super().__init__()
        self.register_buffer("qweight", weight.qweight)
        self.register_buffer("scales", weight.scales)
        if isinstance(weight, Int4Weight):
            self.register_buffer("zeros", weight.zeros)
        self.value = weight


def _weight(holder: nn.Parameter | PackedWeight) -> Weight:
    return holder.value if isinstance(holder, PackedWeight) else holder.data


def _matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape), requires_grad=False)


class DbrxLinear(nn.Module):
    """y = x @ weight.T, weight [N, K] plain or packed."""

    def __init__(self, K: int, N: int) -> None:
        super().__init__()
        self.weight: nn.Parameter | PackedWeight = _matrix(N, K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, _weight(self.weight))


class DbrxEmbedding(nn.Module):
    """Rows of weight [V, D], plain or packed."""

    def __init__(self, V: int, D: int) -> None:
        super().__init__()
        self.weight: nn.Parameter | PackedWeight = _matrix(V, D)

    def forward(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        weight = _weight(self.weight)
        if isinstance(weight, Int8Weight):
            return gather_rows(weight, ids, dtype)
        assert isinstance(weight, torch.Tensor), "embeddings are plain or int8"
        return F.embedding(ids, weight)


class DbrxLayerNorm(nn.Module):
    """LayerNorm without bias."""

    def __init__(self, D: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, None, _NORM_EPS)


class DbrxAttention(nn.Module):
    """Grouped-query attention; Wqkv's output is clamped before it is split, then queries and keys are rotated."""

    def __init__(self, config: DbrxConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads, self.channels = config.n_heads, config.attn_config.kv_n_heads, config.head_dim
        self.clip = config.attn_config.clip_qkv
        self.implementation = IMPLEMENTATIONS[0]
        D = config.d_model
        self.Wqkv = DbrxLinear(D, D + 2 * self.kv_heads * self.channels)
        self.out_proj = DbrxLinear(D, D)

    def forward(self, x: torch.Tensor, batch: _Batch, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        qkv = self.Wqkv(x)  # [T, (H + 2G) C]
        if self.clip is not None:
            qkv = qkv.clamp(-self.clip, self.clip)
        q, k, v = qkv.unflatten(-1, (-1, self.channels)).split([self.heads, self.kv_heads, self.kv_heads], dim=1)  # [T, H or G, C]
        q, k = _rotate(q, rotation), _rotate(k, rotation)
        return self.out_proj(self._attend(q, k, v, batch).flatten(1))

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: _Batch) -> torch.Tensor:
        """[T, H, C]."""
        cache = batch.cache
        if cache is None:
            parts = zip(*(x.split(batch.counts) for x in (q, k, v)), strict=True)
            return torch.cat([attention(a, b.transpose(0, 1), c.transpose(0, 1), implementation=self.implementation) for a, b, c in parts])
        cache.append(self.layer, batch.counts, k, v)
        ends = [length + count for length, count in zip(cache.lengths, batch.counts, strict=True)]
        keys, values = cache.keys[self.layer], cache.values[self.layer]  # [B, G, L, C]
        outs = [
            attention(part, keys[b, :, :end], values[b, :, :end], implementation=self.implementation)
            for b, (part, end) in enumerate(zip(q.split(batch.counts), ends, strict=True))
            if len(part)
        ]
        return torch.cat(outs)


class DbrxNormAttentionNorm(nn.Module):
    """norm_1, attention and its residual, norm_2."""

    def __init__(self, config: DbrxConfig, layer: int) -> None:
        super().__init__()
        self.norm_1 = DbrxLayerNorm(config.d_model)
        self.attn = DbrxAttention(config, layer)
        self.norm_2 = DbrxLayerNorm(config.d_model)

    def forward(self, x: torch.Tensor, batch: _Batch, rotation: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(residual stream after attention, its norm_2), both [T, D]."""
        x = x + self.attn(self.norm_1(x), batch, rotation)
        return x, self.norm_2(x)


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
        w1, v1, w2 = (self._split(_weight(holder)) for holder in (self.w1, self.v1, self.w2))
        return ExpertWeights(w1, v1, w2.transpose(1, 2) if isinstance(w2, torch.Tensor) else w2)

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
        self.top_k = config.ffn_config.moe_top_k
        self.norm_order = config.ffn_config.moe_normalize_expert_weights
        self.router = DbrxRouter(config)
        self.experts = DbrxExperts(config)

    def forward(self, x: torch.Tensor, store: ExpertStore) -> tuple[torch.Tensor, torch.Tensor]:
        """([T, D], float32 router logits [T, E])."""
        routing = route(x, self.router.layer.weight, self.top_k, self.norm_order)
        weights = store.layer(self.index, routing.experts)
        return moe_experts(x, routing.experts, routing.weights, weights), routing.logits


class DbrxBlock(nn.Module):
    """One transformer block."""

    def __init__(self, config: DbrxConfig, layer: int) -> None:
        super().__init__()
        self.norm_attn_norm = DbrxNormAttentionNorm(config, layer)
        self.ffn = DbrxFFN(config, layer)

    def forward(
        self, x: torch.Tensor, batch: _Batch, rotation: tuple[torch.Tensor, torch.Tensor], store: ExpertStore
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(residual stream [T, D], float32 router logits [T, E])."""
        x, normed = self.norm_attn_norm(x, batch, rotation)
        out, logits = self.ffn(normed, store)
        return x + out, logits


class DbrxModel(nn.Module):
    """The transformer without its head, randomly initialised; `DbrxForCausalLM.from_pretrained` loads weights.

    Args:
        config: a `DbrxConfig`.
    """

    def __init__(self, config: DbrxConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = DbrxEmbedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(DbrxBlock(config, layer) for layer in range(config.n_layers))
        self.norm_f = DbrxLayerNorm(config.d_model)
        self.expert_store: ExpertStore | None = None
        _initialise(self, config.initializer_range)
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return self.norm_f.weight.dtype

    def layers(self) -> list[DbrxBlock]:
        """The blocks, with their type."""
        return [block for block in self.blocks if isinstance(block, DbrxBlock)]

    @torch.inference_mode()
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: KVCache | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
    ) -> ModelOutput:
        """Run new tokens through all layers.

        Args:
            input_ids: int64 [B, S].
            attention_mask: [B, S], 0 for padding on either side; or [B, past + S], of which the last S columns are looked at.
            past_key_values: the cache of the tokens before; the new ones are added to it.
            use_cache: return a cache that later calls can go on from; None takes the configuration's.
            output_router_logits: None takes the configuration's.

        Raises:
            RequestError: token ids out of range, a mask of another shape, or more tokens than the context holds.
        """
        batch = self._batch(input_ids, attention_mask, past_key_values, self.config.use_cache if use_cache is None else use_cache)
        ids = input_ids.flatten() if batch.rows is None else input_ids.flatten()[batch.rows]
        x = self.wte(ids, self.dtype)  # [T, D]
        rotation = _rotation(batch.positions, self.config)
        store = self.expert_store or ResidentExpertStore([block.ffn.experts.mlp.weights() for block in self.layers()])
        router_logits = []
        for block in self.blocks:
            x, logits = block(x, batch, rotation, store)
            router_logits.append(logits)
        x = self.norm_f(x)
        if batch.cache is not None:
            batch.cache.advance(batch.counts)
        wanted = self.config.output_router_logits if output_router_logits is None else output_router_logits
        return ModelOutput(_padded(x, batch.rows, input_ids.shape), batch.cache, tuple(router_logits) if wanted else None)

    def _batch(self, ids: torch.Tensor, mask: torch.Tensor | None, cache: KVCache | None, use_cache: bool) -> _Batch:
        if ids.ndim != 2 or ids.is_floating_point():
            raise RequestError(f"input_ids must be whole numbers [batch, tokens]; found {ids.dtype} {list(ids.shape)}")
        B, S = ids.shape
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.config.vocab_size:
            bad = ids.min() if ids.min() < 0 else ids.max()
            raise RequestError(
                f"token ids must be from 0 to {self.config.vocab_size - 1}; found {int(bad)}. Is the tokenizer this model's?"
            )
        past = cache.lengths if cache is not None else [0] * B
        if len(past) != B:
            raise RequestError(f"past_key_values holds {len(past)} sequences; input_ids has {B}")
        rows, counts = None, [S] * B
        if mask is not None:
            if mask.ndim != 2 or mask.shape[0] != B or mask.shape[1] < S:
                raise RequestError(f"attention_mask must be [{B}, {S}], or [{B}, past + {S}]; found {list(mask.shape)}")
            real = mask[:, mask.shape[1] - S :].bool()
            if not real.all():
                rows, counts = real.flatten().nonzero()[:, 0], real.sum(1).tolist()
        longest = max((length + count for length, count in zip(past, counts, strict=True)), default=0)
        if longest > self.config.max_seq_len:
            raise RequestError(f"a sequence must fit {self.config.max_seq_len} tokens, the context; found {longest}. Shorten it")
        if cache is None and use_cache:
            cache = KVCache(self.config, B, max(longest, 1), dtype=self.dtype, device=ids.device, grows=True)
        if cache is not None:
            cache.reserve(longest)
        pieces = [torch.arange(length, length + count) for length, count in zip(past, counts, strict=True)]
        return _Batch(rows, counts, torch.cat(pieces).to(ids.device), cache)


class DbrxForCausalLM(nn.Module):
    """The transformer with its head.

    Args:
        config: a `DbrxConfig`.
    """

    def __init__(self, config: DbrxConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = DbrxModel(config)
        self.lm_head = DbrxLinear(config.d_model, config.vocab_size)
        self.eos_token_ids: tuple[int, ...] = _as_ids(config.eos_token_id)
        _initialise(self.lm_head, config.initializer_range)
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return self.transformer.dtype

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.transformer.norm_f.weight.device

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: str | dict[str, object] | None = None,
        max_memory: dict[int | str, int | str] | None = None,
        attn_implementation: str | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> DbrxForCausalLM:
        """Load a plain or a quantized checkpoint; a packed weight is never decoded on the way.

        Args:
            path_or_hub_id: a folder, or an `owner/name` of the hub.
            device: None or "cpu".
            dtype: of activations and unquantized weights; None takes the checkpoint's `torch_dtype`.
            device_map: not offered by this version.
            max_memory: not offered by this version.
            attn_implementation: "sdpa" (the default) or "eager".
            revision: branch, tag or commit on the hub.
            token: for a gated repository.

        Raises:
            CheckpointError: a file is missing, damaged or of another model.
            UnsupportedError: an argument that this version does not offer.
        """
        from .hub import resolve_folder
        from .loading import load_model

        if device_map is not None:
            raise UnsupportedError(
                f"device_map is not offered by this version; found {device_map!r}. Leave it out: the model is loaded on the CPU"
            )
        if max_memory is not None:
            raise UnsupportedError(f"max_memory is not offered by this version; found {max_memory!r}. Leave it out")
        if device is not None and torch.device(device).type != "cpu":
            raise UnsupportedError(f"device must be 'cpu' in this version; found {str(device)!r}")
        if attn_implementation is not None and attn_implementation not in IMPLEMENTATIONS:
            raise UnsupportedError(
                f"attn_implementation must be one of {', '.join(IMPLEMENTATIONS)} in this version; found {attn_implementation!r}"
            )
        folder = resolve_folder(path_or_hub_id, revision=revision, token=token)
        model = load_model(folder, dtype=_as_dtype(dtype))
        for block in model.transformer.layers():
            block.norm_attn_norm.attn.implementation = attn_implementation or IMPLEMENTATIONS[0]
        return model

    @torch.inference_mode()
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: KVCache | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutput:
        """Logits of new tokens; arguments and errors as for `DbrxModel.forward`.

        Args:
            logits_to_keep: compute the logits of the last so many columns only; 0 for all.
        """
        out = self.transformer(input_ids, attention_mask, past_key_values, use_cache, output_router_logits)
        hidden = out.last_hidden_state[:, -logits_to_keep:]
        return CausalLMOutput(self.lm_head(hidden).float(), out.past_key_values, out.router_logits)


def _as_ids(value: int | list[int] | None) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def _as_dtype(value: torch.dtype | str | None) -> torch.dtype | None:
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if value is not None and dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise RequestError(f"dtype must be float32, float16 or bfloat16; found {value!r}")
    return dtype


def _padded(x: torch.Tensor, rows: torch.Tensor | None, shape: torch.Size) -> torch.Tensor:
    """[T, D] as [B, S, D], zeros where there is no token."""
    if rows is not None:
        full = x.new_zeros(shape.numel(), x.shape[-1])
        full[rows] = x
        x = full
    return x.view(*shape, -1)


def _rotation(positions: torch.Tensor, config: DbrxConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 cosines and sines [T, 1, C] of the rotary embedding (Su et al. 2021, RoFormer, eq. 34), halves in NeoX order."""
    channel = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device) / config.head_dim
    angles = positions.float()[:, None] * config.rope_theta**-channel  # [T, C/2]
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos(), angles.sin()


def _rotate(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """[T, H, C], turned by each token's angles in float32."""
    cos, sin = rotation
    wide = x.float()
    left, right = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)


def _initialise(module: nn.Module, std: float) -> None:
    for parameter in module.parameters():
        if parameter.ndim == 2 and not parameter.is_meta:
            nn.init.normal_(parameter, std=std)
