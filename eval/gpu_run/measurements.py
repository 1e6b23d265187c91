"""What a worker measures, item by item; with the device "meta" it records the launches instead."""

from __future__ import annotations

import gc
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dbrx_q.errors import DbrxError
from dbrx_q.eval.bench.ceilings import CeilingMeter
from dbrx_q.eval.bench.device_timing import environment
from dbrx_q.eval.bench.kernel_work import NamedWork, Work, dbrx_works, step_work
from dbrx_q.eval.bench.kernels import time_work
from dbrx_q.eval.bench.tune import DeviceTimer, problem_calls, sweep
from dbrx_q.kernels.triton.launch import Launch, chip_of, recording
from dbrx_q.kernels.triton.tiles import Problem, Tiles, trying

from .offloading import offloaded_decoding
from .plan import problem_name, tuned_problems
from .random_model import config_of, layers_that_fit, random_model
from .settings import DRY_CHIP, Settings

__all__ = ["PACKAGES", "measure"]

PACKAGES = (
    "numpy",
    "numba",
    "torch",
    "triton",
    "typer",
    "rich",
    "safetensors",
    "tiktoken",
    "huggingface_hub",
    "jinja2",
    "pytest",
    "xdist",
    "bitsandbytes",
    "transformers",
    "gguf",
)
"""Packages that some part of the project imports; a run says which are missing."""
_REPEATS = 10
_LAYERS = 40
_RESERVE = 8 << 30  # bytes of the GPU's memory beside the weights: KV cache, workspaces, the allocator
_STEPS = 32
_CONTEXT = 1024


def measure(stage: str, name: str, settings: Settings, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The result of an item that a worker measures, in values that JSON has.

    Args:
        stage: of the item.
        name: of the item.
        settings: of the run.
        arguments: "seconds" that the item may take; "choices" of tiles, as `tuning` items return them; a "folder" for temporary
            files.
    """
    try:
        return _measure(stage, name, settings, arguments)
    finally:
        if not settings.dry:  # the next item gets all of the memory
            gc.collect()
            torch.cuda.empty_cache()


def _measure(stage: str, name: str, settings: Settings, arguments: Mapping[str, Any]) -> dict[str, Any]:
    device = settings.torch_device
    match stage:
        case "system":
            return _system(device)
        case "ceilings":
            return _ceilings(device)
        case "memcheck":
            return one_call_of_each(settings)
        case "rows":
            return _row(_work(name, settings, device), device)
        case "tuned":
            with ExitStack() as tried:
                chip = DRY_CHIP if settings.dry else chip_of(device)
                for choice in arguments["choices"]:
                    tried.enter_context(trying(Problem(**choice["problem"]), chip, Tiles(**choice["tiles"])))
                return _row(_work(name, settings, device), device)
        case "model":
            return _decode_step(settings, device)
        case "offload":
            return offloaded_decoding(settings.shapes, device, Path(arguments["folder"]))
        case "tuning":
            chip = DRY_CHIP if settings.dry else chip_of(device)
            problem = next(problem for problem in tuned_problems(settings, chip) if problem_name(problem) == name)
            return _tune(problem, settings, device, float(arguments["seconds"]))
    raise AssertionError(stage)


def one_call_of_each(settings: Settings) -> dict[str, Any]:
    """Call every op of the kernel benchmark once, at small sizes."""
    from .settings import SMALL

    device = settings.torch_device
    called = []
    for work in dbrx_works(device, SMALL):
        _launches(work.make, device) if settings.dry else work.make().contenders["dbrx_q"]()[0]()
        called.append(work.name)
    if not settings.dry:
        torch.cuda.synchronize()
    return {"calls": called}


def _system(device: torch.device) -> dict[str, Any]:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    python = {"python": platform.python_version(), "missing": missing}
    if device.type == "meta":
        return python | {"chip": DRY_CHIP.name, "versions": {"torch": torch.__version__}}
    return python | asdict(environment(device))


def _ceilings(device: torch.device) -> dict[str, Any]:
    if device.type == "meta":
        return {"dry": True}
    return asdict(CeilingMeter(device, torch.bfloat16).measure(_REPEATS))


def _work(name: str, settings: Settings, device: torch.device) -> NamedWork:
    return next(work for work in dbrx_works(device, settings.shapes) if work.name == name)


def _row(named: NamedWork, device: torch.device) -> dict[str, Any]:
    if device.type == "meta":
        return _recorded(named.make, device)
    work = named.make()
    times, failed = time_work(work, _REPEATS)
    if "dbrx_q" in failed:
        raise DbrxError(failed["dbrx_q"])
    return _described(work) | {"times": {name: asdict(timed) for name, timed in times.items()}, "failed": failed}


def _described(work: Work) -> dict[str, Any]:
    return {name: getattr(work, name) for name in ("kernel", "case", "ceiling", "amount", "target", "rival")}


def _recorded(make: Callable[[], Work], device: torch.device) -> dict[str, Any]:
    work, launches = _launches(make, device)
    return _described(work) | {"dry": True, "launches": [launch.kernel.__name__ for launch in launches]}


def _launches(make: Callable[[], Work], device: torch.device) -> tuple[Work, Sequence[Launch]]:
    """A row without memory, and what its first call launches."""
    assert device.type == "meta"
    with recording(DRY_CHIP) as launches:
        work = make()
        work.contenders["dbrx_q"]()[0]()
    return work, launches


def _decode_step(settings: Settings, device: torch.device) -> dict[str, Any]:
    """One token of a whole model: on the GPU alone, and as a loop on the host that chooses the next token sees it."""
    if settings.dry:
        config = config_of(settings.shapes, 2)
        return _recorded(lambda: step_work(random_model(config, device), context=settings.shapes.context), device) | {"layers": 2}
    free, _ = torch.cuda.mem_get_info(device)
    layers = layers_that_fit(settings.shapes, _LAYERS, free - _RESERVE)
    started = time.perf_counter()
    model = random_model(config_of(settings.shapes, layers), device)
    torch.cuda.synchronize(device)
    built = time.perf_counter() - started
    work = step_work(model, context=_CONTEXT)
    times, failed = time_work(work, _REPEATS)
    [call] = work.contenders["dbrx_q"]()
    return _described(work) | {
        "layers": layers,
        "of_layers": _LAYERS,
        "build_seconds": built,
        "host_loop_seconds": _host_loop(call, device),
        "peak_bytes": torch.cuda.max_memory_allocated(device),
        "times": {name: asdict(timed) for name, timed in times.items()},
        "failed": failed,
    }


def _host_loop(call: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of a step whose token the host reads before it starts the next step."""
    times = []
    for _ in range(_STEPS):
        started = time.perf_counter()
        int(call().argmax())
        times.append(time.perf_counter() - started)
    torch.cuda.synchronize(device)
    return statistics.median(times)


def _tune(problem: Problem, settings: Settings, device: torch.device, seconds: float) -> dict[str, Any]:
    ends = time.monotonic() + seconds
    chip = DRY_CHIP if settings.dry else chip_of(device)
    timer = _counting_timer(settings) if settings.dry else DeviceTimer(device, settings.shapes)
    choices, failures = sweep([problem], chip, timer, over=lambda: time.monotonic() > ends)
    result = {"dry": settings.dry, "failures": [asdict(failure) for failure in failures]}
    return result | {"choice": asdict(choices[0]) if choices else None}


def _counting_timer(settings: Settings) -> Callable[[Problem, Tiles], float]:
    """Stands in for a GPU's clock: seconds by the programs that are launched, so that a sweep runs without one."""

    def timer(problem: Problem, tiles: Tiles) -> float:
        with recording(DRY_CHIP) as launches, trying(problem, DRY_CHIP, tiles):
            problem_calls(problem, torch.device("meta"), settings.shapes)[0]()
        return 1e-6 * sum(launch.grid[0] for launch in launches)

    return timer
