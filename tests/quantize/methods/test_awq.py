"""AWQ's scales for the columns of w2: folding them in is exact, and they never raise the error that they minimize."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.kernels.formats import int4
from dbrx_q.kernels.formats.weights import dequantize
from dbrx_q.quantize.methods.awq import column_error, column_scales, fold_v1, fold_w2
from dbrx_q.quantize.methods.grid import packed, searched_grid

N, D, K = 48, 64, 256
INT4, INT8 = TensorFormat("int4", 64), TensorFormat("int8", 32)


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(1)) * 0.02


@pytest.fixture
def importance() -> torch.Tensor:
    """A few columns matter far more than the rest, as in an expert's hidden layer."""
    return torch.randn(K, generator=torch.Generator().manual_seed(2)).mul(1.5).exp()


def expert(x: torch.Tensor, w1: torch.Tensor, v1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    return (F.silu(x @ w1.T) * (x @ v1.T)) @ w2.T


def test_folding_does_not_change_the_experts_output(weight: torch.Tensor, importance: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(3)
    w1, v1, x = (torch.randn(rows, D, generator=generator, dtype=torch.float64) / 8 for rows in (K, K, 20))
    scales = column_scales(weight, importance, INT4)
    assert scales.max() > 1.5 * scales.min()
    folded = fold_v1(v1, scales), fold_w2(weight, scales)
    expected = expert(x, w1, v1, weight.double())
    assert torch.allclose(expert(x, w1, folded[0].double(), folded[1].double()), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_folding_powers_of_two_keeps_the_codes_of_v1(weight: torch.Tensor) -> None:
    """float16 scales absorb powers of two without rounding, so that the dequantized rows are scaled exactly."""
    v1 = torch.randn(K, D, generator=torch.Generator().manual_seed(4)) * 0.02
    scales = torch.exp2(torch.arange(K) % 5 - 2.0)
    plain, scaled = (int4.quantize(part, 64) for part in (v1, fold_v1(v1, scales)))
    assert torch.equal(scaled.qweight, plain.qweight)
    assert torch.equal(scaled.zeros, plain.zeros)
    assert torch.equal(dequantize(scaled) * scales[:, None], dequantize(plain))


@pytest.mark.parametrize("fmt", [INT4, INT8], ids=str)
def test_searched_scales_are_never_worse_than_none(weight: torch.Tensor, importance: torch.Tensor, fmt: TensorFormat) -> None:
    ones = torch.ones(K)
    least = column_error(weight, importance, fmt, column_scales(weight, importance, fmt))
    assert least < 0.95 * column_error(weight, importance, fmt, ones)
    assert torch.equal(column_scales(weight, ones, fmt), ones)
    for factor in (0.5, 2.0):  # scales that grow against the importance, or too fast with it, are worse
        assert least < column_error(weight, importance, fmt, importance.pow(factor - 0.75))


def test_column_error_is_the_error_of_the_output(weight: torch.Tensor, importance: torch.Tensor) -> None:
    """For independent inputs and for the weight that is packed in the end."""
    scales = column_scales(weight, importance, INT4)
    folded = fold_w2(weight, scales)
    grid = searched_grid(folded, INT4, importance / scales.square())
    value = dequantize(packed(grid, grid.round(folded)))
    inputs = torch.randn(4000, K, generator=torch.Generator().manual_seed(5)) * importance.sqrt()
    output_error = ((inputs / scales) @ value.T - inputs @ weight.T).square().sum() / 4000
    assert float(output_error) == pytest.approx(column_error(weight, importance, INT4, scales), rel=0.03)


@pytest.mark.parametrize("case", ["none", "one", "zeros", "far apart"])
def test_scales_stay_within_their_bounds(weight: torch.Tensor, case: str) -> None:
    importance = {
        "none": torch.zeros(K),
        "one": (torch.arange(K) == 7).float(),
        "zeros": (torch.arange(K) % 3).float(),
        "far apart": torch.logspace(-30, 30, K),
    }[case]
    scales = column_scales(weight, importance, INT4)
    assert scales.dtype == torch.float32
    assert (scales >= 1 / 16.001).all()
    assert (scales <= 16.001).all()
    assert float(scales.max() * scales.min()) == pytest.approx(1, rel=1e-3)
    if case == "none":
        assert torch.equal(scales, torch.ones(K))
