"""The factor of the inverse Hessian that GPTQ uses, in place and in pieces: a Hessian of 10752 columns takes 0.9 GB in float64.

Dimension letter: `K` columns.
"""

from __future__ import annotations

import torch

from .workers import Workers

__all__ = ["inverse_factor"]

_BLOCK = 512


def inverse_factor(hessian: torch.Tensor, order: torch.Tensor, workers: Workers) -> torch.Tensor | None:
    """float32 upper triangular R [K, K] with R^T R = H^-1, H being the Hessian with its rows and columns in `order`; computed in float64.

    With its order reversed, H = M M^T with M lower triangular, and R is M^-1 reversed. This takes one factorisation and one triangular
    inverse (Golub and Van Loan, "Matrix Computations", section 4.2) instead of two factorisations and a full inverse.

    Args:
        hessian: float32 [K, K], symmetric.
        order: int64 [K].
        workers: the threads that share the work.

    Returns:
        None if the Hessian is not positive definite.
    """
    backwards = order.flip(0)
    K = len(order)
    if hessian.device.type != "cpu":
        return _at_once(hessian[backwards][:, backwards].double())
    a = torch.empty(K, K, dtype=torch.float64)
    for rows in _blocks(K):
        a[rows] = hessian[backwards[rows]][:, backwards].double()
    if not _cholesky(a, workers):
        return None
    _invert(a, workers)
    factor = torch.empty(K, K)
    for rows in _blocks(K):
        factor[K - rows.stop : K - rows.start] = a[rows].tril(rows.start).flip(0, 1).float()
    return factor if bool(torch.isfinite(factor.diagonal()).all()) else None


def _at_once(a: torch.Tensor) -> torch.Tensor | None:
    """`inverse_factor` of a matrix whose rows and columns are in reversed order, by the libraries of a GPU."""
    K, place = len(a), a.device
    lower, failed = torch.linalg.cholesky_ex(a)
    if failed:
        return None
    del a  # at most three such matrices at a time
    factor = torch.linalg.solve_triangular(lower, torch.eye(K, dtype=lower.dtype, device=place), upper=False).float().flip(0, 1)
    return factor if bool(torch.isfinite(factor.diagonal()).all()) else None


def _cholesky(a: torch.Tensor, workers: Workers) -> bool:
    """Replace the lower triangle of `a` by its Cholesky factor, block column by block column; False if there is none."""
    blocks = list(_blocks(len(a)))
    for n, p in enumerate(blocks):
        diagonal, failed = torch.linalg.cholesky_ex(a[p, p])
        if failed:
            return False
        a[p, p] = diagonal
        below = blocks[n + 1 :]

        def solve(rows: slice, p: slice = p, diagonal: torch.Tensor = diagonal) -> None:
            a[rows, p] = torch.linalg.solve_triangular(diagonal.T, a[rows, p], upper=True, left=False)

        def update(q: slice, p: slice = p) -> None:
            a[q.start :, q].addmm_(a[q.start :, p], a[q, p].T, alpha=-1)

        workers.map(solve, below)
        workers.map(update, below)
    return True


def _invert(a: torch.Tensor, workers: Workers) -> None:
    """Replace the lower triangular `a` by its inverse, from the last block column to the first."""
    blocks = list(_blocks(len(a)))
    for n, p in reversed(list(enumerate(blocks))):
        diagonal = torch.linalg.solve_triangular(a[p, p].tril(), torch.eye(p.stop - p.start, dtype=a.dtype), upper=False)
        below = a[p.stop :, p] @ diagonal if n + 1 < len(blocks) else None

        def multiply(rows: slice, p: slice = p, below: torch.Tensor | None = below) -> None:
            assert below is not None
            a[rows, p] = -(_lower(a[rows, p.stop : rows.stop]) @ below[: rows.stop - p.stop])

        workers.map(multiply, blocks[n + 1 :])
        a[p, p] = diagonal


def _lower(rows: torch.Tensor) -> torch.Tensor:
    """The last rows of a lower triangular matrix [b, k] without the elements above its diagonal."""
    return rows.tril(rows.shape[1] - rows.shape[0])


def _blocks(K: int) -> list[slice]:
    return [slice(first, min(first + _BLOCK, K)) for first in range(0, K, _BLOCK)]
