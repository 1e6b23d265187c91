"""The expert store of a CPU: as many experts in memory as a budget holds, the others on disk."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from ..errors import RequestError
from ..kernels.cpu_moe import ExpertOutputs
from ..kernels.moe import ExpertWeights, Routing, route
from .cache import Assignment, ExpertCache, serve
from .files import ExpertFiles
from .foresight import Foresight
from .policies import CachePolicy
from .reader import ExpertReader, Load
from .slots import ExpertKind, ExpertSlots
from .stats import CacheStats, ExpertStats
from .store import ExpertStore

__all__ = ["HostExpertStore", "NextRouter"]


@dataclass(frozen=True)
class NextRouter:
    """What foresees the experts of a layer from the input of the layer before: its router. weight: [E, D]."""

    weight: torch.Tensor
    top_k: int


@dataclass
class _Pool:
    """Slots for one kind of experts, and who lies in them."""

    slots: ExpertSlots
    cache: ExpertCache
    loads: dict[tuple[int, int], Load] = field(default_factory=dict)  # of experts on their way
    arrived: set[tuple[int, int]] = field(default_factory=set)  # experts whose bytes are in their slots


class HostExpertStore(ExpertStore):
    """Serves experts from slots in host memory, which a few threads fill from disk.

    While an expert is computed the next ones are read. What is computed does not depend on what lay where: the same tokens give the same
    bits with any number of slots, any policy and with or without prefetch.

    Args:
        files: where the experts lie.
        reader: brings them; closed with the store.
        slots: how many slots experts of each kind get.
        policies: what goes when slots are full, one for each kind; each may serve one cache only.
        routers: of every layer, to foresee what the next layer will need and read it meanwhile; None for no prefetch.
    """

    def __init__(
        self,
        files: ExpertFiles,
        reader: ExpertReader,
        *,
        slots: dict[ExpertKind, int],
        policies: dict[ExpertKind, CachePolicy],
        routers: Sequence[NextRouter] | None = None,
    ) -> None:
        self._files, self._reader, self._routers = files, reader, routers
        self._pools = {
            kind: _Pool(ExpertSlots(kind, count, torch.device("cpu")), ExpertCache(count, policies[kind])) for kind, count in slots.items()
        }
        self._foresight = Foresight(len(files.kinds), files.n_experts)
        self._compute_seconds = self._wait_seconds = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(pool.slots.nbytes for pool in self._pools.values())

    def fill(self, worth: np.ndarray | None = None) -> None:
        """Read experts into the free slots and return when they are there: the likeliest first.

        Args:
            worth: [L, E], how likely each is; None for the same number of each layer.

        Raises:
            CheckpointError: an expert cannot be read, or is damaged.
        """
        L, E = len(self._files.kinds), self._files.n_experts
        order = [(layer, e) for e in range(E) for layer in range(L)]
        if worth is not None:
            order.sort(key=lambda place: -float(worth[place]))
        for kind, pool in self._pools.items():
            for assignment in pool.cache.fill([place for place in order if self._files.kinds[place[0]] == kind]):
                self._begin(assignment)
        for pool in self._pools.values():
            for place in list(pool.loads):
                self._arrive(pool, place)

    def forward(self, index: int, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        outputs = ExpertOutputs(x, routing.experts)
        pool = self._pool(index)
        needed = list(outputs.counts)
        ahead = self._ahead(index, x, needed)
        following = self._pool(index + 1).cache if ahead else None
        with self._intact():
            for step in serve(pool.cache, index, needed, ahead, following):
                if isinstance(step, Assignment):
                    self._begin(step)
                    continue
                for expert in step.experts:
                    self._arrive(pool, (index, expert))
                started = time.perf_counter()
                outputs.add(pool.slots.weights, {e: pool.cache.slot_of(index, e) for e in step.experts})
                self._compute_seconds += time.perf_counter() - started
        return outputs.total(routing.weights).to(x.dtype)

    def layer(self, index: int, experts: torch.Tensor) -> ExpertWeights:
        pool, needed = self._pool(index), experts.unique().tolist()
        if len(needed) > pool.cache.slots:
            raise RequestError(
                f"this needs the experts of a layer in memory together; it uses {len(needed)} and the budget holds {pool.cache.slots}. "
                "Give more memory"
            )
        with self._intact():
            for step in serve(pool.cache, index, needed):
                if isinstance(step, Assignment):
                    self._begin(step)
            slots = torch.full((self._files.n_experts,), -1, dtype=torch.int32)
            for e in needed:
                self._arrive(pool, (index, e))
                slots[e] = pool.cache.slot_of(index, e)
        return replace(pool.slots.weights, slots=slots)

    def stats(self) -> ExpertStats:
        cache = sum((pool.cache.stats for pool in self._pools.values()), CacheStats())
        foresight, reader = self._foresight, self._reader
        times = self._compute_seconds, self._wait_seconds, reader.busy_seconds
        return ExpertStats(cache, foresight.foreseen, foresight.needed, reader.bytes_read, *times)

    def close(self) -> None:
        self._reader.close()

    def _pool(self, layer: int) -> _Pool:
        return self._pools[self._files.kinds[layer]]

    def _ahead(self, index: int, x: torch.Tensor, needed: list[int]) -> list[int]:
        """The experts of the next layer to fetch, after a look at how the last guess came true."""
        if self._routers is None:
            return []
        self._foresight.judge(index, needed)
        if index + 1 >= len(self._routers) or not len(x):
            return []
        router = self._routers[index + 1]
        return self._foresight.guess(index + 1, route(x, router.weight, router.top_k, None).experts.numpy())

    def _begin(self, assignment: Assignment) -> None:
        pool = self._pool(assignment.layer)
        if assignment.evicted is not None:
            pool.arrived.discard(assignment.evicted)
            gone = pool.loads.pop(assignment.evicted, None)
            if gone is not None:  # foreseen, not needed, and perhaps still being written where the new one goes
                self._reader.abandon(gone)
                gone.settle()
        place = assignment.layer, assignment.expert
        pool.arrived.discard(place)
        pool.loads[place] = self._reader.load(*place, pool.slots, assignment.slot, urgent=assignment.urgent)

    def _arrive(self, pool: _Pool, place: tuple[int, int]) -> None:
        """Wait for an expert that may be on its way."""
        if place in pool.arrived:
            return
        load = pool.loads[place]
        if not load.done:
            started = time.perf_counter()
            self._reader.hurry(load)
            load.settle()
            self._wait_seconds += time.perf_counter() - started
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
