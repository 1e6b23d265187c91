"""Grids that GPTQ begins with, against arithmetic written out in float64."""

from __future__ import annotations

import pytest
import torch

from dbrx_q.layout import TensorFormat
from dbrx_q.quantize.grid import Grid, range_grid
from dbrx_q.quantize.moments import Moments, moments_of
from dbrx_q.quantize.products import Products
from dbrx_q.quantize.starts import best_of, refined, stakes, start
from dbrx_q.quantize.workers import Workers

N, K = 64, 256
INT4, INT8 = TensorFormat("int4", 64), TensorFormat("int8", 32)


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(1)) * 0.02


@pytest.fixture
def moments() -> Moments:
    """Of inputs that depend on each other and differ in size, as activations do."""
    generator = torch.Generator().manual_seed(2)
    mix = torch.randn(K, K, generator=generator) / 16 + torch.eye(K)
    x = torch.randn(2000, K, generator=generator) @ mix * torch.randn(K, generator=generator).exp()
    with Workers() as workers:
        return moments_of([(x, None, None)], K, Products(workers, bfloat16=False))


def loss(weight: torch.Tensor, moments: Moments, found: tuple[Grid, torch.Tensor]) -> torch.Tensor:
    """float64 [N]."""
    error = (found[0].decode(found[1]) - weight).double()
    return ((error @ moments.hessian.double()) * error).sum(-1)


def test_stakes_are_what_is_left_when_later_columns_make_up(moments: Moments) -> None:
    found = stakes(moments).double()
    h, order = moments.hessian.double(), moments.order.tolist()
    for place in (0, 1, 100, K - 2, K - 1):
        i, later = order[place], order[place + 1 :]
        made_up = torch.linalg.solve(h[later][:, later], h[later, i]) @ h[later, i]
        assert float(found[i]) == pytest.approx(float(h[i, i] - made_up), rel=1e-3)
    assert found.max() < 0.9 * h.diagonal().max()


def test_a_searched_start_ends_better_than_whole_ranges(weight: torch.Tensor, moments: Moments) -> None:
    searched, whole = (loss(weight, moments, refined(weight, moments, start(weight, moments, INT4, share))).sum() for share in (None, 1.0))
    assert searched < 0.97 * whole


@pytest.mark.parametrize("fmt", [INT4, INT8], ids=str)
def test_a_share_of_one_is_the_range(weight: torch.Tensor, moments: Moments, fmt: TensorFormat) -> None:
    found, whole, part = start(weight, moments, fmt, 1.0), range_grid(weight, fmt), start(weight, moments, fmt, 0.5)
    assert torch.equal(found.scales, whole.scales)
    assert torch.allclose(part.scales.float(), whole.scales.float() / 2, rtol=2**-10)
    if whole.zeros is not None and part.zeros is not None:
        assert (part.zeros == whole.zeros).float().mean() > 0.95  # one between two whole numbers may go either way


@pytest.mark.parametrize("fmt", [INT4, INT8], ids=str)
def test_every_row_is_that_of_the_best_grid(weight: torch.Tensor, moments: Moments, fmt: TensorFormat) -> None:
    grids = [start(weight, moments, fmt, share) for share in (None, 1.0, 0.9)]
    each = [refined(weight, moments, grid) for grid in grids]
    losses = torch.stack([loss(weight, moments, one) for one in each])
    grid, u = best_of(weight, moments, grids)
    assert torch.allclose(loss(weight, moments, (grid, u)), losses.amin(0), rtol=1e-5)
    chosen = losses.argmin(0)
    if fmt is INT4:
        assert len(chosen.unique()) == 3, "the test must have rows that each grid serves best"
    for row in range(N):
        best_grid, best_u = each[int(chosen[row])]
        assert torch.equal(u[row], best_u[row])
        assert torch.equal(grid.scales[row], best_grid.scales[row])
        assert (grid.zeros is None) == (fmt is INT8)
        if grid.zeros is not None and best_grid.zeros is not None:
            assert torch.equal(grid.zeros[row], best_grid.zeros[row])


def test_one_grid_is_refined_alone(weight: torch.Tensor, moments: Moments) -> None:
    grid = start(weight, moments, INT4)
    found, expected = best_of(weight, moments, [grid]), refined(weight, moments, grid)
    assert torch.equal(found[0].scales, expected[0].scales)
    assert torch.equal(found[1], expected[1])
