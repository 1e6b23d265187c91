"""The expert store of a CPU: as many experts in memory as a budget holds, the others on disk."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

import torch

from dbrx_q.errors import RequestError
from dbrx_q.kernels.formats.expert_weights import ExpertWeights

from .host_tier import HostTier
from .stats import ExpertStats
from .sums import ExpertSum
from .tiered_store import FallbackCopy, NextRouter, TieredExpertStore

__all__ = ["CpuExpertStore"]


class CpuExpertStore(TieredExpertStore):
    """Computes experts where they lie in host memory.

    While an expert is computed the next ones are read. Without a fallback copy, what is computed does not depend on what lay where: the
    same
    tokens give the same bits with any number of slots, any policy and with or without prefetch.

    Args:
        tier, prefetch, routers, fallback: as of `TieredExpertStore`.
    """

    def __init__(
        self, tier: HostTier, *, prefetch: bool, routers: Sequence[NextRouter] | None = None, fallback: FallbackCopy | None = None
    ) -> None:
        super().__init__(tier, prefetch=prefetch, routers=routers, fallback=fallback)
        self._compute_seconds = 0.0
        self._fallback_hits = 0

    def layer(self, index: int, experts: torch.Tensor) -> ExpertWeights:
        needed, slots = experts.unique().tolist(), self.tier.slots(index)
        if len(needed) > slots.count:
            raise RequestError(
                f"this needs the experts of a layer in memory together; it uses {len(needed)} and the budget holds {slots.count}. "
                "Give more memory"
            )
        self.tier.gather(index, needed)
        where = torch.full((self.tier.n_experts,), -1, dtype=torch.int32)
        for e in needed:
            where[e] = self.tier.slot_of(index, e)
        return replace(slots.weights, slots=where)

    def stats(self) -> ExpertStats:
        reader = self.tier.reader
        times = self._compute_seconds, self.tier.wait_seconds, reader.busy_seconds
        return ExpertStats(self.tier.stats, *self._guessed(), reader.bytes_read, *times, fallback_hits=self._fallback_hits)

    def _serve(self, index: int, total: ExpertSum, needed: list[int], ahead: list[int]) -> None:
        if self.fallback is None:
            self._add(self.tier, index, total, needed, ahead)
            return
        full = [e for e in needed if self.tier.ready(index, e)]
        fallback = [e for e in needed if e not in set(full)]
        self._add(self.tier, index, total, full)
        self.tier.serve_from_fallback(index, fallback, upgrade=self.fallback.upgrade)
        self._add(self.fallback.tier, index, total, fallback)
        self._fallback_hits += len(fallback)

    def _add(self, tier: HostTier, index: int, total: ExpertSum, needed: list[int], ahead: Sequence[int] = ()) -> None:
        slots = tier.slots(index)
        with closing(tier.serve(index, needed, ahead)) as groups:
            for experts in groups:
                started = time.perf_counter()
                total.add_host(slots.weights, {e: tier.slot_of(index, e) for e in experts})
                self._compute_seconds += time.perf_counter() - started
