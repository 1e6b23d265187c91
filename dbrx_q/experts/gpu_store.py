"""The expert store of gpus: a cache of experts on each, host memory under them, disk under that."""

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
    """Experts of a model whose layers are split over GPUs.

    Args:
        gpus: in the order of their layers.
        links: all that were made for them; closed with the store.
        tier, prefetch, routers, fallback: as of `TieredExpertStore`.
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

    def fill(self, priority: np.ndarray | None = None) -> None:
        """Bring the likeliest experts onto the GPUs, then the others into host memory.

        Raises:
            CheckpointError: an expert cannot be read, or is damaged.
        """
        chosen = [(gpu, assignment) for gpu in self.gpus for assignment in gpu.choose(priority)]
        held = [(assignment.layer, assignment.expert) for _, assignment in chosen]
        stays = set(self.tier.first(priority, held))
        for gpu, assignment in chosen:
            place = assignment.layer, assignment.expert
            if place not in stays:  # it passes through
                with closing(self.tier.serve(place[0], [place[1]])) as groups:
                    for _ in groups:
                        self._bring(gpu, assignment)
        self.tier.forget()
        self.tier.fill(priority, last=held)
        for gpu, assignment in chosen:
            if (assignment.layer, assignment.expert) in stays:
                self._bring(gpu, assignment)
        self._fill_fallback()
        here = self.tier.held()
        if here.all():
            return
        if (
            here | self._on_gpus()
        ).all() or self.fallback is not None:  # what a GPU gave up would come from disk, or from the fallback copy
            for gpu in self.gpus:
                gpu.keep_what_is_nowhere_else()
        else:  # memory for the most experts: what lies on a GPU need not lie here, too
            self.tier.prefer_to_evict(self._on_gpus)

    def _bring(self, gpu: GpuExperts, assignment: Assignment) -> None:
        slot = self.tier.slot_of(assignment.layer, assignment.expert)
        gpu.bring(assignment, self.tier.slots(assignment.layer).views(slot))

    def _on_gpus(self) -> np.ndarray:
        """bool [L * E]: experts that a GPU holds, but for those that are still wanted here, to be copied."""
        found = np.any([cache.held for gpu in self.gpus for cache in gpu.caches], axis=0)
        for layer, expert in (place for gpu in self.gpus for place in gpu.coming):
            found[layer * self.tier.n_experts + expert] = False
        return found

    def layer(self, index: int, experts: torch.Tensor) -> ExpertWeights:
        raise RequestError("this needs the experts of a layer in one memory; they lie on GPUs and in host memory. Leave --gpu out")

    def stats(self) -> ExpertStats:
        reader = self.tier.reader
        predicted, predictable = self._guessed()
        return ExpertStats(
            cache=sum((gpu.stats for gpu in self.gpus), CacheStats()),
            predicted=predicted,
            predictable=predictable,
            disk_bytes=reader.bytes_read,
            compute_seconds=sum(gpu.compute_seconds for gpu in self.gpus),
            wait_seconds=sum(gpu.wait_seconds for gpu in self.gpus) + self.tier.wait_seconds,
            read_seconds=reader.busy_seconds,
            host=self.tier.stats,
            on_cpu=sum(gpu.on_cpu for gpu in self.gpus),
            links=tuple(LinkStats(gpu.name, gpu.link.bytes_copied, gpu.link.busy_seconds) for gpu in self.gpus),
            fallback_hits=sum(gpu.fallback_hits for gpu in self.gpus),
        )

    def close(self) -> None:
        for link in self._links:
            link.close()
        super().close()

    def _serve(self, index: int, total: ExpertSum, needed: list[int], ahead: list[int]) -> None:
        try:
            self._gpu(index).serve(index, total, needed, ahead)
        except BaseException:
            for gpu in self.gpus:  # host memory that is free now may still be read by another's copies
                gpu.link.settle()
            raise

    def _follows(self, index: int) -> bool:
        return index + 1 < self._gpu(index).layers[1]

    def _gpu(self, layer: int) -> GpuExperts:
        return next(gpu for gpu in self.gpus if gpu.layers[0] <= layer < gpu.layers[1])
