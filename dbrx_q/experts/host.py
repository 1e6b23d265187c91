"""The expert store of a CPU: as many experts in memory as a budget holds, the others on disk."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import torch

from ..errors import RequestError
from ..kernels.cpu_moe import ExpertOutputs
from ..kernels.moe import ExpertWeights, Routing, route
from .foresight import Foresight
from .stats import ExpertStats
from .store import ExpertStore
from .tier import HostTier

__all__ = ["HostExpertStore", "NextRouter"]


@dataclass(frozen=True)
class NextRouter:
    """What foresees the experts of a layer from the input of the layer before: its router. weight: [E, D]."""

    weight: torch.Tensor
    top_k: int

    def foresee(self, foresight: Foresight, layer: int, x: torch.Tensor) -> list[int]:
        """Experts of `layer` that are worth fetching, by the input `x` [T, D] of the layer before."""
        chosen = route(x.to(self.weight.device), self.weight, self.top_k, None).experts
        return foresight.guess(layer, chosen.cpu().numpy()) if len(x) else []


class HostExpertStore(ExpertStore):
    """Computes experts where they lie in host memory.

    While an expert is computed the next ones are read. What is computed does not depend on what lay where: the same tokens give the same
    bits with any number of slots, any policy and with or without prefetch.

    Args:
        tier: where the experts lie; closed with the store.
        routers: of every layer, to foresee what the next layer will need and read it meanwhile; None for no prefetch.
    """

    def __init__(self, tier: HostTier, *, routers: Sequence[NextRouter] | None = None) -> None:
        self.tier = tier
        self._routers = routers
        self._foresight = Foresight(tier.n_layers, tier.n_experts)
        self._compute_seconds = 0.0

    def forward(self, index: int, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        outputs = ExpertOutputs(x, routing.experts)
        needed = list(outputs.counts)
        ahead = self._ahead(index, x, needed)
        slots = self.tier.slots(index)
        with closing(self.tier.serve(index, needed, ahead)) as groups:
            for experts in groups:
                started = time.perf_counter()
                outputs.add(slots.weights, {e: self.tier.slot_of(index, e) for e in experts})
                self._compute_seconds += time.perf_counter() - started
        return outputs.total(routing.weights).to(x.dtype)

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
        foresight, reader = self._foresight, self.tier.reader
        times = self._compute_seconds, self.tier.wait_seconds, reader.busy_seconds
        return ExpertStats(self.tier.stats, foresight.foreseen, foresight.needed, reader.bytes_read, *times)

    def close(self) -> None:
        self.tier.close()

    def _ahead(self, index: int, x: torch.Tensor, needed: list[int]) -> list[int]:
        """The experts of the next layer to fetch, after a look at how the last guess came true."""
        if self._routers is None:
            return []
        self._foresight.judge(index, needed)
        return self._routers[index + 1].foresee(self._foresight, index + 1, x) if index + 1 < len(self._routers) else []
