"""The kernels on a GPU, at DBRX's own shapes in bfloat16. With TRITON_INTERPRET=1 the same tests run in Triton's interpreter on the CPU, at
toy sizes in float16, so that their own logic can be tried without a GPU: `TRITON_INTERPRET=1 pytest tests/kernels/gpu`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dbrx_q.eval.bench.kernel_shapes import DBRX, Shapes

TOY = Shapes(width=128, heads=12, kv_heads=2, channels=64, experts=4, active=2, hidden=128, vocabulary=256, context=96)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    runs = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.gpu)
            if not runs:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device that torch can see"))


@dataclass(frozen=True)
class Place:
    """Where tests run, at which sizes."""

    device: torch.device
    dtype: torch.dtype
    shapes: Shapes

    @property
    def real(self) -> bool:
        """Whether on a GPU."""
        return self.device.type == "cuda"

    def tokens(self, T: int) -> int:
        """T, or less where each takes long."""
        return T if self.real else min(T, 24)

    def randn(self, *shape: int) -> torch.Tensor:
        """Normal activations."""
        return torch.randn(*shape, dtype=self.dtype, device=self.device)

    def ints(self, values: object) -> torch.Tensor:
        """int32 on the device."""
        return torch.tensor(values, dtype=torch.int32, device=self.device)


@pytest.fixture
def place() -> Place:
    torch.manual_seed(0)
    if torch.cuda.is_available():
        return Place(torch.device("cuda"), torch.bfloat16, DBRX)
    return Place(torch.device("cpu"), torch.float16, TOY)


@pytest.fixture
def assert_as_good_as_torch() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]:
    """Checks a result against float32 `truth`: no further away than twice what torch is in the same dtype, and a little."""

    def check(found: torch.Tensor, truth: torch.Tensor, by_torch: torch.Tensor) -> None:
        assert found.shape == truth.shape
        assert found.dtype == by_torch.dtype
        if not truth.numel():
            return
        error, torch_error = ((out.float() - truth).abs() for out in (found, by_torch))
        floor = torch.finfo(found.dtype).eps * truth.abs().max()
        assert error.max() <= 2 * torch_error.max() + floor
        assert error.mean() <= 2 * torch_error.mean() + floor / 8

    return check


@pytest.fixture
def replayed() -> Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]:
    """Captures a call in a CUDA graph; what it gives replays the graph and returns its result."""

    def capture(call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        if not torch.cuda.is_available():  # the interpreter has no graphs: the test's own logic is what is tried there
            return call
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            call()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        return replay

    return capture
