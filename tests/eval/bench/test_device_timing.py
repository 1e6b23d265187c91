"""The benchmark's clock, on a simulated GPU: a host that enqueues, a stream that runs what is enqueued, and events on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch

from dbrx_q.eval.bench import device_timing
from dbrx_q.eval.bench.device_timing import captured, turns
from dbrx_q.kernels.triton import arrival

LAUNCH = 8e-6  # seconds of host time per launch, of a kernel or of a graph
CLOCK = 1.755e9  # of an H200


class SimulatedGpu:
    """One stream in order. The host's clock advances by launches and by waiting; the stream runs work once the host has enqueued it."""

    def __init__(self) -> None:
        self.host = self.stream = 0.0
        self.recorded: list[float] | None = None
        self.kernels = 0
        self.modes: list[str] = []

    def launch(self, seconds: float) -> None:
        if self.recorded is not None:
            self.recorded.append(seconds)
            return
        self.host += LAUNCH
        self.run(seconds)

    def run(self, seconds: float) -> None:
        self.stream = max(self.stream, self.host) + seconds
        self.kernels += 1

    def synchronize(self) -> None:
        if self.recorded is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.host = max(self.host, self.stream)

    def kernel(self, seconds: float) -> Callable[[], None]:
        return lambda: self.launch(seconds)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimulatedGpu:
    """Stands in for `torch.cuda` and for the host's clock."""
    simulated = SimulatedGpu()

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.time = max(simulated.stream, simulated.host)

        def synchronize(self) -> None:
            simulated.host = max(simulated.host, self.time)

        def elapsed_time(self, end: Event) -> float:
            return (end.time - self.time) * 1000

    class Graph:
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def replay(self) -> None:
            simulated.host += LAUNCH
            for seconds in self.seconds:
                simulated.run(seconds)

    @contextmanager
    def graph(captured: Graph, pool: object = None, stream: object = None, capture_error_mode: str = "global") -> Iterator[None]:
        simulated.modes.append(capture_error_mode)
        simulated.recorded = captured.seconds
        try:
            yield
        finally:
            simulated.recorded = None

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(arrival, "_capture_stream", lambda index: None)
    monkeypatch.setattr(arrival, "new_counters", lambda device: torch.zeros(1, dtype=torch.int32))
    monkeypatch.setattr(torch.cuda, "synchronize", simulated.synchronize)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: simulated.launch(cycles / CLOCK), raising=False)
    monkeypatch.setattr("time.perf_counter", lambda: simulated.host)
    return simulated


@pytest.mark.parametrize("capture", [True, False], ids=["graph", "eager"])
@pytest.mark.parametrize("seconds", [4e-6, 40e-6, 3e-3])
@pytest.mark.parametrize("calls", [1, 3])
def test_a_kernel_takes_its_own_time_without_the_hosts(gpu: SimulatedGpu, capture: bool, seconds: float, calls: int) -> None:
    timed = turns({"kernel": [gpu.kernel(seconds)] * calls}, repeats=3, capture=capture)["kernel"]
    assert timed.graph == capture
    assert timed.seconds == pytest.approx(seconds, rel=0.01)


def test_a_sample_is_long_enough_and_its_launches_fit_the_queue(gpu: SimulatedGpu) -> None:
    for seconds, least, most in ((4e-6, 350, 512), (1e-7, 500, 512), (2e-3, 1, 1)):
        sample = device_timing._sample([gpu.kernel(seconds)], capture=True)
        assert least <= sample.calls <= most


def test_contenders_that_cannot_be_captured_run_eagerly_and_the_host_does_not_count(gpu: SimulatedGpu) -> None:
    def waits() -> None:
        gpu.launch(5e-6)
        gpu.synchronize()

    times = turns({"ours": [gpu.kernel(9e-6)], "waits": [waits]}, repeats=2)
    assert times["ours"].seconds == pytest.approx(9e-6, rel=0.01)
    assert times["ours"].graph
    assert not times["waits"].graph
    assert times["waits"].seconds >= 5e-6


def test_work_of_the_host_before_a_replay_is_hidden(gpu: SimulatedGpu) -> None:
    """A decode step writes its inputs on the host before it replays its graph."""

    def step() -> None:
        gpu.host += 150e-6
        gpu.launch(6e-3)

    assert turns({"step": [step]}, repeats=2, capture=False)["step"].seconds == pytest.approx(6e-3, rel=0.001)


def test_a_capture_lets_other_threads_use_the_gpu(gpu: SimulatedGpu) -> None:
    run, graph = captured([gpu.kernel(1e-6)], passes=5)
    before = gpu.kernels
    run()
    assert graph
    assert gpu.kernels - before == 5
    assert gpu.modes == ["thread_local"]
