"""Reads attention masks: which columns of a batch are tokens, and what each token attends to.

Dimension letters: `B` sequences, `S` columns of the call, `W` columns of the mask, `L` tokens in the cache with the new ones, `H` query
heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dbrx_q.errors import RequestError, UnsupportedError
from dbrx_q.kernels.attention import MASKED

from .kv_cache import KVCache

__all__ = ["MaskedColumns", "read_mask", "stored_columns"]


@dataclass(frozen=True)
class MaskedColumns:
    """What a mask says about the columns of a call."""

    real: torch.Tensor | None = None
    """bool [B, S] on the CPU, False for padding; None without padding."""
    masks: tuple[torch.Tensor | None, ...] | None = None
    """For each sequence what its new tokens attend to, [1 or H, tokens, L]; see `Sequences.masks`. None for causal attention."""
    hidden: Sequence[int] | None = None
    """For each sequence how many of its tokens in the cache the mask hides; None for none."""


def read_mask(mask: torch.Tensor, shape: tuple[int, int], heads: int, cache: KVCache | None, implementation: str) -> MaskedColumns:
    """What a mask of 2 or 4 dimensions says.

    Args:
        mask: [B, S] or [B, past + S] of 0 and 1, where 0 is padding or hides a token in the cache; or [B or 1, 1 or H, S, past + S], which
            takes the place of causal attention: a boolean, or a number that is added to the score. `past` are the columns so far.
        shape: (B, S), of the call.
        heads: H.
        cache: the cache before this call.
        implementation: of attention.

    Raises:
        RequestError: another shape, other values, or a mask that shows columns of which the cache has no keys and values.
        UnsupportedError: an implementation of attention that takes no such mask.
    """
    if not isinstance(mask, torch.Tensor):
        raise RequestError(f"attention_mask must be a tensor; found {type(mask).__name__}")
    if mask.ndim == 4:
        _check_implementation("of 4 dimensions", implementation)
        return MaskedColumns(masks=_causal_replaced(mask, shape, heads, cache))
    B, S = shape
    past = max(cache.columns, default=0) if cache is not None else 0
    if mask.ndim != 2 or mask.shape[0] != B or mask.shape[1] not in (S, past + S):
        with_past = f" or [{B}, {past} + {S}] with the columns of the cache" if past else ""
        raise RequestError(
            f"attention_mask must be [{B}, {S}]{with_past}, or of 4 dimensions [{B}, 1 or {heads}, {S}, {past + S}]; "
            f"found {list(mask.shape)}"
        )
    mask = mask.cpu()
    if mask.dtype != torch.bool:
        if not bool(((mask == 0) | (mask == 1)).all()):
            other = mask[(mask != 0) & (mask != 1)][0].item()
            raise RequestError(
                f"attention_mask of 2 dimensions must hold 1 for tokens and 0 for padding; found {other}. A mask that is added to scores "
                "has 4 dimensions"
            )
        mask = mask.bool()
    new = mask[:, mask.shape[1] - S :]
    real = None if bool(new.all()) else new
    if cache is None or mask.shape[1] == S:
        return MaskedColumns(real)
    return _with_past(mask[:, :past], real, shape, cache, implementation)


def stored_columns(cache: KVCache, past: int) -> torch.Tensor:
    """bool [B, past]: whether a column's keys and values are in the cache."""
    stored = torch.ones(len(cache.lengths), past, dtype=torch.bool)
    for b, (columns, padding) in enumerate(zip(cache.columns, cache.padding, strict=True)):
        stored[b, columns:] = False
        if padding:
            stored[b, list(padding)] = False
    return stored


def _with_past(
    visible: torch.Tensor, real: torch.Tensor | None, shape: tuple[int, int], cache: KVCache, implementation: str
) -> MaskedColumns:
    """The columns of a mask whose part before this call is `visible`, bool [B, past]."""
    stored = stored_columns(cache, visible.shape[1])
    if torch.equal(visible, stored):
        return MaskedColumns(real)
    absent = (visible & ~stored).nonzero().tolist()
    if absent:
        b, column = absent[0]
        raise RequestError(
            "attention_mask must be 0 for columns that were padding when they were passed, since the cache has no keys and values of "
            f"them; found 1 for column {column} of sequence {b}. Pass the same mask as before, with 1 for each new token"
        )
    _check_implementation("that hides tokens in the cache", implementation)
    masks: list[torch.Tensor | None] = []
    hidden = (stored & ~visible).sum(1).tolist()
    for b, length in enumerate(cache.lengths):
        count = shape[1] if real is None else int(real[b].sum())
        if not hidden[b]:
            masks.append(None)
            continue
        seen = visible[b, stored[b]].expand(count, length)
        masks.append(torch.cat((seen, torch.ones(count, count, dtype=torch.bool).tril()), 1)[None])
    return MaskedColumns(real, tuple(masks), hidden)


def _causal_replaced(mask: torch.Tensor, shape: tuple[int, int], heads: int, cache: KVCache | None) -> tuple[torch.Tensor, ...]:
    B, S = shape
    past = max(cache.columns, default=0) if cache is not None else 0
    if mask.shape[0] not in (1, B) or mask.shape[1] not in (1, heads) or mask.shape[2:] != (S, past + S):
        raise RequestError(
            f"attention_mask of 4 dimensions must be [{B} or 1, 1 or {heads}, {S}, {past + S}]: sequences, heads, tokens of the call, "
            f"columns with those of the cache; found {list(mask.shape)}"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise RequestError(
            f"attention_mask of 4 dimensions must be boolean, or floating point and added to the scores; found {mask.dtype}. Convert it "
            "with .bool()"
        )
    if cache is None or not any(cache.lengths):
        return tuple(mask[b if len(mask) > 1 else 0][..., past:] for b in range(B))
    kept = torch.cat((stored_columns(cache, past), torch.ones(B, S, dtype=torch.bool)), 1).to(mask.device)
    return tuple(mask[b if len(mask) > 1 else 0][..., kept[b]] for b in range(B))


def _check_implementation(mask: str, implementation: str) -> None:
    if implementation not in MASKED:
        raise UnsupportedError(
            f"an attention_mask {mask} needs attn_implementation 'sdpa' or 'eager'; found {implementation!r}. Call "
            "model.set_attn_implementation('sdpa')"
        )
