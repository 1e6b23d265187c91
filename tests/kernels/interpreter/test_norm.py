"""`add_norm` in the interpreter compared with torch."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from dbrx_q.kernels.backend import Backend, pick
from dbrx_q.kernels.norm import add_norm, add_norm_reference


@dataclass(frozen=True)
class Case:
    """One call."""

    T: int
    """Tokens."""
    D: int
    """Width."""
    add: bool = True
    """Whether there is a delta."""

    def __str__(self) -> str:
        return f"T{self.T}-D{self.D}-{'add' if self.add else 'alone'}"


CASES = [Case(0, 64), Case(1, 64), Case(3, 96), Case(2, 1), Case(2, 1500), Case(3, 96, add=False), Case(1, 6144, add=False)]


def inputs(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    generator = torch.Generator().manual_seed(case.D)
    x, delta = (torch.randn(case.T, case.D, generator=generator).to(dtype) for _ in range(2))
    return x + 3, delta if case.add else None, torch.randn(case.D, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_add_norm_agrees_with_torch(case: Case, dtype: torch.dtype) -> None:
    assert pick(torch.device("cpu")) is Backend.TRITON
    x, delta, weight = inputs(case, dtype)
    total, normed = add_norm(x, delta, weight, 1e-5)
    assert (total.dtype, normed.dtype) == (dtype, dtype)
    assert torch.equal(total, x if delta is None else x + delta)
    truth = add_norm_reference(total.float(), None, weight.float(), 1e-5)[1]
    torch_error = (add_norm_reference(x, delta, weight, 1e-5)[1].float() - truth).abs()
    error = (normed.float() - truth).abs()
    assert torch.isfinite(normed).all()
    assert not case.T or error.max() <= 2 * torch_error.max() + 2e-6 * truth.abs().max()


def test_without_a_delta_the_sum_is_the_input_itself() -> None:
    x, _, weight = inputs(Case(2, 64), torch.float32)
    assert add_norm(x, None, weight, 1e-5)[0] is x


def test_a_mean_much_larger_than_the_deviation_is_subtracted_first() -> None:
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(0)) + 4096
    truth = add_norm_reference(x.double(), None, torch.ones(256, dtype=torch.float64), 1e-5)[1]
    assert (add_norm(x, None, torch.ones(256), 1e-5)[1] - truth).abs().max() < 2e-3


def test_inputs_need_not_be_contiguous() -> None:
    x, delta, weight = inputs(Case(4, 64), torch.float32)
    assert delta is not None
    expected = add_norm(x, delta, weight, 1e-5)
    strided = add_norm(x.T.contiguous().T, delta.T.contiguous().T, weight.repeat_interleave(2)[::2], 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(strided, expected, strict=True))


def test_nan_does_not_spread_to_other_rows() -> None:
    x, delta, weight = inputs(Case(3, 64), torch.float32)
    x[1, 5] = torch.nan
    total, normed = add_norm(x, delta, weight, 1e-5)
    assert total.isnan().sum() == 1
    assert normed.isnan().any(-1).tolist() == [False, True, False]
    assert normed[1].isnan().all()
