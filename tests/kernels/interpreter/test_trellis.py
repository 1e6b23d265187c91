"""Trellis formats in the interpreter: the rotation, levels, `linear` and `moe_experts` in both regimes, compared with the reference.

Streams are random bits, which every code decodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import triton
import triton.language as tl

from dbrx_q.kernels.backend import Backend
from dbrx_q.kernels.formats.expert_weights import ExpertWeights
from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight
from dbrx_q.kernels.formats.registry import TensorFormat
from dbrx_q.kernels.formats.rotation import rotate
from dbrx_q.kernels.formats.trellis import FORMATS, TrellisWeight, levels_of
from dbrx_q.kernels.formats.trellis_codes import CODES
from dbrx_q.kernels.formats.weights import dequantize
from dbrx_q.kernels.linear import linear, linear_reference
from dbrx_q.kernels.moe import moe_experts
from dbrx_q.kernels.triton import moe_prefill as triton_moe_prefill
from dbrx_q.kernels.triton.tiles import MATVEC_TOKENS
from dbrx_q.kernels.triton.trellis import code_constant, level_table, rotated, table_alignment, trellis_tile

NAMES = [record.name for record in FORMATS]
MANY = MATVEC_TOKENS + 4
HOLES = (1, -1, 0, 2)
E, A = 4, 2


def random_weight(fmt: str, *shape: int) -> QuantizedWeight:
    """A weight [..., N, K] in a format spelled as `trellis2:128`, with random streams and scales, or of normal values in another format."""
    generator = torch.Generator().manual_seed(shape[-2])
    kind = TensorFormat.parse(fmt)
    if kind.record.trellis is None:
        return kind.record.quantize(torch.randn(*shape, generator=generator) * 0.1, kind.group_size)
    streams, scales = kind.parts(*shape[-2:])
    codes = torch.randint(0, 256, (*shape[:-2], *streams.shape), dtype=torch.uint8, generator=generator)
    return kind.load({"qweight": codes, "scales": (torch.rand(*shape[:-2], *scales.shape, generator=generator) * 2e-3 + 1e-3).half()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("G", [128, 64])
def test_activations_are_rotated_in_float32(G: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 17 * 128, generator=torch.Generator().manual_seed(G)).to(dtype)  # more blocks than one program takes
    assert torch.equal(rotated(x, G), rotate(x, G).to(dtype))


@triton.jit
def levels_kernel(q, table, out, N, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CODE: tl.constexpr):  # type: ignore[no-untyped-def] # triton compiles the source
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    for k in range(0, K, BK):
        columns = k + tl.arange(0, BK)
        tile = trellis_tile(q, table, rows, k, N, K, BK, CODE, False)
        tl.store(out + rows[:, None] * K + columns[None, :], tile, mask=(rows < N)[:, None] & (columns < K)[None, :])


@pytest.mark.parametrize("rows", [128, 256])
@pytest.mark.parametrize("name", NAMES)
def test_levels_are_those_of_the_format(name: str, rows: int) -> None:
    weight = random_weight(f"{name}:64", 300, 192)
    assert isinstance(weight, TrellisWeight)
    table = level_table(weight.code, torch.float32, weight.device)
    out = torch.full(weight.shape, torch.nan)
    constants = {"K": 192, "BN": rows, "BK": 128, "CODE": code_constant(weight.code)}
    levels_kernel[(-(-300 // rows),)](weight.qweight.view(torch.int32), table, out, 300, **constants)  # type: ignore[type-var] # a grid
    assert torch.equal(out, levels_of(weight).float())


def check_linear(weight: QuantizedWeight, x: torch.Tensor, clip: float | None = None, residual: torch.Tensor | None = None) -> None:
    out = linear(x, weight, clip=clip, residual=residual)
    product, by_torch = linear_reference(x, weight), x @ dequantize(weight, x.dtype).T
    if clip is not None:
        assert (product.abs() > clip).any()
        product, by_torch = product.clamp(-clip, clip), by_torch.clamp(-clip, clip)
    if residual is not None:
        product, by_torch = product + residual, by_torch + residual
    floor = 1e-6 * x.shape[-1] ** 0.5 * linear_reference(x, weight).abs().max()
    assert (out.dtype, out.shape) == (x.dtype, product.shape)
    assert (out.float() - product).abs().max() <= 2 * (by_torch.float() - product).abs().max() + floor


@pytest.mark.parametrize("T", [1, 33])
@pytest.mark.parametrize("name", NAMES)
def test_linear_agrees_with_the_reference(name: str, T: int) -> None:
    check_linear(random_weight(f"{name}:64", 200, 192), torch.randn(T, 192, generator=torch.Generator().manual_seed(T)))


@pytest.mark.parametrize("T", [3, MATVEC_TOKENS, MANY])
def test_linear_in_float16(T: int) -> None:
    generator = torch.Generator().manual_seed(T)
    x, residual = (torch.randn(T, size, generator=generator).half() for size in (256, 70))
    check_linear(random_weight("trellis3:128", 70, 256), x, 1.0, residual)


def test_a_split_reduction() -> None:
    check_linear(random_weight("trellis2:128", 40, 2048), torch.randn(2, 2048, generator=torch.Generator().manual_seed(0)), 3.0)


@dataclass(frozen=True)
class Case:
    """One call of `moe_experts`."""

    formats: tuple[str, str, str]
    """Of w1, v1 and w2."""
    T: int
    """Tokens."""
    slots: tuple[int, ...] | None = None
    """Slot of each expert, -1 for none; None: all experts, in order."""
    dtype: torch.dtype = torch.float32
    """Of activations."""

    def __str__(self) -> str:
        return f"{'+'.join(self.formats)}-T{self.T}{'' if self.slots is None else '-holes'}-{str(self.dtype).removeprefix('torch.')}"


MIXED = [
    ("trellis2:64", "trellis2:64", "trellis3:128"),
    ("trellis2:64", "trellis3:128", "int4:64"),
    ("trellis4:128", "int4:64", "trellis4:64"),
    ("int4:64", "nf4:64", "trellis3-fast:64"),
]
CASES = (
    [Case((f"{name}:128",) * 3, T) for name in NAMES for T in (2, MANY) if T == 2 or "fast" not in name]
    + [Case(formats, T) for formats in MIXED for T in (2, MANY)]
    + [Case(("trellis2:128",) * 3, T, HOLES, dtype) for T, dtype in ((1, torch.float32), (5, torch.float16), (MANY, torch.float16))]
    + [Case(("trellis4:64",) * 3, 0)]
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_experts_agree_with_the_reference(case: Case) -> None:
    check_experts(case)


@pytest.mark.parametrize("formats", MIXED[1:], ids="+".join)
def test_experts_beside_activations_in_halves(formats: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Hopper, where 4-bit formats take them."""
    monkeypatch.setattr(triton_moe_prefill, "_halves_serve", lambda chip: True)
    check_experts(Case(formats, MANY))


def check_experts(case: Case) -> None:
    D, F = 128, 256
    S = E if case.slots is None else max(case.slots) + 1
    matrices = (random_weight(fmt, S, *shape) for fmt, shape in zip(case.formats, ((F, D), (F, D), (D, F)), strict=True))
    layer = ExpertWeights(*matrices, None if case.slots is None else torch.tensor(case.slots, dtype=torch.int32))
    generator = torch.Generator().manual_seed(case.T)
    x = torch.randn(case.T, D, generator=generator).to(case.dtype)
    experts, weights = torch.rand(case.T, E, generator=generator).argsort(-1)[:, :A], torch.rand(case.T, A, generator=generator)
    counted, expected = (torch.zeros(E, dtype=torch.int32) for _ in range(2))
    truth = moe_experts(x.float(), experts, weights, layer, missing=expected, backend=Backend.REFERENCE)
    y = moe_experts(x, experts, weights, layer, missing=counted)
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    assert torch.equal(counted, expected)
    if case.T:
        assert (y.float() - truth).abs().max() <= (1e-5 if case.dtype == torch.float32 else 3e-3) * truth.abs().max()


def test_a_table_begins_where_the_bits_that_a_lookup_replaces_are_zero() -> None:
    for code in CODES.values():
        replaced = 256 if code_constant(code)[1] == 2 else 2 << code.index_bits  # the lowest byte of the address, or a sum
        assert table_alignment(code) % replaced == 0
        assert 2 * len(code.levels) <= replaced
