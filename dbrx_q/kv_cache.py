"""The KV cache: keys (after the rotary embedding) and values of every layer, one row of memory per sequence, without padding.

Dimension letters: `B` sequences, `G` key/value heads, `L` capacity in tokens, `C` channels of a head, `T` new tokens of all sequences.
"""

from __future__ import annotations

import torch

from .config import DbrxConfig
from .errors import RequestError

__all__ = ["KVCache"]


class KVCache:
    """Room for `capacity` tokens in each of `batch_size` sequences.

    Args:
        config: of the model.
        batch_size: B.
        capacity: L, at most the model's `max_seq_len`.
        grows: whether `reserve` may make room for more than L tokens.
        dtype: of keys and values.
        device: where they lie.

    Attributes:
        lengths: tokens that each sequence holds. `forward` moves them on after the last layer.

    Raises:
        RequestError: a capacity past the model's context.
    """

    def __init__(
        self,
        config: DbrxConfig,
        batch_size: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        grows: bool = False,
    ) -> None:
        if capacity > config.max_seq_len:
            raise RequestError(
                f"a sequence must fit the model's context of {config.max_seq_len} tokens; {capacity} are asked for. Shorten it"
            )
        shape = (config.n_layers, batch_size, config.attn_config.kv_n_heads, capacity, config.head_dim)
        # Zeros, not what the memory held: a masked score times NaN would still be NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # [layers, B, G, L, C]
        self.values = torch.zeros_like(self.keys)
        self.lengths = [0] * batch_size
        self._limit = config.max_seq_len if grows else capacity

    @property
    def capacity(self) -> int:
        """Tokens that fit in each sequence."""
        return self.keys.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in every sequence.

        Raises:
            RequestError: more than the cache, or the model's context where the cache grows, can hold.
        """
        if tokens > self._limit:
            raise RequestError(f"a sequence must fit {self._limit} tokens, the room of its cache; found {tokens}. Shorten it")
        if tokens > self.capacity:
            more = min(self._limit, max(tokens, 2 * self.capacity)) - self.capacity
            self.keys, self.values = (torch.nn.functional.pad(x, (0, 0, 0, more)) for x in (self.keys, self.values))

    def append(self, layer: int, counts: list[int], k: torch.Tensor, v: torch.Tensor) -> None:
        """Write the new tokens of one layer: `counts[b]` of sequence b, in order, from k, v [T, G, C]."""
        first = 0
        for b, (count, length) in enumerate(zip(counts, self.lengths, strict=True)):
            place = slice(length, length + count)
            self.keys[layer, b, :, place] = k[first : first + count].transpose(0, 1)
            self.values[layer, b, :, place] = v[first : first + count].transpose(0, 1)
            first += count

    def advance(self, counts: list[int]) -> None:
        """Count the tokens that every layer has written."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
