"""The KV cache: keys (after the rotary embedding) and values of every layer, one row of memory per sequence, without padding.

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
    """Room for `capacity` tokens in each of `batch_size` sequences.

    Args:
        config: of the model.
        batch_size: B.
        capacity: L, at most the model's `max_seq_len`.
        dtype: of the model's activations, and of plain keys and values.
        device: where they lie; or one for each layer.
        grows: whether `reserve` may make room for more than L tokens.
        limit: for how many at most, where it grows; None for the model's context.
        format: "plain", or "int8" or "int4" with scales per token and head.

    Attributes:
        lengths: tokens that each sequence holds. `forward` moves them on after the last layer.
        layers: what each layer holds.

    Raises:
        RequestError: a capacity past the model's context, or an unknown format.
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
        if capacity > config.max_seq_len:
            raise RequestError(
                f"a sequence must fit the model's context of {config.max_seq_len} tokens; {capacity} are asked for. Shorten it"
            )
        if format not in KV_FORMATS:
            raise RequestError(f"the format of a KV cache must be one of {', '.join(KV_FORMATS)}; found {format!r}")
        shape = batch_size, config.attn_config.kv_n_heads, capacity, config.head_dim
        places = [torch.device(device)] * config.n_layers if isinstance(device, (torch.device, str)) else device
        self.layers: list[KVLayer] = [allocate_kv(format, *shape, dtype, place) for place in places]
        self.lengths = [0] * batch_size
        self.capacity = capacity
        self._limit = (config.max_seq_len if limit is None else min(limit, config.max_seq_len)) if grows else capacity

    @property
    def format(self) -> str:
        """ "plain", "int8" or "int4"."""
        return self.layers[0].format

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and scales."""
        return sum(layer.nbytes for layer in self.layers)

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in every sequence.

        Raises:
            RequestError: more than the cache, or the model's context where the cache grows, can hold.
        """
        if tokens > self._limit:
            raise RequestError(f"a sequence must fit {self._limit} tokens, the room of its cache; found {tokens}. Shorten it")
        if tokens > self.capacity:
            more = min(self._limit, max(tokens, 2 * self.capacity)) - self.capacity
            for i, layer in enumerate(self.layers):  # one after the other, so that little more than what is kept is held
                self.layers[i] = _grown(layer, more)
            self.capacity += more

    def sequence(self, index: int) -> KVCache:
        """A cache of one sequence in the same memory: what is written to it is written here; `lengths` are its own."""
        one = object.__new__(KVCache)
        one.layers = [_mapped(layer, lambda x: x[index : index + 1]) for layer in self.layers]
        one.lengths = [self.lengths[index]]
        one.capacity = one._limit = self.capacity
        return one

    def forked(self, rows: Sequence[int], capacity: int) -> KVCache:
        """A cache with memory of its own and one sequence for each of `rows`, which begins as a copy of that sequence of this one.

        It may grow where this one may.

        Args:
            rows: indices of sequences; one may come several times.
            capacity: room for so many tokens in each.

        Raises:
            RequestError: a capacity below what a sequence holds, or above the room that this cache can have.
        """
        held = max((self.lengths[row] for row in rows), default=0)
        if not held <= capacity <= self._limit:
            raise RequestError(f"a fork must have room for {held} to {self._limit} tokens; found {capacity}")

        def copy(x: torch.Tensor) -> torch.Tensor:
            fresh = x.new_zeros(len(rows), x.shape[1], capacity, *x.shape[3:])
            fresh[:, :, :held] = x[list(rows), :, :held]
            return fresh

        fork = object.__new__(KVCache)
        fork.layers = [_mapped(layer, copy) for layer in self.layers]
        fork.lengths = [self.lengths[row] for row in rows]
        fork.capacity, fork._limit = capacity, self._limit
        return fork

    def copy_beginning(self, other: KVCache, tokens: int) -> None:
        """Take the first `tokens` tokens of another cache of one sequence and of this format for the first of this one's.

        Raises:
            RequestError: the other holds fewer, or this one has no room for them.
        """
        if not tokens <= other.lengths[0]:
            raise RequestError(f"a cache must hold the {tokens} tokens that are copied from it; found {other.lengths[0]}")
        self.reserve(tokens)
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            for name in ("keys", "values", "key_scales", "value_scales"):
                part = getattr(mine, name)
                if part is not None:
                    part[:, :, :tokens] = getattr(theirs, name)[:, :, :tokens]
        self.lengths = [tokens]

    def advance(self, counts: list[int]) -> None:
        """Count the tokens that every layer has written."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]


def _grown(layer: KVLayer, more: int) -> KVLayer:
    def pad(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(x, (*(0, 0) * (x.ndim - 3), 0, more))  # the token axis is the third

    return _mapped(layer, pad)


def _mapped(layer: KVLayer, change: Callable[[torch.Tensor], torch.Tensor]) -> KVLayer:
    scales = (None if part is None else change(part) for part in (layer.key_scales, layer.value_scales))
    return KVLayer(layer.format, change(layer.keys), change(layer.values), *scales)
