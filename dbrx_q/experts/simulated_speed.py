"""What a machine's bandwidths take for the requests that a store counted."""

from __future__ import annotations

from dbrx_q.planning.machine import Placement, Rig

from .stats import ExpertStats

__all__ = ["simulated_seconds"]


def simulated_seconds(did: ExpertStats, placement: Placement, rig: Rig, *, tokens: int) -> float:
    """What a rig's bandwidths take for what a store counted: weights and hits from memory, then misses over the link and by the CPU at
    once, then what comes from disk; of several cards, which compute one after the other, the mean card by layers."""
    each = placement.expert_bytes / placement.experts
    if not placement.cards:
        read = tokens * placement.host.dense_read + did.cache.requests * each
        return read / rig.host_bandwidth + did.disk_bytes / rig.disk_bandwidth
    layers = sum(plan.layers[1] - plan.layers[0] for plan in placement.cards)
    shares = [(plan.layers[1] - plan.layers[0]) / layers for plan in placement.cards]
    slow = sum(share / card.bandwidth for share, card in zip(shares, rig.cards, strict=True))
    link = sum(share / card.link for share, card in zip(shares, rig.cards, strict=True))
    dense = sum(plan.dense_read / card.bandwidth for plan, card in zip(placement.cards, rig.cards, strict=True))
    on_card = did.cache.requests - did.on_cpu
    missed = max(did.link_bytes * link, did.on_cpu * each / rig.host_bandwidth)
    return tokens * dense + on_card * each * slow + missed + did.disk_bytes / rig.disk_bandwidth
