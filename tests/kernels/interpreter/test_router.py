"""`route` in the interpreter chooses the experts of the reference, bit for bit, and gives its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from dbrx_q.kernels.backend import Backend
from dbrx_q.kernels.formats.expert_weights import Routing
from dbrx_q.kernels.norm import add_norm
from dbrx_q.kernels.router import norm_route, route
from dbrx_q.kernels.triton.launch import CHIPS, recording


@dataclass(frozen=True)
class Case:
    """One call."""

    T: int
    """Tokens. For up to 16, several programs split D; more tokens share a program."""
    E: int
    """Experts; 5 and 6 are not powers of two."""
    A: int
    """Active experts of a token."""
    D: int
    """Width; 40 and 600 do not fill their tiles."""
    order: float | None = 1.0
    """Of the norm that divides the weights; None for no division."""

    def __str__(self) -> str:
        return f"T{self.T}-E{self.E}-A{self.A}-D{self.D}-norm{self.order}"


CASES = [
    Case(0, 16, 4, 64),
    Case(1, 16, 4, 1152),
    Case(3, 6, 2, 600),
    Case(2, 5, 5, 40),
    Case(1, 1, 1, 64),
    Case(2, 16, 16, 6144, None),
    Case(18, 16, 4, 600),
    Case(21, 6, 6, 40, 2.0),
    Case(17, 100, 7, 64),
    Case(3, 16, 4, 256, 2.0),
    Case(3, 16, 4, 256, 0.5),
    Case(3, 16, 4, 256, 30.0),
    Case(3, 16, 4, 256, math.inf),
]


def integers(case: Case, dtype: torch.dtype, most: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """x and router of small integers, whose sums are exact in any order; pairs of experts are equal, so that logits tie."""
    generator = torch.Generator().manual_seed(case.T + case.E)
    x = torch.randint(-most, most + 1, (case.T, case.D), generator=generator).to(dtype)
    router = torch.randint(-most, most + 1, (case.E, case.D), generator=generator).to(dtype)
    router[1::2] = router[: case.E // 2 * 2 : 2]
    router[:, 16:] = 0
    return x, router


def routed_by_both(case: Case, x: torch.Tensor, router: torch.Tensor) -> tuple[Routing, Routing]:
    return tuple(route(x, router, case.A, case.order, backend=backend) for backend in (None, Backend.REFERENCE))  # type: ignore[return-value] # two


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_chosen_experts_equal_those_of_the_reference_also_among_ties(case: Case, dtype: torch.dtype) -> None:
    routing, truth = routed_by_both(case, *integers(case, dtype))
    assert torch.equal(routing.logits, truth.logits)
    assert torch.equal(routing.experts, truth.experts)
    assert routing.experts.dtype == torch.int64
    torch.testing.assert_close(routing.weights, truth.weights, rtol=1e-5, atol=1e-7)
    assert case.E < 2 or not case.T or len(truth.logits[0].unique()) < case.E


@pytest.mark.parametrize("case", [Case(5, 16, 4, 1152), Case(20, 16, 4, 1152)], ids=str)
def test_route_agrees_with_the_reference_on_random_inputs(case: Case) -> None:
    generator = torch.Generator().manual_seed(7)
    x, router = torch.randn(case.T, case.D, generator=generator).half(), torch.randn(case.E, case.D, generator=generator).half() * 0.05
    routing, truth = routed_by_both(case, x, router)
    torch.testing.assert_close(routing.logits, truth.logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(routing.experts, truth.experts)
    torch.testing.assert_close(routing.weights, truth.weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(case.T))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", [case for case in CASES if 0 < case.T <= 16], ids=str)
def test_norm_and_router_in_one_kernel_have_the_bits_of_two(case: Case, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(8)
    x, router = (torch.randn(n, case.D, generator=generator).mul(3).to(dtype) for n in (case.T, case.E))
    weight = torch.randn(case.D, generator=generator).to(dtype)
    _, truth = add_norm(x, None, weight, 1e-5)
    expected = route(truth, router, case.A, case.order)
    with recording(CHIPS["sm_90"]) as launches:
        norm_route(x, weight, 1e-5, router, case.A, case.order)
    assert [launch.kernel.__name__ for launch in launches] == ["norm_route_kernel"]
    for _ in range(2):  # the second call finds the counters that the first left
        normed, routing = norm_route(x, weight, 1e-5, router, case.A, case.order)
        assert torch.equal(normed, truth)
        for part, other in zip(vars(routing).values(), vars(expected).values(), strict=True):
            assert torch.equal(part, other)


def test_many_tokens_take_two_kernels() -> None:
    x, router = integers(Case(17, 16, 4, 64), torch.float32)
    with recording(CHIPS["sm_90"]) as launches:
        norm_route(x, x[0], 1e-5, router, 4, 1)
    assert [launch.kernel.__name__ for launch in launches] == ["add_norm_kernel", "route_kernel"]


def test_logits_far_apart_neither_overflow_nor_underflow() -> None:
    case = Case(1, 4, 2, 32)
    x = torch.ones(1, 32)
    router = torch.tensor([-3e4, 2e4, 3e4, 3e4])[:, None].expand(4, 32) / 32
    routing, _ = routed_by_both(case, x, router)
    assert routing.experts.tolist() == [[2, 3]]
    assert routing.weights.tolist() == [[0.5, 0.5]]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize("T", [2, 18])
def test_nan_and_infinity_choose_experts_that_exist(T: int) -> None:
    case = Case(T, 6, 4, 64)
    x, router = integers(case, torch.float32)
    x[0] = torch.nan
    x[1] = 1
    router[2] = torch.inf
    router[3] = -torch.inf
    router[4, 0] = torch.nan
    routing, truth = routed_by_both(case, x, router)
    assert torch.equal(routing.experts, truth.experts)
    assert routing.weights.isnan().all()  # as a softmax with an infinite or unknown logit is
    assert routing.experts[0].tolist() == [0, 1, 2, 3]


def test_negative_zero_ties_with_zero() -> None:
    router = torch.zeros(4, 32)
    router[0] = -0.0
    x = torch.ones(1, 32)
    assert route(x, router, 4, None).experts.tolist() == [[0, 1, 2, 3]]


def test_the_counters_are_reset_to_zero() -> None:
    case = Case(3, 16, 4, 1152)
    x, router = integers(case, torch.float32)
    first, second = (route(x, router, case.A, case.order) for _ in range(2))
    assert torch.equal(first.experts, second.experts)
    assert torch.equal(first.weights, second.weights)
