"""Grid searches in compiled code compared with those on whole tensors, and rounding to a grid compared with the formats."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numba
import numpy as np
import pytest
import torch

from dbrx_q.kernels.cpu import quantize as cpu_quantize
from dbrx_q.kernels.cpu.lanes import inverse_power, load, store
from dbrx_q.kernels.formats import int4, int8, q4_0
from dbrx_q.kernels.formats.format import GridLevels
from dbrx_q.kernels.formats.groups import grouped, steps_of
from dbrx_q.kernels.formats.registry import FORMATS
from dbrx_q.kernels.grid_search import half_quadratic, half_quadratic_reference, least_squares, least_squares_reference

INT4, INT8, Q4_0 = int4.LEVELS, int8.LEVELS, q4_0.LEVELS
AFFINE4, AFFINE8, AFFINE4_BF16 = (FORMATS[name].grid for name in ("affine4", "affine8", "affine4-bf16"))
assert AFFINE4 is not None
AFFINE2 = replace(AFFINE4, levels=3)
K = 384
SHARES = torch.tensor([1.0, 0.9, 0.8, 0.7])
BETAS = torch.tensor([10 * 1.01**n for n in range(20)])

SearchedGrid = tuple[torch.Tensor, torch.Tensor]


def weight(rows: int, *, transposed: bool = False) -> torch.Tensor:
    """float32 [rows, K] with a group of zeros, a group too small for float16 scales, and outliers."""
    shape = (K, rows) if transposed else (rows, K)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(rows)) * 0.02
    values = values.T if transposed else values
    values[:, ::50] *= 5
    values[0, :128] = 0
    values[-1, 128:256] = 1e-9
    return values


def dequantized(x: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, G: int, levels: GridLevels) -> torch.Tensor:
    """x rounded to its grid and back, float32 [N, n, G]."""
    if levels.offsets:
        steps, offsets = steps_of(scales).unsqueeze(-1), zeros.float().unsqueeze(-1)
        u = ((grouped(x.float(), G) - offsets) / steps).round().clamp(0, levels.levels)
        return u * scales.float().unsqueeze(-1) + offsets
    most = torch.full_like(zeros, levels.levels)
    low, high = (-most, most) if levels.symmetric else (-zeros, most - zeros)
    u = (grouped(x.float(), G) / steps_of(scales).unsqueeze(-1)).round().clamp(low.unsqueeze(-1), high.unsqueeze(-1))
    return u * scales.float().unsqueeze(-1)


def check(
    x: torch.Tensor, G: int, levels: GridLevels, grid: SearchedGrid, expected: SearchedGrid, power: float, importance: torch.Tensor
) -> None:
    """Nearly all grids are equal; where a tie is broken differently, the errors are as small."""

    def errors(candidate: SearchedGrid) -> torch.Tensor:
        error = dequantized(x, *candidate, G, levels).double() - grouped(x.double(), G)
        return (error.abs().pow(power) * grouped(importance.double(), G)).sum(-1)

    assert (grid[0] == expected[0]).float().mean() > 0.97
    assert (grid[1] == expected[1]).float().mean() > 0.97
    assert errors(grid).sum() <= errors(expected).sum() * (1 + 1e-4)


# Asymmetric grids of every number of levels that a format of 2 to 8 bits may have, symmetric ones and one of few zero-points.
CASES = pytest.mark.parametrize(
    ("G", "levels"),
    [
        *((32, replace(INT4, levels=levels)) for levels in (3, 7, 31, 255)),
        (64, INT4),
        (128, INT4),
        (32, INT8),
        (32, replace(INT8, levels=3)),
        (32, Q4_0),
    ],
    ids=["32-3", "32-7", "32-31", "32-255", "64-int4", "128-int4", "32-int8", "32-symmetric-3", "32-q4_0"],
)
SHAPES = pytest.mark.parametrize(("rows", "transposed"), [(48, False), (37, False), (32, True), (5, True)])


@CASES
@SHAPES
@pytest.mark.parametrize("weighted", [False, True])
def test_least_squares_equals_the_search_on_whole_tensors(G: int, levels: GridLevels, rows: int, transposed: bool, weighted: bool) -> None:
    x = weight(rows, transposed=transposed).bfloat16() if weighted else weight(rows, transposed=transposed)
    importance = torch.rand(K, generator=torch.Generator().manual_seed(3)) ** 4 if weighted else torch.ones(K)
    grid = least_squares(x, G, levels, SHARES, importance if weighted else None)
    check(x, G, levels, grid, least_squares_reference(x, G, levels, SHARES, importance), 2, importance)


@SHAPES
@pytest.mark.parametrize(
    ("G", "levels"), [(32, AFFINE4), (64, AFFINE8), (32, AFFINE4_BF16), (32, AFFINE2)], ids=["32-affine4", "64-affine8", "32-bf16", "32-3"]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_least_squares_with_offsets_equals_the_search_on_whole_tensors(
    G: int, levels: GridLevels, rows: int, transposed: bool, weighted: bool
) -> None:
    test_least_squares_equals_the_search_on_whole_tensors(G, levels, rows, transposed, weighted)


def test_few_zero_points_are_all_tried_with_scales_of_their_own_ranges() -> None:
    """No zero-point, and no share of the range that it covers, gives any group a smaller error."""
    x = weight(40)
    x[1::4] = x[1::4].abs()
    groups = grouped(x, 32)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales, zeros = least_squares(x, 32, Q4_0, SHARES)
    assert {7.0, 8.0} == set(zeros.unique().tolist())
    least = (dequantized(x, scales, zeros, 32, Q4_0) - groups).square().sum(-1)
    for zero in (7, 8):
        for share in SHARES.tolist():
            tried = (share * torch.maximum(-low / zero, high / (15 - zero))).half()
            error = (dequantized(x, tried, torch.full_like(zeros, zero), 32, Q4_0) - groups).square().sum(-1)
            assert (least <= error * (1 + 1e-4)).all()


def test_half_quadratic_with_offsets_lowers_its_norm() -> None:
    x, levels = weight(40), AFFINE4
    assert levels is not None
    grid, start = half_quadratic(x, 64, levels, BETAS), least_squares(x, 64, levels, SHARES[:0])
    errors = [(dequantized(x, *of, 64, levels) - grouped(x, 64)).abs().pow(0.7).sum(-1) for of in (grid, start)]
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()
    assert errors[0].sum() < 0.95 * errors[1].sum()


@CASES
@SHAPES
def test_half_quadratic_equals_the_search_on_whole_tensors(G: int, levels: GridLevels, rows: int, transposed: bool) -> None:
    x = weight(rows, transposed=transposed)
    check(x, G, levels, half_quadratic(x, G, levels, BETAS), half_quadratic_reference(x, G, levels, BETAS), 0.7, torch.ones(K))


@pytest.mark.parametrize("levels", [INT4, INT8], ids=["int4", "int8"])
def test_groups_that_compiled_code_does_not_load_are_searched_on_whole_tensors(levels: GridLevels) -> None:
    x, G = weight(20), 8
    for grid, expected in (
        (least_squares(x, G, levels, SHARES), least_squares_reference(x, G, levels, SHARES, None)),
        (half_quadratic(x, G, levels, BETAS), half_quadratic_reference(x, G, levels, BETAS)),
    ):
        assert all(torch.equal(part, expected_part) for part, expected_part in zip(grid, expected, strict=True))


@pytest.mark.parametrize("search", [least_squares, half_quadratic])
def test_an_infinite_scale_is_returned(search: Callable[..., SearchedGrid]) -> None:
    x = weight(4)
    x[2, 70] = 3e6
    scales, _ = search(x, 64, INT4, SHARES if search is least_squares else BETAS)
    assert torch.isinf(scales).nonzero().tolist() == [[2, 1]]


def test_bits_do_not_depend_on_layout_pieces_and_threads() -> None:
    x = weight(50).bfloat16()
    transposed = x.T.contiguous().T
    strided = torch.empty(50, 2 * K, dtype=x.dtype)[:, ::2].copy_(x)
    for run in (lambda w: least_squares(w, 64, INT4, SHARES), lambda w: half_quadratic(w, 64, INT4, BETAS)):
        expected = run(x)
        with ThreadPoolExecutor(3) as pool:
            pieces = list(pool.map(run, transposed.split(7)))
        for other in (run(transposed), run(strided), run(x.float()), tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))):
            assert all(torch.equal(a, b) for a, b in zip(expected, other, strict=True))


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("G", [32, 128])
def test_rounding_equals_that_of_the_formats(rows: int, transposed: bool, dtype: torch.dtype, G: int) -> None:
    x = weight(rows, transposed=transposed).to(dtype)
    four, eight = int4.quantize(x, G), int8.quantize(x, G)
    if G == 32:
        few, (fast, _, _) = q4_0.quantize(x, G), cpu_quantize.quantize_q4_0(x, G)
        assert all(torch.equal(getattr(fast, part), getattr(few, part)) for part in ("qweight", "scales", "zeros"))
    zeros = int4.unpack(four.zeros, K // G)
    for expected, runs in (
        (four, (cpu_quantize.quantize_int4(x, G), cpu_quantize.round_int4(x, four.scales, zeros, G))),
        (eight, (cpu_quantize.quantize_int8(x, G), cpu_quantize.round_int8(x, eight.scales, G))),
    ):
        module = int4 if expected is four else int8
        for result, error, square in runs:
            for part in ("qweight", "scales", "zeros")[: 3 if expected is four else 2]:
                assert torch.equal(getattr(result, part), getattr(expected, part)), part
            value = module.dequantize(expected)  # type: ignore[arg-type] # of its own format
            assert error == pytest.approx(float((value.double() - x.double()).square().sum()), rel=1e-4)
            assert square == pytest.approx(float(x.double().square().sum()), rel=1e-5)


@SHAPES
@pytest.mark.parametrize("name", ["int3", "int2"])
@pytest.mark.parametrize(("dtype", "G"), [(torch.float32, 32), (torch.bfloat16, 64), (torch.float16, 128)])
def test_rounding_to_few_bits_equals_that_of_the_formats(rows: int, transposed: bool, name: str, dtype: torch.dtype, G: int) -> None:
    """To the grid of each group's range, and to a grid of any zero-points, which is rounded with whole tensors on other devices."""
    x, record = weight(rows, transposed=transposed).to(dtype), FORMATS[name]
    assert record.grid is not None
    expected, kernels = record.quantize(x, G), cpu_quantize.KERNELS[name]
    generator = torch.Generator().manual_seed(1)
    scales, top = torch.rand(rows, K // G, generator=generator).mul(0.04).half(), record.grid.levels
    zeros = torch.randint(0, top + 1, (rows, K // G), generator=generator).float()
    u = (grouped(x.float(), G) / steps_of(scales).unsqueeze(-1)).round()
    u = torch.minimum(torch.maximum(u, -zeros.unsqueeze(-1)), (top - zeros).unsqueeze(-1)).flatten(-2)
    for wanted, (result, error, square) in (
        (expected, kernels.to_nearest(x, G)),
        (record.grid.pack(u, scales, zeros, G), kernels.to_grid(x, scales, zeros, G)),
    ):
        assert all(torch.equal(part, wanted.parts[part_name]) for part_name, part in result.parts.items())
        assert error == pytest.approx(float((record.dequantize(wanted, torch.float32).double() - x.double()).square().sum()), rel=1e-4)
        assert square == pytest.approx(float(x.double().square().sum()), rel=1e-5)


def test_inverse_power() -> None:
    x = torch.logspace(-30, 30, 16 * 4000, base=2)
    powers = torch.empty_like(x)
    _powers(x.numpy(), powers.numpy())
    assert (powers.double() / x.double().pow(-0.3) - 1).abs().max() < 4e-5


@numba.njit  # type: ignore[untyped-decorator] # numba's decorators are not annotated
def _powers(x: np.ndarray, powers: np.ndarray) -> None:
    for i in range(0, len(x), 16):
        store(inverse_power(load(x.ctypes.data + 4 * i)), powers.ctypes.data + 4 * i)
