"""`attention` and `cached_attention`: causal attention with grouped query heads, without a cache and over a possibly quantized one.

Dimension letters: `T` new tokens of all sequences, `S` new tokens of one, `B` sequences, `L` tokens in the cache with the new ones,
`H` query heads, `G` key/value heads, `C` channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dbrx_q.kernels.formats.errors import DbrxError
from dbrx_q.kernels.formats.kv import KVLayer
from dbrx_q.kernels.triton.launch import interpreting

from .backend import Backend, pick

__all__ = ["IMPLEMENTATIONS", "Sequences", "attention", "attention_reference", "cached_attention"]

IMPLEMENTATIONS = ("sdpa", "eager", "triton")
"""In this order: torch's fused attention; every step written out in float32; the Triton kernels of this package."""


@dataclass(frozen=True)
class Sequences:
    """Where each sequence of a call begins and ends; the new tokens of a sequence are its last."""

    starts: torch.Tensor
    """int32 [B + 1] on the device: the first row of each sequence among the T new tokens."""
    lengths: torch.Tensor
    """int32 [B] on the device: tokens in the cache, including the new ones, which are stored already."""
    counts: tuple[int, ...]
    """New tokens of each sequence, on the host."""
    ends: tuple[int, ...]
    """`lengths` on the host. "triton" does not read them if every count is 1, so that a captured graph replays with other lengths."""
    rows: torch.Tensor | None = None
    """int32 [B] on the device: the row of the cache of each sequence; None for 0, 1, 2 ..."""


def cached_attention(q: torch.Tensor, cache: KVLayer, sequences: Sequences, *, implementation: str) -> torch.Tensor:
    """y [T, H, C] in the dtype of `q`.

    Args:
        q: [T, H, C], the rotated queries of the new tokens, one sequence after the other.
        cache: keys and values of all tokens, the new ones included; a plain cache has the dtype of `q`. G divides H.
        sequences: which rows of `q` and of the cache belong together.
        implementation: one of `IMPLEMENTATIONS`.

    Raises:
        DbrxError: "triton" on a device where its kernels do not run, or "sdpa" over a quantized cache on a GPU.
    """
    if implementation == "triton":
        return _own(q, cache, sequences)
    if implementation == "sdpa" and cache.format != "plain" and q.device.type != "cpu":
        raise DbrxError(
            "no 16-bit copy of a quantized KV cache is made on a GPU, so implementation='sdpa' takes a plain one there; "
            f"found {cache.format!r}. Choose 'triton', or 'eager' to compare"
        )
    rows = range(len(sequences.counts)) if sequences.rows is None else sequences.rows.tolist()
    out = torch.zeros_like(q)
    first = 0
    for row, count, end in zip(rows, sequences.counts, sequences.ends, strict=True):
        if count and end:
            k, v = cache.row(max(row, 0), end, torch.float32 if implementation == "eager" else q.dtype)
            out[first : first + count] = attention(q[first : first + count], k, v, implementation=implementation)
        first += count
    return out


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, implementation: str = "sdpa") -> torch.Tensor:
    """y [S, H, C] for the last S of L tokens of one sequence.

    Args:
        q: [S, H, C]. The first query is token L - S of the sequence; each attends to itself and to the tokens before it.
        k, v: [G, L, C], G divides H.
        implementation: "sdpa" or "triton", which both call torch's fused attention here: it prefills over an unquantized cache as fast as
            a kernel of our own; or "eager", every step written out in float32.
    """
    if implementation == "eager":
        return attention_reference(q, k, v).to(q.dtype)
    (S, H, C), (G, L, _) = q.shape, k.shape
    if S == 1:  # the H/G query heads of a key/value head become the rows of one attention: keys and values are read once
        return F.scaled_dot_product_attention(q.view(1, G, H // G, C), k[None], v[None]).reshape(1, H, C)
    mask = torch.ones(S, L, dtype=torch.bool, device=q.device).tril(L - S) if S < L else None
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k[None], v[None], attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )  # [1, H, S, C]
    return out[0].transpose(0, 1)


def attention_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """float32 y [S, H, C]; arguments as for `attention`."""
    S, H, C = q.shape
    G, L, _ = k.shape
    grouped = q.float().view(S, G, H // G, C)
    scores = torch.einsum("sghc,glc->ghsl", grouped, k.float()) * C**-0.5
    future = torch.ones(S, L, dtype=torch.bool, device=q.device).triu(L - S + 1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    return torch.einsum("ghsl,glc->sghc", weights, v.float()).reshape(S, H, C)


def _own(q: torch.Tensor, cache: KVLayer, sequences: Sequences) -> torch.Tensor:
    if pick(q.device) is not Backend.TRITON:
        raise DbrxError(f"implementation='triton' runs on a CUDA or ROCm device; found {str(q.device)!r}. Choose 'sdpa'")
    from dbrx_q.kernels.triton.attention_decode import decode
    from dbrx_q.kernels.triton.attention_prefill import prefill

    C, parts = q.shape[-1], {"plain": 1, "int8": 2, "int4": 4}[cache.format]
    if not interpreting() and (C & (C - 1) or C // parts < 16):
        raise DbrxError(
            f"on a GPU a head must have a power of two of channels, at least {16 * parts} for a KV cache of the format {cache.format!r}; "
            f"found {C}. Choose another format, or the CPU"
        )
    counts, ends = sequences.counts, sequences.ends
    if all(count == 1 for count in counts):
        return decode(q, cache, sequences.lengths, sequences.rows)
    if cache.format == "plain" and len(counts) == 1 and counts == ends and sequences.rows is None:
        # torch's attention is as fast where it applies: one sequence, no earlier tokens, nothing to dequantize
        k, v = cache.row(0, ends[0], q.dtype)
        return attention(q, k, v, implementation="sdpa")
    return prefill(q, cache, sequences.starts, sequences.lengths, sequences.rows, max(counts))
