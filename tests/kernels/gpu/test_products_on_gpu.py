"""`linear` and `moe_experts` on a GPU at DBRX's shapes, every format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dbrx_q.eval.bench.device_timing import random_weight
from dbrx_q.eval.bench.kernel_shapes import FORMATS
from dbrx_q.kernels.formats.expert_weights import ExpertWeights
from dbrx_q.kernels.formats.registry import TensorFormat
from dbrx_q.kernels.formats.weights import Weight, dequantize
from dbrx_q.kernels.linear import linear, linear_reference
from dbrx_q.kernels.moe import moe_experts, moe_experts_reference

Check = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
Replayed = Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]
SLACK = 64 << 20  # bytes of partial sums and of the allocator's rounding
CAPTURED = (TensorFormat("int4", 64), TensorFormat("trellis2", 128))


@pytest.mark.parametrize("T", [0, 1, 3, 16, 17, 300])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_linear_agrees_with_the_reference(fmt: TensorFormat, T: int, place: Any, assert_as_good_as_torch: Check) -> None:
    T, N, K = place.tokens(T), place.shapes.qkv, place.shapes.width
    weight, x, residual = random_weight(fmt, N, K, device=place.device), place.randn(T, K), place.randn(T, N)
    clip = 0.5
    clipped, plain = linear(x, weight, clip=clip, residual=residual), linear(x, weight)
    if place.recorded:
        return
    truth = linear_reference(x, weight).clamp(-clip, clip) + residual.float()
    by_torch = F.linear(x, dequantize(weight, place.dtype)).clamp(-clip, clip) + residual
    assert_as_good_as_torch(clipped, truth, by_torch)
    assert_as_good_as_torch(plain, linear_reference(x, weight), F.linear(x, dequantize(weight, place.dtype)))


@pytest.mark.parametrize("tokens", [16, 256], ids=["matvec", "tiles"])
@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if fmt.record.trellis is None], ids=str)  # a trellis format rotates activations
def test_identity_activations_give_the_dequantized_weight(fmt: TensorFormat, tokens: int, place: Any) -> None:
    N, K = place.shapes.qkv if place.real else 64, place.shapes.width
    weight = random_weight(fmt, N, K, device=place.device)
    rows = torch.eye(K, dtype=place.dtype, device=place.device)
    if place.recorded:
        linear(rows[:tokens], weight)
        return
    dequantized = dequantize(weight, place.dtype).T  # [K, N]
    for first in range(0, K, tokens * max(1, K // tokens // 8)):  # some of many
        part = slice(first, first + tokens)
        assert torch.equal(linear(rows[part], weight), dequantized[part])


def layer_of(fmt: TensorFormat, place: Any, *, slots: torch.Tensor | None = None) -> ExpertWeights:
    E, D, hidden = place.shapes.experts, place.shapes.width, place.shapes.hidden
    S = E if slots is None else int(slots.max()) + 1
    w1, v1, w2 = (random_weight(fmt, S, *shape, device=place.device) for shape in ((hidden, D), (hidden, D), (D, hidden)))
    return ExpertWeights(w1, v1, w2, slots)


def routed(T: int, place: Any) -> tuple[torch.Tensor, torch.Tensor]:
    E, A = place.shapes.experts, place.shapes.active
    experts = torch.rand(T, E, device=place.device).argsort(-1)[:, :A].contiguous()
    return experts, torch.rand(T, A, device=place.device).softmax(-1)


def experts_by_torch(x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, layer: ExpertWeights) -> torch.Tensor:
    """The experts in plain torch in the same dtype, summed over experts in float32."""
    y = torch.zeros(x.shape, device=x.device)
    for e in experts.unique().tolist():
        slot = e if layer.slots is None else int(layer.slots[e])
        if slot < 0:
            continue
        tokens, rank = (experts == e).nonzero(as_tuple=True)
        w1, v1, w2 = (dequantize(weight[slot], x.dtype) for weight in (layer.w1, layer.v1, layer.w2))
        h = F.silu(F.linear(x[tokens], w1)) * F.linear(x[tokens], v1)
        y.index_add_(0, tokens, F.linear(h, w2).float() * weights[tokens, rank, None])
    return y.to(x.dtype)


@pytest.mark.parametrize("T", [0, 1, 2, 8, 16, 17, 300])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_experts_agree_with_the_reference(fmt: TensorFormat, T: int, place: Any, assert_as_good_as_torch: Check) -> None:
    T = place.tokens(T)
    layer, x = layer_of(fmt, place), place.randn(T, place.shapes.width)
    experts, weights = routed(T, place)
    out = moe_experts(x, experts, weights, layer)
    if place.recorded:
        return
    assert_as_good_as_torch(out, moe_experts_reference(x, experts, weights, layer), experts_by_torch(x, experts, weights, layer))


@pytest.mark.parametrize("T", [1, 8, 40])
def test_experts_in_slots_with_holes(T: int, place: Any, assert_as_good_as_torch: Check) -> None:
    E = place.shapes.experts
    slots = place.ints([-1 if e % 3 == 1 else (E - e) // 2 for e in range(E)])  # some experts share a slot, which the kernels permit
    layer, x = layer_of(TensorFormat("int4", 64), place, slots=slots), place.randn(T, place.shapes.width)
    experts, weights = routed(T, place)
    counted, expected = (torch.full((E,), 5, dtype=torch.int32, device=place.device) for _ in range(2))
    out = moe_experts(x, experts, weights, layer, missing=counted)
    truth = moe_experts_reference(x, experts, weights, layer, expected)
    assert torch.equal(counted, expected)
    assert_as_good_as_torch(out, truth, experts_by_torch(x, experts, weights, layer))


@pytest.mark.parametrize("T", [8, 200])
@pytest.mark.parametrize("resident", [True, False], ids=["resident", "missing"])
def test_all_tokens_on_the_same_experts(T: int, resident: bool, place: Any, assert_as_good_as_torch: Check) -> None:
    T, A, E = place.tokens(T), place.shapes.active, place.shapes.experts
    slots = place.ints(range(E) if resident else [-1] * A + list(range(E - A)))
    layer, x = layer_of(TensorFormat("int4", 64), place, slots=slots), place.randn(T, place.shapes.width)
    experts = torch.arange(A, device=place.device).expand(T, A).contiguous()
    weights = torch.full((T, A), 1 / A, device=place.device)
    out = moe_experts(x, experts, weights, layer)
    if not resident:
        assert not out.any()
    else:
        assert_as_good_as_torch(out, moe_experts_reference(x, experts, weights, layer), experts_by_torch(x, experts, weights, layer))


@pytest.mark.parametrize("T", [1, 8])
@pytest.mark.parametrize("fmt", CAPTURED, ids=str)
def test_a_captured_linear_replays_with_other_inputs(fmt: TensorFormat, T: int, place: Any, replayed: Replayed) -> None:
    weight, x = (
        random_weight(fmt, place.shapes.qkv, place.shapes.width, device=place.device),
        place.randn(T, place.shapes.width),
    )
    replay = replayed(lambda: linear(x, weight, clip=8.0))
    for _ in range(3):
        x.copy_(place.randn(*x.shape))
        assert torch.equal(replay(), linear(x, weight, clip=8.0))


@pytest.mark.parametrize("T", [1, 8])
@pytest.mark.parametrize("fmt", CAPTURED, ids=str)
def test_captured_experts_replay_with_other_inputs(fmt: TensorFormat, T: int, place: Any, replayed: Replayed) -> None:
    E = place.shapes.experts
    slots, missing = place.ints(range(E)), torch.zeros(E, dtype=torch.int32, device=place.device)
    layer, x = layer_of(fmt, place, slots=slots), place.randn(T, place.shapes.width)
    experts, weights = routed(T, place)
    replay = replayed(lambda: moe_experts(x, experts, weights, layer, missing=missing))
    for turn in range(3):
        x.copy_(place.randn(*x.shape))
        for kept, new in zip((experts, weights), routed(T, place), strict=True):
            kept.copy_(new)
        slots[turn] = -1  # the map changes between steps as well
        missing.zero_()
        out, counted = replay().clone(), missing.clone()
        missing.zero_()
        assert torch.equal(out, moe_experts(x, experts, weights, layer, missing=missing))
        assert torch.equal(counted, missing)


def peak_memory(call: Callable[[], torch.Tensor]) -> int:
    """The most bytes that a call allocates at a time, without its result."""
    call()  # compiles, and allocates what stays allocated
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - out.nbytes


def nbytes_in_16_bits(weight: Weight) -> int:
    return 2 * weight.shape.numel()


@pytest.mark.parametrize("T", [1, 16, 64])
@pytest.mark.parametrize("fmt", [TensorFormat(*pair) for pair in (("int4", 64), ("int8", 64), ("nf4", 64), ("trellis3", 128))], ids=str)
def test_no_dequantized_copy_of_a_weight_is_made(fmt: TensorFormat, T: int, place: Any) -> None:
    if not place.real:
        return
    D = place.shapes.width
    x = place.randn(T, D)
    weight = random_weight(fmt, place.shapes.vocabulary, D, device=place.device)
    assert nbytes_in_16_bits(weight) / 8 > SLACK
    assert peak_memory(lambda: linear(x, weight)) < SLACK
    layer, (experts, weights) = layer_of(fmt, place), routed(T, place)
    pairs = T * place.shapes.active * (place.shapes.hidden + D) * 4
    assert SLACK + pairs < nbytes_in_16_bits(layer.w1[0])  # less than one expert's matrix
    assert peak_memory(lambda: moe_experts(x, experts, weights, layer)) < SLACK + pairs
