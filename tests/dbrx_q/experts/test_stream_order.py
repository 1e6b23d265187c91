"""The order of a GPU's streams, on simulated ones: nothing reads a slot while it is written, or the other way round."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dbrx_q import DbrxForCausalLM
from dbrx_q.experts import build, streams
from dbrx_q.experts.gpu_experts import GpuExperts
from dbrx_q.experts.gpu_store import GpuExpertStore
from dbrx_q.experts.link import Link, make_link
from dbrx_q.experts.policies import Lru
from dbrx_q.experts.sums import PairSum
from dbrx_q.kernels.formats.expert_weights import Routing
from dbrx_q.model import loading
from dbrx_q.planning.budget import Budget
from dbrx_q.planning.offloading import LINK_BUFFER_BYTES, LINK_BUFFERS
from dbrx_q.planning.policy_names import MissPolicy

Clock = dict[int, int]
"""For each stream, how much of its work is known to be done."""


class Device:
    """Looks like a CUDA device to the code under test; its memory is the CPU's."""

    type, index = "cuda", 0


class Stream:
    """A stream with a vector clock (Mattern 1988): of two pieces of work, one precedes the other if its clock says so."""

    _handles = itertools.count(1)

    def __init__(self, device: Any = None) -> None:
        self.device, self.cuda_stream, self.clock = device, next(self._handles), Clock()

    def work(self) -> Clock:
        """Give the stream a piece of work; its clock."""
        self.clock = {**self.clock, self.cuda_stream: self.clock.get(self.cuda_stream, 0) + 1}
        return self.clock

    def wait_event(self, event: Event) -> None:
        self.clock = {key: max(self.clock.get(key, 0), event.clock.get(key, 0)) for key in self.clock | event.clock}

    def wait_stream(self, other: Stream) -> None:
        event = Event()
        event.record(other)
        self.wait_event(event)

    def synchronize(self) -> None:
        pass


class Event:
    def __init__(self, *, enable_timing: bool = False, blocking: bool = False) -> None:
        self.blocking, self.clock = blocking, Clock()

    def record(self, stream: Stream) -> None:
        self.clock = dict(stream.clock)

    def synchronize(self) -> None:
        assert self.blocking, "a thread that waits must leave its core to the experts that the CPU computes"

    def query(self) -> bool:
        return False

    def elapsed_time(self, end: Event) -> float:
        return 0.0


class Gpu:
    """A simulated GPU: the current stream, and who used which memory when."""

    def __init__(self) -> None:
        self.current = Stream()
        self.uses: dict[int, list[tuple[str, Stream, Clock]]] = {}

    def use(self, kind: str, stream: Stream, memory: torch.Tensor) -> None:
        self.uses.setdefault(memory.data_ptr(), []).append((kind, stream, stream.work()))

    @property
    def races(self) -> list[str]:
        """Pairs of uses of the same memory, one of them a write, of which none is known to precede the other."""
        return [
            f"{earlier[0]} and {later[0]}"
            for uses in self.uses.values()
            for earlier, later in itertools.combinations(uses, 2)
            if "written" in (earlier[0], later[0])
            and not any(
                b.get(stream.cuda_stream, 0) >= a[stream.cuda_stream] for (_, stream, a), (_, _, b) in ((earlier, later), (later, earlier))
            )
        ]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """Stands in for `torch.cuda`; what is allocated on it is in host memory."""
    simulated, real_empty = Gpu(), torch.empty

    def empty(*shape: Any, device: Any = None, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return real_empty(*shape, device=None if isinstance(device, Device) else device, **options)

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        yield  # only the link's threads change their stream

    monkeypatch.setattr(torch, "empty", empty)
    for name, value in (("Stream", Stream), ("Event", Event), ("stream", on), ("device", lambda device: nullcontext())):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: simulated.current)
    monkeypatch.setattr(streams, "_handle", lambda device: simulated.current.cuda_stream)
    return simulated


class ReadingSum(PairSum):
    """Notes which slots the GPU reads."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__(torch.randn(1, 128), Routing(torch.zeros(1, 16), torch.tensor([[3, 7, 1, 9]]), torch.full((1, 4), 0.25)))
        self._gpu = gpu

    def add_gpu(self, weights: Any, slots: Mapping[int, int]) -> None:
        for slot in slots.values():
            self._gpu.use("read", self._gpu.current, next(iter(weights.w1.parts.values()))[slot])
        super().add_gpu(weights, slots)


@pytest.fixture
def experts(
    gpu: Gpu, loaded: Callable[..., DbrxForCausalLM], gpus: Callable[..., Budget], monkeypatch: pytest.MonkeyPatch
) -> Iterator[GpuExperts]:
    """A GPU with eight slots, whose memory the current stream has read for an earlier owner."""
    store = loaded(gpus(2.6, ram=5.0)).expert_store
    assert isinstance(store, GpuExpertStore)
    [host_gpu], tier = store.gpus, store.tier
    tier.clear()
    tier.fill(np.repeat([1.0, 1.0, 0.0, 0.0], 16).reshape(4, 16))
    link = make_link(Device())  # type: ignore[arg-type] # looks like one
    _note_writes(link, gpu, monkeypatch)
    before = gpu.current.work()
    made = GpuExperts(
        Device(),  # type: ignore[arg-type] # the same
        host_gpu.layers,
        tier,
        link,
        name="simulated",
        slots={tier.kind(0): 8},
        policies={tier.kind(0): Lru(tier.n_layers, tier.n_experts)},
        miss_policy=MissPolicy.copy,
        rates=host_gpu.rates,
    )
    for slot in range(8):
        gpu.uses[made.slot_views(0, slot)[0].data_ptr()] = [("read by an earlier owner", gpu.current, before)]
    yield made
    link.close()


def _note_writes(link: Link, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    real = link._send

    def send(job: Any) -> Any:
        event = real(job)
        gpu.use("written", link._stream, job.targets[0])  # type: ignore[attr-defined] # a CUDA link has one
        if event is not None:
            event.record(link._stream)  # type: ignore[attr-defined] # after the noted work
        return event

    monkeypatch.setattr(link, "_send", send)


def serve(experts: GpuExperts, gpu: Gpu, *layers: int) -> None:
    for layer in layers:
        experts.serve(layer, ReadingSum(gpu), [1, 3, 7, 9], [2, 4] if layer == 0 else [])
    experts.link.drain()


def test_new_slots_are_written_after_the_work_that_still_uses_their_memory(experts: GpuExperts, gpu: Gpu) -> None:
    serve(experts, gpu, 0)
    assert gpu.races == []
    assert sum(len(uses) for uses in gpu.uses.values()) >= 8 + 4 + 4 + 2  # earlier owners, copies, reads and prefetches


def test_slots_are_written_again_after_they_were_read(experts: GpuExperts, gpu: Gpu) -> None:
    serve(experts, gpu, 0, 1, 0, 1)
    assert experts.stats.evictions > 0
    assert gpu.races == []


def test_a_caller_may_change_the_current_stream(experts: GpuExperts, gpu: Gpu) -> None:
    first, second = gpu.current, Stream()
    for stream in (first, second, first, first, second):
        gpu.current = stream
        serve(experts, gpu, 0, 1)
    assert gpu.races == []
    handles = {stream.cuda_stream for uses in gpu.uses.values() for _, stream, _ in uses}
    assert {first.cuda_stream, second.cuda_stream} < handles


@pytest.mark.parametrize("threads", [2, 5])
def test_any_number_of_threads_sends_every_byte(threads: int, gpu: Gpu) -> None:
    link = make_link(Device(), threads)  # type: ignore[arg-type] # looks like one
    sources = [torch.randint(0, 255, (size,), dtype=torch.uint8) for size in (1, 1000, 5 * LINK_BUFFER_BYTES + 3, 23_456_789)]
    targets = [torch.zeros_like(source) for source in sources]
    link.copy(sources, targets, urgent=True).wait()
    assert all(torch.equal(source, target) for source, target in zip(sources, targets, strict=True))
    assert link.bytes_copied == sum(source.nbytes for source in sources)
    rings = link._rings  # type: ignore[attr-defined] # a CUDA link has them
    pinned = sum(buffer.nbytes for ring in rings for buffer in ring._buffers)
    assert pinned == threads * LINK_BUFFERS * LINK_BUFFER_BYTES
    link.close()


def test_a_fast_link_gets_more_threads_and_the_plan_their_memory(
    loaded: Callable[..., DbrxForCausalLM], gpus: Callable[..., Budget], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []

    def noted(device: torch.device, threads: int) -> Link:
        taken.append(threads)
        return make_link(device, threads)

    monkeypatch.setattr(loading, "make_link", noted)
    monkeypatch.setattr(build, "usable_threads", lambda: 64)
    budget = gpus(2.6, ram=5.0)
    usual = loaded(budget).placement
    machine = budget.machine
    assert machine is not None
    assert machine.ram is not None
    fast = replace(machine, ram=machine.ram + (12 << 20), gpus=(replace(machine.gpus[0], link=55e9),))
    faster = loaded(replace(budget, machine=fast)).placement
    assert taken == [2, 5]
    assert usual is not None
    assert faster is not None
    assert faster.host.workspace == usual.host.workspace + (12 << 20)
    assert faster.host.slots == usual.host.slots
