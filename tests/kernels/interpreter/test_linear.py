"""`linear` in the interpreter compared with the float32 reference, in both regimes, and with dequantized weights bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from dbrx_q.kernels.formats import int4, int8, nf4
from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight
from dbrx_q.kernels.formats.weights import dequantize
from dbrx_q.kernels.linear import linear_reference
from dbrx_q.kernels.triton.launch import INTERPRETER
from dbrx_q.kernels.triton.linear import linear, problem_of
from dbrx_q.kernels.triton.tiles import MATVEC_TOKENS, Tiles, choose, trying

MODULES = {"int4": int4, "int8": int8, "nf4": nf4}


@dataclass(frozen=True)
class Case:
    """One product."""

    fmt: str
    """Format of the weight."""
    group_size: int
    """Of the weight."""
    T: int
    """Tokens."""
    N: int
    """Output features; never a multiple of the rows of a tile."""
    K: int
    """Input features; only 2048 is a multiple of the depth of a tile."""
    clip: float | None = None
    """Limit of the outputs."""
    residual: bool = False
    """Whether a residual is added."""

    def __str__(self) -> str:
        options = ("-clip" if self.clip else "") + ("-residual" if self.residual else "")
        return f"{self.fmt}-g{self.group_size}-T{self.T}-N{self.N}-K{self.K}{options}"


FORMATS = [(fmt, G) for fmt, module in MODULES.items() for G in module.GROUP_SIZES]  # type: ignore[attr-defined] # all have it
CASES = [
    *(Case(fmt, G, T, 70, 384) for fmt, G in FORMATS for T in (1, 33)),
    *(Case(fmt, G, 3, 40, 2048 + G, 0.5, True) for fmt, G in FORMATS if G == 64),
    *(Case(fmt, 64, 0, 70, 192) for fmt in MODULES),
    Case("int4", 32, 16, 1, 160),
    Case("int4", 32, 17, 1, 160),
    Case("int4", 64, 1, 40, 2048, None, True),
    Case("int8", 32, 2, 130, 2048, 0.5),
    Case("int8", 64, 100, 130, 192, 0.5, True),
    Case("nf4", 64, 70, 100, 320, None, True),
]


def packed_weight(fmt: str, group_size: int, N: int, K: int) -> QuantizedWeight:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(N)) * 0.05 + 0.01
    return MODULES[fmt].quantize(weight, group_size)  # type: ignore[no-any-return, attr-defined] # all have it


def tiles_of(x: torch.Tensor, weight: QuantizedWeight) -> Tiles:
    return choose(problem_of(weight, x.shape[0], INTERPRETER), INTERPRETER)


def finished(y: torch.Tensor, case: Case, residual: torch.Tensor | None) -> torch.Tensor:
    y = y if case.clip is None else y.clamp(-case.clip, case.clip)
    return y if residual is None else y + residual


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_linear_agrees_with_the_reference(case: Case, dtype: torch.dtype) -> None:
    weight = packed_weight(case.fmt, case.group_size, case.N, case.K)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(case.T, case.K, generator=generator).to(dtype)
    residual = torch.randn(case.T, case.N, generator=generator).to(dtype) if case.residual else None
    out = linear(x, weight, case.clip, residual)
    assert (out.dtype, out.shape) == (dtype, (case.T, case.N))
    if not case.T:
        return
    product = linear_reference(x, weight)
    truth = finished(product, case, None if residual is None else residual.float())
    torch_error = (finished(x @ dequantize(weight, dtype).T, case, residual).float() - truth).abs().max()
    assert torch.isfinite(out).all()
    assert (out.float() - truth).abs().max() <= 2 * torch_error + 1e-6 * case.K**0.5 * product.abs().max()
    assert not case.clip or (product.abs() > case.clip).any()


@pytest.mark.parametrize("fmt", ["int4", "int8"])
def test_splits_without_steps_read_nothing(fmt: str) -> None:
    """9 steps in 4 splits are 3, 3, 3 and none."""
    steps, splits, depth = 9, 4, 128
    weight = packed_weight(fmt, 64, 20, steps * depth)
    x = torch.randn(2, steps * depth, generator=torch.Generator().manual_seed(1)).half()
    problem = problem_of(weight, 2, INTERPRETER)
    alone, shared = (replace(choose(problem, INTERPRETER), depth=depth, splits=count) for count in (1, splits))
    with trying(problem, INTERPRETER, alone):
        right = linear(x, weight)
    with trying(problem, INTERPRETER, shared):
        out = linear(x, weight)
    assert (out - right).abs().max() <= 2e-3 * right.abs().max()


def test_the_cases_with_large_k_split_the_reduction() -> None:
    splits = {
        tiles_of(torch.empty(case.T, case.K), packed_weight(case.fmt, case.group_size, case.N, case.K)).splits
        for case in CASES
        if case.K >= 2048
    }
    assert min(splits) > 1


@pytest.mark.parametrize("T", [1, MATVEC_TOKENS, 192], ids=["one", "matvec", "matmul"])
@pytest.mark.parametrize("fmt", ["int4", "int8"])
def test_negative_scales_and_codes_of_minus_128(fmt: str, T: int) -> None:
    """Files of other programs have them."""
    weight = packed_weight(fmt, 32, 35, 192)
    weight.parts["scales"][:, ::2] *= -1
    if fmt == "int8":
        weight.parts["qweight"][::3, ::5] = -128
    out = torch.cat([linear(part, weight) for part in torch.eye(192, dtype=torch.float16)[: max(T, 8)].split(T)])
    assert torch.equal(out, dequantize(weight, torch.float16).T[: max(T, 8)])


@pytest.mark.parametrize("T", [MATVEC_TOKENS, 192], ids=["matvec", "matmul"])
@pytest.mark.parametrize(("fmt", "group_size"), FORMATS)
def test_identity_activations_give_the_dequantized_weight(fmt: str, group_size: int, T: int) -> None:
    K = 192 if group_size < 128 else 256
    weight = packed_weight(fmt, group_size, 35, K)
    out = torch.cat([linear(part, weight) for part in torch.eye(K, dtype=torch.float16).split(T)])
    assert torch.equal(out, dequantize(weight, torch.float16).T)


@pytest.mark.parametrize("T", [3, 20])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
def test_plain_weights_in_any_memory_layout(layout: str, T: int) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = (torch.randn(70, 192, generator=generator) * 0.05).half()
    x = torch.randn(T, 192, generator=generator).half()
    stored = {"contiguous": weight, "transposed": weight.T.contiguous().T, "strided": weight.repeat_interleave(2, 1)[:, ::2]}[layout]
    truth = linear_reference(x, weight)
    error = ((x @ weight.T).float() - truth).abs().max()
    assert (linear(x, stored).float() - truth).abs().max() <= 2 * error + 1e-6
    assert torch.equal(linear(x, stored), linear(x, weight))


@pytest.mark.parametrize("activations", ["centered", "biased", "outliers"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_zero_points_of_few_tokens_cost_less_accuracy_than_rounding_to_bfloat16(group_size: int, activations: str) -> None:
    """Products of 128 + code and of -128 - zero-point, in float32, which bfloat16 takes on a GPU and float16 here, against float64."""
    weight = packed_weight("int4", group_size, 70, 2048)
    x = torch.randn(3, 2048, generator=torch.Generator().manual_seed(4))
    if activations == "biased":
        x += 8
    elif activations == "outliers":
        x[:, ::200] *= 300
    x = x.bfloat16()
    truth = x.double() @ dequantize(weight).double().T
    out = linear(x.half(), weight)
    assert x.equal(x.half().bfloat16())
    assert (out.double() - truth).abs().mean() <= (truth.bfloat16().double() - truth).abs().mean() / 2
    assert (out.double() - truth).abs().max() <= (x.double() @ dequantize(weight, torch.bfloat16).double().T - truth).abs().max()


def test_activations_need_not_be_contiguous() -> None:
    weight = packed_weight("int4", 64, 40, 192)
    x, residual = torch.randn(5, 192), torch.randn(5, 40)
    strided = linear(x.T.contiguous().T, weight, None, residual.T.contiguous().T)
    assert torch.equal(strided, linear(x, weight, None, residual))


@pytest.mark.parametrize("K", [192, 2048], ids=["whole", "split"])
def test_a_token_gives_the_same_bits_in_any_batch_of_its_tile(K: int) -> None:
    weight = packed_weight("int8", 64, 40, K)
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(3)).half()
    assert torch.equal(linear(x, weight)[2:3], linear(x[2:3], weight))


@pytest.mark.parametrize("T", [3, 20])
def test_nan_does_not_spread_to_other_rows(T: int) -> None:
    x = torch.ones(T, 192)
    x[1, 5] = torch.nan
    out = linear(x, packed_weight("int4", 64, 40, 192))
    assert out[1].isnan().all()
    assert out.isnan().any(-1).sum() == 1
