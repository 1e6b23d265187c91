"""The steps of the quantization methods, each compared with arithmetic written out in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.errors import FormatError
from dbrx_q.kernels.formats import int4, int8
from dbrx_q.kernels.formats.groups import grouped, steps_of
from dbrx_q.kernels.formats.weights import dequantize
from dbrx_q.quantize.methods import factor
from dbrx_q.quantize.methods.choose import METHODS
from dbrx_q.quantize.methods.gptq import gptq
from dbrx_q.quantize.methods.grid import Grid, levels_of, packed, searched_grid, to_nearest
from dbrx_q.quantize.methods.hqq import hqq_grid
from dbrx_q.quantize.methods.moments import DAMPING, Moments, moments_of
from dbrx_q.quantize.methods.products import Products
from dbrx_q.quantize.methods.refine import descend, fit_scales
from dbrx_q.quantize.methods.workers import Workers

N, K = 24, 256
INT4, INT8, Q4_0 = TensorFormat("int4", 64), TensorFormat("int8", 32), TensorFormat("q4_0", 32)
INT3, INT2 = TensorFormat("int3", 64), TensorFormat("int2", 32)
AFFINE4, AFFINE8_BF16 = TensorFormat("affine4", 64), TensorFormat("affine8-bf16", 32)


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(1)) * 0.02


@pytest.fixture
def products() -> Iterator[Products]:
    with Workers() as workers:
        yield Products(workers, bfloat16=False)


@pytest.fixture
def moments(products: Products) -> Moments:
    """Moments of inputs that are correlated, as activations are, and differ a little between the two models."""
    generator = torch.Generator().manual_seed(2)
    mix = torch.randn(K, K, generator=generator) / 8 + torch.eye(K)
    y = torch.randn(2000, K, generator=generator) @ mix
    x = y + 0.1 * torch.randn(2000, K, generator=generator)
    return moments_of([(x[:700], y[:700], None), (x[700:], y[700:], None)], K, products)


def sums(moments: Moments) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 [K, K]: H without damping, and C."""
    hessian = moments.hessian.double()
    hessian.diagonal().copy_(moments.importance)
    return hessian, hessian if moments.cross_term is None else hessian + moments.cross_term.double()


def range_grid(weight: torch.Tensor, fmt: TensorFormat) -> Grid:
    """Each group's own range, zero included, as `int4.quantize` and `int8.quantize` cut it."""
    levels = levels_of(fmt)
    groups = grouped(weight, fmt.group_size)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)  # [N, n]
    if levels.symmetric:
        return Grid((torch.maximum(high, -low) / levels.levels).half(), None, fmt)
    scales = ((high - low) / levels.levels).half()
    return Grid(scales, (-low / steps_of(scales)).round().clamp(0, levels.levels), fmt)


def loss(weight: torch.Tensor, value: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """The squared error of each row's outputs, float64 [N]."""
    error = value.double() - weight.double()
    return ((error @ hessian.double()) * error).sum(-1)


@pytest.mark.parametrize("fmt", [INT4, INT8, TensorFormat("int4", 32)], ids=str)
def test_range_grids_equal_those_of_the_formats(weight: torch.Tensor, fmt: TensorFormat) -> None:
    weight[3] = 0
    weight[4, :64] = 1e-9
    module = int4 if fmt.format == "int4" else int8
    expected = module.quantize(weight, fmt.group_size)
    grid = range_grid(weight, fmt)
    result = packed(grid, grid.round(weight))
    assert type(result) is type(expected)
    for part in ("qweight", "scales", "zeros")[: 3 if fmt.format == "int4" else 2]:
        assert torch.equal(getattr(result, part), getattr(expected, part)), part
    assert torch.equal(grid.dequantize(grid.round(weight)), dequantize(expected))


@pytest.mark.parametrize("fmt", [INT4, INT3, INT2, INT8, Q4_0, AFFINE4, AFFINE8_BF16], ids=str)
def test_to_nearest_equals_rounding_and_packing(weight: torch.Tensor, fmt: TensorFormat) -> None:
    grid = searched_grid(weight, fmt)
    expected = packed(grid, grid.round(weight))
    result, error, square = to_nearest(weight, grid)
    assert torch.equal(result.qweight, expected.qweight)
    assert torch.equal(dequantize(result), dequantize(expected))
    assert error == pytest.approx(float((dequantize(expected).double() - weight.double()).square().sum()), rel=1e-4)
    assert square == pytest.approx(float(weight.double().square().sum()), rel=1e-4)


@pytest.mark.parametrize("fmt", [INT4, INT8], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_searched_grid_is_never_worse_than_the_full_range(weight: torch.Tensor, fmt: TensorFormat, weighted: bool) -> None:
    importance = torch.rand(K, generator=torch.Generator().manual_seed(3)) ** 4 if weighted else torch.ones(K)
    weight[0, 5] = 0.5  # far from the rest of its group

    def errors(grid: Grid) -> torch.Tensor:
        return ((grid.dequantize(grid.round(weight)) - weight).square() * importance).unflatten(-1, (-1, fmt.group_size)).sum(-1)

    searched, full_range = searched_grid(weight, fmt, importance if weighted else None), range_grid(weight, fmt)
    assert (errors(searched) <= errors(full_range) * (1 + 1e-5)).all()
    if fmt is INT4:  # with 8 bits no element is worth clipping
        assert errors(searched).sum() < 0.97 * errors(full_range).sum()


def test_hqq_lowers_its_norm_for_weights_with_outliers(weight: torch.Tensor) -> None:
    weight[:, ::64] *= 4

    def norm(grid: Grid) -> float:
        return float((grid.dequantize(grid.round(weight)) - weight).abs().pow(0.7).sum())

    assert norm(hqq_grid(weight, INT4)) < 0.97 * norm(range_grid(weight, INT4))


def textbook_gptq(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Rounds column by column and inverts the Hessian of the remaining columns anew for each (OBQ's equations, fixed order)."""
    w, h = weight.double().clone(), hessian.double()
    offsets = torch.zeros_like(grid.scales) if grid.offsets is None else grid.offsets
    left = hessian.diagonal().argsort(descending=True, stable=True).tolist()
    u = torch.zeros(N, K)
    while left:
        inverse = torch.linalg.inv(h[left][:, left])
        i = left[0]
        group = i // grid.group_size
        wanted = w[:, i] - offsets[:, group].double()
        u[:, i] = (wanted / grid.steps[:, group]).round().clamp(grid.low[:, group], grid.high[:, group])
        error = (wanted - u[:, i].double() * grid.scales[:, group].double()) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    return u


@pytest.mark.parametrize(("fmt", "share"), [(INT4, 0.6), (AFFINE4, 0.65), (INT3, 0.65), (INT2, 0.7)], ids=str)
def test_gptq_equals_the_textbook_algorithm(weight: torch.Tensor, moments: Moments, fmt: TensorFormat, share: float) -> None:
    grid = range_grid(weight, fmt) if fmt is INT4 else searched_grid(weight, fmt)
    codes, expected = gptq(weight, moments, grid), textbook_gptq(weight, moments.hessian, grid)
    assert (codes == expected).float().mean() > 0.99  # a value halfway between two may go either way
    assert torch.allclose(*(loss(weight, grid.dequantize(u), moments.hessian).sum() for u in (codes, expected)), rtol=0.01)
    nearest = loss(weight, grid.dequantize(grid.round(weight)), moments.hessian).sum()
    assert loss(weight, grid.dequantize(codes), moments.hessian).sum() < share * nearest


def test_fitted_scales_solve_the_least_squares_problem(weight: torch.Tensor, moments: Moments) -> None:
    grid = range_grid(weight, INT4)
    u = gptq(weight, moments, grid)
    fitted = fit_scales(weight, moments.hessian, grid, u).scales
    root = torch.linalg.cholesky(moments.hessian.double()).T  # H = root^T root
    for row in (0, 7, N - 1):
        columns = torch.stack([root[:, g * 64 : (g + 1) * 64] @ u[row, g * 64 : (g + 1) * 64].double() for g in range(K // 64)], 1)
        expected = torch.linalg.lstsq(columns, root @ weight[row].double()).solution
        assert torch.allclose(fitted[row].double(), expected, rtol=1e-3)


def test_a_scale_that_would_change_too_much_is_kept(weight: torch.Tensor, moments: Moments) -> None:
    grid = range_grid(weight, INT4)
    u = grid.round(weight)
    u[:, :64] *= 8  # a fit would make these eight times smaller
    fitted = fit_scales(weight, moments.hessian, grid, u).scales
    assert torch.equal(fitted[:, 0], grid.scales[:, 0])
    assert not torch.equal(fitted[:, 1], grid.scales[:, 1])


def test_fitted_offsets_solve_least_squares_with_the_scales(weight: torch.Tensor, moments: Moments) -> None:
    """Their dtype is widened here, so that rounding does not hide an error of the solution."""
    weight = weight + 0.05
    grid = searched_grid(weight, AFFINE4)
    u = grid.round(weight)
    wide = Grid(grid.scales.float(), None, AFFINE4, grid.offsets.float() + 0.01)
    fitted = fit_scales(weight, moments.hessian, wide, u)
    root = torch.linalg.cholesky(moments.hessian.double()).T  # H = root^T root
    for row in (0, 7, N - 1):
        columns = [root[:, g * 64 : (g + 1) * 64] @ u[row, g * 64 : (g + 1) * 64].double() for g in range(K // 64)]
        columns += [root[:, g * 64 : (g + 1) * 64].sum(1) for g in range(K // 64)]
        expected = torch.linalg.lstsq(torch.stack(columns, 1), root @ weight[row].double()).solution
        assert torch.allclose(fitted.scales[row].double(), expected[: K // 64], rtol=1e-3)
        assert torch.allclose(fitted.offsets[row].double(), expected[K // 64 :], rtol=1e-3)
    packed_grid = fit_scales(weight, moments.hessian, grid, u)
    assert packed_grid.scales.dtype == packed_grid.offsets.dtype == torch.float16
    before, after = (loss(weight, of.dequantize(u), moments.hessian) for of in (grid, packed_grid))
    assert (after <= before * (1 + 1e-4)).all()
    assert after.sum() < 0.99 * before.sum()


def test_a_group_that_a_fit_would_change_too_much_keeps_scale_and_offset(weight: torch.Tensor, moments: Moments) -> None:
    grid = searched_grid(weight, AFFINE4)
    u = grid.round(weight)
    u[:, :64] = (u[:, :64] / 4).round()  # a fit would make these scales four times larger
    fitted = fit_scales(weight, moments.hessian, grid, u)
    assert torch.equal(fitted.scales[:, 0], grid.scales[:, 0])
    assert torch.equal(fitted.offsets[:, 0], grid.offsets[:, 0])
    assert not torch.equal(fitted.offsets[:, 1], grid.offsets[:, 1])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_to_the_zero_points_of_q4_0(weight: torch.Tensor, moments: Moments, name: str) -> None:
    zeros = int4.unpack(METHODS[name].run(weight, Q4_0, moments if METHODS[name].calibrated else None).packed.zeros, K // 32)
    assert set(zeros.unique().tolist()) == {7, 8}


@pytest.mark.parametrize("fmt", [INT4, INT2, Q4_0, AFFINE4], ids=str)
def test_descent_ends_where_no_single_change_lowers_the_error(weight: torch.Tensor, moments: Moments, fmt: TensorFormat) -> None:
    grid = searched_grid(weight, fmt)
    start, G = grid.round(weight), fmt.group_size
    once, often = (descend(weight, moments.hessian, grid, start, sweeps=sweeps) for sweeps in (1, 30))
    errors = [loss(weight, grid.dequantize(u), moments.hessian) for u in (start, once, often)]
    assert (errors[1] <= errors[0] * (1 + 1e-6)).all()
    assert (errors[2] <= errors[1] * (1 + 1e-6)).all()
    assert ((often >= grid.low.repeat_interleave(G, -1)) & (often <= grid.high.repeat_interleave(G, -1))).all()
    for i in range(0, K, 13):
        for change in (-1, 1):
            other = often.clone()
            other[:, i] = (other[:, i] + change).clamp(grid.low[:, i // G], grid.high[:, i // G])
            assert (loss(weight, grid.dequantize(other), moments.hessian) >= errors[2] * (1 - 1e-5)).all()


def test_the_corrected_target_solves_its_least_squares_problem(weight: torch.Tensor, moments: Moments, products: Products) -> None:
    target = moments.corrected_target(weight).double()
    hessian, cross = sums(moments)
    d = DAMPING * hessian.diagonal().mean()
    # The gradient of |W' X - W Y|^2 + d |W' - W|^2 with respect to W'.
    gradient = target @ hessian - weight.double() @ cross + d * (target - weight.double())
    assert gradient.abs().max() < 1e-4 * (weight.double() @ cross).abs().max()
    assert (target - weight).norm() > 0.01 * weight.norm()
    assert torch.equal(Moments(moments.hessian, None, products).corrected_target(weight), weight)


def test_moments_add_up_over_pieces_and_weigh_gates_squared(monkeypatch: pytest.MonkeyPatch, products: Products) -> None:
    generator = torch.Generator().manual_seed(4)
    x, y, g = torch.randn(50, 32, generator=generator), torch.randn(50, 32, generator=generator), torch.rand(50, generator=generator)
    monkeypatch.setattr("dbrx_q.quantize.methods.products._COLUMNS", 13)
    hessian, cross = sums(moments_of([(x[:20], y[:20], g[:20]), (x[20:], y[20:], g[20:])], 32, products))
    weights = g.double() ** 2
    assert torch.allclose(hessian, torch.einsum("t,ti,tj->ij", weights, x.double(), x.double()), atol=1e-4)
    assert torch.allclose(cross, torch.einsum("t,ti,tj->ij", weights, y.double(), x.double()), atol=1e-4)


@pytest.mark.parametrize("case", ["zero", "one token", "dead inputs", "indefinite"])
def test_damping_handles_singular_and_indefinite_hessians(weight: torch.Tensor, moments: Moments, products: Products, case: str) -> None:
    hessian = {
        "zero": torch.zeros(K, K),
        "one token": torch.ones(K, K),
        "dead inputs": sums(moments)[0].float() * (torch.arange(K) % 3 > 0) * (torch.arange(K) % 3 > 0)[:, None],
        "indefinite": moments.hessian - 0.05 * moments.hessian.diagonal().mean() * torch.eye(K),
    }[case]
    if case == "indefinite":
        assert torch.linalg.eigvalsh(hessian.double() + DAMPING * hessian.diagonal().mean() * torch.eye(K))[0] < 0
    damped = Moments(hessian, torch.zeros(K, K), products)
    assert torch.isfinite(damped.factor).all()
    for name in ("gptq", "best"):
        value = dequantize(METHODS[name].run(weight, INT4, damped).packed)
        assert (value - weight).norm() < 0.5 * weight.norm(), name


@pytest.mark.parametrize("fmt", [INT4, INT3, INT2, Q4_0, AFFINE4, AFFINE8_BF16], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_reported_errors_are_those_of_the_packed_weight(weight: torch.Tensor, moments: Moments, name: str, fmt: TensorFormat) -> None:
    result = METHODS[name].run(weight.bfloat16(), fmt, moments if METHODS[name].calibrated else None)
    plain = weight.bfloat16().double()
    assert result.error == pytest.approx(float((dequantize(result.packed).double() - plain).square().sum()), rel=1e-4)
    assert result.square == pytest.approx(float(plain.square().sum()), rel=1e-4)


@pytest.mark.parametrize("fmt", [INT4, Q4_0, AFFINE4], ids=str)
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.calibrated])
def test_rows_are_quantized_independently(weight: torch.Tensor, moments: Moments, name: str, fmt: TensorFormat) -> None:
    run = METHODS[name].run
    all_rows, four_rows = dequantize(run(weight, fmt, moments).packed), dequantize(run(weight[5:9], fmt, moments).packed)
    assert (all_rows[5:9] == four_rows).float().mean() > 0.99


@pytest.mark.parametrize("fmt", [INT4, INT3, INT2, Q4_0, AFFINE4], ids=str)
def test_better_methods_have_less_output_error(weight: torch.Tensor, moments: Moments, fmt: TensorFormat) -> None:
    """The target is the original's output on its own inputs: |W' X - W Y|^2, up to a constant."""
    hessian, cross = sums(moments)

    def objective(name: str) -> float:
        value = dequantize(METHODS[name].run(weight, fmt, moments).packed).double()
        return float(((value @ hessian) * value).sum() - 2 * ((weight.double() @ cross) * value).sum())

    best, plain, nearest = objective("best"), objective("gptq"), objective("rtn")
    assert best < plain < nearest


def test_a_method_refuses_formats_that_it_does_not_produce() -> None:
    METHODS["rtn"].check("rtn", TensorFormat("nf4", 64))
    with pytest.raises(FormatError, match=r"best makes int4, int8, .*, trellis2, .*; found nf4\. Choose one of them, or the method rtn$"):
        METHODS["best"].check("best", TensorFormat("nf4", 64))
    with pytest.raises(FormatError, match=r"awq makes .*, int3, int2; found trellis2\. .*, or the method rtn or clip or gptq or best$"):
        METHODS["awq"].check("awq", TensorFormat("trellis2", 64))


def test_workers_keep_the_order_and_restore_the_thread_count() -> None:
    before = torch.get_num_threads()
    with Workers() as workers:
        assert torch.get_num_threads() == 1
        assert workers.map(lambda n: (n, torch.get_num_threads()), range(40)) == [(n, 1) for n in range(40)]
        with pytest.raises(ZeroDivisionError):
            workers.map(lambda n: 1 // n, [1, 0, 2])
    assert torch.get_num_threads() == before


def test_the_inverse_hessian_cost_is_a_schur_complement(moments: Moments) -> None:
    """That is the cost of an error after later columns have corrected it: the least w H w^T of all w with w[i] = 1, zero before i."""
    hessian = moments.hessian.double()[moments.order][:, moments.order]
    costs = moments.inverse_hessian_cost[moments.order]
    for i in (0, 5, K // 2, K - 2, K - 1):
        later = hessian[i + 1 :, i + 1 :]
        correction = hessian[i, i + 1 :] @ torch.linalg.solve(later, hessian[i + 1 :, i]) if i < K - 1 else 0
        assert costs[i] == pytest.approx(float(hessian[i, i] - correction), rel=1e-4)
    assert costs[0] < 0.5 * hessian[0, 0]


@pytest.mark.parametrize("blocks", [32, 100])
def test_the_blocked_factor_equals_the_factor_computed_at_once(
    moments: Moments, monkeypatch: pytest.MonkeyPatch, products: Products, blocks: int
) -> None:
    """GPUs compute it at once. Both are factors of the inverse."""
    assert moments.hessian is not None
    monkeypatch.setattr(factor, "_BLOCK", blocks)
    order = moments.order
    in_blocks = factor.inverse_factor(moments.hessian, order, products.workers)
    backwards = order.flip(0)
    at_once = factor._at_once(moments.hessian[backwards][:, backwards].double())
    assert in_blocks is not None
    assert at_once is not None
    assert torch.allclose(in_blocks, at_once, rtol=1e-5, atol=1e-6 * float(in_blocks.abs().max()))
    inverse = torch.linalg.inv(moments.hessian.double()[order][:, order])
    assert torch.allclose(at_once.double().T @ at_once.double(), inverse, atol=1e-5 * float(inverse.abs().max()))
    assert factor._at_once(-moments.hessian.double()) is None
