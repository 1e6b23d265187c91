"""The time that a machine's bandwidths allow for the requests that a store counted."""

from __future__ import annotations

from dbrx_q.planning.machine import Machine, Placement

from .stats import ExpertStats

__all__ = ["simulated_seconds"]


def simulated_seconds(stats: ExpertStats, placement: Placement, machine: Machine, *, tokens: int) -> float:
    """Seconds for all requests, as a sum: dense weights and hits from memory, then misses, then reads from disk.

    The link and the CPU serve misses at the same time. Several GPUs, which compute one after the other, count as one whose bandwidths are
    their mean, weighted by layers.

    Args:
        stats: of a store, or of its simulation.
        placement: the plan of that store.
        machine: whose bandwidths count.
        tokens: how many were decoded.
    """
    expert_bytes = placement.expert_bytes / placement.experts
    if not placement.gpus:
        read = tokens * placement.host.dense_read + stats.cache.requests * expert_bytes
        return read / machine.host_bandwidth + stats.disk_bytes / machine.disk_bandwidth
    layers = sum(plan.layers[1] - plan.layers[0] for plan in placement.gpus)
    shares = [(plan.layers[1] - plan.layers[0]) / layers for plan in placement.gpus]
    seconds_per_gpu_byte = sum(share / gpu.bandwidth for share, gpu in zip(shares, machine.gpus, strict=True))
    seconds_per_link_byte = sum(share / gpu.link for share, gpu in zip(shares, machine.gpus, strict=True))
    dense_seconds = sum(plan.dense_read / gpu.bandwidth for plan, gpu in zip(placement.gpus, machine.gpus, strict=True))
    on_gpu = stats.cache.requests - stats.computed_on_cpu
    miss_seconds = max(stats.link_bytes * seconds_per_link_byte, stats.computed_on_cpu * expert_bytes / machine.host_bandwidth)
    disk_seconds = stats.disk_bytes / machine.disk_bandwidth
    return tokens * dense_seconds + on_gpu * expert_bytes * seconds_per_gpu_byte + miss_seconds + disk_seconds
