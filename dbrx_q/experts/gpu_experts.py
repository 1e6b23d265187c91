"""The experts of one gpu: a cache of them in its memory, host memory under it.

A layer's experts are served in this order: copies of missed ones begin; what lies on the GPU is computed there, while copies of what the
next layer is predicted to need begin, too; the CPU computes its share of the missed ones where they lie; what was copied is computed as it
arrives. Where there is a fallback copy it takes the place of experts that lie on disk, and is computed and copied like the others.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch

from dbrx_q.planning.expert_kinds import ExpertKind
from dbrx_q.planning.offloading import initial_slots
from dbrx_q.planning.policy_names import MissPolicy

from .cache import Assignment, ExpertCache
from .gpu_slot_pool import GpuSlotPool
from .host_tier import HostTier, Place, fill_order
from .link import Arrival, Link
from .policies import CachePolicy, Lru
from .split import MissRates, split_misses
from .stats import CacheStats
from .sums import ExpertSum
from .tiered_store import FallbackCopy
from .timer import Timer, on_device

__all__ = ["GpuExperts"]

_MANY = 64  # copies that are remembered before those that are done are forgotten


@dataclass(frozen=True)
class _Batch:
    """Experts of a layer that one slot pool serves.

    present: on the GPU. on_cpu: that the CPU computes. copied: that are missed, too, and copied as soon as they lie in host memory and a
    slot can be had. going: copies on their way, in the order in which they arrive: what had been predicted, then those of `copied`.
    """

    slot_pool: GpuSlotPool
    present: list[int]
    on_cpu: list[int]
    copied: list[int]
    going: dict[int, Arrival]

    @property
    def missed(self) -> list[int]:
        """Those that host memory must hold, in ascending order."""
        return sorted([*self.on_cpu, *self.copied])


class GpuExperts:
    """The experts of one GPU's layers.

    Args:
        device: the GPU.
        layers: (first, end) of the layers that it computes.
        tier: host memory under it.
        link: the way there.
        name: as the plan calls the GPU.
        slots, policies: of each kind of its layers' experts.
        miss_policy: how missed experts are served.
        rates: of the CPU and of the link, which the split follows.
        fallback: answers for what lies on disk.
        fallback_slots: of each kind of its experts, for copies of them on the GPU.
    """

    def __init__(
        self,
        device: torch.device,
        layers: tuple[int, int],
        tier: HostTier,
        link: Link,
        *,
        name: str,
        slots: Mapping[ExpertKind, int],
        policies: Mapping[ExpertKind, CachePolicy],
        miss_policy: MissPolicy,
        rates: MissRates,
        fallback: FallbackCopy | None = None,
        fallback_slots: Mapping[ExpertKind, int] = MappingProxyType({}),
    ) -> None:
        self.device, self.layers, self.link, self.name = device, layers, link, name
        self._tier, self._miss_policy, self.rates = tier, miss_policy, rates
        # Forced to one way, what is done does not depend on how fast copies are, and a simulation comes to the same counters.
        self._as_it_comes = miss_policy is MissPolicy.hybrid
        self._full = GpuSlotPool(device, tier, slots, policies)
        self._fallback: GpuSlotPool | None = None
        self._upgrade = False
        if fallback is not None:
            L, E = tier.n_layers, tier.n_experts
            self._fallback = GpuSlotPool(device, fallback.tier, fallback_slots, {kind: Lru(L, E) for kind in fallback_slots})
            self._upgrade = fallback.upgrade
        self._coming: dict[Place, Arrival] = {}  # copies that were begun because they were predicted, and not used yet
        self._read: list[tuple[Place, Arrival]] = []  # every copy that may still read host memory
        tier.watchers.add(self)
        self._seen = 0, 0.0  # bytes and seconds of the link that the rates know
        self.on_cpu = self.fallback_hits = 0
        self.wait_seconds = 0.0
        self._timer = Timer(device)

    @property
    def compute_seconds(self) -> float:
        """In products of experts, on the GPU and on the CPU; waits for the GPU."""
        return self._timer.seconds

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(slot_pool.nbytes for slot_pool in self._slot_pools)

    @property
    def _slot_pools(self) -> list[GpuSlotPool]:
        return [self._full] if self._fallback is None else [self._full, self._fallback]

    @property
    def stats(self) -> CacheStats:
        """Counters of the slots for experts at their full bits."""
        return sum((cache.stats for cache in self.caches), CacheStats())

    @property
    def caches(self) -> list[ExpertCache]:
        """Of the slots for experts at their full bits, one for each kind."""
        return [cache for _, cache in self._full.pools.values()]

    @property
    def coming(self) -> list[Place]:
        """(layer, expert) of those whose copies were begun because they were predicted, and that were not used yet."""
        return list(self._coming)

    def keep_what_is_nowhere_else(self) -> None:
        """Evict from now on only what lies in host memory, too."""
        for cache in self.caches:
            cache.evictable = self._tier.held

    def choose(self, priority: np.ndarray | None) -> list[Assignment]:
        """Slots for the likeliest experts; the last ones stay free for what is copied first."""
        order = [place for place in fill_order(self._tier.n_layers, self._tier.n_experts, priority) if self._own(place[0])]
        found = []
        for kind, (slots, cache) in self._full.pools.items():
            own = [place for place in order if self._tier.kind(place[0]) == kind]
            found += cache.fill(own[: initial_slots(slots.count, len(own))])
        return found

    def bring(self, assignment: Assignment, sources: Sequence[torch.Tensor]) -> None:
        """Copy an expert into its slot and return when it has left host memory."""
        self._await(self._full, (assignment.layer, assignment.expert), self._put(self._full, assignment, sources))

    def calibrated(self, rates: MissRates) -> None:
        """Follow rates that were measured; what went over the link before says nothing more."""
        self.rates, self._seen = rates, (self.link.bytes_copied, self.link.busy_seconds)

    def serve(self, index: int, total: ExpertSum, needed: list[int], ahead: list[int]) -> None:
        """Add the experts that layer `index` needs to the sum; copy some of the next layer's, which is this GPU's, meanwhile."""
        try:
            self._serve(index, total, needed, ahead)
        except BaseException:
            self.recover()
            raise

    def free_slot(self, layer: int) -> int | None:
        """A slot for the experts of a layer that nobody lies in; None where all are taken."""
        return self._full.cache(layer).free_slot

    def slot_views(self, layer: int, slot: int) -> list[torch.Tensor]:
        """The memory of a slot for the experts of a layer."""
        return self._full.slots(layer).views(slot)

    def recover(self) -> None:
        """After an error only what is certain to have arrived is believed to lie on the GPU, and nothing is on its way."""
        for slot_pool in self._slot_pools:
            slot_pool.keep_arrived()
        for arrival in self._coming.values():
            self.link.abandon(arrival)
        self._coming.clear()
        self.link.settle()

    def wait_until_unread(self, place: Place) -> None:
        """Return when no copy reads an expert in host memory any more."""
        started = time.perf_counter()
        coming = self._coming.get(place)
        if coming is not None and not coming.done and not coming.urgent and self._as_it_comes:  # nobody waits for it: cut it off
            self.link.abandon(self._coming.pop(place))
            self._full.cache(place[0]).drop(*place)
        for where, arrival in self._read:
            if where == place and not arrival.done:
                self.link.hurry(arrival)
                arrival.settle()
        self._read = [read for read in self._read if not read[1].done]
        self.wait_seconds += time.perf_counter() - started

    def _serve(self, index: int, total: ExpertSum, needed: list[int], ahead: list[int]) -> None:
        fallback = self._on_disk(index, needed)
        batches = [self._begin(self._full, index, total, [e for e in needed if e not in set(fallback)])]
        if self._fallback is not None and fallback:
            batches.append(self._begin(self._fallback, index, total, fallback))
        for batch in batches:
            self._on_gpu(total, batch.slot_pool, index, batch.present)
            # Those of which no slot was free before.
            batch.going.update(self._begin_copies(batch.slot_pool, index, [e for e in batch.copied if e not in batch.going]))
        if all(self._all_begun(batch, index) for batch in batches):
            self._fetch_ahead(index + 1, ahead)  # the link has nothing left to do for this layer
        absent = [e for e in ahead if self._full.cache(index + 1).slot_of(index + 1, e) < 0]
        for batch in batches:
            self._finish(batch, index, total, absent if self._fallback is None else [])
        if fallback:
            self._full.cache(index).record_miss(index, fallback)
            self._tier.serve_from_fallback(index, fallback, upgrade=self._upgrade)
            self.fallback_hits += len(fallback)
        self._fetch_ahead(index + 1, ahead)  # what found no slot while this layer's were needed
        sent_bytes, busy = self.link.bytes_copied, self.link.busy_seconds
        self.rates.saw(link_bytes=sent_bytes - self._seen[0], link_seconds=busy - self._seen[1])
        self._seen = sent_bytes, busy

    def _on_disk(self, index: int, needed: Sequence[int]) -> list[int]:
        """Which of these experts the fallback copy answers for."""
        if self._fallback is None:
            return []
        cache = self._full.cache(index)
        return [e for e in needed if cache.slot_of(index, e) < 0 and not self._tier.ready(index, e)]

    def _begin(self, slot_pool: GpuSlotPool, index: int, total: ExpertSum, needed: Sequence[int]) -> _Batch:
        """Decide how a slot pool serves the experts of a layer, and begin the copies that find a slot at once."""
        kind, cache = slot_pool.tier.kind(index), slot_pool.cache(index)
        if self._as_it_comes:
            slot_pool.tier.poll_loads(index)
        missed = {e: total.counts[e] for e in needed if cache.slot_of(index, e) < 0}
        coming = self._not_landed(index, needed) if slot_pool is self._full else {}
        late = {e: (total.counts[e], arrival.nbytes - arrival.sent) for e, arrival in coming.items() if slot_pool.tier.has(index, e)}
        on_cpu, copied = split_misses(missed, kind.nbytes, self.rates, self._miss_policy, late, self.link.left_of(coming.values()))
        present, _ = cache.visit(index, [e for e in needed if e not in set(on_cpu)])
        cache.record_miss(index, on_cpu)
        for e in [e for e in coming if e in set(on_cpu)]:
            self.link.defer(coming.pop(e))
        for arrival in coming.values():
            self.link.hurry(arrival)
        return _Batch(
            slot_pool, [e for e in present if e not in coming], on_cpu, copied, coming | self._begin_copies(slot_pool, index, copied)
        )

    def _begin_copies(self, slot_pool: GpuSlotPool, index: int, experts: Sequence[int]) -> dict[int, Arrival]:
        """Begin the copies of those that lie in host memory, as far as there are slots."""
        found: dict[int, Arrival] = {}
        for e in experts:
            if slot_pool.tier.has(index, e) and (arrival := self._copy(slot_pool, index, e)) is not None:
                found[e] = arrival
        return found

    def _all_begun(self, batch: _Batch, index: int) -> bool:
        """Whether nothing of the layer waits for the disk, or for a slot."""
        return all(e in batch.going for e in batch.copied) and all(batch.slot_pool.tier.has(index, e) for e in batch.on_cpu)

    def _finish(self, batch: _Batch, index: int, total: ExpertSum, ahead: Sequence[int]) -> None:
        """Add a batch's experts that are not on the GPU yet; those of `ahead` come from disk into host memory meanwhile."""
        slot_pool, going, computed = batch.slot_pool, batch.going, set(batch.on_cpu)
        with closing(slot_pool.tier.serve(index, batch.missed, ahead)) as groups:
            for experts in groups:
                on_cpu = [e for e in experts if e in computed]
                waiting = [e for e in experts if e not in computed and e not in going]
                while on_cpu or waiting:
                    for e in [e for e, arrival in going.items() if arrival.done and self._as_it_comes]:
                        self._arrive(total, slot_pool, index, going, e)
                    begun = self._begin_copies(slot_pool, index, waiting)
                    going |= begun
                    waiting = [e for e in waiting if e not in begun]
                    if on_cpu:  # one by one, so that the GPU and the link have work as soon as they can
                        now = on_cpu[:1] if self._as_it_comes and (going or waiting) else on_cpu
                        self._on_host(total, slot_pool, index, now)
                        on_cpu = on_cpu[len(now) :]
                    elif waiting and going:  # a slot is free when another copy was computed
                        self._arrive(total, slot_pool, index, going, next(iter(going)))
                    elif waiting:
                        self._on_host(total, slot_pool, index, [waiting.pop(0)])
        while going:
            self._arrive(total, slot_pool, index, going, next(iter(going)))

    def _on_host(self, total: ExpertSum, slot_pool: GpuSlotPool, index: int, experts: Sequence[int]) -> None:
        """Let the CPU compute experts where they lie in host memory."""
        tier = slot_pool.tier
        started = time.perf_counter()
        total.add_host(tier.slots(index).weights, {e: tier.slot_of(index, e) for e in experts})
        seconds = time.perf_counter() - started
        self._timer.add(seconds)
        self.on_cpu += len(experts)
        if all(total.counts[e] == 1 for e in experts):
            self.rates.saw(cpu_bytes=len(experts) * tier.kind(index).nbytes, cpu_seconds=seconds)

    def _arrive(self, total: ExpertSum, slot_pool: GpuSlotPool, index: int, going: dict[int, Arrival], expert: int) -> None:
        """Compute an expert whose copy was begun."""
        self._await(slot_pool, (index, expert), going.pop(expert))
        self._on_gpu(total, slot_pool, index, [expert])

    def _copy(self, slot_pool: GpuSlotPool, index: int, expert: int) -> Arrival | None:
        """Begin to copy an expert of host memory; None where no slot can be had."""
        assignment = slot_pool.cache(index).assign(index, expert)
        return None if assignment is None else self._put(slot_pool, assignment, self._sources(slot_pool, index, expert))

    def _sources(self, slot_pool: GpuSlotPool, index: int, expert: int) -> list[torch.Tensor]:
        return slot_pool.tier.slots(index).views(slot_pool.tier.slot_of(index, expert))

    def _put(self, slot_pool: GpuSlotPool, assignment: Assignment, sources: Sequence[torch.Tensor]) -> Arrival:
        """Begin to copy an expert into its slot, behind whatever is still sent there and whatever the GPU still reads there."""
        if assignment.evicted is not None:
            slot_pool.arrived.discard(assignment.evicted)
            if slot_pool is self._full and (gone := self._coming.pop(assignment.evicted, None)) is not None:
                self.link.abandon(gone)
        place, slots = (assignment.layer, assignment.expert), slot_pool.slots(assignment.layer)
        slot_pool.arrived.discard(place)
        after = slot_pool.used.get((slots.kind, assignment.slot))
        arrival = self.link.copy(sources, slots.views(assignment.slot), after=after, urgent=assignment.urgent)
        if slot_pool is self._full:
            self._read.append((place, arrival))
            if len(self._read) > _MANY:
                self._read = [read for read in self._read if not read[1].done]
        return arrival

    def _await(self, slot_pool: GpuSlotPool, place: Place, arrival: Arrival) -> None:
        """Let what the GPU computes from now on see a copy."""
        started = time.perf_counter()
        with on_device(self.device):
            arrival.wait()
        self.wait_seconds += time.perf_counter() - started
        slot_pool.arrived.add(place)
        if slot_pool is self._full:
            self._coming.pop(place, None)

    def _on_gpu(self, total: ExpertSum, slot_pool: GpuSlotPool, index: int, experts: Sequence[int]) -> None:
        """Compute experts whose bytes are in their slots, or are certain to be there when the GPU gets to it."""
        if not experts:
            return
        slots, cache = slot_pool.slots(index), slot_pool.cache(index)
        where = {e: cache.slot_of(index, e) for e in experts}
        with self._timer.of_gpu() as timed:
            total.add_gpu(slots.weights, where)
        if timed.end is not None:
            slot_pool.used |= {(slots.kind, slot): timed.end for slot in where.values()}
        cache.served(index, experts)

    def _fetch_ahead(self, layer: int, experts: list[int]) -> None:
        """Begin to copy what the next layer is predicted to need and host memory holds; what lies on the GPU already stays there."""
        if not experts:
            return
        cache = self._full.cache(layer)
        wanted = [e for e in experts if cache.slot_of(layer, e) >= 0 or self._tier.has(layer, e)]
        for assignment in cache.prefetch(layer, wanted):
            sources = self._sources(self._full, layer, assignment.expert)
            self._coming[layer, assignment.expert] = self._put(self._full, assignment, sources)

    def _not_landed(self, layer: int, needed: Sequence[int]) -> dict[int, Arrival]:
        """The copies of these experts that were predicted and are still on their way, the next to arrive first; those of others of the
        layer come after them."""
        chosen, found = set(needed), {}
        for (where, e), arrival in list(self._coming.items()):
            if where != layer:
                continue
            if e not in chosen:
                self.link.defer(arrival)
            elif arrival.done and self._as_it_comes:
                self._await(self._full, (layer, e), arrival)
            else:
                found[e] = arrival
        return dict(sorted(found.items(), key=lambda item: (item[1].sent == 0, item[1].rank)))

    def _own(self, layer: int) -> bool:
        return self.layers[0] <= layer < self.layers[1]
