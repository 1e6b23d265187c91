"""The tokens of a forward pass without padding, and what all layers of the pass share.

Dimension letters: `T` tokens of all sequences, `W` tokens of these that are kept, `B` sequences, `S` new tokens of one, `L` tokens in the
cache with the new ones, `H` query heads, `E` experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch

from dbrx_q.config import DbrxConfig
from dbrx_q.experts import ExpertStore
from dbrx_q.kernels.attention import Sequences
from dbrx_q.kernels.backend import pick
from dbrx_q.kernels.router import fused_with_norm

from .block import Rotation, rotation_of
from .kv_cache import KVCache

__all__ = ["Batch", "ForwardPass", "KeptTokens", "Recorder", "batch_of"]


@dataclass(frozen=True)
class Batch:
    """The tokens of one call, one sequence after the other."""

    sequences: Sequences
    """Where each sequence begins and ends."""
    positions: torch.Tensor
    """int32 [T]: the position of each token, which the rotary embedding takes."""
    rows: torch.Tensor
    """int32 [T]: the row of the cache that stores each token's keys and values."""
    cache: KVCache | None
    """None where no keys and values are kept."""
    indices: torch.Tensor | None = None
    """int32 [T]: the index in its row at which a token is stored; None where it equals the position."""

    @property
    def stored_at(self) -> torch.Tensor:
        """int32 [T]: the index in its row at which a token is stored."""
        return self.positions if self.indices is None else self.indices

    def to(self, device: torch.device) -> Batch:
        """The batch on another device; the cache's keys and values stay on the devices of their layers."""
        if self.positions.device == device:
            return self
        old = self.sequences
        sequences = replace(
            old,
            starts=old.starts.to(device),
            lengths=old.lengths.to(device),
            rows=None if old.rows is None else old.rows.to(device),
            masks=None if old.masks is None else tuple(None if mask is None else mask.to(device) for mask in old.masks),
        )
        indices = None if self.indices is None else self.indices.to(device)
        return Batch(sequences, self.positions.to(device), self.rows.to(device), self.cache, indices)


def batch_of(
    counts: Sequence[int],
    past: Sequence[int],
    cache: KVCache | None,
    device: torch.device,
    *,
    positions: torch.Tensor | None = None,
    masks: tuple[torch.Tensor | None, ...] | None = None,
) -> Batch:
    """A batch of `counts[b]` new tokens for each sequence b, which follow `past[b]` tokens in the cache.

    Args:
        counts: new tokens of each sequence.
        past: tokens of each sequence that the cache holds.
        cache: stores the new tokens; None to keep none.
        device: of the batch.
        positions: int32 [T], of each token; None for its index in the cache.
        masks: see `Sequences.masks`.
    """
    ends = [length + count for length, count in zip(past, counts, strict=True)]
    tokens = [(b, length + i) for b, (length, count) in enumerate(zip(past, counts, strict=True)) for i in range(count)]
    rows, indices = torch.tensor(tokens, dtype=torch.int32).view(-1, 2).T.contiguous().to(device)
    starts = torch.tensor([0, *accumulate(counts)], dtype=torch.int32).to(device)
    lengths = torch.tensor(ends, dtype=torch.int32).to(device)
    sequences = Sequences(starts, lengths, tuple(counts), tuple(ends), masks=masks)
    if positions is None:
        return Batch(sequences, indices, rows, cache)
    return Batch(sequences, positions.to(device), rows, cache, indices)


@dataclass(frozen=True)
class KeptTokens:
    """The last new tokens of each sequence of a batch: those whose output of the last layer is wanted."""

    rows: torch.Tensor
    """int64 [W] on the device: the kept ones among the T tokens."""
    counts: tuple[int, ...]
    """How many tokens of each sequence are kept, on the host."""
    sequences: Sequences
    """The sequences with the kept tokens as their new ones."""

    @classmethod
    def of(cls, batch: Batch, counts: Sequence[int]) -> KeptTokens:
        """The last `counts[b]` new tokens of each sequence b of a batch."""
        old, device = batch.sequences, batch.positions.device
        ends = list(accumulate(old.counts))
        rows = torch.tensor([row for end, count in zip(ends, counts, strict=True) for row in range(end - count, end)], dtype=torch.int64)
        starts = torch.tensor([0, *accumulate(counts)], dtype=torch.int32).to(device)
        masks = old.masks
        if masks is not None:
            pairs = zip(masks, counts, strict=True)
            masks = tuple(None if mask is None else mask[:, mask.shape[1] - count :] for mask, count in pairs)
        return cls(rows.to(device), tuple(counts), replace(old, starts=starts, counts=tuple(counts), masks=masks))


@dataclass
class Recorder:
    """Keeps what layers compute beside the residual stream."""

    router_logits: list[torch.Tensor] = field(default_factory=list)
    """float32 [T, E] of every layer so far."""
    attentions: list[list[torch.Tensor]] | None = None
    """For every layer so far the attention weights [H, S, L] of each sequence; None where they are not wanted."""


@dataclass(frozen=True)
class ForwardPass:
    """What all layers of a forward pass share."""

    batch: Batch
    """The tokens."""
    rotation: Rotation
    """Of each token's position."""
    store: ExpertStore
    """Computes the experts."""
    recorder: Recorder | None = None
    """Takes router logits and attention weights; None to keep none."""
    routes_in_norm: bool = False
    """Whether one kernel computes norm_2 and the router."""
    kept: KeptTokens | None = None
    """In the last layer, the tokens whose output is wanted; None for all."""

    @classmethod
    def of(cls, batch: Batch, config: DbrxConfig, store: ExpertStore, recorder: Recorder | None = None) -> ForwardPass:
        """The pass of a batch, on its device."""
        positions = batch.positions
        fused = fused_with_norm(len(positions), pick(positions.device))
        return cls(batch, rotation_of(positions, config), store, recorder, fused)

    def to(self, device: torch.device, config: DbrxConfig) -> ForwardPass:
        """The pass on another device."""
        return ForwardPass.of(self.batch.to(device), config, self.store, self.recorder)

    def attention_weights(self) -> list[torch.Tensor] | None:
        """A list that takes the next layer's attention weights of each sequence; None where they are not wanted."""
        if self.recorder is None or self.recorder.attentions is None:
            return None
        self.recorder.attentions.append([])
        return self.recorder.attentions[-1]
