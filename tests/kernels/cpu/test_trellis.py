"""Products with trellis weights: against float64, exact but for the scaling, with the bits of a token alone, on any number of threads."""

from __future__ import annotations

import warnings

import llvmlite.binding as llvm
import numba
import numpy as np
import pytest
import torch
from llvmlite import ir

from dbrx_q.kernels.cpu import rotation, trellis, trellis_decode, vector
from dbrx_q.kernels.cpu.activations import QuantizedActivations
from dbrx_q.kernels.cpu.choice import Regime
from dbrx_q.kernels.cpu.format_kernels import dequantize_rows
from dbrx_q.kernels.cpu.integer import Job, multiply
from dbrx_q.kernels.cpu.linear import choice_for, use_threads, warm_up
from dbrx_q.kernels.cpu.moe import ExpertOutputs, moe_experts
from dbrx_q.kernels.formats.expert_weights import ExpertWeights
from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight
from dbrx_q.kernels.formats.registry import FORMATS, TensorFormat
from dbrx_q.kernels.formats.rotation import rotate, rotate_back
from dbrx_q.kernels.formats.trellis import TrellisWeight, levels_of
from dbrx_q.kernels.formats.trellis_codes import CODES
from dbrx_q.kernels.formats.weights import dequantize
from dbrx_q.kernels.linear import linear, linear_reference
from dbrx_q.kernels.moe import moe_experts_reference

NAMES = list(trellis.KINDS)
SHAPES = [(128, 128, 128), (300, 192, 64), (5, 1408, 128)]


def random_weight(name: str, group_size: int, *shape: int, seed: int = 0) -> QuantizedWeight:
    """A weight of random bytes: every stream is valid."""
    generator = torch.Generator().manual_seed(seed)
    *lead, N, K = shape
    parts = {part.name: (*lead, *part.shape) for part in TensorFormat(name, group_size).parts(N, K)}
    streams = torch.randint(0, 256, parts["qweight"], dtype=torch.uint8, generator=generator)
    scales = (torch.rand(parts["scales"], generator=generator) * 0.01 + 0.001).half()
    return FORMATS[name].weight.of({"qweight": streams, "scales": scales}, group_size)


def product(x: QuantizedActivations, weight: QuantizedWeight, x_rows: np.ndarray | None = None) -> torch.Tensor:
    rows = np.arange(len(x.codes)) if x_rows is None else x_rows
    out = torch.full((len(rows), weight.shape[-2]), 7.0)
    multiply(x, [Job(weight, (0,), out)], (0, len(rows)), rows, np.arange(len(rows)))
    return out


def integers(x: QuantizedActivations) -> torch.Tensor:
    """float64 [T, K]."""
    codes = x.codes.double()
    assert torch.equal(codes.sum(-1).int(), x.sums)
    whole = codes[:, 0]
    for h in range(1, codes.shape[1]):
        whole = 256 * whole + codes[:, h]
    return whole


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("N", "K", "group_size"), SHAPES)
def test_products_are_exact_but_for_the_scaling(name: str, N: int, K: int, group_size: int) -> None:
    weight, x = random_weight(name, group_size, N, K), torch.randn(40, K)
    assert isinstance(weight, TrellisWeight)
    levels = levels_of(weight).double()
    for code_bytes in (1, 2, 3):
        quantized = rotation.quantize_rotated(x, group_size=group_size, code_bytes=code_bytes)
        whole = integers(quantized)
        error = (whole * quantized.scales.double() - rotate(x, group_size).double()).norm() / x.norm()
        assert error < {1: 1e-2, 2: 5e-5, 3: 3e-7}[code_bytes]
        expected = whole @ levels.T * weight.scales.double().T * quantized.scales.double()
        for T in (1, 2, 5, 17, 40):
            part = QuantizedActivations(quantized.codes[:T], quantized.scales[:T], quantized.sums[:T])
            torch.testing.assert_close(product(part, weight).double(), expected[:T], rtol=3e-7, atol=2e-7 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in NAMES), ("trellis2", torch.bfloat16), ("trellis3", torch.float16)]
)
def test_linear_with_streams_agrees_with_the_reference(name: str, dtype: torch.dtype) -> None:
    for N, K, group_size in SHAPES:
        weight = random_weight(name, group_size, N, K)
        for T in (0, 1, 3, 40):
            x = torch.randn(T, K, generator=torch.Generator().manual_seed(T)).to(dtype)
            y, expected = linear(x, weight), linear_reference(x, weight)
            assert y.dtype == dtype
            if T:
                # 16-bit integers of few tokens, 24-bit ones or float32 of many.
                limit = 6e-3 if dtype != torch.float32 else 2e-4 if T < 17 else 2e-6
                assert (y.float() - expected).norm() / expected.norm() < limit


@pytest.mark.parametrize("name", NAMES)
def test_a_token_has_the_same_bits_alone_in_a_batch_and_on_any_number_of_threads(name: str) -> None:
    weight, x = random_weight(name, 64, 700, 576), torch.randn(31, 576)
    before = numba.get_num_threads()
    try:
        for code_bytes in (1, 2):
            numba.set_num_threads(1)
            quantized = rotation.quantize_rotated(x, group_size=64, code_bytes=code_bytes)
            together = product(quantized, weight)
            for threads in range(1, min(3, numba.config.NUMBA_NUM_THREADS) + 1):
                numba.set_num_threads(threads)
                again = rotation.quantize_rotated(x[3:], group_size=64, code_bytes=code_bytes)
                assert torch.equal(again.codes, quantized.codes[3:])
                for rows in ([0], [30], [3, 4], [7, 0, 30, 30, 2], list(range(30, 3, -1))):
                    assert torch.equal(product(quantized, weight, np.array(rows)), together[rows])
    finally:
        numba.set_num_threads(before)


@pytest.mark.parametrize("name", NAMES)
def test_dequantized_streams_have_the_bits_of_the_format(name: str) -> None:
    for N, K, group_size in SHAPES:
        weight = random_weight(name, group_size, N, K)
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(dequantize_rows(weight, dtype), dequantize(weight, dtype))
        tile = torch.empty(N, K, dtype=torch.bfloat16)
        trellis.dequantize_rows(weight, tile)
        assert torch.equal(tile, (levels_of(weight) * weight.parts["scales"].float()).bfloat16())


@pytest.mark.parametrize("group_size", [64, 128])
def test_the_rotation_has_the_bits_of_the_format(group_size: int) -> None:
    x = torch.randn(7, 1280)
    assert torch.equal(rotation.rotate(x, group_size), rotate(x, group_size))
    expected = rotate_back(x, group_size)
    rotation.rotate_back(x, group_size)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("code_bytes", [1, 2, 3])
def test_the_largest_sums_do_not_overflow(code_bytes: int) -> None:
    K = trellis.LARGEST_K
    weight = random_weight("trellis2", 128, 128, K)
    assert isinstance(weight, TrellisWeight)
    codes = torch.where(levels_of(weight)[:2] < 0, -128, 127).to(torch.int8)[:, None].repeat(1, code_bytes, 1)
    codes[0] = 127
    sums = codes.sum(-1, dtype=torch.int32)
    x = QuantizedActivations(codes, torch.ones(2, 1), sums)
    expected = integers(x) @ levels_of(weight).double().T * weight.scales.double().T
    for rows in ([0], [1], [0, 1, 1]):
        torch.testing.assert_close(product(x, weight, np.array(rows)).double(), expected[rows], rtol=3e-7, atol=1.0)


def test_more_tokens_than_a_panel_and_many_rows() -> None:
    weight, x = random_weight("trellis3", 128, 4100, 128), torch.randn(trellis.PANEL + 90, 128)
    use_threads(1 << 30)
    quantized = rotation.quantize_rotated(x, group_size=128, code_bytes=2)
    expected = quantized.scales.double() * integers(quantized) @ (levels_of(weight) * weight.scales.double()).T  # type: ignore[arg-type, attr-defined]
    torch.testing.assert_close(product(quantized, weight).double(), expected, rtol=3e-7, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_reach_the_result(bad: float) -> None:
    weight, x = random_weight("trellis2", 128, 20, 256), torch.randn(3, 256)
    x[1, 100] = bad
    for code_bytes in (1, 2, 3):
        y = product(rotation.quantize_rotated(x, group_size=128, code_bytes=code_bytes), weight)
        assert not torch.isfinite(y[1]).any()
        assert torch.isfinite(y[[0, 2]]).all()


def test_zeros_and_the_smallest_numbers_are_no_error() -> None:
    weight, x = random_weight("trellis4", 64, 20, 256), torch.zeros(2, 256)
    x[1, :64] = 1e-40
    assert torch.equal(product(rotation.quantize_rotated(x, group_size=64, code_bytes=2), weight), torch.zeros(2, 20))


def with_gaps(weight: QuantizedWeight) -> QuantizedWeight:
    """The same weight, its matrices at a distance from each other."""
    parts = {name: torch.stack([part, torch.full_like(part, 99)], 1)[:, 0] for name, part in weight.parts.items()}
    assert not parts["qweight"].is_contiguous()
    return type(weight).of(parts, weight.group_size)


@pytest.mark.parametrize(
    "formats",
    [
        ("trellis2", "trellis2", "trellis2"),
        ("trellis3", "trellis4", "trellis2-fast"),
        ("trellis4", "trellis4", "int4"),
        ("int4", "int4", "trellis3"),
    ],
    ids="+".join,
)
def test_experts_with_few_and_with_many_tokens(formats: tuple[str, str, str]) -> None:
    weights = []
    for i, (name, shape) in enumerate(zip(formats, ((4, 192, 128), (4, 192, 128), (4, 128, 192)), strict=True)):
        if name == "int4":
            weights.append(FORMATS["int4"].quantize(torch.randn(shape, generator=torch.Generator().manual_seed(i)) * 0.1, 64))
        else:
            weights.append(with_gaps(random_weight(name, 64, *shape, seed=i)))
    layer = ExpertWeights(*weights)
    x = torch.randn(90, 128).bfloat16()
    experts = torch.stack([torch.zeros(90, dtype=torch.long), torch.where(torch.arange(90) < 3, 1, 2)], 1)  # of 90, 3 and 87 tokens
    gates = torch.rand(90, 2)
    y, expected = moe_experts(x, experts, gates, layer), moe_experts_reference(x, experts, gates, layer)
    assert (y - expected).norm() / expected.norm() < 1.5e-2
    order = torch.randperm(90)
    torch.testing.assert_close(moe_experts(x[order], experts[order], gates[order], layer), y[order], rtol=0, atol=0)
    few = moe_experts(x[:3], experts[:3], gates[:3], layer)
    outputs = ExpertOutputs(x[1:2], experts[1:2])
    for e in outputs.counts:
        outputs.add(layer, {e: e})
    assert torch.equal(outputs.total(gates[1:2]), few[1:2])


def test_inputs_beyond_the_largest_sums_are_dequantized() -> None:
    weight, x = random_weight("trellis2", 128, 8, trellis.LARGEST_K + 128), torch.randn(2, trellis.LARGEST_K + 128)
    assert choice_for(2, x, weight).regime is Regime.TILES
    assert choice_for(2, x[:, 128:], random_weight("trellis2", 128, 8, trellis.LARGEST_K)).regime is Regime.INTEGER
    torch.testing.assert_close(linear(x, weight), linear_reference(x, weight), rtol=1e-4, atol=1e-3)


def test_a_chip_without_the_fast_instructions_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight("trellis2", 64, 40, 64)
    monkeypatch.setattr(trellis_decode, "has_fast_decoding", lambda: False)
    trellis_decode.warn_of_slow_decoding.cache_clear()
    with pytest.warns(trellis_decode.SlowDecodingWarning, match="lacks AVX-512 VBMI or GFNI"):
        warm_up(weight, torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warm_up(weight, torch.bfloat16)


def test_neon_looks_bits_and_levels_up_in_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        target = llvm.Target.from_triple("aarch64-linux-gnu")
    except RuntimeError:
        pytest.skip("this LLVM compiles for one architecture alone")
    monkeypatch.setattr(vector, "chip_features", lambda: frozenset({"neon"}))
    function = ir.Function(ir.Module(), ir.FunctionType(ir.VoidType(), [vector.I64, vector.I64]), "decode")
    b = ir.IRBuilder(function.append_basic_block())
    lines = [vector.load(b, b.add(function.args[0], vector.I64(64 * j)), vector.V64) for j in range(2)]
    for turn, levels in enumerate(trellis_decode.decoded(b, CODES["trellis2"], lines, 0)):
        vector.store(b, levels, b.add(function.args[1], vector.I64(64 * turn)))
    b.ret_void()
    module = llvm.parse_assembly(str(function.module))
    module.triple = "aarch64-linux-gnu"
    assembly = target.create_target_machine(features="+neon", opt=3).emit_assembly(module)
    # Of 512 weights: four tables of bits and four of levels for each 16.
    assert assembly.count("\ttbl\t") == 256
