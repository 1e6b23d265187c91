"""What `model.generate` returns with `return_dict_in_generate=True`.

Dimension letters: `B` prompts, `N` sequences of each, `n` tokens of the longest, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dbrx_q.model.kv_cache import KVCache
from dbrx_q.model.outputs import ModelOutput

__all__ = ["GenerateBeamDecoderOnlyOutput", "GenerateDecoderOnlyOutput"]


@dataclass(eq=False)
class GenerateDecoderOnlyOutput(ModelOutput):
    """Of greedy decoding and sampling."""

    sequences: torch.Tensor | None = None
    """int64 [B * N, n], prompts included, padded after the end."""
    scores: tuple[torch.Tensor, ...] | None = None
    """For each new token the processed scores, float32 [B * N, V]; None unless asked for."""
    logits: tuple[torch.Tensor, ...] | None = None
    """For each new token the logits, float32 [B * N, V]; None unless asked for."""
    attentions: tuple[tuple[torch.Tensor, ...], ...] | None = None
    """For each step the attention weights of every layer; None unless asked for."""
    hidden_states: tuple[tuple[torch.Tensor, ...], ...] | None = None
    """For each step the hidden states of every layer; None unless asked for."""
    cache: KVCache | None = None
    """Keys and values of all tokens but the last; None with `use_cache=False`, and with prompt lookup of a padded prompt."""


@dataclass(eq=False)
class GenerateBeamDecoderOnlyOutput(ModelOutput):
    """Of beam search. Scores, logits and states have one row for each running beam of each prompt."""

    sequences: torch.Tensor | None = None
    """int64 [B * N, n], prompts included, best first for each prompt, padded after the end."""
    sequences_scores: torch.Tensor | None = None
    """float32 [B * N], sums of log probabilities over lengths to the power of `length_penalty`; None without `output_scores`."""
    scores: tuple[torch.Tensor, ...] | None = None
    """For each step the processed log probabilities, float32 [B * beams, V]; None unless asked for."""
    logits: tuple[torch.Tensor, ...] | None = None
    """For each step the logits, float32 [B * beams, V]; None unless asked for."""
    beam_indices: torch.Tensor | None = None
    """int32 [B * N, new tokens], the row of the beam that each token continued; -1 after the end."""
    attentions: tuple[tuple[torch.Tensor, ...], ...] | None = None
    """For each step the attention weights of every layer; None unless asked for."""
    hidden_states: tuple[tuple[torch.Tensor, ...], ...] | None = None
    """For each step the hidden states of every layer; None unless asked for."""
    cache: KVCache | None = None
    """Keys and values of the running beams; None with `use_cache=False`."""
