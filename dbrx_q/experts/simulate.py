"""Replays a trace through the store that a model would have, with slots that take no memory and loads that take no time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dbrx_q.kernels.formats.expert_weights import ExpertWeights
from dbrx_q.planning.expert_kinds import ExpertKind
from dbrx_q.planning.machine import Machine, Placement
from dbrx_q.planning.policy_names import MissPolicy

from .build import StoreParts, build_store
from .link import Link, PendingCopy
from .policies import CachePolicy
from .reader import Load
from .slots import ExpertSlots
from .split import MissRates
from .stats import ExpertStats
from .sums import ExpertSum
from .trace import Trace

__all__ = ["simulate", "visits_of"]

_NO_MEMORY = torch.device("meta")


def visits_of(trace: Trace, passes: Sequence[slice]) -> list[tuple[int, list[int]]]:
    """(layer, the experts that it needs) for every layer of every forward pass, in order."""
    L = trace.experts.shape[1]
    if all(tokens.stop - tokens.start == 1 for tokens in passes):
        return [(layer, experts) for tokens in passes for layer, experts in enumerate(trace.experts[tokens.start].tolist())]
    return [(layer, np.unique(trace.experts[tokens, layer]).tolist()) for tokens in passes for layer in range(L)]


def simulate(
    trace: Trace,
    passes: Sequence[slice],
    kinds: list[ExpertKind],
    plan: Placement,
    machine: Machine,
    policy: Callable[[Sequence[int], bool], CachePolicy],
    *,
    prefetch: bool,
    miss_policy: MissPolicy = MissPolicy.hybrid,
    priority: np.ndarray | None = None,
) -> ExpertStats:
    """The counters that a store with this plan would have.

    They are exactly those of a real run, except for the miss policy "hybrid": there a store measures the rates of misses, and the
    simulation uses the machine's bandwidths.

    Args:
        trace: the experts that every token chose.
        passes: the tokens of every forward pass, as `Trace.passes` returns them.
        kinds: the kind of every layer's experts.
        plan: how many slots each device has.
        machine: whose plan it is.
        policy: see `StoreParts`.
        prefetch: whether experts are fetched before they are needed.
        miss_policy: how misses of GPUs are served.
        priority: [L, E], how likely each expert is, which decides what fills the slots at first; None for equally many of each layer.
    """
    L, E = trace.experts.shape[1], trace.n_experts
    reader = _InstantReader(kinds)
    devices = [_NO_MEMORY] * len(plan.gpus)
    parts = StoreParts(_Catalog(kinds, E), reader, devices, lambda *_: _InstantLink(), policy, rates=_FixedRates, memory=_NO_MEMORY)
    store = build_store(parts, plan, machine, prefetch=prefetch, miss_policy=miss_policy)
    store.fill(priority)
    before = store.stats()
    for tokens in passes:
        for layer in range(L):
            chosen = trace.experts[tokens, layer]
            predicted = trace.predicted[tokens, layer + 1] if prefetch and layer + 1 < L else None
            store.run(layer, _CountedSum(chosen), predicted)
    stats = store.stats() - before
    store.close()
    return stats


@dataclass
class _Catalog:
    """See `ExpertCatalog`."""

    kinds: list[ExpertKind]
    """The kind of every layer's experts."""
    n_experts: int
    """Experts of each layer."""


class _CountedSum(ExpertSum):
    """Requests experts and computes nothing."""

    def __init__(self, chosen: np.ndarray) -> None:
        if len(chosen) == 1:
            self.counts = dict.fromkeys(chosen[0].tolist(), 1)
        else:
            experts, counts = np.unique(chosen, return_counts=True)
            self.counts = dict(zip(experts.tolist(), counts.tolist(), strict=True))

    def add_gpu(self, weights: ExpertWeights, slots: Mapping[int, int]) -> None:
        pass

    def add_host(self, weights: ExpertWeights, slots: Mapping[int, int]) -> None:
        pass

    def result(self) -> torch.Tensor:
        raise AssertionError("a simulation moves and computes nothing")


class _InstantReader:
    """Completes every load at once, and counts its bytes."""

    busy_seconds = 0.0

    def __init__(self, kinds: list[ExpertKind]) -> None:
        self._kinds = kinds
        self.bytes_read = 0

    def load(self, layer: int, expert: int, slots: ExpertSlots, slot: int, *, urgent: bool) -> Load:
        self.bytes_read += self._kinds[layer].stored_nbytes
        load = Load(1, list, lambda _: None)
        load.piece_done(None)
        return load

    def prioritize(self, load: Load) -> None:
        pass

    def cancel(self, load: Load) -> None:
        pass

    def close(self) -> None:
        pass


class _InstantLink(Link):
    """Completes every copy at once, and counts its bytes."""

    def __init__(self) -> None:
        self._copied = 0
        self._current = None

    def follow(self) -> None:
        pass

    @property
    def bytes_copied(self) -> int:
        return self._copied

    @property
    def busy_seconds(self) -> float:
        return 0.0

    def copy(
        self,
        sources: Sequence[torch.Tensor],
        targets: Sequence[torch.Tensor],
        *,
        after: torch.cuda.Event | None = None,
        urgent: bool,
    ) -> PendingCopy:
        pending = PendingCopy(sum(source.nbytes for source in sources))
        self._copied += pending.nbytes
        pending.finish(None, None)
        return pending

    def prioritize(self, pending: PendingCopy) -> None:
        pass

    def defer(self, pending: PendingCopy) -> None:
        pass

    def cancel(self, pending: PendingCopy) -> None:
        pass

    def drain(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _send(self, job: object) -> None:
        raise AssertionError("a simulation moves and computes nothing")


class _FixedRates(MissRates):
    """Rates that are never corrected, since nothing is measured."""

    def observe(self, *, cpu_bytes: float = 0, cpu_seconds: float = 0, link_bytes: float = 0, link_seconds: float = 0) -> None:
        pass
