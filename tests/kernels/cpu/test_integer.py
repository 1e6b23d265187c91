"""Integer products: against float64 on the same integers, with the bits of a token alone, on any number of threads."""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
import pytest
import torch

from dbrx_q.kernels.cpu import vector
from dbrx_q.kernels.cpu.activations import QuantizedActivations, quantize_activations, quantize_gated
from dbrx_q.kernels.cpu.choice import CpuChoice, Product, Regime, activation_bytes, activation_unit, choose
from dbrx_q.kernels.cpu.integer import Job, multiply
from dbrx_q.kernels.cpu.linear import linear, use_threads
from dbrx_q.kernels.cpu.moe import moe_experts
from dbrx_q.kernels.cpu.row_codes import FORMATS as ROW_CODES
from dbrx_q.kernels.formats import int8
from dbrx_q.kernels.formats.errors import DbrxError
from dbrx_q.kernels.formats.expert_weights import ExpertWeights
from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight
from dbrx_q.kernels.formats.registry import FORMATS as REGISTRY
from dbrx_q.kernels.formats.weights import dequantize
from dbrx_q.kernels.moe import moe_experts_reference

FORMATS = [
    *(("int2", G) for G in (32, 128)),
    *(("int3", G) for G in (32, 64)),
    *(("int4", G) for G in (32, 64, 128)),
    ("int8", 64),
    ("affine4", 32),
    ("affine8-bf16", 64),
]


def packed(format: str, group: int, *shape: int, seed: int = 0) -> QuantizedWeight:
    return REGISTRY[format].quantize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), group)


def foreign(format: str, group: int, N: int, K: int) -> QuantizedWeight:
    """A weight as files of other programs have them: scales of both signs, and codes and zero-points of the whole range."""
    generator = torch.Generator().manual_seed(N)
    scales = (torch.randn(N, K // group, generator=generator) * 0.1).half()
    scales[0, 0] = -0.25
    if format.startswith("affine"):
        weight = packed(format, group, N, K)
        parts = {**weight.parts, "scales": scales.to(weight.parts["scales"].dtype)}
        return type(weight).of({**parts, "qweight": torch.randint(0, 256, parts["qweight"].shape, dtype=torch.uint8)}, group)
    if format == "int8":
        codes = torch.randint(-128, 128, (N, K), generator=generator, dtype=torch.int8)
        codes[0] = -128
        return int8.Int8Weight(codes, scales, group)
    random = {
        part.name: torch.randint(0, 256, part.shape, generator=generator, dtype=torch.uint8)
        for part in REGISTRY[format].parts(N, K, group)
        if part.dtype == torch.uint8
    }
    return REGISTRY[format].weight.of({**random, "scales": scales}, group)


def activations(x: torch.Tensor, weight: QuantizedWeight, code_bytes: int, unit: int = 0) -> QuantizedActivations:
    return quantize_activations(x, unit=unit or weight.group_size, code_bytes=code_bytes, interleaved=ROW_CODES[weight.format].nibbles)


def values(x: QuantizedActivations, format: str) -> torch.Tensor:
    """float64 [T, K], what the integers and scales stand for."""
    T, H, K = x.codes.shape
    codes = x.codes.double()
    whole = codes[:, 0] if H == 1 else 256 * codes[:, 0] + codes[:, 1]
    if ROW_CODES[format].nibbles:
        whole = whole.view(T, K // 8, 2, 4).transpose(-1, -2).reshape(T, K)
    units = whole.view(T, -1, x.unit)
    assert torch.equal(units.sum(-1).int(), x.sums)
    return (units * x.scales.double()[..., None]).view(T, K)


def product(x: QuantizedActivations, weight: QuantizedWeight, x_rows: np.ndarray | None = None) -> torch.Tensor:
    rows = np.arange(len(x.codes)) if x_rows is None else x_rows
    out = torch.full((len(rows), weight.shape[-2]), 7.0)
    multiply(x, [Job(weight, (0,), out)], (0, len(rows)), rows, np.arange(len(rows)))
    return out


@pytest.mark.parametrize("make", [packed, foreign])
@pytest.mark.parametrize(("format", "group"), FORMATS)
@pytest.mark.parametrize(("N", "K"), [(70, 640), (5, 1408)])
def test_products_are_exact_but_for_the_scaling(format: str, group: int, N: int, K: int, make: Callable[..., QuantizedWeight]) -> None:
    weight, x = make(format, group, N, K), torch.randn(23, K)
    for code_bytes, unit in ((2, group), (1, min(64, group)), (1, 32)):
        quantized = activations(x, weight, code_bytes, unit)
        x_values = values(quantized, format)
        expected = x_values @ dequantize(weight).double().T
        for T in (1, 2, 5, 23):
            part = QuantizedActivations(quantized.codes[:T], quantized.scales[:T], quantized.sums[:T])
            torch.testing.assert_close(product(part, weight).double(), expected[:T], rtol=0, atol=1e-6 * float(expected.abs().max()))
        assert (x_values - x).norm() / x.norm() < (4e-5 if code_bytes == 2 else 1e-2)


@pytest.mark.parametrize(("format", "group"), FORMATS)
def test_a_token_has_the_same_bits_alone_in_a_batch_and_on_any_number_of_threads(format: str, group: int) -> None:
    weight, x = packed(format, group, 300, 640), torch.randn(31, 640)
    before = numba.get_num_threads()
    try:
        for code_bytes in (1, 2):
            quantized = activations(x, weight, code_bytes)
            numba.set_num_threads(1)
            together = product(quantized, weight)
            for rows in ([0], [30], [3, 4], [7, 0, 30, 30, 2], list(range(30, 3, -1))):
                for threads in range(1, min(3, numba.config.NUMBA_NUM_THREADS) + 1):
                    numba.set_num_threads(threads)
                    assert torch.equal(product(quantized, weight, np.array(rows)), together[rows])
    finally:
        numba.set_num_threads(before)


@pytest.mark.parametrize("code_bytes", [1, 2, 3])
@pytest.mark.parametrize("format", ["int2", "int3", "int4", "int8", "int8 of -128", "affine4", "affine8-bf16"])
def test_the_largest_sums_do_not_overflow(format: str, code_bytes: int) -> None:
    if code_bytes == 3 and "avx512vnni" not in vector.chip_features():
        pytest.skip("three bytes are for chips with 512-bit products of bytes")
    signs = torch.randn(40, 256, generator=torch.Generator().manual_seed(0)).sign()
    signs[:8] = 1
    if format == "int8 of -128":
        weight: QuantizedWeight = int8.Int8Weight((signs * 127.5 - 0.5).to(torch.int8), torch.full((40, 2), 0.0078125).half(), 128)
    else:
        weight = REGISTRY[format].quantize(signs, 128)  # all codes at the ends of their range
    x = torch.ones(9, 256)
    x[1:] *= signs[5:13]
    y = product(activations(x, weight, code_bytes, min(128, 64) if code_bytes == 1 else 128), weight)
    torch.testing.assert_close(y.double(), x.double() @ dequantize(weight).double().T, rtol=1e-6, atol=1e-3)


def test_more_tokens_than_a_panel_and_many_rows() -> None:
    weight, x = packed("int4", 64, 4100, 128), torch.randn(600, 128)
    use_threads(1 << 30)
    quantized = activations(x, weight, 1)
    expected = values(quantized, "int4") @ dequantize(weight).double().T
    torch.testing.assert_close(product(quantized, weight).double(), expected, rtol=1e-5, atol=1e-4)


def test_linear_takes_many_tokens_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = packed("int8", 64, 40, 256), torch.randn(75, 256).bfloat16()
    if not vector.has_byte_products():
        pytest.skip("this chip computes many tokens otherwise")
    whole = linear(x, weight)
    monkeypatch.setattr("dbrx_q.kernels.cpu.linear._SUMS", 1)
    assert torch.equal(linear(x, weight), whole)
    assert whole.dtype == torch.bfloat16


def test_the_silu_of_gated_activations() -> None:
    gate = torch.linspace(-60, 60, 4096).view(4, 1024)
    up = torch.ones_like(gate)
    up[:, ::64] = 110.0  # so that every unit has a large magnitude beside its small ones
    x = quantize_gated(gate, up, unit=64, code_bytes=2, interleaved=False)
    expected = torch.nn.functional.silu(gate.double()) * up
    error = (values(x, "int8") - expected).abs().view(4, -1, 64)
    assert bool((error <= 0.51 * x.scales.double()[..., None] + 1e-6 * expected.abs().view(4, -1, 64)).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_reach_the_result(bad: float) -> None:
    weight, x = packed("int4", 64, 20, 256), torch.randn(3, 256)
    x[1, 100] = bad
    for code_bytes in (1, 2):
        y = product(activations(x, weight, code_bytes), weight)
        assert not torch.isfinite(y[1]).any()
        assert torch.isfinite(y[[0, 2]]).all()


def test_zeros_and_the_smallest_numbers_are_no_error() -> None:
    weight, x = packed("int4", 64, 20, 256), torch.zeros(2, 256)
    x[1, :64] = 1e-40
    assert torch.equal(product(activations(x, weight, 2), weight), torch.zeros(2, 20))


def layer(formats: tuple[tuple[str, int], ...]) -> ExpertWeights:
    shapes = ((4, 256, 128), (4, 256, 128), (4, 128, 256))
    w1, v1, w2 = (packed(*fmt, *shape, seed=i) for i, (fmt, shape) in enumerate(zip(formats, shapes, strict=True)))
    return ExpertWeights(w1, v1, w2)


@pytest.mark.parametrize(
    "formats",
    [
        (("int4", 64),) * 3,
        (("int4", 32), ("int8", 64), ("int4", 128)),
        (("int8", 64),) * 3,
        (("int3", 64), ("int3", 64), ("int2", 32)),
        (("affine4", 32), ("affine4", 32), ("affine8-bf16", 64)),
    ],
    ids=["int4", "mixed", "int8", "int3 and int2", "affine"],
)
def test_experts_with_few_and_with_many_tokens(formats: tuple[tuple[str, int], ...]) -> None:
    weights = layer(formats)
    x = torch.randn(90, 128).bfloat16()
    experts = torch.stack([torch.zeros(90, dtype=torch.long), torch.where(torch.arange(90) < 3, 1, 2)], 1)  # of 90, 3 and 87 tokens
    gates = torch.rand(90, 2)
    y, expected = moe_experts(x, experts, gates, weights), moe_experts_reference(x, experts, gates, weights)
    assert (y - expected).norm() / expected.norm() < 1e-2
    order = torch.randperm(90)
    torch.testing.assert_close(moe_experts(x[order], experts[order], gates[order], weights), y[order], rtol=0, atol=0)


def test_eight_bits_are_for_many_tokens_of_gate_and_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def choice(tokens: int, dtype: torch.dtype = torch.bfloat16) -> CpuChoice:
        return choose(tokens, 6144, dtype, bfloat16_matmul=True, amx=False, byte_products=True)

    for bits, expected in (("auto", (1, 2, 2)), ("8", (1, 1, 1)), ("16", (2, 2, 2))):
        monkeypatch.setenv("DBRX_Q_ACTIVATION_BITS", bits)
        assert choice(17).regime is Regime.INTEGER
        assert tuple(activation_bytes(use, choice(17)) for use in Product) == expected
        assert [activation_bytes(use, choice(16)) for use in Product] == [2, 2, 2]
    assert choice(17, torch.float32).regime is Regime.TILES
    assert [activation_unit(Product.GATE_AND_UP, code_bytes, 128) for code_bytes in (1, 2)] == [64, 128]
    assert activation_unit(Product.DOWN, 1, 64) == 32
    monkeypatch.setenv("DBRX_Q_ACTIVATION_BITS", "12")
    with pytest.raises(DbrxError, match="must be 8, 16 or auto; found '12'"):
        activation_bytes(Product.DOWN, choice(17))
