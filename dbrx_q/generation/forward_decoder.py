"""A whole batch through `model.forward`, for requests that need more than logits: caches, hidden states, attentions, embeddings.

Dimension letters: `B` sequences, `S` columns of the prompts, `P` columns of the cache, `D` d_model, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from dbrx_q.errors import RequestError
from dbrx_q.model.kv_cache import KVCache
from dbrx_q.model.modeling import DbrxForCausalLM
from dbrx_q.model.overflow import all_finite, overflow_error, repeat_sequence

__all__ = ["ForwardDecoder"]


class ForwardDecoder:
    """Runs all sequences in one batch, with their padding.

    Args:
        model: a loaded model.
        inputs: new ids int64 [B, S], or embeddings [B, S, D].
        mask: [B, P + S], 0 for padding; None for none.
        cache: the tokens before these; None without a cache.
        hidden_states, attentions: whether to keep them.

    Attributes:
        cache: holds all tokens so far; None without a cache.
        hidden_states, attentions: of each step, a tuple of layers.
    """

    def __init__(
        self,
        model: DbrxForCausalLM,
        inputs: torch.Tensor,
        mask: torch.Tensor | None,
        cache: KVCache | None,
        *,
        hidden_states: bool,
        attentions: bool,
    ) -> None:
        self._model, self._inputs, self._mask, self.cache = model, inputs, mask, cache
        self._wants: dict[str, Any] = {"output_hidden_states": hidden_states or None, "output_attentions": attentions or None}
        self._knows_tokens = not inputs.is_floating_point() and (cache is None or not cache.get_seq_length())
        self.hidden_states: list[tuple[torch.Tensor, ...]] = []
        self.attentions: list[tuple[torch.Tensor, ...]] = []
        # Positions count real tokens, as in transformers' generate. Where padding is on the left alone, columns are as good: rotations are
        # relative, and a cache that forward filled has columns.
        self._counts_tokens = mask is not None and bool((mask.bool().int().diff(dim=1) < 0).any())

    def prefill(self) -> dict[int, torch.Tensor]:
        """Run the prompts; float32 logits [V] of the token that follows, by index of the sequence."""
        inputs, S = self._inputs, self._inputs.shape[1]
        past = 0 if self._mask is None else self._mask.shape[1] - S
        limit = self._model.limits.step_tokens
        columns = S if limit is None or self.cache is None else max(1, min(S, limit // len(inputs)))
        real = torch.ones(len(inputs), S, dtype=torch.bool) if self._mask is None else self._mask[:, past:].bool().cpu()
        last = S - 1 - real.int().flip(1).argmax(1)  # [B], the column of the last real token
        kept: torch.Tensor | None = None  # [B, D]
        layers: list[tuple[torch.Tensor, ...]] = []
        for first in range(0, S, columns):
            end = min(S, first + columns)
            wanted = torch.arange(first, end) == last[:, None]  # [B, columns]
            out = self._run(inputs[:, first:end], None if self._mask is None else self._mask[:, : past + end], wanted)
            hidden = out.last_hidden_state
            here = ((last >= first) & (last < end)).to(hidden.device)
            rows = hidden[torch.arange(len(hidden)), (last - first).clamp(0, end - first - 1)]
            kept = rows if kept is None else torch.where(here[:, None], rows, kept)
            if self._wants["output_hidden_states"]:
                layers.append(out.hidden_states)
            if self._wants["output_attentions"]:
                self.attentions.append(out.attentions)
        if layers:
            self.hidden_states.append(tuple(torch.cat(parts, 1) for parts in zip(*layers, strict=True)))
        assert kept is not None
        return self._logits(kept)

    def step(self, tokens: Mapping[int, int]) -> dict[int, torch.Tensor]:
        """Append one token to every sequence; float32 logits [V] of the token that follows, by index of the sequence."""
        new = torch.tensor(list(tokens.values()), device=self._inputs.device)[:, None]
        if self._mask is not None:
            self._mask = torch.cat((self._mask, self._mask.new_ones(len(new), 1)), 1)
        if self.cache is None:
            embeddings = self._inputs.is_floating_point()
            appended = self._model.get_input_embeddings()(new).to(self._inputs) if embeddings else new
            self._inputs = torch.cat((self._inputs, appended), 1)
        out = self._run(self._inputs if self.cache is None else new, self._mask)
        if self._wants["output_hidden_states"]:
            self.hidden_states.append(out.hidden_states)
        if self._wants["output_attentions"]:
            self.attentions.append(out.attentions)
        return self._logits(out.last_hidden_state[:, -1])

    def reorder(self, sources: Sequence[int]) -> None:
        """Let each sequence i go on as a copy of sequence `sources[i]`."""
        if self.cache is not None:
            self.cache.reorder(sources)
        else:
            self._inputs = self._inputs[list(sources)]
        if self._mask is not None:
            self._mask = self._mask[list(sources)]

    def _run(self, inputs: torch.Tensor, mask: torch.Tensor | None, wanted: int | torch.Tensor = 0) -> Any:
        positions = None
        if self._counts_tokens and mask is not None:
            positions = (mask.bool().int().cumsum(1) - 1).clamp(min=0)[:, -inputs.shape[1] :]
        return self._model.transformer(
            **{"inputs_embeds" if inputs.is_floating_point() else "input_ids": inputs},
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=self.cache is not None,
            output_router_logits=False,
            return_dict=True,
            states_to_keep=wanted,
            **self._wants,
        )

    def _logits(self, hidden: torch.Tensor) -> dict[int, torch.Tensor]:
        logits = self._model.lm_head(hidden).float()
        if not all_finite(logits):
            raise self._overflow(next(i for i, row in enumerate(logits) if not all_finite(row)))
        return dict(enumerate(logits))

    def _overflow(self, row: int) -> RequestError:
        """The error for a sequence whose logits are not finite. Its prompt is run again: where that is finite, the head is to blame."""
        if not self._knows_tokens:
            return overflow_error(self._model, None)
        S = self._inputs.shape[1]
        real = slice(None) if self._mask is None else self._mask[row, :S].bool()
        return overflow_error(self._model, partial(repeat_sequence, self._model, self._inputs[row][real].tolist()))
