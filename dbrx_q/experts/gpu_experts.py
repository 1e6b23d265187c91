"""The experts of one GPU: a cache of them in its memory, and host memory below it.

What happens when a layer needs its experts (`GpuExperts.serve`):

1. Misses are split (`split.py`): the CPU computes some of them from host memory, the others are copied. These copies start.
2. The GPU computes the hits. Copies that found no slot before start, then those that the next layer is predicted to need.
3. The CPU computes its share of the misses. Experts that are only on disk are read into host memory first (`host_tier.py`).
4. The GPU computes each copied expert as soon as it has arrived.

With a fallback copy, experts that are only on disk are replaced by the copy's, which are then computed or copied like the others.
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
from .gpu_copies import GpuCopies
from .gpu_slot_pool import GpuSlotPool
from .host_tier import HostTier, fill_order
from .link import Link, PendingCopy
from .policies import CachePolicy, Lru
from .split import MissRates, split_misses
from .stats import CacheStats
from .streams import StreamOrder
from .sums import ExpertSum
from .tiered_store import FallbackCopy
from .timer import Timer

__all__ = ["GpuExperts"]


@dataclass(frozen=True)
class _Batch:
    """The experts of a layer that one slot pool serves, by the way in which they are served."""

    pool: GpuSlotPool
    """The slot pool."""
    hits: list[int]
    """Experts on the GPU."""
    cpu_misses: list[int]
    """Missed experts that the CPU computes."""
    copied_misses: list[int]
    """Missed experts that are copied as soon as host memory holds them and a slot can be had."""
    under_way: dict[int, PendingCopy]
    """Copies in the order in which they arrive: first prefetches of needed experts, then those of `copied_misses`."""

    @property
    def missed(self) -> list[int]:
        """The experts that host memory must hold, in ascending order."""
        return sorted([*self.cpu_misses, *self.copied_misses])


class GpuExperts:
    """The experts of one GPU's layers.

    Args:
        device: the GPU.
        layers: (first, end) of the layers that it computes.
        tier: host memory below it.
        link: copies from host memory to it.
        name: of the GPU in the plan.
        slots: how many slots experts of each kind get.
        policies: one for each kind; each may serve one cache only.
        miss_policy: how missed experts are served.
        rates: of the CPU and of the link, for the split of misses.
        fallback: replaces experts that are only on disk; None without.
        fallback_slots: how many slots the fallback copy's experts of each kind get.

    Attributes:
        copies: those to this GPU that are under way.
        rates: of the CPU and of the link, corrected by every layer that is served.
        computed_on_cpu: how many misses the CPU computed.
        fallback_hits: how many misses the fallback copy served.
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
        # "cpu" and "copy" make decisions that do not depend on the speed of copies, so a simulation reaches the same counters.
        self._adaptive = miss_policy is MissPolicy.hybrid
        self._main_pool = GpuSlotPool(device, tier, slots, policies)
        self._fallback_pool: GpuSlotPool | None = None
        self._upgrade = False
        if fallback is not None:
            L, E = tier.n_layers, tier.n_experts
            self._fallback_pool = GpuSlotPool(device, fallback.tier, fallback_slots, {kind: Lru(L, E) for kind in fallback_slots})
            self._upgrade = fallback.upgrade
        link.follow()  # the slots were allocated
        self._order = StreamOrder(device)
        self.copies = GpuCopies(device, link, self._main_pool, adaptive=self._adaptive)
        tier.slot_readers.add(self.copies)
        self._link_seen = 0, 0.0  # bytes and busy seconds of the link that `rates` already include
        self.computed_on_cpu = self.fallback_hits = 0
        self._timer = Timer(device)

    @property
    def compute_seconds(self) -> float:
        """Time in products of experts, on the GPU and on the CPU; waits for the GPU."""
        return self._timer.seconds

    @property
    def wait_seconds(self) -> float:
        """Time for which the CPU waited for copies."""
        return self.copies.wait_seconds

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(pool.nbytes for pool in self._pools)

    @property
    def stats(self) -> CacheStats:
        """Counters of the slots for the checkpoint's own experts."""
        return sum((cache.stats for cache in self.caches), CacheStats())

    @property
    def caches(self) -> list[ExpertCache]:
        """The caches of the slots for the checkpoint's own experts, one for each kind."""
        return [cache for _, cache in self._main_pool.pools.values()]

    def evict_only_what_host_holds(self) -> None:
        """From now on, evict only experts that host memory holds too."""
        for cache in self.caches:
            cache.evictable = self._tier.held

    def initial_assignments(self, priority: np.ndarray | None) -> list[Assignment]:
        """Assign slots to the likeliest experts, by `priority` [L, E]; scratch slots stay free."""
        order = [expert_id for expert_id in fill_order(self._tier.n_layers, self._tier.n_experts, priority) if self._computes(expert_id[0])]
        assignments = []
        for kind, (slots, cache) in self._main_pool.pools.items():
            of_kind = [expert_id for expert_id in order if self._tier.kind(expert_id[0]) == kind]
            assignments += cache.fill(of_kind[: initial_slots(slots.count, len(of_kind))])
        return assignments

    def copy_now(self, assignment: Assignment, sources: Sequence[torch.Tensor]) -> None:
        """Copy an expert into its slot, and return when its host memory is no longer read."""
        pending = self.copies.start(self._main_pool, assignment, sources)
        self.copies.wait(self._main_pool, (assignment.layer, assignment.expert), pending)

    def use_rates(self, rates: MissRates) -> None:
        """Split misses by rates that were just measured; earlier traffic of the link no longer corrects them."""
        self.rates, self._link_seen = rates, (self.link.bytes_copied, self.link.busy_seconds)

    def free_slot(self, layer: int) -> int | None:
        """An empty slot for the experts of a layer; None if all are taken."""
        return self._main_pool.cache(layer).free_slot

    def slot_views(self, layer: int, slot: int) -> list[torch.Tensor]:
        """The tensors of a slot for the experts of a layer."""
        return self._main_pool.slots(layer).views(slot)

    def serve(self, index: int, expert_sum: ExpertSum, needed: list[int], ahead: list[int]) -> None:
        """Add the experts that layer `index` needs to the sum; prefetch experts of the next layer, which this GPU computes too.

        Args:
            index: the layer.
            expert_sum: computes the experts and adds them up.
            needed: the layer's experts, in ascending order.
            ahead: experts that the next layer is predicted to need, the likeliest first.
        """
        self._order.follow()
        try:
            self._serve(index, expert_sum, needed, ahead)
        except BaseException:
            self.recover()
            raise

    def recover(self) -> None:
        """After an error: free the slots of all experts that have not arrived for certain, and cancel all copies."""
        for pool in self._pools:
            pool.keep_arrived()
        self.copies.cancel_all()

    @property
    def _pools(self) -> list[GpuSlotPool]:
        return [self._main_pool] if self._fallback_pool is None else [self._main_pool, self._fallback_pool]

    def _serve(self, index: int, expert_sum: ExpertSum, needed: list[int], ahead: list[int]) -> None:
        fallback = self._served_by_fallback(index, needed)
        batches = [self._start(self._main_pool, index, expert_sum, [e for e in needed if e not in set(fallback)])]
        if self._fallback_pool is not None and fallback:
            batches.append(self._start(self._fallback_pool, index, expert_sum, fallback))
        for batch in batches:
            self._compute_on_gpu(expert_sum, batch.pool, index, batch.hits)
            # Computing the hits has released their slots.
            waiting = [e for e in batch.copied_misses if e not in batch.under_way]
            batch.under_way.update(self.copies.start_missed(batch.pool, index, waiting))
        if all(self._all_started(batch, index) for batch in batches):  # otherwise this layer will still use the link
            self.copies.prefetch(index + 1, ahead)
        absent = [e for e in ahead if self._main_pool.cache(index + 1).slot_of(index + 1, e) < 0]
        for batch in batches:
            self._finish(batch, index, expert_sum, absent if self._fallback_pool is None else [])
        if fallback:
            self._main_pool.cache(index).record_miss(index, fallback)
            self._tier.record_fallback_hits(index, fallback, upgrade=self._upgrade)
            self.fallback_hits += len(fallback)
        self.copies.prefetch(index + 1, ahead)  # those that found no slot while this layer needed its own
        self._correct_link_rate()

    def _served_by_fallback(self, index: int, needed: Sequence[int]) -> list[int]:
        """Those of a layer's experts that are neither on the GPU nor in host memory, if there is a fallback copy."""
        if self._fallback_pool is None:
            return []
        cache = self._main_pool.cache(index)
        return [e for e in needed if cache.slot_of(index, e) < 0 and not self._tier.ready(index, e)]

    def _start(self, pool: GpuSlotPool, index: int, expert_sum: ExpertSum, needed: Sequence[int]) -> _Batch:
        """Decide how a pool serves experts of a layer, and start the copies that find a slot at once."""
        kind, cache = pool.tier.kind(index), pool.cache(index)
        if self._adaptive:
            pool.tier.poll_loads(index)
        missed = {e: expert_sum.counts[e] for e in needed if cache.slot_of(index, e) < 0}
        prefetches = self.copies.predicted_under_way(index, needed) if pool is self._main_pool else {}
        unsent = {e: (expert_sum.counts[e], copy.nbytes - copy.sent) for e, copy in prefetches.items() if pool.tier.holds(index, e)}
        queued_bytes = self.link.bytes_before(prefetches.values())
        cpu_misses, copied_misses = split_misses(missed, kind.nbytes, self.rates, self._miss_policy, unsent, queued_bytes)
        present, _ = cache.request(index, [e for e in needed if e not in set(cpu_misses)])
        cache.record_miss(index, cpu_misses)
        for e in [e for e in prefetches if e in set(cpu_misses)]:
            self.link.defer(prefetches.pop(e))
        for pending in prefetches.values():
            self.link.prioritize(pending)
        hits = [e for e in present if e not in prefetches]
        return _Batch(pool, hits, cpu_misses, copied_misses, prefetches | self.copies.start_missed(pool, index, copied_misses))

    def _all_started(self, batch: _Batch, index: int) -> bool:
        """Whether no expert of the batch waits for the disk, or for a slot."""
        return all(e in batch.under_way for e in batch.copied_misses) and all(batch.pool.tier.holds(index, e) for e in batch.cpu_misses)

    def _finish(self, batch: _Batch, index: int, expert_sum: ExpertSum, ahead: Sequence[int]) -> None:
        """Add a batch's experts that are not on the GPU yet; meanwhile read experts of `ahead` from disk into host memory."""
        pool, under_way, on_cpu = batch.pool, batch.under_way, set(batch.cpu_misses)
        with closing(pool.tier.serve(index, batch.missed, ahead)) as groups:
            for experts in groups:
                cpu_misses = [e for e in experts if e in on_cpu]
                waiting = [e for e in experts if e not in on_cpu and e not in under_way]
                while cpu_misses or waiting:
                    for e in [e for e, pending in under_way.items() if pending.done and self._adaptive]:
                        self._compute_copied(expert_sum, pool, index, under_way, e)
                    started = self.copies.start_missed(pool, index, waiting)
                    under_way |= started
                    waiting = [e for e in waiting if e not in started]
                    if cpu_misses:  # one by one, so that the GPU and the link get work as soon as possible
                        now = cpu_misses[:1] if self._adaptive and (under_way or waiting) else cpu_misses
                        self._compute_on_cpu(expert_sum, pool, index, now)
                        cpu_misses = cpu_misses[len(now) :]
                    elif waiting and under_way:  # computing another copied expert releases its slot
                        self._compute_copied(expert_sum, pool, index, under_way, next(iter(under_way)))
                    elif waiting:  # no slot can be had
                        self._compute_on_cpu(expert_sum, pool, index, [waiting.pop(0)])
        while under_way:
            self._compute_copied(expert_sum, pool, index, under_way, next(iter(under_way)))

    def _compute_on_gpu(self, expert_sum: ExpertSum, pool: GpuSlotPool, index: int, experts: Sequence[int]) -> None:
        """Compute experts whose bytes are in their GPU slots, or will be when the GPU reaches this work."""
        if not experts:
            return
        slots, cache = pool.slots(index), pool.cache(index)
        slot_by_expert = {e: cache.slot_of(index, e) for e in experts}
        with self._timer.gpu_work() as timed:
            expert_sum.add_gpu(slots.weights, slot_by_expert)
        if timed.end is not None:
            pool.last_read |= {(slots.kind, slot): timed.end for slot in slot_by_expert.values()}
        cache.release(index, experts)

    def _compute_copied(self, expert_sum: ExpertSum, pool: GpuSlotPool, index: int, under_way: dict[int, PendingCopy], expert: int) -> None:
        """Wait for the copy of an expert, and compute it on the GPU."""
        self.copies.wait(pool, (index, expert), under_way.pop(expert))
        self._compute_on_gpu(expert_sum, pool, index, [expert])

    def _compute_on_cpu(self, expert_sum: ExpertSum, pool: GpuSlotPool, index: int, experts: Sequence[int]) -> None:
        """Let the CPU compute experts in host memory."""
        tier = pool.tier
        started = time.perf_counter()
        expert_sum.add_host(tier.slots(index).weights, {e: tier.slot_of(index, e) for e in experts})
        seconds = time.perf_counter() - started
        self._timer.add(seconds)
        self.computed_on_cpu += len(experts)
        if all(expert_sum.counts[e] == 1 for e in experts):
            self.rates.observe(cpu_bytes=len(experts) * tier.kind(index).nbytes, cpu_seconds=seconds)

    def _correct_link_rate(self) -> None:
        """Correct the rate of the link by what it copied since the last call."""
        copied_bytes, busy_seconds = self.link.bytes_copied, self.link.busy_seconds
        self.rates.observe(link_bytes=copied_bytes - self._link_seen[0], link_seconds=busy_seconds - self._link_seen[1])
        self._link_seen = copied_bytes, busy_seconds

    def _computes(self, layer: int) -> bool:
        return self.layers[0] <= layer < self.layers[1]
