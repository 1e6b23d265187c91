"""The kernels on a GPU, at DBRX's shapes in bfloat16.

With TRITON_INTERPRET=1 the tests run in Triton's interpreter on the CPU, at small shapes in float16, which tries the tests themselves
without a GPU: `TRITON_INTERPRET=1 pytest tests/kernels/gpu`. While launches are recorded, tensors have no memory, and a test ends where it
reads a value: `dbrx-q bench gpu` compiles what the tests launch before it runs them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dbrx_q.eval.bench.kernel_shapes import DBRX, Shapes
from dbrx_q.kernels.triton.arrival import Graph
from dbrx_q.kernels.triton.launch import is_recording

TOY = Shapes(width=128, heads=12, kv_heads=2, channels=64, experts=4, active=2, hidden=128, vocabulary=256, context=96)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    runs = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1" or is_recording()
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.gpu)
            if not runs:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device that torch can see"))


@dataclass(frozen=True)
class Place:
    """Where tests run, and at which sizes."""

    device: torch.device
    """A GPU, the CPU for the interpreter, or "meta" while launches are recorded."""
    dtype: torch.dtype
    """Of activations: bfloat16 on a GPU, float16 in the interpreter."""
    shapes: Shapes
    """Those of DBRX on a GPU, small ones in the interpreter."""

    @property
    def real(self) -> bool:
        """Whether the tests have a GPU's sizes."""
        return self.device.type != "cpu"

    @property
    def recorded(self) -> bool:
        """Whether launches are recorded and not run, so that there is nothing to compare."""
        return self.device.type == "meta"

    def tokens(self, T: int) -> int:
        """T tokens on a GPU, at most 24 in the slow interpreter."""
        return T if self.real else min(T, 24)

    def randn(self, *shape: int) -> torch.Tensor:
        """Normal activations."""
        return torch.randn(*shape, dtype=self.dtype, device=self.device)

    def ints(self, values: object) -> torch.Tensor:
        """An int32 tensor on the device."""
        return torch.tensor(values, dtype=torch.int32, device=self.device)


@pytest.fixture(autouse=True)
def _poison(poisoned_memory: None) -> None:
    """In every test here, memory that no kernel wrote holds NaN."""


@pytest.fixture
def place() -> Place:
    torch.manual_seed(0)
    if is_recording():
        return Place(torch.device("meta"), torch.bfloat16, DBRX)
    if torch.cuda.is_available():
        return Place(torch.device("cuda"), torch.bfloat16, DBRX)
    return Place(torch.device("cpu"), torch.float16, TOY)


@pytest.fixture
def assert_as_good_as_torch() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]:
    """Checks that the error of a result to float32 `truth` is at most twice that of torch in the same dtype, plus a floor."""

    def check(result: torch.Tensor, truth: torch.Tensor, by_torch: torch.Tensor) -> None:
        assert result.shape == truth.shape
        assert result.dtype == by_torch.dtype
        if not truth.numel() or result.is_meta:
            return
        error, torch_error = ((out.float() - truth).abs() for out in (result, by_torch))
        floor = torch.finfo(result.dtype).eps * truth.abs().max()
        assert error.max() <= 2 * torch_error.max() + floor
        assert error.mean() <= 2 * torch_error.mean() + floor / 8

    return check


@pytest.fixture
def replayed() -> Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]:
    """Captures a call in a CUDA graph; the returned function replays the graph and returns its result."""

    def capture(call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        if not torch.cuda.is_available() or is_recording():  # the interpreter has no graphs
            return call
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            call()
        torch.cuda.current_stream().wait_stream(aside)
        graph = Graph(torch.device("cuda", torch.cuda.current_device()))
        with graph.capture():
            out = call()

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        return replay

    return capture
