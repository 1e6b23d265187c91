"""The DBRX model: modules with the names of the checkpoint, for inference.

Dimension letters: `B` sequences, `S` columns of a padded batch, `T` real tokens of all sequences, `D` d_model, `V` vocabulary, `H` query
heads, `G` key/value heads, `C` channels of a head, `E` experts, `F` ffn hidden.

Padding never reaches a layer: a padded batch [B, S] becomes its T real tokens, one sequence after the other, and only attention knows
where a sequence begins.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import nn

from dbrx_q.config import DbrxConfig
from dbrx_q.errors import RequestError, UnsupportedError
from dbrx_q.experts import ExpertStore, ResidentExpertStore
from dbrx_q.kernels.attention import Sequences
from dbrx_q.kernels.backend import Backend, pick
from dbrx_q.planning.policy_names import DEFAULT_POLICY, MissPolicy

from .block import rotation_of
from .kv_cache import KVCache
from .layers import Batch, DbrxBlock, DbrxEmbedding, DbrxLayerNorm, DbrxLinear

if TYPE_CHECKING:
    from dbrx_q.planning.machine import Placement

__all__ = [
    "CausalLMOutput",
    "DbrxForCausalLM",
    "DbrxModel",
    "ModelOutput",
    "batch_of",
]


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
        self.step_limit: int | None = None  # tokens that memory is kept for in one pass; None without a limit
        self.kv_budget: int | None = None  # bytes of keys and values that requests may take; None without a limit
        _initialise(self, config.initializer_range)
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return self.norm_f.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the last layer and the head compute; of a model on one device, the model."""
        return self.norm_f.weight.device

    @property
    def devices(self) -> list[torch.device]:
        """Where each layer computes."""
        return [block.device for block in self.layers()]

    @property
    def steps_together(self) -> bool:
        """Whether one step can serve sequences of lengths that the device alone knows."""
        own = all(block.norm_attn_norm.attn.implementation == "triton" for block in self.layers())
        return own and pick(self.device) is Backend.TRITON

    @property
    def store(self) -> ExpertStore:
        """The expert store; of a model that was not loaded one that has the parameters as they are."""
        return self.expert_store or ResidentExpertStore([block.ffn.experts.mlp.weights() for block in self.layers()])

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
            RequestError: token ids out of range, a mask of another shape, or more tokens than the context, or the memory that the model
                was given, holds.
        """
        batch, rows = self._batch(input_ids, attention_mask, past_key_values, self.config.use_cache if use_cache is None else use_cache)
        ids = input_ids.flatten() if rows is None else input_ids.flatten()[rows]
        x, router_logits = self.run(ids, batch)
        if batch.cache is not None:
            batch.cache.advance(list(batch.sequences.counts))
        wanted = self.config.output_router_logits if output_router_logits is None else output_router_logits
        hidden = _padded(x, None if rows is None else rows.to(x.device), input_ids.shape)
        return ModelOutput(hidden, batch.cache, tuple(router_logits) if wanted else None)

    def run(self, ids: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(the last hidden state [T, D], float32 router logits [T, E] of every layer) of the tokens `ids` [T].

        Nothing of it waits for the device, so that a CUDA graph can hold it; `batch.cache.lengths` are left to the caller.
        """
        x = self.wte(ids.to(self.devices[0]), self.dtype)  # [T, D]
        batch = batch.to(x.device)
        rotation = rotation_of(batch.positions, self.config)
        store = self.store
        delta, router_logits = None, []
        for block in self.layers():
            if block.device != x.device:  # the next GPU's layers begin; tokens cross, 2 D bytes each
                batch = batch.to(block.device)
                rotation = rotation_of(batch.positions, self.config)
                x, delta = x.to(block.device), None if delta is None else delta.to(block.device)
            x, delta, logits = block(x, delta, batch, rotation, store)
            router_logits.append(logits)
        return self.norm_f(x, delta)[1], router_logits

    def _batch(
        self, ids: torch.Tensor, mask: torch.Tensor | None, cache: KVCache | None, use_cache: bool
    ) -> tuple[Batch, torch.Tensor | None]:
        """The checked tokens of a call, and their places in the flattened [B * S], None for all of them."""
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
        if self.step_limit is not None and sum(counts) > self.step_limit:
            raise RequestError(
                f"a pass must bring at most the {self.step_limit} tokens that the model was given memory for; found {sum(counts)}. "
                "Bring fewer at a time, with past_key_values, or load the model with a longer context"
            )
        if cache is None and use_cache:
            room = None
            if self.kv_budget is not None:
                room = self.kv_budget // max(1, KVCache(self.config, B, 1, dtype=self.dtype, device="meta").nbytes)
                if longest > room:
                    raise RequestError(
                        f"keys and values must fit the {self.kv_budget:,} bytes that are kept for them, {room} tokens of {B} sequences; "
                        f"found {longest}. Load the model with a longer context or a larger batch, or shorten it"
                    )
            cache = KVCache(self.config, B, max(longest, 1), dtype=self.dtype, device=self.devices, grows=True, limit=room)
        if cache is not None:
            cache.reserve(longest)
        return batch_of(counts, past, cache, self.device), rows


def batch_of(counts: Sequence[int], past: Sequence[int], cache: KVCache | None, device: torch.device) -> Batch:
    """`counts[b]` new tokens for each sequence b, of which `past[b]` are known already."""
    ends = [length + count for length, count in zip(past, counts, strict=True)]
    places = [(b, length + i) for b, (length, count) in enumerate(zip(past, counts, strict=True)) for i in range(count)]
    rows, positions = torch.tensor(places, dtype=torch.int32).view(-1, 2).T.contiguous().to(device)
    starts = torch.tensor([0, *accumulate(counts)], dtype=torch.int32).to(device)
    lengths = torch.tensor(ends, dtype=torch.int32).to(device)
    return Batch(Sequences(starts, lengths, tuple(counts), tuple(ends)), positions, rows, cache)


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
        self.decoder: object | None = None  # what generation on a GPU keeps from one request to the next
        self.placement: Placement | None = None  # the plan that it was loaded by
        self.logit_room: int | None = None  # bytes that logits may take; None without a limit
        _initialise(self.lm_head, config.initializer_range)
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return self.transformer.dtype

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.transformer.device

    @property
    def kv_budget(self) -> int | None:
        """Bytes of keys and values that requests may take; None without a limit."""
        return self.transformer.kv_budget

    @property
    def expert_store(self) -> ExpertStore:
        """Where the experts live; `expert_store.stats()` says what they were asked for."""
        return self.transformer.store

    def close(self) -> None:
        """Give up what the expert store holds open; the model computes no longer where experts lie on disk."""
        self.transformer.store.close()

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: str | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        context: int | None = None,
        batch_size: int = 1,
        kv_format: str = "plain",
        cache_policy: str = DEFAULT_POLICY.value,
        miss_policy: str = "hybrid",
        prefetch: bool = True,
        fallback: bool = False,
        attn_implementation: str | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> DbrxForCausalLM:
        """Load a plain or a quantized checkpoint; a packed weight is never decoded on the way.

        Args:
            path_or_hub_id: a folder, or an `owner/name` of the hub.
            device: None or "cpu"; or "cuda" (also of a ROCm build), which then holds the whole model.
            dtype: of activations and unquantized weights; None takes the checkpoint's `torch_dtype`. bfloat16 or float16 on a GPU.
            device_map: "auto" places the model as `dbrx-q plan` says: where not all experts fit into the memory that computes, it is a
                cache of them, filled from the next larger memory or from disk. None puts all on `device`.
            max_memory: with "auto", bytes or sizes such as "22GiB" that may be taken, by index of a GPU and for "cpu"; None for what is
                free.
            context, batch_size, kv_format: with "auto", what keys and values are kept room for: tokens of a sequence (None for 4096, or
                the model's context where that is shorter), sequences together, and their format.
            cache_policy: with "auto", which expert gives way: "least-stale", "lru" or "lfu".
            miss_policy: with "auto" and GPUs, how an expert is served that is not on its gpu: computed by the CPU ("cpu"), copied
                ("copy"), or the mix of both that ends first ("hybrid").
            prefetch: with "auto", whether experts are fetched before they are needed, as the next layer's router predicts them.
            fallback: with "auto", whether the fallback copy that the checkpoint carries answers for experts on disk.
            attn_implementation: "triton", the default on a GPU and offered only there; "sdpa", the default on the CPU; or "eager".
            revision: branch, tag or commit on the hub.
            token: for a gated repository.

        Raises:
            CheckpointError: a file is missing, damaged or of another model.
            RequestError: arguments that contradict each other, or memory that cannot hold the least that works, with what would.
            UnsupportedError: an argument that this version does not offer.
        """
        from dbrx_q.planning.budget import Budget, machine_of

        from .loading import load_pretrained

        if device_map not in (None, "auto"):
            raise UnsupportedError(f"device_map must be 'auto' or None; found {device_map!r}")
        if device_map is None and max_memory is not None:
            raise RequestError(f"max_memory needs device_map='auto'; found {max_memory!r} alone")
        if device_map is None and fallback:
            raise RequestError("fallback needs device_map='auto': with all experts in memory there is no miss to answer. Leave it out")
        if device_map is not None and device is not None:
            raise RequestError(f"device_map='auto' chooses the devices; found device {str(device)!r} beside it. Leave one of them out")
        budget = None
        if device_map is not None:
            budget = Budget(
                machine_of(max_memory),
                context,
                batch_size,
                kv_format,
                policy=cache_policy,
                prefetch=prefetch,
                miss_policy=_miss_policy(miss_policy),
                fallback=fallback,
            )
        return load_pretrained(
            path_or_hub_id,
            budget=budget,
            device=device,
            dtype=_as_dtype(dtype),
            attn_implementation=attn_implementation,
            revision=revision,
            token=token,
        )

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
        if self.logit_room is not None and input_ids.ndim == 2:
            B, S = input_ids.shape
            columns = min(logits_to_keep or S, S)
            wanted = B * columns * self.config.vocab_size * (torch.float32.itemsize + self.dtype.itemsize)
            if wanted > self.logit_room:
                raise RequestError(
                    f"logits must fit the {self.logit_room:,} bytes of workspace that the model was given; those of {B} x {columns} tokens "
                    f"take {wanted:,}. Name logits_to_keep, or bring fewer tokens at a time"
                )
        out = self.transformer(input_ids, attention_mask, past_key_values, use_cache, output_router_logits)
        hidden = out.last_hidden_state[:, -logits_to_keep:]
        return CausalLMOutput(self.lm_head(hidden).float(), out.past_key_values, out.router_logits)


def _miss_policy(name: str) -> MissPolicy:
    if name not in list(MissPolicy):
        raise RequestError(f"miss_policy must be 'cpu', 'copy' or 'hybrid'; found {name!r}")
    return MissPolicy(name)


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


def _initialise(module: nn.Module, std: float) -> None:
    for parameter in module.parameters():
        if parameter.ndim == 2 and not parameter.is_meta:
            nn.init.normal_(parameter, std=std)
