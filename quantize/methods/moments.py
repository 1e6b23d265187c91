"""The moments of a matrix's inputs, from which calibrated methods compute the error of its outputs.

Dimension letters: `T` tokens, `N` rows, `K` the reduction axis.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch

from dbrx_q.kernels.formats.rotation import rotate

from .factor import inverse_factor
from .products import Products

__all__ = ["DAMPING", "Moments", "moments_of"]

DAMPING = 0.01
"""The usual damping (Frantar et al. 2022, "GPTQ"), relative to the mean of a Hessian's diagonal."""

_MOST_DAMPING = 1e3
_ROTATED_ROWS = 512  # of a Hessian, rotated by one thread at a time


class Moments:
    """Weighted sums over the tokens that reach a matrix: x is its input in the model that calibrates, y its input in the original model.

    Args:
        hessian: float32 [K, K], the sum of g^2 x x^T, damped in place; or [K], only its diagonal, for methods that need no more.
        cross_term: float32 [K, K], the sum of g^2 (y - x) x^T; None without the original model.
        products: multiply.
        act_order: whether GPTQ rounds the columns with the largest inputs first.
        damping: the share of the mean of the diagonal that is added to the diagonal.

    Attributes:
        hessian: the damped Hessian, which is positive definite: ten times more is added as long as no Cholesky factor exists. Inputs that
            are always zero count as if they had the mean. None if only the diagonal was given.
        cross_term: as given.
        act_order: as given.
        damping: as given.
    """

    def __init__(
        self,
        hessian: torch.Tensor,
        cross_term: torch.Tensor | None,
        products: Products,
        *,
        act_order: bool = True,
        damping: float = DAMPING,
    ) -> None:
        self.hessian = hessian if hessian.ndim == 2 else None
        self.cross_term, self.act_order, self.damping, self._products = cross_term, act_order, damping, products
        self.importance = hessian.diagonal().clone() if hessian.ndim == 2 else hessian
        """float32 [K], sum of g^2 x^2."""
        self._mean = float(self.importance.double().mean()) or 1.0
        self._added = torch.where(self.importance == 0, self._mean, 0.0).double()
        self._rotated: dict[int, Moments] = {}
        if self.hessian is not None:
            self._damp(self.hessian, damping)

    @cached_property
    def order(self) -> torch.Tensor:
        """int64 [K]: columns by descending size of their inputs, the lower of two equals first; ascending without act-order."""
        columns = torch.arange(len(self.importance), device=self.importance.device)
        return self.importance.argsort(descending=True, stable=True) if self.act_order else columns

    @cached_property
    def factor(self) -> torch.Tensor:
        """float32 [K, K]: the upper Cholesky factor of the inverse of the damped Hessian, its rows and columns in `order`."""
        assert self.hessian is not None
        damping = self.damping
        while (factor := inverse_factor(self.hessian, self.order, self._products.workers)) is None:
            assert damping < _MOST_DAMPING, "a finite Hessian with that much on its diagonal is positive definite"
            damping *= 10
            self._damp(self.hessian, damping)
        return factor

    @cached_property
    def inverse_hessian_cost(self) -> torch.Tensor:
        """float32 [K]: the cost of a squared error in each column, once GPTQ has compensated it in all columns that it rounds later.

        1 / R[i, i]^2 with R the `factor` (Frantar et al. 2022, "GPTQ", equation 2). It is far below the Hessian's diagonal where inputs
        depend on each other: an error in an early column is then compensated at almost no cost.
        """
        cost = torch.empty_like(self.importance)
        cost[self.order] = self.factor.diagonal().square().reciprocal()
        return cost

    def prepare(self, rotation: int | None = None) -> None:
        """Compute the cached properties, so that worker threads do not wait for each other.

        Args:
            rotation: prepare the moments that are rotated in groups of so many inputs; None for these moments themselves.
        """
        if self.hessian is not None:
            _ = (self if rotation is None else self.rotated(rotation)).inverse_hessian_cost

    def rotated(self, G: int) -> Moments:
        """The moments of rotated inputs, V x and V y with the rotation V of `kernels/formats/rotation.py` in groups of G; kept for later.

        The Hessian is V H V^T, the cross term V D V^T, and the damping is as much as here. The columns are ordered by the rotated diagonal.
        """
        assert self.hessian is not None
        if G not in self._rotated:
            hessian = self.hessian.clone()
            hessian.diagonal().copy_((self.importance.double() + self._added).float())
            hessian = self._rotate_both(hessian, G)
            cross_term = None if self.cross_term is None else self._rotate_both(self.cross_term.clone(), G)
            self._rotated[G] = Moments(hessian, cross_term, self._products, act_order=self.act_order, damping=self.damping)
        return self._rotated[G]

    def corrected_target(self, weight: torch.Tensor) -> torch.Tensor:
        """float32 [N, K]: the weight that compensates the errors of earlier layers.

        W' = W (C + d I) (H + d I)^-1 with C = sum of g^2 y x^T minimizes |W' X - W Y|^2 + d |W' - W|^2: on the inputs X it approximates
        the outputs of W on the original inputs Y (the aim of GPTAQ, Li et al. 2025, and of Qronos, Zhang et al. 2025, here in closed
        form). With the cross term D = C - H that is W + W D (H + d I)^-1, where d I is the damping.
        """
        if self.cross_term is None:
            return weight
        change = (weight @ self.cross_term)[:, self.order] @ self.factor.T @ self.factor
        target = weight.clone()
        target[:, self.order] += change
        return target

    def _rotate_both(self, matrix: torch.Tensor, G: int) -> torch.Tensor:
        """V M V^T in place of M [K, K]; every element is computed alike, whatever the number of threads."""
        for part in (matrix, matrix.T):

            def rotate_rows(rows: torch.Tensor) -> None:
                rows.copy_(rotate(rows, G))

            self._products.workers.map(rotate_rows, part.split(_ROTATED_ROWS))
        return matrix

    def _damp(self, hessian: torch.Tensor, damping: float) -> None:
        hessian.diagonal().copy_((self.importance.double() + self._added + damping * self._mean).float())


def moments_of(
    pieces: Iterable[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]],
    K: int,
    products: Products,
    *,
    act_order: bool = True,
    squares: bool = False,
    damping: float = DAMPING,
) -> Moments:
    """Add up the moments, in the order of the pieces and on the device of `products`.

    Args:
        pieces: (x [T, K], y [T, K], g [T]): inputs in the two models, and the weight of each token's output; without y there is no cross
            term, without g all tokens weigh alike.
        K: the number of inputs.
        products: multiply.
        act_order: as in `Moments`.
        squares: whether the Hessian's diagonal is enough.
        damping: as in `Moments`.
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
    return Moments(hessian, cross_term, products, act_order=act_order, damping=damping)


def _mirror(matrix: torch.Tensor, step: int = 1024) -> None:
    """Copy the upper triangle to the lower one."""
    for first in range(0, len(matrix), step):
        rows = slice(first, first + step)
        matrix[rows, rows] = matrix[rows, rows].triu() + matrix[rows, rows].triu(1).T
        matrix[first + step :, rows] = matrix[rows, first + step :].T
