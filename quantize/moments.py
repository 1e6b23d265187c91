"""What a calibrated method knows of the inputs of a matrix.

Dimension letters: `T` tokens, `N` rows, `K` the reduction axis.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch

from .workers import Workers

__all__ = ["DAMPING", "Moments", "moments_of"]

DAMPING = 0.01
"""Of the mean of a Hessian's diagonal, added to all of it; more where that does not suffice."""

_MOST_DAMPING = 1e3
_COLUMNS = 1024  # of a product that one thread makes


@dataclass(frozen=True)
class Moments:
    """Weighted sums over the tokens that reach a matrix: x enters it in the quantized model, y in the original one.

    hessian: float32 [K, K], sum of g^2 x x^T. cross: float32 [K, K], sum of g^2 y x^T. tokens: how many.
    """

    hessian: torch.Tensor
    cross: torch.Tensor
    tokens: int

    @cached_property
    def damped(self) -> torch.Tensor:
        """float32 [K, K]: the Hessian with what makes it positive definite.

        `DAMPING` times the mean of the diagonal is added to all of it, ten times more as long as it has no Cholesky factor. Inputs that
        are always zero count as if they had the mean.
        """
        return (self.hessian.double() + self._factored[1].diag()).float()

    @cached_property
    def order(self) -> torch.Tensor:
        """int64 [K]: the columns with the largest inputs first, the lower one of equals."""
        return self.hessian.diagonal().argsort(descending=True, stable=True)

    @cached_property
    def factor(self) -> torch.Tensor:
        """float32 [K, K]: the upper Cholesky factor of the inverse of the damped Hessian, its rows and columns in `order`."""
        return self._factored[0]

    @cached_property
    def _factored(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(`factor`, float64 [K], what was added to the diagonal)."""
        ordered = self.hessian[self.order][:, self.order].double()
        diagonal = self.hessian.diagonal().double()
        damping = DAMPING
        while True:
            added = damping * self._mean + torch.where(diagonal == 0, self._mean, 0.0)
            lower, failed = torch.linalg.cholesky_ex(ordered + added[self.order].diag())
            if not failed:
                upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
                if not failed and bool(torch.isfinite(upper).all()):
                    return upper.float(), added
            assert damping < _MOST_DAMPING, "a finite Hessian with that much on its diagonal is positive definite"
            damping *= 10

    @cached_property
    def transfer(self) -> torch.Tensor:
        """float32 [K, K], by which a matrix W is multiplied from the right to make up for the errors of what comes before it.

        W' = W (cross + d I) (hessian + d I)^-1 minimises |W' X - W Y|^2 + d |W' - W|^2: on the quantized model's inputs X it gives what W
        gives on the original's, Y (the aim of GPTAQ, Li et al. 2025, and of Qronos, Zhang et al. 2025, here in closed form). d I is
        what `damped` adds.
        """
        d = self._factored[1].diag()
        return torch.linalg.solve(self.hessian.double() + d, self.cross.double().T + d).T.float().contiguous()

    @cached_property
    def _mean(self) -> float:
        return float(self.hessian.diagonal().double().mean()) or 1.0


def moments_of(pieces: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]], K: int, workers: Workers) -> Moments:
    """The moments of pieces (x [T, K], y [T, K], g [T]): inputs of the quantized and of the original model and what their outputs weigh.

    No g weighs all alike. Pieces are added in their order.
    """
    hessian, cross, tokens = torch.zeros(K, K), torch.zeros(K, K), 0
    columns = [slice(first, min(first + _COLUMNS, K)) for first in range(0, K, _COLUMNS)]
    for x, y, g in pieces:
        if g is not None:
            x, y = x * g[:, None], y * g[:, None]
        some = [(into, left, x, place) for into, left in ((hessian, x), (cross, y)) for place in columns]
        workers.map(_accumulate, some)
        tokens += len(x)
    return Moments(hessian, cross, tokens)


def _accumulate(some: tuple[torch.Tensor, torch.Tensor, torch.Tensor, slice]) -> None:
    into, left, right, place = some
    into[:, place].addmm_(left.T, right[:, place])
