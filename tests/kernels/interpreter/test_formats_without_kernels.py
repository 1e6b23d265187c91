"""A weight in a format that the Triton kernels have no code for is dequantized and multiplied by torch."""

from __future__ import annotations

import pytest
import torch

from dbrx_q.kernels import linear as linear_module
from dbrx_q.kernels.backend import Backend
from dbrx_q.kernels.formats import nf4
from dbrx_q.kernels.formats import weights as weights_module
from dbrx_q.kernels.formats.expert_weights import ExpertWeights
from dbrx_q.kernels.formats.weights import dequantize
from dbrx_q.kernels.linear import linear
from dbrx_q.kernels.moe import moe_experts
from dbrx_q.kernels.triton.codes import CODES


@pytest.fixture(autouse=True)
def no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(CODES, "nf4")


def test_linear_dequantizes() -> None:
    weight, x, residual = nf4.quantize(torch.randn(40, 64)), torch.randn(3, 64), torch.randn(3, 40)
    out = linear(x, weight, clip=2.0, residual=residual, backend=Backend.TRITON)
    assert torch.allclose(out, (x @ dequantize(weight).T).clamp(-2, 2) + residual, atol=1e-5)


@pytest.mark.parametrize("T", [2, 20])
@pytest.mark.parametrize("slots", [None, [2, -1, 0, 1]], ids=["resident", "slots"])
def test_experts_are_dequantized(T: int, slots: list[int] | None) -> None:
    S, D, F = 4 if slots is None else 3, 64, 128
    w1, v1, w2 = (nf4.quantize(torch.randn(S, *shape) / 8) for shape in ((F, D), (F, D), (D, F)))
    layer = ExpertWeights(w1, v1, w2, None if slots is None else torch.tensor(slots, dtype=torch.int32))
    x, weights = torch.randn(T, D), torch.rand(T, 2)
    experts = torch.stack([torch.randperm(4)[:2] for _ in range(T)])
    missing, expected_missing = torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    out = moe_experts(x, experts, weights, layer, missing=missing, backend=Backend.TRITON)
    expected = moe_experts(x, experts, weights, layer, missing=expected_missing, backend=Backend.REFERENCE)
    assert torch.allclose(out, expected, rtol=1e-4, atol=1e-4)
    if slots is not None:
        assert missing.tolist() == expected_missing.tolist()


def random_layer(experts: int) -> ExpertWeights:
    D, F = 64, 128
    return ExpertWeights(*(nf4.quantize(torch.randn(experts, *shape) / 8) for shape in ((F, D), (F, D), (D, F))))


@pytest.mark.parametrize("T", [2, 20])
def test_experts_in_bfloat16(T: int) -> None:
    layer, x, weights = random_layer(4), torch.randn(T, 64, dtype=torch.bfloat16), torch.rand(T, 2)
    experts = torch.tensor([[0, 2]] * T)
    y = moe_experts(x, experts, weights, layer, backend=Backend.TRITON)
    expected = moe_experts(x.float(), experts, weights, layer, backend=Backend.REFERENCE)
    assert y.dtype == torch.bfloat16
    assert (y.float() - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.fixture
def dequantized_shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that are dequantized, in order."""
    shapes: list[tuple[int, ...]] = []

    def recorded(weight: nf4.Nf4Weight, dtype: torch.dtype) -> torch.Tensor:
        shapes.append(tuple(weight.shape))
        return dequantize(weight, dtype)

    for module in (linear_module, weights_module):
        monkeypatch.setattr(module, "dequantize", recorded)
    return shapes


def test_only_matrices_of_active_experts_are_dequantized_one_at_a_time(dequantized_shapes: list[tuple[int, ...]]) -> None:
    moe_experts(torch.randn(3, 64), torch.tensor([[1, 6]] * 3), torch.rand(3, 2), random_layer(8), backend=Backend.TRITON)
    assert dequantized_shapes == [(128, 64), (128, 64), (64, 128)] * 2


def test_a_large_weight_is_dequantized_in_pieces(monkeypatch: pytest.MonkeyPatch, dequantized_shapes: list[tuple[int, ...]]) -> None:
    monkeypatch.setattr(linear_module, "_PIECE_ELEMENTS", 16 * 64 + 1)
    weight, x = nf4.quantize(torch.randn(40, 64)), torch.randn(2, 3, 64)
    out = linear(x, weight, backend=Backend.TRITON)
    assert dequantized_shapes == [(16, 64), (16, 64), (8, 64)]
    assert torch.allclose(out, x @ dequantize(weight).T, atol=1e-5)


def test_no_tokens() -> None:
    y = moe_experts(torch.empty(0, 64), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2), random_layer(4), backend=Backend.TRITON)
    assert y.shape == (0, 64)
