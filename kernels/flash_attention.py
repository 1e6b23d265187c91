"""Causal attention by the flash-attn package, version 2, on a CUDA or ROCm device.

Dimension letters: `T` new tokens of all sequences, `S` new tokens of one, `B` sequences, `L` tokens in the cache with the new ones,
`H` query heads, `G` key/value heads, `C` channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from dbrx_q.kernels.formats.kv import KVLayer

if TYPE_CHECKING:
    from .attention import Sequences

__all__ = ["cached_flash_attention", "flash_attention", "flash_attention_installed"]


def flash_attention_installed() -> bool:
    """Whether Python finds the package."""
    return find_spec("flash_attn") is not None


def flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """y [T, H, C]: each token of a sequence attends to itself and to the tokens of the sequence before it.

    Args:
        q: [T, H, C], bfloat16 or float16, the tokens of one sequence after those of the other.
        k, v: [T, G, C] of the same dtype, G divides H.
        counts: tokens of each sequence, T in all.
    """
    from flash_attn import flash_attn_varlen_func

    starts = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=q.device)
    longest = max(counts, default=0)
    out: torch.Tensor = flash_attn_varlen_func(q, k, v, starts, starts, longest, longest, causal=True)
    return out


def cached_flash_attention(q: torch.Tensor, cache: KVLayer, sequences: Sequences) -> torch.Tensor:
    """y [T, H, C], over a plain cache; arguments as for `cached_attention`.

    Sequences with equally many new tokens are one call, which reads the cache where it lies; otherwise each sequence is a call.
    """
    from flash_attn import flash_attn_with_kvcache

    keys, values = cache.keys.transpose(1, 2), cache.values.transpose(1, 2)  # [rows, L, G, C]
    rows = torch.arange(len(sequences.counts), dtype=torch.int32, device=q.device) if sequences.rows is None else sequences.rows

    def attended(queries: torch.Tensor, first: int, end: int) -> torch.Tensor:
        """[B, S, H, C] for the sequences from `first` to `end`, which have S new tokens each."""
        lengths, places = sequences.lengths[first:end], rows[first:end].clamp(min=0)
        out: torch.Tensor = flash_attn_with_kvcache(queries, keys, values, cache_seqlens=lengths, cache_batch_idx=places, causal=True)
        return out

    counts = sequences.counts
    if len(set(counts)) == 1:
        return attended(q.view(len(counts), counts[0], *q.shape[1:]), 0, len(counts)).flatten(0, 1) if counts[0] else q
    parts = q.split(list(counts))
    return torch.cat([attended(part[None], b, b + 1)[0] if len(part) else part for b, part in enumerate(parts)])
