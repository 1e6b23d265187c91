"""What a placement allows in tokens/s when one sequence is decoded: bytes over bandwidths, with the arithmetic to show.

Bandwidth decides: a token reads the dense weights and `top_k` experts of every layer, from wherever they lie. Three figures:

expected     experts are chosen by chance, so that the share of requests that hit is the share of experts that have a slot; a miss comes
             from the host's memory, by the faster of the link and the memory itself, after it has come from disk where it lies there.
lower bound  every request misses that can, and of those as many as can lie on disk; misses travel over the link alone.
upper bound  every request hits that has a slot to hit, on a GPU or in host memory; misses come over the link and are computed by the CPU
             at once.

In the first two one thing is done after the other; in the last everything overlaps. A fallback copy answers in place of the disk: its bytes
come from the host's memory. On a CPU that is faster than a hit, so that most misses are the best case there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from .machine import DevicePlan, Gpu, Machine, Placement

__all__ = ["SpeedBounds", "Term", "expected_seconds", "hit_rate", "speed_bounds"]


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
    """Tokens/s of one sequence. hit_rate: expected. terms: of the expected figure, lower_terms: of the lower bound; the seconds of each add
    up to those of a token. upper_terms: of the upper bound, whose busiest path takes a token's time."""

    hit_rate: float
    lower: float
    expected: float
    upper: float
    terms: tuple[Term, ...]
    lower_terms: tuple[Term, ...]
    upper_terms: tuple[Term, ...]


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
        upper=1 / max(_busy(terms[_Case.BEST]).values()),
        terms=terms[_Case.EXPECTED],
        lower_terms=terms[_Case.WORST],
        upper_terms=terms[_Case.BEST],
    )


def _busy(terms: tuple[Term, ...]) -> Mapping[str, float]:
    """Seconds by path; one sequence passes through the GPUs one after the other, so that theirs count as one."""
    found: dict[str, float] = {}
    for term in terms:
        path = term.path.split(" of ")[0]
        found[path] = found.get(path, 0.0) + term.seconds
    return found


def hit_rate(placement: Placement, n_experts: int) -> float:
    """Share of requests for an expert that lies on the device that computes, where experts are chosen by chance."""
    plans = placement.gpus or (placement.host,)
    layers = sum(_layers(plan) for plan in plans)
    return sum(_share(plan, n_experts) * _layers(plan) for plan in plans) / layers


def expected_seconds(placement: Placement, machine: Machine, *, n_experts: int, top_k: int) -> float:
    """Of one token, as the expected figure has it."""
    return sum(term.seconds for term in _terms(placement, machine, n_experts, top_k, _Case.EXPECTED))


def _terms(placement: Placement, machine: Machine, n_experts: int, top_k: int, case: _Case) -> list[Term]:
    found = _on_gpus(placement, machine, n_experts, top_k, case) if placement.gpus else _on_host(placement, machine, n_experts, top_k, case)
    return [term for term in found if term.nbytes]


def _on_host(placement: Placement, machine: Machine, n_experts: int, top_k: int, case: _Case) -> list[Term]:
    plan, memory = placement.host, machine.host_bandwidth
    mean, fallback = placement.expert_bytes / placement.experts, plan.fallback / placement.experts
    if fallback:  # misses are faster than hits
        case = {_Case.WORST: _Case.BEST, _Case.BEST: _Case.WORST}.get(case, case)
    requests, missed = _layers(plan) * top_k, _missed(plan, n_experts, top_k, case)
    return [
        Term("host memory", "weights that every token reads", plan.dense_read, memory),
        Term("host memory", "experts, once they are there", (requests - missed * bool(fallback)) * mean, memory),
        Term("host memory", "fallback copies of experts that miss", missed * fallback, memory)
        if fallback
        else Term("disk", "experts that miss", missed * mean, machine.disk_bandwidth),
    ]


def _on_gpus(placement: Placement, machine: Machine, n_experts: int, top_k: int, case: _Case) -> list[Term]:
    mean, fallback = placement.expert_bytes / placement.experts, placement.host.fallback / placement.experts
    every = [_missed(plan, n_experts, top_k, case) for plan in placement.gpus]
    slots = sum(plan.n_slots for plan in placement.gpus)
    off_gpus = placement.experts - slots + sum(plan.scratch for plan in placement.gpus)
    # Without a fallback copy an expert may lie on a GPU and in host memory, and others in none.
    nowhere = placement.disk_experts if fallback else placement.experts - max(slots, placement.host.n_slots)
    in_host = placement.host.n_slots / sum(_layers(plan) for plan in placement.gpus)  # of each layer
    # A fallback copy comes the same way as an expert of host memory, with fewer bytes: the more of them the better.
    most_on_disk = _Case.BEST if fallback else _Case.WORST
    found = []
    for plan, gpu, missed in zip(placement.gpus, machine.gpus, every, strict=True):
        if not placement.disk_experts or not missed:
            on_disk = 0.0
        elif case is most_on_disk:
            on_disk = missed * min(1.0, nowhere / sum(every))
        elif case is _Case.EXPECTED:
            on_disk = missed * placement.disk_experts / off_gpus
        else:
            on_disk = max(0.0, missed - _layers(plan) * in_host)
        name, path = plan.device, f"host memory and link of {plan.device}"
        to_gpu = _to_gpu(gpu, machine, case)
        found += [
            Term(f"memory of {name}", "weights that every token reads", plan.dense_read, gpu.bandwidth),
            Term(f"memory of {name}", "experts that hit", (_layers(plan) * top_k - missed) * mean, gpu.bandwidth),
            Term(path, "experts that miss", (missed - on_disk * bool(fallback)) * mean, to_gpu),
            Term(path, "fallback copies of experts on disk", on_disk * fallback, to_gpu)
            if fallback
            else Term("disk", f"experts of {name} that miss and lie on disk", on_disk * mean, machine.disk_bandwidth),
        ]
    return found


def _to_gpu(gpu: Gpu, machine: Machine, case: _Case) -> float:
    """Bytes/s of misses that lie in host memory."""
    if case is _Case.WORST:
        return min(gpu.link, machine.host_bandwidth)
    return gpu.link + machine.host_bandwidth if case is _Case.BEST else max(gpu.link, machine.host_bandwidth)


def _missed(plan: DevicePlan, n_experts: int, top_k: int, case: _Case) -> float:
    """Requests of a token that miss on the device."""
    layers, share = _layers(plan), _share(plan, n_experts)
    if case is _Case.WORST:
        return min(layers * top_k, layers * n_experts - plan.n_slots)
    return layers * top_k * (1 - (min(1.0, share * n_experts / top_k) if case is _Case.BEST else share))


def _layers(plan: DevicePlan) -> int:
    return plan.layers[1] - plan.layers[0]


def _share(plan: DevicePlan, n_experts: int) -> float:
    return plan.n_slots / (_layers(plan) * n_experts) if _layers(plan) * n_experts else 0.0
