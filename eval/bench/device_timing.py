"""Time on a GPU: calls captured in a CUDA graph, contenders turn by turn, and what the device is."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

import torch

from dbrx_q.errors import UnsupportedError
from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight
from dbrx_q.kernels.formats.registry import TensorFormat

from .kernel_shapes import empty_weight

__all__ = ["Environment", "MedianTime", "captured", "copies", "device_or_error", "environment", "random_weight", "turns"]

_CACHE_TIMES = 4  # what a rotation reads between two visits, in sizes of the L2 cache


@dataclass(frozen=True)
class Environment:
    """Where and when something was measured. date: ISO 8601, UTC."""

    date: str
    device: str
    chip: str
    multiprocessors: int
    memory: int
    versions: dict[str, str]


@dataclass(frozen=True)
class MedianTime:
    """seconds: the median of one call. graph: whether it ran from a CUDA graph."""

    seconds: float
    graph: bool


def device_or_error(command: str) -> torch.device:
    """The GPU.

    Raises:
        UnsupportedError: torch sees none.
    """
    if not torch.cuda.is_available():
        raise UnsupportedError(
            f"`{command}` measures a GPU; this torch ({torch.__version__}) sees none. Run it on a machine with an NVIDIA or AMD GPU and a "
            "torch that is built for it"
        )
    return torch.device("cuda", torch.cuda.current_device())


def environment(device: torch.device) -> Environment:
    """What `device` is, and the versions that decide how fast it is."""
    import triton

    from dbrx_q.kernels.triton.launch import chip_of

    chip = chip_of(device)
    properties = torch.cuda.get_device_properties(device)
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": str(torch.version.cuda or torch.version.hip)}
    versions["driver"] = _driver()
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Environment(now, properties.name, chip.name, chip.multiprocessors, properties.total_memory, versions)


def random_weight(fmt: TensorFormat, *shape: int, device: torch.device) -> QuantizedWeight:
    """A packed weight [..., N, K] with random codes and scales that give values around 0.01, as a trained one has them."""
    weight = empty_weight(fmt, *shape, device=device)
    codes, *others = weight.parts.values()
    codes.random_(0, 256) if codes.dtype == torch.uint8 else codes.random_(-127, 128)
    levels = fmt.record.grid
    largest = 1 if levels is None else levels.levels if levels.symmetric else (levels.levels + 1) / 2
    for part in others:
        if part.dtype.is_floating_point:  # scales
            part.uniform_(0.015 / largest, 0.03 / largest)
        else:  # zero-points, in the middle of the codes
            part.fill_(0x88)
    return weight


def copies(nbytes: int, device: torch.device) -> int:
    """How many equal inputs to go through, so that none is found in the L2 cache when its turn comes again."""
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20
    return max(1, -(-_CACHE_TIMES * cache // max(1, nbytes)))


def captured(calls: Sequence[Callable[[], object]], *, capture: bool = True) -> tuple[Callable[[], object], bool]:
    """(a function that makes all `calls`, whether from a CUDA graph). A call that no graph can hold is made as it stands."""

    def run() -> None:
        for call in calls:
            call()

    run()  # compiles, and lets libraries allocate what they keep
    torch.cuda.synchronize()
    if not capture:
        return run, False
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:  # of many kinds: what waits for the device, what allocates outside of torch
        torch.cuda.synchronize()
        return run, False
    return graph.replay, True


def turns(contenders: Mapping[str, Sequence[Callable[[], object]]], *, repeats: int, capture: bool = True) -> dict[str, MedianTime]:
    """The median time of one call of each contender; all of them are run in each turn, so that clocks and neighbours treat them alike.

    Args:
        contenders: by name, calls that do the same work on inputs of their own.
        repeats: turns that count, after one that does not.
        capture: whether to take CUDA graphs.
    """
    works = {name: (*captured(calls, capture=capture), len(calls)) for name, calls in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, (run, _, count) in works.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            if turn:
                times[name].append(start.elapsed_time(end) / 1000 / count)
    return {name: MedianTime(statistics.median(times[name]), graph) for name, (_, graph, _) in works.items()}


def _driver() -> str:
    import shutil
    import subprocess

    if shutil.which("nvidia-smi") is None:
        return "unknown"
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return (done.stdout.splitlines() or ["unknown"])[0].strip()
