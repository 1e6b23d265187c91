"""The tier of host memory over disk: slots in memory, which a few threads fill from files."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakSet

import numpy as np
import torch

from dbrx_q.planning.expert_kinds import ExpertKind

from .cache import Assignment, ExpertCache, serve
from .policies import CachePolicy
from .reader import Load
from .slots import ExpertSlots
from .stats import CacheStats

__all__ = ["HOST", "ExpertPlaces", "HostTier", "Place", "Reader", "Watcher", "fill_order"]

HOST = torch.device("cpu")

_UPGRADES = 2  # experts on their way at most when one more is asked for that nobody waits for: enough to keep the disk busy

Place = tuple[int, int]
"""(layer, expert)."""


class ExpertPlaces(Protocol):
    """Which experts there are. kinds: of every layer's. n_experts: of each layer."""

    kinds: list[ExpertKind]
    n_experts: int


class Reader(Protocol):
    """What brings experts from disk, as `ExpertReader`."""

    @property
    def bytes_read(self) -> int:
        """Bytes read so far."""

    @property
    def busy_seconds(self) -> float:
        """Seconds in which something was read."""

    def load(self, layer: int, expert: int, slots: ExpertSlots, slot: int, *, urgent: bool) -> Load:
        """Begin to bring an expert into a slot."""

    def hurry(self, load: Load) -> None:
        """Somebody waits for it now."""

    def abandon(self, load: Load) -> None:
        """Nobody waits for it any more."""

    def close(self) -> None:
        """Bring nothing more."""


class Watcher(Protocol):
    """Who reads experts from host memory while others are served."""

    def wait_until_unread(self, place: Place) -> None:
        """Return when the expert is read there no more."""


@dataclass
class _Pool:
    """Slots for one kind of experts, and who lies in them."""

    slots: ExpertSlots
    cache: ExpertCache
    loads: dict[Place, Load] = field(default_factory=dict)  # of experts on their way
    arrived: set[Place] = field(default_factory=set)  # experts whose bytes are in their slots


class HostTier:
    """Experts in host memory, those that are not there on disk.

    Args:
        files: where the experts lie.
        reader: brings them; closed with the tier.
        slots: how many slots experts of each kind get.
        policies: what goes when slots are full, one for each kind; each may serve one cache only.
        memory: where the slots lie; "meta" for a simulation.

    Attributes:
        wait_seconds: in which somebody waited for an expert.
        watchers: are told of an expert before its slot is written again; held weakly.
    """

    def __init__(
        self,
        files: ExpertPlaces,
        reader: Reader,
        *,
        slots: Mapping[ExpertKind, int],
        policies: Mapping[ExpertKind, CachePolicy],
        memory: torch.device = HOST,
    ) -> None:
        self._files, self._reader = files, reader
        self._pools = {kind: _Pool(ExpertSlots(kind, count, memory), ExpertCache(count, policies[kind])) for kind, count in slots.items()}
        self._by_layer = [self._pools[kind] for kind in files.kinds]
        self.wait_seconds = 0.0
        self.watchers: WeakSet[Watcher] = WeakSet()

    @property
    def n_layers(self) -> int:
        """Layers of the model."""
        return len(self._files.kinds)

    @property
    def n_experts(self) -> int:
        """Experts of each layer."""
        return self._files.n_experts

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(pool.slots.nbytes for pool in self._pools.values())

    @property
    def stats(self) -> CacheStats:
        """Counters of all slots."""
        return sum((pool.cache.stats for pool in self._pools.values()), CacheStats())

    @property
    def reader(self) -> Reader:
        """What brings experts from disk."""
        return self._reader

    def kind(self, layer: int) -> ExpertKind:
        """Of a layer's experts."""
        return self._files.kinds[layer]

    def fill(self, priority: np.ndarray | None = None, last: Sequence[Place] = ()) -> None:
        """Read experts into the free slots and return when they are there: the likeliest first.

        Args:
            worth: [L, E], how likely each is; None for the same number of each layer.
            last: those that come after all others.

        Raises:
            CheckpointError: an expert cannot be read, or is damaged.
        """
        order = self.first(priority, last)
        for kind, pool in self._pools.items():
            for assignment in pool.cache.fill([place for place in order if self.kind(place[0]) == kind]):
                self._begin(assignment)
        for pool in self._pools.values():
            for place in list(pool.loads):
                self._arrive(pool, place)

    def serve(self, layer: int, needed: Sequence[int], ahead: Sequence[int] = ()) -> Generator[tuple[int, ...], None, None]:
        """Groups of the experts that a layer needs, each when its bytes are in memory, where they stay until the next group is asked for.

        Whoever leaves before the last group must close it at once.

        Args:
            layer: its index.
            needed: its experts, in ascending order.
            ahead: experts of the next layer to bring meanwhile, the likeliest first.

        Raises:
            CheckpointError: an expert cannot be read, or is damaged.
        """
        pool = self._pool(layer)
        following = self._pool(layer + 1).cache if ahead else None
        with self._intact():
            for step in serve(pool.cache, layer, needed, ahead, following, lambda expert: self.has(layer, expert)):
                if isinstance(step, Assignment):
                    self._begin(step)
                    continue
                for expert in step.experts:
                    self._arrive(pool, (layer, expert))
                yield step.experts

    def serve_from_fallback(self, layer: int, experts: Sequence[int], *, upgrade: bool) -> None:
        """A fallback copy answered for experts that a layer needs, after the others were served; they count as misses.

        upgrade: whether those that are worth it are brought for the next time, as far as the disk has nothing else to do.
        """
        pool = self._pool(layer)
        pool.cache.record_miss(layer, experts)
        if not upgrade:
            return
        with self._intact():
            for expert in experts:
                if sum(not load.done for load in pool.loads.values()) >= _UPGRADES:
                    return
                if pool.cache.slot_of(layer, expert) < 0 and (taken := pool.cache.upgrade(layer, expert)) is not None:
                    self._begin(taken)

    def gather(self, layer: int, needed: Sequence[int]) -> None:
        """Bring these experts of a layer, which has slots for all of them; they stay until the layer is served again."""
        pool = self._pool(layer)
        with self._intact():
            for step in serve(pool.cache, layer, needed):
                if isinstance(step, Assignment):
                    self._begin(step)
            for expert in needed:
                self._arrive(pool, (layer, expert))

    def poll_loads(self, layer: int) -> None:
        """See which experts of a layer have come from disk since.

        Raises:
            CheckpointError: one could not be read, or is damaged.
        """
        pool = self._pool(layer)
        with self._intact():
            for place in [place for place, load in pool.loads.items() if place[0] == layer and load.done]:
                self._arrive(pool, place)

    def first(self, priority: np.ndarray | None = None, last: Sequence[Place] = ()) -> list[Place]:
        """What `fill` brings into slots that are all free."""
        order = fill_order(self.n_layers, self.n_experts, priority, last)
        return [
            place
            for kind, pool in self._pools.items()
            for place in [place for place in order if self.kind(place[0]) == kind][: pool.cache.slots]
        ]

    def forget(self) -> None:
        """Free all slots."""
        for pool in self._pools.values():
            assert not pool.loads, "an expert is on its way"
            pool.arrived.clear()
            pool.cache.keep_only(())

    def slots(self, layer: int) -> ExpertSlots:
        """The memory that a layer's experts lie in."""
        return self._pool(layer).slots

    def slot_of(self, layer: int, expert: int) -> int:
        """Where an expert lies; -1 for not here."""
        return self._pool(layer).cache.slot_of(layer, expert)

    def has(self, layer: int, expert: int) -> bool:
        """Whether an expert's bytes are here."""
        return (layer, expert) in self._pool(layer).arrived

    def ready(self, layer: int, expert: int) -> bool:
        """Whether an expert can be served without a wait."""
        place, pool = (layer, expert), self._pool(layer)
        return place in pool.arrived or (place in pool.loads and pool.loads[place].done)

    def held(self) -> np.ndarray:
        """bool [L * E]: experts that have a slot."""
        first, *others = (pool.cache.held for pool in self._pools.values())
        return np.any([first, *others], axis=0) if others else first

    def prefer_to_evict(self, evict_first: Callable[[], np.ndarray]) -> None:
        """Evict from now on first what lies in a faster memory, too: those of which `evict_first` gives bool [L * E]."""
        for pool in self._pools.values():
            pool.cache.evict_first = evict_first

    def close(self) -> None:
        """End the reader's threads."""
        self._reader.close()

    def _pool(self, layer: int) -> _Pool:
        return self._by_layer[layer]

    def _begin(self, assignment: Assignment) -> None:
        pool = self._pool(assignment.layer)
        if assignment.evicted is not None:
            pool.arrived.discard(assignment.evicted)
            gone = pool.loads.pop(assignment.evicted, None)
            if gone is not None:  # predicted, not needed, and perhaps still being written where the new one goes
                self._reader.abandon(gone)
                gone.settle()
            for watcher in self.watchers:
                watcher.wait_until_unread(assignment.evicted)
        place = assignment.layer, assignment.expert
        pool.arrived.discard(place)
        pool.loads[place] = self._reader.load(*place, pool.slots, assignment.slot, urgent=assignment.urgent)

    def _arrive(self, pool: _Pool, place: Place) -> None:
        """Wait for an expert that may be on its way."""
        if place in pool.arrived:
            return
        load = pool.loads[place]
        if not load.done:
            started = time.perf_counter()
            self._reader.hurry(load)
            load.settle()
            self.wait_seconds += time.perf_counter() - started
        load.wait()
        pool.arrived.add(place)
        del pool.loads[place]

    @contextmanager
    def _intact(self) -> Iterator[None]:
        """Whatever ends the block early, a slot is believed to hold an expert only where its bytes have arrived."""
        try:
            yield
        except BaseException:
            for pool in self._pools.values():
                for load in pool.loads.values():
                    self._reader.abandon(load)
                for load in pool.loads.values():
                    load.settle()
                pool.loads.clear()
                pool.arrived = {place for place in pool.arrived if pool.cache.slot_of(*place) >= 0}
                pool.cache.keep_only(pool.arrived)
            raise


def fill_order(layers: int, experts: int, priority: np.ndarray | None, last: Sequence[Place] = ()) -> list[Place]:
    """All experts, the likeliest first, by `priority` [L, E] or as many of each layer; behind them those of `last`, the least likely
    first."""
    order = [(layer, e) for e in range(experts) for layer in range(layers)]
    if priority is not None:
        order.sort(key=lambda place: -float(priority[place]))
    behind = set(last)
    return [place for place in order if place not in behind] + [place for place in reversed(order) if place in behind]
