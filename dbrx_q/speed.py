"""What a placement allows in tokens/s when one sequence is decoded: bytes over bandwidths, with the arithmetic to show.

Bandwidth decides: a token reads the dense weights and `top_k` experts of every layer, from wherever they lie. Three figures:

expected     experts are chosen by chance, so that the share of requests that hit is the share of experts that have a slot; a miss comes
             from the host's memory, by the faster of the link and the memory itself, or from disk; one after the other.
lower bound  every request misses, and comes over the link alone (from disk without one); one after the other.
upper bound  every request hits that has a slot to hit; misses come over the link and are computed by the CPU at once; everything overlaps.

A low-bit copy answers in place of the disk: its bytes come from the host's memory. On a CPU that is faster than a hit, so that the bounds
change their places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .experts.stats import ExpertStats
from .placement import DevicePlan, Placement, Rig

__all__ = ["SpeedBounds", "Term", "expected_seconds", "hit_rate", "simulated_seconds", "speed_bounds"]


@dataclass(frozen=True)
class Term:
    """Bytes that a token moves. path: over what. what: the bytes. bandwidth: bytes/s."""

    path: str
    what: str
    nbytes: float
    bandwidth: float

    @property
    def seconds(self) -> float:
        """Time for it."""
        return self.nbytes / self.bandwidth


@dataclass(frozen=True)
class SpeedBounds:
    """Tokens/s of one sequence. hit_rate: expected. terms: of the expected figure, whose seconds add up to those of a token."""

    hit_rate: float
    lower: float
    expected: float
    upper: float
    terms: tuple[Term, ...]


def speed_bounds(placement: Placement, rig: Rig, *, n_experts: int, top_k: int) -> SpeedBounds:
    """The three figures for layers of `n_experts` experts, `top_k` of which are active."""

    def fewest(share: float) -> float:
        return float(share == 1)

    def most(share: float) -> float:
        return min(1.0, share * n_experts / top_k)

    if placement.host.low_bit and not placement.cards:
        fewest, most = most, fewest
    expected = _terms(placement, rig, n_experts, top_k, lambda share: share, max)
    worst = _terms(placement, rig, n_experts, top_k, fewest, lambda link, host: link)
    best = _terms(placement, rig, n_experts, top_k, most, lambda link, host: link + host)
    busy: dict[str, float] = {}
    for term in best:  # one sequence passes through the cards one after the other
        path = term.path.split(" of ")[0]
        busy[path] = busy.get(path, 0.0) + term.seconds
    return SpeedBounds(
        hit_rate=hit_rate(placement, n_experts),
        lower=1 / sum(term.seconds for term in worst),
        expected=1 / sum(term.seconds for term in expected),
        upper=1 / max(busy.values()),
        terms=tuple(expected),
    )


def hit_rate(placement: Placement, n_experts: int) -> float:
    """Share of requests for an expert that lies on the device that computes, where experts are chosen by chance."""
    plans = placement.cards or (placement.host,)
    layers = sum(end - first for first, end in (plan.layers for plan in plans))
    return sum(_share(plan, n_experts) * (plan.layers[1] - plan.layers[0]) for plan in plans) / layers


def expected_seconds(placement: Placement, rig: Rig, *, n_experts: int, top_k: int) -> float:
    """Of one token, as the expected figure has it."""
    return sum(term.seconds for term in _terms(placement, rig, n_experts, top_k, lambda share: share, max))


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


def _terms(
    placement: Placement,
    rig: Rig,
    n_experts: int,
    top_k: int,
    hits: Callable[[float], float],
    of_host: Callable[[float, float], float],
) -> list[Term]:
    """hits: the share of requests that hit, by the share of experts that have slots. of_host: the bandwidth of misses that lie in host
    memory, by the link's and the memory's."""
    mean = placement.expert_bytes / placement.experts
    low_bit = placement.host.low_bit / placement.experts
    if not placement.cards:
        plan, memory = placement.host, rig.host_bandwidth
        requests = (plan.layers[1] - plan.layers[0]) * top_k
        hit = hits(_share(plan, n_experts))
        found = [
            Term("host memory", "weights that every token reads", plan.dense_read, memory),
            Term("host memory", "experts that hit", requests * hit * mean, memory),
            Term("host memory", "low-bit copies of experts that miss", requests * (1 - hit) * low_bit, memory)
            if low_bit
            else Term("disk", "experts that miss", requests * (1 - hit) * mean, rig.disk_bandwidth),
        ]
        return [term for term in found if term.nbytes]
    off_cards = placement.experts - sum(plan.n_slots - plan.scratch for plan in placement.cards)
    on_disk = placement.disk_experts / off_cards if off_cards else 0.0
    found = []
    for plan, card in zip(placement.cards, rig.cards, strict=True):
        requests = (plan.layers[1] - plan.layers[0]) * top_k
        hit = hits(_share(plan, n_experts))
        missed = requests * (1 - hit)
        name, to_card = plan.device, of_host(card.link, rig.host_bandwidth)
        path = f"host memory and link of {name}"
        found += [
            Term(f"memory of {name}", "weights that every token reads", plan.dense_read, card.bandwidth),
            Term(f"memory of {name}", "experts that hit", requests * hit * mean, card.bandwidth),
            Term(path, "experts that miss", missed * (1 - on_disk) * mean, to_card),
            Term(path, "low-bit copies of experts on disk", missed * on_disk * low_bit, to_card)
            if low_bit
            else Term("disk", f"experts of {name} that miss and lie on disk", missed * on_disk * mean, rig.disk_bandwidth),
        ]
    return [term for term in found if term.nbytes]


def _share(plan: DevicePlan, n_experts: int) -> float:
    layers = plan.layers[1] - plan.layers[0]
    return plan.n_slots / (layers * n_experts) if layers * n_experts else 0.0
