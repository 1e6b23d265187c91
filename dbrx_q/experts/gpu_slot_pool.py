"""The slots of one GPU for the experts of a checkpoint or of its fallback copy."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dbrx_q.planning.expert_kinds import ExpertKind

from .cache import ExpertCache
from .host_tier import ExpertId, HostTier
from .policies import CachePolicy
from .slots import ExpertSlots

__all__ = ["GpuSlotPool"]


class GpuSlotPool:
    """A GPU's slots, and the host memory that they are filled from.

    Args:
        device: the GPU.
        tier: host memory.
        slots: how many slots experts of each kind get.
        policies: one for each kind; each may serve one cache only.

    Attributes:
        tier: host memory.
        pools: slots, and the cache that assigns them, by kind of expert.
        last_read: for (kind, slot), the CUDA event after the last product that read the slot.
        arrived: the experts whose bytes are visible to all work that the GPU starts from now on.
    """

    def __init__(
        self, device: torch.device, tier: HostTier, slots: Mapping[ExpertKind, int], policies: Mapping[ExpertKind, CachePolicy]
    ) -> None:
        self.tier = tier
        self.pools = {kind: (ExpertSlots(kind, count, device), ExpertCache(count, policies[kind])) for kind, count in slots.items()}
        self._by_layer = [self.pools.get(tier.kind(layer)) for layer in range(tier.n_layers)]
        self.last_read: dict[tuple[ExpertKind, int], torch.cuda.Event] = {}
        self.arrived: set[ExpertId] = set()

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(slots.nbytes for slots, _ in self.pools.values())

    def slots(self, layer: int) -> ExpertSlots:
        """The memory of the slots for a layer's experts."""
        return self._pool(layer)[0]

    def cache(self, layer: int) -> ExpertCache:
        """The cache that assigns the slots for a layer's experts."""
        return self._pool(layer)[1]

    def host_views(self, layer: int, expert: int) -> list[torch.Tensor]:
        """The tensors of an expert in host memory, which holds it."""
        return self.tier.slots(layer).views(self.tier.slot_of(layer, expert))

    def keep_arrived(self) -> None:
        """After an interruption, free the slots of all experts whose bytes have not arrived."""
        self.arrived = {expert_id for expert_id in self.arrived if self.cache(expert_id[0]).slot_of(*expert_id) >= 0}
        for _, cache in self.pools.values():
            cache.keep_only(self.arrived)

    def _pool(self, layer: int) -> tuple[ExpertSlots, ExpertCache]:
        pool = self._by_layer[layer]
        assert pool is not None, "a GPU has slots for the experts of its own layers only"
        return pool
