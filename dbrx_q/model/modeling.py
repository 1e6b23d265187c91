"""The DBRX model for inference: `DbrxModel` and, with its head, `DbrxForCausalLM`. Modules are named as in the checkpoint.

Dimension letters: `B` sequences, `S` columns of a padded batch, `T` real tokens of all sequences, `D` d_model, `V` vocabulary, `H` query
heads, `G` key/value heads, `C` channels of a head, `E` experts, `F` ffn hidden.

Padding never reaches a layer. A padded batch [B, S] is reduced to its T real tokens, one sequence after the other, and only attention
knows where a sequence begins.
"""

from __future__ import annotations

import torch
from torch import nn

from dbrx_q.config import DbrxConfig
from dbrx_q.errors import RequestError, UnsupportedError
from dbrx_q.experts import ExpertStore, ResidentExpertStore
from dbrx_q.kernels.backend import Backend, pick

from .block import rotation_of
from .kv_cache import KVCache
from .layers import Batch, DbrxBlock, DbrxEmbedding, DbrxLayerNorm, DbrxLinear, batch_of
from .limits import Limits
from .outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from .pretrained import DbrxPreTrainedModel

__all__ = ["DbrxForCausalLM", "DbrxModel"]


class DbrxModel(DbrxPreTrainedModel):
    """The transformer without its head.

    The constructor initialises weights at random; `from_pretrained` loads a checkpoint.

    Args:
        config: a `DbrxConfig`.

    Attributes:
        expert_store: serves the experts of all layers; None for the experts of the modules themselves.
        limits: the memory that requests may take.
    """

    def __init__(self, config: DbrxConfig) -> None:
        super().__init__(config)
        config = self.config
        self.wte = DbrxEmbedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(DbrxBlock(config, layer) for layer in range(config.n_layers))
        self.norm_f = DbrxLayerNorm(config.d_model)
        self.expert_store: ExpertStore | None = None
        self.limits = Limits()
        _initialise(self, config.initializer_range)
        self.eval()

    @property
    def devices(self) -> list[torch.device]:
        """The device of each layer."""
        return [block.device for block in self.layers()]

    @property
    def steps_together(self) -> bool:
        """Whether attention reads the lengths of sequences on the device, so that one captured step serves a batch."""
        triton = all(block.norm_attn_norm.attn.implementation == "triton" for block in self.layers())
        return triton and pick(self.device) is Backend.TRITON

    @property
    def store(self) -> ExpertStore:
        """The expert store; for a model that was not loaded, a store of the modules' own parameters."""
        return self.expert_store or ResidentExpertStore([block.ffn.experts.mlp.weights() for block in self.layers()])

    def layers(self) -> list[DbrxBlock]:
        """The blocks in order, typed."""
        return [block for block in self.blocks if isinstance(block, DbrxBlock)]

    @torch.inference_mode()
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        *,
        cache: KVCache | None = None,
    ) -> MoeModelOutputWithPast:
        """Run new tokens through all layers.

        Args:
            input_ids: int64 [B, S].
            attention_mask: [B, S], 0 for padding on either side; or [B, past + S], of which the last S columns are used. None for no
                padding.
            position_ids, inputs_embeds: must be None.
            past_key_values: the cache with the tokens before these; the new tokens are added to it.
            cache: another name for `past_key_values`.
            use_cache: whether to return a cache for later calls; None for the configuration's `use_cache`.
            output_router_logits: whether to return the logits of every router; None for the configuration's `output_router_logits`.

        Raises:
            RequestError: token ids out of range, a mask of another shape, or more tokens than the context, the cache or the model's budget
                has room for.
        """
        if position_ids is not None or inputs_embeds is not None:
            raise UnsupportedError("position_ids and inputs_embeds must be None; found a tensor")
        past_key_values = past_key_values if cache is None else cache
        batch, rows = self._batch(input_ids, attention_mask, past_key_values, self.config.use_cache if use_cache is None else use_cache)
        ids = input_ids.flatten() if rows is None else input_ids.flatten()[rows]
        x, router_logits = self.run(ids, batch)
        if batch.cache is not None:
            batch.cache.advance(list(batch.sequences.counts))
        with_logits = self.config.output_router_logits if output_router_logits is None else output_router_logits
        hidden = _padded(x, None if rows is None else rows.to(x.device), input_ids.shape)
        return MoeModelOutputWithPast(hidden, batch.cache, router_logits=tuple(router_logits) if with_logits else None)

    def run(self, ids: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(the last hidden state [T, D], float32 router logits [T, E] of every layer) of the tokens `ids` [T].

        It never waits for the device, so that a CUDA graph can capture it. The caller advances `batch.cache.lengths`.
        """
        x = self.wte(ids.to(self.devices[0]), self.dtype)  # [T, D]
        batch = batch.to(x.device)
        rotation = rotation_of(batch.positions, self.config)
        store = self.store
        delta, router_logits = None, []
        for block in self.layers():
            if block.device != x.device:  # the layers of the next GPU begin: the residual stream moves, 2 D bytes per token
                batch = batch.to(block.device)
                rotation = rotation_of(batch.positions, self.config)
                x, delta = x.to(block.device), None if delta is None else delta.to(block.device)
            x, delta, logits = block(x, delta, batch, rotation, store)
            router_logits.append(logits)
        return self.norm_f(x, delta)[1], router_logits

    def _batch(
        self, ids: torch.Tensor, mask: torch.Tensor | None, cache: KVCache | None, use_cache: bool
    ) -> tuple[Batch, torch.Tensor | None]:
        """The tokens of a call once checked, and their indices in the flattened [B * S]; None for the indices without padding."""
        if ids.ndim != 2 or ids.is_floating_point():
            raise RequestError(f"input_ids must be whole numbers [batch, tokens]; found {ids.dtype} {list(ids.shape)}")
        B, S = ids.shape
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.config.vocab_size:
            invalid = ids.min() if ids.min() < 0 else ids.max()
            raise RequestError(
                f"token ids must be from 0 to {self.config.vocab_size - 1}; found {int(invalid)}. Is the tokenizer this model's?"
            )
        past = cache.lengths if cache is not None else [0] * B
        if len(past) != B:
            raise RequestError(
                f"past_key_values must hold the {B} sequences of input_ids; found {len(past)}. Pass the cache of these sequences"
            )
        rows, counts = None, [S] * B
        if mask is not None:
            if mask.ndim != 2 or mask.shape[0] != B or mask.shape[1] < S:
                raise RequestError(f"attention_mask must be [{B}, {S}], or [{B}, past + {S}]; found {list(mask.shape)}")
            real = mask[:, mask.shape[1] - S :].bool()
            if not real.all():
                rows, counts = real.flatten().nonzero()[:, 0], real.sum(1).tolist()
        longest = max((length + count for length, count in zip(past, counts, strict=True)), default=0)
        if longest > self.config.context_length:
            raise RequestError(f"a sequence must fit {self.config.context_length} tokens, the context; found {longest}. Shorten it")
        if self.limits.step_tokens is not None and sum(counts) > self.limits.step_tokens:
            raise RequestError(
                f"a forward pass must have at most {self.limits.step_tokens} tokens, which the model's budget has memory for; found "
                f"{sum(counts)}. Pass fewer at a time, with past_key_values, or load the model with a longer context"
            )
        if cache is None and use_cache:
            cache = self._new_cache(B, longest)
        if cache is not None:
            cache.reserve(longest)
        return batch_of(counts, past, cache, self.device), rows

    def _new_cache(self, batch_size: int, tokens: int) -> KVCache:
        """A cache with room for `tokens` tokens in each sequence, which grows as far as the model's budget allows."""
        room, kv_bytes = None, self.limits.kv_bytes
        if kv_bytes is not None:
            room = kv_bytes // max(1, KVCache(self.config, batch_size, 1, dtype=self.dtype, device="meta").nbytes)
            if tokens > room:
                raise RequestError(
                    f"keys and values must fit the {kv_bytes:,} bytes of the model's budget, {room} tokens of {batch_size} sequences; "
                    f"found {tokens}. Load the model with a longer context or a larger batch, or shorten it"
                )
        return KVCache(self.config, batch_size, max(tokens, 1), dtype=self.dtype, device=self.devices, grows=True, limit=room)


class DbrxForCausalLM(DbrxPreTrainedModel):
    """The transformer with its head; `from_pretrained` loads a checkpoint.

        model = DbrxForCausalLM.from_pretrained("dbrx-int4")
        model(tokenizer.batch_encode(["A mixture of experts is"]).input_ids).logits  # [1, S, V]

    Args:
        config: a `DbrxConfig`; weights are initialised at random.

    Attributes:
        eos_token_ids: tokens that end a generation: those of generation_config.json, or of the configuration without that file.
    """

    def __init__(self, config: DbrxConfig) -> None:
        super().__init__(config)
        config = self.config
        self.transformer = DbrxModel(config)
        self.lm_head = DbrxLinear(config.d_model, config.vocab_size)
        self.eos_token_ids: tuple[int, ...] = _as_ids(config.eos_token_id)
        self.decoder: object | None = None  # the `BatchDecoder` that generation on a GPU keeps from one request to the next
        _initialise(self.lm_head, config.initializer_range)
        self.eval()

    @property
    def limits(self) -> Limits:
        """The memory that requests may take."""
        return self.transformer.limits

    @property
    def expert_store(self) -> ExpertStore:
        """Serves the experts of all layers; its `stats()` counts hits, misses and bytes."""
        return self.transformer.store

    def close(self) -> None:
        """Close the files and threads of the expert store. A model whose experts are partly on disk cannot run afterwards."""
        self.transformer.store.close()

    @torch.inference_mode()
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int = 0,
        *,
        cache: KVCache | None = None,
    ) -> MoeCausalLMOutputWithPast:
        """Logits of new tokens; other arguments and errors as for `DbrxModel.forward`.

        Args:
            logits_to_keep: how many of the last columns to compute logits for; 0 for all.

        Raises:
            RequestError: also for logits that exceed the model's budget.
        """
        logit_bytes = self.limits.logit_bytes
        if logit_bytes is not None and input_ids.ndim == 2:
            B, S = input_ids.shape
            columns = min(logits_to_keep or S, S)
            needed = B * columns * self.config.vocab_size * (torch.float32.itemsize + self.dtype.itemsize)
            if needed > logit_bytes:
                raise RequestError(
                    f"logits must fit {logit_bytes:,} bytes, the workspace of the model's budget; those of {B} x {columns} tokens take "
                    f"{needed:,}. Name logits_to_keep, or pass fewer tokens at a time"
                )
        if labels is not None:
            raise UnsupportedError("labels must be None; found a tensor")
        out = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
        )
        logits = self.lm_head(out.last_hidden_state[:, -logits_to_keep:])
        return MoeCausalLMOutputWithPast(logits=logits, cache=out.cache, router_logits=out.router_logits)


def _as_ids(value: int | list[int] | None) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def _padded(x: torch.Tensor, rows: torch.Tensor | None, shape: torch.Size) -> torch.Tensor:
    """[T, D] as [B, S, D], with zeros in place of padding."""
    if rows is not None:
        padded = x.new_zeros(shape.numel(), x.shape[-1])
        padded[rows] = x
        x = padded
    return x.view(*shape, -1)


def _initialise(module: nn.Module, std: float) -> None:
    for parameter in module.parameters():
        if parameter.ndim == 2 and not parameter.is_meta:
            nn.init.normal_(parameter, std=std)
