"""Damping and weights of sources, chosen by errors on what the Hessian does not contain."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.quantize.methods import folds, shrinkage
from dbrx_q.quantize.methods.folds import FoldPiece, shrunk_moments
from dbrx_q.quantize.methods.gptq import gptq
from dbrx_q.quantize.methods.grid import searched_grid
from dbrx_q.quantize.methods.moments import Moments, moments_of
from dbrx_q.quantize.methods.products import Products
from dbrx_q.quantize.methods.shrinkage import FoldHessians, block_columns, choose_shrinkage
from dbrx_q.quantize.methods.workers import Workers

K = 64


@pytest.fixture
def products() -> Iterator[Products]:
    with Workers() as workers:
        yield Products(workers, bfloat16=False)


def inputs(seed: int, tokens: int, rank: int) -> torch.Tensor:
    """[tokens, K]: of a kind of text whose inputs lie near `rank` directions, which the seed chooses."""
    kind = torch.randn(rank, K, generator=torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + tokens)
    return torch.randn(tokens, rank, generator=generator) @ kind + 0.1 * torch.randn(tokens, K, generator=generator)


def hessian(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x


def fold_hessians(*sources: torch.Tensor) -> FoldHessians:
    halves = [half for x in sources for half in (x[::2], x[1::2])]
    return FoldHessians([hessian(half) for half in halves], [len(half) for half in halves])


@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_the_closed_form_predicts_the_error_of_gptq(products: Products, damping: float) -> None:
    """On another kind of text, relative to rounding to nearest on the same grid: within a tenth, for 512 random rows."""
    weight = torch.randn(512, K, generator=torch.Generator().manual_seed(0))
    fitted, other = hessian(inputs(1, 4000, 24)), hessian(inputs(2, 4000, 24))
    [predicted] = shrinkage._relative_errors(fitted, damping, [other], products.workers, act_order=True)
    grid = searched_grid(weight, TensorFormat("int4", 64))
    errors = []
    for u in (gptq(weight, Moments(fitted.clone(), None, products, damping=damping), grid), grid.round(weight)):
        change = grid.dequantize(u) - weight
        errors.append(float(((change @ other) * change).sum()))
    assert predicted == pytest.approx(errors[0] / errors[1], rel=0.1)


def test_damping_beyond_the_usual_helps_other_texts_and_costs_little(products: Products) -> None:
    """A text with many tokens gets the least damping; on texts of its kind it costs little against 0.01, and another kind gains."""
    of_one = fold_hessians(inputs(1, 8000, 24))
    chosen = choose_shrinkage(of_one, products.workers)
    assert chosen == shrinkage.Shrinkage(shrinkage.LEAST_DAMPING, (1.0,))

    def error(damping: float, x: torch.Tensor) -> float:
        return shrinkage._relative_errors(of_one.of_source(0), damping, [hessian(x)], products.workers, act_order=True)[0]

    same, other = inputs(1, 3000, 24), inputs(2, 3000, 24)
    assert 1 - error(chosen.damping, same) >= 0.95 * (1 - error(0.01, same))
    assert error(chosen.damping, other) < 0.95 * error(0.01, other)


def test_few_tokens_are_believed_less(products: Products) -> None:
    """A matrix that few tokens reach gets more damping."""
    many, few = (choose_shrinkage(fold_hessians(inputs(1, tokens, 60)), products.workers).damping for tokens in (20_000, 130))
    assert few > many == shrinkage.LEAST_DAMPING


def test_a_source_that_calibration_hurts_does_not_limit_the_damping(products: Products) -> None:
    """A source with so small a part that even its own other half errs more than by rounding to nearest."""
    sources = fold_hessians(inputs(1, 20_000, 24), 0.01 * inputs(2, 130, 60))
    for half in (0, 1):
        fitted, other = sources.half(half, (0.8, 1.25)), sources.hessians[3 - half]
        assert shrinkage._relative_errors(fitted, shrinkage.LEAST_DAMPING, [other], products.workers, act_order=True)[0] > 1
    assert choose_shrinkage(sources, products.workers).damping >= shrinkage.LEAST_DAMPING


def test_too_few_tokens_to_compare_get_the_most_damping(products: Products) -> None:
    chosen = choose_shrinkage(fold_hessians(inputs(1, 100, 24), inputs(2, 40, 24)), products.workers)
    assert chosen == shrinkage.Shrinkage(shrinkage.MOST_DAMPING, (1.0, 1.0))


def test_several_sources_are_damped_for_the_worst_of_them_when_it_is_left_out(products: Products) -> None:
    """Of two kinds with nothing in common more damping helps what is left out; no source loses more than 2 % of its gain by it."""
    sources = fold_hessians(inputs(1, 6000, 24), inputs(2, 6000, 24))
    chosen = choose_shrinkage(sources, products.workers)
    assert chosen.damping >= shrinkage.LEAST_DAMPING

    def left_out(damping: float) -> float:
        fitted = sources.without(0, chosen.weights)
        return shrinkage._relative_errors(fitted, damping, [sources.of_source(0)], products.workers, act_order=True)[0]

    def gain(damping: float) -> float:
        fitted = sources.half(0, chosen.weights)
        return 1 - shrinkage._relative_errors(fitted, damping, [sources.hessians[1]], products.workers, act_order=True)[0]

    assert left_out(chosen.damping) <= left_out(shrinkage.LEAST_DAMPING)
    assert gain(chosen.damping) >= 0.97 * gain(shrinkage.LEAST_DAMPING)


def test_the_source_with_the_largest_error_gains_weight_within_bounds(products: Products) -> None:
    """A source with a twentieth of the tokens; its error falls, and no weight leaves its bounds."""
    sources = fold_hessians(inputs(1, 20_000, 24), inputs(2, 1000, 24))
    chosen = choose_shrinkage(sources, products.workers)
    assert 0.8 <= chosen.weights[0] < chosen.weights[1] <= 1.25

    def error(weights: tuple[float, ...]) -> float:
        fitted = sources.half(0, weights) + sources.half(1, weights)
        return shrinkage._relative_errors(fitted, 0.1, [hessian(inputs(2, 3000, 24))], products.workers, act_order=True)[0]

    assert error(chosen.weights) < error((1.0, 1.0))


def pieces(x: torch.Tensor, y: torch.Tensor, g: torch.Tensor, fold: torch.Tensor, n: int = 700) -> list[FoldPiece]:
    return list(zip(x.split(n), y.split(n), g.split(n), fold.split(n), strict=True))


def expected_factors(weights: torch.Tensor, share: float, fold: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
    """[T]: the factor of each token's square, given the weights of two sources and the last fold's share of the whole."""
    factors = torch.cat([weights.repeat_interleave(2), torch.zeros(1)])[fold]
    texts = float((factors * energy).sum())
    return torch.where(fold == 4, share / (1 - share) * texts / float(energy[fold == 4].sum()), factors)


def test_the_moments_are_the_weighted_sums_of_all_tokens(products: Products) -> None:
    """Of two sources and of random tokens, whose part of the trace is given."""
    x = torch.cat([inputs(1, 3000, 24), inputs(2, 1000, 24), inputs(4, 300, 60)])
    y, g = x + 0.1 * inputs(3, 4300, 24), torch.rand(4300, generator=torch.Generator().manual_seed(5))
    fold = torch.cat([torch.arange(3000) // 1500, 2 + torch.arange(1000) // 500, torch.full((300,), 4)])
    moments, chosen = shrunk_moments(lambda step: pieces(x[::step], y[::step], g[::step], fold[::step]), K, 2, products)
    energy = (x * g[:, None]).square().sum(1)
    factors = expected_factors(torch.tensor(chosen.weights), folds.RANDOM_SHARE, fold, energy)
    expected = moments_of([(x, y, factors.sqrt() * g)], K, products, damping=chosen.damping)
    assert moments.damping == chosen.damping
    assert torch.allclose(moments.hessian, expected.hessian, rtol=1e-4, atol=1e-2)
    assert torch.allclose(moments.cross_term, expected.cross_term, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(("count", "share"), [(64, folds.RANDOM_SHARE), (1000, folds.RANDOM_SHARE), (16, folds.RANDOM_SHARE / 4), (0, 0.0)])
def test_few_random_tokens_get_a_smaller_share(count: int, share: float) -> None:
    """One token would give one direction many times the mean of the diagonal."""
    x, noise = inputs(1, 500, 24), inputs(4, count, 60)
    factor = folds._random_factor([hessian(x[::2]), hessian(x[1::2]), hessian(noise)], [1.0, 1.0], count)
    traces = float(x.square().sum()), factor * float(noise.square().sum())
    assert traces[1] / sum(traces) == pytest.approx(share, rel=1e-5)


def test_a_large_matrix_compares_some_columns_on_some_tokens(products: Products, monkeypatch: pytest.MonkeyPatch) -> None:
    """It chooses from a share of the columns and the same share of the tokens, and then sums all tokens of all columns."""
    monkeypatch.setattr(shrinkage, "BLOCK", 16)
    x = torch.cat([inputs(1, 6000, 24), inputs(2, 2000, 24), inputs(4, 400, 60)])
    fold = torch.cat([torch.arange(6000) // 3000, 2 + torch.arange(2000) // 1000, torch.full((400,), 4)])
    steps = []

    def passed(step: int) -> list[FoldPiece]:
        steps.append(step)
        return pieces(x[::step], x[::step] * 1.1, torch.ones(len(x))[::step], fold[::step])

    moments, chosen = folds.shrunk_moments(passed, K, 2, products)
    assert steps == [4, 1]
    assert torch.equal(block_columns(K), torch.arange(0, K, 4))
    halves = [x[::4, ::4][fold[::4] == half] for half in range(4)]
    some = choose_shrinkage(FoldHessians([hessian(half) for half in halves], [len(half) for half in halves]), products.workers)
    assert chosen.damping == pytest.approx(some.damping)
    assert chosen.weights == pytest.approx(some.weights, rel=1e-3)
    factors = expected_factors(torch.tensor(chosen.weights), folds.RANDOM_SHARE, fold[::4], x[::4, ::4].square().sum(1))
    of_fold = torch.stack([factors[fold[::4] == n][0] for n in range(5)])
    expected = moments_of([(x, x * 1.1, of_fold[fold].sqrt())], K, products, damping=chosen.damping)
    assert torch.allclose(moments.hessian, expected.hessian, rtol=1e-3, atol=1e-2)
