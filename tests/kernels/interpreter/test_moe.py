"""`moe_experts` in Triton's interpreter compared with the float32 reference, in both regimes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import triton
import triton.language as tl

from dbrx_q.kernels.backend import Backend
from dbrx_q.kernels.formats import int4, int8, nf4
from dbrx_q.kernels.formats.expert_weights import ExpertWeights
from dbrx_q.kernels.formats.weights import Weight, dequantize
from dbrx_q.kernels.moe import moe_experts
from dbrx_q.kernels.triton import moe_prefill as triton_moe_prefill
from dbrx_q.kernels.triton.moe_prefill import _tile_of
from dbrx_q.kernels.triton.tiles import MATVEC_TOKENS

MODULES = {"int4": int4, "int8": int8, "nf4": nf4}
MANY = MATVEC_TOKENS + 4
HOLES = (1, -1, 0, 2)


@dataclass(frozen=True)
class Case:
    """One call."""

    formats: tuple[str, str, str]
    """Of w1, v1 and w2."""
    T: int
    """Tokens."""
    slots: tuple[int, ...] | None = None
    """Slot of each expert, -1 for none; None: all experts, in order."""
    dtype: torch.dtype = torch.float32
    """Of activations and plain weights."""
    size: int = 0
    """Width and hidden width; 0 for sizes that groups divide and tiles do not."""

    @property
    def width(self) -> int:
        return self.size or (128 if "g128" in self.formats[0] else 64)

    @property
    def hidden(self) -> int:
        return self.size or (128 if "g128" in self.formats[2] else 96 if "g32" in self.formats[2] else 64)

    def __str__(self) -> str:
        holes = "" if self.slots is None else "-holes"
        size = f"-{self.size}" if self.size else ""
        return f"{'+'.join(self.formats)}-T{self.T}{size}{holes}-{str(self.dtype).removeprefix('torch.')}"


FORMATS = [
    ("int4g32", "int4g32", "int4g32"),
    ("int4g64", "int4g64", "int4g64"),
    ("int4g128", "int4g128", "int4g128"),
    ("int8g32", "int8g32", "int8g32"),
    ("int8g64", "int8g64", "int8g64"),
    ("int8g128", "int8g128", "int8g128"),
    ("nf4g64", "nf4g64", "nf4g64"),
    ("plain", "plain", "plain"),
    ("int4g64", "int8g32", "nf4g64"),
    ("plain", "int4g64", "plain"),
    ("nf4g64", "int4g32", "int4g64"),
]
CASES = (
    [Case(formats, T) for formats in FORMATS for T in (1, MANY)]
    + [Case(FORMATS[1], T) for T in (0, 9, MATVEC_TOKENS, MATVEC_TOKENS + 1)]
    + [Case(FORMATS[i], T, HOLES) for i in (1, 7) for T in (1, 5, MANY)]
    + [Case(FORMATS[i], T, HOLES, torch.float16) for i in (1, 4, 6, 7) for T in (2, MANY)]
    + [Case(FORMATS[i], 2, HOLES, torch.float16) for i in (0, 2)]
    + [Case(FORMATS[i], T, size=size) for i, T, size in ((1, 2, 320), (1, MANY, 192), (4, 2, 192))]
    + [Case(FORMATS[i], 2, None, torch.float16, size) for i, size in ((0, 128), (1, 256))]  # scales of a step in one word
)
E, A = 4, 2


def weight_in(fmt: str, S: int, N: int, K: int, seed: int, dtype: torch.dtype) -> Weight:
    stack = torch.randn(S, N, K, generator=torch.Generator().manual_seed(seed)) * 0.1
    if fmt == "plain":  # w2 as a checkpoint stores it, a transposed view
        return stack.to(dtype) if N > K else stack.transpose(1, 2).contiguous().transpose(1, 2).to(dtype)
    kind, group_size = fmt.split("g")
    return MODULES[kind].quantize(stack, int(group_size))  # type: ignore[no-any-return, attr-defined] # all have it


def layer_of(case: Case, n_experts: int = E) -> ExpertWeights:
    S = n_experts if case.slots is None else max(case.slots) + 1
    shapes = (case.hidden, case.width), (case.hidden, case.width), (case.width, case.hidden)
    w1, v1, w2 = (weight_in(fmt, S, *shape, seed, case.dtype) for seed, (fmt, shape) in enumerate(zip(case.formats, shapes, strict=True)))
    return ExpertWeights(w1, v1, w2, None if case.slots is None else torch.tensor(case.slots, dtype=torch.int32))


def inputs(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(case.T)
    x = torch.randn(case.T, case.width, generator=generator).to(case.dtype)
    experts = torch.rand(case.T, E, generator=generator).argsort(-1)[:, :A]
    return x, experts, torch.rand(case.T, A, generator=generator)


def check(x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, layer: ExpertWeights) -> torch.Tensor:
    """The result, after comparing it and the counts of missing experts with the reference."""
    counted, expected = (torch.zeros(layer.n_experts, dtype=torch.int32) for _ in range(2))
    truth = moe_experts(x.float(), experts, weights, layer, missing=expected, backend=Backend.REFERENCE)
    y = moe_experts(x, experts, weights, layer, missing=counted)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    assert torch.equal(counted, expected)
    if not len(x):
        return y
    floor = 1e-5 * float(truth.abs().max())
    error = (y.float() - truth).abs().max()
    if x.dtype == torch.float32:
        assert error <= floor
    else:
        assert error <= 2 * in_torch(x, experts, weights, layer).sub(truth).abs().max() + floor
    return y


def in_torch(x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, layer: ExpertWeights) -> torch.Tensor:
    """The experts computed by torch in the dtype of `x`, as float32."""
    w1, v1, w2 = (dequantize(w, x.dtype) for w in (layer.w1, layer.v1, layer.w2))
    y = torch.zeros_like(x)
    for t, chosen in enumerate(experts.tolist()):
        for a, e in enumerate(chosen):
            slot = e if layer.slots is None else int(layer.slots[e])
            if slot >= 0:
                h = torch.nn.functional.silu(w1[slot] @ x[t]) * (v1[slot] @ x[t])
                y[t] += (w2[slot] @ h) * weights[t, a].to(x.dtype)
    return y.float()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_experts_agree_with_the_reference(case: Case) -> None:
    check(*inputs(case), layer_of(case))


@pytest.mark.parametrize("joined", [False, True], ids=["two products", "one product"])
@pytest.mark.parametrize("formats", [FORMATS[i] for i in (0, 1, 6, 8, 10)], ids="+".join)
def test_activations_in_halves_agree_with_the_reference(
    formats: tuple[str, str, str], joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_moe_prefill, "_halves_serve", lambda chip: True)
    monkeypatch.setattr(triton_moe_prefill, "_one_product", lambda tiles: joined)
    case = Case(formats, MANY, HOLES)
    check(*inputs(case), layer_of(case))


def test_long_prompts_are_computed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_moe_prefill, "_CHUNK", 12)
    case = Case(FORMATS[1], MANY, HOLES)
    check(*inputs(case), layer_of(case))


@pytest.mark.parametrize("T", [4, MANY])
def test_experts_without_tokens_are_not_read(T: int) -> None:
    case = Case(FORMATS[1], T)
    layer = layer_of(case)
    for packed in (layer.w1, layer.v1, layer.w2):
        assert isinstance(packed, int4.Int4Weight)
        packed.scales[1:3] = torch.nan
    x, _, weights = inputs(case)
    check(x, torch.tensor([[3, 0]]).repeat(T, 1), weights, layer)


@pytest.mark.parametrize("T", [2, MANY])
def test_every_token_on_every_expert(T: int) -> None:
    case = Case(FORMATS[0], T)
    x, _, _ = inputs(case)
    generator = torch.Generator().manual_seed(0)
    check(x, torch.rand(T, E, generator=generator).argsort(-1), torch.rand(T, E, generator=generator), layer_of(case))


@pytest.mark.parametrize("T", [3, MANY])
def test_tokens_whose_experts_are_all_missing_get_zero(T: int) -> None:
    case = Case(FORMATS[1], T, (-1, -1, 0, 1))
    x, experts, weights = inputs(case)
    experts[0] = experts[2] = torch.tensor([1, 0])
    y = check(x, experts, weights, layer_of(case))
    assert not y[0].any()
    assert not y[2].any()
    everything = Case(FORMATS[1], T, (-1, 0, -1, -1))
    experts[:] = torch.tensor([0, 2])
    assert not check(x, experts, weights, layer_of(everything)).any()


@pytest.mark.parametrize("T", [2, MANY])
def test_missing_pairs_are_added_to_earlier_counts(T: int) -> None:
    case = Case(FORMATS[1], T, HOLES)
    x, experts, weights = inputs(case)
    missing = torch.full((E,), 100, dtype=torch.int32)
    moe_experts(x, experts, weights, layer_of(case), missing=missing)
    counts = experts.flatten().bincount(minlength=E)
    assert missing.tolist() == [100 + (int(n) if slot < 0 else 0) for n, slot in zip(counts, HOLES, strict=True)]


@pytest.mark.parametrize("T", [2, MANY])
@pytest.mark.parametrize("fmt", ["int4g32", "int4g64", "int8g64", "nf4g64"])
def test_identity_activations_give_the_dequantized_down_projection(fmt: str, T: int) -> None:
    """The gate is so large that silu is the identity, and up selects one row: h is one-hot, and y is a column of w2."""
    D = F = 64
    down = MODULES[fmt.split("g")[0]].quantize(torch.randn(1, D, F), int(fmt.split("g")[1]))  # type: ignore[attr-defined] # all have it
    identity = torch.eye(F, D)[None]
    layer = ExpertWeights(identity * 64, identity / 64, down)
    x = torch.eye(D)[:T]
    y = moe_experts(x, torch.zeros(T, 1, dtype=torch.int64), torch.ones(T, 1), layer)
    assert torch.equal(y, dequantize(down)[0].T[:T])


@pytest.mark.parametrize("formats", [FORMATS[0], FORMATS[1]], ids="+".join)
def test_bits_of_a_token_do_not_depend_on_the_others(formats: tuple[str, str, str]) -> None:
    case = Case(formats, 4, dtype=torch.float16)
    layer, (x, experts, weights) = layer_of(case), inputs(case)
    y = moe_experts(x, experts, weights, layer)
    x[1:], experts[1:] = torch.nan, experts[0]
    assert torch.equal(moe_experts(x, experts, weights, layer)[0], y[0])


def test_repeated_calls_give_the_same_bits() -> None:
    case = Case(FORMATS[1], 5)
    layer, arguments = layer_of(case), inputs(case)
    assert torch.equal(moe_experts(*arguments, layer), moe_experts(*arguments, layer))


@triton.jit
def tiles_kernel(bounds, slots, out):  # type: ignore[no-untyped-def] # triton compiles the source
    expert, row, first, end = _tile_of(bounds, slots, 3, 5, 8, 8, True)
    place = out + tl.program_id(0) * 4
    tl.store(place, expert)
    tl.store(place + 1, row)
    tl.store(place + 2, first)
    tl.store(place + 3, end)


def test_every_tile_of_a_resident_expert_has_one_program() -> None:
    bounds = [0, 0, 150, 153, 190, 191]  # none, more tiles than run together, missing, some, one
    programs = (191 // 8 + 1 + 5) * 3
    out = torch.full((programs, 4), -7, dtype=torch.int32)
    slots = torch.tensor([0, 1, -1, 2, 3], dtype=torch.int32)
    tiles_kernel[(programs,)](torch.tensor(bounds, dtype=torch.int32), slots, out)  # type: ignore[type-var] # a grid
    expected = [(e, row, first, bounds[e + 1]) for e in (1, 3, 4) for row in range(3) for first in range(bounds[e], bounds[e + 1], 8)]
    assert sorted(tuple(tile) for tile in out.tolist() if tile[0] != 8) == sorted(expected)
