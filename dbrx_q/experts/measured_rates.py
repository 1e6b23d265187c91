"""How fast missed experts are served, measured at load: by the CPU and over a link at once, since both read the same memory."""

from __future__ import annotations

import itertools
import time

import torch

from dbrx_q.kernels.cpu.moe import ExpertOutputs

from .gpu_experts import GpuExperts
from .host_tier import HostTier
from .link import Arrival
from .split import MissRates

__all__ = ["measure_rates"]

_SECONDS = 0.3
_EXPERTS = 16
_LEAST_TURNS = 3


def measure_rates(gpu: GpuExperts, tier: HostTier, dtype: torch.dtype, *, cpu: bool = True, link: bool = True) -> MissRates:
    """Rates of a GPU whose tier is full; those that the GPU was made with where there is nothing to measure with.

    Args:
        gpu: gets copies of an expert into a free slot.
        tier: holds experts of the GPU's layers.
        dtype: of activations.
        cpu, link: which of the two work; both, unless one is to be measured alone.
    """
    places = [(layer, e) for layer in range(*gpu.layers) for e in range(tier.n_experts) if tier.has(layer, e)]
    free = next((layer for layer, _ in places if gpu.free_slot(layer) is not None), None)
    if free is None:
        return gpu.rates
    kind, slot = tier.kind(free), gpu.free_slot(free)
    assert slot is not None
    # One after the other, so that none is read from a cache: together they are larger than any.
    places = [place for place in places if tier.kind(place[0]) == kind]
    turn = itertools.cycle(places[:: max(1, len(places) // _EXPERTS)])
    width = tier.slots(free).weights.w1.shape[-1]  # w1 is [S, F, D]

    def compute() -> None:
        layer, expert = next(turn)
        x, chosen = torch.ones(1, width, dtype=dtype), torch.tensor([[expert]])
        ExpertOutputs(x, chosen).add(tier.slots(layer).weights, {expert: tier.slot_of(layer, expert)})

    def begin() -> Arrival:
        layer, expert = next(turn)
        return gpu.link.copy(tier.slots(layer).views(tier.slot_of(layer, expert)), gpu.slot_views(free, slot), urgent=True)

    compute()  # compiled code
    copies: list[Arrival] = []
    sent, busy = gpu.link.bytes_copied, gpu.link.busy_seconds
    turns, started = 0, time.perf_counter()
    while turns < _LEAST_TURNS or time.perf_counter() - started < _SECONDS:
        while link and sum(not copy.done for copy in copies) < 2:  # the link is never idle
            copies.append(begin())
        if cpu:
            compute()
        else:
            copies[0].settle()
            del copies[0]
        turns += 1
    seconds = time.perf_counter() - started
    for copy in copies:
        copy.settle()
    sent, busy = gpu.link.bytes_copied - sent, gpu.link.busy_seconds - busy
    return MissRates(turns * kind.nbytes / seconds if cpu else 0.0, sent / busy if busy else 0.0)
