"""Launches that are repeated reach CUDA's launcher with what Triton itself would pass: compiled for sm_90, and stopped where C begins.

The driver is Triton's for NVIDIA without a GPU: kernels are really compiled, and a list takes the place of the function that starts them.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

from dbrx_q.eval.bench.kernel_shapes import empty_weight
from dbrx_q.kernels.backend import Backend
from dbrx_q.kernels.formats.expert_weights import ExpertWeights
from dbrx_q.kernels.formats.registry import TensorFormat
from dbrx_q.kernels.linear import linear
from dbrx_q.kernels.moe import moe_experts
from dbrx_q.kernels.norm import add_norm
from dbrx_q.kernels.triton import arrival, plans, repeated_launch
from dbrx_q.kernels.triton import launch as triton_launch
from dbrx_q.kernels.triton.arrival import MOST_COUNTERS
from dbrx_q.kernels.triton.launch import CHIPS
from dbrx_q.kernels.triton.linear import linear_kernel
from dbrx_q.kernels.triton.moe_decode import down_decode_kernel
from dbrx_q.kernels.triton.norm import add_norm_kernel
from dbrx_q.kernels.triton.tiles import Problem, Tiles, trying

E, A, D, F = 4, 2, 128, 128
INT4 = TensorFormat("int4", 64)

Started = list[tuple[tuple[int, int, int], object, tuple[Any, ...]]]


class _Utils:
    def load_binary(self, name: str, *_: object) -> tuple[object, ...]:
        return name, name, 64, 0, 1024

    def unload_module(self, _: object) -> None: ...

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": CHIPS["sm_90"].shared_memory}


class _Driver:
    """What `JITFunction.run` and `CompiledKernel` ask of a driver."""

    def __init__(self, started: Started) -> None:
        class Launcher:
            def __init__(self, *_: object) -> None: ...

            def __call__(self, x: int, y: int, z: int, stream: int, function: object, *rest: Any) -> None:
                started.append(((x, y, z), function, rest[4:]))

        self.launcher_cls, self.utils = Launcher, _Utils()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[Started]:
    """What CUDA was asked to start: grid, function, and the kernel's arguments with constants."""
    assert nvidia.CudaLauncher  # the class whose place `Launcher` takes
    launches: Started = []
    before = driver._active
    driver.set_active(_Driver(launches))  # type: ignore[arg-type] # the part of a driver that launches use
    monkeypatch.setattr(repeated_launch, "_KEPT", {})
    monkeypatch.setattr(plans, "_SEEN", {})
    for module in (triton_launch, *_modules_with("chip_of")):
        monkeypatch.setattr(module, "chip_of", lambda _: CHIPS["sm_90"])
    yield launches
    for kernel in _kernels():
        kernel.device_caches.clear()
    monkeypatch.undo()
    gc.collect()  # compiled kernels unload themselves by the driver
    driver._active = before


def _modules_with(name: str) -> list[Any]:
    import sys

    return [module for key, module in sys.modules.items() if key.startswith("dbrx_q.kernels.triton.") and hasattr(module, name)]


def _kernels() -> list[Any]:
    return [value for module in _modules_with("launch") for value in vars(module).values() if isinstance(value, triton.JITFunction)]


def plain(arguments: tuple[Any, ...]) -> list[Any]:
    """Arguments with the forms of tensors in place of their addresses."""
    return [(a.shape, a.dtype, a.data_ptr() % 16) if isinstance(a, torch.Tensor) else a for a in arguments]


def test_a_repeated_launch_passes_what_triton_passes_and_compiles_again_for_other_types(started: Started) -> None:
    x = torch.randn(2, D)
    add_norm(x, None, x[0], 1e-5, backend=Backend.TRITON)
    add_norm(x, None, x[0], 1e-6, backend=Backend.TRITON)
    assert len(repeated_launch._KEPT) == 1
    (grid, function, first), (grid_again, function_again, second) = started
    assert (grid, function) == (grid_again, function_again)
    eps = add_norm_kernel.arg_names.index("eps")
    assert (first[eps], second[eps]) == (1e-5, 1e-6)
    assert plain(first[:eps]) == plain(second[:eps])
    assert first[eps + 1 :] == second[eps + 1 :]
    assert len(first) == len(add_norm_kernel.arg_names)
    add_norm(x.half(), None, x[0].half(), 1e-5, backend=Backend.TRITON)
    odd = torch.randn(2 * D + 1)[1:].view(2, D)  # not divisible by 16
    add_norm(odd, None, x[0], 1e-5, backend=Backend.TRITON)
    add_norm(x, x, x[0], 1e-5, backend=Backend.TRITON)
    assert len(repeated_launch._KEPT) == 4
    assert len(add_norm_kernel.device_caches[0][0]) == 4  # Triton distinguishes the same launches


def test_a_profiler_sees_every_launch(started: Started) -> None:
    x, seen = torch.randn(1, D), []
    add_norm(x, None, x[0], 1e-5, backend=Backend.TRITON)
    triton.knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        assert repeated_launch.profiled()
        add_norm(x, None, x[0], 1e-5, backend=Backend.TRITON)
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(seen.append)
    assert not repeated_launch.profiled()
    assert len(started) == 2


def layer_of() -> ExpertWeights:
    return ExpertWeights(*(empty_weight(INT4, E, N, K, device="cpu") for N, K in ((F, D), (F, D), (D, F))))


def test_planned_experts_launch_what_an_unplanned_call_launches(started: Started) -> None:
    layer = layer_of()
    inputs = [(torch.randn(1, D).half(), torch.tensor([[n, 3]]), torch.rand(1, A), torch.arange(E, dtype=torch.int32)) for n in range(4)]
    results = []
    for x, experts, weights, slot_by_expert in inputs:
        given = ExpertWeights(layer.w1, layer.v1, layer.w2, slot_by_expert)
        results.append(moe_experts(x, experts, weights, given, backend=Backend.TRITON))
    assert [plan is not None for plan in plans._SEEN.values()] == [True]
    assert len(started) == 8
    for number, (x, experts, weights, slot_by_expert) in enumerate(inputs):
        for (grid, function, arguments), (grid_now, function_now, now) in zip(started[:2], started[2 * number :], strict=False):
            assert (grid, function) == (grid_now, function_now)
            assert plain(arguments) == plain(now)
        gate_up, down = (arguments for _, _, arguments in started[2 * number : 2 * number + 2])
        assert gate_up[0].data_ptr() == x.data_ptr()
        assert gate_up[2].data_ptr() == experts.data_ptr()
        assert gate_up[3].data_ptr() == slot_by_expert.data_ptr()
        assert gate_up[5].data_ptr() == layer.w1.parts["qweight"].data_ptr()
        hidden = next(a for a in gate_up if isinstance(a, torch.Tensor) and a.shape == (A, F))
        assert down[0].data_ptr() == hidden.data_ptr()
        assert down[2].data_ptr() == weights.data_ptr()
        assert any(isinstance(a, torch.Tensor) and a.data_ptr() == results[number].data_ptr() for a in down)
    assert len({result.data_ptr() for result in results}) == 4


def test_a_plan_serves_inputs_of_its_form_alone_and_ends_with_its_weights_and_tiles(started: Started) -> None:
    kept = [empty_weight(INT4, 64, D, device="cpu")]
    x = torch.randn(1, D).half()

    def call(x: torch.Tensor, clip: float | None = None) -> int:
        """Calls thrice, and returns how many calls have plans."""
        for _ in range(3):
            linear(x, kept[0], clip=clip, backend=Backend.TRITON)
        return sum(plan is not None for plan in plans._SEEN.values())

    assert call(x) == 1
    assert call(x, clip=8.0) == 2
    before = len(started)
    odd = torch.randn(D + 1).half()[1:].view(1, D)
    assert call(odd) == 2
    assert len(started) == before + 3
    problem = Problem("linear", 1, 64, D, 4, 64)
    with trying(problem, CHIPS["sm_90"], Tiles(32, 8, 64, 1, 2, 3)):
        assert call(x) == 3
    kept.clear()
    gc.collect()
    assert not plans._SEEN


def test_a_plan_leaves_out_inputs_that_are_not_contiguous(started: Started) -> None:
    weight, residual = empty_weight(INT4, 64, D, device="cpu"), torch.randn(2, 64).half()
    for _ in range(3):
        linear(torch.randn(2, D).half(), weight, residual=residual, backend=Backend.TRITON)
    assert [plan is not None for plan in plans._SEEN.values()] == [True]
    for x, rest in ((torch.randn(2, 2 * D).half()[:, :D], residual), (torch.randn(2, D).half(), torch.randn(64, 2).half().T)):
        linear(x, weight, residual=rest, backend=Backend.TRITON)
        taken = (started[-1][2][linear_kernel.arg_names.index(name)] for name in ("x", "residual"))
        for argument, given in zip(taken, (x, rest), strict=True):
            assert argument.is_contiguous()
            assert torch.equal(argument, given)


def test_a_call_whose_inputs_are_one_tensor_is_no_plan_for_two(started: Started) -> None:
    weight, residual = empty_weight(INT4, D, D, device="cpu"), linear_kernel.arg_names.index("residual")
    for _ in range(3):
        x = torch.randn(1, D).half()
        linear(x, weight, residual=x, backend=Backend.TRITON)
    other = torch.randn(1, D).half()
    linear(x, weight, residual=other, backend=Backend.TRITON)
    assert started[-1][2][residual].data_ptr() == other.data_ptr()


def test_a_plan_takes_as_many_counters_as_a_call(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a capture by torch itself a launch gets counters of its own, no more than it asks for."""
    monkeypatch.setattr(arrival, "_BY_STREAM", {})
    layer = layer_of()

    def call() -> tuple[tuple[int, int, int], torch.Tensor]:
        """Grid and counters of the last launch."""
        moe_experts(torch.randn(1, D).half(), torch.tensor([[0, 3]]), torch.rand(1, A), layer, backend=Backend.TRITON)
        grid, _, arguments = started[-1]
        return grid, arguments[down_decode_kernel.arg_names.index("arrived")]

    for _ in range(3):
        call()
    assert [plan is not None for plan in plans._SEEN.values()] == [True]
    monkeypatch.setattr(arrival, "_stream", lambda device: 1)
    monkeypatch.setattr(arrival, "_capturing", lambda device: True)
    (row_tiles, _, _), taken = call()
    assert row_tiles > 1
    assert row_tiles <= len(taken) < MOST_COUNTERS


def test_a_call_that_copies_its_input_is_not_planned(started: Started) -> None:
    weight = empty_weight(INT4, 64, D, device="cpu")
    x = torch.randn(D, 1).half().T.expand(2, D)  # not contiguous
    for _ in range(4):
        linear(x, weight, backend=Backend.TRITON)
    assert list(plans._SEEN.values()) == [None]
    assert len(started) == 4
