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
        fork.capacity, fork._limit = capacity, self._limit
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
            for name in ("keys", "values", "key_scales", "value_scales"):
                part = getattr(target, name)
                if part is not None:
                    part[:, :, :tokens] = getattr(source, name)[:, :, :tokens]
        self.lengths = [tokens]
        # Before the i-th padding column, counted from 0, stand i others and its column less i tokens.
        self.padding = [tuple(column for i, column in enumerate(other.padding[0]) if column - i < tokens)]

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


def _mapped(layer: KVLayer, change: Callable[[torch.Tensor], torch.Tensor]) -> KVLayer:
    scales = (None if part is None else change(part) for part in (layer.key_scales, layer.value_scales))
    return KVLayer(layer.format, change(layer.keys), change(layer.values), *scales)
