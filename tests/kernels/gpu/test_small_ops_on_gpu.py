"""Router and norm on a GPU at DBRX's shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dbrx_q.kernels.backend import Backend
from dbrx_q.kernels.norm import add_norm, add_norm_reference
from dbrx_q.kernels.router import norm_route, route

Check = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
Replayed = Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]
TOKENS = [0, 1, 7, 16, 17, 300]


@pytest.mark.parametrize("T", TOKENS)
def test_the_router_chooses_the_same_experts_as_the_reference(T: int, place: Any) -> None:
    """Sums of small integers are exact in any order: logits tie often, and every choice has one right answer."""
    E, D, A = place.shapes.experts, place.shapes.width, place.shapes.active
    x, router = (torch.randint(-1, 2, shape, device=place.device).to(place.dtype) for shape in ((T, D), (E, D)))
    router[1] = router[0]
    routing, expected = route(x, router, A, 1), route(x, router, A, 1, backend=Backend.REFERENCE)
    assert torch.equal(routing.logits, expected.logits)
    assert torch.equal(routing.experts, expected.experts)
    torch.testing.assert_close(routing.weights, expected.weights, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("T", TOKENS)
def test_the_router_on_random_activations(T: int, place: Any) -> None:
    x, router = place.randn(T, place.shapes.width), place.randn(place.shapes.experts, place.shapes.width) * 0.02
    routing, expected = route(x, router, place.shapes.active, 1), route(x, router, place.shapes.active, 1, backend=Backend.REFERENCE)
    torch.testing.assert_close(routing.logits, expected.logits, rtol=1e-5, atol=1e-4)
    gaps = expected.logits.sort(-1, descending=True).values.diff(dim=-1).abs()[:, : place.shapes.active]
    clear = (gaps > 1e-3).all(-1)
    assert torch.equal(routing.experts[clear], expected.experts[clear])
    torch.testing.assert_close(routing.weights[clear], expected.weights[clear], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("T", TOKENS)
def test_norm_agrees_with_the_reference(T: int, adds: bool, place: Any, assert_as_good_as_torch: Check) -> None:
    D = place.shapes.width
    x, weight = place.randn(T, D) + 2, place.randn(D)
    delta = place.randn(T, D) * 8 if adds else None
    total, normed = add_norm(x, delta, weight, 1e-5)
    by_torch = add_norm_reference(x, delta, weight, 1e-5)
    assert torch.equal(total, by_torch[0])
    _, truth = add_norm_reference(total.float(), None, weight.float(), 1e-5)
    assert_as_good_as_torch(normed, truth, by_torch[1])


@pytest.mark.parametrize("T", [1, 7, 16])
def test_norm_and_router_in_one_kernel_have_the_bits_of_two(T: int, place: Any) -> None:
    D, A = place.shapes.width, place.shapes.active
    x, weight, router = place.randn(T, D) * 3, place.randn(D), place.randn(place.shapes.experts, D) * 0.02
    _, expected = add_norm(x, None, weight, 1e-5)
    truth = route(expected, router, A, 1)
    normed, routing = norm_route(x, weight, 1e-5, router, A, 1)
    assert torch.equal(normed, expected)
    assert torch.equal(routing.logits, truth.logits)
    assert torch.equal(routing.experts, truth.experts)
    assert torch.equal(routing.weights, truth.weights)


def test_captured_small_ops_replay_with_other_inputs(place: Any, replayed: Replayed) -> None:
    D = place.shapes.width
    x, delta, weight = place.randn(4, D), place.randn(4, D), place.randn(D)
    router = place.randn(place.shapes.experts, D)

    def step() -> torch.Tensor:
        _, normed = add_norm(x, delta, weight, 1e-5)
        return route(normed, router, place.shapes.active, 1).weights

    replay = replayed(step)
    for _ in range(3):
        x.copy_(place.randn(4, D))
        assert torch.equal(replay(), step())
