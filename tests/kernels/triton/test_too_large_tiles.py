"""Measured tiles that need more than the chip has give way to the defaults, once and with a warning."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from dbrx_q.eval.bench.kernel_resources import compile_launch
from dbrx_q.eval.bench.kernel_shapes import empty_weight
from dbrx_q.kernels.backend import Backend
from dbrx_q.kernels.formats.expert_weights import ExpertWeights
from dbrx_q.kernels.formats.registry import TensorFormat
from dbrx_q.kernels.linear import linear
from dbrx_q.kernels.moe import moe_experts
from dbrx_q.kernels.triton import launch as launching
from dbrx_q.kernels.triton import linear as triton_linear
from dbrx_q.kernels.triton import moe_decode, plans, tiles
from dbrx_q.kernels.triton.launch import CHIPS, Launch
from dbrx_q.kernels.triton.tiles import Tiles, choose, trying, use_measured

CHIP = CHIPS["sm_86"]
INT8 = TensorFormat("int8", 64)
X, WEIGHT = torch.zeros(32, 512, dtype=torch.bfloat16), empty_weight(INT8, 256, 512)
PROBLEM = triton_linear.problem_of(WEIGHT, 32, CHIP)
LARGE = Tiles(128, 32, 256, 1, 4, 4)  # 128 KB of packed rows in four stages


class Kernel:
    """A kernel on a GPU of CHIP, which it is refused to run on as Triton's launcher does; otherwise nothing runs.

    Args:
        kernel: the function.
        too_large: tiles that are refused; None to compile LARGE and see.
    """

    def __init__(self, kernel: Any, too_large: Tiles | None = None) -> None:
        self._kernel, self.arg_names, self.params, self.__name__ = kernel, kernel.arg_names, kernel.params, kernel.__name__
        self._too_large = too_large
        self.depths: list[int] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, num_warps: int, num_stages: int, enable_fp_fusion: bool, **constants: Any) -> None:
            tried = self._too_large or LARGE
            shared = 0
            if (constants["BN"], constants["BK"]) == (tried.rows, tried.depth):
                shared = CHIP.shared_memory + 1
                if self._too_large is None:
                    launch = Launch(self._kernel, grid, arguments, constants, num_warps, num_stages)
                    shared = compile_launch(launch, CHIP).shared_memory
            if shared > CHIP.shared_memory:
                raise OutOfResources(shared, CHIP.shared_memory, "shared memory")
            self.depths.append(constants["BK"])

        return run


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes the launchers take the CPU for a GPU; the warnings."""
    warnings: list[str] = []
    monkeypatch.setattr(tiles, "_MEASURED", {})
    monkeypatch.setattr(tiles, "warn_once", warnings.append)
    for module in (launching, triton_linear, moe_decode, plans):
        monkeypatch.setattr(module, "chip_of", lambda device: CHIP)
    return warnings


def test_the_product_is_computed_with_the_default_tiles(gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(triton_linear.linear_kernel)
    monkeypatch.setattr(triton_linear, "linear_kernel", kernel)
    default = choose(PROBLEM, CHIP)
    other = replace(PROBLEM, N=512)
    use_measured({("sm_86", PROBLEM): LARGE, ("sm_86", other): LARGE})
    linear(X, WEIGHT, backend=Backend.TRITON)
    assert kernel.depths == [default.depth]
    assert choose(PROBLEM, CHIP) == default
    assert choose(other, CHIP) == LARGE  # the choice of other problems stands
    assert len(gpu) == 1
    assert str(LARGE) in gpu[0]
    assert "dbrx-q bench tune" in gpu[0]
    linear(X, WEIGHT, backend=Backend.TRITON)
    assert len(gpu) == 1


@pytest.mark.parametrize("op", ["gate_up", "down"])
def test_only_the_product_that_does_not_fit_gives_way(op: str, gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = ExpertWeights(empty_weight(INT8, 4, 256, 512), empty_weight(INT8, 4, 256, 512), empty_weight(INT8, 4, 512, 256))
    problems = dict(zip(("gate_up", "down"), moe_decode.problems(layer, 1, 2, CHIP), strict=True))
    fits = Tiles(16, 16, 64, 1, 1, 2)
    use_measured({("sm_86", problem): LARGE if name == op else fits for name, problem in problems.items()})
    kernels = {name: Kernel(getattr(moe_decode, f"{name}_decode_kernel"), LARGE) for name in problems}
    for name, kernel in kernels.items():
        monkeypatch.setattr(moe_decode, f"{name}_decode_kernel", kernel)
    moe_experts(X[:1], torch.tensor([[0, 1]]), torch.ones(1, 2), layer, backend=Backend.TRITON)
    other = "down" if op == "gate_up" else "gate_up"
    assert choose(problems[other], CHIP) == fits
    assert choose(problems[op], CHIP) != LARGE
    assert {*kernels[other].depths} == {fits.depth}
    assert len(gpu) == 1


def test_tiles_that_are_tried_fail(gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a sweep would take the time of the default tiles for theirs."""
    monkeypatch.setattr(triton_linear, "linear_kernel", Kernel(triton_linear.linear_kernel, LARGE))
    with trying(PROBLEM, CHIP, LARGE), pytest.raises(OutOfResources):
        linear(X, WEIGHT, backend=Backend.TRITON)
    assert gpu == []


def test_other_errors_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Kernel):
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            raise ValueError("broken")

    monkeypatch.setattr(triton_linear, "linear_kernel", Broken(triton_linear.linear_kernel))
    use_measured({("sm_86", PROBLEM): LARGE})
    with pytest.raises(ValueError, match="broken"):
        linear(X, WEIGHT, backend=Backend.TRITON)
    assert choose(PROBLEM, CHIP) == LARGE


def test_default_tiles_that_do_not_fit_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_linear, "linear_kernel", Kernel(triton_linear.linear_kernel, choose(PROBLEM, CHIP)))
    with pytest.raises(OutOfResources):
        linear(X, WEIGHT, backend=Backend.TRITON)
