"""A kernel compiled ahead of time is found by the JIT: both give Triton's cache the same key."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.driver import driver

import dbrx_q.kernels.triton.launch as launch_module
from dbrx_q.eval.bench.kernel_shapes import dbrx_launches, essential
from dbrx_q.eval.gpu_run.compiling import compile_as_the_jit, compile_requests
from dbrx_q.eval.gpu_run.settings import SMALL
from dbrx_q.kernels.formats.registry import TensorFormat
from dbrx_q.kernels.triton.launch import CHIPS, Launch, compiler_options, launch

CHIP = CHIPS["sm_90"]


class DriverOfAnotherMachine:
    """What the JIT asks of a machine's driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


class NotRunError(Exception):
    """Raised where the JIT would run the kernel."""


@pytest.fixture
def requested(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of what the JIT compiles, which is not compiled, on a machine with an H200."""
    keys: list[str] = []

    def refuse(source: Any, target: GPUTarget, options: dict[str, Any], **_: Any) -> None:
        keys.append(key_of(source, target, options))
        raise NotRunError

    monkeypatch.setattr("triton.compiler.compile", refuse)
    monkeypatch.setattr(driver, "_active", DriverOfAnotherMachine())
    monkeypatch.setattr(launch_module, "chip_of", lambda _: CHIP)
    return keys


def key_of(source: Any, target: GPUTarget, options: dict[str, Any]) -> str:
    backend = make_backend(target)
    parsed = backend.parse_options(dict(options, **source.parse_options()))
    return f"{source.hash()} {backend.hash()} {parsed.hash()}"


@pytest.fixture(scope="module")
def launches() -> list[Launch]:
    formats = TensorFormat("int4", 64), TensorFormat.of("trellis2")
    return [launch for _, launch in essential(dbrx_launches(CHIP, formats=formats, shapes=SMALL, searched=("trellis2",)))]


def test_a_request_has_the_key_of_the_launch_that_it_was_made_from(requested: list[str], launches: list[Launch]) -> None:
    assert len({recorded.kernel for recorded in launches}) > 12
    for recorded in launches:
        [request] = pickle.loads(pickle.dumps(compile_requests([recorded])))
        options = {"warps": recorded.warps, "stages": recorded.stages, "fusion": recorded.fusion}
        constants = {name: value for name, value in recorded.constants.items() if name != "PDL"}  # which `launch` adds
        for run in (
            lambda request=request: compile_as_the_jit(request, CHIP),
            lambda recorded=recorded, options=options, constants=constants: launch(
                recorded.kernel, recorded.grid, *recorded.arguments, **options, **constants
            ),
        ):
            recorded.kernel.device_caches.clear()
            driver.set_active(DriverOfAnotherMachine())
            with pytest.raises(NotRunError):
                run()
        recorded.kernel.device_caches.clear()
        assert requested[-1] == requested[-2], recorded.kernel.__name__
    assert len(set(requested)) == len(compile_requests(launches))


def test_the_jit_compiles_nothing_that_was_compiled_before(launches: list[Launch], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In Triton's own cache, from which the JIT then reads the kernel."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", DriverOfAnotherMachine())
    recorded = next(launch for launch in launches if launch.kernel.__name__ == "add_norm_kernel")
    [request] = compile_requests([recorded])
    assert compile_as_the_jit(request, CHIP).asm["cubin"]
    entries = sorted(tmp_path.iterdir())
    assert entries
    recorded.kernel.device_caches.clear()
    options = compiler_options(recorded.warps, recorded.stages, recorded.fusion, recorded.pdl)
    again = recorded.kernel.warmup(*recorded.arguments, grid=recorded.grid, **options, **recorded.constants)
    recorded.kernel.device_caches.clear()
    assert again.asm["cubin"]
    assert sorted(tmp_path.iterdir()) == entries
