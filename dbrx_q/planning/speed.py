"""Tokens/s that a placement allows when one sequence is decoded: bytes over bandwidths, with the arithmetic to show.

Decoding is bound by bandwidth: a token reads the dense weights and `top_k` experts of every layer from the memories that hold them. Three
figures:

expected     experts are chosen at random, so the hit rate is the share of experts that have a slot. A miss is served from host memory, at
             the bandwidth of the link or of host memory, whichever is higher, after it was read from disk if only the disk holds it.
lower bound  every request that can miss does, and as many of the misses as possible are on disk. Misses travel over the link alone.
upper bound  every request hits if there are slots enough, on a GPU or in host memory. Misses are copied over the link and computed by
             the CPU at the same time.

The first two figures add up all times; the third one overlaps everything. A fallback copy replaces the disk: its bytes are read from host
memory. On a CPU without GPUs a fallback hit reads fewer bytes than a hit, so there the best case has the most misses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from .machine import DevicePlan, Gpu, Machine, Placement

__all__ = ["SpeedBounds", "Term", "expected_seconds", "expected_terms", "hit_rate", "speed_bounds"]


@dataclass(frozen=True)
class Term:
    """Bytes that are moved for one token."""

    path: str
    """What they are moved over, such as "disk" or "memory of cuda:0"."""
    data: str
    """What they are, such as "experts that miss"."""
    nbytes: float
    """How many."""
    bandwidth: float
    """Of the path, in bytes/s."""

    @property
    def seconds(self) -> float:
        """The time to move them."""
        return self.nbytes / self.bandwidth


@dataclass(frozen=True)
class SpeedBounds:
    """Tokens/s of one sequence."""

    hit_rate: float
    """Expected share of requests that hit."""
    lower: float
    """Tokens/s of the lower bound."""
    expected: float
    """Tokens/s of the expected figure."""
    upper: float
    """Tokens/s of the upper bound."""
    terms: tuple[Term, ...]
    """Of the expected figure: the seconds of all terms add up to a token's."""
    lower_terms: tuple[Term, ...]
    """Of the lower bound: the seconds of all terms add up to a token's."""
    upper_terms: tuple[Term, ...]
    """Of the upper bound: the busiest path takes a token's time."""


class _Case(Enum):
    WORST = "worst"
    EXPECTED = "expected"
    BEST = "best"


def speed_bounds(placement: Placement, machine: Machine, *, n_experts: int, top_k: int) -> SpeedBounds:
    """The three figures for layers of `n_experts` experts, `top_k` of which are active."""
    terms = {case: tuple(_terms(placement, machine, n_experts, top_k, case)) for case in _Case}
    return SpeedBounds(
        hit_rate=hit_rate(placement, n_experts),
        lower=1 / sum(term.seconds for term in terms[_Case.WORST]),
        expected=1 / sum(term.seconds for term in terms[_Case.EXPECTED]),
        upper=1 / max(_seconds_by_path(terms[_Case.BEST]).values()),
        terms=terms[_Case.EXPECTED],
        lower_terms=terms[_Case.WORST],
        upper_terms=terms[_Case.BEST],
    )


def hit_rate(placement: Placement, n_experts: int) -> float:
    """Share of requests for an expert that is in the memory of the device that computes, if experts are chosen at random."""
    plans = placement.gpus or (placement.host,)
    layers = sum(_layers(plan) for plan in plans)
    return sum(_cached_share(plan, n_experts) * _layers(plan) for plan in plans) / layers


def expected_seconds(placement: Placement, machine: Machine, *, n_experts: int, top_k: int) -> float:
    """Seconds of one token by the expected figure."""
    return sum(term.seconds for term in expected_terms(placement, machine, n_experts=n_experts, top_k=top_k))


def expected_terms(placement: Placement, machine: Machine, *, n_experts: int, top_k: float) -> tuple[Term, ...]:
    """What one token reads by the expected figure; or a step of several tokens that need `top_k` experts of a layer together."""
    return tuple(_terms(placement, machine, n_experts, top_k, _Case.EXPECTED))


def _seconds_by_path(terms: tuple[Term, ...]) -> Mapping[str, float]:
    """Seconds that each path is busy. One sequence passes through the GPUs one after the other, so all GPUs count as one path."""
    seconds: dict[str, float] = {}
    for term in terms:
        path = term.path.split(" of ")[0]
        seconds[path] = seconds.get(path, 0.0) + term.seconds
    return seconds


def _terms(placement: Placement, machine: Machine, n_experts: int, top_k: float, case: _Case) -> list[Term]:
    terms = _on_gpus(placement, machine, n_experts, top_k, case) if placement.gpus else _on_host(placement, machine, n_experts, top_k, case)
    return [term for term in terms if term.nbytes]


def _on_host(placement: Placement, machine: Machine, n_experts: int, top_k: float, case: _Case) -> list[Term]:
    plan, memory = placement.host, machine.host_bandwidth
    expert_bytes, fallback_bytes = placement.expert_bytes / placement.experts, plan.fallback / placement.experts
    if fallback_bytes:  # misses are faster than hits
        case = {_Case.WORST: _Case.BEST, _Case.BEST: _Case.WORST}.get(case, case)
    requests, missed = _layers(plan) * top_k, _missed(plan, n_experts, top_k, case)
    return [
        Term("host memory", "weights that every token reads", plan.dense_read, memory),
        Term("host memory", "experts, once they are in memory", (requests - missed * bool(fallback_bytes)) * expert_bytes, memory),
        Term("host memory", "fallback copies of experts that miss", missed * fallback_bytes, memory)
        if fallback_bytes
        else Term("disk", "experts that miss", missed * expert_bytes, machine.disk_bandwidth),
    ]


def _on_gpus(placement: Placement, machine: Machine, n_experts: int, top_k: float, case: _Case) -> list[Term]:
    expert_bytes, fallback_bytes = placement.expert_bytes / placement.experts, placement.host.fallback / placement.experts
    missed_by_gpu = [_missed(plan, n_experts, top_k, case) for plan in placement.gpus]
    slots = sum(plan.n_slots for plan in placement.gpus)
    off_gpus = placement.experts - slots + sum(plan.scratch for plan in placement.gpus)
    # Without a fallback copy, some experts may be on a GPU and in host memory as well, and others in neither.
    most_disk_experts = placement.disk_experts if fallback_bytes else placement.experts - max(slots, placement.host.n_slots)
    host_experts_per_layer = placement.host.n_slots / sum(_layers(plan) for plan in placement.gpus)
    # An expert of the fallback copy travels as one of host memory does, with fewer bytes: the more of them, the faster.
    most_on_disk = _Case.BEST if fallback_bytes else _Case.WORST
    terms = []
    for plan, gpu, missed in zip(placement.gpus, machine.gpus, missed_by_gpu, strict=True):
        if not placement.disk_experts or not missed:
            on_disk = 0.0
        elif case is most_on_disk:
            on_disk = missed * min(1.0, most_disk_experts / sum(missed_by_gpu))
        elif case is _Case.EXPECTED:
            on_disk = missed * placement.disk_experts / off_gpus
        else:
            on_disk = max(0.0, missed - _layers(plan) * host_experts_per_layer)
        name, path = plan.device, f"host memory and link of {plan.device}"
        miss_bandwidth = _miss_bandwidth(gpu, machine, case)
        terms += [
            Term(f"memory of {name}", "weights that every token reads", plan.dense_read, gpu.bandwidth),
            Term(f"memory of {name}", "experts that hit", (_layers(plan) * top_k - missed) * expert_bytes, gpu.bandwidth),
            Term(path, "experts that miss", (missed - on_disk * bool(fallback_bytes)) * expert_bytes, miss_bandwidth),
            Term(path, "fallback copies of experts on disk", on_disk * fallback_bytes, miss_bandwidth)
            if fallback_bytes
            else Term("disk", f"experts of {name} that miss and are on disk", on_disk * expert_bytes, machine.disk_bandwidth),
        ]
    return terms


def _miss_bandwidth(gpu: Gpu, machine: Machine, case: _Case) -> float:
    """Bytes/s at which misses are served from host memory."""
    if case is _Case.WORST:
        return min(gpu.link, machine.host_bandwidth)
    return gpu.link + machine.host_bandwidth if case is _Case.BEST else max(gpu.link, machine.host_bandwidth)


def _missed(plan: DevicePlan, n_experts: int, top_k: float, case: _Case) -> float:
    """Requests of one token that miss on the device."""
    layers, share = _layers(plan), _cached_share(plan, n_experts)
    if case is _Case.WORST:
        return min(layers * top_k, layers * n_experts - plan.n_slots)
    return layers * top_k * (1 - (min(1.0, share * n_experts / top_k) if case is _Case.BEST else share))


def _layers(plan: DevicePlan) -> int:
    return plan.layers[1] - plan.layers[0]


def _cached_share(plan: DevicePlan, n_experts: int) -> float:
    """Share of the experts of the device's layers that have a slot on it."""
    return plan.n_slots / (_layers(plan) * n_experts) if _layers(plan) * n_experts else 0.0
