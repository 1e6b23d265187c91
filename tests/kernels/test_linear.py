"""`linear` on the cpu backend compared with the float32 reference, with dot products and with tiles."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dbrx_q.kernels.backend import Backend, pick
from dbrx_q.kernels.cpu import format_kernels
from dbrx_q.kernels.cpu import linear as cpu
from dbrx_q.kernels.cpu.choice import Regime, choose, matmul, padded_rows, tile_bytes
from dbrx_q.kernels.formats import int4, int8, nf4
from dbrx_q.kernels.formats.errors import DbrxError, FormatError
from dbrx_q.kernels.formats.int4 import Int4Weight
from dbrx_q.kernels.formats.nf4 import Nf4Weight
from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight
from dbrx_q.kernels.formats.weights import dequantize
from dbrx_q.kernels.linear import linear, linear_reference

MODULES = {"int4": int4, "int8": int8, "nf4": nf4}


@dataclass(frozen=True)
class Case:
    """One product."""

    T: int
    """Tokens."""
    N: int
    """Output features."""
    K: int
    """Input features. 96 and 160 are not multiples of the compiled kernels' block, 10752 / 64 groups not of their chunk."""

    def __str__(self) -> str:
        return f"T{self.T}-N{self.N}-K{self.K}"


CASES = [
    Case(0, 40, 128),
    Case(1, 1, 128),
    Case(1, 33, 1152),
    Case(3, 40, 256),
    Case(4, 31, 384),
    Case(7, 100, 640),
    Case(11, 513, 256),
    Case(40, 33, 128),
    Case(300, 520, 640),
    Case(2, 24, 96),
    Case(20, 24, 160),
    Case(1, 5, 10752),
]


def packed_weight(fmt: str, group_size: int, N: int, K: int, seed: int = 0) -> QuantizedWeight:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) * 0.05 + 0.01
    return MODULES[fmt].quantize(weight, group_size)  # type: ignore[no-any-return, attr-defined] # all have it


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new tensors with NaN, so that memory that is never written shows."""
    real = torch.empty

    def empty(*args: object, **kwargs: object) -> torch.Tensor:
        out: torch.Tensor = real(*args, **kwargs)  # type: ignore[call-overload] # forwards its arguments
        return out.fill_(torch.nan) if out.is_floating_point() else out.fill_(77)

    monkeypatch.setattr(torch, "empty", empty)


PRODUCTS = [(case, fmt, G) for case in CASES for fmt, module in MODULES.items() for G in module.GROUP_SIZES if case.K % G == 0]  # type: ignore[attr-defined] # all have it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("case", "fmt", "group_size"), PRODUCTS, ids=str)
def test_linear_agrees_with_the_reference(
    case: Case, fmt: str, group_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = packed_weight(fmt, group_size, case.N, case.K)
    x = torch.randn(case.T, case.K, generator=torch.Generator().manual_seed(1)).to(dtype)
    truth = linear_reference(x, weight)
    poison(monkeypatch)
    out = linear(x, weight)
    assert out.dtype == dtype
    assert out.shape == truth.shape
    if not case.T:
        return
    error = (out.float() - truth).abs().max()
    torch_error = (x @ dequantize(weight, dtype).T).float().sub(truth).abs().max()
    # 16-bit activations: half a step of 2^-15 of a block's largest value, on average far less than its K-fold.
    floor = 2**-16 * x.float().abs().max() * dequantize(weight).abs().max() * case.K**0.5 * 4
    assert error <= 2 * torch_error + floor


def foreign(weight: QuantizedWeight) -> QuantizedWeight:
    """The weight with every other scale negative and, in int8, with codes of -128, as files of other programs have them."""
    parts = {name: part.clone() for name, part in weight.parts.items()}
    parts["scales"][:, ::2] *= -1
    if weight.format == "int8":
        parts["qweight"][::3, ::5] = -128
    return type(weight).of(parts, weight.group_size)


@pytest.mark.parametrize("from_file", [False, True], ids=["ours", "foreign"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("fmt", ["int4", "int8"])
@pytest.mark.parametrize("way", ["one_token", "many_tokens", "tiles"])
def test_identity_activations_give_the_dequantized_weight(fmt: str, group_size: int, way: str, from_file: bool) -> None:
    K = 256
    weight = packed_weight(fmt, group_size, 48, K)
    if from_file:
        weight = foreign(weight)
    identity, expected = torch.eye(K), dequantize(weight).T
    if way == "tiles":
        choice = choose(K, K, torch.float32, bfloat16_matmul=True, amx=False)
        assert torch.equal(cpu._tiled(cpu._tile_order(identity, weight), weight, choice), expected)
        return
    out = torch.cat([linear(part, weight) for part in identity.split(1 if way == "one_token" else K)])
    if way == "many_tokens" and cpu.choice_for(K, identity, weight).regime is Regime.TILES:
        assert torch.equal(out, expected)
    else:  # 1 is a whole number of steps, and zero-points are subtracted once per group: two float32 roundings
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("T", [1, 192])
def test_identity_activations_give_the_dequantized_nf4_weight(T: int, dtype: torch.dtype) -> None:
    weight = packed_weight("nf4", 64, 1100, 192)  # more rows than one tile
    out = torch.cat([linear(part, weight) for part in torch.eye(192, dtype=dtype).split(T)])
    assert torch.equal(out, dequantize(weight, dtype).T)


def test_an_nf4_weight_is_dequantized_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    real = format_kernels.dequantize_on_cpu

    def dequantize_rows(weight: Nf4Weight, dtype: torch.dtype) -> torch.Tensor:
        rows.append(weight.shape[0])
        return real(weight, dtype)

    monkeypatch.setitem(format_kernels.DEQUANTIZERS, "nf4", dequantize_rows)
    linear(torch.ones(1, 64), packed_weight("nf4", 64, 2100, 64))
    assert sum(rows) == 2100
    assert max(rows) <= 1024


def test_a_token_gives_the_same_bits_in_any_small_batch() -> None:
    weight = packed_weight("int4", 64, 70, 640)
    x = torch.randn(9, 640)
    alone = torch.cat([linear(row[None], weight) for row in x])
    for T in range(2, 10):
        assert torch.equal(linear(x[:T], weight), alone[:T])


def test_results_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    code = """
import torch
from dbrx_q.kernels.formats import int4
from dbrx_q.kernels.linear import linear
torch.manual_seed(1)
weight, x = int4.quantize(torch.randn(4096, 1024), 64), torch.randn(2, 1024)
outs = []
for n in (1, 2):
    torch.set_num_threads(n)
    outs.append(linear(x, weight))
    print(torch.get_num_threads())
print(torch.equal(*outs))
"""
    environment = os.environ | {"OMP_NUM_THREADS": "2", "NUMBA_NUM_THREADS": "2"}
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert process.stdout.split() == ["1", "2", "True"]


def test_the_first_product_does_not_change_torchs_thread_count(tmp_path: Path) -> None:
    code = """
import torch
from dbrx_q.kernels.formats import int4
from dbrx_q.kernels.linear import linear
before = torch.get_num_threads()
linear(torch.ones(1, 256), int4.quantize(torch.ones(64, 256), 64))
print(before, torch.get_num_threads())
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "2"}
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert process.stdout.split() == ["1", "1"]


@pytest.mark.parametrize("T", [1, 40])
def test_nan_activations_give_nan(T: int) -> None:
    x = torch.ones(T, 256)
    x[0, 5] = torch.nan
    assert linear(x, packed_weight("int4", 64, 8, 256))[0].isnan().all()


@pytest.mark.parametrize("T", [1, 40])
def test_parts_need_not_be_contiguous(T: int) -> None:
    weight = packed_weight("int4", 64, 40, 256)
    assert isinstance(weight, Int4Weight)
    strided = Int4Weight(weight.qweight.T.contiguous().T, weight.scales, weight.zeros, 64)
    x = torch.randn(T, 256)
    assert torch.equal(linear(x, strided), linear(x, weight))
    other = packed_weight("nf4", 64, 40, 256)
    assert isinstance(other, Nf4Weight)
    strided_nf4 = Nf4Weight(other.qweight.T.contiguous().T, other.absmax.T.contiguous().T, 64)
    assert torch.equal(linear(x, strided_nf4), linear(x, other))


def test_a_plain_weight_is_multiplied_by_torch() -> None:
    x, weight = torch.randn(3, 20), torch.randn(7, 20)
    assert torch.equal(linear(x, weight), x @ weight.T)


def test_leading_axes_are_kept() -> None:
    weight = packed_weight("int8", 64, 16, 128)
    x = torch.randn(2, 3, 128)
    assert torch.equal(linear(x, weight).view(6, 16), linear(x.view(6, 128), weight))


def test_few_tokens_use_dot_products_and_many_use_tiles() -> None:
    few = choose(1, 6144, torch.bfloat16, bfloat16_matmul=True, amx=False)
    many = choose(512, 6144, torch.bfloat16, bfloat16_matmul=True, amx=False)
    assert few.regime is Regime.INTEGER
    assert many.regime is Regime.TILES
    assert many.tile_dtype == torch.bfloat16
    assert choose(512, 6144, torch.bfloat16, bfloat16_matmul=False, amx=False).tile_dtype == torch.float32
    assert choose(512, 6144, torch.float32, bfloat16_matmul=True, amx=True).tile_dtype == torch.float32
    assert choose(1, 96, torch.bfloat16, bfloat16_matmul=True, amx=True).regime is Regime.TILES
    assert choose(1, 6144, torch.bfloat16, bfloat16_matmul=True, amx=True, packed=False).regime is Regime.TILES


def test_many_tokens_of_bfloat16_use_amx() -> None:
    assert choose(512, 6144, torch.bfloat16, bfloat16_matmul=True, amx=True).regime is Regime.AMX
    assert choose(1, 6144, torch.bfloat16, bfloat16_matmul=True, amx=True).regime is Regime.INTEGER
    assert choose(512, 6144, torch.float32, bfloat16_matmul=True, amx=True).regime is Regime.TILES
    wide = choose(512, 6144, torch.float32, bfloat16_matmul=True, amx=True, byte_products=True, wide_byte_products=True)
    assert (wide.regime, wide.wide) == (Regime.INTEGER, True)
    assert choose(512, 96, torch.bfloat16, bfloat16_matmul=True, amx=True).regime is Regime.TILES


def test_products_are_padded_to_few_row_counts() -> None:
    """oneDNN compiles and caches a kernel for every number of rows."""
    assert [padded_rows(T) for T in (0, 1, 2, 3, 16, 17, 33, 128, 129, 512, 513)] == [0, 1, 2, 4, 16, 32, 48, 128, 144, 512, 576]
    assert all(0 <= padded_rows(T) - T < max(16, T / 8) for T in range(4096))
    assert all(padded_rows(padded_rows(T)) == padded_rows(T) for T in range(4096))
    assert len({padded_rows(T) for T in range(1, 513)}) <= 28


@pytest.mark.parametrize("T", [0, 1, 5, 19, 200])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_padding_rows_do_not_change_a_product(T: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(T)
    x, weight = (torch.randn(rows, 128, generator=generator).to(dtype) for rows in (T, 24))
    product = matmul(x, weight)
    assert product.shape == (T, 24)
    torch.testing.assert_close(product.float(), (x.double() @ weight.double().T).float(), rtol=2**-7, atol=1e-3)


def test_dequantized_tiles_take_the_planned_memory() -> None:
    weight = packed_weight("int8", 64, 1500, 256)
    sizes: list[int] = []
    real = torch.empty
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "empty", lambda *shape, **options: (sizes.append(shape[0] * shape[1]), real(*shape, **options))[1])
        cpu._tiled(torch.zeros(100, 256), weight, choose(100, 256, torch.float32, bfloat16_matmul=True, amx=False))
    assert max(sizes[1:]) * 4 == tile_bytes(1500, 256)


def test_activations_of_another_width_are_refused() -> None:
    with pytest.raises(FormatError, match=r"as many features.*found \[2, 64\] and \[33, 128\]"):
        linear(torch.zeros(2, 64), packed_weight("int4", 64, 33, 128))


def test_a_device_without_kernels_is_refused() -> None:
    assert pick(torch.device("cpu")) is Backend.CPU
    with pytest.raises(DbrxError, match="found 'meta'"):
        pick(torch.device("meta"))
