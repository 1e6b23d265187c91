"""The moments of a matrix's inputs, damped and weighted by what sequences that they do not contain say (`shrinkage.py`).

Dimension letters: `T` tokens, `K` the reduction axis, `B` columns that are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from .moments import Moments, moments_of
from .products import Products
from .shrinkage import FoldHessians, Shrinkage, block_columns, choose_shrinkage

__all__ = ["RANDOM_SHARE", "FoldPiece", "shrunk_moments"]

FoldPiece = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor]
"""(x [T, K], y [T, K] or None, g [T] or None, folds int64 [T]): a piece as `moments_of` takes it, and twice the number of each token's
source, plus 1 for the second half of that source; twice the number of sources for a random token. Folds do not decrease within a piece."""

RANDOM_SHARE = 0.04
"""The share of random tokens in the trace of a Hessian. Their inputs are what is known without a text; they reach what a text does not."""

_WHOLE_SHARE_TOKENS = 64  # random tokens that get that share; fewer get as much less


def shrunk_moments(
    pieces: Callable[[int], Iterable[FoldPiece]], K: int, sources: int, products: Products, *, act_order: bool = True
) -> tuple[Moments, Shrinkage]:
    """The moments, and what `choose_shrinkage` chose for them.

    A matrix of at most 1024 inputs passes its tokens once: the sums of all folds are kept apart. A larger one passes a share of them
    first, for some columns alone.

    Args:
        pieces: gives every n-th token of the matrix, in pieces, for n = 1 and, if K is above 1024, for another n before.
        K: the number of inputs.
        sources: the number of sources.
        products: multiply.
        act_order: as in `Moments`.
    """
    columns = block_columns(K)
    step = K // len(columns)
    whole = len(columns) == K
    hessians, cross_terms, counts = _fold_sums(pieces(step), None if whole else columns.to(products.place), len(columns), sources, products)
    shrinkage = choose_shrinkage(FoldHessians(hessians[:-1], counts[:-1]), products.workers, act_order=act_order)
    factors = [weight for weight in shrinkage.weights for _ in (0, 1)]
    factors.append(_random_factor(hessians, factors, counts[-1]))
    if whole:
        hessian, cross_term = _weighted(hessians, factors), _weighted(cross_terms, factors) if cross_terms else None
        return Moments(hessian, cross_term, products, act_order=act_order, damping=shrinkage.damping), shrinkage
    roots = torch.tensor(factors).sqrt()
    weighted = ((x, y, roots[folds] if g is None else g * roots[folds].to(g.device)) for x, y, g, folds in pieces(1))
    return moments_of(weighted, K, products, act_order=act_order, damping=shrinkage.damping), shrinkage


def _random_factor(hessians: Sequence[torch.Tensor], factors: Sequence[float], count: int) -> float:
    """The factor of the Hessian of `count` random tokens, the last one, that gives it its share of the trace.

    That is `RANDOM_SHARE`, and less of few tokens, whose inputs reach few directions; 1 where there is no other Hessian.
    """
    *texts, noise = (float(hessian.diagonal().sum(dtype=torch.float64)) for hessian in hessians)
    total = sum(trace * factor for trace, factor in zip(texts, factors, strict=True))
    share = RANDOM_SHARE * min(1.0, count / _WHOLE_SHARE_TOKENS)
    return share / (1 - share) * total / noise if noise > 0 and total > 0 else 1.0


def _fold_sums(
    pieces: Iterable[FoldPiece], columns: torch.Tensor | None, B: int, sources: int, products: Products
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[int]]:
    """(Hessians [B, B], cross terms [B, B], tokens), of every fold, the random tokens' last.

    There are no cross terms for some columns alone, or without y.
    """
    place = products.place
    hessians = [torch.zeros(B, B, device=place) for _ in range(2 * sources + 1)]
    cross_terms: list[torch.Tensor] = []
    counts = [0] * len(hessians)
    for x, y, g, folds in pieces:
        x, y = x.to(place), None if y is None or columns is not None else y.to(place)
        x = x if columns is None else x[:, columns]
        if g is not None:
            weights = g.to(place)[:, None]
            x, y = x * weights, None if y is None else y * weights
        if y is not None and not cross_terms:
            cross_terms = [torch.zeros(B, B, device=place) for _ in hessians]
        outers, first = [], 0
        for fold, count in zip(*(part.tolist() for part in folds.unique_consecutive(return_counts=True)), strict=True):
            counts[fold] += count
            inputs = x[first : first + count]
            outers.append((hessians[fold], inputs, inputs))
            if y is not None:
                outers.append((cross_terms[fold], y[first : first + count] - inputs, inputs))
            first += count
        products.add_outers(outers)
    return hessians, cross_terms, counts


def _weighted(matrices: list[torch.Tensor], factors: list[float]) -> torch.Tensor:
    out = torch.zeros_like(matrices[0])
    for matrix, factor in zip(matrices, factors, strict=True):
        out.add_(matrix, alpha=factor)
    return out
