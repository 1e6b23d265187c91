"""How the sequences of a request advance: all together on a GPU; on the CPU together where each keeps the bits that it gets alone.

Where sequences advance together, a step reads each expert once for all sequences that need it. On a GPU the whole step is one CUDA graph
(`decode_graph.py`).

A prefix that prompts of a request share is computed once: a later prompt copies its keys and values from an earlier one. On the CPU only
whole prefill steps are copied, so that every product has the same rows, and hence the same bits, as if the prompt ran alone.

Dimension letters: `V` vocabulary, `D` d_model.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from dbrx_q.errors import RequestError
from dbrx_q.experts import ResidentExpertStore
from dbrx_q.kernels.attention import Sequences
from dbrx_q.kernels.backend import Backend, pick
from dbrx_q.kernels.formats.weights import Weight
from dbrx_q.model.batch import Batch
from dbrx_q.model.kv_cache import KVCache
from dbrx_q.model.kv_cache_file import PromptCache, prefill_step
from dbrx_q.model.layers import DbrxLinear, PackedWeight, hooked
from dbrx_q.model.modeling import DbrxForCausalLM
from dbrx_q.model.overflow import all_finite, overflow_error, repeat_sequence

from .decode_graph import BatchDecoder

__all__ = ["Decoder", "decode_one_token", "decoder_for", "prefill"]


class Decoder(ABC):
    """Runs the prompts of one request, which it knows by their index.

    Attributes:
        prompt_cache: keys and values of a prompt in a file, whose beginning prompts may share; None for none.
        prefilled: by index of the prompt, how many of its tokens were computed; the others were copied from another prompt, or read from
            the file.
    """

    def __init__(self, model: DbrxForCausalLM) -> None:
        self._model = model
        self._prompts: dict[int, Sequence[int]] = {}
        self._steps: dict[int, list[int]] = defaultdict(list)  # the tokens that followed each prompt, or an empty sequence
        self._places: dict[int, int] = {}  # where a sequence is stored, if not at its index
        self.prompt_cache: PromptCache | None = None
        self.prefilled: dict[int, int] = {}

    @abstractmethod
    def _cache_at(self, place: int) -> KVCache:
        """A cache of the sequence at `place` alone, in the memory that `step` reads."""

    @abstractmethod
    def _set_length(self, place: int, tokens: int) -> None:
        """Say how many tokens the sequence at `place` has now."""

    def _place(self, index: int) -> int:
        return self._places.get(index, index)

    def _cache(self, index: int) -> KVCache:
        """A cache of sequence `index` alone, in the memory that `step` reads."""
        return self._cache_at(self._place(index))

    def prefill(self, index: int, prompt: Sequence[int]) -> torch.Tensor:
        """Append `prompt` to sequence `index`; float32 logits [V] of the token that follows."""
        cache = self._cache(index)
        if cache.lengths != [0]:
            self._prompts[index] = [*self._sequence(index), *prompt]
            self._steps[index] = []
            self.prefilled[index] += len(prompt)
            return self._checked(index, prefill(self._model, prompt, cache))
        step = prefill_step(self._model) if pick(self._model.device) is Backend.CPU else 1
        prefixes = ((i, _common_prefix_length(earlier, prompt)) for i, earlier in self._prompts.items())
        donor, shared = max(prefixes, key=lambda pair: pair[1], default=(-1, 0))
        shared = min(shared, len(prompt) - 1) // step * step
        stored = 0 if self.prompt_cache is None else self.prompt_cache.shared(self._model, prompt)
        if self.prompt_cache is not None and stored > shared:
            shared = stored
            self.prompt_cache.copy_into(cache, stored)
        elif shared:
            cache.copy_prefix(self._cache(donor), shared)
        self._prompts[index], self.prefilled[index], self._steps[index] = prompt, len(prompt) - shared, []
        return self._checked(index, prefill(self._model, prompt[shared:], cache))

    def extend(self, index: int, tokens: Sequence[int], keep: int) -> torch.Tensor:
        """Append tokens to sequence `index`; float32 logits [keep, V] of what follows each of the last `keep`."""
        cache = self._cache(index)
        length = cache.lengths[0]
        self._prompts[index] = [*self._sequence(index), *tokens]
        self._steps[index] = []
        logits = prefill(self._model, tokens, cache, keep)
        self._set_length(self._place(index), length + len(tokens))
        return self._checked(index, logits)

    def crop(self, index: int, tokens: int) -> None:
        """Forget all but the first `tokens` tokens of sequence `index`."""
        self._prompts[index], self._steps[index] = self._sequence(index)[:tokens], []
        self._set_length(self._place(index), tokens)

    def fork(self, source: int, index: int) -> None:
        """Let the new sequence `index` begin as a copy of sequence `source`."""
        self._prompts[index], self._steps[index], self.prefilled[index] = self._prompts[source], list(self._steps[source]), 0
        self._copy(self._place(source), self._place(index))

    def reorder(self, sources: Sequence[int]) -> None:
        """Let each sequence i go on as a copy of sequence `sources[i]`. A sequence that goes on once is not copied."""
        self._prompts = {i: self._prompts[source] for i, source in enumerate(sources)}
        self._steps = defaultdict(list, {i: list(self._steps[source]) for i, source in enumerate(sources)})
        old = [self._place(i) for i in range(len(sources))]
        wanted = [old[source] for source in sources]
        spare = [place for place in old if place not in set(wanted)]
        taken: set[int] = set()
        for i, place in enumerate(wanted):
            if place in taken:
                capacity = self._cache_at(place).capacity  # beams of prompts of other lengths have other capacities
                target = next(other for other in spare if self._cache_at(other).capacity == capacity)
                spare.remove(target)
                self._copy(place, target)
                place = target
            taken.add(place)
            self._places[i] = place

    def _copy(self, source: int, target: int) -> None:
        """Make the sequence stored at `target` a copy of the one at `source`."""
        tokens = self._cache_at(source).lengths[0]
        self._cache_at(target).copy_prefix(self._cache_at(source), tokens)
        self._set_length(target, tokens)

    def cache_of(self, index: int) -> KVCache:
        """The keys and values of sequence `index`, to be read before the next step."""
        return self._cache(index)

    @abstractmethod
    def step(self, tokens: Mapping[int, int]) -> dict[int, torch.Tensor]:
        """Append one token to each of the given sequences; float32 logits [V] of the token that follows, by index of the sequence.

        Raises:
            RequestError: logits that are not finite; on a GPU those of the step before.
        """

    def _sequence(self, index: int) -> list[int]:
        """The tokens of a sequence so far."""
        return [*self._prompts.get(index, ()), *self._steps[index]]

    def _checked(self, index: int, logits: torch.Tensor) -> torch.Tensor:
        """The logits [.., V] that follow sequence `index`, if they are finite."""
        if not all_finite(logits):
            raise self._overflow(index)
        return logits

    def _overflow(self, index: int) -> RequestError:
        return overflow_error(self._model, partial(repeat_sequence, self._model, self._sequence(index)))


def prefill(
    model: DbrxForCausalLM, prompt: Sequence[int], cache: KVCache, keep: int | None = None, *, all_states: bool = False
) -> torch.Tensor:
    """Append a prompt to a cache of one sequence, in chunks of a prefill step; float32 logits [V] of the token that follows.

    Args:
        model: a loaded model.
        prompt: at least one token.
        cache: of one sequence.
        keep: None for the logits of one token; a number for logits [keep, V] of what follows each of the last `keep` tokens.
        all_states: compute the last layer's output of all tokens, to measure that; nobody needs it of the tokens without logits.
    """
    chunk, kept = prefill_step(model), []
    first_kept = max(0, len(prompt) - (keep or 1))
    for first in range(0, len(prompt), chunk):
        ids = torch.tensor([prompt[first : first + chunk]])
        columns = torch.arange(min(max(0, first_kept - first), ids.shape[1]), ids.shape[1])
        wanted = 0 if all_states else columns
        hidden = model.transformer(ids, past_key_values=cache, output_router_logits=False, states_to_keep=wanted).last_hidden_state
        kept.append(hidden[0, columns.to(hidden.device)])  # of [1, chunk, D]
    logits: torch.Tensor = model.lm_head(torch.cat(kept)).float()
    return logits[0] if keep is None else logits


def decode_one_token(model: DbrxForCausalLM, token: int, cache: KVCache) -> torch.Tensor:
    """Append one token to a cache of one sequence; float32 logits [V] of the token that follows."""
    return model(torch.tensor([[token]]), past_key_values=cache, output_router_logits=False).logits[0, -1].float()


@contextmanager
def decoder_for(model: DbrxForCausalLM, capacities: Sequence[int], kv_format: str) -> Iterator[Decoder]:
    """A decoder for sequences of at most `capacities` tokens each, with a KV cache in the format `kv_format`.

    Sequences advance together with the attention of the Triton kernels, which reads their lengths on the device, and on a CPU that
    multiplies packed weights: an expert is then read once for all that chose it.
    """
    if not model.transformer.steps_together:
        rows = _independent_rows(model) if len(capacities) > 1 and _fits_one_cache(model, capacities, kv_format) else 1
        rows = min(rows, model.limits.step_tokens or rows)
        yield _Shared(model, capacities, kv_format, rows) if rows > 1 else _Separate(model, capacities, kv_format)
        return
    with BatchDecoder.borrowed(model, len(capacities), max(capacities, default=1), kv_format) as batch:
        decoder = _Together(model, batch)
        yield decoder
        decoder.close()


def _independent_rows(model: DbrxForCausalLM) -> int:
    """How many sequences of a decode step on the CPU get the bits that each gets alone.

    It is more than one if all linear layers and experts are int4 or int8 with a multiple of 128 inputs.

    It is one for experts in several memories, where a step of one sequence is what caches and predictions are made for, and where hooks
    watch the model, which see each sequence's own calls.
    """
    store = model.transformer.store
    if any(device.type != "cpu" for device in model.transformer.devices) or not isinstance(store, ResidentExpertStore):
        return 1
    if model.transformer.watched or any(hooked(module) for module in (model, model.transformer, model.lm_head)):
        return 1
    from dbrx_q.kernels.cpu.linear import independent_rows

    linears = (module.weight for module in model.modules() if isinstance(module, DbrxLinear))
    weights: list[Weight] = [weight.value if isinstance(weight, PackedWeight) else weight.data for weight in linears]
    weights += [matrix for layer in store.layers for matrix in (layer.w1, layer.v1, layer.w2)]
    return min(independent_rows(weight, model.dtype) for weight in weights)


def _fits_one_cache(model: DbrxForCausalLM, capacities: Sequence[int], kv_format: str) -> bool:
    """Whether a cache with as much room for each sequence as for the longest stays within the budget, and is not mostly unused."""
    tokens = len(capacities) * max(capacities)
    if tokens > 2 * sum(capacities):
        return False
    limit = model.limits.kv_bytes
    return limit is None or tokens * KVCache(model.config, 1, 1, dtype=model.dtype, device="meta", format=kv_format).nbytes <= limit


def _common_prefix_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens of the longest prefix that both have."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


class _Separate(Decoder):
    """Every sequence has a cache of its own and advances alone."""

    def __init__(self, model: DbrxForCausalLM, capacities: Sequence[int], kv_format: str) -> None:
        super().__init__(model)
        self._caches = [
            KVCache(model.config, 1, capacity, dtype=model.dtype, device=model.transformer.devices, format=kv_format)
            for capacity in capacities
        ]

    def _cache_at(self, place: int) -> KVCache:
        return self._caches[place]

    def _set_length(self, place: int, tokens: int) -> None:
        self._caches[place].lengths = [tokens]

    def step(self, tokens: Mapping[int, int]) -> dict[int, torch.Tensor]:
        logits = {}
        for i, token in tokens.items():
            self._steps[i].append(token)
            logits[i] = self._checked(i, decode_one_token(self._model, token, self._cache(i)))
        return logits


class _Shared(Decoder):
    """All sequences share one cache on the CPU; as many advance together as keep the bits that each gets alone."""

    def __init__(self, model: DbrxForCausalLM, capacities: Sequence[int], kv_format: str, rows: int) -> None:
        super().__init__(model)
        self._most = rows
        self._all = KVCache(
            model.config, len(capacities), max(capacities), dtype=model.dtype, device=model.transformer.devices, format=kv_format
        )

    def _cache_at(self, place: int) -> KVCache:
        return self._all.sequence(place)

    def _set_length(self, place: int, tokens: int) -> None:
        self._all.lengths[place] = tokens

    def prefill(self, index: int, prompt: Sequence[int]) -> torch.Tensor:
        logits = super().prefill(index, prompt)
        self._all.lengths[self._place(index)] = len(self._sequence(index))
        return logits

    def step(self, tokens: Mapping[int, int]) -> dict[int, torch.Tensor]:
        logits: dict[int, torch.Tensor] = {}
        indices = list(tokens)
        for first in range(0, len(indices), self._most):
            logits |= self._step_of(indices[first : first + self._most], tokens)
        return logits

    def _step_of(self, indices: Sequence[int], tokens: Mapping[int, int]) -> dict[int, torch.Tensor]:
        for i in indices:
            self._steps[i].append(tokens[i])
        places = [self._place(i) for i in indices]
        lengths = [self._all.lengths[place] + 1 for place in places]
        if max(lengths) > self._all.capacity:
            raise RequestError(f"a sequence must fit {self._all.capacity} tokens, the room of its cache; found {max(lengths)}. Shorten it")
        ends, rows = torch.tensor(lengths, dtype=torch.int32), torch.tensor(places, dtype=torch.int32)
        starts = torch.arange(len(indices) + 1, dtype=torch.int32)
        sequences = Sequences(starts, ends, (1,) * len(indices), tuple(lengths), rows)
        ids = torch.tensor([tokens[i] for i in indices])
        with torch.inference_mode():
            hidden, _ = self._model.transformer.run(ids, Batch(sequences, ends - 1, rows, self._all))
            logits = self._model.lm_head(hidden).float()
        for place, length in zip(places, lengths, strict=True):
            self._all.lengths[place] = length
        return {i: self._checked(i, row) for i, row in zip(indices, logits, strict=True)}


class _Together(Decoder):
    """All sequences share one cache and advance in one step."""

    def __init__(self, model: DbrxForCausalLM, batch: BatchDecoder) -> None:
        super().__init__(model)
        self._batch = batch
        # The sums of a step's logits follow them to the host. The next step reads them: by then the host has waited for the tokens.
        self._sums = torch.zeros(len(batch.cache.lengths), pin_memory=model.device.type == "cuda")
        self._copied = torch.cuda.Event() if model.device.type == "cuda" else None
        self._unchecked: list[int] = []

    def _cache_at(self, place: int) -> KVCache:
        return self._batch.cache.sequence(place)

    def _set_length(self, place: int, tokens: int) -> None:
        self._batch.cache.lengths[place] = tokens

    def prefill(self, index: int, prompt: Sequence[int]) -> torch.Tensor:
        logits = super().prefill(index, prompt)
        self._batch.cache.lengths[self._place(index)] += len(prompt)
        return logits

    def step(self, tokens: Mapping[int, int]) -> dict[int, torch.Tensor]:
        self.close()
        rows = list(tokens)
        for i, token in tokens.items():
            self._steps[i].append(token)
        logits = self._batch.step(list(tokens.values()), [self._place(i) for i in rows])  # [sequences, V]
        self._sums[: len(rows)].copy_(logits.sum(-1), non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._model.device))
        self._unchecked = rows
        return dict(zip(rows, logits, strict=True))

    def close(self) -> None:
        if self._copied is not None and self._unchecked:
            self._copied.synchronize()
        rows, self._unchecked = self._unchecked, []
        for i, total in zip(rows, self._sums.tolist(), strict=False):
            if not math.isfinite(total):
                raise self._overflow(i)
