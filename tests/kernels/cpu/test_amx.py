"""The AMX kernel compared with the float32 reference."""

from __future__ import annotations

import pytest
import torch

from dbrx_q.kernels.cpu import amx
from dbrx_q.kernels.formats import int4, int8
from dbrx_q.kernels.formats.int4 import Int4Weight
from dbrx_q.kernels.formats.int8 import Int8Weight
from dbrx_q.kernels.formats.weights import dequantize
from dbrx_q.kernels.linear import linear_reference

MODULES = {"int4": int4, "int8": int8}

pytestmark = pytest.mark.skipif(not amx.available(), reason="this machine offers no AMX for bfloat16")


def packed_weight(fmt: str, group_size: int, N: int, K: int) -> Int4Weight | Int8Weight:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 0.05 + 0.01
    return MODULES[fmt].quantize(weight, group_size)  # type: ignore[no-any-return, attr-defined] # both have it


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new tensors with NaN (255 in every byte, in any dtype), so that memory that is never written shows."""
    real = torch.empty

    def empty(*args: object, **kwargs: object) -> torch.Tensor:
        out: torch.Tensor = real(*args, **kwargs)  # type: ignore[call-overload] # forwards its arguments
        out.view(torch.uint8).fill_(255)
        return out

    monkeypatch.setattr(torch, "empty", empty)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("fmt", ["int4", "int8"])
@pytest.mark.parametrize("K", [128, 256, 640])
@pytest.mark.parametrize("N", [16, 32, 33, 100, 1100])
def test_matmul_agrees_with_the_reference(N: int, K: int, fmt: str, group_size: int) -> None:
    weight = packed_weight(fmt, group_size, N, K)
    for T in (1, 15, 16, 17, 33, 128, 600):
        x = torch.randn(T, K, generator=torch.Generator().manual_seed(T)).bfloat16()
        truth = linear_reference(x, weight)
        out = amx.matmul(x, weight)
        assert out.dtype == torch.bfloat16
        assert out.shape == truth.shape
        error = (out.float() - truth).abs().max()
        torch_error = (x @ dequantize(weight, torch.bfloat16).T).float().sub(truth).abs().max()
        assert error <= 2 * torch_error


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("fmt", ["int4", "int8"])
def test_negative_scales_and_codes_of_minus_128(fmt: str, group_size: int) -> None:
    """Files of other programs have them."""
    weight = packed_weight(fmt, group_size, 48, 256)
    weight.scales[:, ::2] *= -1
    if fmt == "int8":
        weight.qweight[::3, ::5] = -128
    assert torch.equal(amx.matmul(torch.eye(256, dtype=torch.bfloat16), weight), dequantize(weight, torch.bfloat16).T)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("fmt", ["int4", "int8"])
@pytest.mark.parametrize("N", [48, 1100])
@pytest.mark.parametrize("K", [256, 640])
def test_identity_activations_give_the_dequantized_weight(N: int, K: int, fmt: str, group_size: int) -> None:
    weight = packed_weight(fmt, group_size, N, K)
    assert torch.equal(amx.matmul(torch.eye(K, dtype=torch.bfloat16), weight), dequantize(weight, torch.bfloat16).T)


def test_tensors_need_not_be_contiguous() -> None:
    weight = packed_weight("int4", 64, 40, 256)
    x = torch.randn(256, 20).bfloat16().T
    assert torch.equal(amx.matmul(x, weight), amx.matmul(x.contiguous(), weight))


def test_nan_does_not_spread_to_other_tokens() -> None:
    x = torch.ones(20, 256, dtype=torch.bfloat16)
    x[19, 5] = torch.nan
    out = amx.matmul(x, packed_weight("int8", 64, 40, 256))
    assert out[19].isnan().all()
    assert not out[:19].isnan().any()
