"""The copies of experts to one GPU that are under way: which were predicted, which still read host memory, when the GPU sees them.

`gpu_experts.py` decides what to copy; `link.py` moves the bytes. This file keeps slots, caches and copies consistent with each other.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from .cache import Assignment
from .gpu_slot_pool import GpuSlotPool
from .host_tier import ExpertId
from .link import Link, PendingCopy
from .streams import on_device

__all__ = ["GpuCopies"]

_MAX_REMEMBERED = 64  # copies that are remembered before finished ones are forgotten


class GpuCopies:
    """Starts copies from host memory into a GPU's slots, and keeps track of them until they are used.

    Args:
        device: the GPU.
        link: copies to it.
        main: the GPU's slots for the checkpoint's own experts; only these are prefetched.
        adaptive: whether decisions depend on which copies have arrived. Without, they do not depend on the speed of copies, so a
            simulation reaches the same counters.

    Attributes:
        predicted: prefetched experts that were not used yet, and their copies.
        wait_seconds: for which the CPU waited for copies.
    """

    def __init__(self, device: torch.device, link: Link, main: GpuSlotPool, *, adaptive: bool) -> None:
        self._device, self._link, self._main, self._adaptive = device, link, main, adaptive
        self.predicted: dict[ExpertId, PendingCopy] = {}
        self._reading: list[tuple[ExpertId, PendingCopy]] = []  # every copy of `main` that may still read host memory
        self.wait_seconds = 0.0

    def start(self, pool: GpuSlotPool, assignment: Assignment, sources: Sequence[torch.Tensor]) -> PendingCopy:
        """Start to copy an expert into its slot, after all earlier copies into the slot and all GPU work that reads it."""
        if assignment.evicted is not None:
            pool.arrived.discard(assignment.evicted)
            if pool is self._main and (evicted := self.predicted.pop(assignment.evicted, None)) is not None:
                self._link.cancel(evicted)
        expert_id, slots = (assignment.layer, assignment.expert), pool.slots(assignment.layer)
        pool.arrived.discard(expert_id)
        after = pool.last_read.get((slots.kind, assignment.slot))
        pending = self._link.copy(sources, slots.views(assignment.slot), after=after, urgent=assignment.urgent)
        if pool is self._main:
            self._reading.append((expert_id, pending))
            if len(self._reading) > _MAX_REMEMBERED:
                self._reading = [(reading_id, copy) for reading_id, copy in self._reading if not copy.done]
        return pending

    def start_missed(self, pool: GpuSlotPool, layer: int, experts: Sequence[int]) -> dict[int, PendingCopy]:
        """Start to copy those of a layer's missed experts that host memory holds, as far as slots can be had."""
        started: dict[int, PendingCopy] = {}
        for e in experts:
            if pool.tier.holds(layer, e) and (assignment := pool.cache(layer).assign(layer, e)) is not None:
                started[e] = self.start(pool, assignment, pool.host_views(layer, e))
        return started

    def prefetch(self, layer: int, experts: list[int]) -> None:
        """Start to copy the experts that the next layer is predicted to need and host memory holds; keep those that the GPU holds."""
        if not experts:
            return
        cache = self._main.cache(layer)
        available = [e for e in experts if cache.slot_of(layer, e) >= 0 or self._main.tier.holds(layer, e)]
        for assignment in cache.prefetch(layer, available):
            sources = self._main.host_views(layer, assignment.expert)
            self.predicted[layer, assignment.expert] = self.start(self._main, assignment, sources)

    def predicted_under_way(self, layer: int, needed: Sequence[int]) -> dict[int, PendingCopy]:
        """The prefetches of these experts of a layer that are still under way, the next to arrive first.

        Prefetches of the layer's other experts, which were predicted wrongly, are deferred behind all other copies.
        """
        chosen, under_way = set(needed), {}
        for (copy_layer, e), pending in list(self.predicted.items()):
            if copy_layer != layer:
                continue
            if e not in chosen:
                self._link.defer(pending)
            elif pending.done and self._adaptive:
                self.wait(self._main, (layer, e), pending)
            else:
                under_way[e] = pending
        return dict(sorted(under_way.items(), key=lambda item: (item[1].sent == 0, item[1].rank)))

    def wait(self, pool: GpuSlotPool, expert_id: ExpertId, pending: PendingCopy) -> None:
        """Make the copied expert visible to all work that the GPU starts from now on."""
        started = time.perf_counter()
        with on_device(self._device):
            pending.wait()
        self.wait_seconds += time.perf_counter() - started
        pool.arrived.add(expert_id)
        if pool is self._main:
            self.predicted.pop(expert_id, None)

    def wait_until_unread(self, expert_id: ExpertId) -> None:
        """Return when no copy reads an expert in host memory any more, so that its slot there can be overwritten."""
        started = time.perf_counter()
        pending = self.predicted.get(expert_id)
        if pending is not None and not pending.done and not pending.urgent and self._adaptive:  # a prefetch that no layer waits for
            self._link.cancel(self.predicted.pop(expert_id))
            self._main.cache(expert_id[0]).drop(*expert_id)
        for reading_id, copy in self._reading:
            if reading_id == expert_id and not copy.done:
                self._link.prioritize(copy)
                copy.join()
        self._reading = [(reading_id, copy) for reading_id, copy in self._reading if not copy.done]
        self.wait_seconds += time.perf_counter() - started

    def cancel_all(self) -> None:
        """After an error: cancel all prefetches, and return when the link is idle."""
        for pending in self.predicted.values():
            self._link.cancel(pending)
        self.predicted.clear()
        self._link.drain()
