"""A GPU's slots for one copy of its experts."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dbrx_q.planning.expert_kinds import ExpertKind

from .cache import ExpertCache
from .host_tier import HostTier, Place
from .policies import CachePolicy
from .slots import ExpertSlots

__all__ = ["GpuSlotPool"]


class GpuSlotPool:
    """A GPU's slots for one copy of the experts, and the host memory that fills them.

    Args:
        device: the GPU.
        tier: the host memory.
        slots, policies: of each kind of experts.

    Attributes:
        pools: slots and who lies in them, by kind.
        used: when the GPU has read a slot for the last time.
        arrived: (layer, expert) of those whose bytes the GPU is certain to see.
    """

    def __init__(
        self, device: torch.device, tier: HostTier, slots: Mapping[ExpertKind, int], policies: Mapping[ExpertKind, CachePolicy]
    ) -> None:
        self.tier = tier
        self.pools = {kind: (ExpertSlots(kind, count, device), ExpertCache(count, policies[kind])) for kind, count in slots.items()}
        self._by_layer = [self.pools.get(tier.kind(layer)) for layer in range(tier.n_layers)]
        self.used: dict[tuple[ExpertKind, int], torch.cuda.Event] = {}
        self.arrived: set[Place] = set()

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(slots.nbytes for slots, _ in self.pools.values())

    def slots(self, layer: int) -> ExpertSlots:
        """For the experts of a layer."""
        return self._pool(layer)[0]

    def cache(self, layer: int) -> ExpertCache:
        """Who lies in them."""
        return self._pool(layer)[1]

    def keep_arrived(self) -> None:
        """Whatever was broken off, a slot is believed to hold an expert only where its bytes have arrived."""
        self.arrived = {place for place in self.arrived if self.cache(place[0]).slot_of(*place) >= 0}
        for _, cache in self.pools.values():
            cache.keep_only(self.arrived)

    def _pool(self, layer: int) -> tuple[ExpertSlots, ExpertCache]:
        found = self._by_layer[layer]
        assert found is not None, "the GPU has slots for the kinds of its layers alone"
        return found
