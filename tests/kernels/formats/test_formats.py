"""The packed formats: packing is lossless, rounding has the stated error, and the compiled quantizer gives the same bits."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dbrx_q.kernels.cpu import quantize as cpu_quantize
from dbrx_q.kernels.formats import int4, int8, nf4
from dbrx_q.kernels.formats.errors import FormatError
from dbrx_q.kernels.formats.weights import gather_rows

GROUP_SIZES = (32, 64, 128)


def hard_weight(N: int, K: int, seed: int = 0) -> torch.Tensor:
    """bfloat16 rows of ordinary, tiny, huge, one-sided, constant and zero values."""
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
    scales = [1.0, 1e-4, 1e4, 1e-9, 0.0]
    weight *= torch.tensor([scales[n % len(scales)] for n in range(N)])[:, None]
    weight[1::7] = weight[1::7].abs() + 0.5
    weight[2::7] = -weight[2::7].abs()
    weight[3::7] = 0.25
    return weight.bfloat16()


@given(codes=st.lists(st.integers(0, 15), max_size=70))
def test_int4_pack_round_trips_at_every_length(codes: list[int]) -> None:
    tensor = torch.tensor(codes, dtype=torch.uint8)
    packed = int4.pack(tensor)
    assert packed.shape == ((len(codes) + 1) // 2,)
    assert int4.unpack(packed, len(codes)).tolist() == codes


def test_int4_layout_is_the_documented_one() -> None:
    assert int4.pack(torch.tensor([1, 2, 3, 15, 7], dtype=torch.uint8)).tolist() == [0x21, 0xF3, 0x07]


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_int4_error_is_at_most_half_a_step_inside_the_range(group_size: int) -> None:
    weight = torch.randn(16, 640, generator=torch.Generator().manual_seed(1))
    packed = int4.quantize(weight, group_size)
    difference = (int4.dequantize(packed) - weight).unflatten(-1, (-1, group_size)).abs().amax(-1)
    # Half a step from rounding, half from the rounded zero-point, and the rounding of the float16 scale over 15 steps.
    assert (difference <= packed.scales.float() * (0.5 + 0.5 + 15 * 2**-11)).all()
    assert difference.max() > packed.scales.float().min() * 0.25


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_int8_error_is_at_most_half_a_step(group_size: int) -> None:
    weight = torch.randn(16, 640, generator=torch.Generator().manual_seed(1))
    packed = int8.quantize(weight, group_size)
    difference = (int8.dequantize(packed) - weight).unflatten(-1, (-1, group_size)).abs().amax(-1)
    assert (difference <= packed.scales.float() * (0.5 + 127 * 2**-11)).all()


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_values_on_the_grid_round_trip_exactly(group_size: int) -> None:
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 16, (8, 256), generator=generator)
    codes.unflatten(-1, (-1, group_size))[..., :2] = torch.tensor([0, 15])  # the whole range occurs in every group
    exact = (codes - 6) * 0.125
    assert torch.equal(int4.dequantize(int4.quantize(exact, group_size)), exact)
    codes = torch.randint(-127, 128, (8, 256), generator=generator)
    codes.unflatten(-1, (-1, group_size))[..., 0] = -127
    assert torch.equal(int8.dequantize(int8.quantize(codes * 0.5, group_size)), codes * 0.5)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_leading_axes_are_independent(group_size: int) -> None:
    stack = torch.stack([hard_weight(6, 256, seed) for seed in range(3)])
    for module in (int4, int8, *((nf4,) if group_size == 64 else ())):
        packed = module.quantize(stack, group_size)
        assert packed.shape == stack.shape
        for e in range(3):
            assert torch.equal(module.dequantize(packed[e]), module.dequantize(module.quantize(stack[e], group_size)))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(("N", "K"), [(1, 128), (37, 640), (8, 1152)])
@pytest.mark.parametrize("layout", ["bfloat16", "float32", "transposed"])
def test_the_compiled_quantizer_gives_the_same_bits(N: int, K: int, group_size: int, layout: str) -> None:
    weight = hard_weight(N, K)
    wide = weight.float()
    source = {"bfloat16": weight, "float32": wide, "transposed": weight.T.contiguous().T}[layout]
    expected4, (fast4, error4, square4) = int4.quantize(weight, group_size), cpu_quantize.quantize_int4(source, group_size)
    assert torch.equal(fast4.qweight, expected4.qweight)
    assert torch.equal(fast4.scales, expected4.scales)
    assert torch.equal(fast4.zeros, expected4.zeros)
    expected8, (fast8, error8, square8) = int8.quantize(weight, group_size), cpu_quantize.quantize_int8(source, group_size)
    assert torch.equal(fast8.qweight, expected8.qweight)
    assert torch.equal(fast8.scales, expected8.scales)
    for packed, dequantize, error, square in ((expected4, int4.dequantize, error4, square4), (expected8, int8.dequantize, error8, square8)):
        difference = dequantize(packed).double() - wide  # type: ignore[arg-type] # each with its own
        assert error == pytest.approx(float(difference.square().sum()), rel=1e-5, abs=1e-12)
        assert square == pytest.approx(float(wide.double().square().sum()), rel=1e-5)


@given(codes=st.lists(st.integers(0, 15), max_size=70).filter(lambda codes: len(codes) % 2 == 0))
def test_nf4_pack_round_trips_at_every_length(codes: list[int]) -> None:
    packed = nf4.pack(torch.tensor(codes, dtype=torch.uint8))
    assert packed.shape == (len(codes) // 2,)
    assert nf4.unpack(packed, len(codes)).tolist() == codes


def test_nf4_layout_is_the_documented_one() -> None:
    assert nf4.pack(torch.tensor([1, 2, 3, 15], dtype=torch.uint8)).tolist() == [0x12, 0x3F]


@pytest.mark.parametrize("layout", ["bfloat16", "float32", "transposed"])
def test_nf4_takes_the_nearest_value_of_its_table(layout: str) -> None:
    weight = hard_weight(12, 192)
    source = {"bfloat16": weight, "float32": weight.float(), "transposed": weight.T.contiguous().T}[layout]
    packed = nf4.quantize(source)
    blocks = weight.double().unflatten(-1, (-1, 64))
    absmax = blocks.abs().amax(-1, keepdim=True)
    assert torch.equal(packed.absmax.double(), absmax.squeeze(-1))
    distances = (blocks.unsqueeze(-1) - torch.tensor(nf4.VALUES, dtype=torch.float64) * absmax.unsqueeze(-1)).abs()  # [N, K/G, G, 16]
    codes = nf4.unpack(packed.qweight, 192).long().unflatten(-1, (-1, 64))
    chosen = distances.gather(-1, codes.unsqueeze(-1)).squeeze(-1)
    assert (chosen <= distances.amin(-1) + 1e-6 * absmax).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("scale", [1.0, 1e-36, 1e38], ids=["ordinary", "tiny", "huge"])
def test_nf4_dequantizes_to_the_bits_of_bitsandbytes(scale: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    codes = torch.arange(256, dtype=torch.uint8).repeat(3, 2)  # every byte
    weight = nf4.Nf4Weight(codes, (torch.rand(3, 16, generator=generator) + 0.5) * scale, 64)
    dequantized, expected = nf4.dequantize_on_cpu(weight, dtype), nf4.dequantize(weight, dtype)
    assert dequantized.dtype == dtype
    assert torch.equal(dequantized.view(torch.uint8), expected.view(torch.uint8))


def test_nf4_dequantizes_subnormal_numbers_in_float32() -> None:
    weight = nf4.quantize(torch.rand(3, 128, generator=torch.Generator().manual_seed(4)) * 1e-39)
    assert torch.equal(nf4.dequantize_on_cpu(weight, torch.float32), nf4.dequantize(weight))


def test_the_dynamic_map_of_bitsandbytes_is_the_same_on_every_chip() -> None:
    """bitsandbytes computes other last bits on chips without fused multiply-add."""
    ours, theirs = nf4.dynamic_map(), nf4.bitsandbytes_functional().create_dynamic_map()
    assert (ours.shape, ours.dtype) == ((256,), torch.float32)
    assert hashlib.sha256(ours.numpy().tobytes()).hexdigest() == "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"
    assert (ours - theirs).abs().max() <= 2**-24
    exact = [10 ** (e - 6) * (0.1 + 0.9 * (2 * i + 1) / 2 ** (e + 1)) for e in range(7) for i in range(2**e)]
    expected = torch.tensor(sorted([0, 1, *exact, *(-value for value in exact)]), dtype=torch.float64)
    assert ((ours.double() - expected).abs() <= 2**-22 * expected.abs()).all()


# Scales of a matrix: 3, 21, 256, 400, 33,000.
SHAPES = [(3, 64), (7, 192), (64, 256), (100, 256), (2200, 960)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["ordinary", "hard", "zero", "constant"])
def test_double_quantization_gives_the_bits_of_bitsandbytes(shape: tuple[int, int], kind: str) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(5)) * 0.02
    if kind == "hard":
        weight = hard_weight(*shape).float()
    elif kind != "ordinary":
        weight = torch.full(shape, 0.0 if kind == "zero" else -0.75)
    functional, threads = nf4.bitsandbytes_functional(), torch.get_num_threads()
    packed = nf4.quantize(weight)
    try:
        torch.set_num_threads(1)
        codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            double = nf4.Nf4DoubleWeight.compress(packed)
            assert torch.equal(double.qweight.view(-1, 1), codes)
            assert torch.equal(double.absmax.view(-1), state.absmax)
            assert torch.equal(double.nested_absmax, state.state2.absmax)
            assert torch.equal(double.offset, state.offset.view(1)), n
    finally:
        torch.set_num_threads(threads)
    expected = functional.dequantize_4bit(codes, state)
    assert torch.equal(nf4.dequantize(double.expand()).view(torch.int32), expected.view(torch.int32))
    scales = weight.numel() // 64
    assert double.nbytes == weight.numel() // 2 + scales + 4 * -(-scales // 256) + 4


def test_the_offset_does_not_depend_on_the_number_of_threads() -> None:
    generator, threads = torch.Generator().manual_seed(7), torch.get_num_threads()
    matrices = [
        torch.rand(400, 100, generator=generator) for _ in range(12)
    ]  # for half of them, another order of summation gives another last bit
    try:
        torch.set_num_threads(1)
        expected = [float(matrix.view(-1).mean()) for matrix in matrices]
        for n in (2, 3, 8):
            torch.set_num_threads(n)
            assert [float(nf4.compress_absmax(matrix)[2]) for matrix in matrices] == expected
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 3)], ids=str)
def test_double_quantization_is_dequantized_matrix_by_matrix(lead: tuple[int, ...]) -> None:
    weight = torch.randn(*lead, 20, 1024, generator=torch.Generator().manual_seed(6)) * torch.rand(*lead, 1, 1)  # 320 scales each
    packed = nf4.quantize(weight)
    parts = [nf4.compress_absmax(absmax) for absmax in packed.absmax.view(-1, 20, 16)]
    absmax, nested, offset = (torch.stack(part).view(*lead, *part[0].shape) for part in zip(*parts, strict=True))
    dequantized = nf4.dequantize_absmax(absmax, nested, offset)
    assert dequantized.shape == packed.absmax.shape
    by_matrix = [nf4.dequantize_absmax(*part) for part in parts]
    assert torch.equal(dequantized.view(-1, 20, 16), torch.stack(by_matrix))
    error = (dequantized - packed.absmax).view(-1, 320)
    for change, scales in zip(error, packed.absmax.view(-1, 320), strict=True):
        largest = (scales - scales.mean()).abs().max()
        assert 0 < change.abs().max() <= 0.9 / 64 / 2 * 1.01 * largest + 1e-7  # half of the map's widest step


def test_an_infinite_sum_of_scales_is_refused() -> None:
    with pytest.raises(FormatError, match=r"must stay below 3\.4e38"):
        nf4.compress_absmax(torch.full((2, 2), 3e38))


def test_importing_bitsandbytes_is_lazy_silent_and_offline(tmp_path: Path) -> None:
    """On chips with bfloat16 instructions, bitsandbytes would fetch code through the package `kernels`, or log that it is missing."""
    (tmp_path / "kernels.py").write_text("def get_kernel(*args, **options): raise SystemExit('fetched from the hub')")
    check = (
        "import logging, sys; logging.basicConfig(); import torch, dbrx_q.kernels.linear, dbrx_q.kernels.formats.nf4 as nf4\n"
        "assert 'bitsandbytes' not in sys.modules\n"
        "nf4.dequantize_on_cpu(nf4.quantize(torch.ones(2, 64)), torch.float32)\n"
        "assert 'bitsandbytes' in sys.modules and 'kernels' not in sys.modules; import kernels"
    )
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    process = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


def test_stated_bits_per_weight_are_true() -> None:
    weight = torch.randn(64, 6144)
    assert 8 * nf4.quantize(weight).nbytes / weight.numel() == 4.5
    for group_size, bits in ((32, 4 + 20 / 32), (64, 4 + 20 / 64), (128, 4 + 20 / 128)):
        assert 8 * int4.quantize(weight, group_size).nbytes / weight.numel() == bits
    for group_size, bits in ((32, 8.5), (64, 8.25), (128, 8.125)):
        assert 8 * int8.quantize(weight, group_size).nbytes / weight.numel() == bits


@pytest.mark.parametrize("module", [int4, int8], ids=["int4", "int8"])
@pytest.mark.parametrize(
    ("weight", "group_size", "message"),
    [
        (torch.zeros(2, 96), 64, "must divide.*64.*96"),
        (torch.zeros(2, 96), 48, "one of 32, 64, 128; found 48"),
        (torch.full((2, 64), torch.nan), 64, "finite; found nan"),
        (torch.full((2, 64), torch.inf), 64, "finite; found inf"),
        (torch.full((2, 64), 1e38), 64, "65504"),
    ],
    ids=["divides", "offered", "nan", "inf", "range"],
)
def test_weights_that_int4_and_int8_refuse(module: object, weight: torch.Tensor, group_size: int, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        module.quantize(weight, group_size)  # type: ignore[attr-defined] # both have it


@pytest.mark.parametrize(
    ("weight", "group_size", "message"),
    [
        (torch.zeros(2, 96), 64, "must divide.*64.*96"),
        (torch.zeros(2, 128), 128, "one of 64; found 128"),
        (torch.full((2, 64), torch.nan), 64, "finite; found nan"),
        (torch.full((2, 64), -torch.inf), 64, "finite; found -inf"),
    ],
    ids=["divides", "offered", "nan", "inf"],
)
def test_weights_that_nf4_refuses(weight: torch.Tensor, group_size: int, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        nf4.quantize(weight, group_size)


def test_gathered_embedding_rows_equal_the_dequantized_rows() -> None:
    packed = int8.quantize(torch.randn(50, 128), 64)
    rows = torch.tensor([3, 3, 49, 0])
    assert torch.equal(gather_rows(packed, rows, torch.float32), int8.dequantize(packed)[rows])
