"""Times calls on a GPU: from CUDA graphs, behind a spin that hides the host, contenders in turns; describes the device."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

import torch

from dbrx_q.errors import UnsupportedError
from dbrx_q.kernels.formats.quantized_weight import QuantizedWeight
from dbrx_q.kernels.formats.registry import TensorFormat

from .kernel_shapes import empty_weight

__all__ = ["Environment", "MedianTime", "captured", "copies", "device_or_error", "environment", "random_weight", "turns"]

_CACHE_TIMES = 4  # bytes read between two uses of an input, in sizes of the L2 cache
_SAMPLE_SECONDS = 1.5e-3  # work of one sample: the time from an event to the first kernel, 1 to 2 us, is then no part of the result
_SAMPLE_CALLS = 512  # most calls in one sample: the driver queues 1,024 launches before the host has to wait
_LEAST_SPIN = 300e-6  # the launch of a graph takes the host 6 to 12 us, of a large one some 100
_LONGEST_SPIN = 20e-3  # calls that wait for the GPU take as long as the spin before them
_FASTEST_CLOCK = 3e9  # cycles/s that no GPU exceeds, so that a spin is never shorter than asked for


@dataclass(frozen=True)
class Environment:
    """Where and when a measurement was made."""

    date: str
    """ISO 8601, UTC."""
    device: str
    """Name of the GPU."""
    chip: str
    """Name of its architecture, such as "sm_90"."""
    multiprocessors: int
    """How many the GPU has."""
    memory: int
    """Bytes of GPU memory."""
    versions: dict[str, str]
    """Of torch, Triton, CUDA or HIP, and the driver."""


@dataclass(frozen=True)
class MedianTime:
    """The time of one contender."""

    seconds: float
    """Median of one call."""
    graph: bool
    """Whether it ran from a CUDA graph."""


def device_or_error(command: str) -> torch.device:
    """The current GPU.

    Args:
        command: that needs it, for the error.

    Raises:
        UnsupportedError: torch sees none.
    """
    if not torch.cuda.is_available():
        raise UnsupportedError(
            f"`{command}` must run on a GPU; this torch ({torch.__version__}) sees none. Use a machine with an NVIDIA or AMD GPU and "
            "a torch built for it"
        )
    return torch.device("cuda", torch.cuda.current_device())


def environment(device: torch.device) -> Environment:
    """Describe `device`, with the versions that affect its speed."""
    import triton

    from dbrx_q.kernels.triton.launch import chip_of

    chip = chip_of(device)
    properties = torch.cuda.get_device_properties(device)
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": str(torch.version.cuda or torch.version.hip)}
    versions["driver"] = _driver()
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Environment(now, properties.name, chip.name, chip.multiprocessors, properties.total_memory, versions)


def random_weight(fmt: TensorFormat, *shape: int, device: torch.device) -> QuantizedWeight:
    """A packed weight [..., N, K] with random codes, and scales that give values around 0.01, as in trained weights."""
    weight = empty_weight(fmt, *shape, device=device)
    codes, *others = weight.parts.values()
    codes.random_(0, 256) if codes.dtype == torch.uint8 else codes.random_(-127, 128)
    levels = fmt.record.grid
    largest = 1 if levels is None else levels.levels if levels.symmetric else (levels.levels + 1) / 2
    if fmt.record.trellis is not None:
        largest = max(fmt.record.trellis.levels)
    for part in others:
        if part.dtype.is_floating_point:  # scales
            part.uniform_(0.015 / largest, 0.03 / largest)
        else:  # zero-points, in the middle of the codes
            part.fill_(0x88)
    return weight


def copies(nbytes: int, device: torch.device) -> int:
    """How many copies of an input of `nbytes` to use in rotation, so that none is still in the L2 cache when it is used again."""
    if device.type != "cuda":
        return 1
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20
    return max(1, -(-_CACHE_TIMES * cache // max(1, nbytes)))


@dataclass(frozen=True)
class _Sample:
    """What is timed between two events."""

    run: Callable[[], object]
    """Enqueues the work."""
    graph: bool
    """Whether from a CUDA graph."""
    calls: int
    """How many calls of the contender the work consists of."""
    enqueue_seconds: float
    """How long the host takes to enqueue it."""


def captured(calls: Sequence[Callable[[], object]], *, capture: bool = True, passes: int = 1) -> tuple[Callable[[], object], bool]:
    """(a function that runs all `calls`, `passes` times in order, whether from a CUDA graph). Calls that cannot be captured run eagerly.

    Args:
        calls: to run; each must have run before, so that it is compiled and libraries have allocated their workspaces.
        capture: whether to try a CUDA graph.
        passes: over `calls`.
    """

    def run() -> None:
        for _ in range(passes):
            for call in calls:
                call()

    if not capture:
        return run, False
    from dbrx_q.kernels.triton.arrival import Graph

    graph = Graph(torch.device("cuda", torch.cuda.current_device()))
    try:
        with graph.capture():
            run()
    except RuntimeError:  # for instance, the call synchronizes or allocates outside of torch
        torch.cuda.synchronize()
        return run, False
    return graph.replay, True


def turns(contenders: Mapping[str, Sequence[Callable[[], object]]], *, repeats: int, capture: bool = True) -> dict[str, MedianTime]:
    """The median time of one call of each contender. Each turn runs all of them, so that clocks and other load affect them alike.

    A sample repeats a contender until it has more than a millisecond of work, and a spin kernel keeps the GPU busy until the host has
    enqueued all of it: neither the host's launches nor the resolution of events count.

    Args:
        contenders: by name, calls that do the same work on different inputs.
        repeats: turns that count, after one that does not.
        capture: whether to use CUDA graphs.
    """
    samples = {name: _sample(calls, capture=capture) for name, calls in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in samples}
    for turn in range(repeats + 1):
        for name, sample in samples.items():
            seconds = _seconds(sample.run, sample.enqueue_seconds) / sample.calls
            if turn:
                times[name].append(seconds)
    return {name: MedianTime(statistics.median(times[name]), sample.graph) for name, sample in samples.items()}


def _sample(calls: Sequence[Callable[[], object]], *, capture: bool) -> _Sample:
    """As many passes over `calls` as give `_SAMPLE_SECONDS` of work."""
    for call in calls:
        call()  # compiles, and lets libraries allocate their workspaces
    torch.cuda.synchronize()
    run, graph = captured(calls, capture=capture)
    enqueue_seconds = _enqueue_seconds(run)
    seconds = _seconds(run, enqueue_seconds)
    passes = max(1, min(math.ceil(_SAMPLE_SECONDS / max(seconds, 1e-9)), _SAMPLE_CALLS // len(calls)))
    if passes > 1:
        run, graph = captured(calls, capture=graph, passes=passes)
        enqueue_seconds = _enqueue_seconds(run)
    return _Sample(run, graph, passes * len(calls), enqueue_seconds)


def _enqueue_seconds(run: Callable[[], object]) -> float:
    """How long the host takes to enqueue `run`, the second time that it does."""
    run()
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    seconds = time.perf_counter() - started
    torch.cuda.synchronize()
    return seconds


def _seconds(run: Callable[[], object], enqueue_seconds: float) -> float:
    """The time that the GPU takes for `run`, which the host enqueues behind a spin of twice `enqueue_seconds`."""
    spin = min(max(_LEAST_SPIN, 2 * enqueue_seconds), _LONGEST_SPIN)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(int(spin * _FASTEST_CLOCK))  # torch's own tests keep streams busy by it
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def _driver() -> str:
    import shutil
    import subprocess

    if shutil.which("nvidia-smi") is None:
        return "unknown"
    result = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return (result.stdout.splitlines() or ["unknown"])[0].strip()
