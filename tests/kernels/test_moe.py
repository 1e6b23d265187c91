"""`route` and `moe_experts` on the cpu backend compared with the float32 reference."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from dbrx_q.kernels.backend import Backend
from dbrx_q.kernels.cpu.moe import ExpertOutputs
from dbrx_q.kernels.formats import int4, int8
from dbrx_q.kernels.formats.expert_weights import ExpertWeights
from dbrx_q.kernels.formats.weights import Weight
from dbrx_q.kernels.moe import moe_experts
from dbrx_q.kernels.router import route

E, F, D, A = 16, 384, 256, 4


@dataclass(frozen=True)
class Case:
    """One call."""

    formats: tuple[str, str, str]
    """Of w1, v1 and w2."""
    T: int
    """Tokens."""

    def __str__(self) -> str:
        return f"{'+'.join(self.formats)}-T{self.T}"


def weight_in(fmt: str, N: int, K: int, seed: int) -> Weight:
    stack = torch.randn(E, N, K, generator=torch.Generator().manual_seed(seed)) * 0.06
    if fmt == "plain":
        return stack
    kind, group_size = fmt.split("g")
    return (int4 if kind == "int4" else int8).quantize(stack, int(group_size))


def layer_in(formats: tuple[str, str, str]) -> ExpertWeights:
    w1, v1, w2 = formats
    return ExpertWeights(weight_in(w1, F, D, 0), weight_in(v1, F, D, 1), weight_in(w2, D, F, 2))


def inputs(T: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(T)
    x = torch.randn(T, D, generator=generator).to(dtype)
    routing = route(x, torch.randn(E, D, generator=generator), A, 1.0)
    return x, routing.experts, routing.weights


FORMATS = [
    ("int4g64", "int4g64", "int4g64"),
    ("int4g32", "int4g32", "int4g128"),
    ("int8g64", "int8g64", "int8g128"),
    ("int4g64", "int4g32", "int8g32"),
    ("int8g64", "int4g64", "int4g64"),
    ("plain", "plain", "plain"),
    ("int4g64", "plain", "int8g64"),
]
CASES = [Case(formats, T) for formats in FORMATS for T in (0, 1, 5, 64, 300)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_experts_agree_with_the_reference(case: Case) -> None:
    layer = layer_in(case.formats)
    x, experts, weights = inputs(case.T)
    truth = moe_experts(x, experts, weights, layer, backend=Backend.REFERENCE)
    out = moe_experts(x, experts, weights, layer)
    assert out.shape == x.shape
    if case.T:
        assert (out - truth).abs().max() <= 2e-4 * truth.abs().max()


@pytest.mark.parametrize("formats", FORMATS[:3], ids=lambda formats: "+".join(formats))
def test_bfloat16_is_as_good_as_torch_in_bfloat16(formats: tuple[str, str, str]) -> None:
    layer = layer_in(formats)
    dequantized = ExpertWeights(*(_plain(w).bfloat16() for w in (layer.w1, layer.v1, layer.w2)))
    for T in (3, 200):
        x, experts, weights = inputs(T, torch.bfloat16)
        truth = moe_experts(x.float(), experts, weights, layer, backend=Backend.REFERENCE)
        error = (moe_experts(x, experts, weights, layer).float() - truth).abs().max()
        torch_error = (moe_experts(x, experts, weights, dequantized).float() - truth).abs().max()
        assert error <= 2 * torch_error


def test_all_tokens_on_the_same_experts() -> None:
    layer = layer_in(FORMATS[0])
    for T in (3, 50):
        x = torch.randn(T, D)
        experts = torch.tensor([[15, 0, 7, 3]]).expand(T, A)
        weights = torch.rand(T, A)
        truth = moe_experts(x, experts, weights, layer, backend=Backend.REFERENCE)
        torch.testing.assert_close(moe_experts(x, experts, weights, layer), truth, rtol=0, atol=2e-4 * float(truth.abs().max()))


def test_experts_with_many_and_with_few_tokens_in_one_call() -> None:
    layer = layer_in(FORMATS[0])
    x = torch.randn(41, D)
    experts = torch.cat([torch.tensor([[0, 1, 2, 3]]).expand(40, A), torch.tensor([[0, 9, 10, 11]])])
    weights = torch.rand(41, A)
    truth = moe_experts(x, experts, weights, layer, backend=Backend.REFERENCE)
    torch.testing.assert_close(moe_experts(x, experts, weights, layer), truth, rtol=0, atol=2e-4 * float(truth.abs().max()))


def test_experts_without_tokens_are_not_read() -> None:
    layer = layer_in(FORMATS[0])
    x, weights = torch.randn(2, D), torch.rand(2, A)
    experts = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])
    before = moe_experts(x, experts, weights, layer)
    for packed in (layer.w1, layer.v1, layer.w2):
        assert isinstance(packed, int4.Int4Weight)
        packed.scales[5:] = torch.nan
        packed.scales[0] = torch.nan
    assert torch.equal(moe_experts(x, experts, weights, layer), before)


SLOTS = torch.tensor([3, -1, 0, 5, 1, -1, 2, 4, -1, -1, 8, 6, 7, -1, 10, 9], dtype=torch.int32)


def in_slots(layer: ExpertWeights) -> ExpertWeights:
    """`layer` with its experts in SLOTS; experts without a slot are absent."""
    experts = [int((slot == SLOTS).nonzero()) for slot in range(int(SLOTS.max()) + 1)]
    return ExpertWeights(*(_experts_of(weight, experts) for weight in (layer.w1, layer.v1, layer.w2)), SLOTS)


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.CPU], ids=lambda backend: backend.value)
@pytest.mark.parametrize("formats", [FORMATS[0], FORMATS[5], FORMATS[6]], ids=lambda formats: "+".join(formats))
@pytest.mark.parametrize("T", [0, 1, 5, 300])
def test_experts_without_a_slot_are_skipped_and_counted(T: int, formats: tuple[str, str, str], backend: Backend) -> None:
    layer = layer_in(formats)
    x, experts, weights = inputs(T)
    has_slot = SLOTS[experts] >= 0
    truth = moe_experts(x, experts, torch.where(has_slot, weights, 0), layer, backend=Backend.REFERENCE)
    missing = torch.full((E,), 7, dtype=torch.int32)
    out = moe_experts(x, experts, weights, in_slots(layer), missing=missing, backend=backend)
    assert torch.equal(missing, 7 + experts[~has_slot].bincount(minlength=E).int())
    if T:
        assert (out - truth).abs().max() <= 2e-4 * truth.abs().max()
        assert torch.equal(moe_experts(x, experts, weights, in_slots(layer), backend=backend), out)


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.CPU], ids=lambda backend: backend.value)
def test_a_token_whose_experts_are_all_missing_gets_zero(backend: Backend) -> None:
    layer = in_slots(layer_in(FORMATS[0]))
    experts = torch.tensor([[1, 5, 8, 13], [0, 2, 3, 4]])
    y = moe_experts(torch.randn(2, D), experts, torch.rand(2, A), layer, backend=backend)
    assert not y[0].any()
    assert y[1].any()


def test_a_token_gives_the_same_bits_alone_and_in_a_small_batch() -> None:
    layer = layer_in(FORMATS[0])
    x, experts, weights = inputs(8)
    alone = torch.cat([moe_experts(x[t : t + 1], experts[t : t + 1], weights[t : t + 1], layer) for t in range(8)])
    assert torch.equal(moe_experts(x, experts, weights, layer), alone)


def test_route_is_a_float32_softmax_and_a_selection_of_the_best() -> None:
    x, router = torch.randn(30, D), torch.randn(E, D)
    routing = route(x.bfloat16(), router.bfloat16(), A, 1.0)
    logits = x.bfloat16().double() @ router.bfloat16().double().T
    probabilities = logits.softmax(-1)
    best = probabilities.topk(A).values
    torch.testing.assert_close(routing.weights.double(), best / best.sum(-1, keepdim=True), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(probabilities.gather(1, routing.experts), best, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(routing.logits.double(), logits, rtol=1e-5, atol=1e-4)


def test_route_breaks_ties_by_the_lower_index() -> None:
    routing = route(torch.ones(1, 8), torch.zeros(E, 8), A, None)
    assert routing.experts.tolist() == [[0, 1, 2, 3]]
    assert routing.weights.tolist() == [[1 / E] * A]


@pytest.mark.parametrize("order", [1.0, 2.0])
def test_route_divides_by_the_requested_norm(order: float) -> None:
    routing = route(torch.randn(5, D), torch.randn(E, D), A, order)
    torch.testing.assert_close(torch.linalg.vector_norm(routing.weights, ord=order, dim=-1), torch.ones(5))


def _experts_of(weight: Weight, experts: list[int]) -> Weight:
    if isinstance(weight, torch.Tensor):
        return weight[experts]
    return replace(weight, **{name: value[experts] for name, value in vars(weight).items() if isinstance(value, torch.Tensor)})


def _plain(weight: Weight) -> torch.Tensor:
    if isinstance(weight, torch.Tensor):
        return weight
    return (int4 if isinstance(weight, int4.Int4Weight) else int8).dequantize(weight)  # type: ignore[arg-type] # each with its own


@pytest.mark.parametrize("formats", [FORMATS[0], FORMATS[3], FORMATS[5]], ids=lambda formats: "+".join(formats))
@pytest.mark.parametrize("T", [1, 40])
def test_experts_computed_in_any_order_and_group_give_the_same_bits(formats: tuple[str, str, str], T: int) -> None:
    layer = layer_in(formats)
    x, experts, weights = inputs(T, torch.float32 if "plain" in formats else torch.bfloat16)
    together = moe_experts(x, experts, weights, layer)
    outputs = ExpertOutputs(x, experts)
    order = list(outputs.counts)[::-1]
    for group in (order[:1], order[1:3], order[3:]):
        outputs.add(layer, {e: e for e in group})
    assert torch.equal(outputs.total(weights).to(x.dtype), together)
