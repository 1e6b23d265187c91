"""Reads and checks the prompts of `model.generate`.

Dimension letters: `B` prompts, `S` columns of a padded batch, `P` columns of a given cache, `D` d_model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dbrx_q.errors import RequestError
from dbrx_q.model.generation_config import GenerationConfig
from dbrx_q.model.kv_cache import KVCache
from dbrx_q.model.modeling import DbrxForCausalLM

__all__ = ["PromptBatch", "read_prompts"]


@dataclass
class PromptBatch:
    """The prompts of a call."""

    ids: torch.Tensor
    """int64 [B, S], as they are returned; [B, 0] for embeddings alone."""
    mask: torch.Tensor | None
    """[B, P + S] in bool, False for padding; None for no padding."""
    embeddings: torch.Tensor | None
    """[B, S, D]; None for ids."""
    cache: KVCache | None
    """The tokens before those that are computed; None where the prompts begin."""
    computed: int
    """Columns of the prompts that the cache does not hold."""

    @property
    def columns(self) -> int:
        """S."""
        return int(self.ids.shape[1])

    @property
    def longest(self) -> int:
        """Real tokens of the longest prompt, those of the cache included."""
        if self.mask is None:
            before = 0 if self.cache is None else max(self.cache.lengths)
            return before + self.computed
        return int(self.mask.sum(1).max())

    @property
    def leading_padding(self) -> torch.Tensor | None:
        """int64 [B], columns of padding before each prompt; None without padding, or without ids."""
        return None if self.mask is None or not self.columns else self.mask[:, -self.columns :].int().argmax(1)

    def repeated(self, copies: int) -> PromptBatch:
        """Every prompt `copies` times, next to each other."""
        if copies > 1:
            self.ids = self.ids.repeat_interleave(copies, 0)
            self.mask = None if self.mask is None else self.mask.repeat_interleave(copies, 0)
            self.embeddings = None if self.embeddings is None else self.embeddings.repeat_interleave(copies, 0)
            if self.cache is not None and self.cache.batch_size * copies == len(self.ids):
                self.cache = self.cache.forked(range(self.cache.batch_size), self.cache.capacity)
                self.cache.repeat(copies)
        return self


def read_prompts(
    model: DbrxForCausalLM,
    config: GenerationConfig,
    *,
    input_ids: Any,
    attention_mask: Any,
    inputs_embeds: torch.Tensor | None,
    cache: KVCache | None,
    pad: int | None,
    ends: Sequence[int] | None,
    copies: int,
) -> PromptBatch:
    """The prompts once checked.

    Args:
        model: whose vocabulary and context the prompts must fit.
        config: names the token of a call without prompts.
        input_ids, attention_mask, inputs_embeds, cache: of the call.
        pad: the padding token, from which the mask is inferred where none is given, as in transformers.
        ends: tokens that end a sequence.
        copies: sequences of each prompt, of which a given cache may hold all or one.

    Raises:
        RequestError: a wrong shape, dtype or value, neither prompts nor embeddings, or a cache of another batch.
    """
    device = model.device
    if input_ids is None and inputs_embeds is None:
        if config.bos_token_id is None:
            raise RequestError(
                "generate() needs input_ids or inputs_embeds; found neither, and no bos_token_id to begin with. Pass prompts"
            )
        input_ids = [[config.bos_token_id]]
    if inputs_embeds is not None:
        if not isinstance(inputs_embeds, torch.Tensor) or inputs_embeds.ndim != 3:
            given = list(inputs_embeds.shape) if isinstance(inputs_embeds, torch.Tensor) else type(inputs_embeds).__name__
            raise RequestError(f"inputs_embeds must be [batch, tokens, {model.config.d_model}]; found {given}")
        ids = torch.zeros(len(inputs_embeds), 0, dtype=torch.int64, device=device) if input_ids is None else _ids(input_ids, model)
        if ids.shape[1] and ids.shape != inputs_embeds.shape[:2]:
            raise RequestError(
                f"inputs_embeds must be for input_ids {list(ids.shape)}; found {list(inputs_embeds.shape)}. Pass one of them"
            )
        shape, device = inputs_embeds.shape[:2], inputs_embeds.device
    else:
        ids = _ids(input_ids, model)
        shape, device = ids.shape, ids.device
    B, S = int(shape[0]), int(shape[1])
    if not B or not S:
        raise RequestError(f"prompts must have at least one sequence and one token; found {[B, S]}")
    past = 0
    if cache is not None:
        if not isinstance(cache, KVCache):
            raise RequestError(f"past_key_values must be a KVCache of dbrx_q; found {type(cache).__name__}. Pass the one of an output")
        if cache.batch_size not in (B, B * copies):
            raise RequestError(
                f"past_key_values must hold {B} sequences, those of the prompts; found {cache.batch_size}. Pass the cache of these prompts"
            )
        past = cache.get_seq_length()
    if attention_mask is None and inputs_embeds is None and pad is not None and pad not in (ends or ()) and bool((ids == pad).any()):
        attention_mask = ids != pad
    mask = None if attention_mask is None else _mask(attention_mask, B, S, past).to(device)
    computed = S
    if past and (mask is None or mask.shape[1] == S):  # the prompts are whole sequences, those of the cache included
        computed = S - past
        if computed < 1:
            raise RequestError(
                f"prompts must have tokens that the cache does not hold; found {S} columns with {past} in the cache. Pass whole sequences, "
                f"or new tokens with an attention_mask [{B}, {past} + {S}]"
            )
    if mask is not None and bool(mask.all()):
        mask = None
    elif mask is not None and not bool(mask.any(1).all()):
        row = int((~mask.any(1)).nonzero()[0])
        raise RequestError(f"every prompt must have at least one token; the attention_mask hides all of prompt {row}")
    batch = PromptBatch(ids, mask, inputs_embeds, cache, computed)
    limit = model.config.context_length
    if batch.longest >= limit:
        raise RequestError(
            f"a prompt must leave room in the model's context of {limit} tokens; the longest has {batch.longest}. Shorten it"
        )
    return batch


def _ids(value: Any, model: DbrxForCausalLM) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        try:
            value = torch.tensor(value)
        except (TypeError, ValueError):
            raise RequestError(
                "input_ids must be a tensor [batch, tokens], or lists of one length. Pad them with the tokenizer and pass its "
                "attention_mask, or call dbrx_q.generate with lists"
            ) from None
    if value.ndim != 2 or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise RequestError(f"input_ids must be whole numbers [batch, tokens]; found {value.dtype} {list(value.shape)}")
    if value.numel():
        smallest, largest = (int(end) for end in value.aminmax())
        if smallest < 0 or largest >= model.config.vocab_size:
            invalid = smallest if smallest < 0 else largest
            raise RequestError(
                f"token ids must be from 0 to {model.config.vocab_size - 1}; found {invalid}. Is the tokenizer this model's?"
            )
    return value.long()


def _mask(value: Any, B: int, S: int, past: int) -> torch.Tensor:
    mask = value if isinstance(value, torch.Tensor) else torch.tensor(value)
    if mask.shape not in ((B, S), (B, past + S)):
        raise RequestError(f"attention_mask must be [{B}, {S}], as the prompts, or [{B}, {past} + {S}]; found {list(mask.shape)}")
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        other = mask[(mask != 0) & (mask != 1)][0].item()
        raise RequestError(f"attention_mask must hold 1 for tokens and 0 for padding; found {other}")
    return mask.bool()
