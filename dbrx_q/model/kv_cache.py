"""The KV cache: keys (after the rotary embedding) and values of every layer, one row per sequence, without padding.

Dimension letters: `B` sequences, `G` key/value heads, `L` capacity in tokens, `C` channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from dbrx_q.config import DbrxConfig
from dbrx_q.errors import RequestError
from dbrx_q.kernels.formats.kv import KV_FORMATS, KVLayer, allocate_kv

__all__ = ["KVCache"]


class KVCache:
    """Keys and values of `batch_size` sequences, with room for `capacity` tokens each.

    `DbrxModel.forward` appends to it:

        cache = KVCache(model.config, 1, 100, dtype=model.dtype)
        model(prompt, past_key_values=cache)  # [1, 40]
        model(next_token, past_key_values=cache)  # [1, 1]
        cache.lengths  # [41]

    Methods have transformers' names where transformers has them (`get_seq_length`, `crop`, `reorder_cache` ...).

    Args:
        config: of the model.
        batch_size: B, sequences.
        capacity: L, tokens of each sequence, at most the model's `context_length`.
        dtype: of the model's activations, and of keys and values in the format "plain".
        device: of all keys and values, or one device for each layer.
        grows: whether `reserve` may enlarge the cache.
        limit: most tokens of a sequence in a cache that grows; None for the model's context.
        format: "plain", or "int8" or "int4" with a scale per token and head.

    Attributes:
        lengths: tokens that each sequence holds, [B]. `forward` advances them after the last layer.
        padding: for each sequence the columns that were padding, in order. Their keys and values are not stored.
        capacity: L, tokens that each sequence has room for now.
        layers: for each layer the keys and values [B, G, L, C], and for "int8" and "int4" their scales; see `KVLayer`.

    Raises:
        RequestError: a capacity above the model's context, or an unknown format.
    """

    def __init__(
        self,
        config: DbrxConfig,
        batch_size: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str | Sequence[torch.device] = "cpu",
        grows: bool = False,
        limit: int | None = None,
        format: str = "plain",
    ) -> None:
        if capacity > config.context_length:
            raise RequestError(
                f"a sequence must fit the model's context of {config.context_length} tokens; {capacity} are asked for. Shorten it"
            )
        if format not in KV_FORMATS:
            raise RequestError(f"the format of a KV cache must be one of {', '.join(KV_FORMATS)}; found {format!r}")
        shape = batch_size, config.attn_config.kv_n_heads, capacity, config.head_dim
        devices = [torch.device(device)] * config.n_layers if isinstance(device, (torch.device, str)) else device
        self.layers: list[KVLayer] = [allocate_kv(format, *shape, dtype, layer_device) for layer_device in devices]
        self.lengths = [0] * batch_size
        self.padding: list[tuple[int, ...]] = [()] * batch_size
        self.capacity = capacity
        self._limit = (config.context_length if limit is None else min(limit, config.context_length)) if grows else capacity
        # Tokens of all sequences together, where memory and not the context is the limit.
        self._total = limit * batch_size if grows and limit is not None else None

    @property
    def format(self) -> str:
        """ "plain", "int8" or "int4"."""
        return self.layers[0].format

    @property
    def columns(self) -> list[int]:
        """For each sequence the columns of the batch so far, padding included: the default position of its next token."""
        return [length + len(padding) for length, padding in zip(self.lengths, self.padding, strict=True)]

    @property
    def nbytes(self) -> int:
        """Bytes of the keys, values and scales of all layers."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def batch_size(self) -> int:
        """B, sequences."""
        return len(self.lengths)

    max_batch_size = batch_size

    @property
    def max_cache_len(self) -> int:
        """The most tokens that a sequence can hold: the capacity, or of a cache that grows its limit."""
        return self._limit

    @property
    def is_initialized(self) -> bool:
        """True: memory is allocated by the constructor."""
        return True

    def __len__(self) -> int:
        """The number of layers."""
        return len(self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The most columns that a sequence has so far, padding included; the same for every layer."""
        return max(self.columns, default=0)

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """`max_cache_len`, which is the same for every layer."""
        return self._limit

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in every sequence.

        Raises:
            RequestError: more tokens than the cache can hold, or than its limit if it grows.
        """
        if tokens > self._limit:
            raise RequestError(f"a sequence must fit {self._limit} tokens, the room of its cache; found {tokens}. Shorten it")
        if tokens > self.capacity:
            more = min(self._limit, max(tokens, 2 * self.capacity)) - self.capacity
            for i, layer in enumerate(self.layers):  # layer by layer, so that only one layer is held twice
                self.layers[i] = _enlarged(layer, more)
            self.capacity += more

    def sequence(self, index: int) -> KVCache:
        """A view of one sequence as a cache: keys and values share this cache's memory, `lengths` do not."""
        view = object.__new__(KVCache)
        view.layers = [_mapped(layer, lambda x: x[index : index + 1]) for layer in self.layers]
        view.lengths, view.padding = [self.lengths[index]], [self.padding[index]]
        view.capacity = view._limit = self.capacity
        view._total = None
        return view

    def forked(self, rows: Sequence[int], capacity: int) -> KVCache:
        """A cache with its own memory, whose sequences begin as copies of sequences of this one.

        It has the same limit as this cache.

        Args:
            rows: indices of the sequences to copy; an index may be repeated.
            capacity: tokens that each sequence of the copy has room for.

        Raises:
            RequestError: a capacity below the length of a copied sequence, or above this cache's limit.
        """
        held = max((self.lengths[row] for row in rows), default=0)
        if not held <= capacity <= self._limit:
            raise RequestError(f"a fork must have room for {held} to {self._limit} tokens; found {capacity}")

        def copy(x: torch.Tensor) -> torch.Tensor:
            copied = x.new_zeros(len(rows), x.shape[1], capacity, *x.shape[3:])
            copied[:, :, :held] = x[list(rows), :, :held]
            return copied

        fork = object.__new__(KVCache)
        fork.layers = [_mapped(layer, copy) for layer in self.layers]
        fork.lengths = [self.lengths[row] for row in rows]
        fork.padding = [self.padding[row] for row in rows]
        fork.capacity, fork._limit, fork._total = capacity, self._limit, None
        return fork

    def copy_prefix(self, other: KVCache, tokens: int) -> None:
        """Replace the sequence of this cache by the first `tokens` tokens of `other`; both have one sequence and the same format.

        Raises:
            RequestError: `other` holds fewer tokens, or this cache has no room for them.
        """
        if not tokens <= other.lengths[0]:
            raise RequestError(f"a cache must hold the {tokens} tokens that are copied from it; found {other.lengths[0]}")
        self.reserve(tokens)
        for target, source in zip(self.layers, other.layers, strict=True):
            for part, copied in zip(_parts(target), _parts(source), strict=True):
                part[:, :, :tokens] = copied[:, :, :tokens]
        self.lengths = [tokens]
        # Before the i-th padding column, counted from 0, stand i others and its column less i tokens.
        self.padding = [tuple(column for i, column in enumerate(other.padding[0]) if column - i < tokens)]

    def crop(self, max_length: int) -> None:
        """Drop the last columns of every sequence.

        Args:
            max_length: columns to keep, padding included; sequences with fewer keep all. If negative, how many columns to drop.
        """
        for b, columns in enumerate(self.columns):
            kept = max(0, columns + max_length) if max_length < 0 else min(max_length, columns)
            self.padding[b] = tuple(column for column in self.padding[b] if column < kept)
            self.lengths[b] = kept - len(self.padding[b])

    def reset(self) -> None:
        """Empty all sequences; the memory stays."""
        self.lengths, self.padding = [0] * self.batch_size, [()] * self.batch_size

    def reorder(self, beam_idx: torch.Tensor | Sequence[int]) -> None:
        """Replace every sequence b by the sequence `beam_idx[b]`, in place: only sequences that change are copied.

        Args:
            beam_idx: whole numbers [B]; an index may be repeated.

        Raises:
            RequestError: another number of indices, or one out of range.
        """
        rows = self._rows(beam_idx)
        if len(rows) != self.batch_size:
            raise RequestError(f"reorder needs an index for each of {self.batch_size} sequences; found {len(rows)}. Or call select")
        changed = [b for b, row in enumerate(rows) if b != row]
        if not changed:
            return
        sources = [rows[b] for b in changed]
        held = max(self.lengths[row] for row in sources)
        for layer in self.layers:
            for part in _parts(layer):
                part[changed, :, :held] = part[sources, :, :held]
        self._take_lengths(rows)

    def select(self, indices: torch.Tensor | Sequence[int]) -> None:
        """Keep these sequences only, in this order; an index may be repeated. Views that `sequence` returned keep the old memory.

        Args:
            indices: whole numbers, at least one.

        Raises:
            RequestError: no index, one out of range, or sequences that exceed the memory of the model's budget together.
        """
        rows = self._rows(indices)
        if not rows:
            raise RequestError("a cache must keep at least one sequence; found no index. Name one, or make a new cache")
        limit = self._limit if self._total is None else min(self._limit, self._total // len(rows))
        held = max(self.lengths[row] for row in rows)
        if held > limit:
            raise RequestError(
                f"{len(rows)} sequences of a cache must have room for {held} tokens each; the model's budget has room for {limit}. Select "
                "fewer, or load the model with a longer context or a larger batch"
            )
        capacity = min(self.capacity, limit)

        def taken(x: torch.Tensor) -> torch.Tensor:
            part = x.new_zeros(len(rows), x.shape[1], capacity, *x.shape[3:])
            part[:, :, :held] = x[rows, :, :held]
            return part

        for i, layer in enumerate(self.layers):  # layer by layer, so that only one layer is held twice
            self.layers[i] = _mapped(layer, taken)
        self.capacity, self._limit = capacity, limit
        self._take_lengths(rows)

    def repeat(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times, the copies next to each other; errors as for `select`."""
        if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
            raise RequestError(f"a sequence must be repeated at least once; found {repeats!r}. Give a whole number from 1")
        if repeats > 1:
            self.select([b for b in range(self.batch_size) for _ in range(repeats)])

    reorder_cache = reorder
    batch_select_indices = select
    batch_repeat_interleave = repeat

    def _rows(self, indices: torch.Tensor | Sequence[int]) -> list[int]:
        """The indices of sequences as a list, once checked."""
        rows = indices.flatten().tolist() if isinstance(indices, torch.Tensor) else list(indices)
        invalid = [row for row in rows if isinstance(row, bool) or not isinstance(row, int) or not 0 <= row < self.batch_size]
        if invalid:
            raise RequestError(f"indices of sequences must be whole numbers from 0 to {self.batch_size - 1}; found {invalid[0]!r}")
        return rows

    def _take_lengths(self, rows: Sequence[int]) -> None:
        self.lengths, self.padding = [self.lengths[row] for row in rows], [self.padding[row] for row in rows]

    def advance(self, counts: Sequence[int], padding: Sequence[tuple[int, ...]] | None = None) -> None:
        """Add to `lengths` the tokens that every layer has written for each sequence.

        Args:
            counts: for each sequence, the new tokens.
            padding: for each sequence, the columns that were padding in this call, counted from its first call; None for no padding.
        """
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        if padding is not None:
            self.padding = [(*earlier, *later) for earlier, later in zip(self.padding, padding, strict=True)]


def _enlarged(layer: KVLayer, more: int) -> KVLayer:
    """A copy with room for `more` tokens."""

    def pad(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(x, (*(0, 0) * (x.ndim - 3), 0, more))  # the token axis is the third

    return _mapped(layer, pad)


def _parts(layer: KVLayer) -> list[torch.Tensor]:
    """Keys, values, and in quantized formats their scales."""
    return [part for part in (layer.keys, layer.values, layer.key_scales, layer.value_scales) if part is not None]


def _mapped(layer: KVLayer, change: Callable[[torch.Tensor], torch.Tensor]) -> KVLayer:
    scales = (None if part is None else change(part) for part in (layer.key_scales, layer.value_scales))
    return KVLayer(layer.format, change(layer.keys), change(layer.values), *scales)
