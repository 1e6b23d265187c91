"""Trellis formats by every method: rotated moments, streams with feedback, fitted scales."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dbrx_q.checkpoint.layout import TensorFormat
from dbrx_q.errors import FormatError
from dbrx_q.kernels.formats.rotation import rotate
from dbrx_q.kernels.formats.weights import dequantize
from dbrx_q.quantize.methods.choose import METHODS
from dbrx_q.quantize.methods.moments import Moments, moments_of
from dbrx_q.quantize.methods.products import Products
from dbrx_q.quantize.methods.trellis import trellis_gptq, trellis_nearest
from dbrx_q.quantize.methods.workers import Workers

N, K = 160, 192  # one tile and a quarter, three groups of 64
FAST, TRELLIS3, TRELLIS4 = TensorFormat("trellis2-fast", 64), TensorFormat("trellis3-fast", 64), TensorFormat("trellis4-fast", 64)


@pytest.fixture
def weight() -> torch.Tensor:
    """Rows of different sizes, one of zeros."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(N, K, generator=generator) * torch.linspace(0.005, 0.05, N)[:, None]
    weight[3] = 0
    return weight


@pytest.fixture
def products() -> Iterator[Products]:
    with Workers() as workers:
        yield Products(workers, bfloat16=False)


@pytest.fixture
def moments(products: Products) -> Moments:
    """Moments of inputs that are correlated and of different sizes; input 5 is always zero."""
    generator = torch.Generator().manual_seed(2)
    mix = (torch.randn(K, K, generator=generator) / 8 + torch.eye(K)) * torch.linspace(0.2, 2, K)
    y = torch.randn(1500, K, generator=generator) @ mix
    x = y + 0.5 * torch.randn(1500, K, generator=generator)
    x[:, 5] = 0
    return moments_of([(x[:700], y[:700], None), (x[700:], y[700:], None)], K, products)


def test_rotated_moments_are_those_of_rotated_inputs(moments: Moments) -> None:
    rotation = rotate(torch.eye(K), 64).T.double()  # V
    rotated = moments.rotated(64)
    assert moments.rotated(64) is rotated
    assert moments.hessian is not None
    assert rotated.hessian is not None
    assert moments.cross_term is not None
    assert rotated.cross_term is not None
    plain = moments.hessian.double()
    expected = rotation @ plain @ rotation.T
    expected.diagonal().add_(moments.damping * float(moments.importance.mean()) / K)  # the zero input counts as the mean does
    assert torch.allclose(rotated.hessian.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    cross_term = rotation @ moments.cross_term.double() @ rotation.T
    assert torch.allclose(rotated.cross_term.double(), cross_term, rtol=0, atol=1e-5 * float(cross_term.abs().max()))
    assert torch.equal(rotated.importance[rotated.order], rotated.importance.sort(descending=True).values)
    assert not torch.equal(rotated.order, moments.order)


def test_the_corrected_target_is_the_same_in_both_bases(weight: torch.Tensor, moments: Moments) -> None:
    plain, rotated = moments.corrected_target(weight), moments.rotated(64).corrected_target(rotate(weight, 64))
    change = (plain - weight).norm()
    assert change > 0.02 * weight.norm()
    assert (rotate(plain, 64) - rotated).norm() < 0.02 * change


@pytest.mark.parametrize("fmt", [FAST, TRELLIS3, TRELLIS4], ids=str)
def test_feedback_lowers_the_error_of_the_outputs(weight: torch.Tensor, moments: Moments, products: Products, fmt: TensorFormat) -> None:
    assert moments.hessian is not None
    hessian = moments.hessian.double()
    hessian.diagonal().copy_(moments.importance)
    without_original = Moments(hessian.float(), None, products)
    used = {"best": moments, "gptq": without_original, "rtn": None}
    values = {name: dequantize(METHODS[name].run(weight, fmt, of_method).packed).double() for name, of_method in used.items()}

    def output_error(name: str, target: torch.Tensor) -> float:
        rest = values[name] - target.double()
        return float(((rest @ hessian) * rest).sum())

    assert output_error("gptq", weight) < 0.7 * output_error("rtn", weight)
    target = moments.corrected_target(weight)
    assert output_error("best", target) < 0.7 * output_error("rtn", target)
    assert output_error("best", target) < output_error("gptq", target)


def test_more_bits_have_less_error(weight: torch.Tensor) -> None:
    two, three, four = (METHODS["rtn"].run(weight, fmt, None) for fmt in (FAST, TRELLIS3, TRELLIS4))
    assert two.square == pytest.approx(float(weight.double().square().sum()), rel=1e-5)
    assert 0.02 < two.error / two.square < 0.11  # less than a code's 0.078, as large rows count more than small ones
    assert three.error < two.error / 3
    assert four.error < three.error / 3


@pytest.mark.parametrize("method", ["rtn", "gptq", "best"])
def test_errors_are_those_of_the_dequantized_weight_in_the_original_basis(weight: torch.Tensor, moments: Moments, method: str) -> None:
    result = METHODS[method].run(weight, FAST, moments if METHODS[method].calibrated else None)
    value = dequantize(result.packed)
    assert value.shape == weight.shape
    assert not value[3].any()
    assert result.error == pytest.approx(float((value.double() - weight.double()).square().sum()), rel=1e-4)
    if method == "best":
        assert moments.hessian is not None
        target = moments.corrected_target(weight)
        rows = (value - target)[::5].double()  # every fifth: 160 rows are too few for every sixteenth
        output_error = float(((rows @ moments.hessian.double()) * rows).sum())
        assert result.output_error == pytest.approx(output_error, rel=0.05)


def test_scales_are_those_of_least_error(weight: torch.Tensor, moments: Moments) -> None:
    rotated = moments.rotated(64)
    assert rotated.hessian is not None
    target = rotate(weight, 64)
    _, values = trellis_gptq(target, FAST, rotated)

    def errors(factor: float) -> torch.Tensor:
        rest = values.double() * factor - target.double()
        return ((rest @ rotated.hessian.double()) * rest).sum(-1)

    assert (errors(1) <= errors(0.998)).all()
    assert (errors(1) <= errors(1.002)).all()


def test_no_row_errs_more_than_one_of_zeros(moments: Moments) -> None:
    """Rows of a tile share streams, in which large rows weigh more: the levels of a row that is a hundred times smaller are arbitrary."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(N, K, generator=generator)
    weight[torch.rand(N, generator=generator) < 0.5] /= 100
    rotated, target = moments.rotated(64), rotate(weight, 64)
    assert rotated.hessian is not None
    hessian = rotated.hessian.double()
    packed, _, _ = trellis_nearest(weight, FAST)
    assert ((dequantize(packed) - weight).norm(dim=-1) <= 1.001 * weight.norm(dim=-1)).all()
    rest, zeros = trellis_gptq(target, FAST, rotated)[1].double() - target, target.double()
    assert (((rest @ hessian) * rest).sum(-1) <= 1.001 * ((zeros @ hessian) * zeros).sum(-1)).all()


def test_tiles_are_independent(weight: torch.Tensor, moments: Moments) -> None:
    for method in ("rtn", "gptq", "best"):
        run = METHODS[method].run
        whole, part = (dequantize(run(rows, FAST, moments).packed) for rows in (weight, weight[128:]))
        assert (whole[128:] == part).float().mean() > 0.99, method  # the last bits of a product depend on its number of rows


def test_without_moments_every_column_is_searched_by_itself(weight: torch.Tensor) -> None:
    nearest, error, _ = trellis_nearest(weight, FAST)
    for method in ("rtn", "clip", "gptq", "best"):
        result = METHODS[method].run(weight, FAST, None)
        assert torch.equal(dequantize(result.packed), dequantize(nearest)), method
        assert result.error == error


def test_what_no_stream_can_hold_is_refused(weight: torch.Tensor) -> None:
    for method in ("rtn", "best"):
        with pytest.raises(FormatError, match="must divide the reduction axis; found group size 128 and 192 elements"):
            METHODS[method].run(weight, TensorFormat("trellis2", 128), None)
        with pytest.raises(FormatError, match=r"a group's scale must stay below 65504"):
            METHODS[method].run(weight * 1e9, FAST, None)
    for method in ("hqq", "awq"):
        with pytest.raises(FormatError, match=rf"{method} makes .*; found trellis3\. Choose one of them"):
            METHODS[method].check(method, TensorFormat("trellis3", 128))
