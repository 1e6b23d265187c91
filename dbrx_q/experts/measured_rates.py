"""How fast missed experts are served, measured at load: by the CPU and over a link at once, since both read host memory."""

from __future__ import annotations

import itertools
import time

import torch

from .gpu_experts import GpuExperts
from .host_tier import HostTier
from .link import PendingCopy
from .split import MissRates

__all__ = ["measure_rates"]

_SECONDS = 0.3  # of the measurement
_EXPERTS = 16  # that are used at most
_LEAST_ROUNDS = 3


def measure_rates(gpu: GpuExperts, tier: HostTier, dtype: torch.dtype, *, cpu: bool = True, link: bool = True) -> MissRates:
    """The rates of misses on a GPU; `gpu.rates` unchanged if it has no free slot, or host memory no expert, to measure with.

    Args:
        gpu: experts are copied into a free slot of it.
        tier: host memory, filled.
        dtype: of activations.
        cpu: whether the CPU computes; False to measure the link alone.
        link: whether the link copies; False to measure the CPU alone.
    """
    in_host = [(layer, e) for layer in range(*gpu.layers) for e in range(tier.n_experts) if tier.holds(layer, e)]
    free_layer = next((layer for layer, _ in in_host if gpu.free_slot(layer) is not None), None)
    if free_layer is None:
        return gpu.rates
    kind, slot = tier.kind(free_layer), gpu.free_slot(free_layer)
    assert slot is not None
    # In turn, so that none is read from the CPU's cache: together they are larger than that.
    of_kind = [expert_id for expert_id in in_host if tier.kind(expert_id[0]) == kind]
    turn = itertools.cycle(of_kind[:: max(1, len(of_kind) // _EXPERTS)])
    width = tier.slots(free_layer).weights.w1.shape[-1]  # w1 is [S, F, D]

    def compute() -> None:
        from dbrx_q.kernels.cpu.moe import ExpertOutputs  # imports numba, which takes long

        layer, expert = next(turn)
        x, chosen = torch.ones(1, width, dtype=dtype), torch.tensor([[expert]])
        ExpertOutputs(x, chosen).add(tier.slots(layer).weights, {expert: tier.slot_of(layer, expert)})

    def start_copy() -> PendingCopy:
        layer, expert = next(turn)
        return gpu.link.copy(tier.slots(layer).views(tier.slot_of(layer, expert)), gpu.slot_views(free_layer, slot), urgent=True)

    compute()  # compiles the kernels
    copies: list[PendingCopy] = []
    sent, busy = gpu.link.bytes_copied, gpu.link.busy_seconds
    rounds, started = 0, time.perf_counter()
    while rounds < _LEAST_ROUNDS or time.perf_counter() - started < _SECONDS:
        while link and sum(not copy.done for copy in copies) < 2:  # the link is never idle
            copies.append(start_copy())
        if cpu:
            compute()
        else:
            copies[0].join()
            del copies[0]
        rounds += 1
    seconds = time.perf_counter() - started
    for copy in copies:
        copy.join()
    sent, busy = gpu.link.bytes_copied - sent, gpu.link.busy_seconds - busy
    return MissRates(rounds * kind.nbytes / seconds if cpu else 0.0, sent / busy if busy else 0.0)
