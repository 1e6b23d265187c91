"""Replaying a trace through the stores that a model would have, with slots that take no memory and experts that are there at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dbrx_q.kernels.formats.expert_weights import ExpertWeights
from dbrx_q.planning.expert_kinds import ExpertKind
from dbrx_q.planning.machine import Machine, Placement
from dbrx_q.planning.policy_names import MissPolicy

from .build import Parts, build_store
from .link import Arrival, Link
from .policies import CachePolicy
from .reader import Load
from .slots import ExpertSlots
from .split import MissRates
from .stats import ExpertStats
from .sums import ExpertSum
from .trace import Trace

__all__ = ["simulate", "visits_of"]

_NOWHERE = torch.device("meta")


def visits_of(trace: Trace, passes: Sequence[slice]) -> list[tuple[int, list[int]]]:
    """(layer, the experts that it needs) for every layer of every forward pass."""
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
    """What the store of a plan counts; of "hybrid" with the machine's bandwidths, which a store measures.

    Args:
        trace: what every token chose.
        passes: the tokens of every forward pass, as `Trace.passes` gives them.
        kinds: of every layer's experts.
        plan, machine: where they lie.
        policy: as of `Parts`.
        prefetch: whether experts are brought before they are needed.
        miss_policy: how misses of GPUs are served.
        worth: [L, E], how likely each expert is, for what lies in the slots at first; None for the same number of each layer.
    """
    L, E = trace.experts.shape[1], trace.n_experts
    reader = _NoReader(kinds)
    devices = [_NOWHERE] * len(plan.gpus)
    parts = Parts(_Places(kinds, E), reader, devices, lambda _: _NoLink(), policy, rates=_Rates, memory=_NOWHERE)
    store = build_store(parts, plan, machine, prefetch=prefetch, miss_policy=miss_policy)
    store.fill(priority)
    before = store.stats()
    for tokens in passes:
        for layer in range(L):
            chosen = trace.experts[tokens, layer]
            guesses = trace.predicted[tokens, layer + 1] if prefetch and layer + 1 < L else None
            store.run(layer, _Counted(chosen), guesses)
    did = store.stats() - before
    store.close()
    return did


@dataclass
class _Places:
    kinds: list[ExpertKind]
    n_experts: int


class _Counted(ExpertSum):
    """Needs experts and computes nothing."""

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


class _NoReader:
    """Has read an expert as soon as it is asked for."""

    busy_seconds = 0.0

    def __init__(self, kinds: list[ExpertKind]) -> None:
        self._kinds = kinds
        self.bytes_read = 0

    def load(self, layer: int, expert: int, slots: ExpertSlots, slot: int, *, urgent: bool) -> Load:
        self.bytes_read += self._kinds[layer].stored_nbytes
        load = Load(1, list, lambda _: None)
        load.piece_done(None)
        return load

    def hurry(self, load: Load) -> None:
        pass

    def abandon(self, load: Load) -> None:
        pass

    def close(self) -> None:
        pass


class _NoLink(Link):
    """Has copied as soon as it is asked to."""

    def __init__(self) -> None:
        self._copied = 0
        self._current = None

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
    ) -> Arrival:
        arrival = Arrival(sum(source.nbytes for source in sources))
        self._copied += arrival.nbytes
        arrival.finish(None, None)
        return arrival

    def hurry(self, arrival: Arrival) -> None:
        pass

    def defer(self, arrival: Arrival) -> None:
        pass

    def abandon(self, arrival: Arrival) -> None:
        pass

    def settle(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _send(self, job: object) -> None:
        raise AssertionError("a simulation moves and computes nothing")


class _Rates(MissRates):
    """Nothing is measured."""

    def saw(self, *, cpu_bytes: float = 0, cpu_seconds: float = 0, link_bytes: float = 0, link_seconds: float = 0) -> None:
        pass
