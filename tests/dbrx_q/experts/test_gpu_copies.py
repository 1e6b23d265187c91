"""Copies to a GPU: their order, what waits for them and what does not, and which experts the CPU computes instead."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dbrx_q import DbrxForCausalLM
from dbrx_q.errors import DbrxError
from dbrx_q.experts.cache import ExpertCache
from dbrx_q.experts.gpu_experts import GpuExperts
from dbrx_q.experts.gpu_store import GpuExpertStore
from dbrx_q.experts.link import Link, PendingCopy, make_link
from dbrx_q.experts.split import MissRates, split_misses
from dbrx_q.experts.sums import PairSum
from dbrx_q.kernels.formats.expert_weights import Routing
from dbrx_q.planning.budget import Budget
from dbrx_q.planning.policy_names import MissPolicy

CPU = torch.device("cpu")
TIMEOUT = 60

Gpus = Callable[..., Budget]
OneGpu = Callable[[MissPolicy], GpuExperts]


class Gate:
    """Holds a link's copies, all or those that `hold` selects, until it is opened."""

    def __init__(self, link: Link, hold: Callable[[Any], bool] = lambda job: True) -> None:
        self.order: list[int] = []
        self._open, self._hold, self._real = threading.Event(), hold, link._send
        link._send = self._send  # type: ignore[method-assign] # to see and hold what is sent

    def open(self) -> None:
        """Let all copies pass."""
        self._open.set()

    def _send(self, job: Any) -> Any:
        if self._hold(job):
            assert self._open.wait(TIMEOUT)
        self.order.append(int(job.sources[0].flatten()[0]))
        return self._real(job)


def test_copies_are_sent_in_the_order_of_need() -> None:
    link = make_link(CPU)
    gate = Gate(link)
    target = torch.zeros(8, 3)
    pending_copies = [link.copy([torch.full((3,), float(i))], [target[i]], urgent=i in (0, 3)) for i in range(8)]
    begun(link, pending_copies[0])
    link.prioritize(pending_copies[4])
    link.defer(pending_copies[1])
    link.prioritize(pending_copies[5])
    link.defer(pending_copies[5])
    link.cancel(pending_copies[6])
    for move in (link.prioritize, link.defer):
        move(pending_copies[0])
    gate.open()
    for pending in [*pending_copies[:6], pending_copies[7]]:
        pending.wait()
    with pytest.raises(DbrxError, match="cancelled"):
        pending_copies[6].wait()
    assert gate.order == [0, 3, 4, 2, 7, 1, 5]
    assert target[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 0, 7]
    assert link.bytes_copied == 7 * 12
    link.drain()
    link.close()


def begun(link: Link, pending: PendingCopy) -> None:
    """Return when the link has started a copy."""
    until = time.monotonic() + TIMEOUT
    while any(job.pending is pending for job in list(link._jobs)):
        assert time.monotonic() < until, "the link does not start it"
        time.sleep(0.001)


def test_a_copy_that_is_cancelled_in_progress_is_not_completed() -> None:
    link = make_link(CPU)
    gate = Gate(link)
    target = torch.zeros(3)
    pending = link.copy([torch.ones(3), torch.ones(3)], [target, target], urgent=False)
    begun(link, pending)
    link.cancel(pending)
    assert not pending.done  # its source must not be overwritten yet
    gate.open()
    pending.join()
    assert target.tolist() == [0, 0, 0]
    with pytest.raises(DbrxError, match="cancelled"):
        pending.wait()
    link.close()


class Noted(PairSum):
    """Notes which experts are computed where, in order."""

    def __init__(self, x: torch.Tensor, routing: Any, notes: list[tuple[str, list[int]]]) -> None:
        super().__init__(x, routing)
        self._notes = notes

    def add_gpu(self, weights: Any, slots: Any) -> None:
        self._notes.append(("gpu", sorted(slots)))
        super().add_gpu(weights, slots)

    def add_host(self, weights: Any, slots: Any) -> None:
        self._notes.append(("host", sorted(slots)))
        super().add_host(weights, slots)


ROUTING = Routing(torch.zeros(1, 16), torch.tensor([[3, 7, 1, 9]]), torch.full((1, 4), 0.25))


@pytest.fixture
def one_gpu(loaded: Callable[..., DbrxForCausalLM], gpus: Gpus) -> OneGpu:
    """Makes a GPU with empty slots for some experts; host memory holds those of the first two layers."""

    def make(miss_policy: MissPolicy) -> GpuExperts:
        store = loaded(gpus(2.6, ram=5.0, miss_policy=miss_policy)).expert_store
        assert isinstance(store, GpuExpertStore)
        [gpu] = store.gpus
        gpu._main_pool.arrived.clear()
        gpu.recover()
        gpu._main_pool.cache(0).evictable = None
        store.tier.clear()
        store.tier.fill(np.repeat([1.0, 1.0, 0.0, 0.0], 16).reshape(4, 16))
        return gpu

    return make


def test_the_cpu_does_not_wait_for_prefetches(one_gpu: OneGpu) -> None:
    """Prefetches start before the CPU computes; experts that have not arrived are computed last."""
    gpu, x, notes = one_gpu(MissPolicy.cpu), torch.randn(1, 128), []
    notes_at_start: list[list[int]] = []
    real = gpu.link.copy

    def copy(sources: Any, targets: Any, **options: Any) -> Any:
        notes_at_start.append([len(notes)])
        return real(sources, targets, **options)

    gpu.link.copy = copy  # type: ignore[method-assign] # to see when
    gate = Gate(gpu.link)
    gpu.serve(0, Noted(x, ROUTING, notes), [1, 3, 7, 9], [3, 1])
    assert notes == [("host", [1, 3, 7, 9])]
    assert notes_at_start == [[0], [0]]  # before the CPU computed
    notes.clear()
    threading.Timer(0.2, gate.open).start()
    before = gpu.wait_seconds
    gpu.serve(1, Noted(x, ROUTING, notes), [1, 3, 7, 9], [])
    assert notes == [("host", [7, 9]), ("gpu", [3]), ("gpu", [1])]
    assert gpu.wait_seconds > before
    assert gpu.stats.prefetch_hits == 2
    assert gpu.copies.predicted == {}


def test_hybrid_computes_experts_whose_copies_are_late(one_gpu: OneGpu) -> None:
    gpu, x, notes = one_gpu(MissPolicy.hybrid), torch.randn(1, 128), []
    gpu.rates = MissRates(cpu=1e12, link=1.0)  # no copy is worth it
    gate = Gate(gpu.link)  # and none arrives
    gpu.serve(0, Noted(x, ROUTING, notes), [1, 3, 7, 9], [3, 1])
    gpu.serve(1, Noted(x, ROUTING, notes), [1, 3, 7, 9], [5])
    assert notes == [("host", [1, 3, 7, 9])] * 2
    assert gpu.computed_on_cpu == gpu.stats.misses == 8
    gate.open()
    gpu.link.drain()
    notes.clear()
    gpu.serve(1, Noted(x, ROUTING, notes), [1, 3, 7, 9], [])  # they have arrived since
    assert notes == [("gpu", [1, 3]), ("host", [7, 9])]
    assert gpu.stats.prefetch_hits == 2


def test_host_slots_that_copies_read_are_not_overwritten(one_gpu: OneGpu) -> None:
    gpu = one_gpu(MissPolicy.cpu)
    gate = Gate(gpu.link)
    gpu.serve(0, PairSum(torch.randn(1, 128), ROUTING), [1, 3, 7, 9], [3])
    assert list(gpu.copies.predicted) == [(1, 3)]
    [(_, pending)] = [read for read in gpu.copies._reading if not read[1].done]
    begun(gpu.link, pending)
    assert list(gpu._tier.slot_readers) == [gpu.copies]
    for still_wanted in (True, False):  # nor if the copy is cancelled in progress
        if not still_wanted:
            gate = Gate(gpu.link)
            gpu.serve(0, PairSum(torch.randn(1, 128), ROUTING), [1, 3, 7, 9], [9])
            [pending] = [pending for expert_id, pending in gpu.copies._reading if expert_id == (1, 9)]
            begun(gpu.link, pending)
            gpu.link.cancel(pending)
        reused = threading.Event()
        expert_id = (1, 3) if still_wanted else (1, 9)

        def reuse(expert_id: tuple[int, int] = expert_id, reused: threading.Event = reused) -> None:
            gpu.copies.wait_until_unread(expert_id)
            reused.set()

        threading.Thread(target=reuse, daemon=True).start()
        assert not reused.wait(0.2)
        gate.open()
        assert reused.wait(TIMEOUT)


def occupied(gpu: GpuExperts, free: int) -> ExpertCache:
    """The GPU's cache when experts of the last two layers, which no other memory holds, take all but `free` slots."""
    cache = gpu._main_pool.cache(1)
    for key in range(32, 64):
        if len(cache._free) > free:
            assert cache.assign(*divmod(key, 16)) is not None
    assert len(cache._free) == free
    cache.evictable = lambda: np.arange(64) < 32
    return cache


def test_a_wrong_prediction_does_not_block_host_memory(one_gpu: OneGpu) -> None:
    """Its copy is cancelled when its host slot is needed; a copy that a layer waits for is not."""
    gpu = one_gpu(MissPolicy.hybrid)
    gpu.rates = MissRates(cpu=1e12, link=1.0)
    gate = Gate(gpu.link)
    gpu.serve(0, PairSum(torch.randn(1, 128), ROUTING), [1, 3, 7, 9], [3, 9])
    cache, (first, second) = gpu._main_pool.cache(1), gpu.copies.predicted.values()
    begun(gpu.link, first)
    gpu.link.prioritize(second)
    threading.Timer(0.2, gate.open).start()
    gpu.copies.wait_until_unread((1, 3))
    assert first.cancelled
    assert [cache.slot_of(1, e) >= 0 for e in (3, 9)] == [False, True]
    gpu.copies.wait_until_unread((1, 9))
    assert second.done
    assert not second.cancelled
    assert list(gpu.copies.predicted) == [(1, 9)]
    assert len(cache._free) == cache.slots - 1


def test_experts_that_are_being_copied_are_not_evicted_first(loaded: Callable[..., DbrxForCausalLM], gpus: Gpus) -> None:
    """Host memory first evicts experts that a GPU holds, too, unless their copies are under way."""
    store = loaded(gpus(2.2, ram=1.6, miss_policy=MissPolicy.cpu)).expert_store
    assert isinstance(store, GpuExpertStore)
    [gpu] = store.gpus
    [host] = [pool.cache for pool in store.tier._pools.values()]
    assert host.evict_first is not None
    assert host.evict_first().sum() == gpu.caches[0].held.sum() > 0
    in_host_only = [e for e in range(16) if store.tier.holds(1, e) and gpu.caches[0].slot_of(1, e) < 0]
    gate = Gate(gpu.link)
    x = torch.randn(1, 128)
    needed = [e for e in range(16) if store.tier.holds(0, e) or gpu.caches[0].slot_of(0, e) >= 0][:4]
    routing = replace(ROUTING, experts=torch.tensor([needed]))
    gpu.serve(0, PairSum(x, routing), needed, in_host_only[:1])
    assert list(gpu.copies.predicted) == [(1, in_host_only[0])]
    assert gpu.caches[0].slot_of(1, in_host_only[0]) >= 0
    assert not host.evict_first()[16 + in_host_only[0]]
    gate.open()


def test_a_copy_starts_when_the_hits_have_released_their_slots(one_gpu: OneGpu) -> None:
    """Not only when the CPU has computed its share."""
    gpu, x, notes = one_gpu(MissPolicy.hybrid), torch.randn(1, 128), []
    cache = occupied(gpu, free=2)
    for e in (3, 9):
        assignment = cache.assign(1, e)
        assert assignment is not None
        gpu.copy_now(assignment, gpu._main_pool.host_views(1, e))
    gpu.rates = MissRates(cpu=1e9, link=1e9)  # of the two that are missed one goes each way
    notes_at_start: list[list[tuple[str, list[int]]]] = []
    real = gpu.link.copy

    def copy(sources: Any, targets: Any, **options: Any) -> Any:
        notes_at_start.append(list(notes))
        return real(sources, targets, **options)

    gpu.link.copy = copy  # type: ignore[method-assign] # to see when
    gpu.serve(1, Noted(x, ROUTING, notes), [1, 3, 7, 9], [])
    assert notes_at_start == [[("gpu", [3, 9])]]
    assert sorted(e for _, experts in notes for e in experts) == [1, 3, 7, 9]
    assert sorted(device for device, _ in notes) == ["gpu", "gpu", "host"]


def test_prefetches_do_not_evict_prefetched_experts(one_gpu: OneGpu) -> None:
    gpu, x = one_gpu(MissPolicy.cpu), torch.randn(1, 128)
    cache = occupied(gpu, free=2)
    gpu.serve(0, PairSum(x, ROUTING), [1, 3, 7, 9], [5, 3, 1])  # slots for two
    assert list(gpu.copies.predicted) == [(1, 5), (1, 3)]
    assert gpu.stats.prefetches == 2
    gpu.serve(0, PairSum(x, ROUTING), [1, 3, 7, 9], [5, 1])
    assert [cache.slot_of(1, e) >= 0 for e in (5, 3, 1)] == [True, False, True]  # an expert that is predicted again stays


def test_an_error_waits_for_the_copies_of_other_gpus(
    loaded: Callable[..., DbrxForCausalLM], monkeypatch: pytest.MonkeyPatch, gpus: Gpus
) -> None:
    """The host slots that they read may be free after it."""
    store = loaded(gpus(1.6, 1.6, ram=5.0)).expert_store
    assert isinstance(store, GpuExpertStore)
    first, second = store.gpus
    gate = Gate(second.link)
    pending = second.link.copy([torch.ones(3)], [torch.zeros(3)], urgent=False)
    threading.Timer(0.2, gate.open).start()
    monkeypatch.setattr(first, "_serve", lambda *_: (_ for _ in ()).throw(RuntimeError("the bus is gone")))
    with pytest.raises(RuntimeError, match="the bus is gone"):
        store._serve(0, PairSum(torch.randn(1, 128), ROUTING), [1, 3, 7, 9], [])
    assert pending.done


@given(
    st.dictionaries(st.integers(0, 15), st.integers(1, 40), max_size=16),
    st.floats(1e9, 1e11),
    st.floats(1e9, 1e11),
)
@settings(max_examples=200, deadline=None)
def test_a_split_is_as_fast_as_any(missed: dict[int, int], cpu: float, link: float) -> None:
    rates, nbytes = MissRates(cpu, link), 10**8

    def seconds(on_cpu: list[int]) -> float:
        return max(sum(rates.cpu_seconds(nbytes, missed[e]) for e in on_cpu), (len(missed) - len(on_cpu)) * nbytes / link)

    on_cpu, copied = split_misses(missed, nbytes, rates, MissPolicy.hybrid)
    assert sorted(on_cpu + copied) == sorted(missed)
    by_tokens = sorted(missed, key=lambda e: missed[e])
    assert seconds(on_cpu) == pytest.approx(min(seconds(by_tokens[:k]) for k in range(len(missed) + 1)))
    assert split_misses(missed, nbytes, rates, MissPolicy.cpu) == (sorted(missed), [])
    assert split_misses(missed, nbytes, rates, MissPolicy.copy) == ([], sorted(missed))
    cpu_seconds = max(sum(rates.cpu_seconds(nbytes, tokens) for tokens in missed.values()), 0)
    assert seconds(on_cpu) <= min(cpu_seconds, len(missed) * nbytes / link) * 1.0000001


def test_started_copies_are_used_unless_the_cpu_is_faster() -> None:
    even, slow = MissRates(10.0, 10.0), MissRates(10.0, 1.0)
    assert split_misses({2: 1}, 10, even, MissPolicy.hybrid, {5: (1, 10)}) == ([2], [])  # one each
    assert split_misses({}, 10, even, MissPolicy.hybrid, {5: (1, 10)}) == ([], [])
    assert split_misses({2: 1, 3: 1}, 10, even, MissPolicy.hybrid, {5: (1, 10), 6: (1, 10)}) == ([2, 3], [])
    assert split_misses({2: 1, 3: 1}, 10, even, MissPolicy.hybrid, {5: (1, 1)}) == ([2], [3])  # it has almost arrived
    assert split_misses({2: 1}, 10, slow, MissPolicy.hybrid, {5: (1, 10), 6: (1, 10)}) == ([2, 5, 6], [])
    assert split_misses({2: 1}, 10, slow, MissPolicy.hybrid, {5: (1, 1), 6: (1, 10)}) == ([2, 6], [])  # the last to arrive
    assert split_misses({2: 1}, 10, slow, MissPolicy.hybrid, {5: (1, 10), 6: (80, 10)}) == ([2], [])  # 80 tokens are 20 reads
    assert split_misses({2: 1}, 10, slow, MissPolicy.cpu, {5: (1, 10)}) == ([2], [])
    assert split_misses({2: 1}, 10, slow, MissPolicy.copy, {5: (1, 10)}) == ([], [2])


def test_rates_follow_measurements() -> None:
    rates = MissRates(10.0, 20.0)
    for _ in range(60):
        rates.observe(cpu_bytes=100, cpu_seconds=5)
    assert rates.cpu == pytest.approx(20, rel=0.02)
    assert rates.link == 20
    rates.observe(link_bytes=0, link_seconds=0)
    assert rates.link == 20
