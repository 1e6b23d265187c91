"""What a calibrated method knows of the inputs of a matrix.

Dimension letters: `T` tokens, `N` rows, `K` the reduction axis.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch

from .factor import inverse_factor
from .products import Products

__all__ = ["DAMPING", "Moments", "moments_of"]

DAMPING = 0.01
"""Of the mean of a Hessian's diagonal, added to all of it; more where that does not suffice."""

_MOST_DAMPING = 1e3


class Moments:
    """Weighted sums over the tokens that reach a matrix: x enters it in the model that calibrates, y in the original one.

    Args:
        hessian: float32 [K, K], sum of g^2 x x^T; becomes the attribute. [K], its diagonal alone, for methods that need no more.
        drift: float32 [K, K], sum of g^2 (y - x) x^T; None where there is no y.
        products: that multiply.

    Attributes:
        hessian: with what makes it positive definite: `DAMPING` times the mean of the diagonal is added to all of it, ten times more as
            long as it has no Cholesky factor. Inputs that are always zero count as if they had the mean. None for a diagonal alone.
        drift: as given.
        act_order: whether the columns with the largest inputs come first.
    """

    def __init__(self, hessian: torch.Tensor, cross_term: torch.Tensor | None, products: Products, *, act_order: bool = True) -> None:
        self.hessian = hessian if hessian.ndim == 2 else None
        self.cross_term, self.act_order, self._products = cross_term, act_order, products
        self.importance = hessian.diagonal().clone() if hessian.ndim == 2 else hessian
        """float32 [K], sum of g^2 x^2."""
        self._mean = float(self.importance.double().mean()) or 1.0
        self._added = torch.where(self.importance == 0, self._mean, 0.0).double()
        if self.hessian is not None:
            self._damp(self.hessian, DAMPING)

    @cached_property
    def order(self) -> torch.Tensor:
        """int64 [K]: the columns with the largest inputs first, the lower one of equals; as they lie without act-order."""
        columns = torch.arange(len(self.importance), device=self.importance.device)
        return self.importance.argsort(descending=True, stable=True) if self.act_order else columns

    @cached_property
    def factor(self) -> torch.Tensor:
        """float32 [K, K]: the upper Cholesky factor of the inverse of the damped Hessian, its rows and columns in `order`."""
        assert self.hessian is not None
        damping = DAMPING
        while (found := inverse_factor(self.hessian, self.order, self._products.workers)) is None:
            assert damping < _MOST_DAMPING, "a finite Hessian with that much on its diagonal is positive definite"
            damping *= 10
            self._damp(self.hessian, damping)
        return found

    @cached_property
    def inverse_hessian_cost(self) -> torch.Tensor:
        """float32 [K]: what a squared error in each column costs once all columns that GPTQ rounds after it have made up for it.

        1 / R[i, i]^2 with R the `factor` (Frantar et al. 2022, "GPTQ", equation 2). It is far from the Hessian's diagonal where inputs
        depend on each other: an error in an early column is made up for almost for nothing.
        """
        found = torch.empty_like(self.importance)
        found[self.order] = self.factor.diagonal().square().reciprocal()
        return found

    def prepare(self) -> None:
        """Compute what threads would otherwise wait for."""
        if self.hessian is not None:
            _ = self.inverse_hessian_cost

    def corrected_target(self, weight: torch.Tensor) -> torch.Tensor:
        """float32 [N, K]: the weight that makes up for the errors of what comes before it.

        W' = W (C + d I) (H + d I)^-1 with C = sum of g^2 y x^T minimises |W' X - W Y|^2 + d |W' - W|^2: on the inputs X it gives what W
        gives on the original's, Y (the aim of GPTAQ, Li et al. 2025, and of Qronos, Zhang et al. 2025, here in closed form). With the
        drift D = C - H that is W + W D (H + d I)^-1; d I is what damping adds.
        """
        if self.cross_term is None:
            return weight
        change = (weight @ self.cross_term)[:, self.order] @ self.factor.T @ self.factor
        made = weight.clone()
        made[:, self.order] += change
        return made

    def _damp(self, hessian: torch.Tensor, damping: float) -> None:
        hessian.diagonal().copy_((self.importance.double() + self._added + damping * self._mean).float())


def moments_of(
    pieces: Iterable[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]],
    K: int,
    products: Products,
    *,
    act_order: bool = True,
    squares: bool = False,
) -> Moments:
    """The moments of pieces (x [T, K], y [T, K], g [T]): inputs of the two models and what their outputs weigh.

    No y gives no drift, no g weighs all alike. Pieces are added in their order, where the results of `products` lie.
    act_order: as in `Moments`. squares: the Hessian's diagonal is enough.
    """
    place = products.place
    hessian, cross_term = torch.zeros(K if squares else (K, K), device=place), None
    for x, y, g in pieces:
        x, y, g = x.to(place), None if y is None else y.to(place), None if g is None else g.to(place)
        if g is not None:
            x, y = x * g[:, None], None if y is None else y * g[:, None]
        if squares:
            hessian += x.square().sum(0)
            continue
        products.add_outer(hessian, x, x, upper=True)
        if y is not None:
            cross_term = torch.zeros(K, K, device=place) if cross_term is None else cross_term
            products.add_outer(cross_term, y - x, x)
    if not squares:
        _mirror(hessian)
    return Moments(hessian, cross_term, products, act_order=act_order)


def _mirror(matrix: torch.Tensor, step: int = 1024) -> None:
    """What lies above the diagonal becomes what lies below."""
    for first in range(0, len(matrix), step):
        rows = slice(first, first + step)
        matrix[rows, rows] = matrix[rows, rows].triu() + matrix[rows, rows].triu(1).T
        matrix[first + step :, rows] = matrix[rows, first + step :].T
