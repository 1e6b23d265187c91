"""Experts in host memory over disk: slots in memory, which a few threads fill from files.

`HostTier.serve` gives a layer's experts to the CPU, or below GPUs to the copies that are sent to them. What happens on a miss:

1. `serve` asks the cache, whose policy chooses an expert to evict where no slot is free (`cache.py`, `policies.py`).
2. `_start_load` lets the threads of `reader.py` read the expert's range from disk into the slot, piece by piece.
3. The experts that hit are computed meanwhile.
4. `_wait_for` returns when the slot is filled, and the expert is computed from it.

With a fallback copy the caller computes from that instead, and does not wait.
"""

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

__all__ = ["HOST", "ExpertCatalog", "ExpertId", "HostTier", "Reader", "SlotReader", "fill_order"]

HOST = torch.device("cpu")

_MAX_UPGRADES = 2  # loads under way at most when another upgrade is started: enough to keep the disk busy

ExpertId = tuple[int, int]
"""(layer, expert)."""


class ExpertCatalog(Protocol):
    """Which experts a checkpoint has."""

    kinds: list[ExpertKind]
    """The kind of every layer's experts."""
    n_experts: int
    """Experts of each layer."""


class Reader(Protocol):
    """Reads experts from disk; `ExpertReader` does, and a simulation's counts them."""

    @property
    def bytes_read(self) -> int:
        """Bytes read so far."""

    @property
    def busy_seconds(self) -> float:
        """Seconds in which at least one read was under way."""

    def load(self, layer: int, expert: int, slots: ExpertSlots, slot: int, *, urgent: bool) -> Load:
        """Start to read an expert into a slot."""

    def prioritize(self, load: Load) -> None:
        """A layer waits for this load now."""

    def cancel(self, load: Load) -> None:
        """The load is no longer needed."""

    def close(self) -> None:
        """Stop reading."""


class SlotReader(Protocol):
    """Reads host slots in the background, as copies to a GPU do."""

    def wait_until_unread(self, expert_id: ExpertId) -> None:
        """Return when the expert's slot in host memory is no longer read."""


@dataclass
class _Pool:
    """Slots for experts of one kind."""

    slots: ExpertSlots
    """Their memory."""
    cache: ExpertCache
    """Assigns them."""
    loads: dict[ExpertId, Load] = field(default_factory=dict)
    """Of the experts that are being read."""
    arrived: set[ExpertId] = field(default_factory=set)
    """Experts whose bytes are in their slots."""


class HostTier:
    """Experts in host memory over disk.

    Args:
        catalog: which experts there are.
        reader: reads them from disk; closed with the tier.
        slots: how many slots experts of each kind get.
        policies: one for each kind; each may serve one cache only.
        memory: of the slots; "meta" for a simulation.

    Attributes:
        reader: reads experts from disk.
        wait_seconds: for which layers waited for experts.
        slot_readers: must finish with an expert before its slot is overwritten; held weakly.
    """

    def __init__(
        self,
        catalog: ExpertCatalog,
        reader: Reader,
        *,
        slots: Mapping[ExpertKind, int],
        policies: Mapping[ExpertKind, CachePolicy],
        memory: torch.device = HOST,
    ) -> None:
        self._catalog, self.reader = catalog, reader
        self._pools = {kind: _Pool(ExpertSlots(kind, count, memory), ExpertCache(count, policies[kind])) for kind, count in slots.items()}
        self._by_layer = [self._pools[kind] for kind in catalog.kinds]
        self.wait_seconds = 0.0
        self.slot_readers: WeakSet[SlotReader] = WeakSet()

    @property
    def n_layers(self) -> int:
        """Layers of the model."""
        return len(self._catalog.kinds)

    @property
    def n_experts(self) -> int:
        """Experts of each layer."""
        return self._catalog.n_experts

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(pool.slots.nbytes for pool in self._pools.values())

    @property
    def stats(self) -> CacheStats:
        """Counters of all slots."""
        return sum((pool.cache.stats for pool in self._pools.values()), CacheStats())

    def kind(self, layer: int) -> ExpertKind:
        """The kind of a layer's experts."""
        return self._catalog.kinds[layer]

    def fill(self, priority: np.ndarray | None = None, last: Sequence[ExpertId] = ()) -> None:
        """Read experts into the free slots, the likeliest first, and return when all have arrived.

        Args:
            priority: [L, E], how likely each expert is; None for equally many of each layer.
            last: experts that come after all others.

        Raises:
            CheckpointError: an expert cannot be read, or is damaged.
        """
        order = self.initial_experts(priority, last)
        for kind, pool in self._pools.items():
            for assignment in pool.cache.fill([expert_id for expert_id in order if self.kind(expert_id[0]) == kind]):
                self._start_load(assignment)
        for pool in self._pools.values():
            for expert_id in list(pool.loads):
                self._wait_for(pool, expert_id)

    def serve(self, layer: int, needed: Sequence[int], ahead: Sequence[int] = ()) -> Generator[tuple[int, ...], None, None]:
        """Yields groups of the experts that a layer needs, each when its bytes are in memory; they stay there until the next group.

        A caller that stops before the last group must close the generator at once.

        Args:
            layer: its index.
            needed: its experts, in ascending order.
            ahead: experts of the next layer to prefetch, the likeliest first.

        Raises:
            CheckpointError: an expert cannot be read, or is damaged.
        """
        pool = self._pool(layer)
        next_cache = self._pool(layer + 1).cache if ahead else None
        with self._repaired_on_error():
            for step in serve(pool.cache, layer, needed, ahead, next_cache, lambda expert: self.holds(layer, expert)):
                if isinstance(step, Assignment):
                    self._start_load(step)
                    continue
                for expert in step.experts:
                    self._wait_for(pool, (layer, expert))
                yield step.experts

    def record_fallback_hits(self, layer: int, experts: Sequence[int], *, upgrade: bool) -> None:
        """Count misses that a fallback copy served; to be called after the layer's other experts were served.

        Args:
            layer: its index.
            experts: that the fallback copy served.
            upgrade: whether to read those of sufficient priority for the next time, while the disk has nothing else to do.
        """
        pool = self._pool(layer)
        pool.cache.record_miss(layer, experts)
        if not upgrade:
            return
        with self._repaired_on_error():
            for expert in experts:
                if sum(not load.done for load in pool.loads.values()) >= _MAX_UPGRADES:
                    return
                if pool.cache.slot_of(layer, expert) < 0 and (assignment := pool.cache.upgrade(layer, expert)) is not None:
                    self._start_load(assignment)

    def load_all(self, layer: int, needed: Sequence[int]) -> None:
        """Read these experts of a layer, which has slots for all of them; they stay until the layer is served again."""
        pool = self._pool(layer)
        with self._repaired_on_error():
            for step in serve(pool.cache, layer, needed):
                if isinstance(step, Assignment):
                    self._start_load(step)
            for expert in needed:
                self._wait_for(pool, (layer, expert))

    def poll_loads(self, layer: int) -> None:
        """Mark experts of a layer as arrived whose loads have finished since the last call, without waiting for others.

        Raises:
            CheckpointError: one could not be read, or is damaged.
        """
        pool = self._pool(layer)
        with self._repaired_on_error():
            for expert_id in [expert_id for expert_id, load in pool.loads.items() if expert_id[0] == layer and load.done]:
                self._wait_for(pool, expert_id)

    def initial_experts(self, priority: np.ndarray | None = None, last: Sequence[ExpertId] = ()) -> list[ExpertId]:
        """The experts that `fill` would read if all slots were free."""
        order = fill_order(self.n_layers, self.n_experts, priority, last)
        return [
            expert_id
            for kind, pool in self._pools.items()
            for expert_id in [expert_id for expert_id in order if self.kind(expert_id[0]) == kind][: pool.cache.slots]
        ]

    def clear(self) -> None:
        """Free all slots."""
        for pool in self._pools.values():
            assert not pool.loads, "an expert is still being read"
            pool.arrived.clear()
            pool.cache.keep_only(())

    def slots(self, layer: int) -> ExpertSlots:
        """The memory of the slots for a layer's experts."""
        return self._pool(layer).slots

    def slot_of(self, layer: int, expert: int) -> int:
        """The slot of an expert; -1 if it has none."""
        return self._pool(layer).cache.slot_of(layer, expert)

    def holds(self, layer: int, expert: int) -> bool:
        """Whether an expert's bytes are in memory and known to be sound."""
        return (layer, expert) in self._pool(layer).arrived

    def ready(self, layer: int, expert: int) -> bool:
        """Whether an expert can be served without waiting."""
        expert_id, pool = (layer, expert), self._pool(layer)
        return expert_id in pool.arrived or (expert_id in pool.loads and pool.loads[expert_id].done)

    def held(self) -> np.ndarray:
        """bool [L * E]: experts that have a slot."""
        first, *others = (pool.cache.held for pool in self._pools.values())
        return np.any([first, *others], axis=0) if others else first

    def prefer_to_evict(self, evict_first: Callable[[], np.ndarray]) -> None:
        """From now on, evict experts first for which `evict_first` returns True, in bool [L * E]."""
        for pool in self._pools.values():
            pool.cache.evict_first = evict_first

    def close(self) -> None:
        """End the reader's threads."""
        self.reader.close()

    def _pool(self, layer: int) -> _Pool:
        return self._by_layer[layer]

    def _start_load(self, assignment: Assignment) -> None:
        pool = self._pool(assignment.layer)
        if assignment.evicted is not None:
            pool.arrived.discard(assignment.evicted)
            evicted_load = pool.loads.pop(assignment.evicted, None)
            if evicted_load is not None:  # a wrong prediction, which a thread may still be writing to this slot
                self.reader.cancel(evicted_load)
                evicted_load.join()
            for slot_reader in self.slot_readers:
                slot_reader.wait_until_unread(assignment.evicted)
        expert_id = assignment.layer, assignment.expert
        pool.arrived.discard(expert_id)
        pool.loads[expert_id] = self.reader.load(*expert_id, pool.slots, assignment.slot, urgent=assignment.urgent)

    def _wait_for(self, pool: _Pool, expert_id: ExpertId) -> None:
        """Wait for an expert if it is still being read."""
        if expert_id in pool.arrived:
            return
        load = pool.loads[expert_id]
        if not load.done:
            started = time.perf_counter()
            self.reader.prioritize(load)
            load.join()
            self.wait_seconds += time.perf_counter() - started
        load.wait()
        pool.arrived.add(expert_id)
        del pool.loads[expert_id]

    @contextmanager
    def _repaired_on_error(self) -> Iterator[None]:
        """If an exception ends the block, cancel all loads and free the slots of experts that have not arrived."""
        try:
            yield
        except BaseException:
            for pool in self._pools.values():
                for load in pool.loads.values():
                    self.reader.cancel(load)
                for load in pool.loads.values():
                    load.join()
                pool.loads.clear()
                pool.arrived = {expert_id for expert_id in pool.arrived if pool.cache.slot_of(*expert_id) >= 0}
                pool.cache.keep_only(pool.arrived)
            raise


def fill_order(layers: int, experts: int, priority: np.ndarray | None, last: Sequence[ExpertId] = ()) -> list[ExpertId]:
    """All experts in the order in which they get slots.

    Args:
        layers: L.
        experts: E.
        priority: [L, E], higher ones first; None for the experts 0 of all layers, then the experts 1, and so on.
        last: come after all others, those of the lowest priority first.
    """
    order = [(layer, e) for e in range(experts) for layer in range(layers)]
    if priority is not None:
        order.sort(key=lambda expert_id: -float(priority[expert_id]))
    postponed = set(last)
    return [expert_id for expert_id in order if expert_id not in postponed] + [
        expert_id for expert_id in reversed(order) if expert_id in postponed
    ]
