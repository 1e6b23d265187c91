"""The losses that a forward pass returns, and the columns that logits are computed for.

Dimension letters: `B` sequences, `S` columns, `P` columns with logits, `V` vocabulary, `D` d_model, `E` experts, `A` active experts of a
token, `T` = B * S.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from dbrx_q.errors import RequestError

__all__ = ["IGNORED", "check_labels", "count_kept", "first_kept", "kept_columns", "kept_mask", "load_balancing_loss", "next_token_loss"]

IGNORED = -100
"""The label of a column that the loss leaves out."""


def next_token_loss(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    *,
    shift_labels: torch.Tensor | None = None,
    real: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | float | None = None,
    ignore_index: int = IGNORED,
) -> torch.Tensor:
    """The mean cross entropy of the labels in nats, each predicted by the column before it; a float32 scalar.

    Args:
        logits: [B, P, V]; or [P, V] with `shift_labels`.
        labels: whole numbers [B, P], the tokens of the same columns; None where `shift_labels` is given.
        shift_labels: whole numbers [B, P] or [P], for each column the token that it predicts, in place of `labels`.
        real: bool [B, P] or [P], False for padding, whose labels and predictions are left out; None for no padding.
        num_items_in_batch: what to divide the sum by in place of the number of labels.
        ignore_index: the label that is left out.
    """
    if shift_labels is not None:
        targets = shift_labels
    else:
        assert labels is not None
        targets = F.pad(labels[:, 1:], (0, 1), value=ignore_index)
    targets = targets.long().to(logits.device)
    if real is not None:
        real = real.to(logits.device)
        predicts = real.clone()
        if shift_labels is None:
            predicts[:, :-1] &= real[:, 1:]
        targets = targets.masked_fill(~predicts, ignore_index)
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), ignore_index=ignore_index, reduction=reduction)
    if num_items_in_batch is None:
        return loss
    return loss / (num_items_in_batch.to(loss.device) if isinstance(num_items_in_batch, torch.Tensor) else num_items_in_batch)


def check_labels(
    labels: torch.Tensor | None, shift_labels: torch.Tensor | None, B: int, S: int, keep: int | torch.Tensor, V: int, ignore_index: int
) -> None:
    """Check the labels of a call [B, S] whose logits are those of `keep`, as for `kept_columns`.

    Raises:
        RequestError: labels of another shape or dtype, or outside the vocabulary.
    """
    name, given = ("labels", labels) if shift_labels is None else ("shift_labels", shift_labels)
    if given is None:
        return
    flat = isinstance(keep, torch.Tensor) and keep.dtype == torch.bool
    if flat and shift_labels is None:
        raise RequestError("labels need logits of columns in order; found booleans for logits_to_keep. Pass shift_labels")
    kept = count_kept(B, S, keep)
    _check_labels(name, given, [kept] if flat else [B, kept // B], V, ignore_index)


def _check_labels(name: str, labels: torch.Tensor, shape: list[int], V: int, ignore_index: int) -> None:
    if not isinstance(labels, torch.Tensor):
        raise RequestError(f"{name} must be a tensor; found {type(labels).__name__}")
    if labels.is_floating_point() or labels.dtype == torch.bool or list(labels.shape) != shape:
        raise RequestError(
            f"{name} must be whole numbers {shape}, one for each column with logits; found {labels.dtype} {list(labels.shape)}"
        )
    outside = labels[((labels < 0) | (labels >= V)) & (labels != ignore_index)]
    if outside.numel():
        raise RequestError(f"{name} must be token ids from 0 to {V - 1}, or {ignore_index} to be ignored; found {int(outside[0])}")


def load_balancing_loss(router_logits: Sequence[torch.Tensor], top_k: int, real: torch.Tensor | None = None) -> torch.Tensor:
    """E * sum over experts of (share of the tokens that choose it) * (its mean probability), over all layers; a float32 scalar.

    Fedus et al. 2021, Switch Transformers, eq. 4 to 6; 1 * A for a router that uses all experts equally.

    Args:
        router_logits: float32 [T, E] of each layer.
        top_k: A.
        real: bool [T], False for padding, which is left out; None for no padding.
    """
    device, E = router_logits[0].device, router_logits[0].shape[1]
    chosen, probability, tokens = torch.zeros(E, device=device), torch.zeros(E, device=device), 0
    for logits in router_logits:
        rows = logits.to(device) if real is None else logits.to(device)[real.to(device)]
        probabilities = rows.softmax(-1)
        chosen += probabilities.topk(top_k, -1).indices.flatten().bincount(minlength=E)
        probability += probabilities.sum(0)
        tokens += len(rows)
    return E * (chosen / tokens * (probability / tokens)).sum()


def kept_columns(hidden: torch.Tensor, keep: int | torch.Tensor) -> torch.Tensor:
    """The columns of hidden states [B, S, D] that logits are computed for.

    Args:
        hidden: [B, S, D].
        keep: the number of last columns, 0 for all; or a tensor: int64 [P] or [B, P] of column indices, or bool [B, S], for which the
            columns of all sequences follow each other in one axis.

    Returns:
        [B, P, D]; for booleans [P, D].

    Raises:
        RequestError: a negative number, or a tensor of another shape or dtype.
    """
    if not isinstance(keep, torch.Tensor):
        return hidden[:, -keep:] if _checked_count(keep) else hidden
    keep = _checked_indices(keep, hidden.shape[0], hidden.shape[1]).to(hidden.device)
    if keep.dtype == torch.bool:
        return hidden[keep]
    return hidden[:, keep] if keep.ndim == 1 else hidden.take_along_dim(keep.long()[..., None], 1)


def kept_mask(real: torch.Tensor, keep: int | torch.Tensor) -> torch.Tensor:
    """`kept_columns` of a mask [B, S]."""
    return kept_columns(real[..., None], keep)[..., 0]


def count_kept(B: int, S: int, keep: int | torch.Tensor) -> int:
    """How many columns of all sequences get logits; errors as for `kept_columns`."""
    if not isinstance(keep, torch.Tensor):
        return B * min(_checked_count(keep) or S, S)
    keep = _checked_indices(keep, B, S)
    return int(keep.sum()) if keep.dtype == torch.bool else keep.numel() * (B if keep.ndim == 1 else 1)


def first_kept(B: int, S: int, keep: int | torch.Tensor) -> list[int]:
    """The first column of each sequence that is kept, S where none is; arguments and errors as for `kept_columns`."""
    if not isinstance(keep, torch.Tensor):
        return [max(0, S - _checked_count(keep)) if keep else 0] * B
    keep = _checked_indices(keep, B, S).cpu()
    is_mask = keep.dtype == torch.bool
    columns = torch.where(keep, torch.arange(S), S) if is_mask else torch.where(keep < 0, keep + S, keep).expand(B, -1)
    return [S] * B if not columns.shape[1] else columns.min(1).values.tolist()


def _checked_count(keep: int) -> int:
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 0:
        raise RequestError(f"logits_to_keep must be 0, a number of columns, or a tensor of their indices; found {keep!r}")
    return keep


def _checked_indices(keep: torch.Tensor, B: int, S: int) -> torch.Tensor:
    right = keep.shape == (B, S) if keep.dtype == torch.bool else keep.ndim == 1 or (keep.ndim == 2 and len(keep) == B)
    if not right or keep.is_floating_point():
        raise RequestError(
            f"a tensor of logits_to_keep must be whole numbers [columns] or [{B}, columns], or booleans [{B}, {S}]; found {keep.dtype} "
            f"{list(keep.shape)}"
        )
    if keep.dtype != torch.bool and keep.numel() and not -S <= int(keep.min()) <= int(keep.max()) < S:
        raise RequestError(f"logits_to_keep must name columns from {-S} to {S - 1}; found {keep.min().item()} to {keep.max().item()}")
    return keep
