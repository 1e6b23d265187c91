"""How the sequences of a request advance: each by itself on the CPU, all together on a GPU.

On the CPU every sequence has a cache and products of its own. Nothing is lost by that, since the tokens of a step go to different
experts: those of one DBRX layer take 23 ms for 1 token, 44 for 2, 96 for 4 and 183 for 8. On a GPU a step reads each expert once for all
sequences that need it, and the whole step is one CUDA graph (`decode_graph.py`).

Dimension letters: `V` vocabulary, `D` d_model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from .decode_graph import BatchDecoder
from .kernels.backend import Backend, pick
from .kv_cache import KVCache
from .model import DbrxForCausalLM

__all__ = ["Decoder", "decode_one_token", "decoder_for", "prefill"]

# Tokens that a prefill step brings at most: enough to keep matrix units busy, few enough to bound memory.
_PREFILL_TOKENS = {Backend.CPU: 512, Backend.TRITON: 2048}


class Decoder(ABC):
    """Runs the prompts of one request."""

    @abstractmethod
    def prefill(self, index: int, prompt: Sequence[int]) -> torch.Tensor:
        """Run prompt `index`; float32 logits [V] of what follows."""

    @abstractmethod
    def step(self, tokens: Mapping[int, int]) -> dict[int, torch.Tensor]:
        """Append one token to each of the sequences named; float32 logits [V] of what follows each."""


def prefill(model: DbrxForCausalLM, prompt: Sequence[int], cache: KVCache) -> torch.Tensor:
    """Run one prompt into an empty cache of one sequence, in chunks; float32 logits [V] of what follows."""
    chunk = _PREFILL_TOKENS[pick(model.device)]
    for first in range(0, len(prompt), chunk):
        ids = torch.tensor([prompt[first : first + chunk]])
        hidden = model.transformer(ids, None, cache, True, False).last_hidden_state  # [1, chunk, D]
    return model.lm_head(hidden[0, -1:]).float()[0]


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


class _Separate(Decoder):
    def __init__(self, model: DbrxForCausalLM, capacities: Sequence[int], kv_format: str) -> None:
        self._model = model
        self._caches = [
            KVCache(model.config, 1, capacity, dtype=model.dtype, device=model.device, format=kv_format) for capacity in capacities
        ]

    def prefill(self, index: int, prompt: Sequence[int]) -> torch.Tensor:
        return prefill(self._model, prompt, self._caches[index])

    def step(self, tokens: Mapping[int, int]) -> dict[int, torch.Tensor]:
        return {i: decode_one_token(self._model, token, self._caches[i]) for i, token in tokens.items()}


class _Together(Decoder):
    def __init__(self, model: DbrxForCausalLM, batch: BatchDecoder) -> None:
        self._model, self._batch = model, batch

    def prefill(self, index: int, prompt: Sequence[int]) -> torch.Tensor:
        logits = prefill(self._model, prompt, self._batch.cache.sequence(index))
        self._batch.cache.lengths[index] = len(prompt)
        return logits

    def step(self, tokens: Mapping[int, int]) -> dict[int, torch.Tensor]:
        rows = list(tokens)
        logits = self._batch.step(list(tokens.values()), rows)  # [sequences, V]
        return dict(zip(rows, logits, strict=True))
