"""The expert store of GPUs: a cache of experts on each GPU, host memory below them, disk below that."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

import numpy as np
import torch

from dbrx_q.errors import RequestError
from dbrx_q.kernels.formats.expert_weights import ExpertWeights

from .cache import Assignment
from .gpu_experts import GpuExperts
from .host_tier import HostTier
from .link import Link
from .stats import CacheStats, ExpertStats, LinkStats
from .sums import ExpertSum
from .tiered_store import FallbackCopy, NextRouter, TieredExpertStore

__all__ = ["GpuExpertStore"]


class GpuExpertStore(TieredExpertStore):
    """The experts of a model whose layers are split over GPUs.

    Args:
        gpus: in the order of their layers.
        tier, prefetch, routers, fallback: see `TieredExpertStore`.
        links: of all GPUs, with or without slots; closed with the store.
    """

    def __init__(
        self,
        gpus: Sequence[GpuExperts],
        tier: HostTier,
        *,
        links: Sequence[Link],
        prefetch: bool,
        routers: Sequence[NextRouter] | None = None,
        fallback: FallbackCopy | None = None,
    ) -> None:
        super().__init__(tier, prefetch=prefetch, routers=routers, fallback=fallback)
        self.gpus, self._links = tuple(gpus), tuple(links)

    @property
    def memory_bytes(self) -> int:
        return super().memory_bytes + sum(gpu.nbytes for gpu in self.gpus)

    def fill(self, priority: np.ndarray | None = None) -> None:
        """Read the likeliest experts onto the GPUs, then the others into host memory.

        Args:
            priority: [L, E], how likely each expert is; None for equally many of each layer.

        Raises:
            CheckpointError: an expert cannot be read, or is damaged.
        """
        assignments = [(gpu, assignment) for gpu in self.gpus for assignment in gpu.initial_assignments(priority)]
        on_gpus = [(assignment.layer, assignment.expert) for _, assignment in assignments]
        on_both = set(self.tier.initial_experts(priority, on_gpus))
        for gpu, assignment in assignments:
            layer, expert = assignment.layer, assignment.expert
            if (layer, expert) not in on_both:  # it only passes through host memory
                with closing(self.tier.serve(layer, [expert])) as groups:
                    for _ in groups:
                        self._copy_to_gpu(gpu, assignment)
        self.tier.clear()
        self.tier.fill(priority, last=on_gpus)
        for gpu, assignment in assignments:
            if (assignment.layer, assignment.expert) in on_both:
                self._copy_to_gpu(gpu, assignment)
        self._fill_fallback()
        self._choose_eviction_rule()

    def layer(self, index: int, experts: torch.Tensor) -> ExpertWeights:
        raise RequestError("this request needs a layer's experts in one memory; they are on GPUs and in host memory. Leave --gpu out")

    def stats(self) -> ExpertStats:
        with self._lock:
            reader = self.tier.reader
            predicted, predictable = self._prediction_counts()
            return ExpertStats(
                cache=sum((gpu.stats for gpu in self.gpus), CacheStats()),
                predicted=predicted,
                predictable=predictable,
                disk_bytes=reader.bytes_read,
                compute_seconds=sum(gpu.compute_seconds for gpu in self.gpus),
                wait_seconds=sum(gpu.wait_seconds for gpu in self.gpus) + self.tier.wait_seconds,
                read_seconds=reader.busy_seconds,
                host=self.tier.stats,
                computed_on_cpu=sum(gpu.computed_on_cpu for gpu in self.gpus),
                links=tuple(LinkStats(gpu.name, gpu.link.bytes_copied, gpu.link.busy_seconds) for gpu in self.gpus),
                fallback_hits=sum(gpu.fallback_hits for gpu in self.gpus),
            )

    def close(self) -> None:
        with self._lock:
            for link in self._links:
                link.close()
            super().close()

    def _choose_eviction_rule(self) -> None:
        """Set what may be evicted, by how much host memory holds after filling."""
        in_host = self.tier.held()
        if in_host.all():
            return  # any GPU may evict any expert
        everything_in_memory = (in_host | self._on_gpus()).all()
        if everything_in_memory or self.fallback is not None:
            # An expert that a GPU evicted would have to be read from disk again, or be replaced by the fallback copy.
            for gpu in self.gpus:
                gpu.evict_only_what_host_holds()
        else:  # as many different experts in memory as possible: host memory first evicts those that a GPU holds, too
            self.tier.prefer_to_evict(self._on_gpus)

    def _on_gpus(self) -> np.ndarray:
        """bool [L * E]: experts on a GPU, except prefetched ones, whose copies may still need host memory."""
        on_gpus = np.any([cache.held for gpu in self.gpus for cache in gpu.caches], axis=0)
        for layer, expert in [expert_id for gpu in self.gpus for expert_id in gpu.copies.predicted]:
            on_gpus[layer * self.tier.n_experts + expert] = False
        return on_gpus

    def _copy_to_gpu(self, gpu: GpuExperts, assignment: Assignment) -> None:
        slot = self.tier.slot_of(assignment.layer, assignment.expert)
        gpu.copy_now(assignment, self.tier.slots(assignment.layer).views(slot))

    def _serve(self, index: int, expert_sum: ExpertSum, needed: list[int], ahead: list[int]) -> None:
        try:
            self._gpu(index).serve(index, expert_sum, needed, ahead)
        except BaseException:
            for gpu in self.gpus:  # copies to other GPUs may still read host slots that are free now
                gpu.link.drain()
            raise

    def _prefetches_after(self, index: int) -> bool:
        return index + 1 < self._gpu(index).layers[1]

    def _gpu(self, layer: int) -> GpuExperts:
        return next(gpu for gpu in self.gpus if gpu.layers[0] <= layer < gpu.layers[1])
