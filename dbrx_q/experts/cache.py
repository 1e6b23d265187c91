"""Which expert is in which slot. Decisions without bytes, so that a store and a simulation make the same ones.

`ExpertCache` assigns slots and evicts by a policy (`policies.py`). `serve` orders what one layer needs: on a miss it yields the
`Assignment` of a slot, which the caller loads, and later the `Group` that the caller computes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .policies import CachePolicy
from .stats import CacheStats

__all__ = ["Assignment", "ExpertCache", "Group", "serve"]


@dataclass(frozen=True)
class Assignment:
    """An expert is to be loaded into a slot."""

    layer: int
    """Of the expert."""
    expert: int
    """Its index in the layer."""
    slot: int
    """Where it is loaded."""
    evicted: tuple[int, int] | None
    """(layer, expert) that was in the slot; None if the slot was free."""
    urgent: bool
    """Whether the current layer waits for it; False for a prefetch or an upgrade."""


class ExpertCache:
    """A fixed number of slots, and the experts in them.

    Args:
        slots: how many; at least one.
        policy: whose priorities decide which expert is evicted.

    Attributes:
        evictable: returns bool [L * E], the only experts that may be evicted, because another memory holds them too; None for all.
        evict_first: returns bool [L * E], the experts that are evicted before all others, because a faster memory holds them too; None
            for no such experts.
    """

    def __init__(self, slots: int, policy: CachePolicy) -> None:
        assert slots >= 1, "a cache must hold an expert"
        self.slots, self._policy = slots, policy
        total = policy.layers * policy.experts
        self._slot = np.full(total, -1)
        self._held = np.zeros(total, bool)
        self._protected = np.zeros(total, bool)  # must not be evicted at the moment
        self._prefetched = np.zeros(total, bool)  # were prefetched and not used yet
        self._free = list(range(slots))[::-1]
        self.evictable: Callable[[], np.ndarray] | None = None
        self.evict_first: Callable[[], np.ndarray] | None = None
        self._hits = self._prefetch_hits = self._misses = self._prefetches = self._evictions = 0

    @property
    def stats(self) -> CacheStats:
        """Counters since the cache was created."""
        return CacheStats(self._hits, self._prefetch_hits, self._misses, self._prefetches, self._evictions)

    @property
    def held(self) -> np.ndarray:
        """bool [L * E]: experts that have a slot."""
        return self._held

    @property
    def free_slot(self) -> int | None:
        """An empty slot; None if all are taken."""
        return self._free[-1] if self._free else None

    def slot_of(self, layer: int, expert: int) -> int:
        """The slot of an expert; -1 if it has none."""
        return int(self._slot[self._key(layer, expert)])

    def fill(self, order: Sequence[tuple[int, int]]) -> list[Assignment]:
        """Assign the free slots to the first (layer, expert) of `order` that have none."""
        chosen = [(layer, expert) for layer, expert in order if self.slot_of(layer, expert) < 0][: len(self._free)]
        return [self._occupy(layer, expert, True) for layer, expert in chosen]

    def request(self, layer: int, experts: Sequence[int]) -> tuple[list[int], list[int]]:
        """A forward pass reaches a layer and needs these experts, in ascending order: (hits, misses).

        Hits are protected from eviction until they are released.
        """
        self._policy.enter(layer)
        self._protected[:] = False
        hits, misses, prefetch_hits = [], [], 0
        for expert in experts:
            key = self._key(layer, expert)
            self._policy.use(key)
            if not self._held[key]:
                misses.append(expert)
                continue
            hits.append(expert)
            self._protected[key] = True
            if self._prefetched[key]:
                self._prefetched[key] = False
                prefetch_hits += 1
        self._hits += len(hits) - prefetch_hits
        self._prefetch_hits += prefetch_hits
        self._misses += len(misses)
        return hits, misses

    def record_miss(self, layer: int, experts: Sequence[int]) -> None:
        """Count misses of experts that the layer needs, but that are served without a slot of this cache."""
        self._misses += len(experts)
        for expert in experts:
            self._policy.use(self._key(layer, expert))

    def assign(self, layer: int, expert: int) -> Assignment | None:
        """A slot for an expert that the current layer needs, protected until it is released; None while nothing can be evicted."""
        assignment = self._assign(layer, expert, urgent=True)
        if assignment is not None:
            self._protected[self._key(layer, expert)] = True
        return assignment

    def upgrade(self, layer: int, expert: int) -> Assignment | None:
        """A slot for an expert that was served without one, if it has a higher priority than the expert it would evict; otherwise None."""
        key, victim = self._key(layer, expert), None if self._free else self._victim()
        priority = self._policy.priority()
        if not self._free and (victim is None or priority[victim] >= priority[key]):
            return None
        return self._assign(layer, expert, urgent=False)

    def drop(self, layer: int, expert: int) -> None:
        """Free the slot of an expert whose load was cancelled."""
        key = self._key(layer, expert)
        self._free.append(int(self._slot[key]))
        self._slot[key], self._held[key], self._prefetched[key], self._protected[key] = -1, False, False, False

    def release(self, layer: int, experts: Sequence[int]) -> None:
        """These experts were computed and may be evicted."""
        self._protected[[self._key(layer, e) for e in experts]] = False

    def prefetch(self, layer: int, experts: Sequence[int]) -> list[Assignment]:
        """Slots for experts that a later layer is predicted to need, the likeliest first.

        Neither experts that the current layer needs nor predicted ones are evicted for them.
        """
        keys = [self._key(layer, e) for e in experts]
        protected = [key for key in keys if self._held[key] and not self._protected[key]]
        self._protected[protected] = True
        assignments = []
        for expert, key in zip(experts, keys, strict=True):
            if self._held[key]:
                continue
            assignment = self._assign(layer, expert, urgent=False)
            if assignment is None:
                break
            self._prefetched[key] = self._protected[key] = True
            protected.append(key)
            assignments.append(assignment)
        self._protected[protected] = False
        self._prefetches += len(assignments)
        return assignments

    def keep_only(self, arrived: Collection[tuple[int, int]]) -> None:
        """Free all slots except those of these (layer, expert); repairs a cache whose change an exception interrupted."""
        kept = {self._key(*expert_id) for expert_id in arrived if self.slot_of(*expert_id) >= 0}
        for key in range(len(self._slot)):
            if key not in kept:
                self._slot[key], self._held[key], self._prefetched[key] = -1, False, False
        self._free = sorted(set(range(self.slots)) - {int(self._slot[key]) for key in kept}, reverse=True)
        self._protected[:] = False

    def _assign(self, layer: int, expert: int, *, urgent: bool) -> Assignment | None:
        """A slot for an expert that has none; None while nothing can be evicted."""
        if self._free:
            return self._occupy(layer, expert, urgent)
        victim = self._victim()
        if victim is None:
            return None
        slot = int(self._slot[victim])
        self._slot[victim], self._held[victim], self._prefetched[victim] = -1, False, False
        self._free.append(slot)
        self._evictions += 1
        return self._occupy(layer, expert, urgent, divmod(victim, self._policy.experts))

    def _victim(self) -> int | None:
        """The number of the expert that is evicted next; None while nothing can be evicted."""
        candidates = self._held & ~self._protected
        if self.evictable is not None:
            candidates &= self.evictable()
        if self.evict_first is not None and (preferred := candidates & self.evict_first()).any():
            candidates = preferred
        keys = np.flatnonzero(candidates)
        return int(keys[self._policy.priority()[keys].argmin()]) if keys.size else None

    def _occupy(self, layer: int, expert: int, urgent: bool, evicted: tuple[int, int] | None = None) -> Assignment:
        key, slot = self._key(layer, expert), self._free.pop()
        self._slot[key], self._held[key] = slot, True
        return Assignment(layer, expert, slot, evicted, urgent)

    def _key(self, layer: int, expert: int) -> int:
        return layer * self._policy.experts + expert


@dataclass(frozen=True)
class Group:
    """Experts of a layer that are to be computed next, together."""

    experts: tuple[int, ...]
    """Their indices in the layer."""


def serve(
    cache: ExpertCache,
    layer: int,
    needed: Sequence[int],
    ahead: Sequence[int] = (),
    next_cache: ExpertCache | None = None,
    arrived: Callable[[int], bool] = lambda expert: True,
) -> Iterator[Assignment | Group]:
    """The steps, in order, by which a forward pass gets the experts of a layer.

    The caller starts the load of an `Assignment`; it computes a `Group`, once the experts have arrived, before it asks for the next step.
    Experts in memory are computed first. Loads start as soon as slots can be had, prefetches after all loads of this layer.

    Args:
        cache: of this layer's experts.
        layer: its index.
        needed: its experts, in ascending order.
        ahead: experts of the next layer to prefetch, the likeliest first.
        next_cache: of the next layer's experts.
        arrived: whether the bytes of an expert that has a slot are there. Experts that are still being loaded are computed last.
    """
    present, missed = cache.request(layer, needed)
    ready = tuple(expert for expert in present if arrived(expert))
    loading = [expert for expert in present if expert not in ready]
    groups = [Group(ready)] if ready else []
    groups += [Group((expert,)) for expert in [*loading, *missed]]
    for group in groups:
        while missed and (assignment := cache.assign(layer, missed[0])) is not None:
            del missed[0]
            yield assignment
        if not missed and ahead and next_cache is not None:
            yield from next_cache.prefetch(layer + 1, ahead)
            ahead = ()
        yield group
        cache.release(layer, group.experts)
    if ahead and next_cache is not None:  # the layer itself needs nothing
        yield from next_cache.prefetch(layer + 1, ahead)
