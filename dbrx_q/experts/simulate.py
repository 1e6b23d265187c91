"""Replaying a trace through the caches of a store, without weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .cache import ExpertCache, serve
from .foresight import Foresight
from .policies import CachePolicy
from .stats import CacheStats
from .trace import Trace

__all__ = ["Simulation", "simulate", "visits_of"]


@dataclass(frozen=True)
class Simulation:
    """What the caches were asked for. foreseen, foreseeable: as of `ExpertStats`."""

    cache: CacheStats
    foreseen: int
    foreseeable: int


def visits_of(trace: Trace, passes: Sequence[slice]) -> list[tuple[int, list[int]]]:
    """(layer, the experts that it needs) for every layer of every forward pass."""
    L = trace.experts.shape[1]
    if all(tokens.stop - tokens.start == 1 for tokens in passes):
        return [(layer, experts) for tokens in passes for layer, experts in enumerate(trace.experts[tokens.start].tolist())]
    return [(layer, np.unique(trace.experts[tokens, layer]).tolist()) for tokens in passes for layer in range(L)]


def simulate(
    trace: Trace,
    passes: Sequence[slice],
    pool_of: Sequence[int],
    slots: Sequence[int],
    policy: Callable[[int], CachePolicy],
    *,
    prefetch: bool,
    fill: np.ndarray | None = None,
) -> Simulation:
    """The counters that a store with these slots comes to.

    Args:
        trace: what every token chose.
        passes: the tokens of every forward pass, as `Trace.passes` gives them.
        pool_of: by layer, which cache its experts share.
        slots: of each cache.
        policy: gives one for the cache of this index.
        prefetch: whether experts are fetched ahead.
        fill: [L, E], how likely each expert is, for what lies in the slots at first; None for the same number of each layer.
    """
    L, E = trace.experts.shape[1], trace.n_experts
    caches = [ExpertCache(count, policy(i)) for i, count in enumerate(slots)]
    order = [(layer, e) for e in range(E) for layer in range(L)]
    if fill is not None:
        order.sort(key=lambda place: -float(fill[place]))
    for i, cache in enumerate(caches):
        cache.fill([place for place in order if pool_of[place[0]] == i])
    foresight = Foresight(L, E)
    visits = iter(visits_of(trace, passes))
    for tokens in passes:
        for layer in range(L):
            _, needed = next(visits)
            ahead: list[int] = []
            if prefetch:
                foresight.judge(layer, needed)
                if layer + 1 < L:
                    ahead = foresight.guess(layer + 1, trace.foreseen[tokens, layer + 1])
            for _ in serve(caches[pool_of[layer]], layer, needed, ahead, caches[pool_of[layer + 1]] if ahead else None):
                pass
    return Simulation(sum((cache.stats for cache in caches), CacheStats()), foresight.foreseen, foresight.needed)
