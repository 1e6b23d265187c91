"""Checks the inputs of a forward pass and reduces them to their real tokens.

Dimension letters: `B` sequences, `S` columns of the call, `T` real tokens of all sequences, `W` tokens of these that are kept, `D` d_model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dbrx_q.config import DbrxConfig
from dbrx_q.errors import RequestError

from .batch import Batch, batch_of
from .kv_cache import KVCache
from .limits import Limits
from .loss import first_kept
from .masks import MaskedColumns, read_mask, stored_columns

__all__ = ["InputReader", "Inputs"]


@dataclass(frozen=True)
class Inputs:
    """The tokens of a call once checked."""

    batch: Batch
    """Where each token stands."""
    tokens: torch.Tensor
    """Ids int64 [T], or embeddings [T, D]."""
    shape: tuple[int, int]
    """(B, S), of the call with its padding."""
    real: torch.Tensor | None
    """int64 [T], the real tokens among the flattened [B * S]; None where all are."""
    past: int
    """Columns of the batch before this call."""
    padding: list[tuple[int, ...]] | None
    """For each sequence the columns of this call that are padding, counted from the first call; None for none."""

    def padded(self, x: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """[T, ...] as [B, S, ...], with zeros in place of padding.

        Args:
            x: [T, ...], or with `kept` [W, ...].
            kept: int64 [W], the tokens that `x` has; the others become zeros. None for all.
        """
        places = self.real
        if kept is not None:
            places = kept if places is None else places[kept.to(places.device)]
        if places is not None:
            with_padding = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:])
            with_padding[places.to(x.device)] = x
            x = with_padding
        return x.view(*self.shape, *x.shape[1:])

    def kept_counts(self, keep: int | torch.Tensor) -> tuple[int, ...] | None:
        """For each sequence, how many of its last tokens reach back to its first kept column; None if all tokens of all sequences do.

        Args:
            keep: the kept columns, as `loss.kept_columns` takes them, which lists the errors.
        """
        (B, S), counts = self.shape, self.batch.sequences.counts
        firsts = first_kept(B, S, keep)
        if not any(firsts) or len(counts) != B:  # where several sequences lie in a row, columns name none of them
            return None
        if self.real is None:
            kept = tuple(S - first for first in firsts)
        else:
            parts = zip(self.real.split(list(counts)), firsts, strict=True)
            kept = tuple(int((part % S >= first).sum()) for part, first in parts)
        return None if kept == counts else kept

    def padded_attentions(self, layers: list[list[torch.Tensor]], heads: int) -> tuple[torch.Tensor, ...]:
        """[B, H, S, past + S] for each layer, with zeros for padding, from the weights [H, tokens, L] of each sequence in each layer.

        `layers` is emptied meanwhile, so that memory holds one layer twice at most. The cache must not have advanced yet.
        """
        (B, S), past, cache = self.shape, self.past, self.batch.cache
        stored = stored_columns(cache, past) if cache is not None and past else torch.ones(B, 0, dtype=torch.bool)
        flat = torch.arange(B * S) if self.real is None else self.real
        places = [(int(part[0]) // S, part % S) for part in flat.split(list(self.batch.sequences.counts)) if len(part)]
        attentions = []
        while layers:
            weights = [part for part in layers.pop(0) if part.shape[1]]
            full = weights[0].new_zeros(B, heads, S, past + S) if weights else torch.zeros(B, heads, S, past + S)
            for (b, columns), part in zip(places, weights, strict=True):
                read = torch.cat((stored[b].nonzero()[:, 0], past + columns)).to(part.device)
                full[b, :, columns.to(part.device)[:, None], read] = part
            attentions.append(full)
        return tuple(attentions)


@dataclass(frozen=True)
class InputReader:
    """Reads the arguments of `DbrxModel.forward`."""

    config: DbrxConfig
    """Of the model."""
    limits: Limits
    """What a pass may take."""
    dtype: torch.dtype
    """Of activations."""
    device: torch.device
    """Of the batch."""
    implementation: str
    """Of attention."""

    def read(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: KVCache | None,
        cache_position: torch.Tensor | None,
        *,
        stores: bool,
    ) -> tuple[Inputs, int]:
        """The inputs, and the tokens that the longest sequence has with this call.

        Args:
            input_ids, inputs_embeds, mask, position_ids, cache, cache_position: as for `DbrxModel.forward`, which lists the errors.
            stores: whether keys and values are kept, in `cache` or in one to be made.
        """
        tokens = self._tokens(input_ids, inputs_embeds)
        B, S = shape = int(tokens.shape[0]), int(tokens.shape[1])
        if cache is not None:
            _check_cache(cache, B)
        past = cache.lengths if cache is not None else [0] * B
        columns = cache.columns if cache is not None else past
        masked = MaskedColumns() if mask is None else read_mask(mask, shape, self.config.n_heads, cache, self.implementation)
        if masked.real is None:
            counts, real, padding = [S] * B, None, None
        else:
            counts, real = masked.real.sum(1).tolist(), masked.real.flatten().nonzero()[:, 0]
            padding = [tuple((columns[b] + (~row).nonzero()[:, 0]).tolist()) for b, row in enumerate(masked.real)]
        longest = max(length + count for length, count in zip(past, counts, strict=True))
        self._check_room(longest, sum(counts))
        if cache_position is not None:
            _check_cache_position(cache_position, max(columns), S)
        positions = None
        if position_ids is not None:
            positions = self._positions(position_ids, shape, real)
            if mask is None and not stores:
                counts = _packed(positions.view(B, S))
                past = [0] * len(counts)
            if mask is None or mask.ndim == 2:
                _check_order(positions, counts, past, masked.hidden)
        elif padding is not None or columns != past:
            start = torch.tensor(columns, dtype=torch.int32)[:, None]
            positions = (start + torch.arange(S, dtype=torch.int32)).flatten()
            positions = positions if real is None else positions[real]
        batch = batch_of(counts, past, cache, self.device, positions=positions, masks=masked.masks)
        tokens = tokens.flatten(0, 1)
        if real is not None:
            tokens = tokens[real.to(tokens.device)]
        return Inputs(batch, tokens, shape, real, max(columns), padding), longest

    def _tokens(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """The ids [B, S] or the embeddings [B, S, D] that were given."""
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise RequestError(f"a forward pass takes input_ids or inputs_embeds; found {given}. Pass one of them")
        if inputs_embeds is not None:
            return self._embeddings(inputs_embeds)
        assert input_ids is not None
        if not isinstance(input_ids, torch.Tensor):
            raise RequestError(f"input_ids must be a tensor; found {type(input_ids).__name__}. Pass torch.tensor(...)")
        if input_ids.ndim != 2 or input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
            raise RequestError(f"input_ids must be whole numbers [batch, tokens]; found {input_ids.dtype} {list(input_ids.shape)}")
        _check_size("input_ids", input_ids.shape)
        smallest, largest = (int(end) for end in input_ids.aminmax())
        if smallest < 0 or largest >= self.config.vocab_size:
            invalid = smallest if smallest < 0 else largest
            raise RequestError(f"token ids must be from 0 to {self.config.vocab_size - 1}; found {invalid}. Is the tokenizer this model's?")
        return input_ids

    def _embeddings(self, embeddings: torch.Tensor) -> torch.Tensor:
        D = self.config.d_model
        if not isinstance(embeddings, torch.Tensor):
            raise RequestError(f"inputs_embeds must be a tensor; found {type(embeddings).__name__}")
        if embeddings.ndim != 3 or embeddings.shape[-1] != D:
            raise RequestError(f"inputs_embeds must be [batch, tokens, {D}]; found {list(embeddings.shape)}")
        if embeddings.dtype != self.dtype:
            raise RequestError(
                f"inputs_embeds must have the dtype of the model's activations, {self.dtype}; found {embeddings.dtype}. Convert them with "
                ".to(model.dtype)"
            )
        _check_size("inputs_embeds", embeddings.shape)
        return embeddings

    def _check_room(self, longest: int, tokens: int) -> None:
        if longest > self.config.context_length:
            raise RequestError(f"a sequence must fit {self.config.context_length} tokens, the context; found {longest}. Shorten it")
        if self.limits.step_tokens is not None and tokens > self.limits.step_tokens:
            raise RequestError(
                f"a forward pass must have at most {self.limits.step_tokens} tokens, which the model's budget has memory for; found "
                f"{tokens}. Pass fewer at a time, with past_key_values, or load the model with a longer context"
            )

    def _positions(self, position_ids: torch.Tensor, shape: tuple[int, int], real: torch.Tensor | None) -> torch.Tensor:
        """int32 [T] on the CPU."""
        B, S = shape
        if not isinstance(position_ids, torch.Tensor):
            raise RequestError(f"position_ids must be a tensor; found {type(position_ids).__name__}")
        dtype = position_ids.dtype
        if position_ids.shape not in ((B, S), (1, S)) or dtype.is_floating_point or dtype == torch.bool:
            raise RequestError(
                f"position_ids must be whole numbers [{B}, {S}] or [1, {S}], one for each new token; found {dtype} "
                f"{list(position_ids.shape)}"
            )
        positions = position_ids.cpu().expand(B, S).flatten()
        positions = positions if real is None else positions[real]
        last = self.config.context_length - 1
        outside = positions[(positions < 0) | (positions > last)]
        if len(outside):
            raise RequestError(f"position_ids of tokens must be from 0 to {last}, the context; found {int(outside[0])}")
        return positions.int()


def _check_size(name: str, shape: Sequence[int]) -> None:
    if not shape[0] or not shape[1]:
        raise RequestError(f"{name} must have at least one sequence and one token; found {list(shape)}")


def _check_cache(cache: KVCache, B: int) -> None:
    if not isinstance(cache, KVCache):
        raise RequestError(
            f"past_key_values must be a KVCache of dbrx_q; found {type(cache).__name__}. Pass the one that an output returned, or make one"
        )
    if len(cache.lengths) != B:
        raise RequestError(
            f"past_key_values must hold the {B} sequences of the call; found {len(cache.lengths)}. Pass the cache of these sequences"
        )


def _check_cache_position(cache_position: torch.Tensor, past: int, S: int) -> None:
    if not isinstance(cache_position, torch.Tensor) or not torch.equal(cache_position.cpu().flatten(), torch.arange(past, past + S)):
        shown = cache_position.tolist() if isinstance(cache_position, torch.Tensor) else cache_position
        raise RequestError(
            f"cache_position must count on from the {past} columns of the cache: {past} to {past + S - 1}; found {shown}. Leave it out"
        )


def _packed(positions: torch.Tensor) -> list[int]:
    """Tokens of the sequences that lie one after the other in each row of positions [B, S]: one begins where a position is no successor."""
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = positions.diff(dim=1) != 1
    firsts = begins.flatten().nonzero()[:, 0]
    counts: list[int] = torch.diff(firsts, append=firsts.new_tensor([positions.numel()])).tolist()
    return counts


def _check_order(positions: torch.Tensor, counts: Sequence[int], past: Sequence[int], hidden: Sequence[int] | None) -> None:
    """Refuse positions [T] that go back within a sequence, or behind the tokens that the cache holds."""
    for b, (part, length) in enumerate(zip(positions.split(list(counts)), past, strict=True)):
        back = (part.diff() < 0).nonzero()[:, 0]
        if len(back):
            before, after = part[int(back[0])], part[int(back[0]) + 1]
            raise RequestError(
                f"position_ids must not go back within a sequence; found {int(after)} after {int(before)} in sequence {b}. For several "
                "sequences in one row pass use_cache=False and no attention_mask, or an attention_mask of 4 dimensions"
            )
        visible = length - (0 if hidden is None else hidden[b])
        if len(part) and int(part[0]) < visible:
            raise RequestError(
                f"position_ids must go on from the {visible} tokens that the cache holds of sequence {b}; found {int(part[0])}. Leave "
                "position_ids out, or pass an attention_mask of 4 dimensions"
            )
