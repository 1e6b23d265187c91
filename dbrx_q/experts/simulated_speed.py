"""What a machine's bandwidths take for the requests that a store counted."""

from __future__ import annotations

from dbrx_q.planning.machine import Machine, Placement

from .stats import ExpertStats

__all__ = ["simulated_seconds"]


def simulated_seconds(did: ExpertStats, placement: Placement, machine: Machine, *, tokens: int) -> float:
    """What a machine's bandwidths take for what a store counted: weights and hits from memory, then misses over the link and by the CPU at
    once, then what comes from disk; of several GPUs, which compute one after the other, the mean GPU by layers."""
    each = placement.expert_bytes / placement.experts
    if not placement.gpus:
        read = tokens * placement.host.dense_read + did.cache.requests * each
        return read / machine.host_bandwidth + did.disk_bytes / machine.disk_bandwidth
    layers = sum(plan.layers[1] - plan.layers[0] for plan in placement.gpus)
    shares = [(plan.layers[1] - plan.layers[0]) / layers for plan in placement.gpus]
    slow = sum(share / gpu.bandwidth for share, gpu in zip(shares, machine.gpus, strict=True))
    link = sum(share / gpu.link for share, gpu in zip(shares, machine.gpus, strict=True))
    dense = sum(plan.dense_read / gpu.bandwidth for plan, gpu in zip(placement.gpus, machine.gpus, strict=True))
    on_gpu = did.cache.requests - did.on_cpu
    missed = max(did.link_bytes * link, did.on_cpu * each / machine.host_bandwidth)
    return tokens * dense + on_gpu * each * slow + missed + did.disk_bytes / machine.disk_bandwidth
