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

__all__ = ["IMPLEMENTATIONS", "MASKED", "Sequences", "attention", "attention_reference", "attention_weights", "cached_attention"]

IMPLEMENTATIONS = ("sdpa", "eager", "triton", "flash_attention_2")
"""In this order: torch's fused attention; every step written out in float32; the Triton kernels of this package; the flash-attn package."""

MASKED = ("sdpa", "eager")
"""The implementations that take masks."""


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# New tokens of a sequence up to which the CPU's kernel wins: for 16 over 4096 tokens 18.3 ms against 28.8, over an int8 cache 17.6 against
# 48.1 (48 heads, one thread, AVX-512 of 256-bit units).
_MOST_NEW_TOKENS = 16
# Tokens from which the kernel computes plain keys and values of 16 bits: a bfloat16 model needs no compiled code before. The kernel
# computes float32 from the first token, because the bits of torch's float32 attention depend on the batch on some chips.
_LEAST_TOKENS_OF_16_BITS = 256


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
    masks: tuple[torch.Tensor | None, ...] | None = None
    """For each sequence what its new tokens attend to: [1 or H, S, L] on the device, a boolean, or a number that is added to the score;
    None where each token attends to itself and to all tokens before it. Only for the implementations of `MASKED`."""

    def mask(self, index: int) -> torch.Tensor | None:
        """The mask of a sequence; None for plain causal attention."""
        return None if self.masks is None else self.masks[index]


def cached_attention(
    q: torch.Tensor,
    cache: KVLayer,
    sequences: Sequences,
    *,
    implementation: str,
    weights: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """y [T, H, C] in the dtype of `q`.

    Args:
        q: [T, H, C], the rotated queries of the new tokens, one sequence after the other.
        cache: keys and values of all tokens, the new ones included; a plain cache has the dtype of `q`. G divides H.
        sequences: which rows of `q` and of the cache belong together.
        implementation: one of `IMPLEMENTATIONS`.
        weights: gets the attention weights [H, S, L] of every sequence appended; only for "eager".

    Raises:
        DbrxError: "triton" on a device where its kernels do not run; "sdpa" or "flash_attention_2" over a quantized cache on a GPU; a mask
            or `weights` for an implementation that has none.
    """
    _check_extras(implementation, sequences.masks is not None, weights is not None)
    if implementation == "triton":
        return _own(q, cache, sequences)
    if implementation in ("sdpa", "flash_attention_2") and cache.format != "plain" and q.device.type != "cpu":
        raise DbrxError(
            f"no 16-bit copy of a quantized KV cache is made on a GPU, so implementation={implementation!r} takes a plain one there; "
            f"found {cache.format!r}. Choose 'triton', or 'eager' to compare"
        )
    if implementation == "flash_attention_2":
        from .flash_attention import cached_flash_attention

        return cached_flash_attention(q, cache, sequences)
    served = _served_by_kernel(q, cache, sequences) if implementation == "sdpa" else []
    if any(served):
        return _by_kernel(q, cache, sequences, served)
    if len(sequences.counts) > 1 and implementation == "sdpa" and _steps_alike(q, cache, sequences):
        return _attention_of_all(q, cache, sequences.ends[0])
    rows = range(len(sequences.counts)) if sequences.rows is None else sequences.rows.tolist()
    out = torch.zeros_like(q)
    first = 0
    for b, (row, count, end) in enumerate(zip(rows, sequences.counts, sequences.ends, strict=True)):
        if count and end:
            k, v = cache.row(max(row, 0), end, torch.float32 if implementation == "eager" else q.dtype)
            queries, mask = q[first : first + count], sequences.mask(b)
            out[first : first + count] = attention(queries, k, v, implementation=implementation, mask=mask, weights=weights)
        elif weights is not None:
            weights.append(q.new_zeros(q.shape[1], count, end))
        first += count
    return out


def _served_by_kernel(q: torch.Tensor, cache: KVLayer, sequences: Sequences) -> list[bool]:
    """For each sequence whether `cpu/attention.py` computes it, by what this sequence has alone, so that others do not change its bits."""
    C = q.shape[-1]
    if q.device.type != "cpu" or q.dtype not in _DTYPES or C % (32 if cache.format == "int4" else 16) or q.requires_grad:
        return []
    if sequences.masks is not None or (cache.format == "plain" and cache.keys.dtype not in _DTYPES):
        return []
    least = _LEAST_TOKENS_OF_16_BITS if cache.format == "plain" and cache.keys.itemsize == 2 else 1
    return [0 < S <= _MOST_NEW_TOKENS and least <= L for S, L in zip(sequences.counts, sequences.ends, strict=True)]


def _by_kernel(q: torch.Tensor, cache: KVLayer, sequences: Sequences, served: list[bool]) -> torch.Tensor:
    """`cached_attention` where the kernel computes some sequences, and torch's fused attention the others."""
    from dbrx_q.kernels.cpu.attention import attend

    rows = list(range(len(served))) if sequences.rows is None else [max(row, 0) for row in sequences.rows.tolist()]
    if all(served):
        return attend(q, cache, sequences.counts, sequences.ends, rows)
    parts = q.split(sequences.counts)
    few = [b for b, by_kernel in enumerate(served) if by_kernel]
    counts, ends = (tuple(numbers[b] for b in few) for numbers in (sequences.counts, sequences.ends))
    computed = attend(torch.cat([parts[b] for b in few]), cache, counts, ends, [rows[b] for b in few])
    results = dict(zip(few, computed.split(counts), strict=True))
    for b, (row, end) in enumerate(zip(rows, sequences.ends, strict=True)):
        if b not in results:
            empty = not len(parts[b]) or not end
            results[b] = torch.zeros_like(parts[b]) if empty else attention(parts[b], *cache.row(row, end, q.dtype))
    return torch.cat([results[b] for b in range(len(parts))])


def _steps_alike(q: torch.Tensor, cache: KVLayer, sequences: Sequences) -> bool:
    """Whether each sequence of a plain cache has one new token, and all are of one length."""
    plain = cache.format == "plain" and sequences.rows is None and sequences.masks is None and len(cache.keys) == len(sequences.counts)
    return plain and set(sequences.counts) == {1} and len(set(sequences.ends)) == 1 and sequences.ends[0] > 0


def _attention_of_all(q: torch.Tensor, cache: KVLayer, L: int) -> torch.Tensor:
    """y [B, H, C] for one new token of each sequence; on the CPU, in 16-bit types, with the bits that `attention` gives each alone.

    One call for 256 sequences of 200 tokens takes a step of the bundled model from 72 to 48 ms of processor time.
    """
    (B, H, C), G = q.shape, cache.keys.shape[1]
    return F.scaled_dot_product_attention(q.view(B, G, H // G, C), cache.keys[:, :, :L], cache.values[:, :, :L]).reshape(B, H, C)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    implementation: str = "sdpa",
    mask: torch.Tensor | None = None,
    weights: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """y [S, H, C] for the last S of L tokens of one sequence.

    Args:
        q: [S, H, C]. The first query is token L - S of the sequence; each attends to itself and to the tokens before it.
        k, v: [G, L, C], G divides H.
        implementation: "sdpa" or "triton", which both call torch's fused attention here: it prefills over an unquantized cache as fast as
            a kernel of our own; "flash_attention_2"; or "eager", every step written out in float32.
        mask: [1 or H, S, L], what each query attends to in place of the tokens up to itself: a boolean, or a number that is added to the
            score. A query that may attend to nothing gets zeros.
        weights: gets the attention weights [H, S, L] appended in the dtype of `q`; only for "eager".

    Raises:
        DbrxError: a mask or `weights` for an implementation that has none.
    """
    if implementation == "eager":
        shares = attention_weights(q, k, mask)
        if weights is not None:
            weights.append(shares.to(q.dtype))
        return _weighted(shares, v).to(q.dtype)
    if mask is not None or weights is not None or implementation == "flash_attention_2":
        _check_extras(implementation, mask is not None, weights is not None)
        if implementation == "flash_attention_2":
            from .flash_attention import flash_attention

            return flash_attention(q, k.transpose(0, 1), v.transpose(0, 1), [len(q)])
    (S, H, C), (G, L, _) = q.shape, k.shape
    if mask is not None:
        return _masked(q, k, v, mask)
    if S == 1:  # the H/G query heads of a key/value head become the rows of one attention: keys and values are read once
        return F.scaled_dot_product_attention(q.view(1, G, H // G, C), k[None], v[None]).reshape(1, H, C)
    mask = torch.ones(S, L, dtype=torch.bool, device=q.device).tril(L - S) if S < L else None
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k[None], v[None], attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )  # [1, H, S, C]
    return out[0].transpose(0, 1)


def _masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`attention` by torch's fused attention with a mask."""
    visible = _visible(mask)
    if mask.dtype != torch.bool:
        mask = mask.to(q.dtype).clamp(min=torch.finfo(q.dtype).min)
    out = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k[None], v[None], attn_mask=mask[None], enable_gqa=True)[0]
    return out.masked_fill(~visible, 0).transpose(0, 1)  # [S, H, C]


def _visible(mask: torch.Tensor) -> torch.Tensor:
    """Whether a query may attend to any token: [1 or H, S, 1]."""
    return (mask if mask.dtype == torch.bool else mask > -torch.inf).any(-1, keepdim=True)


def attention_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """float32 y [S, H, C]; arguments as for `attention`."""
    return _weighted(attention_weights(q, k, mask), v)


def _weighted(weights: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """float32 [S, H, C]: for each query the values v [G, L, C], added up by its weights [H, S, L]."""
    G = len(v)
    return torch.einsum("ghsl,glc->sghc", weights.unflatten(0, (G, -1)), v.float()).flatten(1, 2)


def attention_weights(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """float32 [H, S, L], how much each query takes of each value; arguments as for `attention`."""
    S, H, C = q.shape
    G, L, _ = k.shape
    grouped = q.float().view(S, G, H // G, C)
    scores = torch.einsum("sghc,glc->ghsl", grouped, k.float()) * C**-0.5
    if mask is None:
        future = torch.ones(S, L, dtype=torch.bool, device=q.device).triu(L - S + 1)
        return scores.masked_fill(future, -torch.inf).softmax(-1).view(H, S, L)
    scores = scores.view(H, S, L)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    return scores.softmax(-1).masked_fill(~_visible(mask), 0)


def _check_extras(implementation: str, masked: bool, weighed: bool) -> None:
    if masked and implementation not in MASKED:
        raise DbrxError(f"a mask needs implementation='sdpa' or 'eager'; found {implementation!r}. Choose one of them")
    if weighed and implementation != "eager":
        raise DbrxError(f"attention weights need implementation='eager'; found {implementation!r}. Choose it")


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
