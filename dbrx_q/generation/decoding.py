"""How the sequences of a request advance: each by itself on the CPU, all together on a GPU.

On the CPU every sequence has a cache and products of its own. Nothing is lost by that, since the tokens of a step go to different
experts: those of one DBRX layer take 23 ms for 1 token, 44 for 2, 96 for 4 and 183 for 8. On a GPU a step reads each expert once for all
sequences that need it, and the whole step is one CUDA graph (`decode_graph.py`).

What a prompt begins with is run once: a later prompt of the request copies the keys and values of an earlier one that begins alike. On the
CPU it copies whole prefill steps alone, so that every product is the one that the prompt alone would take, bit for bit.

Dimension letters: `V` vocabulary, `D` d_model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from dbrx_q.kernels.backend import Backend, pick
from dbrx_q.model.kv_cache import KVCache
from dbrx_q.model.modeling import DbrxForCausalLM
from dbrx_q.planning.footprint import PREFILL_TOKENS

from .decode_graph import BatchDecoder

__all__ = ["Decoder", "decode_one_token", "decoder_for", "prefill"]


class Decoder(ABC):
    """Runs the prompts of one request.

    Attributes:
        prefilled: by index of the prompt, how many of its tokens were run; the others were copied.
    """

    def __init__(self, model: DbrxForCausalLM) -> None:
        self._model = model
        self._prompts: dict[int, Sequence[int]] = {}
        self.prefilled: dict[int, int] = {}

    @abstractmethod
    def _cache(self, index: int) -> KVCache:
        """The cache of one sequence, whose memory `step` reads."""

    def prefill(self, index: int, prompt: Sequence[int]) -> torch.Tensor:
        """Run prompt `index`, after what was run of it before; float32 logits [V] of what follows."""
        cache = self._cache(index)
        if cache.lengths != [0]:
            self._prompts[index] = [*self._prompts[index], *prompt]
            self.prefilled[index] += len(prompt)
            return prefill(self._model, prompt, cache)
        step = _chunk(self._model) if pick(self._model.device) is Backend.CPU else 1
        donor, shared = max(
            ((i, _common_prefix_length(other, prompt)) for i, other in self._prompts.items()), key=lambda pair: pair[1], default=(-1, 0)
        )
        shared = min(shared, len(prompt) - 1) // step * step
        if shared:
            cache.copy_beginning(self._cache(donor), shared)
        self._prompts[index], self.prefilled[index] = prompt, len(prompt) - shared
        return prefill(self._model, prompt[shared:], cache)

    @abstractmethod
    def step(self, tokens: Mapping[int, int]) -> dict[int, torch.Tensor]:
        """Append one token to each of the sequences named; float32 logits [V] of what follows each."""


def prefill(model: DbrxForCausalLM, prompt: Sequence[int], cache: KVCache) -> torch.Tensor:
    """Append a prompt to a cache of one sequence, in chunks; float32 logits [V] of what follows."""
    chunk = _chunk(model)
    for first in range(0, len(prompt), chunk):
        ids = torch.tensor([prompt[first : first + chunk]])
        hidden = model.transformer(ids, None, cache, True, False).last_hidden_state  # [1, chunk, D]
    return model.lm_head(hidden[0, -1:]).float()[0]


def _chunk(model: DbrxForCausalLM) -> int:
    limit, most = model.limits.step_tokens, PREFILL_TOKENS[model.device.type]
    return most if limit is None else min(limit, most)


def decode_one_token(model: DbrxForCausalLM, token: int, cache: KVCache) -> torch.Tensor:
    """Append one token to a cache of one sequence; float32 logits [V] of what follows."""
    return model(torch.tensor([[token]]), None, cache, True, False).logits[0, -1]


@contextmanager
def decoder_for(model: DbrxForCausalLM, capacities: Sequence[int], kv_format: str) -> Iterator[Decoder]:
    """A decoder for sequences of at most `capacities` tokens each, whose KV cache has the format `kv_format`.

    Only the attention of the Triton kernels reads lengths on the device; with any other, sequences advance one by one on a GPU too.
    """
    if not model.transformer.steps_together:
        yield _Separate(model, capacities, kv_format)
        return
    with BatchDecoder.borrowed(model, len(capacities), max(capacities, default=1), kv_format) as batch:
        yield _Together(model, batch)


def _common_prefix_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class _Separate(Decoder):
    def __init__(self, model: DbrxForCausalLM, capacities: Sequence[int], kv_format: str) -> None:
        super().__init__(model)
        self._caches = [
            KVCache(model.config, 1, capacity, dtype=model.dtype, device=model.transformer.devices, format=kv_format)
            for capacity in capacities
        ]

    def _cache(self, index: int) -> KVCache:
        return self._caches[index]

    def step(self, tokens: Mapping[int, int]) -> dict[int, torch.Tensor]:
        return {i: decode_one_token(self._model, token, self._caches[i]) for i, token in tokens.items()}


class _Together(Decoder):
    def __init__(self, model: DbrxForCausalLM, batch: BatchDecoder) -> None:
        super().__init__(model)
        self._batch = batch

    def _cache(self, index: int) -> KVCache:
        return self._batch.cache.sequence(index)

    def prefill(self, index: int, prompt: Sequence[int]) -> torch.Tensor:
        logits = super().prefill(index, prompt)
        self._batch.cache.lengths[index] += len(prompt)
        return logits

    def step(self, tokens: Mapping[int, int]) -> dict[int, torch.Tensor]:
        rows = list(tokens)
        logits = self._batch.step(list(tokens.values()), rows)  # [sequences, V]
        return dict(zip(rows, logits, strict=True))
