"""How far the moments of a text are believed: the damping of each Hessian and the weights of its sources, by cross-validation.

A Hessian says what an error costs on the text that it was summed over. On another text errors cost something else, and a matrix that was
fitted closely to the first text has larger errors there than one that was rounded to nearest. Damping draws the Hessian towards a multiple
of the identity, which is what is known without data. How much of it a matrix needs is measured on sequences that its Hessian does not
contain:

GPTQ's error in each row is z T, where T is its factor R with each row divided by its diagonal, and z are independent rounding errors of
each column (Frantar et al. 2022, "GPTQ", equation 2, applied column by column). On tokens with the Hessian H' a row's expected error is
therefore proportional to tr(T H' T^T), and that of rounding to nearest to tr(H'). Their ratio is known before anything is rounded.

Dimension letters: `K` the reduction axis, `B` columns that are compared, up to 1024 of the K.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .factor import inverse_factor
from .workers import Workers

__all__ = ["BLOCK", "LEAST_DAMPING", "MOST_DAMPING", "FoldHessians", "Shrinkage", "block_columns", "choose_shrinkage"]

BLOCK = 1024
"""Columns that are compared. A larger matrix is represented by so many of its columns and by as small a share of its tokens, which keeps
the number of tokens for each column."""

LEAST_DAMPING = 0.1
"""The damping of a matrix that many tokens reach. On texts of the calibrated kind it costs about a hundredth of what calibration gains over
the usual 0.01, and on other texts it gains a fifth."""

MOST_DAMPING = 1.6
"""The damping of a matrix that too few tokens reach to compare any."""

_CANDIDATES = (LEAST_DAMPING, 0.2, 0.4, 0.8, MOST_DAMPING)
_PRICE = 0.02  # the share of its gain over rounding to nearest that a source may lose to more damping than the least
_LEAST_TOKENS = 64  # of a fold
_WEIGHT_STEPS, _WEIGHT_RATE, _MOST_WEIGHT = 2, 1.0, 1.25


@dataclass(frozen=True)
class Shrinkage:
    """What is done to the moments of a matrix."""

    damping: float
    """The share of the mean of the Hessian's diagonal that is added to the diagonal."""
    weights: tuple[float, ...]
    """For each source, the factor of its tokens' weights."""


class FoldHessians:
    """The Hessians of some columns, apart for each source and each half of its sequences.

    Args:
        hessians: float32 [B, B] for each source and half: (source 0 half 0, source 0 half 1, source 1 half 0, ...).
        counts: the tokens of each.
    """

    def __init__(self, hessians: Sequence[torch.Tensor], counts: Sequence[int]) -> None:
        assert len(hessians) == len(counts) > 0
        assert len(hessians) % 2 == 0
        self.hessians, self.counts = list(hessians), list(counts)

    @property
    def sources(self) -> int:
        """The number of sources."""
        return len(self.counts) // 2

    def measurable(self, source: int) -> bool:
        """Whether both halves of a source have enough tokens to measure errors on."""
        return min(self.counts[2 * source], self.counts[2 * source + 1]) >= _LEAST_TOKENS

    def half(self, number: int, weights: Sequence[float]) -> torch.Tensor:
        """[B, B]: the weighted sum of one half of every source."""
        return self._sum([weight if half == number else 0.0 for weight in weights for half in (0, 1)])

    def without(self, source: int, weights: Sequence[float]) -> torch.Tensor:
        """[B, B]: the weighted sum of all sources but one."""
        return self._sum([0.0 if n == source else weight for n, weight in enumerate(weights) for _ in (0, 1)])

    def of_source(self, source: int) -> torch.Tensor:
        """[B, B]: both halves of a source."""
        return self.hessians[2 * source] + self.hessians[2 * source + 1]

    def _sum(self, factors: Sequence[float]) -> torch.Tensor:
        out = torch.zeros_like(self.hessians[0])
        for hessian, factor in zip(self.hessians, factors, strict=True):
            if factor:
                out.add_(hessian, alpha=factor)
        return out


def block_columns(K: int) -> torch.Tensor:
    """int64 [B]: the columns that are compared, at equal distances, all of them where K is at most `BLOCK`."""
    B = min(K, BLOCK)
    return torch.arange(B) * K // B


def choose_shrinkage(folds: FoldHessians, workers: Workers, *, act_order: bool = True) -> Shrinkage:
    """The weights of the sources and the damping for a matrix.

    1. Weights within a factor of 1.25 of equal, by which the largest of the sources' relative errors should fall. Errors are measured on
       the half of each source that the Hessian does not contain.
    2. Damping: of the candidates, the one with the least error on what the Hessian does not contain: with several sources, the largest of
       their errors when each is left out in turn; with one, the error on its other half. So a matrix that few tokens reach leans on the
       identity. No source loses more than 2 % of its gain over rounding to nearest (`_PRICE`).

    Args:
        folds: the Hessians of the sources' halves.
        workers: threads for the factors.
        act_order: as in `Moments`.
    """
    measurable = [source for source in range(folds.sources) if folds.measurable(source)]
    if not measurable:
        return Shrinkage(MOST_DAMPING, (1.0,) * folds.sources)

    def relative_errors(hessian: torch.Tensor, damping: float, others: Sequence[torch.Tensor]) -> list[float]:
        return _relative_errors(hessian, damping, others, workers, act_order=act_order)

    weights = _worst_case_weights(folds, measurable, relative_errors)
    own: dict[float, list[float]] = {}
    for damping in _CANDIDATES:  # errors on a source's own kind grow with damping once it costs
        own[damping] = _own_errors(folds, weights, damping, measurable, relative_errors)
        pairs = zip(own[damping], own[LEAST_DAMPING], strict=True)
        if any(error > before + _PRICE * max(0.0, 1 - before) for error, before in pairs):
            del own[damping]
            break

    def worst(damping: float) -> float:
        if len(measurable) == 1:
            return own[damping][0]
        return max(relative_errors(folds.without(source, weights), damping, [folds.of_source(source)])[0] for source in measurable)

    return Shrinkage(min(own, key=worst), weights)


_RelativeErrors = Callable[[torch.Tensor, float, Sequence[torch.Tensor]], list[float]]


def _worst_case_weights(folds: FoldHessians, measurable: Sequence[int], relative_errors: _RelativeErrors) -> tuple[float, ...]:
    """Weights by multiplicative updates: a source whose relative error is above the mean gains weight."""
    weights = [1.0] * folds.sources
    if len(measurable) < 2:
        return tuple(weights)
    for _ in range(_WEIGHT_STEPS):
        errors = _own_errors(folds, weights, LEAST_DAMPING, measurable, relative_errors)
        mean = sum(errors) / len(errors)
        for source, error in zip(measurable, errors, strict=True):
            step = _WEIGHT_RATE * (error / mean - 1) if mean > 0 else 0.0
            weights[source] = min(_MOST_WEIGHT, max(1 / _MOST_WEIGHT, weights[source] * (1 + step)))
    return tuple(weights)


def _own_errors(
    folds: FoldHessians, weights: Sequence[float], damping: float, measurable: Sequence[int], relative_errors: _RelativeErrors
) -> list[float]:
    """For each measurable source, the relative error on either half when the Hessian holds the other halves of all; their mean."""
    errors = [
        relative_errors(folds.half(half, weights), damping, [folds.hessians[2 * source + 1 - half] for source in measurable])
        for half in (0, 1)
    ]
    return [(first + second) / 2 for first, second in zip(*errors, strict=True)]


def _relative_errors(
    hessian: torch.Tensor, damping: float, others: Sequence[torch.Tensor], workers: Workers, *, act_order: bool
) -> list[float]:
    """tr(T H' T^T) / tr(H') for each H' of others, with T of the damped Hessian [B, B]; 1 where it has no factor."""
    diagonal = hessian.diagonal()
    mean = float(diagonal.double().mean()) or 1.0
    damped = hessian.clone()
    damped.diagonal().add_(damping * mean).add_(torch.where(diagonal == 0, mean, 0.0))
    columns = torch.arange(len(hessian), device=hessian.device)
    order = diagonal.argsort(descending=True, stable=True) if act_order else columns
    factor = inverse_factor(damped, order, workers)
    if factor is None:
        return [1.0] * len(others)
    factor /= factor.diagonal()[:, None].clone()
    errors = []
    for other in others:
        total = float(other.diagonal().sum(dtype=torch.float64))
        ordered = other[order][:, order]
        errors.append(float(((factor @ ordered) * factor).sum(dtype=torch.float64)) / total if total > 0 else 1.0)
    return errors
