"""Which expert lies in which slot: decisions without bytes, so that a store and a simulation come to the same ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .policies import CachePolicy
from .stats import CacheStats

__all__ = ["Assignment", "ExpertCache", "Group", "serve"]


@dataclass(frozen=True)
class Assignment:
    """An expert is to be loaded into a slot. evicted: (layer, expert) that lay there, None for nobody. urgent: it is needed now."""

    layer: int
    expert: int
    slot: int
    evicted: tuple[int, int] | None
    urgent: bool


class ExpertCache:
    """A fixed number of slots and what lies in them.

    Args:
        slots: how many; at least one.
        policy: says what goes when all are full.

    Attributes:
        evictable: gives bool [L * E], the experts that alone may be evicted, since they lie in another memory, too; None for any.
        lent: gives bool [L * E], the experts that are evicted before all others, since they lie in a faster memory, too; None for none.
    """

    def __init__(self, slots: int, policy: CachePolicy) -> None:
        assert slots >= 1, "a cache must hold an expert"
        self.slots, self._policy = slots, policy
        total = policy.layers * policy.experts
        self._slot = np.full(total, -1)
        self._held = np.zeros(total, bool)
        self._shielded = np.zeros(total, bool)  # must stay for now
        self._predicted_only = np.zeros(total, bool)  # came by a prefetch and was not used yet
        self._free = list(range(slots))[::-1]
        self.evictable: Callable[[], np.ndarray] | None = None
        self.evict_first: Callable[[], np.ndarray] | None = None
        self._hits = self._prefetch_hits = self._misses = self._prefetches = self._evictions = 0

    @property
    def stats(self) -> CacheStats:
        """Counters since it was made."""
        return CacheStats(self._hits, self._prefetch_hits, self._misses, self._prefetches, self._evictions)

    @property
    def held(self) -> np.ndarray:
        """bool [L * E]: experts that have a slot."""
        return self._held

    @property
    def free_slot(self) -> int | None:
        """A slot that nobody lies in; None where all are taken."""
        return self._free[-1] if self._free else None

    def slot_of(self, layer: int, expert: int) -> int:
        """Where an expert lies; -1 for nowhere."""
        return int(self._slot[self._key(layer, expert)])

    def fill(self, order: Sequence[tuple[int, int]]) -> list[Assignment]:
        """Give the free slots to these (layer, expert), as far as they reach."""
        chosen = [(layer, expert) for layer, expert in order if self.slot_of(layer, expert) < 0][: len(self._free)]
        return [self._take(layer, expert, True) for layer, expert in chosen]

    def visit(self, layer: int, experts: Sequence[int]) -> tuple[list[int], list[int]]:
        """A forward pass reaches a layer of which it needs these experts, in ascending order: (those that lie here, those that don't)."""
        self._policy.enter(layer)
        self._shielded[:] = False
        present, absent, brought = [], [], 0
        for expert in experts:
            key = self._key(layer, expert)
            self._policy.use(key)
            if not self._held[key]:
                absent.append(expert)
                continue
            present.append(expert)
            self._shielded[key] = True
            if self._predicted_only[key]:
                self._predicted_only[key] = False
                brought += 1
        self._hits += len(present) - brought
        self._prefetch_hits += brought
        self._misses += len(absent)
        return present, absent

    def record_miss(self, layer: int, experts: Sequence[int]) -> None:
        """Experts that the layer needs and that are not here are served elsewhere: they count, and get no slot."""
        self._misses += len(experts)
        for expert in experts:
            self._policy.use(self._key(layer, expert))

    def assign(self, layer: int, expert: int) -> Assignment | None:
        """A slot for an expert that the layer needs; None while all must stay."""
        taken = self._assign(layer, expert, urgent=True)
        if taken is not None:
            self._shielded[self._key(layer, expert)] = True
        return taken

    def upgrade(self, layer: int, expert: int) -> Assignment | None:
        """A slot for an expert that was served elsewhere, if it is worth more than the one that would go; None else."""
        key, victim = self._key(layer, expert), None if self._free else self._victim()
        priority = self._policy.priority()
        if not self._free and (victim is None or priority[victim] >= priority[key]):
            return None
        return self._assign(layer, expert, urgent=False)

    def drop(self, layer: int, expert: int) -> None:
        """Free the slot of an expert that will not come."""
        key = self._key(layer, expert)
        self._free.append(int(self._slot[key]))
        self._slot[key], self._held[key], self._predicted_only[key], self._shielded[key] = -1, False, False, False

    def served(self, layer: int, experts: Sequence[int]) -> None:
        """These were computed: their slots may go to others."""
        self._shielded[[self._key(layer, e) for e in experts]] = False

    def prefetch(self, layer: int, experts: Sequence[int]) -> list[Assignment]:
        """Slots for what a later layer is predicted to need, the likeliest first; what is needed now, and what is predicted, stays."""
        keys = [self._key(layer, e) for e in experts]
        spared = [key for key in keys if self._held[key] and not self._shielded[key]]
        self._shielded[spared] = True
        found = []
        for expert, key in zip(experts, keys, strict=True):
            if self._held[key]:
                continue
            taken = self._assign(layer, expert, urgent=False)
            if taken is None:
                break
            self._predicted_only[key] = self._shielded[key] = True
            spared.append(key)
            found.append(taken)
        self._shielded[spared] = False
        self._prefetches += len(found)
        return found

    def keep_only(self, arrived: Collection[tuple[int, int]]) -> None:
        """Forget every (layer, expert) but these, also where a change was broken off in the middle."""
        kept = {self._key(*place) for place in arrived if self.slot_of(*place) >= 0}
        for key in range(len(self._slot)):
            if key not in kept:
                self._slot[key], self._held[key], self._predicted_only[key] = -1, False, False
        self._free = sorted(set(range(self.slots)) - {int(self._slot[key]) for key in kept}, reverse=True)
        self._shielded[:] = False

    def _assign(self, layer: int, expert: int, *, urgent: bool) -> Assignment | None:
        """A slot for an expert that is not there; None while everything must stay."""
        if self._free:
            return self._take(layer, expert, urgent)
        victim = self._victim()
        if victim is None:
            return None
        slot = int(self._slot[victim])
        self._slot[victim], self._held[victim], self._predicted_only[victim] = -1, False, False
        self._free.append(slot)
        self._evictions += 1
        return self._take(layer, expert, urgent, divmod(victim, self._policy.experts))

    def _victim(self) -> int | None:
        """Who goes next; None while everything must stay."""
        free_to_go = self._held & ~self._shielded
        if self.evictable is not None:
            free_to_go &= self.evictable()
        if self.evict_first is not None and (twice := free_to_go & self.evict_first()).any():
            free_to_go = twice
        candidates = np.flatnonzero(free_to_go)
        return int(candidates[self._policy.priority()[candidates].argmin()]) if candidates.size else None

    def _take(self, layer: int, expert: int, urgent: bool, evicted: tuple[int, int] | None = None) -> Assignment:
        key, slot = self._key(layer, expert), self._free.pop()
        self._slot[key], self._held[key] = slot, True
        return Assignment(layer, expert, slot, evicted, urgent)

    def _key(self, layer: int, expert: int) -> int:
        return layer * self._policy.experts + expert


@dataclass(frozen=True)
class Group:
    """Experts of the layer that are to be computed next, together."""

    experts: tuple[int, ...]


def serve(
    cache: ExpertCache,
    layer: int,
    needed: Sequence[int],
    ahead: Sequence[int] = (),
    next_cache: ExpertCache | None = None,
    arrived: Callable[[int], bool] = lambda expert: True,
) -> Iterator[Assignment | Group]:
    """What is to be done, in order, so that a forward pass gets the experts of a layer.

    An `Assignment` is to be begun; a `Group` is to be computed, once its experts arrived, before the next step is asked for. What lies
    here comes first. Loads are begun as soon as slots can be had, those that were predicted after all that are needed.

    Args:
        cache: of this layer's experts.
        layer: its index.
        needed: its experts, in ascending order.
        ahead: experts of the next layer to fetch before they are needed, the likeliest first.
        next_cache: of the next layer's experts.
        arrived: whether an expert that has a slot has its bytes there, too; what has not comes by itself, after the others.
    """
    present, waiting = cache.visit(layer, needed)
    here = tuple(expert for expert in present if arrived(expert))
    coming = [expert for expert in present if expert not in here]
    groups = [Group(here)] if here else []
    groups += [Group((expert,)) for expert in [*coming, *waiting]]
    for group in groups:
        while waiting and (taken := cache.assign(layer, waiting[0])) is not None:
            del waiting[0]
            yield taken
        if not waiting and ahead and next_cache is not None:
            yield from next_cache.prefetch(layer + 1, ahead)
            ahead = ()
        yield group
        cache.served(layer, group.experts)
    if ahead and next_cache is not None:  # the layer needs nothing from here
        yield from next_cache.prefetch(layer + 1, ahead)
