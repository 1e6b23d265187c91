"""The expert store of a CPU: as many experts in host memory as a budget allows, the others on disk."""

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
    """Computes experts in host memory; while one is computed, the next ones are read.

    Without a fallback copy, the result does not depend on which experts were in memory: the same tokens give the same bits with any number
    of slots, any policy, and with or without prefetch.

    Args:
        tier, prefetch, routers, fallback: see `TieredExpertStore`.
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
                f"this request needs a layer's experts in memory together; it uses {len(needed)} and the budget holds {slots.count}. "
                "Give more memory"
            )
        slot_by_expert = torch.full((self.tier.n_experts,), -1, dtype=torch.int32)
        with self._lock:
            self.tier.load_all(index, needed)
            for e in needed:
                slot_by_expert[e] = self.tier.slot_of(index, e)
        return replace(slots.weights, slots=slot_by_expert)

    def stats(self) -> ExpertStats:
        with self._lock:
            reader = self.tier.reader
            predicted, predictable = self._prediction_counts()
            return ExpertStats(
                cache=self.tier.stats,
                predicted=predicted,
                predictable=predictable,
                disk_bytes=reader.bytes_read,
                compute_seconds=self._compute_seconds,
                wait_seconds=self.tier.wait_seconds,
                read_seconds=reader.busy_seconds,
                fallback_hits=self._fallback_hits,
            )

    def _serve(self, index: int, expert_sum: ExpertSum, needed: list[int], ahead: list[int]) -> None:
        if self.fallback is None:
            self._add(self.tier, index, expert_sum, needed, ahead)
            return
        in_memory = [e for e in needed if self.tier.ready(index, e)]
        fallback = [e for e in needed if e not in set(in_memory)]
        self._add(self.tier, index, expert_sum, in_memory)
        self.tier.record_fallback_hits(index, fallback, upgrade=self.fallback.upgrade)
        self._add(self.fallback.tier, index, expert_sum, fallback)
        self._fallback_hits += len(fallback)

    def _add(self, tier: HostTier, index: int, expert_sum: ExpertSum, needed: list[int], ahead: Sequence[int] = ()) -> None:
        slots = tier.slots(index)
        with closing(tier.serve(index, needed, ahead)) as groups:
            for experts in groups:
                started = time.perf_counter()
                expert_sum.add_host(slots.weights, {e: tier.slot_of(index, e) for e in experts})
                self._compute_seconds += time.perf_counter() - started
